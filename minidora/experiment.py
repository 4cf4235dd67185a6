"""Compare ways to fine-tune, fairly: the same images, the same search, several seeds, intervals.

    comparison = compare(seeds=range(8))
    comparison.difference("dora", "lora").verdict      # for instance "no difference detected"

One seed is one whole replication. It draws four disjoint sets of images, pretrains a model on the
first, and then, for each method: adapts a copy on the second (the shifted task), chooses the
learning rate on the third, and looks at the fourth once, with the chosen model. So nothing that is
reported was used to choose anything, and two methods differ within a seed by the method alone.

References:
    power of a t test: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences"
    overlapping resamples: Nadeau, Bengio 2003, "Inference for the Generalization Error"
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import nn

from minidora.adapt import adapt, count_parameters
from minidora.data import Images, load_images, shift, split
from minidora.memory import training_memory
from minidora.models import MultilayerPerceptron
from minidora.training import History, device, evaluate, fit, one_thread, progress_bar

SIZES = {"pretraining": 600, "adaptation": 300, "validation": 300, "test": 597}
"""How many of the 1797 digits go where, drawn anew for each seed."""

LEARNING_RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
"""Where the search for a learning rate starts, the same for every method."""

EPOCHS = 40
"""The most passes over the adaptation images, the same for every method."""

WIDENINGS = 3
"""How many learning rates may be added where the best one lies at the edge."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: kind is "full", "lora" or "dora"; rank and alpha are for the last two."""

    kind: str
    rank: int = 0
    alpha: float = 0.0


def methods(rank: int = 4) -> dict[str, Method]:
    """The four that the course compares, with alpha = 2 rank as in the paper's table 8.

    Raises:
        ValueError: rank is odd or below 2, so it has no half.
    """
    if rank < 2 or rank % 2:
        raise ValueError(f"rank must be even and at least 2, so that it has a half, got {rank!r}")
    return {
        "full": Method("full"),
        "lora": Method("lora", rank, 2.0 * rank),
        "dora": Method("dora", rank, 2.0 * rank),
        "dora_half": Method("dora", rank // 2, float(rank)),
    }


@dataclass(frozen=True)
class Task:
    """What one seed works with: a pretrained model and the images of the shifted task."""

    seed: int
    base: nn.Module
    adaptation: Images
    validation: Images
    test: Images
    original_accuracy: float
    """of the base on the validation images as they were before the shift, in percent"""


@dataclass(frozen=True)
class Trial:
    """One training run at one learning rate. accuracy and loss are the validation images'."""

    learning_rate: float
    accuracy: float
    loss: float
    model: nn.Module
    history: History


@dataclass(frozen=True)
class Result:
    """What one method reached on one seed.

    Attributes:
        test_accuracy: in percent, of the model with the best learning rate.
        validation: {learning rate: validation accuracy in percent}, in rising order.
        at_edge: the best learning rate is still the first or last, after all widening.
        trainable: number of parameters trained.
        state_bytes: bytes of parameters (frozen ones too), gradients and Adam's state.
        history: of the chosen run.
    """

    seed: int
    test_accuracy: float
    learning_rate: float
    validation: dict[float, float]
    at_edge: bool
    trainable: int
    state_bytes: int
    history: History


@one_thread()
def make_task(images: Images, shift_name: str, seed: int, sizes: Mapping[str, int] = SIZES) -> Task:
    """Split, pretrain a 64-128-64-10 perceptron (for 8x8 images), shift the other three sets.

    Raises:
        ValueError: sizes lacks one of the four names, or a bad size, seed or shift.
    """
    if set(sizes) != set(SIZES):
        raise ValueError(f"sizes must name {', '.join(SIZES)}, got {', '.join(sizes)}")
    parts = split(images, sizes, seed)
    new = {name: shift(part, shift_name).to(device()) for name, part in parts.items()}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        base = MultilayerPerceptron(images.x.shape[1], 128, 64, int(images.y.max()) + 1)
    base.to(device())
    fit(base, parts["pretraining"], epochs=30, learning_rate=3e-3, seed=seed, progress=False)
    original = evaluate(base, parts["validation"]).accuracy
    return Task(seed, base, new["adaptation"], new["validation"], new["test"], original)


def prepare(base: nn.Module, method: Method, seed: int) -> nn.Module:
    """A copy of the base, ready for fit; the base is not touched. LoRA and DoRA get the same A."""
    model = copy.deepcopy(base).requires_grad_(True)
    if method.kind == "full":
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return adapt(model, method.kind, rank=method.rank, alpha=method.alpha)


@one_thread()
def train_once(task: Task, method: Method, learning_rate: float, epochs: int = EPOCHS) -> Trial:
    """Adapt a copy of the task's base at one learning rate."""
    model = prepare(task.base, method, task.seed)
    history = fit(
        model,
        task.adaptation,
        validation=task.validation,
        epochs=epochs,
        patience=10,
        learning_rate=learning_rate,
        seed=task.seed,
        progress=False,
    )
    score = evaluate(model, task.validation)
    return Trial(learning_rate, score.accuracy, score.loss, model, history)


def tune(
    task: Task,
    method: Method,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
) -> Result:
    """Choose the learning rate on the validation images; then, once, look at the test images.

    The best run is that of the highest accuracy; of equal ones, that of the lowest loss. While it
    lies at an edge the grid grows there, in the same steps, by at most WIDENINGS rates in all.

    Raises:
        ValueError: fewer than 3 learning rates, or not in rising order.
    """
    if len(learning_rates) < 3 or sorted(set(learning_rates)) != list(learning_rates):
        raise ValueError(
            f"learning_rates must be at least 3 in rising order, got {list(learning_rates)}"
        )
    trials = [train_once(task, method, rate, epochs) for rate in learning_rates]
    while True:
        best = max(trials, key=lambda trial: (trial.accuracy, -trial.loss))
        at_edge = best is trials[0] or best is trials[-1]
        if not at_edge or len(trials) == len(learning_rates) + WIDENINGS:
            break
        inner = trials[1] if best is trials[0] else trials[-2]
        step = best.learning_rate / inner.learning_rate
        new = train_once(task, method, float(f"{best.learning_rate * step:.2g}"), epochs)
        trials = sorted([*trials, new], key=lambda trial: trial.learning_rate)
    return Result(
        seed=task.seed,
        test_accuracy=evaluate(best.model, task.test).accuracy,
        learning_rate=best.learning_rate,
        validation={trial.learning_rate: trial.accuracy for trial in trials},
        at_edge=at_edge,
        trainable=count_parameters(best.model).trainable,
        state_bytes=training_memory(best.model, "adam").total,
        history=best.history,
    )


@dataclass(frozen=True)
class Difference:
    """The paired difference of two methods in test accuracy, in percentage points.

    Attributes:
        values: one difference a seed.
        mean, error: their mean and its standard error.
        low, high: the 95 % t interval of the mean.
        detectable: the smallest true difference that a test at 5 % would have found with a
            probability of 80 %, with this spread and this number of seeds.
    """

    values: tuple[float, ...]
    mean: float
    error: float
    low: float
    high: float
    detectable: float

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" where the interval lies on one side of 0, else no difference."""
        if self.low <= 0 <= self.high:
            return "no difference detected"
        return "higher" if self.low > 0 else "lower"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, stdev / sqrt(n) with n - 1 in the stdev.

    Raises:
        ValueError: fewer than two values have no spread.
    """
    if len(values) < 2:
        raise ValueError(f"a spread needs at least 2 seeds, got {len(values)}")
    return fmean(values), stdev(values) / math.sqrt(len(values))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first - second, seed by seed: what the seeds have in common drops out.

        mean +- t(0.975; n - 1) * error

    Raises:
        ValueError: not equally many values, or fewer than two.
    """
    from scipy import stats  # type: ignore[import-untyped]

    if len(first) != len(second):
        raise ValueError(
            f"a pair needs one value of each a seed, got {len(first)} and {len(second)}"
        )
    values = tuple(a - b for a, b in zip(first, second, strict=True))
    mean, error = mean_and_error(values)
    half_width = float(stats.t.ppf(0.975, len(values) - 1)) * error
    detectable = detectable_difference(error, len(values))
    return Difference(values, mean, error, mean - half_width, mean + half_width, detectable)


def detectable_difference(
    error: float, seeds: int, level: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true difference that a two-sided paired t test would find.

    With a true difference delta (in units of error, the standard error of the mean) the test finds

        |z + delta| > t(1 - level / 2; n - 1) * s,      z normal,  s^2 = chi^2(n - 1) / (n - 1)

    where s is how much the measured spread misses the true one. delta is where this has the
    probability asked for: the power of the noncentral t distribution, averaged over s.

    Raises:
        ValueError: seeds below 2, error below 0, or not 0 < level < power < 1.
    """
    from scipy import optimize, stats

    if seeds < 2 or not error >= 0:
        raise ValueError(f"seeds must be at least 2 and error at least 0, got {seeds}, {error}")
    if not 0 < level < power < 1:
        raise ValueError(f"it takes 0 < level < power < 1, got level={level}, power={power}")
    critical = stats.t.ppf(1 - level / 2, seeds - 1)
    count = 10_000
    quantiles = [(k + 0.5) / count for k in range(count)]
    threshold = critical * (stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1)) ** 0.5

    def found(delta: float) -> float:
        tails = stats.norm.sf(threshold - delta) + stats.norm.sf(threshold + delta)
        return float(tails.mean())

    delta = optimize.brentq(lambda delta: found(delta) - power, 0.0, 100 * critical)
    return error * float(delta)


def seeds_to_detect(difference: float, spread: float) -> int:
    """The fewest seeds whose detectable_difference is at most this difference.

    Args:
        spread: standard deviation of the paired difference from seed to seed, in the same unit.

    Raises:
        ValueError: difference or spread is not above 0.
    """
    if not (difference > 0 and spread > 0):
        raise ValueError(f"difference and spread must be above 0, got {difference}, {spread}")

    def enough(seeds: int) -> bool:
        return detectable_difference(spread / math.sqrt(seeds), seeds) <= difference

    few, many = 1, 2
    while not enough(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


@dataclass(frozen=True)
class Comparison:
    """The results of compare: for each method one Result a seed, in the order of seeds.

    Attributes:
        original, shifted: accuracy of the bases in percent, one a seed: on the validation images
            as they were, and on the test images of the new task.
    """

    shift: str
    seeds: tuple[int, ...]
    original: tuple[float, ...]
    shifted: tuple[float, ...]
    results: Mapping[str, tuple[Result, ...]]

    def accuracies(self, name: str) -> list[float]:
        """Test accuracies of a method in percent, one a seed."""
        return [result.test_accuracy for result in self.results[name]]

    def difference(self, first: str, second: str) -> Difference:
        """Test accuracy of the first method minus that of the second."""
        return paired_difference(self.accuracies(first), self.accuracies(second))


def compare(
    seeds: Sequence[int] = range(5),
    *,
    shift_name: str = "half turn",
    chosen: Mapping[str, Method] | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    images: Images | None = None,
    sizes: Mapping[str, int] = SIZES,
    epochs: int = EPOCHS,
    progress: bool = True,
) -> Comparison:
    """Run every method on every seed.

    Args:
        seeds: one replication each; they must differ.
        chosen: {name: Method}; methods() if None.
        images: the dataset; the digits at 8x8 if None.

    Raises:
        ValueError: fewer than two seeds or a repeated one; see also make_task and tune.
    """
    seeds = tuple(seeds)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"it takes at least 2 seeds, all different, got {list(seeds)}")
    images = load_images("digits", size=8) if images is None else images
    chosen = methods() if chosen is None else chosen
    original, shifted = [], []
    results: dict[str, list[Result]] = {name: [] for name in chosen}
    for seed in progress_bar(seeds, "seeds", progress):
        task = make_task(images, shift_name, seed, sizes)
        for name, method in chosen.items():
            results[name].append(tune(task, method, learning_rates, epochs))
        original.append(task.original_accuracy)
        shifted.append(evaluate(task.base, task.test).accuracy)
    return Comparison(
        shift_name,
        seeds,
        tuple(original),
        tuple(shifted),
        {name: tuple(rows) for name, rows in results.items()},
    )
