"""How magnitude and direction move: the figures of lesson 5."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from minidora.experiment import Difference, mean_and_error
from minidora.geometry import Correlation, Dot
from minidora.plots.style import (
    COLORS,
    NAMES,
    headline,
    listed,
    new_figure,
    one_line,
    rows_only,
    styled,
)


@styled
def paper_slopes(correlations: Mapping[str, float]) -> Figure:
    """What figure 2 of the paper claims, schematically: a line of the sign and size of each r.

    Args:
        correlations: {method: r}, as reported.
    """
    figure = new_figure(7.6, 2.9)
    panels = figure.subplots(1, len(correlations), sharey=True, squeeze=False)[0]
    for axes, (name, r) in zip(panels, correlations.items(), strict=True):
        axes.plot([0.1, 0.9], [0.5 - 0.4 * r, 0.5 + 0.4 * r], color=COLORS[name], lw=3)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], xlabel="change in direction, ΔD")
        axes.set_title(f"{NAMES[name]}, r = {r:+.2f}", color=COLORS[name])
    panels[0].set_ylabel("change in magnitude, ΔM")
    falls = [NAMES[name] for name, r in correlations.items() if r < 0]
    rises = [NAMES[name] for name, r in correlations.items() if r > 0]
    claims = [f"rises with ΔD in {listed(rises)}"] if rises else []
    claims += [f"falls in {listed(falls)}"] if falls else []
    finding = f"The paper's claim: ΔM {', '.join(claims)}"
    headline(figure, finding)
    figure.set_label(
        f"A sketch without data: one line for each method, its slope the paper's correlation. "
        f"{finding}. r: "
        + ", ".join(f"{NAMES[name]} {r:+.2f}" for name, r in correlations.items())
        + "."
    )
    return figure


@styled
def movement(groups: Mapping[str, Sequence[Dot]], upto: int | None = None) -> Figure:
    """Figure 2: change in magnitude against change in direction, a panel for each method.

    Args:
        groups: {method: dots of one run}. The line of a layer is its path through the steps; the
            dashed one is fitted to all dots by least squares.
        upto: draw no step after this one; the axes stay those of all steps.
    """
    figure = new_figure(8.4, 3.5)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    correlations = {}
    layers = list(dict.fromkeys(dot.layer for dots in groups.values() for dot in dots))
    shades = colormaps["viridis"]
    styles: dict[str, dict[str, Any]] = {  # up to green: yellow cannot be seen on white
        layer: {"color": shades(0.75 * k / max(1, len(layers) - 1)), "marker": "os^Dv<>P"[k % 8]}
        for k, layer in enumerate(layers)
    }
    for axes, (name, dots) in zip(panels, groups.items(), strict=True):
        shown = [dot for dot in dots if upto is None or dot.step <= upto]
        for layer, style in styles.items():
            path = [dot for dot in shown if dot.layer == layer]
            turned = [dot.delta_direction for dot in path]
            axes.plot(turned, [dot.delta_magnitude for dot in path], ms=4, lw=0.8, **style)
        x = torch.tensor([dot.delta_direction for dot in shown], dtype=torch.float64)
        y = torch.tensor([dot.delta_magnitude for dot in shown], dtype=torch.float64)
        correlations[name] = r = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
        slope = r * float(y.std() / x.std())
        if math.isfinite(slope):
            ends = [float(x.min()), float(x.max())]
            fitted = [float(y.mean() + slope * (end - x.mean())) for end in ends]
            axes.plot(ends, fitted, "--", color="black", lw=1.4)
        axes.set_xlim(0, 1.08 * max(dot.delta_direction for dot in dots))
        axes.set_ylim(0, 1.08 * max(dot.delta_magnitude for dot in dots))
        axes.set_title(f"{NAMES[name]}, r = {r:+.2f}", color=COLORS[name])
        axes.set_xlabel("ΔD, 1 - cosine")
        axes.locator_params(nbins=4)
    panels[0].set_ylabel("ΔM, norm")
    handles = [Line2D([], [], ms=4, lw=0.8, label=_block(name), **s) for name, s in styles.items()]
    handles.append(Line2D([], [], ls="--", color="black", lw=1.4, label="fitted line"))
    figure.legend(handles=handles, ncols=4, loc="outside lower center")
    last = max(dot.step for dots in groups.values() for dot in dots if upto is None or
               dot.step <= upto)  # fmt: skip
    signs = {
        "rises": [NAMES[name] for name, r in correlations.items() if r > 0],
        "falls": [NAMES[name] for name, r in correlations.items() if r < 0],
    }
    said = ", ".join(f"{sign} in {listed(names)}" for sign, names in signs.items() if names)
    through = "the line through all layers"
    finding = (
        f"Up to step {last}, {through} {said}" if said else f"Up to step {last}, no r is defined"
    )
    headline(figure, f"{finding} (the axes differ)")
    figure.set_label(
        f"Change in magnitude against change in direction, one path for each layer and one fitted "
        f"line for each method. {finding}. Correlations: "
        + ", ".join(f"{NAMES[name]} {r:+.2f}" for name, r in correlations.items())
        + "."
    )
    return figure


def _block(layer: str) -> str:
    """The number of a layer's block, or its whole name."""
    parts = layer.split(".")
    return f"block {parts[1]}" if parts[0] == "blocks" and len(parts) > 1 else layer


@styled
def pythagoras(rows: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """How much longer each row got, against what a turn by an orthogonal update would make of it.

    Args:
        rows: {method: (length now / length before, 1 / cos)}, a number a row.
    """
    figure = new_figure(8.4, 3.4)
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    means = {}
    for axes, (name, (ratio, predicted)) in zip(panels, rows.items(), strict=True):
        axes.plot(predicted, ratio, ".", ms=3, alpha=0.5, color=COLORS[name])
        limit = float(predicted.max())
        axes.plot([1, limit], [1, limit], color="#666666", lw=1, ls="--")
        axes.axhline(1, color="#cccccc", lw=0.8, zorder=0)
        means[name] = float(ratio.mean())
        axes.set_title(f"{NAMES[name]}, mean {means[name]:.3f}", color=COLORS[name])
        axes.set_xlabel("1 / cos of the turn")
    panels[0].set_ylabel("length now / before")
    longer = {name: 100 * float((ratio > 1).double().mean()) for name, (ratio, _) in rows.items()}
    finding = "Rows that got longer: " + ", ".join(
        f"{NAMES[name]} {share:.0f} %" for name, share in longer.items()
    )
    dashed = [Line2D([], [], color="#666666", lw=1, ls="--")]
    figure.legend(dashed, ["if the update is orthogonal to the row"], loc="outside lower center")
    headline(figure, finding)
    figure.set_label(
        "Length of each row now over before, against 1 / cos of its turn; a dashed line shows "
        f"where an orthogonal update puts it. {finding}. Mean ratios: "
        + ", ".join(f"{NAMES[name]} {mean:.3f}" for name, mean in means.items())
        + "."
    )
    return figure


@styled
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
    figure.legend(handles=handles, ncols=3, loc="outside lower center")
    rows_only(axes)
    ours = ", ".join(f"{NAMES[name]} {pooled[name].r:+.2f}" for name in seeds)
    theirs = ", ".join(f"{paper[name]:+.2f}" for name in seeds)
    headline(figure, f"Pooled r: {ours};\nthe paper has {theirs}")
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


@styled
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
    axes.set_yticks(range(len(variants)), list(variants))
    axes.set(xlim=(-1.02, 1.02), ylim=(len(variants) - 0.5, -0.5))
    axes.set_xlabel("correlation of ΔD and ΔM, 95 % interval over seeds and layers")
    handles = [Line2D([], [], marker="o", color=COLORS[m], label=NAMES[m]) for m in methods]
    figure.legend(handles=handles, ncols=3, loc="outside lower center")
    rows_only(axes)
    signs = {name: [f[name].r > 0 for f in variants.values()] for name in methods}
    text = ", ".join(f"{sum(above)} for {NAMES[name]}" for name, above in signs.items())
    headline(figure, f"Of {len(variants)} ways to compute it, r is above 0 in {text}")
    figure.set_label(
        "Correlations with intervals for each way to compute them. "
        + " ".join(
            f"{variant}: " + ", ".join(f"{NAMES[n]} {c.r:+.2f}" for n, c in found.items()) + "."
            for variant, found in variants.items()
        )
    )
    return figure


@styled
def loss_strip(
    losses: Mapping[str, tuple[str, Mapping[int, float]]],
    before: float,
    differences: Mapping[str, Difference],
) -> Figure:
    """The test loss of each setting, seed by seed; lines join what one seed reached.

    Args:
        losses: {label: (method, {seed: loss})}.
        before: the loss of the pretrained model, for the caption.
        differences: {label: DoRA minus LoRA}, drawn beside: too small to be seen among the losses.
    """
    figure = new_figure(9.2, 3.6)
    axes, right = figure.subplots(1, 2, width_ratios=(2.6, 1))
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
        above: dict[str, Any] = {"xytext": (0, 13), "textcoords": "offset points", "ha": "center",
                                 "bbox": {"fc": "white", "ec": "none", "pad": 1}}  # fmt: skip
        axes.annotate(f"{mean:.3f}", (place, max(by_seed.values())), **above)
    axes.set_xticks(range(len(losses)), list(losses))
    axes.set_xlim(-0.5, len(losses) - 0.5)
    axes.margins(y=0.16)
    axes.set_ylabel("test loss (nats per character)")
    for place, d in enumerate(differences.values()):
        _difference(right, place, d)
    right.axhline(0, color="#999999", lw=0.8)
    right.set_xticks(range(len(differences)), list(differences))
    right.set_xlim(-0.5, len(differences) - 0.5)
    right.set_ylabel("DoRA minus LoRA (nats)")
    right.set_title("one dot a seed,\n◆ mean and 95 %")
    best = min(means, key=means.__getitem__)
    labels = {label: one_line(label) for label in losses}
    headline(
        figure,
        f"From {before:.2f} before adapting; lowest is {labels[best]} with {means[best]:.3f}",
    )
    figure.set_label(
        f"Test loss after adapting, {len(values[0])} seeds each, {before:.2f} before. "
        + ", ".join(f"{labels[label]} {mean:.3f}" for label, mean in means.items())
        + ". Right, DoRA minus LoRA: "
        + ", ".join(
            f"{one_line(label)} {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
            for label, d in differences.items()
        )
        + "."
    )
    return figure


def _difference(axes: Axes, place: int, d: Difference, *, filled: bool = True) -> None:
    """The differences of the seeds, and to the right of them their mean with its interval."""
    color = COLORS["dora"]
    axes.plot([place - 0.16] * len(d.values), d.values, "o", ms=3.5, alpha=0.55, color="#555555")
    axes.plot([place + 0.1] * 2, [d.low, d.high], color=color, lw=2.4)
    face = color if filled else "white"
    axes.plot(place + 0.1, d.mean, "D", ms=7, color=color, mfc=face, mew=1.4)


@styled
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
    axes.legend()
    inner = [label for label, (_, _, curve) in curves.items() if best[label] not in
             (min(curve), max(curve))]  # fmt: skip
    headline(
        figure,
        f"The best rate (ring) lies inside the grid for {len(inner)} of {len(curves)} settings",
    )
    figure.set_label(
        "Validation loss against learning rate. Best rates: "
        + ", ".join(f"{label} {rate:g}" for label, rate in best.items())
        + "."
    )
    return figure


@styled
def gradient_parts(along: Tensor, across: Tensor) -> Figure:
    """What turns a row against the gradient of its magnitude: at one length, and as they are.

    Args:
        along, across: length of a gradient's part along its row, which is |gradient of m|, and of
            its part across the row, which turns it; a number each for every gradient.
    """
    along, across = along.flatten(), across.flatten()
    length = (along**2 + across**2).sqrt()
    figure = new_figure(8.0, 3.7)
    left, right = figure.subplots(1, 2)
    found = []
    for axes, scale in ((left, length), (right, length.mean())):
        x, y = across / scale, along / scale
        found.append(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))
        axes.plot(x.cpu(), y.cpu(), ".", ms=1.5, alpha=0.2, color=COLORS["dora"], rasterized=True)
        axes.set_xlabel("part across the row: the turn")
    quarter = torch.linspace(0, math.pi / 2, 50)
    left.plot(quarter.sin(), quarter.cos(), color="black", lw=1, zorder=0)
    left.set(title=f"scaled to length 1, r = {found[0]:+.2f}", xlim=(0, 1.05), ylim=(0, 1.05))
    left.set_aspect("equal")
    left.set_ylabel("part along the row: |∇m|")
    right.set_title(f"as they are (1 is the mean length of G), r = {found[1]:+.2f}")
    slope = found[1] * float(y.std() / x.std())
    ends = [float(x.min()), float(x.max())]
    line = [float(y.mean() + slope * (end - x.mean())) for end in ends]
    right.plot(ends, line, "--", color="black", lw=1.4, label="fitted line")
    right.set(xlim=(0, None), ylim=(0, None))
    right.legend(loc="upper left")
    goes = "rises" if found[1] > 0 else "falls"
    finding = (
        f"At equal length |∇m| falls with the turn; as the gradients are, it {goes} with the turn"
    )
    headline(figure, finding)
    figure.set_label(
        f"One dot for each of {len(along):,} gradients of a row: its part along the row against "
        f"its part across. {finding}. Left, scaled to one length, on a quarter circle: r = "
        f"{found[0]:+.2f}. Right, as they are: r = {found[1]:+.2f}."
    )
    return figure


@styled
def equal_budget(
    means: Mapping[str, Mapping[int, float]],
    differences: Mapping[int, tuple[int, float, Difference]],
) -> Figure:
    """Loss against trained numbers, and DoRA minus LoRA where both train as many.

    Args:
        means: {"lora" or "dora": {trained numbers: mean test loss}}.
        differences: {rank: (DoRA's trained numbers, the share by which they exceed LoRA's, DoRA
            minus LoRA)}; a share above 0 is drawn hollow.
    """
    figure = new_figure(9.2, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    for (name, curve), marker in zip(means.items(), "os", strict=True):
        left.plot(list(curve), list(curve.values()), f"{marker}-", ms=5, lw=1.4,
                  color=COLORS[name], label=NAMES[name])  # fmt: skip
    left.set(xscale="log", xlabel="trained numbers", ylabel="test loss (nats per character)")
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.xaxis.set_minor_formatter("")
    left.legend(loc="upper right")
    left.set_title("mean of the seeds")
    verdicts: dict[str, list[str]] = {}
    for place, (rank, (_, more, d)) in enumerate(differences.items()):
        _difference(right, place, d, filled=not more)
        verdicts.setdefault(d.verdict, []).append(str(rank))
    right.axhline(0, color="#999999", lw=0.8)
    right.set_xticks(
        range(len(differences)), [f"{rank}\n{n:,}" for rank, (n, *_) in differences.items()]
    )
    right.set(xlabel="DoRA's rank, and what it trains", ylabel="DoRA minus LoRA (nats)")
    seeds = len(next(iter(differences.values()))[2].values)
    title = f"{seeds} seeds, ◆ mean and 95 %"
    exceeding = [more for _, more, _ in differences.values() if more]
    if exceeding:
        title += f";\n◇ DoRA trains {100 * max(exceeding):.1f} % more"
    right.set_title(title)
    lower = verdicts.get("lower", [])
    finding = f"With as many trained numbers, DoRA's loss is lower than LoRA's at {_ranks(lower)}"
    if higher := verdicts.get("higher", []):
        finding += f", higher at {_ranks(higher)}"
    finding += f" of {', '.join(map(str, differences))}"
    headline(figure, finding)
    figure.set_label(
        f"{finding}. Left: mean test loss of LoRA and DoRA against trained numbers. Right: DoRA "
        "minus LoRA at DoRA's number, LoRA interpolated: "
        + ", ".join(
            f"rank {rank} {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}"
            + (f", with {100 * more:.1f} % more numbers)" if more else ")")
            for rank, (_, more, d) in differences.items()
        )
        + "."
    )
    return figure


def _ranks(ranks: Sequence[str]) -> str:
    if not ranks:
        return "no rank"
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"
