"""Adapt a whole model: put LoRA or DoRA layers in place of its linear layers, and back.

    adapt(model, "dora", rank=8, alpha=16.0)     # in place; everything but the adapters is frozen
    with disable_adapters(model): ...            # the pretrained model answers
    merge(model); unmerge(model)                 # one weight per layer, and back, bit for bit
    merge_and_unload(model)                      # a plain model again

Which layers: see minidora/targets.py. What a layer must be: see Adapter.check_base.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidora.adapter import Adapter, check_arguments
from minidora.dora import DoRALinear
from minidora.lora import LoRALinear
from minidora.targets import check_places, names_inside, select_targets, values_by_name

METHODS: dict[str, type[Adapter]] = {"lora": LoRALinear, "dora": DoRALinear}
ADAPTED = ("lora_A", "lora_B", "magnitude", "lora_magnitude_vector")
SYNCHRONIZED = ("DistributedDataParallel", "FullyShardedDataParallel")


def adapt(
    model: nn.Module,
    method: str | type[Adapter] = "dora",
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Collection[str] = "all-linear",
    exclude_modules: str | Collection[str] | None = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    modules_to_save: str | Collection[str] | None = (),
) -> nn.Module:
    """Wrap the chosen nn.Linear layers of a model in place; freeze every other parameter.

    Args:
        model: any module that holds nn.Linear layers. It is changed and returned.
        method: "lora", "dora", or a class of adapters: one that derives from LoRALinear, say.
        rank, alpha, dropout, use_rslora: as in LoRALinear, for every layer.
        target_modules: a list matches exact names or ends of names ("q_proj" matches
            "layers.0.q_proj"), a string is a regular expression for the whole name, and
            "all-linear" takes every nn.Linear but the output head (see select_targets).
        exclude_modules: names or a regular expression, in the same way, to leave out, with all
            that is inside them.
        rank_pattern, alpha_pattern: {name: value} where a layer differs; a name is a regular
            expression for the whole name or for the end of it after a dot.
        modules_to_save: names or a regular expression, in the same way, of modules that are
            trained whole beside the adapters, such as a new classifier. They are trained in
            place: disable_adapters does not bring their old values back.

    Raises:
        TypeError: the model is itself an nn.Linear, or a target is not one.
        ValueError: an unknown method, a bad number, a name that matches nothing, a model that is
            adapted already, or a layer that cannot be adapted. The model is left as it was.
    """
    layer_class = METHODS.get(method) if isinstance(method, str) else method
    if not (isinstance(layer_class, type) and issubclass(layer_class, Adapter)):
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} or a class of adapters, got {method!r}"
        )
    _check_model(model, layer_class)
    saved = names_inside(model, modules_to_save, "modules_to_save")
    names = select_targets(
        model, target_modules, exclude_modules, kind=layer_class.adapts, saved=saved
    )
    ranks = values_by_name(names, rank_pattern or {}, rank, "rank_pattern")
    alphas = values_by_name(names, alpha_pattern or {}, alpha, "alpha_pattern")
    bases = {name: model.get_submodule(name) for name in names}
    for name, base in bases.items():  # all checks come before the first change
        try:
            layer_class.check_base(base)
            check_arguments(ranks[name], alphas[name], dropout)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    check_places(model, bases, {name: (ranks[name], alphas[name]) for name in names})

    # A layer that stands in the model under two names is wrapped once and stays shared.
    layers: dict[int, Adapter] = {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for name, base in bases.items():
            if id(base) not in layers:
                layers[id(base)] = layer_class(base, ranks[name], alphas[name], dropout, use_rslora)
    except BaseException:  # no memory left, or a warning that is an error: nothing is in place yet
        for parameter in trainable:
            parameter.requires_grad_(True)
        for layer in layers.values():
            layer.base.train(layer.training)
        raise
    model.requires_grad_(False)
    for name, base in bases.items():
        _put(model, name, layers[id(base)])
    for name in saved:
        module = model.get_submodule(name).requires_grad_(True)
        vars(module)["trained_whole"] = True  # adapter_state_dict reads it
    for module in list(model.modules()):  # whichever of them is loaded
        if not isinstance(module, Adapter) and any(True for _ in adapter_layers(module)):
            module.register_load_state_dict_pre_hook(_check_loading)
    return model


def merge(model: nn.Module) -> None:
    """Let every adapted layer answer with one weight W' (see Adapter.merge).

    Raises:
        ValueError: no adapted layer, or a W' that is not finite; then no layer is merged by it.
    """
    layers = _require_layers(model)
    before = [layer.merged_weight for _, layer in layers]
    try:
        for name, layer in layers:
            try:
                layer.merge()
            except ValueError as error:
                raise ValueError(f"{name}: {error}; no other layer was merged either") from None
    except BaseException:
        for (_, layer), weight in zip(layers, before, strict=True):
            layer.merged_weight = weight
        raise


def unmerge(model: nn.Module) -> None:
    """Undo merge: W was kept, so it is exact. Raises ValueError without an adapted layer."""
    for _, layer in _require_layers(model):
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Write W' into each base layer and drop the adapters; returns the plain model.

    In place, unless the model is itself an adapted layer. A base whose weight was computed
    (parametrized, pruned) becomes a layer with a weight of its own. Parameters stay frozen: call
    requires_grad_(True) to train on.

    Raises:
        ValueError: no adapted layer, or a W' that is not finite; the model is left as it was.
    """
    layers = _require_layers(model)
    merge(model)  # anew, so that a weight merged before the last step is not written
    for name, layer in layers:
        plain = layer.unload()
        if not name:
            return plain
        _put(model, name, plain)
    for module in model.modules():
        vars(module).pop("trained_whole", None)
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", None) is _check_loading:
                del module._load_state_dict_pre_hooks[key]
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within it the pretrained model answers, also when merged; then everything is as before."""
    layers = _require_layers(model)
    before = [layer.enabled for _, layer in layers]
    for _, layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for (_, layer), enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: the adapters, their scalings, and modules_to_save whole.

    Under the names they have in model.state_dict(), without gradients, a shared layer once. Load
    it into a model that was adapted in the same way: model.load_state_dict(adapters, strict=False).
    Values that belong to another model, method, rank or alpha are refused there by name, before
    anything is written. A model that was not adapted cannot notice them; torch then returns their
    names as unexpected_keys.
    """
    _require_layers(model)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, Adapter):
            for key, parameter in module.named_parameters(recurse=False):
                found[prefix + key] = parameter.detach()
            found[f"{prefix}scaling"] = torch.tensor(module.scaling, dtype=torch.float64)
        elif getattr(module, "trained_whole", False):
            module.state_dict(destination=found, prefix=prefix)
    return found


def _check_loading(model: nn.Module, state: Mapping[str, Any], prefix: str, *more: Any) -> None:
    """Before load_state_dict writes anything: refuse values that are not for these adapters.

    Raises:
        RuntimeError: naming the layers and what does not fit.
    """
    layers = {
        f"{prefix}{name}{'.' if name else ''}": layer for name, layer in adapter_layers(model)
    }
    problems = [
        f"{place.removesuffix('.')}: {reason}"
        for place, layer in layers.items()
        if (reason := layer.misfit(state, place))
    ]
    for key in (key for key in state if key.startswith(prefix)):
        owner, _, what = key.removesuffix(".weight").rpartition(".")
        if what in ADAPTED and f"{owner}." not in layers:
            problems.append(f"{key}: no adapter has this name")
    known = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    if state and not problems and not prefix and not any(key in state for key, _ in known):
        problems = [f"{key}: nothing has this name" for key in state]
    if problems:
        rest = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RuntimeError(
            "these values are not for this model, and nothing was loaded:\n  "
            + "\n  ".join(problems[:5])
            + f"{rest}\nadapt the model as it was when they were saved; its adapters are "
            + ", ".join(name.removesuffix(".") for name in list(layers)[:5])
        )


class ParameterCount(NamedTuple):
    """Numbers of parameters; percent is trainable in percent of total, adapters included."""

    trainable: int
    total: int
    percent: float


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count each parameter once, also where layers share it. Works on the meta device."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trainable = sum(size for size, requires_grad in sizes if requires_grad)
    return ParameterCount(trainable, total, 100.0 * trainable / total if total else 0.0)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(name, layer) of every adapted layer, under each of its names; "" for the model itself."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Adapter):
            yield name, module


def _require_layers(model: nn.Module) -> list[tuple[str, Adapter]]:
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRALinear or DoRALinear layer: call adapt first"
        )
    return layers


def _check_model(model: nn.Module, layer_class: type[Adapter]) -> None:
    """Refuse a model that cannot be adapted as a whole."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(getattr(model, "_orig_mod", model), layer_class.adapts):
        raise TypeError(
            f"the model is itself an nn.{layer_class.adapts.__name__} and cannot be replaced "
            f"inside itself: use {layer_class.__name__}(model, rank, alpha), or wrap it, "
            "nn.Sequential(model)"
        )
    modules = list(model.named_modules(remove_duplicate=False))
    adapted = [name for name, m in modules if isinstance(m, Adapter) or hasattr(m, "base_layer")]
    if adapted:
        raise ValueError(
            f"the model is adapted already ({adapted[0] or 'the model itself'}, {len(adapted)} "
            "layers in all): merge_and_unload(model) first, or adapt a fresh copy of the plain "
            "model"
        )
    for name, module in modules:
        if type(module).__name__ in SYNCHRONIZED:
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, which would not synchronize "
                "parameters that come later: adapt the model first, then wrap it"
            )


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set a layer in the place of the one of this name; one compiled by itself is compiled anew."""
    owner, _, key = name.rpartition(".")
    if key == "_orig_mod":
        compiled = model.get_submodule(owner)
        name, layer = owner, type(compiled)(layer, compiled.dynamo_ctx)
    model.set_submodule(name, layer)
