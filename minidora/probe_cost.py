"""The probe of lesson 6: what a learner's function answers, and how many bytes it takes.

Apart from minidora/probe.py because it counts with LiveBytes. Nothing here knows a right answer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidora.memory import LiveBytes


def cost(
    answer: Callable[..., Any], args: list[Any], wrt: list[int], cotangent: Tensor
) -> dict[str, Any]:
    """answer(*args), or answer.apply(*args) of an autograd.Function, with its bytes.

    Args:
        wrt: numbers of the arguments that need a gradient.
        cotangent: the gradients are those of sum(y * cotangent).

    Returns:
        "value": y; "held": bytes that the forward pass leaves behind beside y and the arguments;
        "peak": the most that was alive at once in it; "gradients": one for each of wrt, or None.
    """
    leaves = list(args)
    for index in wrt:
        leaves[index] = args[index].detach().clone().requires_grad_()
    with LiveBytes() as live:
        value = getattr(answer, "apply", answer)(*leaves)
    held = live.now
    if isinstance(value, Tensor):
        held -= value.untyped_storage().nbytes()
        if value.requires_grad:
            torch.autograd.backward([value], [cotangent])
    gradients = [leaves[index].grad for index in wrt]
    return {"value": value, "held": held, "peak": live.peak, "gradients": gradients}
