"""Checks of exercises/05_why_it_works.ipynb: measure how weights move, and what moves them."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from minidora.checks.exercise import Answer, Lesson, kind_of
from minidora.checks.expect import NOTHING, expect, expect_parts, randn, require, type_name
from minidora.checks.oracle import Wrong, lengths, signed
from minidora.checks.spec import spec
from minidora.runner import probe

lesson = Lesson(5, "05_why_it_works", closed=("minidora.geometry",))


# ---- 5.1 and 5.2: how weights move ----


def _wrong_means(each: Tensor, columns: int) -> Wrong:
    """In place of the mean over the rows."""
    yield "one number per row: take their mean", each
    yield "this is the sum: take the mean over the rows", each.sum()
    yield "the wrong k: it counts the rows, one per output", each.sum() / columns
    yield "the largest of all rows: take the mean", each.amax()
    yield "the median of all rows: take the mean", each.quantile(0.5)


@spec(
    lesson,
    "5.1",
    title="Change in magnitude",
    difficulty="easy",
    minutes=5,
    teaches="what the paper's Delta M measures, and that it cannot say whether rows grew",
    hint="One row grows by 5, another shrinks by 8. By how much did a row change, on average?",
    shapes="(out, in), (out, in) -> ()",
    grads=(),  # a plain number will do
    tiny=("weight", "reference"),
    half=False,
)
def delta_magnitude(weight: Tensor, reference: Tensor) -> Tensor:
    return (lengths(weight) - lengths(reference)).abs().mean()


def _wrong_delta_magnitudes(w: Tensor, w0: Tensor) -> Wrong:
    before = lengths(w0)
    moved, turned = lengths(w) - before, (w - w0).norm(dim=1)
    cancel = "gains and losses cancel: take |m - m0| of each row"
    yield f"{cancel} before the mean", moved.mean()
    yield f"{cancel}, and the mean of that", moved.mean().abs()
    yield "this is how long W - W0 is: compare the length of a row with what it was", turned.mean()
    columns = (w.norm(dim=0) - w0.norm(dim=0)).abs()
    yield "one norm per input (dim=0): there is one magnitude per output neuron", columns.mean()
    yield from _wrong_means(moved.abs(), w.shape[1])
    yield "one number per row: take the mean of their absolute values", moved
    yield "one norm for the whole matrix: there is one per row", (w.norm() - w0.norm()).abs()
    yield "these are squares: equation 3 has absolute values", moved.square().mean()
    yield "the root of mean squares: equation 3 has |m - m0|", moved.square().mean().sqrt()
    yield "a relative change: equation 3 does not divide by m0", (moved.abs() / before).mean()
    yield "the mean change of an entry: compare lengths of rows", (w - w0).abs().mean()


delta_magnitude.example([[6, 8], [3, 4], [10, 0]], [[3, 4], [5, 12], [0, 5]], gives=6)
delta_magnitude.example(
    [[6, 8], [3, 4], [0, 2]], [[3, 4], [3, 4], [2, 0]], gives=5 / 3, case="two lengths as they were"
)
delta_magnitude.example([[0, 0], [3, 4]], [[3, 4], [0, 0]], gives=5, case="rows of zeros")
delta_magnitude.mistakes_of(_wrong_delta_magnitudes)


@spec(
    lesson,
    "5.2",
    title="Change in direction",
    difficulty="easy",
    minutes=10,
    teaches="what the paper's Delta D measures, and that float32 loses a small angle",
    hint="What must a product of two rows be divided by, and how near to 1 may the result be?",
    shapes="(out, in), (out, in) -> ()",
    grads=(),
    tiny=("weight", "reference"),
    tiny_scale=3e-7,  # below 1e-8 torch.cosine_similarity is not exact any more
    half=False,
)
def delta_direction(weight: Tensor, reference: Tensor) -> Tensor:
    """1 - cos as half the squared distance of the unit rows: exact for tiny changes too."""
    total = []
    for row, row0 in zip(weight.tolist(), reference.tolist(), strict=True):
        long, long0 = math.hypot(*row), math.hypot(*row0)
        total.append(math.dist([a / long for a in row], [b / long0 for b in row0]) ** 2 / 2)
    return torch.tensor(math.fsum(total) / len(total), dtype=torch.float64)


def _wrong_delta_directions(w: Tensor, w0: Tensor) -> Wrong:
    u, u0 = w / lengths(w)[:, None], w0 / lengths(w0)[:, None]
    cos, change = (u * u0).sum(1), w - w0
    columns = ((w / w.norm(dim=0)) * (w0 / w0.norm(dim=0))).sum(0)
    yield "this is the mean cosine, 1 for what did not move: take 1 - cos", cos.mean()
    yield "cosines of columns (dim=0): one direction per output neuron", 1 - columns.mean()
    whole = (w * w0).sum() / (w.norm() * w0.norm())
    yield "one cosine for the whole matrix: row by row", 1 - whole
    yield from _wrong_means(1 - cos, w.shape[1])
    yield "|cos| takes a reversed row for one that did not move: keep signs", 1 - cos.abs().mean()
    yield "cos is squared: equation 4 has 1 - cos", 1 - cos.square().mean()
    yield "the products are not divided by both lengths", 1 - (w * w0).sum(1).mean()
    yield "divided by the lengths in W0 alone: divide by W's too", 1 - (w * u0).sum(1).mean()
    yield "divided by the lengths in W alone: divide by W0's too", 1 - (u * w0).sum(1).mean()
    yield "this is the angle: equation 4 has 1 - cos", cos.clamp(-1, 1).acos().mean()
    distance = (u - u0).norm(dim=1).mean()
    yield "this is the distance of the directions: 1 - cos is wanted", distance
    towards = (change * u0).sum(1) / lengths(change)
    yield "the cosine of W - W0 and W0: compare the direction of W with W0's", 1 - towards.mean()


@delta_direction.also
def _small_change(answer: Answer) -> None:
    answer.case("a small change")
    for change, tolerance in ((1e-4, 0.01), (1e-4, 0.01), (0.1, 1e-4)):
        reference = randn(8, 16)
        weight = reference + change * randn(8, 16)
        want, got = float(delta_direction.want([weight, reference])[0]), answer(weight, reference)
        steps = "a float32 near 1 has steps of 6e-8"
        text = f"expected {want:.3e}, got {float(got):.3e}: {steps}"
        near = abs(float(got) / want - 1) < tolerance
        require(near, f"{text}, so compute the cosine in float64, with nothing added to it")


delta_direction.example([[0, 5], [4, 3], [-4, 3]], [[3, 4], [0, 2], [1, 0]], gives=0.8)
delta_direction.mistakes_of(_wrong_delta_directions)


# ---- 5.3: correlation ----


@spec(
    lesson,
    "5.3",
    title="Pearson's correlation",
    difficulty="medium",
    minutes=10,
    teaches="what a correlation measures, and that units and slope are no part of it",
    hint="If y is measured in other units, or from another zero, which parts of r may change?",
    shapes="(n,), (n,) -> ()",
    sizes={"n": (4, 12)},  # of one point there is no correlation, and of two it is 1 or -1
    draw={
        "x": lambda n: 2 + randn(n, dtype=torch.float64),
        "y": lambda n: 3 + 5 * randn(n, dtype=torch.float64),
    },
    grads=(),
    tiny=("x", "y"),
    tiny_scale=1e-6,
    half=False,
)
def pearson(x: Tensor, y: Tensor) -> Tensor:
    return torch.tensor(statistics.correlation(x.tolist(), y.tolist()), dtype=torch.float64)


def _ranks(x: Tensor) -> list[int]:
    return [sorted(x.tolist()).index(entry) for entry in x.tolist()]


def _wrong_correlations(x: Tensor, y: Tensor) -> Wrong:
    r, n = pearson.oracle(x, y), len(x)
    x_, y_ = x - x.mean(), y - y.mean()
    products, xx, yy = (x_ * y_).sum(), x_.square().sum(), y_.square().sum()
    yield "divided by n and by n - 1: .mean() has n, .std() has n - 1, take one", r * (n - 1) / n
    yield "divided by n and by n - 1: the covariance and both spreads take one", r * n / (n - 1)
    yield "this is the covariance: divide it by both standard deviations", products / n
    yield "this is the covariance, over n - 1: divide it by both spreads", products / (n - 1)
    yield "this is the sum of products: divide it by both spreads", products
    yield "this is r squared: r has a sign", r * r
    yield "the sign is lost or wrong: r is negative where y falls as x grows", -r
    spearman = torch.tensor(statistics.correlation(_ranks(x), _ranks(y)), dtype=torch.float64)
    yield "this is Spearman's correlation, of ranks: use values", spearman
    yield "the means are not subtracted", (x * y).sum() / (x.norm() * y.norm())
    yield "the mean of y is not subtracted below the line", products / (xx.sqrt() * y.norm())
    yield "the mean of x is not subtracted below the line", products / (x.norm() * yy.sqrt())
    yield "this is the slope of y over x: divide by both standard deviations", products / xx
    yield "this is the slope of x over y: divide by both standard deviations", products / yy
    yield "divided by both variances: divide by standard deviations", products / (xx * yy) * (n - 1)
    yield "the root is missing below the line", products / (xx * yy)
    table = "this is the table of all correlations: return the one of x and y"
    yield table, torch.corrcoef(torch.stack([x, y]))


@pearson.also
def _far_from_zero(answer: Answer) -> None:
    answer.case("far from zero")
    for sign in (1, -1):
        x = randn(30)
        y = sign * x + 0.5 * randn(30) + 3000
        x = x - 2000
        got, want = float(answer(x, y)), float(pearson.want([x, y])[0])
        text = f"expected {want:.4f}, got {got:.4f}: large sums cancel"
        require(abs(got - want) < 1e-3, f"{text}, so subtract the means before you multiply")


pearson.example([1, 4, 7, 8], [14, 16, 8, 2], gives=-5 / 6)
pearson.example([1, 4], [3, 2], gives=-1, case="two points")
pearson.mistakes_of(_wrong_correlations)


# ---- 5.4: draws are random, so they are counted ----

DRAWS = 300


def _rows(got: Any) -> list[int]:
    """The row numbers of one draw, whether they came as a tensor or as a list."""
    require(got is not None, NOTHING)
    if isinstance(got, list | tuple) and all(type(row) is int for row in got):
        return list(got)
    require(isinstance(got, Tensor), f"expected a tensor of row numbers, got {kind_of(got)}")
    whole = got.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    kind = f"{type_name(got.dtype)} of shape {tuple(got.shape)}"
    plain = got.ndim == 1 and whole and not got.is_meta and got.layout == torch.strided
    require(plain, f"row numbers are whole numbers in one axis, got {kind}")
    return [int(row) for row in got.tolist()]


def _times(rows: list[int], clusters: list[int]) -> dict[int, int]:
    """How often each cluster stands in one draw; refuses what is no draw of whole clusters."""
    for row in rows:
        number = f"there are {len(clusters)} points, so {row} is no row number"
        require(0 <= row < len(clusters), f"{number}: return the rows, not their labels")
    times = {}
    for label in dict.fromkeys(clusters):
        each = {rows.count(row) for row, its in enumerate(clusters) if its == label}
        counts = " and ".join(map(str, sorted(each)))
        torn = f"cluster {label} is torn apart: in one draw its points stand {counts} times"
        require(len(each) == 1, torn)
        times[label] = each.pop()
    return times


def _check_sizes(draws: list[dict[int, int]], k: int) -> None:
    """Refuse draws of another number of clusters than k."""
    sizes = {sum(draw.values()) for draw in draws}
    once = max(max(draw.values()) for draw in draws) == 1
    wrong = next((size for size in sorted(sizes) if size != k), k)
    text = f"clusters in one draw: {wrong}, expected {k}"
    require(not (once and len(sizes) > 1), f"{text}: one drawn twice must stand twice")
    require(len(sizes) > 1 or wrong == k, f"{text}: draw as many as there are")
    require(wrong == k, f"{text}: draw {k} times, among labels that occur")
    require(k == 1 or not once, "no cluster is ever drawn twice: draw with replacement")


def _check_shares(draws: list[dict[int, int]], clusters: list[int]) -> None:
    """Refuse draws that prefer some clusters: by more than 5 deviations."""
    k, every = len(draws[0]), len(draws) * len(draws[0])
    for label in draws[0]:
        share = sum(draw[label] for draw in draws) / every
        near = abs(share - 1 / k) <= 5 * math.sqrt(1 / k * (1 - 1 / k) / every)
        text = f"a cluster of {clusters.count(label)} points is drawn in {share:.0%} of cases"
        require(near, f"{text}: each of the {k} has the same chance, however large it is")


def _check_independent(draws: list[dict[int, int]]) -> None:
    """Refuse draws in which one cluster depends on another: by more than 5 deviations."""
    k = len(draws[0])
    different = sum(sum(count > 0 for count in draw.values()) for draw in draws) / len(draws)
    one, two = (1 - 1 / k) ** k, max(0, 1 - 2 / k) ** k  # chances that one, that two are missing
    want, variance = k * (1 - one), k * one * (1 - one) + k * (k - 1) * (two - one**2)
    text = f"a draw holds {different:.2f} different clusters on average, expected {want:.2f}"
    near = abs(different - want) <= 5 * math.sqrt(variance / len(draws)) + 1e-9
    require(near, f"{text}: each is drawn independently")


@lesson.exercise(
    "5.4",
    title="Draw whole clusters",
    difficulty="medium",
    minutes=15,
    teaches="how an interval takes into account that points of one layer are not independent",
    hint="What is drawn here, a point or a label? And what if the same one is drawn twice?",
)
def draw_clusters(answer: Answer) -> None:
    labels = torch.tensor([3, 3, 3, 3, 3, 3, 3, 0, 0, -9, -2, 40])
    for case, own in {
        "three points": [torch.tensor([5, 5, 8]), torch.tensor([5, 8, 8])],
        "clusters of all sizes, in no order": [labels[randn(12).argsort()] for _ in range(2)],
        "one cluster": [torch.tensor([4]), torch.tensor([6, 6, 6])],
    }.items():
        answer.case(case)
        for clusters in own:
            answer(clusters)  # leaves its argument as it is
        found = answer.probe(probe.calls, [[clusters] for clusters in own] * DRAWS)
        every = []
        for clusters, got in zip(own, (found[::2], found[1::2]), strict=True):
            rows, each = [_rows(one) for one in got], clusters.tolist()
            require(any(rows), "every draw is empty: return the rows of the labels drawn")
            draws = [_times(one, each) for one in rows]
            k = len(draws[0])
            same = "the same draw each time: draw among all labels, the last too, and set no seed"
            require(k == 1 or any(one != rows[0] for one in rows), same)
            _check_sizes(draws, k)
            _check_shares(draws, each)
            every += draws
        _check_independent(every)


# ---- 5.5 and 5.6: what moves them ----


def _through(
    gradient: Tensor, v: Tensor, magnitude: Tensor, detached: bool
) -> tuple[Tensor, Tensor]:
    """Autograd's gradients of V and of the magnitude, from that of W'."""
    v, magnitude = (part.clone().requires_grad_() for part in (v, magnitude))
    norm = v.norm(dim=1, keepdim=True)
    weight = magnitude[:, None] / (norm.detach() if detached else norm) * v
    to_v, to_magnitude = torch.autograd.grad((weight * gradient).sum(), (v, magnitude))
    return to_v, to_magnitude


@spec(
    lesson,
    "5.5",
    title="The gradient of the magnitude",
    difficulty="medium",
    minutes=10,
    teaches="that a magnitude sees only the part of the gradient along its row (equation 7)",
    hint="W' = magnitude * V / ||V||. If one magnitude grows by 1, by what does its row change?",
    shapes="(out, in), (out, in) -> (out,)",
    grads=(),  # autograd itself may be asked
    tiny=("gradient", "v"),
    tiny_scale=3e-7,
)
def magnitude_gradient(gradient: Tensor, v: Tensor) -> Tensor:
    return _through(gradient, v, torch.ones(len(v), dtype=torch.float64), detached=True)[1]


def _wrong_magnitude_gradients(g: Tensor, v: Tensor) -> Wrong:
    norm, dot, length = lengths(v), (g * v).sum(1), lengths(g)
    yield "not divided by the length of the row of V", dot
    yield "divided by the squared length: divide by the length", dot / norm**2
    yield "this is the cosine of equation 8: do not divide by ||gradient||", dot / (norm * length)
    yield "divided by ||gradient||: divide by ||V||", dot / length
    yield "the sign is lost: a magnitude may have to grow or to shrink", dot.abs() / norm
    yield "the sign is wrong: this is the step downhill, not the gradient", -dot / norm
    per_output = "summed over the outputs (dim=0): there is one magnitude per output neuron"
    yield per_output, (g * v).sum(0) / v.norm(dim=0)
    yield "one number for the whole matrix: there is one per row", dot.sum() / v.norm()
    yield "divided by the norm of the whole matrix: row by row", dot / v.norm()
    pairs = "a matrix product pairs each row with all rows: multiply row by row"
    yield pairs, g @ v.T / norm
    yield f"{pairs} (dim=1)", g @ v.T / norm[:, None]
    yield "this is how long the gradient is: only its part along V counts", length
    yield "products of entries: add them up along each row", g * v / norm[:, None]
    yield "the shape is (out, 1): leave out keepdim", (dot / norm)[:, None]
    part = "this is the part of the gradient along V: return its length, with its sign"
    yield part, (dot / norm**2)[:, None] * v


magnitude_gradient.example(
    [[5, 0, 7], [1, -13, 0]], [[3, 4, 0], [0, 5, 12]], gives=[3, -5]
)  # fmt: skip
magnitude_gradient.mistakes_of(_wrong_magnitude_gradients)


@spec(
    lesson,
    "5.6",
    title="What the full gradient removes",
    difficulty="hard",
    minutes=20,
    teaches="that equation 6 is meant row by row, and what a detached norm keeps (equation 11)",
    hint="A longer row of V gives the same W'. So which part of the gradient can have no effect?",
    shapes="(out, in), (out, in), (out,) -> full (out, in), removed (out, in)",
    draw={"magnitude": signed},
    sizes={"in": (2, 7)},  # of a single input only rounding is left: see _one_input
    grads=(),
    tiny=("v",),
)
def split_gradient(gradient: Tensor, v: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    full, detached = (_through(gradient, v, magnitude, each)[0] for each in (False, True))
    return full, detached - full


def _wrong_full(g: Tensor, v: Tensor, magnitude: Tensor) -> Wrong:
    m, norm, dot = magnitude[:, None], lengths(v)[:, None], (g * v).sum(1, keepdim=True)
    f, along, whole = m / norm, dot / norm**2 * v, v.norm()
    yield "nothing is removed: this is equation 11", f * g
    yield "the magnitude has lost its sign: a trained one may be negative", f.abs() * (g - along)
    yield "the factor magnitude / ||V|| is missing", g - along
    yield "not divided by ||V||: the factor is magnitude / ||V||", m * (g - along)
    yield "the magnitude is missing: the factor is magnitude / ||V||", (g - along) / norm
    factor = "the factor magnitude / ||V|| belongs"
    yield f"{factor} to the gradient too", g - f * along
    yield f"{factor} to the part that is removed too", f * g - along
    yield "the part along V is not divided by ||V||^2", f * (g - dot * v)
    yield "the part along V is divided by ||V||, not ||V||^2", f * (g - dot / norm * v)
    yield "the part along V is added: it is what the full gradient lacks", f * (g + along)
    matrix = "V V^T is read as a matrix product: equation 6 speaks of one row, v v^T"
    yield matrix, f * (g - v @ v.T @ g / norm**2)
    yield f"{matrix}, and of its norm", f * (g - v @ v.T @ g / whole**2)
    yield f"{matrix}, with its own norms", m / whole * (g - v @ v.T @ g / whole**2)
    yield "gradient V^T pairs each row with all: row by row", f * (g - (g @ v.T / norm**2) @ v)
    yield "all rows are projected as one: row by row", f * (g - dot.sum() / whole**2 * v)
    columns = "projected column by column (dim=0): there is one norm per row"
    yield columns, f * (g - (g * v).sum(0) / v.norm(dim=0) ** 2 * v)
    on_gradient = dot / g.square().sum(1, keepdim=True) * g
    yield "projected on the gradient: what goes is along V", f * (g - on_gradient)


def _wrong_removed(g: Tensor, v: Tensor, magnitude: Tensor) -> Wrong:
    full, removed = split_gradient.oracle(g, v, magnitude)
    f = (magnitude / lengths(v))[:, None]
    yield "this is the full gradient again: return what it lacks", full
    yield "the sign is wrong: full + removed is equation 11", -removed
    yield "the factor magnitude / ||V|| is missing: full + removed is eq. 11", removed / f
    yield "this is all of equation 11: full + removed should be that", f * g
    one = "one number per row: return the part of the gradient, (out, in)"
    yield one, (removed / lengths(v)[:, None] * v).sum(1)


@split_gradient.also
def _one_input(answer: Answer) -> None:
    answer.case("in = 1")
    args = split_gradient.some({"out": 3, "in": 1})
    full, removed = expect_parts(answer(*args), ("full", "removed"))
    want = split_gradient.want(args)
    expect(removed, want[1], name="removed")
    expect(full + removed, sum(want), name="full + removed")


split_gradient.example(
    [[5, 0, 1], [4, 0, 6]],
    [[3, 4, 0], [0, 0, 2]],
    [10, 1],
    gives=([[6.4, -4.8, 2], [2, 0, 0]], [[3.6, 4.8, 0], [0, 0, 3]]),
)
split_gradient.mistakes_of(_wrong_full, part="full")
split_gradient.mistakes_of(_wrong_removed, part="removed")
