"""Checks of exercises/04_mlp_demo.ipynb: adapt a whole model, train it, compare honestly."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain, combinations, pairwise, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Lesson, Refused, Unstarted, kind_of
from minidora.checks.expect import (
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
    closed=(
        "minidora.adapt",
        "minidora.data",
        "minidora.training",
        "minidora.experiment",
        "peft",
    ),
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


_MODE = {True: "training", False: "evaluation"}


def _as_it_was(now: Any, before: Tensor) -> bool:
    return isinstance(now, Tensor) and now.dtype == before.dtype and torch.equal(now, before)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# ---- 4.1: accuracy ----


def _labels(logits: Tensor) -> list[int]:
    """The class of the largest logit of each image."""
    rows = logits.tolist()
    return [max(range(len(row)), key=row.__getitem__) for row in rows]


def _normalised(x: Tensor, eps: float) -> Tensor:
    """What batch normalisation makes of x in training mode, before weight and bias; float64."""
    x = x.double()
    return (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()


def _percent(predicted: list[int], labels: list[int]) -> float:
    return 100 * sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)


def _classifier(weight: Tensor, bias: Tensor, training: bool) -> nn.Sequential:
    """A linear classifier. While training, its dropout lets nothing through: each image gets the
    bias's class. In evaluation mode the dropout and the normalisation change nothing."""
    norm, last = nn.BatchNorm1d(weight.shape[1]), nn.Linear(weight.shape[1], len(weight))
    norm.load_state_dict({"running_var": torch.full((weight.shape[1],), 1 - norm.eps)}, False)
    last.load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(nn.Dropout(1.0), norm, last).to(weight.dtype).train(training)


def _wrong_accuracies(
    x: Tensor, weight: Tensor, bias: Tensor, y: list[int], training: bool
) -> Iterable[tuple[float, str]]:
    def of(x: Tensor) -> Tensor:
        return x.double() @ weight.double().T + bias.double()

    right = _percent(_labels(of(x)), y)
    yield right / 100, "this is the fraction: return it in percent"
    yield right * len(y) / 100, "this is the number of hits: return it in percent"
    yield 100 - right, "these are the errors: accuracy counts the hits"
    if training:
        partly = _percent(_labels(of(_normalised(x, nn.BatchNorm1d(1).eps))), y)
        yield partly, "a layer is still in training mode: model.eval() sets them all"
        dropped = _percent([int(bias.argmax())] * len(y), y)
        yield dropped, "measured in training mode: eval() first"
    if len(y) == len(weight):
        over_images = _percent(_labels(of(x).T), y)
        yield over_images, "argmax runs over the images (dim=0): take the classes"


def _check_accuracy(
    answer: Answer, x: Tensor, weight: Tensor, bias: Tensor, y: list[int], training: bool
) -> None:
    given = (_classifier(weight, bias, training), x, torch.tensor(y))
    found = answer.probe(probe.build, *given)
    right = _percent(_labels(x.double() @ weight.double().T + bias.double()), y)
    known = _wrong_accuracies(x, weight, bias, y, training)
    expect_number(found["made"], right, known, tolerance=1e-5)
    after, *rest = found["given"]
    require(all(map(torch.equal, rest, given[1:])), "it changes the caller's images or labels")
    now = {**after.parameters, **after.tensors}
    before = _tensors_of(given[0])
    moved = [name for name, value in before.items() if not _as_it_was(now.get(name), value)]
    refuse_any(moved, "{} is not as it was: leave the model as you found it")
    frozen = [name for name, value in after.parameters.items() if not value.requires_grad]
    refuse_any(frozen, "{} is frozen now: no_grad() is enough to measure")
    found_in, left_in = (_MODE[mode] for mode in (training, after.training[""]))
    require(
        found_in == left_in, f"a model in {found_in} mode is left in {left_in} mode: put it back"
    )
    left = [name for name, mode in after.training.items() if mode != training]
    refuse_any(
        left,
        f"layer {{}} is left in {_MODE[not training]} mode, the model is not: "
        f"model.train({training}) sets every layer",
    )


@lesson.exercise(
    "4.1",
    title="Accuracy",
    difficulty="easy",
    minutes=10,
    teaches="what evaluation mode is for, and to leave a model as you found it",
    hint="Which layers answer differently while training, and who sets the mode back afterwards?",
)
def accuracy(answer: Answer) -> None:
    answer.case("by hand")
    x = torch.tensor(
        [
            [5.0, 0.0, 0.0, 3.0, 2.0],
            [0.0, 5.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 6.0, 0.0, 0.0],
            [1.0, 0.0, 5.0, 2.0, 1.0],
            [4.0, 0.0, 0.0, 0.0, 1.0],
        ]
    )
    bias = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0])
    _check_accuracy(answer, x, torch.eye(5), bias, [0, 1, 2, 2, 3], training=False)
    answer.case("training mode")
    _check_accuracy(answer, x, torch.eye(5), bias, [0, 1, 2, 2, 3], training=True)
    count = random_size(1100, 1500)
    for case, dtype, images, classes, size in (
        ("random images", torch.float32, count, 3, 1),
        ("other images of the same shape", torch.float32, count, 3, 1),
        ("large logits", torch.float64, count, 5, 1000),
        ("float64", torch.float64, 77, 4, 1),
        ("two classes", torch.float64, 60, 2, 1),
    ):
        answer.case(case)
        shapes = (images, 4), (classes, 4), (classes,)
        x, weight, bias = (randn(*shape, dtype=dtype) for shape in shapes)
        weight *= size
        y = _labels(x.double() @ weight.double().T + bias.double())
        wrong = random_size(images // 5, images // 3)
        y[:wrong] = [(label + 1) % classes for label in y[:wrong]]
        _check_accuracy(answer, x, weight, bias, y, training=True)
    answer.case("one image")
    right = _labels(x[:1] @ weight.T + bias)
    _check_accuracy(answer, x[:1], weight, bias, right, training=False)
    _check_accuracy(answer, x[:1], weight, bias, [1 - right[0]], training=False)
    model, y = _classifier(weight.float(), bias.float(), True), [*right, *right]
    expect_device(answer, model, x[:2].float(), torch.tensor(y))
    expect_nothing_changed(answer, model, x[:2].float(), torch.tensor(y))


# ---- 4.2: parts of a dataset ----


def _rows(got: Any, sizes: list[int]) -> list[list[int]]:
    """The row numbers of each part."""
    require(got is not None, "got None: end with `return ...` (print gives nothing back)")
    require(isinstance(got, list | tuple), f"expected a list of tensors, got {kind_of(got)}")
    require(len(got) == len(sizes), f"expected {len(sizes)} parts, got {len(got)}")
    rows = []
    for number, (part, size) in enumerate(zip(got, sizes, strict=True), start=1):
        is_tensor = isinstance(part, Tensor)
        require(is_tensor, f"part {number}: expected a tensor of rows, got {kind_of(part)}")
        whole = part.dtype == torch.int64 or size == 0  # of no numbers it says nothing
        require(whole, f"part {number}: expected row numbers (int64), got {part.dtype}")
        shape = tuple(part.shape)
        right = shape == (size,)
        require(
            right,
            f"part {number}: expected {size} row{'s' * (size != 1)}, shape ({size},), got {shape}",
        )
        rows.append(part.tolist())
    return rows


def _expect_disjoint(drawn: list[list[int]], count: int) -> None:
    before: list[int] = []
    for number, part in enumerate(drawn, start=1):
        outside = [row for row in part if not 0 <= row < count]
        refuse_any(outside, f"there is no row {{}}: they run from 0 to {count - 1}")
        require(len(set(part)) == len(part), f"a row stands twice in part {number}")
        both = sorted(set(part) & set(before))
        refuse_any(both, f"row {{}} is in part {number} and in one before: draw once")
        before += part


def _expect_shuffled(draws: list[list[list[int]]], count: int, sizes: list[int]) -> None:
    """Refuse draws of a large dataset, one for each seed, that are not from all of its rows."""
    flat = [[row for part in draw for row in part] for draw in draws]
    for draw, rows in zip(draws, flat, strict=True):
        _expect_disjoint(draw, count)
        steps = Counter((b - a) % count for a, b in pairwise(rows))
        require(
            steps.most_common(1)[0][1] < 0.8 * len(rows),
            "not shuffled: the rows follow one another at a fixed step",
        )
    require(
        max(map(max, flat)) >= sum(sizes),
        "only the first rows are ever drawn: shuffle all of them, then cut",
    )
    for index, size in enumerate(sizes):
        middle = sum(sum(draw[index]) for draw in draws) / (len(draws) * size)
        require(
            abs(middle / count - 0.5) < 0.15,
            f"part {index + 1} comes from one end of the file: "
            "cut the shuffled order, do not sort it before",
        )


def _expect_anew(draws: list[list[list[int]]], count: int, seeds: list[int]) -> None:
    """Refuse unless every two seeds differ in every part."""
    for (a, one), (b, other) in combinations(zip(seeds, draws, strict=True), 2):
        for number, (first, second) in enumerate(zip(one, other, strict=True), start=1):
            shared = len(set(first) & set(second))
            require(
                shared < 0.7 * len(first),
                f"seeds {a} and {b} share {shared} of {len(first)} rows in part "
                f"{number}: each seed draws all parts anew",
            )
            step = {(y - x) % count for x, y in zip(first, second, strict=True)}
            require(len(step) > 1, f"seed {b} gives the rows of seed {a}, moved on by {min(step)}")


@lesson.exercise(
    "4.2",
    title="No image in two parts",
    difficulty="easy",
    minutes=10,
    teaches="to split data so that nothing reported was seen before, anew for each seed",
    hint="If one shuffled order is cut into pieces, can a row be in two of them?",
)
def split_rows(answer: Answer) -> None:
    def draw(count: int, sizes: list[int], seeds: Sequence[int]) -> list[list[list[int]]]:
        rounds = [[count, sizes, seed] for seed in seeds]
        return [_rows(got, sizes) for got in answer.probe(probe.calls, rounds)]

    answer.case("sizes")
    drawn = _rows(answer(10, [5, 3, 2], 0), [5, 3, 2])
    answer.case("disjoint")
    _expect_disjoint(drawn, 10)
    answer.case("parts of one row, and of none")
    for count, sizes in ((5, [1, 2, 1]), (12, [1, 4, 0, 1, 3]), (1, [1])):
        _expect_disjoint(_rows(answer(count, sizes, 3), sizes), count)
    answer.case("random")
    count = random_size(200, 300)
    sizes, late = [count // 3, count // 4], random_size(1000, 10**6)
    seeds = [0, 1, 2, late]
    draws = draw(count, sizes, seeds)
    _expect_shuffled(draws, count, sizes)
    more = [late + far for far in (1, 2, 10, 256, 1000, 2**16, 10**6, 2**31)]
    _expect_anew(draws + draw(count, sizes, more), count, seeds + more)
    answer.case("repeatable")
    for seed, first, again in zip(seeds, draws, draw(count, sizes, seeds), strict=True):
        require(again == first, f"seed {seed} gives other rows each time: use seed")
    answer.case("every pair of rows")
    pairs = list(combinations(range(5), 2))  # 1 of 10: a right answer misses one in 1000 draws
    for sizes in ([2, 2], [2]):  # with a probability of 1e-45, and a share by 5 deviations: 1e-6
        many = draw(5, sizes, range(1000))
        for index in range(len(sizes)):
            shares = [sum(row in parts[index] for parts in many) / 1000 for row in range(5)]
            row, share = max(enumerate(shares), key=lambda each: abs(each[1] - 0.4))
            text = f"of 5 rows, row {row} is in part {index + 1} in {share:.0%} of draws, not 40%"
            require(abs(share - 0.4) < 0.08, f"{text}: give each row the same chance")
            together = {tuple(sorted(parts[index])) for parts in many}
            refuse_any(
                [pair for pair in pairs if pair not in together],
                f"of 5 rows, {{}} are never together in part {index + 1}: shuffle each row alone",
            )
    # torch.manual_seed is a right way to use the seed.
    expect_nothing_changed(answer, 10, [5, 3], 1, but="torch's random state")


# ---- 4.3: choosing ----


def _picked(scores: Tensor, columns: list[int]) -> Tensor:
    return torch.stack([row[column] for row, column in zip(scores, columns, strict=True)])


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
    return _picked(test, _labels(validation))


@chosen_scores.mistakes_of
def _wrong_choices(validation: Tensor, test: Tensor) -> Wrong:
    columns = _labels(validation)
    yield (
        "chosen on the test images: the best of several noisy scores is too good",
        _picked(test, _labels(test)),
    )
    yield (
        "the choice looks at test too: choose on validation alone",
        _picked(test, _labels(validation + test)),
    )
    yield "the score that chose: report the test accuracy", _picked(validation, columns)
    yield (
        "the tables are exchanged: choose on validation, report test",
        _picked(validation, _labels(test)),
    )
    yield (
        "one rate for all seeds: each seed chooses its own",
        _picked(test, _labels(validation.mean(dim=0)[None]) * len(test)),
    )
    yield "the rate with the lowest validation accuracy", _picked(test, _labels(-validation))
    yield "these are numbers of columns: return what test holds there", torch.tensor(columns)
    yield "one per rate: choose one per seed", _picked(test.T, _labels(validation.T))
    yield "this is one mean: return one score per seed", _picked(test, columns).mean()
    if len(test) > 1:
        yield "test[:, best] gives every pair: take one number from each row", test[:, columns]


chosen_scores.example(
    [[80.0, 85.0, 83.0], [70.0, 72.0, 75.0]],
    [[84.0, 81.0, 82.0], [71.0, 79.0, 78.0]],
    gives=[81.0, 78.0],
)


# ---- 4.4: adapters in a copy ----


def _nested_model() -> nn.Sequential:
    """Linear layers at several depths, three of them called head, and other layers; float64."""

    def block() -> nn.Sequential:
        mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
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
ADAPTERS = [f"{name}.{part}" for name in NAMES for part in ("lora_A", "lora_B")]


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _expect_left_alone(model: nn.Module, caller: probe.Module, names: list[str]) -> None:
    """The caller's model and names, after a copy was adapted."""
    values = dict(model.named_parameters())
    same = caller.modules == _kinds(model)
    require(same, "the caller's model has adapters now: adapt a deep copy")
    now = {name: value.requires_grad for name, value in caller.parameters.items()}
    frozen = [name for name, value in values.items() if value.requires_grad and not now[name]]
    thawed = [name for name, value in values.items() if now[name] and not value.requires_grad]
    refuse_any(thawed, "the caller's {} was frozen and trains now: freeze the copy alone")
    modes = {name: module.training for name, module in model.named_modules()}
    require(caller.training == modes, "the caller's model is in another mode now")
    require(names == NAMES, "it changes the caller's names: make a new one instead")
    own = bool(frozen) and all(name.rpartition(".")[0] in NAMES for name in frozen)
    require(not own, "the adapters wrap the caller's own layers: take those of the copy")
    require(not frozen, "the caller's model is frozen now: freeze the copy")
    after = {**caller.parameters, **caller.tensors}
    changed = [n for n, value in _tensors_of(model).items() if not _as_it_was(after[n], value)]
    refuse_any(changed, "the caller's {} has other values now")


def _expect_swapped(model: nn.Module, made: probe.Module) -> None:
    """LoRALinear in the place of each of NAMES, and nothing else changed."""
    for name in NAMES:
        beside = made.modules.get(name) == "LoRALinear" and f"{name}.weight" in made.parameters
        message = f"the copy got a child called '{name}': setattr takes no path, find the parent"
        require(not beside, message)
    swapped = [name for name, kind in made.modules.items() if kind == "LoRALinear"]
    require(bool(swapped), "no layer is swapped in what you return")
    extra = [name for name in swapped if name not in NAMES]
    last = [name.split(".")[-1] for name in NAMES]
    ends = all(name.split(".")[-1] in last for name in extra)
    reason = "its name only ends like one in names" if ends else "it is not in names"
    refuse_any(extra, f"{{}} is swapped too: {reason}")
    missed = [name for name in NAMES if name not in swapped]
    top = swapped == ["head"]
    reason = ": a name may lead to any depth of the model, two dots or more" if top else ""
    refuse_any(missed, f"{{}} is not swapped{reason}")
    now = {**made.parameters, **made.tensors}
    for name, value in _tensors_of(model).items():
        layer, _, part = name.rpartition(".")
        got = now.get(f"{layer}.base.{part}" if layer in NAMES else name)
        require(got is not None, f"your copy has lost the model's {name}")
        same = _as_it_was(got, value)
        require(same, f"the copy's {name} has other values than the model's: copy, do not rebuild")
    drops = made.numbers.get("drop.p")
    require(drops == 0.25, f"the copy's dropout is {drops}, not 0.25: leave its layers as they are")
    kept = [name for name, _ in model.named_modules()]
    in_order = [name for name in made.modules if name in kept] == kept
    require(in_order, "the copy's layers are in another order: a Sequential runs them in order")
    for name, module in model.named_modules():
        mode = module.training if name not in NAMES else made.training[name]
        require(
            made.training[name] == mode,
            f"the copy's {name or 'model'} is in {_MODE[not mode]} mode: leave modes as they are",
        )


def _expect_trains(answer: Answer, model: nn.Module, made: probe.Module) -> None:
    """The adapters train, and nothing else; of a DoRALinear too."""
    kinds = _kinds(model)
    for name in ADAPTERS:
        trains = made.parameters[name].requires_grad
        require(trains, f"{name} is frozen too: freeze first, then put adapters in")
    left = [name for name, value in made.parameters.items() if value.requires_grad]
    left = [name for name in left if name not in ADAPTERS]
    linear = any(kinds.get(name.rpartition(".")[0], "Linear") == "Linear" for name in left)
    reason = "freeze the rest" if linear else "there are more than nn.Linear layers"
    if left == ["start"]:
        reason = "a model may have parameters of its own, outside of its layers"
    left.sort(key="start".__eq__)  # last
    refuse_any(left, f"{{}} still trains: {reason}")
    other = partial(DoRALinear, rank=2, alpha=4.0)
    made = expect_module(answer.probe(probe.build, model, NAMES, other)["made"], "Module")
    for name in [*ADAPTERS, *(f"{name}.magnitude" for name in NAMES)]:
        trains = name in made.parameters and made.parameters[name].requires_grad
        require(trains, f"{name} of a DoRALinear is frozen: freeze before make, not by names")


def _expect_any_adapter(answer: Answer, model: nn.Module) -> None:
    """Adapters whose parameters have names of their own, around any layer."""
    kinds, names = _kinds(model), [*NAMES, "embed", "blocks.0.query"]  # two of one shape
    made = expect_module(answer.probe(probe.build, model, names, probe.Shifted)["made"], "Module")
    for name in names:
        swapped_too = made.modules.get(name) == "Shifted"
        require(swapped_too, f"{name} ({kinds[name]}) is not swapped: make may take any layer")
        for part in ("shift", "gain.weight", "gain.bias"):
            trains = made.parameters[f"{name}.{part}"].requires_grad
            require(trains, f"{name}.{part} is frozen: freeze before make, not by names")
    each = made.distinct >= len(list(model.parameters())) + 3 * len(names)
    require(each, "two layers of one shape share an adapter: call make for each name")
    own_parts = tuple(f"{name}.{part}" for name in names for part in ("shift", "gain."))
    left = [name for name, value in made.parameters.items() if value.requires_grad]
    left = [name for name in left if not name.startswith(own_parts)]
    refuse_any(left, "{} trains: freeze the whole copy before make, not by names")


@lesson.exercise(
    "4.4",
    title="Swap layers by name, in a copy",
    difficulty="medium",
    minutes=20,
    teaches="how a layer deep inside a model is replaced, and why several methods share one base",
    hint="Whose attribute is the layer blocks.1.query: the model's, or that of what module?",
)
def adapted_copy(answer: Answer) -> None:
    model, make = _nested_model(), partial(LoRALinear, rank=2, alpha=4.0)
    found = answer.probe(probe.build, model, NAMES, make)
    answer.case("the model as it was")
    made = expect_module(found["made"], "Module")
    _expect_left_alone(model, *found["given"][:2])
    answer.case("layers swapped")
    _expect_swapped(model, made)
    answer.case("what trains")
    _expect_trains(answer, model, made)
    answer.case("another adapter")
    _expect_any_adapter(answer, model)
    answer.case("an unknown name")
    message = "a name that is not there passes in silence: raise an error"
    for unknown in (
        ["blocks.0.qurey"], ["haed"], ["blocks.7.query"], ["head", "haed"], ["blocks.0.mlp.7"]
    ):  # fmt: skip
        expect_error(answer, model, unknown, make, message=message)
    answer.case("no name")
    nothing: list[str] = []
    made = expect_module(answer.probe(probe.build, model, nothing, make)["made"], "Module")
    left = [name for name, value in made.parameters.items() if value.requires_grad]
    refuse_any(left, "{} trains, but the copy is frozen: names may be empty")
    shared = answer.probe(probe.shared, model, nothing, make)
    refuse_any(shared, "{} is the caller's own: return a copy, also where names is empty")
    answer.case("one step of training")
    shared = answer.probe(probe.shared, model, NAMES, make)
    refuse_any(shared, "the copy's {} shares its memory with the caller's: copy.deepcopy copies it")
    two = ["head", "blocks.0.head"]
    step = answer.probe(probe.step, [model, two, make], torch.tensor([0, 3, 8, 5]))
    for layer in two:
        name = f"{layer}.lora_B"
        require(name in step["before"], f"{layer} is not swapped, beside another layer called head")
        moved = not torch.equal(step["made"].parameters[name], step["before"][name])
        require(moved, f"a step of training does not change {name}")
    expect_nothing_changed(answer, model, NAMES, probe.Shifted)


# ---- 4.5: a paired interval ----


T = {
    1: 12.7062047,
    2: 4.3026527,
    3: 3.1824463,
    4: 2.7764451,
    5: 2.5705818,
    6: 2.4469119,
    7: 2.3646243,
    8: 2.3060041,
    14: 2.1447867,
    39: 2.0226909,
    40: 2.0210754,
    78: 1.9908471,
    99: 1.9842170,
    999: 1.9623415,
}
"""Student's t, 97.5 % quantile by degrees of freedom, as printed in tables of statistics."""

T_ONE_SIDED = {2: 2.91999, 3: 2.35336, 4: 2.13185, 7: 1.89458, 39: 1.68488}
"""The 95 % quantile."""


def _mean_and_error(values: list[Fraction]) -> tuple[float, float]:
    """Mean and standard error, in fractions: s^2 = (n sum d^2 - (sum d)^2) / (n (n - 1))."""
    n, total = len(values), sum(values, Fraction(0))
    apart = n * sum((d * d for d in values), Fraction(0)) - total**2
    return float(total / n), math.sqrt(apart / (n * n * (n - 1)))


def _wrong_intervals(
    a: list[Fraction], b: list[Fraction], d: list[Fraction]
) -> Iterable[tuple[float, float, str]]:
    """(middle, half the width, message) of usual mistakes."""
    n, (mean, error) = len(d), _mean_and_error(d)
    half = T[n - 1] * error
    unpaired = math.hypot(_mean_and_error(a)[1], _mean_and_error(b)[1])
    in_order = _mean_and_error([x - y for x, y in zip(sorted(a), sorted(b), strict=True)])[1]
    absolute = _mean_and_error([abs(x) for x in d])
    yield 2.0, 3.18245, BY_HEART
    yield -mean, half, "the other way round: the first method minus the second"
    yield absolute[0], T[n - 1] * absolute[1], "of absolute differences: keep their sign"
    for t, message in (
        (T[n - 1], "not paired: take the spread of the differences, seed by seed"),
        (T.get(2 * n - 2, math.nan), "not paired: take the differences, seed by seed"),
        (1.95996, "not paired, and 1.96: take the differences, and their t"),
    ):
        yield mean, t * unpaired, message
    yield mean, T[n - 1] * in_order, "both are sorted: a pair is one seed, not one place"
    for factor, message in (
        (math.sqrt(n), "with the spread of one difference: a mean of n has less"),
        (1 / math.sqrt(n), "divided by n: divide the spread by sqrt(n)"),
        (math.sqrt((n - 1) / n), "the spread has n - 1 below it, not n"),
        (error, "with a variance: take the root before dividing by sqrt(n)"),
        (-1, "low and high have changed places"),
    ):
        yield mean, half * factor, message
    for t, message in (
        (1.95996, "1.96 is for very many seeds: take t with n - 1"),
        (2.0, "2 is for very many seeds: take t with n - 1"),
        (1.0, "one standard error each way is no 95 % interval: where is t?"),
        (T.get(n, math.nan), "t with n degrees of freedom: it has n - 1"),
        (T_ONE_SIDED.get(n - 1, math.nan), "2.5 % lie outside on each side: t at 0.975"),
        (0.0, "this is the mean: return the two ends of the interval"),
    ):
        yield mean, t * error, message
    yield 0.0, half, "the interval lies around 0: it lies around the mean"


NOTHING = "no difference detected"


def _side(low: float, high: float) -> str:
    return "higher" if low > 0 else "lower" if high < 0 else NOTHING


def _expect_verdict(got: Any, right: str) -> None:
    require(isinstance(got, str), f"verdict: expected a text, got {kind_of(got)}")
    if right == NOTHING:
        claims = got in ("higher", "lower")
        require(not claims, f"'{got}', but the interval holds 0: '{NOTHING}'")
        equal = got.lower() in ("equal", "same", "no difference", "equally good")
        require(not equal, f"'{got}', but what was not detected may still be there: '{NOTHING}'")
    else:
        opposite = got in ("higher", "lower") and got != right
        require(not opposite, f"'{got}', but the first method is {right}")
        missed = got == NOTHING
        require(not missed, f"'{got}', but the interval lies on one side of 0: '{right}'")
    require(got == right, f"verdict: expected '{right}', got '{got[:40]}'")


def _check_interval(answer: Answer, first: list[float], second: list[float]) -> None:
    a, b = [[Fraction(value) for value in values] for values in (first, second)]
    d = [x - y for x, y in zip(a, b, strict=True)]
    mean, error = _mean_and_error(d)
    half = T[len(d) - 1] * error
    got = expect_parts(answer(first, second), ("low", "high", "verdict"))
    right = _side(mean - half, mean + half)
    if half == 0 and all(isinstance(end, float) and math.isnan(end) for end in got[:2]):
        # SciPy's t.interval knows no ends where nothing varies: then "nothing detected" is right.
        _expect_verdict(got[2], NOTHING if got[2] == NOTHING else right)
        return
    mistakes, tolerance = list(_wrong_intervals(a, b, d)), max(1e-4 * min(1, half), 2e-5)
    for name, side, end in (("low", -1, got[0]), ("high", 1, got[1])):
        known = [(middle + side * width, message) for middle, width, message in mistakes]
        expect_number(end, mean + side * half, known, name, tolerance)
    _expect_verdict(got[2], right)


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
    for seeds in (3, 5, 8, 40, 100, 1000, 2):
        hard = [80 + dice.randrange(1000) / 100 for _ in range(seeds)]
        pair = [[base + dice.randrange(300) / 100 for base in hard] for _ in range(2)]
        pair[0][0] += 6  # so that one difference is positive
        pair[1][1] += 4  # and one negative
        check(*pair)
    answer.case("on one side of 0")
    high, low = [84.0, 86.5, 81.0, 88.0, 85.0], [81.0, 84.0, 78.5, 84.5, 82.5]
    check(high, low)
    check(low, high)
    check([80.11, 80.3, 84.1], [80.0, 80.2, 84.0])
    answer.case("just beside 0")
    mean, error = _mean_and_error(
        [Fraction(a) - Fraction(b) for a, b in zip(high, low, strict=True)]
    )
    for side in (-1, 1):
        for beside in (-3e-4, 3e-4):
            end = mean + side * T[4] * error
            check([value - end + beside for value in high], low)
    answer.case("below 0 on average")
    check([81.0, 84.0, 78.5, 84.5, 84.0], [84.0, 83.0, 79.0, 88.0, 82.0])
    check([81.0, 82.0, 84.0, 86.0], [80.0] * 4)  # 0 is inside, but not of the one-sided interval
    answer.case("one difference in all seeds")
    check([85.0, 86.5, 82.0], [84.0, 85.5, 81.0])
    answer.case("equal scores")
    check([84.0, 86.5, 81.0], [84.0, 86.5, 81.0])
    answer.case("lists of different lengths")
    three, two, one = [90.0, 92.0, 91.0], [89.0, 91.0], [90.0]
    for first, second in ((three, two), (two, three), (three, one), (one, three)):
        counts = f"{len(first)} and {len(second)} values"
        message = f"{counts} make no pairs, and no error says so: zip(strict=True)?"
        expect_error(answer, first, second, message=message)
    expect_nothing_changed(answer, high, low)


# ---- 4.6: the training loop ----


class _Run(NamedTuple):
    """What plain gradient descent makes of a linear classifier, in float64."""

    weight: Tensor
    bias: Tensor
    batches: list[list[Tensor]]  # of each epoch, of each batch: the losses of its images
    stepped: list[list[Tensor]]  # the same, measured after the batch's step
    after: list[float]  # of all images, after each epoch


def _descend(
    features: Tensor,
    y: Tensor,
    layer: nn.Linear,
    epochs: int,
    batch_size: int,
    rate: float,
    mistake: str = "",
) -> _Run:
    """Cross-entropy by its closed form, dL/dlogits = (softmax - onehot) / batch; no autograd.

    mistake: one of _MOVES; "adam" is right for the first step only.
    """
    x = torch.cat([features.double(), torch.ones(len(y), 1).double()], dim=1)  # 1 for the bias
    wanted = torch.eye(layer.out_features).double()[y]
    weight = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().double()

    def losses(rows: Tensor) -> Tensor:
        return -((x[rows] @ weight.T).log_softmax(1) * wanted[rows]).sum(1)

    even = math.ceil(len(y) / math.ceil(len(y) / batch_size))
    every = torch.arange(len(y))
    batches = list(every.split({"one batch": len(y), "even": even}.get(mistake, batch_size)))
    if mistake == "last batch" and len(batches[-1]) < batch_size < len(y):
        del batches[-1]
    keep = {"accumulated": 1.0, "momentum": 0.9, "once": 1.0}.get(mistake, 0.0)
    run = _Run(weight, weight, [], [], [])
    moved = torch.zeros_like(weight)
    for _ in range(epochs):
        run.batches.append([])
        run.stepped.append([])
        if mistake == "once":
            moved = torch.zeros_like(weight)
        for rows in batches:
            run.batches[-1].append(losses(rows))
            p = (x[rows] @ weight.T).softmax(1)
            slope = p - wanted[rows]
            if mistake == "softmax":  # taken a second time
                inner, outer = p, p.softmax(1)
                slope = outer - wanted[rows]
                slope = inner * (slope - (slope * inner).sum(1, keepdim=True))
            grad = slope.T @ x[rows] / (1 if mistake == "sum" else len(rows))
            moved = keep * moved + grad
            if mistake == "adam":
                moved = moved / (moved.abs() + 1e-8)
            if mistake not in ("once", "once, the last") or rows is batches[-1]:
                weight = weight - rate * moved
            run.stepped[-1].append(losses(rows))
        run.after.append(float(losses(every).mean()))
    return run._replace(weight=weight[:, :-1], bias=weight[:, -1])


_MOVES = [
    ("accumulated", "the gradients add up from step to step: where is zero_grad()?"),
    ("momentum", "this is SGD with a momentum of 0.9: plain SGD was asked for"),
    ("sum", "the loss is the sum over the batch: take the mean"),
    ("softmax", "cross_entropy takes logits: it applies the softmax itself"),
    ("adam", "each number moves by the learning rate: this is Adam, and plain SGD was asked for"),
    ("one batch", "one step an epoch, with all images: split them into batches"),
    ("once", "one step an epoch, after its batches: step() belongs into the loop over batches"),
    ("once, the last", "one step an epoch, from its last batch: step() belongs into the loop"),
    ("last batch", "the last, smaller batch is left out"),
    ("even", "the batches are made even: each but the last has batch_size images"),
]


def _train(
    answer: Answer, model: nn.Module, x: Tensor, y: Tensor, *numbers: float, by: Any = probe.build
) -> tuple[Any, probe.Module]:
    """The losses that come back, and the model afterwards."""
    found = answer.probe(by, model, x, y, *numbers)
    losses, after = found["made"], found["given"][0]
    require(losses is not None, "got None: end with `return losses` (print gives nothing back)")
    kind = kind_of(losses)
    require(isinstance(losses, list | tuple), f"expected a list of losses, got {kind}")
    epochs = int(numbers[0])
    require(len(losses) == epochs, f"expected {epochs} losses, one an epoch: {len(losses)} came")
    for name, value in model.named_parameters():
        now = after.parameters[name]
        require(now.dtype == value.dtype, f"{name} is {now.dtype} afterwards: it was {value.dtype}")
        still = value.requires_grad or torch.equal(now, value)
        require(still, f"{name} was frozen and has moved")
        require(
            now.requires_grad == value.requires_grad, f"requires_grad of {name} is not what it was"
        )
    for name, before, now in (("x", x, found["given"][1]), ("y", y, found["given"][2])):
        require(torch.equal(before, now), f"it changes the caller's {name}: make a new one instead")
    return losses, after


def _expect_moved(
    after: probe.Module,
    name: str,
    layer: nn.Linear,
    descend: Callable[..., _Run],
    shuffled: Iterable[_Run] = (),
) -> None:
    """Compare the parameters of the classifier called name."""
    right = descend()
    still = _Run(layer.weight, layer.bias, [], [], [])
    known = [(still, "nothing moved in the given model: zero_grad, backward, step, in this order")]
    known += [(descend(mistake=mistake), message) for mistake, message in _MOVES]
    message = "the images come in another order: take them as they stand in x"
    for part in ("weight", "bias"):
        values = chain(
            ((getattr(wrong, part), text) for wrong, text in known),
            ((getattr(wrong, part), message) for wrong in shuffled),
        )
        expect(after.parameters[name + part], getattr(right, part), values, name + part)


def _expect_losses(losses: Sequence[Any], run: _Run) -> None:
    def mean(batches: Iterable[Tensor]) -> float:
        return float(torch.cat(list(batches)).mean())

    right = [mean(batches) for batches in run.batches]
    for number, loss in enumerate(losses):
        batches = run.batches[number]
        known = [
            (
                float(torch.stack([batch.mean() for batch in batches]).mean()),
                "a mean of batch means: the last batch is smaller",
            ),
            (
                right[number] * sum(map(len, batches)),
                "this is the sum: divide by the number of images",
            ),
            (sum(right[: number + 1]), "the losses of all epochs so far: start from 0"),
            (
                run.after[number],
                "measured after the epoch: take the losses of its batches as they were trained on",
            ),
            (mean(run.stepped[number]), "measured after each step: take the loss before it"),
            (mean(batches[-1:]), "this is the last batch's: take the mean of all images"),
        ]
        expect_number(loss, right[number], known, f"epoch {number + 1}", tolerance=1e-5)


def _check_sizes(answer: Answer) -> None:
    """Values and losses of a linear classifier, in float64: (images, epochs, batch size)."""
    for case, images, epochs, batch_size, size in (
        ("batches", 5, 1, 2, 1),
        ("batches", 9, 3, 4, 1),
        ("twelve epochs", 8, 12, 4, 1),
        ("a batch larger than x", 5, 7, 100, 1),
        ("batches of one image", 4, 2, 1, 1),
        ("one image", 1, 2, 3, 1),
        ("large batches", 47, 2, 20, 1),
        ("large numbers", 6, 8, 3, 300),
    ):
        answer.case(case)
        layer = nn.Linear(4, 3).double()
        x, y = size * randn(images, 4, dtype=torch.float64), torch.arange(images) ** 2 % 3
        losses, after = _train(answer, layer, x, y, epochs, batch_size, 0.5)
        descend = partial(_descend, x, y, layer, epochs, batch_size, 0.5)
        shuffled = (
            _descend(x[list(order)], y[list(order)], layer, epochs, batch_size, 0.5)
            for order in (permutations(range(5)) if images == 5 else ())
        )
        _expect_moved(after, "", layer, descend, shuffled)
        _expect_losses(losses, descend())


def _check_stays(answer: Answer) -> None:
    """Every epoch is trained, where the loss is small early on and where it rises."""
    for case in ("a small loss", "a loss that rises"):
        answer.case(case)
        for _ in range(500):
            layer = nn.Linear(4, 3).double()
            x, y = 10 * randn(5, 4, dtype=torch.float64), torch.arange(5) ** 2 % 3
            run = _descend(x, y, layer, 12, 4, 0.5)
            losses = [float(torch.cat(batches).mean()) for batches in run.batches]
            rises = any(b > 1.1 * a for a, b in pairwise(losses[4:]))
            if rises if case == "a loss that rises" else losses[3] < 1e-3:
                break
        _train(answer, layer, x, y, 12, 4, 0.5)


def _check_given(answer: Answer, x: Tensor, y: Tensor) -> None:
    """One step of a model that comes with gradients, a frozen bias and a weight in two layers."""
    answer.case("old gradients, a shared weight")
    layer = nn.Linear(4, 3).double()
    layer.bias.requires_grad_(False)
    layer.twin = nn.Linear(4, 3, bias=False)
    layer.twin.weight = layer.weight
    _, after = _train(answer, layer, x, y, 1, 6, 0.5, by=probe.build_after_backward)
    right = _descend(x, y, layer, 1, 6, 0.5).weight
    twice = 2 * right - layer.weight.detach()
    known = [
        (right - 0.5, "the gradient from before goes into the first step: zero_grad() comes first"),
        (twice, "two layers share it, and it moves twice: model.parameters() lists it once"),
    ]
    expect(after.parameters["weight"], right, known, "weight")


def _check_modes(answer: Answer) -> None:
    """Training mode in every batch, evaluation mode afterwards."""
    answer.case("modes")
    norm, layer = nn.BatchNorm1d(4), nn.Linear(4, 3)
    x, y = randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    layer.weight.requires_grad_(False)
    model = nn.Sequential(norm, layer).eval()
    _, after = _train(answer, model, x, y, 6, 3, 0.1)
    tracked = int(after.tensors["0.num_batches_tracked"])
    require(tracked != 0, "it trains in evaluation mode: model.train() comes before the loop")
    require(tracked == 12, f"the model saw {tracked} batches in training mode, expected 12")
    for name, value in model.named_parameters():
        moves = not torch.equal(after.parameters[name], value)
        require(moves or not value.requires_grad, f"{name} is not frozen, but does not move")
    require(not after.training[""], "the model is left in training mode: end with model.eval()")
    left = [name for name, mode in after.training.items() if mode]
    refuse_any(
        left, "layer {} is left in training mode, the model is not: model.eval() sets every layer"
    )
    losses, _ = _train(answer, model, x, y, 1, 6, 0.1)

    def loss_of(z: Tensor) -> float:
        log_p = (z @ layer.weight.double().T + layer.bias.double()).log_softmax(1)
        return -float(log_p[torch.arange(len(y)), y].detach().mean())

    wide = x.double()  # evaluation mode takes running means, of no batch so far or of this one
    once = (wide - 0.1 * wide.mean(0)) / (0.9 + 0.1 * wide.var(0) + norm.eps).sqrt()
    message = "measured in evaluation mode: take the loss that is trained on"
    known = [(loss_of(z), message) for z in (wide, once)]
    expect_number(losses[0], loss_of(_normalised(x, norm.eps)), known, "loss", tolerance=1e-4)
    answer.case("no epoch")
    _, after = _train(answer, layer.train(), x, y, 0, 3, 0.5)
    require(not after.training[""], "with epochs = 0 the model is left in training mode")


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

    answer.case("one step")
    layer, x, y = nn.Linear(4, 3), 20 * randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    _, after = _train(answer, layer, x, y, 1, 6, 0.5)
    _expect_moved(after, "", layer, partial(_descend, x, y, layer, 1, 6, 0.5))
    trained = "found in training mode, the model is left in it: end with model.eval()"
    require(not after.training[""], trained)
    _check_sizes(answer)
    _check_stays(answer)
    answer.case("frozen parameters")
    first, last = nn.Linear(4, 5).double().requires_grad_(False), nn.Linear(5, 3).double()
    x = x.double() / 20
    _, after = _train(answer, nn.Sequential(first, nn.ReLU(), last), x, y, 7, 4, 0.5)
    features = (x @ first.weight.T + first.bias).relu()
    _expect_moved(after, "2.", last, partial(_descend, features, y, last, 7, 4, 0.5))
    _check_given(answer, x, y)
    _check_modes(answer)
    expect_device(answer, layer, x.float(), y, 2, 4, 0.5)
    answer.case("nothing else changed")
    for thing in answer.probe(probe.torch_state, layer, x.float(), y, 2, 4, 0.5):
        drawn = thing == "torch's random state"  # a DataLoader draws a number
        require(drawn, f"it changes {thing}: leave that as it is")
