"""Everything that only a GPU can tell, by one command, in at most six minutes; it writes JSON.

    python -m minidora.evidence.gpu                        # all parts, into runs/gpu/
    python -m minidora.evidence.gpu layers llama           # these parts alone
    python -m minidora.evidence.gpu --output DIR --minutes 3

Nothing but torch, Triton, Typer and this package's folder on PYTHONPATH is needed; PEFT's layers
are measured where PEFT can be imported. Each part has a share of the time, and what it leaves goes
to those after it. One that fails or runs out of its share is reported, and the next one starts;
every part's file is written once it is done.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from minidora.evidence import bench, gpu_parts
from minidora.evidence.gpu_parts import Clock, Rows, State, Unfinished

ROOT = Path(__file__).parents[2]


# ---- Programs of their own ----


TESTS = {
    "test_dora.py": "", "test_dora_cost.py": "", "test_kernels.py": "", "test_lora.py": "",
    "test_stack.py": "cuda", "test_training.py": "cuda",
}  # fmt: skip
"""Files, and the word in the names of those of their tests that are wanted."""
OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<one>\S+::.+?)"
    r"|(?P<other>\S+::.+?) (?P<last>[A-Z]+)(?: +\[ *\d+%\]| \(.*)?)\s*$",
    re.MULTILINE,
)
"""A line of `pytest -v`: with pytest-xdist the outcome comes first."""


def tests(rows: Rows, clock: Clock) -> None:
    """The tests that need CUDA, and those of the layers, in a process of their own.

    All of them, or those that end in time; the names of those that fail, and why.
    """
    found = {name: word for name, word in TESTS.items() if (ROOT / "tests" / name).exists()}
    wanted = " or ".join(f"({name} and {word or 'test'})" for name, word in found.items())
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    files = [str(ROOT / "tests" / name) for name in found]
    done = _run([*command, "-k", wanted, *files], clock)
    outcomes = {
        match["one"] or match["other"]: match["first"] or match["last"]
        for match in OUTCOME.finditer(done.output)
    }
    bad = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    why = dict(re.findall(r"^(?:FAILED|ERROR) (\S+::.+?) - (.*)$", done.output, re.MULTILINE))
    counts = {word: list(outcomes.values()).count(word) for word in sorted({*outcomes.values()})}
    rows.append(
        {
            "state": done.state, "seconds": done.seconds, "counts": counts,
            "failed": {name: why.get(name, "") for name in bad}, "tail": done.output[-2000:],
        }
    )  # fmt: skip
    print({key: value for key, value in rows[-1].items() if key != "tail"}, flush=True)
    if bad or done.state is not State.COMPLETE:
        raise Unfinished(f"{done.state}, {len(bad)} of {len(outcomes)} tests failed")


FIRST_LESSONS = ("07", "02", "04", "05")
"""Those whose minutes are not known yet; after them the others, in their order."""


def lessons(rows: Rows, clock: Clock) -> None:
    """Minutes of each lesson, one after the other, by nbclient; those left out are named too."""
    program = (
        "import nbformat, nbclient, sys; nb = nbformat.read(sys.argv[1], 4); "
        "nbclient.NotebookClient(nb, timeout=None).execute()"
    )
    paths = sorted((ROOT / "notebooks").glob("0*.ipynb"))
    order = [*FIRST_LESSONS, *(path.name[:2] for path in paths)]
    paths.sort(key=lambda path: order.index(path.name[:2]))
    for path in paths:
        row: dict[str, Any] = {"name": path.stem, "state": State.NOT_RUN, "minutes": None}
        if clock.left() > 5:
            done = _run([sys.executable, "-c", program, str(path)], clock)
            row |= {"state": done.state, "seconds": done.seconds}
            if done.state is State.COMPLETE:
                row["minutes"] = round(done.seconds / 60, 1)
            else:
                row["tail"] = done.output[-2000:]
        rows.append(row)
        print({key: value for key, value in row.items() if key != "tail"}, flush=True)
    ran = sum(row["state"] is State.COMPLETE for row in rows)
    if ran < len(rows):
        raise Unfinished(f"{ran} of {len(rows)} lessons ran to their end")


@dataclass(frozen=True)
class Done:
    """How a program ended, and what it printed, errors too."""

    state: State
    seconds: float
    output: str


def _run(command: list[str], clock: Clock) -> Done:
    """Run a program until it ends, or the time does."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # what it has printed when it is ended
        )  # fmt: skip
        try:
            code = process.wait(max(1.0, clock.left()))
            state = State.FAILED if code else State.COMPLETE
        except subprocess.TimeoutExpired:
            state = State.OUT_OF_TIME
            process.terminate()  # nbclient ends its kernel then, pytest its workers
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        output.seek(0)
        return Done(state, time.perf_counter() - start, output.read())


PARTS: dict[str, tuple[Callable[[Rows, Clock], None], float]] = {
    "full": (gpu_parts.full_fine_tuning, 0.02),
    "kernels": (gpu_parts.kernels_against_float64, 0.10),
    "layers": (gpu_parts.layers, 0.20),
    "llama": (gpu_parts.llama_steps, 0.18),
    "compiled": (gpu_parts.compiled, 0.11),
    "tests": (tests, 0.12),
    "lessons": (lessons, 0.27),
}
"""Each part and its share of the minutes, in the order in which they run: full while the card is
empty. On an H200 the first five took 1, 25 (7 of 12 sizes took 15), 53, 51 and 22 seconds."""
SPARE = 10
"""Seconds for the start, and to end what runs out of time."""


def run(names: list[str], output: Path, minutes: float) -> int:
    """Run parts, write output/gpu-<part>.json each; the number of parts that did not finish."""
    output.mkdir(parents=True, exist_ok=True)
    machine = replace(
        bench.machine(gpu_parts.DEVICE, torch.bfloat16, compiled=False), torch=torch.__version__
    ).found()
    end = time.perf_counter() + 60 * minutes - SPARE
    unfinished = 0
    for place, name in enumerate(names):
        part, share = PARTS[name]
        share /= sum(PARTS[later][1] for later in names[place:])
        rows: Rows = []
        allocated = gpu_parts.free_memory()
        start = time.perf_counter()
        state: str = State.COMPLETE
        try:
            part(rows, Clock(start + max(0.0, end - start) * share))
        except Unfinished as error:
            state = str(error)
        except Exception:
            state = traceback.format_exc()
        unfinished += state != State.COMPLETE
        seconds = round(time.perf_counter() - start, 1)
        report = {
            "part": name, "state": state, "seconds": seconds, "allocated_before": allocated,
            "machine": machine, "results": rows,
        }  # fmt: skip
        path = output / f"gpu-{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"== {name}: {state}, {seconds} s, {len(rows)} rows", flush=True)
    return unfinished


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(PARTS)}")] = None,
    output: Annotated[Path, typer.Option(help="where the JSON goes")] = Path("runs/gpu"),
    minutes: Annotated[float, typer.Option(help="for all parts together")] = 6.0,
) -> None:
    """Measure on one GPU; the exit status is 0 where every part finished."""
    if unknown := [name for name in parts or [] if name not in PARTS]:
        raise typer.BadParameter(f"no part {unknown[0]!r}: they are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("no CUDA device: nothing can be measured here", file=sys.stderr)
        raise typer.Exit(2)
    raise typer.Exit(min(1, run(parts or list(PARTS), output, minutes)))


if __name__ == "__main__":
    typer.run(main)
