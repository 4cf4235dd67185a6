"""A learner's own copy of the course: make it, find its exercises, put one back.

No progress is kept beside the notebooks: what is done is found out by running them (grade.py).
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minidora.checks import LESSONS
from minidora.checks.exercise import Exercise, Lesson
from minidora.classroom import editions
from minidora.classroom.authoring import BEGIN, END
from minidora.classroom.files import UserError, quoted, typed, write_whole
from minidora.classroom.notebook import Notebook, read_notebook

ROOT = Path(os.path.realpath(__file__)).parents[2]
DEFAULT_FOLDER = ROOT / "my-work"


def real(path: Path) -> Path:
    """Without links and dots; a link to itself stays, where Path.resolve breaks off."""
    return Path(os.path.realpath(path))


# ---- The working copy ----


def start(folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy lessons and exercises into a folder; (copied, kept). What is there already is kept.

    An exercise notebook under another name counts as there.
    """
    folder = real(folder)
    tracked = [ROOT / name for name in ("notebooks", "exercises", "solutions", "minidora", "tests")]
    if folder == ROOT or any(folder.is_relative_to(path) for path in tracked):
        raise UserError(f"{folder} belongs to the course itself: name a folder of your own")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder, which may be a new one")
    copied, kept, names = [], [], {}
    for name, source in _course_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        target = _copy_of(folder, name)
        if target.exists():
            kept.append(target)
        else:
            write_whole(target, source.read_bytes())
            copied.append(target)
            names[name] = source
    editions.note_copies(folder, names)
    return copied, kept


def _course_files() -> Iterator[tuple[str, Path]]:
    """("notebooks/01_adam_memory.ipynb", its path in the course) of everything that is copied."""
    for folder in ("notebooks", "exercises"):
        require_course(folder)
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in (".ipynb", ".md"):
                yield f"{folder}/{path.name}", path


def _copy_of(folder: Path, name: str) -> Path:
    """The learner's copy of a course's file, an exercise notebook also under another name."""
    target = folder / name
    if not target.exists() and name.startswith("exercises/"):
        lesson = read_notebook(ROOT / name).lesson()
        if lesson is not None:
            found = _notebooks_of(folder, LESSONS[lesson])
            return next((one.path for one in found if not editions.is_new(one.path)), target)
    return target


def renew(folder: Path) -> list[str]:
    """Lay the new edition beside each copy of an older one; a line about each.

    The copies themselves are left as they are.
    """
    lines = []
    listed = editions.copies(folder)
    for name, source in _course_files():
        copy = _copy_of(folder, name)
        changed = editions.changed_since(copy, source, listed.get(name))
        if changed:
            new = editions.lay_beside(copy, source)
            counts = " Yours is the one that counts." if name.startswith("exercises/") else ""
            lines.append(
                f"{copy} is of an older edition, or you changed it: {editions.describe(changed)}. "
                f"The new one is beside it, {new.name}.{counts}"
            )
    return lines


def work_folder(given: Path | None) -> Path:
    """The learner's folder: the one named, the one we are in, or my-work/ in the course."""
    if given is not None and _is_the_courses(given):
        raise UserError(f"this is the course itself: `{typed('start')}` makes a copy to work in")
    folder = given or DEFAULT_FOLDER
    if given is None:
        here = real(Path.cwd())
        around = [path for path in (here, *here.parents) if not ROOT.is_relative_to(path)]
        own = [path for path in around if path != ROOT and (path / "exercises").is_dir()]
        folder = own[0] if own else folder
    if not (folder / "exercises").is_dir():
        where = "" if folder == DEFAULT_FOLDER else f" {quoted(folder)}"
        raise UserError(f"there is no {folder / 'exercises'}: `{typed('start' + where)}` makes it")
    return folder


def command(folder: Path, arguments: str) -> str:
    """What to type for a command about this folder, from where we are."""
    with suppress(UserError):
        if real(work_folder(None)) == real(folder):
            return typed(arguments)
    return typed(f"{arguments} --folder {quoted(folder)}")


def find_notebook(folder: Path, lesson: Lesson) -> tuple[Notebook | None, str]:
    """The learner's notebook of a lesson, under whatever name; and a note where that is odd."""
    found = list(_notebooks_of(folder, lesson))
    found = [one for one in found if not editions.is_new(one.path)] or found
    if not found:
        again = command(folder, f"reset {lesson.number}")
        return None, f"no notebook holds lesson {lesson.number}: `{again}` puts it back"
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
    lesson = {str(lesson.number): lesson for lesson in LESSONS.values()}.get(number)
    if lesson is None:
        known = ", ".join(str(number) for number in LESSONS)
        raise UserError(f"{what[:20]} is not a lesson with exercises: there are {known}")
    chosen = [exercise for exercise in lesson.exercises if what in (number, exercise.number)]
    if not chosen:
        known = ", ".join(exercise.number for exercise in lesson.exercises)
        raise UserError(f"there is no exercise {what[:20]}: there are {known}")
    return lesson, chosen


def select_one(what: str) -> tuple[Lesson, Exercise]:
    """As select, for one exercise: "3.2"."""
    lesson, exercises = select(what)
    if what != exercises[0].number:
        raise UserError(f"name one exercise of lesson {what}, {exercises[0].number} for example")
    return lesson, exercises[0]


# ---- Putting back, looking up ----


def reset_lesson(folder: Path, lesson: Lesson) -> Path | None:
    """Put the course's notebook in the place of the learner's, which goes to backups/: its path."""
    require_course("exercises")
    notebook, _ = find_notebook(folder, lesson)
    name = f"exercises/{lesson.name}.ipynb"
    target = notebook.path if notebook else folder / name
    backup = None
    if target.exists():
        backup = _free_name(folder, lesson.name, ".ipynb")
        write_whole(backup, target.read_bytes())
    write_whole(target, (ROOT / name).read_bytes())
    editions.note_copies(folder, {name: ROOT / name})
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
            f"`{command(folder, f'reset {lesson.number}')}` puts all of it back"
        )
    content = json.loads(notebook.path.read_text(encoding="utf-8-sig"))
    cells = content["cells"]
    own = [cell.index - 1 for cell in notebook.cells_of(exercise)]
    backup = None
    if own:
        backup = _free_name(folder, exercise.number, ".py")
        texts = [cell.source for cell in notebook.cells_of(exercise)]
        write_whole(backup, "\n\n\n".join(texts) + "\n")
    stub = _course_cell("exercises", lesson, exercise.name)
    check = _course_cell("exercises", lesson, f"{exercise.name}_check")
    checks = [
        cell.index - 1 for cell in notebook.cells if cell.grade_id == f"{exercise.name}_check"
    ]
    place = (own or checks or [len(cells)])[0]
    after = [cells[index] for index in range(place, len(cells)) if index not in own]
    content["cells"] = [*cells[:place], stub, *([] if checks else [check]), *after]
    if (content.get("nbformat"), content.get("nbformat_minor", 0)) < (4, 5):
        for cell in (stub, check):
            cell.pop("id", None)  # Colab saves format 4.0, where a cell may have none
    write_whole(notebook.path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return backup


def solution(lesson: Lesson, exercise: Exercise) -> str:
    """The source of the exercise's solution, without nbgrader's markers."""
    source = "".join(_course_cell("solutions", lesson, exercise.name)["source"])
    lines = source.splitlines()
    return "\n".join(line for line in lines if line.strip() not in (BEGIN, END))


def _course_cell(folder: str, lesson: Lesson, grade_id: str) -> dict[str, Any]:
    """A cell of the course's own notebook, as JSON."""
    require_course(folder)
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


def _is_the_courses(folder: Path) -> bool:
    """Whether a folder is the course's own, where nobody works."""
    own = [ROOT, *(ROOT / name for name in ("notebooks", "exercises", "solutions", "minidora"))]
    return real(folder) in own


def require_course(name: str) -> None:
    """Refuse to go on without a folder that only the repository has."""
    if not (ROOT / name).is_dir():
        raise UserError(
            f"there is no {ROOT / name}: the course's notebooks are in its repository, so clone "
            "it and install it from there (pip install -e .)"
        )
