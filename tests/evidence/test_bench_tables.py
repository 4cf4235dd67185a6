"""The tables of the benchmark's reports, and the page that is made of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minidora.cli import app
from minidora.evidence import bench, bench_tables

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "benchmarks").glob("*.json"))


def test_the_page_is_made_of_the_committed_reports(tmp_path: Path) -> None:
    for path in REPORTS:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = CliRunner().invoke(app, ["bench", "page", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    made = (tmp_path / "README.md").read_text()
    assert made == (ROOT / "benchmarks" / "README.md").read_text(), "run: minidora bench page"
    assert all(bench_tables.markdown_table(r) in made for r in bench.load_reports().values())
    assert CliRunner().invoke(app, ["bench", "page", "--folder", "nowhere"]).exit_code == 2


def row(
    features: int, contender: str, ratio: float, mib: float, work: str = "training step",
    dtype: str | None = None,
) -> bench.Result:  # fmt: skip
    return bench.Result(
        features, 8, 4, work, contender, 1.0, (ratio, ratio, ratio), int(mib * 2**20), 2**21, dtype
    )


MACHINE = bench.Machine(
    device="a CPU", threads="1", dtype="float32", mode="eager", python="3", torch="2", date="today"
)
SMALL_REPORT = bench.Report(
    MACHINE,
    (
        row(64, "LoRA", 1.0, 0.5),
        row(64, "DoRA", 1.104, 1.0),
        row(64, "PEFT DoRA", 1.0, 2.0),
        row(64, "PEFT LoRA", 0.9, 0.5),
        row(128, "LoRA", 1.0, 0.5),
        row(128, "DoRA", 1.3, 1.5),
        row(128, "PEFT DoRA", 1.4, 2.0),
        row(128, "PEFT LoRA", 0.9, 0.5),
        row(128, "DoRA", 7.0, 0.0, work="one token"),
    ),
)
HALF = (
    row(64, "LoRA", 1.0, 0.5, dtype="bfloat16"),
    row(64, "DoRA", 1.6, 0.75, dtype="bfloat16"),
    row(64, "DoRA, first form", 2.5, 0.75, dtype="bfloat16"),
    row(64, "PEFT DoRA", 1.5, 2.0, dtype="bfloat16"),
    row(64, "PEFT LoRA", 0.8, 0.5, dtype="bfloat16"),
)
BOTH = replace(SMALL_REPORT, results=SMALL_REPORT.results + HALF)


def test_the_price_names_every_shape_above_it_and_where_others_are_faster() -> None:
    assert bench_tables.price(SMALL_REPORT).splitlines() == [
        "eager: at most 1.10 times LoRA's time in 1 of 2 shapes",
        "  1.30 with 128 features, 8 tokens, rank 4",
        "  a lower median than ours: PEFT in 1 of 2 shapes",
        "  peak 1.00 to 1.00 times LoRA's, held 2 to 3 times",
    ]


@pytest.mark.parametrize(("n", "tokens", "r"), [(2048, 512, 512), (4096, 4096, 384), (128, 8, 4)])
def test_the_norm_is_compared_with_a_whole_lora_step(n: int, tokens: int, r: int) -> None:
    norm = 2 * n * n * r + 2 * r * r * n + 2 * n * r * r  # W A^T, A A^T, B (A A^T)
    lora = 2 * 2 * tokens * n * n + 3 * 2 * tokens * r * (n + n)
    assert bench_tables.norm_share(n, tokens, r) == pytest.approx(norm / lora, rel=1e-12)
    assert bench_tables.norm_share(n, tokens, r) < r / (2 * tokens)


def test_a_table_of_some_shapes_has_no_others() -> None:
    rows = bench_tables.markdown_table(SMALL_REPORT, [bench.Case(128, 8, 4)]).splitlines()[2:]
    assert rows == ["| 128, 8, 4 | 1.30 | 1.40 | 0.90 | 0.5, 1.5, 2.0 | 2.0, 2.0, 2.0 | 24.3 % |"]
    assert len(bench_tables.markdown_table(SMALL_REPORT).splitlines()) == 2 + 2


def test_the_whole_table_has_every_contender_and_both_works() -> None:
    header, _, *rows = bench_tables.whole_table(SMALL_REPORT).splitlines()
    assert (
        header == "| features, tokens, rank | LoRA, ours | DoRA, ours | LoRA, PEFT | DoRA, PEFT |"
    )
    assert "| 128, 8, 4: step | 1.00 | 1.30 | 0.90 | 1.40 |" in rows
    assert "| 128, 8, 4: held, MiB | 0.50 | 1.50 | 0.50 | 2.00 |" in rows
    assert "| 128, 8, 4: one token |  | 7.00 |  |  |" in rows
    assert len(rows) == 2 * 4
    compiled = replace(SMALL_REPORT, machine=replace(MACHINE, mode="compiled"))
    rows = bench_tables.whole_table(compiled).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {features}, 8, 4: {work}" for features in (64, 128) for work in ("step", "one token")
    ]


def test_rows_in_half_precision_stand_beside_the_others() -> None:
    """A shape in both: neither takes the other's place in a table, and each counts in the price."""
    header, _, first, _, half = bench_tables.markdown_table(BOTH).splitlines()
    assert "| DoRA, ours | its first form | DoRA, PEFT | LoRA, PEFT |" in header
    assert first.startswith("| 64, 8, 4 | 1.10 |  | 1.00 | 0.90 | 0.5, 1.0, 2.0 |")
    assert half.startswith("| 64, 8, 4 (bf16) | 1.60 | 2.50 | 1.50 | 0.80 | 0.5, 0.8, 2.0 |")
    assert len(bench_tables.markdown_table(BOTH, [bench.Case(64, 8, 4)]).splitlines()) == 2 + 1
    assert "| 64, 8, 4 (bf16): step | 1.00 | 1.60 | 2.50 | 0.80 | 1.50 |" in (
        bench_tables.whole_table(BOTH)
    )
    assert bench_tables.price(BOTH).splitlines()[:5] == [
        "eager: at most 1.10 times LoRA's time in 1 of 3 shapes",
        "  1.30 with 128 features, 8 tokens, rank 4",
        "  1.60 with 64 features, 8 tokens, rank 4 (bf16)",
        "  a lower median than ours: PEFT in 2 of 3 shapes",
        "  0.64 to 0.64 times the time of its first form",
    ]
