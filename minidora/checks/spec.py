"""An exercise as a spec: a slow, plain oracle, and what is drawn to compare the learner's with it.

    @spec(lesson, "3.1", title=..., difficulty="easy", minutes=5, teaches=..., hint=...,
          shapes="(out, in) -> (out,)")
    def row_norm(weight: Tensor) -> Tensor:
        return torch.tensor([math.hypot(*row) for row in weight.tolist()], dtype=torch.float64)

    row_norm.example([[3, 4, 0], [0, 5, 12]], gives=[5, 13])
    row_norm.mistake("one norm per input (dim=0): DoRA keeps one per output neuron",
                     lambda w: w.norm(dim=0))

The oracle gets its tensors in float64. It must not be the code being taught. Names in `shapes` are
sizes, drawn anew; "..." stands for any number of axes; a word without parentheses is no tensor
("(rank, in), alpha -> (in,)"); a result of several parts names them ("magnitude (out,), direction
(out, in)").

Every spec goes through the same battery: examples, random sizes, sizes of 1, larger ones, zeros,
tiny rows, float64 to 1e-10, gradients against central differences of the oracle, half precision,
arguments that are not contiguous, calls in between, another device, and whatever a function has no
business to change. adapters.py puts layers through it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from minidora.checks.exercise import Answer, Exercise, Lesson, Refused
from minidora.checks.expect import (
    expect_device,
    expect_dtype,
    expect_nothing_changed,
    randn,
    require,
)
from minidora.checks.oracle import Function, Oracle
from minidora.runner import probe


@dataclass
class Spec(Exercise, Oracle):
    """An exercise whose check is made from its oracle: see Exercise, and Oracle, for the fields.

    half: whether it must also work in bfloat16.
    """

    half: bool = field(default=True, kw_only=True)
    extra: list[Callable[[Answer], None]] = field(default_factory=list, init=False)
    looks: list[Callable[[Answer], None]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        Exercise.__post_init__(self)
        Oracle.__post_init__(self)

    @classmethod
    def declare(
        cls, lesson: Lesson, number: str, like: Oracle | None = None, **told: Any
    ) -> Callable[[Function], Self]:
        """Make an exercise of the lesson of the oracle below, with the fields that are told.

        like: one whose oracle, arguments, examples and mistakes are this one's too. Then the
        function below says no more than the name.
        """

        def decorate(oracle: Function) -> Any:
            told.update(number=number, name=oracle.__name__, siblings=lesson.exercises)
            if like is None:
                made = cls(oracle=oracle, **told)
            else:
                shared = {part: getattr(like, part.name) for part in fields(Oracle)}
                asked = {part.name: value for part, value in shared.items() if part.init}
                made = cls(**asked | told)
                for part, value in shared.items():
                    if not part.init:
                        setattr(made, part.name, [*value])
            lesson.exercises.append(made)
            return made

        return decorate

    def also(self, check: Callable[[Answer], None]) -> Callable[[Answer], None]:
        """A further check, for what this exercise alone asks."""
        self.extra.append(check)
        return check

    def explain(self, look: Callable[[Answer], None]) -> Callable[[Answer], None]:
        """Look once more at what was refused without a name: look(answer) refuses it by name.

        For a result that says little by itself, as a rank or a list of names does.
        """
        self.looks.append(look)
        return look

    # ---- How the answer is asked: a subclass whose answer is no function of tensors does otherwise

    look = staticmethod(probe.surroundings)
    spared: ClassVar[tuple[str, ...]] = ()
    """What may change, of all that `look` finds changed."""

    def given(self, args: Sequence[Any]) -> list[Any]:
        """What the answer is called with where the oracle gets args."""
        return list(args)

    def taken(self, got: Any, given: Sequence[Any]) -> Any:
        """What is compared of what came back."""
        return got

    def ask(self, answer: Answer, args: Sequence[Any]) -> Any:
        given = self.given(args)
        return self.taken(answer(*given), given)

    def device(self, answer: Answer, args: Sequence[Any]) -> None:
        expect_device(answer, *self.given(args))

    def gradients(
        self, answer: Answer, args: Sequence[Any], dys: Sequence[Tensor]
    ) -> Sequence[Any]:
        """Of sum(y * dy), for the arguments in grads."""
        found: Sequence[Any] = answer.probe(probe.gradients, args, self.wrt, *dys)["gradients"]
        return found

    # ---- The battery ----

    def judge(self, answer: Answer) -> None:
        """The check of this exercise."""
        try:
            self.battery(answer)
        except Refused as refused:
            if refused.helped and not refused.known:
                for look in self.looks:
                    look(answer)
            raise

    def battery(self, answer: Answer) -> None:
        """From what tells most to what is rarely wrong."""
        has_tensors = any(slot.axes is not None for slot in self.inputs)
        for case, given, value in self.examples:
            answer.case(case)
            self.compare(answer, given, value)
        answer.case("random")
        self.compare(answer, self.telling(torch.float32))
        if has_tensors:
            answer.case("float64")
        self.compare(answer, self.telling())
        self.compare(answer, self.telling())
        if self.grads:
            answer.case("gradient")
            self.compare_gradients(answer, self.telling())
        for case, args, named in self.shaped():
            answer.case(case)
            self.compare(answer, args, named=named)
        self.calls_in_turn(answer)
        if has_tensors:
            self.other_tensors(answer)
        args = self.given(self.some(self.random_sizes()))
        expect_nothing_changed(answer, *args, but=self.spared, look=self.look)
        for check in self.extra:
            check(answer)

    def calls_in_turn(self, answer: Answer) -> None:
        answer.case("calls in turn")
        sizes = self.random_sizes()
        first, second = self.some(sizes), self.some(sizes)
        rounds = [(args, self.given(args)) for args in (first, second, first)]
        found = answer.probe(probe.calls, [given for _, given in rounds])
        for (args, given), got in zip(rounds, found, strict=True):
            with _because("something is kept from an earlier call: "):
                self.refuse(self.taken(got, given), args, self.want(args), named=False)

    def other_tensors(self, answer: Answer) -> None:
        if self.tiny:
            answer.case("tiny rows")
            with _because("numbers this small: is there an epsilon or a clamp? "):
                self.compare(answer, self.tiny_rows(), named=False)
        answer.case("not contiguous")
        self.compare(answer, list(map(_strided, self.some(self.random_sizes()))), named=False)
        self.device(answer, self.some(self.random_sizes(), dtype=torch.float32))
        if self.half:
            answer.case("bfloat16")
            self.compare_half(answer, self.telling(torch.bfloat16))

    def compare(
        self, answer: Answer, args: Sequence[Any], want: Any = None, named: bool = True
    ) -> None:
        """Refuse what the learner's function makes of args unless it is `want`, or the oracle's."""
        got = self.ask(answer, args)
        if want is None:
            self.refuse(got, args, self.want(args), named)
            return
        try:
            self.refuse(got, args, want, named, by_heart=False)
        except Refused as refused:
            if self.name_mistake(answer, refused):
                raise
            self.refuse(got, args, want, named=False, by_heart=False)

    def name_mistake(self, answer: Answer, example: Refused) -> bool:
        """Refuse by name what failed at an example, which may not tell one mistake from another.

        Returns whether a name that the example gave can stand: nothing here speaks against it.
        """
        args = self.telling()
        try:
            self.refuse(self.ask(answer, args), args, self.want(args))
        except Refused as refused:
            if refused.known:
                raise Refused(refused.message, known=True, picture=example.picture) from None
            return False
        return not any(example.message.endswith(text) for _, text, _ in self.known(args))

    def compare_half(self, answer: Answer, args: Sequence[Any]) -> None:
        """The right dtype, and about the right values: rounding may hurt where rows cancel."""
        try:
            got = self.ask(answer, args)
        except Refused as refused:
            if "not implemented for" in refused.message:  # PyTorch's gap on a CPU, not the answer's
                return
            raise
        parts = got if len(self.outputs) > 1 else (got,)
        for part, want in zip(parts, self.want(args), strict=True):
            if not isinstance(part, Tensor):
                continue
            if self.dtypes == "same":
                expect_dtype(part, torch.bfloat16)
            error, size = (part.double() - want).abs(), want.abs()
            require(
                bool(error.median() <= 0.1 * size.max()),
                f"bfloat16 arguments give something else: off by {error.median():.2g}",
            )

    def compare_gradients(self, answer: Answer, args: list[Any]) -> None:
        """Refuse gradients that are not the central differences of one and the same slope."""
        dys = [randn(*part.shape, dtype=torch.float64) for part in self.want(args)]
        self.refuse_gradients(self.gradients(answer, args, dys), args, dys)


spec = Spec.declare


def _strided(arg: Any) -> Any:
    """The same tensor, not contiguous."""
    if not isinstance(arg, Tensor) or not arg.ndim:
        return arg
    return (
        arg.repeat_interleave(2, dim=-1)[..., ::2]
        if arg.ndim == 1
        else arg.mT.clone(memory_format=torch.contiguous_format).mT
    )


@contextmanager
def _because(text: str) -> Iterator[None]:
    """Put this before what is refused inside."""
    try:
        yield
    except Refused as refused:
        raise Refused(text + refused.message, where=refused.where, helped=refused.helped) from None
