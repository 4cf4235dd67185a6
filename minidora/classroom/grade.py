"""Judge notebooks from outside: run each in a process of its own, and check what it defines.

What runs a learner's code (runner/worker.py) never decides anything: it is asked for plain data,
and the check judges that here. The notebook's own check cells and stored outputs are not looked at.
"""

import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from minidora.checks.exercise import Answer, CheckFailed, Exercise, Lesson, NotStarted
from minidora.classroom.notebook import Notebook
from minidora.runner.process import Lost, Worker, WorkerPool

CHECK_CELL = re.compile(r"\s*checks\.\w+\([^\n]*\)\s*;?\s*")
GRACE = 5.0
"""Seconds that a process may answer late, before it is ended."""


@dataclass(frozen=True)
class Limits:
    """Of one notebook: seconds for all of it and for one cell, and GiB of memory."""

    seconds: float = 300.0
    cell_seconds: float = 60.0
    memory_gib: float = 4.0


@dataclass(frozen=True)
class Result:
    """What became of one exercise.

    state: "done", "failing", "not started", or "missing" where nothing defines the answer.
    message: why it is not done. cell: number of the cell with the answer, counted from 1.
    """

    exercise: Exercise
    state: str
    message: str = ""
    cell: int | None = None

    @property
    def points(self) -> int:
        return self.exercise.points if self.state == "done" else 0


# ---- A notebook at work ----


class Session:
    """A notebook at work: its cells run in a worker, which is started again when it is lost."""

    def __init__(
        self,
        workers: WorkerPool,
        notebook: Notebook,
        lesson: Lesson,
        limits: Limits,
        shut: list[str],
    ) -> None:
        self.workers = workers
        self.notebook = notebook
        self.lesson = lesson
        self.limits = limits
        self.shut = shut
        self.deadline = time.monotonic() + limits.seconds
        self.worker: Worker | None = None
        self.errors: dict[int, dict[str, Any]] = {}  # by cell
        self.fatal: set[int] = set()  # cells that ended the process

    def __enter__(self) -> Self:
        # A class's code works in an empty folder, a learner's own beside the notebook.
        self.folder = tempfile.TemporaryDirectory(prefix="minidora-", ignore_cleanup_errors=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self.folder.cleanup()

    def ask(self, action: str, wait: float, **request: Any) -> dict[str, Any]:
        """As Worker.ask, within the time that is left; a lost process is ended."""
        assert self.worker is not None
        left = self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise Lost(f"the notebook took more than {self.limits.seconds:g} s")
            return self.worker.ask(action, min(wait + GRACE, left), **request)
        except Lost:
            self._end()
            raise

    def probe(self, exercise: Exercise, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        """The reply of a probe of the exercise's answer; a kind "lost" where there is none."""
        try:
            if self.worker is None:
                self._run_cells()
            return self.ask(
                "probe",
                exercise.seconds,
                answer=exercise.answer,
                name=name,
                args=args,
                kwargs=kwargs,
                seconds=exercise.seconds,
            )
        except Lost as lost:
            return {"error": "lost", "message": str(lost)}

    def _run_cells(self) -> None:
        """Run every code cell but the checks, again without those that ended the process."""
        while self.worker is None:
            begun = time.monotonic()
            self.worker = self.workers.start(self.limits.memory_gib)
            self.deadline += time.monotonic() - begun  # this is not the notebook's time
            folder = self.folder.name if self.shut else str(self.notebook.path.parent.resolve())
            self.ask("enter", 30.0, folder=folder, closed=self.lesson.closed, shut=self.shut)
            for cell in self.notebook.cells:
                skip = (
                    not cell.code or CHECK_CELL.fullmatch(cell.source) or cell.index in self.fatal
                )
                if skip or not cell.source.strip():
                    continue
                seconds = self.limits.cell_seconds
                try:
                    reply = self.ask(
                        "cell", seconds, index=cell.index, source=cell.source, seconds=seconds
                    )
                except Lost as lost:
                    self.errors[cell.index] = {"error": "lost", "message": str(lost)}
                    self.fatal.add(cell.index)
                    if time.monotonic() > self.deadline:
                        raise
                    break
                if "error" in reply:
                    self.errors[cell.index] = reply

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


# ---- Judging ----


def judge(
    workers: WorkerPool,
    notebook: Notebook,
    lesson: Lesson,
    exercises: Iterable[Exercise],
    limits: Limits,
    shut: list[str] | None = None,
) -> list[Result]:
    """Run a notebook and check these exercises of its lesson; it is not run for bare stubs.

    Args:
        shut: files and folders that its code may not open, in a class; None for a learner's own.
    """
    if notebook.problem:
        return [Result(exercise, "failing", notebook.problem) for exercise in exercises]
    with Session(workers, notebook, lesson, limits, shut or []) as session:
        return [
            Result(
                exercise, "not started", exercise.not_started, notebook.cells_of(exercise)[0].index
            )
            if notebook.untouched(exercise)
            else _judge_one(session, exercise)
            for exercise in exercises
        ]


def _judge_one(session: Session, exercise: Exercise) -> Result:
    cells = session.notebook.cells_of(exercise)
    cell = cells[-1].index if cells else None
    missing = False

    def reach(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal missing
        reply = session.probe(exercise, name, args, kwargs)
        if reply.get("error") != "missing":
            return reply
        for candidate in reversed(cells):
            if candidate.index in session.errors:  # the cell is there, but did not run
                return session.errors[candidate.index]
        missing = True
        return {"error": "lost", "message": f"no cell defines {exercise.answer}"}

    try:
        exercise.check(Answer(exercise, reach))
    except NotStarted as failed:
        return Result(exercise, "not started", str(failed), cell)
    except CheckFailed as failed:
        message = str(failed)
        if len(cells) > 1:
            numbers = " and ".join(str(cell.index) for cell in cells)
            message += f"\nCells {numbers} define {exercise.answer}: the last one counts."
        return Result(exercise, "missing" if missing else "failing", message, cell)
    except Exception as error:  # a check that an odd answer trips up must not stop the others
        text = f"{exercise.number} {exercise.answer}: the check could not read this answer"
        return Result(exercise, "failing", f"{text} ({type(error).__name__}: {error})", cell)
    return Result(exercise, "done", cell=cell)
