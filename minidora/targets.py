"""Which layers of a model are adapted: by name, by pattern, or all but the output head.

The rules are those of PEFT's LoraConfig, with one difference. Every entry must match something,
for a misspelt name that is passed over trains nothing.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

Number = TypeVar("Number", int, float)
HEADS = (
    "lm_head",
    "head",
    "heads",
    "fc",
    "classifier",
    "classification_head",
    "score",
    "qa_outputs",
)


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
    excluded = {*names_inside(model, exclude_modules, "exclude_modules"), *saved}
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


def names_inside(
    model: nn.Module, patterns: str | Collection[str] | None, argument: str
) -> list[str]:
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


def values_by_name(
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


def check_places(
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
