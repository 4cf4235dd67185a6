"""Compare ways to fine-tune, fairly: the same images, the same search, several seeds, intervals.

    comparison = compare(seeds=range(8))
    comparison.difference("dora", "lora").verdict      # for instance "no difference detected"

One seed is one whole replication. It draws four disjoint sets of images, pretrains a model on the
first, and then, for each method: adapts a copy on the second (the shifted task), chooses the
learning rate on the third, and looks at the fourth once, with the chosen model. So nothing that is
reported was used to choose anything, and two methods differ within a seed by the method alone.

Reference:
    overlapping resamples: Nadeau, Bengio 2003, "Inference for the Generalization Error"
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minidora.adapt import adapt, count_parameters
from minidora.data import Images, load_images, shift, split
from minidora.intervals import (
    Difference,
    detectable_difference,
    mean_and_error,
    paired_difference,
    seeds_to_detect,
)
from minidora.memory import training_memory
from minidora.models import MultilayerPerceptron
from minidora.training import History, device, evaluate, fit_many, one_thread

__all__ = [
    "Comparison",
    "Difference",
    "Method",
    "Result",
    "Task",
    "Trial",
    "compare",
    "detectable_difference",
    "make_task",
    "make_tasks",
    "mean_and_error",
    "methods",
    "paired_difference",
    "prepare",
    "seeds_to_detect",
    "train_many",
    "train_once",
    "tune",
    "tune_many",
]

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
    """A way to fine-tune: kind is "full", "lora" or "dora"; rank and alpha are for the last two.

    B and the magnitude train at the learning rate times b_rate and magnitude_rate; targets are the
    layers to adapt, all-linear if there are none.
    """

    kind: str
    rank: int = 0
    alpha: float = 0.0
    b_rate: float = 1.0
    magnitude_rate: float = 1.0
    targets: tuple[str, ...] = ()

    @property
    def rate_factors(self) -> dict[str, float]:
        """Both as fit takes them, where they are not 1."""
        factors = {"lora_B": self.b_rate, "magnitude": self.magnitude_rate}
        return {name: factor for name, factor in factors.items() if factor != 1}


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


def make_task(images: Images, shift_name: str, seed: int, sizes: Mapping[str, int] = SIZES) -> Task:
    """make_tasks for one seed."""
    return make_tasks(images, shift_name, [seed], sizes)[0]


@one_thread()
def make_tasks(
    images: Images,
    shift_name: str,
    seeds: Sequence[int],
    sizes: Mapping[str, int] = SIZES,
    progress: bool = False,
) -> list[Task]:
    """For each seed: split, pretrain a 64-128-64-10 perceptron (8x8 images), shift the other sets.

    Raises:
        ValueError: sizes lacks one of the four names, or a bad size, seed or shift.
    """
    if set(sizes) != set(SIZES):
        raise ValueError(f"sizes must name {', '.join(SIZES)}, got {', '.join(sizes)}")
    parts = [split(images, sizes, seed) for seed in seeds]
    bases = []
    for seed in seeds:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            base = MultilayerPerceptron(images.x.shape[1], 128, 64, int(images.y.max()) + 1)
        bases.append(base.to(device()))
    fit_many(
        bases,
        [part["pretraining"] for part in parts],
        epochs=30,
        learning_rate=3e-3,
        seed=list(seeds),
        progress="pretraining" if progress else False,
    )
    tasks = []
    for seed, base, part in zip(seeds, bases, parts, strict=True):
        new = {name: shift(images, shift_name).to(device()) for name, images in part.items()}
        original = evaluate(base, part["validation"]).accuracy
        tasks.append(Task(seed, base, new["adaptation"], new["validation"], new["test"], original))
    return tasks


def prepare(base: nn.Module, method: Method, seed: int) -> nn.Module:
    """A copy of the base, ready for fit; the base is not touched. LoRA and DoRA get the same A."""
    model = copy.deepcopy(base).requires_grad_(True)
    if method.kind == "full":
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return adapt(
            model,
            method.kind,
            rank=method.rank,
            alpha=method.alpha,
            target_modules=method.targets or "all-linear",
        )


def train_once(task: Task, method: Method, learning_rate: float, epochs: int = EPOCHS) -> Trial:
    """train_many for one task and one learning rate."""
    return train_many([task], method, [learning_rate], epochs)[0]


@one_thread()
def train_many(
    tasks: Sequence[Task],
    method: Method,
    learning_rates: Sequence[float],
    epochs: int = EPOCHS,
    progress: bool | str = False,
) -> list[Trial]:
    """Adapt a copy of each task's base, at that task's learning rate, all at once: see fit_many."""
    models = [prepare(task.base, method, task.seed) for task in tasks]
    histories = fit_many(
        models,
        [task.adaptation for task in tasks],
        validation=[task.validation for task in tasks],
        epochs=epochs,
        patience=10,
        learning_rate=learning_rates,
        rate_factors=method.rate_factors,
        seed=[task.seed for task in tasks],
        progress=progress,
    )
    trials = []
    for rate, model, history in zip(learning_rates, models, histories, strict=True):
        assert history.best.validation is not None  # there are validation images
        loss, accuracy = history.best.validation
        trials.append(Trial(rate, accuracy, loss, model, history))
    return trials


def tune(
    task: Task,
    method: Method,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
) -> Result:
    """tune_many for one task."""
    return tune_many([task], method, learning_rates, epochs)[0]


def tune_many(
    tasks: Sequence[Task],
    method: Method,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
    progress: bool | str = False,
) -> list[Result]:
    """For each task choose the rate on its validation images; then, once, look at its test images.

    The best run is that of the highest accuracy; of equal ones, that of the lowest loss. While it
    lies at an edge the grid grows there, in the same steps, by at most WIDENINGS rates in all.

    Raises:
        ValueError: fewer than 3 learning rates, or not in rising order.
    """
    if len(learning_rates) < 3 or sorted(set(learning_rates)) != list(learning_rates):
        raise ValueError(
            f"learning_rates must be at least 3 in rising order, got {list(learning_rates)}"
        )
    trials: list[list[Trial]] = [[] for _ in tasks]
    wanted = [(place, rate) for place in range(len(tasks)) for rate in learning_rates]
    while wanted:  # the runs that every task needs, then those of tasks whose grid grows
        chosen = [tasks[place] for place, _ in wanted]
        rates = [rate for _, rate in wanted]
        found = train_many(chosen, method, rates, epochs, progress)
        for (place, _), trial in zip(wanted, found, strict=True):
            trials[place].append(trial)
            trials[place].sort(key=lambda trial: trial.learning_rate)
        most = len(learning_rates) + WIDENINGS
        wanted = [
            (place, rate)
            for place in dict.fromkeys(place for place, _ in wanted)
            if (rate := _wider(trials[place])) and len(trials[place]) < most
        ]
    return [_result(task, found) for task, found in zip(tasks, trials, strict=True)]


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: (trial.accuracy, -trial.loss))


def _wider(trials: Sequence[Trial]) -> float | None:
    """The next learning rate beyond the edge at which the best trial lies; None inside."""
    best = _best(trials)
    if best is not trials[0] and best is not trials[-1]:
        return None
    inner = trials[1] if best is trials[0] else trials[-2]
    return float(f"{best.learning_rate * best.learning_rate / inner.learning_rate:.2g}")


def _result(task: Task, trials: Sequence[Trial]) -> Result:
    best = _best(trials)
    return Result(
        seed=task.seed,
        test_accuracy=evaluate(best.model, task.test).accuracy,
        learning_rate=best.learning_rate,
        validation={trial.learning_rate: trial.accuracy for trial in trials},
        at_edge=_wider(trials) is not None,
        trainable=count_parameters(best.model).trainable,
        state_bytes=training_memory(best.model, "adam").total,
        history=best.history,
    )


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
    """Run every method on every seed, all runs of a method at once: see fit_many.

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
    tasks = make_tasks(images, shift_name, seeds, sizes, progress)
    results = {
        name: tuple(tune_many(tasks, method, learning_rates, epochs, progress and name))
        for name, method in chosen.items()
    }
    return Comparison(
        shift_name,
        seeds,
        original=tuple(task.original_accuracy for task in tasks),
        shifted=tuple(evaluate(task.base, task.test).accuracy for task in tasks),
        results=results,
    )
