"""`minidora experiment`: a sweep from the command line, and what it says."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import path, word, write_figure

if TYPE_CHECKING:
    from rich.table import Table

    from minidora.grid import Grid

app = typer.Typer(
    help="Train every method at every rank, rate and seed, and compare. Without a command: run.",
    no_args_is_help=True,
    invoke_without_command=True,
)

Task = Annotated[str, typer.Option(help="digits, mnist, fashion-mnist or chargpt.")]
Methods = Annotated[str, typer.Option(help="Of full, lora and dora, with commas between.")]
Ranks = Annotated[str, typer.Option(help="Of LoRA and DoRA; alpha is twice the rank.")]
Rates = Annotated[str, typer.Option("--lrs", help="Learning rates; auto takes the task's own.")]
Seeds = Annotated[str, typer.Option(help="How many seeds, or the seeds: 10, or 3,4,5.")]
Targets = Annotated[str, typer.Option(help="Names of the layers to adapt.")]
BRates = Annotated[str, typer.Option(help="B trains at these multiples of the rate.")]
MagnitudeRates = Annotated[str, typer.Option(help="And so does the magnitude.")]
Length = Annotated[int, typer.Option(help="Epochs (steps for chargpt); 0: 40 (300).", min=0)]
Question = Annotated[str, typer.Option(help="A prepared grid: magnitude-rate or lora-plus.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", callback=word)]
Out = Annotated[
    Path,
    typer.Option(parser=path, metavar="PATH", help="Where results go; an old sweep goes on."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say how many runs and minutes.")]


@contextmanager
def _explained() -> Iterator[None]:
    """What is wrong with the options, the folder or the device, as a sentence."""
    from minidora.classroom.files import UserError

    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


@app.callback()
def short_form(
    context: typer.Context,
    task: Task = "digits",
    methods: Methods = "full,lora,dora",
    ranks: Ranks = "4",
    lrs: Rates = "auto",
    seeds: Seeds = "10",
    targets: Targets = "all-linear",
    b_rates: BRates = "1",
    magnitude_rates: MagnitudeRates = "1",
    length: Length = 0,
    question: Question = "",
    device: Device = "auto",
    out: Out = Path("runs/first"),
    dry_run: DryRun = False,
) -> None:
    if context.invoked_subcommand is None:
        values = {key: value for key, value in locals().items() if key != "context"}
        run(**values)


@app.command()
def run(
    task: Task = "digits",
    methods: Methods = "full,lora,dora",
    ranks: Ranks = "4",
    lrs: Rates = "auto",
    seeds: Seeds = "10",
    targets: Targets = "all-linear",
    b_rates: BRates = "1",
    magnitude_rates: MagnitudeRates = "1",
    length: Length = 0,
    question: Question = "",
    device: Device = "auto",
    out: Out = Path("runs/first"),
    dry_run: DryRun = False,
) -> None:
    """Run what is not yet in the folder. Stop it when you like: the same command goes on."""
    with _explained():
        if device != "auto":
            os.environ["MINIDORA_DEVICE"] = device
        from minidora import sweep
        from minidora import training as here

        if question:
            if question not in sweep.QUESTIONS:
                raise ValueError(
                    f"--question: there is no {question!r}; there is {', '.join(sweep.QUESTIONS)}"
                )
            grid = sweep.QUESTIONS[question]
        else:
            grid = sweep.Grid(
                task=task,
                methods=methods.split(","),
                ranks=_numbers("--ranks", ranks, int),
                rates=() if lrs == "auto" else _numbers("--lrs", lrs, float),
                seeds=_numbers("--seeds", seeds, int)
                if "," in seeds
                else _numbers("--seeds", seeds, int)[0],
                targets=() if targets == "all-linear" else targets.split(","),
                b_rates=_numbers("--b-rates", b_rates, float),
                magnitude_rates=_numbers("--magnitude-rates", magnitude_rates, float),
                length=length,
            )
        first = int(os.environ.get("RANK", 0)) == 0  # of the processes of torchrun
        if first:
            typer.echo(f"{grid.size} runs in {len(grid.groups)} groups on {here.device()}")
        if dry_run:
            typer.echo(
                f"about {sweep.minutes(grid):.1f} minutes, measured here; nothing is written"
            )
            return
        _run_live(grid, out, first)
    if first:
        typer.echo(f"done: minidora experiment report {out}")


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} takes {what} with commas between, got {text!r}") from None


def _run_live(grid: "Grid", out: Path, show: bool) -> None:
    """sweep.run, with a table that follows it."""
    from rich.console import Console
    from rich.live import Live

    from minidora import sweep
    from minidora.grid import name_of
    from minidora.results import read

    done: dict[str, list[dict[str, Any]]] = {name_of(method): [] for method in grid.arms}

    def add(rows: list[dict[str, Any]]) -> None:
        done[name_of(grid.groups[rows[0]["group"]][0])] += rows

    if sweep.holds(grid, out):
        for rows in read(out, grid.runs).values():
            add(rows)
    before, start = sum(map(len, done.values())), time.monotonic()

    def table() -> "Table":
        now = sum(map(len, done.values()))
        title = f"{now} of {grid.size} runs"
        if before < now < grid.size:
            left = (time.monotonic() - start) / (now - before) * (grid.size - now)
            title += f"; about {left / 60:.1f} minutes left"
        return _table(grid, done, title)

    console = Console()
    if not (show and console.is_terminal):  # a log: one table, at the end
        sweep.run(grid, out, add, progress=False)
        if show:
            console.print(table())
        return
    with Live(table(), console=console, auto_refresh=False) as live:

        def after(rows: list[dict[str, Any]]) -> None:
            add(rows)
            live.update(table(), refresh=True)

        sweep.run(grid, out, after, progress=False)


def _table(grid: "Grid", done: dict[str, list[dict[str, Any]]], title: str) -> "Table":
    """The best validation result of each seed so far, averaged: the test data wait."""
    from statistics import fmean

    from rich.table import Table

    what = "validation_loss" if grid.task == "chargpt" else "validation_accuracy"
    best = min if grid.task == "chargpt" else max
    table = Table(title=title)
    for column in ("method", "runs", "best " + what.replace("_", " ")):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, rows in done.items():
        seeds = {row["seed"] for row in rows}
        values = [best(row[what] for row in rows if row["seed"] == seed) for seed in seeds]
        mean = f"{fmean(values):.3f}" if values else ""
        total = grid.size // len(done)
        table.add_row(name, f"{len(rows)} of {total}", mean)
    return table


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(parser=path, metavar="PATH", help="The folder of the results.")
    ],
) -> None:
    """Say what the runs show, and write report.md and figures beside them."""
    with _explained():
        from minidora import plots, sweep
        from minidora.classroom.files import write_whole

        found = sweep.report(folder)
        text = found.markdown()
        write_whole(folder / "report.md", text.encode())
        typer.echo(text)
        for name, figure in plots.sweep_figures(found).items():
            write_figure(figure, folder / f"{name}.png")
            typer.echo(f"figure: {folder / name}.png")
