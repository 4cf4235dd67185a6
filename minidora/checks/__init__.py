"""Checks of the exercises: `checks.row_norm(row_norm)` says whether yours is right, and why not.

One file a lesson; exercise.py and spec.py say how a check is made. Each exercise is an attribute of
this module, by its name.
"""

from minidora.checks import (
    adam_memory,
    dora_decomposition,
    fast_dora,
    gpu_kernels,
    lora_recap,
    mlp_demo,
    why_it_works,
)
from minidora.checks.exercise import CheckFailed, Exercise, Lesson, NotPossible, NotStarted

LESSONS: dict[int, Lesson] = {
    lesson.number: lesson
    for lesson in (
        adam_memory.lesson,
        lora_recap.lesson,
        dora_decomposition.lesson,
        mlp_demo.lesson,
        why_it_works.lesson,
        fast_dora.lesson,
        gpu_kernels.lesson,
    )
}
"""Every lesson that has exercises, by its number."""

EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise for lesson in LESSONS.values() for exercise in lesson.exercises
}
"""Every exercise, by its name."""

globals().update(EXERCISES)


def status() -> None:
    """What is done and what is next, by the saved notebooks of this folder: `minidora status`."""
    from minidora.classroom import report  # the one way up, because a notebook knows only checks

    report.status(None)


def hint(number: str) -> None:
    """Ask the leading question of an exercise, "3.2" for example: `minidora hint`."""
    hints = {exercise.number: exercise.hint for exercise in EXERCISES.values()}
    print(hints.get(str(number), f"there is no exercise {number}: there are {', '.join(hints)}"))


__all__ = [
    "EXERCISES",
    "LESSONS",
    "CheckFailed",
    "Exercise",
    "Lesson",
    "NotPossible",
    "NotStarted",
    "hint",
    "status",
    *EXERCISES,
]
