"""What every spec is tried with: its own mistakes, and mistakes made from the solution."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from answers import EXERCISES, answer, name, refusal
from torch import Tensor, nn

from minidora.checks.adapters import Layer, Merge, linear
from minidora.checks.exercise import CheckFailed, Exercise
from minidora.checks.oracle import BY_HEART, wide
from minidora.checks.spec import Spec

SPECS = [exercise for exercise in EXERCISES if isinstance(exercise, Spec)]
Function = Callable[..., Any]


def each(value: Any, change: Function) -> Any:
    """A value with its tensors changed."""
    if isinstance(value, tuple | list):
        return type(value)(each(part, change) for part in value)
    return change(value) if isinstance(value, Tensor) else value


def floats(args: Any) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]


# ---- An answer as a function of the oracle's arguments, and back ----


def as_function(exercise: Spec) -> Function:
    """The solution, of whatever kind it is, as a function of the oracle's arguments."""
    solution = answer(exercise)
    if isinstance(exercise, Merge):

        def merged(weight: Tensor, *rest: Any) -> Tensor:
            base = linear(weight, None)
            return solution(base, *rest).weight  # type: ignore[no-any-return]

        return merged
    if isinstance(exercise, Layer):

        def layer(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
            module = solution(linear(weight, bias), len(rest[0]), rest[-1])
            values = dict(zip(exercise.names, rest[:-1], strict=True))
            return torch.func.functional_call(module, values, (x,))

        return layer
    return solution  # type: ignore[no-any-return]


def as_answer(exercise: Spec, function: Function) -> Any:
    """A function of the oracle's arguments as an answer of the exercise's kind."""
    if isinstance(exercise, Merge):

        def merge(base: nn.Linear, *rest: Any) -> nn.Linear | None:
            weight = function(base.weight, *rest)
            if weight is None:
                return None
            merged = copy.deepcopy(base)
            merged.weight = nn.Parameter(weight.detach())
            return merged

        return merge
    if isinstance(exercise, Layer):
        solution = answer(exercise)

        class Wrong(solution):  # type: ignore[misc, valid-type]
            def forward(self, x: Tensor) -> Any:
                values = [getattr(self, name) for name in exercise.names]
                alpha = self.scaling * len(self.lora_A)
                return function(x, self.base.weight, self.base.bias, *values, alpha)

        return Wrong
    return function


# ---- The spec itself ----


@pytest.mark.parametrize("exercise", SPECS, ids=name)
def test_oracle_agrees_with_the_examples(exercise: Spec) -> None:
    for _, args, value in exercise.examples:
        assert exercise.alike(exercise.want(args), value)


@pytest.mark.parametrize("exercise", SPECS, ids=name)
def test_some_draw_tells_all_mistakes_apart(exercise: Spec) -> None:
    args = exercise.telling()
    values = [exercise.want(args), *(value for value, _, _ in exercise.known(args))]
    for index, value in enumerate(values):
        assert not any(exercise.alike(value, other) for other in values[:index])


def held(form: Function, own: list[Tensor]) -> int:
    """Bytes of the matrices that autograd saves beside its own tensors and g, each storage once."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, g = form(*own)
    existed = {tensor.untyped_storage().data_ptr() for tensor in (*own, g)}
    storages = [tensor.untyped_storage() for tensor in saved if tensor.ndim == 2]
    every = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(count for key, count in every.items() if key not in existed)


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    return x @ w.T + (2.0 * (x @ a.T)) @ b.T, m


def merged(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    v = w + 2.0 * (b @ a)
    g = m / v.detach().norm(dim=1)
    return x @ (g[:, None] * v).T, g


def composed(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    g = m / (w + 2.0 * (b @ a)).detach().norm(dim=1)
    return g * lora(x, w, a, b, m)[0], g


@pytest.mark.parametrize("sizes", [(3, 5, 8, 2), (2, 3, 2, 5), (7, 40, 6, 3)])
def test_bytes_of_6_2_are_those_that_autograd_holds(sizes: tuple[int, ...]) -> None:
    t, i, o, r = sizes
    own = [torch.randn(*shape) for shape in ((t, i), (o, i), (r, i), (o, r), (o,))]
    for trained in (own[0], *own[2:]):
        trained.requires_grad_()
    oracle = next(exercise for exercise in SPECS if exercise.name == "held_bytes").oracle
    assert tuple(held(form, own) for form in (lora, merged, composed)) == oracle(*sizes, 4)


def derived() -> list[Any]:
    """Every mistake that a spec names, as a wrong answer."""
    found = {}
    for exercise in SPECS:
        sizes = dict.fromkeys(exercise.random_sizes(), 4)
        for args in (exercise.telling(), exercise.some(sizes)):
            for index, mistakes in enumerate(exercise.mistakes):
                for message, value in mistakes.function(*args):
                    if value is not None:
                        found[exercise.number, message] = (exercise, index, message)
    return list(found.values())


@pytest.mark.parametrize(
    ("exercise", "index", "message"), derived(), ids=lambda value: getattr(value, "number", None)
)
def test_named_mistake_is_refused_by_its_name(exercise: Spec, index: int, message: str) -> None:
    mistakes, solution = exercise.mistakes[index], as_function(exercise)

    def wrong(*args: Any) -> Any:
        plain = wide([arg.detach() if isinstance(arg, Tensor) else arg for arg in args])
        value = dict(mistakes.function(*plain)).get(message)
        if value is None:  # right where it is no mistake
            return solution(*args)
        whole = list(exercise.parts(exercise.oracle(*plain)))
        if mistakes.part:
            whole[[slot.name for slot in exercise.outputs].index(mistakes.part)] = value
        else:
            whole = list(exercise.parts(value))
        dtype = floats(args)[0].dtype if floats(args) else torch.float64
        parts = each(
            tuple(whole), lambda part: part.to(dtype) if part.is_floating_point() else part
        )
        return parts if len(exercise.outputs) > 1 else parts[0]

    assert message in str(refusal(exercise, as_answer(exercise, wrong)))


# ---- Mistakes made from the solution ----


def printed(solution: Function, exercise: Spec) -> Function:
    return lambda *args: (solution(*args), None)[1]


def by_heart(solution: Function, exercise: Spec) -> Function:
    _, args, _ = exercise.examples[0]
    return lambda *_: solution(*args)


def detached(solution: Function, exercise: Spec) -> Function:
    return lambda *args: each(solution(*args), Tensor.detach)


def always_float32(solution: Function, exercise: Spec) -> Function:
    return lambda *args: each(solution(*args), Tensor.float)


def float32_inside(solution: Function, exercise: Spec) -> Function:
    def wrong(*args: Any) -> Any:
        narrow = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return each(solution(*narrow), lambda part: part.to(floats(args)[0].dtype))

    return wrong


def in_place(solution: Function, exercise: Spec) -> Function:
    def wrong(*args: Any) -> Any:
        value = solution(*[copy.deepcopy(arg.detach()) if isinstance(arg, Tensor) else arg
                           for arg in args])  # fmt: skip
        with torch.no_grad():  # of a layer x: its parameters are its own
            floats(args)[0 if isinstance(exercise, Layer) else -1].mul_(2)
        return value

    return wrong


def on_the_cpu(solution: Function, exercise: Spec) -> Function:
    def wrong(*args: Any) -> Any:
        return each(solution(*args), lambda y: torch.zeros(y.shape, dtype=y.dtype) + y)

    return wrong


def through_numpy(solution: Function, exercise: Spec) -> Function:
    def wrong(*args: Any) -> Any:
        return each(solution(*args), lambda y: y + torch.from_numpy(0 * y.detach().numpy()))

    return wrong


def one_shape(solution: Function, exercise: Spec) -> Function:
    shapes = [getattr(arg, "shape", None) for arg in exercise.examples[0][1]]

    def wrong(*args: Any) -> Any:
        assert [getattr(arg, "shape", None) for arg in args] == shapes, "another shape"
        return solution(*args)

    return wrong


def kept(solution: Function, exercise: Spec) -> Function:
    store: dict[Any, Any] = {}

    def wrong(*args: Any) -> Any:
        key = tuple(getattr(arg, "shape", None) for arg in args)
        key += tuple(arg.dtype for arg in floats(args))
        return store.setdefault(key, solution(*args))

    return wrong


def contiguous(solution: Function, exercise: Spec) -> Function:
    return lambda *args: solution(
        *(arg.view(-1).view(arg.shape) if isinstance(arg, Tensor) else arg for arg in args)
    )


def squeezed(solution: Function, exercise: Spec) -> Function:
    return lambda *args: each(solution(*args), Tensor.squeeze)


def without_gradients(solution: Function, exercise: Spec) -> Function:
    def wrong(*args: Any) -> Any:
        value = solution(*args)
        torch.set_grad_enabled(False)
        return value

    return wrong


def seeded(solution: Function, exercise: Spec) -> Function:
    def wrong(*args: Any) -> Any:
        torch.manual_seed(0)
        return solution(*args)

    return wrong


def hooked(solution: Function, exercise: Spec) -> Function:
    def wrong(*args: Any) -> Any:
        handles.append(nn.modules.module.register_module_forward_hook(lambda *_: None))
        return solution(*args)

    return wrong


handles: list[Any] = []
FUNCTIONS = [e for e in SPECS if not isinstance(e, Merge | Layer)]  # which draw no numbers
HAS_TENSORS = [e for e in SPECS if any(slot.axes is not None for slot in e.inputs)]
SAME = [e for e in HAS_TENSORS if e.dtypes == "same"]
ARRAYS = [e for e in SAME if all(slot.axes for slot in e.outputs)]  # a number may be on the CPU
MATRICES = [e for e in SPECS if any(len(slot.axes or ()) > 1 for slot in e.inputs)]
DIFFERENTIABLE = [e for e in SPECS if e.grads]
GENERIC: list[tuple[Function, list[Spec], str]] = [
    (printed, SPECS, "got None"),
    (by_heart, [e for e in SPECS if e.examples], BY_HEART),
    (detached, DIFFERENTIABLE, "no gradient reaches"),
    (always_float32, SAME, "float32"),
    (float32_inside, SAME, "computed in float32"),
    (in_place, HAS_TENSORS, "changes the caller's"),
    (on_the_cpu, ARRAYS, "works on a CPU only"),
    (through_numpy, ARRAYS, "works on a CPU only"),
    (one_shape, [e for e in SPECS if e.examples and e.random_sizes()], "another shape"),
    (kept, HAS_TENSORS, ""),  # by whichever draw comes first with sizes seen before
    (contiguous, MATRICES, "not contiguous: your code raised"),
    (squeezed, [e for e in SPECS if any(slot.axes for slot in e.outputs)], "squeeze()"),
    (without_gradients, SPECS, "it changes whether gradients are recorded"),
    (seeded, FUNCTIONS, "it changes torch's random state"),
    (hooked, SPECS, "it changes the hooks of all modules"),
]


@pytest.mark.parametrize(
    ("make", "exercise", "says"),
    [(make, exercise, says) for make, specs, says in GENERIC for exercise in specs],
    ids=lambda value: getattr(value, "number", None) or getattr(value, "__name__", ""),
)
def test_usual_mistake_is_refused(make: Function, exercise: Spec, says: str) -> None:
    try:
        wrong = as_answer(exercise, make(as_function(exercise), exercise))
        assert says in str(refusal(exercise, wrong))
    finally:
        while handles:
            handles.pop().remove()
    assert torch.is_grad_enabled()


# ---- Whatever a notebook has set, and whatever comes back ----


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
@pytest.mark.parametrize(
    "setting",
    [
        "meta device",
        "float64",
        pytest.param("no gradients", marks=pytest.mark.slow),
        pytest.param("inference", marks=pytest.mark.slow),
    ],
)
def test_right_answer_passes_whatever_a_notebook_has_set(
    exercise: Exercise, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once a default device was set back, torch 2.6 cannot say which it is: leave no trace of it.
    monkeypatch.setattr(torch, "_GLOBAL_DEVICE_CONTEXT", threading.local())
    solution = answer(exercise)
    try:
        if setting == "meta device":
            torch.set_default_device("meta")
        elif setting == "float64":
            torch.set_default_dtype(torch.float64)
        elif setting == "no gradients":
            torch.set_grad_enabled(False)
        with torch.inference_mode(setting == "inference"):
            exercise(solution)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


class Broken(nn.Module):
    @property
    def scaling(self) -> float:
        raise ValueError("no scaling")


loop: list[Any] = []
loop.append(loop)
ODD: list[Any] = [
    None, True, 0, -1, 10**400, float("nan"), float("inf"), 1j, "text", "\ud800", b"bytes", ..., [],
    (), {}, {1: {2}}, loop, [None, None], (1, 2), (1, 2, 3), [1.0, "a", None], object(), object,
    int, len, range(3), Broken(), nn.Module(), nn.Linear(2, 3), nn.Linear(0, 0), nn.ReLU(),
    torch.tensor(1.0), torch.tensor([]), torch.tensor(True), torch.tensor([True, False]),
    torch.tensor(1j), torch.tensor([1 + 1j, 2]), torch.tensor(3), torch.empty(0, 3),
    torch.empty(2, device="meta"), torch.eye(3).to_sparse(), torch.full((2, 2), float("nan")),
    torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.ones(2, 3, 4, 5, 6),
    torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), nn.Parameter(torch.ones(2)),
    (torch.ones(2), None), (torch.ones(2), torch.ones(2, 2)), [torch.ones(1)] * 3, torch.float32,
    torch.device("cpu"), iter([1, 2]), Exception("x"), (1.0, 2.0, "higher"), (1.0, 2.0, 3),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
@pytest.mark.filterwarnings("ignore")
def test_odd_value_gets_a_sentence(exercise: Exercise) -> None:
    for odd in ODD:
        with pytest.raises(CheckFailed) as caught:  # and not a CheckError
            exercise(lambda *args, odd=odd: odd)
        assert str(caught.value).startswith(exercise.number)


# ---- Checks by hand: the same mistakes, as far as they can be made from the solution ----


def first_value(solution: Function, exercise: Exercise) -> Function:
    """By heart: whatever it is asked, it gives what was right the first time."""
    store: list[Any] = []

    def wrong(*args: Any) -> Any:
        if not store:
            store.append(solution(*args))
        return store[0]

    return wrong


def sizes(args: Any) -> list[Any]:
    return [getattr(arg, "shape", len(arg) if isinstance(arg, list) else None) for arg in args]


def kept_by_size(solution: Function, exercise: Exercise) -> Function:
    store: dict[str, Any] = {}

    def wrong(*args: Any) -> Any:
        key = str(sizes(args))
        if key not in store:
            store[key] = solution(*args)
        return store[key]

    return wrong


def first_size(solution: Function, exercise: Exercise) -> Function:
    first: list[Any] = []

    def wrong(*args: Any) -> Any:
        first.append(sizes(args))
        assert first[-1] == first[0], "another size"
        return solution(*args)

    return wrong


def into_arguments(solution: Function, exercise: Exercise) -> Function:
    """Changes its last argument that is a tensor or a list."""

    def wrong(*args: Any) -> Any:
        value = solution(*each(args, torch.clone))
        last = [arg for arg in args if isinstance(arg, Tensor | list)][-1]
        with torch.no_grad():
            last.reverse() if isinstance(last, list) else last.mul_(2)
        return value

    return wrong


BY_HAND = {e.name: e for e in EXERCISES if not isinstance(e, Spec)}
ALL_BY_HAND = [e for e in BY_HAND.values() if not e.triton]
PLAIN = [e for e in ALL_BY_HAND if not isinstance(answer(e), type)]
OF_TENSORS = [BY_HAND[name] for name in ("round_once", "split_float32")]
HALVES = [*OF_TENSORS, BY_HAND["compose_function"]]
SIZED = [e for e in ALL_BY_HAND if e.name not in (
    "init_lora", "split_rows", "adapted_copy", "freeze_base")]  # fmt: skip
GIVEN = [e for e in SIZED if e.name != "train"] + [BY_HAND["split_rows"], BY_HAND["adapted_copy"]]
BY_HAND_GENERIC: list[tuple[Function, list[Exercise], str]] = [
    (printed, [e for e in ALL_BY_HAND if e.name != "freeze_base"], ""),
    (first_value, [e for e in ALL_BY_HAND if e.name != "freeze_base"], ""),
    (kept_by_size, SIZED, ""),
    (first_size, [*SIZED, BY_HAND["split_rows"]], ""),
    (into_arguments, GIVEN, "it changes "),
    (always_float32, HALVES, ""),
    (on_the_cpu, HALVES, "works on a CPU only"),
    (through_numpy, OF_TENSORS, ""),
    (contiguous, OF_TENSORS, "your code raised"),
    (detached, [BY_HAND["round_once"]], "no gradient reaches"),
    (without_gradients, PLAIN, "it changes whether gradients are recorded"),
    (hooked, ALL_BY_HAND, "it changes the hooks of all modules"),
]


@pytest.mark.parametrize(
    ("make", "exercise", "says"),
    [(make, exercise, says) for make, some, says in BY_HAND_GENERIC for exercise in some],
    ids=lambda value: getattr(value, "number", None) or getattr(value, "__name__", ""),
)
def test_usual_mistake_in_a_check_by_hand_is_refused(
    make: Function, exercise: Exercise, says: str
) -> None:
    solution = answer(exercise)
    if isinstance(solution, type):  # an autograd.Function
        forward = staticmethod(make(solution.forward, exercise))
        wrong: Any = type(solution.__name__, (solution,), {"forward": forward})
    else:
        wrong = make(solution, exercise)
    try:
        assert says in str(refusal(exercise, wrong))
    finally:
        while handles:
            handles.pop().remove()
