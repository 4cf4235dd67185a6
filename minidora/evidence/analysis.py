"""What the committed runs of lesson 5 show: correlations, losses, and how far seeds spread.

    runs = read_results()                                   # pretrain.py: one dict a run
    moved = dots(select(runs, "compare", "dora", "qv"))     # the dots of figure 2
    correlate(moved).r, by_seed(moved)                      # pooled with an interval, seed by seed
    loss_difference(runs, ("dora", "qv"), ("lora", "qv"))   # paired over seeds

Nothing here runs a model. A loss is the mean cross-entropy on the test part, in nats a character.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import torch

from minidora.evidence.pretrain import RANKS, best_rates
from minidora.experiment import Difference, paired_difference
from minidora.geometry import Correlation, Dot, correlation
from minidora.intervals import at_as_many

Row = Mapping[str, Any]
"""One run, as pretrain.execute returns it."""

PAPER = {"full": -0.62, "lora": 0.83, "dora": -0.31}
"""Correlations of figure 2, query matrices of VL-BART (sec. 4.1)."""

TABLE_15 = {
    "lora": {4: 39.5, 8: 40.7, 16: 70.9, 32: 74.7, 64: 65.8},
    "dora": {4: 61.9, 8: 77.9, 16: 77.5, 32: 78.4, 64: 72.1},
}
"""Average accuracy in percent of LLaMA-7B by rank, eight commonsense tasks, one run each
(table 15, figure 5)."""

METHODS = {"full": "all", "lora": "qv", "dora": "qv"}
"""The methods of figure 2 and the layers each trains."""


def select(
    runs: Iterable[Row],
    purpose: str,
    method: str,
    targets: str,
    *,
    learning_rate: float | None = None,
) -> list[Row]:
    """The runs of one setting, one a seed, in the order of seeds.

    Raises:
        ValueError: there are none.
    """
    found = [
        run
        for run in runs
        if (run["purpose"], run["method"], run["targets"]) == (purpose, method, targets)
        and learning_rate in (None, run["learning_rate"])
    ]
    if not found:
        raise ValueError(
            f"no run {purpose!r} of {method!r} on {targets!r} is there: "
            "`minidora evidence run` makes it"
        )
    return sorted(found, key=lambda run: run["seed"])


def dots(
    runs: Iterable[Row],
    matrices: Iterable[str] = ("q_proj",),
    *,
    dim: int = 1,
    steps: Iterable[int] | None = None,
) -> list[Dot]:
    """The points of runs, of the layers whose names end so, at these steps or at all recorded.

    Args:
        dim: 1 has one magnitude per output, as DoRA has; 0 one per input.
    """
    ends, wanted = tuple(matrices), None if steps is None else set(steps)
    return [
        Dot(run["seed"], layer, step, magnitude, direction)
        for run in runs
        for axis, layer, step, magnitude, direction in run["points"]
        if axis == dim and layer.endswith(ends) and (wanted is None or step in wanted)
    ]


def correlate(found: Iterable[Dot], over: Sequence[str] = ("seed", "layer")) -> Correlation:
    """r of change in direction and change in magnitude.

    Args:
        over: what the interval draws anew: seeds and layers, or ("seed",) for these layers alone.
    """
    found = list(found)
    return correlation(
        [dot.delta_direction for dot in found],
        [dot.delta_magnitude for dot in found],
        [tuple(getattr(dot, kind) for kind in over) for dot in found],
    )


def by_seed(found: Iterable[Dot]) -> dict[int, float]:
    """{seed: r of its own points}: what one run alone, as in the paper, would have reported."""
    seeds: dict[int, list[tuple[float, float]]] = {}
    for dot in found:
        seeds.setdefault(dot.seed, []).append((dot.delta_direction, dot.delta_magnitude))
    return {
        seed: float(torch.corrcoef(torch.tensor(own, dtype=torch.float64).T)[0, 1])
        for seed, own in seeds.items()
    }


def within_layers(found: Iterable[Dot]) -> list[Dot]:
    """Each dot measured from the mean of its own layer and run: what is left is the path alone."""
    paths: dict[tuple[int, str], list[Dot]] = {}
    for dot in found:
        paths.setdefault((dot.seed, dot.layer), []).append(dot)
    return [
        dot._replace(
            delta_magnitude=dot.delta_magnitude - fmean(d.delta_magnitude for d in path),
            delta_direction=dot.delta_direction - fmean(d.delta_direction for d in path),
        )
        for path in paths.values()
        for dot in path
    ]


class Order(NamedTuple):
    """In how many of the seeds something of figure 2 holds."""

    seeds: int
    full_negative: int
    lora_positive: int
    dora_negative: int
    ordered: int
    """full fine-tuning below DoRA below LoRA"""


def order(correlations: Mapping[str, Mapping[int, float]]) -> Order:
    """Count over the seeds that all three methods have: {"full": by_seed(...), ...}."""
    full, lora, dora = (correlations[name] for name in ("full", "lora", "dora"))
    seeds = sorted(set(full) & set(lora) & set(dora))
    return Order(
        seeds=len(seeds),
        full_negative=sum(full[seed] < 0 for seed in seeds),
        lora_positive=sum(lora[seed] > 0 for seed in seeds),
        dora_negative=sum(dora[seed] < 0 for seed in seeds),
        ordered=sum(full[seed] < dora[seed] < lora[seed] for seed in seeds),
    )


def losses(runs: Iterable[Row]) -> dict[int, float]:
    """{seed: test loss} of the runs of one setting."""
    return {run["seed"]: run["test_loss"] for run in runs}


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """first - second over the seeds that both have."""
    seeds = sorted(set(first) & set(second))
    return paired_difference([first[seed] for seed in seeds], [second[seed] for seed in seeds])


def loss_difference(
    runs: Iterable[Row], first: tuple[str, str], second: tuple[str, str]
) -> Difference:
    """Test loss of (method, targets) first minus second, paired over the compared seeds.

    Below 0 the first is better.
    """
    runs = list(runs)
    one, other = (losses(select(runs, "compare", *setting)) for setting in (first, second))
    return difference(one, other)


def rank_losses(runs: Iterable[Row]) -> dict[str, dict[int, dict[int, float]]]:
    """{"lora" or "dora": {rank: {seed: test loss}}}, the five targets, seeds that have all ranks.

    The learning rate is the one tuned at rank 8, at every rank.
    """
    found: dict[str, dict[int, dict[int, float]]] = {
        method: {rank: {} for rank in RANKS} for method in ("lora", "dora")
    }
    for run in runs:
        if run["purpose"] in ("compare", "ranks") and run["targets"] == "five":
            found[run["method"]][run["rank"]][run["seed"]] = run["test_loss"]
    everywhere = set.intersection(*(set(seeds) for by in found.values() for seeds in by.values()))
    return {
        method: {
            rank: {seed: loss for seed, loss in seeds.items() if seed in everywhere}
            for rank, seeds in by_rank.items()
        }
        for method, by_rank in found.items()
    }


def half_rank(runs: Iterable[Row]) -> dict[int, Difference]:
    """{r: DoRA at rank r / 2 minus LoRA at rank r}, paired over seeds; below 0 DoRA is better."""
    by_rank = rank_losses(runs)
    return {
        rank: difference(by_rank["dora"][rank // 2], by_rank["lora"][rank])
        for rank in RANKS
        if rank // 2 in RANKS
    }


class AtEqualBudget(NamedTuple):
    """DoRA at one rank against LoRA with as many trained numbers.

    Attributes:
        trained: DoRA's trained numbers.
        more: by what share they exceed LoRA's: 0 where LoRA is interpolated.
        difference: DoRA's loss minus LoRA's; below 0 DoRA is better.
        bend: by how much the straight line puts LoRA's loss too high, and so favours DoRA.
    """

    trained: int
    more: float
    difference: Difference
    bend: float


def trained_numbers(runs: Iterable[Row]) -> dict[str, dict[int, int]]:
    """{"lora" or "dora": {rank: trained parameters}} of the runs that rank_losses reads."""
    found: dict[str, dict[int, int]] = {"lora": {}, "dora": {}}
    for run in runs:
        if run["purpose"] in ("compare", "ranks") and run["targets"] == "five":
            found[run["method"]][run["rank"]] = run["trainable"]
    return found


def budget_means(runs: Iterable[Row]) -> dict[str, dict[int, float]]:
    """{"lora" or "dora": {trained parameters: mean test loss}} over the ranks."""
    runs = list(runs)
    trained = trained_numbers(runs)
    return {
        method: {trained[method][rank]: fmean(seeds.values()) for rank, seeds in by_rank.items()}
        for method, by_rank in rank_losses(runs).items()
    }


def equal_budget(runs: Iterable[Row]) -> dict[int, AtEqualBudget]:
    """{rank: DoRA minus LoRA at DoRA's number of trained parameters}, paired over seeds.

    LoRA's loss is interpolated between its ranks: see intervals.at_as_many. DoRA's highest rank
    trains a little more than any LoRA here, so it stands against LoRA's highest rank as it is.
    """
    runs = list(runs)
    losses, trained = rank_losses(runs), trained_numbers(runs)
    seeds = sorted(losses["lora"][RANKS[0]])
    lora = {
        trained["lora"][rank]: [by_seed[seed] for seed in seeds]
        for rank, by_seed in losses["lora"].items()
    }
    bends = _bends({count: fmean(values) for count, values in lora.items()})
    largest = max(lora)
    found = {}
    for rank, count in sorted(trained["dora"].items()):
        inside = count <= largest
        line = at_as_many(count, lora) if inside else lora[largest]
        if line is None:
            continue  # fewer than any LoRA
        difference = paired_difference([losses["dora"][rank][seed] for seed in seeds], line)
        more = 0.0 if inside else count / largest - 1
        found[rank] = AtEqualBudget(count, more, difference, bends(count) if inside else 0.0)
    return found


def _bends(curve: Mapping[int, float]) -> Callable[[int], float]:
    """How far the straight line between two points of a curve over ln(x) lies above a parabola.

    The parabola goes through the two points around x and a third beside them; where there is one on
    either side, it is the mean of the two.
    """
    points = sorted((math.log(x), y) for x, y in curve.items())
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    curvatures = [  # divided differences: the factor of x squared through three neighbours
        (slopes[k + 1] - slopes[k]) / (points[k + 2][0] - points[k][0])
        for k in range(len(slopes) - 1)
    ]

    def bend(x: int) -> float:
        at = math.log(x)
        k = next(k for k, (low, high) in enumerate(pairwise(points)) if low[0] <= at <= high[0])
        beside = fmean(curvatures[max(k - 1, 0) : k + 1])
        return beside * (at - points[k][0]) * (points[k + 1][0] - at)

    return bend


def tuning_curve(runs: Iterable[Row], method: str, targets: str) -> dict[float, float]:
    """{learning rate: mean validation loss over the tuning seeds}, in rising order."""
    by_rate: dict[float, list[float]] = {}
    for run in select(runs, "tune", method, targets):
        by_rate.setdefault(run["learning_rate"], []).append(run["validation_loss"])
    return {rate: fmean(by_rate[rate]) for rate in sorted(by_rate)}


def at_highest_rate(runs: Iterable[Row], method: str, targets: str) -> dict[int, float]:
    """{tuning seed: validation loss at the highest learning rate minus that at the best one}."""
    runs = list(runs)
    rates = (best_rates(runs)[method, targets], max(tuning_curve(runs, method, targets)))
    best, highest = (
        {
            run["seed"]: run["validation_loss"]
            for run in select(runs, "tune", method, targets, learning_rate=rate)
        }
        for rate in rates
    )
    return {seed: highest[seed] - loss for seed, loss in best.items()}


def variants(runs: Iterable[Row]) -> dict[str, dict[str, Correlation]]:
    """Ways to compute figure 2's correlations, each a choice that somebody could have made.

    Returns:
        {what is taken: {method: r}}; the first is the paper's way.
    """
    runs = list(runs)
    compared = {m: select(runs, "compare", m, targets) for m, targets in METHODS.items()}
    five = {
        m: select(runs, "compare", m, targets)
        for m, targets in {"full": "all", "lora": "five", "dora": "five"}.items()
    }
    lower = {}
    for method, targets in METHODS.items():
        grid = list(tuning_curve(runs, method, targets))
        rate = grid[grid.index(best_rates(runs)[method, targets]) - 1]
        lower[method] = select(runs, "tune", method, targets, learning_rate=rate)

    def without_block_0(found: list[Dot]) -> list[Dot]:
        return [dot for dot in found if not dot.layer.startswith("blocks.0.")]

    def r(
        chosen: Mapping[str, Iterable[Row]],
        matrices: Iterable[str] = ("q_proj",),
        change: Callable[[list[Dot]], list[Dot]] = list,
        steps: Iterable[int] | None = None,
        dim: int = 1,
    ) -> dict[str, Correlation]:
        return {
            method: correlate(change(dots(found, matrices, dim=dim, steps=steps)))
            for method, found in chosen.items()
        }

    both, last = ("q_proj", "v_proj"), [300]
    return {
        "query, all steps (figure 2)": r(compared),
        "value, all steps (figure 7)": r(compared, ["v_proj"]),
        "query and value": r(compared, both),
        "query, last step": r(compared, steps=last),
        "query and value, last step": r(compared, both, steps=last),
        "query, first record": r(compared, steps=[75]),
        "query, one norm per input": r(compared, dim=0),
        "query, without block 0": r(compared, change=without_block_0),
        "query, last step, without block 0": r(compared, change=without_block_0, steps=last),
        "query, within layers": r(compared, change=within_layers),
        "query, lower rate (3 seeds)": r(lower),
        "query, five targets trained": r(five),
        "up and down, five trained": r(five, ["up_proj", "down_proj"]),
        "all five pooled": r(five, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
    }
