"""What training costs in memory: the figures of lesson 1."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn

from minidora.adapt import adapt
from minidora.memory import QUANTIZATIONS, TrainingMemory, gb, gib, llama, training_memory
from minidora.models import PAPER_TARGETS
from minidora.plots.style import (
    ALTERNATIVES,
    COLORS,
    NAMES,
    headline,
    listed,
    new_figure,
    one_line,
    rows_only,
    styled,
)

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

PRECISIONS = ("float32", "bfloat16", "bfloat16 + masters", *QUANTIZATIONS)
"""How the weights stand in memory_explorer. Masters: float32 copies of what is trained in bf16."""


def smallest_card(count: int) -> int | None:
    """The smallest of GPU_CARDS with room for so many bytes, or None. A card is 1e9 bytes a GB."""
    return next((card for card in GPU_CARDS if count <= card * 1e9), None)


@styled
def training_bill(
    parts: Mapping[str, float], counted: int, cards: Sequence[int] = (24, 80)
) -> Figure:
    """One bar of what training holds, part after part, beside the cards it would have to fit.

    Args:
        parts: name -> GB, in the order in which they are drawn.
        counted: how many of the parts, from the left, make the sum in the title.
        cards: sizes of graphics cards in GB, drawn as lines.
    """
    figure = new_figure(8.2, 2.3)
    axes = figure.subplots()
    left = 0.0
    colors = (COLORS["base"], "#009E73", "#56B4E9", "#CC79A7")
    for number, ((name, size), color) in enumerate(zip(parts.items(), colors, strict=False)):
        axes.barh(0, size, 0.7, left, color=color, edgecolor="white", lw=1.5)
        text = f"{name}\n{size:g} GB"
        axes.text(left + size / 2, 0, text, ha="center", va="center", fontsize=10)
        left += size
        if number + 1 == counted:
            axes.annotate("", (0, 0.5), (left, 0.5), arrowprops={"arrowstyle": "<->"})
            axes.text(left / 2, 0.56, f"{left:g} GB", ha="center", va="top", fontsize=10)
    for card in cards:
        axes.axvline(card, color="black", ls=":", lw=1.2)
        axes.text(card, -0.62, f"{card} GB card", ha="center", va="bottom")
    axes.set(xlim=(0, 1.02 * max(left, *cards)), ylim=(0.85, -0.62), yticks=[])
    axes.set_xlabel("GB (1e9 bytes), without activations")
    axes.spines["left"].set_visible(False)
    names = list(parts)
    first = listed(names[:counted])
    some = sum(list(parts.values())[:counted])
    room = [card for card in cards if left <= card]
    verdict = f"{_card(min(room))} has room" if room else f"too much for {_card(max(cards))}"
    headline(
        figure,
        f"{first[:1].upper()}{first[1:]}: {some:g} GB; "
        f"with {listed(names[counted:])} {left:g} GB, {verdict}",
    )
    figure.set_label(
        "One bar, part after part: "
        + ", ".join(f"{name} {size:g} GB" for name, size in parts.items())
        + f"; together {left:g} GB. Lines at "
        + " and ".join(f"{card} GB" for card in cards)
        + f" mark cards: {verdict}."
    )
    return figure


@styled
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
        axes.text(gb(memory.peak), row, text, va="center")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * gb(widest))
    axes.set_xlabel("GB (1e9 bytes), without activations")
    rows_only(axes)
    handles = [
        Patch(fc="none" if part == "step_temporaries" else color, ec=color, label=name)
        for part, (name, color) in MEMORY_PARTS.items()
    ]
    handles[-1].set_hatch("////")
    figure.legend(handles=handles, ncols=4, loc="outside lower center")
    totals = {name: memory.total for name, memory in rows.items()}
    most, least = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
    headline(
        figure,
        f"{subject}: {gb(totals[most]):.1f} GB with {most},\n"
        f"{gb(totals[least]):.1f} GB with {least}",
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


@styled
def step_timeline(histories: Mapping[str, Sequence[int]], parameters: int) -> Figure:
    """Bytes that are alive only inside step(), operation by operation, a panel for each way.

    Args:
        histories: LiveBytes.history of one step, by implementation.
        parameters: bytes of what is trained, the unit of the vertical axis.
    """
    figure = new_figure(8.2, 3.0)
    panels = figure.subplots(1, len(histories), sharey=True, squeeze=False)[0]
    for axes, (name, history) in zip(panels, histories.items(), strict=True):
        copies = [size / parameters for size in [0, *history, 0]]
        done = [*range(len(history) + 1), len(history)]  # after the last, step() frees the rest
        axes.plot(done, copies, color=ALTERNATIVES[1], drawstyle="steps-post", lw=2, clip_on=False)
        axes.axhline(1, color=COLORS["base"], lw=1, ls=":", zorder=0)
        axes.set_title(f"{name}: {len(history)} operations")
        axes.set(xlabel="operations done in step()", xlim=(0, len(history)), ylim=(0, 1.1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("copies of the parameters")
    peaks = {name: max(history, default=0) / parameters for name, history in histories.items()}
    needs = [f"{name} {peak:.2f}" for name, peak in peaks.items()]
    headline(figure, f"More copies of the parameters inside one step of Adam: {listed(needs)}")
    figure.set_label(
        "Memory that exists only inside step(), in copies of the trained parameters, a panel for "
        f"each way to run it: {', '.join(f'{n} at most {peak:.2f}' for n, peak in peaks.items())}."
    )
    return figure


@styled
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
            axes.text(*middle, text, ha="center", va="center", color=ink)
    axes.set(xlim=(0, len(ways)), ylim=(len(models), 0))
    axes.set_xticks([column + 0.5 for column in range(len(ways))], ways)
    axes.set_yticks([row + 0.5 for row in range(len(models))], models)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    first, last = cards[models[0], ways[0]], cards[models[0], ways[-1]]
    headline(
        figure,
        f"{models[0]}: {_card(first)} has room for {one_line(ways[0])}; "
        f"{_card(last)} for {one_line(ways[-1])}",
    )
    sizes = ", ".join(map(str, GPU_CARDS))
    axes.set_xlabel(
        f"peak inside step(), without activations and the allocator's overhead; cards of {sizes} GB"
    )
    cells = [
        f"{m}, {one_line(w)}: {gb(needs[m][w]):.1f} GB, {_card(cards[m, w])}"
        for m in models
        for w in ways
    ]
    figure.set_label(f"Table of the smallest card with room, of {sizes} GB. {'; '.join(cells)}.")
    return figure


def _card(card: int | None) -> str:
    """With its article: an 8, an 80, but a 16, a 180."""
    return f"a{'n' if str(card).startswith('8') else ''} {card} GB card" if card else _NO_CARD


_NO_CARD = f"no card up to {GPU_CARDS[-1]} GB"


@lru_cache(maxsize=64)  # a slider asks for the same model again, and building it takes as long
def adapted_llama(name: str, method: str, rank: int, precision: str) -> nn.Module:
    """A LLaMA on the meta device, as memory_explorer counts it; ask it, do not change it.

    Raises:
        ValueError: an unknown name, method or precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    model = llama(name, torch.float32 if precision == "float32" else torch.bfloat16)
    if method != "full":
        adapt(model, method, rank=rank, target_modules=PAPER_TARGETS)
    return model


@styled
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
    model = adapted_llama(name, method, rank, precision)
    memory = training_memory(
        model,
        optimizer,
        implementation=implementation,
        master_weights=precision == "bfloat16 + masters",
        quantize=precision if precision in QUANTIZATIONS else None,
    )
    figure = new_figure(8.2, 3.6)
    axes = figure.subplots()
    left = 0
    rows = []
    for row, (part, (label, _)) in enumerate(MEMORY_PARTS.items()):
        size = getattr(memory, part)
        _memory_bar(axes, row, 0, size, part)
        _memory_bar(axes, len(MEMORY_PARTS), left, size, part)
        rows.append(f"{label}\n{_size(size)}")
        left += size
    rows.append(f"together\n{_size(memory.peak)}")
    card = smallest_card(memory.peak)
    limit = max(1.5 * gb(memory.peak), 1.08 * (card or 0))
    right = math.inf
    for size in reversed(GPU_CARDS):
        if size <= limit and right - size > 0.1 * limit:  # else the names would overlap
            right = size
            axes.vlines(size, -0.6, len(MEMORY_PARTS) + 0.5, "black", ":", lw=0.8, zorder=0)
            axes.text(size, -0.65, f"{size} GB card", ha="center", va="bottom")
    axes.set(xlim=(0, limit), ylim=(len(MEMORY_PARTS) + 0.5, -1))
    axes.set_yticks(range(len(rows)), rows)
    rows_only(axes)
    axes.set_xlabel("GB (1e9 bytes), without activations")
    if card:
        verdict = f"fits {_card(card)}"
    else:
        verdict = f"needs {math.ceil(gb(memory.peak) / GPU_CARDS[-1])} cards of {GPU_CARDS[-1]} GB"
    who = NAMES[method] if method == "full" else f"{NAMES[method]} of rank {rank}"
    headline(
        figure,
        f"{name}, {who}, {precision}, {optimizer} ({implementation}): {verdict}",
    )
    parts = [f"{label} {_size(getattr(memory, part))}" for part, (label, _) in MEMORY_PARTS.items()]
    figure.set_label(
        f"Memory of {name}, {who}, {precision}, {optimizer}, {implementation}: {', '.join(parts)}; "
        f"together {_size(memory.peak)}, which {verdict}."
    )
    return figure


def _size(count: int) -> str:
    return f"{gb(count):.2f} GB = {gib(count):.2f} GiB"
