"""A learner's own copy of the course: make it, find its exercises, put one back.

Nothing is kept beside the notebooks: what is done is found out by running them (grading.py).
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minidora.checks import LESSONS
from minidora.checks.exercise import Exercise, Lesson
from minidora.classroom.authoring import BEGIN, END
from minidora.classroom.notebook import Notebook, read_notebook

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = ROOT / "my-work"


class UserError(Exception):
    """Something that the person at the terminal can mend; the message says how."""


# ---- The working copy ----


def start(folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy lessons and exercises into a folder; (copied, kept). What is there already is kept.

    An exercise notebook under another name counts as there.
    """
    folder = folder.resolve()
    tracked = [ROOT / name for name in ("notebooks", "exercises", "solutions", "minidora", "tests")]
    if folder == ROOT or any(folder.is_relative_to(path) for path in tracked):
        raise UserError(f"{folder} belongs to the course itself: name a folder of your own")
    copied, kept = [], []
    for name in ("notebooks", "exercises"):
        _require_course(name)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for source in sorted((ROOT / name).iterdir()):
            if source.suffix not in (".ipynb", ".md"):
                continue
            target = folder / name / source.name
            lesson = read_notebook(source).lesson() if name == "exercises" else None
            if not target.exists() and lesson is not None:
                target = next(_notebooks_of(folder, LESSONS[lesson]), Notebook(target)).path
            if target.exists():
                kept.append(target)
            else:
                shutil.copyfile(source, target)
                copied.append(target)
    return copied, kept


def work_folder(given: Path | None) -> Path:
    """The learner's folder: the one named, the one we are in, or my-work/ in the course."""
    if given is not None and given.resolve() == ROOT:
        raise UserError("this is the course itself: `minidora start` makes a copy to work in")
    folder = given or DEFAULT_FOLDER
    if given is None:
        here = Path.cwd().resolve()
        around = [path for path in (here, *here.parents) if not ROOT.is_relative_to(path)]
        own = [path for path in around if path != ROOT and (path / "exercises").is_dir()]
        folder = own[0] if own else folder
    if not (folder / "exercises").is_dir():
        where = "" if folder == DEFAULT_FOLDER else f" {folder}"
        raise UserError(f"there is no {folder / 'exercises'}: `minidora start{where}` makes it")
    return folder


def find_notebook(folder: Path, lesson: Lesson) -> tuple[Notebook | None, str]:
    """The learner's notebook of a lesson, under whatever name; and a note where that is odd."""
    found = list(_notebooks_of(folder, lesson))
    if not found:
        return None, f"no notebook holds lesson {lesson.number}: `minidora start` copies it again"
    own = [notebook for notebook in found if notebook.path.stem == lesson.name]
    chosen = own[0] if own else max(found, key=lambda notebook: notebook.path.stat().st_mtime)
    others = [notebook.path.name for notebook in found if notebook is not chosen]
    if others:
        note = f"{' and '.join(others)} holds lesson {lesson.number} too: {chosen.path.name} counts"
        return chosen, note
    return chosen, "" if own else f"lesson {lesson.number} is {chosen.path.name}"


def _notebooks_of(folder: Path, lesson: Lesson) -> Iterator[Notebook]:
    for path in sorted((folder / "exercises").glob("*.ipynb")):
        notebook = read_notebook(path)
        if notebook.lesson() == lesson.number:
            yield notebook


def select(what: str) -> tuple[Lesson, list[Exercise]]:
    """The lesson and its exercises for "3", or the one exercise for "3.2"."""
    number = what.partition(".")[0]
    lesson = LESSONS.get(int(number)) if number.isdecimal() else None
    if lesson is None:
        known = ", ".join(str(number) for number in LESSONS)
        raise UserError(f"{what} is no lesson with exercises: there are {known}")
    chosen = [exercise for exercise in lesson.exercises if what in (number, exercise.number)]
    if not chosen:
        known = ", ".join(exercise.number for exercise in lesson.exercises)
        raise UserError(f"there is no exercise {what}: there are {known}")
    return lesson, chosen


def select_one(what: str) -> tuple[Lesson, Exercise]:
    """As select, for one exercise: "3.2"."""
    lesson, exercises = select(what)
    if what != exercises[0].number:
        raise UserError(f"name one exercise of lesson {what}, {exercises[0].number} for example")
    return lesson, exercises[0]


# ---- Putting back, looking up ----


def reset_lesson(folder: Path, lesson: Lesson) -> Path | None:
    """Put the whole notebook back as it came; the old one goes to backups/. Returns where."""
    _require_course("exercises")
    notebook, _ = find_notebook(folder, lesson)
    target = notebook.path if notebook else folder / "exercises" / f"{lesson.name}.ipynb"
    backup = None
    if target.exists():
        backup = _free_name(folder, lesson.name, ".ipynb")
        shutil.move(target, backup)
    shutil.copyfile(ROOT / "exercises" / f"{lesson.name}.ipynb", target)
    return backup


def reset_exercise(folder: Path, lesson: Lesson, exercise: Exercise) -> Path | None:
    """Put the stub back into the exercise's cell, or the cell where it is gone.

    Other cells that define the same name are taken out, for the last one would count. All of it
    goes to backups/, and that file is returned (None where there was nothing to keep).
    """
    notebook, _ = find_notebook(folder, lesson)
    if notebook is None or notebook.problem:
        problem = notebook.problem if notebook else "it is gone"
        raise UserError(
            f"the notebook of lesson {lesson.number} cannot be edited ({problem}): "
            f"`minidora reset {lesson.number}` puts all of it back"
        )
    content = json.loads(notebook.path.read_text(encoding="utf-8-sig"))
    cells = content["cells"]
    own = [cell.index - 1 for cell in notebook.cells_of(exercise)]
    backup = None
    if own:
        backup = _free_name(folder, exercise.number, ".py")
        texts = [cell.source for cell in notebook.cells_of(exercise)]
        backup.write_text("\n\n\n".join(texts) + "\n", encoding="utf-8")
    stub = _course_cell("exercises", lesson, exercise.name)
    check = _course_cell("exercises", lesson, f"{exercise.name}_check")
    checks = [
        cell.index - 1 for cell in notebook.cells if cell.grade_id == f"{exercise.name}_check"
    ]
    place = (own or checks or [len(cells)])[0]
    after = [cells[index] for index in range(place, len(cells)) if index not in own]
    content["cells"] = [*cells[:place], stub, *([] if checks else [check]), *after]
    half_written = notebook.path.with_suffix(".saving")
    half_written.write_text(
        json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    os.replace(half_written, notebook.path)
    return backup


def solution(lesson: Lesson, exercise: Exercise) -> str:
    """The source of the exercise's solution, without nbgrader's markers."""
    source = "".join(_course_cell("solutions", lesson, exercise.name)["source"])
    lines = source.splitlines()
    return "\n".join(line for line in lines if line.strip() not in (BEGIN, END))


def _course_cell(folder: str, lesson: Lesson, grade_id: str) -> dict[str, Any]:
    """A cell of the course's own notebook, as JSON."""
    _require_course(folder)
    path = ROOT / folder / f"{lesson.name}.ipynb"
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    ids = [cell["metadata"].get("nbgrader", {}).get("grade_id") for cell in cells]
    return cells[ids.index(grade_id)]


def _free_name(folder: Path, name: str, suffix: str) -> Path:
    """backups/NAME-1.py, or the next number that is free."""
    (folder / "backups").mkdir(exist_ok=True)
    number = 1
    while (path := folder / "backups" / f"{name}-{number}{suffix}").exists():
        number += 1
    return path


def _require_course(name: str) -> None:
    if not (ROOT / name).is_dir():
        raise UserError(
            f"there is no {ROOT / name}: the course's notebooks are in its repository, so clone "
            "it and install it from there (pip install -e .)"
        )
