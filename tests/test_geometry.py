"""Magnitude and direction against numbers worked by hand, scipy and autograd."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from minidora import DoRALinear, LoRALinear
from minidora.geometry import (
    Tracker,
    correlation,
    delta_direction,
    delta_magnitude,
    magnitude_direction,
    project_gradient,
)

W0 = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
W = torch.tensor([[6.0, 8.0, 0.0], [0.0, 1.0, 0.0]])


def test_equations_3_and_4_by_hand() -> None:
    # Row norms 5, 2 become 10, 1; the first keeps its direction, the second turns by 90 degrees.
    assert delta_magnitude(W, W0) == pytest.approx((5 + 1) / 2, abs=1e-15)
    assert delta_direction(W, W0) == pytest.approx((0 + 1) / 2, abs=1e-15)
    # Column norms 3, 4, 2 become 6, sqrt(65), 0; the columns' cosines are 1, 8 / sqrt(65), none.
    expected = (3 + math.sqrt(65) - 4 + 2) / 3
    assert delta_magnitude(W, W0, dim=0) == pytest.approx(expected, abs=1e-15)
    assert delta_direction(W, W0, dim=0) == pytest.approx((2 - 8 / math.sqrt(65)) / 3, abs=1e-15)


def test_magnitude_direction_multiplies_back() -> None:
    weight = torch.randn(5, 7)
    weight[2] = 0.0
    for dim in (0, 1):
        magnitude, direction = magnitude_direction(weight, dim)
        assert magnitude.dtype == torch.float64
        torch.testing.assert_close(magnitude.unsqueeze(dim) * direction, weight.double())
        lengths = direction.norm(dim=dim)
        assert ((lengths - 1).abs() < 1e-12).logical_or(magnitude == 0).all()
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3\), reference \(3, 2\)"):
        delta_magnitude(W, W0.T)


@pytest.mark.parametrize("detached", [True, False])
def test_equations_6_and_11_against_autograd(detached: bool) -> None:
    torch.manual_seed(0)
    v = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    magnitude, gradient = torch.rand(5).double() + 0.5, torch.randn(5, 7, dtype=torch.float64)
    norm = v.norm(dim=1, keepdim=True)
    weight = magnitude[:, None] * v / (norm.detach() if detached else norm)
    expected = torch.autograd.grad(weight, v, gradient)[0]
    ours = project_gradient(gradient, v.detach(), magnitude, detached)
    torch.testing.assert_close(ours, expected)
    assert ((ours * v).sum(1).abs().max() < 1e-12) is not detached


def test_rows_of_zeros_turn_only_where_they_were_none() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert delta_direction(weight, weight) == pytest.approx(0, abs=1e-15)
    assert delta_direction(torch.zeros(2, 2), weight) == pytest.approx((1 + 0) / 2)


@pytest.mark.slow
def test_correlation_equals_scipy_and_its_interval_widens_with_dependence() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator, dtype=torch.float64)
    y = 0.5 * x + torch.randn(200, generator=generator, dtype=torch.float64)
    points = x.tolist(), y.tolist()
    independent = correlation(*points, clusters=[(i,) for i in range(200)])
    oracle = scipy.stats.pearsonr(*points)
    assert independent.r == pytest.approx(oracle.statistic, abs=1e-12)
    interval = oracle.confidence_interval(0.95)  # Fisher's, for independent points
    assert independent.low == pytest.approx(interval.low, abs=0.03)
    assert independent.high == pytest.approx(interval.high, abs=0.03)
    # The same points four times over hold no more evidence: the interval must not shrink.
    repeated = correlation(x.tolist() * 4, y.tolist() * 4, [(i % 200,) for i in range(800)])
    assert repeated.r == pytest.approx(independent.r, abs=1e-12)
    width = independent.high - independent.low
    assert repeated.high - repeated.low == pytest.approx(width, rel=0.1)
    naive = correlation(x.tolist() * 4, y.tolist() * 4, [(i,) for i in range(800)])
    assert naive.high - naive.low < 0.65 * width


def test_correlation_draws_seeds_and_layers_apart() -> None:
    """Two seeds with opposite slopes: which are drawn decides the sign, so no sign is sure."""
    x = [float(i) for i in range(10)] * 2
    y = [float(i) for i in range(10)] + [9.0 - i for i in range(10)]
    clusters = [(seed, i // 5) for seed in (0, 1) for i in range(10)]
    found = correlation(x, y, clusters)
    assert abs(found.r) < 1e-12
    assert found.low < -0.9
    assert found.high > 0.9
    assert found == correlation(x, y, clusters)  # the same seed, the same interval


def test_layers_that_every_seed_shares_do_not_average_out() -> None:
    """One of two layers has the slope -1, in each of 40 seeds alike: more seeds do not make a sign
    surer that the layer decides. Drawn in each seed anew (nested), the layers would average out."""
    points = [
        (seed, layer, x, x if layer else -x)
        for seed in range(40)
        for layer in (0, 1)
        for x in (-1.0, 0.0, 1.0)
    ]
    x, y = [p[2] for p in points], [p[3] for p in points]
    crossed = correlation(x, y, [p[:2] for p in points])
    assert (crossed.low, crossed.high) == (pytest.approx(-1.0), pytest.approx(1.0))
    seeds = correlation(x, y, [p[:1] for p in points])
    assert (seeds.low, seeds.high) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))
    nested = correlation(x, y, [(f"{p[0]} {p[1]}",) for p in points])
    assert -0.4 < nested.low < nested.high < 0.4


def test_crossed_draws_are_those_of_a_loop() -> None:
    """The interval against a plain pigeonhole bootstrap, drawn one by one with numpy."""
    generator = np.random.default_rng(0)
    layer = generator.normal(size=(1, 5, 1))
    x = 1 + layer + generator.normal(size=(8, 5, 4))
    y = 2 * layer + generator.normal(size=(8, 5, 1)) + generator.normal(size=(8, 5, 4))
    draws = []
    for _ in range(2000):
        pick = np.ix_(generator.integers(8, size=8), generator.integers(5, size=5))
        draws.append(np.corrcoef(x[pick].ravel(), y[pick].ravel())[0, 1])
    clusters = [(seed, k) for seed in range(8) for k in range(5) for _ in range(4)]
    found = correlation(x.ravel().tolist(), y.ravel().tolist(), clusters)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.05)
    assert found.high == pytest.approx(high, abs=0.05)


@pytest.mark.parametrize(
    ("x", "y", "clusters", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], [(0,), (1,)], "at least 3 points"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [(0,), (1,), (2,)], "both vary"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], [(0,), (1,), (2,)], "3 x, 2 y and 3 clusters"),
    ],
)
def test_correlation_refuses(
    x: list[float], y: list[float], clusters: list[tuple[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        correlation(x, y, clusters)


@pytest.mark.parametrize("kind", [nn.Linear, LoRALinear, DoRALinear])
def test_tracker_equals_the_equations(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(7, 5)
    before = layer.weight.detach().double()
    if kind is not nn.Linear:
        layer = kind(layer, 2, 3.0)
    model = nn.ModuleDict({"block": nn.ModuleDict({"q_proj": layer}), "head": nn.Linear(5, 2)})
    tracker = Tracker(model, ["q_proj"])
    tracker.record(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tracker.record(3)
    if isinstance(layer, LoRALinear):
        after = before + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
        if isinstance(layer, DoRALinear):
            after *= (layer.magnitude.double() / after.norm(dim=1))[:, None]
    else:
        after = layer.weight.double()  # type: ignore[union-attr, operator]
    start, end = tracker.points
    assert (start.layer, start.step, end.step) == ("block.q_proj", 0, 3)
    assert start.delta_magnitude == pytest.approx(0, abs=1e-7)
    assert start.delta_direction == pytest.approx(0, abs=1e-7)
    moved = (after.norm(dim=1) - before.norm(dim=1)).abs().mean().item()
    turned = (1 - torch.cosine_similarity(after, before, dim=1)).mean().item()
    assert end.delta_magnitude == pytest.approx(moved, rel=1e-5)
    assert end.delta_direction == pytest.approx(turned, rel=1e-5)
    with pytest.raises(ValueError, match=r"'v_proj' matches no .* block.q_proj, head"):
        Tracker(model, ["v_proj"])
