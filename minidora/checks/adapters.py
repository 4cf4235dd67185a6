"""What LoRA's and DoRA's exercises have in common: a merged layer, and a layer that trains.

Both are specs: the oracle is a function of tensors, and the answer takes its weight in a layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Refused
from minidora.checks.expect import (
    expect,
    expect_device,
    expect_module,
    expect_parameter,
    randn,
    random_size,
    require,
    same,
    type_name,
)
from minidora.checks.oracle import wide
from minidora.checks.spec import Spec
from minidora.runner import probe


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The layer of this weight and this bias."""
    out, in_ = weight.shape
    layer = nn.Linear(in_, out, bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


# ---- A merged layer ----


@dataclass
class Merge(Spec):
    """An oracle (weight, *args) -> W', whose answer takes a layer of that weight and gives back a
    plain one of its own, with the weight W' and the same bias.

    factor: (weight, *args) -> the factor of each row, by which a bias may be scaled by mistake.
    """

    factor: Callable[..., Tensor] | None = field(default=None, kw_only=True)
    spared = ("torch's random state",)  # a new nn.Linear draws numbers before it is overwritten

    def __post_init__(self) -> None:
        self.grads = ()
        super().__post_init__()
        self.outputs = [replace(self.outputs[0], name="weight")]

    def given(self, args: Sequence[Any], bias: bool = True) -> list[Any]:
        weight, *rest = args
        return [linear(weight, randn(len(weight)).to(weight) if bias else None), *rest]

    def taken(self, got: Any, given: Sequence[Any]) -> Any:
        base, merged = given[0], expect_module(got, "Linear")
        require(
            "weight" not in merged.tensors,
            "weight is a plain tensor: no optimizer sees it unless it is an nn.Parameter",
        )
        for name in ("in_features", "out_features"):
            size, want = merged.numbers.get(name), getattr(base, name)
            require(size == want, f"expected {name} {want}, got {size}")
        for name, parameter in merged.parameters.items():
            have, want = type_name(parameter.dtype), type_name(base.weight.dtype)
            text = f"{name} is {have} where the given layer has {want}: it must be able to run"
            require(have == want, text)
        bias = merged.parameters.get("bias")
        if base.bias is None:
            require(bias is None, "the base has no bias and the merged layer has one")
        elif bias is None:
            raise Refused("the bias is lost")
        elif not same(bias, base.bias):
            args = wide([base.weight.detach(), *given[1:]])
            scaled = self.factor is not None and same(bias, self.factor(*args) * base.bias.double())
            require(not scaled, "the bias is scaled: it stays as it is")
            raise Refused("the bias is not the base's")
        return merged.parameters.get("weight")

    def battery(self, answer: Answer) -> None:
        super().battery(answer)
        answer.case("no bias")
        args = self.telling(torch.float32)
        given = self.given(args, bias=False)
        self.refuse(self.taken(answer(*given), given), args, self.want(args))
        answer.case("one step of training")
        for args in (self.telling(torch.float32), dict(self.zeros())["lora_B = 0"]):
            self.own(answer, *self.given(args))

    def own(self, answer: Answer, base: nn.Linear, *args: Any) -> None:
        """What comes back trains, and shares no memory with the layer that was given."""
        for name in answer.probe(probe.shared, base, *args):
            raise Refused(f"{name} is the given layer's own: a step of training would change both")
        found = answer.probe(probe.step, [base, *args], randn(4, base.in_features).to(base.weight))
        for name, before in found["before"].items():
            after = found["made"].parameters[name]
            require(after.requires_grad, f"{name} is frozen: the new layer can be trained")
            moved = not torch.equal(after.cpu(), before.cpu())
            require(moved, f"a step of training does not change {name} of the new layer")


# ---- A layer around a base ----

USES = (
    ("in evaluation mode", 0),
    ("in evaluation mode, after A and B changed", 1),
    ("back in training mode", 1),
    ("a deep copy with other values", 0),
    ("after a deep copy got other values", 1),
    ("after another layer was made and used", 1),
)
"""What probe.use does with a layer, and which of two sets of parameters it then holds."""


@dataclass
class Layer(Spec):
    """An oracle (x, weight, bias, lora_A, lora_B, *more parameters, alpha) -> y, whose answer is a
    class: answer(base, rank, alpha) is a layer around a frozen base that has these parameters."""

    starts: list[Callable[[probe.Module, nn.Linear], None]] = field(
        default_factory=list, init=False
    )
    names: list[str] = field(default_factory=list, init=False)
    look = staticmethod(probe.torch_state)  # it freezes the base that it is given
    spared = ("torch's random state",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.names = [slot.name for slot in self.inputs[3:-1]]

    def start(self, look: Callable[[probe.Module, nn.Linear], None]) -> None:
        """A look at the parameters that this exercise adds: look(module as it starts, its base)."""
        self.starts.append(look)

    def given(self, args: Sequence[Any], bias: bool = True) -> list[Any]:
        return [linear(args[1], args[2] if bias else None), len(args[3]), args[-1]]

    def ask(self, answer: Answer, args: Sequence[Any]) -> Any:
        return self.run(answer, args, torch.empty(0))["value"]

    def device(self, answer: Answer, args: Sequence[Any]) -> None:
        expect_device(answer, *self.given(args), x=args[0])

    def run(
        self, answer: Answer, args: Sequence[Any], dy: Tensor, bias: bool = True
    ) -> dict[str, Any]:
        """probe.layer with these arguments; refuses a forward pass that writes into them."""
        given, x = self.given(args, bias), args[0]
        fills = dict(zip(self.names, args[3:-1], strict=True))
        found: dict[str, Any] = answer.probe(probe.layer, given, fills, x, dy)
        kept = torch.equal(found["given"], x)
        require(kept, "forward changes the caller's x: make a new tensor instead")
        kept = torch.equal(found["module"].parameters["base.weight"].cpu(), args[1])
        require(kept, "forward changes base.weight: `+=` writes into it, use +")
        return found

    def gradients(
        self, answer: Answer, args: Sequence[Any], dys: Sequence[Tensor]
    ) -> Sequence[Any]:
        found = self.run(answer, args, dys[0])
        frozen = found["gradients"]["base.weight"] is None
        require(frozen, "the frozen base gets a gradient")
        return [{**found["gradients"], "x": found["x"]}[name] for name in self.grads or ()]

    def battery(self, answer: Answer) -> None:
        self.parameters(answer)
        answer.case("start")
        check_uniform(lambda in_, rank: self.first_A(answer, in_, rank))
        super().battery(answer)
        for case, bias in (("before any training", True), ("no bias", False)):
            answer.case(case)
            args = self.telling()
            args[2] = args[2] if bias else 0 * args[2]
            found = self.run(answer, args, torch.empty(0), bias)
            self.refuse(found["value"], args, self.want(args))
            start = self.given(args, bias)[0](args[0]).detach()
            expect(found["start"], start, name="before any training", shape="(..., out)")

    def parameters(self, answer: Answer) -> None:
        """Shapes, flags and dtypes of a layer of rank 2 and alpha 3 around an nn.Linear(5, 3)."""
        answer.case("parameters")
        own = nn.Linear(5, 3)
        module, base = self.build(answer, own)
        for look in self.starts:
            look(module, own)
        sizes = {"in": 5, "out": 3, "rank": 2}
        for slot in self.inputs[3:-1]:
            got = module.parameters.get(slot.name, module.tensors.get(slot.name))
            require(got is not None, f"it has no parameter called {slot.name}")
            shape = tuple(sizes[axis] for axis in slot.axes or ())
            expect_parameter(got, slot.name, shape, slot.text)
        require("base" in module.modules, "it keeps the given layer as self.base")
        kept = "base" in answer.probe(probe.shared, own, 2, 3.0)
        require(kept, "base is a copy: keep the layer that was given")
        require(module.training["base"], "base is put into evaluation mode: leave its mode alone")
        for name in ("weight", "bias"):
            frozen = not base.parameters[name].requires_grad
            require(frozen, f"base.{name} is not frozen: the optimizer would train it")
        for name, parameter in module.parameters.items():
            trains = parameter.requires_grad and name not in self.names
            require(not trains, f"{name} trains too: only the adapter should")
        scaling = module.numbers.get("scaling")
        require(scaling is not None, "it has no number called scaling")
        require(scaling == 1.5, f"expected scaling 1.5 for alpha 3, rank 2, got {scaling:g}")
        for name, parameter in self.build(answer, nn.Linear(5, 3).double())[0].parameters.items():
            dtype = parameter.dtype
            require(dtype == torch.float64, f"{name} is {type_name(dtype)} over a float64 base")

    def build(
        self, answer: Answer, base: nn.Linear, rank: int = 2, alpha: float = 3.0
    ) -> tuple[probe.Module, probe.Module]:
        """The layer around a base, and the base afterwards."""
        found = answer.probe(probe.build, base, rank, alpha)
        return expect_module(found["made"], "Module"), found["given"][0]

    def first_A(self, answer: Answer, in_features: int, rank: int) -> Tensor:
        """lora_A of a new layer, whose lora_B is zero."""
        module, _ = self.build(answer, nn.Linear(in_features, 8), rank, 32.0)
        zero = not module.parameters["lora_B"].any()
        require(zero, "lora_B is not zero at the start: the layer differs from its base")
        return module.parameters["lora_A"]

    def calls_in_turn(self, answer: Answer) -> None:
        """Refuse a layer that keeps something between its uses: modes, copies, other layers."""
        sizes = self.random_sizes()
        first, second = self.some(sizes), self.some(sizes)
        second[:3], second[-1] = first[:3], first[-1]  # the same base, other parameters
        x, dy = first[0], randn(*first[0].shape[:-1], sizes["out"]).double()
        fills = [dict(zip(self.names, args[3:-1], strict=True)) for args in (first, second)]
        found = answer.probe(probe.use, self.given(first), fills, [x, 2 * x], dy)

        def refuse(got: Any, args: Sequence[Any]) -> None:
            self.refuse(got, args, self.want(args), named=False)

        for (text, which), value in zip(USES, found["values"], strict=True):
            answer.case(text)
            refuse(value, (first, second)[which])
        answer.case("two forward passes before a backward pass, the first in evaluation mode")
        for scale, grads in zip((1, 2), found["gradients"], strict=True):
            found_of = [grads[name] for name in self.grads or ()]
            self.refuse_gradients(found_of, [scale * x, *second[1:]], [dy])
        answer.case("one step of training")
        stepped = [found["stepped"].parameters[name].detach().cpu() for name in self.names]
        for name, before, after in zip(self.names, second[3:-1], stepped, strict=True):
            moved = not torch.equal(before, after)
            require(moved, f"a step of an optimizer does not change {name}")
        args = [*second[:3], *stepped, second[-1]]
        refuse(found["after"], args)
        answer.case("self.base with other weights")
        refuse(found["base changed"], [x, 2 * args[1], *args[2:]])


# ---- New parameters ----


def check_uniform(draw: Callable[[int, int], Tensor]) -> None:
    """Refuse unless draw(in, rank), lora_A, is uniform on +-1/sqrt(in), and new each time."""
    for in_features, rank in ((256, 64), (3, 2000), (random_size(40, 200), 400)):
        lora_A = draw(in_features, rank).detach()
        bound, std = 1 / math.sqrt(in_features), float(lora_A.std())
        require(bool(lora_A.any()), "lora_A is zero: then lora_B never gets a gradient")
        alike = len(lora_A.unique()) < 0.9 * lora_A.numel()
        require(not alike, "the same numbers stand in lora_A again and again: draw each by itself")
        for wrong, message in (
            (1.0, f"lora_A has a standard deviation of 1, not of {bound / math.sqrt(3):.3f}"),
            (math.sqrt(2) * bound, "Kaiming-uniform with a = 0: LoRA takes a = sqrt(5)"),
            (1 / math.sqrt(3 * rank), "the bound is 1 / sqrt(rank): it is 1 / sqrt(in)"),
        ):
            require(abs(std / wrong - 1) > 0.05, message)
        largest, mean = float(lora_A.abs().max()), float(lora_A.mean())
        drawn = f"lora_A is not drawn uniformly from +-1/sqrt(in) = +-{bound:.4f}"
        reaches = 0.98 * bound < largest <= 1.001 * bound
        require(reaches, f"{drawn}: its largest entry is {largest:.4f}")
        even = abs(mean) < 0.05 * bound and abs(std / bound * math.sqrt(3) - 1) < 0.05
        require(even, f"{drawn}: mean {mean:.4f}, standard deviation {std:.4f}")
        new = not torch.equal(lora_A, draw(in_features, rank))
        require(new, "lora_A is the same each time: set no seed")


def check_tensors_train(answer: Answer, names: Sequence[str], *args: Any) -> None:
    """The parameters that come back can be trained, each of its own memory."""
    answer.case("one step of training")
    found = answer.probe(probe.step_of_parameters, *args)
    require(not found["shared"], "two of them share their memory: make each its own")
    for name, before, after in zip(names, found["before"], found["after"], strict=True):
        moved = not torch.equal(before, after.detach())
        require(moved, f"a step of an optimizer does not change {name}")
