"""Checks of exercises/03_dora_decomposition.ipynb: DoRA from empty cells."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minidora.checks import adapters
from minidora.checks.exercise import Answer, Lesson
from minidora.checks.expect import expect, expect_parameter, require
from minidora.checks.oracle import Wrong, lengths, product, signed
from minidora.checks.spec import spec

lesson = Lesson(
    3, "03_dora_decomposition", closed=("minidora.lora", "minidora.dora", "minidora.adapt", "peft")
)


# ---- 3.1 and 3.2: lengths and directions ----


@spec(
    lesson,
    "3.1",
    title="One length per output neuron",
    difficulty="easy",
    minutes=5,
    teaches="which axis of a PyTorch weight belongs to an output neuron",
    hint="A weight is (out, in). Over which of the two must you sum to keep one number per output?",
    shapes="(out, in) -> (out,)",
)
def row_norm(weight: Tensor) -> Tensor:
    return lengths(weight)


row_norm.example([[3, 4, 0], [0, 5, 12]], gives=[5, 13])
row_norm.example([[0, 0], [3, 4]], gives=[0, 5], case="a row of zeros")
row_norm.mistake(
    "one norm per input (dim=0): DoRA keeps one per output neuron", lambda w: w.norm(dim=0)
)
row_norm.mistake("the shape is (out, 1): leave out keepdim", lambda w: w.norm(dim=1, keepdim=True))
row_norm.mistake(
    "one norm for the whole matrix: DoRA keeps one per output neuron", lambda w: w.norm()
)
row_norm.mistake("these are squared lengths: take the square root", lambda w: w.square().sum(dim=1))
row_norm.mistake(
    "these are sums of |w|: a length is the root of summed squares", lambda w: w.abs().sum(dim=1)
)
row_norm.mistake(
    "these are the largest entries: a length needs all of the row", lambda w: w.abs().amax(dim=1)
)


@spec(
    lesson,
    "3.2",
    title="Magnitude and direction",
    difficulty="easy",
    minutes=10,
    teaches="that a weight is the product of lengths and rows of length 1",
    hint="To divide row by row, which shape must the lengths have beside a weight of (out, in)?",
    shapes="(out, in) -> magnitude (out,), direction (out, in)",
)
def decompose(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = [[entry / math.hypot(*row) for entry in row] for row in weight.tolist()]
    return lengths(weight), torch.tensor(rows, dtype=torch.float64)


decompose.example([[3, 4, 0], [0, 5, 12]], gives=([5, 13], [[0.6, 0.8, 0], [0, 5 / 13, 12 / 13]]))
decompose.mistake(
    "the other way round: return magnitude, direction", lambda w: decompose.oracle(w)[::-1]
)


def _wrong_magnitudes(w: Tensor) -> Wrong:
    yield "one magnitude per input (dim=0): it is one per output", w.norm(dim=0)
    yield "the shape is (out, 1): leave out keepdim", w.norm(dim=1, keepdim=True)
    yield "one magnitude per entry: it is one per row, its length", w.abs()
    yield "one magnitude for the whole matrix: it is one per output", w.norm()
    yield "these are squared lengths: take the square root", w.square().sum(dim=1)


def _wrong_directions(w: Tensor) -> Wrong:
    yield "this is the weight itself: divide each row by its length", w.clone()
    yield "its columns have length 1: its rows should", w / w.norm(dim=0)
    yield "divided by the norm of the whole matrix: row by row", w / w.norm()
    yield "divided by the squared length", w / w.square().sum(dim=1, keepdim=True)


decompose.mistakes_of(_wrong_magnitudes, part="magnitude")
decompose.mistakes_of(_wrong_directions, part="direction")


# ---- 3.3 to 3.5: DoRA's weight, its forward pass, its gradient ----


def _direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    """V = W + s B A."""
    return weight + alpha / len(lora_A) * product(lora_A, lora_B)


def _scaled(magnitude: Tensor, direction: Tensor, norm: Tensor | None = None) -> Tensor:
    """magnitude / norm * direction, row by row; the norm of the direction where none is given."""
    norm = lengths(direction) if norm is None else norm
    return (magnitude / norm)[:, None] * direction


EQUATION_5 = "(out, in), (rank, in), (out, rank), (out,), alpha -> (out, in)"


@spec(
    lesson,
    "3.3",
    title="Equation 5",
    difficulty="medium",
    minutes=10,
    teaches="how magnitude and the updated direction make one weight",
    hint="W' has rows of length `magnitude`. Which matrix gives their directions?",
    shapes=EQUATION_5,
    draw={"magnitude": signed},
    grads=("magnitude", "lora_A", "lora_B"),
    tiny=("weight", "lora_B"),
)
def dora_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, alpha: float
) -> Tensor:
    return _scaled(magnitude, _direction(weight, lora_A, lora_B, alpha))


@spec(
    lesson,
    "3.4",
    title="The forward pass without W'",
    difficulty="medium",
    minutes=15,
    teaches="that one factor per output does what equation 5 does, and leaves the bias alone",
    hint="W' = g * (W + s B A), a factor for each row. What does a factor of a row do to x W^T?",
    shapes="(..., in), (out, in), (out,), (rank, in), (out, rank), (out,), alpha -> (..., out)",
    draw={"magnitude": signed},
    grads=("magnitude", "lora_A", "lora_B", "x"),
    tiny=("weight", "lora_B"),
)
def dora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    alpha: float,
) -> Tensor:
    adapted = _scaled(magnitude, _direction(weight, lora_A, lora_B, alpha))
    return (x[..., None, :] * adapted).sum(-1) + bias


@spec(
    lesson,
    "3.5",
    title="The detached norm",
    difficulty="medium",
    minutes=10,
    teaches="what the paper treats as a constant in the backward pass (section 4.3)",
    hint="Equation 11 has C where equation 6 has a norm. Which one tensor is a constant there?",
    shapes=EQUATION_5,
    draw={"magnitude": signed},
    tiny=("weight", "lora_B"),
    grads=("magnitude", "lora_A", "lora_B", "weight"),
)
def dora_weight_detached(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, alpha: float
) -> Tensor:
    return _scaled(magnitude, _direction(weight, lora_A, lora_B, alpha))


LORA = "this is W + s B A, what LoRA merges: now its rows get the lengths in magnitude"


def _wrong_weights(w: Tensor, a: Tensor, b: Tensor, m: Tensor, alpha: float) -> Wrong:
    """What usual mistakes make of W'."""
    ba, s, v = product(a, b), alpha / len(a), _direction(w, a, b, alpha)
    once = w + ba
    yield "divided by the norm of W: the norm is that of W + s B A", _scaled(m, v, w.norm(dim=1))
    yield (
        "the scaling is missing inside the norm: ||W + s B A||",
        _scaled(m, v, once.norm(dim=1)),
    )
    yield "the scaling is missing: s = alpha / rank", _scaled(m, once)
    yield "scaled by alpha alone: s = alpha / rank", _scaled(m, w + alpha * ba)
    yield (
        "the magnitude is missing: these rows have length 1",
        _scaled(torch.ones_like(m), v),
    )
    yield (
        "the magnitude has lost its sign: a trained one may be negative",
        _scaled(m.abs(), v),
    )
    yield "not divided by the norm of W + s B A", m[:, None] * v
    yield "divided by the norm of the whole matrix: row by row", m[:, None] * v / v.norm()
    yield (
        "divided by the norms of the columns (dim=0): there is one per output neuron",
        m[:, None] * v / v.norm(dim=0),
    )
    yield (
        "reshape is not transpose: B A is (out, in)",
        _scaled(m, w + s * ba.T.reshape(w.shape)),
    )
    yield "the update is missing: V = W + s B A", _scaled(m, w)
    yield LORA, v
    yield "the update belongs inside the norm", m[:, None] * w + s * ba


def _wrong_outputs(
    x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, m: Tensor, alpha: float
) -> Wrong:
    """What usual mistakes make of y."""
    g = m / lengths(_direction(w, a, b, alpha))
    base, low = x @ w.T, alpha / len(a) * x @ product(a, b).T
    yield "the bias is scaled by g: add it last, as it is", g * (base + low + bias)
    yield "the bias is missing", g * (base + low)
    yield "only the update is scaled: g scales x W^T too", base + g * low + bias
    yield "only x W^T is scaled: g scales the update too", g * base + low + bias
    yield "x W^T is missing", g * low + bias
    yield "g is missing: this is LoRA", base + low + bias
    for message, wrong in _wrong_weights(w, a, b, m, alpha):
        if message != LORA:
            yield message, x @ wrong.T + bias


for exercise in (dora_weight, dora_weight_detached):
    exercise.example(
        [[3, 0], [0, 5], [6, 8]],
        [[1, 0], [0, 1]],
        [[0, 2], [6, 0], [0, 0]],
        [10, 13, 5],
        4.0,
        gives=[[6, 8], [12, 5], [3, 4]],
    )
    exercise.mistakes_of(_wrong_weights)
dora_forward.example(
    [[1, 1]],
    [[3, 0], [0, 5], [6, 8]],
    [1, 2, 3],
    [[1, 0], [0, 1]],
    [[0, 2], [6, 0], [0, 0]],
    [10, 13, 5],
    4.0,
    gives=[[15, 19, 10]],
)
dora_forward.mistakes_of(_wrong_outputs)


def _full(at: Any, *now: Any) -> Tensor:
    """Equation 6: nothing is a constant."""
    w, a, b, m, alpha = now
    return _scaled(m, _direction(w, a, b, alpha))


def _detached(at: Any, *now: Any) -> Tensor:
    """Equation 11: the norm is a constant."""
    (w, a, b, _, alpha), (w_, a_, b_, m_, _) = at, now
    norm = lengths(_direction(w, a, b, alpha))
    return _scaled(m_, _direction(w_, a_, b_, alpha), norm)


def _inverted(at: Any, *now: Any) -> Tensor:
    """A mistake: the direction is a constant and the norm is not."""
    (w, a, b, _, alpha), (w_, a_, b_, m_, _) = at, now
    return _scaled(m_, _direction(w, a, b, alpha), lengths(_direction(w_, a_, b_, alpha)))


ONLY_NORM = "it comes through the norm alone: the update itself is detached"
NOT_DETACHED = "the norm is not detached: this is equation 6, not 11"
WRONG_ONE = "the direction is detached: it is the norm that should be"

dora_weight.slope(_full)
dora_weight.slope(_detached)
dora_weight.slope_mistake(ONLY_NORM, _inverted)
dora_weight_detached.slope(_detached)
dora_weight_detached.slope_mistake(NOT_DETACHED, _full)
dora_weight_detached.slope_mistake(WRONG_ONE, _inverted)


def _forward_slope(weight_slope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The slope of y = x W'^T + bias, from one of W'."""

    def slope(at: Any, x: Tensor, w: Tensor, bias: Tensor, *now: Any) -> Tensor:
        return x @ weight_slope((at[1], *at[3:]), w, *now).T + bias

    return slope


def _x_apart(update_alone: bool) -> Any:
    """A mistake in the gradient of x: x is detached beside W, or in the update."""

    def slope(at: Any, x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Any:
        m, alpha = rest
        v, update = _direction(w, a, b, alpha), _direction(torch.zeros_like(w), a, b, alpha)
        of_w, of_update = (at[0], x) if update_alone else (x, at[0])
        g = m / lengths(v)
        return g * (of_w @ w.T + of_update @ update.T) + bias

    return slope


dora_forward.slope(_forward_slope(_full))
dora_forward.slope(_forward_slope(_detached))
dora_forward.slope_mistake(ONLY_NORM, _forward_slope(_inverted))
dora_forward.slope_mistake(
    "it comes through the update alone: the layers before need W's part too", _x_apart(True)
)
dora_forward.slope_mistake(
    "it comes through x W^T alone, but x is in the update too", _x_apart(False)
)


# ---- 3.6: the source notebook's bug ----


@spec(
    lesson,
    "3.6",
    title="Find the bug",
    difficulty="medium",
    minutes=10,
    teaches="why a reshape hides behind B = 0 and behind square layers",
    hint="Entry [i, j] of the product belongs to input i, output j. Where does .view put it?",
    shapes="(in, rank), (rank, out) -> (out, in)",
)
def update_for_weight(lora_B: Tensor, lora_A: Tensor) -> Tensor:
    columns = [[sum(map(float.__mul__, row, column)) for row in lora_B.tolist()]
               for column in lora_A.T.tolist()]  # fmt: skip
    return torch.tensor(columns, dtype=torch.float64)


def _is_square(b: Tensor, a: Tensor) -> bool:
    return len(b) == a.shape[1]


update_for_weight.example([[1, 0], [0, 1]], [[1, 2, 3], [4, 5, 6]], gives=[[1, 4], [2, 5], [3, 6]])
update_for_weight.mistake(
    "this is (in, out): a weight is (out, in)", lambda b, a: None if _is_square(b, a) else b @ a
)
update_for_weight.mistake(
    "not transposed: for a square layer .view changes nothing",
    lambda b, a: b @ a if _is_square(b, a) else None,
)
update_for_weight.mistake(
    "this is still what .view gives, not the transpose",
    lambda b, a: None if _is_square(b, a) else (b @ a).view(a.shape[1], len(b)),
)
update_for_weight.mistake(
    "it is zero: so the bug stays hidden, as with B = 0", lambda b, a: (0 * b @ a).T
)


# ---- 3.7 and 3.8: layers ----


def _wrong_merges(w: Tensor, a: Tensor, b: Tensor, m: Tensor, alpha: float) -> Wrong:
    yield from _wrong_weights(w, a, b, m, alpha)
    right = _scaled(m, _direction(w, a, b, alpha))
    yield "W is added to W': W' takes the place of W", w + right
    yield "the weight is still W", w


def _g(w: Tensor, a: Tensor, b: Tensor, m: Tensor, alpha: float) -> Tensor:
    return m / lengths(_direction(w, a, b, alpha))


@lesson.exercise(
    "3.7",
    title="Merge DoRA into one weight",
    difficulty="medium",
    minutes=10,
    teaches="that DoRA too ends as a plain nn.Linear, and what happens to the bias",
    hint="y = x W'^T + bias. Which of the two does the magnitude change?",
)
def merge_dora(answer: Answer) -> None:
    adapters.check_merge(answer, _merged, _g)


_merged = replace(dora_weight, grads=())  # the same weight, with mistakes of its own
_merged.examples = dora_weight.examples
_merged.mistakes_of(_wrong_merges)


@lesson.exercise(
    "3.8",
    answer="DoRALinear",
    title="The DoRA layer",
    difficulty="hard",
    minutes=25,
    teaches="how magnitude, direction and the detached norm make one module that can be trained",
    hint="At the start W' = W. What must magnitude be then, and what may the optimizer change?",
)
def dora_linear(answer: Answer) -> None:
    answer.case("parameters")
    linear = nn.Linear(5, 3)
    module = adapters.check_parameters(answer, linear, "lora_A", "lora_B", "magnitude")
    got = module.parameters.get("magnitude", module.tensors.get("magnitude"))
    require(
        getattr(got, "shape", None) not in ((5,), (1, 5)),
        "magnitude is one per input (dim=0): DoRA keeps one per output neuron",
    )
    magnitude = expect_parameter(module, "magnitude", (3,))
    answer.case("start")
    require(not bool((magnitude == 1).all()), "magnitude starts at 1: it starts as W's row norm")
    expect(magnitude, lengths(linear.weight.detach()), name="magnitude at the start")
    adapters.check_start(answer)
    adapters.check_layer(answer, _layer)


def _stale(
    x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, m: Tensor, alpha: float
) -> Wrong:
    stale = _scaled(m, _direction(w, a, b, alpha), w.norm(dim=1))
    yield (
        "divided by the norm of W, or by a norm kept from the start: V = W + s B A changes",
        x @ stale.T + bias,
    )
    yield from _wrong_outputs(x, w, bias, a, b, m, alpha)


_layer = replace(dora_forward)  # the same values, with one right gradient
_layer.mistakes_of(_stale)
_layer.slope(_forward_slope(_detached))
_layer.slope_mistake(NOT_DETACHED, _forward_slope(_full))
_layer.slope_mistake(WRONG_ONE, _forward_slope(_inverted))
for mistake in dora_forward.slope_mistakes[1:]:
    _layer.slope_mistake(mistake.message, mistake.function)
