"""Grade a class: every submission's notebooks against the checks, into a table.

Students' code runs without a sandbox (docs/teaching.md says how to contain it), but apart from the
verdict: the checks run here, on data that the student's process hands over.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minidora.checks import LESSONS, Lesson
from minidora.classroom.folder import ROOT
from minidora.classroom.grade import Limits, Result, judge
from minidora.classroom.notebook import Notebook, read_notebook
from minidora.runner.process import WorkerPool

COLUMNS = ("student", "notebook", "exercise", "title", "state", "points", "max_points", "message")


@dataclass(frozen=True)
class Submission:
    """One student's notebook of one lesson; None where there is none."""

    student: str
    lesson: int
    notebook: Notebook | None
    note: str = ""


def collect(folder: Path) -> list[Submission]:
    """Whose notebooks lie in the folder: STUDENT/.../*.ipynb, or STUDENT.ipynb.

    Every student has a submission for each lesson that anybody handed in. Of several notebooks of
    one lesson that with the course's name counts, else the newest. A damaged file whose name tells
    no lesson is noted where its student lacks one: it may be what is missing.
    """
    found: dict[str, dict[int, list[Notebook]]] = {}
    damaged: dict[str, list[str]] = {}
    for student, path in _files(folder):
        notebook = read_notebook(path)
        lessons = found.setdefault(student, {})
        if (lesson := notebook.lesson()) is not None:
            lessons.setdefault(lesson, []).append(notebook)
        elif path.is_file() and notebook.problem:
            damaged.setdefault(student, []).append(f"{path.name}: {notebook.problem}")
    graded = sorted({lesson for lessons in found.values() for lesson in lessons})
    return [
        _choose(student, lesson, lessons.get(lesson, []), damaged.get(student, []))
        for student, lessons in found.items()
        for lesson in graded
    ]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(student, notebook); (student, folder) where a student's folder holds none."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or entry.name.startswith("."):
            continue  # a link could point at somebody else's work
        if entry.is_dir():
            paths = [
                path
                for path in sorted(entry.rglob("*.ipynb"))
                if ".ipynb_checkpoints" not in path.parts and not path.is_symlink()
            ]
            yield from ((entry.name, path) for path in paths or [entry])
        elif entry.suffix == ".ipynb":
            yield entry.stem, entry


def _choose(student: str, lesson: int, notebooks: list[Notebook], damaged: list[str]) -> Submission:
    if not notebooks:
        return Submission(student, lesson, None, "; ".join(damaged))
    name = LESSONS[lesson].name
    chosen = max(notebooks, key=lambda one: (one.path.stem == name, one.path.stat().st_mtime))
    others = len(notebooks) - 1
    note = f"{others} more notebook(s) of this lesson were left out" if others else ""
    return Submission(student, lesson, chosen, note)


def grade(
    folder: Path,
    limits: Limits,
    jobs: int | None = None,
    progress: Callable[[Submission, list[Result]], None] | None = None,
) -> list[tuple[Submission, list[Result]]]:
    """Judge all submissions in the folder, so many at a time (one for each core)."""
    submissions = collect(folder)

    def one(submission: Submission) -> tuple[Submission, list[Result]]:
        lesson = LESSONS[submission.lesson]
        if submission.notebook is None:
            results = [
                Result(one, "missing", "no notebook of this lesson.") for one in lesson.exercises
            ]
        else:
            shut = _shut(lesson, folder)
            results = judge(workers, submission.notebook, lesson, lesson.exercises, limits, shut)
        if progress is not None:
            progress(submission, results)
        return submission, results

    with WorkerPool() as workers, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(one, submissions))


def _shut(lesson: Lesson, folder: Path) -> list[str]:
    """What students' code may not open: where answers are, and each other's work."""
    names = ["solutions", "tests", ".git", "minidora/checks", "minidora/__pycache__"]
    names += [f"{module.replace('.', '/')}.py" for module in lesson.closed]
    return [str(folder.resolve()), *(str(ROOT / name) for name in names)]


def write_report(path: Path, graded: Iterable[tuple[Submission, list[Result]]]) -> None:
    """One row for each student and exercise, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for submission, results in graded:
            notebook = submission.notebook.path.name if submission.notebook else ""
            for result in results:
                exercise = result.exercise
                message = " ".join(f"{result.message} {submission.note}".split())
                row = (
                    submission.student, notebook, exercise.number, exercise.title, result.state,
                    result.points, exercise.points, message,
                )  # fmt: skip
                writer.writerow([_harmless(value) for value in row])


def _harmless(value: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
