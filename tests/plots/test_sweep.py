"""The figures of a sweep's report, over made-up results whose finding is known."""

import json
from pathlib import Path
from typing import Any

import pytest
from figures import check, title

from minidora import plots, summary
from minidora.grid import Grid
from minidora.results import append


def made_up(folder: Path, scores: dict[tuple[str, int, float], float], **grid: Any) -> Any:
    """A report in which each method has this accuracy, up to a little noise, on 4 seeds."""
    folder.mkdir()
    made = Grid(rates=(0.01,), seeds=4, **grid)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(made).items()}
    (folder / "grid.json").write_text(json.dumps({**settings, "device": "cpu"}))
    for group, (method, seeds) in enumerate(made.groups):
        score = scores[method.kind, method.rank, method.magnitude_rate]
        trained = method.rank * 458 + 202 * (method.kind == "dora") or 17226
        noise = {seed: 0.1 * ((seed * 7 + group) % 5) for seed in seeds}
        append(
            folder,
            0,
            [
                {
                    "seed": seed,
                    "rate": 0.01,
                    "group": group,
                    "trained": trained,
                    "validation_accuracy": 1.0,
                    "validation_loss": 1.0,
                    "test_accuracy": score + noise[seed],
                    "test_loss": (100 - score - noise[seed]) / 100,
                }
                for seed in seeds
            ],
        )
    return summary.report(folder)


SCORES = {
    ("full", 0, 1.0): 94.0,
    ("lora", 1, 1.0): 80.0,
    ("lora", 2, 1.0): 90.0,
    ("dora", 1, 1.0): 88.0,
    ("dora", 2, 1.0): 90.05,
}


@pytest.fixture
def report(tmp_path: Path) -> Any:
    return made_up(tmp_path / "runs", SCORES, ranks=(1, 2))


def test_scores(report: Any) -> None:
    figure = plots.sweep_scores(report)
    check(figure, "Best mean of 4 seeds: full fine-tuning", "LoRA, rank 1 80.", "test accuracy")
    dots = {tuple(line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 4}
    assert dots == {arm.scores for arm in report.arms.values()}


def test_differences(report: Any) -> None:
    figure = plots.sweep_differences(report)
    found = [d.verdict for d in report.differences.values()]
    clear = sum(verdict != "no difference detected" for verdict in found)
    assert 0 < clear < len(found) == 6
    check(
        figure,
        f"{clear} of 6 differences are detected with 4 seeds",
        "DoRA, rank 1 minus LoRA, rank 1",
    )


def test_budget(report: Any) -> None:
    # Halfway (in the logarithm, 0.53) from rank 1 to 2 LoRA would have about 85 %; DoRA has 88 %.
    figure = plots.sweep_budget(report)
    check(
        figure,
        "DoRA's loss is lower than LoRA's at 1 of 1 ranks",
        "LoRA, rank 2: 916 numbers, loss 0.0",
    )
    assert [line.get_label() for line in figure.axes[0].containers] == [
        "full fine-tuning", "LoRA", "DoRA",
    ]  # fmt: skip


def test_a_sweep_of_one_size_has_no_budget(tmp_path: Path) -> None:
    scores = {("dora", 4, factor): 90 + factor for factor in (1.0, 3.0)}
    found = made_up(tmp_path / "r", scores, methods=("dora",), magnitude_rates=(1.0, 3.0))
    figures = plots.sweep_figures(found)
    assert list(figures) == ["scores", "differences"]
    assert title(figures["differences"]) == "1 of 1 differences are detected with 4 seeds"
    check(figures["scores"], "Best mean of 4 seeds: DoRA, rank 4, magnitude at 3 times the rate")
