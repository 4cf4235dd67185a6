"""Checks of exercises/07_gpu_kernels.ipynb: launches, bytes, and kernels of one's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    multiples,
    randn,
    random_size,
    require,
    same,
    type_name,
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


SIZES = ("tokens", "out_features", "rank")


@spec(
    lesson,
    "7.2",
    title="Bytes that two forms move",
    difficulty="easy",
    minutes=15,
    teaches="what a fused kernel saves: not operations, but trips to memory",
    hint="Which tensors does a kernel read, and which does it write, one kernel at a time?",
    shapes="tokens, out_features, rank, itemsize -> separate, fused",
    draw=dict.fromkeys(SIZES, lambda: random_size(3, 60))
    | {"itemsize": lambda: dice.choice((2, 4, 8))},
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
    yield "what is written counts too: each kernel writes an output", size * (right - 4 * out)
    yield "what is read counts too, not only the four outputs", size * 4 * out
    yield "the vectors g and bias are read as well", size * (right - 2 * o)
    yield "h and B are read as well, by the product", size * (right - factors)
    yield "base + low reads two outputs and writes one", size * (right - out)
    yield "each tensor once: but a kernel reads again what others wrote", size * (right - 3 * out)


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


# ---- 7.3: a float32 as two bf16 numbers ----


def _check_parts(answer: Answer, a: Tensor) -> None:
    hi = a.bfloat16()
    lo, half = (a - hi.float()).bfloat16(), (a / 2).bfloat16()
    cut = (a.view(torch.int32) & -65536).view(torch.float32).bfloat16()  # by leaving bits out
    of_hi: Known = [
        (lo, "this is lo: the order is hi, lo"),
        (cut, "cut off, not rounded to nearest: .bfloat16() rounds"),
        (half, "not half of the value: hi has the upper half of its bits"),
        (a, "not rounded: hi is what bf16 keeps of a"),
    ]
    of_lo: Known = [
        (torch.zeros_like(a), "0: subtract hi in float32, where the rest can be seen"),
        (-lo, "the wrong sign: hi + lo gives a, so lo = a - hi"),
        ((a - cut.float()).bfloat16(), "the rest of a number that was cut off"),
        (half, "not half of the value: lo is what rounding left"),
        (hi, "this is hi again: lo = a - hi"),
    ]
    parts = expect_parts(answer(a), ("hi", "lo"))
    for part, name, want, known in zip(parts, ("hi", "lo"), (hi, lo), (of_hi, of_lo), strict=True):
        expect(part, want, known, name)
        kind = type_name(part.dtype)
        message = f"{name} is {kind}: both parts are bfloat16, for the tensor cores"
        require(part.dtype == torch.bfloat16, message)


@lesson.exercise(
    "7.3",
    title="A float32 as two numbers of half its width",
    difficulty="medium",
    minutes=15,
    teaches="how tensor cores that take bf16 give a product to nearly float32's accuracy",
    hint="What has rounding to bf16 left over, and in which dtype can you still see it?",
)
def split_float32(answer: Answer) -> None:
    for case, a in (
        ("by hand", torch.tensor([1 + 2**-9, -3.0, 1 + 3 * 2**-9, 0.0])),
        ("random", randn(random_size(5, 9), random_size(20, 40))),
        ("both signs, cut or rounded", -randn(200).abs()),
        ("numbers of 1e-30", 1e-30 * randn(50)),
        ("numbers of 1e+30", 1e30 * randn(50)),
        ("shapes", randn(3)),
        ("shapes", randn(2, 3, 4)),
        ("shapes", randn(6, 8).T),
    ):
        answer.case(case)
        _check_parts(answer, a)
    expect_device(answer, randn(4, 5))
    expect_nothing_changed(answer, randn(4, 5))


# ---- Kernels: what is asked of all of them ----


@dataclass(frozen=True)
class Kernel:
    """A kernel that an exercise asks for, and what is right: (*drawn, rows, columns, **constants).

    Args:
        tile: rows and columns of one program, under the names of the constants.
        draw: (rows, columns, dtype) -> tensors by name, and further constants. What the kernel
            writes holds NaN, or what it writes over.
        writes: the tile of program 0 in each tensor that it writes.
        judge: (what was written, what was drawn) refuses what is wrong.
        axes: of the grid.
    """

    tile: dict[str, int]
    draw: Callable[[int, int, torch.dtype], dict[str, Any]]
    writes: Mapping[str, tuple[slice, ...]]
    judge: Callable[[dict[str, Tensor], dict[str, Any]], None]
    axes: int = 2

    def check(self, answer: Answer) -> None:
        """From whole tiles to sizes of 1, and in half precision."""
        rows, columns = self.tile.values()
        for case, n, m in (
            ("one tile", rows, columns),
            ("several tiles", 2 * rows, 3 * columns),
            ("no multiples of a tile", _between(rows), _between(columns)),
            ("no multiples of a tile", _between(rows), _between(columns)),
            ("1 x 5", 1, 5),
            ("7 x 1", 7, 1),
            ("1 x 1", 1, 1),
            ("fp16", 2 * rows + 4, columns + 3),
        ):
            answer.case(case)
            drawn = self.draw(n, m, torch.float16 if case == "fp16" else torch.float32)
            self.run(answer, drawn, n, m)
        answer.case("one program, one tile")
        drawn = self.draw(2 * rows, 3 * columns, torch.float32)
        for name, got in self.launch(answer, drawn, 2 * rows, 3 * columns, one=True).items():
            others = got.where(drawn[name].isnan(), torch.nan)  # base is there for all
            others[self.writes[name]] = torch.nan
            message = f"program 0 writes more of {name} than its own tile: leave the rest to others"
            require(bool(others.isnan().all()), message)

    def run(self, answer: Answer, drawn: dict[str, Any], n: int, m: int) -> None:
        self.judge(self.launch(answer, drawn, n, m), drawn)

    def launch(
        self, answer: Answer, drawn: dict[str, Any], n: int, m: int, one: bool = False
    ) -> dict[str, Tensor]:
        """What was written by all programs, or one; nothing else may be, and nothing beside it."""
        tensors = {name: value for name, value in drawn.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in drawn.items() if name not in tensors}
        tiles = zip((n, m), self.tile.values(), strict=True)
        grid = [1 if one else -(-size // block) for size, block in tiles][: self.axes]
        args = [*tensors.values(), n, m]
        found = answer.probe(probe.launched, grid, args, constants | self.tile)
        for name in (list(tensors)[index] for index in found["beside"]):
            mask = "a store needs a mask, for a tile is often larger than what is left"
            require(False, f"it writes beside {name}: {mask}")
        after = dict(zip(tensors, found["after"], strict=False))
        for name, before in tensors.items():
            same = name in self.writes or torch.equal(after[name], before)
            require(same, f"it writes into {name}, which is only read")
        return {name: after[name] for name in self.writes}


def _between(size: int) -> int:
    """More than two tiles, and less than three."""
    return random_size(2 * size + 1, 3 * size)


def _expect_written(got: Tensor, first: tuple[slice, ...], name: str) -> None:
    """Refuse entries that are still what they were before, NaN: by what is missing."""
    missing = got.isnan()
    if not missing.any():
        return
    require(not missing.all(), f"{name} is NaN everywhere: nothing was stored, or NaN was")
    others = missing.clone()
    others[first] = True
    alone = bool(others.all()) and not missing[first].any()
    require(not alone, f"only the first tile of {name} is written: where does program_id come in?")
    place = missing.nonzero()[0].tolist()
    mask = "a load needs a mask, and 0.0 in place of what is outside"
    text = f"{name}{place} is NaN: no program stored it, or one read what lies beside a tensor"
    require(False, f"{text} ({mask})")


# ---- 7.4: compose ----

TILE, FIRST = {"TOKENS": 16, "OUT": 8}, (slice(16), slice(8))


def _compose_args(tokens: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Such that float32 computes everything exactly: there is one right way to round."""
    rank = 1 if tokens == 1 else random_size(2, 6)
    base = multiples(tokens, n, steps=1000, unit=1 / 16).to(dtype)
    return {
        "y": torch.full_like(base, torch.nan),
        "base": base,
        "h": multiples(tokens, rank, steps=7, unit=1 / 8).to(dtype),
        "B": multiples(n, rank, steps=7, unit=1 / 8),
        "g": 1 + multiples(n, steps=120, unit=1 / 512),
        "bias": multiples(n, steps=4000, unit=1 / 1024),
        "rank": rank,
    }


def _judge_compose(after: dict[str, Tensor], drawn: dict[str, Any]) -> None:
    dtype = drawn["base"].dtype
    base, h, B, g, bias = (drawn[name].double() for name in ("base", "h", "B", "g", "bias"))
    low = h @ B.T
    u = base + low
    rounded = u.to(dtype).double()
    _expect_written(after["y"], FIRST, "y")
    known: Known = [
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
    y = (g * u + bias).to(dtype)
    expect(after["y"], y, known, "y")
    known = [
        (drawn["base"], "u is not stored: it takes the place of base"),
        (g * u, "this is g u: the backward pass needs u without g"),
        (y, "this is y: the backward pass needs u"),
        (low, "this is h B^T alone: u = base + h B^T"),
    ]
    expect(after["base"], u.to(dtype), known, "base, where u goes")


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
    Kernel(TILE, _compose_args, {"y": FIRST, "base": FIRST}, _judge_compose).check(answer)


# ---- 7.5: the row norm ----

ROWS = (slice(4),)


def _norm_args(n: int, m: int, dtype: torch.dtype) -> dict[str, Any]:
    W = (300 if dtype == torch.float16 else 1) * randn(n, m)
    W = W.abs() if (n, m) == (4, 16) else W  # so that a root of sums is a number
    return {"norm": torch.full((n,), torch.nan), "W": W.to(dtype)}


def _beyond(W: Tensor, cols: int) -> Tensor:
    """Norms where columns have no mask: a row goes on into the next one, the last into NaN."""
    n, m = W.shape
    flat = torch.cat([W.flatten(), torch.full((cols,), torch.nan)])
    long = -(-m // cols) * cols
    return torch.stack([flat[row * m : row * m + long].norm() for row in range(n)])


def _judge_norm(after: dict[str, Tensor], drawn: dict[str, Any]) -> None:
    got, W = after["norm"], drawn["W"].double()
    own, beyond, m = W.norm(dim=1), _beyond(W, 16), W.shape[1]
    goes_on = torch.equal(got.isnan(), beyond.isnan()) and not got.isnan().all()
    goes_on = goes_on and m % 16 > 0 and same(got.nan_to_num(), beyond.nan_to_num())
    require(not goes_on, "a row goes on into the next one: mask the columns beyond m too")
    inf = "inf: a square above 65504 leaves fp16, so turn W to float32 before you square"
    require(not got.isinf().any(), inf)
    _expect_written(got, ROWS, "norm")
    last = W[:, 16 * ((m - 1) // 16) :]
    known = [
        (own**2, "these are squared lengths: take the root"),
        (W.abs().sum(1), "these are sums of absolute values: square, then add"),
        (W.sum(1).abs(), "these are sums of the entries: square them first"),
        (W.sum(1).sqrt(), "the root of the sum of the entries: square them first"),
        (W.abs().sum(1).sqrt(), "the root of a sum of absolute values: square them"),
        (own / m**0.5, "divided by the number of columns: a length is no mean"),
        (W[:, :16].norm(dim=1), "only the first COLS columns are in: walk to the end"),
        (last.norm(dim=1), "only the last columns are in: the sum must outlive the loop"),
        (W.abs().amax(1), "these are the largest entries: add the squares"),
    ]
    live = bool((got[own == 0] == 0).all())
    require(live, "a row of zeros has the length 0: no epsilon")
    tiny = 0 < float(own.amax()) < 1e-6
    name = "norm of tiny rows, where an epsilon would show" if tiny else "norm"
    expect(got, own, known, name, "(n,)")


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
    tile = {"ROWS": 4, "COLS": 16}
    kernel = Kernel(tile, _norm_args, {"norm": ROWS}, _judge_norm, axes=1)
    kernel.check(answer)
    for case, W in (
        ("by hand", torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]])),
        ("rows of zeros", torch.cat([randn(2, 20), torch.zeros(3, 20)])),
        ("tiny rows", 1e-15 * randn(5, 20)),
    ):
        answer.case(case)
        kernel.run(answer, {"norm": torch.full((len(W),), torch.nan), "W": W}, *W.shape)


# ---- 7.6: the backward pass ----


def _backward_args(tokens: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    dy, u = randn(tokens, n).to(dtype), randn(tokens, n).to(dtype)
    norm, g = randn(n).abs() + 0.5, randn(n)
    if n > 2:
        norm[1], g[1] = 0.0, 1.0
    d_u, d_m = torch.full_like(dy, torch.nan), torch.full((-(-tokens // 16), n), torch.nan)
    return {"d_u": d_u, "d_m": d_m, "dy": dy, "u": u, "g": g, "norm": norm}


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
    number = not (got[:, norm == 0].isnan().any() or got.isinf().any())
    require(number, "d_m is not a number where the norm is 0: tl.where puts 0 there")
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


def _judge_backward(after: dict[str, Tensor], drawn: dict[str, Any]) -> None:
    given = [drawn[name].double() for name in ("dy", "u", "g", "norm")]
    _expect_written(after["d_u"], FIRST, "d_u")
    _check_d_u(after["d_u"], *given)
    _check_d_m(after["d_m"], *given)


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
    writes = {"d_u": FIRST, "d_m": (slice(1), slice(8))}
    Kernel(TILE, _backward_args, writes, _judge_backward).check(answer)
