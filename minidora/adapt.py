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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from minidora.dora import DoRALinear
from minidora.lora import Adapter, LoRALinear, check_numbers, weight_hook

METHODS: dict[str, type[Adapter]] = {"lora": LoRALinear, "dora": DoRALinear}
Number = TypeVar("Number", int, float)
HEADS = ("lm_head", "head", "heads", "fc", "classifier", "classification_head", "score")
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
    saved = _inside(model, modules_to_save, "modules_to_save")
    names = select_targets(
        model, target_modules, exclude_modules, kind=layer_class.adapts, saved=saved
    )
    ranks = _values_by_name(names, rank_pattern or {}, rank, "rank_pattern")
    alphas = _values_by_name(names, alpha_pattern or {}, alpha, "alpha_pattern")
    bases = {name: model.get_submodule(name) for name in names}
    for name, base in bases.items():  # all checks come before the first change
        try:
            layer_class.check_base(base)
            check_numbers(ranks[name], alphas[name], dropout)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    _check_places(model, bases, {name: (ranks[name], alphas[name]) for name in names})

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
    model.register_load_state_dict_pre_hook(_check_loading)
    return model


def select_targets(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None = (),
    *,
    kind: type[nn.Module] = nn.Linear,
    saved: Collection[str] = (),
) -> list[str]:
    """Names of the layers of a kind that adapt would wrap, in the model's order.

    "all-linear" leaves the output head out: what the model's get_output_embeddings() returns, else
    the last layer, if it is or belongs to a child of the model with a head's name (HEADS).
    Wrappers around the model, such as torch.compile's, are looked through. Layers inside a module
    that is saved whole are left out too.

    Raises:
        TypeError: an entry names a module of another kind.
        ValueError: an entry matches nothing, nothing is left, or it is not clear what the head is.
    """
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    linear: list[str] = []
    for name, module in modules.items():
        inner = linear and name.startswith(f"{linear[-1]}.")  # of a parametrization, say
        if isinstance(module, kind) and not inner:
            linear.append(name)
    if not linear:
        raise ValueError(f"{type(model).__name__} holds no nn.{kind.__name__} layer to adapt")
    excluded = {*_inside(model, exclude_modules, "exclude_modules"), *saved}
    if target_modules == "all-linear":
        head = _output_head(model, linear, excluded)
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
                f"only nn.{kind.__name__} can be adapted{advice}"
            )
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
    for _, layer in layers:
        _write(layer)
    for name, layer in layers:
        plain: nn.Module = layer.base.train(layer.training)
        if not name:
            return plain
        _put(model, name, plain)
    for module in model.modules():
        vars(module).pop("trained_whole", None)
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", None) is _check_loading:
                del module._load_state_dict_pre_hooks[key]
    return model


def _write(layer: Adapter) -> None:
    """Make W', merged before, a parameter of the base, in the place of whatever its weight was."""
    base, weight = layer.base, layer.merged_weight
    assert weight is not None
    hook = weight_hook(base)
    if parametrize.is_parametrized(base, "weight"):
        parametrize.remove_parametrizations(base, "weight")
    elif hook is not None:
        removals = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}
        removals.get(type(hook), prune.remove)(base, "weight")
    # A new parameter: a weight tied to this one elsewhere (an embedding) keeps its values.
    del base.weight
    base.weight = nn.Parameter(weight, requires_grad=False)


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


def _check_places(
    model: nn.Module, bases: Mapping[str, nn.Module], numbers: Mapping[str, tuple[int, float]]
) -> None:
    """Refuse a layer that the model would still reach, unadapted, in another way."""
    names = {id(base): name for name, base in bases.items()}
    for owner, module in model.named_modules(remove_duplicate=False):
        name = names.get(id(module), owner)
        if name != owner and (owner not in bases or numbers[owner] != numbers[name]):
            raise ValueError(
                f"{owner} and {name} are one layer under two names: target both, or neither, "
                "and with the same rank and alpha"
            )
        for key, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value
            for item in held if isinstance(value, dict | list | tuple | set) else (held,):
                if id(item) in names and key != "_modules":
                    raise ValueError(
                        f"{names[id(item)]}: {type(module).__name__}.{key} holds this layer too, "
                        "where an adapter cannot take its place: use nn.ModuleList or nn.ModuleDict"
                    )


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set a layer in the place of the one of this name; one compiled by itself is compiled anew."""
    owner, _, key = name.rpartition(".")
    if key == "_orig_mod":
        compiled = model.get_submodule(owner)
        name, layer = owner, type(compiled)(layer, compiled.dynamo_ctx)
    model.set_submodule(name, layer)


def _output_head(model: nn.Module, linear: list[str], excluded: set[str]) -> nn.Module | None:
    """The layer whose output is the model's answer, where model or names tell (select_targets)."""
    for module in model.modules():
        get_output_embeddings = getattr(module, "get_output_embeddings", None)
        head = get_output_embeddings() if callable(get_output_embeddings) else None
        if isinstance(head, nn.Module):
            return head
    prefix, inner = "", model  # look through wrappers: modules that add no parameters of their own
    while True:
        children = [c for c in inner.named_children() if any(True for _ in c[1].parameters())]
        if len(children) != 1 or isinstance(children[0][1], nn.Linear):
            break
        prefix, inner = f"{prefix}{children[0][0]}.", children[0][1]
    named = [name for name in linear if name.removeprefix(prefix).split(".")[0] in HEADS]
    if linear[-1] in named:
        return model.get_submodule(linear[-1])
    if named and excluded.isdisjoint((*named, linear[-1])):
        raise ValueError(
            f"which layer is the output head? {named[-1]} has a head's name, but {linear[-1]} "
            "comes after it: leave the head out with exclude_modules, or name the layers to adapt"
        )
    return None


def _inside(model: nn.Module, patterns: str | Collection[str] | None, argument: str) -> list[str]:
    """Names of the modules that match, and of all modules inside them."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    matched = _match(patterns or (), names, names, argument)
    return [n for n in names if any(n == m or n.startswith(f"{m}.") for m in matched)]


def _match(
    patterns: str | Collection[str], names: list[str], known: list[str], argument: str
) -> list[str]:
    """Those of names that a regular expression, or some entry of a list, matches."""
    if not isinstance(patterns, Collection) or isinstance(patterns, bytes):
        raise TypeError(f"{argument} must be names or a regular expression, got {patterns!r}")
    if isinstance(patterns, str):
        try:
            found = [name for name in names if re.fullmatch(patterns, name)]
        except re.error as error:
            raise ValueError(
                f"{argument}={patterns!r} is not a regular expression: {error}"
            ) from None
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

    try:
        unmatched = [key for key in pattern if not any(matches(key, name) for name in names)]
    except re.error as error:
        raise ValueError(
            f"{argument}: {error.pattern!r} is not a regular expression: {error}"
        ) from None
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
