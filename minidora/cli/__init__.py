"""The `minidora` command: one file a group of commands, put together here.

minidora_command.py loads this package by its path, without minidora/__init__.py, which imports
torch. So the files in here import each other relatively, and minidora inside the commands alone.
"""

from typing import Annotated

import typer

from . import authoring, bench, claims, course, evidence, experiment
from .errors import Explained

app = typer.Typer(
    cls=Explained,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text: a command or a path in it can be copied whole
    pretty_exceptions_enable=False,
)
app.add_typer(course.app)
app.add_typer(bench.app, name="bench")
app.add_typer(experiment.app, name="experiment")
app.add_typer(evidence.app, name="evidence")
app.add_typer(claims.app)
app.add_typer(authoring.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"minidora {version('minidora')}")
        raise typer.Exit


@app.callback()
def minidora(
    version: Annotated[
        bool,
        typer.Option("--version", help="The course's version.", callback=_print_version),
    ] = False,
) -> None:
    """Learn DoRA by building it."""
