"""The tables of the benchmark's reports, and the page that is made of them."""

import json
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
    assert all(
        bench_tables.markdown_table(json.loads(path.read_text())) in made for path in REPORTS
    )
    assert CliRunner().invoke(app, ["bench", "page", "--folder", "nowhere"]).exit_code == 2


def row(features: int, tokens: int, contender: str, ratio: float, mib: float, **other: object):  # type: ignore[no-untyped-def]
    made = {
        "features": features, "tokens": tokens, "rank": 4, "work": "training step",
        "contender": contender, "ratio": [ratio, ratio, ratio],
        "held": int(mib * 2**20), "peak": 2**21,
    }  # fmt: skip
    return {**made, **other}


SMALL_REPORT = {
    "machine": {"mode": "eager"},
    "results": [
        row(64, 8, "LoRA", 1.0, 0.5),
        row(64, 8, "DoRA", 1.104, 1.0),
        row(64, 8, "PEFT DoRA", 1.0, 2.0),
        row(64, 8, "PEFT LoRA", 0.9, 0.5),
        row(128, 8, "LoRA", 1.0, 0.5),
        row(128, 8, "DoRA", 1.3, 1.5),
        row(128, 8, "PEFT DoRA", 1.4, 2.0),
        row(128, 8, "PEFT LoRA", 0.9, 0.5),
        row(128, 8, "DoRA", 7.0, 0.0, work="one token"),
    ],
}


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
    compiled = {**SMALL_REPORT, "machine": {"mode": "compiled"}}
    rows = bench_tables.whole_table(compiled).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {features}, 8, 4: {work}" for features in (64, 128) for work in ("step", "one token")
    ]
