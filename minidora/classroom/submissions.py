"""Grade a class: every submission's notebooks against the checks, into a table.

Students' code runs in a sandbox where there is one (runner/sandbox.py), and apart from the verdict
everywhere: the checks run here, on data that the student's process hands over.
"""

import csv
import hashlib
import io
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minidora.checks import LESSONS
from minidora.checks.exercise import State
from minidora.classroom.files import UserError, write_whole
from minidora.classroom.grade import Limits, Result, judge
from minidora.classroom.notebook import Notebook, read_notebook
from minidora.runner import sandbox
from minidora.runner.process import WorkerPool

COLUMNS = (
    "student", "notebook", "exercise", "title", "state", "points", "max_points", "message",
    "fingerprint",
)  # fmt: skip
LONGEST = 4000
"""Letters of a message in the report; a spreadsheet's cell holds 32,767."""

SKIPPED = {"__MACOSX"}
"""Folders that a program for archives adds; those that begin with a dot are skipped too."""

Row = dict[str, str]
"""A row of the report: one exercise of one student."""


# ---- Who handed in what ----


@dataclass(frozen=True, eq=False)
class Submission:
    """One student's notebook of one lesson; None where there is none.

    student: as the file or folder is called, whatever that is: readable(student) can be printed.
    """

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
    """(student, notebook); (student, folder) where a student's folder holds none.

    Links are left out: one could point at somebody else's work.
    """
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or _skipped(entry.name):
            continue
        if entry.is_dir():
            paths = []
            for where, folders, names in os.walk(entry):
                folders[:] = sorted(name for name in folders if not _skipped(name))
                paths += [Path(where, name) for name in sorted(names) if _is_notebook(where, name)]
            yield from ((entry.name, path) for path in paths or [entry])
        elif _is_notebook(str(folder), entry.name):
            yield entry.stem, entry


def _skipped(name: str) -> bool:
    return name.startswith(".") or name in SKIPPED


def _is_notebook(folder: str, name: str) -> bool:
    if not name.lower().endswith(".ipynb") or name.startswith("."):
        return False
    return not os.path.islink(os.path.join(folder, name))


def _choose(student: str, lesson: int, notebooks: list[Notebook], damaged: list[str]) -> Submission:
    if not notebooks:
        return Submission(student, lesson, None, "; ".join(damaged))
    name = LESSONS[lesson].name
    chosen = max(notebooks, key=lambda one: (one.path.stem == name, one.path.stat().st_mtime))
    others = len(notebooks) - 1
    note = f"{others} more notebook(s) of this lesson were left out" if others else ""
    return Submission(student, lesson, chosen, note)


# ---- Grading ----


def grade(
    folder: Path,
    report: Path,
    limits: Limits,
    sandboxed: bool,
    progress: Callable[[str], None] = print,
) -> list[Row]:
    """Judge all submissions in the folder, one on each core at a time, and write the report.

    The report is written as it goes. Of a report that is there already, what still holds is kept:
    the rows of notebooks that have not changed since, graded by the same checks.

    Args:
        progress: what to do with a line on each submission that is done.

    Raises:
        UserError: the file of the report is there, and is no report.
        KeyboardInterrupt: the report holds what was graded until then.
    """
    submissions = collect(folder)
    if not submissions:
        return []
    course = _course(limits, sandboxed)
    marks = {one: _fingerprint(one, course) for one in submissions}
    before = _read(report)
    rows = {
        one: before[marks[one]]
        for one in submissions
        if len(before.get(marks[one], [])) == len(LESSONS[one.lesson].exercises)
    }
    as_it_goes = report.is_file() or not report.exists()  # and not to a pipe
    if as_it_goes:
        _write(report, rows.values())
    if rows:
        progress(f"{len(rows)} of {len(submissions)} are in {report} already, and unchanged.")

    def one(submission: Submission) -> list[Row]:
        results = _judge(workers, folder, submission, limits)
        return [_row(submission, result, marks[submission]) for result in results]

    with ThreadPoolExecutor(os.cpu_count()) as threads, WorkerPool(sandboxed) as workers:
        left = {threads.submit(one, each): each for each in submissions if each not in rows}
        try:
            for future in as_completed(left):
                submission = left[future]
                rows[submission] = future.result()
                if as_it_goes:
                    _append(report, rows[submission])
                points = sum(int(row["points"]) for row in rows[submission])
                progress(
                    f"{len(rows)} of {len(submissions)}: {readable(submission.student)}, "
                    f"lesson {submission.lesson}, {points} points"
                )
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    ordered = [rows[submission] for submission in submissions]
    _write(report, ordered)
    return [row for part in ordered for row in part]


def _judge(
    workers: WorkerPool, folder: Path, submission: Submission, limits: Limits
) -> list[Result]:
    exercises = LESSONS[submission.lesson].exercises
    notebook = submission.notebook
    if notebook is None:
        return [Result(one, State.MISSING, "no notebook of this lesson.") for one in exercises]
    own = notebook.path if notebook.path.parent == folder else notebook.path.parent
    try:
        return judge(workers, notebook, LESSONS[submission.lesson], exercises, limits, own)
    except Exception:  # a fault of ours with one notebook must not stop the others
        stack = traceback.format_exc()
        return [Result(one, State.CHECK_ERROR, stack) for one in exercises]


# ---- The report ----


def _course(limits: Limits, sandboxed: bool) -> bytes:
    """What a verdict depends on beside the notebook: the checks, and how they are made."""
    digest = hashlib.sha256(repr((limits, sandboxed)).encode())
    for path in sorted(sandbox.PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _fingerprint(submission: Submission, course: bytes) -> str:
    """Differs when the notebook or the course does."""
    digest = hashlib.sha256(course)
    digest.update(repr((submission.student, submission.lesson, submission.note)).encode())
    if submission.notebook is not None:
        digest.update(submission.notebook.problem.encode("utf-8", "backslashreplace"))
        for cell in submission.notebook.cells:
            digest.update(repr((cell.code, cell.source, cell.grade_id)).encode())
    return digest.hexdigest()[:16]


def _row(submission: Submission, result: Result, fingerprint: str) -> Row:
    exercise = result.exercise
    message = readable(f"{result.message} {submission.note}")
    values = (
        readable(submission.student),
        readable(submission.notebook.path.name) if submission.notebook else "",
        exercise.number,
        exercise.title,
        result.state.value,
        str(result.points),
        str(exercise.points),
        message if len(message) <= LONGEST else f"{message[:LONGEST]} ...",
        "" if result.state is State.CHECK_ERROR else fingerprint,  # to be judged again
    )
    return {name: _harmless(value) for name, value in zip(COLUMNS, values, strict=True)}


def _read(report: Path) -> dict[str, list[Row]]:
    """The rows of an earlier report, by fingerprint."""
    if not report.is_file() or not report.stat().st_size:
        return {}
    try:
        with report.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ())[:-1] != COLUMNS[:-1]:
                raise ValueError
            rows: dict[str, list[Row]] = {}
            for row in reader:
                if None not in row.values():  # as in a line that was cut off
                    rows.setdefault(row["fingerprint"], []).append(row)
            return rows
    except (ValueError, csv.Error):
        raise UserError(
            f"{report} is there already, and is no report of a class: name another file"
        ) from None


def _write(report: Path, graded: Iterable[list[Row]]) -> None:
    """The whole report, in this order."""
    file = io.StringIO()
    csv.writer(file).writerow(COLUMNS)
    for rows in graded:
        csv.DictWriter(file, COLUMNS).writerows(rows)
    write_whole(report, file.getvalue())


def _append(report: Path, rows: list[Row]) -> None:
    with report.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writerows(rows)


def readable(text: str) -> str:
    """Text that can be printed and stored: in one line, and with escapes for the rest.

    A file's name that is no UTF-8 is read as Latin-1.
    """
    with suppress(UnicodeEncodeError):
        if any("\udc80" <= letter <= "\udcff" for letter in text):
            text = text.encode("utf-8", "surrogateescape").decode("latin-1")
    return "".join(
        letter if letter.isprintable() or letter in "\u200c\u200d"  # which join letters
        else letter.encode("unicode_escape").decode()
        for letter in " ".join(text.split())
    )  # fmt: skip


def _harmless(value: str) -> str:
    """A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@") else value
