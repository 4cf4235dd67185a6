"""The benchmark measures what it says: equal outputs first, bytes that match the arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from minidora.cli import app
from minidora.evidence import bench, bench_tables

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "benchmarks").glob("*.json"))
CASE = bench.Case(192, 48, 4)


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    return bench.run([CASE], torch.device("cpu"), budget=0.0)


def rows(report: dict[str, object], work: str) -> dict[str, bench.Result]:
    results: list[dict[str, object]] = report["results"]  # type: ignore[assignment]
    found = [bench.Result(**row) for row in results if row["work"] == work]  # type: ignore[arg-type]
    return {row.contender: row for row in found}


def test_every_contender_is_timed_and_counted(report: dict[str, object]) -> None:
    step, token = rows(report, "training step"), rows(report, "one token")
    everywhere = {"linear", "LoRA", "DoRA", "source form", "PEFT LoRA", "PEFT DoRA"}
    assert everywhere | {"DoRA recompute"} <= set(step)
    assert everywhere | {"DoRA merged", "DoRA cached"} <= set(token)
    assert {*step, *token} <= set(bench.NAMES)
    assert step["LoRA"].ratio == token["LoRA"].ratio == (1.0, 1.0, 1.0)
    for row in (*step.values(), *token.values()):
        assert row.seconds > 0
        assert row.ratio[0] <= row.ratio[1] <= row.ratio[2]


@pytest.mark.slow
def test_small_layers_are_timed_in_both_precisions() -> None:
    small = bench.SMALL_CASES[0]
    assert set(bench.SMALL_CASES) <= set(bench.CPU_CASES)
    report = bench.run([CASE, small], torch.device("cpu"), budget=0.0)
    assert {(r["features"], r["tokens"]) for r in report["half_precision"]} == {(64, 64)}
    assert {(r["features"], r["tokens"]) for r in report["results"]} == {(192, 48), (64, 64)}
    rows = [line.split(" | ")[0] for line in bench_tables.markdown_table(report).splitlines()[2:]]
    assert rows == ["| 192, 48, 4", "| 64, 64, 4", "| 64, 64, 4 (bf16)"]


def test_bytes_held_follow_the_arithmetic(report: dict[str, object]) -> None:
    step = rows(report, "training step")
    output, hidden = 4 * 48 * 192, 4 * 48 * 4
    assert step["linear"].held == 0
    assert step["LoRA"].held == hidden  # s x A^T, for the gradient of B
    assert step["DoRA"].held == output + hidden + 2 * 4 * 192  # u; g and its norm
    assert step["PEFT DoRA"].held is not None
    assert step["PEFT DoRA"].held >= 2 * output


def test_a_contender_that_computes_something_else_is_refused() -> None:
    layers = bench.contenders(CASE, torch.device("cpu"), torch.float32)
    x = torch.randn(48, 192)
    bench.check_outputs(layers, x)
    for name in layers.keys() - {"linear", "DoRA"}:  # DoRA holds the values of the closed form
        wrong = {**layers, name: nn.Linear(192, 192, bias=False)}
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            bench.check_outputs(wrong, x)
    layers["linear"].weight.data.mul_(1.01)  # type: ignore[operator, union-attr]
    with pytest.raises(AssertionError, match="linear is off by"):
        bench.check_outputs(layers, x)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["DoRA merged", "DoRA cached"])
def test_one_token_is_compared_too(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = bench.check_outputs, []

    def check(layers: dict[str, nn.Module], x: torch.Tensor) -> None:
        seen.append((set(layers), len(x)))
        if wrong in layers:
            layers[wrong].base.bias = nn.Parameter(torch.ones(192))  # type: ignore[union-attr]
        original(layers, x)

    monkeypatch.setattr(bench, "check_outputs", check)
    with pytest.raises(AssertionError, match=f"{wrong} is off by"):
        bench.run_case(CASE, torch.device("cpu"), torch.float32, compiled=False, budget=0.0)
    assert [tokens for _, tokens in seen] == [48, 1]


def test_compiled_layers_are_compared_before_they_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the compiler itself, which takes minutes: what compile() is called on is checked."""

    def compile_wrongly(layer: nn.Module) -> None:
        layer.register_forward_hook(lambda module, args, y: 1.01 * y)

    monkeypatch.setattr(nn.Module, "compile", compile_wrongly)
    with pytest.raises(AssertionError, match="linear is off by"):
        bench.run_case(CASE, torch.device("cpu"), torch.float32, compiled=True, budget=0.0)


@pytest.mark.slow
def test_the_command_writes_json_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "QUICK", [CASE])
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")
    result = CliRunner().invoke(
        app, ["bench", "layers", "--quick", "--budget", "0", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "cpu-eager.json").read_text())
    assert set(written["machine"]) >= {"device", "threads", "dtype", "mode", "torch", "date"}
    assert (tmp_path / "cpu-eager.png").stat().st_size > 10_000


def test_reports_are_read_from_the_repository_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(bench.load_reports()) == [path.stem for path in REPORTS]
    assert bench.load_reports(tmp_path / "nowhere") == {}
    report = {"machine": {"dtype": "bfloat16", "mode": "eager"}, "results": []}
    (tmp_path / bench.file_name(report)).write_text(json.dumps(report))
    assert bench.load_reports(tmp_path) == {"cuda-eager": report}
