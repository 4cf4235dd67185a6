"""The `minidora` command: one file a group of commands, put together here.

minidora_command.py loads this package by its path, without minidora/__init__.py, which imports
torch. So the files in here import each other relatively, and minidora inside the commands alone.
"""

import typer

from . import authoring, bench, claims, course, evidence

app = typer.Typer(help="Learn DoRA by building it.", no_args_is_help=True, add_completion=False)
app.add_typer(course.app)
app.add_typer(bench.app, name="bench")
app.add_typer(evidence.app, name="evidence")
app.add_typer(claims.app)
app.add_typer(authoring.app)
