"""A slow, plain function and what is known of its mistakes: what a learner's answer is held to.

Draws arguments of random sizes, says what is right, names usual mistakes in values and gradients.
spec.py makes an exercise of it.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minidora.checks.exercise import Refused
from minidora.checks.expect import (
    dice,
    expect,
    expect_dtype,
    expect_number,
    expect_parts,
    expect_words,
    matches,
    randn,
    random_size,
    require,
)

Function = Callable[..., Any]
BY_HEART = "this is the answer to the example: compute it from the arguments"
LONGEST = 120
"""Letters of arguments that a message still repeats."""

AXES = ((), (2,), (2, 3), (2, 2, 3))
"""What "..." stands for, in turn."""

MAY_BE_ZERO = ("lora_B", "magnitude", "gradient", "bias")


@dataclass(frozen=True)
class Slot:
    """One argument or one part of the result; axes is None for what is not a tensor."""

    name: str
    axes: tuple[str, ...] | None

    @property
    def text(self) -> str:
        axes = self.axes or ()
        return f"({', '.join(axes)}{',' if len(axes) == 1 and axes != ('...',) else ''})"


Wrong = Iterator[tuple[str, Any]]
"""(message, value) of several usual mistakes; a value of None says nothing here."""


@dataclass(frozen=True)
class Mistakes:
    """Usual mistakes, as a function of the arguments; of the part of the result of that name."""

    function: Callable[..., Wrong]
    part: str = ""


@dataclass(frozen=True)
class SlopeMistake:
    message: str
    function: Function


@dataclass(kw_only=True)
class Oracle:
    """The right function, how its arguments are drawn, and what usual mistakes give.

    Args:
        oracle: the function. It gets its tensors in float64, and is not the code being taught.
        shapes: of the arguments and of the result: "(rank, in), (out, rank), alpha -> (out, in)".
        draw: how to draw an argument, by name, where standard normal numbers (or a number from 1
            to 20) will not do: called with its shape, or with nothing.
        grads: names of the arguments whose gradients are checked; by default all tensors, if the
            result is a tensor.
        tiny: names of the arguments that are scaled by tiny_scale; by default the first tensor.
        dtypes: "same" where the result has the dtype of the arguments, "any" where it may not.
        tolerance: relative, for plain numbers.
        sizes: ranges for names in shapes, (lowest, highest); by default (2, 7), and 1 by itself.
    """

    oracle: Function
    shapes: str
    draw: dict[str, Function] = field(default_factory=dict)
    grads: tuple[str, ...] | None = None
    tiny: tuple[str, ...] | None = None
    tiny_scale: float = 1e-10
    dtypes: str = "same"
    tolerance: float = 0.0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    examples: list[tuple[str, tuple[Any, ...], Any]] = field(default_factory=list, init=False)
    mistakes: list[Mistakes] = field(default_factory=list, init=False)
    slopes: list[Function] = field(default_factory=list, init=False)
    slope_mistakes: list[SlopeMistake] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        given, result = self.shapes.split("->")
        code = self.oracle.__code__
        names = list(code.co_varnames[: code.co_argcount])
        self.inputs = _slots(given, names)
        self.outputs = _slots(result, [])
        tensors = [slot.name for slot in self.inputs if slot.axes is not None]
        self.tiny = tuple(tensors[:1]) if self.tiny is None else self.tiny
        real = all(slot.axes is not None for slot in self.outputs)
        self.grads = (tuple(tensors) if real else ()) if self.grads is None else self.grads
        self.wrt = [names.index(name) for name in self.grads]
        axes = [axis for slot in self.inputs for axis in slot.axes or ()]
        self.size_names = [axis for axis in dict.fromkeys(axes) if axis.isidentifier()]

    # ---- What an author adds ----

    def example(self, *args: Any, gives: Any, case: str = "by hand") -> None:
        """A case worked by hand; nested lists are tensors. `gives` is compared with the oracle."""

        def told(slots: list[Slot], values: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
            pairs = zip(slots, values, strict=True)
            return tuple(v if s.axes is None else torch.tensor(v, dtype=dtype) for s, v in pairs)

        given = told(self.inputs, args, torch.float32)
        self.examples.append((case, given, told(self.outputs, self.parts(gives), torch.float64)))

    def mistake(self, message: str, function: Function, part: str = "") -> None:
        """Name a usual mistake once: what it would give, and what to say to whoever made it.

        Where it gives the right value, or cannot be computed, in some draw, it is passed over.
        """

        def wrong(*args: Any) -> Wrong:
            yield message, function(*args)

        self.mistakes_of(wrong, part)

    def mistakes_of(self, function: Callable[..., Wrong], part: str = "") -> Callable[..., Wrong]:
        """Several at once: a generator of (message, value), for mistakes that share a piece."""
        self.mistakes.append(Mistakes(function, part))
        return function

    def slope(self, function: Function) -> None:
        """Another function whose central differences are right gradients: function(at, *args).

        `at` holds the arguments as they are, and args those that are moved: what is computed from
        `at` is a constant in the backward pass. With several slopes, any of them will do, for all
        arguments alike.
        """
        self.slopes.append(function)

    def slope_mistake(self, message: str, function: Function) -> None:
        """A usual mistake in the gradient, as function(at, *args); see slope."""
        self.slope_mistakes.append(SlopeMistake(message, function))

    # ---- Draws ----

    def random_sizes(self, **fixed: int) -> dict[str, int]:
        """A size for each name in shapes: different ones, but for those that are fixed."""
        drawn = [(name, self.sizes.get(name, (2, 7))) for name in self.size_names]
        for _ in range(100):
            sizes = {name: fixed.get(name) or dice.randint(*span) for name, span in drawn}
            if len(set(sizes.values())) == len(sizes):
                break
        return sizes

    def some(
        self, sizes: dict[str, int], lead: Sequence[int] = (2,), dtype: torch.dtype = torch.float64
    ) -> list[Any]:
        """Arguments of these sizes; lead is what "..." stands for."""
        args = []
        for slot in self.inputs:
            if slot.axes is None:
                args.append(self.draw.get(slot.name, _number)())
                continue
            shape: list[int] = []
            for axis in slot.axes:
                shape += lead if axis == "..." else [sizes[axis] if axis in sizes else int(axis)]
            value = self.draw.get(slot.name, _normal)(*shape)
            args.append(value.to(dtype) if value.is_floating_point() else value)
        return args

    def telling(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """Arguments for which the mistakes differ, from the result and from each other.

        To know an example by heart is one of them. Rounding stays small: no sum nearly cancels.
        """
        for _ in range(60):
            args = self.some(self.random_sizes(), dtype=dtype)
            want = self.want(args)
            near = [_nudged(arg) for arg in args]
            if not all(map(partial(matches, tolerance=2e-6), want, self.want(near))):
                continue
            values = [want, *(value for value, _, _ in self.known(args))]
            pairs = itertools.chain(
                itertools.combinations(values, 2),
                itertools.product(values, (value for _, _, value in self.examples)),
            )
            if not any(itertools.starmap(self.alike, pairs)):
                break
        return args

    def tiny_rows(self) -> list[Any]:
        """Arguments of which those in `tiny` are very small."""
        args = zip(self.inputs, self.telling(), strict=True)
        return [
            self.tiny_scale * arg if slot.name in (self.tiny or ()) else arg for slot, arg in args
        ]

    def shaped(self) -> Iterator[tuple[str, list[Any], bool]]:
        """(case, arguments, whether mistakes have names there), with sizes of every kind."""
        names = self.size_names
        if names:
            yield "equal sizes", self.some(dict.fromkeys(names, 4), (4,)), True
        for index, slot in enumerate(self.inputs):
            for lead in AXES if "..." in (slot.axes or ()) else ():
                args = self.some(self.random_sizes(), lead)
                count = args[index].ndim
                yield f"{slot.name} with {count} {'axis' if count == 1 else 'axes'}", args, True
        for case, args in [*self.ones(), *self.zeros()]:
            yield case, args, False
        if names:
            yield "larger sizes", self.some({name: random_size(20, 50) for name in names}), True
            return
        for index, slot in enumerate(self.inputs):
            args = self.some({})
            if isinstance(args[index], int):
                args[index] *= 1009
                yield f"many {slot.name}", args, True

    def zeros(self) -> Iterator[tuple[str, list[Any]]]:
        """(case, arguments) with each in turn all 0 that may be: B = 0 is where training begins."""
        for index, slot in enumerate(self.inputs):
            if slot.name in MAY_BE_ZERO:
                args = self.telling()
                args[index] = 0 * args[index]
                yield f"{slot.name} = 0", args

    def ones(self) -> Iterator[tuple[str, list[Any]]]:
        """(case, arguments) with each size in turn 1 that may be, and with all of them 1."""
        may = [name for name in self.size_names if self.sizes.get(name, (1, 1))[0] == 1]
        for ones in [*([name] for name in may), may] if may else []:
            args = self.some(self.random_sizes(**dict.fromkeys(ones, 1)), (1,))
            yield f"{' = '.join(ones)} = 1", args

    # ---- What is right, and what usual mistakes give ----

    def want(self, args: Sequence[Any]) -> tuple[Any, ...]:
        return self.parts(self.oracle(*wide(args)))

    def parts(self, value: Any) -> tuple[Any, ...]:
        return tuple(value) if len(self.outputs) > 1 else (value,)

    def known(self, args: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], str, int | None]]:
        """(result, message, index of the part or None) of each mistake that says something here."""
        names, right = [slot.name for slot in self.outputs], self.want(args)
        for mistakes in self.mistakes:
            found = mistakes.function(*wide(args))
            with suppress(RuntimeError, IndexError):  # one that cannot be made with these sizes
                for message, value in found:
                    if value is None:
                        continue
                    if not mistakes.part:
                        yield self.parts(value), message, None
                        continue
                    at = names.index(mistakes.part)
                    yield (*right[:at], value, *right[at + 1 :]), message, at

    def alike(self, first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
        return all(map(partial(matches, tolerance=max(self.tolerance, 1e-3)), first, second))

    # ---- Judging a value, or gradients ----

    def refuse(
        self,
        got: Any,
        args: Sequence[Any],
        want: tuple[Any, ...],
        named: bool = True,
        by_heart: bool = True,
    ) -> None:
        """Refuse unless got is `want`, by the mistake's name where it has one."""
        names = [slot.name for slot in self.outputs]
        parts = expect_parts(got, names) if len(names) > 1 else (got,)
        known = list(self.known(args)) if named else []
        if by_heart:
            known += [(value, BY_HEART, None) for _, _, value in self.examples]
        for value, message, index in known:
            whole = len(names) > 1 and index is None
            if whole and self.alike(parts, value) and not self.alike(parts, want):
                raise Refused(message, known=True)
        for index, (slot, part, right) in enumerate(zip(self.outputs, parts, want, strict=True)):
            mine = [(value[index], text) for value, text, at in known if at in (index, None)]
            mine += [
                (other, f"this is {name}: keep the order")
                for other, name in zip(want, names, strict=True)
                if named and type(other) is type(right)
            ]
            if slot.axes is not None:
                self.refuse_tensor(part, right, mine, slot, args)
            else:
                name = slot.name if len(names) > 1 else ""
                self.refuse_plain(part, right, mine, name, args)

    def refuse_tensor(
        self, got: Any, want: Tensor, known: Any, slot: Slot, args: Sequence[Any]
    ) -> None:
        dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()}
        if not slot.axes and isinstance(got, int | float) and not isinstance(got, bool):
            got = torch.tensor(float(got), dtype=torch.float64)
        if not slot.axes and isinstance(got, Tensor) and dtypes == {torch.float32}:
            got = got.float()  # one number may come as a float, which is float64
        expect(got, want, known, slot.name, slot.text)
        if self.dtypes == "same" and dtypes == {torch.float64} and got.dtype != torch.float64:
            expect_dtype(got, torch.float64)

    def refuse_plain(self, got: Any, want: Any, known: Any, name: str, args: Sequence[Any]) -> None:
        """Refuse a wrong number or list of names; one without a name, with what was asked."""
        try:
            if isinstance(want, list):
                expect_words(got, want, known, name)
            else:
                expect_number(got, want, known, name, self.tolerance)
        except Refused as refused:
            asked = ", ".join(
                f"{slot.name} = {arg}" if isinstance(arg, list) else f"{slot.name} = {arg:,}"
                for slot, arg in zip(self.inputs, args, strict=True)
                if isinstance(arg, int | float | list)
            )
            told = "expected" not in refused.message or not 0 < len(asked) < LONGEST
            if refused.known or told:
                raise
            raise Refused(f"for {asked}: {refused.message}") from None

    def refuse_gradients(self, found: Sequence[Any], args: list[Any], dys: list[Tensor]) -> None:
        """As compare_gradients, for the gradients found of the arguments in grads."""
        slopes = self.slopes or [lambda at, *now: self.oracle(*now)]
        rights = [self.differences(slope, args, dys) for slope in slopes]
        fits = [list(map(_near, found, right)) for right in rights]
        if any(map(all, fits)):
            return
        best = max(range(len(fits)), key=lambda index: sum(fits[index]))
        at = fits[best].index(False)
        got, want = found[at], rights[best][at]
        name = self.inputs[self.wrt[at]].name
        require(
            isinstance(got, Tensor),
            f"no gradient reaches {name}: something on its way is detached, or under no_grad",
        )
        for mistake in self.slope_mistakes:
            wrong = self.differences(mistake.function, args, dys)[at]
            if _near(got, wrong) and not _near(want, wrong):
                raise Refused(f"gradient of {name}: {mistake.message}", known=True)
        require(
            not any(fit[at] for fit in fits),
            f"the gradient of {name} belongs to another formula than those before it: "
            "what is a constant for one is a constant for all",
        )
        expect(got, want, name=f"gradient of {name}")

    def differences(
        self, function: Function, args: Sequence[Any], dys: Sequence[Tensor]
    ) -> list[Tensor]:
        """d sum(y * dy) / d argument for each of grads, by central differences of order 4."""

        def height(index: int, entry: int, step: float) -> float:
            moved = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            moved[index].view(-1)[entry] += step
            parts = self.parts(function(args, *moved))
            return math.fsum(float((y * dy).sum()) for y, dy in zip(parts, dys, strict=True))

        step, weights = 1e-4, {1: 8, -1: -8, 2: -1, -2: 1}
        return [
            torch.tensor(
                [
                    sum(w * height(index, entry, n * step) for n, w in weights.items()) / 12 / step
                    for entry in range(args[index].numel())
                ],
                dtype=torch.float64,
            ).reshape(args[index].shape)
            for index in self.wrt
        ]


def _slots(text: str, names: Sequence[str]) -> list[Slot]:
    found = re.findall(r"(\w*)\s*\(([^)]*)\)|(\w+)", text)
    slots = []
    for index, (name, axes, word) in enumerate(found):
        own = names[index] if index < len(names) else name or word
        inside = tuple(axis.strip() for axis in axes.split(",") if axis.strip())
        slots.append(Slot(own, None if word else inside))
    return slots


def _normal(*shape: int) -> Tensor:
    return randn(*shape, dtype=torch.float64)


def _number() -> float:
    """From 1 to 20, seldom whole."""
    return dice.randint(10, 200) / 10


def wide(args: Sequence[Any]) -> list[Any]:
    """Tensors of fractions in float64."""
    floats = [isinstance(arg, Tensor) and arg.is_floating_point() for arg in args]
    return [arg.double() if is_float else arg for arg, is_float in zip(args, floats, strict=True)]


def _nudged(arg: Any) -> Any:
    """The argument, as rounding to float32 may change it."""
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    return arg.double() * (1 + 1e-7 * _normal(*arg.shape))


def _near(got: Any, want: Tensor) -> bool:
    """Equal up to what central differences leave open; no gradient is a gradient of zeros."""
    if got is None:
        return not want.abs().max() > 1e-9
    return isinstance(got, Tensor) and matches(got, want, 1e-6)


# ---- For oracles: slow, plain, exact ----


def lengths(matrix: Tensor) -> Tensor:
    """The length of each row, by Python's own exact sums."""
    return torch.tensor([math.hypot(*row) for row in matrix.tolist()], dtype=torch.float64)


def product(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """B A, as a sum of outer products."""
    pairs = zip(lora_B.T, lora_A, strict=True)
    return torch.stack([torch.outer(b, a) for b, a in pairs]).sum(0)


def signed(*shape: int) -> Tensor:
    """Magnitudes, away from 0; the first is negative: nothing keeps training from it."""
    magnitude = randn(*shape, dtype=torch.float64).abs() + 0.5
    magnitude[0] *= -1
    return magnitude
