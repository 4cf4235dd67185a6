"""benchmarks/h200/README.md: what `make gpu` measured on one H200, as tables.

Its JSON files are those of minidora/evidence/gpu.py. Every ratio is to our LoRA in the same run.
"""

from pathlib import Path
from typing import Any

from minidora.evidence.bench import load_reports

FOLDER = Path(__file__).parents[2] / "benchmarks" / "h200"
NAMES = {"dora": "DoRA, ours", "peft_dora": "DoRA, PEFT", "peft_lora": "LoRA, PEFT"}


AIMS = (  # set before the kernels were written: a training step in units of our LoRA's
    ("layer, CUDA graph: 4096 features, 4096 tokens, rank 16", 1.10),
    ("layer, CUDA graph: 4096 features, 4096 tokens, rank 384", 1.20),
    ("layer, CUDA graph: 8192 features, 8192 tokens, rank 16", 1.10),
    ("LLaMA-7B, 4096 tokens", 1.08),
    ("LLaMA-7B, 2048 tokens", 1.20),
    ("LLaMA-7B, 2048 tokens, gradient checkpointing, norms reused", 1.10),
)


def aims(reports: dict[str, Any]) -> str:
    """What was aimed at beside what was measured, and PEFT's DoRA in the same run."""
    found: dict[str, dict[str, float]] = {}
    for row in reports["gpu-layers"]["results"]:
        shape = f"{row['features']} features, {row['tokens']} tokens, rank {row['rank']}"
        names = {"DoRA": "dora", "PEFT DoRA": "peft_dora"}
        if (name := names.get(row["contender"])) is not None:
            found.setdefault(f"layer, CUDA graph: {shape}", {})[name] = row["graph_ratio"]
    for row in reports["gpu-llama"]["results"]:
        found.setdefault(f"LLaMA-7B, {_setting(row)}", {})[row["method"]] = row["ratio"]
    lines = ["| training step | aim | DoRA, ours | | DoRA, PEFT |", "|---|---|---|---|---|"]
    for what, aim in AIMS:
        ours, theirs = found[what]["dora"], found[what].get("peft_dora")
        verdict = "met" if round(ours, 2) <= aim else "missed"
        beside = "" if theirs is None else f"{theirs:.2f}"
        lines.append(f"| {what} | {aim:.2f} | {ours:.2f} | {verdict} | {beside} |")
    return "\n".join(lines)


def _setting(row: dict[str, Any]) -> str:
    setting = f"{row['tokens']} tokens"
    setting += ", gradient checkpointing" if row["checkpointing"] else ""
    return setting + (", norms reused" if row["reuse_norms"] else "")


def layers(report: dict[str, Any]) -> str:
    """A training step of one layer: as PyTorch runs it / replayed as a CUDA graph."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["results"]:
        case = f"{row['features']}, {row['tokens']}, {row['rank']}"
        cases.setdefault(case, {})[row["contender"]] = row
    names = ("DoRA", "DoRA, norms reused", "PEFT DoRA", "PEFT LoRA")
    lines = [
        "| features, tokens, rank | LoRA, ms | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for case, rows in cases.items():
        lora = rows["LoRA"]
        times = f"{1e3 * lora['seconds']:.2f} / {1e3 * lora['graph_seconds']:.2f}"
        ratios = [
            f"{rows[name]['ratio'][1]:.2f} / {rows[name]['graph_ratio']:.2f}" for name in names
        ]
        lines.append(f"| {case} | {times} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def llama(report: dict[str, Any]) -> str:
    """A training step of a whole LLaMA-7B: seconds, ratios, GiB of the step's peak."""
    settings: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["results"]:
        settings.setdefault(_setting(row), {})[row["method"]] = row
    lines = [
        "| setting | LoRA, s | " + " | ".join(NAMES.values()) + " | peak: LoRA, DoRA, PEFT's |",
        "|---|---|" + "---|" * (len(NAMES) + 1),
    ]
    for setting, rows in settings.items():
        ratios = [f"{rows[name]['ratio']:.2f}" if name in rows else "" for name in NAMES]
        peaks = [
            f"{rows[name]['step_peak'] / 2**30:.1f}"
            for name in ("lora", "dora", "peft_dora")
            if name in rows
        ]
        lines.append(
            f"| {setting} | {rows['lora']['seconds']:.3f} | {' | '.join(ratios)} | "
            f"{', '.join(peaks)} GiB |"
        )
    return "\n".join(lines)


def compiled(report: dict[str, Any]) -> str:
    """A training step of one layer after layer.compile()."""
    lines = ["| features, tokens, rank | DoRA, ours | DoRA, PEFT |", "|---|---|---|"]
    rows = {(f"{r['features']}, {r['tokens']}, {r['rank']}", r["contender"]): r["ratio"][1]
            for r in report["results"]}  # fmt: skip
    for case in dict.fromkeys(case for case, _ in rows):
        ours, theirs = rows[case, "DoRA"], rows[case, "PEFT DoRA"]
        lines.append(f"| {case} | {ours:.2f} | {theirs:.2f} |")
    return "\n".join(lines)


def page(reports: dict[str, Any] | None = None) -> str:
    """The whole page; without reports, those of the repository."""
    found = load_reports(FOLDER) if reports is None else reports
    machine = ", ".join(f"{k} {v}" for k, v in found["gpu-layers"]["machine"].items())
    return "\n".join(
        [
            "# On one H200",
            "",
            "`minidora bench page` makes this page from the JSON files beside it; `make gpu` makes "
            "those. Every number is a ratio to our LoRA in the same run: a training step in bf16 "
            "as PyTorch runs it, and, after the slash, replayed as a CUDA graph, which is the "
            "GPU's time without Python's. Two runs of the same day, the second with a new norm "
            "for ranks above 64 and in compiled graphs, show how much the host's share varies.",
            "",
            "After these runs the norm of ranks 33 to 64 moved to the path of larger ranks: "
            "`gpu-kernels.json` shows its wrong sums at rank 64 (5e-4), which was the reason.",
            "",
            machine + ".",
            "",
            "## One layer",
            "",
            layers(found["gpu-layers"]),
            "",
            "The first run:",
            "",
            layers(found["gpu-layers-first-run"]),
            "",
            "## A whole LLaMA-7B, rank 32, five targets a block, batch 1",
            "",
            llama(found["gpu-llama"]),
            "",
            "The first run:",
            "",
            llama(found["gpu-llama-first-run"]),
            "",
            "## One layer, compiled",
            "",
            compiled(found["gpu-compiled"]),
            "",
        ]
    )
