"""Read notebooks as learners leave them, without running anything."""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidora.checks import LESSONS
from minidora.checks.exercise import Exercise

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
