"""The figures of a sweep's report."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from minidora.intervals import mean_and_error
from minidora.plots.style import COLORS, NAMES, headline, new_figure, rows_only, styled
from minidora.summary import Report


def sweep_figures(report: Report) -> dict[str, Figure]:
    """All figures that the report has the numbers for, by the names of their files."""
    figures = {"scores": sweep_scores(report)}
    if report.differences:
        figures["differences"] = sweep_differences(report)
    if len({arm.trained for arm in report.arms.values()}) > 1:
        figures["budget"] = sweep_budget(report)
    return figures


@styled
def sweep_scores(report: Report) -> Figure:
    """The mean score of each method with its standard error, and every seed as a small dot."""
    arms = report.arms
    figure = new_figure(7.0, 1.2 + 0.35 * len(arms))
    axes = figure.subplots()
    said = []
    for place, (name, arm) in enumerate(arms.items()):
        mean, error = mean_and_error(arm.scores)
        color = COLORS[arm.method.kind]
        axes.plot(arm.scores, [place] * len(arm.scores), ".", color=color, alpha=0.35)
        axes.errorbar(mean, place, xerr=error, fmt="o", color=color, capsize=3)
        said.append(f"{name} {mean:.4g} ± {error:.2g}")
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    unit = "%" if "accuracy" in report.score else "nats"
    axes.set_xlabel(f"{report.score} ({unit}); small dots are seeds")
    best = (min if unit == "nats" else max)(arms, key=lambda n: mean_and_error(arms[n].scores)[0])
    headline(figure, f"Best mean of {len(report.seeds)} seeds: {best}")
    rows_only(axes)
    figure.set_label(f"{report.score}, mean and standard error. {'; '.join(said)}.")
    return figure


@styled
def sweep_differences(report: Report) -> Figure:
    """Paired differences with their 95 % intervals; gray is what would probably be missed."""
    pairs = report.differences
    unit = "points" if "accuracy" in report.score else "nats"
    figure = new_figure(7.5, 1.4 + 0.4 * len(pairs))
    axes = figure.subplots()
    said = []
    for place, ((first, second), d) in enumerate(pairs.items()):
        axes.barh(place, 2 * d.detectable, left=-d.detectable, height=0.7, color="#dddddd")
        clear = d.verdict != "no difference detected"
        style: dict[str, Any] = {"fmt": "o" if clear else "s", "mfc": "black" if clear else "white"}
        half = [[d.mean - d.low], [d.high - d.mean]]
        axes.errorbar(d.mean, place, xerr=half, color="black", capsize=3, **style)
        said.append(f"{first} minus {second} {d.low:+.3g} to {d.high:+.3g}, {d.verdict}")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(pairs)), [f"{a}\nminus {b}" for a, b in pairs], fontsize=8)
    axes.invert_yaxis()
    reach = 1.08 * max(max(d.detectable, abs(d.low), abs(d.high)) for d in pairs.values())
    axes.set_xlim(-reach, reach)
    axes.set_xlabel(f"difference in {report.score} ({unit}), 95 % interval; gray: likely missed")
    rows_only(axes)
    found = sum(d.verdict != "no difference detected" for d in pairs.values())
    headline(
        figure, f"{found} of {len(pairs)} differences are detected with {len(report.seeds)} seeds"
    )
    figure.set_label(f"Paired differences in {report.score}. {'; '.join(said)}.")
    return figure


@styled
def sweep_budget(report: Report) -> Figure:
    """Test loss against trained numbers: what lies lower at the same place is better."""
    figure = new_figure()
    axes = figure.subplots()
    said = []
    kinds: dict[tuple[str, float, float], list[tuple[int, float, float]]] = {}
    for name, arm in report.arms.items():
        mean, error = mean_and_error(arm.losses)
        method = arm.method
        key = (method.kind, method.b_rate, method.magnitude_rate)
        kinds.setdefault(key, []).append((arm.trained, mean, error))
        said.append(f"{name}: {arm.trained:,} numbers, loss {mean:.3g}")
    for (kind, *factors), points in kinds.items():
        x, y, errors = zip(*sorted(points), strict=True)
        style: dict[str, Any] = {"marker": "x", "linestyle": ":", "alpha": 0.6}
        if set(factors) == {1.0}:
            style = {
                "marker": {"full": "s", "lora": "o", "dora": "D"}[kind],
                "label": NAMES[kind],
            }
        axes.errorbar(x, y, yerr=errors, color=COLORS[kind], capsize=3, **style)
    axes.set_xscale("log")
    ticks = sorted({arm.trained for arm in report.arms.values()})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, ha="right", fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("trained numbers")
    axes.set_ylabel("test loss (nats)")
    lower = [n for n, d in report.at_equal_budget.items() if d.verdict == "lower"]
    compared = len(report.at_equal_budget)
    headline(
        figure,
        f"At equally many trained numbers DoRA's loss is lower than LoRA's at {len(lower)} of "
        f"{compared} ranks"
        if compared
        else "Test loss against trained numbers",
    )
    axes.legend()
    figure.set_label(f"Test loss against trained numbers. {'; '.join(said)}.")
    return figure
