"""What is computed once within a context that the user opened: norms, or the whole scale g.

Nothing is kept without being asked for, so nothing can go stale unseen. reuse_norms is for
training, where A, B and W stay the same for several passes; cached_scale is for generation. Both
refuse what would make the kept values wrong, and say what they cannot notice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minidora.dora import DoRALinear


def _refuse_loading(module: nn.Module, *_: Any) -> None:
    """A copy of a model takes this hook along, but no cached norm: there it does nothing."""
    for layer in module.modules():
        if isinstance(layer, DoRALinear):
            layer.refuse_while_cached("load_state_dict", "leave the context first")


@contextmanager
def _norms_held(model: nn.Module, layers: list[DoRALinear], hold_g: bool) -> Iterator[None]:
    """Hold each layer's norm, or its g too; refuse what would make them wrong."""

    def refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in stepped for p in model.parameters()):
            layers[0].refuse_while_cached("an optimizer's step", "step after it")

    before = [(layer.cached_norm, layer.cached_g) for layer in layers]
    # On every module, so that whichever is loaded refuses before it has changed anything.
    hooks = [m.register_load_state_dict_pre_hook(_refuse_loading) for m in model.modules()]
    hooks.append(register_optimizer_step_pre_hook(refuse_step))
    try:
        with torch.no_grad():
            for layer in layers:
                if layer.cached_norm is None:
                    layer.cached_norm = layer.weight_norm()
                if hold_g and layer.cached_g is None:
                    layer.cached_g = layer.magnitude_scale()
        yield
    finally:
        for layer, (norm, g) in zip(layers, before, strict=True):
            layer.cached_norm, layer.cached_g = norm, g
        for hook in hooks:
            hook.remove()


def _dora_layers(model: nn.Module, what: str) -> list[DoRALinear]:
    layers = [module for module in model.modules() if isinstance(module, DoRALinear)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no DoRALinear layer whose {what} could be kept"
        )
    return layers


@contextmanager
def reuse_norms(model: nn.Module) -> Iterator[None]:
    """Within it every DoRALinear uses a norm computed once, here: same results, bit for bit.

        with reuse_norms(model):
            for batch in micro_batches:
                loss(model(batch)).backward()
        optimizer.step()

    For what sees the same A, B and W several times: the micro-batches of one optimizer step, and
    the second forward pass of gradient checkpointing. The norm carries no gradient, so nothing
    is lost. An optimizer's step over the model's parameters, load_state_dict(), merge() and
    reset_parameters() are refused while it is open. It cannot notice another write to A, B or W:
    to .data, under torch.no_grad(), by .to(), or by an optimizer outside torch.optim.

    Raises:
        ValueError: the model has no DoRALinear.
        RuntimeError: within it, for what is refused.
    """
    with _norms_held(model, _dora_layers(model, "norm"), hold_g=False):
        yield


@contextmanager
def cached_scale(model: nn.Module) -> Iterator[None]:
    """Within it every DoRALinear of a model in evaluation mode uses a g computed once, here.

    For generation: one token costs as much as with LoRA, where the norm would cost more than the
    layer. What reuse_norms refuses is refused while it is open, and so are gradients and train();
    what reuse_norms cannot notice, it cannot either, for the magnitude too.

    Raises:
        ValueError: the model has no DoRALinear, or one that is in training mode.
        RuntimeError: within it, for what is refused.
    """
    layers = _dora_layers(model, "g")
    if any(layer.training for layer in layers):
        raise ValueError("cached_scale is for evaluation: call model.eval() first")
    modes = [(module, module.training) for module in model.modules()]
    try:
        with _norms_held(model, layers, hold_g=True):
            yield
    finally:
        for module, training in modes:  # a train() that was refused had reached some of them
            module.training = training
