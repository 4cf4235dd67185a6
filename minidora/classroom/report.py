"""What the terminal says about exercises: a learner's progress, and the table of a class."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minidora.checks import LESSONS
from minidora.checks.exercise import Exercise, Lesson
from minidora.classroom import folder as folders
from minidora.classroom import submissions
from minidora.classroom.grade import Limits, Result, judge
from minidora.classroom.notebook import Notebook
from minidora.runner.process import WorkerPool

STYLES = {"done": "green", "failing": "red", "not started": "dim", "missing": "yellow"}


def status(folder: Path | None, limits: Limits | None = None) -> None:
    """Print the table of all exercises, the minutes left and the next one."""
    console = Console(highlight=False)
    work = folders.work_folder(folder)
    table = Table("exercise", "", "state", "minutes", title=f"Exercises in {escape(str(work))}")
    left: list[tuple[Result, Notebook | None]] = []
    total = done = 0
    with WorkerPool() as workers:
        for lesson in LESSONS.values():
            notebook, note = folders.find_notebook(work, lesson)
            if note:
                console.print(escape(f"Note: {note}."))
            for result in _judge(workers, notebook, lesson, lesson.exercises, limits or Limits()):
                exercise = result.exercise
                total += 1
                done += result.state == "done"
                style = STYLES[result.state]
                table.add_row(
                    exercise.number, exercise.title, f"[{style}]{result.state}[/]",
                    str(exercise.minutes),
                )  # fmt: skip
                if result.state != "done":
                    left.append((result, notebook))
    console.print(table)
    minutes = sum(result.exercise.minutes for result, _ in left)
    console.print(f"{done} of {total} done, about {minutes} minutes left.")
    if left:
        result, notebook = left[0]
        where = f" in {notebook.path}" if notebook else ""
        number = result.exercise.number
        console.print(escape(f"Next: {number}, {result.exercise.title}{where}"))
        if result.state == "failing":
            console.print(escape(f"What is wrong with it: minidora check {number}"))


def check(folder: Path | None, what: list[str], limits: Limits, quiet: bool = False) -> bool:
    """Check lessons or exercises (all without any) and print each; whether all are done."""
    console = Console(highlight=False, quiet=quiet, soft_wrap=True)
    work = folders.work_folder(folder)
    chosen: dict[int, list[Exercise]] = {}
    for text in what or [str(number) for number in LESSONS]:
        lesson, exercises = folders.select(text)
        chosen.setdefault(lesson.number, []).extend(exercises)
    all_done = True
    with WorkerPool() as workers:
        for number, exercises in chosen.items():
            notebook, note = folders.find_notebook(work, LESSONS[number])
            if note:
                console.print(escape(f"Note: {note}."))
            for result in _judge(workers, notebook, LESSONS[number], exercises, limits):
                console.print(_line(result, notebook))
                all_done &= result.state == "done"
    return all_done


def _judge(
    workers: WorkerPool,
    notebook: Notebook | None,
    lesson: Lesson,
    exercises: list[Exercise],
    limits: Limits,
) -> list[Result]:
    if notebook is None:
        return [Result(exercise, "missing", "no notebook") for exercise in exercises]
    return judge(workers, notebook, lesson, exercises, limits)


def _line(result: Result, notebook: Notebook | None) -> str:
    """One exercise: state, and where and why it is not done."""
    exercise = result.exercise
    first = f"[{STYLES[result.state]}]{result.state}[/]  {exercise.number} {exercise.answer}"
    if result.state == "done":
        return first
    place = f", cell {result.cell}" if result.cell else ""
    where = f"  [dim]{escape(str(notebook.path))}{place}[/]" if notebook else ""
    advice = ""
    if result.state == "missing":
        advice = f"\n  `minidora reset {exercise.number}` puts its cell back"
    elif notebook and notebook.problem:
        advice = f"\n  `minidora reset {exercise.lesson}` puts the notebook back"
    text = result.message if result.state != "not started" else "not started"
    message = "" if text == "not started" else "\n  " + escape(text).replace("\n", "\n  ")
    return first + where + message + advice


def grade_class(report: Path, named: list[Path], limits: Limits) -> None:
    """Grade the one folder of submissions, print points by student, write the report."""
    if len(named) != 1 or not named[0].is_dir():
        got = ", ".join(map(str, named)) or "none"
        raise folders.UserError(
            "--report needs one folder of submissions (STUDENT/*.ipynb or STUDENT.ipynb), "
            f"got {got}"
        )
    console = Console(highlight=False)
    graded = submissions.grade(named[0], limits)
    if not graded:
        raise folders.UserError(f"no exercise notebook was found in {named[0]}")
    submissions.write_report(report, graded)
    table = Table("student", "lesson", "points", "of", "not done")
    for submission, results in graded:
        open_ones = [result.exercise.number for result in results if result.state != "done"]
        table.add_row(
            escape(submission.student),
            str(submission.lesson),
            str(sum(result.points for result in results)),
            str(sum(result.exercise.points for result in results)),
            ", ".join(open_ones),
        )
    console.print(table)
    console.print(escape(f"{len(graded)} notebooks; every message is in {report}"))
