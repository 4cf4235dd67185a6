"""The benchmark measures what it says: equal outputs first, bytes that match the arithmetic."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from minidora.cli import app
from minidora.evidence import bench, bench_tables

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "benchmarks").glob("*.json"))
CASE = bench.Case(192, 160, 4)
SMALL = bench.SMALL_CASES[0]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run([CASE, SMALL], torch.device("cpu"), budget=0.0)


def rows(report: bench.Report, work: str) -> dict[str, bench.Result]:
    """Those of CASE, by contender."""
    return {row.contender: row for row in report.results if (row.case, row.work) == (CASE, work)}


@pytest.mark.slow
def test_every_contender_is_timed_and_counted(report: bench.Report) -> None:
    step, token = rows(report, "training step"), rows(report, "one token")
    everywhere = {
        "linear", "LoRA", "DoRA", "DoRA, first form", "source form", "PEFT LoRA", "PEFT DoRA"
    }  # fmt: skip
    assert everywhere | {"DoRA recompute"} <= set(step)
    assert everywhere | {"DoRA merged", "DoRA cached"} <= set(token)
    assert {*step, *token} <= set(bench.NAMES)
    assert step["LoRA"].ratio == token["LoRA"].ratio == (1.0, 1.0, 1.0)
    for row in (*step.values(), *token.values()):
        assert row.seconds > 0
        assert row.ratio[0] <= row.ratio[1] <= row.ratio[2]


@pytest.mark.slow
def test_small_layers_are_timed_in_both_precisions(report: bench.Report) -> None:
    assert set(bench.SMALL_CASES) <= set(bench.CPU_CASES)
    assert {row.case for row in report.results if row.dtype == "bfloat16"} == {SMALL}
    assert {row.case for row in report.results if row.dtype is None} == {CASE, SMALL}
    assert {row.contender for row in report.results if row.dtype} == set(bench.NAMES) & {
        row.contender for row in report.results
    }
    assert bench.Report.read(json.loads(report.text())) == report
    rows = [line.split(" | ")[0] for line in bench_tables.markdown_table(report).splitlines()[2:]]
    assert rows == ["| 192, 160, 4", "| 64, 64, 4", "| 64, 64, 4 (bf16)"]


@pytest.mark.slow
def test_bytes_held_follow_the_arithmetic(report: bench.Report) -> None:
    step = rows(report, "training step")
    output, hidden = 4 * 160 * 192, 4 * 160 * 4
    assert step["linear"].held == 0
    assert step["LoRA"].held == hidden  # s x A^T, for the gradient of B
    assert step["DoRA"].held == output + hidden + 2 * 4 * 192  # u; g and its norm
    assert step["PEFT DoRA"].held is not None
    assert step["PEFT DoRA"].held >= 2 * output


def test_a_contender_that_computes_something_else_is_refused() -> None:
    layers = bench.contenders(CASE, torch.device("cpu"), torch.float32)
    x = torch.randn(160, 192)
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
    assert [tokens for _, tokens in seen] == [160, 1]


@pytest.mark.slow
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
    monkeypatch.setattr(bench, "QUICK", [CASE, bench.SMALL_CASES[0]])
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")
    result = CliRunner().invoke(
        app, ["bench", "layers", "--quick", "--budget", "0", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    report = bench.load_reports(tmp_path)["cpu-eager"]
    assert set(report.machine.found()) >= {"device", "threads", "dtype", "mode", "torch", "date"}
    assert {row.label for row in report.results} == {"192, 160, 4", "64, 64, 4", "64, 64, 4 (bf16)"}
    table = result.output  # narrow here: a cell is broken into lines
    assert table.count("64, 64, 4") >= 2 * len(report.results) / 3
    assert table.count("(bf16)") == len(report.results) / 3
    assert (tmp_path / "cpu-eager.png").stat().st_size > 10_000


def test_reports_are_read_from_the_repository_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(bench.load_reports()) == [path.stem for path in REPORTS]
    assert bench.load_reports(tmp_path / "nowhere") == {}


def test_reports_are_written_as_they_were_read(report: bench.Report, tmp_path: Path) -> None:
    """The committed ones byte for byte: dtype stands in a row where it is not the machine's."""
    for path in REPORTS:
        committed = bench.load_reports()[path.stem]
        assert committed.text() == path.read_text(encoding="utf-8")
        assert committed.name == path.stem
    on_gpu = replace(report, machine=replace(report.machine, dtype="bfloat16", mode="compiled"))
    assert on_gpu.name == "cuda-compiled"
    half = replace(report.results[0], dtype="bfloat16")
    written = replace(report, results=(*report.results, half))
    (tmp_path / "some.json").write_text(written.text())
    assert bench.load_reports(tmp_path) == {"some": written}
    assert half.label == "192, 160, 4 (bf16)"


@pytest.mark.parametrize(
    "content",
    [[], {}, {"machine": {}, "results": []}, {"machine": 1, "results": [{"features": 8}]}],
)
def test_what_is_no_report_is_named(content: object, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"other\.json: this is not a report of minidora bench"):
        bench.load_reports(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_form_is_the_layer(dtype: torch.dtype) -> None:
    """Against float64, in both passes."""
    layers = bench.contenders(CASE, torch.device("cpu"), dtype)
    layer, dora = layers["DoRA, first form"], layers["DoRA"]
    x = torch.randn(160, 192, dtype=dtype, requires_grad=True)
    dy = torch.randn(160, 192, dtype=dtype)
    torch.autograd.backward(layer(x), dy)
    W, A, B, m = (
        t.detach().double().requires_grad_()
        for t in (dora.base.weight, dora.lora_A, dora.lora_B, dora.magnitude)
    )
    V = W + dora.scaling * B @ A
    x64 = x.detach().double().requires_grad_()
    y = x64 @ ((m / V.norm(dim=1).detach())[:, None] * V).T
    y.backward(dy.double())
    for name, exact in {"lora_A": A, "lora_B": B, "magnitude": m}.items():
        got = layer.get_parameter(f"dora.{name}").grad
        assert got is not None
        assert (got.double() - exact.grad).norm() < TOLERANCE[dtype] * exact.grad.norm()
    assert (x.grad.double() - x64.grad).norm() < TOLERANCE[dtype] * x64.grad.norm()
