"""A new exercise, added by the way that docs/teaching.md shows, in a copy of the course."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minidora.classroom import draft
from minidora.classroom.files import UserError
from minidora.classroom.folder import ROOT

NAME = "03_dora_decomposition"
EXAMPLE = draft.Draft(
    "3.9", "row_max", "Title", "easy", 5, "a thing", "Which?", "(out, in) -> (out,)", "weight"
)


def section() -> str:
    text = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    return text[text.index("## Writing an exercise") :]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(), re.DOTALL)


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("course")
    for name in ("minidora", "solutions", "exercises", "notebooks"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "minidora_command.py", root)
    return root


def run(course: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=course,
        env=os.environ | {"PYTHONPATH": str(course)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def source(cell: dict[str, object]) -> str:
    return "".join(cell["source"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_exercise_is_added_as_the_docs_say(course: Path) -> None:
    [command], [check, solution] = blocks("bash"), blocks("python")
    assert len((command + check + solution).splitlines()) <= 22, "about 20 lines"
    typed = shlex.split(command.replace("\\\n", ""))
    assert typed[:3] == ["minidora", "exercise", "new"]
    done = run(course, "-m", *typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has 3.9, row_cosine") == 2

    checks = course / "minidora" / "checks" / "dora_decomposition.py"
    text = checks.read_text()
    raising = re.findall(r"    raise NotImplementedError\(.*\n", text)
    assert len(raising) == 1
    checks.write_text(text.replace(raising[0], check))
    path = course / "solutions" / f"{NAME}.ipynb"
    content = json.loads(path.read_text())
    heading, answer, last = content["cells"][-3:]
    assert source(heading).startswith("## Exercise 3.9: How far a row turned\n")
    answer["source"] = re.sub(r"    raise NotImpl.*\n", lambda _: solution, source(answer))
    assert source(last) == "checks.row_cosine(row_cosine)"
    path.write_text(json.dumps(content))

    style = run(course, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "minidora")
    assert style.returncode == 0, style.stdout
    built = run(course, "-m", "minidora", "build")
    assert built.returncode == 0, built.stderr
    assert f"{NAME}.ipynb written" in built.stdout
    stub = json.loads((course / "exercises" / f"{NAME}.ipynb").read_text())["cells"][-2]
    assert 'raise NotImplementedError("exercise 3.9: row_cosine")' in source(stub)
    hint = run(course, "-m", "minidora", "hint", "3.9")
    assert hint.stdout == "What divides a dot product into a cosine?\n"

    verdicts = run(course, "-c", JUDGE, source(answer))
    assert verdicts.returncode == 0, verdicts.stderr
    right, dots, columns, epsilon = json.loads(verdicts.stdout.splitlines()[-1])
    assert right == ""
    assert "these are dot products: divide by both lengths" in dots
    assert "one number per input (dim=0): it is one per row" in columns
    assert epsilon, "the battery knows what no author has to name"


JUDGE = """
import json, sys, torch
from torch import Tensor
from minidora import checks
from minidora.checks.exercise import CheckFailed

exec(sys.argv[1])
answers = [
    row_cosine,
    lambda weight, updated: (weight * updated).sum(1),
    lambda weight, updated: torch.cosine_similarity(weight, updated, dim=0),
    lambda weight, updated: torch.cosine_similarity(weight, updated, dim=1, eps=1e-3),
]
said = []
for answer in answers:
    try:
        checks.row_cosine(answer)
        said.append("")
    except CheckFailed as refused:
        said.append(str(refused))
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("number", "3.1", "3.1 is there already, row_norm"),
        ("number", "9.1", "one of the lessons 1, 2, 3"),
        ("number", "3", "is not a number for an exercise"),
        ("number", "3.9\n", "is not a number for an exercise"),
        ("name", "row_norm", "cannot be the name"),
        ("name", "RowNorm", "cannot be the name"),
        ("name", "lambda", "cannot be the name"),
        ("name", "a-b", "cannot be the name"),
        ("title", "", "the title must be one line"),
        ("hint", "one\ntwo", "the hint must be one line"),
        ("shapes", "(out, in)", "do not fit"),
        ("shapes", "(out, in), (out,) -> (out,)", "do not fit"),
        ("takes", "weight, alpha", "do not fit"),
        ("takes", "1st", "do not fit"),
    ],
)
def test_what_cannot_be_meant_is_refused(field: str, value: str, says: str) -> None:
    from dataclasses import replace

    with pytest.raises(UserError) as caught:
        draft.new_exercise(ROOT, replace(EXAMPLE, **{field: value}))  # type: ignore[arg-type]
    assert says in str(caught.value)


@pytest.mark.parametrize("lesson", range(1, 8))
def test_every_lesson_can_have_one_more(lesson: int) -> None:
    from dataclasses import replace

    written = draft.new_exercise(ROOT, replace(EXAMPLE, number=f"{lesson}.99"))
    check, notebook = written.values()
    assert check.count("from minidora.checks.spec import") == 1
    compile(check, "file", "exec")
    assert len(json.loads(notebook)["cells"]) > 3
