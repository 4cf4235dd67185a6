"""Checks of exercises/07_gpu_kernels.ipynb: launches, bytes, and kernels of one's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minidora.checks.exercise import Answer, Lesson
from minidora.checks.expect import (
    Known,
    dice,
    expect,
    expect_device,
    expect_nothing_changed,
    expect_parts,
    generator,
    randn,
    random_size,
    require,
    same,
)
from minidora.checks.oracle import Wrong
from minidora.checks.spec import spec
from minidora.runner import probe

lesson = Lesson(
    7,
    "07_gpu_kernels",
    closed=("minidora.kernels", "minidora.fused", "minidora.memory", "minidora.dora"),
    opened=("minidora.interpreter",),
)

Operation = tuple[str, list[int], list[int]]
"""Name, and the numbers of the memories that it is given and that it gives back."""


# ---- 7.1: launches ----

VIEWS = ("aten.t.default", "aten.view.default", "aten._unsafe_view.default", "aten.slice.Tensor")
EMPTY = ("aten.empty.memory_format", "aten.empty_like.default")
IN_PLACE = ("aten.add_.Tensor", "aten.copy_.default", "aten.addmm_.default")
NEW = ("aten.mm.default", "aten.mul.Tensor", "aten._to_copy.default")


def _operations() -> list[Operation]:
    """Some of each kind, in any order; some come twice."""
    kinds = {VIEWS: random_size(2, 5), EMPTY: random_size(1, 4), IN_PLACE: random_size(2, 6)}
    made: list[Operation] = []
    for kind, count in (kinds | {NEW: random_size(5, 9)}).items():
        for name in dice.choices(kind, k=count):
            one, two, new = (3 * len(made) + number for number in range(3))
            given = [] if name == "aten.empty.memory_format" else [one, two][: 1 + (kind != VIEWS)]
            made.append((name, given, [one if kind in (VIEWS, IN_PLACE) else new]))
    dice.shuffle(made)
    return made


def _in_place(name: str) -> bool:
    return name.split(".")[1].endswith("_")


@spec(
    lesson,
    "7.1",
    title="Which operations start a kernel",
    difficulty="easy",
    minutes=15,
    teaches="what a GPU has to start in one pass, and what only describes memory anew",
    hint="What would change in memory if this operation were left out?",
    shapes="operations -> launches",
    draw={"operations": _operations},
)
def count_launches(operations: list[Operation]) -> int:
    launches = 0
    for name, given, made in operations:
        view = all(memory in given for memory in made)
        launches += _in_place(name) or not (view or ".empty" in name)
    return launches


@count_launches.mistakes_of
def _wrong_launches(operations: list[Operation]) -> Wrong:
    right = count_launches.oracle(operations)
    starts = {name for name, *rest in operations if count_launches.oracle([(name, *rest)])}
    views = sum({*made} <= {*given} and not _in_place(name) for name, given, made in operations)
    empty = sum(".empty" in name for name, _, _ in operations)
    in_place = sum(_in_place(name) for name, _, _ in operations)
    copies = sum("._to_copy" in name for name, _, _ in operations)
    yield "these are all operations: views and empty ones start no kernel", len(operations)
    yield "views are counted: they only describe memory anew", right + views
    yield "empty is counted: it reserves memory, and nothing is computed", right + empty
    yield "what writes in place starts a kernel too: add_ adds", right - in_place
    yield "_to_copy makes new memory and fills it: a _ in front says nothing", right - copies
    yield "each launch counts, also of an operation that came before", len(starts)
    yield "these are the ones that start nothing", views + empty


count_launches.example(
    [
        ("aten.t.default", [1], [1]),
        ("aten.mm.default", [2, 1], [3]),
        ("aten.empty_like.default", [3], [4]),
        ("aten.copy_.default", [4, 3], [4]),
        ("aten._to_copy.default", [4], [5]),
        ("aten._unsafe_view.default", [5], [5]),
        ("aten.add_.Tensor", [5, 3], [5]),
    ],
    gives=4,
)
count_launches.example([("aten.detach.default", [1], [1])], gives=0, case="a view alone")
count_launches.example([], gives=0, case="nothing")
count_launches.example(
    [("aten.mm.default", [1, 1], [2]), ("aten.mm.default", [2, 1], [3])],
    gives=2,
    case="the same twice",
)


# ---- 7.2: bytes ----


def _size() -> int:
    return random_size(3, 60)


@spec(
    lesson,
    "7.2",
    title="Bytes that two forms move",
    difficulty="easy",
    minutes=15,
    teaches="what a fused kernel saves: not operations, but trips to memory",
    hint="Which tensors does a kernel read, and which does it write, one kernel at a time?",
    shapes="tokens, out_features, rank, itemsize -> separate, fused",
    draw={
        "tokens": _size,
        "out_features": _size,
        "rank": _size,
        "itemsize": lambda: dice.choice((2, 4, 8)),
    },
)
def bytes_moved(tokens: int, out_features: int, rank: int, itemsize: int) -> tuple[int, int]:
    """By the tensors themselves: four kernels one after the other, then one."""
    h, b, g = tokens * rank, out_features * rank, out_features
    out = tokens * out_features
    steps = ((h, b, out), (out, out, out), (out, g, out), (out, g, out))
    separate = sum(itemsize * number for step in steps for number in step)
    return separate, itemsize * sum((out, h, b, g, g, out))


bytes_moved.example(2, 3, 1, 4, gives=(236, 92))
bytes_moved.example(1, 1, 1, 2, gives=(24, 12), case="sizes of 1")
bytes_moved.example(4096, 4096, 16, 2, gives=(268713984, 67387392), case="a layer of LLaMA-7B")


def _wrong_separate(t: int, o: int, r: int, size: int) -> Wrong:
    out, factors = t * o, t * r + o * r
    right = factors + 8 * out + 2 * o
    yield "these are numbers: a number takes itemsize bytes", right
    yield (
        "what is written counts too: each of the four kernels writes an output",
        size * (right - 4 * out),
    )
    yield "what is read counts too, not only the four outputs", size * 4 * out
    yield "the vectors g and bias are read as well", size * (right - 2 * o)
    yield "h and B are read as well, by the product", size * (right - factors)
    yield "base + low reads two outputs and writes one", size * (right - out)
    yield (
        "each tensor once: but a kernel reads again what another has written",
        size * (factors + 5 * out + 2 * o),
    )


def _wrong_fused(t: int, o: int, r: int, size: int) -> Wrong:
    out, factors = t * o, t * r + o * r
    right = factors + 2 * out + 2 * o
    yield "these are numbers: a number takes itemsize bytes", right
    yield "low is never written or read: it stays in registers", size * (right + out)
    yield "nothing between base and y reaches memory", size * (right + 2 * out)
    yield "base is read: it comes from another kernel", size * (right - out)
    yield "the vectors g and bias are read as well", size * (right - 2 * o)
    yield "h and B are read as well: the product happens inside", size * (right - factors)


bytes_moved.mistakes_of(_wrong_separate, "separate")
bytes_moved.mistakes_of(_wrong_fused, "fused")
bytes_moved.mistake(
    "the order is separate, then fused", lambda *sizes: bytes_moved.oracle(*sizes)[::-1]
)


# ---- 7.3: a float32 as two bf16 numbers ----


def _cut(a: Tensor) -> Tensor:
    """To bf16 by leaving bits out, where rounding would look at them."""
    return (a.view(torch.int32) & -65536).view(torch.float32).bfloat16()


@lesson.exercise(
    "7.3",
    title="A float32 as two numbers of half its width",
    difficulty="medium",
    minutes=15,
    teaches="how tensor cores that take bf16 give a product to nearly float32's accuracy",
    hint="What has rounding to bf16 left over, and in which dtype can you still see it?",
)
def split_float32(answer: Answer) -> None:
    names = ("hi", "lo")

    def check(a: Tensor) -> None:
        parts = expect_parts(answer(a), names)
        hi = a.bfloat16()
        lo = (a - hi.float()).bfloat16()
        knowns: dict[str, Known] = {
            "hi": [
                (lo, "this is lo: the order is hi, lo"),
                (_cut(a), "cut off, not rounded to nearest: .bfloat16() rounds"),
                ((a / 2).bfloat16(), "not half of the value: hi has the upper half of its bits"),
                (a, "not rounded: hi is what bf16 keeps of a"),
            ],
            "lo": [
                (torch.zeros_like(a), "0: subtract hi in float32, where the rest can be seen"),
                (-lo, "the wrong sign: hi + lo gives a, so lo = a - hi"),
                ((a - _cut(a).float()).bfloat16(), "the rest of a number that was cut off"),
                ((a / 2).bfloat16(), "not half of the value: lo is what rounding left"),
                (hi, "this is hi again: lo = a - hi"),
            ],
        }
        for name, part, want in zip(names, parts, (hi, lo), strict=True):
            expect(part, want, knowns[name], name)
            require(
                part.dtype == torch.bfloat16,
                f"{name} is {str(part.dtype)[6:]}: both parts are bfloat16, for the tensor cores",
            )

    answer.case("by hand")
    check(torch.tensor([1 + 2**-9, -3.0, 1 + 3 * 2**-9, 0.0]))
    answer.case("random")
    check(randn(random_size(5, 9), random_size(20, 40)))
    answer.case("both signs, cut or rounded")
    check(-randn(200).abs())
    for size in (1e-30, 1e30):
        answer.case(f"numbers of {size:g}")
        check(size * randn(50))
    answer.case("shapes")
    check(randn(3))
    check(randn(2, 3, 4))
    check(randn(6, 8).T)
    expect_device(answer, randn(4, 5))
    expect_nothing_changed(answer, randn(4, 5))


# ---- Kernels: what is asked of all of them ----


def _tiles(*pairs: tuple[int, int]) -> list[int]:
    """The grid: as many programs along each axis as blocks of so many cover it."""
    return [-(-size // block) for size, block in pairs]


def _launch(
    answer: Answer,
    grid: list[int],
    args: Sequence[Any],
    names: Sequence[str],
    writes: Sequence[str],
    constants: dict[str, int],
) -> dict[str, Tensor]:
    """What is in `writes` after a launch; nothing else may be written, and nothing beside it."""
    found = answer.probe(probe.launched, grid, list(args), constants)
    for index in found["beside"]:
        require(
            False,
            f"it writes beside {names[index]}: a store needs a mask, for a tile is often larger "
            "than what is left",
        )
    after = dict(zip(names, found["after"], strict=True))
    for name, before in zip(names, args, strict=True):
        if isinstance(before, Tensor) and name not in writes:
            require(torch.equal(after[name], before), f"it writes into {name}, which is only read")
    return {name: after[name] for name in writes}


def _expect_written(got: Tensor, first: tuple[slice, ...], name: str) -> None:
    """Refuse entries that are still what they were before, NaN: by what is missing."""
    missing = got.isnan()
    if not missing.any():
        return
    require(not missing.all(), f"{name} is NaN everywhere: nothing was stored, or NaN was")
    others = missing.clone()
    others[first] = True
    require(
        not (others.all() and not missing[first].any()),
        f"only the first tile of {name} is written: where does program_id come in?",
    )
    place = missing.nonzero()[0].tolist()
    require(
        False,
        f"{name}{place} is NaN: no program stored it, or one read what lies beside a tensor "
        "(a load needs a mask, and 0.0 in place of what is outside)",
    )


def _one_tile(got: Tensor, first: tuple[slice, ...], name: str) -> None:
    """Refuse a program that writes more than its own tile; `got` is after program 0 alone."""
    rest = got.clone()
    rest[first] = torch.nan
    require(
        bool(rest.isnan().all()),
        f"program 0 writes more of {name} than its own tile: the others are there for the rest",
    )


def _grid_numbers(*shape: int, steps: int, unit: float) -> Tensor:
    """Random multiples of unit: float32 adds and multiplies few of them without rounding."""
    return (steps * (2 * torch.rand(shape, generator=generator) - 1)).round() * unit


# ---- 7.4: compose ----

COMPOSE = ("y", "base", "h", "B", "g", "bias", "tokens", "n")


def _compose_args(tokens: int, n: int, rank: int, dtype: torch.dtype) -> list[Any]:
    """Such that float32 computes everything exactly: there is one right way to round."""
    base = _grid_numbers(tokens, n, steps=1000, unit=1 / 16).to(dtype)
    h = _grid_numbers(tokens, rank, steps=7, unit=1 / 8).to(dtype)
    B = _grid_numbers(n, rank, steps=7, unit=1 / 8)
    g = 1 + _grid_numbers(n, steps=120, unit=1 / 512)
    bias = _grid_numbers(n, steps=4000, unit=1 / 1024)
    return [torch.full_like(base, torch.nan), base, h, B, g, bias, tokens, n]


def _wrong_y(args: Sequence[Any]) -> Known:
    base, h, B, g, bias = (part.double() for part in args[1:6])
    low = h @ B.T
    u = base + low
    dtype = args[1].dtype
    rounded = u.to(dtype).double()
    return [
        (u, "this is u: y = g u + bias"),
        (u + bias, "g is missing"),
        (g * u, "the bias is missing"),
        (g * (u + bias), "the bias is scaled by g: add it last, as it is"),
        (g * base + bias, "h B^T is missing"),
        (g * base + low + bias, "g scales h B^T too"),
        (base + g * low + bias, "g scales base too"),
        (g * low + bias, "base is missing"),
        (g * (base + h[:, :1] @ B[:, :1].T) + bias, "only the first of the rank's products is in"),
        (g * (base + h[:, -1:] @ B[:, -1:].T) + bias, "only the last of the products is in"),
        (u / g + bias, "divided by g"),
        ((g * rounded + bias).to(dtype), "u was rounded before g: keep it in float32 until y"),
    ]


@lesson.exercise(
    "7.4",
    title="The compose kernel",
    difficulty="medium",
    minutes=30,
    teaches="how one kernel does what four did, a tile at a time, with nothing in between stored",
    hint="Which tokens and which outputs belong to this program, and where do they lie in memory?",
    seconds=30.0,
    triton=True,
)
def compose_kernel(answer: Answer) -> None:
    size = {"TOKENS": 16, "OUT": 8}
    first = (slice(16), slice(8))

    def run(args: list[Any], grid: list[int] | None = None) -> dict[str, Tensor]:
        tiles = _tiles((args[6], 16), (args[7], 8))
        constants = {"rank": args[2].shape[1], **size}
        return _launch(answer, grid or tiles, args, COMPOSE, ("y", "base"), constants)

    def check(tokens: int, n: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
        args = _compose_args(tokens, n, rank, dtype)
        after = run(args)
        base, h, B, g, bias = (part.double() for part in args[1:6])
        low = h @ B.T
        u = base + low
        _expect_written(after["y"], first, "y")
        expect(after["y"], (g * u + bias).to(dtype), _wrong_y(args), "y")
        expect(
            after["base"],
            u.to(dtype),
            [
                (args[1], "u is not stored: it takes the place of base"),
                (g * u, "this is g u: the backward pass needs u without g"),
                ((g * u + bias).to(dtype), "this is y: the backward pass needs u"),
                (low, "this is h B^T alone: u = base + h B^T"),
            ],
            "base, where u goes",
        )

    answer.case("one tile")
    check(16, 8, 3)
    answer.case("several tiles")
    check(32, 24, random_size(2, 6))
    answer.case("no multiples of a tile")
    for _ in range(2):
        check(random_size(17, 32), random_size(17, 24), random_size(2, 6))
    for tokens, n, rank in ((1, 5, 2), (7, 1, 2), (3, 5, 1)):
        answer.case(f"{tokens} x {n} of rank {rank}")
        check(tokens, n, rank)
    answer.case("one program, one tile")
    args = _compose_args(32, 24, 2, torch.float32)
    _one_tile(run(args, [1, 1])["y"], first, "y")
    answer.case("fp16")
    check(20, 11, 3, torch.float16)


# ---- 7.5: the row norm ----

NORM = ("norm", "W", "n", "m")


def _beyond(W: Tensor, cols: int) -> Tensor:
    """Norms where columns have no mask: a row goes on into the next one, the last into NaN."""
    n, m = W.shape
    flat = torch.cat([W.flatten(), torch.full((cols,), torch.nan)]).double()
    long = -(-m // cols) * cols
    return torch.stack([flat[row * m : row * m + long].norm() for row in range(n)])


@lesson.exercise(
    "7.5",
    title="The lengths of rows, in one pass",
    difficulty="medium",
    minutes=25,
    teaches="how a program walks along its rows and keeps the sum, so that W is read once",
    hint="What does a program keep from one step along its rows to the next?",
    seconds=30.0,
    triton=True,
)
def row_norm_kernel(answer: Answer) -> None:
    size = {"ROWS": 4, "COLS": 16}
    first = (slice(4),)

    def run(W: Tensor, grid: list[int] | None = None) -> Tensor:
        args = [torch.full((len(W),), torch.nan), W, *W.shape]
        grid = grid or _tiles((len(W), 4))
        return _launch(answer, grid, args, NORM, ("norm",), size)["norm"]

    def check(W: Tensor) -> None:
        m = W.shape[1]
        got, wide = run(W), W.double()
        own = wide.norm(dim=1)
        beyond = _beyond(W.float(), 16)
        goes_on = torch.equal(got.isnan(), beyond.isnan()) and not got.isnan().all()
        require(
            not (m % 16 and goes_on and same(got.nan_to_num(), beyond.nan_to_num())),
            "a row goes on into the next one: the mask leaves out columns beyond m too",
        )
        require(
            not got.isinf().any(),
            "inf: a square above 65504 leaves fp16, so turn W to float32 before you square",
        )
        _expect_written(got, first, "norm")
        last = wide[:, 16 * ((m - 1) // 16) :]
        known = [
            (own**2, "these are squared lengths: take the root"),
            (wide.abs().sum(1), "these are sums of absolute values: square, then add"),
            (wide.sum(1).abs(), "these are sums of the entries: square them first"),
            (wide.sum(1).sqrt(), "the root of the sum of the entries: square them first"),
            (wide.abs().sum(1).sqrt(), "the root of a sum of absolute values: square them"),
            (own / m**0.5, "divided by the number of columns: a length is no mean"),
            (wide[:, :16].norm(dim=1), "only the first COLS columns are in: walk to the end"),
            (last.norm(dim=1), "only the last columns are in: the sum must outlive the loop"),
            (wide.abs().amax(1), "these are the largest entries: add the squares"),
        ]
        expect(got, own, known, "norm", "(n,)")

    answer.case("one step along the row")
    check(randn(4, 16).abs())
    answer.case("several steps and programs")
    check(randn(12, 48))
    answer.case("no multiples of a tile")
    for _ in range(2):
        check(randn(random_size(5, 8), random_size(33, 48)))
    answer.case("by hand")
    check(torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]]))
    for n, m in ((1, 20), (6, 1), (1, 1)):
        answer.case(f"{n} x {m}")
        check(randn(n, m))
    answer.case("one program, its own rows")
    _one_tile(run(randn(12, 20), [1]), first, "norm")
    answer.case("zero and tiny rows")
    for W in (torch.cat([randn(2, 20), torch.zeros(3, 20)]), 1e-15 * randn(5, 20)):
        with_none = W.norm(dim=1) == 0
        got = run(W)
        require(bool((got[with_none] == 0).all()), "a row of zeros has the length 0: no epsilon")
        expect(got, W.double().norm(dim=1), name="norm of tiny rows: is there an epsilon?")
    answer.case("fp16")
    check((300 * randn(6, 40)).half())


# ---- 7.6: the backward pass ----

BACKWARD = ("d_u", "d_m", "dy", "u", "g", "norm", "tokens", "n")


def _backward_args(tokens: int, n: int, dtype: torch.dtype) -> list[Any]:
    dy, u = randn(tokens, n).to(dtype), randn(tokens, n).to(dtype)
    norm, g = randn(n).abs() + 0.5, randn(n)
    if n > 2:
        norm[1], g[1] = 0.0, 1.0
    parts = torch.full((_tiles((tokens, 16))[0], n), torch.nan)
    return [torch.full_like(dy, torch.nan), parts, dy, u, g, norm, tokens, n]


def _check_d_u(got: Tensor, dy: Tensor, u: Tensor, g: Tensor, norm: Tensor) -> None:
    """In fp16 to a rounding, else as always."""
    want = g * dy
    if got.dtype == torch.float16:
        near = (got.double() - want).abs() <= 2e-3 * want.abs() + 1e-6
        require(bool(near.all()), "d_u: not g dy to within a rounding of fp16")
        return
    live = norm != 0
    known = [
        (dy, "g is missing: y = g u + bias changes g times as fast as u"),
        (dy / norm, "divided by the norm: it is g that stands beside u"),
        (want * u, "multiplied by u: the gradient of u does not hold u"),
        (g * u, "this is g u: the gradient dy takes the place of u"),
    ]
    expect(got[:, live], want[:, live], [(value[:, live], text) for value, text in known], "d_u")
    expect(got, want, name="d_u, where the norm is 0 too")


def _check_d_m(got: Tensor, dy: Tensor, u: Tensor, g: Tensor, norm: Tensor) -> None:
    """One row for each block of tokens."""
    only_first = len(got) > 1 and bool(got[1:].isnan().all())
    require(not only_first, "only row 0 of d_m is written: each block of tokens has its own row")
    require(
        not got[:, norm == 0].isnan().any() and not got.isinf().any(),
        "d_m is not a number where the norm is 0: tl.where puts 0 there",
    )
    _expect_written(got, (slice(1), slice(8)), "d_m")

    def sums(products: Tensor) -> Tensor:
        return torch.stack([part.sum(0) for part in products.split(16)])

    safe = norm.masked_fill(norm == 0, torch.inf)
    products = dy * u
    own = sums(products)
    last = torch.stack([part[-1] for part in products.split(16)])
    known = [
        (own.masked_fill(norm == 0, 0), "not divided by the norm: g = m / norm"),
        (own, "not divided by the norm: g = m / norm"),
        (sums(g * products) / safe, "times g: the gradient of m holds dy u / norm alone"),
        (own / sums(torch.ones_like(dy)) / safe, "a mean: the gradient is a sum over the tokens"),
        (sums(dy) / safe, "u is missing: y = m / norm u + bias"),
        (sums(u) / safe, "dy is missing"),
        (last / safe, "only the last token of each block is in: add them up"),
        (own.cumsum(0) / safe, "sums of all blocks so far: each row has its own"),
        (own / safe**2, "divided by the norm twice"),
        (own.sum(0).expand_as(got) / safe, "each row holds all tokens: a program sums its own"),
    ]
    expect(got, own / safe, known, "d_m", "(blocks of tokens, n)")


@lesson.exercise(
    "7.6",
    title="The backward kernel, with partial sums",
    difficulty="hard",
    minutes=35,
    teaches="how programs that cannot talk to each other share one sum",
    hint="Which tokens does this program see, and where may it leave their sum?",
    seconds=30.0,
    triton=True,
)
def backward_kernel(answer: Answer) -> None:
    size = {"TOKENS": 16, "OUT": 8}
    first = (slice(16), slice(8))

    def run(args: list[Any], grid: list[int] | None = None) -> dict[str, Tensor]:
        tiles = _tiles((args[6], 16), (args[7], 8))
        return _launch(answer, grid or tiles, args, BACKWARD, ("d_u", "d_m"), size)

    def check(tokens: int, n: int, dtype: torch.dtype = torch.float32) -> None:
        args = _backward_args(tokens, n, dtype)
        after = run(args)
        dy, u, g, norm = (part.double() for part in args[2:6])
        _expect_written(after["d_u"], first, "d_u")
        _check_d_u(after["d_u"], dy, u, g, norm)
        _check_d_m(after["d_m"], dy, u, g, norm)

    answer.case("one tile")
    check(16, 8)
    answer.case("several tiles")
    check(48, 24)
    answer.case("no multiples of a tile")
    for _ in range(2):
        check(random_size(33, 48), random_size(17, 24))
    for tokens, n in ((1, 5), (20, 1), (1, 1)):
        answer.case(f"{tokens} x {n}")
        check(tokens, n)
    answer.case("one program, one tile")
    after = run(_backward_args(32, 24, torch.float32), [1, 1])
    _one_tile(after["d_u"], first, "d_u")
    _one_tile(after["d_m"], (slice(1), slice(8)), "d_m")
    answer.case("fp16")
    check(40, 11, torch.float16)
