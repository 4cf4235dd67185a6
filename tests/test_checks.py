"""Every check against the solution, other right answers, the stub, and every usual wrong answer."""

import dataclasses
import functools
import json
import linecache
import textwrap
from pathlib import Path
from typing import Any

import IPython
import pytest
import torch
from torch import Tensor

from minidora import checks, course, dora, plots, probe
from minidora.checks import core
from minidora.checks.core import CheckFailed, Exercise, NotStarted, WrongAnswer

SOLUTIONS = Path(__file__).parent.parent / "solutions"
EXERCISES = [exercise for lesson in checks.LESSONS.values() for exercise in lesson.exercises]
WRONG = [(exercise, wrong) for exercise in EXERCISES for wrong in exercise.wrong]


def name(value: Any) -> str:
    return value.number if isinstance(value, Exercise) else value.name.replace(" ", "-")


@functools.cache
def notebook(lesson: int) -> Any:
    path = SOLUTIONS / f"{checks.LESSONS[lesson].name}.ipynb"
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def cells(lesson: int) -> dict[str, str]:
    """Sources of a solution notebook's code cells, by grade_id; other cells under a number."""
    return {
        cell["metadata"].get("nbgrader", {}).get("grade_id", str(index)): "".join(cell["source"])
        for index, cell in enumerate(notebook(lesson)["cells"])
        if cell["cell_type"] == "code"
    }


def answer(exercise: Exercise, source: str | None = None) -> Any:
    """What the learner defines: the notebook's setup cells, then this source or the solution."""
    sources = cells(exercise.lesson)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for key, setup in sources.items():
        if key.isdigit():
            exec(setup, namespace)
    source = sources[exercise.name] if source is None else textwrap.dedent(source)
    file = f"<cell {exercise.number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)
    return namespace[exercise.answer]


def refusal(exercise: Exercise, source: str | Any) -> CheckFailed:
    """What the check says of an answer that it must refuse."""
    given = answer(exercise, source) if isinstance(source, str) else source
    with pytest.raises(CheckFailed) as caught:
        exercise(given)
    assert all(len(line) <= core.WIDTH for line in caught.value._render_traceback_())
    return caught.value


# ---- Solutions, stubs, wrong answers ----


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_solution_passes(exercise: Exercise, capsys: Any) -> None:
    exercise(answer(exercise))
    assert capsys.readouterr().out.startswith(f"{exercise.number} {exercise.answer} passed: ")


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_stub_is_not_started(exercise: Exercise) -> None:
    stub = course.with_stubs(
        cells(exercise.lesson)[exercise.name], f"exercise {exercise.number}: {exercise.answer}"
    )
    assert isinstance(refusal(exercise, stub), NotStarted)
    nbgraders = stub.replace(f'("exercise {exercise.number}: {exercise.answer}")', "()")
    assert nbgraders != stub
    assert isinstance(refusal(exercise, nbgraders), NotStarted)


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=name)
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_wrong_answer_is_refused_by_name(exercise: Exercise, wrong: WrongAnswer) -> None:
    solution = cells(exercise.lesson)[exercise.name]
    assert solution.count(wrong.old) == 1, "the mistake must be one place in the solution"
    failed = refusal(exercise, solution.replace(wrong.old, wrong.new))
    assert wrong.says in str(failed)
    assert not isinstance(failed, NotStarted)


def test_every_exercise_is_announced_as_its_check_declares_it() -> None:
    for lesson in checks.LESSONS.values():
        content = notebook(lesson.number)["cells"]
        texts = ["".join(cell["source"]) for cell in content]
        metadata = [cell["metadata"].get("nbgrader") for cell in content]
        assert len(lesson.exercises) >= 4
        points = [exercise.points for exercise in lesson.exercises]
        assert points == sorted(points), "from easy to hard"
        for index, exercise in enumerate(lesson.exercises, start=1):
            assert exercise.number == f"{lesson.number}.{index}"
            assert exercise.hint.endswith("?")
            assert len(exercise.wrong) >= 4
            assert len({wrong.name for wrong in exercise.wrong}) == len(exercise.wrong)
            solution = next(
                place for place, data in enumerate(metadata)
                if data and data["grade_id"] == exercise.name
            )  # fmt: skip
            assert texts[solution - 1].startswith(exercise.heading)
            assert texts[solution + 1] == f"checks.{exercise.name}({exercise.answer})"
            common = {"schema_version": 3, "task": False}
            assert metadata[solution] == common | {
                "grade_id": exercise.name, "solution": True, "grade": False, "locked": False
            }  # fmt: skip
            assert metadata[solution + 1] == common | {
                "grade_id": f"{exercise.name}_check", "solution": False, "grade": True,
                "locked": True, "points": exercise.points,
            }  # fmt: skip
        assert all(len(line) <= 100 for text in cells(lesson.number).values()
                   for line in text.splitlines())  # fmt: skip
        problems = course.problems(SOLUTIONS / f"{lesson.name}.ipynb", len(lesson.exercises))
        assert problems == []


# ---- Other right answers: a check must not insist on our way ----

RIGHT = {
    "init_lora": [
        """
        def init_lora(in_features, out_features, rank):
            bound = 1 / in_features**0.5
            a = nn.Parameter((2 * torch.rand(rank, in_features) - 1) * bound)
            return [a, nn.Parameter(torch.zeros([out_features, rank]))]
        """,
    ],
    "lora_delta": [
        """
        def lora_delta(lora_A, lora_B, alpha):
            return torch.einsum("or,ri->oi", lora_B, lora_A) * (alpha / len(lora_A))
        """,
    ],
    "lora_forward": [
        """
        def lora_forward(x, weight, bias, lora_A, lora_B, alpha):
            s = alpha / lora_B.size(1)
            return F.linear(F.linear(x, lora_A), lora_B).mul(s).add(x @ weight.T).add(bias)
        """,
        """
        def lora_forward(x, w, b, A, B, alpha):
            return F.linear(x, w + B @ A * alpha / A.shape[0], b)
        """,
    ],
    "freeze_base": [
        """
        def freeze_base(model):
            model.requires_grad_(False)
            for module in model.modules():
                for key in ("lora_A", "lora_B"):
                    if hasattr(module, key):
                        getattr(module, key).requires_grad = True
            return model
        """,
    ],
    "merge_lora": [
        """
        def merge_lora(base, lora_A, lora_B, alpha):
            out, in_ = base.weight.shape
            like = {"device": base.weight.device, "dtype": base.weight.dtype}
            merged = nn.Linear(in_, out, bias=base.bias is not None, **like)
            state = {k: v.clone() for k, v in base.state_dict().items()}
            state["weight"] += (alpha / len(lora_A) * lora_B @ lora_A).detach()
            merged.load_state_dict(state)
            return merged
        """,
    ],
    "lora_linear": [
        """
        class LoRALinear(nn.Module):
            def __init__(self, base, rank, alpha):
                super().__init__()
                self.base, self.rank, self.scaling = base, rank, alpha / rank
                for p in base.parameters():
                    p.requires_grad = False
                w = base.weight
                bound = base.in_features**-0.5
                like = {"dtype": w.dtype, "device": w.device}
                self.lora_A = nn.Parameter(torch.rand(rank, w.shape[1], **like) * 2 * bound - bound)
                self.lora_B = nn.Parameter(torch.zeros(w.shape[0], rank, **like))

            def forward(self, x):
                return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B * self.scaling)
        """,
    ],
    "row_norm": [
        "def row_norm(weight): return torch.linalg.vector_norm(weight, dim=-1)",
        "def row_norm(weight): return torch.stack([row.norm() for row in weight])",
        "def row_norm(w): return torch.sqrt(torch.einsum('ij,ij->i', w, w))",
        "row_norm = lambda w: (w**2).sum(axis=1) ** 0.5",
    ],
    "decompose": [
        "def decompose(w): return w.norm(dim=1), F.normalize(w, dim=1)",
    ],
    "dora_weight": [
        """
        def dora_weight(weight, lora_A, lora_B, magnitude, alpha):
            s = alpha / lora_A.size(0)
            return magnitude.unsqueeze(1) * F.normalize(weight + s * lora_B @ lora_A, dim=1)
        """,
    ],
    "dora_forward": [
        """
        def dora_forward(x, weight, bias, lora_A, lora_B, magnitude, alpha):
            v = weight + alpha / len(lora_A) * lora_B @ lora_A
            with torch.no_grad():
                norm = v.norm(dim=1, keepdim=True)
            return F.linear(x, magnitude.view(-1, 1) / norm * v, bias)
        """,
    ],
    "dora_weight_detached": [
        """
        def dora_weight_detached(weight, lora_A, lora_B, magnitude, alpha):
            v = weight + alpha / len(lora_A) * lora_B @ lora_A
            with torch.no_grad():
                norm = v.norm(dim=1, keepdim=True)
            return magnitude.view(-1, 1) / norm * v
        """,
    ],
    "update_for_weight": [
        "def update_for_weight(lora_B, lora_A): return lora_A.T @ lora_B.T",
        "def update_for_weight(b, a): return torch.einsum('ir,ro->oi', b, a)",
        "def update_for_weight(b, a): return (b @ a).transpose(0, 1).contiguous()",
    ],
    "merge_dora": [
        """
        def merge_dora(base, lora_A, lora_B, magnitude, alpha):
            v = base.weight.detach() + alpha / len(lora_A) * lora_B.detach() @ lora_A.detach()
            merged = copy.deepcopy(base)
            merged.weight = nn.Parameter(magnitude.detach()[:, None] * F.normalize(v, dim=1))
            return merged
        """,
    ],
    "dora_linear": [
        """
        class DoRALinear(nn.Module):
            def __init__(self, base, rank, alpha):
                super().__init__()
                base.weight.requires_grad = False
                if base.bias is not None:
                    base.bias.requires_grad = False
                self.base = base
                self.scaling = alpha / rank
                self.magnitude = nn.Parameter(base.weight.norm(dim=1).clone())
                self.lora_A = nn.Parameter(torch.empty_like(base.weight[:1]).repeat(rank, 1))
                nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
                self.lora_B = nn.Parameter(torch.zeros_like(base.weight[:, :1]).repeat(1, rank))

            def forward(self, x):
                with torch.no_grad():
                    norm = (self.base.weight + self.scaling * self.lora_B @ self.lora_A).norm(dim=1)
                y = x @ self.base.weight.T + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)
                y = self.magnitude / norm * y
                return y if self.base.bias is None else y + self.base.bias
        """,
    ],
}


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_other_right_answers_pass(exercise: Exercise) -> None:
    for source in RIGHT[exercise.name]:
        exercise(answer(exercise, source))


# ---- Answers of the wrong kind ----

ROW_NORM = next(exercise for exercise in EXERCISES if exercise.name == "row_norm")


def test_failure_is_one_line_with_one_question() -> None:
    lines = refusal(ROW_NORM, "def row_norm(w): return w.norm(dim=0)")._render_traceback_()
    assert lines[0].startswith(
        "CheckFailed: 3.1 row_norm, by hand: one norm per input (dim=0): DoRA"
    )
    assert " ".join(lines).endswith("Hint: " + ROW_NORM.hint)


def test_error_points_at_the_learners_own_line() -> None:
    source = """
    def helper(w):
        return torch.nn.functional.normalize(w, dim=7)

    def row_norm(weight):
        return helper(weight).sum(dim=1)
    """
    text = str(refusal(ROW_NORM, source))
    assert "your code raised IndexError: Dimension out of range" in text
    assert text.endswith("cell 3.1, line 3: return torch.nn.functional.normalize(w, dim=7)")


@pytest.mark.parametrize(
    "loop",
    [
        "while True:\n        pass",
        "while True:\n        try:\n            weight = weight + 1\n        except Exception:\n"
        "            pass",
    ],
)
def test_endless_loop_is_stopped_at_its_line(loop: str) -> None:
    quick = dataclasses.replace(ROW_NORM, seconds=0.2)
    text = str(refusal(quick, f"def row_norm(weight):\n    {loop}\n"))
    assert "stopped after 0.2 s: does this loop ever end?" in text
    assert "cell 3.1, line " in text


def test_loop_that_swallows_everything_is_stopped_too() -> None:
    rounds = []

    def row_norm(weight: Tensor) -> Tensor:
        while len(rounds) < 2:
            try:
                while True:
                    pass
            except:  # noqa: E722
                rounds.append(1)
        return weight

    refusal(dataclasses.replace(ROW_NORM, seconds=0.1), row_norm)
    assert len(rounds) == 2


def test_time_limit_leaves_nothing_behind() -> None:
    with probe.time_limit(0.05):
        pass
    torch.randn(300, 300) @ torch.randn(300, 300)
    assert not [thread for thread in __import__("threading").enumerate() if "watch" in thread.name]


def test_leaving_python_is_an_error_like_any_other() -> None:
    text = str(refusal(ROW_NORM, "def row_norm(w):\n    raise SystemExit(0)\n"))
    assert "your code raised SystemExit: 0" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.ones(3), "the check needs the function itself, checks.row_norm(row_norm)"),
        (dora.row_norm, "belongs to the package"),
        (lambda w: w.norm(dim=1).tolist(), "expected a tensor, got list"),
        (lambda w: w.norm(dim=1).numpy(), "expected a tensor, got ndarray"),
        (lambda w: w.norm(dim=1) * float("nan"), "expected [5, 13], got [nan, nan]"),
        (lambda w: w.norm(dim=1) + 1e-3, "expected [5, 13], got [5.001, 13]"),
        (lambda w: w.norm(dim=1)[:0], "expected the shape (out,) = (2,), got (0,)"),
        (lambda w: w.norm(dim=1) > 0, "expected [5, 13], got [1, 1]"),
        (lambda: 1, "takes 0 positional arguments but 1 was given"),
        (lambda w: object(), "expected a tensor, got object"),
    ],
)
def test_answer_of_the_wrong_kind(given: Any, says: str) -> None:
    assert says in str(refusal(ROW_NORM, given))


def test_stub_of_another_exercise_is_named() -> None:
    source = """
    def decompose(weight):
        raise NotImplementedError("exercise 3.2: decompose")

    def row_norm(weight):
        return decompose(weight)[0]
    """
    text = str(refusal(ROW_NORM, source))
    assert "it uses exercise 3.2, which is not started" in text


def test_picture_of_yours_beside_the_target(monkeypatch: Any) -> None:
    shown: list[Any] = []
    exercise = next(exercise for exercise in EXERCISES if exercise.name == "dora_weight")
    wrong = cells(3)["dora_weight"].replace("direction.norm(", "weight.norm(")
    monkeypatch.setattr(plots, "show", shown.append)
    refusal(exercise, wrong)
    assert shown == []  # a terminal cannot show it
    monkeypatch.setattr(IPython, "get_ipython", object)  # as in a notebook
    refusal(exercise, wrong)
    assert len(shown) == 1
    assert shown[0].get_suptitle() == "4 of 6 entries are off"
    assert "4 of 6" in shown[0].get_label()


# ---- Plain data ----


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).bfloat16(),
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor(True),
        torch.empty(0, 3),
        torch.randn(4, 3).T,
        torch.nn.Parameter(torch.randn(2), requires_grad=False),
        torch.empty(2, 3, device="meta"),
    ],
    ids=lambda value: f"{value.dtype}{tuple(value.shape)}",
)
def test_tensor_comes_back_as_it_was(value: Tensor) -> None:
    back = probe.unpack(json.loads(json.dumps(probe.pack(value))))
    assert type(back) is type(value)
    assert (back.dtype, back.shape, back.device) == (value.dtype, value.shape, value.device)
    assert back.requires_grad == value.requires_grad
    assert value.is_meta or torch.equal(back, value)


def test_plain_data_comes_back_and_the_rest_by_name() -> None:
    value = {"a": [1, (2.5, None)], "b": "text", "c": object()}
    back = probe.unpack(json.loads(json.dumps(probe.pack(value))))
    assert back == {"a": [1, (2.5, None)], "b": "text", "c": probe.Other("object")}
