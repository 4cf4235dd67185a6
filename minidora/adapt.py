"""Adapt a whole model: put LoRA or DoRA layers in place of its linear layers, and back.

    adapt(model, "dora", rank=8, alpha=16.0)     # in place; everything but the adapters is frozen
    with disable_adapters(model): ...            # the pretrained model answers
    merge(model); unmerge(model)                 # one weight per layer, and back, bit for bit
    merge_and_unload(model)                      # a plain model again

Which layers: target_modules and its companions follow PEFT's LoraConfig, with one difference.
Every entry must match something, for a misspelt name that is passed over trains nothing.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from minidora.dora import DoRALinear
from minidora.lora import Adapter, LoRALinear, check_numbers

METHODS: dict[str, type[Adapter]] = {"lora": LoRALinear, "dora": DoRALinear}
Number = TypeVar("Number", int, float)
HEADS = ("lm_head", "head", "fc", "classifier")


def adapt(
    model: nn.Module,
    method: str | type[Adapter] = "dora",
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str | Collection[str] = "all-linear",
    exclude_modules: str | Collection[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
) -> nn.Module:
    """Wrap the chosen nn.Linear layers of a model in place; freeze every other parameter.

    Args:
        model: any module that holds nn.Linear layers. It is changed and returned.
        method: "lora", "dora", or a class of adapters: one that derives from LoRALinear, say.
        rank, alpha, dropout, use_rslora: as in LoRALinear, for every layer.
        target_modules: a list matches exact names or ends of names ("q_proj" matches
            "layers.0.q_proj"), a string is a regular expression for the whole name, and
            "all-linear" takes every nn.Linear but the output head.
        exclude_modules: names or a regular expression, in the same way, to leave out.
        rank_pattern, alpha_pattern: {name: value} where a layer differs; a name is a regular
            expression for the whole name or for the end of it after a dot.

    Raises:
        TypeError: the model is itself an nn.Linear, or a target is no nn.Linear.
        ValueError: an unknown method, a bad number, a name that matches nothing, or a model that
            is adapted already. The model is left as it was.
    """
    layer_class = METHODS.get(method) if isinstance(method, str) else method
    if not (isinstance(layer_class, type) and issubclass(layer_class, Adapter)):
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} or a class of adapters, got {method!r}"
        )
    if isinstance(model, nn.Linear):
        raise TypeError(
            "the model is itself an nn.Linear and cannot be replaced inside itself: "
            f"use {layer_class.__name__}(model, rank, alpha), or wrap it, nn.Sequential(model)"
        )
    if adapted := [name or "the model itself" for name, _ in adapter_layers(model)]:
        raise ValueError(
            f"the model is adapted already ({adapted[0]}, {len(adapted)} layers in all): "
            "merge_and_unload(model) first, or adapt a fresh copy of the plain model"
        )
    names = select_targets(model, target_modules, exclude_modules)
    ranks = _values_by_name(names, rank_pattern or {}, rank, "rank_pattern")
    alphas = _values_by_name(names, alpha_pattern or {}, alpha, "alpha_pattern")
    bases = {name: model.get_submodule(name) for name in names}
    for name, base in bases.items():  # all checks come before the first change
        try:
            layer_class.check_base(base)
            check_numbers(ranks[name], alphas[name], dropout)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None

    # A layer that stands in the model under two names is wrapped once and stays shared.
    layers: dict[int, Adapter] = {}
    model.requires_grad_(False)
    for name, base in bases.items():
        if id(base) not in layers:
            assert isinstance(base, nn.Linear)  # select_targets returns nothing else
            layer = layer_class(base, ranks[name], alphas[name], dropout, use_rslora)
            layers[id(base)] = layer.train(base.training)
        model.set_submodule(name, layers[id(base)])
    return model


def select_targets(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] = (),
) -> list[str]:
    """Names of the nn.Linear layers that adapt would wrap, in the model's order.

    Raises:
        TypeError: an entry names a module that is no nn.Linear.
        ValueError: an entry matches nothing, or nothing is left.
    """
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} holds no nn.Linear layer to adapt")
    if target_modules == "all-linear":
        head = _output_head(model)
        chosen = [name for name in linear if modules[name] is not head]
    elif isinstance(target_modules, str):
        chosen = _match(target_modules, linear, list(modules), "target_modules")
    else:
        chosen = _match(target_modules, list(modules), list(modules), "target_modules")
        if wrong := [name for name in chosen if name not in linear]:
            inside = [name for name in linear if name.startswith(wrong[0] + ".")]
            advice = f"; name the layers inside it: {', '.join(inside[:5])}" if inside else ""
            raise TypeError(
                f"target_modules names {wrong[0]}, a {type(modules[wrong[0]]).__name__}: "
                f"only nn.Linear can be adapted{advice}"
            )
    excluded = _match(exclude_modules, list(modules), list(modules), "exclude_modules")
    chosen = [name for name in chosen if name not in excluded]
    if not chosen:
        raise ValueError(
            "no layer is left to adapt: target_modules and exclude_modules (or the output head, "
            f"which 'all-linear' leaves out) cancel out; the linear layers are {', '.join(linear)}"
        )
    return chosen


def merge(model: nn.Module) -> None:
    """Let every adapted layer answer with one weight W' (see Adapter.merge).

    Raises:
        ValueError: no adapted layer, or a W' that is not finite; then no layer is merged by it.
    """
    layers = _require_layers(model)
    before = [layer.merged_weight for _, layer in layers]
    for name, layer in layers:
        try:
            layer.merge()
        except ValueError as error:
            for (_, done), weight in zip(layers, before, strict=True):
                done.merged_weight = weight
            raise ValueError(f"{name}: {error}; no other layer was merged either") from None


def unmerge(model: nn.Module) -> None:
    """Undo merge: W was kept, so it is exact. Raises ValueError without an adapted layer."""
    for _, layer in _require_layers(model):
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Write W' into each base layer and drop the adapters; returns the plain model.

    In place, unless the model is itself an adapted layer. Parameters stay frozen: call
    requires_grad_(True) to train on.

    Raises:
        ValueError: no adapted layer, or a W' that is not finite; the model is left as it was.
    """
    layers = _require_layers(model)
    merge(model)  # anew, so that a weight merged before the last step is not written
    for name, layer in layers:
        assert layer.merged_weight is not None
        # A new parameter: a weight tied to this one elsewhere (an embedding) keeps its values.
        layer.base.weight = nn.Parameter(layer.merged_weight, requires_grad=False)
        if not name:
            plain: nn.Module = layer.base
            return plain
    for name, layer in layers:
        model.set_submodule(name, layer.base.train(layer.training))
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
    """The adapters alone, under the names they have in model.state_dict(), without gradients.

    Load them with model.load_state_dict(adapters, strict=False).
    """
    return {
        f"{name}.{key}" if name else key: parameter.detach()
        for name, layer in _require_layers(model)
        for key, parameter in layer.named_parameters(recurse=False)
    }


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


def _output_head(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(get_output_embeddings):
        head = get_output_embeddings()
        return head if isinstance(head, nn.Module) else None
    children = dict(model.named_children())
    return next((children[name] for name in HEADS if name in children), None)


def _match(
    patterns: str | Collection[str], names: list[str], known: list[str], argument: str
) -> list[str]:
    """Those of names that a regular expression, or some entry of a list, matches."""
    if isinstance(patterns, str):
        try:
            found = [name for name in names if re.fullmatch(patterns, name)]
        except re.error as error:
            raise ValueError(f"{argument}={patterns!r} is no regular expression: {error}") from None
        missing = [] if found else [patterns]
    else:
        matches = {
            entry: [name for name in names if name == entry or name.endswith(f".{entry}")]
            for entry in patterns
        }
        missing = [entry for entry, hits in matches.items() if not hits]
        hits = {name for entry_hits in matches.values() for name in entry_hits}
        found = [name for name in names if name in hits]
    if missing:
        _raise_unmatched(missing, known, argument)
    return found


def _values_by_name(
    names: list[str], pattern: Mapping[str, Number], default: Number, argument: str
) -> dict[str, Number]:
    """The value of each name: that of the first key that matches it, else the default."""

    def matches(key: str, name: str) -> bool:
        return re.fullmatch(rf"(.*\.)?({key})", name) is not None

    unmatched = [key for key in pattern if not any(matches(key, name) for name in names)]
    if unmatched:
        _raise_unmatched(unmatched, names, argument)
    return {
        name: next((value for key, value in pattern.items() if matches(key, name)), default)
        for name in names
    }


def _raise_unmatched(missing: list[str], known: list[str], argument: str) -> None:
    """Name what matched nothing, and the nearest names that exist."""
    ends = {name.rsplit(".", 1)[-1] for name in known}
    nearest = {
        near for entry in missing for near in difflib.get_close_matches(entry, {*known, *ends}, n=3)
    }
    advice = (
        f"nearest names: {', '.join(sorted(nearest))}"
        if nearest
        else (f"the names are {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}")
    )
    raise ValueError(f"{argument}: {', '.join(map(repr, missing))} matches no module; {advice}")
