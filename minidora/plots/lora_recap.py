"""A low-rank update: the figures of lesson 2."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from minidora.plots.style import (
    ALTERNATIVES,
    COLORS,
    DIVERGING,
    MARKERS,
    NAMES,
    PAIR,
    headline,
    new_figure,
    styled,
)


@styled
def low_rank_sum(in_features: int, out_features: int, rank: int) -> Figure:
    """W + s B A as rectangles, drawn to scale, with the number of entries of each."""
    dense, low = out_features * in_features, rank * (in_features + out_features)
    gap = 0.2 * in_features
    figure = new_figure(8.4, 3.4)
    axes = figure.subplots()
    left = 0.0
    for name, rows, columns, sign in [
        ("W", out_features, in_features, "+  s ·"),
        ("B", out_features, rank, "·"),
        ("A", rank, in_features, ""),
    ]:
        color = COLORS["base" if name == "W" else "lora"]
        corner = (left, (out_features - rows) / 2)
        axes.add_patch(Rectangle(corner, columns, rows, facecolor=color, alpha=0.55))
        axes.add_patch(Rectangle(corner, columns, rows, fill=False, edgecolor=color))
        kind = "frozen" if name == "W" else "trained"
        text = f"{name}, {kind}\n({rows}, {columns})\n{rows * columns:,} numbers"
        axes.text(left + columns / 2, -0.06 * out_features, text, ha="center", va="top")
        left += columns + gap
        axes.text(left - gap / 2, out_features / 2, sign, ha="center", va="center", fontsize=14)
    axes.set(xlim=(-gap, left), ylim=(-0.36 * out_features, 1.03 * out_features))
    axes.set_aspect("equal")
    axes.axis("off")
    headline(
        figure,
        f"W' = W + s B A: {low:,} trained numbers beside {dense:,} frozen ones "
        f"({100 * low / dense:.3g} %)",
    )
    figure.set_label(
        f"Rectangles drawn to scale: the frozen W, {out_features} by {in_features}, plus s times "
        f"B, {out_features} by {rank}, times A, {rank} by {in_features}. B and A together have "
        f"{low:,} numbers, W has {dense:,}."
    )
    return figure


@styled
def full_or_lora(in_features: int, out_features: int, rank: int) -> Figure:
    """What is trained in full fine-tuning and in LoRA: one weight drawn to scale, twice."""
    dense, low = out_features * in_features, rank * (in_features + out_features)
    figure = new_figure(8.4, 2.8)
    gap, near = 0.24 * in_features, 0.1 * in_features  # around "+ s ·", and between B and A
    widths = (in_features + gap, 2 * in_features + rank + 2 * gap + near)
    full, lora = figure.subplots(1, 2, width_ratios=widths)
    for axes, width in zip((full, lora), widths, strict=True):
        axes.set(xlim=(-gap / 2, width - gap / 2), aspect="equal")
        axes.set_ylim(-0.3 * out_features, 1.03 * out_features)
        axes.axis("off")

    def block(
        axes: Axes, left: float, bottom: float, columns: int, rows: int, color: str, hatch: str = ""
    ) -> None:
        axes.add_patch(Rectangle((left, bottom), columns, rows, fc=color, alpha=0.4))
        axes.add_patch(Rectangle((left, bottom), columns, rows, fill=False, ec=color, hatch=hatch))

    def under(axes: Axes, left: float, text: str) -> None:
        axes.text(left, -0.06 * out_features, text, ha="center", va="top")

    block(full, 0, 0, in_features, out_features, COLORS["full"], "//")
    under(full, in_features / 2, f"W, all of it trained\n{dense:,} numbers")
    full.set_title("full fine-tuning: W becomes W'")
    block(lora, 0, 0, in_features, out_features, COLORS["base"])
    block(lora, in_features + gap, 0, rank, out_features, COLORS["lora"], "//")
    middle = (out_features - rank) / 2
    right = in_features + gap + rank + near
    block(lora, right, middle, in_features, rank, COLORS["lora"], "//")
    for place, sign in ((in_features + gap / 2, "+ s ·"), (right - near / 2, "·")):
        lora.text(place, out_features / 2, sign, ha="center", va="center", fontsize=13)
    under(lora, in_features / 2, f"W, frozen\n{dense:,} numbers")
    under(lora, in_features + gap + rank / 2, f"B, trained\n{out_features * rank:,} numbers")
    under(lora, right + in_features / 2, f"A, trained\n{rank * in_features:,} numbers")
    lora.set_title("LoRA: W' = W + s B A")
    headline(
        figure,
        f"Full fine-tuning trains {dense:,} numbers of this layer, LoRA of rank {rank} trains "
        f"{low:,} ({100 * low / dense:.3g} %)",
    )
    figure.set_label(
        f"Two panels drawn to scale. Left, full fine-tuning: one rectangle W, {out_features} by "
        f"{in_features}, all {dense:,} numbers trained. Right, LoRA: W is frozen; a tall rectangle "
        f"B, {out_features} by {rank}, and a wide one A, {rank} by {in_features}, are trained, "
        f"{low:,} numbers."
    )
    return figure


@styled
def gradient_norms(norms_a: Sequence[float], norms_b: Sequence[float]) -> Figure:
    """Norm of the gradient of A and of B before each step, from the start on."""
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    for name, norms, color, marker in [
        ("B", norms_b, PAIR[0], "o"),
        ("A", norms_a, PAIR[1], "s"),
    ]:
        axes.plot(norms, marker + "-", color=color, markersize=4, label=f"of {name}")
    axes.set(xlabel="steps taken", ylabel="norm of the gradient")
    axes.set_xticks(range(0, len(norms_a), max(1, len(norms_a) // 10)))
    axes.set_ylim(bottom=-0.04 * max(*norms_a, *norms_b))
    axes.legend()
    if norms_a[0] == 0.0 < norms_b[0] and norms_a[1] > 0:
        title = "At the start only B has a gradient; A gets one as soon as B has moved"
    else:
        title = f"At the start: norm {norms_a[0]:.3g} for A, {norms_b[0]:.3g} for B"
    headline(figure, title)
    figure.set_label(
        f"Norms of the gradients over {len(norms_a)} steps. At the start A's is {norms_a[0]:.3g} "
        f"and B's is {norms_b[0]:.3g}; at the end A's is {norms_a[-1]:.3g} and B's "
        f"{norms_b[-1]:.3g}."
    )
    return figure


@styled
def update_spectra(full: Tensor, lora: Tensor) -> Figure:
    """The update of one weight by full fine-tuning and by LoRA: entries and singular values.

    Args:
        full, lora: W' - W, (out, in), of the same layer.
    """
    updates = {"full": full.detach().cpu().double(), "lora": lora.detach().cpu().double()}
    spectra = {name: torch.linalg.svdvals(update) for name, update in updates.items()}
    ranks = {name: int((s > 1e-6 * s[0]).sum()) for name, s in spectra.items()}
    rank = ranks["lora"]
    share = float(spectra["full"][:rank].square().sum() / spectra["full"].square().sum())

    figure = new_figure(8.6, 3.9)
    *heats, axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.9))
    for heat, (name, update) in zip(heats, updates.items(), strict=True):
        limit = float(update.abs().quantile(0.99))
        image = heat.imshow(update.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
        figure.colorbar(image, ax=heat, location="bottom", label="entry, own scale", extend="both")
        heat.set_title(NAMES[name])
        heat.set(xlabel="input", xticks=[], yticks=[])
        axes.semilogy(
            range(1, ranks[name] + 1),
            spectra[name][: ranks[name]].numpy(),
            "os"[name == "lora"],
            markersize=4,
            color=COLORS[name],
            label=f"{NAMES[name]}: rank {ranks[name]}",
        )
    heats[0].set_ylabel("output")
    axes.set(xlabel="number of the singular value", ylabel="singular value of the update")
    axes.set_xlim(0, len(spectra["full"]) + 1)
    axes.legend(loc="upper right")
    headline(
        figure,
        f"LoRA's update has rank {rank}; the {rank} largest directions of the full update hold "
        f"{100 * share:.0f} % of its squared size",
    )
    figure.set_label(
        "Heat maps of the update of one weight by full fine-tuning and by LoRA, and their singular "
        f"values. LoRA's has {rank} above zero, the full one {ranks['full']}, of which the "
        f"{rank} largest hold {100 * share:.0f} percent of the squared size."
    )
    return figure


@styled
def scaling_rules(
    ranks: Sequence[int], progress: Mapping[str, Mapping[str, Sequence[float]]], reference: int
) -> Figure:
    """How far the first step lowers the loss at each rank, for several rules of scaling.

    Args:
        ranks: the ranks, among them the reference.
        progress: optimizer -> rule -> decrease of the loss at each rank, 1 at the reference.
        reference: the rank at which every rule has the same scaling.
    """
    figure = new_figure(8.6, 3.7)
    panels = figure.subplots(1, len(progress), sharey=True, squeeze=False)[0]
    flattest = {}
    for axes, (optimizer, rules) in zip(panels, progress.items(), strict=True):
        for (rule, values), color, marker in zip(
            rules.items(), ALTERNATIVES[1:], MARKERS, strict=False
        ):
            axes.loglog(ranks, values, marker + "-", color=color, markersize=5, label=rule)
        flattest[optimizer] = min(rules, key=lambda rule: max(rules[rule]) / min(rules[rule]))
        axes.axhline(1, color="#dddddd", linewidth=0.8, zorder=0)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.set_xlabel("rank")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(optimizer)
    panels[0].set_ylabel(f"loss removed by the first step\n(1 = at rank {reference})")
    panels[0].legend()
    findings = ", ".join(f"with {rule} under {name}" for name, rule in flattest.items())
    headline(figure, f"The first step depends least on the rank {findings}")
    figure.set_label(
        f"Loss removed by the first step against the rank, relative to rank {reference}. "
        + " ".join(
            f"{optimizer}: "
            + ", ".join(f"{values[-1]:.2g} at rank {ranks[-1]} with {rule}" for rule, values in r)
            + "."
            for optimizer, r in ((name, rules.items()) for name, rules in progress.items())
        )
    )
    return figure


@styled
def initial_scale(
    widths: Sequence[int],
    first_step: Mapping[str, Sequence[float]],
    learning_rates: Sequence[float],
    losses: Mapping[str, Tensor],
) -> Figure:
    """What the size of the random factor at the start does: to the first step, and to training.

    Args:
        widths: numbers of inputs.
        first_step: initialisation -> size of the update after one Adam step, in percent of W.
        learning_rates: of the training runs.
        losses: the same initialisations -> (seeds, learning rates), loss on new images at the end.
    """
    figure = new_figure(8.8, 3.9)
    left, right = figure.subplots(1, 2)
    # The last is dashed, as it may lie on the one before.
    looks = zip(ALTERNATIVES, MARKERS, ("-", "-", "-", "--"), strict=True)
    styles = dict(zip(losses, looks, strict=False))
    best = {}
    for name, values in losses.items():
        color, marker, line = styles[name]
        mean = values.double().mean(dim=0)
        error = values.double().std(dim=0) / math.sqrt(len(values))
        best[name] = learning_rates[int(mean.argmin())]
        right.errorbar(
            learning_rates, mean, error, fmt=marker + line, color=color, markersize=5, capsize=2
        )
        right.plot(best[name], mean.min(), "o", color=color, markersize=12, fillstyle="none")
        left.loglog(widths, first_step[name], marker + line, color=color, markersize=5)
    left.set_xticks(widths, [str(width) for width in widths])
    left.minorticks_off()
    left.yaxis.set_major_formatter("{x:g}")
    left.set(xlabel="inputs of the layer", ylabel="update after one step (% of W)")
    left.set_title("first step of Adam, same learning rate")
    right.set(xscale="log", yscale="log", xlabel="learning rate (ring: the best)")
    right.set_ylabel("loss on new images (nats)")
    right.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    everything = torch.cat([values.double().mean(dim=0) for values in losses.values()])
    right.set_ylim(0.75 * float(everything.min()), 1.3 * float(everything.max()))
    right.minorticks_off()
    right.set_title(
        f"after training: mean ± standard error, {len(next(iter(losses.values())))} seeds",
    )
    handles = [
        Line2D([], [], color=color, marker=marker, ls=line, markersize=5)
        for color, marker, line in styles.values()
    ]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=4)
    rising = sorted(first_step, key=lambda name: first_step[name][-1])
    finding = "The first step at each width, and the loss after training"
    pairs = list(pairwise(rising))
    if all(
        small < 1.1 * large  # equal factors differ a little, as they are drawn
        for one, other in pairs
        for small, large in zip(first_step[one], first_step[other], strict=True)
    ):
        finding = "The larger the random factor, the larger the first step"
        if all(best[one] >= best[other] for one, other in pairs):
            finding += "; the best rate does not rise"
    headline(figure, finding)
    figure.set_label(
        "Left: size of the update after one Adam step against the number of inputs: "
        + ", ".join(
            f"{values[0]:.2g} to {values[-1]:.2g} percent with {name}"
            for name, values in first_step.items()
        )
        + ". Right: loss after training against the learning rate; the best learning "
        + "rate is "
        + ", ".join(f"{rate:g} with {name}" for name, rate in best.items())
        + "."
    )
    return figure


@styled
def trained_share(shapes: Sequence[tuple[int, int]], rank: int) -> Figure:
    """LoRA's parameters in percent of the layer's weights, against the rank.

    Args:
        shapes: (in_features, out_features) of each layer, at most four.
        rank: the rank to mark.
    """
    figure = new_figure(7.4, 3.9)
    axes = figure.subplots()
    shares = {}
    top = max(rank, *(min(shape) for shape in shapes))
    ranks = [2**k for k in range(math.ceil(math.log2(top)) + 1)]
    for (inputs, outputs), color, marker in zip(shapes, ALTERNATIVES, MARKERS, strict=False):
        name = f"{inputs} → {outputs}"
        percent = 100 * (inputs + outputs) / (inputs * outputs)  # of each rank
        shares[name] = percent * rank
        axes.plot(ranks, [percent * r for r in ranks], color=color, linewidth=1.6)
        axes.plot(100 / percent, 100, marker, color=color, markersize=7, clip_on=False)
        label = f"{name}: {100 / percent:,.1f}"
        axes.plot([], [], marker + "-", color=color, label=label)
    axes.axhline(100, color="#555555", linewidth=1, linestyle="--")
    axes.axvline(rank, color=COLORS["lora"], linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="rank (dotted: the one in the title)")
    axes.set_ylabel("trained, in % of the layer's weights")
    axes.set_xticks(ranks, [str(r) if k % 2 == 0 else "" for k, r in enumerate(ranks)])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(
        title="in → out: break-even rank",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    said = [f"{share:.3g} % of a layer {name}" for name, share in shares.items()]
    ends = said if len(said) == 1 else [said[0], said[-1]]
    headline(figure, f"Rank {rank} trains {' but '.join(ends)}")
    figure.set_label(
        f"Trained share of a layer against the rank, straight lines through 100 percent at the "
        f"break-even rank. At rank {rank}: {', '.join(said)}."
    )
    return figure


@styled
def merge_rounding(sizes: Sequence[float], lost: Mapping[str, Sequence[float]]) -> Figure:
    """How much of an update is lost when W + s B A is rounded to the dtype of W.

    Args:
        sizes: ||s B A|| in percent of ||W||.
        lost: dtype -> ||rounded W' - (W + s B A)|| in percent of ||s B A||, for each size.
    """
    figure = new_figure(7.4, 3.8)
    axes = figure.subplots()
    for (dtype, values), color, marker in zip(lost.items(), ALTERNATIVES, MARKERS, strict=False):
        axes.loglog(sizes, values, marker + "-", color=color, markersize=5, label=dtype)
    axes.axhline(100, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set(xlabel="size of the update (% of ‖W‖)", ylabel="part of the update lost (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    one = min(range(len(sizes)), key=lambda k: abs(math.log(sizes[k])))
    found = ", ".join(f"{values[one]:.2g} % in {dtype}" for dtype, values in lost.items())
    worst = max(lost, key=lambda dtype: lost[dtype][one])
    headline(
        figure,
        f"Merged in {worst}, an update of {sizes[one]:.2g} % of W loses {lost[worst][one]:.2g} %",
    )
    figure.set_label(
        f"Part of the update lost by rounding, against the size of the update. At "
        f"{sizes[one]:.2g} percent of W: {found}."
    )
    return figure
