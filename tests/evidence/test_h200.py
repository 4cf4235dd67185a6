"""The bytes that an H200 reported for LLaMA-7B under Adam, against the sizes worked out by hand."""

from minidora.evidence import gpu_page
from minidora.evidence.bench import load_json
from minidora.evidence.measures import ROOT

BLOCKS, WIDTH, INNER, TOKENS = 32, 4096, 11008, 32000
TENSORS = 2 + BLOCKS * 9 + 1  # embedding and head; 4 + 3 matrices and 2 norms a block; last norm
NUMBERS = 2 * TOKENS * WIDTH + BLOCKS * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH) + WIDTH
ROTARY = 2 * 512  # two buffers of 64 float32 frequencies, each in a block


def test_every_byte_of_the_h200_is_explained():
    report = load_json(ROOT / "benchmarks" / "h200")["llama7b-memory"]
    assert {key for key in report if key != "results"} >= {"device", "torch", "date", "model"}
    weights = 4 * NUMBERS + ROTARY
    foreach, fused = report["results"]["foreach"], report["results"]["fused"]
    assert foreach["weights"] == fused["weights"] == weights
    assert foreach["total_after_step"] == 16 * NUMBERS + ROTARY  # its counters are on the CPU
    assert foreach["peak_in_step"] == 20 * NUMBERS + ROTARY
    assert fused["total_after_step"] == 16 * NUMBERS + ROTARY + 512 * TENSORS
    assert fused["peak_in_step"] == fused["total_after_step"]


def test_the_gpu_page_is_made_of_the_committed_measurements():
    """The page is derived; a few of its numbers are read off the JSON by hand here."""
    folder = ROOT / "benchmarks" / "h200"
    reports = load_json(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == gpu_page.page(reports), "run: minidora bench page"
    row = next(
        r for r in reports["gpu-llama"]["results"]
        if (r["tokens"], r["checkpointing"], r["method"]) == (4096, False, "dora")
    )  # fmt: skip
    assert round(row["ratio"], 2) == 1.06
    assert "| 4096 tokens | 0.267 | 1.06 | 1.44 | 1.00 | 20.4, 27.1, 33.7 GiB |" in text
    assert "| 4096, 4096, 16 | " in text


def test_the_readme_states_what_was_measured():
    """README.md's GPU row, against the second run's JSON."""
    reports = load_json(ROOT / "benchmarks" / "h200")
    graph = {
        (r["features"], r["tokens"], r["rank"], r["contender"]): r["graph_ratio"]
        for r in reports["gpu-layers"]["results"]
    }
    whole = {
        (r["tokens"], r["checkpointing"], r["reuse_norms"], r["method"]): r["ratio"]
        for r in reports["gpu-llama"]["results"]
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for label, ours, theirs in (
        ("one layer of 4096, 4096 tokens, rank 16, as a CUDA graph",
         graph[4096, 4096, 16, "DoRA"], graph[4096, 4096, 16, "PEFT DoRA"]),
        ("LLaMA-7B, 4096 tokens", whole[4096, False, False, "dora"],
         whole[4096, False, False, "peft_dora"]),
        ("LLaMA-7B, 2048 tokens, probably limited by Python",
         whole[2048, False, False, "dora"], whole[2048, False, False, "peft_dora"]),
    ):  # fmt: skip
        assert f"| {label} | {ours:.2f} | {theirs:.2f} |" in readme


def test_aims_that_were_missed_are_called_so() -> None:
    reports = load_json(ROOT / "benchmarks" / "h200")
    rows = [line.split(" | ") for line in gpu_page.aims(reports).splitlines()[2:]]
    assert len(rows) == len(gpu_page.AIMS)
    for _, aim, ours, verdict, *_ in rows:
        assert verdict == ("met" if float(ours) <= float(aim) else "missed")
    assert {row[3] for row in rows} == {"met", "missed"}  # as of this report
    graph = next(
        r for r in reports["gpu-layers"]["results"]
        if (r["features"], r["tokens"], r["rank"], r["contender"]) == (4096, 4096, 384, "DoRA")
    )  # fmt: skip
    [row] = [row for row in rows if "rank 384" in row[0]]
    assert row[2] == f"{graph['graph_ratio']:.2f}"
    reused = next(
        r for r in reports["gpu-layers"]["results"]
        if (r["features"], r["rank"], r["contender"]) == (4096, 384, "DoRA, norms reused")
        and r["tokens"] == 4096
    )  # fmt: skip
    # By FLOPs 2 n^2 r + 4 n r^2 over 4 T n^2 + 12 T n r.
    n, r = 4096, 384
    share = (2 * n * n * r + 4 * n * r * r) / (4 * n**3 + 12 * n * n * r)
    time = graph["graph_ratio"] - reused["graph_ratio"]
    assert row[5:] == [f"{100 * share:.1f} %", f"{100 * time:.0f} % |"]
