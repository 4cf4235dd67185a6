"""The exercises, their solutions, and what a check says of an answer: for several tests."""

import functools
import json
import linecache
import textwrap
from pathlib import Path
from typing import Any

import pytest

from minidora import checks, interpreter
from minidora.checks.exercise import WIDTH, CheckFailed, Exercise

SOLUTIONS = Path(__file__).parents[1] / "solutions"
EXERCISES = [exercise for lesson in checks.LESSONS.values() for exercise in lesson.exercises]


def name(value: Any) -> str:
    return value.number if isinstance(value, Exercise) else value.name.replace(" ", "-")


@functools.cache
def notebook(lesson: int) -> Any:
    path = SOLUTIONS / f"{checks.LESSONS[lesson].name}.ipynb"
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def cells(lesson: int) -> dict[str, str]:
    """Sources of a solution notebook's code cells, by grade_id; other cells under a number."""
    return {
        cell["metadata"].get("nbgrader", {}).get("grade_id", str(index)): "".join(cell["source"])
        for index, cell in enumerate(notebook(lesson)["cells"])
        if cell["cell_type"] == "code"
    }


def answer(exercise: Exercise, source: str | None = None) -> Any:
    """What the learner defines: the notebook's setup cells, then this source or the solution."""
    if exercise.triton and interpreter.problem:
        pytest.skip(interpreter.problem)
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


def refusal(exercise: Exercise, source: str | Any) -> CheckFailed:
    """What the check says of an answer that it must refuse."""
    given = answer(exercise, source) if isinstance(source, str) else source
    with pytest.raises(CheckFailed) as caught:
        exercise(given)
    assert all(len(line) <= WIDTH for line in caught.value._render_traceback_())
    return caught.value
