"""What the exercises say of themselves, read from the check files without importing torch.

`minidora hint 3.1` loads this file by its path: it imports nothing but the standard library.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """The literals of one exercise's decorator."""

    number: str  # "3.1"
    name: str  # "row_norm": the check's name
    answer: str  # what the learner defines: the same, or "DoRALinear"
    title: str
    difficulty: str
    minutes: int
    teaches: str
    hint: str
    lesson: str  # "dora_decomposition": the check file's name


def entries(folder: Path = HERE) -> list[Entry]:
    """Every exercise of the check files in a folder, by number."""
    found = [entry for path in folder.glob("*.py") for entry in _of_file(path)]
    return sorted(found, key=lambda entry: [int(part) for part in entry.number.split(".")])


def _of_file(path: Path) -> Iterator[Entry]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in node.decorator_list:
            told = _literals(call) if isinstance(call, ast.Call) else {}
            if "hint" in told:
                told.setdefault("answer", node.name)
                yield Entry(name=node.name, lesson=path.stem, **told)


def _literals(call: ast.Call) -> dict[str, Any]:
    """@lesson.exercise("3.1", title=...) or @spec(lesson, "3.1", title=...)."""
    told = {
        keyword.arg: ast.literal_eval(keyword.value)
        for keyword in call.keywords
        if keyword.arg in Entry.__annotations__
    }
    numbers = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    return {**told, "number": numbers[0]} if numbers else {}
