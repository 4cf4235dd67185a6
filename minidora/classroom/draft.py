"""Draft an exercise: its check, and its cells in the solutions."""

import ast
import hashlib
import json
import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidora import checks
from minidora.checks import spec
from minidora.checks.exercise import Exercise, Lesson
from minidora.classroom.authoring import BEGIN, END
from minidora.classroom.files import UserError

WIDTH = 100


@dataclass(frozen=True)
class Draft:
    """What an author says of a new exercise: the arguments of @spec, and the arguments' names.

    takes: "weight" or "weight, alpha", one for each in shapes: "(out, in), number -> (out,)".
    """

    number: str
    name: str
    title: str
    difficulty: str
    minutes: int
    teaches: str
    hint: str
    shapes: str
    takes: str


def new_exercise(root: Path, draft: Draft) -> dict[Path, str]:
    """The files of the course with the draft in them, and the text of each; nothing is written.

    The author then writes the oracle, the task and the solution, where the draft says so.

    Raises:
        UserError: the number or the name cannot be used, or shapes and takes do not fit.
    """
    lesson = _lesson(draft)
    file = root / "minidora" / "checks" / f"{lesson.name.partition('_')[2]}.py"
    solutions = root / "solutions" / f"{lesson.name}.ipynb"
    return {
        file: _with_check(file.read_text("utf-8"), draft),
        solutions: _with_cells(solutions.read_text("utf-8"), draft),
    }


def _lesson(draft: Draft) -> Lesson:
    """The lesson of the number; refuses what cannot be meant."""
    known = {exercise.number: exercise for exercise in checks.EXERCISES.values()}
    taken = {*vars(checks), "lesson", *vars(spec)}
    lessons = {str(one.number): one for one in checks.LESSONS.values()}
    lesson = lessons.get(draft.number.partition(".")[0])
    if lesson is None or not re.fullmatch(r"\d+\.[1-9]\d?", draft.number, re.ASCII):
        raise UserError(
            f"{draft.number[:20]!r} is not a number for an exercise: it is one of the lessons "
            f"{', '.join(lessons)}, a dot and a number, {lesson.number if lesson else 3}.9 say"
        )
    if draft.number in known:
        raise UserError(
            f"{draft.number} is there already, {known[draft.number].name}: take another"
        )
    usable = re.fullmatch(r"[a-z][a-z0-9_]{0,40}", draft.name) and not keyword.iskeyword(draft.name)
    if not usable or draft.name in taken:
        raise UserError(
            f"{draft.name[:40]!r} cannot be the name of an exercise: it is a new function's, "
            "in lower case with underscores, row_norm for example"
        )
    for what, text in (("title", draft.title), ("teaches", draft.teaches), ("hint", draft.hint)):
        if not text.strip() or "\n" in text or not text.isprintable():
            raise UserError(f"the {what} must be one line of text, got {text[:40]!r}")
    _signature(draft)
    return lesson


def _signature(draft: Draft) -> str:
    """weight: Tensor, alpha: float) -> Tensor"""
    given, arrow, result = draft.shapes.partition("->")
    kinds, results = _kinds(given), _kinds(result)
    names = [name.strip() for name in draft.takes.split(",")]
    sound = all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
    if not arrow or not kinds or not results or not sound or len(names) != len(kinds):
        raise UserError(
            f"--shapes {draft.shapes!r} and --takes {draft.takes!r} do not fit: "
            'they are as "(out, in), number -> (out,)" and "weight, alpha"'
        )
    taken = ", ".join(f"{name}: {kind}" for name, kind in zip(names, kinds, strict=True))
    returned = results[0] if len(results) == 1 else f"tuple[{', '.join(results)}]"
    return f"{taken}) -> {returned}"


def _kinds(shapes: str) -> list[str]:
    """A type for each part: a shape in parentheses is a tensor, a word a number."""
    parts = re.findall(r"(?:\w+\s*)?\([^()]*\)|\w+", shapes)
    return ["Tensor" if "(" in part else "float" for part in parts]


# ---- The two files ----


def _with_check(source: str, draft: Draft) -> str:
    fields = ("title", "difficulty", "minutes", "teaches", "hint", "shapes")
    values = [f"    {key}={_literal(getattr(draft, key))}," for key in fields]
    todo = "write the value here: slow, plain, and not as the solution does it"
    check = "\n".join(
        [
            "",
            "",
            "@spec(",
            "    lesson,",
            f"    {_literal(draft.number)},",
            *values,
            ")",
            f"def {draft.name}({_signature(draft)}:",
            f"    raise NotImplementedError({_literal(todo)})",
            "",
        ]
    )
    return _with_import(source, "minidora.checks.spec", "spec").rstrip() + "\n" + check


def _with_import(source: str, module: str, name: str) -> str:
    """The source with `from module import name`, in its alphabetical place."""
    imports = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minidora")
    ]
    for node in imports:
        if node.module == module:
            names = {alias.name for alias in node.names}
            return source if name in names else _replaced(source, node, module, names | {name})
    lines = source.splitlines(keepends=True)
    after = [node for node in imports if (node.module or "") > module]
    place = after[0].lineno - 1 if after else (imports[-1].end_lineno or 0)
    return "".join([*lines[:place], f"from {module} import {name}\n", *lines[place:]])


def _replaced(source: str, node: ast.ImportFrom, module: str, names: Iterable[str]) -> str:
    """The source with an import statement written anew, as ruff would."""
    ordered = sorted(names, key=_order)
    text = f"from {module} import {', '.join(ordered)}\n"
    if len(text) > WIDTH:
        text = f"from {module} import (\n" + "".join(f"    {one},\n" for one in ordered) + ")\n"
    lines = source.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def _order(name: str) -> tuple[bool, bool, str]:
    """CONSTANTS, then Classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name


def _with_cells(text: str, draft: Draft) -> str:
    content = json.loads(text)
    exercise = Exercise(
        number=draft.number, name=draft.name, title=draft.title, difficulty=draft.difficulty,
        minutes=draft.minutes, teaches=draft.teaches, hint=draft.hint,
    )  # fmt: skip
    solution = [
        f"def {draft.name}({_signature(draft)}:",
        f'    """{draft.title}."""',
        f"    {BEGIN}",
        f'    raise NotImplementedError("write the solution of {draft.number} here")',
        f"    {END}",
    ]
    content["cells"] += [
        _cell(draft, "markdown", f"{exercise.heading}\n\nThe task of {draft.number} goes here."),
        _cell(draft, "code", "\n".join(solution), grade_id=draft.name, solution=True),
        _cell(
            draft, "code", f"checks.{draft.name}({draft.name})",
            grade_id=f"{draft.name}_check", solution=False, points=exercise.points,
        ),
    ]  # fmt: skip
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def _cell(draft: Draft, kind: str, source: str, **nbgrader: Any) -> dict[str, Any]:
    """A cell as nbgrader wants it: a solution is written by the student, a check is graded."""
    metadata: dict[str, Any] = {}
    if nbgrader:
        graded = not nbgrader["solution"]
        metadata["nbgrader"] = {
            "grade": graded, "locked": graded, "schema_version": 3, "task": False, **nbgrader
        }  # fmt: skip
        if graded:
            metadata["tags"] = ["nbval-check-output"]
    name = f"{draft.number} {source}"
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": hashlib.sha256(name.encode()).hexdigest()[:8],
        "metadata": metadata,
        "source": source.splitlines(keepends=True),
    }
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


def _literal(value: str | int) -> str:
    """As ruff writes it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
