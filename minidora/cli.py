"""The `minidora` command. `minidora doctor` is started by minidora_command.py, which says why."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from minidora.evidence.ledger import Entry

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


def _lessons(paths: list[Path] | None) -> list[Path]:
    lessons = paths or sorted(Path("notebooks").glob("*.ipynb"))
    if not lessons:
        raise typer.BadParameter(
            "there is no ./notebooks/*.ipynb: go to the root of the repository, or name files"
        )
    return lessons


# ---- Demo ----


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(help="Replications, each from pretraining on.", min=2)] = 5,
    output: Annotated[Path, typer.Option(help="Where the figure goes (.png).")] = Path(
        "demo/half_turn.png"
    ),
) -> None:
    """Turn the digits upside down and adapt to that: full fine-tuning, LoRA, DoRA."""
    from rich.console import Console
    from rich.table import Table

    from minidora import plots
    from minidora.experiment import compare, mean_and_error, methods

    output.parent.mkdir(parents=True, exist_ok=True)  # rather now than after a minute of training
    chosen = {name: method for name, method in methods().items() if name != "dora_half"}
    comparison = compare(range(seeds), shift_name="half turn", chosen=chosen)
    table = Table(title=f"Real digits after a half turn: mean ± standard error of {seeds} seeds")
    for column in ("", "test accuracy (%)", "trainable parameters", "bytes of training state"):
        table.add_column(column, justify="right" if column else "left")
    rows = {name: (comparison.accuracies(name), rs[0]) for name, rs in comparison.results.items()}
    mean, error = mean_and_error(comparison.shifted)
    table.add_row(plots.NAMES["base"], f"{mean:.1f} ± {error:.1f}", "0", "")
    for name, (accuracies, result) in rows.items():
        mean, error = mean_and_error(accuracies)
        table.add_row(
            plots.NAMES[name],
            f"{mean:.1f} ± {error:.1f}",
            f"{result.trainable:,}",
            f"{result.state_bytes:,}",
        )
    Console().print(table)
    difference = comparison.difference("dora", "lora")
    typer.echo(
        f"DoRA minus LoRA, seed by seed: {difference.mean:+.1f} points, 95 % interval "
        f"{difference.low:+.1f} to {difference.high:+.1f}: {difference.verdict}. "
        f"Below {difference.detectable:.1f} points it would probably have been missed."
    )
    plots.accuracy_and_bytes(comparison).savefig(output)
    typer.echo(f"figure: {output}")


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
    plots.bench_ratios(report).savefig(path.with_suffix(".png"))
    typer.echo(f"written: {path} and {path.with_suffix('.png')}")


# ---- Claims ----


@app.command()
def claims(
    said_by: Annotated[
        str | None, typer.Option(help="Only these: source, paper, others or ours.")
    ] = None,
    verdict: Annotated[str | None, typer.Option(help='Only these: "does not hold", ...')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every setting, as JSON.")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="How a verdict is reached.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write docs/claims.md anew.")] = False,
) -> None:
    """Every claim of the source notebook, the paper and the lessons, and what we measured."""
    from minidora.evidence import ledger
    from minidora.evidence.measures import Record

    if rules:
        for name, rule in ledger.RULES.items():
            typer.echo(f"{name}: {rule}\n")
        return
    for given, known in ((said_by, tuple(ledger.SAID_BY)), (verdict, ledger.VERDICTS)):
        if given is not None and given not in known:
            raise typer.BadParameter(f"{given!r} is none of {', '.join(known)}")
    try:
        entries = ledger.ledger(Record())
    except ValueError as error:
        typer.echo(f"minidora: {error}", err=True)
        raise typer.Exit(2) from None
    if write:
        ledger.DOCUMENT.write_text(ledger.markdown(entries), encoding="utf-8")
        typer.echo(f"written: {ledger.DOCUMENT}")
        return
    chosen = [
        entry
        for entry in entries
        if said_by in (None, entry.claim.said_by) and verdict in (None, entry.verdict)
    ]
    if as_json:
        typer.echo(ledger.as_json(chosen))
        return
    _print_claims(chosen)


def _print_claims(entries: "list[Entry]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from minidora.evidence.ledger import SAID_BY, VERDICTS

    colors = dict(zip(VERDICTS, ("green", "yellow", "red", "dim"), strict=True))
    for key, title in SAID_BY.items():
        table = Table(title=title, show_lines=True, title_justify="left", expand=True)
        table.add_column("claim", ratio=5)
        table.add_column("measured", ratio=4)
        table.add_column("verdict", width=8)
        table.add_column("shown", ratio=2, overflow="fold")
        for entry in (entry for entry in entries if entry.claim.said_by == key):
            claim = entry.claim
            table.add_row(
                f"{escape(claim.text)} [dim]({escape(claim.where)})[/]",
                escape(entry.finding),
                f"[{colors[entry.verdict]}]{entry.verdict}[/]",
                escape(entry.place.split("::")[0]),
            )
        if table.row_count:
            Console().print(table)


# ---- Exercises ----

WorkFolder = Annotated[
    Path | None,
    typer.Option(
        "--folder", help="Your working copy; without it, the one you are in, or my-work/."
    ),
]
OneExercise = Annotated[str, typer.Argument(help="The exercise, 3.2 for example.")]


@contextmanager
def _explained() -> Iterator[None]:
    """End with the message of what the person here can mend, and without a stack."""
    from minidora.classroom.folder import UserError

    try:
        yield
    except UserError as error:
        typer.echo(f"minidora: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def start(
    folder: Annotated[Path | None, typer.Argument(help="Where; without it, my-work/.")] = None,
) -> None:
    """Copy lessons and exercises into a folder of your own; what is there already is kept."""
    from minidora.classroom import folder as folders

    with _explained():
        where = folder or folders.DEFAULT_FOLDER
        copied, kept = folders.start(where)
    typer.echo(f"{len(copied)} files copied to {where}, {len(kept)} kept as they were.")
    typer.echo(f"Open it: jupyter lab {where}")


@app.command()
def status(folder: WorkFolder = None) -> None:
    """What is done, failing and not started, the minutes left, and what is next."""
    from minidora.classroom import report as reports

    with _explained():
        reports.status(folder)


@app.command()
def check(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Lessons or exercises (3, 3.2); with --report the submissions."),
    ] = None,
    folder: WorkFolder = None,
    report: Annotated[Path | None, typer.Option(help="Grade a class: write this CSV file.")] = None,
    seconds: Annotated[float, typer.Option(help="Time limit of one notebook.")] = 300.0,
    memory: Annotated[float, typer.Option(help="Memory limit of one notebook, in GiB.")] = 4.0,
) -> None:
    """Check your exercises; exit code 1 if one is not done. Or grade a class with --report."""
    from minidora.classroom import report as reports
    from minidora.classroom.grade import Limits

    limits = Limits(seconds=seconds, memory_gib=memory)
    with _explained():
        if report is not None:
            reports.grade_class(report, [Path(name) for name in what or []], limits)
        elif not reports.check(folder, what or [], limits):
            raise typer.Exit(1)


@app.command()
def hint(exercise: OneExercise) -> None:
    """A question that leads on."""
    from minidora.classroom import folder as folders

    with _explained():
        typer.echo(folders.select_one(exercise)[1].hint)


@app.command()
def reset(
    what: Annotated[str, typer.Argument(help="An exercise (3.2), or a whole lesson (3).")],
    folder: WorkFolder = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Put an exercise back to how it came, or a lesson's whole notebook; yours goes to backups/."""
    from minidora.classroom import folder as folders

    with _explained():
        work = folders.work_folder(folder)
        lesson, exercises = folders.select(what)
        if not yes:
            typer.confirm(f"Take your answer to {what} out of {work / 'exercises'}?", abort=True)
        if what == exercises[0].number:
            backup = folders.reset_exercise(work, lesson, exercises[0])
        else:
            backup = folders.reset_lesson(work, lesson)
    typer.echo(f"{what} is as it came." + (f" Yours is in {backup}." if backup else ""))
    typer.echo("If it is open in JupyterLab: File > Reload Notebook from Disk.")


@app.command()
def solution(
    exercise: OneExercise,
    folder: WorkFolder = None,
    spoil: Annotated[bool, typer.Option("--spoil", help="Also before you have solved it.")] = False,
) -> None:
    """Our solution of an exercise, once yours passes."""
    from minidora.classroom import folder as folders
    from minidora.classroom import report as reports
    from minidora.classroom.grade import Limits

    with _explained():
        lesson, chosen = folders.select_one(exercise)
        if not spoil and not reports.check(folder, [exercise], Limits(), quiet=True):
            raise folders.UserError(
                f"{exercise} does not pass yet: `minidora hint {exercise}` leads on, "
                "and --spoil shows the solution all the same"
            )
        typer.echo(folders.solution(lesson, chosen))


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
