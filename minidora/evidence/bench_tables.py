"""The reports of bench as tables: for the lesson, and benchmarks/README.md."""

from collections.abc import Collection

from minidora.evidence.bench import NAMES, REFERENCE, Case, Report, Result
from minidora.plots import step_flops


def norm_share(features: int, tokens: int, rank: int) -> float:
    """FLOPs of the factored norm of a square layer, as a share of those of a LoRA step.

    W A^T alone is rank / (2 tokens) of the step's two products with W, but a step has more than
    these.
    """
    flops = step_flops(features, features, rank, tokens)
    return flops["DoRA, ours"] / flops["LoRA"] - 1


STEP_RATIOS = {
    "DoRA": "DoRA, ours",
    "DoRA, first form": "its first form",
    "PEFT DoRA": "DoRA, PEFT",
    "PEFT LoRA": "LoRA, PEFT",
}
"""The columns of markdown_table: a report of the first edition has no first form."""


def markdown_table(report: Report, cases: Collection[Case] = ()) -> str:
    """The training steps of a report as a table: time as a ratio to our LoRA, held and peak in MiB.

    Of all its shapes, or of some cases in the machine's dtype. The last column is norm_share.
    """
    rows: dict[str, dict[str, Result]] = {}
    for row in report.results:
        wanted = not cases or (row.dtype is None and row.case in cases)
        if row.work == "training step" and wanted:
            rows.setdefault(row.label, {})[row.contender] = row
    names = [name for name in STEP_RATIOS if any(name in cells for cells in rows.values())]
    columns = " | ".join(STEP_RATIOS[name] for name in names)
    lines = [
        f"| features, tokens, rank | {columns} "
        "| held, MiB: LoRA, DoRA, PEFT's DoRA | peak, MiB, of the same "
        "| FLOPs of the norm / of a LoRA step |",
        "|---" * (len(names) + 4) + "|",
    ]
    for label, cells in rows.items():
        case = cells[REFERENCE].case
        ratios = [f"{cells[name].ratio[1]:.2f}" if name in cells else "" for name in names]
        held, peak = (
            ", ".join(
                f"{_bytes(cells[name], what) / 2**20:.1f}"
                for name in (REFERENCE, "DoRA", "PEFT DoRA")
            )
            for what in ("held", "peak")
        )
        share = f"{100 * norm_share(case.features, case.tokens, case.rank):.1f} %"
        lines.append(f"| {label} | {' | '.join(ratios)} | {held} | {peak} | {share} |")
    return "\n".join(lines)


def whole_table(report: Report) -> str:
    """Every shape and contender: a step and one token as ratios to our LoRA, MiB held and peak.

    Without the bytes where the layers were compiled: they were counted before that.
    """
    names = [n for n in NAMES if any(row.contender == n for row in report.results)]
    rows: dict[str, dict[tuple[str, str], Result]] = {}
    for row in report.results:
        rows.setdefault(row.label, {})[row.contender, row.work] = row
    works = {"step": "training step", "one token": "one token"}
    if report.machine.mode == "eager":
        works |= {"held, MiB": "training step", "peak, MiB": "training step"}
    lines = [
        "| features, tokens, rank | " + " | ".join(NAMES[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for label, cells in rows.items():
        for what, work in works.items():
            found = [
                _text(cells[name, work], what) if (name, work) in cells else "" for name in names
            ]
            lines.append(f"| {label}: {what} | {' | '.join(found)} |")
    return "\n".join(lines)


def _text(row: Result, what: str) -> str:
    """A ratio, or MiB held or at the peak."""
    if what.endswith(", MiB"):
        key = what.removesuffix(", MiB")
        return f"{_bytes(row, key) / 2**20:.{2 if key == 'held' else 1}f}"
    return f"{row.ratio[1]:.2f}"


def _bytes(row: Result, what: str) -> int:
    """Bytes "held" or at the "peak" of a training step."""
    count = row.held if what == "held" else row.peak
    if count is None:
        raise ValueError(f"the bytes of {row.work} are not counted")
    return count


def price(report: Report, limit: float = 1.1) -> str:
    """What a report says of our DoRA's training step beside LoRA's, as lines to print."""
    steps: dict[str, dict[str, Result]] = {}
    for row in report.results:
        if row.work == "training step":
            steps.setdefault(row.contender, {})[row.label] = row
    ours, lora = steps["DoRA"], steps[REFERENCE]
    ratio = {label: round(row.ratio[1], 2) for label, row in ours.items()}
    above = {label: value for label, value in ratio.items() if value > limit}
    lower = [
        f"{NAMES[name].removeprefix('DoRA, ')} in "
        f"{sum(row.ratio[1] < ours[label].ratio[1] for label, row in theirs.items())}"
        for name, theirs in steps.items()
        if name in ("PEFT DoRA", "torchtune DoRA", "source form")
    ]
    held, peak = (
        [_bytes(row, what) / _bytes(lora[label], what) for label, row in ours.items()]
        for what in ("held", "peak")
    )
    first = steps.get("DoRA, first form", {})
    to_first = [ours[label].ratio[1] / row.ratio[1] for label, row in first.items()]
    lines = [
        f"{report.machine.mode}: at most {limit:.2f} times LoRA's time in "
        f"{len(ratio) - len(above)} of {len(ratio)} shapes",
        *(
            f"  {value:.2f} with {ours[label].features} features, {ours[label].tokens} tokens, "
            f"rank {ours[label].rank}{ours[label].note}"
            for label, value in above.items()
        ),
        f"  a lower median than ours: {', '.join(lower)} of {len(ratio)} shapes",
        *(
            [f"  {min(to_first):.2f} to {max(to_first):.2f} times the time of its first form"]
            if to_first
            else []
        ),
        f"  peak {min(peak):.2f} to {max(peak):.2f} times LoRA's, "
        f"held {min(held):.0f} to {max(held):.0f} times",
    ]
    return "\n".join(lines)


def page(reports: dict[str, Report]) -> str:
    """benchmarks/README.md: made of the reports by `minidora bench page`, and never edited."""
    lines = [
        "# What the layer costs",
        "",
        "`minidora bench page` makes this page from the JSON files beside it; "
        "`minidora bench layers --output benchmarks`, with `--compiled` or without, makes those. "
        "They also hold one-token times, the spread, and torchtune where it was installed. What a "
        "GPU costs stands on [a page of its own](h200/README.md).",
        "",
        "A training step, its time as a ratio to our LoRA's (the median of rounds that time all in "
        "turn), and bytes in MiB: what is held between the forward and the backward pass, and the "
        "peak. Bytes are counted before compiling. The last column is the FLOPs of the norm as a "
        "share of those of a whole LoRA step: where it is large, with few tokens or a large rank, "
        "DoRA costs more than LoRA. FLOPs leave out that the norm also reads W, which takes as "
        "long for few tokens as for many.",
    ]
    for name, report in reports.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{report.machine}.",
            "",
            f"![Times as ratios to our LoRA's, {name}]({name}.png)",
            "",
            markdown_table(report),
        ]
    return "\n".join(lines) + "\n"
