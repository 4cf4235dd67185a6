"""The probe of lesson 6: what a learner's function answers, and how many bytes it takes.

Apart from minidora/probe.py because it counts with LiveBytes. Nothing here knows a right answer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidora.memory import LiveBytes


def cost(
    answer: Callable[..., Any],
    args: list[Any],
    wrt: list[int],
    cotangent: Tensor,
    alone: bool = False,
) -> dict[str, Any]:
    """answer(*args), or answer.apply(*args) of an autograd.Function, with its bytes.

    Args:
        wrt: numbers of the arguments that need a gradient.
        cotangent: the gradients are those of sum(y * cotangent).
        alone: nobody but the answer holds its arguments, all of them tensors. What it keeps of
            them counts as held then.

    Returns:
        "value": y; "held": bytes that the forward pass leaves behind beside y and the arguments;
        "peak": the most that was alive at once in it; "gradients": one for each of wrt, or None;
        "changed": numbers of the arguments that forward wrote into (if alone), and len(args) where
        backward wrote into the cotangent.
    """
    leaves = list(args)
    for index in wrt:
        leaves[index] = args[index].detach().clone().requires_grad_()
    changed = []
    with LiveBytes() as live:
        given = [leaf.clone() for leaf in leaves] if alone else leaves
        value = getattr(answer, "apply", answer)(*given)
        if alone:
            pairs = enumerate(zip(given, leaves, strict=True))
            changed = [index for index, pair in pairs if not torch.equal(*pair)]
        del given
    held = live.now
    before = cotangent.clone()
    if isinstance(value, Tensor):
        held -= value.untyped_storage().nbytes()
        if value.requires_grad:
            torch.autograd.backward([value], [cotangent])
    if not torch.equal(cotangent, before):
        changed.append(len(args))
    return {
        "value": value,
        "held": held,
        "peak": live.peak,
        "gradients": [leaves[index].grad for index in wrt],
        "changed": changed,
    }
