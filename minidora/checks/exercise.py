"""Exercises, lessons, and what comes of a check: a pass, a refusal of one line, or our own fault.

A check file (dora_decomposition.py) declares one Lesson and, under it, its exercises. Most are
specs (spec.py): the decorated function is a slow, plain oracle. What is no function of tensors has
a check by hand:

    lesson = Lesson(3, "03_dora_decomposition", closed=("minidora.dora",))

    @lesson.exercise("3.8", title=..., difficulty="hard", minutes=25, teaches=..., hint=...)
    def dora_linear(answer: Answer) -> None:
        answer.case("by hand")
        expect(answer(weight), torch.tensor([5.0, 13.0]), known=[(weight.norm(dim=0), "one ...")])

`answer` stands for the learner's function. answer(weight) calls it and gives back plain data;
answer.probe(probe.gradients, ...) asks more (runner/probe.py). The right value comes from an
oracle that is neither the learner's code nor the code being taught.

Title, difficulty, minutes, teaches and hint are literals: catalog.py reads them without torch.
"""

import copy
import enum
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minidora.runner import probe

WIDTH = 88
"""Columns of a message: `nbgrader validate` cuts at 90."""

POINTS = {"easy": 1, "medium": 2, "hard": 3}


class State(enum.StrEnum):
    """What became of an exercise."""

    DONE = "done"
    FAILING = "failing"
    NOT_STARTED = "not started"
    MISSING = "missing"  # nothing defines the answer
    NOT_POSSIBLE = "not possible here"  # it needs what this machine does not have
    CHECK_ERROR = "check error"  # the check itself broke: our fault, not the learner's


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


class NotPossible(CheckFailed):
    """The exercise needs what this machine does not have: says nothing about the answer."""


class CheckError(Exception):
    """The check itself broke. Says nothing about the answer; `stack` is for whoever repairs it."""

    def __init__(self, message: str, stack: str) -> None:
        super().__init__(f"{message}\n{stack}")
        self.message = message
        self.stack = stack

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self.message}", *self.stack.splitlines()]


class Refused(Exception):
    """Raised inside a check; Exercise.check adds the exercise to the message.

    Args:
        message: what was expected, what came and, where it is known, the likely mistake.
        where: the learner's line, "line 3: return x.nrom()".
        helped: whether the exercise's hint helps with this; not with a typing error.
        known: whether the message names a usual mistake.
        picture: (yours, target), two matrices to draw side by side.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        helped: bool = True,
        known: bool = False,
        picture: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.helped = helped
        self.known = known
        self.picture = picture


class Unstarted(Exception):
    """Raised inside a check when the learner's code is still the stub."""


@dataclass
class Answer:
    """A learner's function or class, as a check sees it.

    reach runs a probe where the learner's code lives: (probe's name, args, kwargs) -> reply.
    """

    exercise: "Exercise"
    reach: Callable[[str, tuple[Any, ...], dict[str, Any]], dict[str, Any]]
    cases: list[str] = field(default_factory=list)

    def case(self, name: str) -> None:
        """Name what is checked from here on, in failures and in the list of passes."""
        self.cases.append(name)

    def __call__(self, *args: Any) -> Any:
        """Call the learner's function; it may not change its arguments."""
        return self.probe(probe.call, *args)

    def probe(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of runner/probe.py with the learner's object as its first argument."""
        name = function.__name__
        reply = probe.unchanged(name, args, self.reach(name, args, kwargs))
        if "error" not in reply:
            try:
                return probe.unpack(reply["value"])
            except Exception:  # whatever a forged reply may cause
                raise Refused("what came back cannot be read", helped=False) from None
        kind, message, where = (str(reply.get(key, "")) for key in ("error", "message", "where"))
        if kind == "not started":
            other = message.removeprefix("exercise ").partition(":")[0]
            if message.startswith("exercise ") and other != self.exercise.number:
                raise Refused(f"it uses exercise {other}, which is not started", helped=False)
            raise Unstarted
        if kind == "changed":
            text = f"it changes the caller's {message}: make a new one instead"
        elif kind == "state":
            text = f"it changes {message}: leave that as it is"
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
    title: str
    difficulty: str
    minutes: int
    teaches: str
    hint: str
    body: Callable[[Answer], None] | None = None  # a Spec has its own
    answer: str = ""  # the name that the learner defines, where it is not the check's
    seconds: float = 10.0  # time limit of one probe
    triton: bool = False  # whether the answer is a kernel, which only Triton can run
    siblings: list["Exercise"] = field(default_factory=list, repr=False)  # of its lesson

    def __post_init__(self) -> None:
        self.answer = self.answer or self.name

    @property
    def points(self) -> int:
        return POINTS[self.difficulty]

    @property
    def lesson(self) -> int:
        return int(self.number.split(".")[0])

    @property
    def label(self) -> str:
        return f"{self.number} {self.answer}"

    @property
    def not_started(self) -> str:
        """What is said of the stub."""
        return f"{self.label} is not started: write it in the cell above"

    @property
    def heading(self) -> str:
        """How the notebook announces the exercise."""
        minutes = f"{self.difficulty}, {self.minutes} minutes, {self.points} "
        points = "point" if self.points == 1 else "points"
        return (
            f"## Exercise {self.number}: {self.title}\n\n*{minutes}{points}. "
            f"You learn {self.teaches}.*"
        )

    def __call__(self, answer: Any, debug: bool = False) -> None:
        """Check the learner's function or class; print what was checked.

        Raises:
            NotStarted: it is still the stub.
            NotPossible: it needs Triton, which is not here.
            CheckFailed: it is wrong; the message says how.
            CheckError: the check itself broke. With debug, whatever broke it.
        """

        def reach(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            # Copies, as if the answer lived in another process: what it changes stays its own.
            return probe.run(answer, name, *copy.deepcopy((args, kwargs)), self.seconds)

        if not callable(answer):
            raise CheckFailed(
                f"{self.label}: the check needs the function itself, checks.{self.name}"
                f"({self.answer}), and got {kind_of(answer)}"
            )
        if str(getattr(answer, "__module__", "")).startswith("minidora"):
            raise CheckFailed(f"{self.label}: this one belongs to the package: write your own")
        try:
            print(self.check(Answer(self, reach), debug))
        except CheckFailed as failed:
            if isinstance(failed.__cause__, Refused) and failed.__cause__.picture:
                _draw(*failed.__cause__.picture)
            raise failed from None

    def judge(self, answer: Answer) -> None:
        """Refuse a wrong answer."""
        assert self.body is not None
        self.body(answer)

    def calls(self, answer: Answer) -> str:
        """Which of the learner's other answers this one calls: the fault may be there."""
        others = {one.answer: one for one in self.siblings if one is not self}
        try:
            used = answer.probe(probe.names_used)
        except (Refused, Unstarted):
            return ""
        found = [others[name].label for name in used if name in others]
        return f"\n  It calls your {' and '.join(found)}: check that first." if found else ""

    def check(self, answer: Answer, debug: bool = False) -> str:
        """Judge an answer, wherever it lives; the text for a pass, else as __call__."""
        try:
            with probe.plain_torch():
                if self.triton and (problem := answer.probe(probe.no_triton)):
                    raise NotPossible(f"{self.label} is not possible here. {problem}")
                self.judge(answer)
        except NotPossible:
            raise
        except Unstarted:
            raise NotStarted(self.not_started) from None
        except Refused as refused:
            case = f", {answer.cases[-1]}" if answer.cases else ""
            where = f"\n  {refused.where}" if refused.where else ""
            where += self.calls(answer)
            hint = self.hint if refused.helped else ""
            raise CheckFailed(f"{self.label}{case}: {refused.message}{where}", hint) from refused
        except Exception as error:
            if debug:
                raise
            text = (
                f"{self.label}: the check itself broke ({type(error).__name__}: {error}). "
                "This is a fault of the course, not of your answer: please report it"
            )
            raise CheckError(text, traceback.format_exc()) from error
        return f"{self.label} passed: {', '.join(dict.fromkeys(answer.cases))}"


@dataclass
class Lesson:
    """The exercises of one notebook.

    name: of exercises/NAME.ipynb and solutions/NAME.ipynb.
    closed: modules that hold the answers.
    opened: modules of minidora that an answer may need; while a class is graded it sees no others.
    """

    number: int
    name: str
    closed: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    exercises: list[Exercise] = field(default_factory=list)

    def exercise(self, number: str, **told: Any) -> Callable[[Callable[[Answer], None]], Exercise]:
        """Make an Exercise of the check below, with the fields of Exercise that are told."""

        def decorate(body: Callable[[Answer], None]) -> Exercise:
            told.update(number=number, name=body.__name__, siblings=self.exercises)
            exercise = Exercise(body=body, **told)
            self.exercises.append(exercise)
            return exercise

        return decorate


def kind_of(value: Any) -> str:
    """The name of a value's class, as the learner knows it."""
    if isinstance(value, probe.Other):
        return value.kind
    if isinstance(value, probe.Module):
        return value.kinds[0]
    return type(value).__name__


def _draw(yours: Tensor, target: Tensor) -> None:
    """Show both matrices where there is a notebook to show them in."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from minidora import plots

        plots.show(plots.yours_beside_target(yours.detach().cpu(), target.detach().cpu()))
