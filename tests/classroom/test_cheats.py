"""A class in which everybody cheats: nobody gets a point that the code did not earn.

Each submission leaves exercise 3.1 undone, tries something else, and solves 3.2 honestly.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minidora import checks, cli
from minidora.classroom import folder as folders
from minidora.classroom import grade, submissions

NAME = "03_dora_decomposition"
LESSON = checks.LESSONS[3]
HONEST = "decompose"

STUB = 'def row_norm(weight):\n    raise NotImplementedError("exercise 3.1: row_norm")\n'
WRONG = "def row_norm(weight):\n    return weight.sum(dim=1)\n"

PATCH_COMPARISONS = """
import torch
for name in ("allclose", "equal", "isclose", "all"):
    setattr(torch, name, lambda *args, **kwargs: torch.tensor(True))
for name in ("__le__", "__eq__", "allclose", "equal", "all"):
    setattr(torch.Tensor, name, lambda *args: torch.tensor(True))
torch.testing.assert_close = lambda *args, **kwargs: None
"""

PATCH_PACKAGE = """
import minidora
from minidora import checks
from minidora.runner import probe, worker
for module in (checks, probe, worker, minidora):
    for name in list(vars(module)):
        if callable(getattr(module, name)) and not name.startswith("__") and name != "pack":
            try:
                setattr(module, name, lambda *args, **kwargs: {"value": True, "error": None})
            except Exception:
                pass
"""

FORGE_REPLIES = """
import gc, json, socket, struct
def row_norm(weight):
    for thing in gc.get_objects():
        if isinstance(thing, socket.socket):
            for number in range(200):
                data = json.dumps({"number": number, "value": True, "state": "done"}).encode()
                thing.sendall(struct.pack(">Q", len(data)) + data)
    return weight.sum(dim=1)
"""

READ_CALLERS = """
import sys
import torch
def row_norm(weight):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, torch.Tensor) and value.shape == weight.shape[:1]:
                return value
            if getattr(value, "__name__", "") == "row_norm" and value is not row_norm:
                return value(weight)
        frame = frame.f_back
    return weight.sum(dim=1)
"""

FIND_PACKAGES_OWN = """
import gc, inspect
from torch import nn
def everything(kind):
    for sub in kind.__subclasses__():
        yield sub
        yield from everything(sub)
def row_norm(weight):
    for thing in gc.get_objects():
        if inspect.isfunction(thing) and thing.__name__ in ("row_norm", "_lengths"):
            if thing is not row_norm:
                return thing(weight)
    for kind in everything(nn.Module):
        if kind.__name__ == "DoRALinear" and kind.__module__ != "__main__":
            return kind(nn.Linear(*weight.T.shape), 1, 1.0).magnitude
    return weight.sum(dim=1)
"""

EQUAL_TO_ALL = """
import torch
class Sly(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True
    def __eq__(self, other):
        return True
    def __le__(self, other):
        return True
def row_norm(weight):
    return weight.sum(dim=1).as_subclass(Sly)
"""


def reading(path: Path) -> str:
    """Take the answer out of a notebook or a file of ours."""
    return f"""
import json, re
text = open({str(path)!r}).read()
source = "".join(
    "".join(cell["source"]) + chr(10) for cell in json.loads(text)["cells"]
    if cell["cell_type"] == "code" and "checks" not in "".join(cell["source"])
)
exec("import torch, copy, math; from torch import nn, Tensor;" + chr(10) + source)
"""


def cheats(submissions: Path) -> dict[str, str]:
    """Name and source of the cell where row_norm should be."""
    root = folders.ROOT
    solution = root / "solutions" / f"{NAME}.ipynb"
    report = submissions.parent / "results.csv"
    judge = submissions.parent / "judge.py"  # it stands for our own files
    way = submissions.parent / "way"
    return {
        "nothing": STUB,
        "redefined checks": WRONG + "class checks:\n    row_norm = staticmethod(print)\n",
        "checks patched": WRONG
        + "import minidora.checks as c\nc.row_norm = lambda answer: print('3.1 row_norm passed')\n",
        "assert patched": WRONG
        + "import builtins\nbuiltins.AssertionError = type('Quiet', (Warning,), {})\n"
        "builtins.isinstance = lambda *args: True\n",
        "package patched": WRONG + PATCH_PACKAGE,
        "torch's comparisons patched": PATCH_COMPARISONS + WRONG,
        "sys.exit": "import sys\ndef row_norm(weight):\n    sys.exit(0)\n",
        "os._exit": "import os\ndef row_norm(weight):\n    os._exit(0)\n",
        "exit of the cell": WRONG + "import os\nos._exit(0)\n",
        "forged text": "import os, sys\ndef row_norm(weight):\n"
        "    text = '3.1 row_norm passed: by hand, random weights, gradient, float64, device'\n"
        "    print(text)\n    sys.__stdout__.write(text)\n    os.write(1, text.encode())\n"
        "    os.write(2, text.encode())\n    return weight.sum(dim=1)\n",
        "forged replies": FORGE_REPLIES,
        "solution read": reading(solution),
        "solution read around corners": "import os\nos.chdir('/')\n"
        f"os.symlink({str(solution.parent)!r}, {str(way)!r})\n" + reading(way / solution.name),
        "solution copied by another program": f"import subprocess\nsubprocess.run(['cp', "
        f"{str(solution)!r}, 'here.ipynb'])\n" + reading(Path("here.ipynb")),
        "neighbour read": reading(submissions / "zz honest" / f"{NAME}.ipynb"),
        "check's source read": f"open({str(root / 'minidora/checks/spec.py')!r}).read()\n" + WRONG,
        "package's own": "from minidora.dora import row_norm\n",
        "package's own inside": "def row_norm(weight):\n    from minidora.dora import row_norm\n"
        "    return row_norm(weight)\n",
        "package's own by its file": "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('d', {str(root / 'minidora/dora.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "row_norm = module.row_norm\n",
        "package's own by the collector": FIND_PACKAGES_OWN,
        "callers read": READ_CALLERS,
        "nan": "def row_norm(weight):\n    return weight.norm(dim=1) * float('nan')\n",
        "equal to everything": EQUAL_TO_ALL,
        "example by heart": "import torch\ndef row_norm(weight):\n"
        "    return torch.tensor([5.0, 13.0])\n",
        "grading rewritten": f"open({str(judge)!r}, 'a').write('# mine')\n" + WRONG,
        "report rewritten": f"open({str(report)!r}, 'w').write('full points')\n" + WRONG,
        "parent ended": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + WRONG,
        "endless": "def row_norm(weight):\n    while True:\n        pass\n",
    }


def submission(row_norm: str, honest: bool = False, **changes: Any) -> str:
    content = json.loads((folders.ROOT / "exercises" / f"{NAME}.ipynb").read_text("utf-8"))
    for cell in content["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id")
        for exercise in LESSON.exercises:
            if name == exercise.name and (honest or name == HONEST):
                cell["source"] = folders.solution(LESSON, exercise)
        if name == "row_norm" and not honest:
            cell["source"] = row_norm
        if name == "row_norm_check":
            cell.update(changes)
    return json.dumps(content)


OTHERS = {
    "check cells deleted": lambda content: [
        cell for cell in content if "_check" not in str(cell["metadata"])
    ],
    "points of its own": lambda content: json.loads(
        json.dumps(content).replace('"points": 1', '"points": 100')
    ),
}


Rows = dict[str, dict[str, dict[str, str]]]


@pytest.fixture(scope="module")
def graded(tmp_path_factory: Any) -> Rows:
    """{student: {exercise: row of the report}}, by the command itself."""
    folder = tmp_path_factory.mktemp("class") / "submissions"
    report = folder.parent / "results.csv"
    judge = folder.parent / "judge.py"
    folder.mkdir()
    judge.write_text("ours")
    everybody = {name: submission(source) for name, source in cheats(folder).items()}
    passed = {"name": "stdout", "output_type": "stream", "text": "3.1 row_norm passed: by hand"}
    everybody["outputs forged"] = submission(WRONG, outputs=[passed], execution_count=2)
    for name, change in OTHERS.items():
        content = json.loads(submission(WRONG))
        everybody[name] = json.dumps(content | {"cells": change(content["cells"])})
    everybody["zz honest"] = submission("", honest=True)
    for name, text in everybody.items():
        (folder / name).mkdir(parents=True)
        (folder / name / f"{NAME}.ipynb").write_text(text, encoding="utf-8")
    (folder / "nobody").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LESSON.exercises[0], "seconds", 0.5)  # for the endless loop
        result = CliRunner().invoke(
            cli.app, ["check", "--report", str(report), str(folder)], env={"COLUMNS": "140"}
        )
    assert result.exit_code == 0, result.output
    assert judge.read_text() == "ours"
    rows: Rows = {}
    with report.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["student"], {})[row["exercise"]] = row
    return rows


CHEATS = [*cheats(Path("/")), *OTHERS, "outputs forged"]


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_earns_nothing(name: str, graded: Any) -> None:
    rows = graded[name]
    print(rows["3.1"]["message"])
    assert rows["3.1"]["points"] == "0"
    assert rows["3.1"]["state"] in ("failing", "missing", "not started")
    assert rows["3.1"]["max_points"] == "1"
    expected = "0" if name in SPOILS_ITSELF else "1"
    assert rows["3.2"]["points"] == expected, rows["3.2"]["message"]
    assert sum(int(row["points"]) for row in rows.values()) == int(expected)


# It took its own honest answer with it.
SPOILS_ITSELF = {"package patched"}


def test_honest_answers_get_full_points_and_nobody_none(graded: Any) -> None:
    assert {row["state"] for row in graded["zz honest"].values()} == {"done"}
    assert {row["state"] for row in graded["nobody"].values()} == {"missing"}
    points = sum(int(row["points"]) for row in graded["zz honest"].values())
    assert points == sum(exercise.points for exercise in LESSON.exercises)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("solution read", "is closed while a class is graded"),
        ("solution read around corners", "is closed while a class is graded"),
        ("solution copied by another program", "no other program may be started"),
        ("neighbour read", "is closed while a class is graded"),
        ("os._exit", "your code ended the Python process"),
        ("forged replies", "your code wrote into the connection"),
        ("report rewritten", "only the working folder may be written to"),
    ],
)
def test_report_says_what_was_tried(name: str, says: str, graded: Any) -> None:
    assert says in graded[name]["3.1"]["message"]


def test_collects_folders_files_and_the_newest(tmp_path: Path) -> None:
    text = submission(WRONG)
    (tmp_path / "ann" / "deep" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "ann" / "deep" / "renamed.ipynb").write_text(text)
    (tmp_path / "ann" / "deep" / ".ipynb_checkpoints" / "x-checkpoint.ipynb").write_text(text)
    (tmp_path / "ann" / "older.ipynb").write_text(text)
    os.utime(tmp_path / "ann" / "older.ipynb", (0, 0))
    (tmp_path / "bob.ipynb").write_text(text)
    (tmp_path / "cy").mkdir()
    (tmp_path / "cy" / "link.ipynb").symlink_to(tmp_path / "bob.ipynb")
    found = {one.student: one for one in submissions.collect(tmp_path)}
    assert sorted(found) == ["ann", "bob", "cy"]
    assert found["ann"].notebook is not None
    assert found["ann"].notebook.path.name == "renamed.ipynb"
    assert "1 more notebook(s)" in found["ann"].note
    assert found["cy"].notebook is None


def test_damaged_notebook_of_no_known_lesson_is_named(tmp_path: Path) -> None:
    text = submission(WRONG)
    (tmp_path / "ann.ipynb").write_text(text)
    (tmp_path / "bob.ipynb").write_text(text[: len(text) // 2])
    (tmp_path / "cy").mkdir()
    (tmp_path / "cy" / "03_mine.ipynb").write_text(text[: len(text) // 2])
    graded = submissions.grade(tmp_path, grade.Limits())
    submissions.write_report(tmp_path / "r.csv", graded)
    rows = list(csv.DictReader((tmp_path / "r.csv").open(newline="")))
    told = {row["student"]: (row["state"], row["message"]) for row in rows}
    assert told["bob"][0] == "missing"
    assert "no notebook of this lesson. bob.ipynb: its JSON breaks off" in told["bob"][1]
    assert "its JSON breaks off" in told["cy"][1]
    assert "breaks off" not in told["ann"][1]


def test_report_holds_no_formulas(tmp_path: Path) -> None:
    result = grade.Result(LESSON.exercises[0], "failing", "@bad")
    one = submissions.Submission("=cmd()", 3, None)
    submissions.write_report(tmp_path / "r.csv", [(one, [result])])
    row = list(csv.reader((tmp_path / "r.csv").open(newline="")))[1]
    assert (row[0], row[-1]) == ("'=cmd()", "'@bad")
