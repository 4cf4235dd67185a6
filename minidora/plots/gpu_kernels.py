"""Launches, bytes and kernels: the figures of lesson 7."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from minidora.plots.style import COLORS, headline, new_figure, rows_only, styled

FORM_STYLE = {
    "linear": (COLORS["base"], "s"),
    "LoRA": (COLORS["lora"], "o"),
    "PEFT LoRA": ("#56B4E9", "v"),
    "PEFT DoRA": ("#009E73", "^"),
    "DoRA, first form": ("#CC79A7", "D"),
    "DoRA": (COLORS["dora"], "o"),
    "DoRA, norms reused": (COLORS["dora_half"], "P"),
}
"""Colour and marker of each form of a layer on a GPU."""


def _in_a_title(name: str) -> str:
    """Without a comma, which would read as the next item of a list."""
    form, _, kind = name.partition(", ")
    return f"{form} ({kind})" if kind else form


@styled
def launches_and_bytes(forms: Mapping[str, tuple[int, float]]) -> Figure:
    """What one training step starts and moves, form by form.

    Args:
        forms: form -> (launches, MiB moved). "LoRA" is the yardstick.
    """
    panels = (
        ("launches", [float(launches) for launches, _ in forms.values()], "%.0f"),
        ("moved to and from memory (MiB)", [mib for _, mib in forms.values()], "%.0f"),
    )
    figure = new_figure(8.6, 1.3 + 0.36 * len(forms))
    colors = [FORM_STYLE[name][0] for name in forms]
    for axes, (label, values, form) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        bars = axes.barh(range(len(forms)), values, color=colors, height=0.62)
        axes.bar_label(bars, fmt=f" {form}")
        axes.set(xlabel=label, xlim=(0, 1.16 * max(values)))
        rows_only(axes)
    axes = figure.axes[0]
    axes.set_yticks(range(len(forms)), list(forms))
    axes.invert_yaxis()
    lora = forms["LoRA"]
    most = max(forms, key=lambda name: forms[name][0])
    widest = max(forms, key=lambda name: forms[name][1])
    headline(
        figure,
        f"{_in_a_title(most)} starts {forms[most][0] / lora[0]:.1f} times LoRA's kernels, "
        f"{_in_a_title(widest)} moves {forms[widest][1] / lora[1]:.1f} times its bytes",
    )
    figure.set_label(
        "Bars of kernels started and of MiB moved in one training step: "
        + "; ".join(f"{name}: {count} and {mib:.0f} MiB" for name, (count, mib) in forms.items())
        + "."
    )
    return figure


@styled
def roofline(
    forms: Mapping[str, tuple[float, float, float]], card: str, peak: float, bandwidth: float
) -> Figure:
    """FLOPs a second against FLOPs for each byte moved, below a card's two limits.

    Args:
        forms: form -> (FLOPs, bytes, measured seconds) of one training step.
        peak: FLOPs a second of the card. bandwidth: bytes a second.
    """
    figure = new_figure(7.8, 4.4)
    axes = figure.subplots()
    points = {
        name: (flops / moved, flops / seconds) for name, (flops, moved, seconds) in forms.items()
    }
    knee = peak / bandwidth
    low = 0.6 * min(knee, *(x for x, _ in points.values()))
    high = 1.6 * max(knee, *(x for x, _ in points.values()))
    axes.plot([low, knee, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12],
              color="#000000", lw=1.8, label=f"{card}: memory, then products")  # fmt: skip
    reached = {}
    for name, (x, y) in points.items():
        color, marker = FORM_STYLE[name]
        ring = {"ms": 16, "mfc": "none", "mew": 2} if name == "LoRA" else {"ms": 8}
        axes.plot(x, y / 1e12, marker, color=color, ls="", label=name, **ring)
        reached[name] = y / min(peak, x * bandwidth)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([50, 100, 200, 500, 1000, 2000]))
    axes.yaxis.set_major_locator(FixedLocator([50, 100, 200, 500, 1000]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set(xlabel="FLOPs for each byte moved", ylabel="TFLOP/s, measured as a CUDA graph")
    figure.legend(loc="outside right center", labelspacing=1.0)
    left = [_in_a_title(name) for name, (x, _) in points.items() if x < knee]
    headline(
        figure,
        f"Left of the knee at {knee:.0f} FLOPs a byte, where memory is the limit: "
        f"{', '.join(left) or 'none'}",
    )
    figure.set_label(
        f"Roofline of an {card}: {bandwidth / 1e12:g} TB/s up to {knee:.0f} FLOPs a byte, then "
        f"{peak / 1e12:g} TFLOP/s. "
        + "; ".join(
            f"{name}: {x:.0f} FLOPs a byte, {y / 1e12:.0f} TFLOP/s, {reached[name]:.0%} of the roof"
            for name, (x, y) in points.items()
        )
        + "."
    )
    return figure


@styled
def tiles(tokens: int, outputs: int, TOKENS: int, OUT: int) -> Figure:
    """The programs of a kernel over a matrix: one tile each, some of it outside."""
    rows, columns = math.ceil(tokens / TOKENS), math.ceil(outputs / OUT)
    figure = new_figure(5.8, 1.2 + 4.4 * rows * TOKENS / (columns * OUT))
    axes = figure.subplots()
    for i in range(rows):
        for j in range(columns):
            shade = "#dbe9f4" if (i + j) % 2 else "#f6e3d4"
            axes.add_patch(
                Rectangle((j * OUT, i * TOKENS), OUT, TOKENS, facecolor=shade, edgecolor="#666666")
            )
            # In the middle of what lies in the matrix, so that its edge crosses no label.
            across = (j * OUT + min((j + 1) * OUT, outputs)) / 2
            down = (i * TOKENS + min((i + 1) * TOKENS, tokens)) / 2
            axes.text(across, down, f"program\n({i}, {j})", ha="center", va="center")
    axes.add_patch(Rectangle((0, 0), outputs, tokens, fill=False, edgecolor="#000000", lw=2.5))
    axes.set(
        xlim=(-0.5, columns * OUT + 0.5), ylim=(rows * TOKENS + 0.5, -0.5),
        xlabel=f"output o, {outputs} of them", ylabel=f"token t, {tokens} of them",
        xticks=[j * OUT for j in range(columns + 1)], yticks=[i * TOKENS for i in range(rows + 1)],
    )  # fmt: skip
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    covered = rows * TOKENS * columns * OUT
    headline(
        figure,
        f"{rows * columns} programs of {TOKENS} x {OUT} cover {tokens} x {outputs}; "
        f"masks leave out {1 - tokens * outputs / covered:.0%} of their lanes",
    )
    figure.set_label(
        f"A matrix of {tokens} tokens and {outputs} outputs under a grid of {rows} x {columns} "
        f"tiles, one for each program, each of {TOKENS} tokens and {OUT} outputs. The last row "
        f"and column of tiles reach over the edge of the matrix, where masks leave lanes out."
    )
    return figure


@styled
def product_errors(errors: Mapping[str, float], needed: float) -> Figure:
    """Largest error of the row norm by the way in which W A^T was computed.

    Args:
        errors: way -> largest relative error against float64.
        needed: the error that the layer may have.
    """
    figure = new_figure(7.6, 1.5 + 0.42 * len(errors))
    axes = figure.subplots()
    places = range(len(errors))
    good = [value <= needed for value in errors.values()]
    for ok, color, marker in ((True, COLORS["lora"], "o"), (False, COLORS["dora"], "X")):
        at = [place for place in places if good[place] is ok]
        axes.plot([list(errors.values())[place] for place in at], at, marker, color=color, ms=9)
    for place, value in enumerate(errors.values()):
        axes.annotate(f"{value:.0e}", (value, place), xytext=(9, 0), textcoords="offset points",
                      va="center")  # fmt: skip
    axes.axvline(needed, color="#000000", lw=1.4)
    axes.annotate(f" allowed: {needed:.0e}", (needed, -0.6), va="center")
    axes.set_xscale("log")
    axes.set_xlim(0.3 * min(errors.values()), 12 * max(errors.values()))
    axes.set_yticks(places, list(errors))
    axes.set_ylim(len(errors) - 0.5, -0.95)
    axes.set_xlabel("largest relative error of a row norm, against float64")
    rows_only(axes)
    fine = [name for name, ok in zip(errors, good, strict=True) if ok]
    headline(figure, f"Accurate enough for the norm: {', '.join(fine) or 'none'}")
    figure.set_label(
        f"Largest relative error of a row norm, on a logarithmic axis, {needed:.0e} allowed: "
        + "; ".join(f"{name}: {value:.1e}" for name, value in errors.items())
        + "."
    )
    return figure


@styled
def aims(rows: Sequence[tuple[str, float, Sequence[float]]]) -> Figure:
    """Ratios that were asked for, and those that were measured.

    Args:
        rows: (what, ratio asked for at most, one ratio for each run), only what was measured.
    """
    figure = new_figure(8.8, 1.6 + 0.36 * len(rows))
    axes = figure.subplots()
    met = [all(run <= most for run in runs) for _, most, runs in rows]
    for place, ((_, most, runs), ok) in enumerate(zip(rows, met, strict=True)):
        axes.vlines(most, place - 0.32, place + 0.32, color="#000000", lw=2.2)
        color, marker = (COLORS["lora"], "o") if ok else (COLORS["dora"], "X")
        axes.plot(runs, [place] * len(runs), marker, color=color, ms=8, ls="")
    for ok, name, color, marker in (
        (True, "met in every run", COLORS["lora"], "o"),
        (False, "missed, at least once", COLORS["dora"], "X"),
    ):
        if ok in met:
            axes.plot([], [], marker, color=color, ms=8, ls="", label=name)
    axes.plot([], [], "|", color="#000000", ms=14, mew=2.2, ls="", label="aim")
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlabel("ratio of times, to our LoRA unless a row says otherwise")
    axes.grid(axis="x", color="#e5e5e5", zorder=0)
    axes.set_axisbelow(True)
    rows_only(axes)
    figure.legend(loc="outside lower center", ncols=3)
    headline(figure, f"{sum(met)} of {len(rows)} aims are met in every run")
    figure.set_label(
        "Measured ratios beside aims: "
        + "; ".join(
            f"{label}: {' and '.join(f'{run:.2f}' for run in runs)}, at most {most:.2f} asked"
            for label, most, runs in rows
        )
        + "."
    )
    return figure
