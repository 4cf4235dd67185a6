"""Commands for who writes lessons and exercises: the notebooks as files."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

notebooks_app = typer.Typer(help="Execute and check the lessons' files.", no_args_is_help=True)
app.add_typer(notebooks_app, name="notebooks")

Notebooks = Annotated[
    list[Path] | None,
    typer.Argument(help="Notebook files; without any, all of ./notebooks.", show_default=False),
]


@notebooks_app.command("execute")
def execute_notebooks(paths: Notebooks = None) -> None:
    """Run notebooks top to bottom and write them back, ready to commit."""
    from minidora.classroom import authoring

    for path in _lessons(paths):
        typer.echo(f"{path} ...")
        authoring.execute(path)


@notebooks_app.command("check")
def check_notebooks(paths: Notebooks = None) -> None:
    """Say what keeps executed lessons from being committed; exit code 1 if anything does."""
    from minidora.classroom import authoring

    problems = [f"{path}: {text}" for path in _lessons(paths) for text in authoring.problems(path)]
    for problem in problems:
        typer.echo(problem)
    raise typer.Exit(1 if problems else 0)


@notebooks_app.command("length")
def notebook_lengths(paths: Notebooks = None) -> None:
    """Count what a reader reads: words, words folded away, sections, predictions, folds."""
    from minidora.classroom.length import length

    typer.echo(f"{'words':>6} {'folded':>6} {'sections':>8} {'predict':>7} {'folds':>5}")
    for path in _lessons(paths):
        one = length(path)
        typer.echo(
            f"{one.words:6} {one.folded:6} {one.sections:8} {one.predictions:7} {one.folds:5}  "
            f"{path.name}"
        )


def _lessons(paths: list[Path] | None) -> list[Path]:
    lessons = paths or sorted(Path("notebooks").glob("*.ipynb"))
    if not lessons:
        raise typer.BadParameter(
            "there is no ./notebooks/*.ipynb: go to the root of the repository, or name files"
        )
    return lessons


@app.command()
def build(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; 1 if stale.")] = False,
) -> None:
    """For those who write exercises: derive exercises/ from solutions/."""
    from minidora.classroom import authoring
    from minidora.classroom.folder import ROOT

    stale = 0
    for path, text in authoring.build(ROOT).items():
        if not path.exists() or path.read_bytes() != text.encode():
            stale += 1
            typer.echo(f"{path.relative_to(ROOT)} {'is stale' if check else 'written'}")
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(text.encode())
    raise typer.Exit(1 if check and stale else 0)
