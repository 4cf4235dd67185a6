"""Checks of exercises/02_lora_recap.ipynb: LoRA from empty cells."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Lesson
from minidora.checks.expect import (
    expect,
    expect_device,
    expect_dtype_and_device,
    expect_gradient,
    expect_module,
    expect_parameter,
    expect_parts,
    randn,
    require,
)
from minidora.runner import probe

lesson = Lesson(
    2, "02_lora_recap", closed=("minidora.lora", "minidora.dora", "minidora.adapt", "peft")
)
EXAMPLE = "this is the answer to the example: compute it from the arguments"


@lesson.exercise(
    "2.1",
    title="How LoRA starts",
    difficulty="easy",
    minutes=10,
    teaches="why one factor is zero, the other is not, and how large it may be",
    hint="Which of the two must be zero so that B A = 0, and why may the other one not be?",
)
def init_lora(answer: Answer) -> None:
    answer.case("shapes")
    parts = expect_parts(answer(5, 3, 2), ("lora_A", "lora_B"))
    shapes = [tuple(getattr(part, "shape", ())) for part in parts]
    require(shapes != [(3, 2), (2, 5)], "the other way round: return lora_A, lora_B")
    for name, part, axes, shape in (
        ("lora_A", parts[0], "(rank, in)", (2, 5)),
        ("lora_B", parts[1], "(out, rank)", (3, 2)),
    ):
        require(isinstance(part, Tensor), f"{name} is no tensor")
        got = tuple(part.shape)
        require(got == shape, f"expected {name} of shape {axes} = {shape}, got {got}")
        require(isinstance(part, nn.Parameter), f"{name} is a plain tensor: use nn.Parameter")
        require(part.requires_grad, f"{name} is frozen: it is there to be trained")

    answer.case("which one is zero")
    lora_A, lora_B = answer(256, 48, 64)
    zero_A, zero_B = not lora_A.any(), not lora_B.any()
    require(
        not (zero_A and zero_B),
        "both are zero: each one's gradient holds the other, so neither ever moves",
    )
    require(not (zero_A and not zero_B), "the zero factor is lora_B, and here it is lora_A")
    require(zero_B, "lora_B is not zero: the adapted layer differs from its base at the start")

    answer.case("spread of lora_A")
    std, want = float(lora_A.detach().std()), 1 / math.sqrt(3 * 256)

    def near(value: float) -> bool:
        return abs(std / value - 1) < 0.05

    require(
        not near(1), f"lora_A has a standard deviation of 1, {1 / want:.0f} times what in=256 asks"
    )
    require(not near(math.sqrt(2 / 256)), "Kaiming-uniform with a = 0: LoRA takes a = sqrt(5)")
    require(not near(1 / math.sqrt(3 * 64)), "the bound is 1 / sqrt(rank): it is 1 / sqrt(in)")
    require(near(want), f"lora_A: expected a standard deviation of {want:.4f}, got {std:.4f}")
    largest = float(lora_A.detach().abs().max())
    require(
        0.98 / 16 < largest <= 1.001 / 16,
        f"lora_A: expected uniform on +-1/sqrt(in) = +-0.0625, its largest entry is {largest:.4f}",
    )
    require(not torch.equal(lora_A, answer(256, 48, 64)[0]), "lora_A is the same each time")


def _delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s B A as a sum of outer products, one for each rank, in float64."""
    a, b = lora_A.double(), lora_B.double()
    return scaling * sum(
        (torch.outer(b[:, i], a[i]) for i in range(len(a))), torch.zeros(len(b), a.shape[1])
    )


@lesson.exercise(
    "2.2",
    title="The update and its scaling",
    difficulty="easy",
    minutes=5,
    teaches="the order of B and A for a weight of shape (out, in), and what alpha does",
    hint="A weight is (out, in). Which product of (out, rank) and (rank, in) has this shape?",
)
def lora_delta(answer: Answer) -> None:
    def known(a: Tensor, b: Tensor, alpha: float) -> list[tuple[Tensor, str]]:
        rank, out = len(a), len(b)
        right = _delta(a, b, alpha / rank)
        return [
            (example, EXAMPLE),
            (_delta(a, b, 1.0), "the scaling is missing: s = alpha / rank"),
            (_delta(a, b, alpha), "scaled by alpha alone: s = alpha / rank"),
            (_delta(a, b, alpha / rank**0.5), "scaled by alpha / sqrt(rank): s = alpha / rank"),
            (_delta(a, b, alpha / out), "divided by out: the rank is lora_A.shape[0]"),
            (_delta(a, b, alpha // rank), "// rounds down: use / for alpha / rank"),
            (_delta(a, b, rank / alpha), "scaled by rank / alpha: s = alpha / rank"),
            (right.T, "this is (in, out), the transpose: a weight is (out, in)"),
            (right.T.reshape(right.shape), "reshape is no transpose: which entry goes where?"),
        ]

    answer.case("by hand")
    lora_A = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    lora_B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    example = torch.tensor([[3.0, 0.0, 6.0], [0.0, 3.0, 0.0], [3.0, 3.0, 6.0], [6.0, 0.0, 12.0]])
    expect(answer(lora_A, lora_B, 6.0), example, known(lora_A, lora_B, 6.0)[1:], shape="(out, in)")
    answer.case("random factors")
    for out, in_, rank, alpha in ((5, 3, 4, 3.0), (2, 7, 3, 16.0), (4, 4, 2, 1.0)):
        a, b = randn(rank, in_), randn(out, rank)
        expect(answer(a, b, alpha), _delta(a, b, alpha / rank), known(a, b, alpha))
    answer.case("gradient")
    a, b, cotangent = randn(2, 5), randn(3, 2), randn(3, 5)
    found = answer.probe(probe.gradients, [a, b, 3.0], [0, 1], cotangent)
    expect_gradient(found["gradients"][0], 1.5 * b.T @ cotangent, "lora_A")
    expect_gradient(found["gradients"][1], 1.5 * cotangent @ a.T, "lora_B")
    expect_dtype_and_device(answer, a, b, 3.0)


@lesson.exercise(
    "2.3",
    title="The forward pass",
    difficulty="medium",
    minutes=10,
    teaches="how the update acts beside the frozen weight, and that B A is never built",
    hint="x has in features. Which factor takes them to rank, and which takes rank to out?",
)
def lora_forward(answer: Answer) -> None:
    def parts(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """x W^T and (x A^T) B^T by sums over single entries, in float64."""
        x, w, a, b = x.double(), w.double(), a.double(), b.double()
        base = (x[..., None, :] * w).sum(-1)
        return base, ((x[..., None, :] * a).sum(-1)[..., None, :] * b).sum(-1)

    def check(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
        base, low = parts(x, w, a, b)
        s = alpha / len(a)
        expect(
            answer(x, w, bias, a, b, alpha),
            base + bias + s * low,
            [
                (base + bias + low, "the scaling is missing: s = alpha / rank"),
                (base + bias + alpha * low, "scaled by alpha alone: s = alpha / rank"),
                (base + s * low, "the bias is missing"),
                (base + bias + s * (low + bias), "the bias is in it twice, once scaled"),
                (base + s * (low + bias), "the bias is scaled: add it last, as it is"),
                (s * low, "only the update is here: add it to x W^T + bias"),
                (base + bias, "the update is missing"),
            ],
            shape="(..., out)",
        )

    answer.case("by hand")
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    bias = torch.tensor([10.0, 20.0])
    lora_A, lora_B = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0], [2.0]])
    check(torch.tensor([[1.0, 2.0, 3.0]]), weight, bias, lora_A, lora_B, 4.0)
    answer.case("random layers")
    for out, in_, rank, alpha in ((5, 3, 2, 3.0), (2, 7, 3, 16.0), (4, 4, 2, 1.0)):
        check(randn(6, in_), randn(out, in_), randn(out), randn(rank, in_), randn(out, rank), alpha)
    for shape in ((2, 3, 5), (5,), (2, 2, 3, 5)):
        answer.case(f"x of shape {shape}")
        check(randn(*shape), randn(4, 5), randn(4), randn(2, 5), randn(4, 2), 5.0)
    answer.case("gradient")
    x, w, bias, a, b = randn(6, 5), randn(3, 5), randn(3), randn(2, 5), randn(3, 2)
    cotangent = randn(6, 3)
    found = answer.probe(probe.gradients, [x, w, bias, a, b, 3.0], [0, 3, 4], cotangent)
    to_x, to_a, to_b = found["gradients"]
    expect_gradient(to_a, 1.5 * b.T @ cotangent.T @ x, "lora_A")
    expect_gradient(to_b, 1.5 * cotangent.T @ (x @ a.T), "lora_B")
    expect_input_gradient(to_x, cotangent, w, _delta(a, b, 1.5))
    expect_dtype_and_device(answer, x, w, bias, a, b, 3.0)


def _adapted_model() -> nn.Module:
    """A small model of everything that a real one holds, with one adapted layer deep inside."""
    adapted = nn.Module()
    adapted.base = nn.Linear(6, 4)
    adapted.lora_A = nn.Parameter(torch.randn(2, 6))
    adapted.lora_B = nn.Parameter(torch.zeros(4, 2))
    block = nn.Sequential(nn.LayerNorm(6), adapted, nn.ReLU(), nn.Linear(4, 4))
    model = nn.Module()
    model.embedding = nn.Embedding(9, 6)
    model.blocks = nn.Sequential(block)
    model.exploration = nn.Linear(4, 2)  # "lora" stands in this name too
    model.lora_head = nn.Linear(2, 2)
    model.temperature = nn.Parameter(torch.ones(1))
    return model


@lesson.exercise(
    "2.4",
    title="Freeze everything but the adapters",
    difficulty="medium",
    minutes=10,
    teaches="what a loop over nn.Linear layers leaves trainable",
    hint="named_parameters() lists all of them. What do the names of the adapters end with?",
)
def freeze_base(answer: Answer) -> None:
    def frozen(model: nn.Module) -> tuple[probe.Module, dict[str, bool]]:
        after = answer.probe(probe.in_place, model)
        values = dict(model.named_parameters())
        require(
            after.parameters.keys() == values.keys(), "the model has other parameters afterwards"
        )
        for name, parameter in after.parameters.items():
            require(torch.equal(parameter, values[name]), f"the values of {name} have changed")
        state = {name: not value.requires_grad for name, value in after.parameters.items()}
        return after, state

    def adapters(names: Any) -> list[str]:
        return [name for name in names if name.split(".")[-1] in ("lora_A", "lora_B")]

    answer.case("a mixed model")
    model = _adapted_model()
    after, state = frozen(model)
    require(any(state.values()), "nothing is frozen: it is the parameters that need it")
    for name in adapters(state):
        require(not state[name], f"{name} is frozen too: the adapters are what is trained")
    for name, letters in (("exploration.weight", "lora"), ("lora_head.weight", "lora_")):
        by_letters = not state[name] and state["embedding.weight"]
        require(not by_letters, f"{name} still trains: its name holds the letters {letters}")
    left = [name for name, is_frozen in state.items() if not is_frozen]
    left = sorted(set(left) - set(adapters(state)))
    linear = [name for name in left if after.modules[name.rpartition(".")[0]] == "Linear"]
    reason = "" if linear else ": there are more than nn.Linear layers in a model"
    require(not left, f"{left[0] if left else ''} still trains{reason}")

    answer.case("a frozen model")
    _, state = frozen(model.requires_grad_(False))
    for name in adapters(state):
        require(not state[name], f"{name} was frozen before and still is: set both ways")

    answer.case("a single layer")
    single: Any = _adapted_model().blocks[0][1]  # type: ignore[index]
    _, state = frozen(single)
    require(not state["lora_A"] and not state["lora_B"], "in a single layer lora_A is frozen too")
    require(state["base.weight"] and state["base.bias"], "in a single layer base.weight trains")


@lesson.exercise(
    "2.5",
    title="Merge the update into the weight",
    difficulty="medium",
    minutes=10,
    teaches="that a merged layer is a plain nn.Linear, and how the base stays as it was",
    hint="What must be copied so that the layer you were given keeps its weight and its bias?",
)
def merge_lora(answer: Answer) -> None:
    def check(base: nn.Linear, a: Tensor, b: Tensor, alpha: float) -> None:
        merged = expect_module(answer(base, a, b, alpha), "Linear")
        check_can_run(merged, base)
        weight = base.weight.detach().double()
        s = alpha / len(a)
        delta = _delta(a, b, s)
        expect(
            merged.parameters.get("weight"),
            weight + delta,
            [
                (weight + _delta(a, b, 1.0), "the scaling is missing: s = alpha / rank"),
                (weight + _delta(a, b, alpha), "scaled by alpha alone: s = alpha / rank"),
                (delta, "only the update is here: W' = W + s B A"),
                (weight - delta, "the update is subtracted: W' = W + s B A"),
                (weight, "the update is missing: W' = W + s B A"),
                (weight + delta.T.reshape(weight.shape), "reshape is no transpose: B A is enough"),
            ],
            "weight",
        )
        bias = merged.parameters.get("bias")
        if base.bias is None:
            require(bias is None, "the base has no bias and the merged layer has one")
        else:
            require(bias is not None, "the bias is lost")
            require(torch.equal(bias, base.bias), "the bias is not the base's")  # type: ignore[arg-type]

    answer.case("by hand")
    base = nn.Linear(2, 3)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    check(base, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0], [2.0]]), 2.0)
    answer.case("random layers")
    for out, in_, rank, alpha in ((5, 3, 2, 3.0), (2, 7, 4, 6.0), (4, 4, 2, 1.0)):
        check(nn.Linear(in_, out), randn(rank, in_), randn(out, rank), alpha)
    answer.case("no bias")
    check(nn.Linear(3, 5, bias=False), randn(2, 3), randn(5, 2), 3.0)
    check_nothing_shared(answer, nn.Linear(3, 5), randn(2, 3), randn(5, 2), 3.0)
    expect_dtype_and_device(answer, nn.Linear(3, 5), randn(2, 3), randn(5, 2), 3.0)


@lesson.exercise(
    "2.6",
    answer="LoRALinear",
    title="The LoRA layer",
    difficulty="hard",
    minutes=20,
    teaches="how the pieces make one module that an optimizer can train",
    hint="Which of its tensors does the optimizer train, and where must they be when it asks?",
)
def lora_linear(answer: Answer) -> None:
    answer.case("parameters")
    check_adapter(answer, nn.Linear(5, 3), "lora_A", "lora_B")
    answer.case("start")
    check_start(answer, 256)

    for shape, has_bias in (((6, 5), True), ((6, 5), False), ((2, 4, 5), True)):
        answer.case(f"x of shape {shape}" if has_bias else "no bias")
        linear, a, b, x = nn.Linear(5, 3, has_bias), randn(2, 5), randn(3, 2), randn(*shape)
        cotangent = randn(*shape[:-1], 3)
        values = {"lora_A": a, "lora_B": b}
        found = answer.probe(probe.layer, [linear, 2, 3.0], values, x, cotangent)
        weight = linear.weight.detach().double()
        bias = linear.bias.detach() if has_bias else torch.zeros(3)
        y, low = x.double() @ weight.T, x.double() @ _delta(a, b, 1.0).T
        expect(
            found["value"],
            y + bias + 1.5 * low,
            [
                (y + bias + low, "the scaling is missing in forward"),
                (y + 1.5 * low, "the bias is missing"),
                (y + bias, "the update is missing"),
                (1.5 * low, "only the update is here: add it to what base answers"),
            ],
            shape="(..., out)",
        )
        check_forward(found, linear, x)
    answer.case("gradient")
    flat_x, flat_g = x.reshape(-1, 5), cotangent.reshape(-1, 3)
    expect_gradient(found["gradients"]["lora_A"], 1.5 * b.T @ flat_g.T @ flat_x, "lora_A")
    expect_gradient(found["gradients"]["lora_B"], 1.5 * flat_g.T @ flat_x @ a.T, "lora_B")
    require(found["gradients"]["base.weight"] is None, "the frozen base gets a gradient")
    expect_input_gradient(found["x"], cotangent, weight, _delta(a, b, 1.5))
    check_follows_base(answer)


# ---- What LoRA's and DoRA's exercises have in common ----


def expect_input_gradient(got: Any, cotangent: Tensor, weight: Tensor, update: Tensor) -> None:
    """Refuse unless got is the gradient of x in y = x (weight + update)^T; both in float64."""
    dy, weight, update = cotangent.double(), weight.double(), update.double()
    known = [
        (dy @ weight, "it comes through x W^T alone, but x is in the update too"),
        (dy @ update, "it comes through the update alone: the layers before need W's part too"),
    ]
    expect_gradient(got, dy @ (weight + update), "x", known)


def check_can_run(merged: probe.Module, base: nn.Linear) -> None:
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


def check_nothing_shared(answer: Answer, *args: Any) -> None:
    """The layer that an answer returns has parameters of its own."""
    for name in answer.probe(probe.shared, *args):
        message = f"{name} is the given layer's own: a step of training would change both"
        require(False, message)


def build_layer(
    answer: Answer, base: nn.Linear, rank: int, alpha: float
) -> tuple[probe.Module, probe.Module]:
    found = answer.probe(probe.build, base, rank, alpha)
    return expect_module(found["made"], "Module"), found["given"][0]


def check_adapter(answer: Answer, linear: nn.Linear, *names: str) -> probe.Module:
    """Shapes and flags of a layer of rank 2 and alpha 3 around an nn.Linear(5, 3).

    names: of all that it trains.
    """
    module, base = build_layer(answer, linear, 2, 3.0)
    expect_parameter(module, "lora_A", (2, 5))
    expect_parameter(module, "lora_B", (3, 2))
    require("base" in module.modules, "it keeps the given layer as self.base")
    for name in ("weight", "bias"):
        require(
            not base.parameters[name].requires_grad,
            f"base.{name} is not frozen: the optimizer would train it",
        )
    for name, parameter in module.parameters.items():
        trains = parameter.requires_grad and name not in names
        require(not trains, f"{name} trains too: only the adapter should")
    kept = "base.weight" in answer.probe(probe.shared, linear, 2, 3.0)
    require(kept, "base is a copy: keep the layer that was given")
    got = module.numbers.get("scaling")
    require(got is not None, "it has no number called scaling")
    require(got == 1.5, f"expected scaling 1.5 for alpha 3, rank 2, got {got:g}")
    return module


def check_start(answer: Answer, in_features: int) -> None:
    """lora_A on +-1/sqrt(in), new each time; lora_B zero."""
    module, _ = build_layer(answer, nn.Linear(in_features, 8), 32, 32.0)
    lora_A, lora_B = module.parameters["lora_A"].detach(), module.parameters["lora_B"]
    require(not lora_B.any(), "lora_B is not zero at the start: the layer differs from its base")
    largest, bound = float(lora_A.abs().max()), 1 / math.sqrt(in_features)
    require(largest > 0, "lora_A is zero: then lora_B never gets a gradient")
    require(
        largest <= 1.001 * bound,
        f"lora_A is too large: expected +-1/sqrt(in) = +-{bound:.4f}, got up to {largest:.4f}",
    )
    require(largest > 0.95 * bound, f"lora_A is too small: up to {largest:.4f}, not {bound:.4f}")
    mean, std = float(lora_A.mean()), float(lora_A.std())
    even = abs(mean) < 0.05 * bound and abs(std / bound - 1 / math.sqrt(3)) < 0.05
    require(
        even, f"lora_A is not drawn uniformly from +-1/sqrt(in): mean {mean:.4f}, std {std:.4f}"
    )
    again, _ = build_layer(answer, nn.Linear(in_features, 8), 32, 32.0)
    new = not torch.equal(lora_A, again.parameters["lora_A"])
    require(new, "lora_A is the same each time: set no seed")


WRITES = "forward changes base.weight: `+=` writes into it, use +"


def check_forward(found: dict[str, Any], linear: nn.Linear, x: Tensor) -> None:
    """What probe.layer found beside y: the start, and the base afterwards."""
    with torch.no_grad():
        expect(found["start"], linear(x), name="before any training", shape="(..., out)")
    after = found["module"].parameters["base.weight"]
    require(torch.equal(after.cpu(), linear.weight), WRITES)


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
