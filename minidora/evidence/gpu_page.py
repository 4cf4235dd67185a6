"""benchmarks/h200/README.md: what `make gpu` measured on one H200, as tables.

Its JSON files are those of minidora/evidence/gpu.py. Every ratio is to our LoRA in the same run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidora.evidence.bench import load_json
from minidora.evidence.bench_tables import norm_share

FOLDER = Path(__file__).parents[2] / "benchmarks" / "h200"
MISSING = "no benchmarks/h200/*.json here: they are in the course's repository"
NAMES = {"dora": "DoRA, ours", "peft_dora": "DoRA, PEFT", "peft_lora": "LoRA, PEFT"}


AIMS = (  # set before the kernels were written: a training step in units of our LoRA's
    ("layer, CUDA graph: 4096 features, 4096 tokens, rank 16", 1.10),
    ("layer, CUDA graph: 4096 features, 4096 tokens, rank 384", 1.20),
    ("layer, CUDA graph: 8192 features, 8192 tokens, rank 16", 1.10),
    ("LLaMA-7B, 4096 tokens", 1.08),
    ("LLaMA-7B, 2048 tokens", 1.20),
    ("LLaMA-7B, 2048 tokens, gradient checkpointing, norms reused", 1.10),
)


MORE_AIMS = (
    ("layer, eager: 8192 features, 8192 tokens, rank 16", 1.12),
    ("LLaMA-7B, 4096 tokens, gradient checkpointing, norms reused", 1.10),
)
LARGEST_RANK_THEN = 64  # of the norm kernel before rows named their path; above it, cuBLAS
FASTER_THAN_PEFT = 1.6  # aimed at where a LLaMA-7B has enough to do, or recomputes


def aims(reports: dict[str, Any]) -> str:
    """What was aimed at beside what was measured, and PEFT's DoRA in the same run.

    Of a layer also the norm's share of a LoRA step, by FLOPs and by time: the time is what reusing
    the norm takes away.
    """
    found = _ratios(reports["gpu-layers"], reports["gpu-llama"])
    norm = {}
    for row in reports["gpu-layers"]["results"]:
        if row["contender"] == "DoRA, norms reused":
            case = row["features"], row["tokens"], row["rank"]
            what = "layer, CUDA graph: {} features, {} tokens, rank {}".format(*case)
            norm[what] = norm_share(*case), found[what]["dora"] - row["graph_ratio"]
    lines = [
        "| training step | aim | DoRA, ours | verdict | DoRA, PEFT | norm / LoRA: FLOPs | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, aim in AIMS:
        ours, theirs = found[what]["dora"], found[what].get("peft_dora")
        verdict = "met" if round(ours, 2) <= aim else "missed"
        beside = "" if theirs is None else f"{theirs:.2f}"
        shares = " | "
        if what in norm:
            flops, seconds = norm[what]
            shares = f"{100 * flops:.1f} % | {100 * seconds:.0f} %"
        lines.append(f"| {what} | {aim:.2f} | {ours:.2f} | {verdict} | {beside} | {shares} |")
    return "\n".join(lines)


def _ratios(layers: dict[str, Any], llama: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{training step: {method: its time to our LoRA's}} of one run."""
    found: dict[str, dict[str, float]] = {}
    names = {"DoRA": "dora", "PEFT DoRA": "peft_dora"}
    for row in layers["results"]:
        shape = f"{row['features']} features, {row['tokens']} tokens, rank {row['rank']}"
        if (name := names.get(row["contender"])) is not None:
            found.setdefault(f"layer, CUDA graph: {shape}", {})[name] = row["graph_ratio"]
            found.setdefault(f"layer, eager: {shape}", {})[name] = row["ratio"][1]
    for row in llama["results"]:
        found.setdefault(f"LLaMA-7B, {_setting(row)}", {})[row["method"]] = row["ratio"]
    return found


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


def before(layers: dict[str, Any], compiled: dict[str, Any]) -> str:
    """The first form and PEFT's DoRA beside it: eager / graph / compiled."""
    names = ("DoRA, first form", "PEFT DoRA")
    cells: dict[tuple[int, int, int], dict[str, list[float]]] = {}
    for rows, keys in (
        (layers["results"], ("ratio", "graph_ratio")),
        (compiled["results"], ("ratio",)),
    ):
        for row in rows:
            if row["contender"] in names:
                shape = cells.setdefault((row["features"], row["tokens"], row["rank"]), {})
                shape.setdefault(row["contender"], []).extend(
                    row[key][1] if key == "ratio" else row[key] for key in keys
                )
    lines = ["| features, tokens, rank | DoRA, first form | DoRA, PEFT |", "|---|---|---|"]
    for case, found in cells.items():
        texts = [" / ".join(f"{ratio:.2f}" for ratio in found[name]) for name in names]
        lines.append(f"| {', '.join(map(str, case))} | {' | '.join(texts)} |")
    return "\n".join(lines)


def kernel_errors(reports: dict[str, Any]) -> str:
    """Largest relative error of the norm against float64, at real sizes on the card, by path."""
    if not reports:
        return MISSING

    def path(row: dict[str, Any]) -> str:
        then = "kernel" if row["rank"] <= LARGEST_RANK_THEN else "cuBLAS"
        return str(row.get("path", then))

    return "\n".join(
        f"W ({row['out']}, {row['in']}), {row['dtype'][6:]:8}, rank {row['rank']:3}, "
        f"{path(row)}: {row['norm']:.0e}"
        for row in reports["gpu-kernels"]["results"]
    )


def reuse(reports: dict[str, Any]) -> str:
    """Ratios to our LoRA without and with reuse_norms, both runs; of a model the seconds too."""
    if not reports:
        return MISSING
    lines = [f"{'':46}first run        second run"]

    def add(label: str, per_run: list[list[float]], digits: int) -> None:
        texts = (" -> ".join(f"{value:.{digits}f}" for value in values) for values in per_run)
        lines.append(f"{label:46}" + "   ".join(f"{text:14}" for text in texts).rstrip())

    for label, key in (("eager", "ratio"), ("CUDA graph", "graph_ratio")):
        ratios = []
        for name in ("gpu-layers-first-run", "gpu-layers"):
            found = {
                row["contender"]: row[key][1] if key == "ratio" else row[key]
                for row in reports[name]["results"]
                if (row["features"], row["tokens"], row["rank"]) == (4096, 4096, 16)
            }
            ratios.append([found["DoRA"], found["DoRA, norms reused"]])
        add(f"layer 4096, 4096, 16, {label}", ratios, 2)
    for checkpointing in (False, True):

        def of(method: str, key: str, checkpointing: bool = checkpointing) -> list[list[float]]:
            return [
                [
                    row[key]
                    for reused in (False, True)
                    for row in reports[name]["results"]
                    if (row["tokens"], row["checkpointing"], row["reuse_norms"], row["method"])
                    == (2048, checkpointing, reused, method)
                ]
                for name in ("gpu-llama-first-run", "gpu-llama")
            ]

        label = "LLaMA-7B, 2048 tokens" + (", checkpointing" if checkpointing else "")
        add(label, of("dora", "ratio"), 2)
        add("  DoRA, seconds", of("dora", "seconds"), 3)
        add("  LoRA beside it, seconds", of("lora", "seconds"), 3)
    return "\n".join(lines)


def compiled_forms(reports: dict[str, Any]) -> str:
    """ms, and the median ratio to our LoRA of the same kind and run: eager, and both compiled."""
    if not reports:
        return MISSING
    lines = [
        "In brackets: to LoRA, eager to eager LoRA and compiled to compiled LoRA, on the same day",
        f"{'4096 features, 4096 tokens, rank 16':36} {'eager, ms':13} compiled, ms",
    ]
    for day, eager, compiled, names in (
        ("", "gpu-layers", "gpu-compiled", ("LoRA", "DoRA", "PEFT DoRA")),
        (
            "The day before:", "gpu-layers-before", "gpu-compiled-before",
            ("LoRA", "DoRA, first form", "PEFT DoRA"),
        ),
    ):  # fmt: skip
        lines += [day] if day else []
        for name in names:
            cells = []
            for report in (eager, compiled):
                [row] = [
                    row for row in reports[report]["results"]
                    if (row["features"], row["tokens"], row["rank"]) == (4096, 4096, 16)
                    and row["contender"] == name
                ]  # fmt: skip
                cells.append(f"{1e3 * row['seconds']:.2f} ({row['ratio'][1]:.2f})")
            lines.append(f"{name:36} {cells[0]:13} {cells[1]}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Aim:
    """What was asked before the kernels were measured: a ratio, and what the runs gave."""

    label: str
    most: float
    runs: tuple[float, ...]

    @property
    def verdict(self) -> str:
        met = sum(round(run, 2) <= round(self.most, 2) for run in self.runs)
        if not self.runs or met == len(self.runs):
            return "met" if self.runs else "not measured"
        return f"met in one run of {len(self.runs)}" if met else "missed"


def every_aim(reports: dict[str, Any]) -> list[Aim]:
    """Every aim, to our LoRA and to PEFT's DoRA, against both runs."""
    runs = [
        _ratios(reports[f"gpu-layers{run}"], reports[f"gpu-llama{run}"])
        for run in ("-first-run", "")
    ]
    found = [
        Aim(what, aim, tuple(run[what]["dora"] for run in runs))
        for what, aim in sorted(AIMS + MORE_AIMS)
    ]
    found.append(Aim("LLaMA-7B, compiled", 1.08, ()))
    to_peft = [
        {what: row["dora"] / row["peft_dora"] for what, row in run.items() if "peft_dora" in row}
        for run in runs
    ]
    for what in ("LLaMA-7B, 4096 tokens", "LLaMA-7B, 2048 tokens, gradient checkpointing"):
        ratios = tuple(run[what] for run in to_peft)
        found.append(Aim(f"{what}, to PEFT's DoRA", 1 / FASTER_THAN_PEFT, ratios))
    worst = tuple(max(run.values()) for run in to_peft)
    found.append(Aim("to PEFT's DoRA, the worst of all rows", 1.0, worst))
    times = {
        (row["features"], row["contender"]): row["ratio"][1]
        for row in reports["gpu-compiled"]["results"]
    }
    compiled = max(times[size, "DoRA"] / times[size, "PEFT DoRA"] for size in (4096, 2048))
    found.append(Aim("to PEFT's DoRA, the worst of compiled layers", 1.0, (compiled,)))
    return found


def every_aim_table(found: list[Aim]) -> str:
    """As Markdown, with those that were missed among the others."""
    lines = [
        "| ratio of times | aim, at most | first run | second run | |",
        "|---|---|---|---|---|",
    ]
    for aim in found:
        runs = ["", "", *(f"{run:.2f}" for run in aim.runs)][-2:]
        lines.append(f"| {aim.label} | {aim.most:.2f} | {' | '.join(runs)} | {aim.verdict} |")
    return "\n".join(lines)


def _both_runs(
    heading: str, table: Callable[[dict[str, Any]], str], reports: dict[str, Any], name: str
) -> list[str]:
    first = table(reports[f"{name}-first-run"])
    return [f"## {heading}", "", table(reports[name]), "", "The first run:", "", first, ""]


def page(reports: dict[str, Any] | None = None) -> str:
    """The whole page; without reports, those of the repository."""
    found = load_json(FOLDER) if reports is None else reports
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
            "`gpu-kernels.json` shows its wrong sums at rank 64 (5e-4), which was the reason. And "
            "kernels that ran before are started without asking Triton again which one serves, "
            "which was half of what Python does for a start. Neither has run on a card yet.",
            "",
            machine + ".",
            "",
            *_both_runs("One layer", layers, found, "gpu-layers"),
            *_both_runs(
                "A whole LLaMA-7B, rank 32, five targets a block, batch 1",
                llama,
                found,
                "gpu-llama",
            ),
            "## One layer, compiled",
            "",
            compiled(found["gpu-compiled"]),
            "",
            "## Before the kernels",
            "",
            "The layer's first form on a GPU, from another day; `gpu-layers-before.json` and "
            "`gpu-compiled-before.json`. Eager / as a CUDA graph / compiled, to LoRA in the same "
            "run:",
            "",
            before(found["gpu-layers-before"], found["gpu-compiled-before"]),
            "",
            "## Aims",
            "",
            "Set before the kernels were measured. A row is a ratio to our LoRA unless it says "
            "otherwise.",
            "",
            every_aim_table(every_aim(found)),
            "",
        ]
    )
