"""One exercise of every lesson in JupyterLab: wrong, right, saved, reset, beside its terminal."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from answers import cells as solutions
from browser.lab import Lab
from jupyter_server import ROOT, Server
from playwright.sync_api import Browser

from minidora.checks import LESSONS
from minidora.checks.exercise import Exercise, Lesson


def listed(lesson: Lesson) -> tuple[Exercise, tuple[str, str, str, str]]:
    """The first exercise of a lesson with a wrong answer in tests/checks/wrong_answers/."""
    path = ROOT / f"tests/checks/wrong_answers/{lesson.name[3:]}.py"
    wrong = runpy.run_path(str(path))["WRONG"]
    exercise = next(one for one in lesson.exercises if wrong.get(one.name))
    return exercise, wrong[exercise.name][0]


@pytest.fixture(scope="module")
def lab(server: Server, chromium: Browser, pictures: Path) -> Iterator[Lab]:
    lab = Lab(server, chromium, pictures)
    yield lab
    lab.close()


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.name)
def test_wrong_right_saved_reset(lab: Lab, lesson: Lesson) -> None:
    exercise, (_, old, new, says) = listed(lesson)
    solution = solutions(lesson.number)[exercise.name]
    path = f"exercises/{lesson.name}.ipynb"
    lab.open(path)
    cells = {cell["source"]: cell["id"] for cell in lab.cells()}
    lab.run(next(iter(cells.values())))  # the imports
    stub = next(source for source in cells if f"exercise {exercise.number}:" in source)
    answer, check = cells[stub], cells[f"checks.{exercise.name}({exercise.answer})"]

    lab.type_and_run(answer, solution.replace(old, new))
    message = lab.run(check)
    lab.cell(check)
    lab.show(f"exercise-{lesson.name}-wrong")
    assert says in " ".join(message.split())
    assert "Traceback" not in message
    lab.save()
    assert state(lab, exercise) == "failing"

    lab.return_to(path)
    lab.type_and_run(answer, solution)
    assert f"{exercise.number} {exercise.answer} passed: " in lab.run(check)
    lab.show(f"exercise-{lesson.name}-right")
    lab.save()
    assert state(lab, exercise) == "done"
    lab.show(f"exercise-{lesson.name}-status")

    said = lab.terminal(f"minidora reset {exercise.number} --yes")
    assert f"{exercise.number} has been reset" in said
    assert "Reload Notebook from Disk" in said
    lab.return_to(path)
    lab.reload()
    assert {cell["source"]: cell["id"] for cell in lab.cells()}[stub] == answer
    lab.run(answer)
    assert "not started" in lab.run(check)


def state(lab: Lab, exercise: Exercise) -> str:
    """What `minidora status` says of an exercise, typed into JupyterLab's terminal."""
    said = lab.terminal("minidora status")
    row = re.search(rf"│ {re.escape(exercise.number)} +│[^│]*│ ([a-z ]+?) +│", said)
    assert row, said
    return row[1]
