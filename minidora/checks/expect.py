"""Expectations: each refuses an answer in one line, "expected ..., got ...", or lets it pass.

`known` lists what usual mistakes would give, each with what to say to whoever made them.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Refused, kind_of
from minidora.runner import probe
from minidora.training import device

Known = Iterable[tuple[Tensor, str]]
"""(value, message): what usual mistakes would give, and what to say to whoever made them."""

Numbers = Iterable[tuple[float, str]]
"""The same for an answer that is a plain number."""


def require(condition: bool, message: str) -> None:
    """Refuse with this message unless the condition holds."""
    if not condition:
        raise Refused(message)


NOTHING = "got None: end with `return ...` (print gives nothing back)"


def expect(got: Any, want: Tensor, known: Known = (), name: str = "", shape: str = "") -> None:
    """Refuse unless got is a tensor of want's shape and values, up to the rounding of its dtype.

    Args:
        known: usual mistakes, tried first. Where one gives the right value, as it may in a
            special case, it is passed over.
        name: what to call it, where the answer has several parts.
        shape: the shape in words, "(out,)".
    """
    name = f"{name}: " if name else ""
    require(got is not None, name + NOTHING)
    require(isinstance(got, Tensor), f"{name}expected a tensor, got {kind_of(got)}")
    require(not got.is_meta, f"{name}the tensor is on the meta device: it holds no numbers")
    require(not got.dtype.is_complex, f"{name}expected real numbers, got {type_name(got.dtype)}")
    if same(got, want):
        return
    for value, message in known:
        if same(got, value):
            picture = (got, want) if got.shape == want.shape and want.ndim == 2 else None
            raise Refused(name + message, known=True, picture=picture)
    wanted = f"{shape} = {_tuple(want.shape)}" if shape else _tuple(want.shape)
    if got.shape != want.shape and got.numel() == want.numel() and 1 in want.shape:
        message = f"{name}expected the shape {wanted}, got {_tuple(got.shape)}"
        require(got.squeeze().shape != want.squeeze().shape, f"{message}: does squeeze() drop it?")
    require(got.shape == want.shape, f"{name}expected the shape {wanted}, got {_tuple(got.shape)}")
    raise Refused(name + _difference(got, want), picture=(got, want) if want.ndim == 2 else None)


def expect_number(
    got: Any, want: float, known: Numbers = (), name: str = "", tolerance: float = 0.0
) -> None:
    """As expect, for a plain number; tolerance is relative, and absolute below 1."""
    name = f"{name}: " if name else ""
    require(got is not None, name + NOTHING)
    require(
        not isinstance(got, Tensor),
        f"{name}expected a plain number, got a tensor: .item() gives its number",
    )
    plain = isinstance(got, int | float) and not isinstance(got, bool)
    require(plain, f"{name}expected a plain number, got {kind_of(got)}")

    def near(value: float) -> bool:
        return bool(got == value) or math.isclose(got, value, rel_tol=tolerance, abs_tol=tolerance)

    if near(want):
        return
    for value, message in known:
        if near(value):
            raise Refused(name + message, known=True)
    raise Refused(f"{name}expected {{}}, got {{}}".format(*_apart(want, got)))


def expect_words(
    got: Any, want: list[str], known: Iterable[tuple[list[str], str]] = (), name: str = ""
) -> None:
    """Refuse unless got is this list of words, in this order."""
    name = f"{name}: " if name else ""
    require(got is not None, name + NOTHING)
    require(isinstance(got, list | tuple), f"{name}expected a list of names, got {kind_of(got)}")
    if list(got) == want:
        return
    for value, message in known:
        if list(got) == value:
            raise Refused(name + message, known=True)
    expected, found = (", ".join(map(str, words)) or "nothing" for words in (want, got))
    require(False, f"{name}expected {expected}; got {found}")


def expect_parts(got: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """The parts of an answer that is a tuple (or list) of so many."""
    wanted = ", ".join(names)
    require(got is not None, f"got None: end with `return {wanted}` (print gives nothing back)")
    require(isinstance(got, tuple | list), f"expected a tuple ({wanted}), got {kind_of(got)}")
    require(len(got) == len(names), f"expected {len(names)} parts ({wanted}), got {len(got)}")
    return tuple(got)


def expect_module(got: Any, kind: str) -> probe.Module:
    """The answer as a module of that class, or one that derives from it."""
    require(got is not None, f"got None: end with `return ...`, an nn.{kind}")
    require(isinstance(got, probe.Module), f"expected an nn.{kind}, got {kind_of(got)}")
    require(kind in got.kinds, f"expected an nn.{kind}, got {got.kinds[0]}")
    assert isinstance(got, probe.Module)
    return got


def expect_parameter(got: Any, name: str, shape: tuple[int, ...], axes: str) -> None:
    """Refuse unless got is a trainable parameter of this shape."""
    require(isinstance(got, Tensor), f"{name} is not a tensor, but {kind_of(got)}")
    have, is_parameter = tuple(got.shape), isinstance(got, nn.Parameter)
    require(have == shape, f"expected {name} of shape {axes} = {shape}, got {have}")
    plain = f"{name} is a plain tensor: no optimizer sees it unless it is an nn.Parameter"
    require(is_parameter, plain)
    require(got.requires_grad, f"{name} is frozen: it is there to be trained")


def expect_gradient(got: Any, want: Tensor, name: str, known: Known = ()) -> None:
    """As expect, for the gradient of the argument or parameter called name."""
    require(
        isinstance(got, Tensor),
        f"no gradient reaches {name}: something on its way is detached, or under no_grad",
    )
    expect(got, want, known, f"gradient of {name}")


def expect_dtype(got: Tensor, want: torch.dtype) -> None:
    require(
        got.dtype == want,
        f"a {type_name(got.dtype)} result for {type_name(want)} arguments: "
        "new tensors take the dtype of an argument",
    )


def expect_device(answer: Answer, *args: Any, x: Tensor | None = None) -> None:
    """Refuse unless results are on the device of the arguments, which is not the CPU.

    It is the GPU if there is one, else probe.away's. x: what a layer then takes.
    """
    answer.case("device")
    gpu = "" if device().type == "cpu" else str(device())
    message, where = "works on a CPU only: make new tensors on the device of an argument", ""
    try:
        result = answer.probe(probe.away, *args, x=x, gpu=gpu)
        on_cpu = any(part.device.type == "cpu" for part in tensors(result))
    except Refused as refused:
        if "device" not in refused.message:
            raise
        on_cpu, where = True, refused.where
    if on_cpu:
        raise Refused(message, where=where, helped=False)


def expect_nothing_changed(
    answer: Answer,
    *args: Any,
    but: Sequence[str] = (),
    look: Callable[..., list[str]] = probe.surroundings,
) -> None:
    """Refuse an answer that changes its arguments, or torch's state; `but` is allowed.

    With probe.torch_state as the look, its arguments are its own.
    """
    answer.case("nothing else changed")
    for thing in answer.probe(look, *args):
        require(thing in but, f"it changes {thing}: leave that as it is")


# ---- Small tools ----

# New numbers each time: an answer that holds the last ones is no answer.
dice = random.Random()
generator = torch.Generator()
generator.seed()


def repeat_draws(seed: int) -> None:
    """Draw the same from here on as after any other call with this seed: for the tests."""
    dice.seed(seed)
    generator.manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, without touching the learner's random state."""
    return torch.randn(shape, generator=generator, dtype=dtype)


def multiples(*shape: int, steps: int, unit: float) -> Tensor:
    """Random multiples of unit, up to `steps` of them: sums and products of few are exact."""
    return (steps * (2 * torch.rand(shape, generator=generator) - 1)).round() * unit


def random_size(low: int, high: int) -> int:
    """A size from low to high - 1 that no answer can know by heart."""
    return dice.randrange(low, high)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal shapes, and values equal up to rounding; a NaN equals nothing."""
    exact = got.dtype == want.dtype == torch.float64
    return got.dtype != torch.bool and matches(got, want, 1e-10 if exact else 2e-5)


def matches(got: Any, want: Any, tolerance: float) -> bool:
    """Whether two values are alike, tensors relative to the largest entry."""
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        if got.shape != want.shape or got.is_meta or got.dtype.is_complex:
            return False
        a, b = (part.detach().to("cpu", torch.float64) for part in (got, want))
        return bool(((a - b).abs() <= tolerance * b.abs().max()).all()) if b.numel() else True
    if isinstance(got, int | float) and isinstance(want, int | float):
        return got == want or math.isclose(got, want, rel_tol=tolerance)
    return type(got) is type(want) and bool(got == want)


def _difference(got: Tensor, want: Tensor) -> str:
    a, b = got.detach().cpu(), want.detach().cpu()
    rounding = 1e-6 * float(b.double().abs().max()) if b.numel() else 0.0
    off = (~torch.isclose(a.double(), b.double(), rtol=1e-4, atol=rounding)).nonzero().tolist()
    largest = f"off by up to {float((a.double() - b.double()).abs().max()):.1e}"
    if not off and a.dtype == b.dtype == torch.float64 and same(a.float(), b):
        return f"{largest}: computed in float32, or with a small number added to something"
    if want.numel() <= 6:
        return "expected {}, got {}".format(*_apart(b.tolist(), a.tolist()))
    if not off:
        return f"{largest}, more than rounding"
    first = tuple(off[0])
    expected, found = _apart(b[first].item(), a[first].item())
    return (
        f"entry {list(first)}: expected {expected}, got {found} "
        f"({len(off)} of {want.numel()} entries differ)"
    )


def _apart(want: Any, got: Any) -> tuple[str, str]:
    """Both as text, with as many digits as tell them apart."""
    for digits in (4, 6, 9, 12, 17):
        texts = _text(want, digits), _text(got, digits)
        if texts[0] != texts[1]:
            break
    return texts[0], texts[1]


def _text(value: Any, digits: int) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_text(part, digits) for part in value) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if math.isfinite(value) and value == int(value) and 1e4 <= abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{digits}g}"


def _tuple(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def type_name(dtype: torch.dtype) -> str:
    """As the learner writes it: float32."""
    return str(dtype).removeprefix("torch.")


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a value: the parts of a tuple, the parameters of a module."""
    if isinstance(value, probe.Module):
        return [*value.parameters.values(), *value.tensors.values()]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors(part)]
    return [value] if isinstance(value, Tensor) else []
