"""The figures and sliders of lesson 5: what titles and alternative texts say, against the data."""

import numpy as np
import pytest
import torch
from figures import check

from minidora import plots, widgets
from minidora.evidence import analysis
from minidora.geometry import Correlation, Dot


def rising(slope: float, seed: int = 0) -> list[Dot]:
    return [
        Dot(seed, f"blocks.{layer}.q_proj", step, 1.0 + slope * turn, turn)
        for layer in range(3)
        for step in (10, 20)
        for turn in (layer + step / 10,)
    ]


GROUPS = {"full": rising(-0.2), "lora": rising(1.0), "dora": rising(0.5)}


def test_movement_shows_the_steps_so_far_on_fixed_axes() -> None:
    whole, part = plots.movement(GROUPS), plots.movement(GROUPS, upto=10)
    said = "the line through all layers rises in LoRA and DoRA, falls in full fine-tuning"
    check(whole, f"Up to step 20, {said} (the axes differ)", "full fine-tuning -1.00", "LoRA +1.00")
    check(part, "Up to step 10")
    for figure, points in ((whole, 2), (part, 1)):
        for axes in figure.axes:
            assert [len(line.get_xdata()) for line in axes.get_lines()[:3]] == [points] * 3
    assert [a.get_xlim() for a in whole.axes] == [a.get_xlim() for a in part.axes]
    names = [text.get_text() for text in whole.legends[0].get_texts()]
    assert names == ["block 0", "block 1", "block 2", "fitted line"]


def test_movement_fits_the_line_of_least_squares() -> None:
    dots = [
        Dot(0, "blocks.0.q_proj", step, y, x)
        for step, (x, y) in enumerate([(0.0, 1.0), (1.0, 3.0), (2.0, 2.0), (4.0, 7.0)])
    ]
    *_, line = plots.movement({"lora": dots}).axes[0].get_lines()
    assert line.get_linestyle() == "--"
    assert np.polyfit(line.get_xdata(), line.get_ydata(), 1) == pytest.approx(
        np.polyfit([0, 1, 2, 4], [1, 3, 2, 7], 1)
    )


def test_paper_slopes_have_the_signs_of_the_paper() -> None:
    figure = plots.paper_slopes(analysis.PAPER)
    check(figure, "rises with ΔD in LoRA, falls in full fine-tuning and DoRA", "LoRA +0.83")
    for axes, r in zip(figure.axes, analysis.PAPER.values(), strict=True):
        (left, right) = axes.lines[0].get_ydata()
        assert right - left == pytest.approx(0.8 * r)
    check(plots.paper_slopes({"full": 0.1, "dora": 0.2}), "claim: ΔM rises with ΔD in")


def test_equal_budget_draws_the_differences_and_names_the_ranks_that_differ() -> None:
    zero = dict.fromkeys(range(3), 0.0)
    differences = {
        1: (100, 0.0, analysis.difference({0: 0.01, 1: -0.01, 2: 0.0}, zero)),
        2: (200, 0.0, analysis.difference({0: -0.1, 1: -0.11, 2: -0.1}, zero)),
        4: (400, 0.25, analysis.difference({0: 0.1, 1: 0.11, 2: 0.1}, zero)),
    }
    means = {"lora": {80: 2.0, 160: 1.9}, "dora": {100: 1.9, 200: 1.8}}
    figure = plots.equal_budget(means, differences)
    check(figure, "lower than LoRA's at rank 2, higher at rank 4 of 1, 2, 4", "rank 2 -0.1033")
    left, right = figure.axes[:2]
    assert [dict(zip(*line.get_data(), strict=True)) for line in left.lines] == [*means.values()]
    drawn = [line for line in right.lines if line.get_marker() == "D"]
    assert [line.get_ydata()[0] for line in drawn] == pytest.approx([0.0, -0.31 / 3, 0.31 / 3])
    assert [line.get_markerfacecolor() == "white" for line in drawn] == [False, False, True]
    assert "DoRA trains 25.0 % more" in right.get_title()
    assert "with 25.0 % more numbers" in figure.get_label()
    check(plots.equal_budget(means, {1: differences[1]}), "lower than LoRA's at no rank of 1")


def test_pythagoras_counts_rows_that_got_longer() -> None:
    predicted = torch.tensor([1.0, 1.1, 1.2, 1.3])
    rows = {"lora": (predicted, predicted), "dora": (2 - predicted + 0.001, predicted)}
    figure = plots.pythagoras(rows)
    check(figure, "longer: LoRA 75 %, DoRA 25 %", "LoRA 1.150, DoRA 0.851")
    for axes, (ratio, turned) in zip(figure.axes, rows.values(), strict=True):
        dots, line = axes.lines[:2]
        assert torch.tensor(dots.get_xydata()).equal(torch.stack([turned, ratio], 1))
        assert list(line.get_xdata()) == list(line.get_ydata())


def test_correlation_strip_tells_seeds_interval_and_paper() -> None:
    seeds = {"full": {0: -0.5, 1: 0.25}, "lora": {0: 0.9, 1: 0.8}, "dora": {0: 0.1, 1: 0.2}}
    pooled = {name: Correlation(sum(s.values()) / 2, -0.6, 0.95, 48) for name, s in seeds.items()}
    figure = plots.correlation_strip(seeds, pooled, analysis.PAPER)
    ticks = [line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert [list(x) for x in ticks] == [list(s.values()) for s in seeds.values()]
    theirs = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert theirs == list(analysis.PAPER.values())
    check(
        figure,
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
    assert sum(line.get_marker() == "o" for line in figure.axes[0].lines) == 6
    check(
        figure,
        "Of 2 ways to compute it, r is above 0 in 1 for full fine-tuning, 2 for LoRA, 0 for DoRA",
        "another: full fine-tuning +0.30",
    )


def test_loss_strip_names_the_lowest() -> None:
    losses = {
        "full\nfine-tuning": ("full", {0: 1.4, 1: 1.5}),
        "LoRA,\nq and v": ("lora", {0: 1.6, 1: 1.61}),
    }
    d = analysis.difference({0: 1.5, 1: 1.6}, {0: 1.6, 1: 1.61})
    figure = plots.loss_strip(losses, 2.13, {"q and v": d})
    check(figure, "From 2.13", "lowest is full fine-tuning with 1.450", "q and v -0.0550")
    assert list(figure.axes[1].lines[0].get_ydata()) == pytest.approx([-0.1, -0.01])
    seeds = [list(line.get_ydata()) for line in figure.axes[0].lines[:2]]
    assert seeds == [[1.4, 1.6], [1.5, 1.61]]


def test_rate_curves_count_what_lies_inside_the_grid() -> None:
    curves = {
        "LoRA": ("lora", "-", {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}),
        "DoRA": ("dora", "--", {1e-3: 2.0, 1e-2: 1.0, 1e-1: 0.5}),
    }
    figure = plots.rate_curves(curves)
    check(figure, "inside the grid for 1 of 2", "LoRA 0.01, DoRA 0.1")
    drawn = [dict(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines[::2]]
    assert drawn == [curve for *_, curve in curves.values()]


def test_gradient_parts_fall_at_one_length_and_rise_as_they_are() -> None:
    """Gradients of lengths 5, 10 and 26: the longer, the larger either part."""
    along = torch.tensor([4.0, 6.0, 10.0], dtype=torch.float64)
    across = torch.tensor([3.0, 8.0, 24.0], dtype=torch.float64)
    figure = plots.gradient_parts(along, across)
    left, right = figure.axes
    x, y = left.lines[0].get_data()
    assert x.tolist() == pytest.approx([3 / 5, 8 / 10, 24 / 26])
    assert (x**2 + y**2).tolist() == pytest.approx([1.0] * 3)
    scale = 41 / 3
    assert right.lines[0].get_ydata().tolist() == pytest.approx([v / scale for v in (4, 6, 10)])
    check(
        figure,
        "as the gradients are, it rises with the turn",
        "each of 3 gradients",
        f"r = {np.corrcoef(x, y)[0, 1]:+.2f}. Right",
        f"as they are: r = {np.corrcoef(across, along)[0, 1]:+.2f}",
    )
    ends, line = right.lines[1].get_data()
    assert np.polyfit(ends, line, 1) == pytest.approx(np.polyfit(across / scale, along / scale, 1))
    check(plots.gradient_parts(along.flip(0), across), "as the gradients are, it falls")


@pytest.mark.parametrize(
    ("widget", "start", "then"),
    [
        (lambda: widgets.movement(GROUPS), "step 20", "step 10"),
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
