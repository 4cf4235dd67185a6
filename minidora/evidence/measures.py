"""What the ledger of claims rests on: committed runs, benchmarks and outputs, and what they say.

A measure is a function of MEASURES. It returns a number, a text or an interval for each setting in
which a claim is looked at; claims.toml names it and its arguments. None runs a model.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from minidora import summary
from minidora.adapt import adapt
from minidora.evidence import analysis, pretrain
from minidora.evidence.bench import Report, load_reports
from minidora.evidence.pretrain import RANKS, TARGETS
from minidora.experiment import Difference
from minidora.geometry import Dot, delta_direction, delta_magnitude, magnitude_direction
from minidora.memory import LLAMAS, adapter_parameters, gb, llama, training_memory

ROOT = Path(__file__).resolve().parents[2]


class Interval(NamedTuple):
    """A mean with the bounds of its 95 % interval, and the smallest detectable difference."""

    mean: float
    low: float
    high: float
    detectable: float | None = None


Values = dict[str, Any]
"""{setting: a number, a text or an Interval}"""


# ---- The committed figures ----


class Record:
    """What verdicts rest on: the committed runs, benchmarks and outputs of the lessons."""

    def __init__(
        self,
        root: Path = ROOT,
        runs: list[dict[str, Any]] | None = None,
        reports: dict[str, Report] | None = None,
    ) -> None:
        self.root = root
        self._runs = runs
        self.reports = load_reports(root / "benchmarks") if reports is None else reports
        self._cells: dict[str, dict[str, tuple[str, str]]] = {}

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """The evidence of lesson 5, all of it.

        Raises:
            ValueError: some is missing.
        """
        runs = pretrain.read_results() if self._runs is None else self._runs
        keys = pretrain.Run.__dataclass_fields__
        done = {pretrain.Run(**{key: row[key] for key in keys}) for row in runs}
        wanted = set(pretrain.tuning_runs())
        if wanted <= done:
            wanted |= set(pretrain.evidence_runs(pretrain.best_rates(runs)))
        if not wanted <= done:
            raise ValueError(
                f"the evidence is not complete, {len(done)} runs are there: "
                "`minidora evidence run --output minidora/evidence/runs.jsonl` makes the rest"
            )
        return runs

    def cell(self, shown: str) -> tuple[str, str]:
        """(the heading above a cell, its stored output) of "notebooks/x.ipynb#cell id".

        Raises:
            ValueError: there is no such notebook or cell.
        """
        path, _, name = shown.partition("#")
        if path not in self._cells:
            if not (self.root / path).is_file():
                raise ValueError(f"there is no {path}: the ledger reads the repository's files")
            self._cells[path] = dict(_cells(self.root / path))
        if name not in self._cells[path]:
            raise ValueError(f"{path} has no cell {name!r}")
        return self._cells[path][name]

    def place(self, shown: str) -> str:
        """Where a reader finds it: "lesson 3, section 8", or the test.

        Raises:
            ValueError: it is not there.
        """
        if "#" in shown:
            section = re.match(r"(\d+)\. ", heading := self.cell(shown)[0])
            where = f"section {section[1]}" if section else heading
            return f"lesson {int(Path(shown).name[:2])}, {where}"
        path, _, test = shown.partition("::")
        file = self.root / path
        if not file.is_file() or f"\ndef {test}(" not in file.read_text(encoding="utf-8"):
            raise ValueError(f"there is no test {shown}")
        return f"{file.name}::{test}"


def _cells(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """As plain JSON: importing nbformat takes longer than all the claims together."""
    heading = ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            heading = [heading, *re.findall(r"^## (.+)$", source, re.MULTILINE)][-1]
        outputs = cell.get("outputs", [])
        texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs]
        yield cell["id"], (heading, "".join("".join(text) for text in texts))


def printed(output: str, pattern: str) -> Values:
    """Read a cell's output by a pattern with a group `value`, or `mean` with `low` and `high` or
    with `half`, and perhaps `detectable`. A group `name` names the setting. A value stays text."""
    found: Values = {}
    for match in re.finditer(pattern, output, re.MULTILINE):
        groups = {key: text for key, text in match.groupdict().items() if text is not None}
        name = " ".join(groups.pop("name", "").split())
        value: Any = groups.get("value")
        if value is None:
            numbers = {key: float(text) for key, text in groups.items()}
            if "half" in numbers:
                mean, half = numbers["mean"], numbers.pop("half")
                numbers |= {"low": mean - half, "high": mean + half}
            value = Interval(**numbers)
        found[name if name not in found else f"{name} ({len(found) + 1})".strip()] = value
    return found


# ---- Computed from shapes ----


def _layers(name: str) -> tuple[list[torch.nn.Linear], int]:
    """The layers of a LLaMA that the paper adapts, and the number of all its parameters."""
    model = llama(name)
    layers = [
        module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.endswith(tuple(TARGETS["five"]))
    ]
    return layers, sum(parameter.numel() for parameter in model.parameters())


def adam(figures: Record, settings: list[str]) -> Values:
    """LLaMA-7B trained by Adam in float32: GB, and its state in copies of the weights."""
    memory, size = training_memory(llama("LLaMA-7B", torch.float32), "adam"), LLAMAS["LLaMA-7B"]
    three = memory.weights + memory.optimizer_state
    found = {
        "copies": memory.optimizer_state / memory.weights,
        "weights": gb(memory.weights),
        "gradients": gb(memory.gradients),
        "weights, m and v of 7.0e9 parameters": 7.0 * 4 * three / memory.weights,
        "weights, m and v of LLaMA-7B": gb(three),
        "inputs of blocks, 2048 tokens": gb(2 * size.layers * 2048 * size.hidden),
    }
    return {name: found[name] for name in settings}


def adapters(figures: Record, settings: list[str]) -> Values:
    """GB at the peak of training adapters of rank 32 over LLaMA-7B in bf16, no activations."""
    found = {}
    for method in ("LoRA", "DoRA"):
        model = llama("LLaMA-7B")
        adapt(model, method.lower(), rank=32, target_modules=TARGETS["five"])
        found[method] = gb(training_memory(model, "adamw").peak)
    found["DoRA minus LoRA"] = found["DoRA"] - found["LoRA"]
    return {name: found[name] for name in settings}


def trained_percent(figures: Record) -> Values:
    """Trained parameters in percent of all, as the paper counts them in Table 1."""
    found = {}
    for name in ("LLaMA-7B", "LLaMA-13B", "LLaMA3-8B"):
        layers, total = _layers(name)
        for method, rank in (("LoRA", 32), ("DoRA", 16), ("DoRA", 32)):
            count = adapter_parameters(layers, rank, method.lower())
            found[f"{name} {method} {rank}"] = 100 * count / (total + count)
    return found


def magnitudes_of_model(figures: Record) -> Values:
    """What the magnitudes add, in percentage points of the model."""
    percent = trained_percent(figures)
    names = ("LLaMA-7B", "LLaMA-13B", "LLaMA3-8B")
    return {name: percent[f"{name} DoRA 32"] - percent[f"{name} LoRA 32"] for name in names}


def magnitudes_of_lora(figures: Record) -> Values:
    """What they add in percent of LoRA's parameters, in LLaMA-7B."""
    layers, _ = _layers("LLaMA-7B")
    counts = {
        r: [adapter_parameters(layers, r, m) for m in ("lora", "dora")] for r in (4, 8, 16, 32)
    }
    return {f"rank {r}": 100 * (dora - lora) / lora for r, (lora, dora) in counts.items()}


def vectors(figures: Record) -> Values:
    """The largest |length * (v / length) - v|."""
    pairs = {"a vector": torch.tensor([3.0, 4.0]), "the zero vector": torch.zeros(2)}
    return {name: float((v.norm() * (v / v.norm()) - v).abs().max()) for name, v in pairs.items()}


def distance_at_start(figures: Record) -> Values:
    """Equations 3 and 4 of a weight that has not been trained."""
    weight = torch.arange(1.0, 13.0).view(3, 4)
    return {"Delta M": delta_magnitude(weight, weight), "Delta D": delta_direction(weight, weight)}


def shrunk_and_grown(figures: Record) -> Values:
    """Delta M of rows half and one and a half times as long, in parts of their mean length."""
    weight = torch.arange(1.0, 13.0).view(3, 4)
    mean = float(magnitude_direction(weight)[0].mean())
    shrunk, grown = (delta_magnitude(f * weight, weight) / mean for f in (0.5, 1.5))
    return {"difference of Delta M, shrunk and grown": abs(shrunk - grown)}


# ---- From the evidence of lesson 5 ----

NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}
SETTINGS = {"qv": "CharGPT, q and v", "five": "CharGPT, five targets"}
DIGITS = "notebooks/04_mlp_demo.ipynb#f2343ef6"  # lesson 4's paired differences, in points
FIGURE_2 = ["q_proj"]


def _interval(found: Difference) -> Interval:
    return Interval(found.mean, found.low, found.high, found.detectable)


def _dots(
    figures: Record, method: str, matrices: list[str], steps: Iterable[int] | None = None
) -> list[Dot]:
    runs = analysis.select(figures.runs, "compare", method, analysis.METHODS[method])
    return analysis.dots(runs, matrices, steps=steps)


def _by_seed(
    figures: Record, matrices: list[str], steps: list[int] | None
) -> dict[str, dict[int, float]]:
    return {m: analysis.by_seed(_dots(figures, m, matrices, steps)) for m in analysis.METHODS}


def correlation(figures: Record, methods: list[str], matrices: list[str] = FIGURE_2) -> Values:
    """r of the changes in direction and in magnitude: query matrices, all recorded steps."""
    found: Values = {}
    for method in methods:
        dots = _dots(figures, method, FIGURE_2)
        for over, what in ((["seed"], "seeds"), (["seed", "layer"], "seeds and layers")):
            r = analysis.correlate(dots, over)
            found[f"{NAMES[method]}, over {what}"] = Interval(r.r, r.low, r.high)
    return found


def order(
    figures: Record, matrices: list[str] = FIGURE_2, steps: list[int] | None = None
) -> Values:
    """Differences of r, paired over seeds."""
    r = _by_seed(figures, matrices, steps)
    found = {}
    for one, other in (("dora", "full"), ("lora", "dora")):
        difference = analysis.difference(r[one], r[other])
        above = f"above 0 in {sum(v > 0 for v in difference.values)} of {len(difference.values)}"
        found[f"r of {NAMES[one]} minus {NAMES[other]}, {above} seeds"] = _interval(difference)
    return found


def nearer_to_full(figures: Record) -> Values:
    """|r of DoRA - r of full| minus |r of LoRA - r of full|, paired over seeds."""
    r = _by_seed(figures, FIGURE_2, None)
    off = {m: {seed: abs(r[m][seed] - r["full"][seed]) for seed in r[m]} for m in ("dora", "lora")}
    return {"distance of r from full's": _interval(analysis.difference(off["dora"], off["lora"]))}


def explained(figures: Record, method: str) -> Values:
    """r squared: the part of the variance that a line explains."""
    here = analysis.correlate(_dots(figures, method, FIGURE_2)).r
    return {"r² here": here**2, "r² in the paper": analysis.PAPER[method] ** 2}


def moved(figures: Record) -> Values:
    """How far DoRA moved from W0 minus how far LoRA did: query matrices, last step."""
    found = {}
    for what in ("delta_direction", "delta_magnitude"):
        mean: dict[str, dict[int, float]] = {}
        for method in ("dora", "lora"):
            seeds: dict[int, list[float]] = {}
            for dot in _dots(figures, method, FIGURE_2, pretrain.RECORD_AT[-1:]):
                seeds.setdefault(dot.seed, []).append(getattr(dot, what))
            mean[method] = {seed: fmean(values) for seed, values in seeds.items()}
        name = what.replace("delta_", "change of ")
        found[name] = _interval(analysis.difference(mean["dora"], mean["lora"]))
    return found


def gain(figures: Record, first: str, second: str) -> Values:
    """By how much the first is better than the second: loss here, accuracy in lesson 4."""
    found: Values = {}
    for targets, name in SETTINGS.items():
        one, other = ((m, "all" if m == "full" else targets) for m in (first, second))
        found[name] = _interval(analysis.loss_difference(figures.runs, other, one))
    return found | _digits(figures, f"{NAMES[first]} minus {NAMES[second]}")


def _digits(figures: Record, pair: str) -> Values:
    points = r"[+-]\d+\.\d+"
    pattern = rf"^{pair} +(?P<mean>{points}) \((?P<low>{points}) to (?P<high>{points})\)"
    found = printed(figures.cell(DIGITS)[1], pattern + r".*detectable: (?P<detectable>[\d.]+)")
    return {"digits, points": found[""]}


def half_rank(figures: Record, digits: bool) -> Values:
    """By how much DoRA of half the rank is better than LoRA."""
    halves = analysis.half_rank(figures.runs)
    found: Values = {
        f"rank {rank // 2} for {rank}": Interval(-d.mean, -d.high, -d.low, d.detectable)
        for rank, d in halves.items()
    }
    return found | (_digits(figures, "DoRA, half rank minus LoRA") if digits else {})


def rank_gain(figures: Record) -> Values:
    """By how much DoRA is better than LoRA of the same rank, five targets."""
    loss = analysis.rank_losses(figures.runs)
    pairs = {rank: analysis.difference(loss["lora"][rank], loss["dora"][rank]) for rank in RANKS}
    return {f"rank {rank}": _interval(d) for rank, d in pairs.items()}


def too_large(figures: Record) -> Values:
    """LoRA's loss at a larger rank minus that at 8, where its learning rate was tuned."""
    loss = analysis.rank_losses(figures.runs)["lora"]
    larger = [rank for rank in RANKS if rank > 8]
    return {f"rank {r}": _interval(analysis.difference(loss[r], loss[8])) for r in larger}


def more_targets(figures: Record) -> Values:
    """LoRA's loss on q and v at rank 8 minus that on five targets at rank 2: as many numbers."""
    narrow = analysis.losses(analysis.select(figures.runs, "compare", "lora", "qv"))
    wide = analysis.rank_losses(figures.runs)["lora"][2]
    return {"five targets, rank 2": _interval(analysis.difference(narrow, wide))}


def rank_range(figures: Record) -> Values:
    """Worst minus best loss over ranks: DoRA's minus LoRA's, paired over seeds."""
    found = {}
    for lowest in (4, 1):  # the paper's ranks begin at 4
        spread = {}
        for method, by_rank in analysis.rank_losses(figures.runs).items():
            losses = {rank: loss for rank, loss in by_rank.items() if rank >= lowest}
            spread[method] = {
                seed: max(loss[seed] for loss in losses.values())
                - min(loss[seed] for loss in losses.values())
                for seed in losses[8]
            }
        difference = analysis.difference(spread["dora"], spread["lora"])
        found[f"ranks {lowest} to {RANKS[-1]}"] = _interval(difference)
    return found


def low_rank_gain(figures: Record) -> Values:
    """DoRA's gain over LoRA at rank 4 minus that at rank 32, two of the paper's ranks."""
    loss = analysis.rank_losses(figures.runs)
    gains = {
        rank: {s: loss["lora"][rank][s] - loss["dora"][rank][s] for s in loss["lora"][rank]}
        for rank in (4, 32)
    }
    return {"gain at 4 minus at 32": _interval(analysis.difference(gains[4], gains[32]))}


def detached(figures: Record) -> Values:
    """Mean loss with the norm detached minus that with the full gradient, in percent of it."""
    loss, full = (
        fmean(analysis.losses(analysis.select(figures.runs, purpose, method, "qv")).values())
        for purpose, method in (("compare", "dora"), ("gradient", "dora, full gradient"))
    )
    return {"percent": 100 * (loss - full) / full}


def tuned_gap(figures: Record) -> Values:
    """The difference of DoRA's and LoRA's mean test loss in percent of it, both tuned."""
    found = {}
    for targets, name in SETTINGS.items():
        dora, lora = (
            fmean(analysis.losses(analysis.select(figures.runs, "compare", m, targets)).values())
            for m in ("dora", "lora")
        )
        found[name] = 100 * abs(dora - lora) / lora
    return found


def rate_over_method(figures: Record) -> Values:
    """Loss between the best and the next best learning rate, over that between the methods."""
    found = {}
    for targets, name in SETTINGS.items():
        curves = {m: analysis.tuning_curve(figures.runs, m, targets) for m in ("lora", "dora")}
        best = {m: sorted(curve.values())[:2] for m, curve in curves.items()}
        between = abs(best["dora"][0] - best["lora"][0])
        for m, (first, next_best) in best.items():
            found[f"{NAMES[m]}, {name}"] = (next_best - first) / between
    return found


# ---- From the committed sweeps ----

SWEEPS = Path(__file__).with_name("sweeps")
"""The results of `minidora experiment run --question NAME`, a folder each."""


def own_rate(figures: Record, question: str) -> Values:
    """Test accuracy with a multiple of the learning rate minus that without, in points."""
    differences = summary.report(SWEEPS / question).differences
    return {first.split(", ", 2)[2]: _interval(d) for (first, _), d in differences.items()}


# ---- From the committed benchmarks ----


def cost(figures: Record, contender: str, to: str, what: str, work: str) -> Values:
    """One contender's median time ("ratio"), or bytes "held" or at the "peak", over another's."""
    rows: dict[str, dict[str, Any]] = {}
    for report, content in figures.reports.items():
        if what != "ratio" and content.machine.mode == "compiled":
            continue  # bytes are counted before a layer is compiled: the eager report has them
        for row in content.results:
            if row.work == work:
                value = row.ratio[1] if what == "ratio" else getattr(row, what)
                key = f"{report}, {row.features} features, {row.tokens} tokens, rank {row.rank}"
                rows.setdefault(f"{key}{row.note}", {})[row.contender] = value
    return {key: c[contender] / c[to] for key, c in rows.items() if {contender, to} <= set(c)}


MEASURES: dict[str, Callable[..., Values]] = {
    function.__name__: function
    for function in (
        adam, adapters, trained_percent, magnitudes_of_model, magnitudes_of_lora, vectors,
        distance_at_start, shrunk_and_grown, correlation, order, nearer_to_full, explained, moved,
        gain, half_rank, rank_gain, too_large, more_targets, rank_range, low_rank_gain, detached,
        tuned_gap, rate_over_method, own_rate, cost,
    )
}  # fmt: skip
