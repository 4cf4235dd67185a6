"""Checks of exercises/05_why_it_works.ipynb: measure how weights move, and what moves them."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minidora.checks.exercise import Answer, Lesson, kind_of
from minidora.checks.expect import randn, require
from minidora.checks.oracle import Wrong
from minidora.checks.spec import spec

lesson = Lesson(5, "05_why_it_works", closed=("minidora.geometry",))


def _lengths(matrix: Tensor) -> Tensor:
    """The length of each row, by Python's own exact sums."""
    return torch.tensor([math.hypot(*row) for row in matrix.tolist()], dtype=torch.float64)


def _float64(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def _value(got: Any) -> float:
    """Of an answer that is one number."""
    one = isinstance(got, float) or (isinstance(got, Tensor) and got.numel() == 1)
    require(one, f"expected one number, got {kind_of(got)}")
    return float(got)


# ---- How weights move ----


@spec(
    lesson,
    "5.1",
    title="Change in magnitude",
    difficulty="easy",
    minutes=5,
    teaches="what the paper's Delta M measures, and that it cannot say whether rows grew",
    hint="One row grows by 5, another shrinks by 8. By how much did a row change, on average?",
    shapes="(out, in), (out, in) -> ()",
    grads=(),
    tiny=("weight", "reference"),
)
def delta_magnitude(weight: Tensor, reference: Tensor) -> Tensor:
    return (_lengths(weight) - _lengths(reference)).abs().mean()


def _wrong_magnitudes(w: Tensor, w0: Tensor) -> Wrong:
    before = _lengths(w0)
    moved = _lengths(w) - before
    cancel = "gains and losses cancel: take |m - m0| of each row before the mean"
    yield cancel, moved.mean().abs()
    yield cancel, moved.mean() if moved.mean() < 0 else None
    yield (
        "this is how long W - W0 is: compare the length of a row with what it was",
        (w - w0).norm(dim=1).mean(),
    )
    yield (
        "one norm per input (dim=0): there is one magnitude per output neuron",
        (w.norm(dim=0) - w0.norm(dim=0)).abs().mean(),
    )
    yield "one number per row: take their mean", moved.abs()
    yield "one number per row: take the mean of their absolute values", moved
    yield "this is the sum: take the mean over the rows", moved.abs().sum()
    yield (
        "divided by the wrong number: k counts the rows, one per output",
        moved.abs().sum() / w.shape[1],
    )
    yield "one norm for the whole matrix: there is one per row", (w.norm() - w0.norm()).abs()
    yield "these are squares: equation 3 has absolute values", moved.square().mean()
    yield "the root of mean squares: equation 3 has |m - m0|", moved.square().mean().sqrt()
    yield "a relative change: equation 3 does not divide by m0", (moved.abs() / before).mean()
    yield "the largest change: take the mean", moved.abs().amax()
    yield "the mean change of an entry: compare lengths of rows", (w - w0).abs().mean()


delta_magnitude.example([[6, 8], [3, 4], [10, 0]], [[3, 4], [5, 12], [0, 5]], gives=6)
delta_magnitude.mistakes_of(_wrong_magnitudes)


@delta_magnitude.also
def _not_moved(answer: Answer) -> None:
    answer.case("not moved")
    weight = randn(4, 3)
    require(_value(answer(weight, weight.clone())) == 0, "not 0 for a weight that did not move")


def _delta_direction(weight: Tensor, reference: Tensor) -> Tensor:
    """Mean of 1 - cos as half the squared distance of the unit rows: exact for tiny changes too."""
    total = []
    for row, row0 in zip(weight.tolist(), reference.tolist(), strict=True):
        long, long0 = math.hypot(*row), math.hypot(*row0)
        total.append(math.dist([a / long for a in row], [b / long0 for b in row0]) ** 2 / 2)
    return _float64(math.fsum(total) / len(total))


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
    tiny_scale=1e-7,  # torch.cosine_similarity stops at 1e-8, and is right
    half=False,
)
def delta_direction(weight: Tensor, reference: Tensor) -> Tensor:
    return _delta_direction(weight, reference)


def _wrong_directions(w: Tensor, w0: Tensor) -> Wrong:
    u, u0 = w / _lengths(w)[:, None], w0 / _lengths(w0)[:, None]
    cos = (u * u0).sum(1)
    columns = ((w / w.norm(dim=0)) * (w0 / w0.norm(dim=0))).sum(0)
    towards = ((w - w0) * u0).sum(1) / _lengths(w - w0)
    yield "this is the mean cosine, 1 for what did not move: take 1 - cos", cos.mean()
    yield (
        "cosines of the columns (dim=0): there is one direction per output neuron",
        1 - columns.mean(),
    )
    yield (
        "one cosine for the whole matrix: row by row",
        1 - (w * w0).sum() / (w.norm() * w0.norm()),
    )
    yield "one number per row: take their mean", 1 - cos
    yield "this is the sum: take the mean over the rows", (1 - cos).sum()
    yield (
        "divided by the wrong number: k counts the rows, one per output",
        (1 - cos).sum() / w.shape[1],
    )
    yield (
        "|cos| takes a reversed row for one that did not move: keep signs",
        1 - cos.abs().mean(),
    )
    yield "cos is squared: equation 4 has 1 - cos", 1 - cos.square().mean()
    yield "the products are not divided by both lengths", 1 - (w * w0).sum(1).mean()
    yield "divided by the lengths in W0 alone: divide by W's too", 1 - (w * u0).sum(1).mean()
    yield "divided by the lengths in W alone: divide by W0's too", 1 - (u * w0).sum(1).mean()
    yield "this is the angle: equation 4 has 1 - cos", cos.clamp(-1, 1).acos().mean()
    yield "this is the distance of the directions: 1 - cos is wanted", _lengths(u - u0).mean()
    yield (
        "the cosine of W - W0 and W0: compare the direction of W with that of W0",
        1 - towards.mean(),
    )


delta_direction.example([[0, 5], [4, 3], [-4, 3]], [[3, 4], [0, 2], [1, 0]], gives=0.8)
delta_direction.mistakes_of(_wrong_directions)


@delta_direction.also
def _small_change(answer: Answer) -> None:
    answer.case("a small change")
    for _ in range(3):
        reference = randn(8, 16)
        weight = reference + 1e-4 * randn(8, 16)
        got, want = _value(answer(weight, reference)), float(_delta_direction(weight, reference))
        require(
            abs(got / want - 1) < 0.01,
            f"expected {want:.3e}, got {got:.3e}: a float32 near 1 has steps of 6e-8, "
            "so compute the cosine in float64, with nothing added to it",
        )


# ---- What goes with what ----


@spec(
    lesson,
    "5.3",
    title="Pearson's correlation",
    difficulty="medium",
    minutes=10,
    teaches="what a correlation measures, and that units and slope are no part of it",
    hint="If y is measured in other units, or from another zero, which parts of r may change?",
    shapes="(n,), (n,) -> ()",
    sizes={"n": (4, 12)},
    draw={
        "x": lambda n: 2 + randn(n, dtype=torch.float64),
        "y": lambda n: 3 + 5 * randn(n, dtype=torch.float64),
    },
    grads=(),
    tiny_scale=1e-6,
    half=False,
)
def pearson(x: Tensor, y: Tensor) -> Tensor:
    return _float64(statistics.correlation(x.tolist(), y.tolist()))


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    ranks = [[sorted(part).index(entry) for entry in part] for part in (x, y)]
    return statistics.correlation(*ranks)


def _wrong_correlations(x: Tensor, y: Tensor) -> Wrong:
    r = statistics.correlation(x.tolist(), y.tolist())
    n, cov = len(x), statistics.covariance(x.tolist(), y.tolist())  # divided by n - 1
    xx, yy = float(x.var()), float(y.var())
    dx, dy = x - x.mean(), y - y.mean()
    mixed = "divided by n and by n - 1: "
    yield mixed + ".mean() has n, .std() has n - 1, take one", _float64(r * (n - 1) / n)
    yield mixed + "the covariance and both spreads take one", _float64(r * n / (n - 1))
    covariance = "this is the covariance: divide it by both standard deviations"
    yield covariance, _float64(cov)
    yield covariance, _float64(cov * (n - 1) / n)
    yield (
        "this is the sum of products: divide it by both spreads",
        _float64(cov * (n - 1)),
    )
    yield "this is r squared: r has a sign", _float64(r * r)
    yield (
        "the sign is lost: r is negative where y falls as x grows",
        _float64(-r) if r < 0 else None,
    )
    yield "the sign is the wrong way round", _float64(-r) if r > 0 else None
    yield (
        "this is Spearman's correlation, of ranks: use values",
        _float64(_spearman(x.tolist(), y.tolist())),
    )
    yield "the means are not subtracted", (x * y).sum() / (x.norm() * y.norm())
    yield "the mean of y is not subtracted below the line", (dx * y).sum() / (dx.norm() * y.norm())
    yield "the mean of x is not subtracted below the line", (x * dy).sum() / (x.norm() * dy.norm())
    yield (
        "this is the slope of y over x: divide by both standard deviations",
        _float64(cov / xx),
    )
    yield (
        "this is the slope of x over y: divide by both standard deviations",
        _float64(cov / yy),
    )
    yield (
        "divided by both variances: divide by standard deviations",
        _float64(cov / (xx * yy)),
    )
    yield "the root is missing below the line", _float64(cov / (xx * yy) / (n - 1))
    yield (
        "this is the table of all correlations: return the one of x and y",
        torch.tensor([[1, r], [r, 1]], dtype=torch.float64),
    )


pearson.example([1, 4, 7, 8], [14, 16, 8, 2], gives=-5 / 6)
pearson.mistakes_of(_wrong_correlations)


@pearson.also
def _units_and_zero(answer: Answer) -> None:
    answer.case("other units")
    for scale in (1e-3, 1e3):
        x, y = randn(8), randn(8)
        want = statistics.correlation(x.tolist(), y.tolist())
        got = _value(answer(scale * x, y))
        require(abs(got - want) < 1e-4, f"expected {want:.4f} in any unit of x, got {got:.4f}")
    answer.case("far from zero")
    for sign in (1, -1):
        x = randn(30)
        y = sign * x + 0.5 * randn(30) + 3000
        x = x - 2000
        got, want = _value(answer(x, y)), statistics.correlation(x.tolist(), y.tolist())
        require(
            abs(got - want) < 1e-3,
            f"expected {want:.4f}, got {got:.4f}: large sums cancel, "
            "so subtract the means before you multiply",
        )


DRAWS = 300


def _draw(got: Any) -> Tensor:
    """Row numbers as a tensor, whether they came as a tensor or as a list."""
    require(got is not None, "got None: end with `return ...` (print gives nothing back)")
    if isinstance(got, list | tuple) and all(type(row) is int for row in got):
        return torch.tensor(got)
    require(isinstance(got, Tensor), f"expected a tensor of row numbers, got {kind_of(got)}")
    assert isinstance(got, Tensor)
    return got


def _times(got: Tensor, clusters: Tensor) -> dict[int, int]:
    """How often each cluster stands in one draw; refuses what is no draw of whole clusters."""
    whole = not got.is_floating_point() and not got.is_complex() and got.dtype != torch.bool
    plain = got.ndim == 1 and whole
    kind = f"{str(got.dtype).removeprefix('torch.')} of shape {tuple(got.shape)}"
    require(plain, f"row numbers are whole numbers in one axis, got {kind}")
    rows = got.tolist()
    for row in rows:
        number = f"there are {len(clusters)} points, so {row} is no row number"
        require(0 <= row < len(clusters), f"{number}: return the rows, not their labels")
    times = {}
    for label in sorted(set(clusters.tolist())):
        each = [rows.count(row) for row, its in enumerate(clusters.tolist()) if its == label]
        counts = " and ".join(str(count) for count in sorted(set(each)))
        require(
            len(set(each)) == 1,
            f"cluster {label} is torn apart: in one draw its points stand {counts} times",
        )
        times[label] = each[0]
    return times


@lesson.exercise(
    "5.4",
    title="Draw whole clusters",
    difficulty="medium",
    minutes=15,
    teaches="how an interval takes into account that points of one layer are not independent",
    hint="What is drawn here, a point or a label? And what if the same one is drawn twice?",
)
def draw_clusters(answer: Answer) -> None:
    def check(clusters: Tensor) -> None:
        answers = [_draw(answer(clusters)) for _ in range(DRAWS)]
        draws = [_times(got, clusters) for got in answers]
        require(
            any(not torch.equal(got, answers[0]) for got in answers),
            "the same draw each time: draw at random among all labels, and set no seed",
        )
        labels = list(draws[0])
        k = len(labels)
        sizes = {sum(draw.values()) for draw in draws}
        once = max(max(draw.values()) for draw in draws) == 1
        wrong = next((size for size in sorted(sizes) if size != k), k)
        require(
            not (once and len(sizes) > 1),
            f"clusters in one draw: {wrong}, expected {k}: one drawn twice must stand twice",
        )
        require(
            len(sizes) > 1 or wrong == k,
            f"clusters in each draw: {wrong}, expected {k}: draw as many as there are",
        )
        require(
            wrong == k,
            f"clusters in one draw: {wrong}, expected {k}: draw {k} times, among labels that occur",
        )
        require(not once, "no cluster is ever drawn twice: draw with replacement")
        for label in labels:
            share = sum(draw[label] for draw in draws) / (k * DRAWS)
            number = int((clusters == label).sum())
            deviation = math.sqrt(1 / k * (1 - 1 / k) / (k * DRAWS))
            require(
                abs(share - 1 / k) < 5 * deviation,
                f"a cluster of {number} points is drawn in {share:.0%} of cases: "
                f"each of the {k} has the same chance, however large it is",
            )
        different = sum(sum(count > 0 for count in draw.values()) for draw in draws) / DRAWS
        want = k * (1 - (1 - 1 / k) ** k)
        require(
            abs(different - want) < 0.25,
            f"a draw holds {different:.2f} different clusters on average, expected {want:.2f}: "
            "each is drawn independently",
        )

    answer.case("three points")
    check(torch.tensor([5, 5, 8]))
    answer.case("clusters of all sizes, in no order")
    clusters = torch.tensor([3, 3, 3, 3, 3, 3, 3, 7, 7, 9, 12, 40])
    check(clusters[randn(len(clusters)).argsort()])


# ---- What moves them ----


def _through(gradient: Tensor, v: Tensor, m: Tensor, detached: bool) -> tuple[Tensor, Tensor]:
    """Autograd's gradients of V' and of the magnitude, from that of W'."""
    v, m = v.clone().requires_grad_(), m.clone().requires_grad_()
    norm = v.norm(dim=1, keepdim=True)
    weight = m[:, None] / (norm.detach() if detached else norm) * v
    to_v, to_m = torch.autograd.grad((weight * gradient).sum(), (v, m))
    return to_v, to_m


@spec(
    lesson,
    "5.5",
    title="The gradient of the magnitude",
    difficulty="medium",
    minutes=10,
    teaches="that a magnitude sees only the part of the gradient along its row (equation 7)",
    hint="W' = magnitude * V' / ||V'||. If one magnitude grows by 1, by what does its row change?",
    shapes="(out, in), (out, in) -> (out,)",
    grads=(),
    tiny=("v",),
    tiny_scale=1e-7,  # torch.cosine_similarity stops at 1e-8, and is right
)
def magnitude_gradient(gradient: Tensor, v: Tensor) -> Tensor:
    return _through(gradient, v, torch.ones(len(v), dtype=torch.float64), detached=True)[1]


def _wrong_magnitude_gradients(g: Tensor, v: Tensor) -> Wrong:
    norm, dot, length = _lengths(v), (g * v).sum(1), _lengths(g)
    pairs = "a matrix product pairs each row with all rows: multiply row by row"
    yield "not divided by the length of the row of V'", dot
    yield "divided by the squared length: divide by the length", dot / norm**2
    yield (
        "this is the cosine of equation 8: do not divide by ||gradient||",
        dot / (norm * length),
    )
    yield "divided by ||gradient||: divide by ||V'||", dot / length
    yield "the sign is lost: a magnitude may have to grow or to shrink", dot.abs() / norm
    yield "the sign is wrong: this is the step downhill, not the gradient", -dot / norm
    yield (
        "summed over the outputs (dim=0): there is one magnitude per output neuron",
        (g * v).sum(0) / v.norm(dim=0),
    )
    yield "one number for the whole matrix: there is one per row", dot.sum() / v.norm()
    yield "divided by the norm of the whole matrix: row by row", dot / v.norm()
    yield pairs, g @ v.T / norm
    yield pairs, g @ v.T / norm[:, None]
    yield "this is how long the gradient is: only its part along V' counts", length
    yield "products of entries: add them up along each row", g * v / norm[:, None]
    yield "the shape is (out, 1): leave out keepdim", (dot / norm)[:, None]
    yield (
        "this is the part of the gradient along V': return its length, with its sign",
        (dot / norm**2)[:, None] * v,
    )


magnitude_gradient.example([[5, 0, 7], [1, -13, 0]], [[3, 4, 0], [0, 5, 12]], gives=[3, -5])
magnitude_gradient.mistakes_of(_wrong_magnitude_gradients)


def _signed(out: int) -> Tensor:
    """Magnitudes; the first is negative: nothing keeps training from it."""
    magnitude = randn(out, dtype=torch.float64).abs() + 0.5
    magnitude[0] *= -1
    return magnitude


@spec(
    lesson,
    "5.6",
    title="What the full gradient removes",
    difficulty="hard",
    minutes=20,
    teaches="that equation 6 is meant row by row, and what a detached norm keeps (equation 11)",
    hint="A longer row of V' gives the same W'. So which part of the gradient can have no effect?",
    shapes="(out, in), (out, in), (out,) -> full (out, in), removed (out, in)",
    draw={"magnitude": _signed},
    sizes={"in": (2, 7)},  # with one input the full gradient is 0, up to rounding
    grads=(),
    tiny=("v",),
)
def split_gradient(gradient: Tensor, v: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    full, _ = _through(gradient, v, magnitude, detached=False)
    return full, _through(gradient, v, magnitude, detached=True)[0] - full


def _wrong_full(g: Tensor, v: Tensor, magnitude: Tensor) -> Wrong:
    m, norm, dot, whole = (
        magnitude[:, None],
        _lengths(v)[:, None],
        (g * v).sum(1)[:, None],
        v.norm(),
    )
    f, along = m / norm, dot / norm**2 * v
    matrix = "V'V'^T is read as a matrix product: equation 6 speaks of one row, v v^T"
    yield "nothing is removed: this is equation 11", f * g
    yield "the other way round: return full, removed", f * along
    yield (
        "the magnitude has lost its sign: a trained one may be negative",
        f.abs() * (g - along),
    )
    yield "the factor magnitude / ||V'|| is missing", g - along
    yield "not divided by ||V'||: the factor is magnitude / ||V'||", m * (g - along)
    yield "the magnitude is missing: the factor is magnitude / ||V'||", (g - along) / norm
    yield "the factor magnitude / ||V'|| is for all of it, gradient too", g - f * along
    yield "the factor magnitude / ||V'|| is for all of it, what goes too", f * g - along
    yield "the part along V' is not divided by ||V'||^2", f * (g - dot * v)
    yield "the part along V' is divided by ||V'||, not ||V'||^2", f * (g - dot / norm * v)
    yield "the part along V' is added: it is what the full gradient lacks", f * (g + along)
    yield matrix, f * (g - v @ v.T @ g / norm**2)
    yield matrix, f * (g - v @ v.T @ g / whole**2)
    yield matrix, m / whole * (g - v @ v.T @ g / whole**2)
    yield "gradient V'^T pairs each row with all: row by row", f * (g - (g @ v.T / norm**2) @ v)
    yield "all rows are projected as one: row by row", f * (g - dot.sum() / whole**2 * v)
    yield (
        "projected column by column (dim=0): there is one norm per row",
        f * (g - (g * v).sum(0) / v.norm(dim=0) ** 2 * v),
    )
    yield (
        "projected on the gradient: what goes is along V'",
        f * (g - dot / g.square().sum(1, keepdim=True) * g),
    )


def _wrong_removed(g: Tensor, v: Tensor, magnitude: Tensor) -> Wrong:
    norm, dot = _lengths(v)[:, None], (g * v).sum(1)[:, None]
    f, along = magnitude[:, None] / norm, dot / norm**2 * v
    yield "this is the full gradient again: return what it lacks", f * (g - along)
    yield "the sign is wrong: full + removed is equation 11", -f * along
    yield "the factor magnitude / ||V'|| is missing: full + removed is eq. 11", along
    yield "this is all of equation 11: full + removed should be that", f * g
    yield (
        "one number per row: return the part of the gradient, (out, in)",
        (f * dot / norm)[:, 0],
    )


split_gradient.example(
    [[5, 0, 1], [4, 0, 6]],
    [[3, 4, 0], [0, 0, 2]],
    [10, 1],
    gives=([[6.4, -4.8, 2], [2, 0, 0]], [[3.6, 4.8, 0], [0, 0, 3]]),
)
split_gradient.mistakes_of(_wrong_full, part="full")
split_gradient.mistakes_of(_wrong_removed, part="removed")
