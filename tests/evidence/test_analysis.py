"""What is read out of the runs, against runs made by hand and scipy."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from minidora.evidence import analysis
from minidora.evidence.pretrain import (
    RANKS,
    RATES,
    RECORD_AT,
    SETTINGS,
    Run,
    best_rates,
    evidence_runs,
    read_results,
    tuning_runs,
)

LAYERS = ("blocks.0.q_proj", "blocks.1.q_proj", "blocks.0.v_proj")


def row(
    purpose: str = "compare",
    method: str = "dora",
    targets: str = "qv",
    seed: int = 0,
    loss: float = 1.5,
    rank: int = 8,
    rate: float = 1e-2,
    points: Any = (),
) -> dict[str, Any]:
    return {
        "purpose": purpose, "method": method, "targets": targets, "rank": rank, "seed": seed,
        "learning_rate": rate, "test_loss": loss, "validation_loss": loss, "points": points,
    }  # fmt: skip


def points(slope: float) -> list[list[object]]:
    """Direction 1, 2, ... over layers and steps; magnitude follows with a slope, and some noise."""
    noise = (0.1, -0.2, 0.3, 0.0, -0.1, 0.2)
    turns = [(layer, step) for layer in LAYERS for step in (1, 2)]
    along = [
        [1, layer, step, slope * k + noise[k], float(k)] for k, (layer, step) in enumerate(turns)
    ]
    return along + [[0, layer, step, 7.0, 7.0 + step] for layer, step in turns]


def test_dots_are_those_of_the_matrices_axis_and_steps() -> None:
    run = row(points=points(2.0), seed=4)
    queries = analysis.dots([run])
    assert [(dot.layer, dot.step) for dot in queries] == [
        (layer, step) for layer in LAYERS[:2] for step in (1, 2)
    ]
    assert queries[1] == analysis.Dot(4, "blocks.0.q_proj", 2, 1.8, 1.0)
    assert len(analysis.dots([run], ("q_proj", "v_proj"), steps=[2])) == 3
    assert {dot.delta_magnitude for dot in analysis.dots([run], dim=0)} == {7.0}


def test_correlations_equal_scipys() -> None:
    runs = [row(seed=seed, points=points(slope)) for seed, slope in enumerate((1.0, -1.0, 0.5))]
    found = analysis.dots(runs, ("q_proj", "v_proj"))
    x, y = [dot.delta_direction for dot in found], [dot.delta_magnitude for dot in found]
    assert analysis.correlate(found).r == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    each = analysis.by_seed(found)
    for seed in range(3):
        own = slice(6 * seed, 6 * seed + 6)
        assert each[seed] == pytest.approx(scipy.stats.pearsonr(x[own], y[own]).statistic)
    assert each[1] < -0.9 < 0.9 < each[0]


def test_order_counts_seeds() -> None:
    counted = analysis.order(
        {
            "full": {0: -0.5, 1: 0.1, 2: -0.2, 9: -1.0},  # nobody else has seed 9
            "lora": {0: 0.8, 1: 0.7, 2: -0.3},
            "dora": {0: 0.2, 1: -0.1, 2: -0.25},
        }
    )
    assert counted == analysis.Order(
        seeds=3, full_negative=2, lora_positive=2, dora_negative=2, ordered=1
    )


def test_losses_are_paired_by_seed() -> None:
    runs = [row(method="lora", seed=s, loss=1.0 + s) for s in (2, 0, 1)]
    runs += [row(method="dora", seed=s, loss=1.1 + s + 0.01 * s) for s in (0, 1, 2)]
    found = analysis.loss_difference(runs, ("dora", "qv"), ("lora", "qv"))
    assert found.values == pytest.approx((0.1, 0.11, 0.12))
    low, high = scipy.stats.t.interval(0.95, 2, loc=0.11, scale=scipy.stats.sem([0.1, 0.11, 0.12]))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.verdict == "higher"


def test_half_rank_pairs_r_over_two_with_r() -> None:
    runs = []
    for seed in (0, 1):
        for rank in RANKS:
            purpose = "compare" if rank == 8 else "ranks"
            for method, offset in (("lora", 0.0), ("dora", 0.5)):
                loss = 10.0 - rank / 10 + offset + seed + 0.001 * rank * seed
                runs.append(row(purpose, method, "five", seed, loss, rank))
    runs.append(row("compare", "lora", "five", 7, 1.0))  # no other rank has seed 7
    found = analysis.half_rank(runs)
    assert list(found) == [2, 4, 8, 16, 32]
    for rank, difference in found.items():
        assert difference.mean == pytest.approx(0.5 + rank / 20 - 0.0005 * rank / 2)
    assert set(analysis.rank_losses(runs)["lora"][8]) == {0, 1}


def test_equal_budget_of_losses_that_are_linear_in_the_logarithm_is_exact() -> None:
    """LoRA loses 2 - 0.1 ln(trained); DoRA trains 5 more and is 0.03 better at equal numbers."""
    runs = []
    for seed in (0, 1):
        for rank in RANKS:
            for method, trained, gain in (("lora", 10 * rank, 0.0), ("dora", 10 * rank + 5, 0.03)):
                purpose = "compare" if rank == 8 else "ranks"
                loss = 2 + seed - 0.1 * math.log(trained) - gain * (1 + seed)
                runs.append(
                    {**row(purpose, method, "five", seed, loss, rank), "trainable": trained}
                )
    found = analysis.equal_budget(runs)
    assert list(found) == [*RANKS]
    for rank, (trained, more, difference, bend) in found.items():
        assert trained == 10 * rank + 5
        assert bend == pytest.approx(0)
        # DoRA of rank 32 trains more than any LoRA: its few more numbers stay in the difference
        assert more == pytest.approx(325 / 320 - 1 if rank == 32 else 0)
        left = -0.1 * math.log(1 + more)
        assert difference.values == pytest.approx((left - 0.03, left - 0.06))


def test_the_bend_of_a_parabola_is_how_far_its_chord_lies_above_it() -> None:
    counts = [10, 20, 40, 80]

    def loss(count: int) -> float:
        return 3 - 0.2 * math.log(count) + 0.01 * math.log(count) ** 2

    bends = analysis._bends({count: loss(count) for count in counts})
    for count in (10, 13, 25, 77, 80):
        chord = np.interp(math.log(count), np.log(counts), [loss(c) for c in counts])
        assert bends(count) == pytest.approx(chord - loss(count), abs=1e-12)


def test_equal_budget_of_the_committed_runs() -> None:
    """Worked out apart from this code when the first edition was reviewed."""
    found = analysis.equal_budget(read_results())
    said = {
        rank: f"{at.difference.mean:+.4f} ± {(at.difference.high - at.difference.low) / 2:.4f}"
        for rank, at in found.items()
    }
    assert said == {
        1: "+0.0007 ± 0.0019",
        2: "-0.0013 ± 0.0036",
        4: "-0.0026 ± 0.0030",
        8: "-0.0043 ± 0.0033",
        16: "-0.0038 ± 0.0020",
        32: "-0.0080 ± 0.0028",
    }
    lower = {rank for rank, at in found.items() if at.difference.verdict == "lower"}
    assert lower == {8, 16, 32}
    assert [at.trained for at in found.values()] == [
        13_824, 23_040, 41_472, 78_336, 152_064, 299_520
    ]  # fmt: skip
    assert [round(at.more, 4) for at in found.values()] == [0, 0, 0, 0, 0, 0.0156]
    # numpy.polyfit of degree 2 through the neighbouring ranks, worked out apart from this code
    assert [f"{at.bend:.4f}" for at in found.values()] == [
        "0.0000", "0.0004", "0.0008", "0.0007", "0.0004", "0.0000"
    ]  # fmt: skip


def test_tuning_curve_averages_over_seeds() -> None:
    runs = [row("tune", seed=s, loss=loss, rate=r) for r, s, loss in
            [(1e-2, 100, 1.0), (1e-3, 100, 3.0), (1e-2, 101, 2.0), (1e-3, 101, 5.0)]]  # fmt: skip
    assert list(analysis.tuning_curve(runs, "dora", "qv").items()) == [(1e-3, 4.0), (1e-2, 1.5)]


def test_missing_runs_are_named_with_the_way_to_make_them() -> None:
    with pytest.raises(
        ValueError, match="no run 'compare' of 'lora' on 'qv'.*`minidora evidence run` makes it"
    ):
        analysis.select([row()], "compare", "lora", "qv")


# ---- The committed evidence ----


def test_the_evidence_is_complete() -> None:
    """Each run once, none besides, and in each all points of the layers that it trained."""
    rows = read_results()
    runs = [Run(**{key: row[key] for key in Run.__dataclass_fields__}) for row in rows]
    expected = [*tuning_runs(), *evidence_runs(best_rates(rows))]
    assert len(runs) == len(set(runs)) == len(expected) == 170
    assert set(runs) == set(expected)
    kinds = {"qv": 2, "five": 5, "all": 5}
    for row in rows:  # two axes, six blocks
        assert len(row["points"]) == 2 * len(RECORD_AT) * 6 * kinds[row["targets"]]
        assert 1.2 < row["test_loss"] < 1.8


def test_no_learning_rate_was_chosen_at_the_edge_of_its_grid() -> None:
    rates = best_rates(read_results())
    for method, targets in SETTINGS:
        assert RATES[method][0] < rates[method, targets] < RATES[method][-1]


def test_budget_means_put_each_mean_at_what_was_trained() -> None:
    runs = read_results()
    means = analysis.budget_means(runs)
    five = [r for r in runs if r["targets"] == "five" and r["rank"] == 4 and r["method"] == "dora"]
    [trained] = {r["trainable"] for r in five}
    assert means["dora"][trained] == pytest.approx(sum(r["test_loss"] for r in five) / len(five))
    assert [len(curve) for curve in means.values()] == [len(RANKS)] * 2


def test_at_the_highest_rate_against_the_best_one() -> None:
    runs = [
        row("tune", "lora", "qv", seed, loss, rate=rate)
        for seed in (0, 1)
        for rate, loss in ((1e-3, 2.0), (1e-2, 1.0), (1e-1, 1.5 + seed))
    ]
    assert analysis.at_highest_rate(runs, "lora", "qv") == pytest.approx({0: 0.5, 1: 1.5})


def test_variants_are_scipys_correlations_of_the_committed_dots() -> None:
    """Three of the ways, read here from the file without the package's selection."""
    runs = read_results()
    ways = analysis.variants(runs)
    assert len(ways) == 14
    rate = best_rates(runs)["dora", "qv"]

    def r(purpose: str, **wanted: Any) -> float:
        found = [
            (direction, magnitude)
            for run in runs
            if (run["purpose"], run["method"], run["targets"]) == (purpose, "dora", "qv")
            and run["learning_rate"] == wanted.get("rate", rate)
            for axis, layer, step, magnitude, direction in run["points"]
            if axis == wanted.get("axis", 1)
            and layer.endswith("q_proj")
            and step >= wanted.get("first", 0)
            and layer.split(".")[1] >= wanted.get("block", "0")
        ]
        return float(scipy.stats.pearsonr(*zip(*found, strict=True)).statistic)

    expected = {
        "query, all steps (figure 2)": r("compare"),
        "query, one norm per input": r("compare", axis=0),
        "query, last step, without block 0": r("compare", first=300, block="1"),
        "query, lower rate (3 seeds)": r("tune", rate=3e-3),
    }
    assert {name: ways[name]["dora"].r for name in expected} == pytest.approx(expected)
