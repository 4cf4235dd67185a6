"""The gradients that reach the weights of a text model: what lesson 5 holds the paper against.

G = weight_gradients(model, layers, windows)    # one (out, in) a layer, of one batch
for windows in batches(text, 64): ...
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora.data import random_windows
from minidora.loop import mode, place_of
from minidora.lora import LoRALinear


def batches(text: Tensor, count: int, size: int = 16, context: int = 64) -> Iterator[Tensor]:
    """So many batches of random windows of a text, (size, context + 1) each, always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield random_windows(text, size, context + 1, generator)


def weight_gradients(
    model: nn.Module, layers: Sequence[nn.Linear | LoRALinear], windows: Tensor
) -> list[Tensor]:
    """G of each layer: the gradient of one batch's loss for the weight that the layer acts with.

    For an adapted layer that is W', which the layer itself need never build.

    Args:
        windows: (batch, context + 1) characters; the last of each is predicted, too.

    Returns:
        (out, in) a layer, in float64.
    """
    weights = [
        (layer.effective_weight() if isinstance(layer, LoRALinear) else layer.weight)
        .detach()
        .requires_grad_()
        for layer in layers
    ]

    def act(weight: Tensor, layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        bias: Any = layer.bias
        return F.linear(inputs[0], weight, bias)

    hooks = [
        layer.register_forward_hook(partial(act, weight))
        for layer, weight in zip(layers, weights, strict=True)
    ]
    try:
        with mode(model, training=False), torch.enable_grad():
            windows = windows.to(place_of(model))
            logits = model(windows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            return [gradient.double() for gradient in torch.autograd.grad(loss, weights)]
    finally:
        for hook in hooks:
            hook.remove()
