"""Magnitude times direction: the figures of lesson 3."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from torch import Tensor

from minidora.plots.style import COLORS, DIVERGING, NAMES, PAIR, headline, new_figure, styled

ROW = (1.6, 1.2)
"""One row of a weight with two inputs, of length 2: what lesson 3 draws in the plane."""


@styled
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
    widths = {"base": 6.0, "lora": 4.0, "dora": 1.8}  # LoRA and DoRA share a ray: narrower on top
    heads = {"base": 18, "lora": 18, "dora": 13}
    for name, row in rows.items():
        if lengths[name] < 1e-12:
            continue
        shape = {"arrowstyle": "-|>", "color": COLORS[name], "linewidth": widths[name]}
        shape |= {"mutation_scale": heads[name], "shrinkA": 0, "shrinkB": 0}
        plane.annotate("", xy=row, xytext=(0, 0), arrowprops=shape)
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
    figure.legend(handles, labels, loc="outside lower center", ncols=5)

    names = [NAMES[name] for name in rows]
    places = range(len(rows))
    bars.barh(places, list(lengths.values()), color=[COLORS[name] for name in rows], height=0.55)
    turns = {"base": 0.0, "lora": turn, "dora": turn}
    for place, name in zip(places, rows, strict=True):
        text = " 0, no direction"
        if lengths[name] > 1e-12:
            text = f" {lengths[name]:.2f}, turned by {_signed(turns[name])}°"
        bars.text(lengths[name], place, text, va="center")
    bars.set_yticks(places, names)
    bars.invert_yaxis()
    bars.set(xlim=(0, 7.4), xticks=range(5))
    bars.set_xlabel("length of the row", x=2 / 7.4)
    bars.spines["bottom"].set_bounds(0, 4)
    if zero:
        title = "The update cancels the row: no direction is left, and both answer 0"
    else:
        title = (
            f"Both turn the row by {_signed(turn)}°: LoRA's length becomes {lengths['lora']:.2f}, "
            f"DoRA's is m = {magnitude:.2f}"
        )
    headline(figure, title)
    figure.set_label(
        f"A row of length 2.00 as an arrow in the plane of its two weights, and the same row "
        f"after an update of length {length:.2f} at {angle:.0f} degrees. LoRA's row has length "
        f"{lengths['lora']:.2f}; DoRA's lies on the same ray, on the circle of radius "
        f"{magnitude:.2f}. Both are turned by {_signed(turn)} degrees."
    )
    return figure


ROWS = ((1.5, 0.9), (-0.6, 1.7), (0.5, -1.4))
"""Three rows of a weight with two inputs, pretrained: what turn_and_length moves."""


@styled
def turn_and_length(
    direction: float = 20.0, steps: Sequence[float] = (1.0, -1.2, 1.6), share: float = 0.6
) -> Figure:
    """Where rank 1 can take three rows of a weight: LoRA to a line each, DoRA to a half-plane.

    With rank 1 row i of s B A is b_i a, so every row moves along the same direction a.

        LoRA  w_i' = w_i + b_i a           DoRA  w_i' = m_i (w_i + b_i a) / ||w_i + b_i a||

    Args:
        direction: of a, in degrees from the first axis.
        steps: b_i, for each of ROWS.
        share: m_i / ||w_i||, drawn for DoRA: any number is in its reach.
    """
    a = (math.cos(math.radians(direction)), math.sin(math.radians(direction)))
    figure = new_figure(8.4, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    colors = {"lora": COLORS["lora"], "dora": COLORS["dora"]}
    turns = []
    for row, step in zip(ROWS, steps, strict=True):
        lora = (row[0] + step * a[0], row[1] + step * a[1])
        scale = share * math.hypot(*row) / math.hypot(*lora)
        dora = (scale * lora[0], scale * lora[1])
        turns.append(_degrees_between(row, lora))
        far = 4 / math.hypot(*lora)
        for axes in (left, right):
            axes.axline(row, xy2=(row[0] + a[0], row[1] + a[1]), color=COLORS["lora"], lw=1, ls=":")
            axes.plot([0, row[0]], [0, row[1]], color=COLORS["base"], lw=2.5)
            axes.plot(*row, "o", color=COLORS["base"], ms=7)
        left.plot([row[0], lora[0]], [row[1], lora[1]], color=COLORS["lora"], lw=2.2)
        right.plot([0, far * lora[0]], [0, far * lora[1]], color=COLORS["dora"], lw=1, ls="--")
        for axes, name, end in ((left, "lora", lora), (right, "dora", dora)):
            axes.plot([0, end[0]], [0, end[1]], color=colors[name], lw=1.4)
            axes.plot(*end, "s", color=colors[name], ms=6)
    for axes in (left, right):
        corner = (0.95, -2.0)
        shape = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
        end = (corner[0] + a[0], corner[1] + a[1])
        axes.annotate("", end, corner, arrowprops=shape)
        axes.text(end[0] + 0.12, end[1], "a", va="center", fontsize=10)
        axes.axhline(0, color="#dddddd", lw=0.8, zorder=0)
        axes.axvline(0, color="#dddddd", lw=0.8, zorder=0)
        axes.set(xlim=(-2.6, 2.6), ylim=(-2.2, 2.6), aspect="equal", xlabel="weight of input 1")
    left.set(ylabel="weight of input 2", title="LoRA: a turn fixes the length")
    right.set_title(f"DoRA: the same turns, here with m = {share:g} ‖w‖")
    handles = [
        Line2D([], [], color=COLORS["base"], marker="o", lw=2.5, label="w, pretrained"),
        Line2D([], [], color=COLORS["lora"], ls=":", label="w + b a, any b"),
        Line2D([], [], color=COLORS["lora"], marker="s", label="w' in LoRA"),
        Line2D([], [], color=COLORS["dora"], ls="--", label="any length m"),
        Line2D([], [], color=COLORS["dora"], marker="s", label="w' in DoRA"),
    ]
    figure.legend(handles=handles, ncols=5, loc="outside lower center")
    headline(
        figure,
        "Rank 1: LoRA moves each row along a line parallel to one direction a; "
        "DoRA reaches any length on the ray it turns to",
    )
    figure.set_label(
        "Three rows of a weight as points of the plane, each with a dotted line through it, all "
        "three parallel. Left, LoRA of rank 1: each row moves along its line, turned by "
        + ", ".join(f"{_signed(turn)}" for turn in turns)
        + " degrees, and the turn decides its length. Right, DoRA: the same turns, and on the ray "
        f"from the origin any length m, drawn at {share:g} times the row's old length."
    )
    return figure


def _signed(degrees: float) -> str:
    return f"{degrees:+.0f}".replace("-", "−").replace("+0", "0")


def _degrees_between(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Signed angle from the first vector to the second, in (-180, 180]."""
    cross = first[0] * second[1] - first[1] * second[0]
    return math.degrees(math.atan2(cross, first[0] * second[0] + first[1] * second[1]))


@styled
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
    image = heat.imshow(values.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
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
                color=color,
            )
    heat.set_xticks(range(in_features), [f"in {j}" for j in range(in_features)])
    heat.set_yticks(range(out_features), [f"out {i}" for i in range(out_features)])
    above = top.bar(range(in_features), columns, color=COLORS["base"], width=0.6)
    top.bar_label(above, fmt="%.1f")
    top.set(xlim=(-0.5, in_features - 0.5), ylim=(0, 1.35 * max(columns)), xticks=[], yticks=[])
    top.set_title(f"dim=0: {in_features} norms, one per input")
    beside = side.barh(range(out_features), rows, color=COLORS["dora"], height=0.6)
    side.bar_label(beside, fmt=" %.1f")
    side.set(ylim=(out_features - 0.5, -0.5), xlim=(0, 1.4 * max(rows)), xticks=[], yticks=[])
    side.set_title(f"dim=1: {out_features} norms,\none per output (DoRA)")
    figure.colorbar(image, cax=figure.add_subplot(grid[1, 2]), label="weight")
    headline(
        figure,
        f"One ({out_features}, {in_features}) weight: DoRA's magnitude is its {out_features} row "
        f"norms (dim=1), not its {in_features} column norms (dim=0)",
    )
    figure.set_label(
        f"A heat map of a weight with {out_features} rows (outputs) and {in_features} columns "
        f"(inputs). Above it {in_features} column norms, beside it {out_features} row norms: "
        "DoRA's magnitude is the row norms."
    )
    return figure


@styled
def dora_diagram(in_features: int, out_features: int, rank: int) -> Figure:
    """How DoRALinear computes y: where g acts, and where the bias joins."""
    figure = new_figure(8.6, 3.5)
    axes = figure.subplots()
    axes.set(xlim=(0, 104), ylim=(0, 53))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, color: str) -> None:
        patch = FancyBboxPatch((x, y - 4), width, 8, "round", edgecolor=color, facecolor="white")
        patch.set_linewidth(1.4)
        axes.add_patch(patch)
        axes.text(x + width / 2, y, text, ha="center", va="center")

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        shape = {"arrowstyle": "-|>", "color": "#444444", "shrinkA": 1, "shrinkB": 1}
        axes.annotate("", xy=end, xytext=start, arrowprops=shape)

    axes.text(3, 21, "x", fontsize=13, ha="center", va="center")
    axes.text(3, 15, f"(…, {in_features})", ha="center", va="center")
    box(20, 33, 22, f"W, frozen\n({out_features}, {in_features})", COLORS["base"])
    box(12, 9, 15, f"A\n({rank}, {in_features})", COLORS["lora"])
    box(31, 9, 15, f"B\n({out_features}, {rank})", COLORS["lora"])
    box(50, 9, 5, "· s", COLORS["lora"])
    axes.text(64, 21, "+", fontsize=16, ha="center", va="center")
    box(71, 21, 11, f"· g\n({out_features},)", COLORS["dora"])
    axes.text(88, 21, "+ bias", ha="center", va="center")
    axes.text(96.5, 21, "y", fontsize=13, ha="center", va="center")
    axes.text(96.5, 15, f"(…, {out_features})", ha="center", va="center")
    for start, end in [
        ((5, 23), (19, 33)),
        ((5, 19), (11, 10)),
        ((28, 9), (30, 9)),
        ((47, 9), (49, 9)),
        ((56, 11), (62.5, 18)),
        ((43, 33), (62.5, 24)),
        ((66, 21), (70, 21)),
        ((83, 21), (84.5, 21)),
        ((91.5, 21), (95, 21)),
    ]:
        arrow(start, end)
    formula = "$g = m\\,/\\,\\|W + sBA\\|_{row}$\nno gradient through the norm"
    axes.text(76.5, 35.5, formula, ha="center", va="center")
    arrow((76.5, 31.5), (76.5, 26))
    box(44, 47, 11, f"m\n({out_features},)", COLORS["dora"])
    link: dict[str, Any] = {"color": COLORS["dora"], "ls": ":", "lw": 1.2}
    # What g is made from, each line into the formula: W, m, and round the right A, B and s.
    for corners in (
        [(43, 35.5), (63.5, 35.5)],
        [(56, 47), (76.5, 47), (76.5, 39.5)],
        [(19.5, 4), (19.5, 1), (102.5, 1), (102.5, 35.5), (89.5, 35.5)],
    ):
        axes.plot(*zip(*corners[:-1], strict=True), **link)
        axes.annotate("", corners[-1], corners[-2], arrowprops={"arrowstyle": "-|>", **link})
    for x in (38.5, 52.5):
        axes.plot([x, x], [4, 1], **link)
    headline(figure, "g scales both paths together; the bias joins after it, never scaled")
    figure.set_label(
        "Diagram: x goes through the frozen W and, beside it, through A, B and the factor s, and "
        "W, A, B and s also give g, together with the magnitude m. "
        "The two results are added, multiplied by g, one factor for each output, and then the "
        "bias is added."
    )
    return figure


@styled
def gradient_split(angle: float = 50.0) -> Figure:
    """The detached gradient of a row v, its part across the row (the full one), and the rest.

    Args:
        angle: between the step (minus the gradient) and v, in degrees.
    """
    radians = math.radians(angle)
    row, step = 2.0, 1.0  # v lies along the first axis; the step starts at its tip
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
        "row v",
        f"detached step (eq. 11): ‖v‖ → {norms['detached']:.2f}",
        f"full step (eq. 6): ‖v‖ → {norms['full']:.2f}",
        "rows as long as v",
    ]
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    plane.set(xlim=(-0.1, 3.3), ylim=(-1.2, 1.25), aspect="equal")
    plane.set(xlabel="along the row", ylabel="across the row")

    angles = list(range(181))
    curve.plot(angles, [math.sin(math.radians(t)) for t in angles], color="#000000", linewidth=1.8)
    curve.plot(angle, cosine, "o", color=PAIR[0], markersize=9)
    curve.set(xlabel="angle of the step to the row (degrees)", xticks=range(0, 181, 45))
    curve.set(ylabel="cos(full, detached)", ylim=(-0.03, 1.08))
    headline(
        figure,
        f"The full gradient is the part across the row, here {100 * cosine:.0f} % of the detached",
    )
    figure.set_label(
        f"Left: a row v of length 2 and, from its tip, a detached step of length 1 at "
        f"{angle:.0f} degrees to the row; the full gradient keeps only the part across the row. "
        f"After the step v has length {norms['detached']:.2f} (detached) or {norms['full']:.2f} "
        f"(full). Right: the cosine between the two gradients is the sine of that angle, here "
        f"{cosine:.2f}."
    )
    return figure


@styled
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
            axes.bar_label(bar, fmt=" %.2f")
    bar = axes.barh(len(mib), lora / 2**20, color=COLORS["lora"], height=0.36)
    axes.bar_label(bar, fmt=" %.3f")
    axes.set_yticks(range(len(mib) + 1), [*mib, NAMES["lora"]])
    axes.invert_yaxis()
    longest = max(value for pair in mib.values() for value in pair)
    axes.set(xlabel="held for the backward pass (MiB)", xlim=(0, 1.12 * longest))
    handles = [Patch(color=color) for color in PAIR]
    axes.legend(handles, ["full gradient (eq. 6)", "norm detached (eq. 11)"])
    saved = {form: first - second for form, (first, second) in mib.items()}
    most, least = max(saved, key=saved.__getitem__), min(saved, key=saved.__getitem__)
    finding = f"Detaching the norm saves {saved[most]:.2f} MiB in the {most}"
    if most != least:
        little = saved[least] < 0.01 * full[least] / 2**20
        finding += f", {'about 0' if little else f'{saved[least]:.2f}'} in the {least}"
    headline(figure, finding)
    figure.set_label(
        "Bars of the memory held for the backward pass, full gradient against detached norm: "
        + "; ".join(f"{form} {pair[0]:.2f} against {pair[1]:.2f} MiB" for form, pair in mib.items())
        + f"; LoRA {lora / 2**20:.3f} MiB."
    )
    return figure


@styled
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
    axes.legend()
    (first, low), (second, high) = ranks.items()
    headline(figure, f"The same entries: rank {low} by {first}, rank {high} by {second}")
    figure.set_label(
        f"Singular values of one product, by {first} and by {second}: {low} and {high} of them "
        "are above zero."
    )
    return figure


@styled
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
    axes.legend(loc="center left")
    headline(
        figure,
        f"The same m is {of_model:.3f} % of the model and "
        f"{min(of_lora):.3g} to {max(of_lora):.3g} % of LoRA",
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
