"""Exercises as files: derived from the solutions, worked on, judged and put back."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from typer.testing import CliRunner, Result

from minidora import checks, cli
from minidora.checks.exercise import WIDTH, State
from minidora.classroom import authoring, grade, report
from minidora.classroom import folder as folders
from minidora.classroom.notebook import is_stub, read_notebook
from minidora.runner import process
from minidora.runner.process import WorkerPool

ROOT = folders.ROOT
NAME = "03_dora_decomposition"
LESSON = checks.LESSONS[3]


# ---- Derived files ----


def test_exercises_are_what_the_solutions_give_to_the_byte() -> None:
    built = authoring.build(ROOT)
    assert {path.name for path in built} == {f"{one.name}.ipynb" for one in checks.LESSONS.values()}
    assert sorted(built) == sorted((ROOT / "exercises").glob("*"))
    for path, text in built.items():
        assert path.read_bytes() == text.encode(), f"{path.name} is stale: run minidora build"


def test_build_check_sees_one_byte(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "solutions").mkdir()
    source = ROOT / "solutions" / f"{NAME}.ipynb"
    (tmp_path / "solutions" / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    run = CliRunner().invoke
    assert run(cli.app, ["build", "--check"]).exit_code == 1
    assert run(cli.app, ["build"]).exit_code == 0
    assert run(cli.app, ["build", "--check"]).exit_code == 0
    exercise = tmp_path / "exercises" / source.name
    data = exercise.read_bytes()
    exercise.write_bytes(data.replace(b"row", b"roW", 1))
    stale = run(cli.app, ["build", "--check"])
    assert (stale.exit_code, stale.stdout) == (1, f"exercises/{NAME}.ipynb is stale\n")
    exercise.write_bytes(data.replace(b"\n", b"\r\n"))
    assert run(cli.app, ["build", "--check"]).exit_code == 1


@pytest.mark.parametrize("lesson", checks.LESSONS.values(), ids=lambda lesson: lesson.name)
def test_exercise_differs_from_its_solution_by_stubs_and_outputs_alone(lesson: Any) -> None:
    solution, exercise = (
        json.loads((ROOT / folder / f"{lesson.name}.ipynb").read_text(encoding="utf-8"))
        for folder in ("solutions", "exercises")
    )
    assert solution["metadata"] == exercise["metadata"]
    stubs = 0
    for theirs, ours in zip(solution["cells"], exercise["cells"], strict=True):
        assert (theirs["id"], theirs["metadata"]) == (ours["id"], ours["metadata"])
        if ours["cell_type"] == "code":
            assert (ours["outputs"], ours["execution_count"]) == ([], None)
        if theirs["metadata"].get("nbgrader", {}).get("solution"):
            source = "".join(ours["source"])
            stubs += 1
            assert "SOLUTION" not in source
            assert 'raise NotImplementedError("exercise' in source
        else:
            assert theirs["source"] == ours["source"]
    assert stubs == len(lesson.exercises)


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "### BEGIN SOLUTION\nx = 1",
        "### END SOLUTION\n### BEGIN SOLUTION",
        "### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION",
    ],
)
def test_markers_out_of_order_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="SOLUTION"):
        authoring.with_stubs(source, "exercise 9.9: x")


FORGET = """
import builtins as _kept
_kept.__dict__.setdefault("known", {*globals()})
for _name in {*globals()} - _kept.known:
    if not _name.startswith("_"):
        del globals()[_name]
"""


@pytest.mark.slow
def test_exercise_notebooks_run_through_with_not_started_alone() -> None:
    """One after the other in one kernel, which forgets the names of a lesson before the next."""
    parts = {}
    for lesson in checks.LESSONS.values():
        notebook = nbformat.read(ROOT / "exercises" / f"{lesson.name}.ipynb", as_version=4)
        parts[lesson.name] = notebook.cells
    cells = [cell for part in parts.values() for cell in (nbformat.v4.new_code_cell(FORGET), *part)]
    whole = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    NotebookClient(whole, allow_errors=True, record_timing=False).execute()
    for lesson in checks.LESSONS.values():
        errors = [
            output
            for cell in parts[lesson.name]
            if cell.cell_type == "code"
            for output in cell.outputs
            if output.output_type == "error"
        ]
        assert [error.ename for error in errors] == ["NotStarted"] * len(lesson.exercises)
        for error in errors:
            assert len(error.traceback) == 1, "one line, without the stack"
            assert len(error.traceback[0]) <= WIDTH


# ---- A learner's folder ----


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool() as shared:
        yield shared


class Work:
    """A learner's folder, the command in it, and ways to fill or spoil its cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "exercises" / f"{NAME}.ipynb"

    def run(self, *arguments: str, **options: Any) -> Result:
        needs_folder = arguments[0] in ("status", "check", "reset", "solution")
        where = ["--folder", str(self.folder)] if needs_folder else []
        result = CliRunner().invoke(
            cli.app, [*arguments, *where], env={"COLUMNS": "120"}, **options
        )
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def content(self) -> Any:
        return json.loads(self.path.read_text(encoding="utf-8"))

    def change(self, edit: Callable[[list[Any]], Any]) -> None:
        content = self.content()
        edit(content["cells"])
        self.path.write_text(json.dumps(content), encoding="utf-8")

    def write(self, name: str, source: str) -> int:
        """Write an answer into its cell; returns the cell's number."""
        self.change(lambda cells: cell_of(cells, name).update(source=source))
        return 1 + [grade_id(cell) for cell in self.content()["cells"]].index(name)

    def solve(self, *names: str) -> None:
        for name in names:
            self.write(name, solution(name))


def grade_id(cell: Any) -> str:
    return str(cell["metadata"].get("nbgrader", {}).get("grade_id"))


def cell_of(cells: list[Any], name: str) -> Any:
    return next(cell for cell in cells if grade_id(cell) == name)


def solution(name: str) -> str:
    exercise = next(one for one in LESSON.exercises if one.name == name)
    return folders.solution(LESSON, exercise)


@pytest.fixture
def work(tmp_path: Path, workers: WorkerPool, monkeypatch: Any) -> Work:
    monkeypatch.setattr(report, "WorkerPool", lambda: nullcontext(workers))
    folders.start(tmp_path / "work")
    return Work(tmp_path / "work")


def states(work: Work, workers: WorkerPool, **limits: float) -> dict[str, grade.Result]:
    """What lesson 3's exercises are judged to be."""
    notebook, _ = folders.find_notebook(work.folder, LESSON)
    assert notebook is not None
    results = grade.judge(workers, notebook, LESSON, LESSON.exercises, grade.Limits(**limits))
    return {result.exercise.name: result for result in results}


def test_start_copies_once_and_never_overwrites(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    copied, kept = folders.start(folder)
    assert kept == []
    expected = [*(ROOT / "notebooks").iterdir(), *(ROOT / "exercises").iterdir()]
    names = {f"{path.parent.name}/{path.name}" for path in expected if path.suffix != ".py"}
    assert {str(path.relative_to(folder)) for path in copied} <= names
    mine = folder / "exercises" / f"{NAME}.ipynb"
    mine.write_text("my work")
    (folder / "exercises" / "02_lora_recap.ipynb").rename(folder / "exercises" / "lora, mine.ipynb")
    (folder / "notebooks" / "symbols.md").unlink()
    copied, kept = folders.start(folder)
    assert [path.name for path in copied] == ["symbols.md"]  # the renamed notebook counts as there
    assert mine.read_text() == "my work"


def test_links_of_the_copy_lead_somewhere(work: Work) -> None:
    found = 0
    for path in work.folder.rglob("*.ipynb"):
        content = json.loads(path.read_text(encoding="utf-8"))
        text = "".join(
            "".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "markdown"
        )
        for target in re.findall(r"\]\(([^)#]+\.(?:ipynb|md))[^)]*\)", text):
            exists = (path.parent / target).exists()
            ours = path.parent.name == "exercises" or target.startswith("../exercises/0")
            lesson = re.search(r"/(\d\d)_", target)
            if ours and (lesson is None or int(lesson[1]) in checks.LESSONS):
                assert exists or path.parent.name == "exercises", f"{path.name}: {target}"
                found += 1
    assert found


@pytest.mark.parametrize("folder", [".", "exercises", "solutions/mine"])
def test_start_stays_out_of_the_course_itself(folder: str) -> None:
    with pytest.raises(folders.UserError, match="belongs to the course itself"):
        folders.start(ROOT / folder)


def test_folder_is_the_one_we_are_in(work: Work, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(work.folder / "exercises")
    assert folders.work_folder(None) == work.folder
    monkeypatch.chdir(ROOT / "exercises")
    monkeypatch.setattr(folders, "DEFAULT_FOLDER", tmp_path / "my-work")
    with pytest.raises(folders.UserError, match=r"my-work/exercises: `.*minidora start` makes it"):
        folders.work_folder(None)
    with pytest.raises(folders.UserError, match=r"minidora start .*/elsewhere` makes it"):
        folders.work_folder(tmp_path / "elsewhere")


def test_status_counts_and_names_the_next(work: Work) -> None:
    work.solve("row_norm", "dora_weight")
    work.write("decompose", solution("decompose").replace("[:, None]", "[:, None] ** 2"))
    text = work.run("status").stdout
    assert re.search(r"3\.1 .*done .* 5 ", text)
    assert re.search(r"3\.2 .*failing", text)
    assert re.search(r"3\.3 .*done", text)
    assert re.search(r"3\.4 .*not started .* 15 ", text)
    minutes = sum(e.minutes for one in checks.LESSONS.values() for e in one.exercises)
    number = sum(len(one.exercises) for one in checks.LESSONS.values())
    assert f"2 of {number} done, about {minutes - 15} minutes left." in text
    assert "Next: 1.1, Four numbers for each parameter" in text


def test_check_says_why_and_where(work: Work) -> None:
    work.solve("row_norm")
    cell = work.write("decompose", solution("decompose").replace("[:, None]", "[:, None] ** 2"))
    done = work.run("check", "3.1")
    assert (done.exit_code, done.stdout) == (0, "done  3.1 row_norm\n")
    failing = work.run("check", "3.1", "3.2")
    assert failing.exit_code == 1
    assert "done  3.1 row_norm" in failing.stdout
    assert f"failing  3.2 decompose  {work.path}, cell {cell}" in failing.stdout
    lessons_last_line = "which shape must the lengths have beside a weight of (out, in)?"
    assert lessons_last_line in work.run("check", "3").stdout


def test_hint_asks(work: Work) -> None:
    assert work.run("hint", "3.2").stdout.strip().endswith("?")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "12"], "12 is not a lesson with exercises: there are "),
        (["check", "3.77"], "there is no exercise 3.77: there are 3.1, 3.2"),
        (["hint", "3"], "name one exercise of lesson 3, 3.1 for example"),
        (["check", "first"], "first is not a lesson with exercises"),
    ],
)
def test_unknown_numbers_are_explained(work: Work, arguments: list[str], says: str) -> None:
    result = work.run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr


# ---- Notebooks as learners leave them ----


def test_error_in_a_cell_is_named_by_cell_and_line(work: Work, workers: WorkerPool) -> None:
    work.solve("decompose", "dora_weight")
    first = work.write("row_norm", "def row_norm(weight):\n    return (weight.norm(dim=1)\n")
    second = work.write("dora_weight", "import nothing_like_it\n" + solution("dora_weight"))
    third = work.write(
        "update_for_weight", "def update_for_weight(lora_B, lora_A):\n\n    return lora_B.tea()\n"
    )
    found = states(work, workers)
    assert found["row_norm"].cell == first
    assert f"SyntaxError: '(' was never closed\n  cell {first}, line 2" in found["row_norm"].message
    assert "No module named 'nothing_like_it'" in found["dora_weight"].message
    assert f"cell {second}, line 1: import nothing_like_it" in found["dora_weight"].message
    assert f"cell {third}, line 3: return lora_B.tea()" in found["update_for_weight"].message
    assert found["decompose"].state == "done"


def test_bare_stubs_are_not_run(work: Work, monkeypatch: Any) -> None:
    """A new copy is "not started" without a process; anything written into it is looked at."""
    started: list[float] = []

    class Counting(WorkerPool):
        def start(self, memory_gib: float) -> Any:
            started.append(memory_gib)
            return super().start(memory_gib)

    with Counting() as workers:
        assert {result.state for result in states(work, workers).values()} == {"not started"}
        assert started == []
        cells = work.content()["cells"]
        text = "3.1 row_norm is not started: write it in the cell above"
        result = states(work, workers)["row_norm"]
        assert result.message == text
        assert cells[result.cell - 1]["metadata"]["nbgrader"]["grade_id"] == "row_norm"  # type: ignore[operator]
        work.write("row_norm", "def row_norm(weight):\n    weight.norm(dim=1)")
        assert states(work, workers)["row_norm"].state == "failing"
        assert len(started) == 1


@pytest.mark.parametrize(
    ("source", "stub"),
    [
        ('def f(x):\n    """Does it."""\n    raise NotImplementedError("exercise 3.1: f")', True),
        ("def f(x):\n    # YOUR CODE HERE\n    raise NotImplementedError()", True),
        ("class F:\n    def __init__(self):\n        super().__init__()\n"
         "        raise NotImplementedError()\n\n"
         "    def forward(self, x):\n        raise NotImplementedError()", True),
        ("class F:\n    def __init__(self):\n        self.x = 1\n\n"
         "    def forward(self, x):\n        raise NotImplementedError()", False),
        ("def f(x):\n    y = x\n    raise NotImplementedError()", False),
        ("def f(x):\n    raise ValueError", False),
        ("def f(x):\n    raise NotImplementedError\nf = abs", False),
        ("@cache\ndef f(x):\n    raise NotImplementedError", False),
        ("def f(x, y=print(1)):\n    raise NotImplementedError", False),
        ("def f(x):\n    raise NotImplementedError\nfor f in [abs]: pass", False),
        ("def f(x):\n    return 0x" + "f" * 9999, False),
        ("f = abs", False),
        ("def f(x:", False),
        ('def f(x):\n    """Only words."""', False),
    ],
)  # fmt: skip
def test_what_a_stub_is(source: str, stub: bool) -> None:
    assert is_stub(source) is stub


def test_a_stub_whose_methods_come_from_another_cell_is_run(
    work: Work, workers: WorkerPool
) -> None:
    cell = {"cell_type": "code", "source": "DoRALinear.forward = lambda self, x: x", "metadata": {}}
    work.change(lambda cells: cells.append(cell))
    copy = read_notebook(work.path)
    assert not copy.untouched(LESSON)


@pytest.mark.parametrize("lesson", checks.LESSONS.values(), ids=lambda lesson: lesson.name)
def test_a_new_copy_is_untouched_and_a_solution_is_not(lesson: Any) -> None:
    for folder, untouched in (("exercises", True), ("solutions", False)):
        copy = read_notebook(ROOT / folder / f"{lesson.name}.ipynb")
        assert copy.untouched(lesson) is untouched


BODY = "weight.norm(dim=1)"


@pytest.mark.parametrize(
    "source",
    [
        f"if True:\n    def row_norm(weight):\n        return {BODY}",
        f"try:\n    row_norm = lambda weight: {BODY}\nfinally:\n    pass",
        f"for row_norm in [lambda weight: {BODY}]:\n    pass",
        f"with open('/dev/null'):\n    row_norm = lambda weight: {BODY}",
        f"row_norm: object = lambda weight: {BODY}",
        f"(row_norm := lambda weight: {BODY})",
        f"row_norm, other = (lambda weight: {BODY}), 1",
        f"match (lambda weight: {BODY}):\n    case row_norm:\n        pass",
        f"globals()['row_' + 'norm'] = lambda weight: {BODY}",
        f"exec('def row_norm(weight): return {BODY}')",
        f"def define():\n    global row_norm\n    row_norm = lambda weight: {BODY}\n\ndefine()",
        f"import __main__\nsetattr(__main__, 'row_norm', lambda weight: {BODY})",
        f"%%time\ndef row_norm(weight):\n    return {BODY}",
        f"%time row_norm = lambda weight: {BODY}",
        "from IPython import get_ipython as g\ng().user_ns['row_norm'] = lambda w: w.norm(dim=1)",
        f"%%capture said\nprint(1)\nrow_norm = lambda weight: {BODY}",
        f"import asyncio\nawait asyncio.sleep(0)\nrow_norm = lambda weight: {BODY}",
        f"async def made():\n    return lambda weight: {BODY}\n\nrow_norm = await made()",
        f"get_ipython().run_line_magic('matplotlib', 'inline')\nrow_norm = lambda weight: {BODY}",
        f"%config InlineBackend.figure_format = 'retina'\n%load_ext nothing_like_it\n"
        f"row_norm = lambda weight: {BODY}",
        f"%%writefile lengths.py\ndef row_norm(weight):\n    return {BODY}",
    ],
)  # fmt: skip
def test_what_the_notebook_defines_below_its_stub_counts(
    work: Work, workers: WorkerPool, source: str
) -> None:
    cells = [{"cell_type": "code", "source": source, "metadata": {}}]
    if "writefile" in source:
        cells.append({"cell_type": "code", "source": "from lengths import *", "metadata": {}})
    work.change(lambda own: own.extend(cells))
    assert states(work, workers)["row_norm"].state == "done"


def test_missing_and_duplicated_cells(work: Work, workers: WorkerPool) -> None:
    work.solve("row_norm", "decompose")
    work.change(lambda cells: cells.remove(cell_of(cells, "row_norm")))

    def duplicate(cells: list[Any]) -> None:
        copy = dict(cell_of(cells, "decompose"), id="copied", source="decompose = print")
        cells.append(copy)

    work.change(duplicate)
    found = states(work, workers)
    assert found["row_norm"].state == "missing"
    assert "no cell defines row_norm" in found["row_norm"].message
    assert found["decompose"].state == "failing"
    assert re.search(r"Cells \d+ and \d+ define decompose: the last", found["decompose"].message)
    advice = rf"minidora reset 3\.1 --folder {work.folder}` puts its cell back"
    assert re.search(advice, work.run("check", "3.1").stdout)


def test_renamed_notebook_without_metadata_is_found(work: Work) -> None:
    work.solve("row_norm")
    work.change(lambda cells: [cell.update(metadata={}) for cell in cells])
    work.path.rename(work.path.with_name("my second try.ipynb"))
    result = work.run("check", "3.1")
    assert "Note: lesson 3 is my second try.ipynb." in result.stdout
    assert "done  3.1 row_norm" in result.stdout


def test_two_notebooks_of_a_lesson(work: Work) -> None:
    work.path.with_name("copy.ipynb").write_bytes(work.path.read_bytes())
    assert f"copy.ipynb holds lesson 3 too: {NAME}.ipynb counts" in work.run("check", "3.1").stdout
    assert "no notebook holds lesson 2" in _without(work, "02_lora_recap").stdout


def _without(work: Work, name: str) -> Result:
    (work.folder / "exercises" / f"{name}.ipynb").unlink()
    return work.run("status")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[: len(data) // 2], "its JSON breaks off or is wrong in line"),
        (lambda data: b"", "its JSON breaks off or is wrong in line 1"),
        (lambda data: b"[1, 2]", "no notebook of format 4"),
        (lambda data: b'{"cells": [3]}', "no notebook of format 4"),
        (lambda data: b"[" * 100_000, "no notebook of format 4"),
        (lambda data: b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_unreadable_notebook_is_said_and_put_back(
    work: Work, spoil: Callable[[bytes], bytes], says: str
) -> None:
    broken = spoil(work.path.read_bytes())
    work.path.write_bytes(broken)
    text = work.run("check", "3.1").stdout
    assert says in text
    assert f"minidora reset 3 --folder {work.folder}` puts it back" in text
    assert work.run("check", "3").stdout.count(says) == 1
    assert "minidora reset 3" in work.run("reset", "3.1", "--yes").stderr
    assert work.run("reset", "3", "--yes").exit_code == 0
    assert work.path.read_bytes() == (ROOT / "exercises" / work.path.name).read_bytes()
    assert (work.folder / "backups" / f"{NAME}-1.ipynb").read_bytes() == broken


def test_magics_prints_questions_and_pictures_do_no_harm(work: Work, workers: WorkerPool) -> None:
    noise = "%matplotlib inline\n!echo hello\nprint('x' * 10**6)\ninput('name?')\ndisplay(3)\n"
    work.write("row_norm", noise + solution("row_norm"))
    work.write("decompose", "%%time\n" + solution("decompose"))
    found = states(work, workers)
    assert found["row_norm"].state == found["decompose"].state == "done"


def test_limits_hold_and_the_rest_is_still_judged(work: Work, workers: WorkerPool) -> None:
    work.solve("decompose", "dora_weight", "merge_dora")
    setup = work.content()["cells"][1]["source"]
    work.change(
        lambda cells: cells.insert(2, {**cells[1], "id": "loop", "source": "while True:\n    pass"})
    )
    work.change(
        lambda cells: cells.insert(3, {**cells[1], "id": "end", "source": "import os; os._exit(0)"})
    )
    work.change(
        lambda cells: cells.insert(
            4, {**cells[1], "id": "more", "source": "pile = bytearray(2**30)"}
        )
    )
    assert "import torch" in "".join(setup)
    hog = "def row_norm(weight):\n    pile = b'1' * 2**30\n    while True:\n        pass\n"
    work.write("row_norm", hog)
    found = states(work, workers, cell_seconds=0.3, memory_gib=0.9)
    assert "used more than 0.9 GiB of memory" in found["row_norm"].message
    assert found["decompose"].state == found["merge_dora"].state == "done"


def test_what_waits_inside_c_is_ended_from_outside(work: Work, workers: WorkerPool) -> None:
    work.write("row_norm", "import time\n\ndef row_norm(weight):\n    time.sleep(1000)\n")
    work.solve("decompose")
    found = states(work, workers, seconds=2.0)
    assert "its time was over" in found["row_norm"].message
    assert "the notebook took more than 2 s" in found["decompose"].message


# ---- Putting back ----


def test_reset_asks_and_keeps_a_backup(work: Work) -> None:
    answer = solution("row_norm").replace("dim=1", "dim=0")
    work.write("row_norm", answer)
    before = work.path.read_bytes()
    assert work.run("reset", "3.1", input="n\n").exit_code == 1
    assert work.path.read_bytes() == before
    result = work.run("reset", "3.1", input="y\n")
    assert "Take your answer to 3.1 out of" in result.stdout
    backup = work.folder / "backups" / "3.1-1.py"
    assert f"Yours is in {backup}" in result.stdout
    assert backup.read_text() == answer + "\n"
    original = json.loads((ROOT / "exercises" / f"{NAME}.ipynb").read_text(encoding="utf-8"))
    assert work.content() == original
    work.write("row_norm", "row_norm = 3")
    work.run("reset", "3.1", "--yes")
    assert (work.folder / "backups" / "3.1-2.py").read_text() == "row_norm = 3\n"


def test_reset_brings_back_what_is_gone_and_takes_out_copies(
    work: Work, workers: WorkerPool
) -> None:
    original = work.content()
    gone = ("row_norm", "decompose", "decompose_check")
    work.change(lambda cells: [cells.remove(cell_of(cells, name)) for name in gone])
    work.change(lambda cells: cells.append(
        dict(cell_of(cells, "dora_weight"), id="copied", source="dora_weight = print")
    ))  # fmt: skip
    for number in ("3.1", "3.2", "3.3"):
        assert work.run("reset", number, "--yes").exit_code == 0
    cells = work.content()["cells"]
    assert sorted(map(grade_id, cells)) == sorted(map(grade_id, original["cells"]))
    assert [cell for cell in cells if grade_id(cell)[:5] != "decom"] == [
        cell for cell in original["cells"] if grade_id(cell)[:5] != "decom"
    ]
    assert {result.state for result in states(work, workers).values()} == {"not started"}


def test_solution_is_shown_after_passing_or_as_a_spoiler(work: Work) -> None:
    refused = work.run("solution", "3.1")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "3.1 does not pass yet" in refused.stderr
    text = work.run("solution", "3.1", "--spoil").stdout
    assert "return weight.norm(dim=1)" in text
    assert "SOLUTION" not in text
    work.solve("row_norm")
    assert work.run("solution", "3.1").stdout == text


@pytest.mark.parametrize(
    ("serve", "memory", "why"),
    [(print, 4.0, "it ended at once"), (process.serve, 0.0, "it used more than 0 GiB of memory")],
)
def test_a_machine_that_cannot_start_a_process_is_not_the_learners_fault(
    work: Work, workers: WorkerPool, monkeypatch: Any, serve: Any, memory: float, why: str
) -> None:
    monkeypatch.setattr(process, "serve", serve)
    work.solve("row_norm")
    result = states(work, workers, memory_gib=memory)["row_norm"]
    assert result.state == "check error"
    assert why in result.message
    assert "not your code's fault" in result.message


def test_reset_keeps_a_colab_notebook_valid(work: Work) -> None:
    """Colab saves format 4.0, in which a cell has no id."""
    content = work.content()
    content["nbformat_minor"] = 0
    for cell in content["cells"]:
        del cell["id"]
    content["cells"] = [cell for cell in content["cells"] if grade_id(cell) != "row_norm_check"]
    work.path.write_text(json.dumps(content), encoding="utf-8")
    assert work.run("reset", "3.1", "--yes").exit_code == 0
    nbformat.validate(work.content())
    assert any(grade_id(cell) == "row_norm_check" for cell in work.content()["cells"])


@pytest.mark.skipif(process.os.name == "nt", reason="links and permissions as POSIX has them")
def test_reset_keeps_link_mode_and_whatever_was_written(work: Work) -> None:
    half = "# half of a pair: \ud83d, and é\r\n"
    work.write("decompose", half)
    work.write("row_norm", half)
    real = work.folder / "elsewhere.ipynb"
    work.path.rename(real)
    real.chmod(0o600)
    work.path.symlink_to(real)
    assert work.run("reset", "3.1", "--yes").exit_code == 0
    assert work.path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert cell_of(work.content()["cells"], "decompose")["source"] == half
    assert "\\ud83d" in (work.folder / "backups" / "3.1-1.py").read_text(encoding="utf-8")
    assert not list(work.folder.rglob("*.saving"))


def test_all_done_is_an_ending(work: Work, monkeypatch: Any) -> None:
    def all_done(
        workers: Any, notebook: Any, lesson: Any, exercises: Any, *rest: Any, **more: Any
    ) -> Any:
        return [grade.Result(exercise, State.DONE) for exercise in exercises]

    monkeypatch.setattr(report, "judge", all_done)
    text = work.run("status").stdout
    number = sum(len(one.exercises) for one in checks.LESSONS.values())
    assert f"All {number} are done" in text
    assert "minutes left" not in text
