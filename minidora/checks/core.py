"""What every check is made of: lessons, exercises, expectations, and failures of one line.

A check file (dora_decomposition.py) declares one Lesson and, under it, one function an exercise:

    lesson = Lesson(3, "03_dora_decomposition", closed=("minidora.dora",))

    @lesson.exercise("3.1", title=..., difficulty="easy", minutes=5, teaches=..., hint=...)
    def row_norm(answer: Answer) -> None:
        answer.case("by hand")
        expect(answer(weight), torch.tensor([5.0, 13.0]), known=[(weight.norm(dim=0), "one ...")])

    row_norm.refuses(("norm over the outputs", "dim=1", "dim=0", "one norm per input"), ...)

`answer` stands for the learner's function. answer(weight) calls it and gives back plain data;
answer.probe(probe.gradients, ...) asks more (runner/probe.py). The right value comes from an
oracle that is neither the learner's code nor the code being taught. A check goes: type, shape,
values worked by hand, random property, gradient, dtype and device.
"""

import copy
import math
import secrets
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minidora.runner import probe
from minidora.training import device

WIDTH = 88
"""Columns of a message: `nbgrader validate` cuts at 90."""

POINTS = {"easy": 1, "medium": 2, "hard": 3}


class CheckFailed(AssertionError):
    """A check refused an answer. A notebook shows its text alone, without the stack."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\nHint: {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for an exception that prints itself."""
        lines = f"{type(self).__name__}: {self}".split("\n")
        return [part for line in lines for part in textwrap.wrap(line, WIDTH)]


class NotStarted(CheckFailed):
    """The answer is still the stub."""


class Refused(Exception):
    """Raised inside a check; Exercise.check adds the exercise to the message.

    Args:
        message: what was expected, what came and, where it is known, the likely mistake.
        where: the learner's line, "line 3: return x.nrom()".
        helped: whether the exercise's hint helps with this; not with a typing error.
        picture: (yours, target), two matrices to draw side by side.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        helped: bool = True,
        picture: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.helped = helped
        self.picture = picture


class Unstarted(Exception):
    """Raised inside a check when the learner's code is still the stub."""


# ---- Lessons and exercises ----


@dataclass(frozen=True)
class WrongAnswer:
    """A usual mistake: the solution with `old` replaced by `new`, and what the check says of it.

    A test applies it to the solution's cell, where `old` must stand exactly once, and demands a
    message that contains `says`.
    """

    name: str
    old: str
    new: str
    says: str


@dataclass
class Answer:
    """A learner's function or class, as a check sees it.

    reach runs a probe where the learner's code lives: (probe's name, args, kwargs) -> reply.
    """

    exercise: "Exercise"
    reach: Callable[[str, tuple[Any, ...], dict[str, Any]], dict[str, Any]]
    cases: list[str] = field(default_factory=list)

    def case(self, name: str) -> None:
        """Name what is checked from here on: it stands in failures and in the list of passes."""
        self.cases.append(name)

    def __call__(self, *args: Any) -> Any:
        """Call the learner's function; it may not change its arguments."""
        return self.probe(probe.call, *args)

    def probe(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of runner/probe.py with the learner's object as its first argument."""
        reply = self.reach(function.__name__, args, kwargs)
        if "error" not in reply:
            try:
                return probe.unpack(reply["value"])
            except Exception:  # whatever a forged reply may cause
                raise Refused("what came back is no answer", helped=False) from None
        kind, message, where = (str(reply.get(key, "")) for key in ("error", "message", "where"))
        if kind == "not started":
            other = message.removeprefix("exercise ").partition(":")[0]
            if message.startswith("exercise ") and other != self.exercise.number:
                raise Refused(f"it uses exercise {other}, which is not started", helped=False)
            raise Unstarted
        if kind == "changed":
            text = f"it changes the caller's {message}: make a new tensor instead"
        elif kind == "time":
            text = f"stopped after {self.exercise.seconds:g} s: does this loop ever end?"
        elif kind == "lost":  # the learner's process is gone
            text = message
        else:
            text = f"your code raised {message}"
        raise Refused(text, where=where, helped=False)


@dataclass
class Exercise:
    """One exercise and its check. Calling it checks an answer in this very process."""

    number: str  # "3.1"
    name: str  # "row_norm": the check's name and the notebook's grade_id
    answer: str  # the name that the learner defines
    title: str
    difficulty: str
    minutes: int
    teaches: str
    hint: str
    body: Callable[[Answer], None]
    seconds: float = 10.0  # time limit of one probe
    wrong: list[WrongAnswer] = field(default_factory=list)

    def refuses(self, *mistakes: tuple[str, str, str, str]) -> None:
        """List usual wrong answers: (name, old, new, says), see WrongAnswer."""
        self.wrong += [WrongAnswer(*mistake) for mistake in mistakes]

    @property
    def points(self) -> int:
        return POINTS[self.difficulty]

    @property
    def lesson(self) -> int:
        return int(self.number.split(".")[0])

    @property
    def not_started(self) -> str:
        """What is said of the stub."""
        return f"{self.number} {self.answer} is not started: write it in the cell above"

    @property
    def heading(self) -> str:
        """How the notebook announces the exercise."""
        minutes = f"{self.difficulty}, {self.minutes} minutes, {self.points} "
        points = "point" if self.points == 1 else "points"
        return (
            f"## Exercise {self.number}: {self.title}\n\n*{minutes}{points}. "
            f"You learn {self.teaches}.*"
        )

    def __call__(self, answer: Any) -> None:
        """Check the learner's function or class; print what was checked.

        Raises:
            NotStarted: it is still the stub.
            CheckFailed: it is wrong; the message says how.
        """

        def reach(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            # Copies, as if the answer lived in another process: what it changes stays its own.
            return probe.run(answer, name, *copy.deepcopy((args, kwargs)), self.seconds)

        label = f"{self.number} {self.answer}"
        if not callable(answer):
            raise CheckFailed(
                f"{label}: the check needs the function itself, checks.{self.name}({self.answer}), "
                f"and got {kind_of(answer)}"
            )
        if str(getattr(answer, "__module__", "")).startswith("minidora"):
            raise CheckFailed(f"{label}: this one belongs to the package: write your own")
        try:
            print(self.check(Answer(self, reach)))
        except CheckFailed as failed:
            if isinstance(failed.__cause__, Refused) and failed.__cause__.picture:
                _draw(*failed.__cause__.picture)
            raise failed from None

    def check(self, answer: Answer) -> str:
        """Judge an answer, wherever it lives; the text for a pass, else as __call__."""
        label = f"{self.number} {self.answer}"
        try:
            self.body(answer)
        except Unstarted:
            raise NotStarted(self.not_started) from None
        except Refused as refused:
            case = f", {answer.cases[-1]}" if answer.cases else ""
            where = f"\n  {refused.where}" if refused.where else ""
            hint = self.hint if refused.helped else ""
            raise CheckFailed(f"{label}{case}: {refused.message}{where}", hint) from refused
        return f"{label} passed: {', '.join(answer.cases)}"


@dataclass
class Lesson:
    """The exercises of one notebook.

    name: of exercises/NAME.ipynb and solutions/NAME.ipynb.
    closed: modules that hold the answers; out of reach while a class is graded.
    """

    number: int
    name: str
    closed: tuple[str, ...] = ()
    exercises: list[Exercise] = field(default_factory=list)

    def exercise(
        self,
        number: str,
        *,
        title: str,
        difficulty: str,
        minutes: int,
        teaches: str,
        hint: str,
        answer: str = "",
        seconds: float = 10.0,
    ) -> Callable[[Callable[[Answer], None]], Exercise]:
        """Make an Exercise of the check below; `answer` where the learner's name differs."""

        def decorate(body: Callable[[Answer], None]) -> Exercise:
            name = body.__name__
            exercise = Exercise(
                number,
                name,
                answer or name,
                title,
                difficulty,
                minutes,
                teaches,
                hint,
                body,
                seconds,
            )
            self.exercises.append(exercise)
            return exercise

        return decorate


# ---- Expectations ----

Known = Iterable[tuple[Tensor, str]]
"""(value, message): what usual mistakes would give, and what to say to whoever made them."""

Numbers = Iterable[tuple[float, str]]
"""The same for an answer that is a plain number."""


def require(condition: bool, message: str) -> None:
    """Refuse with this message unless the condition holds."""
    if not condition:
        raise Refused(message)


def expect(got: Any, want: Tensor, known: Known = (), name: str = "", shape: str = "") -> None:
    """Refuse unless got is a tensor of want's shape and values, up to the rounding of its dtype.

    Args:
        known: usual mistakes, tried first. Where one gives the right value, as it may in a
            special case, it is passed over.
        name: what to call it, where the answer has several parts.
        shape: the shape in words, "(out,)".
    """
    name = f"{name}: " if name else ""
    require(got is not None, f"{name}got None: end with `return ...` (print gives nothing back)")
    require(isinstance(got, Tensor), f"{name}expected a tensor, got {kind_of(got)}")
    if same(got, want):
        return
    for value, message in known:
        if same(got, value):
            picture = (got, want) if got.shape == want.shape and want.ndim == 2 else None
            raise Refused(name + message, picture=picture)
    wanted = f"{shape} = {_tuple(want.shape)}" if shape else _tuple(want.shape)
    require(got.shape == want.shape, f"{name}expected the shape {wanted}, got {_tuple(got.shape)}")
    raise Refused(name + _difference(got, want), picture=(got, want) if want.ndim == 2 else None)


def expect_number(
    got: Any, want: float, known: Numbers = (), name: str = "", tolerance: float = 0.0
) -> None:
    """As expect, for a plain number; tolerance is relative, and absolute below 1."""
    name = f"{name}: " if name else ""
    require(got is not None, f"{name}got None: end with `return ...` (print gives nothing back)")
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
        require(not near(value), name + message)
    require(False, f"{name}expected {_number(want)}, got {_number(got)}")


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


def expect_parameter(module: probe.Module, name: str, shape: tuple[int, ...]) -> nn.Parameter:
    """A trainable parameter of the module, by name and shape."""
    require(
        name not in module.tensors,
        f"{name} is a plain tensor: no optimizer sees it unless it is an nn.Parameter",
    )
    require(name in module.parameters, f"it has no parameter called {name}")
    parameter = module.parameters[name]
    require(
        parameter.shape == shape,
        f"expected {name} of shape {_tuple(shape)}, got {_tuple(parameter.shape)}",
    )
    require(parameter.requires_grad, f"{name} is frozen: it is there to be trained")
    return parameter


def expect_gradient(got: Any, want: Tensor, name: str, known: Known = ()) -> None:
    """As expect, for the gradient of the argument or parameter called name."""
    require(
        isinstance(got, Tensor),
        f"no gradient reaches {name}: something on its way is detached, or under no_grad",
    )
    expect(got, want, known, f"gradient of {name}")


def expect_dtype_and_device(answer: Answer, *args: Any) -> None:
    """Refuse unless float64 in gives float64 out, and results are where the arguments are."""
    answer.case("float64")
    for part in tensors(answer(*[_to(argument, torch.float64) for argument in args])):
        require(
            part.dtype == torch.float64,
            f"a {_name(part.dtype)} result for float64 arguments: "
            "new tensors take the dtype of an argument",
        )
    expect_device(answer, *args)


def expect_device(answer: Answer, *args: Any) -> None:
    """Refuse unless results are on the device of the arguments: the GPU if there is one."""
    answer.case("device")
    try:
        if device().type == "cpu":
            result = answer.probe(probe.away, *args)
        else:
            result = answer.probe(probe.build, *[_to(part, device()) for part in args])["made"]
    except Refused as refused:
        if "device" not in refused.message:
            raise
        raise Refused(_ON_CPU, where=refused.where, helped=False) from None
    for part in tensors(result):
        if part.device.type != device().type:
            raise Refused(_ON_CPU, helped=False)


_ON_CPU = "works on a CPU only: make new tensors on the device of an argument"


# ---- Small tools ----

_generator = torch.Generator()
_generator.seed()  # new numbers each time: an answer that holds the last ones is no answer


def randn(*shape: int) -> Tensor:
    """Standard normal numbers, float32, without touching the learner's random state."""
    return torch.randn(shape, generator=_generator)


def random_size(low: int, high: int) -> int:
    """A size from low to high - 1 that no answer can know by heart."""
    return low + secrets.randbelow(high - low)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal shapes, and values equal up to rounding; a NaN equals nothing."""
    if got.shape != want.shape or got.dtype in (torch.bool, torch.complex64, torch.complex128):
        return False
    a, b = (tensor.detach().to("cpu", torch.float64) for tensor in (got, want))
    exact = got.dtype == want.dtype == torch.float64
    tolerance = (1e-10 if exact else 2e-5) * b.abs().max() if b.numel() else 0.0
    return bool(((a - b).abs() <= tolerance).all())


def _difference(got: Tensor, want: Tensor) -> str:
    a, b = got.detach().cpu(), want.detach().cpu()
    if want.numel() <= 6:
        return f"expected {_numbers(b)}, got {_numbers(a)}"
    off = (~torch.isclose(a.double(), b.double(), rtol=1e-4)).nonzero().tolist()
    if not off:
        largest = f"off by up to {float((a - b).abs().max()):.1e}"
        if a.dtype == torch.float64:
            return f"{largest} for float64: it was computed in float32, and turned afterwards"
        return f"{largest}, more than rounding"
    first = tuple(off[0])
    return (
        f"entry {list(first)}: expected {b[first].item():.4g}, got {a[first].item():.4g} "
        f"({len(off)} of {want.numel()} entries differ)"
    )


def _numbers(tensor: Tensor) -> str:
    if tensor.ndim == 0:
        return f"{tensor.item():.4g}"
    return "[" + ", ".join(_numbers(row) for row in tensor) + "]"


def _number(number: float) -> str:
    whole = math.isfinite(number) and number == int(number)
    return f"{int(number):,}" if whole else f"{number:,.6g}"


def _tuple(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kind_of(value: Any) -> str:
    """The name of a value's class, as the learner knows it."""
    if isinstance(value, probe.Other):
        return value.kind
    if isinstance(value, probe.Module):
        return value.kinds[0]
    return type(value).__name__


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a value: the parts of a tuple, the parameters of a module."""
    if isinstance(value, probe.Module):
        return [*value.parameters.values(), *value.tensors.values()]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _to(argument: Any, target: torch.dtype | torch.device) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(target)
    if isinstance(argument, nn.Module):
        return copy.deepcopy(argument).to(target)
    return argument


def _draw(yours: Tensor, target: Tensor) -> None:
    """Show both matrices where there is a notebook to show them in."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from minidora import plots

        plots.show(plots.yours_beside_target(yours.detach().cpu(), target.detach().cpu()))
