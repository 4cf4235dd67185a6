"""Checks of exercises/04_mlp_demo.ipynb: adapt a whole model, train it, compare honestly."""

import copy
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain, combinations, pairwise, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidora.checks.exercise import Answer, Lesson, Refused, Unstarted, kind_of
from minidora.checks.expect import (
    expect,
    expect_module,
    expect_number,
    expect_parts,
    randn,
    random_size,
    require,
)
from minidora.dora import DoRALinear
from minidora.lora import LoRALinear
from minidora.runner import probe
from minidora.training import device

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
EXAMPLE = "this is the answer to the example: compute it from the arguments"


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


def _labels(logits: Tensor) -> list[int]:
    """The class of the largest logit of each image."""
    rows = logits.tolist()
    return [max(range(len(row)), key=row.__getitem__) for row in rows]


_MODE = {True: "training", False: "evaluation"}


def _as_it_was(now: Tensor | None, before: Tensor) -> bool:
    return now is not None and now.dtype == before.dtype and torch.equal(now, before)


def _normalised(x: Tensor, eps: float) -> Tensor:
    """What batch normalisation makes of x in training mode, before weight and bias; float64."""
    x = x.double()
    return (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()


def _percent(predicted: list[int], labels: list[int]) -> float:
    return 100 * sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)


@lesson.exercise(
    "4.1",
    title="Accuracy",
    difficulty="easy",
    minutes=10,
    teaches="what evaluation mode is for, and to leave a model as you found it",
    hint="Which layers answer differently while training, and who sets the mode back afterwards?",
)
def accuracy(answer: Answer) -> None:
    def check(x: Tensor, weight: Tensor, bias: Tensor, y: list[int], training: bool) -> None:
        # While training, this dropout lets nothing through: each image gets the bias's class.
        # In evaluation mode it and the normalisation change nothing.
        norm, last = nn.BatchNorm1d(weight.shape[1]), nn.Linear(weight.shape[1], len(weight))
        norm.load_state_dict({"running_var": torch.full((weight.shape[1],), 1 - norm.eps)}, False)
        last.load_state_dict({"weight": weight, "bias": bias})
        model = nn.Sequential(nn.Dropout(1.0), norm, last)
        given = (model.train(training), x, torch.tensor(y))
        found = answer.probe(probe.build, *given)
        logits = x.double() @ weight.double().T + bias.double()
        right = _percent(_labels(logits), y)
        known = [
            (right / 100, "this is the fraction: return it in percent"),
            (right * len(y) / 100, "this is the number of hits: return it in percent"),
            (100 - right, "these are the errors: accuracy counts the hits"),
        ]
        if training:
            z = _normalised(x, norm.eps)
            partly = _percent(_labels(z @ weight.double().T + bias.double()), y)
            known.append((partly, "a layer is still in training mode: model.eval() sets them all"))
            dropped = _percent([int(bias.argmax())] * len(y), y)
            known.append((dropped, "measured in training mode: eval() first"))
        if len(y) == len(weight):
            over_images = _percent(_labels(logits.T), y)
            known.append((over_images, "argmax runs over the images (dim=0): take the classes"))
        expect_number(found["made"], right, known, tolerance=1e-5)
        after, *rest = found["given"]
        require(all(map(torch.equal, rest, given[1:])), "it changes the caller's images or labels")
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        now_state = {**after.parameters, **after.tensors}
        moved = [
            name for name, value in state.items() if not _as_it_was(now_state.get(name), value)
        ]
        refuse_any(moved, "{} is not as it was: leave the model as you found it")
        frozen = [n for n, v in after.parameters.items() if not v.requires_grad]
        refuse_any(frozen, "{} is frozen now: no_grad() is enough to measure")
        before, now = (_MODE[mode] for mode in (training, after.training[""]))
        require(before == now, f"a model in {before} mode is left in {now} mode: put it back")
        left = [name for name, mode in after.training.items() if mode != training]
        refuse_any(
            left,
            f"layer {{}} is left in {_MODE[not training]} mode, the model is not: "
            f"model.train({training}) sets every layer",
        )

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
    check(x, torch.eye(5), bias, [0, 1, 2, 2, 3], training=False)
    answer.case("training mode")
    check(x, torch.eye(5), bias, [0, 1, 2, 2, 3], training=True)
    answer.case("random images")
    x, weight, bias = randn(random_size(1100, 1500), 4), randn(3, 4), randn(3)
    y = _labels(x.double() @ weight.double().T + bias.double())
    wrong = random_size(100, 300)
    check(x, weight, bias, [(label + 1) % 3 for label in y[:wrong]] + y[wrong:], training=True)


@lesson.exercise(
    "4.2",
    title="No image in two parts",
    difficulty="easy",
    minutes=10,
    teaches="to split data so that nothing reported was seen before, anew for each seed",
    hint="If one shuffled order is cut into pieces, can a row be in two of them?",
)
def split_rows(answer: Answer) -> None:
    def parts(count: int, sizes: list[int], seed: int) -> list[list[int]]:
        got = answer(count, sizes, seed)
        require(got is not None, "got None: end with `return ...` (print gives nothing back)")
        require(isinstance(got, list | tuple), f"expected a list of tensors, got {kind_of(got)}")
        require(len(got) == len(sizes), f"expected {len(sizes)} parts, got {len(got)}")
        rows = []
        for number, (part, size) in enumerate(zip(got, sizes, strict=True), start=1):
            is_tensor = isinstance(part, Tensor)
            require(is_tensor, f"part {number}: expected a tensor of rows, got {kind_of(part)}")
            whole = part.dtype == torch.int64
            require(whole, f"part {number}: expected row numbers (int64), got {part.dtype}")
            right = part.shape == (size,)
            shape = tuple(part.shape)
            require(right, f"part {number}: expected {size} rows, shape ({size},), got {shape}")
            rows.append(part.tolist())
        return rows

    answer.case("sizes")
    drawn = parts(10, [5, 3, 2], 0)
    answer.case("disjoint")
    every: list[int] = []
    for number, part in enumerate(drawn, start=1):
        outside = [row for row in part if not 0 <= row < 10]
        refuse_any(outside, "there is no row {}: they run from 0 to 9")
        require(len(set(part)) == len(part), f"a row stands twice in part {number}")
        both = sorted(set(part) & set(every))
        refuse_any(both, f"row {{}} is in part {number} and in one before: draw once")
        every += part
    answer.case("random")
    count = random_size(200, 300)
    sizes = [count // 3, count // 4]
    seeds = [0, 1, 2, random_size(1000, 10**6)]
    draws = [parts(count, sizes, seed) for seed in seeds]
    flat = [[row for part in draw for row in part] for draw in draws]
    for rows in flat:
        require(len(set(rows)) == sum(sizes), "a row is in two parts: draw once, then cut")
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
        drawn = [draw[index] for draw in draws]
        middle = sum(map(sum, drawn)) / (len(seeds) * size)
        require(
            abs(middle / count - 0.5) < 0.15,
            f"part {index + 1} comes from one end of the file: "
            "cut the shuffled order, do not sort it before",
        )
        for a, b in combinations(range(len(seeds)), 2):
            shared = len(set(drawn[a]) & set(drawn[b]))
            require(
                shared < 0.7 * size,
                f"seeds {seeds[a]} and {seeds[b]} share {shared} of {size} rows in part "
                f"{index + 1}: each seed draws all parts anew",
            )
    answer.case("repeatable")
    for seed, first in zip(seeds, draws, strict=True):
        again = parts(count, sizes, seed) == first
        require(again, f"seed {seed} gives other rows each time: use seed")


def _picked(scores: Tensor, columns: list[int]) -> Tensor:
    return torch.tensor([float(row[c]) for row, c in zip(scores, columns, strict=True)])


def _best_columns(scores: Tensor) -> list[int]:
    return [max(range(len(row)), key=row.__getitem__) for row in scores.tolist()]


def _disagreeing(seeds: int, rates: int) -> tuple[Tensor, Tensor]:
    """Validation and test scores whose best rates differ, from each other and from their sum's."""
    while True:
        validation, test = 80 + randn(seeds, rates), 80 + randn(seeds, rates)
        first, second, both = map(_best_columns, (validation, test, validation + test))
        if first != second and both not in (first, second):
            return validation, test


@lesson.exercise(
    "4.3",
    title="Choose on one set, report another",
    difficulty="easy",
    minutes=10,
    teaches="how a learning rate is chosen without a look at the images that are reported",
    hint="Which of the two tables may the choice read, and which one only the report?",
)
def chosen_scores(answer: Answer) -> None:
    def check(validation: Tensor, test: Tensor) -> None:
        seeds, rates = test.shape
        columns = _best_columns(validation)
        right = _picked(test, columns)
        for_all = _best_columns(sum(validation, torch.zeros(rates))[None]) * seeds
        lowest = _best_columns(-validation)
        known = [
            (example, EXAMPLE),
            (right.squeeze(), "with one seed squeeze() drops its axis too: the shape is (seeds,)"),
            (
                _picked(test, _best_columns(test)),
                "chosen on the test images: the best of several noisy scores is too good",
            ),
            (
                _picked(test, _best_columns(validation + test)),
                "the choice looks at test too: choose on validation alone",
            ),
            (_picked(validation, columns), "the score that chose: report the test accuracy"),
            (
                _picked(validation, _best_columns(test)),
                "the tables are exchanged: choose on validation, report test",
            ),
            (_picked(test, for_all), "one rate for all seeds: each seed chooses its own"),
            (_picked(test, lowest), "the rate with the lowest validation accuracy"),
            (torch.tensor(columns), "these are numbers of columns: return what test holds there"),
            (_picked(test.T, _best_columns(validation.T)), "one per rate: choose one per seed"),
            (right.mean(), "this is one mean: return one score per seed"),
            (test[:, columns], "test[:, best] gives every pair: take one number from each row"),
        ]
        if torch.equal(right, example):
            known = known[1:]
        expect(answer(validation, test), right, known, shape="(seeds,)")

    example = torch.tensor([81.0, 78.0])
    answer.case("by hand")
    check(
        torch.tensor([[80.0, 85.0, 83.0], [70.0, 72.0, 75.0]]),
        torch.tensor([[84.0, 81.0, 82.0], [71.0, 79.0, 78.0]]),
    )
    answer.case("random accuracies")
    for seeds, rates in ((8, 5), (3, 7), (4, 4)):
        check(*_disagreeing(seeds, rates))
    answer.case("one seed")
    check(*_disagreeing(1, 5))


def _nested_model() -> nn.Module:
    """Linear layers at several depths, three of them called head, and other layers."""

    def block() -> nn.ModuleDict:
        mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        return nn.ModuleDict(
            {"query": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "mlp": mlp, "head": nn.Linear(6, 6)}
        )

    model = nn.Module()
    model.embed = nn.Embedding(9, 6)
    model.blocks = nn.Sequential(block(), block())
    model.head = nn.Linear(6, 9)
    model.start = nn.Parameter(randn(6))
    model.blocks[0].norm.requires_grad_(False)
    model.embed.eval()
    return model


NAMES = ["head", "blocks.1.query", "blocks.0.mlp.2"]


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
    before = {name: type(module).__name__ for name, module in model.named_modules()}
    values = dict(model.named_parameters())
    make = partial(LoRALinear, rank=2, alpha=4.0)
    found = answer.probe(probe.build, model, NAMES, make)

    answer.case("the model as it was")
    made = expect_module(found["made"], "Module")
    caller = found["given"][0]
    require(caller.modules == before, "the caller's model has adapters now: adapt a deep copy")
    now = {name: value.requires_grad for name, value in caller.parameters.items()}
    frozen = [name for name, value in values.items() if value.requires_grad and not now[name]]
    thawed = [name for name, value in values.items() if now[name] and not value.requires_grad]
    refuse_any(thawed, "the caller's {} was frozen and trains now: freeze the copy alone")
    modes = {name: module.training for name, module in model.named_modules()}
    require(caller.training == modes, "the caller's model is in another mode now")
    require(found["given"][1] == NAMES, "it changes the caller's names: make a new list instead")
    own = bool(frozen) and all(name.rpartition(".")[0] in NAMES for name in frozen)
    require(not own, "the adapters wrap the caller's own layers: take those of the copy")
    require(not frozen, "the caller's model is frozen now: freeze the copy")
    changed = [n for n, value in values.items() if not torch.equal(caller.parameters[n], value)]
    refuse_any(changed, "the caller's {} has other values now")

    answer.case("layers swapped")
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
    require(swapped != ["head"], "only the top level is searched: go down into the model")
    refuse_any(missed, "{} is not swapped")
    for name, value in values.items():
        layer, _, part = name.rpartition(".")
        got = made.parameters.get(f"{layer}.base.{part}" if layer in NAMES else name)
        require(got is not None, f"your copy has lost the model's {name}")
        same = torch.equal(got, value) if isinstance(got, Tensor) else False
        require(same, f"the copy's {name} has other values than the model's: copy, do not rebuild")

    answer.case("what trains")
    adapters = [f"{name}.{part}" for name in NAMES for part in ("lora_A", "lora_B")]
    for name in adapters:
        trains = made.parameters[name].requires_grad
        require(trains, f"{name} is frozen too: freeze first, then put adapters in")
    left = [name for name, value in made.parameters.items() if value.requires_grad]
    left = [name for name in left if name not in adapters]
    kinds = {before[name.rpartition(".")[0]] for name in left}
    reason = "freeze the rest" if "Linear" in kinds else "there are more than nn.Linear layers"
    if left == ["start"]:
        reason = "a model may have parameters of its own, outside of its layers"
    left.sort(key="start".__eq__)  # last
    refuse_any(left, f"{{}} still trains: {reason}")
    other = partial(DoRALinear, rank=2, alpha=4.0)
    made = expect_module(answer.probe(probe.build, model, NAMES, other)["made"], "Module")
    for name in [*adapters, *(f"{name}.magnitude" for name in NAMES)]:
        trains = name in made.parameters and made.parameters[name].requires_grad
        require(trains, f"{name} of a DoRALinear is frozen: freeze before make, not by names")

    answer.case("another adapter")
    names = [*NAMES, "embed"]
    made = expect_module(answer.probe(probe.build, model, names, probe.Shifted)["made"], "Module")
    for name in names:
        swapped_too = made.modules.get(name) == "Shifted"
        require(swapped_too, f"{name} ({before[name]}) is not swapped: make may take any layer")
        for part in ("shift", "gain.weight", "gain.bias"):
            trains = made.parameters[f"{name}.{part}"].requires_grad
            require(trains, f"{name}.{part} is frozen: freeze before make, not by names")
    own_parts = tuple(f"{name}.{part}" for name in names for part in ("shift", "gain."))
    left = [name for name, value in made.parameters.items() if value.requires_grad]
    left = [name for name in left if not name.startswith(own_parts)]
    refuse_any(left, "{} trains: freeze the whole copy before make, not by names")

    answer.case("an unknown name")
    message = "a name that is not there passes in silence: raise an error"
    for unknown in (["blocks.0.qurey"], ["haed"], ["blocks.7.query"], ["head", "haed"]):
        expect_error(answer, model, unknown, make, message=message)


T = {
    2: 4.30265,
    3: 3.18245,
    4: 2.77645,
    5: 2.57058,
    6: 2.44691,
    7: 2.36462,
    8: 2.30600,
    14: 2.14479,
    39: 2.02269,
    40: 2.02108,
    78: 1.99085,
}
"""Student's t, 97.5 % quantile by degrees of freedom, as printed in tables of statistics."""

T_ONE_SIDED = {2: 2.91999, 3: 2.35336, 4: 2.13185, 7: 1.89458, 39: 1.68488}
"""The 95 % quantile."""


def _mean_and_error(values: list[Fraction]) -> tuple[float, float]:
    """Mean and standard error, by the differences between the values, exactly.

    s^2 = sum over pairs (d_i - d_j)^2 / (n (n - 1)),  error = s / sqrt(n)
    """
    n = len(values)
    apart = sum(((a - b) ** 2 for a, b in combinations(values, 2)), Fraction(0))
    return float(sum(values) / n), math.sqrt(apart / (n * n * (n - 1)))


def _check_verdict(got: Any, low: float, high: float) -> None:
    """Refuse unless got are the words for this interval."""
    require(isinstance(got, str), f"verdict: expected a text, got {kind_of(got)}")
    nothing = "no difference detected"
    right = "higher" if low > 0 else "lower" if high < 0 else nothing
    if right == nothing:
        claims = got in ("higher", "lower")
        require(not claims, f"'{got}', but the interval holds 0: '{nothing}'")
        equal = got.lower() in ("equal", "same", "no difference", "equally good")
        require(not equal, f"'{got}', but what was not detected may still be there: '{nothing}'")
    else:
        opposite = got in ("higher", "lower") and got != right
        require(not opposite, f"'{got}', but the first method is {right}")
        missed = got == nothing
        require(not missed, f"'{got}', but the interval lies on one side of 0: '{right}'")
    require(got == right, f"verdict: expected '{right}', got '{got[:40]}'")


@lesson.exercise(
    "4.5",
    title="A difference and its interval",
    difficulty="medium",
    minutes=20,
    teaches="why methods are compared seed by seed, and to say no more than a few seeds can show",
    hint="Which one list of numbers has a mean and a spread here, and how many does it hold?",
)
def paired_interval(answer: Answer) -> None:
    def check(first: list[float], second: list[float]) -> None:
        a, b = [[Fraction(value) for value in values] for values in (first, second)]
        n, d = len(a), [x - y for x, y in zip(a, b, strict=True)]
        t = T[n - 1]
        mean, error = _mean_and_error(d)
        half = t * error
        unpaired = math.hypot(_mean_and_error(a)[1], _mean_and_error(b)[1])
        in_order = _mean_and_error([x - y for x, y in zip(sorted(a), sorted(b), strict=True)])[1]
        absolute = _mean_and_error([abs(x) for x in d])
        # (middle, half the width, message)
        mistakes = [
            (2.0, 3.18245, EXAMPLE),
            (-mean, half, "the other way round: the first method minus the second"),
            (absolute[0], t * absolute[1], "of absolute differences: keep their sign"),
            (mean, t * unpaired, "not paired: take the spread of the differences, seed by seed"),
            (mean, T[2 * n - 2] * unpaired, "not paired: take the differences, seed by seed"),
            (mean, 1.95996 * unpaired, "not paired, and 1.96: take the differences, and their t"),
            (mean, t * in_order, "both are sorted: a pair is one seed, not one place"),
            (mean, half * math.sqrt(n), "with the spread of one difference: a mean of n has less"),
            (mean, half / math.sqrt(n), "divided by n: divide the spread by sqrt(n)"),
            (mean, half * math.sqrt((n - 1) / n), "the spread has n - 1 below it, not n"),
            (mean, half * error, "with a variance: take the root before dividing by sqrt(n)"),
            (mean, 1.95996 * error, "1.96 is for very many seeds: take t with n - 1"),
            (mean, 2 * error, "2 is for very many seeds: take t with n - 1"),
            (mean, error, "one standard error each way is no 95 % interval: where is t?"),
            (mean, T[n] * error, "t with n degrees of freedom: it has n - 1"),
            (mean, T_ONE_SIDED[n - 1] * error, "2.5 % lie outside on each side: t at 0.975"),
            (mean, 0.0, "this is the mean: return the two ends of the interval"),
            (0.0, half, "the interval lies around 0: it lies around the mean"),
            (mean, -half, "low and high have changed places"),
        ]
        if first == example:
            del mistakes[0]
        got = expect_parts(answer(first, second), ("low", "high", "verdict"))
        for name, side, end in (("low", -1, got[0]), ("high", 1, got[1])):
            known = [(middle + side * width, message) for middle, width, message in mistakes]
            expect_number(end, mean + side * half, known, name, tolerance=1e-4)
        _check_verdict(got[2], mean - half, mean + half)

    example = [90.0, 92.0, 91.0, 95.0]
    answer.case("by hand")
    check(example, [89.0, 91.0, 90.0, 90.0])
    answer.case("random accuracies")
    for seeds in (3, 5, 8, 40):
        hard = [80 + secrets.randbelow(1000) / 100 for _ in range(seeds)]
        pair = [[base + secrets.randbelow(300) / 100 for base in hard] for _ in range(2)]
        pair[0][0] += 6  # so that one difference is positive
        pair[1][1] += 4  # and one negative
        check(*pair)
    answer.case("on one side of 0")
    check([84.0, 86.5, 81.0, 88.0, 85.0], [81.0, 84.0, 78.5, 84.5, 82.5])
    check([81.0, 84.0, 78.5, 84.5, 82.5], [84.0, 86.5, 81.0, 88.0, 85.0])
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


class _Run(NamedTuple):
    """What plain gradient descent makes of a linear classifier, in float64."""

    weight: Tensor
    bias: Tensor
    losses: list[float]  # mean of each epoch, over images
    batch_losses: list[float]  # mean of each epoch, over batches
    last_losses: list[float]  # of the last batch of each epoch
    after_losses: list[float]  # of all images, after each epoch


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
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    sum_w, sum_b = torch.zeros_like(weight), torch.zeros_like(bias)
    means: list[list[float]] = []
    totals = []
    after = []
    for _ in range(epochs):
        means.append([])
        totals.append(0.0)
        even = math.ceil(len(y) / math.ceil(len(y) / batch_size))
        size = {"one batch": len(y), "even": even}.get(mistake, batch_size)
        for rows in torch.arange(len(y)).split(size):
            if mistake == "last batch" and len(rows) < batch_size:
                continue
            x, wanted = features[rows], torch.eye(len(bias)).double()[y[rows]]
            p = (x @ weight.T + bias).softmax(1)
            slope = p - wanted
            if mistake == "softmax":  # taken a second time
                p, outer = p.softmax(1), p
                slope = outer * (p - wanted - ((p - wanted) * outer).sum(1, keepdim=True))
            losses = -(p.log() * wanted).sum(1)
            slope = slope / (1 if mistake == "sum" else len(rows))
            grad_w, grad_b = slope.T @ x, slope.sum(0)
            if keep := {"accumulated": 1.0, "momentum": 0.9}.get(mistake):
                grad_w, grad_b = sum_w, sum_b = keep * sum_w + grad_w, keep * sum_b + grad_b
            if mistake == "adam":
                grad_w, grad_b = (g / (g.abs() + 1e-8) for g in (grad_w, grad_b))
            weight, bias = weight - rate * grad_w, bias - rate * grad_b
            means[-1].append(float(losses.mean()))
            totals[-1] += float(losses.sum())
        log_p = (features @ weight.T + bias).log_softmax(1)
        after.append(-float(log_p[torch.arange(len(y)), y].mean()))
    return _Run(
        weight,
        bias,
        [total / len(y) for total in totals],
        [sum(epoch) / len(epoch) for epoch in means],
        [epoch[-1] for epoch in means],
        after,
    )


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

    def run(model: nn.Module, x: Tensor, y: Tensor, *numbers: float) -> tuple[Any, probe.Module]:
        given = [part.to(device()) for part in (copy.deepcopy(model), x, y)]
        found = answer.probe(probe.build, *given, *numbers)
        losses = found["made"]
        require(losses is not None, "got None: end with `return losses` (print gives nothing back)")
        kind = kind_of(losses)
        require(isinstance(losses, list | tuple), f"expected a list of losses, got {kind}")
        epochs = int(numbers[0])
        require(
            len(losses) == epochs, f"expected {epochs} losses, one an epoch: {len(losses)} came"
        )
        for name, value in model.named_parameters():
            dtype = found["given"][0].parameters[name].dtype
            require(dtype == value.dtype, f"{name} is {dtype} afterwards: it was {value.dtype}")
        for name, before, after in (("x", x, found["given"][1]), ("y", y, found["given"][2])):
            same = torch.equal(before, after.cpu())
            require(same, f"it changes the caller's {name}: make a new tensor instead")
        return losses, found["given"][0]

    answer.case("one step")
    layer, x, y = nn.Linear(4, 3), 20 * randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])

    def moved(
        after: probe.Module, name: str, descend: Callable[..., _Run], shuffled: Iterable[_Run] = ()
    ) -> None:
        """Compare the parameters of the classifier called name."""
        right = descend()
        still = _Run(layer.weight, layer.bias, [], [], [], [])
        known = [
            (still, "nothing moved in the given model: zero_grad, backward, step, in this order")
        ]
        known += [(descend(mistake=mistake), message) for mistake, message in _MOVES]
        message = "the images come in another order: take them as they stand in x"
        for part in ("weight", "bias"):
            values = chain(
                ((getattr(wrong, part), text) for wrong, text in known),
                ((getattr(wrong, part), message) for wrong in shuffled),
            )
            expect(after.parameters[name + part], getattr(right, part), values, name + part)

    _, after = run(layer, x, y, 1, 6, 0.5)
    moved(after, "", partial(_descend, x.double(), y, layer, 1, 6, 0.5))

    answer.case("batches")
    layer, x, y = nn.Linear(4, 3), randn(5, 4), torch.tensor([0, 1, 2, 2, 1])
    _, after = run(layer, x, y, 1, 2, 0.5)
    shuffled = (
        _descend(x[list(order)].double(), y[list(order)], layer, 1, 2, 0.5)
        for order in permutations(range(len(y)))
    )
    moved(after, "", partial(_descend, x.double(), y, layer, 1, 2, 0.5), shuffled)
    layer, x, y = nn.Linear(4, 3), randn(9, 4), torch.tensor([0, 1, 2, 2, 1, 0, 1, 0, 2])
    losses, after = run(layer, x, y, 3, 4, 0.5)
    descend = partial(_descend, x.double(), y, layer, 3, 4, 0.5)
    moved(after, "", descend)

    answer.case("losses")
    right = descend()
    for number, loss in enumerate(losses):
        known = [
            (right.batch_losses[number], "a mean of batch means: the last batch is smaller"),
            (right.losses[number] * len(y), "this is the sum: divide by the number of images"),
            (sum(right.losses[: number + 1]), "the losses of all epochs so far: start from 0"),
            (
                right.after_losses[number],
                "measured after the epoch: take the losses of its batches as they were trained on",
            ),
            (right.last_losses[number], "this is the last batch's: take the mean of all images"),
        ]
        expect_number(loss, right.losses[number], known, f"epoch {number + 1}", tolerance=1e-4)

    answer.case("frozen parameters")
    first, layer = nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 3)
    model = nn.Sequential(first, nn.ReLU(), layer)
    _, after = run(model, x, y, 2, 3, 0.5)
    for name, value in model.named_parameters():
        frozen = not value.requires_grad
        still = torch.equal(after.parameters[name].cpu(), value.cpu())
        require(still or not frozen, f"{name} was frozen and has moved")
        now_frozen = not after.parameters[name].requires_grad
        require(now_frozen == frozen, f"requires_grad of {name} is not what it was")
    features = (x.double() @ first.weight.double().T + first.bias.double()).relu()
    moved(after, "2.", partial(_descend, features, y, layer, 2, 3, 0.5))

    answer.case("modes")
    trained = "found in training mode, the model is left in it: end with model.eval()"
    require(not after.training[""], trained)
    norm, layer, x, y = nn.BatchNorm1d(4), nn.Linear(4, 3), x[:6], y[:6]
    layer.weight.requires_grad_(False)
    model = nn.Sequential(norm, layer).eval()
    _, after = run(model, x, y, 2, 3, 0.1)
    tracked = int(after.tensors["0.num_batches_tracked"])
    require(tracked != 0, "it trains in evaluation mode: model.train() comes before the loop")
    require(tracked == 4, f"the model saw {tracked} batches in training mode, expected 4")
    for name, value in model.named_parameters():
        moves = not torch.equal(after.parameters[name].cpu(), value.cpu())
        require(moves or not value.requires_grad, f"{name} is not frozen, but does not move")
        require(not moves or value.requires_grad, f"{name} was frozen and has moved")
    require(not after.training[""], "the model is left in training mode: end with model.eval()")
    left = [name for name, mode in after.training.items() if mode]
    refuse_any(
        left, "layer {} is left in training mode, the model is not: model.eval() sets every layer"
    )
    losses, _ = run(model, x, y, 1, 6, 0.1)

    def loss_of(z: Tensor) -> float:
        log_p = (z @ layer.weight.double().T + layer.bias.double()).log_softmax(1)
        return -float(log_p[torch.arange(len(y)), y].detach().mean())

    wide = x.double()  # evaluation mode takes running means, of no batch so far or of this one
    once = (wide - 0.1 * wide.mean(0)) / (0.9 + 0.1 * wide.var(0) + norm.eps).sqrt()
    message = "measured in evaluation mode: take the loss that is trained on"
    known = [(loss_of(z), message) for z in (wide, once)]
    expect_number(losses[0], loss_of(_normalised(x, norm.eps)), known, "loss", tolerance=1e-4)
    answer.case("no epoch")
    _, after = run(layer.train(), x, y, 0, 3, 0.5)
    require(not after.training[""], "with epochs = 0 the model is left in training mode")


_MOVES = [
    ("accumulated", "the gradients add up from step to step: where is zero_grad()?"),
    ("momentum", "this is SGD with a momentum of 0.9: plain SGD was asked for"),
    ("sum", "the loss is the sum over the batch: take the mean"),
    ("softmax", "cross_entropy takes logits: it applies the softmax itself"),
    ("adam", "each number moves by the learning rate: this is Adam, and plain SGD was asked for"),
    ("one batch", "one step an epoch, with all images: split them into batches"),
    ("last batch", "the last, smaller batch is left out"),
    ("even", "the batches are made even: each but the last has batch_size images"),
]
