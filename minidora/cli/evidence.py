"""`minidora evidence`: make what lesson 5's claims rest on, the checkpoint and its runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make the evidence of lesson 5 again.", no_args_is_help=True)


@app.command()
def pretrain(
    output: Annotated[
        Path, typer.Option(help="Where the weights go; their loss curve goes beside them.")
    ] = Path("evidence/chargpt.safetensors"),
) -> None:
    """Train the character model on Python's documentation: half an hour on 2 cores."""
    from minidora.evidence.pretrain import pretrain

    pretrain(output)
    typer.echo(f"written: {output} and {output.with_suffix('.json')}")


@app.command()
def run(
    output: Annotated[
        Path, typer.Option(help="A .jsonl file, one run a line; the runs in it are not repeated.")
    ] = Path("evidence/runs.jsonl"),
    workers: Annotated[int, typer.Option(help="Processes, one thread each.", min=1)] = 2,
) -> None:
    """Adapt the pretrained model 170 times: one to two hours on 2 cores, resumable."""
    from minidora.evidence.pretrain import collect

    collect(output, workers)
    typer.echo(f"all runs are in {output}")
