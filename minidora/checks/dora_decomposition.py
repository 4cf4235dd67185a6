"""Checks of exercises/03_dora_decomposition.ipynb: DoRA from empty cells."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minidora.checks import adapters
from minidora.checks.exercise import Lesson
from minidora.checks.expect import expect, require
from minidora.checks.oracle import SlopeMistake, Wrong, lengths, product, signed
from minidora.checks.spec import spec
from minidora.runner import probe

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


@row_norm.mistakes_of
def _wrong_lengths(w: Tensor) -> Wrong:
    yield "one norm per input (dim=0): DoRA keeps one per output neuron", w.norm(dim=0)
    yield "the shape is (out, 1): leave out keepdim", w.norm(dim=1, keepdim=True)
    yield "one norm for the whole matrix: DoRA keeps one per output neuron", w.norm()
    yield "these are squared lengths: take the square root", w.square().sum(dim=1)
    yield "these are sums of |w|: a length is the root of summed squares", w.abs().sum(dim=1)
    yield "these are the largest entries: a length needs all of the row", w.abs().amax(dim=1)


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


@spec(
    lesson,
    "3.3",
    title="Equation 5",
    difficulty="medium",
    minutes=10,
    teaches="how magnitude and the updated direction make one weight",
    hint="W' has rows of length `magnitude`. Which matrix gives their directions?",
    shapes="(out, in), (rank, in), (out, rank), (out,), alpha -> (out, in)",
    draw={"magnitude": signed},
    grads=("magnitude", "lora_A", "lora_B"),
    tiny=("weight", "lora_B"),
)
def dora_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, alpha: float
) -> Tensor:
    return _scaled(magnitude, _direction(weight, lora_A, lora_B, alpha))


LORA = "this is W + s B A, what LoRA merges: now its rows get the lengths in magnitude"


@dora_weight.mistakes_of
def _wrong_weights(w: Tensor, a: Tensor, b: Tensor, m: Tensor, alpha: float) -> Wrong:
    ba, s, v = product(a, b), alpha / len(a), _direction(w, a, b, alpha)
    once, column = w + ba, m[:, None]
    of_w = "divided by the norm of W: the norm is that of W + s B A, and changes as it trains"
    yield of_w, _scaled(m, v, w.norm(dim=1))
    yield "the scaling is missing inside the norm: ||W + s B A||", _scaled(m, v, once.norm(dim=1))
    yield "the scaling is missing: s = alpha / rank", _scaled(m, once)
    yield "scaled by alpha alone: s = alpha / rank", _scaled(m, w + alpha * ba)
    yield "the magnitude is missing: these rows have length 1", _scaled(torch.ones_like(m), v)
    yield "the magnitude has lost its sign: a trained one may be negative", _scaled(m.abs(), v)
    yield "not divided by the norm of W + s B A", column * v
    yield "divided by the norm of the whole matrix: row by row", column * v / v.norm()
    of_columns = "divided by the norms of the columns (dim=0): there is one per output neuron"
    yield of_columns, column * v / v.norm(dim=0)
    yield "reshape is not transpose: B A is (out, in)", _scaled(m, w + s * ba.T.reshape(w.shape))
    yield "the update is missing: V = W + s B A", _scaled(m, w)
    yield LORA, v
    yield "the update belongs inside the norm", column * w + s * ba


dora_weight.example(
    [[3, 0], [0, 5], [6, 8]],
    [[1, 0], [0, 1]],
    [[0, 2], [6, 0], [0, 0]],
    [10, 13, 5],
    4.0,
    gives=[[6, 8], [12, 5], [3, 4]],
)


def _full(at: Any, *now: Any) -> Tensor:
    """Equation 6: nothing is a constant."""
    w, a, b, m, alpha = now
    return _scaled(m, _direction(w, a, b, alpha))


def _detached(at: Any, *now: Any) -> Tensor:
    """Equation 11: the norm is a constant."""
    (w, a, b, _, alpha), (w_, a_, b_, m_, _) = at, now
    return _scaled(m_, _direction(w_, a_, b_, alpha), lengths(_direction(w, a, b, alpha)))


def _inverted(at: Any, *now: Any) -> Tensor:
    """A mistake: the direction is a constant and the norm is not."""
    (w, a, b, _, alpha), (w_, a_, b_, m_, _) = at, now
    return _scaled(m_, _direction(w, a, b, alpha), lengths(_direction(w_, a_, b_, alpha)))


ONLY_NORM = "it comes through the norm alone: the direction is detached, and only the norm may be"
NOT_DETACHED = "the norm is not detached: this is equation 6, not 11"

dora_weight.slope(_full)
dora_weight.slope(_detached)
dora_weight.slope_mistake(ONLY_NORM, _inverted)


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


@dora_forward.mistakes_of
def _wrong_outputs(x: Tensor, w: Tensor, bias: Tensor, *of_weight: Any) -> Wrong:
    a, b, m, alpha = of_weight
    g = m / lengths(_direction(w, a, b, alpha))
    base, low = x @ w.T, alpha / len(a) * x @ product(a, b).T
    yield "the bias is scaled by g: add it last, as it is", g * (base + low + bias)
    yield "the bias is missing", g * (base + low)
    yield "only the update is scaled: g scales x W^T too", base + g * low + bias
    yield "only x W^T is scaled: g scales the update too", g * base + low + bias
    yield "x W^T is missing", g * low + bias
    yield "g is missing: this is LoRA", base + low + bias
    for message, wrong in _wrong_weights(w, *of_weight):
        if message != LORA:
            yield message, x @ wrong.T + bias


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


def _forward_slope(weight_slope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The slope of y = x W'^T + bias, from one of W'."""

    def slope(at: Any, x: Tensor, w: Tensor, bias: Tensor, *now: Any) -> Tensor:
        return x @ weight_slope((at[1], *at[3:]), w, *now).T + bias

    return slope


def _x_apart(beside_w: Tensor, in_update: Tensor, w: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    """y from one x beside W, and another in the update."""
    a, b, m, alpha = rest
    v = _direction(w, a, b, alpha)
    y: Tensor = m / lengths(v) * (beside_w @ w.T + in_update @ (v - w).T) + bias
    return y


dora_forward.slope(_forward_slope(_full))
dora_forward.slope(_forward_slope(_detached))
dora_forward.slope_mistake(ONLY_NORM, _forward_slope(_inverted))
dora_forward.slope_mistake(
    "it comes through the update alone: the layers before need W's part too",
    lambda at, x, *rest: _x_apart(at[0], x, *rest),
)
dora_forward.slope_mistake(
    "it comes through x W^T alone, but x is in the update too",
    lambda at, x, *rest: _x_apart(x, at[0], *rest),
)


@spec(
    lesson,
    "3.5",
    title="The detached norm",
    difficulty="medium",
    minutes=10,
    teaches="what the paper treats as a constant in the backward pass (section 4.3)",
    hint="Equation 11 has C where equation 6 has a norm. Which one tensor is a constant there?",
    like=dora_weight,
    grads=("magnitude", "lora_A", "lora_B", "weight"),
)
def dora_weight_detached() -> None:
    """The W' of dora_weight, with the gradients of equation 11 alone."""


dora_weight_detached.slopes = [_detached]
dora_weight_detached.slope_mistake(NOT_DETACHED, _full)


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


@update_for_weight.mistakes_of
def _wrong_updates(b: Tensor, a: Tensor) -> Wrong:
    ba = b @ a
    if len(b) == a.shape[1]:
        yield "not transposed: for a square layer .view changes nothing", ba
    else:
        yield "this is (in, out): a weight is (out, in)", ba
        yield "this is still what .view gives, not the transpose", ba.view(ba.T.shape)
    yield "it is zero: so the bug stays hidden, as with B = 0", 0 * ba.T


update_for_weight.example([[1, 0], [0, 1]], [[1, 2, 3], [4, 5, 6]], gives=[[1, 4], [2, 5], [3, 6]])


# ---- 3.7 and 3.8: layers ----


@adapters.Merge.declare(
    lesson,
    "3.7",
    title="Merge DoRA into one weight",
    difficulty="medium",
    minutes=10,
    teaches="that DoRA too ends as a plain nn.Linear, and what happens to the bias",
    hint="y = x W'^T + bias. Which of the two does the magnitude change?",
    like=dora_weight,
    factor=lambda w, a, b, m, alpha: m / lengths(_direction(w, a, b, alpha)),
)
def merge_dora() -> None:
    """The W' of dora_weight, in a plain layer."""


merge_dora.mistake(
    "W is added to W': W' takes the place of W", lambda w, *rest: w + dora_weight.oracle(w, *rest)
)
merge_dora.mistake("the weight is still W", lambda w, *rest: w)


@adapters.Layer.declare(
    lesson,
    "3.8",
    answer="DoRALinear",
    title="The DoRA layer",
    difficulty="hard",
    minutes=25,
    teaches="how magnitude, direction and the detached norm make one module that can be trained",
    hint="At the start W' = W. What must magnitude be then, and what may the optimizer change?",
    like=dora_forward,
)
def dora_linear() -> None:
    """The y of dora_forward, from a layer that holds lora_A, lora_B and magnitude."""


dora_linear.slopes = [_forward_slope(_detached)]
dora_linear.slope_mistakes.insert(0, SlopeMistake(NOT_DETACHED, _forward_slope(_full)))


@dora_linear.start
def _magnitude(module: probe.Module, base: nn.Linear) -> None:
    got = module.parameters.get("magnitude", module.tensors.get("magnitude"))
    by_input = getattr(got, "shape", None) in ((5,), (1, 5))
    require(not by_input, "magnitude is one per input (dim=0): DoRA keeps one per output neuron")
    if got is not None:
        ones = got.shape == (3,) and bool((got == 1).all())
        require(not ones, "magnitude starts at 1: it starts as W's row norm")
        expect(got, lengths(base.weight.detach()), name="magnitude at the start")
