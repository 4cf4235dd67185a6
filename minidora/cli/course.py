"""Commands for who takes the course: a folder of one's own, exercises, the demo."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from minidora_command import load

from .common import (
    FIGURES,
    OneExercise,
    WorkFolder,
    course_device,
    figure,
    finite,
    path,
    write_figure,
)

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Say whether the course can run here."""
    raise typer.Exit(load("doctor").main())  # as minidora_command.main, which needs no typer


@app.command()
def start(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", parser=path, help="Where; without it, my-work/."),
    ] = None,
) -> None:
    """Copy the course into a folder of yours.

    What is there already is never overwritten. Where your copy of a lesson is of an older edition,
    it says what has changed since, and the new one is laid beside yours.
    """
    from minidora.classroom import folder as folders
    from minidora.classroom.files import quoted, typed

    where = folder or folders.DEFAULT_FOLDER
    copied, kept = folders.start(where)
    typer.echo(f"{len(copied)} files copied to {where}, {len(kept)} kept as they were.")
    for line in folders.renew(where):
        typer.echo(line)
    option = "" if where == folders.DEFAULT_FOLDER else f" --folder {quoted(where)}"
    typer.echo(f"To open it in JupyterLab: {typed('lab' + option)}")


@app.command(context_settings={"ignore_unknown_options": True})
def lab(
    folder: WorkFolder = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="Options for JupyterLab: --no-browser, --port 8899.")
    ] = None,
) -> None:
    """Open your folder in JupyterLab.

    Its notebooks and terminals find this environment's Python and the minidora command.
    """
    from minidora.classroom import folder as folders

    work = folders.real(folders.work_folder(folder))
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join((scripts, os.environ.get("PATH", "")))}
    # In this folder, where its terminals then open too; -P keeps what lies there out of the server.
    os.chdir(work)
    command = [sys.executable, "-P", "-m", "jupyterlab", f"--ServerApp.root_dir={work}"]
    if os.name == "nt":
        raise typer.Exit(subprocess.call([*command, *(options or [])], env=environment))
    # A login shell, which JupyterLab starts where it has no terminal itself, would set PATH anew.
    shell = os.environ.get("SHELL", "/bin/sh")
    command.append(f"--ServerApp.terminado_settings=shell_command=['{shell}']")
    if os.geteuid() == 0:  # in a container there is often no other user
        command.append("--allow-root")
    os.execve(sys.executable, [*command, *(options or [])], environment)


@app.command()
def status(folder: WorkFolder = None) -> None:
    """Say what is done and what is next.

    It lists every exercise of your saved notebooks as done, failing or not started.
    """
    from minidora.classroom import report as reports

    reports.status(folder)


@app.command()
def check(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Lessons or exercises (3, 3.2); with --report the submissions."),
    ] = None,
    folder: WorkFolder = None,
    report: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Grade a class: write this CSV file."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Time limit of one notebook.", min=1, callback=finite)
    ] = 300.0,
    memory: Annotated[
        float,
        typer.Option(help="Memory limit of one notebook, in GiB.", min=0.5, callback=finite),
    ] = 4.0,
    require_sandbox: Annotated[
        bool, typer.Option("--require-sandbox", help="With --report: refuse to grade without one.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Stop with the stack where a check itself is at fault.")
    ] = False,
) -> None:
    """Check your exercises, or grade a class.

    The exit code is 1 if an exercise is not done. With --report FILE, WHAT is the folder of
    submissions: STUDENT/*.ipynb or STUDENT.ipynb.
    """
    from minidora.classroom import report as reports
    from minidora.classroom.files import output_file
    from minidora.classroom.grade import Limits

    limits = Limits(seconds=seconds, memory_gib=memory)
    if report is not None:
        named = [path(name) for name in what or []]
        reports.grade_class(output_file(report), named, limits, require_sandbox)
    elif not reports.check(folder, what or [], limits, debug=debug):
        raise typer.Exit(1)


@app.command()
def hint(exercise: OneExercise) -> None:
    """Ask a question that leads on."""
    hints = {entry.number: entry.hint for entry in load("checks.catalog").entries()}
    of_lesson = [number for number in hints if number.partition(".")[0] == exercise]
    if of_lesson:
        raise typer.BadParameter(
            f"name one exercise of lesson {exercise}, {of_lesson[0]} for example"
        )
    if exercise not in hints:
        raise typer.BadParameter(
            f"there is no exercise {exercise[:20]}: there are {', '.join(hints)}"
        )
    typer.echo(hints[exercise])


@app.command()
def reset(
    what: Annotated[str, typer.Argument(help="An exercise (3.2), or a whole lesson (3).")],
    folder: WorkFolder = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Put an exercise or a lesson back.

    An exercise (3.2) gets its stub again, a lesson (3) its whole notebook. What you wrote goes to
    backups/ in your folder.
    """
    from minidora.classroom import folder as folders

    work = folders.work_folder(folder)
    lesson, exercises = folders.select(what)
    if not yes:
        typer.confirm(f"Take your answer to {what} out of {work / 'exercises'}?", abort=True)
    if what == exercises[0].number:
        backup = folders.reset_exercise(work, lesson, exercises[0])
    else:
        backup = folders.reset_lesson(work, lesson)
    typer.echo(f"{what} has been reset." + (f" Yours is in {backup}." if backup else ""))
    typer.echo("If it is open in JupyterLab: File > Reload Notebook from Disk.")


@app.command()
def solution(
    exercise: OneExercise,
    folder: WorkFolder = None,
    spoil: Annotated[bool, typer.Option("--spoil", help="Also before you have solved it.")] = False,
) -> None:
    """Show our solution, once yours passes."""
    from minidora.classroom import folder as folders
    from minidora.classroom import report as reports
    from minidora.classroom.files import UserError, typed
    from minidora.classroom.grade import Limits

    lesson, chosen = folders.select_one(exercise)
    if not spoil and not reports.check(folder, [exercise], Limits(), quiet=True):
        raise UserError(
            f"{exercise} does not pass yet: `{typed(f'hint {exercise}')}` leads on, "
            "and --spoil shows the solution all the same"
        )
    typer.echo(folders.solution(lesson, chosen))


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(help="Replications, each from pretraining on.", min=2)] = 5,
    output: Annotated[
        Path,
        typer.Option(
            parser=path,
            callback=figure,
            metavar="FILE",
            help=f"Where the figure goes ({', '.join(FIGURES)}).",
        ),
    ] = Path("demo/half_turn.png"),
) -> None:
    """Compare full fine-tuning, LoRA and DoRA.

    A perceptron learns digits, the digits are turned upside down, and each method adapts to that.
    """
    from rich.console import Console
    from rich.table import Table

    from minidora import plots
    from minidora.classroom.files import output_file
    from minidora.experiment import compare, mean_and_error, methods

    output = output_file(output)  # rather now than after a minute of training
    typer.echo(f"{seeds} seeds on {course_device()}, each pretrained, turned and adapted:")
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
    write_figure(plots.accuracy_and_bytes(comparison), output)
    typer.echo(f"figure: {output}")
