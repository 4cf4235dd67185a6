"""`minidora bench`: times and bytes, on the machine at hand."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Time and count, on this machine.", no_args_is_help=True)


@app.command()
def layers(
    quick: Annotated[bool, typer.Option(help="Two shapes, for a look.")] = False,
    compiled: Annotated[bool, typer.Option(help="Compile every layer with torch.compile.")] = False,
    budget: Annotated[float, typer.Option(help="Seconds of rounds for each shape and work.")] = 4.0,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the figure.")] = Path(
        "bench"
    ),
) -> None:
    """Time and count our layers beside nn.Linear, PEFT and torchtune, alternating in one run."""
    from rich.console import Console
    from rich.table import Table

    from minidora import plots
    from minidora.evidence import bench
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
    plots.save(plots.bench_ratios(report), path.with_suffix(".png"))
    typer.echo(f"written: {path} and {path.with_suffix('.png')}")
