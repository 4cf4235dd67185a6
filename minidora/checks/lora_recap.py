"""Checks of exercises/02_lora_recap.ipynb: LoRA from empty cells."""

from typing import Any

import torch
from torch import Tensor, nn

from minidora.checks import adapters
from minidora.checks.exercise import Answer, Lesson, Refused
from minidora.checks.expect import expect_parameter, expect_parts, require, type_name
from minidora.checks.oracle import Wrong, product
from minidora.checks.spec import spec
from minidora.runner import probe

lesson = Lesson(
    2, "02_lora_recap", closed=("minidora.lora", "minidora.dora", "minidora.adapt", "peft")
)


@lesson.exercise(
    "2.1",
    title="How LoRA starts",
    difficulty="easy",
    minutes=10,
    teaches="why one factor is zero, the other is not, and how large it may be",
    hint="Which of the two must be zero so that B A = 0, and why may the other one not be?",
)
def init_lora(answer: Answer) -> None:
    names = ("lora_A", "lora_B")

    def drawn(in_: int, out: int, rank: int) -> list[Tensor]:
        parts = expect_parts(answer(in_, out, rank), names)
        shapes = [tuple(getattr(part, "shape", ())) for part in parts]
        turned = shapes == [(out, rank), (rank, in_)] != [(rank, in_), (out, rank)]
        require(not turned, "the other way round: return lora_A, lora_B")
        expect_parameter(parts[0], "lora_A", (rank, in_), "(rank, in)")
        expect_parameter(parts[1], "lora_B", (out, rank), "(out, rank)")
        for name, part in zip(names, parts, strict=True):
            new = f"{name} is {type_name(part.dtype)}: new parameters are float32"
            require(part.dtype == torch.float32, new)
        return [part.detach() for part in parts]

    answer.case("shapes")
    drawn(5, 3, 2)
    answer.case("which one is zero")
    zero_A, zero_B = (not part.any() for part in drawn(256, 96, 64))
    both = "both are zero: each one's gradient holds the other, so neither ever moves"
    require(not (zero_A and zero_B), both)
    require(not zero_A, "the zero factor is lora_B, and here it is lora_A")
    require(zero_B, "lora_B is not zero: the adapted layer differs from its base at the start")
    answer.case("sizes of 1, and a rank above both sides")
    for sizes in ((1, 1, 1), (3, 1, 2), (1, 4, 1), (4, 2, 9)):
        drawn(*sizes)
    answer.case("spread of lora_A")
    adapters.check_uniform(lambda in_, rank: drawn(in_, 8, rank)[0])
    adapters.check_tensors_train(answer, names, 5, 3, 2)


# ---- 2.2 and 2.3: the update, and the forward pass ----


@spec(
    lesson,
    "2.2",
    title="The update and its scaling",
    difficulty="easy",
    minutes=5,
    teaches="the order of B and A for a weight of shape (out, in), and what alpha does",
    hint="A weight is (out, in). Which product of (out, rank) and (rank, in) has this shape?",
    shapes="(rank, in), (out, rank), alpha -> (out, in)",
)
def lora_delta(lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return alpha / len(lora_A) * product(lora_A, lora_B)


def _wrong_deltas(a: Tensor, b: Tensor, alpha: float) -> Wrong:
    rank, out, ba = len(a), len(b), product(a, b)
    right = alpha / rank * ba
    yield "the scaling is missing: s = alpha / rank", ba
    yield "scaled by alpha alone: s = alpha / rank", alpha * ba
    yield "scaled by alpha / sqrt(rank): s = alpha / rank", alpha / rank**0.5 * ba
    yield "divided by out: the rank is lora_A.shape[0]", alpha / out * ba
    yield "// rounds down: use / for alpha / rank", alpha // rank * ba
    yield "scaled by rank / alpha: s = alpha / rank", rank / alpha * ba
    yield "this is (in, out), the transpose: a weight is (out, in)", right.T
    yield "reshape is not transpose: which entry goes where?", right.T.reshape(right.shape)


lora_delta.example(
    [[1, 0, 2], [0, 1, 0]],
    [[1, 0], [0, 1], [1, 1], [2, 0]],
    6.0,
    gives=[[3, 0, 6], [0, 3, 0], [3, 3, 6], [6, 0, 12]],
)
lora_delta.mistakes_of(_wrong_deltas)


@spec(
    lesson,
    "2.3",
    title="The forward pass",
    difficulty="medium",
    minutes=10,
    teaches="how the update acts beside the frozen weight, one factor after the other",
    hint="x has in features. Which factor takes them to rank, and which takes rank to out?",
    shapes="(..., in), (out, in), (out,), (rank, in), (out, rank), alpha -> (..., out)",
    grads=("lora_A", "lora_B", "x"),
    tiny=("weight", "lora_B", "bias"),
)
def lora_forward(
    x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float
) -> Tensor:
    adapted: Tensor = weight + alpha / len(lora_A) * product(lora_A, lora_B)
    return (x[..., None, :] * adapted).sum(-1) + bias


def _wrong_outputs(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, alpha: float) -> Wrong:
    base, low, s = x @ w.T, x @ product(a, b).T, alpha / len(a)
    yield "the scaling is missing: s = alpha / rank", base + bias + low
    yield "scaled by alpha alone: s = alpha / rank", base + bias + alpha * low
    yield "the bias is missing", base + s * low
    yield "the bias is in it twice, once scaled", base + bias + s * (low + bias)
    yield "the bias is scaled: add it last, as it is", base + s * (low + bias)
    yield "only the update is here: add it to x W^T + bias", s * low
    yield "the update is missing", base + bias


lora_forward.example(
    [[1, 2, 3]],
    [[1, 0, 2], [0, 1, 1]],
    [10, 20],
    [[1, 1, 0]],
    [[1], [2]],
    4.0,
    gives=[[29, 49]],
)
lora_forward.mistakes_of(_wrong_outputs)


def _x_apart(beside_w: Tensor, in_update: Tensor, *rest: Any) -> Tensor:
    """y from one x beside W, and another in the update."""
    w, bias, a, b, alpha = rest
    y: Tensor = beside_w @ w.T + bias + alpha / len(a) * in_update @ product(a, b).T
    return y


lora_forward.slope_mistake(
    "it comes through x W^T alone, but x is in the update too",
    lambda at, x, *rest: _x_apart(x, at[0], *rest),
)
lora_forward.slope_mistake(
    "it comes through the update alone: the layers before need W's part too",
    lambda at, x, *rest: _x_apart(at[0], x, *rest),
)


# ---- 2.4: what trains ----


LETTERS = {
    "exploration.weight": "lora",
    "lora_head.weight": "lora_",
    "lora_scale": "lora_",
    "lora_a": "lora_A, in another case",
    "lora_A_norm.weight": "lora_A",
    "old_lora_B": "lora_B",
    "lora_B.weight": "lora_B",
}
"""Parameters of this model that are no factors, though their names hold these letters."""


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
    model.lora_A_norm = nn.LayerNorm(2)
    model.old_lora_B = nn.Parameter(torch.ones(3))
    model.lora_scale = nn.Parameter(torch.ones(3))
    model.lora_a = nn.Parameter(torch.ones(3))
    model.single = nn.LayerNorm(2)
    model.single.lora_A = nn.Parameter(torch.ones(1, 2))  # without a lora_B beside it
    model.lora_B = nn.Linear(2, 2)  # a layer of that name: its parameters are weight and bias
    model.tied = nn.Embedding(9, 6)
    model.tied.weight = model.embedding.weight
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
    def trained(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
        """Names of the parameters that train afterwards: all, of factors; and factors that do not.

        Refuses whoever changes more than requires_grad, or another model than the one given.
        """
        before = probe.unpack(probe.pack(model))
        found = answer.probe(probe.build, model)
        made, after = found["made"], found["given"][0]
        names = after.parameters.keys()
        require(names == before.parameters.keys(), "the model has other parameters afterwards")
        for name, parameter in after.parameters.items():
            kept = torch.equal(parameter, before.parameters[name])
            require(kept, f"the values of {name} have changed")
        ours = after.distinct == before.distinct
        require(ours, "parameters are replaced by new ones: set requires_grad of those there")
        as_it_was = after.training == before.training
        require(as_it_was, "it changes the mode of the model: leave train() and eval() alone")
        train = [name for name in names if after.parameters[name].requires_grad]
        if isinstance(made, probe.Module):
            same_model = train == [n for n, p in made.parameters.items() if p.requires_grad]
            require(same_model, "the model that was given is not the one you changed: make no copy")
        factors = [name for name in names if name.split(".")[-1] in ("lora_A", "lora_B")]
        too_many = [name for name in train if name not in factors]
        return train, too_many, [name for name in factors if name not in train]

    answer.case("a mixed model")
    model = _adapted_model()
    every, too_many, missing = trained(model)
    some = len(every) < len(dict(model.named_parameters(remove_duplicate=False)))
    require(some, "nothing is frozen in the given model: set it on its parameters, not on a copy")
    for name in missing:
        raise Refused(f"{name} is frozen too: the adapters are what is trained")
    for name, letters in LETTERS.items():
        by_letters = name in too_many and "embedding.weight" not in too_many
        require(not by_letters, f"{name} still trains: its name holds the letters {letters}")
    kinds = [type(model.get_submodule(name.rpartition(".")[0])) for name in too_many]
    reason = "" if nn.Linear in kinds else ": there are more than nn.Linear layers in a model"
    for name in sorted(too_many):
        raise Refused(f"{name} still trains{reason}")
    answer.case("a frozen model")
    for name in trained(model.requires_grad_(False))[2]:
        raise Refused(f"{name} was frozen before and still is: set both ways")
    answer.case("a single layer")
    single = _adapted_model().get_submodule("blocks.0.1")
    _, too_many, missing = trained(single)
    require(not missing, "in a single layer lora_A is frozen too")
    require(not too_many, "in a single layer base.weight trains")


# ---- 2.5 and 2.6: layers ----


@adapters.Merge.declare(
    lesson,
    "2.5",
    title="Merge the update into the weight",
    difficulty="medium",
    minutes=10,
    teaches="that a merged layer is a plain nn.Linear, and how the base stays as it was",
    hint="What must be copied so that the layer you were given keeps its weight and its bias?",
    shapes="(out, in), (rank, in), (out, rank), alpha -> (out, in)",
)
def merge_lora(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    return weight + alpha / len(lora_A) * product(lora_A, lora_B)


@merge_lora.mistakes_of
def _wrong_merges(w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Wrong:
    ba, s = product(a, b), alpha / len(a)
    yield "the scaling is missing: s = alpha / rank", w + ba
    yield "scaled by alpha alone: s = alpha / rank", w + alpha * ba
    yield "only the update is here: W' = W + s B A", s * ba
    yield "the update is subtracted: W' = W + s B A", w - s * ba
    yield "the update is missing: W' = W + s B A", w
    yield "reshape is not transpose: B A is enough", w + s * ba.T.reshape(w.shape)


merge_lora.example(
    [[1, 2], [3, 4], [5, 6]], [[1, 0]], [[1], [0], [2]], 2.0, gives=[[3, 2], [3, 4], [9, 6]]
)


@adapters.Layer.declare(
    lesson,
    "2.6",
    answer="LoRALinear",
    title="The LoRA layer",
    difficulty="hard",
    minutes=20,
    teaches="how the pieces make one module that an optimizer can train",
    hint="Which of its tensors does the optimizer train, and where must they be when it asks?",
    like=lora_forward,
)
def lora_linear() -> None:
    """The y of lora_forward, from a layer that holds lora_A and lora_B."""
