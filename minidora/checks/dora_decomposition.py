"""Checks of exercises/03_dora_decomposition.ipynb: DoRA from empty cells."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Lesson
from minidora.checks.expect import (
    Known,
    expect,
    expect_dtype_and_device,
    expect_gradient,
    expect_module,
    expect_parameter,
    expect_parts,
    randn,
    require,
    same,
)
from minidora.checks.lora_recap import (
    check_adapter,
    check_can_run,
    check_follows_base,
    check_forward,
    check_nothing_shared,
    check_start,
    expect_input_gradient,
)
from minidora.runner import probe

lesson = Lesson(
    3, "03_dora_decomposition", closed=("minidora.lora", "minidora.dora", "minidora.adapt", "peft")
)


def _lengths(matrix: Tensor) -> Tensor:
    """The length of each row, by Python's own exact sums, in float64."""
    rows = matrix.detach().cpu().double().tolist()
    return torch.tensor([math.hypot(*row) for row in rows], dtype=torch.float64)


@lesson.exercise(
    "3.1",
    title="One length per output neuron",
    difficulty="easy",
    minutes=5,
    teaches="which axis of a PyTorch weight belongs to an output neuron",
    hint="A weight is (out, in). Over which of the two must you sum to keep one number per output?",
)
def row_norm(answer: Answer) -> None:
    def known(weight: Tensor) -> Known:
        return [
            (weight.norm(dim=0), "one norm per input (dim=0): DoRA keeps one per output neuron"),
            (_lengths(weight)[:, None], "the shape is (out, 1): leave out keepdim"),
            (weight.norm(), "one norm for the whole matrix: DoRA keeps one per output neuron"),
            (weight.square().sum(1), "these are squared lengths: take the square root"),
            (weight.abs().sum(1), "these are sums of |w|: a length is the root of summed squares"),
            (weight.abs().amax(1), "these are the largest entries: a length needs all of the row"),
        ]

    answer.case("by hand")
    example = torch.tensor([5.0, 13.0])
    weight = torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]])
    expect(answer(weight), example, known(weight), shape="(out,)")
    answer.case("random weights")
    for shape in ((5, 3), (2, 7), (4, 4)):
        weight = randn(*shape)
        by_heart = (example, "this is the answer to the example: compute it from the weight")
        expect(answer(weight), _lengths(weight), [*known(weight), by_heart], shape="(out,)")
    answer.case("gradient")
    weight, cotangent = randn(4, 3), randn(4)
    found = answer.probe(probe.gradients, [weight], [0], cotangent)
    want = (cotangent / _lengths(weight))[:, None] * weight
    expect_gradient(found["gradients"][0], want, "weight")
    expect_dtype_and_device(answer, weight)


@lesson.exercise(
    "3.2",
    title="Magnitude and direction",
    difficulty="easy",
    minutes=10,
    teaches="that a weight is the product of lengths and rows of length 1",
    hint="To divide row by row, which shape must the lengths have beside a weight of (out, in)?",
)
def decompose(answer: Answer) -> None:
    def check(weight: Tensor) -> None:
        magnitude, direction = expect_parts(answer(weight), ("magnitude", "direction"))
        lengths = _lengths(weight)
        shapes = [tuple(getattr(part, "shape", ())) for part in (magnitude, direction)]
        swapped = shapes == [tuple(weight.shape), (len(weight),)]
        require(not swapped, "the other way round: return magnitude, direction")
        expect(
            magnitude,
            lengths,
            [
                (weight.norm(dim=0), "one magnitude per input (dim=0): it is one per output"),
                (lengths[:, None], "the shape is (out, 1): leave out keepdim"),
                (weight.abs(), "one magnitude per entry: it is one per row, its length"),
                (weight.norm(), "one magnitude for the whole matrix: it is one per output"),
                (weight.square().sum(1), "these are squared lengths: take the square root"),
            ],
            "magnitude",
            "(out,)",
        )
        expect(
            direction,
            weight / lengths[:, None],
            [
                (weight, "this is the weight itself: divide each row by its length"),
                (weight / weight.norm(dim=0), "its columns have length 1: its rows should"),
                (weight / weight.norm(), "divided by the norm of the whole matrix: row by row"),
                (weight / lengths[:, None] ** 2, "divided by the squared length"),
            ],
            "direction",
            "(out, in)",
        )

    answer.case("by hand")
    check(torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]]))
    answer.case("random weights")
    for shape in ((5, 3), (2, 7), (4, 4)):
        check(randn(*shape))
    expect_dtype_and_device(answer, randn(5, 3))


class Sample(NamedTuple):
    """A random layer. Everything about it is computed in float64."""

    weight: Tensor  # (out, in)
    lora_A: Tensor  # (rank, in)
    lora_B: Tensor  # (out, rank)
    magnitude: Tensor  # (out,), away from the row norms; the first is negative
    alpha: float

    @property
    def scaling(self) -> float:
        return self.alpha / len(self.lora_A)

    @property
    def product(self) -> Tensor:
        """B A, as a sum of outer products."""
        pairs = zip(self.lora_B.double().T, self.lora_A.double(), strict=True)
        return torch.stack([torch.outer(b, a) for b, a in pairs]).sum(0)

    @property
    def direction(self) -> Tensor:
        """V = W + s B A."""
        return self.weight.double() + self.scaling * self.product

    def scaled(self, direction: Tensor, norm: Tensor) -> Tensor:
        """magnitude / norm * direction, row by row."""
        return (self.magnitude.double() / norm)[:, None] * direction

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """What W and what the update give to W'; their sum is equation 5."""
        norm = _lengths(self.direction)
        update = self.scaling * self.product
        return self.scaled(self.weight.double(), norm), self.scaled(update, norm)

    @property
    def adapted(self) -> Tensor:
        """W', equation 5."""
        return self.scaled(self.direction, _lengths(self.direction))


EXAMPLE = Sample(
    torch.tensor([[3.0, 0.0], [0.0, 5.0], [6.0, 8.0]]),
    torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    torch.tensor([[0.0, 2.0], [6.0, 0.0], [0.0, 0.0]]),
    torch.tensor([10.0, 13.0, 5.0]),
    4.0,
)
EXAMPLE_WEIGHT = torch.tensor([[6.0, 8.0], [12.0, 5.0], [3.0, 4.0]])


def _sample(out: int, in_: int, rank: int, alpha: float) -> Sample:
    magnitude = randn(out).abs() + 0.5
    magnitude[0] *= -1  # nothing keeps training from it
    return Sample(randn(out, in_), randn(rank, in_), randn(out, rank), magnitude, alpha)


SIZES = ((5, 3, 2, 3.0), (2, 7, 4, 6.0), (4, 4, 2, 1.0))


def _wrong_weights(s: Sample) -> list[tuple[Tensor, str]]:
    """What usual mistakes make of W'."""
    w, v, ba = s.weight.double(), s.direction, s.product
    reshaped = w + s.scaling * ba.T.reshape(w.shape)
    whole = torch.full_like(s.magnitude.double(), float(v.norm()))
    return [
        (s.scaled(v, _lengths(w)), "divided by the norm of W: the norm is that of W + s B A"),
        (s.scaled(v, _lengths(w + ba)), "the scaling is missing inside the norm: ||W + s B A||"),
        (s.scaled(w + ba, _lengths(w + ba)), "the scaling is missing: s = alpha / rank"),
        (
            s.scaled(w + s.alpha * ba, _lengths(w + s.alpha * ba)),
            "scaled by alpha alone: s = alpha / rank",
        ),
        (v / _lengths(v)[:, None], "the magnitude is missing: these rows have length 1"),
        (
            s.scaled(v, _lengths(v)).abs() * v.sign(),
            "the magnitude has lost its sign: a trained one may be negative",
        ),
        (s.magnitude.double()[:, None] * v, "not divided by the norm of W + s B A"),
        (s.scaled(v, whole), "divided by the norm of the whole matrix: row by row"),
        (
            s.magnitude.double()[:, None] * v / v.norm(dim=0),
            "divided by the norms of the columns (dim=0): there is one per output neuron",
        ),
        (s.scaled(reshaped, _lengths(reshaped)), "reshape is no transpose: B A is (out, in)"),
        (s.scaled(w, _lengths(w)), "the update is missing: V = W + s B A"),
        (v, "this is W + s B A, what LoRA merges: now its rows get the lengths in magnitude"),
        (s.magnitude.double()[:, None] * w + s.scaling * ba, "the update belongs inside the norm"),
        (EXAMPLE_WEIGHT.double(), "this is the answer to the example: compute it"),
    ]


@lesson.exercise(
    "3.3",
    title="Equation 5",
    difficulty="medium",
    minutes=10,
    teaches="how magnitude and the updated direction make one weight",
    hint="W' has rows of length `magnitude`. Which matrix gives their directions?",
)
def dora_weight(answer: Answer) -> None:
    answer.case("by hand")
    expect(answer(*EXAMPLE), EXAMPLE_WEIGHT, _wrong_weights(EXAMPLE)[:-1], shape="(out, in)")
    answer.case("random layers")
    for size in SIZES:
        sample = _sample(*size)
        expect(answer(*sample), sample.adapted, _wrong_weights(sample), shape="(out, in)")
    answer.case("gradient")
    cotangent = randn(*size[:2])
    found = answer.probe(probe.gradients, list(sample), [1, 2, 3], cotangent)
    check_either(sample, cotangent, _Gradients(*found["gradients"]))
    expect_dtype_and_device(answer, *_sample(5, 3, 2, 3.0))


def _wrong_outputs(x: Tensor, bias: Tensor, s: Sample) -> list[tuple[Tensor, str]]:
    """What usual mistakes make of y."""
    x, bias = x.double(), bias.double()
    g = s.magnitude.double() / _lengths(s.direction)
    base, low = x @ s.weight.double().T, s.scaling * x @ s.product.T
    return [
        (g * (base + low + bias), "the bias is scaled by g: add it last, as it is"),
        (g * (base + low), "the bias is missing"),
        (base + g * low + bias, "only the update is scaled: g scales x W^T too"),
        (g * base + low + bias, "only x W^T is scaled: g scales the update too"),
        (g * low + bias, "x W^T is missing"),
        (base + low + bias, "g is missing: this is LoRA"),
        *((x @ wrong.T + bias, message) for wrong, message in _wrong_weights(s)[:-1]),
    ]


@lesson.exercise(
    "3.4",
    title="The forward pass without W'",
    difficulty="medium",
    minutes=15,
    teaches="that one factor per output does what equation 5 does, and leaves the bias alone",
    hint="W' = g * (W + s B A), a factor for each row. What does a factor of a row do to x W^T?",
)
def dora_forward(answer: Answer) -> None:
    def check(x: Tensor, bias: Tensor, s: Sample) -> None:
        want = x.double() @ s.adapted.T + bias.double()
        got = answer(x, s.weight, bias, *s[1:])
        expect(got, want, _wrong_outputs(x, bias, s), shape="(..., out)")

    answer.case("by hand")
    check(torch.tensor([[1.0, 1.0]]), torch.tensor([1.0, 2.0, 3.0]), EXAMPLE)
    answer.case("random layers")
    for size in SIZES:
        check(randn(6, size[1]), randn(size[0]), _sample(*size))
    for shape in ((2, 3, 5), (5,), (2, 2, 3, 5)):
        answer.case(f"x of shape {shape}")
        check(randn(*shape), randn(4), _sample(4, 5, 2, 5.0))
    answer.case("gradient")
    s, x, cotangent = _sample(3, 5, 2, 3.0), randn(6, 5), randn(6, 3)
    args = [x, s.weight, randn(3), *s[1:]]
    found = answer.probe(probe.gradients, args, [0, 3, 4, 5], cotangent)["gradients"]
    check_either(s, cotangent.double().T @ x.double(), _Gradients(*found[1:]))
    expect_input_gradient(found[0], cotangent, *s.parts)
    expect_dtype_and_device(answer, *args)


class _Gradients(NamedTuple):
    """Of sum(W' * cotangent) with respect to A, B and magnitude."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor


def _through(s: Sample, cotangent: Tensor, detach: str) -> _Gradients:
    """Closed form: equation 11 where the norm is detached, 6 where nothing is, and 7.

    detach is "norm", "nothing" or "direction" (a mistake).
    """
    v, g_out = s.direction, cotangent.double()
    norm = _lengths(v)
    unit, factor = v / norm[:, None], (s.magnitude.double() / norm)[:, None]
    along = (g_out * unit).sum(1, keepdim=True) * unit  # the part that the norm takes away
    to_v = {"norm": g_out, "nothing": g_out - along, "direction": -along}[detach] * factor
    return _Gradients(
        s.scaling * s.lora_B.double().T @ to_v,
        s.scaling * to_v @ s.lora_A.double().T,
        (g_out * unit).sum(1),
    )


def check_either(s: Sample, cotangent: Tensor, found: _Gradients) -> None:
    """Refuse gradients that are neither equation 11's nor 6's."""
    detached, full, inverted = (
        _through(s, cotangent, what) for what in ("norm", "nothing", "direction")
    )
    expect_gradient(found.magnitude, full.magnitude, "magnitude")
    for name in ("lora_A", "lora_B"):
        got = getattr(found, name)
        if not (isinstance(got, Tensor) and same(got, getattr(detached, name))):
            message = "it comes through the norm alone: the update itself is detached"
            known = [(getattr(inverted, name), message)]
            expect_gradient(got, getattr(full, name), name, known)


def check_detached(s: Sample, cotangent: Tensor, found: _Gradients) -> None:
    """Refuse gradients that are not equation 11's."""
    want = _through(s, cotangent, "norm")
    full, inverted = (_through(s, cotangent, what) for what in ("nothing", "direction"))
    expect_gradient(found.magnitude, want.magnitude, "magnitude")
    for name in ("lora_A", "lora_B"):
        known = [
            (getattr(full, name), "the norm is not detached: this is equation 6, not 11"),
            (getattr(inverted, name), "the direction is detached: it is the norm that should be"),
        ]
        expect_gradient(getattr(found, name), getattr(want, name), name, known)


@lesson.exercise(
    "3.5",
    title="The detached norm",
    difficulty="medium",
    minutes=10,
    teaches="what the paper treats as a constant in the backward pass (section 4.3)",
    hint="Equation 11 has C where equation 6 has a norm. Which one tensor is a constant there?",
)
def dora_weight_detached(answer: Answer) -> None:
    answer.case("by hand")
    expect(answer(*EXAMPLE), EXAMPLE_WEIGHT, _wrong_weights(EXAMPLE)[:-1], shape="(out, in)")
    answer.case("random layers")
    for size in SIZES:
        sample = _sample(*size)
        expect(answer(*sample), sample.adapted, _wrong_weights(sample), shape="(out, in)")
    answer.case("gradient")
    for size in SIZES:
        sample, cotangent = _sample(*size), randn(*size[:2])
        found = answer.probe(probe.gradients, list(sample), [1, 2, 3], cotangent)
        check_detached(sample, cotangent, _Gradients(*found["gradients"]))
    expect_dtype_and_device(answer, *_sample(5, 3, 2, 3.0))


@lesson.exercise(
    "3.6",
    title="Find the bug",
    difficulty="medium",
    minutes=10,
    teaches="why a reshape hides behind B = 0 and behind square layers",
    hint="Entry [i, j] of the product belongs to input i, output j. Where does .view put it?",
)
def update_for_weight(answer: Answer) -> None:
    def check(lora_B: Tensor, lora_A: Tensor, known: Known = ()) -> None:
        product = lora_B.double() @ lora_A.double()  # (in, out)
        in_, out = product.shape
        entries = [[float(product[i, j]) for i in range(in_)] for j in range(out)]
        square = (product, "not transposed: for a square layer .view changes nothing")
        expect(
            answer(lora_B, lora_A),
            torch.tensor(entries, dtype=torch.float64),
            [
                square if in_ == out else (product, "this is (in, out): a weight is (out, in)"),
                (product.reshape(out, in_), "this is still what .view gives, not the transpose"),
                (torch.zeros(out, in_), "it is zero: so the bug stays hidden, as with B = 0"),
                *known,
            ],
            shape="(out, in)",
        )

    answer.case("by hand")
    example = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    check(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    answer.case("random factors")
    by_heart = [(example, "this is the answer to the example: compute it")]
    for in_, out, rank in ((3, 5, 2), (7, 2, 4)):
        check(randn(in_, rank), randn(rank, out), by_heart)
    answer.case("a square layer")
    check(randn(4, 2), randn(2, 4))
    answer.case("gradient")
    b, a, cotangent = randn(3, 2), randn(2, 5), randn(5, 3)
    to_b, to_a = answer.probe(probe.gradients, [b, a], [0, 1], cotangent)["gradients"]
    expect_gradient(to_b, cotangent.double().T @ a.double().T, "lora_B")
    expect_gradient(to_a, b.double().T @ cotangent.double().T, "lora_A")
    expect_dtype_and_device(answer, randn(3, 2), randn(2, 5))


@lesson.exercise(
    "3.7",
    title="Merge DoRA into one weight",
    difficulty="medium",
    minutes=10,
    teaches="that DoRA too ends as a plain nn.Linear, and what happens to the bias",
    hint="y = x W'^T + bias. Which of the two does the magnitude change?",
)
def merge_dora(answer: Answer) -> None:
    def check(base: nn.Linear, s: Sample) -> None:
        with torch.no_grad():
            base.weight.copy_(s.weight)
        merged = expect_module(answer(base, *s[1:]), "Linear")
        check_can_run(merged, base)
        known = [
            *_wrong_weights(s)[:-1],
            (s.weight.double() + s.adapted, "W is added to W': W' takes the place of W"),
            (s.weight, "the weight is still W"),
        ]
        expect(merged.parameters.get("weight"), s.adapted, known, "weight")
        bias = merged.parameters.get("bias")
        if base.bias is None:
            require(bias is None, "the base has no bias and the merged layer has one")
            return
        require(bias is not None, "the bias is lost")
        g = s.magnitude.double() / _lengths(s.direction)
        scaled = (g * base.bias.double(), "the bias is scaled: it stays as it is")
        expect(bias, base.bias, [scaled, (bias, "the bias is not the base's")], "bias")  # type: ignore[list-item]

    answer.case("by hand")
    check(nn.Linear(2, 3), EXAMPLE)
    answer.case("random layers")
    for size in SIZES:
        check(nn.Linear(size[1], size[0]), _sample(*size))
    answer.case("no bias")
    check(nn.Linear(3, 5, bias=False), _sample(5, 3, 2, 3.0))
    check_nothing_shared(answer, nn.Linear(3, 5), *_sample(5, 3, 2, 3.0)[1:])
    expect_dtype_and_device(answer, nn.Linear(3, 5), *_sample(5, 3, 2, 3.0)[1:])


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
    module = check_adapter(answer, linear, "lora_A", "lora_B", "magnitude")
    got = module.parameters.get("magnitude", module.tensors.get("magnitude"))
    require(
        getattr(got, "shape", None) not in ((5,), (1, 5)),
        "magnitude is one per input (dim=0): DoRA keeps one per output neuron",
    )
    magnitude = expect_parameter(module, "magnitude", (3,))
    answer.case("start")
    require(not bool((magnitude == 1).all()), "magnitude starts at 1: it starts as W's row norm")
    expect(magnitude, _lengths(linear.weight), name="magnitude at the start")
    check_start(answer, 256)

    for shape, has_bias in (((6, 5), True), ((6, 5), False), ((2, 4, 5), True)):
        answer.case(f"x of shape {shape}" if has_bias else "no bias")
        linear, x, cotangent = nn.Linear(5, 3, has_bias), randn(*shape), randn(*shape[:-1], 3)
        s = _sample(3, 5, 2, 3.0)._replace(weight=linear.weight.detach())
        values = {"lora_A": s.lora_A, "lora_B": s.lora_B, "magnitude": s.magnitude}
        found = answer.probe(probe.layer, [linear, 2, 3.0], values, x, cotangent)
        bias = linear.bias.detach() if has_bias else torch.zeros(3)
        want = x.double() @ s.adapted.T + bias.double()
        stale = (x.double() @ s.scaled(s.direction, _lengths(s.weight)).T + bias, STALE)
        expect(found["value"], want, [stale, *_wrong_outputs(x, bias, s)], shape="(..., out)")
        check_forward(found, linear, x)
    answer.case("gradient")
    gradients = found["gradients"]
    require(gradients["base.weight"] is None, "the frozen base gets a gradient")
    to_weight = cotangent.reshape(-1, 3).T @ x.reshape(-1, 5)  # dL/dW'
    check_detached(s, to_weight, _Gradients(*(gradients[name] for name in _Gradients._fields)))
    expect_input_gradient(found["x"], cotangent, *s.parts)
    check_follows_base(answer)


STALE = "divided by the norm of W, or by a norm kept from the start: V = W + s B A changes"
