"""What `make gpu` runs, on a CPU: small sizes, made-up clocks, and what it says of failures."""

import gc
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor, nn

from minidora import dora, memory
from minidora.evidence import bench, gpu, gpu_page
from minidora.evidence import gpu_parts as parts
from minidora.evidence.gpu import Done
from minidora.evidence.gpu_parts import Clock, State, Unfinished
from minidora.interpreter import problem

FAR = 1e18


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts at sizes of a CPU. Its memory is not counted, and there are no graphs."""
    monkeypatch.setattr(parts, "DEVICE", torch.device("cpu"))
    answers: dict[str, Any] = {
        "mem_get_info": (100 * 2**30, 0), "memory_allocated": 0, "max_memory_allocated": 0,
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(parts, "graph_seconds", lambda call: call() or 1e-3)
    monkeypatch.setattr(
        bench, "alternate",
        lambda layers, call, *_: {
            name: (2e-3, (1.0, 1.5, 2.0)) for name in layers if call(layers[name]) is None
        },
    )  # fmt: skip
    case = bench.Case(136, 24, 4)
    monkeypatch.setattr(parts, "LAYER_CASES", [case])
    monkeypatch.setattr(parts, "COMPILED_CASES", [case])
    monkeypatch.setattr(nn.Module, "compile", lambda module: None)
    monkeypatch.setattr(parts, "KERNEL_SIZES", [(24, 40, 3), (40, 24, 16)])
    monkeypatch.setattr(parts, "LLAMA_SETTINGS", [(16, False, False), (8, True, True)])
    tiny = memory.Architecture(128, 136, 2, 128, 50)
    monkeypatch.setitem(memory.LLAMAS, "LLaMA-7B", tiny)


def reports(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("gpu-*.json")}


def test_layers_and_a_llama_are_measured_and_let_go(
    on_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    unfinished = gpu.run(["layers", "llama", "compiled"], tmp_path, minutes=60)
    found = reports(tmp_path)
    assert {name: report["state"] for name, report in found.items()} == dict.fromkeys(
        ("gpu-layers", "gpu-llama", "gpu-compiled"), "complete"
    )
    assert unfinished == 0
    layers = {row["contender"]: row for row in found["gpu-layers"]["results"]}
    assert {"LoRA", "DoRA", "DoRA, first form", "DoRA, norms reused", "PEFT DoRA"} <= set(layers)
    assert layers["DoRA"]["held"] > layers["LoRA"]["held"] > 0
    assert [(row["tokens"], row["method"]) for row in found["gpu-llama"]["results"]] == [
        (16, "lora"), (16, "dora"), (16, "peft_dora"), (16, "peft_lora"), (8, "lora"), (8, "dora"),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in found["gpu-llama"]["results"])
    assert "| 136, 24, 4 | 2.00 / 1.00 |" in gpu_page.layers(found["gpu-layers"])
    assert "| 8 tokens, gradient checkpointing, norms reused |" in gpu_page.llama(
        found["gpu-llama"]
    )
    assert "| 136, 24, 4 | 1.50 | 1.50 |" in gpu_page.compiled(found["gpu-compiled"])
    gc.collect()
    kinds = (Tensor, nn.Parameter)
    left = [thing for thing in gc.get_objects() if type(thing) in kinds]
    shapes = {tuple(tensor.shape) for tensor in left if not tensor.is_nested}  # those have no shape
    assert not {(136, 136), (128, 136), (136, 128)} & shapes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* in divide:RuntimeWarning")  # the norm of a zero row
@pytest.mark.skipif(bool(problem), reason=problem)
def test_the_kernels_errors_are_small_in_the_interpreter(
    on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minidora import fused

    monkeypatch.setattr(fused, "MAX_RANK", 8)
    assert gpu.run(["kernels"], tmp_path, minutes=60) == 0
    rows = reports(tmp_path)["gpu-kernels"]["results"]
    large = "cuBLAS" if dora.MIXED_MM else "PyTorch"  # torch 2.6 has no such product
    assert {(row["rank"], row["dtype"][6:], row["path"]) for row in rows} == {
        (3, "bfloat16", "kernel"), (3, "float32", "kernel"), (3, "float16", "kernel"),
        (16, "bfloat16", large), (16, "float32", "PyTorch"), (16, "float16", "PyTorch"),
    }  # fmt: skip
    for row in rows:
        limit = 1e-5 if row["dtype"] == "torch.float32" else 1e-2
        assert row["norm"] < 1e-6
        assert max(row["y"], row["d_u"], row["d_m"]) < limit
    text = gpu_page.kernel_errors({"gpu-kernels": {"results": rows}})
    assert "W (40, 24), float32 , rank  16, PyTorch: " in text


def test_full_fine_tuning_leaves_out_what_was_there_before(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7,000 bytes that something else holds none is counted."""
    counts = iter([7000, 7100, 7400] * 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(counts))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7500)
    rows: parts.Rows = []
    parts.full_fine_tuning(rows, Clock(FAR))
    for row, name in zip(rows, ("fused", "foreach"), strict=True):
        assert (row["implementation"], row["blocks"]) == (name, 32)
        assert (row["weights"], row["after_step"], row["peak_in_step"]) == (100, 400, 500)
        assert row["allocated_before"] == 7000
    numbers = 2 * 50 * 128 + 2 * (4 * 128**2 + 3 * 128 * 136 + 2 * 128) + 128
    assert rows[0]["predicted"]["weights"] == 4 * numbers


def test_all_captures_run_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS kept 64 MiB for each of 33 streams, which full fine-tuning's bytes then included."""
    streams: list[object] = []

    class Stream:
        def __init__(self) -> None:
            streams.append(self)

        def wait_stream(self, other: object) -> None: ...

    event = SimpleNamespace(record=id, synchronize=int, elapsed_time=lambda end: 5.0)
    event.record = event.synchronize = lambda: None
    current = SimpleNamespace(wait_stream=lambda stream: None)
    fakes: dict[str, Callable[..., object]] = {
        "Stream": Stream, "current_stream": lambda: current, "stream": lambda _: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda _: nullcontext(), "Event": lambda **_: event,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    parts._side_stream.cache_clear()
    calls: list[int] = []
    for _ in range(3):
        assert parts.graph_seconds(lambda: calls.append(1)) == 5.0 / 1e4
    parts._side_stream.cache_clear()
    assert len(streams) == 1
    assert len(calls) == 3 * 4  # three to warm up, one captured


# ---- Time ----


@pytest.fixture
def clock(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    for module in (gpu, parts):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_what_a_part_leaves_goes_to_those_after_it(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lefts: dict[str, float] = {}

    def part(name: str, seconds: float, ending: Exception | None = None) -> Any:
        def run(rows: parts.Rows, limit: Clock) -> None:
            lefts[name] = limit.left()
            rows.append({"name": name})
            clock.seconds += seconds
            if ending is not None:
                raise ending
            limit.check()

        return run

    monkeypatch.setattr(
        gpu, "PARTS",
        {
            "short": (part("short", 10), 0.5),
            "wrong": (part("wrong", 20, ValueError("no such kernel")), 0.25),
            "late": (part("late", 200), 0.125),
            "last": (part("last", 0, Unfinished("3 of 9 tests failed")), 0.125),
        },
    )  # fmt: skip
    monkeypatch.setattr(gpu, "SPARE", 10)
    assert gpu.run(["short", "wrong", "late", "last"], tmp_path, minutes=5.5) == 3
    assert lefts == {"short": 160, "wrong": 155, "late": 145, "last": 90}
    assert clock.seconds - 1000 < 60 * 5.5
    found = reports(tmp_path)
    assert found["gpu-short"]["state"] == "complete"
    assert "ValueError: no such kernel" in found["gpu-wrong"]["state"]
    assert found["gpu-late"]["state"] == "out of time"
    assert found["gpu-last"]["state"] == "3 of 9 tests failed"
    assert all(report["results"] for report in found.values())  # what was measured is kept
    assert gpu.run(["late"], tmp_path, minutes=0.1) == 1  # no time at all is no error


def test_the_shares_are_a_whole() -> None:
    assert sum(share for _, share in gpu.PARTS.values()) == pytest.approx(1)
    assert next(iter(gpu.PARTS)) == "full"  # while the card is empty


# ---- Programs of their own ----

PROGRAM = """
import time
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "one is not two"

@pytest.mark.parametrize("text", ["a b", "c"])
def test_with_words(text): assert text == "c"

@pytest.mark.skip(reason="no")
def test_skipped(): pass

@pytest.fixture
def broken(): raise OSError("no device")

def test_error(broken): pass

def test_cuda_of_another_name(): pass
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("parallel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_failing_test_is_named(
    parallel: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not parallel:
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("xdist")
    (root / "tests" / "test_dora.py").write_text(PROGRAM)
    (root / "tests" / "test_stack.py").write_text(PROGRAM)  # of which those of CUDA are wanted
    rows: parts.Rows = []
    with pytest.raises(Unfinished, match="failed, 3 of 8 tests failed"):
        gpu.tests(rows, Clock(FAR))
    [row] = rows
    assert row["counts"] == {"ERROR": 1, "FAILED": 2, "PASSED": 4, "SKIPPED": 1}
    failed = {name.rpartition("/")[2]: why for name, why in row["failed"].items()}
    assert set(failed) == {
        "test_dora.py::test_wrong", "test_dora.py::test_with_words[a b]", "test_dora.py::test_error"
    }  # fmt: skip
    assert "one is not two" in failed["test_dora.py::test_wrong"]
    assert "no device" in failed["test_dora.py::test_error"]


def test_tests_that_hang_leave_the_names_of_those_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time ends once the hanging test has begun, however long the start takes."""
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    hanging = f"""
def test_hangs():
    open({str(root / "begun")!r}, "w").close()
    time.sleep(1800)
"""
    (root / "tests" / "test_lora.py").write_text(PROGRAM + hanging)

    class UntilBegun(Clock):
        def left(self) -> float:
            return 0.0

    real = gpu.subprocess.Popen.wait

    def wait(process: Any, timeout: float | None = None) -> int:
        while timeout == 1.0 and not (root / "begun").exists():
            gpu.time.sleep(0.05)
        return real(process, timeout)

    monkeypatch.setattr(gpu.subprocess.Popen, "wait", wait)
    rows: parts.Rows = []
    with pytest.raises(Unfinished, match="out of time, 3 of 7 tests failed"):
        gpu.tests(rows, UntilBegun(0))
    assert rows[0]["state"] == "out of time"
    assert len(rows[0]["failed"]) == 3


def lesson(path: Path, source: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, path)


def test_lessons_that_did_not_run_are_named(
    root: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose minutes are missing come first; each may take all that is left."""
    for number in range(1, 9):
        lesson(root / "notebooks" / f"0{number}_x.ipynb", "1")

    def run(command: list[str], limit: Clock) -> Done:
        name = Path(command[-1]).stem
        clock.seconds += 30
        state = State.FAILED if name == "02_x" else State.COMPLETE
        if limit.left() < 0:
            state = State.OUT_OF_TIME
        return Done(state, 30.0, f"output of {name}")

    monkeypatch.setattr(gpu, "_run", run)
    rows: parts.Rows = []
    with pytest.raises(Unfinished, match="4 of 8 lessons ran to their end"):
        gpu.lessons(rows, Clock(clock.seconds + 155))
    assert [(row["name"][:2], row["state"], row["minutes"]) for row in rows] == [
        ("07", "complete", 0.5), ("02", "failed", None), ("04", "complete", 0.5),
        ("05", "complete", 0.5), ("01", "complete", 0.5), ("03", "not run", None),
        ("06", "not run", None), ("08", "not run", None),
    ]  # fmt: skip
    assert rows[1]["tail"] == "output of 02_x"
    json.dumps(rows)


@pytest.mark.slow
def test_a_lesson_is_run_and_timed(root: Path) -> None:
    lesson(root / "notebooks" / "01_right.ipynb", "1 + 1")
    lesson(root / "notebooks" / "03_wrong.ipynb", "raise ValueError('a cell went wrong')")
    rows: parts.Rows = []
    with pytest.raises(Unfinished, match="1 of 2 lessons"):
        gpu.lessons(rows, Clock(FAR))
    right, wrong = rows
    assert right["state"] == "complete"
    assert right["minutes"] == round(right["seconds"] / 60, 1)
    assert "a cell went wrong" in wrong["tail"]


def test_a_program_s_output_is_kept() -> None:
    done = gpu._run([sys.executable, "-c", "import sys; print('one'); sys.exit('two')"], Clock(FAR))
    assert done.state is State.FAILED
    assert sorted(done.output.split()) == ["one", "two"]
