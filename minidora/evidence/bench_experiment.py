"""How many small trainings a second: many at once against one after the other.

    minidora bench experiment            # a minute on two cores; the same command on a GPU

Both ways train the same models on the same batches, in turn, for a few rounds; what counts is the
median of the rounds' ratios. One by one uses one CPU thread, which is the faster way there.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from minidora.data import Images, load_images, load_text, shift, split
from minidora.evidence.bench import machine
from minidora.experiment import Method, prepare
from minidora.loop import Run, TextRun
from minidora.models import CharGPT, MultilayerPerceptron
from minidora.stack import fit_in_step, fit_text_in_step, why_one_by_one
from minidora.training import fit, fit_text, one_thread

METHODS = (Method("full"), Method("lora", 4, 8.0), Method("dora", 4, 8.0))
EPOCHS, STEPS = 5, 4
"""Of a run of the perceptron (300 digits, 5 batches an epoch), and of CharGPT."""


@dataclass(frozen=True)
class Result:
    """One model and method. together and alone: runs a second. choice: what fit_many does here."""

    model: str
    method: str
    runs: int
    together: float
    alone: float
    ratios: tuple[float, ...]
    choice: str

    @property
    def ratio(self) -> float:
        """How many times as many runs a second together as one by one."""
        return median(self.ratios)


def measure(
    device: torch.device, perceptrons: int = 60, texts: int = 4, rounds: int = 3
) -> Iterator[Result]:
    """A result for each model and method.

    Args:
        perceptrons, texts: how many of each train at once.
        rounds: how often both ways are timed, in turn, after one that is not counted.
    """
    digits = shift(split(load_images("digits"), {"train": 300}, seed=0)["train"], "half turn")
    train = digits.to(device)
    tokens = load_text("source")
    for name, count in (("perceptron", perceptrons), ("CharGPT", texts)):
        base = MultilayerPerceptron(64, 128, 64, 10) if name == "perceptron" else CharGPT()
        for method in METHODS:
            models = [prepare(base.to(device), method, seed) for seed in range(count)]
            if name == "perceptron":
                ways = _images(models, train)
                batch = train.x[:64]
            else:
                ways = _texts(models, tokens)
                batch = tokens[: 16 * 64].view(16, 64)
            seconds = [[_seconds(way, device) for way in ways] for _ in range(rounds + 1)][1:]
            together, alone = (median(column) for column in zip(*seconds, strict=True))
            yield Result(
                model=name,
                method=method.kind,
                runs=count,
                together=count / together,
                alone=count / alone,
                ratios=tuple(one / both for both, one in seconds),
                choice="one by one" if why_one_by_one(models[0], batch) else "in step",
            )


def _images(models: list[nn.Module], train: Images) -> tuple[Callable[[], object], ...]:
    settings: dict[str, Any] = {"epochs": EPOCHS, "patience": None, "batch_size": 64}

    def runs() -> list[Run]:
        return [Run(copy.deepcopy(m), train, None, 0.01, None, k) for k, m in enumerate(models)]

    @one_thread()
    def alone() -> None:
        for run in runs():
            fit(**run._asdict(), **{**settings, "progress": False})

    return lambda: fit_in_step(runs(), False, **settings), alone


def _texts(models: list[nn.Module], tokens: torch.Tensor) -> tuple[Callable[[], object], ...]:
    settings: dict[str, Any] = {"steps": STEPS, "context": 64, "batch_size": 16}
    settings["weight_decay"] = 0.0

    def runs() -> list[TextRun]:
        return [TextRun(copy.deepcopy(m), 0.003, None, k) for k, m in enumerate(models)]

    def alone() -> None:
        for run in runs():
            fit_text(tokens=tokens, **run._asdict(), **{**settings, "progress": False})

    return lambda: fit_text_in_step(runs(), tokens, False, **settings), alone


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def report(device: torch.device, results: list[Result]) -> dict[str, Any]:
    """What is written as JSON: the machine and a row for each result."""
    rows = [{**vars(result), "ratio": result.ratio} for result in results]
    return {"machine": machine(device, torch.float32, compiled=False).found(), "results": rows}
