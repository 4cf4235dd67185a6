"""The figures and sliders of lesson 5: what titles and alternative texts say, against the data."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from minidora import plots, widgets
from minidora.evidence import analysis
from minidora.evidence.analysis import TABLE_15
from minidora.evidence.pretrain import RANKS
from minidora.geometry import Correlation, Dot
from minidora.models import CHECKPOINT


def check(figure: Figure, *needed: str) -> None:
    """Title or alternative text say what is needed, and the figure can be drawn in its frame."""
    title = figure.get_suptitle() or figure.axes[0].get_title()
    said = f"{title}\n{figure.get_label()}".replace("\n", " ")
    for text in needed:
        assert text in said, said
    assert len(str(figure.get_label())) > 60
    figure.canvas.draw()
    titles = [axes.title for axes in figure.axes]
    for text in [*titles, *figure.texts]:  # none hangs over the edge
        extent = text.get_window_extent()
        assert extent.x0 >= 0, text
        assert extent.x1 <= figure.bbox.width, text


def rising(slope: float, seed: int = 0) -> list[Dot]:
    return [
        Dot(seed, f"blocks.{layer}.q_proj", step, 1.0 + slope * turn, turn)
        for layer in range(3)
        for step in (10, 20)
        for turn in (layer + step / 10,)
    ]


GROUPS = {"full": rising(-0.2), "lora": rising(1.0), "dora": rising(0.5)}


def test_pretraining_curve_tells_the_committed_loss() -> None:
    curve = json.loads(CHECKPOINT.with_suffix(".json").read_text())
    check(plots.pretraining_curve(curve), f"{curve['validation_loss']:.2f} nats per character")


def test_movement_shows_the_steps_so_far_on_fixed_axes() -> None:
    whole, part = plots.movement(GROUPS), plots.movement(GROUPS, upto=10)
    check(whole, "Step 20, mean ΔD: full fine-tuning 3, LoRA 3, DoRA 3", "LoRA +1.00", "-1.00")
    check(part, "Step 10, mean ΔD: full fine-tuning 2")
    for figure, points in ((whole, 2), (part, 1)):
        for axes in figure.axes:
            assert [len(line.get_xdata()) for line in axes.get_lines()] == [points] * 3
    assert [a.get_xlim() for a in whole.axes] == [a.get_xlim() for a in part.axes]


def test_pythagoras_counts_rows_that_got_longer() -> None:
    predicted = torch.tensor([1.0, 1.1, 1.2, 1.3])
    rows = {"lora": (predicted, predicted), "dora": (2 - predicted + 0.001, predicted)}
    check(plots.pythagoras(rows), "LoRA 75 %, DoRA 25 %", "LoRA 1.150, DoRA 0.851")


def test_correlation_strip_tells_seeds_interval_and_paper() -> None:
    seeds = {"full": {0: -0.5, 1: 0.25}, "lora": {0: 0.9, 1: 0.8}, "dora": {0: 0.1, 1: 0.2}}
    pooled = {name: Correlation(sum(s.values()) / 2, -0.6, 0.95, 48) for name, s in seeds.items()}
    check(
        plots.correlation_strip(seeds, pooled, analysis.PAPER),
        "full fine-tuning -0.12, LoRA +0.85, DoRA +0.15; the paper has -0.62, +0.83, -0.31",
        "seeds from -0.50 to +0.25",
    )


def test_correlation_variants_count_signs() -> None:
    def found(full: float) -> dict[str, Correlation]:
        return {
            name: Correlation(r, r - 0.1, r + 0.1, 9)
            for name, r in {"full": full, "lora": 0.8, "dora": -0.2}.items()
        }

    name = "query and value, one norm per input"  # long names leave the axes little room
    figure = plots.correlation_variants({name: found(-0.3), "another": found(0.3)})
    check(
        figure,
        "Of 2 ways to compute r, above 0: 1 (full fine-tuning), 2 (LoRA), 0 (DoRA)",
        "another: full fine-tuning +0.30",
    )


def test_loss_strip_names_the_lowest() -> None:
    losses = {
        "full\nfine-tuning": ("full", {0: 1.4, 1: 1.5}),
        "LoRA,\nq and v": ("lora", {0: 1.6, 1: 1.61}),
    }
    check(plots.loss_strip(losses, 2.13), "From 2.13", "lowest is full fine-tuning with 1.450")


def test_rate_curves_count_what_lies_inside_the_grid() -> None:
    curves = {
        "LoRA": ("lora", "-", {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}),
        "DoRA": ("dora", "--", {1e-3: 2.0, 1e-2: 1.0, 1e-1: 0.5}),
    }
    check(plots.rate_curves(curves), "inside the grid for 1 of 2", "LoRA 0.01, DoRA 0.1")


def by_rank() -> dict[str, dict[int, dict[int, float]]]:
    return {
        method: {rank: {0: 2 - rank / 100 + extra, 1: 2.02 - rank / 100 + extra} for rank in RANKS}
        for method, extra in (("lora", 0.0), ("dora", 0.05))
    }


def test_rank_sweep_reads_out_a_rank() -> None:
    figure = plots.rank_sweep(by_rank(), TABLE_15, rank=4)
    check(figure, "Rank 4: LoRA 1.970 ± 0.010, DoRA 2.020 ± 0.010", "39.5, 40.7, 70.9, 74.7, 65.8")


def test_half_rank_counts_what_is_higher() -> None:
    differences = {
        2: analysis.difference({0: 1.0, 1: 1.01, 2: 1.0}, {0: 0.5, 1: 0.5, 2: 0.5}),
        4: analysis.difference({0: 1.0, 1: 0.0, 2: 0.5}, {0: 0.5, 1: 0.5, 2: 0.5}),
    }
    check(plots.half_rank(differences), "higher in 1 of 2 pairs, lower in 0", "Ranks 1 and 2")


@pytest.mark.parametrize(
    ("widget", "start", "then"),
    [
        (lambda: widgets.movement(GROUPS), "Step 20", "Step 10"),
        (lambda: widgets.rank_sweep(by_rank(), TABLE_15), "Rank 8", "Rank 1"),
    ],
)
def test_sliders_draw_anew(widget, start, then) -> None:
    box = widget()
    slider, picture = box.children
    assert start in picture.value
    slider.value = (
        slider.options[0][1] if isinstance(slider.options[0], tuple) else slider.options[0]
    )
    assert then in picture.value
