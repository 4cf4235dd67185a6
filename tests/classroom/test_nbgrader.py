"""nbgrader on the solutions as they are: assign, grade, validate. Optional: the extra "class".

Runs only where nbgrader is installed: pip install -e '.[dev,class]'.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="the extra 'class' is not installed")

import nbformat
from nbgrader.apps import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import ClearSolutions
from nbgrader.validator import Validator
from traitlets.config import Config

from minidora import checks
from minidora.classroom import folder as folders

NAMES = [lesson.name for lesson in checks.LESSONS.values()]
STUB = re.compile(r'raise NotImplementedError\("exercise [^"]*"\)')
THEIRS = "# YOUR CODE HERE\\n(?P<indent> *)raise NotImplementedError\\(\\)"


def read(folder: str, name: str) -> Any:
    return nbformat.read(folders.ROOT / folder / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_our_stubs_are_nbgraders_but_for_their_text(name: str) -> None:
    cleared, _ = ClearSolutions().preprocess(read("solutions", name), {})
    for theirs, ours in zip(cleared.cells, read("exercises", name).cells, strict=True):
        expected = re.sub(THEIRS, "raise NotImplementedError()", theirs.source)
        assert STUB.sub("raise NotImplementedError()", ours.source) == expected
        assert ours.metadata == theirs.metadata
        assert ours.id == theirs.id


@pytest.fixture(scope="module")
def course(tmp_path_factory: Any) -> NbGraderAPI:
    """A course of one assignment with all notebooks; one student solved them, one did nothing."""
    root = tmp_path_factory.mktemp("course")
    (root / "source" / "dora").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(folders.ROOT / "solutions" / f"{name}.ipynb", root / "source" / "dora")
    config = Config()
    config.CourseDirectory.root = str(root)
    config.ExecutePreprocessor.timeout = 120
    api = NbGraderAPI(CourseDirectory(config=config), config=config)
    with pytest.MonkeyPatch.context() as patch:
        # nbgrader starts `alembic` by its name, also where no environment is activated
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        assert api.generate_assignment("dora")["success"]
        for student, source in (("solver", root / "source"), ("idler", root / "release")):
            shutil.copytree(source / "dora", root / "submitted" / student / "dora")
            assert api.autograde("dora", student)["success"]
    return api


def test_generated_assignment_holds_no_solution(course: NbGraderAPI) -> None:
    for name in NAMES:
        path = Path(course.coursedir.root) / "release" / "dora" / f"{name}.ipynb"
        text = path.read_text(encoding="utf-8")
        assert "SOLUTION" not in text
        assert text.count("raise NotImplementedError()") >= len(STUB.findall(
            "".join(cell.source for cell in read("exercises", name).cells)
        ))  # fmt: skip


def test_autograde_gives_the_solution_all_points_and_the_stub_none(course: NbGraderAPI) -> None:
    possible = sum(one.points for lesson in checks.LESSONS.values() for one in lesson.exercises)
    scores = {student: course.get_submission("dora", student) for student in ("solver", "idler")}
    assert {scores[student]["max_score"] for student in scores} == {possible}
    assert scores["solver"]["score"] == possible
    assert scores["idler"]["score"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_validate_passes_the_solution_and_says_of_the_stub_what_we_say(name: str) -> None:
    validator = Validator()
    solved = validator.validate(str(folders.ROOT / "solutions" / f"{name}.ipynb"))
    assert not solved.get("failed")
    stubs = validator.validate(str(folders.ROOT / "exercises" / f"{name}.ipynb"))
    number = name[:2].lstrip("0")
    assert len(stubs["failed"]) == len(checks.LESSONS[int(number)].exercises)
    assert f"NotStarted: {number}.1" in json.dumps(stubs["failed"][0])
