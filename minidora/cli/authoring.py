"""Commands for who writes lessons and exercises: the notebooks as files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import path

app = typer.Typer()


class Difficulty(StrEnum):
    """checks.exercise.POINTS, which cannot be read without torch."""

    EASY = "easy"
    MEDIUM = "medium"
    HARD = "hard"


notebooks_app = typer.Typer(help="Execute and check lessons, for authors.", no_args_is_help=True)
app.add_typer(notebooks_app, name="notebooks")

Notebooks = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FILE]...",
        parser=path,
        help="Notebook files; without any, all of ./notebooks.",
        show_default=False,
    ),
]


@notebooks_app.command("execute")
def execute_notebooks(paths: Notebooks = None) -> None:
    """Run notebooks and write them back.

    From top to bottom, ready to commit. A notebook with a cell that fails is left as it was.
    """
    lessons = _lessons(paths)
    from minidora.classroom import authoring
    from minidora.classroom.files import UserError

    try:
        from nbclient.exceptions import CellExecutionError
    except ImportError:
        raise UserError("nbclient is missing: pip install -e '.[dev]' installs it") from None
    for lesson in lessons:
        typer.echo(f"{lesson} ...")
        try:
            authoring.execute(lesson)
        except CellExecutionError as error:
            raise UserError(f"{lesson} is left as it was: {error}") from None


@notebooks_app.command("check")
def check_notebooks(paths: Notebooks = None) -> None:
    """Say what keeps lessons from a commit.

    The exit code is 1 if anything does.
    """
    lessons = _lessons(paths)
    from minidora.classroom import authoring

    problems = [f"{one}: {text}" for one in lessons for text in authoring.problems(one)]
    for problem in problems:
        typer.echo(problem)
    raise typer.Exit(1 if problems else 0)


@notebooks_app.command("length")
def notebook_lengths(paths: Notebooks = None) -> None:
    """Count what a reader reads.

    Words, words folded away, sections, predictions and folds of each lesson.
    """
    lessons = _lessons(paths)
    from minidora.classroom.files import UserError
    from minidora.classroom.length import length
    from minidora.classroom.notebook import read_notebook

    typer.echo(f"{'words':>6} {'folded':>6} {'sections':>8} {'predict':>7} {'folds':>5}")
    for lesson in lessons:
        if problem := read_notebook(lesson).problem:
            raise UserError(f"{lesson} {problem}")
        try:
            one = length(lesson)
        except ValueError as error:  # a fold that is not closed
            raise UserError(str(error)) from None
        typer.echo(
            f"{one.words:6} {one.folded:6} {one.sections:8} {one.predictions:7} {one.folds:5}  "
            f"{lesson.name}"
        )


def _lessons(paths: list[Path] | None) -> list[Path]:
    lessons = paths or sorted(Path("notebooks").glob("*.ipynb"))
    if not lessons:
        raise typer.BadParameter(
            "there is no ./notebooks/*.ipynb: go to the root of the repository, or name files"
        )
    for lesson in lessons:
        if not lesson.is_file():
            raise typer.BadParameter(f"{str(lesson)!r} is not a file: name a notebook")
    return lessons


@app.command()
def build(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; 1 if stale.")] = False,
) -> None:
    """Derive exercises/ from solutions/, for authors."""
    from minidora.classroom import authoring
    from minidora.classroom.files import UserError, write_whole
    from minidora.classroom.folder import ROOT

    try:
        built = authoring.build(ROOT)
    except ValueError as error:  # a marker or a name that is wrong
        raise UserError(str(error)) from None
    stale = [exercise for exercise, text in built.items() if _differs(exercise, text)]
    for exercise in stale:
        if not check:
            exercise.parent.mkdir(exist_ok=True)
            write_whole(exercise, built[exercise])
        typer.echo(f"{exercise.relative_to(ROOT)} {'is stale' if check else 'written'}")
    raise typer.Exit(1 if check and stale else 0)


def _differs(file: Path, text: str) -> bool:
    return not file.exists() or file.read_bytes() != text.encode()


exercise_app = typer.Typer(help="Add exercises, for authors.", no_args_is_help=True)
app.add_typer(exercise_app, name="exercise")


@exercise_app.callback()
def exercise() -> None:
    """Add exercises, for authors."""


@exercise_app.command("new")
def new_exercise(
    number: Annotated[str, typer.Argument(help="Its number, 3.9 for example.")],
    name: Annotated[str, typer.Argument(help="The function that the learner writes.")],
    title: Annotated[str, typer.Option(help="The heading in the notebook.")] = "A title",
    difficulty: Annotated[Difficulty, typer.Option(help="It decides the points.")] = (
        Difficulty.EASY
    ),
    minutes: Annotated[int, typer.Option(help="For a learner.", min=1, max=600)] = 10,
    teaches: Annotated[str, typer.Option(help="You learn ...")] = "what it teaches",
    hint: Annotated[str, typer.Option(help="A question that leads on.")] = "Which question?",
    shapes: Annotated[
        str, typer.Option(help="Of what it takes and returns.")
    ] = "(out, in) -> (out,)",
    takes: Annotated[str, typer.Option(help="The names of its arguments.")] = "weight",
) -> None:
    """Draft an exercise in all its places.

    It adds a check to minidora/checks/ and three cells to solutions/. docs/teaching.md shows what
    an author then writes.
    """
    from minidora.classroom import draft
    from minidora.classroom.files import typed, write_whole
    from minidora.classroom.folder import ROOT, require_course

    require_course("solutions")
    exercise = draft.Draft(
        number, name, title, difficulty.value, minutes, teaches, hint, shapes, takes
    )
    written = draft.new_exercise(ROOT, exercise)
    for file, text in written.items():
        write_whole(file, text)
        typer.echo(f"{file.relative_to(ROOT)} has {number}, {name}")
    notebook = max(written, key=lambda file: file.suffix == ".ipynb")
    typer.echo("Write its oracle and mistakes, its task and its solution, where the draft says so.")
    typer.echo(f"Then: {typed('notebooks execute')} {notebook.relative_to(ROOT)}; {typed('build')}")
