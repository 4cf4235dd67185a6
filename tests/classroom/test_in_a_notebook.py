"""checks.status() and checks.hint() in a notebook say what the command says in a terminal."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from minidora.classroom import folder as folders


def outputs(folder: Path, *sources: str) -> list[Any]:
    """What the cells of a notebook in a folder put out."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in sources])
    NotebookClient(
        notebook, timeout=1800, allow_errors=True, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [output for cell in notebook.cells for output in cell.outputs]


def text(output: Any) -> str:
    return str(output.get("text", "") or output.get("data", {}).get("text/plain", ""))


@pytest.mark.slow
def test_status_and_hint(tmp_path: Path) -> None:
    folders.start(tmp_path / "work")
    found = outputs(
        tmp_path / "work" / "exercises",
        "from minidora import checks",
        "checks.status()",
        "checks.hint('3.2')",
        "checks.hint('9.9')",
    )
    said = "".join(map(text, found))
    assert not any(output.output_type == "error" for output in found)
    assert "not started" in said
    assert "Next: 1.1" in said
    assert "To divide row by row" in said
    assert "there is no exercise 9.9: there are 1.1, 1.2" in said


def test_elsewhere_it_is_a_sentence_without_a_stack(tmp_path: Path) -> None:
    found = outputs(
        tmp_path,
        "from minidora.classroom import folder\n"
        f"folder.DEFAULT_FOLDER = folder.Path({str(tmp_path / 'none')!r})\n"
        "from minidora import checks",
        "checks.status()",
    )
    [error] = [output for output in found if output.output_type == "error"]
    assert len(error.traceback) == 1
    assert "there is no" in error.traceback[0]
    assert "start" in error.traceback[0]
