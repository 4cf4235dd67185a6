"""The `minidora` command. `minidora doctor` is started by minidora_command.py, which says why."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Learn DoRA by building it.", no_args_is_help=True, add_completion=False)


@app.command()
def doctor() -> None:
    """Say whether the course can run here, and what mends it where it cannot."""
    from minidora.doctor import main

    raise typer.Exit(main())


# ---- For those who write lessons: the notebooks as files ----

notebooks_app = typer.Typer(help="Execute and check the lessons' files.", no_args_is_help=True)
app.add_typer(notebooks_app, name="notebooks")

Notebooks = Annotated[
    list[Path] | None,
    typer.Argument(help="Notebook files; without any, all of ./notebooks.", show_default=False),
]


@notebooks_app.command("execute")
def execute_notebooks(paths: Notebooks = None) -> None:
    """Run notebooks top to bottom and write them back, ready to commit."""
    from minidora import course

    for path in _lessons(paths):
        typer.echo(f"{path} ...")
        course.execute(path)


@notebooks_app.command("check")
def check_notebooks(paths: Notebooks = None) -> None:
    """Say what keeps executed lessons from being committed; exit code 1 if anything does."""
    from minidora import course

    problems = [f"{path}: {text}" for path in _lessons(paths) for text in course.problems(path)]
    for problem in problems:
        typer.echo(problem)
    raise typer.Exit(1 if problems else 0)


def _lessons(paths: list[Path] | None) -> list[Path]:
    lessons = paths or sorted(Path("notebooks").glob("*.ipynb"))
    if not lessons:
        raise typer.BadParameter(
            "there is no ./notebooks/*.ipynb: go to the root of the repository, or name files"
        )
    return lessons


# ---- Benchmarks ----


@app.command()
def bench(
    quick: Annotated[bool, typer.Option(help="Two shapes, for a look.")] = False,
    compiled: Annotated[bool, typer.Option(help="Compile every layer with torch.compile.")] = False,
    budget: Annotated[float, typer.Option(help="Seconds of rounds for each shape and work.")] = 4.0,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the figure.")] = Path(
        "benchmarks"
    ),
) -> None:
    """Time and count our layers beside nn.Linear, PEFT and torchtune, alternating in one run."""
    from rich.console import Console
    from rich.table import Table

    from minidora import bench, plots
    from minidora.training import device

    place = device()
    cases = bench.QUICK if quick else bench.CUDA_CASES if place.type == "cuda" else bench.CPU_CASES
    report = bench.run(cases, place, compiled, budget)
    table = Table(title=", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for column in ("features, tokens, rank", "work", "contender", "ms", "x LoRA", "held", "peak"):
        table.add_column(column, justify="left" if column in ("work", "contender") else "right")
    for row in report["results"]:
        low, middle, high = row["ratio"]
        table.add_row(
            f"{row['features']}, {row['tokens']}, {row['rank']}",
            row["work"],
            bench.NAMES[row["contender"]],
            f"{1e3 * row['seconds']:.2f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            *("" if row[what] is None else f"{row[what]:,}" for what in ("held", "peak")),
        )
    Console().print(table)
    path = bench.write(report, output)
    plots.bench_ratios(report).savefig(path.with_suffix(".png"))
    typer.echo(f"written: {path} and {path.with_suffix('.png')}")
