"""A whole model, trained and compared: the figures of lesson 4."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from minidora.data import Images, shift
from minidora.experiment import Comparison, detectable_difference, mean_and_error, seeds_to_detect
from minidora.plots.style import (
    COLORS,
    MARKERS,
    NAMES,
    boxed,
    headline,
    listed,
    new_figure,
    rows_only,
    styled,
)

WRONG = "#D55E00"


@styled
def shifted_digits(images: Images, name: str, before: Tensor, after: Tensor) -> Figure:
    """Images as the base was pretrained on them and after a shift, with what the base reads.

    Args:
        images: the original images; the first 8 are drawn.
        name: the shift, see minidora.data.SHIFTS.
        before, after: (n,), the base's answers on all images and on the shifted ones.
    """
    figure = new_figure(7.6, 2.9)
    grid = figure.subplots(2, 8)
    rows = {"as pretrained": (images, before), name: (shift(images, name), after)}
    for row, (title, (seen, answers)) in enumerate(rows.items()):
        for column in range(8):
            axes = grid[row, column]
            axes.imshow(seen.pictures[column].numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            boxed(axes)
            right = answers[column] == seen.y[column]
            axes.set_title(
                f"reads {answers[column]}" + ("" if right else " ✗"),
                color="black" if right else WRONG,
            )
            if axes in grid[1]:
                axes.set_xlabel(f"a {seen.y[column]}")
        grid[row, 0].set_ylabel(title)
    score = [100 * float((answers == images.y).double().mean()) for answers in (before, after)]
    headline(
        figure,
        f"The base reads {score[0]:.0f} % of {len(images)} images, after the {name} "
        f"{score[1]:.0f} %",
    )
    figure.set_label(
        f"Eight digits of 8 by 8 pixels and the same after the {name}, each with the base's "
        f"answer. It reads {score[0]:.0f} percent of {len(images)} images before and "
        f"{score[1]:.0f} percent after."
    )
    return figure


@styled
def learning_rate_curves(comparison: Comparison) -> Figure:
    """Validation accuracy against the learning rate, the mean over the seeds and its error.

    Lines join the rates that were tried on every seed. Below, how many seeds chose which rate: a
    seed's choice may be another than that of the mean.
    """
    figure = new_figure(7.4, 4.6)
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0))
    best = {}
    for k, (name, results) in enumerate(comparison.results.items()):
        rates = sorted(set.intersection(*(set(result.validation) for result in results)))
        points = [mean_and_error([r.validation[rate] for r in results]) for rate in rates]
        best[name] = max(zip(points, rates, strict=True))[1]
        beside = 1.02 ** (k - 1.5)  # else they hide one another
        axes.errorbar(
            [rate * beside for rate in rates],
            [mean for mean, _ in points],
            [error for _, error in points],
            marker=MARKERS[k % len(MARKERS)],
            color=COLORS[name],
            markersize=5,
            capsize=2,
            label=f"{NAMES[name]}: mean best at {best[name]:g}",
        )
        for rate, count in sorted(Counter(r.learning_rate for r in results).items()):
            strip.text(rate, k, f"{count}", color=COLORS[name], ha="center", va="center", size=10)
    axes.set(xscale="log", ylabel="validation accuracy (%)")
    strip.set(xlabel="learning rate of Adam", ylim=(len(comparison.results) - 0.5, -0.5))
    strip.set_yticks(range(len(comparison.results)), [NAMES[name] for name in comparison.results])
    strip.set_title("how many seeds chose the rate")
    rows_only(strip)
    ticks = sorted(
        {rate for rows in comparison.results.values() for r in rows for rate in r.validation}
    )
    shown = [t for t in ticks if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.minorticks_off()
    axes.legend()
    by_rate: dict[float, list[str]] = {}
    for name, rate in best.items():
        by_rate.setdefault(rate, []).append(NAMES[name])
    found = "; ".join(f"at {rate:g} for {listed(names)}" for rate, names in by_rate.items())
    headline(figure, f"The mean is best {found}")
    said = ", ".join(f"{NAMES[name]} at {rate:g}" for name, rate in best.items())
    figure.set_label(
        f"Validation accuracy against the learning rate, mean of {len(comparison.seeds)} seeds "
        f"with standard errors. The best means: {said}."
    )
    return figure


@styled
def training_curves(comparison: Comparison) -> Figure:
    """Loss on the training and the validation images of the first seed's chosen runs, by epoch.

    A ring marks the epoch whose parameters were kept.
    """
    figure = new_figure(7.6, 3.6)
    left, right = figure.subplots(1, 2)
    kept, final, lowest = {}, {}, {}
    for name, results in comparison.results.items():
        history = results[0].history
        kept[name] = history.best.number
        numbers = [epoch.number for epoch in history.epochs]
        validation = [epoch.validation.loss for epoch in history.epochs if epoch.validation]
        left.plot(numbers, [epoch.train_loss for epoch in history.epochs], color=COLORS[name])
        rate = f"{NAMES[name]}, rate {results[0].learning_rate:g}"
        right.plot(numbers, validation, color=COLORS[name], label=rate)
        right.plot(kept[name], min(validation), "o", color=COLORS[name], fillstyle="none")
        final[name] = history.epochs[-1].train_loss
        lowest[name] = min(validation)
    left.set(yscale="log", ylabel="loss (nats, log scale)")
    left.set_title("training images")
    right.set(yscale="log", yticks=[0.1, 0.2, 0.5, 1, 2, 5])
    right.set_title("validation images (○ epoch kept)")
    right.set_ylim(min(lowest.values()) / 1.3)
    for axes in (left, right):
        axes.set(xlabel="epoch")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    right.legend()
    said = ", ".join(f"{NAMES[name]} {number}" for name, number in kept.items())
    closest = [NAMES[min(losses, key=losses.__getitem__)] for losses in (final, lowest)]
    finding = f"{closest[0]} fits training and validation images closest"
    if closest[0] != closest[1]:
        finding = (
            f"{closest[0]} fits the training images closest, {closest[1]} the validation images"
        )
    headline(figure, f"Seed {comparison.seeds[0]}: {finding}")
    figure.set_label(
        f"Loss by epoch on training and validation images, seed {comparison.seeds[0]}. Epochs "
        f"kept: {said}."
    )
    return figure


@styled
def paired_differences(comparison: Comparison, pairs: Sequence[tuple[str, str]]) -> Figure:
    """Differences in test accuracy, seed by seed, their 95 % interval, and what was detectable."""
    figure = new_figure(7.6, 1.3 + 0.62 * len(pairs))
    axes = figure.subplots()
    said = []
    for row, (first, second) in enumerate(pairs):
        d = comparison.difference(first, second)
        axes.barh(row, 2 * d.detectable, 0.62, -d.detectable, color="#eeeeee", zorder=0)
        offsets = [row + 0.16 * ((k % 5) / 2 - 1) for k in range(len(d.values))]
        axes.plot(d.values, offsets, "o", color="#777777", markersize=4, alpha=0.8)
        color = COLORS[first]
        axes.plot([d.low, d.high], [row, row], color=color, linewidth=2.4, solid_capstyle="butt")
        axes.plot(d.mean, row, "D", color=color, markersize=7)
        axes.text(1.01, row, d.verdict, transform=axes.get_yaxis_transform(), va="center")
        said.append(
            f"{NAMES[first]} minus {NAMES[second]}: {d.low:.1f} to {d.high:.1f}, {d.verdict}"
        )
    axes.axvline(0, color="black", linewidth=0.8)
    names = [f"{NAMES[first]}\nminus {NAMES[second]}" for first, second in pairs]
    axes.set_yticks(range(len(pairs)), names)
    axes.invert_yaxis()
    axes.set_xlabel("difference in test accuracy (percentage points)")
    rows_only(axes)
    handles: list[Any] = [
        Line2D([], [], marker="o", color="#777777", linestyle="", markersize=4, label="one seed"),
        Line2D([], [], marker="D", color="#333333", linewidth=2.4, label="mean, 95 % interval"),
        Patch(color="#eeeeee", label="true differences often missed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    found = sum("detected" not in line for line in said)
    headline(
        figure,
        f"{found} of {len(pairs)} differences are detected with {len(comparison.seeds)} seeds",
    )
    figure.set_label("Paired differences in percentage points. " + "; ".join(said) + ".")
    return figure


@cache
def _detectable(seeds: int) -> float:
    """detectable_difference in standard errors, to which it is proportional."""
    return detectable_difference(1.0, seeds)


@styled
def seeds_needed(spread: float, reported: Mapping[str, float] | None = None) -> Figure:
    """The smallest difference that a paired t test detects, against the number of seeds.

    Args:
        spread: standard deviation of the difference from seed to seed, in percentage points.
        reported: source -> a difference in percentage points, drawn as a level.
    """
    reported = reported or {}
    figure = new_figure(7.6, 3.9)
    axes = figure.subplots()
    counts = [2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 80, 130, 200, 300, 500]
    detectable = [spread / n**0.5 * _detectable(n) for n in counts]
    axes.loglog(counts, detectable, "o-", color=COLORS["dora"], markersize=4)
    needed = {name: seeds_to_detect(level, spread) for name, level in reported.items()}
    for name, level in reported.items():
        axes.axhline(level, color="#555555", linewidth=1, linestyle="--", zorder=0)
        label = f"{name}: {level:g} points, {needed[name]} seeds"
        if needed[name] < 20:  # then the curve is below the level on the right, else above it left
            axes.text(counts[-1], level * 1.03, label, ha="right", va="bottom")
        else:
            axes.text(counts[0], level / 1.06, label, ha="left", va="top")
    axes.set(xlabel="seeds", ylabel="smallest difference detected\n(percentage points)")
    axes.set_xticks(
        [2, 5, 10, 20, 50, 100, 200, 500], ["2", "5", "10", "20", "50", "100", "200", "500"]
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0.65 * min([detectable[-1], *reported.values()]))
    axes.minorticks_off()
    five = detectable[counts.index(5)]
    headline(
        figure,
        f"With a standard deviation of {spread:.2g} points from seed to seed, "
        f"5 seeds detect {five:.2g} points and more",
    )
    said = "".join(
        f" {name} ({level:g} points) takes {needed[name]} seeds."
        for name, level in reported.items()
    )
    figure.set_label(
        f"Smallest detectable difference against the number of seeds, falling from "
        f"{detectable[0]:.2g} points at 2 seeds to {detectable[-1]:.2g} at {counts[-1]}.{said}"
    )
    return figure


@styled
def accuracy_and_bytes(comparison: Comparison) -> Figure:
    """Test accuracy of every seed, and the bytes of training state, method by method."""
    figure = new_figure(7.6, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    names = list(comparison.results)
    accuracies = [comparison.accuracies(name) for name in names]
    for seed in zip(*accuracies, strict=True):
        left.plot(range(len(names)), seed, color="#cccccc", linewidth=0.8, zorder=0)
    for k, (name, values) in enumerate(zip(names, accuracies, strict=True)):
        mean, error = mean_and_error(values)
        left.plot([k] * len(values), values, "o", color=COLORS[name], markersize=3.5, alpha=0.5)
        left.errorbar(k, mean, error, marker="D", color=COLORS[name], markersize=7, capsize=4)
    left.set(ylabel="test accuracy (%)", title="each line is a seed, ◆ mean ± standard error")
    sizes = [comparison.results[name][0].state_bytes for name in names]
    right.bar(range(len(names)), [s / 1000 for s in sizes], color=[COLORS[n] for n in names])
    for k, size in enumerate(sizes):
        right.text(k, size / 1000, f"{size / 1000:.0f}", ha="center", va="bottom")
    right.set(ylabel="kB (1000 bytes)", title="training state")
    for axes in (left, right):
        axes.set_xticks(range(len(names)), [NAMES[n].replace(" ", "\n", 1) for n in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    base = sum(comparison.shifted) / len(comparison.shifted)
    means = {name: sum(v) / len(v) for name, v in zip(names, accuracies, strict=True)}
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    headline(
        figure,
        f"After the {comparison.shift} the base reads {base:.0f} %; adapted, it reads "
        f"{means[least]:.1f} % ({NAMES[least]}) to {means[most]:.1f} % ({NAMES[most]})",
    )
    figure.set_label(
        f"Test accuracy after the {comparison.shift}, over {len(comparison.seeds)} seeds; the "
        f"frozen base has {base:.0f} percent. "
        + ", ".join(
            f"{NAMES[name]} {means[name]:.1f} percent with {size:,} bytes of training state"
            for name, size in zip(names, sizes, strict=True)
        )
        + "."
    )
    return figure
