"""A learner's copy of an older edition is recognised, described and never touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minidora.classroom import editions
from minidora.classroom import folder as folders

LESSON = "notebooks/03_dora_decomposition.ipynb"
EXERCISES = "exercises/03_dora_decomposition.ipynb"


@pytest.fixture
def course(tmp_path: Path, monkeypatch: Any) -> Path:
    """A course whose files a test may change, as a new edition would."""
    for name in ("notebooks", "exercises"):
        shutil.copytree(folders.ROOT / name, tmp_path / "course" / name)
    monkeypatch.setattr(folders, "ROOT", tmp_path / "course")
    return tmp_path / "course"


@pytest.fixture
def work(course: Path, tmp_path: Path) -> Path:
    folders.start(tmp_path / "work")
    return tmp_path / "work"


def edit(path: Path, change: Callable[[list[Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content["cells"])
    path.write_text(json.dumps(content), encoding="utf-8")


def rewrite(path: Path, kind: str = "markdown", index: int = 5) -> None:
    """Give one cell another text, as an edition does."""

    def change(cells: list[Any]) -> None:
        chosen = [cell for cell in cells if cell["cell_type"] == kind][index]
        chosen["source"] = f"## Another heading\n\nText {index} of another edition."

    edit(path, change)


def test_a_new_copy_is_of_this_edition(work: Path) -> None:
    assert folders.renew(work) == []
    assert list(work.rglob("*.new*")) == []


def test_what_changed_is_said_and_the_new_one_laid_beside(course: Path, work: Path) -> None:
    mine = (work / LESSON).read_bytes()
    rewrite(course / LESSON)
    [line] = folders.renew(work)
    assert line.startswith(str(work / LESSON))
    assert "1 cell has changed since, in: Another heading." in line
    assert "The new one is beside it, 03_dora_decomposition.new.ipynb" in line
    assert (work / LESSON).read_bytes() == mine
    beside = (work / LESSON).with_suffix(".new.ipynb")
    assert beside.read_bytes() == (course / LESSON).read_bytes()
    beside.write_bytes(beside.read_bytes() + b"\n")  # the learner opens and saves it
    assert folders.renew(work) == [line]
    assert beside.read_bytes() == (course / LESSON).read_bytes() + b"\n"


def test_a_learners_own_edits_are_not_another_edition(work: Path) -> None:
    def write_into(cells: list[Any]) -> None:
        for cell in cells[5:25]:
            added = "\n\nMy own note." if cell["cell_type"] == "markdown" else "\nprint(1)"
            cell["source"] = "".join(cell["source"]) + added
        cells.append(dict(cells[0], id="mine", source="# Notes of my own"))

    edit(work / LESSON, write_into)
    edit(work / EXERCISES, lambda cells: [
        cell.update(source="def mine(): pass")
        for cell in cells
        if cell["metadata"].get("nbgrader", {}).get("solution")
    ])  # fmt: skip
    assert folders.renew(work) == []


def test_both_edits_are_told_apart(course: Path, work: Path) -> None:
    rewrite(work / LESSON, "code", 3)
    rewrite(course / LESSON, index=7)
    [line] = folders.renew(work)
    assert "1 cell has changed since" in line


@pytest.mark.parametrize("listed", [True, False])
def test_a_copy_of_an_older_edition_is_recognised_by_its_cells(work: Path, listed: bool) -> None:
    """As it was made before copies were listed, or put into the place of one that is."""
    rewrite(work / LESSON)
    rewrite(work / EXERCISES)
    if not listed:
        (work / editions.LIST).unlink()
    lines = folders.renew(work)
    assert [Path(line.split(" is of an older")[0]) for line in lines] == [
        work / LESSON,
        work / EXERCISES,
    ]
    assert lines[1].endswith("Yours is the one that counts.")
    notebook, note = folders.find_notebook(work, folders.LESSONS[3])
    assert notebook is not None
    assert (notebook.path, note) == (work / EXERCISES, "")


def test_taking_the_new_one_over_ends_it(course: Path, work: Path) -> None:
    rewrite(course / LESSON)
    assert folders.renew(work)
    (work / LESSON).with_suffix(".new.ipynb").replace(work / LESSON)
    assert folders.renew(work) == []
    edit(work / LESSON, lambda cells: cells[2].update(source="x = 1"))
    assert folders.renew(work) == []


def test_two_new_editions_after_another(course: Path, work: Path) -> None:
    rewrite(course / LESSON)
    folders.renew(work)
    rewrite(course / LESSON, index=8)
    assert "2 cells have changed since" in folders.renew(work)[0]
    assert (work / LESSON).with_suffix(".new.2.ipynb").exists()
    assert len(list(work.rglob("*.new*"))) == 2


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'{"cells": 3}', b"\xff\xfe"])
def test_damaged_files_are_no_edition(work: Path, data: bytes) -> None:
    (work / LESSON).write_bytes(data)
    (work / editions.LIST).write_bytes(data)
    folders.renew(work)
    assert (work / LESSON).read_bytes() == data
