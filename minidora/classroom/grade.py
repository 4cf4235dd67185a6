"""Judge notebooks from outside: run each in a process of its own, and check what it defines.

What runs a learner's code (runner/worker.py) never decides anything: it is asked for plain data,
and the check judges that here. The notebook's own check cells and stored outputs are not looked at.
"""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from minidora.checks.exercise import (
    Answer,
    CheckError,
    CheckFailed,
    Exercise,
    Lesson,
    NotPossible,
    NotStarted,
    State,
)
from minidora.classroom.notebook import CHECK_CELL, Notebook
from minidora.runner import sandbox
from minidora.runner.probe import PATIENCE
from minidora.runner.process import Lost, NotReady, Worker, WorkerPool

GRACE = 5.0
"""Seconds that a process may answer late, before it is ended."""
MOST_STARTS = 10
"""How often the process of one notebook is started anew."""


@dataclass(frozen=True)
class Limits:
    """Of one notebook: seconds for all of it and for one cell, and GiB of memory."""

    seconds: float = 300.0
    cell_seconds: float = 60.0
    memory_gib: float = 4.0


@dataclass(frozen=True)
class Result:
    """What became of one exercise.

    message: why it is not done. cell: number of the cell with the answer, counted from 1.
    """

    exercise: Exercise
    state: State
    message: str = ""
    cell: int | None = None

    @property
    def points(self) -> int:
        return self.exercise.points if self.state is State.DONE else 0


# ---- A notebook at work ----


class Session:
    """A notebook at work: its cells run in a worker, which is started again when it is lost."""

    def __init__(
        self,
        workers: WorkerPool,
        notebook: Notebook,
        lesson: Lesson,
        limits: Limits,
        submission: Path | None,
    ) -> None:
        self.workers = workers
        self.notebook = notebook
        self.lesson = lesson
        self.limits = limits
        self.submission = submission
        self.deadline = time.monotonic() + limits.seconds
        self.worker: Worker | None = None
        self.starts = 0
        self.not_ready = ""  # why no process could be started
        self.errors: dict[int, dict[str, Any]] = {}  # by cell
        self.fatal: set[int] = set()  # cells that ended the process

    def __enter__(self) -> Self:
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
            return self.worker.ask(action, min(PATIENCE * wait + GRACE, left), **request)
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
        except NotReady as fault:
            self.not_ready = str(fault)
            return {"error": "lost", "message": str(fault)}
        except Lost as lost:
            return {"error": "lost", "message": str(lost)}

    def _run_cells(self) -> None:
        """Run every code cell but the checks, again without those that ended the process."""
        while self.worker is None:
            self._start()
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

    def _start(self) -> None:
        if self.starts == MOST_STARTS:
            raise Lost(f"not run again: its process ended {MOST_STARTS} times")
        self.starts += 1
        begun = time.monotonic()
        memory = self.limits.memory_gib
        place: dict[str, Any] = {"folder": self.folder.name, "show": "", "hide": False}
        if self.submission is None:
            self.worker = self.workers.start(memory)
            place["folder"] = str(self.notebook.path.parent.resolve())
        elif self.workers.sandboxed:
            self.worker = self.workers.start_in_sandbox(
                memory, self.lesson.closed, self.lesson.opened, self.submission
            )
            place = {"folder": sandbox.WORK, "show": sandbox.SUBMISSION, "hide": True}
        else:
            self.worker = self.workers.start(memory)
        self.deadline += time.monotonic() - begun  # this is not the notebook's time
        self.ask("enter", 30.0, **place)

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
    submission: Path | None = None,
    debug: bool = False,
) -> list[Result]:
    """Run a notebook, unless nothing was written into it, and check these of its exercises.

    Args:
        submission: in a class, the folder (or the notebook alone) that the student's code may
            see; None for a learner's own notebook, which runs beside its files.
        debug: raise what breaks a check, instead of a Result that tells of it.
    """
    if notebook.problem:
        return [Result(exercise, State.FAILING, notebook.problem) for exercise in exercises]
    with Session(workers, notebook, lesson, limits, submission) as session:
        if notebook.untouched(lesson):
            return [
                Result(one, State.NOT_STARTED, one.not_started, notebook.cells_of(one)[0].index)
                for one in exercises
            ]
        return [_judge_one(session, exercise, debug) for exercise in exercises]


def _judge_one(session: Session, exercise: Exercise, debug: bool) -> Result:
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
        exercise.check(Answer(exercise, reach), debug)
    except NotStarted as failed:
        return Result(exercise, State.NOT_STARTED, str(failed), cell)
    except NotPossible as failed:
        return Result(exercise, State.NOT_POSSIBLE, str(failed), cell)
    except CheckFailed as failed:
        if session.not_ready:
            return Result(exercise, State.CHECK_ERROR, session.not_ready, cell)
        message = str(failed)
        if len(cells) > 1:
            numbers = " and ".join(str(cell.index) for cell in cells)
            message += f"\nCells {numbers} define {exercise.answer}: the last one counts."
        return Result(exercise, State.MISSING if missing else State.FAILING, message, cell)
    except CheckError as error:
        return Result(exercise, State.CHECK_ERROR, str(error), cell)
    return Result(exercise, State.DONE, cell=cell)
