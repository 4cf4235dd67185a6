"""Make what lesson 5 stands on: the pretrained CharGPT, and the evidence over many seeds.

    minidora evidence pretrain      # the checkpoint: half an hour on 2 cores
    minidora evidence run           # all runs, resumable: one to two hours

A run adapts the pretrained model from documentation to source code and records how magnitude and
direction moved. Each run is one line of a .jsonl file; what is in it already is not run again, so
the command may be stopped and started at will. The committed evidence is that file.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minidora.adapt import adapt, count_parameters
from minidora.data import load_text, split_text
from minidora.dora import DoRALinear, dora_weight
from minidora.geometry import Tracker
from minidora.models import PAPER_TARGETS, CharGPT, load_pretrained
from minidora.training import evaluate_text, fit_text, progress_bar

EVIDENCE = Path(__file__).with_name("runs.jsonl")
PRETRAIN_STEPS = 4000
STEPS = 300
RECORD_AT = (75, 150, 225, 300)
TARGETS = {
    "qv": ["q_proj", "v_proj"],  # figure 2's
    "five": list(PAPER_TARGETS),
    "all": [],  # full fine-tuning trains every parameter
}
SETTINGS = (("full", "all"), ("lora", "qv"), ("dora", "qv"), ("lora", "five"), ("dora", "five"))
"""(method, targets) that are tuned, then compared."""
RATES = {
    "full": (3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "dora": (1e-3, 3e-3, 1e-2, 3e-2),
}
"""Learning rates tried for each method: full fine-tuning's are a third of an adapter's."""
TUNING_SEEDS = (100, 101, 102)
SEEDS = tuple(range(10))
RANK_SEEDS = tuple(range(5))
RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Run:
    """What is run: a method ("full", "lora", "dora", "dora, full gradient") and its setting."""

    purpose: str  # "tune", "compare", "ranks" or "gradient"
    method: str
    targets: str
    rank: int
    learning_rate: float
    seed: int


class FullGradientDoRA(DoRALinear):
    """DoRA whose norm is differentiated: equation 6 instead of equation 11, in the merged form."""

    def forward(self, x: Tensor) -> Tensor:
        weight = dora_weight(
            self.base.weight, self.delta_weight(), self.magnitude, detach_norm=False
        )
        return F.linear(x, weight, self.base.bias)


def texts(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(train, validation, test): learning rates are chosen on the second, losses on the third."""
    train, held_out = split_text(load_text(name), held_out=0.1)
    validation, test = split_text(held_out, held_out=0.5)
    return train, validation, test


def pretrain() -> tuple[CharGPT, dict[str, Any]]:
    """CharGPT, trained on the documentation, and its loss curve."""
    train, validation, _ = texts("documentation")
    torch.manual_seed(0)
    model = CharGPT()
    start = time.perf_counter()
    losses = fit_text(
        model, train, steps=PRETRAIN_STEPS, learning_rate=3e-3, batch_size=32, weight_decay=0.1
    )
    curve = {
        "steps": PRETRAIN_STEPS,
        "every": 20,
        "losses": [round(sum(losses[k : k + 20]) / 20, 4) for k in range(0, len(losses), 20)],
        "validation_loss": round(evaluate_text(model, validation), 4),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "torch": torch.__version__,
    }
    return model, curve


def build(run: Run) -> CharGPT:
    """The pretrained model, prepared for a run; its adapters start from the run's seed."""
    torch.manual_seed(run.seed)
    model = load_pretrained()
    if run.method == "full":
        return model
    method = "lora" if run.method == "lora" else "dora"
    adapt(model, method, rank=run.rank, alpha=2.0 * run.rank, target_modules=TARGETS[run.targets])
    if run.method == "dora, full gradient":
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.__class__ = FullGradientDoRA
    return model


def execute(run: Run) -> dict[str, Any]:
    """Train one run; its losses, and its points at the recorded steps over both axes."""
    train, validation, test = texts("source")
    model = build(run)
    trackers = {dim: Tracker(model, TARGETS["five"], dim) for dim in (1, 0)}

    def record(step: int) -> None:
        if step in RECORD_AT:
            for tracker in trackers.values():
                tracker.record(step)

    losses = fit_text(
        model, train, steps=STEPS, learning_rate=run.learning_rate, seed=run.seed,
        after_step=record, progress=False,
    )  # fmt: skip
    return {
        **asdict(run),
        "trainable": count_parameters(model).trainable,
        "train_loss": round(sum(losses[-20:]) / 20, 4),
        "validation_loss": round(evaluate_text(model, validation), 4),
        "test_loss": round(evaluate_text(model, test), 4),
        "points": [
            [
                dim,
                p.layer,
                p.step,
                float(f"{p.delta_magnitude:.4g}"),
                float(f"{p.delta_direction:.4g}"),
            ]
            for dim, tracker in trackers.items()
            for p in tracker.points
            # An adapter leaves the layers that it does not target where they were.
            if run.method == "full" or p.layer.rsplit(".", 1)[-1] in TARGETS[run.targets]
        ],
    }


def tuning_runs() -> Iterator[Run]:
    """Every setting at every rate. They record their points too: what the rate changes."""
    for seed in TUNING_SEEDS:
        for method, targets in SETTINGS:
            for rate in RATES[method]:
                yield Run("tune", method, targets, 8, rate, seed)


def best_rates(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """{(method, targets): learning rate} of the lowest mean validation loss over tuning seeds."""
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in results:
        if row["purpose"] == "tune":
            by_rate = losses.setdefault((row["method"], row["targets"]), {})
            by_rate.setdefault(row["learning_rate"], []).append(row["validation_loss"])
    return {
        key: min(by_rate, key=lambda rate: sum(by_rate[rate]) / len(by_rate[rate]))
        for key, by_rate in losses.items()
    }


def evidence_runs(rates: dict[tuple[str, str], float]) -> Iterator[Run]:
    """All runs but the tuning, each at the rate tuned for its method at rank 8."""
    for seed in SEEDS:
        for method, targets in SETTINGS:
            yield Run("compare", method, targets, 8, rates[method, targets], seed)
        yield Run("gradient", "dora, full gradient", "qv", 8, rates["dora", "qv"], seed)
    for seed in RANK_SEEDS:
        for rank in RANKS:
            for method in ("lora", "dora"):
                if rank != 8:  # those are among the compared
                    yield Run("ranks", method, "five", rank, rates[method, "five"], seed)


def read_results(path: Path | None = None) -> list[dict[str, Any]]:
    """The finished runs of a file (EVIDENCE if None), in its order; none where there is no file.

    A last line without its end, left by an interrupted run, is not a finished one.

    Raises:
        ValueError: another line is not a run.
    """
    path = path or EVIDENCE
    if not path.exists():
        return []
    rows = []
    text = path.read_bytes().decode("utf-8", "replace")
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
            Run(**{key: rows[-1][key] for key in Run.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}, is not a run") from None
    return rows


def collect(path: Path, workers: int = 2) -> None:
    """Run what the file does not hold yet: first the tuning, then the rest."""
    _drop_half_a_line(path)
    _run_missing(list(tuning_runs()), path, workers)
    _run_missing(list(evidence_runs(best_rates(read_results(path)))), path, workers)


def _drop_half_a_line(path: Path) -> None:
    """Cut off what a run that was interrupted while it wrote has left at the end of the file."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _run_missing(runs: list[Run], path: Path, workers: int) -> None:
    keys = Run.__dataclass_fields__
    done = {Run(**{key: row[key] for key in keys}) for row in read_results(path)}
    missing = [run for run in runs if run not in done]
    with (
        ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        rows = pool.map(execute, missing)
        for _, row in zip(progress_bar(missing, "runs"), rows, strict=True):
            file.write(json.dumps(row) + "\n")
            file.flush()
