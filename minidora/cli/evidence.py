"""`minidora evidence`: make what lesson 5's claims rest on, the checkpoint and its runs."""

from pathlib import Path
from typing import Annotated

import typer

from .common import path

app = typer.Typer(help="Make the evidence of lesson 5 again.", no_args_is_help=True)


@app.command()
def pretrain(
    output: Annotated[
        Path,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="Where the weights go; their loss curve goes beside them.",
        ),
    ] = Path("evidence/chargpt.safetensors"),
) -> None:
    """Train the character model on Python's documentation.

    Half an hour on 2 cores. The committed weights are minidora/checkpoints/chargpt.safetensors.
    """
    import json

    from safetensors.torch import save

    from minidora.classroom.files import output_file, write_whole
    from minidora.evidence.pretrain import pretrain

    weights, losses = output_file(output), output_file(output.with_suffix(".json"))
    model, curve = pretrain()
    write_whole(weights, save(model.state_dict()))
    write_whole(losses, json.dumps(curve) + "\n")
    typer.echo(f"written: {weights} and {losses}")


@app.command()
def run(
    output: Annotated[
        Path,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="A .jsonl file, one run a line; the runs in it are not repeated.",
        ),
    ] = Path("evidence/runs.jsonl"),
    workers: Annotated[int, typer.Option(help="Processes, one thread each.", min=1)] = 2,
) -> None:
    """Adapt the pretrained model 170 times.

    One to two hours on 2 cores; it may be stopped, and goes on where it was. The committed runs are
    minidora/evidence/runs.jsonl.
    """
    from minidora.classroom.files import UserError, output_file
    from minidora.evidence.pretrain import collect, read_results

    output = output_file(output)
    if output.exists() and not output.is_file():
        raise UserError(f"{output} cannot be read again later: name a .jsonl file")
    try:
        read_results(output)
    except ValueError as error:
        raise UserError(f"{error}: name another file") from None
    collect(output, workers)
    typer.echo(f"all runs are in {output}")
