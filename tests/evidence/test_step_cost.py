"""What a step costs, against arithmetic worked out by hand, for a layer of two plain products."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidora.evidence import bench
from minidora.evidence.step_cost import count_flops, held_tensors, peak_bytes, step_cost
from minidora.memory import LiveBytes

T, IN, OUT, RANK = 24, 32, 48, 4
W = torch.randn(OUT, IN)
A = torch.randn(RANK, IN, requires_grad=True)
B = torch.randn(OUT, RANK, requires_grad=True)
x = torch.randn(T, IN, requires_grad=True)
dy = torch.randn(T, OUT)


def lora(x: Tensor) -> Tensor:
    return F.linear(x, W) + F.linear(F.linear(x, A), B)


def merged(x: Tensor) -> Tensor:
    return F.linear(x, W + B @ A)


def test_flops_are_those_of_the_products() -> None:
    assert count_flops(lambda: W @ A.T) == 2 * OUT * IN * RANK
    with torch.no_grad():
        total = torch.zeros(OUT, RANK)
        assert count_flops(lambda: total.addmm_(W, A.T)) == 2 * OUT * IN * RANK
        assert count_flops(lambda: total.mul_(2)) == 0


def test_a_step_is_counted_in_both_passes() -> None:
    layer, low = 2 * T * IN * OUT, 2 * T * RANK * (IN + OUT)
    cost = step_cost(lora, x, dy, (A, B))
    assert cost.flops == 2 * layer + 3 * low  # the frozen W needs no gradient
    assert cost.held == 4 * T * RANK  # x A^T, for the gradient of B
    full = step_cost(merged, x, dy, (A, B))
    assert full.flops == 3 * layer + 3 * 2 * OUT * RANK * IN
    assert full.held == 4 * OUT * IN  # the new weight, for the gradient of x


@pytest.mark.slow
def test_a_step_makes_its_gradients_anew() -> None:
    """Gradients left by an earlier step would be added to, and not be made by this one."""
    for leaf in (x, A, B):
        leaf.grad = None
    first = step_cost(lora, x, dy, (A, B))
    assert A.grad is not None
    assert step_cost(lora, x, dy, (A, B)) == first
    assert first.peak == max(first.history)


def test_the_history_is_split_where_the_forward_pass_ends() -> None:
    cost = step_cost(lora, x, dy, (A, B))
    with LiveBytes() as live:
        y = lora(x)
    assert cost.history[: cost.forward] == live.history
    assert cost.held == live.now - y.nbytes
    assert len(cost.history) > cost.forward


def test_the_peak_of_a_call() -> None:
    assert peak_bytes(lambda: (W + 1).sum()) == 4 * OUT * IN + 4
    assert peak_bytes(lambda: W.T) == 0


def test_held_tensors_name_what_and_who() -> None:
    existing = (x, W, A, B)
    assert held_tensors(lora(x), existing) == {(T, RANK): [["MmBackward0"]]}
    V = W + B @ A
    norm = V.norm(dim=1, keepdim=True)
    y = F.linear(x, V / norm)
    held = held_tensors(y, existing)
    assert set(held) == {(OUT, IN)}  # the weight is held transposed, and counts as what it is
    assert sorted(held[OUT, IN]) == [["DivBackward0", "LinalgVectorNormBackward0"], ["MmBackward0"]]
    assert held_tensors(y.detach(), existing) == {}
    # Where nothing is known to exist anyway, x, A and B are held too, each once.
    assert {(T, IN), (RANK, IN), (OUT, RANK)} <= set(held_tensors(lora(x), ()))


def test_held_tensors_of_a_function_of_ones_own() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):  # type: ignore[no-untyped-def]
            doubled = 2 * a
            ctx.save_for_backward(doubled)
            return a**2

        @staticmethod
        def backward(ctx, d):  # type: ignore[no-untyped-def]
            return ctx.saved_tensors[0] * d

    assert held_tensors(Square.apply(A), (A,)) == {(RANK, IN): [["SquareBackward"]]}


def test_ratios_are_printed_beside_lora() -> None:
    forms = {"LoRA": 1, "a longer name": 2}
    lines = bench.ratios(forms, lambda form: sum(range(1000 * form)), torch.device("cpu"), 0.0)
    first, second = lines.splitlines()
    assert first == "LoRA            1.00 times LoRA's (quartiles 1.00 to 1.00)"
    assert second.startswith("a longer name  ")


def test_a_form_without_a_yardstick_is_an_error() -> None:
    with pytest.raises(KeyError, match="LoRA"):
        bench.ratios({"DoRA": 1}, lambda _: None, torch.device("cpu"), 0.0)
