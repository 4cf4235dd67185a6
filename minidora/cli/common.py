"""What several commands take and write: arguments, refused where they cannot be meant; figures."""

import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

FIGURES = (".png", ".svg", ".pdf")


def path(text: str) -> Path:
    """A path as it was meant: ~ is the home folder, also where the shell left it alone."""
    try:
        expanded = Path(str(text)).expanduser()
    except RuntimeError:  # ~somebody
        raise typer.BadParameter(f"{text!r} names the home folder of nobody here") from None
    try:
        if b"\0" in os.fsencode(str(text)):
            raise typer.BadParameter(f"{text!r} holds a zero byte, which no path can have")
    except UnicodeEncodeError:  # half of a surrogate pair
        raise typer.BadParameter(f"{text!r} cannot be written as the name of a file") from None
    return expanded


def word(text: str) -> str:
    """What an environment variable can hold."""
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:  # half of a surrogate pair
        pass
    raise typer.BadParameter(f"{text!r} holds what no name can hold")


def finite(number: float) -> float:
    """Neither nan nor infinity, which pass every bound or none."""
    if not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number")
    return number


def figure(given: Path) -> Path:
    """The name of a figure, of a kind that can be drawn."""
    if given.suffix.lower() not in FIGURES:
        raise typer.BadParameter(f"{str(given)!r} does not end in {', '.join(FIGURES)}")
    return given


WorkFolder = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        metavar="PATH",
        parser=path,
        help="Your working copy; without it, the one you are in, or my-work/.",
    ),
]
OneExercise = Annotated[str, typer.Argument(help="The exercise, 3.2 for example.")]


def course_device() -> "torch.device":
    """Where the course computes, or what is wrong with MINIDORA_DEVICE."""
    from minidora.classroom.files import UserError
    from minidora.training import device

    try:
        return device()
    except (ValueError, RuntimeError) as error:  # both of them documented
        raise UserError(str(error)) from None


def write_figure(drawn: "Figure", target: Path) -> None:
    """Write a figure whole, of the kind that its name says."""
    from minidora import plots
    from minidora.classroom.files import write_whole

    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, f"figure{target.suffix.lower()}")
        plots.save(drawn, draft)
        write_whole(target, draft.read_bytes())
