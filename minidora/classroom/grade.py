"""Judge notebooks from outside: run each in a process of its own, and check what it defines.

What runs a learner's code (runner/worker.py) never decides anything: it is asked for plain data,
and the check judges that here. The notebook's own check cells and stored outputs are not looked at.
"""

import ast
import json
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from minidora.checks import LESSONS
from minidora.checks.core import Answer, CheckFailed, Exercise, Lesson, NotStarted
from minidora.runner.process import Lost, Worker, WorkerPool

CHECK_CELL = re.compile(r"\s*checks\.\w+\([^\n]*\)\s*;?\s*")
LARGEST_NOTEBOOK = 50 * 2**20
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


# ---- Notebooks as a learner may leave them ----


@dataclass
class Cell:
    index: int  # from 1, as a person counts
    code: bool
    source: str
    grade_id: str


@dataclass
class Notebook:
    """A notebook file; `problem` says why it has no cells."""

    path: Path
    cells: list[Cell] = field(default_factory=list)
    problem: str = ""

    def cells_of(self, exercise: Exercise) -> list[Cell]:
        """The cells that define the exercise's answer; else its cell by nbgrader's name."""
        code = [cell for cell in self.cells if cell.code]
        defining = [cell for cell in code if exercise.answer in defined_names(cell.source)]
        return defining or [cell for cell in code if cell.grade_id == exercise.name]

    def untouched(self, exercise: Exercise) -> bool:
        """Whether one cell defines the answer, and nothing was written into it yet."""
        own = self.cells_of(exercise)
        others = [cell.source for cell in self.cells if cell.code and cell not in own]
        patched = any(f"{exercise.answer}." in source for source in others)  # a method, later
        return len(own) == 1 and is_stub(own[0].source) and not patched

    def lesson(self) -> int | None:
        """Which lesson's exercises it holds, by its cells; by its name where they say nothing."""
        found = {
            number: sum(bool(self.cells_of(exercise)) for exercise in lesson.exercises)
            for number, lesson in LESSONS.items()
        }
        best = max(found, key=lambda number: found[number])
        if found[best]:
            return best
        start = re.match(r"0*(\d+)_", self.path.name)
        return int(start[1]) if start and int(start[1]) in LESSONS else None


def read_notebook(path: Path) -> Notebook:
    """Read whatever is there: a half-saved or foreign file gives a notebook with a problem."""
    try:
        if path.stat().st_size > LARGEST_NOTEBOOK:
            return Notebook(path, problem=f"larger than {LARGEST_NOTEBOOK // 2**20} MiB")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        cells = content["cells"]
        return Notebook(path, [_cell(index, cell) for index, cell in enumerate(cells, start=1)])
    except json.JSONDecodeError as error:
        return Notebook(
            path,
            problem=f"its JSON breaks off or is wrong in line {error.lineno}: "
            "an older copy may lie in .ipynb_checkpoints beside it",
        )
    except (OSError, UnicodeDecodeError) as error:
        return Notebook(path, problem=f"cannot be read: {error}")
    except (KeyError, TypeError, AttributeError, RecursionError):
        return Notebook(path, problem="no notebook of format 4: it has no list of cells")


def _cell(index: int, cell: dict[str, Any]) -> Cell:
    source = cell.get("source", "")
    if isinstance(source, list):
        source = "".join(part for part in source if isinstance(part, str))
    metadata = cell.get("metadata")
    nbgrader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = nbgrader.get("grade_id") if isinstance(nbgrader, dict) else ""
    return Cell(index, cell.get("cell_type") == "code", str(source), str(grade_id))


def defined_names(source: str) -> set[str]:
    """Names that a cell's top level defines; by the look of its lines where it does not parse."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError):
        return set(re.findall(r"^(?:async\s+)?(?:def|class)\s+(\w+)", source, re.MULTILINE))
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def is_stub(source: str) -> bool:
    """Whether all that its functions do is to raise NotImplementedError."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return False
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return bool(functions) and all(map(_only_raises, functions))


def _only_raises(function: ast.FunctionDef) -> bool:
    body = function.body[ast.get_docstring(function) is not None :]
    lines = [ast.unparse(line) for line in body]
    if lines[:1] == ["super().__init__()"]:  # what a class gets for free
        lines = lines[1:]
    return len(lines) == 1 and lines[0].startswith("raise NotImplementedError")


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
