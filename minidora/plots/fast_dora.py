"""What the layers cost: the figures of lesson 6."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from minidora.plots.style import (
    ALTERNATIVES,
    COLORS,
    headline,
    new_figure,
    one_line,
    rows_only,
    styled,
)

BENCH_STYLE = {
    "linear": ("frozen nn.Linear", COLORS["base"], "s"),
    "PEFT LoRA": ("LoRA, PEFT", "#56B4E9", "v"),
    "DoRA": ("DoRA, ours", COLORS["dora"], "o"),
    "DoRA cached": ("DoRA, ours, g kept", COLORS["dora_half"], "o"),
    "DoRA merged": ("DoRA, ours, merged", "#F0E442", "o"),
    "torchtune DoRA": ("DoRA, torchtune", "#CC79A7", "D"),
    "PEFT DoRA": ("DoRA, PEFT", "#009E73", "^"),
    "source form": ("DoRA, the source notebook's form", COLORS["full"], "s"),
}


BENCH_SHOWN = {
    "training step": ("DoRA", "torchtune DoRA", "PEFT DoRA", "source form"),
    "one token": ("DoRA", "DoRA cached", "torchtune DoRA", "PEFT DoRA"),
}
"""The contenders that bench_ratios draws; the report holds more."""


class Timing(Protocol):
    """A row of `minidora bench layers`: minidora.evidence.bench.Result."""

    @property
    def features(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def work(self) -> str: ...
    @property
    def contender(self) -> str: ...
    @property
    def ratio(self) -> tuple[float, float, float]: ...
    @property
    def note(self) -> str: ...


class Timings(Protocol):
    """What `minidora bench layers` measured: minidora.evidence.bench.Report."""

    @property
    def machine(self) -> Any: ...
    @property
    def results(self) -> Sequence[Timing]: ...


@styled
def bench_ratios(report: Timings, work: str = "training step") -> Figure:
    """Times of `minidora bench layers` as ratios to our LoRA, a row for each shape.

    Args:
        report: as bench read it.
        work: "training step", or "one token", where DoRA also keeps g, and a shape is the same
            whatever its tokens: the first of its rows is drawn, and labelled so.

    Raises:
        ValueError: another work, or one that the report does not have.
    """
    results = [r for r in report.results if r.work == work]
    if work not in BENCH_SHOWN or not results:
        raise ValueError(f"work must be one of {', '.join(BENCH_SHOWN)}, got {work!r}")

    def shape(row: Timing) -> str:
        tokens = f"{row.tokens} tokens, " if work == "training step" else ""
        return f"{row.features} features, {tokens}r {row.rank}{row.note}"

    runs = Counter(shape(r) for r in results if r.contender == "DoRA")
    results = list({(r.contender, shape(r)): r for r in reversed(results)}.values())[::-1]
    shapes = list(dict.fromkeys(map(shape, results)))
    middles: dict[str, dict[int, float]] = {}  # contender -> row -> median
    figure = new_figure(8.2, 1.7 + 0.5 * len(shapes))
    axes = figure.subplots()
    shown = [name for name in BENCH_SHOWN[work] if any(r.contender == name for r in results)]
    for k, contender in enumerate(shown):
        name, color, marker = BENCH_STYLE[contender]
        rows = [r for r in results if r.contender == contender]
        places = [shapes.index(shape(r)) for r in rows]
        low, middle, high = zip(*(r.ratio for r in rows), strict=True)
        beside = [place + 0.7 * ((k + 0.5) / len(shown) - 0.5) for place in places]
        axes.hlines(beside, low, high, color=color, lw=2.2)
        axes.plot(middle, beside, marker, color=color, ms=7, label=name)
        middles[contender] = dict(zip(places, middle, strict=True))
    for place in range(1, len(shapes), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#f4f4f4", zorder=0)
    axes.axvline(1.0, color=COLORS["lora"], lw=1.5, label="LoRA, ours")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{work}: time / LoRA's, median and quartiles")
    labels = [f"{name} (first of {runs[name]} runs)" if runs[name] > 1 else name for name in shapes]
    axes.set_yticks(range(len(shapes)), labels)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    rows_only(axes)
    figure.legend(loc="outside lower center", ncols=5)
    ours = middles["DoRA"]
    who = "Compiled, our" if report.machine.mode == "compiled" else "Our"
    what = work if work.startswith("one ") else f"a {work}"
    finding = (
        f"{who} DoRA takes {min(ours.values()):.2f} to {max(ours.values()):.2f} times LoRA's time "
        f"for {what}"
    )
    if "DoRA cached" in middles:
        kept = middles["DoRA cached"].values()
        finding += f", {min(kept):.2f} to {max(kept):.2f} with g kept"
    others = []
    for contender, theirs in middles.items():
        if "ours" not in (name := BENCH_STYLE[contender][0]):
            both = ours.keys() & theirs.keys()
            won = sum(theirs[place] < ours[place] for place in both)
            others.append(f"{name.removeprefix('DoRA, ')} in {won} of {len(both)}")
    if others:
        finding += f".\nShapes with a lower median than ours: {', '.join(others)}"
    headline(figure, finding)
    finding = one_line(finding)
    figure.set_label(
        f"{finding}. Medians with quartiles, in units of our LoRA's time, for "
        + "; ".join(
            f"{BENCH_STYLE[name][0]}: {min(rows.values()):.2f} to {max(rows.values()):.2f}"
            for name, rows in middles.items()
        )
        + f". {len(shapes)} shapes."
    )
    return figure


@styled
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
        axes.bar_label(bars, fmt=f" {form}")
        axes.set(xlabel=label, xlim=(0, 1.28 * max(values)))
        rows_only(axes)
    axes = figure.axes[0]
    axes.set_yticks(range(len(costs)), list(costs))
    axes.invert_yaxis()
    flops, held, peak = ([values[1], values[-1]] for _, values, _ in panels)
    beside = [values[0] for _, values, _ in panels]
    headline(
        figure,
        f"From the definition to the layer: FLOPs {flops[0]:.2f} → {flops[1]:.2f} times {lora}'s; "
        f"held {held[0]:.1f} → {held[1]:.1f} MiB, {lora} {beside[1]:.2f}; "
        f"peak {peak[0]:.1f} → {peak[1]:.1f} MiB, {lora} {beside[2]:.1f}",
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


@styled
def held_by_form(forms: Mapping[str, Mapping[str, tuple[int, str]]]) -> Figure:
    """What autograd holds for the backward pass, tensor by tensor, as bars to scale.

    Args:
        forms: form -> tensor -> (its bytes, what it is held for). Tensors of one name have one
            colour. First LoRA, the yardstick.
    """
    mib = {form: {k: size / 2**20 for k, (size, _) in held.items()} for form, held in forms.items()}
    total = {form: sum(sizes.values()) for form, sizes in mib.items()}
    names = list(dict.fromkeys(name for sizes in mib.values() for name in sizes))
    palette = ("#56B4E9", "#CC79A7", "#F0E442", "#009E73", COLORS["base"])
    colors = dict(zip(names, palette, strict=False))
    figure = new_figure(8.6, 1.2 + 0.62 * len(forms))
    axes = figure.subplots()
    thin = dict.fromkeys(names)  # without a bar that has room for the name
    for row, (form, held) in enumerate(forms.items()):
        left = 0.0
        for name, size in mib[form].items():
            axes.barh(
                row, size, left=left, height=0.42, color=colors[name], edgecolor="black", lw=0.6
            )
            if size > 0.02 * max(total.values()):
                axes.text(left + size / 2, row, name, ha="center", va="center")
                thin.pop(name, None)
            left += size
        why = "; ".join(f"{name}: {reason}" for name, (_, reason) in held.items())
        axes.text(left + 0.15, row, f"{total[form]:.2f}", va="center", fontweight="bold")
        axes.text(0, row - 0.25, why or "nothing", va="bottom")
    axes.set_yticks(range(len(forms)), list(forms))
    axes.set_ylim(len(forms) - 0.6, -0.75)
    unseen = f"; too thin to see: {'; '.join(thin)}" if thin else ""
    axes.set_xlabel(f"held for the backward pass (MiB{unseen})")
    axes.set_xlim(0, 1.1 * max(total.values()))
    rows_only(axes)
    lora, *others = total
    most, least = max(others, key=total.__getitem__), min(others, key=total.__getitem__)
    headline(
        figure,
        f"Held by autograd: {most} {total[most]:.1f} MiB; {least} {total[least]:.1f}; "
        f"{lora} {total[lora]:.2f}",
    )
    figure.set_label(
        "Bars of what each form holds for the backward pass: "
        + ". ".join(
            f"{form}, {total[form]:.2f} MiB: "
            + ("; ".join(f"{name} for {reason}" for name, (_, reason) in held.items()) or "nothing")
            for form, held in forms.items()
        )
        + "."
    )
    return figure


@styled
def bytes_alive(
    histories: Mapping[str, tuple[Sequence[int], int]], at_peak: Mapping[str, str]
) -> Figure:
    """Memory during one training step, operation by operation.

    Args:
        histories: form -> (LiveBytes.history of a step, operations in its forward pass).
        at_peak: form -> what it computes where its memory is highest, written beside that place.
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
        if name in at_peak:
            place = mib.index(peaks[name])
            axes.annotate(
                at_peak[name],
                (progress[place], mib[place]),
                xytext=(8, -4),
                textcoords="offset points",
                va="top",
            )
    axes.axvline(1, color=COLORS["base"], lw=1, zorder=0)
    between = "forward ends,\nbackward starts"
    axes.set_xticks([0, 0.5, 1, 1.5, 2], ["start", "half", between, "half", "end"])
    axes.set_xlabel("each pass by its operations, evenly spaced")
    axes.set(ylabel="alive (MiB)", xlim=(0, 2), ylim=(0, 1.05 * max(peaks.values())))
    axes.legend()
    first, *_, last = peaks
    shown = {first, max(peaks, key=peaks.__getitem__), last}
    headline(
        figure,
        "Most alive at once in a training step: "
        + ", ".join(f"{name} {peak:.1f} MiB" for name, peak in peaks.items() if name in shown),
    )
    figure.set_label(
        "Steps of the memory alive in one forward and backward pass; the most at once is "
        + ", ".join(f"{peak:.1f} MiB for {name}" for name, peak in peaks.items())
        + "."
    )
    return figure


@styled
def digits_lost(
    residuals: Sequence[float], errors: Mapping[str, Sequence[float]], expected: Sequence[float]
) -> Figure:
    """Error of the norm of W + s B A where the sum nearly cancels.

    Args:
        residuals: ||W + s B A|| / ||W||.
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
    axes.axhline(1, color="#dddddd", lw=1, zorder=0)
    axes.set(xlabel="what is left of W: ||W + s B A|| / ||W||", ylabel="relative error of the norm")
    axes.legend()
    (formula, lost), *_, (ours, kept) = errors.items()
    place = min(range(len(residuals)), key=lambda i: abs(math.log(residuals[i] / 0.01)))
    last = min(range(len(residuals)), key=residuals.__getitem__)
    left = f"{100 * residuals[place]:.2g} %"
    headline(
        figure,
        f"Where {left} of W is left, {formula} is off by {lost[place]:.0e}, "
        f"{ours} by {kept[place]:.0e}",
    )
    figure.set_label(
        f"Relative error of the norm against what is left of W, both logarithmic. At {left}: "
        + ", ".join(f"{name} {values[place]:.1e}" for name, values in errors.items())
        + f". At the smallest residual, {residuals[last]:.1g}: "
        + ", ".join(f"{name} {values[last]:.1e}" for name, values in errors.items())
        + "."
    )
    return figure


@styled
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
        axes.text(expected, row - 0.38, f"√{counted[form]}", ha="center")
        styles = zip(values.values(), ALTERNATIVES[1:], "o^s", (0.16, 0, -0.16), strict=False)
        for value, color, marker, offset in styles:
            axes.plot(value, row + offset, marker, color=color, markersize=7)
    axes.axvline(1, color=COLORS["base"], lw=1.2, zorder=0)
    axes.set_yticks(range(len(errors)), list(errors))
    axes.set_ylim(len(errors) - 0.5, -0.75)
    axes.set_xlim(0.95, 2.1)
    axes.set_xlabel("relative RMS error / that of a plain bf16 nn.Linear")
    names = list(next(iter(errors.values())))
    handles = [
        Line2D([], [], color=color, marker=marker, ls="", markersize=7)
        for color, marker in zip(ALTERNATIVES[1 : 1 + len(names)], "o^s", strict=False)
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    worst = {form: max(values.values()) for form, values in errors.items()}
    most, least = max(worst, key=worst.__getitem__), min(worst, key=worst.__getitem__)
    headline(
        figure,
        f"{most}: up to {worst[most]:.2f} times a plain layer's error; {least}: {worst[least]:.2f}",
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


@styled
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
    axes.legend()
    place = tokens.index(1024)
    ours, theirs = ratios["DoRA, ours"], ratios["DoRA, PEFT"]
    layer = f"{in_features} → {out_features}, rank {rank}"
    headline(
        figure,
        f"{layer}: the norm adds {100 * (ours[place] - 1):.2g} % to LoRA's step with 1,024 tokens\n"
        f"and makes it {ours[0]:.1f} times as large with one (PEFT {theirs[0]:.1f})",
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


@styled
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
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("time of a step / PEFT's")
    figure.legend(loc="outside lower center", ncols=4, handletextpad=0.2)
    headline(
        figure,
        f"{min(shares):.0f} to {max(shares):.0f} % of the time saved is saved "
        "by leaving out the identity matrix",
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
