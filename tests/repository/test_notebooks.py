"""The lessons as files, and what watches over them.

`make test` runs every notebook once with nbval. Here the stored files are read, and the watchers
(nbval, the closed network, the checks of a file) are seen to bark.
"""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import no_network
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minidora.classroom import authoring

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_is_ready_to_commit(path):
    assert authoring.problems(path) == []


def test_the_first_four_lessons_are_there():
    assert [path.stem for path in LESSONS][:4] == [
        "01_adam_memory",
        "02_lora_recap",
        "03_dora_decomposition",
        "04_mlp_demo",
    ]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_opens_and_ends_as_every_lesson_does(path):
    cells = nbformat.read(path, as_version=4).cells
    number = int(path.stem[:2])
    assert cells[0].source.startswith(f"# Lesson {number}: ")
    assert "symbols.md" in cells[0].source
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert f"(../exercises/{path.name})" in text
    assert text.count("<details>") >= 2
    assert "What this does not show" in text


# ---- The checks of a file find what they are for ----


def finished_notebook():
    """Two cells, executed, one of them with compared output: nothing to complain about."""
    png = new_output(
        "display_data",
        data={
            "text/html": '<img alt="a line" src="data:image/png;base64,iVBORw0/home/ada">',
            "text/plain": "a line",
        },
    )
    one = new_output("stream", name="stdout", text="1\n")
    return new_notebook(
        cells=[
            new_markdown_cell("# One"),
            new_code_cell(
                "print(1)",
                execution_count=1,
                outputs=[one],
                metadata={"tags": [authoring.CHECKED]},
            ),
            new_code_cell("draw()", execution_count=2, outputs=[png]),
        ]
    )


def problems(notebook, folder, checked_cells=1):
    path = folder / "notebook.ipynb"
    path.write_text(json.dumps(notebook))  # nbformat.write would mend the ids
    return authoring.problems(path, checked_cells)


def test_a_finished_notebook_has_no_problems(tmp_path):
    assert problems(finished_notebook(), tmp_path) == []
    assert "at least 8" in problems(finished_notebook(), tmp_path, checked_cells=8)[0]


def unnamed(page):
    return lambda cells: cells[2].outputs[0].data.update({"text/html": page})


def spoil_picture(cells):
    """As matplotlib stores it: the alt in its metadata is read out nowhere."""
    cells[2].outputs[0].data = {"image/png": "iVBORw0KGgo=", "text/plain": "a line"}
    cells[2].outputs[0].metadata = {"image/png": {"alt": "a line"}}


def spoil_order(cells):
    cells[1].execution_count, cells[2].execution_count = 2, 1


def spoil_error(cells):
    cells[2].outputs = [new_output("error", ename="ValueError", evalue="rank", traceback=[])]


def spoil_path(cells):
    cells[1].outputs[0].text = "saved to /".join(["", "home/ada/minidora/x.pt"])


SPOILERS = {
    "the execution counts are [2, 1]": spoil_order,
    "not executed top to bottom": lambda cells: cells[1].update(execution_count=None),
    "ends in an error, ValueError: rank": spoil_error,
    "stores when it was run": lambda cells: cells[1].metadata.update(execution={"a": "b"}),
    "shows a picture without alternative text": spoil_picture,
    "a picture without alternative text: show it": unnamed('<p><IMG src="x.png"></p>'),
    "picture without alternative text": unnamed('<img alt="a line"><img alt=" " src="x.png">'),
    "prints nothing to compare": lambda cells: cells[1].update(outputs=[]),
    "shows a figure: matplotlib's versions differ": lambda cells: cells[2].metadata.update(
        tags=[authoring.CHECKED]
    ),
    "stores a widget": lambda cells: cells[2].outputs[0].data.update({authoring.WIDGET: {}}),
    "prints a path of one machine": spoil_path,
    "names a path of one machine": lambda cells: cells[0].update(source=r"see C:\Users\ada"),
    "without an id of their own": lambda cells: cells[1].update(id=cells[2].id),
}


@pytest.mark.parametrize("said", SPOILERS)
@pytest.mark.filterwarnings("ignore:.*ids.*", "ignore::nbformat.warnings.DuplicateCellId")
def test_each_problem_is_named(said, tmp_path):
    notebook = finished_notebook()
    SPOILERS[said](notebook.cells)
    found = problems(notebook, tmp_path)
    assert len(found) == 1
    assert said in found[0]


def test_addresses_are_no_paths_of_a_machine(tmp_path):
    notebook = finished_notebook()
    notebook.cells[0].source = "https://arxiv.org/abs/2402.09353 and data/home/x, 1/2, a / b"
    assert problems(notebook, tmp_path) == []


def test_execute_stores_counts_and_outputs_but_no_times(tmp_path):
    notebook = finished_notebook()
    notebook.cells[1:] = [
        new_code_cell("print(1 + 1)", metadata={"tags": [authoring.CHECKED]}),
        new_code_cell("import ipywidgets\nipywidgets.IntSlider()"),
    ]
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook, path)
    authoring.execute(path)
    assert authoring.problems(path, checked_cells=1) == []
    cells = nbformat.read(path, as_version=4).cells
    assert cells[1].outputs[0].text == "2\n"
    assert cells[2].outputs == []


# ---- nbval and the closed network bark ----


def nbval(folder, *arguments):
    """Run nbval as `make test` does, on notebooks outside the repository."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    shutil.copy(no_network.__file__, folder / "tests")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", *arguments, "."],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_nbval_sees_one_altered_output(tmp_path):
    """Lesson 3 down to its first compared cell, with one digit of that stored output changed."""
    notebook = nbformat.read(ROOT / "notebooks/03_dora_decomposition.ipynb", as_version=4)
    tagged = [authoring.CHECKED in cell.metadata.get("tags", []) for cell in notebook.cells]
    del notebook.cells[tagged.index(True) + 1 :]
    output = notebook.cells[-1].outputs[0]
    assert output.output_type == "stream"
    digit = next(letter for letter in output.text if letter.isdigit())
    output.text = output.text.replace(digit, str((int(digit) + 1) % 10), 1)
    nbformat.write(notebook, tmp_path / "altered.ipynb")

    done = nbval(tmp_path)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    last = sum(cell.cell_type == "code" for cell in notebook.cells) - 1
    assert done.returncode == 1, done.stdout
    assert len(failed) == 1
    assert failed[0].startswith(f"FAILED altered.ipynb::Cell {last}")


@pytest.mark.slow
def test_a_notebooks_seconds_are_reported_and_fail_nothing(tmp_path):
    notebook = new_notebook(cells=[new_code_cell("import time; time.sleep(1)", execution_count=1)])
    nbformat.write(notebook, tmp_path / "slow.ipynb")
    done = nbval(tmp_path)
    assert done.returncode == 0, done.stdout
    written = json.loads((tmp_path / "build/notebook-seconds.json").read_text())
    assert f"{written['slow.ipynb']:6.1f} s  slow.ipynb" in done.stdout
    assert written["slow.ipynb"] >= 1


@pytest.mark.slow
def test_notebooks_have_no_network(tmp_path):
    ask = "import socket\nsocket.getaddrinfo('datasets.invalid', 443)"
    notebook = new_notebook(cells=[new_code_cell(ask, execution_count=1)])
    nbformat.write(notebook, tmp_path / "online.ipynb")
    done = nbval(tmp_path)
    assert done.returncode == 1
    assert "the network is closed while testing, but 'datasets.invalid' was asked for" in (
        done.stdout
    )


def test_tests_have_no_network_but_this_machine():
    with pytest.raises(no_network.NetworkClosed, match=r"'192\.0\.2\.1' was asked for"):
        sys.audit("socket.connect", None, ("192.0.2.1", 80))  # asks the hook, connects nothing
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
