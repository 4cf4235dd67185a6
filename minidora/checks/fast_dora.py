"""Checks of exercises/06_fast_dora.ipynb: the same layer at LoRA's price."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidora.checks.exercise import Answer, Lesson
from minidora.checks.expect import (
    Known,
    dice,
    expect,
    expect_device,
    expect_gradient,
    expect_nothing_changed,
    multiples,
    randn,
    random_size,
    require,
)
from minidora.checks.oracle import Wrong, lengths, product, signed
from minidora.checks.spec import spec
from minidora.runner import probe
from minidora.runner.probe import cost

lesson = Lesson(
    6, "06_fast_dora", closed=("minidora.lora", "minidora.dora", "minidora.adapt", "peft")
)


# ---- 6.1 and 6.2: what a forward pass costs ----


NAMES = ("tokens", "in_features", "out_features", "rank")
SIZES = dict.fromkeys(NAMES, lambda: random_size(2, 41))


def _flops(*products: tuple[int, int, int]) -> int:
    """Of products (a, b) x (b, c): each of a c entries takes b multiplications and additions."""
    return sum(2 * a * b * c for a, b, c in products)


@spec(
    lesson,
    "6.1",
    title="FLOPs of a forward pass",
    difficulty="easy",
    minutes=10,
    teaches="which part of DoRA depends on the tokens, and which does not",
    hint="A product (a, b) x (b, c) has a * c entries. How many operations does one of them take?",
    shapes="tokens, in_features, out_features, rank -> layer, low_rank, norm",
    draw=SIZES,
)
def forward_flops(
    tokens: int, in_features: int, out_features: int, rank: int
) -> tuple[int, int, int]:
    t, i, o, r = tokens, in_features, out_features, rank
    return _flops((t, i, o)), _flops((t, i, r), (t, r, o)), _flops((o, i, r), (r, i, r), (o, r, r))


forward_flops.example(3, 5, 8, 2, gives=(240, 156, 264))
forward_flops.example(2, 3, 2, 5, gives=(24, 100, 310), case="rank above both sides")
forward_flops.example(1, 1, 1, 1, gives=(2, 4, 6), case="sizes of 1")
forward_flops.example(
    5003, 4099, 11003, 17, gives=(451283577782, 2568880404, 1542173054), case="large odd sizes"
)
HALF = "an entry takes as many additions as multiplications"


def _wrong_layers(t: int, i: int, o: int, r: int) -> Wrong:
    yield HALF, t * i * o
    yield "the tokens are missing: x is (tokens, in)", 2 * i * o


def _wrong_paths(t: int, i: int, o: int, r: int) -> Wrong:
    yield HALF, t * r * (i + o)
    yield "this is B A: x A^T first, then times B^T, is far cheaper", 2 * o * r * i
    yield "B A is not built: x A^T first, then times B^T", 2 * o * r * i + 2 * t * i * o
    yield "the second product is missing, (tokens, rank) x (rank, out)", 2 * t * r * i
    yield "the first product is missing, (tokens, in) x (in, rank)", 2 * t * r * o


def _wrong_norm_flops(t: int, i: int, o: int, r: int) -> Wrong:
    u, gram, bg = 2 * o * i * r, 2 * r * r * i, 2 * o * r * r
    yield HALF, (u + gram + bg) // 2
    yield "the norm does not depend on the tokens: it is one per layer", t * (u + gram + bg)
    yield "this is U alone: A A^T and B G are products too", u
    yield "B G is missing, (out, rank) x (rank, rank)", u + gram
    yield "A A^T is missing, (rank, in) x (in, rank)", u + bg
    yield "U = W A^T is missing, the largest of the three", gram + bg


forward_flops.mistakes_of(_wrong_layers, "layer")
forward_flops.mistakes_of(_wrong_paths, "low_rank")
forward_flops.mistakes_of(_wrong_norm_flops, "norm")


@spec(
    lesson,
    "6.2",
    title="Bytes held for the backward pass",
    difficulty="easy",
    minutes=10,
    teaches="what each form of the layer keeps until the backward pass",
    hint="For each product, which of its two factors does the gradient of the other one need?",
    shapes="tokens, in_features, out_features, rank, itemsize -> lora, merged, compose",
    draw=SIZES | {"itemsize": lambda: dice.choice((4, 8))},  # at 2, two mistakes give one value
)
def held_bytes(
    tokens: int, in_features: int, out_features: int, rank: int, itemsize: int
) -> tuple[int, ...]:
    """By hand; the tests hold it against what autograd saves."""
    h, matrix, u = tokens * rank, out_features * in_features, tokens * out_features
    return itemsize * h, itemsize * 2 * matrix, itemsize * (u + h)


held_bytes.example(3, 5, 8, 2, 4, gives=(24, 320, 120))
held_bytes.example(2, 3, 2, 5, 2, gives=(20, 24, 28), case="rank above both sides")
held_bytes.example(1, 3, 4, 1, 8, gives=(8, 192, 40), case="sizes of 1")


def _wrong_bytes(name: str, index: int) -> Callable[..., Wrong]:
    """Of one form: what is wrong for all of them, and what is for this one."""

    def wrong(t: int, i: int, o: int, r: int, size: int) -> Wrong:
        matrix, output, hidden = size * o * i, size * t * o, size * t * r
        right = (hidden, 2 * matrix, output + hidden)[index]
        yield "vectors such as g are not counted", right + size * o
        twice = "h is held once: x A^T and s x A^T are not both needed"
        if name == "merged":
            twice = "no h here: x goes through W' alone, x A^T is not computed"
        # Of two messages for one value, one speaks.
        yield twice, right + hidden
        yield "these are numbers: a number takes itemsize bytes", right // size
        if (name, size) != ("merged", 8):
            yield "4 bytes a number, whatever itemsize is", 4 * right // size
        if name == "lora":
            yield "an addition holds neither of its terms: h = s x A^T is what is held", output
            yield "an addition holds neither of its terms: h is what is held", output + hidden
            yield "W exists anyway, and B A is not built: h = s x A^T is what is held", matrix
            yield "the gradient of B needs h = s x A^T", 0
            yield "x exists anyway: count what the layer makes", size * (t * r + t * i)
        elif name == "merged":
            yield "one matrix: the gradient of m needs V, that of x needs W'", matrix
            yield "three matrices: B A and s B A are let go, V and W' are held", 3 * matrix
            yield "the output is not counted", 2 * matrix + output
            yield "no output is held here: V and W' are", output
        else:
            yield "h = s x A^T is held too, as in LoRA", output
            yield "u is held too: the gradient of g needs it", hidden
            yield "two outputs: g * u holds u, and u's sum neither term", 2 * output + hidden
            yield "the norm is detached: nobody needs V any more", matrix + output + hidden
            yield "W' is not built: u and h are held", 2 * matrix

    return wrong


for index, part in enumerate(("lora", "merged", "compose")):
    held_bytes.mistakes_of(_wrong_bytes(part, index), part)


# ---- 6.3: the factored norm ----


def _norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return lengths(weight + scaling * product(lora_A, lora_B))


def _either_sign() -> float:
    return dice.choice((-1, 1)) * random_size(10, 40) / 10


@spec(
    lesson,
    "6.3",
    title="The factored norm",
    difficulty="medium",
    minutes=20,
    teaches="how to take the lengths of the rows of W + s B A without building B A",
    hint="What is |w + d|^2, multiplied out, and what is w . d if d is a sum of rows of A?",
    shapes="(out, in), (rank, in), (out, rank), scaling -> (out,)",
    draw={"scaling": _either_sign},
    grads=(),
    tiny=("weight", "lora_B"),
)
def factored_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return _norms(weight, lora_A, lora_B, scaling)


@factored_norm.mistakes_of
def _wrong_norms(w: Tensor, a: Tensor, b: Tensor, s: float) -> Wrong:
    own, cross = w.square().sum(1), (b * (w @ a.T)).sum(1)
    update = (b * (b @ (a @ a.T))).sum(1)
    no_g = own + 2 * s * cross + s**2 * b.square().sum(1)
    yield "these are the lengths of W's rows: the update is missing", own.sqrt()
    yield "these are squared lengths: take the root", own + 2 * s * cross + s**2 * update
    for message, square in {
        "the cross term is missing: 2 s sum over l of B U": own + s**2 * update,
        "the cross term counts twice: 2 s, not s": own + s * cross + s**2 * update,
        "the square of the update is missing: s^2 B G": own + 2 * s * cross,
        "s stands squared before the update's square": own + 2 * s * cross + s * update,
        "the scaling is missing": own + 2 * cross + update,
        "A's rows are not of length 1 and orthogonal: G = A A^T is missing": no_g,
    }.items():
        yield message, square.clamp(min=0).sqrt()


factored_norm.example(
    [[1, 0], [3, 2], [6, 8]], [[1, 0], [0, 1]], [[1, 2], [1, 5], [0, 0]], 2.0, gives=[5, 13, 10]
)


@factored_norm.also
def _no_gradient(answer: Answer) -> None:
    answer.case("no gradient")
    found = answer.probe(cost, [randn(4, 4), randn(2, 4), randn(4, 2), -2.0], [0, 1, 2], randn(4))
    constant = "it is a constant in the backward pass (equation 11)"
    none = found["gradients"] == [None] * 3
    require(none, f"a gradient runs through the norm: {constant}")
    useless = "no product with it can be trained"
    require(not found["inference"], f"made in inference mode: {useless}, so take no_grad() for it")


@factored_norm.also
def _nothing_left(answer: Answer) -> None:
    answer.case("nothing left of W")
    # Small whole numbers, so that every product is exact. Only the root of W's own square is
    # rounded, and it comes out too small in these rows, which leaves a square below 0.
    lora_A, lora_B = (4 * randn(3, 16)).round(), (4 * randn(2000, 3)).round()
    weight = -2.0 * (lora_B @ lora_A)
    short = weight.norm(dim=1).square() < weight.square().sum(1)
    norm = answer(weight[short], lora_A, lora_B[short], 2.0)
    finite = isinstance(norm, Tensor) and bool(norm.isfinite().all())
    require(finite, "NaN where W = -s B A: rounding pushed a square below 0, so stop it at 0")
    near = (norm == 0).double().mean()  # a half where the root is taken in some other way
    text = f"{norm.min():.1g} where W = -s B A"
    require(bool(near > 0.4), f"{text}: a square that rounding pushed below 0 counts as 0")


@factored_norm.also
def _little_left(answer: Answer) -> None:
    answer.case("little left of W")
    _, lora_A, lora_B, scaling = factored_norm.some({"out": 5, "rank": 2, "in": 9})
    weight = 1e-4 * randn(5, 9).double() - scaling * (lora_B @ lora_A)
    want = factored_norm.want([weight, lora_A, lora_B, scaling])[0]
    expect(answer(weight, lora_A, lora_B, scaling).float(), want, shape="(out,)")


@factored_norm.also
def _small(answer: Answer) -> None:
    answer.case("bytes")
    args = randn(256, 256), randn(2, 256), randn(256, 2), 2.0
    share = answer.probe(cost, list(args), [], randn(256))["peak"] / (4 * 256 * 256)
    text = f"it makes {share:.1f} times the bytes of W"
    require(share < 0.9, f"{text}: nothing of that size, no B A, no W squared")


# ---- 6.4: rounding ----

PARTS = ("base", "low", "g", "bias")


def _half_precision(
    tokens: int, out: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """base, low (dtype), g, bias (float32), such that float32 computes g (base + low) + bias
    exactly: then there is one right way to round it. All bits of the dtype are in use."""
    steps, units = (127, (1 / 16, 1 / 64)) if dtype == torch.bfloat16 else (1023, (2**-7, 2**-9))
    base, low = (scale * multiples(tokens, out, steps=steps, unit=unit) for unit in units)
    g = 1 + multiples(out, steps=120, unit=1 / 512)
    return base.to(dtype), low.to(dtype), g, scale * multiples(out, steps=4000, unit=1 / 8192)


def _wrong_roundings(base: Tensor, low: Tensor, g: Tensor, bias: Tensor) -> Known:
    dtype, wide = base.dtype, base.float() + low.float()
    rounded = (g * wide).to(dtype)
    path, other = (g * base.float()).to(dtype).float(), g * low.float()
    return [
        ((path + other + bias).to(dtype), "g base is rounded on its own, before the rest is added"),
        ((g * (base + low).float() + bias).to(dtype), "the sum base + low is rounded first"),
        ((g.to(dtype).float() * wide + bias).to(dtype), "g is rounded: keep it in float32"),
        (rounded + bias.to(dtype), "rounded before the bias is added, and after"),
        ((rounded + bias).to(dtype), "rounded before the bias is added, and after"),
        ((g * wide + bias.to(dtype).float()).to(dtype), "the bias is rounded: keep it"),
        (g.to(dtype) * (base + low) + bias.to(dtype), "everything is rounded, at each step"),
        ((g * (wide + bias)).to(dtype), "the bias is scaled by g: add it last, as it is"),
        (rounded, "the bias is missing"),
        ((wide + bias).to(dtype), "g is missing"),
        ((g * base.float() + bias).to(dtype), "low is missing"),
    ]


def _expect_rounded(got: Any, base: Tensor, low: Tensor, g: Tensor, bias: Tensor) -> None:
    """Refuse unless got is g (base + low) + bias, rounded once, at the end."""
    if isinstance(got, Tensor):
        right = got.dtype == base.dtype
        require(right, f"y has the dtype of base, {base.dtype}: got {got.dtype}")
    exact = g.double() * (base.double() + low.double()) + bias.double()
    known = _wrong_roundings(base, low, g, bias)
    expect(got, exact.to(base.dtype), known, shape="(tokens, out)")


@lesson.exercise(
    "6.4",
    title="Round once",
    difficulty="medium",
    minutes=15,
    teaches="where half precision loses digits, and how to lose no more than one rounding",
    hint="How many times is a number rounded to bf16 on its way through your lines?",
)
def round_once(answer: Answer) -> None:
    half, e = torch.bfloat16, 2**-8  # half a step of bf16 above 1
    columns = [  # base, low, g, bias: each shows another mistake
        (1.0, e, 1.0, e),
        (1.0, 0.0, 1 + e, e),
        (1.0, e, 3.0, 0.0),
        (e, 0.0, 1.0, 1 + e),
        (1.0, 0.0, 2.0, 1.0),
        (1.0, 1.0, 1.0, 1.0),
        (1 + 2 * e, 0.0, 1 + 2 * e, e),
    ]
    base, low, g, bias = torch.tensor(columns).T.contiguous()
    by_hand = base[None].to(half), low[None].to(half), g, bias
    cases: list[tuple[str, tuple[Tensor, ...]]] = [("by hand", by_hand)]
    for name, dtype in (("bf16", half), ("fp16", torch.float16)):
        cases.append((name, _half_precision(20, 30, dtype)))
        cases.append((name, _half_precision(20, 30, dtype, scale=4096)))
        for tokens, out in ((1, 5), (4, 1), (1, 1)):
            cases.append((f"{name}, {tokens} x {out}", _half_precision(tokens, out, dtype)))
    base, low, g, bias = args = _half_precision(5, 3, half)
    cases.append(("not contiguous", (base.T.contiguous().T, low.T.contiguous().T, g, bias)))
    for case, given in cases:
        answer.case(case)
        _expect_rounded(answer(*given), *given)
    answer.case("too large for fp16")
    large, one = torch.full((1, 1), 6e4).half(), torch.ones(1)
    got = answer(large, large, one, one)
    require(bool(got.isinf().all()), "beyond the largest number of fp16, rounding gives inf")
    answer.case("gradient")
    dy = torch.ones(5, 3).to(half)
    found = answer.probe(probe.gradients, list(args), [0, 1, 2, 3], dy)["gradients"]
    for name, gradient in zip(PARTS, found, strict=True):
        expect_gradient(gradient, gradient if isinstance(gradient, Tensor) else dy, name)
    expect_device(answer, *args)
    expect_nothing_changed(answer, *args)


# ---- 6.5: the compose form ----


def _norm_of_its_own(*shape: int) -> Tensor:
    return randn(*shape, dtype=torch.float64).abs() + 0.5


@spec(
    lesson,
    "6.5",
    title="The compose form, holding one output",
    difficulty="medium",
    minutes=15,
    teaches="how the way a formula is written decides what is kept for the backward pass",
    hint="A product with g keeps its other factor. How many such products do you have?",
    shapes="(tokens, in), (out, in), (out,), (rank, in), (out, rank), (out,), (out,), scaling "
    "-> (tokens, out)",
    draw={"magnitude": signed, "norm": _norm_of_its_own, "scaling": _either_sign},
    grads=("x", "lora_A", "lora_B", "magnitude"),
    tiny=("magnitude", "norm"),
)
def compose_form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
) -> Tensor:
    base, low = _paths(x, x, weight, lora_A, lora_B)
    return magnitude / norm * (base + scaling * low) + bias


def _paths(
    beside_w: Tensor, in_update: Tensor, w: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """x W^T and x (B A)^T, by sums over in, each from an x of its own."""
    update = (b[:, :, None] * a).sum(1)
    return (beside_w[:, None] * w).sum(-1), (in_update[:, None] * update).sum(-1)


@compose_form.mistakes_of
def _wrong_forms(
    x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, m: Tensor, norm: Tensor, s: float
) -> Wrong:
    g, (base, low) = m / norm, _paths(x, x, w, a, b)
    u = base + s * low
    yield "the bias is scaled by g: add it last, as it is", g * (u + bias)
    yield "the bias is missing", g * u
    yield "the scaling is missing", g * (base + low) + bias
    yield "only the update is scaled: g scales x W^T too", base + g * s * low + bias
    yield "only x W^T is scaled: g scales the update too", g * base + s * low + bias
    yield "g is missing: this is LoRA", u + bias
    yield "upside down: g = magnitude / norm", u / g + bias
    yield "the magnitude has lost its sign: a trained one may be negative", g.abs() * u + bias
    yield "not divided by the norm", m * u + bias
    own = m / _norms(w, a, b, s) * u + bias
    yield "the norm is given: do not compute one of your own", own


def _apart(at: Any, now: Any, x_base: int, x_low: int, m_base: int, m_low: int) -> Tensor:
    """y, where x and magnitude are constants (0) or not (1), in x W^T and in the update."""
    x, w, bias, a, b, m, norm, s = now
    base, low = _paths((at[0], x)[x_base], (at[0], x)[x_low], w, a, b)
    y: Tensor = ((at[5], m)[m_base] * base + (at[5], m)[m_low] * s * low) / norm + bias
    return y


for message, which in (
    ("it comes through x W^T alone, but x is in the update too", (1, 0, 1, 1)),
    ("it comes through the update alone, not through x W^T", (0, 1, 1, 1)),
    ("g scales the update too", (1, 1, 1, 0)),
    ("g scales x W^T too", (1, 1, 0, 1)),
):
    compose_form.slope_mistake(message, lambda at, *now, which=which: _apart(at, now, *which))


@compose_form.also
def _little_held(answer: Answer) -> None:
    def held(tokens: int, in_: int, out: int, rank: int) -> tuple[float, float]:
        """Bytes held, in outputs and in weights."""
        args = compose_form.some({"tokens": tokens, "in": in_, "out": out, "rank": rank})
        found = answer.probe(cost, args, [0, 3, 4, 5], randn(tokens, out).double())
        return found["held"] / (8 * tokens * out), found["held"] / (8 * out * in_)

    answer.case("few tokens")
    _, weights = held(2, 64, 48, 2)
    text = f"{weights:.0f} times the bytes of W are held"
    require(weights < 0.5, f"{text}: make nothing of its size, no W' and no B A")
    answer.case("many tokens")
    outputs, _ = held(512, 6, 32, 2)
    text = f"{outputs:.0f} tensors of the size of an output are held"
    require(outputs < 1.5, f"{text}: one product with g is enough")


# ---- 6.6: two passes of one's own ----


def _expect_gradients(
    found: Sequence[Any], args: Sequence[Tensor], dy: Tensor, names: Sequence[str] = PARTS
) -> None:
    """Of base, low, g and bias, or of those in names, from the u that is saved."""
    base, low, g, _ = args
    dtype, narrow, dy = base.dtype, dy, dy.double()
    u = (base.double() + low.double()).to(dtype)
    du, products = g.double() * dy, dy * u.double()
    wants = dict(zip(PARTS, (du.to(dtype), du.to(dtype), products.sum(0), dy.sum(0)), strict=True))
    mean = "a mean: the gradient is the sum over all tokens"
    path: Known = [
        (dy, "g is missing: y changes g times as fast"),
        (g.to(dtype) * narrow, "g is rounded: multiply in float32, then round"),
    ]
    usual: dict[str, Known] = {
        "base": path,
        "low": path,
        "g": [
            ((dy * base.double()).sum(0), "low is missing, u = base + low"),
            (products.mean(0), mean),
            (du.sum(0), "dy is multiplied by g: it is u that g stands beside"),
            ((narrow * u).sum(0), "multiplied or summed in half precision: sum in float32"),
            ((narrow * u).double().sum(0), "multiplied in half precision: dy to float32 first"),
        ],
        "bias": [(du.sum(0), "scaled by g: the bias is added after g"), (dy.mean(0), mean)],
    }
    keep = "keep the order of the arguments"
    order = [(want, f"this is the gradient of {name}: {keep}") for name, want in wants.items()]
    for name, gradient in zip(names, found, strict=True):
        if name == "bias" and isinstance(gradient, Tensor) and dtype != torch.float32:
            once = (gradient.double() - wants[name]).abs() <= wants[name].abs() / 2**8  # of bf16
            require(bool(once.all()), "gradient of bias: rounded after each token, not once")
        else:
            expect_gradient(gradient, wants[name], name, [*usual[name], *order])


def _run(
    answer: Answer, args: Sequence[Tensor], dy: Tensor, wrt: Sequence[str] = PARTS
) -> dict[str, Any]:
    found = dict(answer.probe(cost, list(args), list(map(PARTS.index, wrt)), dy, alone=True))
    for index in found["changed"]:
        require(False, f"it changes {[*PARTS, 'dy'][index]} in place: others may need it still")
    return found


def _float32(tokens: int, out: int) -> tuple[list[Tensor], Tensor]:
    shapes = (tokens, out), (tokens, out), (out,), (out,)
    return [randn(*shape) for shape in shapes], randn(tokens, out)


def _check_passes(answer: Answer, args: Sequence[Tensor], dy: Tensor) -> None:
    """What both passes give, and what is held between them."""
    base = args[0]
    found = _run(answer, args, dy)
    _expect_rounded(found["value"], *args)
    outputs = found["held"] / base.untyped_storage().nbytes()
    alone = "save u and g alone, u in the dtype of base"
    if len(base) > 100:  # so that g counts for little
        more = f"{outputs:.0f} times the bytes of an output are held"
        require(outputs < 1.5, f"{more}: {alone}")
        require(outputs > 0.5, "no output is held: save u, in the dtype of base")
    _expect_gradients(found["gradients"], args, dy)


def _check_turns(answer: Answer) -> None:
    """Two forward passes before the first backward pass, and a second one through the first."""
    answer.case("two forward passes before a backward pass")
    (first, dy), (second, _) = _float32(4, 3), _float32(4, 3)
    found = answer.probe(probe.passes_in_turn, [first, second], [0, 1, 0], dy)
    for index, gradients in zip((0, 1, 0), found["gradients"], strict=True):
        _expect_rounded(found["values"][index], *(first, second)[index])
        _expect_gradients(gradients, (first, second)[index], dy)


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
    for tokens, out in ((6, 3), (1, 5), (4, 1), (1, 1)):
        answer.case("float32" if tokens == 6 else f"{tokens} x {out}")
        _check_passes(answer, *_float32(tokens, out))
    for case, half in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        answer.case(case)
        base, *rest = _half_precision(random_size(600, 1200), 8, half)
        dy = multiples(*base.shape, steps=127, unit=1 / 16).to(half)
        _check_passes(answer, [base, *rest], dy)
    _check_turns(answer)
    for frozen in PARTS:
        answer.case(f"{frozen} needs no gradient")
        args, dy = _float32(4, 3)
        others = [name for name in PARTS if name != frozen]
        _expect_gradients(_run(answer, args, dy, others)["gradients"], args, dy, others)
    expect_device(answer, *args)
    expect_nothing_changed(answer, *args)
