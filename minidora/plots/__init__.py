"""Every figure of the course: plain functions that return a matplotlib Figure.

A figure's title states its finding, its axes carry units, and its label (Figure.set_label) is
the alternative text that `show` hands to the notebook. Colours are Okabe and Ito's, which stay
apart for colour-blind readers; a method has the same colour in every figure.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FixedLocator
from torch import Tensor

from minidora.adapt import adapt
from minidora.data import Images, shift
from minidora.evidence.analysis import Dot
from minidora.experiment import (
    Comparison,
    Difference,
    detectable_difference,
    mean_and_error,
    seeds_to_detect,
)
from minidora.geometry import Correlation
from minidora.memory import QUANTIZATIONS, TrainingMemory, gb, gib, llama, training_memory

COLORS = {
    "full": "#000000",
    "lora": "#0072B2",
    "dora": "#D55E00",
    "dora_half": "#E69F00",
    "base": "#999999",
}
"""One colour a method: full fine-tuning, LoRA, DoRA, DoRA at half the rank, the frozen base."""

NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "dora_half": "DoRA, half rank",
    "base": "frozen base",
}


def new_figure(width: float = 7.0, height: float = 3.6) -> Figure:
    """An empty figure in the course's style, without pyplot's global state. Sizes in inches."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def png(figure: Figure) -> str:
    """The figure as PNG data in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def show(figure: Figure) -> None:
    """Display a figure in a notebook as a PNG with its alternative text.

    Raises:
        ValueError: the figure has no label to use as alternative text.
    """
    from IPython.display import display

    alt = str(figure.get_label())
    if not alt:
        raise ValueError("the figure has no alternative text: call figure.set_label(text) first")
    display(
        {"image/png": png(figure), "text/plain": alt},
        metadata={"image/png": {"alt": alt}},
        raw=True,
    )


# ---- Lesson 1: what training costs in memory ----

MEMORY_PARTS = {
    "weights": ("weights", COLORS["base"]),
    "gradients": ("gradients", "#56B4E9"),
    "optimizer_state": ("optimizer state", "#009E73"),
    "step_temporaries": ("only inside step()", "#CC79A7"),
}
"""Field of TrainingMemory: (name, colour). The last is drawn hatched: it comes and goes."""

GPU_CARDS = (8, 12, 16, 24, 40, 48, 80, 141, 180)
"""Sizes graphics cards are sold as, in GB; 180 is a B200, 141 an H200, 80 an A100 or H100, 24 an
RTX 4090."""

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""The layers that the DoRA paper adapts in LLaMA (Table 8)."""

PRECISIONS = ("float32", "bfloat16", "bfloat16 + masters", *QUANTIZATIONS)
"""How the weights stand in memory_explorer. Masters: float32 copies of what is trained in bf16."""


def smallest_card(count: int) -> int | None:
    """The smallest of GPU_CARDS with room for so many bytes, or None. A card is 1e9 bytes a GB."""
    return next((card for card in GPU_CARDS if count <= card * 1e9), None)


def memory_bars(rows: Mapping[str, TrainingMemory], subject: str) -> Figure:
    """What each way to train needs, as stacked bars in GB, the peak inside step() hatched."""
    figure = new_figure(8.2, 1.5 + 0.42 * len(rows))
    axes = figure.subplots()
    widest = max(memory.peak for memory in rows.values())
    for row, memory in enumerate(rows.values()):
        left = 0
        for part in MEMORY_PARTS:
            size = getattr(memory, part)
            _memory_bar(axes, row, left, size, part)
            left += size
        text = f" {gb(memory.total):.1f} GB"
        if memory.step_temporaries:
            text += f", {gb(memory.peak):.1f} in step()"
        axes.text(gb(memory.peak), row, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * gb(widest))
    axes.set_xlabel("GB (1e9 bytes), without activations")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        Patch(fc="none" if part == "step_temporaries" else color, ec=color, label=name)
        for part, (name, color) in MEMORY_PARTS.items()
    ]
    handles[-1].set_hatch("////")
    figure.legend(handles=handles, frameon=False, fontsize=8.5, ncols=4, loc="outside lower center")
    totals = {name: memory.total for name, memory in rows.items()}
    most, least = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
    axes.set_title(
        f"{subject}: {gb(totals[most]):.1f} GB with {most},\n"
        f"{gb(totals[least]):.1f} GB with {least}",
        fontsize=11,
    )
    parts = [
        f"{name} {gb(m.total):.1f} GB (weights {gb(m.weights):.1f}, gradients "
        f"{gb(m.gradients):.1f}, optimizer state {gb(m.optimizer_state):.1f}; inside step() "
        f"{gb(m.step_temporaries):.1f} more)"
        for name, m in rows.items()
    ]
    figure.set_label(f"Stacked bars of the memory of {subject}: {'; '.join(parts)}.")
    return figure


def _memory_bar(axes: Axes, row: int, left: int, size: int, part: str) -> None:
    """One part of a stacked bar, from left on; left and size in bytes."""
    if not size:
        return  # it would still draw its edge
    color = MEMORY_PARTS[part][1]
    passing = part == "step_temporaries"
    axes.barh(
        row,
        gb(size),
        left=gb(left),
        height=0.62,
        facecolor="none" if passing else color,
        edgecolor=color,
        hatch="////" if passing else None,
    )


def step_timeline(histories: Mapping[str, Sequence[int]], parameters: int) -> Figure:
    """Bytes that are alive only inside step(), operation by operation.

    Args:
        histories: LiveBytes.history of one step, by implementation.
        parameters: bytes of what is trained, the unit of the vertical axis.
    """
    figure = new_figure(8.2, 3.5)
    axes = figure.subplots()
    styles = zip(ALTERNATIVES[1:], ("-", "--", ":"), strict=True)
    for (name, history), (color, style) in zip(histories.items(), styles, strict=False):
        copies = [size / parameters for size in [0, *history, 0]]
        progress = [100 * i / (len(copies) - 1) for i in range(len(copies))]
        label = f"{name}: {len(history)} operations, at most {max(copies):.2f}"
        axes.plot(progress, copies, style, color=color, drawstyle="steps-post", lw=2, label=label)
    axes.axhline(1, color=COLORS["base"], lw=1, zorder=0)
    axes.set(xlabel="progress of step() (% of its operations)", ylabel="copies of the parameters")
    axes.set_ylim(bottom=-0.04)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    peaks = {name: max(history, default=0) / parameters for name, history in histories.items()}
    most, least = max(peaks, key=peaks.__getitem__), min(peaks, key=peaks.__getitem__)
    axes.set_title(
        f"Inside one step of Adam, {most} needs {peaks[most]:.2f} more copies of the parameters, "
        f"{least} {peaks[least]:.2f}",
        fontsize=11,
    )
    figure.set_label(
        "Memory that exists only inside step(), in copies of the trained parameters, for each way "
        f"to run it: {', '.join(f'{name} at most {peak:.2f}' for name, peak in peaks.items())}."
    )
    return figure


def gpu_fit(needs: Mapping[str, Mapping[str, int]]) -> Figure:
    """A table: which card has room for which model (row) trained in which way (column).

    Args:
        needs: {model: {way: bytes}}, the same ways for every model.
    """
    models, ways = list(needs), list(next(iter(needs.values())))
    cards = {(m, w): smallest_card(needs[m][w]) for m in models for w in ways}
    figure = new_figure(1.6 + 1.32 * len(ways), 1.5 + 0.58 * len(models))
    axes = figure.subplots()
    shades = colormaps["Blues"]
    for row, model in enumerate(models):
        for column, way in enumerate(ways):
            card = cards[model, way]
            level = GPU_CARDS.index(card) / len(GPU_CARDS) if card else 1.0
            face = shades(0.08 + 0.6 * level) if card else "#444444"
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", lw=2))
            ink = "black" if card else "white"
            room = f"{card} GB card" if card else f"over {GPU_CARDS[-1]} GB"
            text = f"{gb(needs[model][way]):.1f} GB\n{room}"
            middle = (column + 0.5, row + 0.5)
            axes.text(*middle, text, ha="center", va="center", fontsize=8.5, color=ink)
    axes.set(xlim=(0, len(ways)), ylim=(len(models), 0))
    axes.set_xticks([column + 0.5 for column in range(len(ways))], ways, fontsize=8.5)
    axes.set_yticks([row + 0.5 for row in range(len(models))], models, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    first, last = cards[models[0], ways[0]], cards[models[0], ways[-1]]
    axes.set_title(
        f"{models[0]}: {_card(first)} has room for {_one_line(ways[0])}; "
        f"{_card(last)} for {_one_line(ways[-1])}",
        fontsize=11,
    )
    sizes = ", ".join(map(str, GPU_CARDS))
    axes.set_xlabel(
        f"peak inside step(), without activations and the allocator's overhead; cards of {sizes} GB"
    )
    cells = [
        f"{m}, {_one_line(w)}: {gb(needs[m][w]):.1f} GB, {_card(cards[m, w])}"
        for m in models
        for w in ways
    ]
    figure.set_label(f"Table of the smallest card with room, of {sizes} GB. {'; '.join(cells)}.")
    return figure


def _card(card: int | None) -> str:
    return f"a{'n' if card in (8, 180) else ''} {card} GB card" if card else _NO_CARD


_NO_CARD = f"no card up to {GPU_CARDS[-1]} GB"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def memory_explorer(
    name: str = "LLaMA-7B",
    method: str = "dora",
    rank: int = 32,
    precision: str = "bfloat16",
    optimizer: str = "adamw",
    implementation: str = "foreach",
) -> Figure:
    """What training one LLaMA in one way needs, part by part, beside the cards that have room.

    Args:
        name: a key of memory.LLAMAS.
        method: "full", or "lora" or "dora" of this rank on PAPER_TARGETS.
        precision: one of PRECISIONS.
        optimizer, implementation: as in memory.training_memory.

    Raises:
        ValueError: an unknown name, or full fine-tuning of a quantized base.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    model = llama(name, torch.float32 if precision == "float32" else torch.bfloat16)
    if method != "full":
        adapt(model, method, rank=rank, target_modules=PAPER_TARGETS)
    memory = training_memory(
        model,
        optimizer,
        implementation=implementation,
        master_weights=precision == "bfloat16 + masters",
        quantize=precision if precision in QUANTIZATIONS else None,
    )
    figure = new_figure(8.2, 3.6)
    axes = figure.subplots()
    beside: dict[str, Any] = {
        "xytext": (4, 0),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": 9,
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
    }
    left = 0
    for row, (part, (label, _)) in enumerate(MEMORY_PARTS.items()):
        size = getattr(memory, part)
        _memory_bar(axes, row, 0, size, part)
        _memory_bar(axes, len(MEMORY_PARTS), left, size, part)
        axes.annotate(f"{label}: {_size(size)}", (gb(size), row), **beside)
        left += size
    place = (gb(memory.peak), len(MEMORY_PARTS))
    axes.annotate(f"together: {_size(memory.peak)}", place, weight="bold", **beside)
    card = smallest_card(memory.peak)
    limit = max(1.5 * gb(memory.peak), 1.08 * (card or 0))
    right = math.inf
    for size in reversed(GPU_CARDS):
        if size <= limit and right - size > 0.04 * limit:  # else the numbers would overlap
            right = size
            axes.axvline(size, color="black", lw=0.8, ls=":", zorder=0)
            axes.text(size, -0.6, f"{size}", ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, limit), ylim=(len(MEMORY_PARTS) + 0.5, -1), yticks=[])
    axes.set_xlabel("GB (1e9 bytes), without activations; dotted: sizes of graphics cards")
    axes.spines[["top", "right"]].set_visible(False)
    if card:
        verdict = f"fits {_card(card)}"
    else:
        verdict = f"needs {math.ceil(gb(memory.peak) / GPU_CARDS[-1])} cards of {GPU_CARDS[-1]} GB"
    who = NAMES[method] if method == "full" else f"{NAMES[method]} of rank {rank}"
    axes.set_title(
        f"{name}, {who}, {precision}, {optimizer} ({implementation}): {verdict}", fontsize=10.5
    )
    parts = [f"{label} {_size(getattr(memory, part))}" for part, (label, _) in MEMORY_PARTS.items()]
    figure.set_label(
        f"Memory of {name}, {who}, {precision}, {optimizer}, {implementation}: {', '.join(parts)}; "
        f"together {_size(memory.peak)}, which {verdict}."
    )
    return figure


def _size(count: int) -> str:
    return f"{gb(count):.2f} GB = {gib(count):.2f} GiB"


# ---- Lesson 2: a low-rank update ----

ALTERNATIVES = ("#000000", "#009E73", "#CC79A7", "#56B4E9")
"""Okabe and Ito's black, green, purple and sky blue, each with its own marker in MARKERS."""

MARKERS = "osD^"


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
        axes.text(left + columns / 2, -0.06 * out_features, text, ha="center", va="top", fontsize=9)
        left += columns + gap
        axes.text(left - gap / 2, out_features / 2, sign, ha="center", va="center", fontsize=14)
    axes.set(xlim=(-gap, left), ylim=(-0.36 * out_features, 1.03 * out_features))
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(
        f"W' = W + s B A: {low:,} trained numbers beside {dense:,} frozen ones "
        f"({100 * low / dense:.3g} %)",
        fontsize=11,
    )
    figure.set_label(
        f"Rectangles drawn to scale: the frozen W, {out_features} by {in_features}, plus s times "
        f"B, {out_features} by {rank}, times A, {rank} by {in_features}. B and A together have "
        f"{low:,} numbers, W has {dense:,}."
    )
    return figure


def gradient_norms(norms_a: Sequence[float], norms_b: Sequence[float]) -> Figure:
    """Norm of the gradient of A and of B before each step, from the start on."""
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    for name, norms, color, marker in [
        ("B", norms_b, COLORS["lora"], "o"),
        ("A", norms_a, COLORS["dora_half"], "s"),
    ]:
        axes.plot(norms, marker + "-", color=color, markersize=4, label=f"of {name}")
    axes.set(xlabel="steps taken", ylabel="norm of the gradient")
    axes.set_xticks(range(0, len(norms_a), max(1, len(norms_a) // 10)))
    axes.set_ylim(bottom=-0.04 * max(*norms_a, *norms_b))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    if norms_a[0] == 0.0 < norms_b[0]:
        title = "At the start only B has a gradient; A gets one as soon as B has moved"
    else:
        title = f"At the start: norm {norms_a[0]:.3g} for A, {norms_b[0]:.3g} for B"
    axes.set_title(title, fontsize=11)
    figure.set_label(
        f"Norms of the gradients over {len(norms_a)} steps. At the start A's is {norms_a[0]:.3g} "
        f"and B's is {norms_b[0]:.3g}; at the end A's is {norms_a[-1]:.3g} and B's "
        f"{norms_b[-1]:.3g}."
    )
    return figure


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
        heat.imshow(update.numpy(), cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        heat.set_title(f"{NAMES[name]}\n(colours to ±{limit:.2g})", fontsize=9.5)
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
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"LoRA's update has rank {rank}; the {rank} largest directions of the full update hold "
        f"{100 * share:.0f} % of it",
        fontsize=11,
    )
    figure.set_label(
        "Heat maps of the update of one weight by full fine-tuning and by LoRA, and their singular "
        f"values. LoRA's has {rank} above zero, the full one {ranks['full']}, of which the "
        f"{rank} largest hold {100 * share:.0f} percent of the squared size."
    )
    return figure


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
        axes.set_title(optimizer, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"loss removed by the first step\n(1 = at rank {reference})")
    panels[0].legend(frameon=False, fontsize=9)
    findings = ", ".join(f"with {rule} under {name}" for name, rule in flattest.items())
    figure.suptitle(f"The first step depends least on the rank {findings}", fontsize=11)
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
        losses: initialisation -> (seeds, learning rates), loss on new images after training.
    """
    figure = new_figure(8.8, 3.9)
    left, right = figure.subplots(1, 2)
    styles = dict(zip(losses, zip(ALTERNATIVES, MARKERS, strict=True), strict=False))
    best = {}
    for name, values in losses.items():
        color, marker = styles[name]
        mean = values.double().mean(dim=0)
        error = values.double().std(dim=0) / math.sqrt(len(values))
        best[name] = learning_rates[int(mean.argmin())]
        right.errorbar(
            learning_rates, mean, error, fmt=marker + "-", color=color, markersize=5, capsize=2
        )
        if name in first_step:
            left.loglog(widths, first_step[name], marker + "-", color=color, markersize=5)
    left.set_xticks(widths, [str(width) for width in widths])
    left.minorticks_off()
    left.yaxis.set_major_formatter("{x:g}")
    left.set(xlabel="inputs of the layer", ylabel="update after one step (% of W)")
    left.set_title("first step of Adam, same learning rate", fontsize=10)
    right.set(xscale="log", yscale="log", xlabel="learning rate")
    right.set_ylabel("loss on new images (nats)")
    right.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    everything = torch.cat([values.double().mean(dim=0) for values in losses.values()])
    right.set_ylim(0.75 * float(everything.min()), 1.3 * float(everything.max()))
    right.minorticks_off()
    right.set_title(
        f"after training: mean ± standard error, {len(next(iter(losses.values())))} seeds",
        fontsize=10,
    )
    handles = [Line2D([], [], color=c, marker=m, markersize=5) for c, m in styles.values()]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=4, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    small, large = (f(first_step, key=lambda name: first_step[name][-1]) for f in (min, max))
    if best[large] < best[small]:
        finding = (
            "A larger random factor acts like a larger learning rate: "
            f"best at {best[small]:g} for {small}, at {best[large]:g} for {large}"
        )
    else:
        finding = (
            "A larger random factor makes a larger first step; "
            f"best learning rate {best[small]:g} for {small}, {best[large]:g} for {large}"
        )
    figure.suptitle(finding, fontsize=11)
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
        frameon=False,
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    axes.spines[["top", "right"]].set_visible(False)
    said = [f"{share:.3g} % of a layer {name}" for name, share in shares.items()]
    ends = said if len(said) == 1 else [said[0], said[-1]]
    axes.set_title(f"Rank {rank} trains {' but '.join(ends)}", fontsize=11)
    figure.set_label(
        f"Trained share of a layer against the rank, straight lines through 100 percent at the "
        f"break-even rank. At rank {rank}: {', '.join(said)}."
    )
    return figure


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
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    one = min(range(len(sizes)), key=lambda k: abs(math.log(sizes[k])))
    found = ", ".join(f"{values[one]:.2g} % in {dtype}" for dtype, values in lost.items())
    worst = max(lost, key=lambda dtype: lost[dtype][one])
    axes.set_title(
        f"Merged in {worst}, an update of {sizes[one]:.2g} % of W loses {lost[worst][one]:.2g} %",
        fontsize=11,
    )
    figure.set_label(
        f"Part of the update lost by rounding, against the size of the update. At "
        f"{sizes[one]:.2g} percent of W: {found}. Smaller updates lose more."
    )
    return figure


# ---- Lesson 3: magnitude times direction ----

ROW = (1.6, 1.2)
"""One row of a weight with two inputs, of length 2: what lesson 3 draws in the plane."""

PAIR = ("#009E73", "#CC79A7")
"""Okabe and Ito's green and purple, for two alternatives within a method."""


def magnitude_direction(
    angle: float = 110.0, length: float = 1.5, magnitude: float = 2.0
) -> Figure:
    """One row w of a weight, and where the same update takes it in LoRA and in DoRA.

        LoRA  w' = w + update              DoRA  w' = magnitude * (w + update) / ||w + update||

    Args:
        angle: of the update, in degrees from the first axis.
        length: of the update, at least 0.
        magnitude: DoRA's trained length of the row, at least 0.
    """
    radians = math.radians(angle)
    update = (length * math.cos(radians), length * math.sin(radians))
    lora = (ROW[0] + update[0], ROW[1] + update[1])
    norm = math.hypot(*lora)
    zero = norm < 1e-12  # then the row has no direction, and g = 1 leaves it as it is
    dora = lora if zero else (magnitude * lora[0] / norm, magnitude * lora[1] / norm)
    turn = 0.0 if zero else _degrees_between(ROW, lora)
    rows = {"base": ROW, "lora": lora, "dora": dora}
    lengths = {name: math.hypot(*row) for name, row in rows.items()}

    figure = new_figure(8.4, 4.0)
    plane, bars = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    circle = [math.radians(degree) for degree in range(361)]
    plane.plot(
        [magnitude * math.cos(t) for t in circle],
        [magnitude * math.sin(t) for t in circle],
        color=COLORS["dora"],
        alpha=0.45,
        linewidth=1,
    )
    plane.plot(
        *zip(ROW, lora, strict=True), color="#555555", linestyle="--", linewidth=1.2, zorder=2
    )
    widths = {"base": 5.0, "lora": 3.2, "dora": 1.8}  # on one ray, each stays visible
    for name, row in rows.items():
        if lengths[name] < 1e-12:
            continue
        plane.annotate(
            "",
            xy=row,
            xytext=(0, 0),
            arrowprops={
                "arrowstyle": "-|>",
                "color": COLORS[name],
                "linewidth": widths[name],
                "mutation_scale": 16,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    plane.set(xlim=(-4.2, 4.2), ylim=(-4.2, 4.2), aspect="equal")
    plane.set(xlabel="weight of input 1", ylabel="weight of input 2")
    plane.axhline(0, color="#dddddd", linewidth=0.8, zorder=0)
    plane.axvline(0, color="#dddddd", linewidth=0.8, zorder=0)
    handles = [Line2D([], [], color=COLORS[name], linewidth=widths[name]) for name in rows]
    handles += [
        Line2D([], [], color="#555555", linestyle="--", linewidth=1.2),
        Line2D([], [], color=COLORS["dora"], alpha=0.45, linewidth=1),
    ]
    labels = ["w, pretrained", "w' in LoRA", "w' in DoRA", "update", "rows of length m"]
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=5, frameon=False)

    names = [NAMES[name] for name in rows]
    places = range(len(rows))
    bars.barh(places, list(lengths.values()), color=[COLORS[name] for name in rows], height=0.55)
    turns = {"base": 0.0, "lora": turn, "dora": turn}
    for place, name in zip(places, rows, strict=True):
        text = " 0, no direction"
        if lengths[name] > 1e-12:
            text = f" {lengths[name]:.2f}, turned by {_signed(turns[name])}°"
        bars.text(lengths[name], place, text, va="center", fontsize=9)
    bars.set_yticks(places, names)
    bars.invert_yaxis()
    bars.set(xlim=(0, 7.4), xticks=range(5))
    bars.set_xlabel("length of the row", x=2 / 7.4)
    bars.spines[["top", "right"]].set_visible(False)
    bars.spines["bottom"].set_bounds(0, 4)
    if zero:
        title = "The update cancels the row: no direction is left, and both answer 0"
    else:
        title = (
            f"Both turn the row by {_signed(turn)}°: LoRA's length becomes {lengths['lora']:.2f}, "
            f"DoRA's is m = {magnitude:.2f}"
        )
    figure.suptitle(title, fontsize=11)
    figure.set_label(
        f"A row of length 2.00 as an arrow in the plane of its two weights, and the same row "
        f"after an update of length {length:.2f} at {angle:.0f} degrees. LoRA's row has length "
        f"{lengths['lora']:.2f}; DoRA's lies on the same ray, on the circle of radius "
        f"{magnitude:.2f}. Both are turned by {_signed(turn)} degrees."
    )
    return figure


def turn_and_length(lengths: Sequence[float] = (0.5, 1.0, 1.5)) -> Figure:
    """The pairs (turn, length) of the row that updates of fixed lengths reach, in every direction.

    Args:
        lengths: of the updates, each above 0 and below 2, the length of the row.
    """
    figure = new_figure(7.0, 3.8)
    axes = figure.subplots()
    widest = 0.0
    for number, length in enumerate(lengths):
        turns, reached = [], []
        for degree in range(361):
            radians = math.radians(degree)
            row = (ROW[0] + length * math.cos(radians), ROW[1] + length * math.sin(radians))
            turns.append(_degrees_between(ROW, row))
            reached.append(math.hypot(*row))
        widest = max(widest, *turns)
        axes.plot(turns, reached, color=COLORS["lora"], alpha=0.4 + 0.3 * number, linewidth=1.8)
        top = reached.index(max(reached))
        axes.annotate(
            f"‖update‖ = {length:g}",
            (turns[top], reached[top]),
            xytext=(0, 4),
            textcoords="offset points",
            color=COLORS["lora"],
            fontsize=9,
            ha="center",
        )
    for magnitude in (1.0, 2.0, 3.0):
        axes.plot([-widest, widest], [magnitude] * 2, color=COLORS["dora"], linewidth=1.2)
        axes.text(
            widest + 2,
            magnitude,
            f"m = {magnitude:g}",
            color=COLORS["dora"],
            va="center",
            fontsize=9,
        )
    axes.plot(0, math.hypot(*ROW), "o", color=COLORS["base"], markersize=8, zorder=3)
    axes.annotate("w", (0, 2), xytext=(7, 5), textcoords="offset points", color="#555555")
    axes.set(xlabel="turn of the row (degrees)", ylabel="length of the row")
    axes.set(xlim=(-widest - 4, widest + 16), ylim=(0, 4.0))
    axes.set_title(
        "LoRA (blue): an update of one length leaves two lengths for a turn. DoRA: any m",
        fontsize=10.5,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(
        "Turn of the row against its length. For each length of the update LoRA traces a closed "
        "loop around the pretrained row (turn 0, length 2), so a turn comes with one of two "
        "lengths. DoRA moves along horizontal lines, one for each m."
    )
    return figure


def _signed(degrees: float) -> str:
    return f"{degrees:+.0f}".replace("-", "−").replace("+0", "0")


def _degrees_between(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Signed angle from the first vector to the second, in (-180, 180]."""
    cross = first[0] * second[1] - first[1] * second[0]
    return math.degrees(math.atan2(cross, first[0] * second[0] + first[1] * second[1]))


def two_norms(weight: Tensor) -> Figure:
    """A small weight (out, in) with its row norms beside it and its column norms above it."""
    out_features, in_features = weight.shape
    values = weight.detach().cpu().double()
    rows, columns = values.norm(dim=1).tolist(), values.norm(dim=0).tolist()
    limit = float(values.abs().max())

    figure = new_figure(8.2, 4.2)
    grid = figure.add_gridspec(2, 3, width_ratios=(3, 1.2, 0.12), height_ratios=(1, 2.2))
    top, heat = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    side = figure.add_subplot(grid[1, 1])
    image = heat.imshow(values.numpy(), cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    for i in range(out_features):
        for j in range(in_features):
            value = float(values[i, j])
            color = "white" if abs(value) > 0.65 * limit else "black"
            heat.text(
                j,
                i,
                f"{round(value, 1) + 0.0:.1f}",
                ha="center",
                va="center",
                fontsize=9,
                color=color,
            )
    heat.set_xticks(range(in_features), [f"in {j}" for j in range(in_features)])
    heat.set_yticks(range(out_features), [f"out {i}" for i in range(out_features)])
    above = top.bar(range(in_features), columns, color=COLORS["base"], width=0.6)
    top.bar_label(above, fmt="%.1f", fontsize=9)
    top.set(xlim=(-0.5, in_features - 0.5), ylim=(0, 1.35 * max(columns)), xticks=[], yticks=[])
    top.set_title(f"dim=0: {in_features} norms, one per input", fontsize=10)
    beside = side.barh(range(out_features), rows, color=COLORS["dora"], height=0.6)
    side.bar_label(beside, fmt=" %.1f", fontsize=9)
    side.set(ylim=(out_features - 0.5, -0.5), xlim=(0, 1.4 * max(rows)), xticks=[], yticks=[])
    side.set_title(f"dim=1: {out_features} norms,\none per output (DoRA)", fontsize=10)
    for axes in (top, side):
        axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, cax=figure.add_subplot(grid[1, 2]), label="weight")
    figure.suptitle(
        f"One ({out_features}, {in_features}) weight, two candidates for the magnitude", fontsize=11
    )
    figure.set_label(
        f"A heat map of a weight with {out_features} rows (outputs) and {in_features} columns "
        f"(inputs). Above it {in_features} column norms, beside it {out_features} row norms: "
        "DoRA's magnitude is the row norms."
    )
    return figure


def dora_diagram(in_features: int, out_features: int, rank: int) -> Figure:
    """How DoRALinear computes y: where g acts, and where the bias joins."""
    figure = new_figure(8.4, 3.0)
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 42))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, color: str) -> None:
        patch = FancyBboxPatch((x, y - 4), width, 8, "round", edgecolor=color, facecolor="white")
        patch.set_linewidth(1.4)
        axes.add_patch(patch)
        axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        shape = {"arrowstyle": "-|>", "color": "#444444", "shrinkA": 1, "shrinkB": 1}
        axes.annotate("", xy=end, xytext=start, arrowprops=shape)

    axes.text(2, 21, "x", fontsize=13, ha="center", va="center")
    axes.text(2, 15, f"(…, {in_features})", fontsize=8, ha="center", va="center")
    box(24, 33, 22, f"W, frozen\n({out_features}, {in_features})", COLORS["base"])
    box(12, 9, 16, f"A\n({rank}, {in_features})", COLORS["lora"])
    box(35, 9, 16, f"B\n({out_features}, {rank})", COLORS["lora"])
    axes.text(54.5, 9, "· s", fontsize=11, ha="left", va="center")
    axes.text(64, 21, "+", fontsize=16, ha="center", va="center")
    box(71, 21, 11, f"· g\n({out_features},)", COLORS["dora"])
    axes.text(88, 21, "+ bias", fontsize=10, ha="center", va="center")
    axes.text(97.5, 21, "y", fontsize=13, ha="center", va="center")
    axes.text(97.5, 15, f"(…, {out_features})", fontsize=8, ha="center", va="center")
    for start, end in [
        ((4, 23), (23, 33)),
        ((4, 19), (11, 10)),
        ((29, 9), (34, 9)),
        ((58, 11), (62.5, 18)),
        ((47, 33), (62.5, 24)),
        ((66, 21), (70, 21)),
        ((83, 21), (84.5, 21)),
        ((91.5, 21), (96, 21)),
    ]:
        arrow(start, end)
    axes.text(
        76.5,
        34,
        "$g = m\\,/\\,\\|W + sBA\\|_{row}$\nno gradient through the norm",
        fontsize=9,
        ha="center",
    )
    arrow((76.5, 33), (76.5, 26))
    axes.set_title(
        "g scales both paths together; the bias joins after it, never scaled", fontsize=11
    )
    figure.set_label(
        "Diagram: x goes through the frozen W and, beside it, through A, B and the factor s. "
        "The two results are added, multiplied by g, one factor for each output, and then the "
        "bias is added."
    )
    return figure


def gradient_split(angle: float = 50.0) -> Figure:
    """The detached gradient of a row v', its part across the row (the full one), and the rest.

    Args:
        angle: between the step (minus the gradient) and v', in degrees.
    """
    radians = math.radians(angle)
    row, step = 2.0, 1.0  # v' lies along the first axis; the step starts at its tip
    along, across = step * math.cos(radians), step * math.sin(radians)
    norms = {"full": math.hypot(row, across), "detached": math.hypot(row + along, across)}
    cosine = abs(math.sin(radians))

    figure = new_figure(8.4, 4.0)
    plane, curve = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    circle = [math.radians(degree) for degree in range(-60, 61)]
    plane.plot(
        [row * math.cos(t) for t in circle],
        [row * math.sin(t) for t in circle],
        color=COLORS["base"],
        linewidth=1,
    )

    def arrow(
        start: tuple[float, float], end: tuple[float, float], color: str, width: float
    ) -> None:
        shape = {"arrowstyle": "-|>", "color": color, "linewidth": width, "mutation_scale": 14}
        plane.annotate("", xy=end, xytext=start, arrowprops={**shape, "shrinkA": 0, "shrinkB": 0})

    tip = (row, 0.0)
    arrow((0, 0), tip, "#000000", 2.4)
    arrow(tip, (row + along, across), PAIR[1], 2.6)
    if abs(across) > 1e-9:
        arrow(tip, (row, across), PAIR[0], 2.6)
    plane.plot([row, row + along], [across, across], color="#555555", linestyle=":", linewidth=1.2)
    handles = [
        Line2D([], [], color="#000000", linewidth=2.4),
        Line2D([], [], color=PAIR[1], linewidth=2.6),
        Line2D([], [], color=PAIR[0], linewidth=2.6),
        Line2D([], [], color=COLORS["base"], linewidth=1),
    ]
    labels = [
        "row v'",
        f"detached step (eq. 11): ‖v'‖ → {norms['detached']:.2f}",
        f"full step (eq. 6): ‖v'‖ → {norms['full']:.2f}",
        "rows as long as v'",
    ]
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=2, frameon=False)
    plane.set(xlim=(-0.1, 3.3), ylim=(-1.2, 1.25), aspect="equal")
    plane.set(xlabel="along the row", ylabel="across the row")

    angles = list(range(181))
    curve.plot(angles, [math.sin(math.radians(t)) for t in angles], color="#000000", linewidth=1.8)
    curve.plot(angle, cosine, "o", color=PAIR[0], markersize=9)
    curve.set(xlabel="angle of the step to the row (degrees)", xticks=range(0, 181, 45))
    curve.set(ylabel="cos(full, detached)", ylim=(-0.03, 1.08))
    for axes in (plane, curve):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"The full gradient is the part across the row, here {100 * cosine:.0f} % of the detached",
        fontsize=11,
    )
    figure.set_label(
        f"Left: a row v' of length 2 and, from its tip, a detached step of length 1 at "
        f"{angle:.0f} degrees to the row; the full gradient keeps only the part across the row. "
        f"After the step v' has length {norms['detached']:.2f} (detached) or {norms['full']:.2f} "
        f"(full). Right: the cosine between the two gradients is the sine of that angle, here "
        f"{cosine:.2f}."
    )
    return figure


def held_for_backward(full: Mapping[str, int], detached: Mapping[str, int], lora: int) -> Figure:
    """Bytes that autograd holds until the backward pass, with and without the norm's gradient.

    Args:
        full, detached: form of the layer -> bytes, for the same forms.
        lora: bytes of LoRA, for comparison.
    """
    mib = {form: (full[form] / 2**20, detached[form] / 2**20) for form in full}
    figure = new_figure(7.4, 1.3 + 0.75 * len(mib))
    axes = figure.subplots()
    for place, pair in enumerate(mib.values()):
        for offset, value, color in zip((-0.19, 0.19), pair, PAIR, strict=True):
            bar = axes.barh(place + offset, value, color=color, height=0.36)
            axes.bar_label(bar, fmt=" %.2f", fontsize=9)
    bar = axes.barh(len(mib), lora / 2**20, color=COLORS["lora"], height=0.36)
    axes.bar_label(bar, fmt=" %.3f", fontsize=9)
    axes.set_yticks(range(len(mib) + 1), [*mib, NAMES["lora"]])
    axes.invert_yaxis()
    most = max(value for pair in mib.values() for value in pair)
    axes.set(xlabel="held for the backward pass (MiB)", xlim=(0, 1.12 * most))
    handles = [Patch(color=color) for color in PAIR]
    axes.legend(handles, ["full gradient (eq. 6)", "norm detached (eq. 11)"], frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    saved = ", ".join(f"{first - second:.2f}" for first, second in mib.values())
    axes.set_title(f"From the top, detaching the norm saves {saved} MiB", fontsize=10.5)
    figure.set_label(
        "Bars of the memory held for the backward pass, full gradient against detached norm: "
        + "; ".join(f"{form} {pair[0]:.2f} against {pair[1]:.2f} MiB" for form, pair in mib.items())
        + f"; LoRA {lora / 2**20:.3f} MiB."
    )
    return figure


def singular_values(spectra: Mapping[str, Tensor]) -> Figure:
    """The singular values of two matrices with the same entries: transposed and reshaped.

    Args:
        spectra: name -> singular values, largest first, as torch.linalg.svdvals returns them.
    """
    figure = new_figure(7.4, 3.6)
    axes = figure.subplots()
    ranks = {}
    styles = zip(spectra.items(), PAIR, "os", strict=True)
    for (name, values), color, marker in styles:
        values = values.detach().cpu().double()
        ranks[name] = int((values > 1e-10 * values.max()).sum())
        number = range(1, len(values) + 1)
        axes.plot(number, values, marker, color=color, markersize=5)
        axes.plot([], [], marker, color=color, label=f"{name}: rank {ranks[name]}")
    axes.set(xlabel="number of the singular value", ylabel="singular value")
    axes.axhline(0, color="#dddddd", linewidth=0.8, zorder=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    (first, low), (second, high) = ranks.items()
    axes.set_title(f"The same entries: rank {low} by {first}, rank {high} by {second}", fontsize=11)
    figure.set_label(
        f"Singular values of one product, by {first} and by {second}: {low} and {high} of them "
        "are above zero."
    )
    return figure


def magnitude_share(ranks: Sequence[int], of_lora: Sequence[float], of_model: float) -> Figure:
    """What the magnitudes add, in percent of LoRA's parameters and of the whole model's.

    Args:
        ranks: LoRA's ranks.
        of_lora: the magnitudes in percent of LoRA's parameters, one number for each rank.
        of_model: the magnitudes in percent of the model's parameters, the same at every rank.
    """
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    places = range(len(ranks))
    axes.plot(places, of_lora, "o-", color=COLORS["lora"], label="in percent of LoRA's parameters")
    label = "in percent of the model's parameters"
    axes.plot(places, [of_model] * len(ranks), "s-", color=COLORS["base"], label=label)
    for place, share in zip(places, of_lora, strict=True):
        axes.annotate(
            f"{share:.3g}", (place, share), xytext=(0, 7), textcoords="offset points", ha="center"
        )
    axes.annotate(
        f"{of_model:.4f}",
        (0, of_model),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
    )
    axes.set_yscale("log")
    axes.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axes.set_xticks(places, [str(rank) for rank in ranks])
    axes.set(xlabel="rank", ylabel="percent", ylim=(of_model / 2.5, 3 * max(of_lora)))
    axes.legend(frameon=False, loc="center right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"The same m is {of_model:.3f} % of the model and "
        f"{of_lora[-1]:.3g} to {of_lora[0]:.3g} % of LoRA",
        fontsize=11,
    )
    figure.set_label(
        f"What the magnitudes add, by rank: {of_model:.4f} percent of the model at every rank; "
        + ", ".join(
            f"{share:.3g} percent of LoRA at rank {rank}"
            for rank, share in zip(ranks, of_lora, strict=True)
        )
        + "."
    )
    return figure


# ---- Lesson 4: a whole model, trained and compared ----

WRONG = "#D55E00"


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
            axes.imshow(seen.pictures[column], cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            right = answers[column] == seen.y[column]
            axes.set_title(
                f"reads {answers[column]}" + ("" if right else " ✗"),
                fontsize=9,
                color="black" if right else WRONG,
            )
        grid[row, 0].set_ylabel(title, fontsize=9)
    score = [100 * float((answers == images.y).double().mean()) for answers in (before, after)]
    figure.suptitle(
        f"The base reads {score[0]:.0f} % of {len(images)} images, after the {name} "
        f"{score[1]:.0f} %",
        fontsize=11,
    )
    figure.set_label(
        f"Eight digits of 8 by 8 pixels and the same after the {name}, each with the base's "
        f"answer. It reads {score[0]:.0f} percent of {len(images)} images before and "
        f"{score[1]:.0f} percent after."
    )
    return figure


def learning_rate_curves(comparison: Comparison) -> Figure:
    """Validation accuracy against the learning rate, the mean over the seeds and its error.

    Drawn are the rates that were tried on every seed; a ring marks each seed's choice.
    """
    figure = new_figure(7.4, 4.0)
    axes = figure.subplots()
    best = {}
    for k, (name, results) in enumerate(comparison.results.items()):
        rates = sorted(set.intersection(*(set(result.validation) for result in results)))
        points = [mean_and_error([r.validation[rate] for r in results]) for rate in rates]
        best[name] = max(zip(points, rates, strict=True))[1]
        axes.errorbar(
            [rate * 1.02 ** (k - 1.5) for rate in rates],  # beside one another
            [mean for mean, _ in points],
            [error for _, error in points],
            marker=MARKERS[k % len(MARKERS)],
            color=COLORS[name],
            markersize=5,
            capsize=2,
            label=f"{NAMES[name]}: best at {best[name]:g}",
        )
    axes.set(xscale="log", xlabel="learning rate of Adam", ylabel="validation accuracy (%)")
    ticks = sorted(
        {rate for rows in comparison.results.values() for r in rows for rate in r.validation}
    )
    shown = [t for t in ticks if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    same = len(set(best.values())) == 1
    axes.set_title(
        f"The best mean lies at {next(iter(best.values())):g} for all methods"
        if same
        else "Where the best learning rate lies depends on the method",
        fontsize=11,
    )
    said = ", ".join(f"{NAMES[name]} at {rate:g}" for name, rate in best.items())
    figure.set_label(
        f"Validation accuracy against the learning rate, mean of {len(comparison.seeds)} seeds "
        f"with standard errors. The best means: {said}."
    )
    return figure


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
        right.plot(numbers, validation, color=COLORS[name], label=NAMES[name])
        right.plot(kept[name], min(validation), "o", color=COLORS[name], fillstyle="none")
        final[name] = history.epochs[-1].train_loss
        lowest[name] = min(validation)
    left.set(yscale="log", ylabel="loss (nats, log scale)")
    left.set_title("training images", fontsize=10)
    right.set(yscale="log", yticks=[0.1, 0.2, 0.5, 1, 2, 5])
    right.set_title("validation images (○ epoch kept)", fontsize=10)
    right.set_ylim(min(lowest.values()) / 1.3)
    for axes in (left, right):
        axes.set(xlabel="epoch")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9)
    said = ", ".join(f"{NAMES[name]} {number}" for name, number in kept.items())
    closest = [NAMES[min(losses, key=losses.__getitem__)] for losses in (final, lowest)]
    finding = f"{closest[0]} fits training and validation images closest"
    if closest[0] != closest[1]:
        finding = (
            f"{closest[0]} fits the training images closest, {closest[1]} the validation images"
        )
    figure.suptitle(f"Seed {comparison.seeds[0]}: {finding}", fontsize=11)
    figure.set_label(
        f"Loss by epoch on training and validation images, seed {comparison.seeds[0]}. Epochs "
        f"kept: {said}."
    )
    return figure


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
        axes.text(
            1.01, row, d.verdict, transform=axes.get_yaxis_transform(), va="center", fontsize=9
        )
        said.append(
            f"{NAMES[first]} minus {NAMES[second]}: {d.low:.1f} to {d.high:.1f}, {d.verdict}"
        )
    axes.axvline(0, color="black", linewidth=0.8)
    names = [f"{NAMES[first]}\nminus {NAMES[second]}" for first, second in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("difference in test accuracy (percentage points)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles: list[Any] = [
        Line2D([], [], marker="o", color="#777777", linestyle="", markersize=4, label="one seed"),
        Line2D([], [], marker="D", color="#333333", linewidth=2.4, label="mean, 95 % interval"),
        Patch(color="#eeeeee", label="too small to detect (power 80 %)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    found = sum("detected" not in line for line in said)
    axes.set_title(
        f"{found} of {len(pairs)} differences are detected with {len(comparison.seeds)} seeds",
        fontsize=11,
    )
    figure.set_label("Paired differences in percentage points. " + "; ".join(said) + ".")
    return figure


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
    detectable = [detectable_difference(spread / n**0.5, n) for n in counts]
    axes.loglog(counts, detectable, "o-", color=COLORS["dora"], markersize=4)
    needed = {name: seeds_to_detect(level, spread) for name, level in reported.items()}
    for name, level in reported.items():
        axes.axhline(level, color="#555555", linewidth=1, linestyle="--", zorder=0)
        label = f"{name}: {level:g} points, {needed[name]} seeds"
        if needed[name] < 20:  # then the curve is below the level on the right, else above it left
            axes.text(counts[-1], level * 1.03, label, ha="right", va="bottom", fontsize=9)
        else:
            axes.text(counts[0], level / 1.06, label, ha="left", va="top", fontsize=9)
    axes.set(xlabel="seeds", ylabel="smallest difference detected\n(percentage points)")
    axes.set_xticks(
        [2, 5, 10, 20, 50, 100, 200, 500], ["2", "5", "10", "20", "50", "100", "200", "500"]
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0.8 * min([detectable[-1], *reported.values()]))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    five = detectable[counts.index(5)]
    axes.set_title(
        f"With a spread of {spread:.2g} points, 5 seeds detect {five:.2g} points and more",
        fontsize=11,
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
        right.text(k, size / 1000, f"{size / 1000:.0f}", ha="center", va="bottom", fontsize=9)
    right.set(ylabel="kB (1000 bytes)", title="training state")
    for axes in (left, right):
        axes.title.set_fontsize(9)
        axes.set_xticks(
            range(len(names)), [NAMES[n].replace(" ", "\n", 1) for n in names], fontsize=8
        )
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    base = sum(comparison.shifted) / len(comparison.shifted)
    means = {name: sum(v) / len(v) for name, v in zip(names, accuracies, strict=True)}
    figure.suptitle(
        f"{comparison.shift}: from {base:.0f} % to "
        + ", ".join(f"{mean:.1f} % ({NAMES[name]})" for name, mean in means.items()),
        fontsize=10,
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


# ---- Lesson 5: how magnitude and direction move ----


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
    one_line = {label: _one_line(label) for label in losses}
    axes.set_title(
        f"From {before:.2f} before adapting; lowest is {one_line[best]} with {means[best]:.3f}",
        fontsize=10,
    )
    figure.set_label(
        f"Test loss after adapting, {len(values[0])} seeds each, {before:.2f} before. "
        + ", ".join(f"{one_line[label]} {mean:.3f}" for label, mean in means.items())
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


# ---- Checks: an answer beside its target ----


def yours_beside_target(yours: Tensor, target: Tensor) -> Figure:
    """An answer, the right one and their difference, three matrices in the same colours.

    Args:
        yours, target: two-dimensional, of the same shape, on the CPU; a NaN stays white.
    """
    yours, target = yours.double(), target.double()
    panels = {"yours": yours, "target": target, "yours - target": yours - target}
    limit = float(torch.stack([yours, target]).nan_to_num(0, 0, 0).abs().max()) or 1.0
    figure = new_figure(7.0, 2.6)
    all_axes = figure.subplots(1, 3)
    for axes, (name, value) in zip(all_axes, panels.items(), strict=True):
        image = axes.imshow(value.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(title=name, xlabel="column", ylabel="row")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        for row, entries in enumerate(value.tolist() if value.numel() <= 30 else []):
            for column, entry in enumerate(entries):
                c = "white" if abs(entry) > 0.6 * limit else "black"
                axes.text(column, row, f"{entry:.2g}", ha="center", va="center", c=c, fontsize=8)
    figure.colorbar(image, ax=list(all_axes), shrink=0.8, label="entry")
    off = ~((yours - target).abs() <= 1e-5 * limit)
    finding = f"{int(off.sum())} of {off.numel()} entries are off"
    figure.suptitle(finding)
    figure.set_label(f"Heat maps of your matrix, the right one and the difference: {finding}.")
    return figure


# ---- Lesson 6: what the layers cost ----

BENCH_STYLE = {
    "linear": ("frozen nn.Linear", COLORS["base"], "s"),
    "PEFT LoRA": ("LoRA, PEFT", "#56B4E9", "v"),
    "DoRA": ("DoRA, ours", COLORS["dora"], "o"),
    "DoRA cached": ("DoRA, ours, g kept", COLORS["dora_half"], "o"),
    "DoRA merged": ("DoRA, ours, merged", "#F0E442", "o"),
    "torchtune DoRA": ("DoRA, torchtune", "#CC79A7", "D"),
    "PEFT DoRA": ("DoRA, PEFT", "#009E73", "^"),
}


def bench_ratios(report: Mapping[str, Any]) -> Figure:
    """Times of `minidora bench layers` as ratios to our LoRA, for a training step and one token."""
    results = report["results"]
    works = ("training step", "one token")
    keys = list(dict.fromkeys((r["features"], r["tokens"], r["rank"]) for r in results))
    figure = new_figure(8.2, 1.6 + 0.42 * len(keys))
    worst: dict[str, float] = {}
    for axes, work in zip(figure.subplots(1, 2, sharey=True), works, strict=True):
        for contender, (name, color, marker) in BENCH_STYLE.items():
            rows = [r for r in results if r["work"] == work and r["contender"] == contender]
            if not rows:
                continue
            places = [keys.index((r["features"], r["tokens"], r["rank"])) for r in rows]
            low, middle, high = zip(*(r["ratio"] for r in rows), strict=True)
            axes.plot(middle, places, marker, color=color, label=name, markeredgecolor="black",
                      markeredgewidth=0.4)  # fmt: skip
            axes.hlines(places, low, high, color=color, linewidth=2, zorder=0)
            worst[f"{work} {contender}"] = max(middle)
        axes.axvline(1.0, color=COLORS["lora"], linewidth=1.5, label="LoRA, ours")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 3, 5, 10, 20, 50, 100]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(f"{work}: time / LoRA's")
        axes.grid(axis="x", which="both", alpha=0.25)
    axes = figure.axes[0]
    axes.set_yticks(range(len(keys)), [f"{f} features, {t} tokens, r {r}" for f, t, r in keys])
    axes.set_ylim(len(keys) - 0.5, -0.5)
    handles = {
        label: handle
        for ax in figure.axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    ours, theirs = worst["training step DoRA"], worst.get("training step PEFT DoRA")
    what = "Compiled, a" if report["machine"]["mode"] == "compiled" else "A"
    finding = f"{what} training step of our DoRA takes at most {ours:.2f} times LoRA's"
    if theirs is not None:
        finding += f", PEFT's up to {theirs:.1f} times"
    figure.suptitle(finding, fontsize=11)
    figure.set_label(
        f"{finding}. Two panels of ratios to our LoRA on a logarithmic axis, a training step and "
        f"one token, one row for each of {len(keys)} shapes, quartiles as bars."
    )
    return figure


def cost_ladder(costs: Mapping[str, tuple[int, int, int]]) -> Figure:
    """What a training step costs, form by form: FLOPs, bytes held and most bytes alive.

    Args:
        costs: form -> (FLOPs, bytes held for the backward pass, peak bytes). First LoRA, the
            yardstick; then the forms from the definition to the package's layer.
    """
    lora, start, *_, end = costs
    panels = (
        ("FLOPs / LoRA's", [flops / costs[lora][0] for flops, _, _ in costs.values()], "%.2f"),
        ("held for backward (MiB)", [held / 2**20 for _, held, _ in costs.values()], "%.2f"),
        ("most alive at once (MiB)", [peak / 2**20 for *_, peak in costs.values()], "%.1f"),
    )
    figure = new_figure(9.2, 1.3 + 0.36 * len(costs))
    colors = [COLORS["lora"], *[COLORS["base"]] * (len(costs) - 2), COLORS["dora"]]
    for axes, (label, values, form) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        bars = axes.barh(range(len(costs)), values, color=colors, height=0.62)
        axes.bar_label(bars, fmt=f" {form}", fontsize=8.5)
        axes.set(xlabel=label, xlim=(0, 1.28 * max(values)))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    axes = figure.axes[0]
    axes.set_yticks(range(len(costs)), list(costs), fontsize=9)
    axes.invert_yaxis()
    flops, held, peak = ([values[1], values[-1]] for _, values, _ in panels)
    figure.suptitle(
        f"From the definition to the layer: FLOPs {flops[0]:.2f} → {flops[1]:.2f} times LoRA's, "
        f"held {held[0]:.1f} → {held[1]:.1f} MiB, peak {peak[0]:.0f} → {peak[1]:.0f} MiB",
        fontsize=11,
    )
    rows = zip(costs, *(values for _, values, _ in panels), strict=True)
    figure.set_label(
        f"Bars for each form, from {start} to {end}, beside {lora}: "
        + "; ".join(
            f"{name}: FLOPs {f:.2f} times, held {h:.2f} MiB, peak {p:.1f} MiB"
            for name, f, h, p in rows
        )
        + "."
    )
    return figure


def bytes_alive(histories: Mapping[str, tuple[Sequence[int], int]]) -> Figure:
    """Memory during one training step, operation by operation.

    Args:
        histories: form -> (LiveBytes.history of a step, operations in its forward pass).
    """
    figure = new_figure(8.2, 3.6)
    axes = figure.subplots()
    colors = (COLORS["lora"], "#000000", "#CC79A7", "#009E73", COLORS["dora"])
    peaks: dict[str, float] = {}
    for (name, (history, forward)), color in zip(histories.items(), colors, strict=False):
        mib = [size / 2**20 for size in [0, *history]]
        backward = len(history) - forward
        # The forward pass from 0 to 1, the backward pass from 1 to 2, whatever their operations.
        progress = [i / forward for i in range(forward)]
        progress += [1 + i / backward for i in range(backward + 1)]
        peaks[name] = max(mib)
        axes.plot(progress, mib, color=color, drawstyle="steps-post", lw=1.8, label=name)
    axes.axvline(1, color=COLORS["base"], lw=1, zorder=0)
    axes.set_xticks([0.5, 1.5], ["forward pass", "backward pass"])
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="alive (MiB)", xlim=(0, 2), ylim=(0, 1.05 * max(peaks.values())))
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    first, *_, last = peaks
    shown = {first, max(peaks, key=peaks.__getitem__), last}
    axes.set_title(
        "Most alive at once in a training step: "
        + ", ".join(f"{name} {peak:.1f} MiB" for name, peak in peaks.items() if name in shown),
        fontsize=11,
    )
    figure.set_label(
        "Steps of the memory alive in one forward and backward pass; the most at once is "
        + ", ".join(f"{peak:.1f} MiB for {name}" for name, peak in peaks.items())
        + "."
    )
    return figure


def digits_lost(
    residuals: Sequence[float], errors: Mapping[str, Sequence[float]], expected: Sequence[float]
) -> Figure:
    """Error of the norm of W + s B A where the sum nearly cancels.

    Args:
        residuals: ||W + s B A|| / ||W||, falling.
        errors: way to compute the norm -> its relative error at each residual. The first is the
            factored formula, the last the package's.
        expected: what the arithmetic says of the factored formula.
    """
    figure = new_figure(7.6, 3.8)
    axes = figure.subplots()
    axes.plot(residuals, expected, color=COLORS["base"], lw=5, alpha=0.5,
              label="eps ||W||² / (2 ||W + s B A||²)")  # fmt: skip
    styles = (("s", "#CC79A7", 5), ("^", "#009E73", 10), ("o", COLORS["dora"], 5))
    for (name, values), (marker, color, size) in zip(errors.items(), styles, strict=True):
        axes.plot(residuals, values, marker, ls="-", lw=1, color=color, markersize=size, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.axhline(1, color="#dddddd", lw=1, zorder=0)
    axes.set(xlabel="what is left of W: ||W + s B A|| / ||W||", ylabel="relative error of the norm")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    (formula, lost), *_, (ours, kept) = errors.items()
    place = min(range(len(residuals)), key=lambda i: abs(math.log(residuals[i] / 0.01)))
    left = f"{100 * residuals[place]:.2g} %"
    axes.set_title(
        f"Where {left} of W is left, {formula} is off by {lost[place]:.0e}, "
        f"{ours} by {kept[place]:.0e}",
        fontsize=11,
    )
    figure.set_label(
        f"Relative error of the norm against what is left of W, both logarithmic. At {left}: "
        + ", ".join(f"{name} {values[place]:.1e}" for name, values in errors.items())
        + f". At the smallest residual, {residuals[-1]:g}: "
        + ", ".join(f"{name} {values[-1]:.1e}" for name, values in errors.items())
        + "."
    )
    return figure


def roundings(errors: Mapping[str, Mapping[str, float]], counted: Mapping[str, int]) -> Figure:
    """Error of half-precision forms, in units of a plain layer's, beside the root of the roundings.

    Args:
        errors: form -> magnitudes -> relative RMS error / that of a plain layer.
        counted: form -> roundings that an output goes through.
    """
    figure = new_figure(8.0, 1.6 + 0.42 * len(errors))
    axes = figure.subplots()
    for row, (form, values) in enumerate(errors.items()):
        expected = math.sqrt(counted[form])
        axes.vlines(expected, row - 0.32, row + 0.32, color=COLORS["full"], lw=2)
        axes.text(expected, row - 0.38, f"√{counted[form]}", ha="center", fontsize=9)
        styles = zip(values.values(), ALTERNATIVES[1:], "o^s", (0.16, 0, -0.16), strict=False)
        for value, color, marker, offset in styles:
            axes.plot(value, row + offset, marker, color=color, markersize=7)
    axes.axvline(1, color=COLORS["base"], lw=1.2, zorder=0)
    axes.set_yticks(range(len(errors)), list(errors), fontsize=9)
    axes.set_ylim(len(errors) - 0.5, -0.75)
    axes.set_xlim(0.95, 2.1)
    axes.set_xlabel("relative RMS error / that of a plain bf16 nn.Linear")
    names = list(next(iter(errors.values())))
    handles = [
        Line2D([], [], color=color, marker=marker, ls="", markersize=7)
        for color, marker in zip(ALTERNATIVES[1 : 1 + len(names)], "o^s", strict=False)
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    worst = {form: max(values.values()) for form, values in errors.items()}
    most, least = max(worst, key=worst.__getitem__), min(worst, key=worst.__getitem__)
    axes.set_title(
        f"{most}: up to {worst[most]:.2f} times a plain layer's error; {least}: {worst[least]:.2f}",
        fontsize=11,
    )
    figure.set_label(
        "Error in units of a plain bf16 layer's, beside the root of the number of roundings: "
        + "; ".join(
            f"{form}, √{counted[form]}: "
            + ", ".join(f"{value:.2f} {name}" for name, value in values.items())
            for form, values in errors.items()
        )
        + "."
    )
    return figure


def step_flops(in_features: int, out_features: int, rank: int, tokens: int) -> dict[str, int]:
    """FLOPs of the products in one training step of a layer in the middle of a model, by form.

    A product (a, b) x (b, c) counts 2 a b c. The gradient of x is needed, that of W is not.
    """
    size = in_features * out_features
    layer, low = 2 * tokens * size, 2 * tokens * rank * (in_features + out_features)
    product = 2 * size * rank  # B A
    lora = 2 * layer + 3 * low
    return {
        "frozen nn.Linear": 2 * layer,
        "LoRA": lora,
        "DoRA, ours": lora + product + 2 * rank**2 * (in_features + out_features),
        "DoRA, PEFT": lora + product + 2 * in_features**2 * rank,  # the identity matrix times A
        "DoRA, merged form": 3 * layer + 3 * product,
    }


def flops_by_tokens(in_features: int = 4096, out_features: int = 4096, rank: int = 16) -> Figure:
    """FLOPs of a training step, in units of LoRA's, over the number of tokens (step_flops)."""
    tokens = [2**k for k in range(15)]
    figure = new_figure(7.8, 3.8)
    axes = figure.subplots()
    styles = {
        "DoRA, merged form": ("#000000", "s"),
        "DoRA, PEFT": ("#009E73", "^"),
        "DoRA, ours": (COLORS["dora"], "o"),
        "frozen nn.Linear": (COLORS["base"], "v"),
    }
    counts = [step_flops(in_features, out_features, rank, t) for t in tokens]
    ratios = {name: [count[name] / count["LoRA"] for count in counts] for name in styles}
    for name, (color, marker) in styles.items():
        axes.plot(tokens, ratios[name], marker, ls="-", color=color, markersize=4.5, label=name)
    axes.axhline(1, color=COLORS["lora"], lw=1.5, label="LoRA", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens[::2], [f"{t:,}" for t in tokens[::2]])
    top = max(max(values) for values in ratios.values())
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
    axes.set_yticks([tick for tick in ticks if tick <= top], minor=False)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel="tokens in a step", ylabel="FLOPs / LoRA's")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    place = tokens.index(1024)
    ours, theirs = ratios["DoRA, ours"], ratios["DoRA, PEFT"]
    layer = f"{in_features} → {out_features}, rank {rank}"
    axes.set_title(
        f"{layer}: the norm adds {100 * (ours[place] - 1):.2g} % to LoRA's step with 1,024 tokens\n"
        f"and makes it {ours[0]:.1f} times as large with one (PEFT {theirs[0]:.1f})",
        fontsize=11,
    )
    figure.set_label(
        f"FLOPs of a training step in units of LoRA's for a layer {layer}, from 1 to 16,384 tokens,"
        " both axes logarithmic. With 1 and with 1,024 tokens: "
        + "; ".join(
            f"{name} {values[0]:.2f}, {values[place]:.3f}" for name, values in ratios.items()
        )
        + "."
    )
    return figure


def scaling_paper(rows: Mapping[str, Sequence[float]]) -> Figure:
    """Seconds per step of four ways to compute DoRA, in units of PEFT's.

    Args:
        rows: GPU and model -> seconds of PEFT, dense B A, factored norm in eager mode, fused.
    """
    names = ("PEFT: identity matrix", "dense B A", "factored norm, eager", "factored norm, fused")
    figure = new_figure(8.0, 1.7 + 0.34 * len(rows))
    axes = figure.subplots()
    styles = zip(names, ("#009E73", "#000000", COLORS["dora"], "#CC79A7"), "^soD", strict=True)
    shares = [100 * (peft - dense) / (peft - fused) for peft, dense, _, fused in rows.values()]
    for number, (name, color, marker) in enumerate(styles):
        values = [seconds[number] / seconds[0] for seconds in rows.values()]
        axes.plot(values, range(len(rows)), marker, color=color, label=name, markersize=7)
    axes.hlines(range(len(rows)), 0.5, 1.0, color="#eeeeee", zorder=0)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("time of a step / PEFT's")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8.5, handletextpad=0.2)
    figure.suptitle(
        f"{min(shares):.0f} to {max(shares):.0f} % of the time saved is saved "
        "by leaving out the identity matrix",
        fontsize=11,
    )
    figure.set_label(
        "Time of a step in units of PEFT's, for "
        + "; ".join(
            f"{row}: dense {dense / peft:.2f}, factored eager {eager / peft:.2f}, "
            f"fused {fused / peft:.2f}"
            for row, (peft, dense, eager, fused) in rows.items()
        )
        + f". The dense form alone saves {min(shares):.0f} to {max(shares):.0f} percent of what "
        "the fused one saves."
    )
    return figure
