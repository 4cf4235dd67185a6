"""The figures and the slider of lesson 4, from results made up here: data, titles, seeds."""

import math

import pytest
import torch
from figures import check, title

from minidora import plots, widgets
from minidora.data import Images
from minidora.experiment import Comparison, Result, detectable_difference, seeds_to_detect
from minidora.training import Epoch, History, Score

RATES = (0.01, 0.02)
VALIDATION = {  # method -> for each seed the accuracy at each rate
    "lora": [(90.0, 88.0), (91.0, 93.0), (92.0, 89.0)],
    "dora": [(80.0, 88.0), (81.0, 85.0), (82.0, 89.0)],
}
ACCURACY = {"lora": [90.0, 91.0, 95.0], "dora": [96.0, 97.0, 98.5]}
LOSSES = {  # method -> (training, validation) by epoch, the same for each seed
    "lora": [(2.0, 1.0), (1.0, 0.2), (0.5, 0.4)],
    "dora": [(2.0, 1.5), (1.5, 0.9), (1.2, 0.6)],
}


def history(name: str) -> History:
    epochs = [
        Epoch(k, train, Score(validation, 50.0)) for k, (train, validation) in
        enumerate(LOSSES[name])
    ]  # fmt: skip
    return History(epochs, min(epochs, key=lambda epoch: epoch.validation.loss))


def result(name: str, seed: int) -> Result:
    validation = dict(zip(RATES, VALIDATION[name][seed], strict=True))
    return Result(
        seed=seed,
        test_accuracy=ACCURACY[name][seed],
        learning_rate=max(validation, key=validation.__getitem__),
        validation=validation,
        at_edge=False,
        trainable=10,
        state_bytes={"lora": 120_000, "dora": 124_000}[name],
        history=history(name),
    )


def comparison() -> Comparison:
    return Comparison(
        shift="half turn",
        seeds=(0, 1, 2),
        original=(95.0, 95.0, 95.0),
        shifted=(40.0, 42.0, 44.0),
        results={name: tuple(result(name, seed) for seed in range(3)) for name in VALIDATION},
    )


def test_shifted_digits_counts_what_the_base_reads():
    y = torch.arange(10) % 5
    images = Images(torch.rand(10, 64), y, torch.arange(10))
    before, after = y.clone(), y.clone()
    before[9], after[:5] = 7, 8
    figure = plots.shifted_digits(images, "half turn", before, after)
    check(figure, "The base reads 90 % of 10 images, after the half turn 50 %")
    said = [axes.get_title() for axes in figure.axes]
    assert said[:8] == [f"reads {k}" for k in (0, 1, 2, 3, 4, 0, 1, 2)]
    assert said[8:] == [*["reads 8 ✗"] * 5, "reads 0", "reads 1", "reads 2"]
    assert [axes.get_xlabel() for axes in figure.axes[8:]] == [f"a {k % 5}" for k in range(8)]
    first, turned = (torch.tensor(figure.axes[k].images[0].get_array()) for k in (0, 8))
    assert turned.allclose(first.flip(0, 1))  # a half turn


def test_learning_rate_curves_tell_the_best_mean_and_each_seed_s_choice():
    figure = plots.learning_rate_curves(comparison())
    check(figure, "best at 0.01 for LoRA; at 0.02 for DoRA")
    means = [list(box.lines[0].get_ydata()) for box in figure.axes[0].containers]
    assert means == [pytest.approx([91, 90]), pytest.approx([81, 262 / 3])]
    strip = [(*text.get_position(), text.get_text()) for text in figure.axes[1].texts]
    # Of LoRA, in row 0, seed 1 chose 0.02; the mean is best at 0.01. Each seed of DoRA chose 0.02.
    assert strip == [(0.01, 0, "2"), (0.02, 0, "1"), (0.02, 1, "3")]
    rows = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert rows == ["LoRA", "DoRA"]
    same = comparison()
    same.results["dora"] = same.results["lora"]
    check(plots.learning_rate_curves(same), "best at 0.01 for LoRA and DoRA")


def test_training_curves_ring_the_epoch_that_was_kept():
    figure = plots.training_curves(comparison())
    check(figure, "Seed 0: LoRA fits training and validation images closest", "LoRA 1, DoRA 2")
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2.0, 1.0, 0.5], [2.0, 1.5, 1.2]]
    named = [text.get_text() for text in right.get_legend().get_texts()]
    assert named == ["LoRA, rate 0.01", "DoRA, rate 0.02"]
    rings = [line.get_xydata()[0] for line in right.lines if line.get_fillstyle() == "none"]
    assert [tuple(ring) for ring in rings] == [(1, 0.2), (2, 0.6)]


def test_training_curves_name_two_methods_where_two_are_closest(monkeypatch):
    monkeypatch.setitem(LOSSES, "dora", [(2.0, 1.5), (1.5, 0.9), (0.1, 0.6)])
    figure = plots.training_curves(comparison())
    check(figure, "DoRA fits the training images closest, LoRA the validation images")


def test_paired_differences_count_what_is_detected():
    pairs = [("dora", "lora"), ("lora", "lora")]
    compared = comparison()
    figure = plots.paired_differences(compared, pairs)
    d = compared.difference("dora", "lora")
    assert d.verdict == "higher"
    check(figure, "1 of 2 differences are detected with 3 seeds", f"{d.low:.1f} to {d.high:.1f}")
    axes = figure.axes[0]
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    assert list(dots.get_xdata()) == [6, 6, 3.5]
    assert axes.patches[0].get_width() == pytest.approx(2 * d.detectable)


def test_seeds_needed_draws_what_the_t_test_detects():
    figure = plots.seeds_needed(1.7, {"a paper": 2.1})
    needed = seeds_to_detect(2.1, 1.7)
    check(
        figure,
        "deviation of 1.7 points from seed to seed, 5 seeds detect",
        f"(2.1 points) takes {needed}",
    )
    counts, detected = figure.axes[0].lines[0].get_data()
    assert list(detected) == pytest.approx(
        [detectable_difference(1.7 / math.sqrt(n), n) for n in counts]
    )
    assert f"detect {detected[list(counts).index(5)]:.2g} points" in title(figure)


def test_accuracy_and_bytes_names_the_best_and_the_worst():
    figure = plots.accuracy_and_bytes(comparison())
    said = "After the half turn the base reads 42 %; adapted, it reads 92.0 % (LoRA) to 97.2 %"
    check(figure, f"{said} (DoRA)", "LoRA 92.0 percent with 120,000 bytes")
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines[:3]] == [[90, 96], [91, 97], [95, 98.5]]
    assert [bar.get_height() for bar in right.patches] == [120, 124]


def test_the_slider_of_the_spread_draws_its_figure():
    slider, picture = widgets.seeds_needed().children
    slider.value = 2.5
    assert plots.png(plots.seeds_needed(2.5)) in picture.value
