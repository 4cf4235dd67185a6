"""Read notebooks as learners leave them, without running anything."""

import ast
import json
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from minidora.checks import LESSONS
from minidora.checks.exercise import Exercise, Lesson

CHECK_CELL = re.compile(r"\s*checks\.\w+\([^\n]*\)\s*;?\s*")
LARGEST_NOTEBOOK = 50 * 2**20


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

    def untouched(self, lesson: Lesson) -> bool:
        """Whether nothing was written into it yet: it holds nothing but imports, stubs and checks.

        It need not be run then. Whatever else stands anywhere may define an answer.
        """
        answers = {exercise.answer for exercise in lesson.exercises}
        for source in (cell.source for cell in self.cells if cell.code):
            if is_stub(source) or CHECK_CELL.fullmatch(source):
                continue
            if not _imports(source) or defined_names(source) & answers:
                return False
        return all(len(self.cells_of(exercise)) == 1 for exercise in lesson.exercises)

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
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            return Notebook(path, problem="no file but a folder, a pipe or a device")
        if found.st_size > LARGEST_NOTEBOOK:
            return Notebook(path, problem=f"larger than {LARGEST_NOTEBOOK // 2**20} MiB")
        # No number in it matters here, and Python refuses to read an int of 5,000 digits.
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=float)
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


# ---- What a cell defines ----


def _parsed(source: str) -> list[ast.stmt] | None:
    """The cell's statements, with `pass` for magics and shell commands; None if it is no Python."""
    try:
        return ast.parse(re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@lru_cache(maxsize=4096)  # asked for each exercise
def defined_names(source: str) -> frozenset[str]:
    """Names that a cell defines, in any statement; by the look of its lines if it is no Python.

    What exec or globals() define is not seen.
    """
    body = _parsed(source)
    if body is None:
        return frozenset(re.findall(r"^(?:async\s+)?(?:def|class)\s+(\w+)", source, re.MULTILINE))
    names: set[str] = set()
    for node in _of_the_cell(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.Global):
            names |= set(node.names)
    return frozenset(names)


def _of_the_cell(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes in the cell's own scope, and `global` statements of the functions in it."""
    for node in nodes:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.Global))
        elif not isinstance(node, ast.Lambda | ast.comprehension):
            yield from _of_the_cell(ast.iter_child_nodes(node))


def is_stub(source: str) -> bool:
    """Whether a cell defines something, and all that it does is to raise NotImplementedError."""
    body = _parsed(source)
    return body is not None and _only_stubs(body)


def _only_stubs(body: list[ast.stmt]) -> bool:
    rest = [node for node in body if not _is_text(node)]
    return bool(rest) and all(
        (isinstance(node, ast.FunctionDef) and _only_raises(node))
        or (isinstance(node, ast.ClassDef) and not node.decorator_list and _only_stubs(node.body))
        for node in rest
    )


def _only_raises(function: ast.FunctionDef) -> bool:
    body = [node for node in function.body if not _is_text(node)]
    if len(body) == 2 and ast.dump(body[0]) == SUPER_INIT:  # what a class gets for free
        body = body[1:]
    decorators = {ast.unparse(node) for node in function.decorator_list}
    if len(body) != 1 or not isinstance(body[0], ast.Raise) or body[0].exc is None:
        return False
    raised = body[0].exc.func if isinstance(body[0].exc, ast.Call) else body[0].exc
    return (
        isinstance(raised, ast.Name)
        and raised.id == "NotImplementedError"
        and decorators <= {"staticmethod", "classmethod", "property", "triton.jit"}
        and not any(isinstance(node, ast.Call) for node in ast.walk(function.args))
    )


SUPER_INIT = ast.dump(ast.parse("super().__init__()").body[0])


def _is_text(node: ast.stmt) -> bool:
    """Whether it is a docstring, which does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _imports(source: str) -> bool:
    """Whether a cell does nothing, or imports from Python and the packages of the course alone."""
    known = {"minidora", "numpy", "scipy", "torch", *sys.stdlib_module_names}
    body = _parsed(source)
    if body is None:
        return False
    for node in body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.names[0].name != "*" and not node.level:
            modules = [node.module or ""]
        else:
            return False
        if not {module.split(".")[0] for module in modules} <= known:
            return False
    return True
