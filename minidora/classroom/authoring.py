"""The notebooks as files: execute them the way they are committed."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from minidora.classroom.files import UserError, write_whole

CHECKED = "nbval-check-output"
"""Tag of the cells whose stored output every run must repeat."""

MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|mnt|opt|work)/\w\S*|\b[A-Z]:\\\S+")

EMBEDDED = re.compile(r"data:image/[\w+]+;base64,[\w+/=]*")

WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path, timeout: int = 300) -> None:
    """Run a notebook top to bottom in its folder and write it back, ready to commit.

    No timestamps, no Python patch version and no widget views are kept: they would change with
    every run, and a widget is dead without its kernel.

    Args:
        path: the .ipynb file, overwritten only when every cell ran.
        timeout: seconds a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
        UserError: it is not a notebook.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ["TQDM_DISABLE"] = "1"  # a progress bar is for a person who waits
    notebook = _read(path)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    write_whole(path, nbformat.writes(notebook) + "\n")


def _read(path: Path) -> Any:
    import nbformat

    from minidora.classroom.notebook import read_notebook

    if problem := read_notebook(path).problem:
        raise UserError(f"{path} {problem}")
    return nbformat.read(path, as_version=4)


def problems(path: Path, checked_cells: int = 8) -> list[str]:
    """What keeps an executed notebook from being committed, one line each; empty if nothing does.

    Args:
        path: the .ipynb file.
        checked_cells: how many cells with compared output (tag nbval-check-output) it must have.
    """
    notebook = _read(path)
    found = [line for cell in notebook.cells for line in _cell_problems(cell)]
    # From the file itself, for nbformat.read makes up the ids that are missing.
    ids = [cell.get("id") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        found.append("there are cells without an id of their own")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"not executed top to bottom: the execution counts are {counts}")
    checked = sum(CHECKED in cell.metadata.get("tags", []) for cell in code)
    if checked < checked_cells:
        found.append(f"{checked} cells are tagged {CHECKED}, at least {checked_cells} should be")
    return found


def _cell_problems(cell: Any) -> Iterator[str]:
    where = f"In [{cell.execution_count}]" if cell.cell_type == "code" else f"cell {cell.get('id')}"
    if "execution" in cell.metadata:
        yield f"{where} stores when it was run"
    if name := _machine_path(cell.source):
        yield f"{where} names a path of one machine, {name}"
    text = ""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.output_type == "error":
            yield f"{where} ends in an error, {output.ename}: {output.evalue}"
        if any(kind.startswith("image/") for kind in data) or _pictures_without_text(data):
            yield f"{where} shows a picture without alternative text: show it with plots.show"
        if WIDGET in data:
            yield f"{where} stores a widget, which is dead without its kernel"
        page = EMBEDDED.sub("", data.get("text/html", ""))
        text += output.get("text", "") + data.get("text/plain", "") + page
    if name := _machine_path(text):
        yield f"{where} prints a path of one machine, {name}"
    if CHECKED in cell.metadata.get("tags", []):
        if "<img" in text:
            yield f"{where} is tagged {CHECKED}, but shows a figure: matplotlib's versions differ"
        elif not text.strip():
            yield f"{where} is tagged {CHECKED}, but prints nothing to compare"


def _pictures_without_text(data: Mapping[str, str]) -> bool:
    """Whether the HTML of an output has an image without alternative text.

    Only there is one read out: JupyterLab and nbconvert drop the alt of an image/png.
    """
    alts: list[str | None] = []

    class Images(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                alts.append(dict(attrs).get("alt"))

    Images().feed(data.get("text/html", ""))
    return not all(alt and alt.strip() for alt in alts)


def _machine_path(text: str) -> str | None:
    """The first absolute path in text that means something on one machine only, if any."""
    match = MACHINE_PATH.search(text)
    return match[0] if match else None


# ---- Exercises: derived from the solutions, which are nbgrader's source format ----

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"


def build(root: Path) -> dict[Path, str]:
    """The exercise notebooks that the solutions give: their files under root, and the text of each.

    Raises:
        ValueError: a solution cell without its two markers, or one that no check knows.
    """
    return {
        root / "exercises" / path.name: exercise_notebook(path)
        for path in sorted((root / "solutions").glob("*.ipynb"))
    }


def exercise_notebook(solution: Path) -> str:
    """The text of the exercise notebook: no outputs, and a stub in place of each solution.

    Every byte follows from the solution's source, ids and metadata: a second build changes nothing.
    """
    notebook = json.loads(solution.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell["outputs"], cell["execution_count"] = [], None
        source, nbgrader = "".join(cell["source"]), cell["metadata"].get("nbgrader", {})
        if nbgrader.get("solution"):
            try:
                source = with_stubs(source, f"exercise {_exercise_name(nbgrader['grade_id'])}")
            except ValueError as error:
                raise ValueError(f"{solution.name}, cell {cell['id']}: {error}") from None
        elif BEGIN in source or END in source:
            raise ValueError(f"{solution.name}, cell {cell['id']}: a marker outside of a solution")
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def with_stubs(source: str, name: str) -> str:
    """The source with one `raise NotImplementedError(name)` for each marked region."""
    lines: list[str] = []
    inside = False
    for line in source.splitlines():
        if line.strip() == BEGIN and not inside:
            indent = line[: line.index(BEGIN)]
            lines.append(f'{indent}raise NotImplementedError("{name}")')
            inside = True
        elif line.strip() == END and inside:
            inside = False
        elif line.strip() in (BEGIN, END):
            raise ValueError(f"{line.strip()} stands where the other marker should")
        elif not inside:
            lines.append(line)
    if inside or len(lines) == len(source.splitlines()):
        raise ValueError(f"it needs a {BEGIN} and a {END}")
    return "\n".join(lines)


def _exercise_name(grade_id: str) -> str:
    from minidora.checks import LESSONS

    for lesson in LESSONS.values():
        for exercise in lesson.exercises:
            if exercise.name == grade_id:
                return f"{exercise.number}: {exercise.answer}"
    raise ValueError(f"no check is called {grade_id}")
