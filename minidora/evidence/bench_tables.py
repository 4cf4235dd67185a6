"""The reports of bench as tables: for the lesson, and benchmarks/README.md."""

from collections.abc import Collection, Mapping
from typing import Any

from minidora.evidence.bench import NAMES, REFERENCE, Case
from minidora.plots import step_flops


def norm_share(features: int, tokens: int, rank: int) -> float:
    """FLOPs of the factored norm of a square layer, as a share of those of a LoRA step.

    W A^T alone is rank / (2 tokens) of the step's two products with W, but a step has more than
    these.
    """
    flops = step_flops(features, features, rank, tokens)
    return flops["DoRA, ours"] / flops["LoRA"] - 1


def markdown_table(report: dict[str, Any], cases: Collection[Case] = ()) -> str:
    """The training steps of a report as a table: time as a ratio to our LoRA, held and peak in MiB.

    Of all its shapes, or of some cases in float32. The last column is norm_share.
    """
    lines = [
        "| features, tokens, rank | DoRA, ours | DoRA, PEFT | LoRA, PEFT "
        "| held, MiB: LoRA, DoRA, PEFT's DoRA | peak, MiB, of the same "
        "| FLOPs of the norm / of a LoRA step |",
        "|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[int, int, str], dict[str, dict[str, Any]]] = {}
    for name, note in (("results", ""), ("half_precision", " (bf16)")):
        for row in report.get(name, []):
            wanted = not cases or (not note and _case(row) in cases)
            if row["work"] == "training step" and wanted:
                key = (row["features"], row["tokens"], f"{row['rank']}{note}")
                rows.setdefault(key, {})[row["contender"]] = row
    for (features, tokens, label), cells in rows.items():
        rank = cells[REFERENCE]["rank"]
        ratios = [f"{cells[name]['ratio'][1]:.2f}" for name in ("DoRA", "PEFT DoRA", "PEFT LoRA")]
        held, peak = (
            ", ".join(
                f"{cells[name][what] / 2**20:.1f}" for name in (REFERENCE, "DoRA", "PEFT DoRA")
            )
            for what in ("held", "peak")
        )
        share = f"{100 * norm_share(features, tokens, rank):.1f} %"
        lines.append(
            f"| {features}, {tokens}, {label} | {' | '.join(ratios)} | {held} | {peak} | {share} |"
        )
    return "\n".join(lines)


def _case(row: Mapping[str, Any]) -> Case:
    return Case(row["features"], row["tokens"], row["rank"])


def whole_table(report: dict[str, Any]) -> str:
    """Every shape and contender: a step and one token as ratios to our LoRA, MiB held and peak.

    Without the bytes where the layers were compiled: they were counted before that.
    """
    names = [n for n in NAMES if any(row["contender"] == n for row in report["results"])]
    rows: dict[Case, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in report["results"]:
        rows.setdefault(_case(row), {})[row["contender"], row["work"]] = row
    works = {"step": "training step", "one token": "one token"}
    if report["machine"]["mode"] == "eager":
        works |= {"held, MiB": "training step", "peak, MiB": "training step"}
    lines = [
        "| features, tokens, rank | " + " | ".join(NAMES[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for case, cells in rows.items():
        for what, work in works.items():
            found = [
                _text(cells[name, work], what) if (name, work) in cells else "" for name in names
            ]
            shape = f"{case.features}, {case.tokens}, {case.rank}"
            lines.append(f"| {shape}: {what} | {' | '.join(found)} |")
    return "\n".join(lines)


def _text(row: Mapping[str, Any], what: str) -> str:
    """A ratio, or MiB held or at the peak."""
    if what.endswith(", MiB"):
        key = what.removesuffix(", MiB")
        return f"{row[key] / 2**20:.{2 if key == 'held' else 1}f}"
    return f"{row['ratio'][1]:.2f}"


def price(report: dict[str, Any], limit: float = 1.1) -> str:
    """What a report says of our DoRA's training step beside LoRA's, as lines to print."""
    steps: dict[str, dict[Case, dict[str, Any]]] = {}
    for row in report["results"]:
        if row["work"] == "training step":
            steps.setdefault(row["contender"], {})[_case(row)] = row
    ours, lora = steps["DoRA"], steps[REFERENCE]
    ratio = {case: round(row["ratio"][1], 2) for case, row in ours.items()}
    above = {case: value for case, value in ratio.items() if value > limit}
    lower = [
        f"{NAMES[name].removeprefix('DoRA, ')} in "
        f"{sum(theirs[case]['ratio'][1] < ours[case]['ratio'][1] for case in theirs)}"
        for name, theirs in steps.items()
        if name in ("PEFT DoRA", "torchtune DoRA", "source form")
    ]
    held, peak = (
        [ours[case][what] / lora[case][what] for case in ours] for what in ("held", "peak")
    )
    lines = [
        f"{report['machine']['mode']}: at most {limit:.2f} times LoRA's time in "
        f"{len(ratio) - len(above)} of {len(ratio)} shapes",
        *(
            f"  {value:.2f} with {case.features} features, {case.tokens} tokens, rank {case.rank}"
            for case, value in above.items()
        ),
        f"  a lower median than ours: {', '.join(lower)} of {len(ratio)} shapes",
        f"  peak {min(peak):.2f} to {max(peak):.2f} times LoRA's, "
        f"held {min(held):.0f} to {max(held):.0f} times",
    ]
    return "\n".join(lines)


def page(reports: dict[str, dict[str, Any]]) -> str:
    """benchmarks/README.md: made of the reports by `minidora bench page`, and never edited.

    Raises:
        ValueError: one of them is not a report.
    """
    for name, report in reports.items():
        if not isinstance(report, dict) or not {"machine", "results"} <= report.keys():
            raise ValueError(f"{name}.json is not a report of minidora bench layers")
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
        machine = report["machine"]
        lines += [
            "",
            f"## {name}",
            "",
            ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
            "",
            f"![Times as ratios to our LoRA's, {name}]({name}.png)",
            "",
            markdown_table(report),
        ]
    return "\n".join(lines) + "\n"
