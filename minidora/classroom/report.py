"""What the terminal says about exercises: a learner's progress, and the table of a class."""

import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minidora.checks import LESSONS
from minidora.checks.exercise import Exercise, Lesson, State
from minidora.classroom import folder as folders
from minidora.classroom import submissions
from minidora.classroom.files import UserError
from minidora.classroom.grade import Limits, Result, judge
from minidora.classroom.notebook import Notebook
from minidora.runner import sandbox
from minidora.runner.process import WorkerPool

STYLES = {
    State.DONE: "green",
    State.FAILING: "red",
    State.NOT_STARTED: "dim",
    State.MISSING: "yellow",
    State.CHECK_ERROR: "magenta",
    State.NOT_POSSIBLE: "dim",
}
SAVED = "What counts is what is saved: Ctrl+S in JupyterLab."


def status(folder: Path | None, limits: Limits | None = None) -> None:
    """Print the table of all exercises, the minutes left and the next one."""
    console = Console(highlight=False)
    work = folders.work_folder(folder)
    for line in folders.renew(work):
        console.print(escape(line))
    table = Table("exercise", "", "state", "minutes", title=f"Exercises in {escape(str(work))}")
    left: list[tuple[Result, Notebook | None]] = []
    impossible: list[Result] = []
    total = done = 0
    with WorkerPool() as workers:
        for lesson in LESSONS.values():
            notebook, note = folders.find_notebook(work, lesson)
            _print_notes(console, notebook, lesson, note)
            for result in _judge(workers, notebook, lesson, lesson.exercises, limits or Limits()):
                exercise = result.exercise
                total += 1
                done += result.state is State.DONE
                style = STYLES[result.state]
                table.add_row(
                    exercise.number, exercise.title, f"[{style}]{result.state}[/]",
                    str(exercise.minutes),
                )  # fmt: skip
                if result.state is State.NOT_POSSIBLE:
                    impossible.append(result)
                elif result.state is not State.DONE:
                    left.append((result, notebook))
    console.print(table)
    for result, _ in left:
        if result.state is State.CHECK_ERROR:
            console.print(escape(result.message), soft_wrap=True)
    if impossible:
        numbers = ", ".join(result.exercise.number for result in impossible)
        console.print(escape(f"Not possible here: {numbers}. {impossible[0].message}"))
        total -= len(impossible)
    if not left:
        console.print(f"All {total} are done: you have built every piece of it yourself.")
        return
    minutes = sum(result.exercise.minutes for result, _ in left)
    console.print(f"{done} of {total} done, about {minutes} minutes left. {SAVED}")
    result, notebook = left[0]
    where = f" in {notebook.path}" if notebook else ""
    number = result.exercise.number
    console.print(escape(f"Next: {number}, {result.exercise.title}{where}"))
    if result.state is State.FAILING:
        command = folders.command(work, f"check {number}")
        console.print(escape(f"What is wrong with it: {command}"), soft_wrap=True)


def _print_notes(console: Console, notebook: Notebook | None, lesson: Lesson, note: str) -> None:
    """Once for a lesson: which notebook counts, and why one cannot be read."""
    if note:
        console.print(escape(f"Note: {note}."))
    if notebook is not None and notebook.problem:
        again = folders.command(notebook.path.parents[1], f"reset {lesson.number}")
        console.print(escape(f"Note: {notebook.path} {notebook.problem}. `{again}` puts it back."))


def check(
    folder: Path | None,
    what: list[str],
    limits: Limits,
    quiet: bool = False,
    debug: bool = False,
) -> bool:
    """Check lessons or exercises (all without any) and print each; whether all are done.

    With debug, raise what breaks a check.
    """
    console = Console(highlight=False, quiet=quiet, soft_wrap=True)
    work = folders.work_folder(folder)
    chosen: dict[int, list[Exercise]] = {}
    for text in what or [str(number) for number in LESSONS]:
        lesson, exercises = folders.select(text)
        chosen.setdefault(lesson.number, []).extend(exercises)
    states: set[State] = set()
    with WorkerPool() as workers:
        for number, exercises in chosen.items():
            notebook, note = folders.find_notebook(work, LESSONS[number])
            _print_notes(console, notebook, LESSONS[number], note)
            for result in _judge(workers, notebook, LESSONS[number], exercises, limits, debug):
                console.print(_line(result, notebook))
                states.add(result.state)
    if State.NOT_STARTED in states:
        console.print(SAVED)
    return states <= {State.DONE, State.NOT_POSSIBLE}


def _judge(
    workers: WorkerPool,
    notebook: Notebook | None,
    lesson: Lesson,
    exercises: list[Exercise],
    limits: Limits,
    debug: bool = False,
) -> list[Result]:
    if notebook is None:
        return [Result(exercise, State.MISSING, "no notebook") for exercise in exercises]
    return judge(workers, notebook, lesson, exercises, limits, debug=debug)


def _line(result: Result, notebook: Notebook | None) -> str:
    """One exercise: state, and where and why it is not done."""
    exercise = result.exercise
    first = f"[{STYLES[result.state]}]{result.state}[/]  {exercise.number} {exercise.answer}"
    if result.state is State.DONE:
        return first
    place = f", cell {result.cell}" if result.cell else ""
    where = f"  [dim]{escape(str(notebook.path))}{place}[/]" if notebook else ""
    if notebook is None or notebook.problem or result.state is State.NOT_STARTED:
        return first + where  # the note above says why, or there is nothing to say
    text = result.message
    if result.state is State.MISSING:
        again = folders.command(notebook.path.parents[1], f"reset {exercise.number}")
        text += f"\n`{again}` puts its cell back"
    return first + where + "\n  " + escape(text).replace("\n", "\n  ")


def grade_class(
    report: Path, named: list[Path], limits: Limits, require_sandbox: bool = False
) -> None:
    """Grade the one folder of submissions, print points by student, write the report."""
    if len(named) != 1 or not named[0].is_dir():
        got = ", ".join(map(str, named)) or "none"
        raise UserError(
            "--report needs one folder of submissions (STUDENT/*.ipynb or STUDENT.ipynb), "
            f"got {got}"
        )
    console = Console(highlight=False, soft_wrap=True)
    problem = sandbox.problem()
    if problem and require_sandbox:
        raise UserError(f"there is no sandbox, and --require-sandbox is given: {problem}")
    if problem:
        console.print(escape(f"Deliberate cheats are not stopped: {problem}."))
    else:
        os.environ["MINIDORA_DEVICE"] = "cpu"  # no GPU is in the sandbox

    def progress(line: str) -> None:
        console.print(escape(line))

    try:
        rows = submissions.grade(named[0], report, limits, not problem, progress)
    except KeyboardInterrupt:
        progress(
            f"Interrupted. What is graded is in {report}; the same command goes on from there."
        )
        raise
    if not rows:
        raise UserError(f"no exercise notebook was found in {named[0]}")
    table = Table("student", "lesson", "points", "of", "not done")
    graded: dict[tuple[str, str], list[submissions.Row]] = {}
    for row in rows:
        graded.setdefault((row["student"], row["exercise"].split(".")[0]), []).append(row)
    for (student, lesson), part in graded.items():
        table.add_row(
            escape(student),
            lesson,
            str(sum(int(row["points"]) for row in part)),
            str(sum(int(row["max_points"]) for row in part)),
            ", ".join(row["exercise"] for row in part if row["state"] != State.DONE),
        )
    console.print(table)
    console.print(escape(f"{len(graded)} notebooks; every message is in {report}"))
