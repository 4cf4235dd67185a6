"""minidora.interpreter: Triton on a CPU, and what stands there where it cannot be imported."""

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from answers import EXERCISES, answer
from fresh import python
from nbclient import NotebookClient

from minidora import checks, dora, interpreter
from minidora.checks.exercise import CheckFailed, Exercise, NotPossible
from minidora.classroom.grade import Limits, judge
from minidora.classroom.notebook import read_notebook
from minidora.runner import probe
from minidora.runner.process import WorkerPool

ROOT = Path(__file__).parents[1]
KERNELS = [exercise for exercise in EXERCISES if exercise.triton]
needs_triton = pytest.mark.skipif(bool(interpreter.problem), reason=interpreter.problem)


@pytest.fixture
def without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Processes started from here find a Triton that cannot be imported, as on a Mac."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        'raise ImportError("no Triton for this system")'
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return dict(os.environ)


KERNEL = """
from minidora.interpreter import difference, problem, tl, triton

@triton.jit
def twice(y, x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at < n, 0.0), at < n)
"""


@needs_triton
def test_a_kernel_runs_without_anything_being_set() -> None:
    """In a file of its own, since Triton reads a kernel's source."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = Path(os.environ["IPYTHONDIR"], "twice.py")
    file.write_text(
        KERNEL
        + """
import torch

x, y = torch.arange(10.0), torch.zeros(10)
twice[(3,)](y, x, 10, BLOCK=4)
print(bool((y == 2 * x).all()), difference(y, 2 * x), repr(problem))
"""
    )
    printed = python(f"import runpy; runpy.run_path({str(file)!r})", environment)
    assert printed == "True 0e+00 of the largest entry ''\n"


@needs_triton
def test_what_lesson_7_imports_leaves_triton_to_the_interpreter() -> None:
    """Whatever imports Triton first, torch's counter of FLOPs for one, chooses how it runs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = (
        "from minidora.evidence import bench, gpu_counts, gpu_page; print(repr(gpu_counts.problem))"
    )
    assert python(code, environment) == "''\n"


def test_a_triton_that_compiles_is_not_taken() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    pytest.importorskip("triton")
    printed = python("import triton\nfrom minidora.interpreter import problem\nprint(problem)",
                     environment)  # fmt: skip
    assert printed.startswith("Triton was imported before, to compile kernels for a GPU: restart")


def test_without_triton_a_kernel_can_be_written(without_triton: dict[str, str]) -> None:
    code = KERNEL + "import torch\ntwice[(3,)](None, None, 10, BLOCK=4)\nprint(triton.cdiv(7, 4))"
    code += "\nprint(difference(torch.zeros(1), torch.ones(1)))"
    lines = python(code, without_triton).splitlines()
    why = (
        "Triton cannot be imported here (ImportError: no Triton for this system): it has packages "
        "for Linux only (pip install triton)."
    )
    assert lines == [f"twice did not run. {why}", "2", f"nothing to compare. {why}"]


def test_layers_on_a_gpu_do_not_take_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device, dtype, is_cuda = torch.device("cuda"), torch.bfloat16, True

    monkeypatch.setattr(dora, "_kernels_load", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not dora.kernels_serve(OnCuda())  # type: ignore[arg-type]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert dora.kernels_serve(OnCuda()) == (torch.version.hip is None)  # type: ignore[arg-type]


# ---- Exercises that need it ----


def test_which_exercises_need_triton() -> None:
    assert [exercise.number for exercise in KERNELS] == ["7.4", "7.5", "7.6"]


@pytest.mark.parametrize("exercise", KERNELS, ids=lambda exercise: exercise.number)
def test_without_triton_an_exercise_is_not_possible(
    exercise: Exercise, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = answer(exercise)
    monkeypatch.setattr(interpreter, "problem", "Triton cannot be imported here.")
    with pytest.raises(NotPossible) as caught:
        exercise(given)
    assert str(caught.value) == (
        f"{exercise.label} is not possible here. Triton cannot be imported here."
    )


@pytest.mark.slow
def test_without_triton_nothing_of_lesson_7_fails(without_triton: dict[str, str]) -> None:
    """Judged as `minidora check` does, in a process of its own."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_interpreter import judged
if __name__ == "__main__":
    print(*judged(), sep="\\n")
"""
    lines = python(code, without_triton).splitlines()
    assert lines == ["7.1 done", "7.2 done", "7.3 done", "7.4 not possible here",
                     "7.5 not possible here", "7.6 not possible here"]  # fmt: skip


def judged() -> list[str]:
    lesson = checks.LESSONS[7]
    notebook = read_notebook(ROOT / "solutions" / f"{lesson.name}.ipynb")
    with WorkerPool() as workers:
        results = judge(workers, notebook, lesson, lesson.exercises, Limits())
    return [f"{result.exercise.number} {result.state}" for result in results]


@needs_triton
@pytest.mark.slow
def test_the_solutions_pass_in_a_process_of_their_own() -> None:
    assert judged() == [f"7.{number} done" for number in range(1, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["notebooks", "solutions"])
def test_lesson_7_runs_through_without_triton(folder: str, without_triton: dict[str, str]) -> None:
    notebook = nbformat.read(ROOT / folder / "07_gpu_kernels.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, allow_errors=folder == "solutions").execute()
    printed = json.dumps(notebook)
    assert "Triton cannot be imported here (ImportError: no Triton for this system)" in printed
    errors = [
        output.ename
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "error"
    ]
    assert errors == (["NotPossible"] * 3 if folder == "solutions" else [])


# ---- What a check sees of a kernel ----


def kernel(body: str) -> Any:
    """A kernel with these lines, over y (8,) and x (8,)."""
    [one, *_] = [exercise for exercise in EXERCISES if exercise.name == "row_norm_kernel"]
    text = "@triton.jit\ndef row_norm_kernel(y, x, n, BLOCK: tl.constexpr):\n"
    return answer(one, text + "".join(f"    {line}\n" for line in body.splitlines()))


@needs_triton
def test_a_launch_gives_back_what_was_written_and_beside_what() -> None:
    args = [torch.zeros(5), torch.arange(5.0), 5]
    load = "at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\nv = tl.load(x + at, at < n, 0.0)\n"
    good = probe.launched(kernel(load + "tl.store(y + at, v, at < n)"), [2], args, {"BLOCK": 4})
    assert good["after"][0].tolist() == [0, 1, 2, 3, 4]
    assert good["beside"] == []
    assert args[0].tolist() == [0] * 5  # its own copies
    bad = probe.launched(kernel(load + "tl.store(y + at, v)"), [2], args, {"BLOCK": 4})
    assert bad["beside"] == [0]
    beyond = "at = tl.arange(0, BLOCK)\ntl.store(y + at, tl.load(x + at + 2), at < n)"
    found = probe.launched(kernel(beyond), [1], args, {"BLOCK": 8})
    assert found["after"][0].isnan().tolist() == [False] * 3 + [True] * 2


@needs_triton
def test_an_error_inside_a_kernel_shows_the_learners_line() -> None:
    given = kernel("at = tl.arange(0, BLOCK)\ntl.store(y + at, tl.lod(x + at))")
    [exercise] = [one for one in EXERCISES if one.name == "row_norm_kernel"]
    reply = probe.run(given, "launched", ([1], [torch.zeros(4), torch.zeros(4), 4], {"BLOCK": 4}),
                      {}, 10.0)  # fmt: skip
    assert reply["error"] == "raised"
    assert "lod" in reply["message"]
    assert reply["where"] == "cell 7.5, line 4: tl.store(y + at, tl.lod(x + at))"
    with pytest.raises(CheckFailed, match="this is no kernel: @triton.jit is missing above it"):
        exercise(lambda: None)
