"""How weights move: magnitude and direction, measured as the paper's figure 2 does.

    Delta M = mean_n |m_n - m0_n|                  change in magnitude      (eq. 3)
    Delta D = mean_n (1 - cos(V_n, W0_n))          change in direction      (eq. 4)

n runs over the rows of PyTorch's (out, in) weight, one for each output neuron (the paper's
columns); dim=0 takes the inputs instead, for comparison. Both compare with the pretrained W0, not
with some optimum.

Reference:
    Liu et al. 2024, arXiv 2402.09353, sec. 3.2 (eqs. 3, 4), sec. 4.2 (eqs. 6, 11)
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidora.lora import LoRALinear


def magnitude_direction(weight: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Split a weight: (magnitude, direction), in float64.

    Args:
        weight: (out, in).
        dim: what the norm runs over: 1, the inputs (one magnitude per output, DoRA's), or 0.

    Returns:
        magnitude (out,) or (in,), and a direction of the shape of weight whose rows (columns)
        have length 1; a row of zeros has no direction and stays zero.
    """
    weight = weight.detach().double()
    magnitude = torch.linalg.vector_norm(weight, dim=dim)
    return magnitude, weight / magnitude.where(magnitude > 0, 1.0).unsqueeze(dim)


def delta_magnitude(weight: Tensor, reference: Tensor, dim: int = 1) -> float:
    """Delta M, eq. 3: the mean absolute difference of the norms. An absolute value: it says how
    far magnitudes moved, not whether they grew."""
    magnitude, _ = magnitude_direction(weight, dim)
    before, _ = magnitude_direction(_same_shape(reference, weight), dim)
    return float((magnitude - before).abs().mean())


def delta_direction(weight: Tensor, reference: Tensor, dim: int = 1) -> float:
    """Delta D, eq. 4: the mean of 1 - cos between rows, 0 for the same direction, at most 2.

    A row that is zero in both has not turned and counts 0; one that is zero in one of them has no
    angle to the other and counts 1, as if it were orthogonal.
    """
    magnitude, direction = magnitude_direction(weight, dim)
    old_magnitude, before = magnitude_direction(_same_shape(reference, weight), dim)
    turned = 1 - (direction * before).sum(dim)
    return float(turned.masked_fill((magnitude == 0) & (old_magnitude == 0), 0.0).mean())


def _same_shape(reference: Tensor, weight: Tensor) -> Tensor:
    if reference.shape != weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, reference {tuple(reference.shape)}: "
            "compare a weight with its own pretrained value"
        )
    return reference


def project_gradient(gradient: Tensor, v: Tensor, magnitude: Tensor, detached: bool) -> Tensor:
    """The gradient of V from that of W' = magnitude V / ||V||, row by row.

        detached:  m / ||v|| * gradient                                            (eq. 11)
        full:      m / ||v|| * (I - v v^T / ||v||^2) gradient                      (eq. 6)

    The full one is orthogonal to v: what would only make the row longer does not change W'. The
    detached one keeps that part.

    Args:
        gradient, v: (out, in). magnitude: (out,).
    """
    norm: Tensor = torch.linalg.vector_norm(v, dim=1, keepdim=True)  # (out, 1)
    if not detached:
        unit = v / norm
        gradient = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    return magnitude[:, None] / norm * gradient


def acting_weight(layer: nn.Linear | LoRALinear) -> Tensor:
    """The weight that a layer acts with: W' of an adapted one, not yet rounded to W's dtype."""
    return layer.adapted_weight() if isinstance(layer, LoRALinear) else layer.weight


class Point(NamedTuple):
    """One layer at one step: a dot of figure 2."""

    layer: str
    step: int
    delta_magnitude: float
    delta_direction: float


class Dot(NamedTuple):
    """A Point of one run among several: a dot of the paper's figure 2."""

    seed: int
    layer: str
    step: int
    delta_magnitude: float
    delta_direction: float


class Tracker:
    """Record Delta M and Delta D of chosen layers while a model trains.

        tracker = Tracker(model, ["q_proj", "v_proj"])       # before training: remembers W0
        ...; tracker.record(step)                            # whenever wanted
        tracker.points

    A plain layer is measured by its weight, an adapted one by W' (effective_weight). W0 is the
    weight a plain layer has when the tracker is made, and the frozen base of an adapted one.

    Args:
        model: it may be adapted already.
        layers: names, or ends of names after a dot, as in adapt's target_modules.

    Raises:
        ValueError: a name that matches no linear layer.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], dim: int = 1) -> None:
        self.dim = dim
        self.points: list[Point] = []
        self._layers: dict[str, nn.Linear | LoRALinear] = {}
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | LoRALinear) and not name.endswith(".base")
        }
        for entry in layers:
            found = {n: m for n, m in linear.items() if n == entry or n.endswith(f".{entry}")}
            if not found:
                raise ValueError(
                    f"{entry!r} matches no linear layer; there are {', '.join(linear) or 'none'}"
                )
            self._layers |= found
        self._before = {
            name: (layer.base.weight if isinstance(layer, LoRALinear) else layer.weight)
            .detach()
            .clone()
            for name, layer in self._layers.items()
        }

    @torch.no_grad()
    def record(self, step: int) -> None:
        """Add a point for each layer."""
        for name, layer in self._layers.items():
            # Not rounded to the dtype of W: the changes are small.
            weight, before = acting_weight(layer), self._before[name]
            self.points.append(
                Point(
                    name,
                    step,
                    delta_magnitude(weight, before, self.dim),
                    delta_direction(weight, before, self.dim),
                )
            )


class Correlation(NamedTuple):
    """Pearson's r, with the bounds of a bootstrap interval; n points in so many clusters."""

    r: float
    low: float
    high: float
    n: int


def correlation(
    x: Sequence[float],
    y: Sequence[float],
    clusters: Sequence[tuple[object, ...]],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Pearson's correlation with an interval that treats points of one cluster as dependent.

    Points of one layer at several steps lie on one path, and the layers of one run share its seed.
    The same layers occur under every seed: the two are crossed. So the bootstrap draws seeds with
    replacement and, apart from that, layers with replacement; a point counts as often as its seed
    was drawn times as often as its layer was (Owen 2007, the pigeonhole bootstrap).

    Args:
        x, y: the points.
        clusters: one tuple a point, all of the same length: (seed, layer) draws both, (seed,) asks
            about other seeds of these layers, (number of the point,) takes points as independent.
        level: of the percentile interval.

    Raises:
        ValueError: lengths that differ, fewer than 3 points, or a constant x or y.

    Reference: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1.
    """
    if not len(x) == len(y) == len(clusters):
        raise ValueError(f"{len(x)} x, {len(y)} y and {len(clusters)} clusters: one each a point")
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        raise ValueError("a correlation needs at least 3 points whose x and y both vary")
    points = torch.tensor([x, y], dtype=torch.float64)
    points = points - points.mean(1, keepdim=True)  # moves no r, and keeps the sums' digits
    sums = torch.stack(
        [points[0] ** 0, *points, *points**2, points[0] * points[1]], dim=1
    )  # (n, 6)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(resamples, len(x), dtype=torch.float64)
    for names in zip(*clusters, strict=True):  # of one kind: the seeds, then the layers
        kinds = {name: k for k, name in enumerate(dict.fromkeys(names))}
        drawn = torch.randint(len(kinds), (resamples, len(kinds)), generator=generator)
        times = torch.zeros(resamples, len(kinds), dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        weights *= times[:, [kinds[name] for name in names]]
    draws = _pearson(weights @ sums)
    draws = draws[draws.isfinite()]  # a draw may hold one cluster alone, whose points do not vary
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = draws.quantile(bounds).tolist()
    return Correlation(float(_pearson(sums.sum(0))), low, high, len(x))


def _pearson(sums: Tensor) -> Tensor:
    """r from the sums of 1, x, y, x^2, y^2, x y, (..., 6); NaN where x or y does not vary."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    vary_x, vary_y = xx - x * x / n, yy - y * y / n
    vary = (vary_x > 1e-12 * xx) & (vary_y > 1e-12 * yy)  # below that it is rounding
    return ((xy - x * y / n) / (vary_x * vary_y).abs().sqrt()).where(vary, torch.nan)
