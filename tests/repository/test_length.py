"""No lesson grows: the words of each, counted by minidora/classroom/length.py."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minidora import cli
from minidora.classroom.length import Length, length

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook(folder: Path, *texts: str) -> Path:
    cells = [{"cell_type": "markdown", "source": text} for text in texts]
    cells.append({"cell_type": "code", "source": "# code does not count"})
    path = folder / "lesson.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    return path


def test_the_counter_by_hand(tmp_path):
    path = notebook(
        tmp_path,
        "# Lesson one\n\nOne, two $a + b = c$ four.",  # 2 + 4 words
        "## 1. Part\n\n| a | b |\n|---|---|\n| c | d |",  # 2 + 4
        "## 2. Other\n\n**Predict:** what?",
        "<details><summary>Yes, folded</summary>\n\n$$x$$\n</details>",
    )
    assert length(path) == Length(
        words=2 + 4 + 2 + 4 + 2 + 2, folded=3, sections=2, predictions=1, folds=1
    )


def test_a_fold_that_is_not_closed_is_said(tmp_path):
    with pytest.raises(ValueError, match="lesson.ipynb: a <details> is not closed"):
        length(notebook(tmp_path, "# One", "<details> and no end"))


def test_the_command_lists_every_lesson():
    done = CliRunner().invoke(cli.app, ["notebooks", "length", *map(str, LESSONS)])
    assert done.exit_code == 0, done.output
    rows = done.output.splitlines()[1:]
    assert [row.split()[-1] for row in rows] == [path.name for path in LESSONS]
    assert int(rows[0].split()[0]) == length(LESSONS[0]).words


# The first edition's words, folded ones included: no lesson may become longer than it was.
FIRST_EDITION = {"01": 2515, "02": 2388, "03": 3177, "04": 1960, "05": 3096, "06": 2749}


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_stays_within_its_limits(path: Path) -> None:
    found, number = length(path), path.name[:2]
    assert found.words <= (2800 if number == "05" else 2200)
    assert found.sections <= 11
    assert found.all_words <= FIRST_EDITION.get(number, 3177)
    assert found.predictions >= 4
    assert found.folds > found.predictions  # an answer to each, and to the problems
    problems = path.read_text(encoding="utf-8").count("**Problem ")
    assert problems >= (2 if number in ("01", "02", "04") else 4)
