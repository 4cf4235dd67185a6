"""Every check against the solution, other right answers, the stub, and every usual wrong answer."""

import functools
import json
import linecache
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minidora import checks, course, probe
from minidora.checks import core
from minidora.checks.core import Answer, CheckFailed, Exercise, NotStarted, WrongAnswer

SOLUTIONS = Path(__file__).parent.parent / "solutions"
EXERCISES = [exercise for lesson in checks.LESSONS.values() for exercise in lesson.exercises]
WRONG = [(exercise, wrong) for exercise in EXERCISES for wrong in exercise.wrong]


def name(value: Any) -> str:
    return value.number if isinstance(value, Exercise) else value.name.replace(" ", "-")


@functools.cache
def cells(lesson: int) -> dict[str, str]:
    """Sources of a solution notebook's code cells, by grade_id; other cells under a number."""
    path = SOLUTIONS / f"{checks.LESSONS[lesson].name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return {
        cell["metadata"].get("nbgrader", {}).get("grade_id", str(index)): "".join(cell["source"])
        for index, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
    }


def answer(exercise: Exercise, source: str | None = None) -> Any:
    """What the learner defines: the notebook's setup cells, then this source or the solution."""
    sources = cells(exercise.lesson)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for key, setup in sources.items():
        if key.isdigit():
            exec(setup, namespace)
    source = sources[exercise.name] if source is None else textwrap.dedent(source)
    file = f"<cell {exercise.number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)
    return namespace[exercise.answer]


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_solution_passes(exercise: Exercise, capsys: Any) -> None:
    exercise(answer(exercise))
    assert capsys.readouterr().out.startswith(f"{exercise.number} {exercise.answer} passed: ")


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=name)
def test_wrong_answer_is_refused_by_name(exercise: Exercise, wrong: WrongAnswer) -> None:
    solution = cells(exercise.lesson)[exercise.name]
    assert solution.count(wrong.old) == 1, "the mistake must be one place in the solution"
    with pytest.raises(CheckFailed) as caught:
        exercise(answer(exercise, solution.replace(wrong.old, wrong.new)))
    print(caught.value)
    assert wrong.says in str(caught.value)
    assert not isinstance(caught.value, NotStarted)
    assert all(len(line) <= core.WIDTH for line in caught.value._render_traceback_())
