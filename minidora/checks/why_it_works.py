"""Checks of exercises/05_why_it_works.ipynb: measure how weights move, and what moves them."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minidora.checks.exercise import Answer, Lesson, kind_of
from minidora.checks.expect import (
    Known,
    expect,
    expect_dtype_and_device,
    expect_parts,
    randn,
    require,
)

lesson = Lesson(5, "05_why_it_works", closed=("minidora.geometry",))
EXAMPLE = "this is the answer to the example: compute it from the arguments"
SHAPES = ((5, 3), (2, 7), (4, 4))


def _number(got: Any) -> Any:
    """One number as a float32 tensor, whether it came as a tensor or as a float."""
    if isinstance(got, int | float) and not isinstance(got, bool):
        return torch.tensor(got, dtype=torch.float32)
    return got.float() if isinstance(got, Tensor) and got.is_floating_point() else got


def _value(got: Any) -> float:
    """Of an answer that is one number."""
    number = _number(got)
    one = isinstance(number, Tensor) and number.numel() == 1 and not number.is_complex()
    require(one, f"expected one number, got {kind_of(got)}")
    return float(number)


def _rows(matrix: Tensor) -> list[list[float]]:
    return [[float(entry) for entry in row] for row in matrix.double().tolist()]


def _lengths(matrix: Tensor) -> Tensor:
    """The length of each row, by Python's own exact sums, in float64."""
    return torch.tensor([math.hypot(*row) for row in _rows(matrix)], dtype=torch.float64)


# ---- How weights move ----


def _wrong_delta_magnitude(weight: Tensor, reference: Tensor) -> list[tuple[Tensor, str]]:
    w, w0 = weight.double(), reference.double()
    before = _lengths(w0)
    moved = _lengths(w) - before
    columns = (w.norm(dim=0) - w0.norm(dim=0)).abs().mean()
    return [
        (moved.mean(), "gains and losses cancel: take |m - m0| of each row before the mean"),
        (moved.mean().abs(), "gains and losses cancel: take |m - m0| of each row before the mean"),
        (
            (w - w0).norm(dim=1).mean(),
            "this is how long W - W0 is: compare the length of a row with what it was",
        ),
        (columns, "one norm per input (dim=0): there is one magnitude per output neuron"),
        (moved.abs(), "one number per row: take their mean"),
        (moved, "one number per row: take the mean of their absolute values"),
        (moved.abs().sum(), "this is the sum: take the mean over the rows"),
        (
            moved.abs().sum() / w.shape[1],
            "divided by the wrong number: k counts the rows, one per output",
        ),
        ((w.norm() - w0.norm()).abs(), "one norm for the whole matrix: there is one per row"),
        (moved.square().mean(), "these are squares: equation 3 has absolute values"),
        (moved.square().mean().sqrt(), "the root of mean squares: equation 3 has |m - m0|"),
        ((moved.abs() / before).mean(), "a relative change: equation 3 does not divide by m0"),
        (moved.abs().amax(), "the largest change: take the mean"),
        ((w - w0).abs().mean(), "the mean change of an entry: compare lengths of rows"),
    ]


@lesson.exercise(
    "5.1",
    title="Change in magnitude",
    difficulty="easy",
    minutes=5,
    teaches="what the paper's Delta M measures, and that it cannot say whether rows grew",
    hint="One row grows by 5, another shrinks by 8. By how much did a row change, on average?",
)
def delta_magnitude(answer: Answer) -> None:
    def check(weight: Tensor, reference: Tensor, known: Known = ()) -> None:
        want = (_lengths(weight) - _lengths(reference)).abs().mean()
        got = _number(answer(weight, reference))
        expect(got, want, [*_wrong_delta_magnitude(weight, reference), *known], shape="()")

    answer.case("by hand")
    check(
        torch.tensor([[6.0, 8.0], [3.0, 4.0], [10.0, 0.0]]),
        torch.tensor([[3.0, 4.0], [5.0, 12.0], [0.0, 5.0]]),
    )
    answer.case("random weights")
    for shape in SHAPES:
        weight, reference = randn(*shape), randn(*shape)
        weight[0], weight[1] = 3 * reference[0], 0.2 * reference[1]  # one grows, one shrinks
        check(weight, reference, [(torch.tensor(6.0), EXAMPLE)])
    answer.case("not moved")
    reference = randn(4, 3)
    check(reference.clone(), reference)
    expect_dtype_and_device(answer, randn(4, 3), reference)


def _delta_direction(weight: Tensor, reference: Tensor) -> Tensor:
    """Mean of 1 - cos as half the squared distance of the unit rows: exact for tiny changes too."""
    total = []
    for row, row0 in zip(_rows(weight), _rows(reference), strict=True):
        long, long0 = math.hypot(*row), math.hypot(*row0)
        total.append(math.dist([a / long for a in row], [b / long0 for b in row0]) ** 2 / 2)
    return torch.tensor(math.fsum(total) / len(total), dtype=torch.float64)


def _wrong_delta_direction(weight: Tensor, reference: Tensor) -> list[tuple[Tensor, str]]:
    w, w0 = weight.double(), reference.double()
    u, u0 = w / _lengths(w)[:, None], w0 / _lengths(w0)[:, None]
    cos = (u * u0).sum(1)
    columns = ((w / w.norm(dim=0)) * (w0 / w0.norm(dim=0))).sum(0)
    change = w - w0
    towards = (change * u0).sum(1) / _lengths(change)
    return [
        (cos.mean(), "this is the mean cosine, 1 for what did not move: take 1 - cos"),
        (
            1 - columns.mean(),
            "cosines of the columns (dim=0): there is one direction per output neuron",
        ),
        (
            1 - (w * w0).sum() / (w.norm() * w0.norm()),
            "one cosine for the whole matrix: row by row",
        ),
        (1 - cos, "one number per row: take their mean"),
        ((1 - cos).sum(), "this is the sum: take the mean over the rows"),
        (
            (1 - cos).sum() / w.shape[1],
            "divided by the wrong number: k counts the rows, one per output",
        ),
        (1 - cos.abs().mean(), "|cos| takes a reversed row for one that did not move: keep signs"),
        (1 - cos.square().mean(), "cos is squared: equation 4 has 1 - cos"),
        (1 - (w * w0).sum(1).mean(), "the products are not divided by both lengths"),
        (1 - (w * u0).sum(1).mean(), "divided by the lengths in W0 alone: divide by W's too"),
        (1 - (u * w0).sum(1).mean(), "divided by the lengths in W alone: divide by W0's too"),
        (cos.clamp(-1, 1).acos().mean(), "this is the angle: equation 4 has 1 - cos"),
        ((u - u0).norm(dim=1).mean(), "this is the distance of the directions: 1 - cos is wanted"),
        (
            1 - towards.mean(),
            "the cosine of W - W0 and W0: compare the direction of W with that of W0",
        ),
    ]


@lesson.exercise(
    "5.2",
    title="Change in direction",
    difficulty="easy",
    minutes=10,
    teaches="what the paper's Delta D measures, and that float32 loses a small angle",
    hint="What must a product of two rows be divided by, and how near to 1 may the result be?",
)
def delta_direction(answer: Answer) -> None:
    def check(weight: Tensor, reference: Tensor, known: Known = ()) -> None:
        want = _delta_direction(weight, reference)
        got = _number(answer(weight, reference))
        expect(got, want, [*_wrong_delta_direction(weight, reference), *known], shape="()")

    answer.case("by hand")
    check(
        torch.tensor([[0.0, 5.0], [4.0, 3.0], [-4.0, 3.0]]),
        torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]),
    )
    answer.case("random weights")
    for shape in SHAPES:
        weight, reference = randn(*shape), randn(*shape)
        weight[0] = -2 * reference[0]  # turned round
        check(weight, reference, [(torch.tensor(0.8), EXAMPLE)])
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
    expect_dtype_and_device(answer, randn(4, 3), randn(4, 3))


# ---- What goes with what ----


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    ranks = [[sorted(part).index(entry) for entry in part] for part in (x, y)]
    return statistics.correlation(*ranks)


def _wrong_pearson(x: Tensor, y: Tensor) -> list[tuple[Tensor, str]]:
    r = statistics.correlation(x.tolist(), y.tolist())
    n, covariance = len(x), statistics.covariance(x.tolist(), y.tolist())  # divided by n - 1
    x, y = x.double(), y.double()
    xx, yy = float(x.var()), float(y.var())
    raw = float((x * y).sum() / (x.norm() * y.norm()))
    half = float(((x - x.mean()) * y).sum() / ((x - x.mean()).norm() * y.norm()))
    other_half = float((x * (y - y.mean())).sum() / (x.norm() * (y - y.mean()).norm()))
    wrong: list[tuple[float, str]] = [
        (r * (n - 1) / n, "divided by n and by n - 1: .mean() has n, .std() has n - 1, take one"),
        (r * n / (n - 1), "divided by n and by n - 1: the covariance and both spreads take one"),
        (covariance, "this is the covariance: divide it by both standard deviations"),
        (covariance * (n - 1) / n, "this is the covariance: divide by both standard deviations"),
        (covariance * (n - 1), "this is the sum of products: divide it by both spreads"),
        (r * r, "this is r squared: r has a sign"),
        (abs(r), "the sign is lost: r is negative where y falls as x grows"),
        (-r, "the sign is the wrong way round"),
        (_spearman(x.tolist(), y.tolist()), "this is Spearman's correlation, of ranks: use values"),
        (raw, "the means are not subtracted"),
        (half, "the mean of y is not subtracted below the line"),
        (other_half, "the mean of x is not subtracted below the line"),
        (covariance / xx, "this is the slope of y over x: divide by both standard deviations"),
        (covariance / yy, "this is the slope of x over y: divide by both standard deviations"),
        (covariance / (xx * yy), "divided by both variances: divide by standard deviations"),
        (covariance / (xx * yy) / (n - 1), "the root is missing below the line"),
    ]
    table = torch.tensor([[1, r], [r, 1]], dtype=torch.float64)
    return [
        (table, "this is the table of all correlations: return the one of x and y"),
        *((torch.tensor(value, dtype=torch.float64), message) for value, message in wrong),
    ]


@lesson.exercise(
    "5.3",
    title="Pearson's correlation",
    difficulty="medium",
    minutes=10,
    teaches="what a correlation measures, and that units and slope are no part of it",
    hint="If y is measured in other units, or from another zero, which parts of r may change?",
)
def pearson(answer: Answer) -> None:
    def correlation(x: Tensor, y: Tensor) -> Tensor:
        r = statistics.correlation(x.tolist(), y.tolist())
        return torch.tensor(r, dtype=torch.float64)

    answer.case("by hand")
    x, y = torch.tensor([1.0, 4.0, 7.0, 8.0]), torch.tensor([14.0, 16.0, 8.0, 2.0])
    expect(_number(answer(x, y)), torch.tensor(-5 / 6), _wrong_pearson(x, y), shape="()")
    answer.case("random points")
    for n, slope, scale in ((8, 1.0, 1.0), (20, -1.0, 1e-3), (5, -2.0, 30.0), (12, 0.8, 5.0)):
        x = randn(n) + 2
        y = scale * (slope * x + 0.5 * randn(n) + 3)
        x = min(scale, 1.0) * x
        known = [*_wrong_pearson(x, y), (torch.tensor(-5 / 6), EXAMPLE)]
        expect(_number(answer(x, y)), correlation(x, y), known, shape="()")
    answer.case("far from zero")
    for sign in (1, -1):
        x = randn(30)
        y = sign * x + 0.5 * randn(30) + 3000
        x = x - 2000
        got, want = _value(answer(x, y)), float(correlation(x, y))
        require(
            abs(got - want) < 1e-3,
            f"expected {want:.4f}, got {got:.4f}: large sums cancel, "
            "so subtract the means before you multiply",
        )
    expect_dtype_and_device(answer, randn(6), randn(6))


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


def _through(
    gradient: Tensor, v: Tensor, magnitude: Tensor, detached: bool
) -> tuple[Tensor, Tensor]:
    """Autograd's gradients of V and of the magnitude, in float64, from that of W'."""
    v, magnitude = (part.double().requires_grad_() for part in (v, magnitude))
    norm = v.norm(dim=1, keepdim=True)
    weight = magnitude[:, None] / (norm.detach() if detached else norm) * v
    to_v, to_magnitude = torch.autograd.grad((weight * gradient.double()).sum(), (v, magnitude))
    return to_v, to_magnitude


def _wrong_magnitude_gradient(gradient: Tensor, v: Tensor) -> list[tuple[Tensor, str]]:
    g, v = gradient.double(), v.double()
    norm, dot = _lengths(v), (g * v).sum(1)
    length = _lengths(g)
    return [
        (dot, "not divided by the length of the row of V'"),
        (dot / norm**2, "divided by the squared length: divide by the length"),
        (dot / (norm * length), "this is the cosine of equation 8: do not divide by ||gradient||"),
        (dot / length, "divided by ||gradient||: divide by ||V'||"),
        (dot.abs() / norm, "the sign is lost: a magnitude may have to grow or to shrink"),
        (-dot / norm, "the sign is wrong: this is the step downhill, not the gradient"),
        (
            (g * v).sum(0) / v.norm(dim=0),
            "summed over the outputs (dim=0): there is one magnitude per output neuron",
        ),
        (dot.sum() / v.norm(), "one number for the whole matrix: there is one per row"),
        (dot / v.norm(), "divided by the norm of the whole matrix: row by row"),
        (g @ v.T / norm, "a matrix product pairs each row with all rows: multiply row by row"),
        (
            g @ v.T / norm[:, None],
            "a matrix product pairs each row with all rows: multiply row by row",
        ),
        (length, "this is how long the gradient is: only its part along V' counts"),
        (g * v / norm[:, None], "products of entries: add them up along each row"),
        ((dot / norm)[:, None], "the shape is (out, 1): leave out keepdim"),
        (
            (dot / norm**2)[:, None] * v,
            "this is the part of the gradient along V': return its length, with its sign",
        ),
    ]


@lesson.exercise(
    "5.5",
    title="The gradient of the magnitude",
    difficulty="medium",
    minutes=10,
    teaches="that a magnitude sees only the part of the gradient along its row (equation 7)",
    hint="W' = magnitude * V' / ||V'||. If one magnitude grows by 1, by what does its row change?",
)
def magnitude_gradient(answer: Answer) -> None:
    def check(gradient: Tensor, v: Tensor, known: Known = ()) -> None:
        _, want = _through(gradient, v, randn(len(v)), detached=True)
        got = answer(gradient, v)
        expect(got, want, [*_wrong_magnitude_gradient(gradient, v), *known], shape="(out,)")

    answer.case("by hand")
    check(
        torch.tensor([[5.0, 0.0, 7.0], [1.0, -13.0, 0.0]]),
        torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]]),
    )
    answer.case("random gradients")
    for shape in SHAPES:
        check(randn(*shape), randn(*shape), [(torch.tensor([3.0, -5.0]), EXAMPLE)])
    expect_dtype_and_device(answer, randn(5, 3), randn(5, 3))


def _wrong_full(gradient: Tensor, v: Tensor, magnitude: Tensor) -> list[tuple[Tensor, str]]:
    g, v, m = gradient.double(), v.double(), magnitude.double()[:, None]
    norm, dot = _lengths(v)[:, None], (g * v).sum(1, keepdim=True)
    f, along = m / norm, dot / norm**2 * v
    whole = v.norm()
    matrix = "V'V'^T is read as a matrix product: equation 6 speaks of one row, v v^T"
    return [
        (f * g, "nothing is removed: this is equation 11"),
        (f * along, "the other way round: return full, removed"),
        (f.abs() * (g - along), "the magnitude has lost its sign: a trained one may be negative"),
        (g - along, "the factor magnitude / ||V'|| is missing"),
        (m * (g - along), "not divided by ||V'||: the factor is magnitude / ||V'||"),
        ((g - along) / norm, "the magnitude is missing: the factor is magnitude / ||V'||"),
        (g - f * along, "the factor magnitude / ||V'|| is for all of it, gradient too"),
        (f * g - along, "the factor magnitude / ||V'|| is for all of it, what goes too"),
        (f * (g - dot * v), "the part along V' is not divided by ||V'||^2"),
        (f * (g - dot / norm * v), "the part along V' is divided by ||V'||, not ||V'||^2"),
        (f * (g + along), "the part along V' is added: it is what the full gradient lacks"),
        (f * (g - v @ v.T @ g / norm**2), matrix),
        (f * (g - v @ v.T @ g / whole**2), matrix),
        (m / whole * (g - v @ v.T @ g / whole**2), matrix),
        (f * (g - (g @ v.T / norm**2) @ v), "gradient V'^T pairs each row with all: row by row"),
        (f * (g - dot.sum() / whole**2 * v), "all rows are projected as one: row by row"),
        (
            f * (g - (g * v).sum(0) / v.norm(dim=0) ** 2 * v),
            "projected column by column (dim=0): there is one norm per row",
        ),
        (
            f * (g - dot / g.square().sum(1, keepdim=True) * g),
            "projected on the gradient: what goes is along V'",
        ),
    ]


@lesson.exercise(
    "5.6",
    title="What the full gradient removes",
    difficulty="hard",
    minutes=20,
    teaches="that equation 6 is meant row by row, and what a detached norm keeps (equation 11)",
    hint="A longer row of V' gives the same W'. So which part of the gradient can have no effect?",
)
def split_gradient(answer: Answer) -> None:
    def check(gradient: Tensor, v: Tensor, magnitude: Tensor, known: Known = ()) -> None:
        want, _ = _through(gradient, v, magnitude, detached=False)
        want_removed = _through(gradient, v, magnitude, detached=True)[0] - want
        parts = expect_parts(answer(gradient, v, magnitude), ("full", "removed"))
        full, removed = parts
        known = [*_wrong_full(gradient, v, magnitude), *known]
        expect(full, want, known, "full", "(out, in)")
        f = (magnitude.double() / _lengths(v))[:, None]
        known = [
            (want, "this is the full gradient again: return what it lacks"),
            (-want_removed, "the sign is wrong: full + removed is equation 11"),
            (
                want_removed / f,
                "the factor magnitude / ||V'|| is missing: full + removed is eq. 11",
            ),
            (f * gradient.double(), "this is all of equation 11: full + removed should be that"),
            (
                (want_removed / _lengths(v)[:, None] * v.double()).sum(1),
                "one number per row: return the part of the gradient, (out, in)",
            ),
        ]
        expect(removed, want_removed, known, "removed", "(out, in)")

    answer.case("by hand")
    check(
        torch.tensor([[5.0, 0.0, 1.0], [4.0, 0.0, 6.0]]),
        torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]),
        torch.tensor([10.0, 1.0]),
    )
    answer.case("random gradients")
    by_heart = torch.tensor([[6.4, -4.8, 2.0], [2.0, 0.0, 0.0]])
    for shape in SHAPES:
        magnitude = randn(shape[0]).abs() + 0.5
        magnitude[0] *= -1  # nothing keeps training from it
        check(randn(*shape), randn(*shape), magnitude, [(by_heart, EXAMPLE)])
    expect_dtype_and_device(answer, randn(5, 3), randn(5, 3), randn(5).abs() + 0.5)
