"""Checks of exercises/06_fast_dora.ipynb: the same layer at LoRA's price."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from minidora.checks.exercise import Answer, Lesson
from minidora.checks.expect import (
    Known,
    expect,
    expect_dtype_and_device,
    expect_gradient,
    expect_number,
    expect_parts,
    randn,
    random_size,
    require,
    same,
)
from minidora.runner import probe
from minidora.runner.probe import cost

lesson = Lesson(
    6, "06_fast_dora", closed=("minidora.lora", "minidora.dora", "minidora.adapt", "peft")
)


def _sizes() -> tuple[tuple[int, int, int, int], ...]:
    """Some (tokens, in, out, rank); the first are worked by hand in the exercise."""
    drawn = (random_size(50, 99), random_size(20, 40), random_size(41, 60), random_size(4, 9))
    return (3, 5, 8, 2), (5, 7, 6, 3), drawn


@lesson.exercise(
    "6.1",
    title="FLOPs of a forward pass",
    difficulty="easy",
    minutes=10,
    teaches="which part of DoRA depends on the tokens, and which does not",
    hint="A product (a, b) x (b, c) has a * c entries. How many operations does one of them take?",
)
def forward_flops(answer: Answer) -> None:
    names = ("layer", "low_rank", "norm")
    for number, shape in enumerate(_sizes()):
        answer.case(("by hand", "other sizes", "random sizes")[number])
        t, i, o, r = shape
        x, w, a, b = (torch.empty(s, device="meta") for s in ((t, i), (o, i), (r, i), (o, r)))
        want = {
            "layer": _flops((x, w.T)),
            "low_rank": _flops((x, a.T), (x @ a.T, b.T)),
            "norm": _flops((w, a.T), (a, a.T), (b, a @ a.T)),
        }
        gram, update = 2 * r * r * i, 2 * t * r * (i + o)
        known: dict[str, list[tuple[float, str]]] = {
            "layer": [
                (want["layer"] // 2, "an entry takes as many additions as multiplications"),
                (2 * i * o, "the tokens are missing: x is (tokens, in)"),
            ],
            "low_rank": [
                (update // 2, "an entry takes as many additions as multiplications"),
                (2 * o * r * i, "this is B A: x A^T first, then times B^T, is far cheaper"),
                (2 * o * r * i + want["layer"], "B A is not built: x A^T first, then times B^T"),
                (2 * t * r * i, "the second product is missing, (tokens, rank) x (rank, out)"),
                (2 * t * r * o, "the first product is missing, (tokens, in) x (in, rank)"),
            ],
            "norm": [
                (want["norm"] // 2, "an entry takes as many additions as multiplications"),
                (t * want["norm"], "the norm does not depend on the tokens: it is one per layer"),
                (2 * o * i * r, "this is U alone: A A^T and B G are products too"),
                (2 * o * i * r + gram, "B G is missing, (out, rank) x (rank, rank)"),
                (want["norm"] - gram, "A A^T is missing, (rank, in) x (in, rank)"),
                (want["norm"] - 2 * o * i * r, "U = W A^T is missing, the largest of the three"),
            ],
        }
        for name, part in zip(names, expect_parts(answer(*shape), names), strict=True):
            others = [(want[other], f"this is {other}: keep the order") for other in names]
            expect_number(part, want[name], [*known[name], *others], name)


def _flops(*products: tuple[Tensor, Tensor]) -> int:
    """FLOPs of some products as PyTorch counts them; on the meta device nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode  # half a second, and triton

    with FlopCounterMode(display=False) as counter:
        for first, second in products:
            first @ second
    return int(counter.get_total_flops())


def _held(forward: Callable[[Tensor], Tensor], x: Tensor, own: Sequence[Tensor]) -> int:
    """Bytes of the matrices that autograd saves beside x and its own tensors, each storage once."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(x)
    matrices = [tensor for tensor in saved if tensor.ndim == 2 and tensor.shape[1] > 1]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in matrices}
    existed = {t.untyped_storage()._cdata for t in (x, *own)}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in existed)


@lesson.exercise(
    "6.2",
    title="Bytes held for the backward pass",
    difficulty="easy",
    minutes=10,
    teaches="what each form of the layer keeps until the backward pass",
    hint="For each product, which of its two factors does the gradient of the other one need?",
)
def held_bytes(answer: Answer) -> None:
    names = ("lora", "merged", "compose")
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for number, (shape, dtype) in enumerate(zip(_sizes(), dtypes, strict=True)):
        answer.case(("by hand", "other sizes", "random sizes")[number])
        t, i, o, r = shape
        x, w = torch.randn(t, i, dtype=dtype, requires_grad=True), torch.randn(o, i, dtype=dtype)
        a, b, m = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((r, i), (o, r), (o,)))

        def lora(x: Tensor, w: Tensor = w, a: Tensor = a, b: Tensor = b) -> Tensor:
            return F.linear(x, w) + F.linear(2.0 * F.linear(x, a), b)

        def merged(x: Tensor, w: Tensor = w, a: Tensor = a, b: Tensor = b, m: Tensor = m) -> Tensor:
            v = w + 2.0 * (b @ a)
            return F.linear(x, (m / v.detach().norm(dim=1))[:, None] * v)

        def compose(
            x: Tensor, w: Tensor = w, a: Tensor = a, b: Tensor = b, m: Tensor = m
        ) -> Tensor:
            g: Tensor = m / (w + 2.0 * (b @ a)).detach().norm(dim=1)
            return g * (F.linear(x, w) + F.linear(2.0 * F.linear(x, a), b))

        size = dtype.itemsize
        matrix, output, hidden = size * o * i, size * t * o, size * t * r
        want = {
            name: _held(form, x, (w, a, b))
            for name, form in zip(names, (lora, merged, compose), strict=True)
        }
        known: dict[str, list[tuple[float, str]]] = {
            "lora": [
                (output, "an addition holds neither of its terms: h = s x A^T is what is held"),
                (output + hidden, "an addition holds neither of its terms: h is what is held"),
                (matrix, "W exists anyway, and B A is not built: h = s x A^T is what is held"),
                (0, "the gradient of B needs h = s x A^T"),
                (size * (t * r + t * i), "x exists anyway: count what the layer makes"),
            ],
            "merged": [
                (matrix, "one matrix: the gradient of m needs V, that of x needs W'"),
                (3 * matrix, "three matrices: B A and s B A are let go, V and W' are held"),
                (2 * matrix + output, "the output is not counted"),
                (output, "no output is held here: V and W' are"),
                (2 * matrix + hidden, "no h here: x goes through W' alone, x A^T is not computed"),
            ],
            "compose": [
                (output, "h = s x A^T is held too, as in LoRA"),
                (hidden, "u is held too: the gradient of g needs it"),
                (2 * output + hidden, "two outputs: g * u holds u, and u's sum neither term"),
                (matrix + output + hidden, "the norm is detached: nobody needs V any more"),
                (2 * matrix, "W' is not built: u and h are held"),
            ],
        }
        for name, part in zip(names, expect_parts(answer(*shape, size), names), strict=True):
            numbers = want[name] // size
            others = [
                *[(want[other], f"this is {other}: keep the order") for other in names],
                (want[name] + size * o, "vectors such as g are not counted"),
                (want[name] + hidden, "h is held once: x A^T and s x A^T are not both needed"),
                (numbers, "these are numbers: a number takes itemsize bytes"),
                (4 * numbers, "4 bytes a number, whatever itemsize is"),
            ]
            expect_number(part, want[name], [*known[name], *others], name)


def _norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Lengths of the rows of W + s B A, by Python's own exact sums, in float64."""
    pairs = zip(lora_B.double().T, lora_A.double(), strict=True)
    update = torch.stack([torch.outer(b, a) for b, a in pairs]).sum(0)
    rows = (weight.double() + scaling * update).tolist()
    return torch.tensor([math.hypot(*row) for row in rows], dtype=torch.float64)


def _wrong_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Known:
    """What usual mistakes make of the norm."""
    w, a, b = weight.double(), lora_A.double(), lora_B.double()
    own, cross = w.square().sum(1), (b * (w @ a.T)).sum(1)
    update = (b * (b @ (a @ a.T))).sum(1)
    s = scaling

    def root(square: Tensor) -> Tensor:
        return square.clamp(min=0).sqrt()

    return [
        (own.sqrt(), "these are the lengths of W's rows: the update is missing"),
        (own + 2 * s * cross + s**2 * update, "these are squared lengths: take the root"),
        (root(own + s**2 * update), "the cross term is missing: 2 s sum over l of B U"),
        (root(own + s * cross + s**2 * update), "the cross term counts twice: 2 s, not s"),
        (root(own + 2 * s * cross), "the square of the update is missing: s^2 B G"),
        (root(own + 2 * s * cross + s * update), "s stands squared before the update's square"),
        (root(own + 2 * cross + update), "the scaling is missing"),
        (
            root(own + 2 * s * cross + s**2 * b.square().sum(1)),
            "A's rows are not of length 1 and orthogonal: G = A A^T is missing",
        ),
    ]


@lesson.exercise(
    "6.3",
    title="The factored norm",
    difficulty="medium",
    minutes=20,
    teaches="how to take the lengths of the rows of W + s B A without building B A",
    hint="What is |w + d|^2, multiplied out, and what is w . d if d is a sum of rows of A?",
)
def factored_norm(answer: Answer) -> None:
    answer.case("by hand")
    weight = torch.tensor([[1.0, 0.0], [3.0, 2.0], [6.0, 8.0]])
    lora_A = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    lora_B = torch.tensor([[1.0, 2.0], [1.0, 5.0], [0.0, 0.0]])
    example, args = torch.tensor([5.0, 13.0, 10.0]), (weight, lora_A, lora_B, 2.0)
    expect(answer(*args), example, _wrong_norms(*args), shape="(out,)")
    answer.case("random factors")
    by_heart = (example, "this is the answer to the example: compute it")
    for out, in_, rank, scaling in ((5, 3, 2, 1.5), (3, 7, 4, 0.5), (4, 4, 2, -2.0)):
        args = randn(out, in_), randn(rank, in_), randn(out, rank), scaling
        expect(answer(*args), _norms(*args), [*_wrong_norms(*args), by_heart], shape="(out,)")
    answer.case("no gradient")
    found = answer.probe(cost, list(args), [0, 1, 2], randn(4))
    require(
        found["gradients"] == [None] * 3,
        "a gradient runs through the norm: it is a constant in the backward pass (equation 11)",
    )
    answer.case("nothing left of W")
    # Small whole numbers, so that every product is exact. Only the root of W's own square is
    # rounded, and it comes out too small in these rows, which leaves a square below 0.
    lora_A, lora_B = (4 * randn(3, 16)).round(), (4 * randn(2000, 3)).round()
    weight = -2.0 * (lora_B @ lora_A)
    short = weight.norm(dim=1).square() < weight.square().sum(1)
    norm = answer(weight[short], lora_A, lora_B[short], 2.0)
    require(
        isinstance(norm, Tensor) and bool(norm.isfinite().all()),
        "NaN where W = -s B A: rounding pushed a square below 0, so stop it at 0",
    )
    near = (norm == 0).double().mean()  # a half where the root is taken in some other way
    require(
        bool(near > 0.4),
        f"{norm.min():.1g} where W = -s B A: a square that rounding pushed below 0 counts as 0",
    )
    answer.case("tiny rows")
    weight, lora_A, lora_B = randn(5, 8), randn(2, 8), randn(5, 2)
    norm = answer(1e-10 * weight, lora_A, 1e-10 * lora_B, 2.0)
    want = 1e-10 * _norms(weight, lora_A, lora_B, 2.0)
    longer = isinstance(norm, Tensor) and norm.shape == (5,) and bool((norm > 1.01 * want).any())
    require(not longer, "rows of length 1e-10 come out longer: stop squares at 0, without epsilon")
    expect(norm, want, shape="(out,)")
    answer.case("bytes")
    args = randn(256, 256), randn(2, 256), randn(256, 2), 2.0
    share = answer.probe(cost, list(args), [], randn(256))["peak"] / (4 * 256 * 256)
    require(
        share < 0.9,
        f"it makes {share:.1f} times the bytes of W: nothing of that size, no B A, no W squared",
    )
    expect_dtype_and_device(answer, randn(5, 3), randn(2, 3), randn(5, 2), 1.5)


def _grid(*shape: int, steps: int, unit: float) -> Tensor:
    """Random multiples of unit, up to `steps` of them: sums and products of few are exact."""
    return (steps * (2 * torch.rand(shape, generator=_dice) - 1)).round() * unit


_dice = torch.Generator()
_dice.seed()


def _half_precision(tokens: int, out: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """base, low (dtype), g, bias (float32), such that float32 computes g (base + low) + bias
    exactly: then there is one right way to round it."""
    base, low = (_grid(tokens, out, steps=127, unit=u).to(dtype) for u in (1 / 16, 1 / 64))
    g = 1 + _grid(out, steps=120, unit=1 / 512)
    return base, low, g, _grid(out, steps=4000, unit=1 / 8192)


@lesson.exercise(
    "6.4",
    title="Round once",
    difficulty="medium",
    minutes=15,
    teaches="where half precision loses digits, and how to lose no more than one rounding",
    hint="How many times is a number rounded to bf16 on its way through your lines?",
)
def round_once(answer: Answer) -> None:
    def check(base: Tensor, low: Tensor, g: Tensor, bias: Tensor) -> None:
        dtype = base.dtype
        got = answer(base, low, g, bias)
        if isinstance(got, Tensor):
            require(got.dtype == dtype, f"y has the dtype of base, {dtype}: got {got.dtype}")
        wide = base.float() + low.float()
        known = [
            ((g * (base + low).float() + bias).to(dtype), "the sum base + low is rounded first"),
            ((g.to(dtype).float() * wide + bias).to(dtype), "g is rounded: keep it in float32"),
            ((g * wide).to(dtype) + bias.to(dtype), "rounded before the bias is added, and after"),
            (
                ((g * wide).to(dtype) + bias).to(dtype),
                "rounded before the bias is added, and after",
            ),
            ((g * wide + bias.to(dtype).float()).to(dtype), "the bias is rounded: keep it"),
            (g.to(dtype) * (base + low) + bias.to(dtype), "everything is rounded, at each step"),
            ((g * (wide + bias)).to(dtype), "the bias is scaled by g: add it last, as it is"),
            ((g * wide).to(dtype), "the bias is missing"),
            ((g * base.float() + bias).to(dtype), "low is missing"),
        ]
        expect(got, (g.double() * wide.double() + bias.double()).to(dtype), known)

    answer.case("by hand")
    half, e = torch.bfloat16, 2**-8  # half a step of bf16 above 1
    columns = [  # base, low, g, bias: each shows another mistake
        (1.0, e, 1.0, e),
        (1.0, 0.0, 1 + e, e),
        (1.0, e, 3.0, 0.0),
        (e, 0.0, 1.0, 1 + e),
        (1.0, 0.0, 2.0, 1.0),
        (1.0, 1.0, 1.0, 1.0),
    ]
    base, low, g, bias = torch.tensor(columns).T
    check(base[None].to(half), low[None].to(half), g.clone(), bias.clone())
    answer.case("bf16")
    check(*_half_precision(20, 30, half))
    answer.case("fp16")
    check(*_half_precision(20, 30, torch.float16))
    expect_dtype_and_device(answer, randn(6, 3), randn(6, 3), randn(3), randn(3))


@lesson.exercise(
    "6.5",
    title="The compose form, holding one output",
    difficulty="medium",
    minutes=15,
    teaches="how the way a formula is written decides what is kept for the backward pass",
    hint="A product with g keeps its other factor. How many such products do you have?",
)
def compose_form(answer: Answer) -> None:
    def case(
        tokens: int, in_: int, out: int, rank: int, scaling: float
    ) -> tuple[list[Any], Tensor, Known]:
        """Arguments, the right y, and what usual mistakes make of it."""
        x, weight, bias, a, b = (
            randn(*shape) for shape in ((tokens, in_), (out, in_), (out,), (rank, in_), (out, rank))
        )
        own = _norms(weight, a, b, scaling)
        norm = (own * (1.5 + 0.3 * randn(out).tanh())).float()
        magnitude = norm * (1 + 0.3 * randn(out).tanh())
        magnitude[0] *= -1  # nothing keeps training from it
        g = magnitude.double() / norm.double()
        base, low = x.double() @ weight.double().T, x.double() @ a.double().T @ b.double().T
        u, bias64 = base + scaling * low, bias.double()
        known = [
            (g * (u + bias64), "the bias is scaled by g: add it last, as it is"),
            (g * u, "the bias is missing"),
            (g * (base + low) + bias64, "the scaling is missing"),
            (base + g * scaling * low + bias64, "only the update is scaled: g scales x W^T too"),
            (g * base + scaling * low + bias64, "only x W^T is scaled: g scales the update too"),
            (u + bias64, "g is missing: this is LoRA"),
            (u / g + bias64, "upside down: g = magnitude / norm"),
            (
                g.abs() * u + bias64,
                "the magnitude has lost its sign: a trained one may be negative",
            ),
            (magnitude.double() * u + bias64, "not divided by the norm"),
            (magnitude / own * u + bias64, "the norm is given: do not compute one of your own"),
        ]
        return [x, weight, bias, a, b, magnitude, norm, scaling], g * u + bias64, known

    def check_gradients(args: list[Any], dy: Tensor) -> None:
        x, weight, _, a, b, magnitude, norm = (tensor.double() for tensor in args[:7])
        scaling, g = args[7], magnitude / norm
        base, low = x @ weight.T, x @ a.T @ b.T
        du = g * dy.double()
        wants: list[tuple[str, Tensor, Known]] = [
            (
                "x",
                du @ (weight + scaling * b @ a),
                [
                    (du @ weight, "it comes through x W^T alone, but x is in the update too"),
                    (scaling * du @ b @ a, "it comes through the update alone, not through x W^T"),
                ],
            ),
            ("lora_A", scaling * (du @ b).T @ x, []),
            ("lora_B", scaling * du.T @ (x @ a.T), []),
            (
                "magnitude",
                (dy.double() * (base + scaling * low)).sum(0) / norm,
                [
                    ((dy.double() * base).sum(0) / norm, "g scales the update too"),
                    ((dy.double() * scaling * low).sum(0) / norm, "g scales x W^T too"),
                ],
            ),
        ]
        found = answer.probe(probe.gradients, args, [0, 3, 4, 5], dy)
        for (name, want, known), gradient in zip(wants, found["gradients"], strict=True):
            expect_gradient(gradient, want, name, known)

    def held(tokens: int, in_: int, out: int, rank: int) -> tuple[float, float]:
        """Bytes held, in outputs and in weights."""
        args, _, _ = case(tokens, in_, out, rank, 2.0)
        found = answer.probe(cost, args, [0, 3, 4, 5], randn(tokens, out))
        return found["held"] / (4 * tokens * out), found["held"] / (4 * out * in_)

    answer.case("random layers")
    for size in ((6, 5, 3, 2, 1.5), (4, 2, 7, 4, 0.5), (3, 4, 4, 2, 2.0)):
        args, want, known = case(*size)
        expect(answer(*args), want, known, shape="(tokens, out)")
    answer.case("gradient")
    check_gradients(case(5, 4, 3, 2, 1.5)[0], randn(5, 3))
    answer.case("few tokens")
    _, weights = held(2, 64, 48, 2)
    require(
        weights < 0.5,
        f"{weights:.0f} times the bytes of W are held: make nothing of its size, no W' and no B A",
    )
    answer.case("many tokens")
    outputs, _ = held(512, 6, 32, 2)
    require(
        outputs < 1.5,
        f"{outputs:.0f} tensors of the size of an output are held: one product with g is enough",
    )
    expect_dtype_and_device(answer, *args)


@lesson.exercise(
    "6.6",
    answer="Compose",
    title="A forward and a backward pass of your own",
    difficulty="hard",
    minutes=30,
    teaches="how an autograd.Function keeps less than autograd would",
    hint="y = g * (base + low) + bias. How does y change with each of the four, and over which "
    "tokens is that collected?",
)
def compose_function(answer: Answer) -> None:
    names = ("base", "low", "g", "bias")

    def run(args: Sequence[Tensor], cotangent: Tensor) -> dict[str, Any]:
        found = dict(answer.probe(cost, list(args), [0, 1, 2, 3], cotangent, alone=True))
        for index in found["changed"]:
            require(False, f"it changes {[*names, 'dy'][index]} in place: others may need it still")
        return found

    def check_gradients(found: dict[str, Any], u: Tensor, g: Tensor, dy: Tensor) -> None:
        du, d_bias = (g.double() * dy.double()), dy.double().sum(0)
        products = dy.double() * u.double()  # (tokens, out)
        wants = {"base": du, "low": du, "g": products.sum(0), "bias": d_bias}
        knowns: dict[str, Known] = {
            "base": [(dy, "g is missing: y changes g times as fast as base")],
            "low": [(dy, "g is missing: y changes g times as fast as low")],
            "g": [
                (d_bias, "this is the gradient of the bias: keep the order of the arguments"),
                (products.mean(0), "a mean: the gradient is the sum over all tokens"),
                (du.sum(0), "dy is multiplied by g: it is u that g stands beside"),
            ],
            "bias": [
                (du.sum(0), "scaled by g: the bias is added after g"),
                (products.sum(0), "this is the gradient of g: keep the order of the arguments"),
                (dy.double().mean(0), "a mean: the gradient is the sum over all tokens"),
            ],
        }
        for name, gradient in zip(names, found["gradients"], strict=True):
            expect_gradient(gradient, wants[name], name, knowns[name])

    answer.case("forward")
    base, low, g, bias = (randn(*shape) for shape in ((6, 3), (6, 3), (3,), (3,)))
    dy = randn(6, 3)
    found = run((base, low, g, bias), dy)
    u = base.double() + low.double()
    known = [
        (g * (u + bias), "the bias is scaled by g: add it last, as it is"),
        (g * u, "the bias is missing"),
        (u + bias, "g is missing"),
    ]
    expect(found["value"], g * u + bias, known)
    answer.case("gradient")
    found_g = found["gradients"][2]
    require(
        not (isinstance(found_g, Tensor) and same(found_g, (dy.double() * base.double()).sum(0))),
        "gradient of g: low is missing, u = base + low",
    )
    check_gradients(found, u, g, dy)

    for half in (torch.bfloat16, torch.float16):
        answer.case("bf16" if half == torch.bfloat16 else "fp16")
        base, low, g, bias = _half_precision(512, 8, half)
        dy = _grid(512, 8, steps=127, unit=1 / 16).to(half)
        found = run((base, low, g, bias), dy)
        exact = base.double() + low.double()
        require(
            isinstance(found["value"], Tensor) and found["value"].dtype == half,
            "y has the dtype of base: round it at the end",
        )
        want_y = (g.double() * exact + bias.double()).to(half)
        expect(found["value"], want_y, name="y, rounded once")
        outputs = found["held"] / base.untyped_storage().nbytes()
        require(
            outputs < 1.5,
            f"{outputs:.0f} times the bytes of an output are held: "
            "save u and g alone, u in the dtype of base",
        )
        require(outputs > 0.5, "no output is held: save u, in the dtype of base")
        u = exact.to(half)
        known = [
            ((dy * u).sum(0), "multiplied or summed in half precision: sum over tokens in float32"),
            ((dy * u).double().sum(0), "multiplied in half precision: turn dy to float32 first"),
        ]
        expect_gradient(found["gradients"][2], (dy.double() * u.double()).sum(0), "g", known)
        known = [(g.to(half) * dy, "g is rounded: multiply in float32, then round")]
        for name, gradient in zip(names[:2], found["gradients"][:2], strict=True):
            expect_gradient(gradient, (g.double() * dy.double()).to(half), name, known)
        d_bias, want = found["gradients"][3].double(), dy.double().sum(0)
        require(
            bool(
                ((d_bias - want).abs() <= want.abs() / 2**8).all()
            ),  # bf16 has 8 digits, fp16 more
            "gradient of bias: rounded after each token, not once",
        )
