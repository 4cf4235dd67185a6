"""A check by hand is short: what takes more belongs into the battery that all specs share."""

import ast
from pathlib import Path

import pytest

import minidora.checks

FILES = sorted(Path(minidora.checks.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_function_of_a_check_is_longer_than_60_lines(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.FunctionDef)]  # fmt: skip
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: size for name, size in sizes.items() if size > 60} == {}
