"""What one training step of a layer costs, counted: FLOPs, bytes held, and most bytes alive.

    step_cost(forward, x, dy, trained)          # the same numbers on every machine
    held_tensors(forward(x), existing)          # which matrices autograd holds, and who holds them

The arithmetic that these are compared with stands in lesson 6.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from minidora.memory import LiveBytes

# The counter knows addmm, but not addmm_, which writes its sum in place.
IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]  # their shapes
}


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products in call(): 2 a b c for each (a, b) x (b, c)."""
    # Here, because it brings Triton along, which lesson 7 wants in its interpreter.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        call()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class StepCost:
    """What a forward and a backward pass cost.

    Attributes:
        held: bytes that the forward pass leaves for the backward pass, beside what existed before
            it and the output.
        peak: most bytes alive at once, made by the step.
        history: bytes alive after each operation.
        forward: how many operations of the history are the forward pass.
        flops: of the matrix products; 0 where only bytes are counted.
    """

    held: int
    peak: int
    history: list[int]
    forward: int
    flops: int = 0


def step_bytes(
    forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, trained: Iterable[Tensor]
) -> StepCost:
    """Run a training step and count its bytes.

    Args:
        forward: x -> y.
        dy: the gradient of y.
        trained: whose gradients are dropped before the step, with that of x, so that the step
            makes them anew.
    """
    for leaf in (x, *trained):
        leaf.grad = None
    gc.collect()  # what an earlier step left in a circle would be freed within this one
    with LiveBytes() as live:
        y = forward(x)
        held, operations = live.now - y.untyped_storage().nbytes(), len(live.history)
        torch.autograd.backward([y], [dy])
    return StepCost(held, live.peak, live.history, operations)


def step_cost(
    forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, trained: Iterable[Tensor]
) -> StepCost:
    """Run a training step twice, to count its bytes and its FLOPs. Args: as step_bytes."""
    cost = step_bytes(forward, x, dy, trained)
    flops = count_flops(lambda: torch.autograd.backward([forward(x)], [dy]))
    return replace(cost, flops=flops)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that were alive at once in call(), made by it."""
    with LiveBytes() as live:
        call()
    return int(live.peak)


def held_tensors(y: Tensor, existing: Iterable[Tensor]) -> dict[tuple[int, ...], list[list[str]]]:
    """The matrices that autograd holds for the backward pass of y: shape -> for each, who holds it.

    Who is a node of autograd's graph, such as "MulBackward0". A matrix that several nodes hold is
    there once. Vectors are left out, and what exists anyway; a transposed view counts as what it
    is a view of.
    """
    known = {tensor.untyped_storage()._cdata for tensor in existing}
    found: dict[int, tuple[tuple[int, ...], list[str]]] = {}
    for node in _nodes(y.grad_fn):
        for tensor in _saved(node):
            key = tensor.untyped_storage()._cdata
            if tensor.dim() == 2 and min(tensor.shape) > 1 and key not in known:
                transposed = tensor.stride(0) == 1
                shape = tuple(tensor.mT.shape if transposed else tensor.shape)
                found.setdefault(key, (shape, []))[1].append(node.name())
    held: dict[tuple[int, ...], list[list[str]]] = {}
    for shape, nodes in found.values():
        held.setdefault(shape, []).append(nodes)
    return held


def _nodes(last: Node | None) -> list[Node]:
    """The nodes of a graph, from its end to its beginning."""
    waiting, found = [last], []
    while waiting:
        node = waiting.pop(0)
        if node is not None and node not in found:
            found.append(node)
            waiting += [before for before, _ in node.next_functions]
    return found


def _saved(node: Any) -> list[Tensor]:
    """The tensors that a node holds; those of an autograd.Function are called saved_tensors."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    saved = [getattr(node, name) for name in names] + list(getattr(node, "saved_tensors", ()))
    return [tensor for tensor in saved if isinstance(tensor, Tensor)]
