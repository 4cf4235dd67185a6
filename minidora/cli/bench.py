"""`minidora bench`: times and bytes, on the machine at hand."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import course_device, finite, path, write_figure

app = typer.Typer(help="Time and count, on this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Time and count, on this machine."""


@app.command()
def layers(
    quick: Annotated[bool, typer.Option("--quick", help="Two shapes, for a look.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile every layer with torch.compile.")
    ] = False,
    budget: Annotated[
        float,
        typer.Option(help="Seconds of rounds for each shape and work.", min=0, callback=finite),
    ] = 4.0,
    output: Annotated[
        Path,
        typer.Option(parser=path, metavar="FOLDER", help="Where the JSON and the figure go."),
    ] = Path("bench"),
) -> None:
    """Compare our layers with nn.Linear, PEFT's and torchtune's.

    All are timed in turn in one run, and their bytes counted. The committed results are in
    benchmarks/.
    """
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from minidora import plots
    from minidora.classroom.files import output_folder, write_whole
    from minidora.evidence import bench

    output = output_folder(output)
    place = course_device()
    cases = bench.QUICK if quick else bench.CUDA_CASES if place.type == "cuda" else bench.CPU_CASES
    report = bench.run(cases, place, compiled, budget)
    table = Table(title=str(report.machine))
    for column in ("features, tokens, rank", "work", "contender", "ms", "x LoRA", "held", "peak"):
        table.add_column(column, justify="left" if column in ("work", "contender") else "right")
    for row in report.results:
        low, middle, high = row.ratio
        table.add_row(
            row.label,
            row.work,
            bench.NAMES[row.contender],
            f"{1e3 * row.seconds:.2f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            *("" if count is None else decimal(count) for count in (row.held, row.peak)),
        )
    Console().print(table)
    data = output / f"{report.name}.json"
    figure = data.with_suffix(".png")
    write_whole(data, report.text())
    write_figure(plots.bench_ratios(report), figure)
    typer.echo(f"written: {data} and {figure}")


@app.command()
def experiment(
    quick: Annotated[bool, typer.Option("--quick", help="Few runs, for a look.")] = False,
    output: Annotated[
        Path, typer.Option(parser=path, metavar="FOLDER", help="Where the JSON goes.")
    ] = Path("bench"),
) -> None:
    """Compare many small trainings at once with one after the other."""
    from rich.console import Console
    from rich.table import Table

    from minidora import plots
    from minidora.classroom.files import output_folder, write_whole
    from minidora.evidence import bench_experiment

    output = output_folder(output)
    place = course_device()
    sizes = {"perceptrons": 10, "texts": 2, "rounds": 1} if quick else {}
    results = []
    for result in bench_experiment.measure(place, **sizes):
        results.append(result)
        typer.echo(f"{result.model}, {plots.NAMES[result.method]}: {result.ratio:.2f} times")
    data = bench_experiment.report(place, results)
    table = Table(title=", ".join(f"{key} {value}" for key, value in data["machine"].items()))
    for column in ("model", "method", "runs", "a second: at once", "one by one", "times", "choice"):
        table.add_column(column, justify="left" if column in ("model", "method") else "right")
    for row in results:
        low, high = min(row.ratios), max(row.ratios)
        table.add_row(
            row.model,
            plots.NAMES[row.method],
            str(row.runs),
            f"{row.together:.2f}",
            f"{row.alone:.2f}",
            f"{row.ratio:.2f} ({low:.2f} to {high:.2f})",
            row.choice,
        )
    Console().print(table)
    file = output / f"experiment-{place.type}.json"
    write_whole(file, json.dumps(data, indent=1) + "\n")
    typer.echo(f"written: {file}")


@app.command()
def page(
    folder: Annotated[
        Path, typer.Option(parser=path, metavar="FOLDER", help="Where the JSON files are.")
    ] = Path("benchmarks"),
) -> None:
    """Write FOLDER/README.md from its JSON files."""
    from minidora.classroom.files import UserError, write_whole
    from minidora.evidence import bench, bench_tables

    try:
        reports = bench.load_reports(folder)
        text = bench_tables.page(reports)
    except ValueError as error:
        raise UserError(f"{folder} holds more than reports, or damaged ones: {error}") from None
    if not reports:
        raise UserError(f"there is no *.json in {folder}: minidora bench layers makes one")
    pages = {folder / "README.md": text}
    if (folder / "h200" / "gpu-layers.json").exists():
        from minidora.evidence import gpu_page

        pages[folder / "h200" / "README.md"] = gpu_page.page(bench.load_json(folder / "h200"))
    for file, content in pages.items():
        write_whole(file, content)
        typer.echo(f"written: {file}")
