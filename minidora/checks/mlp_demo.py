"""Checks of exercises/04_mlp_demo.ipynb: adapt a whole model, train it, compare honestly."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations, pairwise, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Lesson, Refused, Unstarted, kind_of
from minidora.checks.expect import (
    NOTHING,
    dice,
    expect,
    expect_device,
    expect_module,
    expect_nothing_changed,
    expect_number,
    expect_parts,
    randn,
    random_size,
    require,
)
from minidora.checks.oracle import BY_HEART, Wrong
from minidora.checks.spec import spec
from minidora.dora import DoRALinear
from minidora.lora import LoRALinear
from minidora.runner import probe

lesson = Lesson(
    4,
    "04_mlp_demo",
    closed=("minidora.adapt", "minidora.data", "minidora.training", "minidora.experiment", "peft"),
    opened=("minidora.adapter", "minidora.dora", "minidora.kernels", "minidora.lora"),
)


def refuse_any(found: Sequence[object], message: str) -> None:
    """Refuse, naming the first of what was found, unless nothing was."""
    if found:
        raise Refused(message.format(found[0]))


def expect_error(answer: Answer, *args: Any, message: str) -> None:
    """Refuse with this message unless the learner's function raises an error, of whatever kind."""
    try:
        answer.probe(probe.build, *args)
    except Unstarted:  # a NotImplementedError of the learner's: the stub was refused before
        pass
    except Refused as refused:
        if not refused.message.startswith("your code raised"):
            raise
    else:
        raise Refused(message)


class Changes(NamedTuple):
    """Names of what is not as it was in a model: of tensors, and of layers in another mode."""

    values: list[str]
    frozen: list[str]
    thawed: list[str]
    modes: list[str]


def changes(model: nn.Module, now: probe.Module) -> Changes:
    was, tensors = dict(model.named_parameters()), {**now.parameters, **now.tensors}
    turned = [k for k, v in was.items() if now.parameters[k].requires_grad != v.requires_grad]
    return Changes(
        [k for k, v in {**was, **dict(model.named_buffers())}.items() if not _equal(tensors[k], v)],
        [name for name in turned if was[name].requires_grad],
        [name for name in turned if not was[name].requires_grad],
        [k for k, module in model.named_modules() if now.training[k] != module.training],
    )


def _equal(now: Any, before: Tensor) -> bool:
    return isinstance(now, Tensor) and now.dtype == before.dtype and torch.equal(now, before)


# ---- 4.1: accuracy ----


def _labels(logits: Tensor) -> list[int]:
    """The class of the largest logit of each image."""
    rows = logits.tolist()
    return [max(range(len(row)), key=row.__getitem__) for row in rows]


def _normalised(x: Tensor, eps: float) -> Tensor:
    """What batch normalisation makes of x in training mode, before weight and bias; float64."""
    x = x.double()
    return (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()


def _logits(last: nn.Linear, x: Tensor) -> Tensor:
    """In float64."""
    return x.double() @ last.weight.detach().double().T + last.bias.detach().double()


def _classifier(last: nn.Linear, training: bool) -> nn.Sequential:
    """A linear classifier. While training, its dropout lets nothing through: each image gets the
    bias's class. In evaluation mode the dropout and the normalisation change nothing."""
    norm = nn.BatchNorm1d(last.in_features)
    norm.running_var = torch.full((last.in_features,), 1 - norm.eps)
    return nn.Sequential(nn.Dropout(1.0), norm, last).to(last.weight.dtype).train(training)


def _check_accuracy(
    answer: Answer, last: nn.Linear, x: Tensor, y: list[int], training: bool
) -> None:
    def percent(logits: Tensor) -> float:
        return 100 * sum(a == b for a, b in zip(_labels(logits), y, strict=True)) / len(y)

    model, images, logits = _classifier(last, training), (x, torch.tensor(y)), _logits(last, x)
    right = percent(logits)
    known = [
        (right / 100, "this is the fraction: return it in percent"),
        (right * len(y) / 100, "this is the number of hits: return it in percent"),
        (100 - right, "these are the errors: accuracy counts the hits"),
    ]
    if training:
        partly, dropped = (percent(_logits(last, z)) for z in (_normalised(x, 1e-5), 0 * x))
        known.append((partly, "a layer is still in training mode: model.eval() sets them all"))
        known.append((dropped, "measured in training mode: eval() first"))
    if len(y) == last.out_features:
        message = "argmax runs over the images (dim=0): take the classes"
        known.append((percent(logits.T), message))
    found = answer.probe(probe.build, model, *images)
    expect_number(found["made"], right, known, tolerance=1e-5)
    after, *rest = found["given"]
    require(all(map(torch.equal, rest, images)), "it changes the caller's images or labels")
    changed = changes(model, after)
    refuse_any(changed.values, "{} is not as it was: leave the model as you found it")
    refuse_any(changed.frozen, "{} is frozen now: no_grad() is enough to measure")
    was, now = ("training", "evaluation")[:: 1 if training else -1]
    whole = "" in changed.modes
    require(not whole, f"a model in {was} mode is left in {now} mode: put it back")
    every = f"model.train({training}) sets every layer"
    refuse_any(changed.modes, f"layer {{}} is left in {now} mode, the model is not: {every}")


@lesson.exercise(
    "4.1",
    title="Accuracy",
    difficulty="easy",
    minutes=10,
    teaches="what evaluation mode is for, and to leave a model as you found it",
    hint="Which layers answer differently while training, and who sets the mode back afterwards?",
)
def accuracy(answer: Answer) -> None:
    x = torch.tensor(
        [[5, 0, 0, 3, 2], [0, 5, 0, 0, 0], [0, 0, 6, 0, 0], [1, 0, 5, 2, 1], [4, 0, 0, 0, 1.0]]
    )
    last, bias = nn.Linear(5, 5), torch.tensor([0, 0, 0.1, 0, 0])
    last.load_state_dict({"weight": torch.eye(5), "bias": bias})
    for case, training in (("by hand", False), ("training mode", True)):
        answer.case(case)
        _check_accuracy(answer, last, x, [0, 1, 2, 2, 3], training)
    count = random_size(1030, 1270)  # no multiple of a usual batch
    for case, dtype, images, classes, size in (
        ("random images", torch.float32, count, 3, 1),
        ("other images of the same shape", torch.float32, count, 3, 1),
        ("large logits", torch.float64, count, 5, 1000),
        ("float64", torch.float64, 77, 4, 1),
        ("two classes", torch.float64, 60, 2, 1),
    ):
        answer.case(case)
        last, x = nn.Linear(4, classes).to(dtype), size * randn(images, 4, dtype=dtype)
        y = _labels(_logits(last, x))
        wrong = random_size(images // 5, images // 3)
        y[:wrong] = [(label + 1) % classes for label in y[:wrong]]
        _check_accuracy(answer, last, x, y, training=True)
    answer.case("one image")
    for label in (0, 1):
        _check_accuracy(answer, last, x[:1], [label], training=False)
    given = _classifier(nn.Linear(4, 2), True), randn(2, 4), torch.tensor([0, 1])
    expect_device(answer, *given)
    expect_nothing_changed(answer, *given)


# ---- 4.2: parts of a dataset ----


def _parts(got: Any, sizes: list[int]) -> list[Tensor]:
    """The row numbers of each part."""
    require(got is not None, NOTHING)
    require(isinstance(got, list | tuple), f"expected a list of tensors, got {kind_of(got)}")
    require(len(got) == len(sizes), f"expected {len(sizes)} parts, got {len(got)}")
    for number, (part, size) in enumerate(zip(got, sizes, strict=True), start=1):
        tensor = isinstance(part, Tensor)
        require(tensor, f"part {number}: expected a tensor of rows, got {kind_of(part)}")
        whole = part.dtype == torch.int64 or size == 0  # of no numbers it says nothing
        require(whole, f"part {number}: expected row numbers (int64), got {part.dtype}")
        wanted = f"expected {size} row{'s' * (size != 1)}, shape ({size},)"
        fits = part.shape == (size,)
        require(fits, f"part {number}: {wanted}, got {tuple(part.shape)}")
    return list(got)


def _draws(answer: Answer, count: int, sizes: list[int], seeds: Sequence[int]) -> list[Tensor]:
    """The rows of each part, (seeds, size)."""
    found = answer.probe(probe.calls, [[count, sizes, seed] for seed in seeds])
    each = zip(*(_parts(got, sizes) for got in found), strict=True)
    return [torch.stack(part) for part in each]


def _expect_disjoint(parts: Iterable[Tensor], count: int) -> None:
    """Refuse parts of one draw that are no parts of count rows."""
    before: set[int] = set()
    for number, part in enumerate(parts, start=1):
        rows = part.tolist()
        outside = [row for row in rows if not 0 <= row < count]
        refuse_any(outside, f"there is no row {{}}: they run from 0 to {count - 1}")
        require(len(set(rows)) == len(rows), f"a row stands twice in part {number}")
        both = sorted(before.intersection(rows))
        refuse_any(both, f"row {{}} is in part {number} and in one before: draw once")
        before.update(rows)


def _expect_shuffled(draws: list[Tensor], count: int) -> None:
    """Refuse draws of a large dataset that are not from all of its rows."""
    for parts in zip(*draws, strict=True):
        _expect_disjoint(parts, count)
    rows = torch.cat(draws, dim=1)
    steps = rows.diff() % count
    usual = steps == steps.mode(dim=1, keepdim=True).values
    steady = bool((usual.double().mean(dim=1) > 0.8).any())
    require(not steady, "not shuffled: the rows follow one another at a fixed step")
    first = rows.max() < rows.shape[1]
    require(not first, "only the first rows are ever drawn: shuffle all of them, then cut")
    for number, part in enumerate(draws, start=1):
        middle = abs(float(part.double().mean()) / count - 0.5) < 0.15
        reason = "cut the shuffled order, do not sort it before"
        require(middle, f"part {number} comes from one end of the file: {reason}")


def _expect_anew(draws: list[Tensor], count: int, seeds: list[int]) -> None:
    """Refuse unless every two seeds differ in every part."""
    for number, part in enumerate(draws, start=1):
        for (a, first), (b, second) in combinations(zip(seeds, part, strict=True), 2):
            shared = int(torch.isin(first, second).sum())
            text = f"seeds {a} and {b} share {shared} of {len(first)} rows in part {number}"
            require(shared < 0.7 * len(first), f"{text}: each seed draws all parts anew")
            step = ((second - first) % count).unique().tolist()
            require(len(step) > 1, f"seed {b} gives the rows of seed {a}, moved on by {step[0]}")


def _expect_fair(answer: Answer, sizes: list[int]) -> None:
    """Refuse unless, of 5 rows, each and every pair of them gets into every part, of 2 rows."""
    # A right answer misses a pair (1 of 10) in 1000 draws with a probability of 1e-45, and a share
    # by 5 deviations: 1e-6.
    for number, part in enumerate(_draws(answer, 5, sizes, range(1000)), start=1):
        shares = [float((part == row).sum()) / len(part) for row in range(5)]
        row, share = max(enumerate(shares), key=lambda each: abs(each[1] - 0.4))
        text = f"of 5 rows, row {row} is in part {number} in {share:.0%} of draws, not 40%"
        require(abs(share - 0.4) < 0.08, f"{text}: give each row the same chance")
        together = set(map(tuple, part.sort().values.tolist()))
        never = [pair for pair in combinations(range(5), 2) if pair not in together]
        text = f"of 5 rows, {{}} are never together in part {number}"
        refuse_any(never, f"{text}: shuffle each row alone")


@lesson.exercise(
    "4.2",
    title="No image in two parts",
    difficulty="easy",
    minutes=10,
    teaches="to split data so that nothing reported was seen before, anew for each seed",
    hint="If one shuffled order is cut into pieces, can a row be in two of them?",
)
def split_rows(answer: Answer) -> None:
    answer.case("sizes")
    parts = _parts(answer(10, [5, 3, 2], 0), [5, 3, 2])
    answer.case("disjoint")
    _expect_disjoint(parts, 10)
    answer.case("parts of one row, and of none")
    for count, sizes in ((5, [1, 2, 1]), (12, [1, 4, 0, 1, 3]), (1, [1])):
        _expect_disjoint(_parts(answer(count, sizes, 3), sizes), count)
    answer.case("random")
    count, late = random_size(200, 300), random_size(1000, 10**6)
    sizes, seeds = [count // 3, count // 4], [0, 1, 2, late]
    draws = _draws(answer, count, sizes, seeds)
    _expect_shuffled(draws, count)
    seeds += [late + far for far in (1, 2, 10, 256, 1000, 2**16, 10**6, 2**31)]
    _expect_anew(_draws(answer, count, sizes, seeds), count, seeds)
    answer.case("repeatable")
    again = zip(seeds, *draws, *_draws(answer, count, sizes, seeds[:4]), strict=False)
    others = [seed for seed, a, b, *now in again if not all(map(torch.equal, (a, b), now))]
    refuse_any(others, "seed {} gives other rows each time: use seed")
    answer.case("every pair of rows")
    for sizes in ([2, 2], [2]):
        _expect_fair(answer, sizes)
    # torch.manual_seed is a right way to use the seed.
    expect_nothing_changed(answer, 10, [5, 3], 1, but=["torch's random state"])


# ---- 4.3: choosing ----


def _picked(scores: Tensor, chosen_by: Tensor) -> Tensor:
    """Of each row of scores, the number that stands where chosen_by is largest."""
    rows = zip(scores, _labels(chosen_by), strict=True)
    return torch.stack([row[column] for row, column in rows])


def _accuracies(*shape: int) -> Tensor:
    return 80 + randn(*shape, dtype=torch.float64)


def _alike(*shape: int) -> Tensor:
    """Accuracies that hardly differ, at times."""
    return 80 + dice.choice((1, 1e-3)) * randn(*shape, dtype=torch.float64)


@spec(
    lesson,
    "4.3",
    title="Choose on one set, report another",
    difficulty="easy",
    minutes=10,
    teaches="how a learning rate is chosen without a look at the images that are reported",
    hint="Which of the two tables may the choice read, and which one only the report?",
    shapes="(seeds, rates), (seeds, rates) -> (seeds,)",
    draw={"validation": _alike, "test": _accuracies},
    grads=(),
    tiny=(),
    half=False,  # two rates would reach the same accuracy
)
def chosen_scores(validation: Tensor, test: Tensor) -> Tensor:
    return _picked(test, validation)


@chosen_scores.mistakes_of
def _wrong_choices(validation: Tensor, test: Tensor) -> Wrong:
    columns = torch.tensor(_labels(validation))
    yield "chosen on the test images: the best of noisy scores is too good", _picked(test, test)
    yield "the choice looks at test too: choose on validation", _picked(test, validation + test)
    yield "the score that chose: report the test accuracy", _picked(validation, validation)
    yield "the tables are exchanged: choose on validation, report test", _picked(validation, test)
    one = "one rate for all seeds: each seed chooses its own"
    yield one, _picked(test, validation.mean(dim=0).expand_as(test))
    yield "the rate with the lowest validation accuracy", _picked(test, -validation)
    yield "these are numbers of columns: return what test holds there", columns
    yield "one per rate: choose one per seed", _picked(test.T, validation.T)
    yield "this is one mean: return one score per seed", _picked(test, validation).mean()
    if len(test) > 1:
        yield "test[:, best] gives every pair: take one number from each row", test[:, columns]


chosen_scores.example(
    [[80.0, 85.0, 83.0], [70.0, 72.0, 75.0]],
    [[84.0, 81.0, 82.0], [71.0, 79.0, 78.0]],
    gives=[81.0, 78.0],
)


# ---- 4.4: adapters in a copy ----

Make = Callable[[nn.Module], nn.Module]


def _nested_model() -> nn.Sequential:
    """Linear layers at several depths, three of them called head, and other layers; float64."""

    def block() -> nn.Sequential:
        mlp = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        query, norm, head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        return _named(query=query, norm=norm, mlp=mlp, head=head)

    blocks = nn.Sequential(block(), block())
    model = _named(
        embed=nn.Embedding(9, 6), blocks=blocks, scale=nn.BatchNorm1d(6), drop=nn.Dropout(0.25),
        head=nn.Linear(6, 9),
    ).double()  # fmt: skip
    model.start = nn.Parameter(randn(6, dtype=torch.float64))
    blocks[0].norm.requires_grad_(False)
    model.get_submodule("embed").eval()
    scale = model.get_submodule("scale").eval()
    scale.get_buffer("running_mean").fill_(0.5)
    return model


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


NAMES = ["head", "blocks.1.query", "blocks.0.mlp.2"]


def _right_copy(model: nn.Module, names: list[str], make: Make) -> probe.Module:
    """What a copy should be, as a check sees it."""
    right = copy.deepcopy(model).requires_grad_(False)
    for name in names:
        right.set_submodule(name, make(right.get_submodule(name)))
    seen = probe.unpack(probe.pack(right))
    assert isinstance(seen, probe.Module)
    return seen


def _trained(module: probe.Module) -> list[str]:
    return [name for name, value in module.parameters.items() if value.requires_grad]


def _expect_left_alone(model: nn.Module, caller: probe.Module, names: list[str]) -> None:
    """The caller's model, after a copy was adapted."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    require(caller.modules == kinds, "the caller's model has adapters now: adapt a deep copy")
    changed = changes(model, caller)
    refuse_any(changed.thawed, "the caller's {} was frozen and trains now: freeze the copy alone")
    require(not changed.modes, "the caller's model is in another mode now")
    wrapped = changed.frozen and all(k.rpartition(".")[0] in names for k in changed.frozen)
    require(not wrapped, "the adapters wrap the caller's own layers: take those of the copy")
    require(not changed.frozen, "the caller's model is frozen now: freeze the copy")
    refuse_any(changed.values, "the caller's {} has other values now")


def _expect_swapped(
    model: nn.Module, names: list[str], kind: str, made: probe.Module, right: probe.Module
) -> None:
    """An adapter of that kind in the place of each of names, and nothing else changed."""
    swapped = [name for name, its in made.modules.items() if its == kind]
    beside = [name for name in names if name in swapped and f"{name}.weight" in made.parameters]
    refuse_any(beside, "the copy got a child called '{}': setattr takes no path, find the parent")
    require(bool(swapped) or not names, "no layer is swapped in what you return")
    extra, ends = [name for name in swapped if name not in names], [k.split(".")[-1] for k in names]
    alike = all(name.split(".")[-1] in ends for name in extra)
    reason = "its name only ends like one in names" if alike else "it is not in names"
    refuse_any(extra, f"{{}} is swapped too: {reason}")
    own = {name: type(module).__name__ for name, module in model.named_modules()}
    missed = [f"{name} ({own[name]})" for name in names if name not in swapped]
    refuse_any(
        missed, "{} is not swapped: a name may lead to any depth, and to a layer of any kind"
    )
    each = made.distinct >= right.distinct
    require(each, "two layers of one shape share an adapter: call make for each name")
    now = {**made.parameters, **made.tensors}
    for name, value in {**right.parameters, **right.tensors}.items():
        require(name in now, f"your copy has lost the model's {name}")
        message = f"the copy's {name} has other values than the model's: copy, do not rebuild"
        require(value.requires_grad or _equal(now[name], value), message)
    for name, number in right.numbers.items():  # and modes, such as drop.training
        got = made.numbers.get(name)
        message = (
            f"the copy's {name.lstrip('.')} is {got}, not {number}: leave its layers as they are"
        )
        adapters = name.startswith(tuple(f"{layer}." for layer in names))
        require(adapters or got == number, message)
    in_order = [name for name in made.modules if name in own] == list(own)
    require(in_order, "the copy's layers are in another order: a Sequential runs them in order")


def _expect_trains(names: list[str], kind: str, made: probe.Module, right: probe.Module) -> None:
    """What make adds trains, and nothing else."""
    frozen = [name for name in _trained(right) if name not in _trained(made)]
    refuse_any(frozen, f"{{}} of a {kind} is frozen: freeze the copy before make adds to it")
    left = [name for name in _trained(made) if name not in _trained(right)]
    reason = "there are more than nn.Linear layers"
    if any(right.modules.get(name.rpartition(".")[0]) == "Linear" for name in left):
        reason = "freeze the rest"
    if left == ["start"]:
        reason = "a model may have parameters of its own, outside of its layers"
    if not names:
        reason = "the copy is frozen, also where names is empty"
    refuse_any(sorted(left, key="start".__eq__), f"{{}} still trains: {reason}")


def _check_copy(answer: Answer, model: nn.Module, names: list[str], kind: str, make: Make) -> None:
    found = answer.probe(probe.build, model, names, make)
    made, right = expect_module(found["made"], "Module"), _right_copy(model, names, make)
    caller, names_after, _ = found["given"]
    require(names_after == names, "it changes the caller's names: make a new one instead")
    _expect_left_alone(model, caller, names)
    _expect_swapped(model, names, kind, made, right)
    _expect_trains(names, kind, made, right)
    shared = answer.probe(probe.shared, model, names, make)
    refuse_any(shared, "the copy's {} shares its memory with the caller's: copy.deepcopy copies it")


@lesson.exercise(
    "4.4",
    title="Swap layers by name, in a copy",
    difficulty="medium",
    minutes=20,
    teaches="how a layer deep inside a model is replaced, and why several methods share one base",
    hint="Whose attribute is the layer blocks.1.query: the model's, or that of what module?",
)
def adapted_copy(answer: Answer) -> None:
    model = _nested_model()
    lora, dora = (partial(layer, rank=2, alpha=4.0) for layer in (LoRALinear, DoRALinear))
    two = ["head", "blocks.0.head"]
    for case, names, kind, make in (
        ("LoRA", NAMES, "LoRALinear", lora),
        ("DoRA", NAMES, "DoRALinear", dora),
        ("another adapter", [*NAMES, "embed", "blocks.0.query"], "Shifted", probe.Shifted),
        ("two layers called head", two, "LoRALinear", lora),
    ):
        answer.case(case)
        _check_copy(answer, model, names, kind, make)
    answer.case("an unknown name")
    message = "a name that is not there passes in silence: raise an error"
    for unknown in (["blocks.0.qurey"], ["haed"], ["blocks.7.query"], ["head", "haed"],
                    ["blocks.0.mlp.7"]):  # fmt: skip
        expect_error(answer, model, unknown, lora, message=message)
    answer.case("no name")
    _check_copy(answer, model, [], "LoRALinear", lora)
    answer.case("one step of training")
    step = answer.probe(probe.step, [model, two, lora], torch.tensor([0, 3, 8, 5]))
    for name in (f"{layer}.lora_B" for layer in two):
        moved = not torch.equal(step["made"].parameters[name], step["before"][name])
        require(moved, f"a step of training does not change {name}")
    expect_nothing_changed(answer, model, NAMES, probe.Shifted)


# ---- 4.5: a paired interval ----


UNDETECTED = "no difference detected"


def _t(freedom: int, probability: float = 0.975) -> float:
    """Student's t, the quantile."""
    from scipy import stats  # type: ignore[import-untyped]

    return float(stats.t.ppf(probability, freedom))


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _wrong_intervals(a: Tensor, b: Tensor) -> Iterable[tuple[str, float, float]]:
    """(message, middle, half the width) of usual mistakes."""
    n, (mean, error) = len(a), _mean_and_error(a - b)
    half, normal = _t(n - 1) * error, 1.95996
    unpaired = math.hypot(_mean_and_error(a)[1], _mean_and_error(b)[1])
    in_order = _mean_and_error(a.sort().values - b.sort().values)[1]
    absolute = _mean_and_error((a - b).abs())
    yield BY_HEART, 2.0, 3.18245
    yield "the other way round: the first method minus the second", -mean, half
    yield "of absolute differences: keep their sign", absolute[0], _t(n - 1) * absolute[1]
    paired = "not paired: take the spread of the differences, seed by seed"
    yield paired, mean, _t(n - 1) * unpaired
    yield paired, mean, _t(2 * n - 2) * unpaired
    yield "not paired, and 1.96: take the differences, and their t", mean, normal * unpaired
    yield "both are sorted: a pair is one seed, not one place", mean, _t(n - 1) * in_order
    yield "with the spread of one difference: a mean of n has less", mean, half * math.sqrt(n)
    yield "divided by n: divide the spread by sqrt(n)", mean, half / math.sqrt(n)
    yield "the spread has n - 1 below it, not n", mean, half * math.sqrt((n - 1) / n)
    yield "with a variance: take the root before dividing by sqrt(n)", mean, half * error
    yield "low and high have changed places", mean, -half
    yield "1.96 is for very many seeds: take t with n - 1", mean, normal * error
    yield "2 is for very many seeds: take t with n - 1", mean, 2 * error
    yield "one standard error each way is no 95 % interval: where is t?", mean, error
    yield "t with n degrees of freedom: it has n - 1", mean, _t(n) * error
    yield "2.5 % lie outside on each side: t at 0.975", mean, _t(n - 1, 0.95) * error
    yield "this is the mean: return the two ends of the interval", mean, 0.0
    yield "the interval lies around 0: it lies around the mean", 0.0, half


def _expect_verdict(got: Any, right: str) -> None:
    require(isinstance(got, str), f"verdict: expected a text, got {kind_of(got)}")
    reason = f"but the first method is {right}"
    if right == UNDETECTED and got in ("higher", "lower"):
        reason = "but the interval holds 0"
    elif right == UNDETECTED:
        reason = "but what was not detected may still be there"
    elif got == UNDETECTED:
        reason = "but the interval lies on one side of 0"
    require(got == right, f"'{got[:40]}', {reason}: '{right}'")


def _check_interval(answer: Answer, first: list[float], second: list[float]) -> None:
    a, b = torch.tensor([first, second], dtype=torch.float64)
    mean, error = _mean_and_error(a - b)
    half = _t(len(a) - 1) * error
    low, high, verdict = expect_parts(answer(first, second), ("low", "high", "verdict"))
    right = "higher" if mean > half else "lower" if mean < -half else UNDETECTED
    if half == 0 and all(isinstance(end, float) and math.isnan(end) for end in (low, high)):
        # SciPy's t.interval knows no ends where nothing varies: then "nothing detected" is right.
        _expect_verdict(verdict, UNDETECTED if verdict == UNDETECTED else right)
        return
    mistakes, tolerance = list(_wrong_intervals(a, b)), max(1e-4 * min(1, half), 2e-5)
    for name, side, end in (("low", -1, low), ("high", 1, high)):
        known = [(middle + side * width, message) for message, middle, width in mistakes]
        expect_number(end, mean + side * half, known, name, tolerance)
    _expect_verdict(verdict, right)


@lesson.exercise(
    "4.5",
    title="A difference and its interval",
    difficulty="medium",
    minutes=20,
    teaches="why methods are compared seed by seed, and to say no more than a few seeds can show",
    hint="Which one list of numbers has a mean and a spread here, and how many does it hold?",
)
def paired_interval(answer: Answer) -> None:
    check = partial(_check_interval, answer)
    answer.case("by hand")
    check([90.0, 92.0, 91.0, 95.0], [89.0, 91.0, 90.0, 90.0])
    answer.case("random accuracies")
    for seeds in (3, random_size(5, 20), 40, random_size(100, 200), 1000, 2):
        hard = [80 + dice.randrange(1000) / 100 for _ in range(seeds)]
        pair = [[base + dice.randrange(300) / 100 for base in hard] for _ in range(2)]
        pair[0][0] += 6  # so that one difference is positive
        pair[1][1] += 4  # and one negative
        check(*pair)
    high, low = [84.0, 86.5, 81.0, 88.0, 85.0], [81.0, 84.0, 78.5, 84.5, 82.5]
    few = [84.0, 86.5, 81.0]
    for case, first, second in (
        ("on one side of 0", high, low),
        ("on one side of 0", low, high),
        ("on one side of 0", [80.11, 80.3, 84.1], [80.0, 80.2, 84.0]),
        ("below 0 on average", [81.0, 84.0, 78.5, 84.5, 84.0], [84.0, 83.0, 79.0, 88.0, 82.0]),
        ("inside a one-sided interval", [81.0, 82.0, 84.0, 86.0], [80.0] * 4),
        ("one difference in all seeds", few, [score - 1 for score in few]),
        ("equal scores", few, few),
    ):
        answer.case(case)
        check(first, second)
    answer.case("just beside 0")
    mean, error = _mean_and_error(torch.tensor(high).double() - torch.tensor(low).double())
    for end in (mean - _t(4) * error, mean + _t(4) * error):
        for beside in (-3e-4, 3e-4):
            check([value - end + beside for value in high], low)
    answer.case("lists of different lengths")
    three, two, one = [90.0, 92.0, 91.0], [89.0, 91.0], [90.0]
    for first, second in ((three, two), (two, three), (three, one), (one, three)):
        counts = f"{len(first)} and {len(second)} values"
        message = f"{counts} make no pairs, and no error says so: zip(strict=True)?"
        expect_error(answer, first, second, message=message)
    expect_nothing_changed(answer, high, low)


# ---- 4.6: the training loop ----


class _Task(NamedTuple):
    """What train gets beside the model."""

    x: Tensor
    y: Tensor
    epochs: int
    batch_size: int
    rate: float = 0.5


def _task(
    images: int, epochs: int, batch_size: int, size: float = 1, dtype: torch.dtype = torch.float64
) -> _Task:
    """With images of 4 numbers, of this size, in 3 classes."""
    x = size * randn(images, 4, dtype=dtype)
    return _Task(x, torch.arange(images) ** 2 % 3, epochs, batch_size)


class _Run(NamedTuple):
    """What plain gradient descent makes of a linear classifier, in float64."""

    weight: Tensor
    bias: Tensor
    batches: list[list[Tensor]]  # of each epoch, of each batch: the losses of its images
    stepped: list[list[Tensor]]  # the same, measured after the batch's step
    after: list[float]  # of all images, after each epoch

    def losses(self) -> list[float]:
        return [float(torch.cat(batches).mean()) for batches in self.batches]


def _descend(layer: nn.Linear, task: _Task, mistake: str = "") -> _Run:
    """Cross-entropy by its closed form, dL/dlogits = (softmax - onehot) / batch; no autograd.

    mistake: one of _MOVES; "adam" is right for the first step only.
    """
    count = len(task.y)
    x = torch.cat([task.x.double(), torch.ones(count, 1).double()], dim=1)  # 1 for the bias
    wanted = torch.eye(layer.out_features).double()[task.y]
    weight = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().double()

    def losses(rows: Tensor) -> Tensor:
        return -((x[rows] @ weight.T).log_softmax(1) * wanted[rows]).sum(1)

    even = math.ceil(count / math.ceil(count / task.batch_size))
    sizes = {"one batch": count, "even": even}
    every = torch.arange(count)
    batches = list(every.split(sizes.get(mistake, task.batch_size)))
    if mistake == "last batch" and len(batches[-1]) < task.batch_size < count:
        del batches[-1]
    keep = {"accumulated": 1.0, "momentum": 0.9, "once": 1.0}.get(mistake, 0.0)
    run = _Run(weight, weight, [], [], [])
    moved = torch.zeros_like(weight)
    for _ in range(task.epochs):
        run.batches.append([])
        run.stepped.append([])
        if mistake == "once":
            moved = torch.zeros_like(weight)
        for rows in batches:
            run.batches[-1].append(losses(rows))
            p = (x[rows] @ weight.T).softmax(1)
            slope = p - wanted[rows]
            if mistake == "softmax":  # taken a second time
                slope = p.softmax(1) - wanted[rows]
                slope = p * (slope - (slope * p).sum(1, keepdim=True))
            grad = slope.T @ x[rows] / (1 if mistake == "sum" else len(rows))
            moved = keep * moved + grad
            if mistake == "adam":
                moved = moved / (moved.abs() + 1e-8)
            if mistake not in ("once", "once, the last") or rows is batches[-1]:
                weight = weight - task.rate * moved
            run.stepped[-1].append(losses(rows))
        run.after.append(float(losses(every).mean()))
    return run._replace(weight=weight[:, :-1], bias=weight[:, -1])


_MOVES = {
    "accumulated": "the gradients add up from step to step: where is zero_grad()?",
    "momentum": "this is SGD with a momentum of 0.9: plain SGD was asked for",
    "sum": "the loss is the sum over the batch: take the mean",
    "softmax": "cross_entropy takes logits: it applies the softmax itself",
    "adam": "each number moves by the learning rate: this is Adam, and plain SGD was asked for",
    "one batch": "one step an epoch, with all images: split them into batches",
    "once": "one step an epoch, after its batches: step() belongs into the loop over batches",
    "once, the last": "one step an epoch, from its last batch: step() belongs into the loop",
    "last batch": "the last, smaller batch is left out",
    "even": "the batches are made even: each but the last has batch_size images",
}


def _wrong_runs(layer: nn.Linear, task: _Task) -> Iterable[tuple[_Run, str]]:
    nothing = "nothing moved in the given model: zero_grad, backward, step, in this order"
    yield _Run(layer.weight, layer.bias, [], [], []), nothing
    for mistake, message in _MOVES.items():
        yield _descend(layer, task, mistake), message
    for order in map(list, permutations(range(5)) if len(task.y) == 5 else ()):
        shuffled = task._replace(x=task.x[order], y=task.y[order])
        yield _descend(layer, shuffled), "the images come in another order: take them as in x"


def _train(
    answer: Answer, model: nn.Module, task: _Task, by: Any = probe.build
) -> tuple[list[Any], probe.Module]:
    """The losses that come back, and the model afterwards."""
    found = answer.probe(by, model, *task)
    losses, (after, x, y, *_) = found["made"], found["given"]
    require(losses is not None, "got None: end with `return losses` (print gives nothing back)")
    kind = kind_of(losses)
    require(isinstance(losses, list | tuple), f"expected a list of losses, got {kind}")
    one_each = len(losses) == task.epochs
    require(one_each, f"expected {task.epochs} losses, one an epoch: {len(losses)} came")
    for name, value in model.named_parameters():
        now = after.parameters[name]
        require(now.dtype == value.dtype, f"{name} is {now.dtype} afterwards: it was {value.dtype}")
        still = value.requires_grad or torch.equal(now, value)
        require(still, f"{name} was frozen and has moved")
        flag = now.requires_grad == value.requires_grad
        require(flag, f"requires_grad of {name} is not what it was")
    for name, before, now in (("x", task.x, x), ("y", task.y, y)):
        require(torch.equal(before, now), f"it changes the caller's {name}: make a new one instead")
    left = [name for name, mode in after.training.items() if mode]
    every = "end with model.eval(), whatever its mode was"
    require("" not in left, f"the model is left in training mode: {every}")
    every = "model.eval() sets every layer"
    refuse_any(left, f"layer {{}} is left in training mode, the model is not: {every}")
    return losses, after


def _expect_moved(after: probe.Module, name: str, layer: nn.Linear, task: _Task) -> None:
    """Compare the parameters of the classifier called name."""
    right = _descend(layer, task)
    for part in ("weight", "bias"):
        known = ((getattr(wrong, part), text) for wrong, text in _wrong_runs(layer, task))
        expect(after.parameters[name + part], getattr(right, part), known, name + part)


def _expect_losses(losses: Sequence[Any], run: _Run) -> None:
    rights, stepped = run.losses(), run._replace(batches=run.stepped).losses()
    for epoch, (loss, right, batches) in enumerate(zip(losses, rights, run.batches, strict=True)):
        means = [float(batch.mean()) for batch in batches]
        whole = "measured after the epoch: take the losses of its batches as they were trained on"
        known = [
            (sum(means) / len(means), "a mean of batch means: the last batch is smaller"),
            (right * sum(map(len, batches)), "this is the sum: divide by the number of images"),
            (sum(rights[: epoch + 1]), "the losses of all epochs so far: start from 0"),
            (run.after[epoch], whole),
            (stepped[epoch], "measured after each step: take the loss before it"),
            (means[-1], "this is the last batch's: take the mean of all images"),
        ]
        expect_number(loss, right, known, f"epoch {epoch + 1}", tolerance=1e-5)


def _check_sizes(answer: Answer) -> None:
    """Values and losses of a linear classifier, in float64 but for the first."""
    for case, task in (
        ("one step", _task(6, 1, 6, size=20, dtype=torch.float32)),
        ("batches", _task(5, 1, 2)),
        ("batches", _task(9, 3, 4)),
        ("twelve epochs", _task(8, 12, 4)),
        ("a batch larger than x", _task(5, 7, 100)),
        ("batches of one image", _task(4, 2, 1)),
        ("one image", _task(1, 2, 3)),
        ("large batches", _task(47, 2, 20)),
        ("large numbers", _task(6, 8, 3, size=300)),
    ):
        answer.case(case)
        layer = nn.Linear(4, 3).to(task.x.dtype)
        losses, after = _train(answer, layer, task)
        _expect_moved(after, "", layer, task)
        _expect_losses(losses, _descend(layer, task))


def _check_stays(answer: Answer) -> None:
    """Every epoch is trained, where the loss is small early on and where it rises."""
    for case in ("a small loss", "a loss that rises"):
        answer.case(case)
        for _ in range(500):
            layer, task = nn.Linear(4, 3).double(), _task(5, 12, 4, size=10)
            losses = _descend(layer, task).losses()
            rises = any(b > 1.1 * a for a, b in pairwise(losses[4:]))
            if rises if case == "a loss that rises" else losses[3] < 1e-3:
                break
        _train(answer, layer, task)


def _check_given(answer: Answer) -> None:
    """A frozen layer below; a model that comes with gradients and a weight in two layers."""
    answer.case("frozen parameters")
    first, last = nn.Linear(4, 5).double().requires_grad_(False), nn.Linear(5, 3).double()
    task = _task(6, 7, 4)
    _, after = _train(answer, nn.Sequential(first, nn.ReLU(), last), task)
    features = (task.x @ first.weight.T + first.bias).relu()
    _expect_moved(after, "2.", last, task._replace(x=features))
    answer.case("old gradients, a shared weight")
    layer, task = nn.Linear(4, 3).double(), _task(6, 1, 6)
    layer.bias.requires_grad_(False)
    layer.twin = nn.Linear(4, 3, bias=False)
    layer.twin.weight = layer.weight
    _, after = _train(answer, layer, task, by=probe.build_after_backward)
    right = _descend(layer, task).weight
    old = "the gradient from before goes into the first step: zero_grad() comes first"
    twice = "two layers share it, and it moves twice: model.parameters() lists it once"
    known = [(right - 0.5, old), (2 * right - layer.weight.detach(), twice)]
    expect(after.parameters["weight"], right, known, "weight")


def _check_modes(answer: Answer) -> None:
    """Training mode in every batch."""
    answer.case("modes")
    norm, layer, task = nn.BatchNorm1d(4), nn.Linear(4, 3), _task(6, 6, 3, dtype=torch.float32)
    layer.weight.requires_grad_(False)
    model = nn.Sequential(norm, layer).eval()
    _, after = _train(answer, model, task)
    tracked = int(after.tensors["0.num_batches_tracked"])
    require(tracked != 0, "it trains in evaluation mode: model.train() comes before the loop")
    require(tracked == 12, f"the model saw {tracked} batches in training mode, expected 12")
    for name, value in model.named_parameters():
        moves = not torch.equal(after.parameters[name], value)
        require(moves or not value.requires_grad, f"{name} is not frozen, but does not move")
    losses, _ = _train(answer, model, task._replace(epochs=1, batch_size=6))

    def loss_of(features: Tensor) -> float:
        return _descend(layer, task._replace(x=features, batch_size=6)).losses()[0]

    wide = task.x.double()  # evaluation mode has running means, of no batch so far or of this one
    once = (wide - 0.1 * wide.mean(0)) / (0.9 + 0.1 * wide.var(0) + norm.eps).sqrt()
    message = "measured in evaluation mode: take the loss that is trained on"
    known = [(loss_of(features), message) for features in (wide, once)]
    right = loss_of(_normalised(wide, norm.eps))
    expect_number(losses[0], right, known, "loss", tolerance=1e-4)
    answer.case("no epoch")
    _train(answer, layer.train(), task._replace(epochs=0))


@lesson.exercise(
    "4.6",
    title="The training loop",
    difficulty="hard",
    minutes=25,
    teaches="the five lines of every training, and what may move in them",
    hint="Which numbers does step() read, who wrote them, and when were they 0?",
    seconds=30.0,  # in a process of its own the first optimizer imports torch._dynamo
)
def train(answer: Answer) -> None:
    import torch._dynamo  # the first optimizer imports it: not in the learner's time

    _check_sizes(answer)
    _check_stays(answer)
    _check_given(answer)
    _check_modes(answer)
    given = nn.Linear(4, 3), *_task(6, 2, 4, dtype=torch.float32)
    expect_device(answer, *given)
    # A DataLoader draws a number.
    drawn = "torch's random state"
    expect_nothing_changed(answer, *given, but=[drawn], look=probe.torch_state)
