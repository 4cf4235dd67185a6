"""How magnitude and direction move: the figures of lesson 5."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from minidora.experiment import Difference, mean_and_error
from minidora.geometry import Correlation, Dot
from minidora.plots.style import COLORS, NAMES, new_figure, one_line


def pretraining_curve(curve: Mapping[str, Any]) -> Figure:
    """The training loss of the checkpoint's pretraining, and its loss on text it has not seen."""
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    steps = [curve["every"] * (k + 1) for k in range(len(curve["losses"]))]
    held_out = curve["validation_loss"]
    axes.plot(steps, curve["losses"], color=COLORS["full"], lw=1.2, label="training")
    axes.axhline(held_out, color=COLORS["base"], ls="--", lw=1.2, label="unseen pages, at the end")
    axes.axhline(math.log(96), color=COLORS["base"], ls=":", lw=1.2, label="guessing, ln 96")
    axes.set(xlabel="step", ylabel="loss (nats per character)", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    finding = (
        f"Pretraining: from {curve['losses'][0]:.1f} to {held_out:.2f} nats per character "
        f"in {curve['steps']:,} steps"
    )
    axes.set_title(finding, fontsize=10)
    figure.set_label(f"Loss against step. {finding}; guessing among 96 characters has 4.56.")
    return figure


def movement(groups: Mapping[str, Sequence[Dot]], upto: int | None = None) -> Figure:
    """Figure 2: change in magnitude against change in direction, a panel for each method.

    Args:
        groups: {method: dots of one run}. Colours are layers, first to last from dark to light;
            the line of a layer is its path through the steps.
        upto: draw no step after this one; the axes stay those of all steps.
    """
    figure = new_figure(8.4, 3.2)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    correlations = []
    for axes, (name, dots) in zip(panels, groups.items(), strict=True):
        layers = list(dict.fromkeys(dot.layer for dot in dots))
        shown = [dot for dot in dots if upto is None or dot.step <= upto]
        for place, layer in enumerate(layers):
            path = [dot for dot in shown if dot.layer == layer]
            axes.plot(
                [dot.delta_direction for dot in path],
                [dot.delta_magnitude for dot in path],
                "o-", ms=3.5, lw=0.7, color=colormaps["viridis"](place / max(1, len(layers) - 1)),
            )  # fmt: skip
        axes.set_xlim(0, 1.08 * max(dot.delta_direction for dot in dots))
        axes.set_ylim(0, 1.08 * max(dot.delta_magnitude for dot in dots))
        r = _correlation(shown)
        correlations.append(f"{NAMES[name]} {r:+.2f}")
        axes.set_title(f"{NAMES[name]}, r = {r:+.2f}", fontsize=9.5, color=COLORS[name])
        axes.set_xlabel("ΔD, 1 - cosine", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ΔM, norm", fontsize=9)
    last = max(dot.step for dots in groups.values() for dot in dots if upto in (None, dot.step))
    turned = {
        name: fmean(dot.delta_direction for dot in dots if dot.step == last)
        for name, dots in groups.items()
    }
    finding = f"Step {last}, mean ΔD: " + ", ".join(
        f"{NAMES[name]} {value:.2g}" for name, value in turned.items()
    )
    figure.suptitle(f"{finding}; the axes differ", fontsize=10)
    figure.set_label(
        f"Change in magnitude against change in direction, one path for each layer. {finding}. "
        f"Correlations: {', '.join(correlations)}."
    )
    return figure


def _correlation(dots: Sequence[Dot]) -> float:
    pairs = torch.tensor([[dot.delta_direction, dot.delta_magnitude] for dot in dots])
    return float(torch.corrcoef(pairs.double().T)[0, 1])


def pythagoras(rows: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """How much longer each row got, against what a turn by an orthogonal update would make of it.

    Args:
        rows: {method: (length now / length before, 1 / cos)}, a number a row.
    """
    figure = new_figure(8.4, 3.1)
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    means = {}
    for axes, (name, (ratio, predicted)) in zip(panels, rows.items(), strict=True):
        axes.plot(predicted, ratio, ".", ms=3, alpha=0.5, color=COLORS[name])
        limit = float(predicted.max())
        axes.plot([1, limit], [1, limit], color="#666666", lw=1, ls="--")
        axes.axhline(1, color="#cccccc", lw=0.8, zorder=0)
        means[name] = float(ratio.mean())
        axes.set_title(f"{NAMES[name]}, mean {means[name]:.3f}", fontsize=9.5, color=COLORS[name])
        axes.set_xlabel("1 / cos of the turn", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("length now / before", fontsize=9)
    longer = {name: 100 * float((ratio > 1).double().mean()) for name, (ratio, _) in rows.items()}
    finding = "Rows that got longer: " + ", ".join(
        f"{NAMES[name]} {share:.0f} %" for name, share in longer.items()
    )
    figure.suptitle(f"{finding}; dashed: the update is orthogonal to the row", fontsize=10)
    figure.set_label(
        "Length of each row now over before, against 1 / cos of its turn; a dashed line shows "
        f"where an orthogonal update puts it. {finding}. Mean ratios: "
        + ", ".join(f"{NAMES[name]} {mean:.3f}" for name, mean in means.items())
        + "."
    )
    return figure


def correlation_strip(
    seeds: Mapping[str, Mapping[int, float]],
    pooled: Mapping[str, Correlation],
    paper: Mapping[str, float],
) -> Figure:
    """The correlation of each method: every seed, all seeds pooled with interval, the paper's."""
    figure = new_figure(7.0, 3.0)
    axes = figure.subplots()
    for row, (name, by_seed) in enumerate(seeds.items()):
        found, color = pooled[name], COLORS[name]
        axes.plot(list(by_seed.values()), [row] * len(by_seed), "|", ms=13, mew=1.4, color=color)
        axes.plot([found.low, found.high], [row + 0.26] * 2, color=color, lw=2)
        axes.plot(found.r, row + 0.26, "o", color=color, ms=6)
        axes.plot(paper[name], row - 0.26, "D", mfc="white", mec=color, ms=7)
    axes.axvline(0, color="#999999", lw=0.8)
    axes.set_yticks(range(len(seeds)), [NAMES[name] for name in seeds])
    axes.set(xlim=(-1.02, 1.02), ylim=(len(seeds) - 0.5, -0.5))
    axes.set_xlabel("correlation of ΔD and ΔM")
    handles = [
        Line2D([], [], ls="", marker="|", color="k", ms=10, mew=1.4, label="one seed"),
        Line2D([], [], marker="o", color="k", lw=2, label="95 % over seeds and layers"),
        Line2D([], [], ls="", marker="D", mfc="white", mec="k", label="the paper"),
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8.5, ncols=3, loc="outside lower center")
    axes.spines[["top", "right", "left"]].set_visible(False)
    ours = ", ".join(f"{NAMES[name]} {pooled[name].r:+.2f}" for name in seeds)
    theirs = ", ".join(f"{paper[name]:+.2f}" for name in seeds)
    axes.set_title(f"Pooled r: {ours};\nthe paper has {theirs}", fontsize=9.5)
    figure.set_label(
        "Correlation of change in direction and in magnitude, seed by seed. "
        + " ".join(
            f"{NAMES[name]}: seeds from {min(s.values()):+.2f} to {max(s.values()):+.2f}, pooled "
            f"{pooled[name].r:+.2f} ({pooled[name].low:+.2f} to {pooled[name].high:+.2f}), "
            f"the paper {paper[name]:+.2f}."
            for name, s in seeds.items()
        )
    )
    return figure


def correlation_variants(variants: Mapping[str, Mapping[str, Correlation]]) -> Figure:
    """What changes the correlations: a row for each way to compute them, methods in colours."""
    figure = new_figure(7.6, 1.3 + 0.36 * len(variants))
    axes = figure.subplots()
    methods = list(next(iter(variants.values())))
    for row, found in enumerate(variants.values()):
        for place, (name, c) in enumerate(found.items()):
            y = row + 0.2 * (place - (len(found) - 1) / 2)
            axes.plot([c.low, c.high], [y, y], color=COLORS[name], lw=1.6)
            axes.plot(c.r, y, "o", color=COLORS[name], ms=4.5)
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", zorder=0)
    axes.axvline(0, color="#999999", lw=0.8)
    axes.set_yticks(range(len(variants)), list(variants), fontsize=9)
    axes.set(xlim=(-1.02, 1.02), ylim=(len(variants) - 0.5, -0.5))
    axes.set_xlabel("correlation of ΔD and ΔM, 95 % interval over seeds and layers")
    handles = [Line2D([], [], marker="o", color=COLORS[m], label=NAMES[m]) for m in methods]
    figure.legend(handles=handles, frameon=False, fontsize=8.5, ncols=3, loc="outside lower center")
    axes.spines[["top", "right", "left"]].set_visible(False)
    signs = {name: [f[name].r > 0 for f in variants.values()] for name in methods}
    text = ", ".join(f"{sum(above)} ({NAMES[name]})" for name, above in signs.items())
    figure.suptitle(f"Of {len(variants)} ways to compute r, above 0: {text}", fontsize=10)
    figure.set_label(
        "Correlations with intervals for each way to compute them. "
        + " ".join(
            f"{variant}: " + ", ".join(f"{NAMES[n]} {c.r:+.2f}" for n, c in found.items()) + "."
            for variant, found in variants.items()
        )
    )
    return figure


def loss_strip(losses: Mapping[str, tuple[str, Mapping[int, float]]], before: float) -> Figure:
    """The test loss of each setting, seed by seed; lines join what one seed reached.

    Args:
        losses: {label: (method, {seed: loss})}.
        before: the loss of the pretrained model, for the caption.
    """
    figure = new_figure(7.2, 3.4)
    axes = figure.subplots()
    values = [by_seed for _, by_seed in losses.values()]
    for seed in values[0]:
        axes.plot(range(len(values)), [v[seed] for v in values], color="#cccccc", lw=0.8, zorder=0)
    means = {}
    for place, (label, (method, by_seed)) in enumerate(losses.items()):
        mean, error = mean_and_error(list(by_seed.values()))
        means[label] = mean
        axes.plot([place] * len(by_seed), list(by_seed.values()), "o", ms=3.5, alpha=0.5,
                  color=COLORS[method])  # fmt: skip
        axes.errorbar(place, mean, error, marker="D", color=COLORS[method], ms=7, capsize=4)
        axes.annotate(f"{mean:.3f}", (place, mean), (9, 0), textcoords="offset points",
                      fontsize=8.5, va="center")  # fmt: skip
    axes.set_xticks(range(len(losses)), list(losses), fontsize=8.5)
    axes.set_xlim(-0.4, len(losses) - 0.4)
    axes.set_ylabel("test loss (nats per character)")
    axes.spines[["top", "right"]].set_visible(False)
    best = min(means, key=means.__getitem__)
    labels = {label: one_line(label) for label in losses}
    axes.set_title(
        f"From {before:.2f} before adapting; lowest is {labels[best]} with {means[best]:.3f}",
        fontsize=10,
    )
    figure.set_label(
        f"Test loss after adapting, {len(values[0])} seeds each, {before:.2f} before. "
        + ", ".join(f"{labels[label]} {mean:.3f}" for label, mean in means.items())
        + "."
    )
    return figure


def rate_curves(curves: Mapping[str, tuple[str, str, Mapping[float, float]]]) -> Figure:
    """Validation loss against learning rate, where each method was tuned.

    Args:
        curves: {label: (method, line style, {learning rate: loss})}.
    """
    figure = new_figure(6.6, 3.4)
    axes = figure.subplots()
    best = {}
    for label, (method, style, curve) in curves.items():
        axes.plot(list(curve), list(curve.values()), style, marker="o", ms=4, color=COLORS[method],
                  label=label)  # fmt: skip
        best[label] = min(curve, key=curve.__getitem__)
        axes.plot(best[label], curve[best[label]], "o", ms=10, mfc="none", color=COLORS[method])
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="validation loss (nats per character)")
    axes.legend(frameon=False, fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    inner = [label for label, (_, _, curve) in curves.items() if best[label] not in
             (min(curve), max(curve))]  # fmt: skip
    axes.set_title(
        f"The best rate (ring) lies inside the grid for {len(inner)} of {len(curves)} settings",
        fontsize=10,
    )
    figure.set_label(
        "Validation loss against learning rate. Best rates: "
        + ", ".join(f"{label} {rate:g}" for label, rate in best.items())
        + "."
    )
    return figure


def rank_sweep(
    ours: Mapping[str, Mapping[int, Mapping[int, float]]],
    paper: Mapping[str, Mapping[int, float]],
    rank: int = 8,
) -> Figure:
    """Loss against rank, ours; accuracy against rank, the paper's table 15; one rank read out.

    Args:
        ours: {"lora" or "dora": {rank: {seed: test loss}}}.
        paper: {"lora" or "dora": {rank: average accuracy in percent}}.
        rank: a rank of ours, marked and told.
    """
    figure = new_figure(8.2, 3.3)
    left, right = figure.subplots(1, 2)
    for name, by_rank in ours.items():
        summary = [mean_and_error(list(seeds.values())) for seeds in by_rank.values()]
        left.errorbar(list(by_rank), [m for m, _ in summary], [e for _, e in summary], marker="o",
                      ms=4, capsize=3, color=COLORS[name], label=NAMES[name])  # fmt: skip
        right.plot(list(paper[name]), list(paper[name].values()), "o-", ms=4, color=COLORS[name])
    left.axvline(rank, color="#999999", lw=0.8, ls=":")
    seeds = len(next(iter(ours["lora"].values())))
    left.set(
        ylabel="test loss (nats per character)", title=f"here, {seeds} seeds, ± standard error"
    )
    right.set(ylabel="accuracy (%)", title="the paper's table 15, one run each", ylim=(0, 100))
    for axes, ranks in ((left, list(ours["lora"])), (right, list(paper["lora"]))):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.set_xlabel("rank")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    # A fixed place: the best one would jump when a slider moves the line.
    left.legend(frameon=False, fontsize=8.5, loc="upper right")
    at = {name: mean_and_error(list(by_rank[rank].values())) for name, by_rank in ours.items()}
    finding = f"Rank {rank}: " + ", ".join(
        f"{NAMES[name]} {mean:.3f} ± {error:.3f}" for name, (mean, error) in at.items()
    )
    figure.suptitle(finding, fontsize=10)
    figure.set_label(
        f"Left, test loss against rank here; right, the paper's accuracies. {finding}. "
        + " ".join(
            f"{NAMES[name]}: "
            + ", ".join(f"{mean_and_error(list(s.values()))[0]:.3f}" for s in by_rank.values())
            + f" at ranks {', '.join(map(str, by_rank))}; the paper "
            + ", ".join(f"{value:g}" for value in paper[name].values())
            + f" at ranks {', '.join(map(str, paper[name]))}."
            for name, by_rank in ours.items()
        )
    )
    return figure


def half_rank(differences: Mapping[int, Difference]) -> Figure:
    """DoRA at rank r / 2 minus LoRA at rank r, with the 95 % interval, for each r."""
    figure = new_figure(6.4, 3.0)
    axes = figure.subplots()
    for place, d in enumerate(differences.values()):
        axes.plot([place + 0.12] * len(d.values), d.values, "o", ms=3, alpha=0.5,
                  color=COLORS["dora_half"])  # fmt: skip
        axes.plot([place, place], [d.low, d.high], color=COLORS["dora_half"], lw=2)
        axes.plot(place, d.mean, "D", ms=6, color=COLORS["dora_half"])
    axes.axhline(0, color="#999999", lw=0.8)
    axes.set_xticks(range(len(differences)), [f"{r // 2} and {r}" for r in differences], fontsize=9)
    axes.set(xlabel="rank of DoRA and of LoRA", ylabel="difference in test loss (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    worse = [rank for rank, d in differences.items() if d.verdict == "higher"]
    better = [rank for rank, d in differences.items() if d.verdict == "lower"]
    axes.set_title(
        f"At half the rank DoRA's loss is higher in {len(worse)} of {len(differences)} pairs, "
        f"lower in {len(better)}",
        fontsize=10,
    )
    figure.set_label(
        "Test loss of DoRA at half the rank minus that of LoRA. "
        + " ".join(
            f"Ranks {r // 2} and {r}: {d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f}), {d.verdict}."
            for r, d in differences.items()
        )
    )
    return figure
