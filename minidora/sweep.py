"""Sweeps: every method at every rank, rate and seed, kept as they finish, and what they say.

    grid = Grid(task="digits", methods=("lora", "dora"), ranks=(2, 4), seeds=5)
    run(grid, "runs/first")                      # again, after a kill: it goes on where it was
    print(report("runs/first").markdown())

A run is one training at one learning rate from one seed. Runs of one method train together, a
group at a time (see fit_many). The grid alone decides who is in a group, so a group that is
repeated on the same machine gives the same numbers, bit for bit. Each finished group is appended
to results-0.jsonl, a line a run, and flushed: a kill loses the group in hand and nothing else.

Under torchrun process r takes groups r, r + world, ... and writes results-r.jsonl. Folders from
machines that share no disk are joined by copying these files together.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minidora.adapt import count_parameters
from minidora.data import Images, expanded, load_images, load_text, split_text
from minidora.experiment import SIZES, Method, Task, make_tasks, prepare, train_many
from minidora.grid import QUESTIONS, Grid, name_of
from minidora.models import load_pretrained
from minidora.results import Row, append, hold, read_settings
from minidora.summary import Report, report
from minidora.training import (
    device,
    evaluate,
    evaluate_text,
    fit_text_many,
    one_thread,
    progress_bar,
)

__all__ = ["QUESTIONS", "Grid", "GroupFailed", "Report", "holds", "minutes", "report", "run"]

LARGE = {"pretraining": 5000, "adaptation": 1000, "validation": 1000, "test": 5000}
"""How many images of the larger datasets go where."""


# ---- One group ----


@lru_cache(maxsize=1)
def _images(task: str) -> Images:
    return load_images(task)


@lru_cache(maxsize=1)
def _tasks(task: str, seeds: tuple[int, ...]) -> tuple[Task, ...]:
    sizes = SIZES if task == "digits" else LARGE
    return tuple(make_tasks(_images(task), "half turn", seeds, sizes))


@lru_cache(maxsize=1)
def _texts() -> tuple[Tensor, Tensor, Tensor]:
    """(train, validation, test) of Python's source code, as lesson 5 has them."""
    train, held_out = split_text(load_text("source"))
    return train, *split_text(held_out, held_out=0.5)


class GroupFailed(Exception):
    """Something failed within a group of runs: a fault, or no memory left, not a wrong setting."""


def run_group(grid: Grid, group: int) -> list[Row]:
    """Train the runs of one group; a row for each, seed by seed, in rising order of rates.

    Raises:
        GroupFailed: from whatever failed there.
    """
    method, seeds = grid.groups[group]
    pairs = list(product(seeds, grid.rates))
    start = time.perf_counter()
    train = _run_texts if grid.task == "chargpt" else _run_images
    try:
        results = list(train(grid, method, pairs))
    except Exception as error:
        raise GroupFailed(
            f"group {group} ({name_of(method)}, seeds {seeds[0]} to {seeds[-1]}) failed: "
            f"{error!r}; groups that were done before it are kept"
        ) from error
    seconds = round((time.perf_counter() - start) / len(pairs), 4)
    about = {"seconds": seconds, "group": group, **machine()}
    arm = {key: value for key, value in asdict(method).items() if key != "targets"}
    return [
        {**arm, "seed": seed, "rate": rate, **result, **about}
        for (seed, rate), result in zip(pairs, results, strict=True)
    ]


def _run_images(grid: Grid, method: Method, pairs: list[tuple[int, float]]) -> Iterable[Row]:
    seeds = tuple(dict.fromkeys(seed for seed, _ in pairs))
    tasks = dict(zip(seeds, _tasks(grid.task, seeds), strict=True))
    chosen = [tasks[seed] for seed, _ in pairs]
    for task, trial in zip(
        chosen, train_many(chosen, method, [rate for _, rate in pairs], grid.length), strict=True
    ):
        test = evaluate(trial.model, task.test)
        yield {
            "trained": count_parameters(trial.model).trainable,
            "best": trial.history.best.number,
            "validation_loss": trial.loss,
            "validation_accuracy": trial.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
        }


@one_thread()
def _run_texts(grid: Grid, method: Method, pairs: list[tuple[int, float]]) -> Iterable[Row]:
    train, validation, test = _texts()
    models = [prepare(load_pretrained(device()), method, seed) for seed, _ in pairs]
    fit_text_many(
        models,
        train,
        steps=grid.length,
        learning_rate=[rate for _, rate in pairs],
        rate_factors=method.rate_factors,
        seed=[seed for seed, _ in pairs],
        progress=False,
    )
    for model in models:
        yield {
            "trained": count_parameters(model).trainable,
            "best": grid.length,
            "validation_loss": evaluate_text(model, validation),
            "test_loss": evaluate_text(model, test),
        }


@lru_cache
def machine() -> Row:
    """Where and with what: the device, the versions, the commit of this package."""
    place, folder = device(), Path(__file__).resolve().parent
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    git = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # installed without its repository
    versions = {"minidora": version("minidora"), "torch": torch.__version__}
    versions["python"] = platform.python_version()
    return {"device": name, **versions, "commit": commit}


# ---- All groups, in a folder ----


def run(
    grid: Grid,
    folder: str | Path,
    after_group: Callable[[list[Row]], None] | None = None,
    progress: bool = True,
) -> None:
    """Run what is not yet in the folder, and add it there (see results.py).

    Args:
        after_group: called with the rows of each group once they are written.
        progress: a bar over the groups.

    Raises:
        ValueError: the folder holds another sweep; the settings that differ are named.
        RuntimeError: another process is at work there, or the task's images cannot be had.
        OSError: the folder cannot be written.
        GroupFailed: a group failed; what was done before it is kept.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and "MINIDORA_DEVICE" not in os.environ and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        os.environ["MINIDORA_DEVICE"] = f"cuda:{local}"
    settings = _settings(grid)
    if grid.task != "chargpt":
        _images(grid.task)  # what cannot be had is said before the folder is made
    folder = expanded(folder)
    with hold(folder, settings, grid.runs, rank, world) as done:
        mine = [group for group in range(rank, len(grid.groups), world) if group not in done]
        for group in progress_bar(mine, "groups", progress and rank == 0):
            rows = run_group(grid, group)
            append(folder, rank, rows)
            if after_group is not None:
                after_group(rows)


def holds(grid: Grid, folder: str | Path) -> bool:
    """Whether the folder holds this sweep, begun or done."""
    try:
        return read_settings(expanded(folder)) == _settings(grid)
    except ValueError:
        return False


def _settings(grid: Grid) -> Row:
    """What a folder is for, as JSON has it."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(grid).items()}
    return {**settings, "device": device().type}


def minutes(grid: Grid) -> float:
    """About how long the grid takes here, measured: very short runs of each method, scaled up.

    Runs that stop early take less. Nothing is written.
    """
    images, seeds = grid.task != "chargpt", grid.groups[0][1]
    start = time.perf_counter()
    if images:
        _tasks(grid.task, seeds)
    total = (time.perf_counter() - start) * len(grid.groups) / len(grid.arms)
    for kind in grid.methods:
        few = Grid(
            task=grid.task,
            methods=(kind,),
            ranks=grid.ranks[-1:],
            rates=grid.rates if images else grid.rates[:1],
            seeds=seeds if images else seeds[:1],
            targets=grid.targets,
        )
        once, thrice = (run_group(replace(few, length=n), 0)[0]["seconds"] for n in (1, 3))
        step = max(0.0, (thrice - once) / 2)
        of_this = [g for g, (method, _) in enumerate(grid.groups) if method.kind == kind]
        total += (once + step * (grid.length - 1)) * sum(map(grid.runs, of_this))
    return total / 60
