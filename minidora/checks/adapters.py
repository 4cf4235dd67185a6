"""What LoRA's and DoRA's exercises have in common: a merged layer, and a layer that trains."""

import math
from collections.abc import Callable, Sequence
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
)
from minidora.checks.oracle import Oracle, wide
from minidora.checks.spec import AXES, axes_of
from minidora.runner import probe

# ---- A merged layer ----


def check_merge(answer: Answer, weight: Oracle, scale: Callable[..., Tensor] | None = None) -> None:
    """Refuse unless answer(base, *args) is a plain layer of its own with the weight of that spec.

    Args:
        weight: the spec of the merged weight, (W, *args) -> W'.
        scale: (W, *args) -> the factor of each row, by which a bias may be scaled by mistake.
    """

    def check(args: Sequence[Any], bias: bool = True, named: bool = True) -> None:
        base = _linear(args[0], bias)
        merged = expect_module(answer(base, *args[1:]), "Linear")
        require(
            "weight" not in merged.tensors,
            "weight is a plain tensor: no optimizer sees it unless it is an nn.Parameter",
        )
        expect_can_run(merged, base)
        known = [(value[0], text) for value, text, _ in weight.known(args)] if named else []
        expect(merged.parameters.get("weight"), weight.want(args)[0], known, "weight")
        got = merged.parameters.get("bias")
        if base.bias is None:
            require(got is None, "the base has no bias and the merged layer has one")
            return
        require(got is not None, "the bias is lost")
        assert got is not None
        if scale is not None and named:
            scaled = same(got, scale(*wide(args)) * base.bias.detach().double())
            require(not scaled, "the bias is scaled: it stays as it is")
        require(same(got, base.bias), "the bias is not the base's")

    for case, given, _ in weight.examples:
        answer.case(case)
        check(given)
    answer.case("random layers")
    check(weight.telling(torch.float32))
    check(weight.telling(torch.float32))
    answer.case("no bias")
    check(weight.telling(torch.float32), bias=False)
    answer.case("float64")
    check(weight.telling())
    for case, args in [*weight.ones(), *weight.zeros()]:
        answer.case(case)
        check(args, named=False)
        if "lora_B" in case:
            check_own(answer, _linear(args[0], True), *args[1:])
    if weight.tiny:
        answer.case("tiny rows")
        check(weight.tiny_rows(), named=False)
    first, *rest = weight.telling(torch.float32)
    base = _linear(first, True)
    check_own(answer, base, *rest)
    expect_device(answer, base, *rest)
    answer.case("nothing else changed")
    for thing in answer.probe(probe.surroundings, base, *rest):
        # A new nn.Linear draws its numbers before they are overwritten.
        require(thing == "torch's random state", f"it changes {thing}: leave that as it is")


def expect_can_run(merged: probe.Module, base: nn.Linear) -> None:
    """A merged layer's sizes and dtypes are those of the layer it came from."""
    for name, want in (("in_features", base.in_features), ("out_features", base.out_features)):
        got = merged.numbers.get(name)
        require(got == want, f"expected {name} {want}, got {got}")
    want_dtype = str(base.weight.dtype).removeprefix("torch.")
    for name, parameter in merged.parameters.items():
        dtype = str(parameter.dtype).removeprefix("torch.")
        require(
            dtype == want_dtype,
            f"{name} is {dtype} where the given layer has {want_dtype}: it must be able to run",
        )


def check_own(answer: Answer, base: nn.Linear, *args: Any) -> None:
    """What comes back trains, and shares no memory with the layer that was given."""
    answer.case("one step of training")
    for name in answer.probe(probe.shared, base, *args):
        raise Refused(f"{name} is the given layer's own: a step of training would change both")
    found = answer.probe(probe.step, [base, *args], randn(4, base.in_features).to(base.weight))
    for name, before in found["before"].items():
        after = found["made"].parameters[name]
        require(after.requires_grad, f"{name} is frozen: the new layer can be trained")
        moved = not torch.equal(after.cpu(), before.cpu())
        require(moved, f"a step of training does not change {name} of the new layer")


def check_tensors_train(answer: Answer, names: Sequence[str], *args: Any) -> None:
    """The parameters that come back can be trained, each of its own memory."""
    answer.case("one step of training")
    found = answer.probe(probe.step_of_parameters, *args)
    require(not found["shared"], "two of them share their memory: make each its own")
    for name, before, after in zip(names, found["before"], found["after"], strict=True):
        moved = not torch.equal(before, after.detach())
        require(moved, f"a step of an optimizer does not change {name}")


# ---- A layer around a base ----


def check_layer(answer: Answer, forward: Oracle) -> None:
    """Refuse a layer whose values or gradients are not those of that spec.

    Args:
        forward: (x, weight, bias, lora_A, lora_B, *more parameters, alpha) -> y.
    """
    names = [slot.name for slot in forward.inputs[3:-1]]

    def check(
        args: list[Any], bias: bool = True, named: bool = True, gradient: bool = False
    ) -> None:
        x, weight, base_bias, *values, alpha = args
        args[2] = base_bias = base_bias if bias else torch.zeros_like(base_bias)
        base = _linear(weight, bias, base_bias)
        dy = randn(*x.shape[:-1], len(weight)).to(x)
        fills = dict(zip(names, values, strict=True))
        found = answer.probe(probe.layer, [base, len(values[0]), alpha], fills, x, dy)
        start = base(x).detach()
        kept = torch.equal(found["given"], x)
        require(kept, "forward changes the caller's x: make a new tensor instead")
        forward.refuse(found["value"], args, forward.want(args), named=named, by_heart=False)
        expect(found["start"], start, name="before any training", shape="(..., out)")
        same_base = torch.equal(found["module"].parameters["base.weight"].cpu(), base.weight)
        require(same_base, "forward changes base.weight: `+=` writes into it, use +")
        if gradient:
            frozen = found["gradients"]["base.weight"] is None
            require(frozen, "the frozen base gets a gradient")
            every = {**found["gradients"], "x": found["x"]}
            at = [forward.inputs[index].name for index in forward.wrt]
            forward.refuse_gradients([every[name] for name in at], args, [dy.double()])

    check_follows_base(answer)
    answer.case("random layers")
    check(forward.telling(torch.float32))
    check(forward.telling())
    answer.case("no bias")
    check(forward.telling(), bias=False)
    for lead in AXES:
        args = forward.some(forward.random_sizes(), lead)
        answer.case(axes_of("x", args[0]))
        check(args)
    for case, args in [*forward.ones(), *forward.zeros()]:
        answer.case(case)
        check(args, named=False)
    answer.case("tiny rows")
    check(forward.tiny_rows(), named=False)
    answer.case("gradient")
    check(forward.telling(), gradient=True)
    check_use(answer, forward, names)


USES = (
    ("evaluation", 0, "in evaluation mode"),
    ("changed", 1, "in evaluation mode, after A and B changed"),
    ("training", 1, "back in training mode"),
    ("copy", 0, "a deep copy with other values"),
    ("original", 1, "after a deep copy got other values"),
    ("first of two", 1, "after another layer was made and used"),
)


def check_use(answer: Answer, forward: Oracle, names: list[str]) -> None:
    """Refuse a layer that keeps something between its uses: modes, copies, other layers, calls."""
    sizes = forward.random_sizes()
    rounds = [forward.some(sizes) for _ in range(2)]
    x, weight, bias = rounds[0][:3]
    alpha, rank = rounds[0][-1], len(rounds[0][3])
    for args in rounds:
        args[:3], args[-1] = [x, weight, bias], alpha
    fills = [dict(zip(names, args[3:-1], strict=True)) for args in rounds]
    dy = randn(*x.shape[:-1], len(weight)).double()
    found = answer.probe(
        probe.use, [_linear(weight, True, bias), rank, alpha], fills, [x, 2 * x], dy
    )
    for key, which, text in USES:
        answer.case(text)
        args = rounds[which]
        forward.refuse(found[key], args, forward.want(args), named=False, by_heart=False)
    answer.case("two forward passes before a backward pass, the first in evaluation mode")
    for scale, grads in zip((1, 2), found["gradients"], strict=True):
        args = [scale * x, *rounds[1][1:]]
        at = [forward.inputs[index].name for index in forward.wrt]
        forward.refuse_gradients([grads[name] for name in at], args, [dy])
    answer.case("one step of training")
    for name in names:
        before, after = fills[1][name], found["stepped"].parameters[name]
        require(
            not torch.equal(before, after.detach().cpu()),
            f"a step of an optimizer does not change {name}",
        )
    args = [*rounds[1][:3], *(found["stepped"].parameters[n].detach() for n in names), alpha]
    forward.refuse(found["after"], args, forward.want(args), named=False, by_heart=False)
    answer.case("self.base with other weights")
    args[1] = 2 * args[1]
    forward.refuse(found["base changed"], args, forward.want(args), named=False, by_heart=False)


def build_layer(
    answer: Answer, base: nn.Linear, rank: int, alpha: float
) -> tuple[probe.Module, probe.Module]:
    found = answer.probe(probe.build, base, rank, alpha)
    return expect_module(found["made"], "Module"), found["given"][0]


def check_parameters(answer: Answer, linear: nn.Linear, *names: str) -> probe.Module:
    """Shapes and flags of a layer of rank 2 and alpha 3 around an nn.Linear(5, 3).

    names: of all that it trains.
    """
    module, base = build_layer(answer, linear, 2, 3.0)
    expect_parameter(module, "lora_A", (2, 5))
    expect_parameter(module, "lora_B", (3, 2))
    require("base" in module.modules, "it keeps the given layer as self.base")
    kept = "base" in answer.probe(probe.shared, linear, 2, 3.0)
    require(kept, "base is a copy: keep the layer that was given")
    require(module.training["base"], "base is put into evaluation mode: leave its mode alone")
    for name in ("weight", "bias"):
        require(
            not base.parameters[name].requires_grad,
            f"base.{name} is not frozen: the optimizer would train it",
        )
    for name in names:
        known = name in module.parameters or name in module.tensors
        require(known, f"it has no parameter called {name}")
    for name, parameter in module.parameters.items():
        trains = parameter.requires_grad and name not in names
        require(not trains, f"{name} trains too: only the adapter should")
    got = module.numbers.get("scaling")
    require(got is not None, "it has no number called scaling")
    require(got == 1.5, f"expected scaling 1.5 for alpha 3, rank 2, got {got:g}")
    return module


def check_start(answer: Answer) -> None:
    """lora_A on +-1/sqrt(in), new each time; lora_B zero."""

    def start(in_features: int, rank: int) -> Tensor:
        module, _ = build_layer(answer, nn.Linear(in_features, 8), rank, 32.0)
        lora_B = module.parameters["lora_B"]
        require(
            not lora_B.any(), "lora_B is not zero at the start: the layer differs from its base"
        )
        return module.parameters["lora_A"]

    check_uniform(start)


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
        drawn = f"drawn uniformly from +-1/sqrt(in) = +-{bound:.4f}"
        require(
            0.98 * bound < largest <= 1.001 * bound,
            f"lora_A is not {drawn}: its largest entry is {largest:.4f}",
        )
        require(
            abs(mean) < 0.05 * bound and abs(std / bound * math.sqrt(3) - 1) < 0.05,
            f"lora_A is not {drawn}: mean {mean:.4f}, standard deviation {std:.4f}",
        )
        new = not torch.equal(lora_A, draw(in_features, rank))
        require(new, "lora_A is the same each time: set no seed")


def check_follows_base(answer: Answer) -> None:
    """The new parameters have the dtype and the device of the base."""
    answer.case("float64")
    module, _ = build_layer(answer, nn.Linear(5, 3).double(), 2, 3.0)
    for name, parameter in module.parameters.items():
        require(
            parameter.dtype == torch.float64,
            f"{name} is {str(parameter.dtype).removeprefix('torch.')} over a float64 base",
        )
    expect_device(answer, nn.Linear(5, 3), 2, 3.0)


def _linear(weight: Tensor, bias: bool, values: Tensor | None = None) -> nn.Linear:
    """A layer with this weight, and with a bias of these values or its own."""
    out, in_ = weight.shape
    layer = nn.Linear(in_, out, bias, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias and values is not None:
            layer.bias.copy_(values)
    return layer
