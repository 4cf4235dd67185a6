"""The figures of lesson 2: what their titles and lines say against numbers worked out here."""

import math

import pytest
import torch
from figures import check

from minidora import plots, widgets


def test_low_rank_sum_is_drawn_to_scale():
    figure = plots.low_rank_sum(in_features=64, out_features=48, rank=4)
    check(figure, "448 trained", "3,072 frozen", "14.6 %")
    sizes = {(patch.get_height(), patch.get_width()) for patch in figure.axes[0].patches}
    assert sizes == {(48, 64), (48, 4), (4, 64)}


def test_full_or_lora_is_drawn_to_scale_and_counts_both():
    figure = plots.full_or_lora(in_features=64, out_features=48, rank=4)
    check(figure, "trains 3,072 numbers of this layer, LoRA of rank 4 trains 448 (14.6 %)")
    sizes = [
        {(patch.get_height(), patch.get_width()) for patch in axes.patches} for axes in figure.axes
    ]
    assert sizes == [{(48, 64)}, {(48, 64), (48, 4), (4, 64)}]
    product = {text.get_text() for text in figure.axes[1].texts}
    assert {"+ s ·", "·"} < product  # W + s · B · A
    assert {"B, trained\n192 numbers", "A, trained\n256 numbers"} < product


def test_gradient_norms_names_the_zero_only_where_it_is():
    figure = plots.gradient_norms([0.0, 1.0], [2.0, 1.0])
    check(figure, "only B has a gradient")
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[2.0, 1.0], [0.0, 1.0]]
    check(plots.gradient_norms([0.5, 1.0], [2.0, 1.0]), "0.5 for A, 2 for B")
    check(plots.gradient_norms([0.0, 0.0], [2.0, 1.0]), "0 for A, 2 for B")  # A never gets one


def test_update_spectra_counts_ranks_and_shares():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(9, 5, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(7, 5, generator=generator, dtype=torch.float64))
    full = left * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64) @ right.T
    figure = plots.update_spectra(full=full, lora=left[:, :2] @ right[:, :2].T)
    share = 100 * (9 + 4) / (9 + 4 + 1 + 1 + 1)
    check(figure, "has rank 2", f"hold {share:.0f} % of its squared size")
    spectra = figure.axes[2].get_lines()
    bars = [axes.get_xlabel() for axes in figure.axes[3:]]
    assert bars == ["entry, own scale"] * 2  # a colour bar for each heat map
    assert [len(line.get_xdata()) for line in spectra] == [5, 2]
    assert list(spectra[0].get_ydata()) == pytest.approx([3, 2, 1, 1, 1])


def test_scaling_rules_names_the_flattest_rule_of_each_optimizer():
    ranks = [1, 4, 16]
    flat, rising = [1.0, 1.0, 1.1], [0.5, 1.0, 2.0]
    figure = plots.scaling_rules(
        ranks,
        {"SGD": {"first": flat, "second": rising}, "Adam": {"first": rising, "second": flat}},
        reference=4,
    )
    check(figure, "with first under SGD", "with second under Adam")
    assert [axes.get_title() for axes in figure.axes] == ["SGD", "Adam"]
    drawn = [[list(line.get_ydata()) for line in axes.lines[:2]] for axes in figure.axes]
    assert drawn == [[flat, rising], [rising, flat]]


@pytest.mark.parametrize(
    ("small", "large", "rises", "at"),
    [
        ([4.0, 1.0], [1.0, 3.0], False, "0.1 with small, 0.01 with large, 0.01 with equal"),
        ([4.0, 1.0], [3.0, 1.0], False, "0.1 with small, 0.1 with large, 0.01 with equal"),
        ([1.0, 4.0], [3.0, 1.0], True, "0.01 with small, 0.1 with large, 0.01 with equal"),
    ],
)
def test_initial_scale_draws_its_finding_from_the_losses(small, large, rises, at):
    spread = torch.tensor([[-0.1], [0.1]])
    losses = {
        "small": torch.tensor([small]) + spread,
        "large": torch.tensor([large]) + spread,
        "equal": torch.tensor([[2.0, 4.0]]) + spread,  # as large: its first steps but drawn anew
    }
    steps = {"small": [0.4, 0.4], "large": [2.2, 44.0], "equal": [2.1, 44.5]}
    figure = plots.initial_scale([10, 4096], steps, [0.01, 0.1], losses)
    check(figure, "The larger the random factor, the larger the first step", f"rate is {at}.")
    assert ("the best rate does not rise" in figure.get_suptitle()) is not rises
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == list(steps.values())
    rings = [line.get_xydata()[0] for line in figure.axes[1].lines if line.get_markersize() == 12]
    assert [x for x, _ in rings] == [float(rate.split()[0]) for rate in at.split(", ")]
    assert [y for _, y in rings] == pytest.approx([min(small), min(large), 2])
    drawn = figure.axes[1].containers[1]  # error bars of "large"
    assert list(drawn.lines[0].get_ydata()) == pytest.approx(large)
    (bars,) = drawn.lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * math.sqrt(0.02) / math.sqrt(2), rel=1e-5)


def test_initial_scale_claims_no_order_that_the_first_steps_lack():
    losses = {name: torch.tensor([[2.0, 1.0], [2.1, 1.1]]) for name in ("small", "large")}
    steps = {"small": [0.4, 5.0], "large": [0.3, 6.0]}
    figure = plots.initial_scale([10, 4096], steps, [0.01, 0.1], losses)
    check(figure, "The first step at each width")


def test_trained_share_crosses_100_percent_at_the_break_even_rank():
    figure = plots.trained_share([(10, 2), (64, 64)], rank=4)
    check(figure, "Rank 4 trains 240 % of a layer 10 → 2 but 12.5 % of a layer 64 → 64")
    markers = [line for line in figure.axes[0].get_lines() if line.get_marker() in "osD^"]
    places = [tuple(line.get_xydata()[0]) for line in markers if len(line.get_xdata()) == 1]
    assert places == [pytest.approx((20 / 12, 100)), pytest.approx((32, 100))]


def test_trained_share_of_the_smallest_layer():
    check(plots.trained_share([(1, 1)], rank=1), "Rank 1 trains 200 % of a layer 1 → 1")


def test_merge_rounding_names_the_worst_dtype_at_one_percent():
    lost = {"fine": [1, 0.5, 0.1], "coarse": [90, 15.2, 2]}
    figure = plots.merge_rounding([0.1, 1, 10], lost)
    check(figure, "Merged in coarse, an update of 1 % of W loses 15 %")
    assert {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines[:2]} == lost


def test_widget_draws_the_chosen_layer():
    *sliders, picture = widgets.trained_share().children
    for slider, value in zip(sliders, (64, 32, 8), strict=True):
        slider.value = value
    figure = plots.trained_share([(64, 32)], rank=8)
    check(figure, "Rank 8 trains 37.5 % of a layer 64 → 32")
    assert plots.png(figure) in picture.value
