"""Commands for who takes the course: a folder of one's own, exercises, the demo."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Say whether the course can run here, and how to fix it where it cannot."""
    from minidora.doctor import main

    raise typer.Exit(main())


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
    require_sandbox: Annotated[
        bool, typer.Option("--require-sandbox", help="With --report: refuse to grade without one.")
    ] = False,
) -> None:
    """Check your exercises; exit code 1 if one is not done. Or grade a class with --report."""
    from minidora.classroom import report as reports
    from minidora.classroom.grade import Limits

    limits = Limits(seconds=seconds, memory_gib=memory)
    with _explained():
        if report is not None:
            named = [Path(name) for name in what or []]
            reports.grade_class(report, named, limits, require_sandbox)
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
    plots.save(plots.accuracy_and_bytes(comparison), output)
    typer.echo(f"figure: {output}")
