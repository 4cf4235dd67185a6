"""How a command ends where something goes wrong: a sentence for what one can fix, else a stack."""

import sys

import typer
from typer.core import TyperGroup


class Explained(TyperGroup):
    """Commands that say in one sentence what the person at the terminal can fix."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nStopped.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            text = _sentence(error)
            if text is None:
                raise
            typer.echo(f"minidora: {text}", err=True)
            raise typer.Exit(2) from None


def _sentence(error: Exception) -> str | None:
    if "minidora" not in sys.modules:  # its import failed, or nothing needed it yet
        broken = isinstance(error, ImportError | OSError)
        text = f"the course cannot be loaded ({error}): minidora doctor says how to fix it"
        return text if broken else None
    from minidora.classroom.files import UserError, explain

    if isinstance(error, UserError):
        return str(error)
    return explain(error) if isinstance(error, OSError) else None
