"""What a sweep runs: a grid of methods, ranks, rates and seeds, checked before anything is made.

Grid(task="digits", methods=("lora", "dora"), ranks=(2, 4), seeds=5).size    # 160 runs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral, Real
from typing import Any, TypeGuard

from torch import nn

from minidora.data import DATASETS
from minidora.experiment import EPOCHS, Method
from minidora.models import CharGPT, MultilayerPerceptron
from minidora.targets import select_targets

TASKS = (*DATASETS, "chargpt")
"""Images after a half turn, for a perceptron; Python's source code, for the small GPT of lesson 5,
which was trained on Python's documentation."""
METHODS = ("full", "lora", "dora")
AUTO_RATES = {
    "digits": (0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    "mnist": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "fashion-mnist": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "chargpt": (0.0003, 0.001, 0.003, 0.01, 0.03),
}
STEPS = 300
"""Training steps of a run of chargpt, as in lesson 5."""
SEEDS_A_GROUP = 5


@dataclass(frozen=True)
class Grid:
    """What is run: every combination, checked before anything is made.

    Attributes:
        ranks: of LoRA and DoRA, with alpha = 2 rank.
        rates: learning rates; none means AUTO_RATES of the task, the same for every method.
        seeds: a number of seeds from 0, or the seeds themselves.
        targets: names of the layers to adapt, as in adapt; none means all-linear.
        b_rates, magnitude_rates: lora_B and magnitude train at these multiples of the rate.
        length: epochs of a run (training steps for chargpt); 0 means 40 (and 300).

    Raises:
        ValueError: an unknown name or a bad number; the text lists what exists.
    """

    task: str = "digits"
    methods: Sequence[str] = METHODS
    ranks: Sequence[int] = (4,)
    rates: Sequence[float] = ()
    seeds: int | Sequence[int] = 10
    targets: Sequence[str] = ()
    b_rates: Sequence[float] = (1.0,)
    magnitude_rates: Sequence[float] = (1.0,)
    length: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        _known("task", [self.task], TASKS)
        if _whole(self.seeds):
            put("seeds", tuple(range(self.seeds)))
        for name in ("methods", "ranks", "rates", "seeds", "targets", "b_rates", "magnitude_rates"):
            value = getattr(self, name)
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                raise ValueError(f"{name} must be a list, got {value!r}")
            if len(set(value)) < len(value):
                raise ValueError(f"{name} names one thing twice: {list(value)}")
            put(name, tuple(value))
        put("rates", self.rates or AUTO_RATES[self.task])
        put("length", self.length or (STEPS if self.task == "chargpt" else EPOCHS))
        _known("methods", self.methods, METHODS)
        for name, least in (("ranks", 1), ("seeds", 0)):
            for value in getattr(self, name):
                if not _whole(value) or value < least:
                    raise ValueError(f"{name} must be whole numbers from {least}, got {value!r}")
            put(name, tuple(map(int, getattr(self, name))))  # NumPy's too, which JSON lacks
        for name in ("rates", "b_rates", "magnitude_rates"):
            for value in getattr(self, name):
                real = isinstance(value, Real) and not isinstance(value, bool)
                if not real or not 0 < value < float("inf"):
                    raise ValueError(f"{name} must be finite numbers above 0, got {value!r}")
            put(name, tuple(map(float, getattr(self, name))))
        put("rates", tuple(sorted(self.rates)))
        if not _whole(self.length) or self.length < 1:
            raise ValueError(f"length must be a whole number of at least 1, got {self.length!r}")
        put("length", int(self.length))
        needed = ("methods", "ranks", "seeds", "b_rates", "magnitude_rates")
        if empty := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"{empty[0]} is empty: there is nothing to run")
        if self.targets:
            select_targets(_shape(self.task), self.targets)

    @property
    def arms(self) -> tuple[Method, ...]:
        """What is compared: each method at each rank and each multiple of a rate."""
        found = []
        for kind in self.methods:
            if kind == "full":
                found.append(Method("full"))
                continue
            magnitudes = self.magnitude_rates if kind == "dora" else (1.0,)
            for rank, b, m in product(self.ranks, self.b_rates, magnitudes):
                found.append(Method(kind, rank, 2.0 * rank, b, m, tuple(self.targets)))
        return tuple(found)

    @property
    def every_seed(self) -> tuple[int, ...]:
        """The seeds themselves."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    @property
    def groups(self) -> tuple[tuple[Method, tuple[int, ...]], ...]:
        """(method, seeds) that train together at all rates, in the order they are run."""
        seeds = self.every_seed
        blocks = [seeds[k : k + SEEDS_A_GROUP] for k in range(0, len(seeds), SEEDS_A_GROUP)]
        return tuple((method, block) for block in blocks for method in self.arms)

    def runs(self, group: int) -> int:
        """How many runs a group has."""
        return len(self.groups[group][1]) * len(self.rates)

    @property
    def size(self) -> int:
        """How many runs there are in all."""
        return sum(self.runs(group) for group in range(len(self.groups)))


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: there is no {value!r}; there is {', '.join(known)}")


def _shape(task: str) -> nn.Module:
    """A model with the layers that the task's model has."""
    return CharGPT() if task == "chargpt" else MultilayerPerceptron(64, 128, 64, 10)


def name_of(method: Method) -> str:
    """For instance "DoRA, rank 4, magnitude at 10 times the rate"."""
    parts = [{"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}[method.kind]]
    if method.kind != "full":
        parts.append(f"rank {method.rank}")
    for what, factor in (("B", method.b_rate), ("magnitude", method.magnitude_rate)):
        if factor != 1:
            parts.append(f"{what} at {factor:g} times the rate")
    return ", ".join(parts)


QUESTIONS = {
    "magnitude-rate": Grid(methods=("dora",), magnitude_rates=(1.0, 0.1, 0.3, 3.0, 10.0), seeds=20),
    "lora-plus": Grid(methods=("lora",), b_rates=(1.0, 2.0, 4.0, 8.0, 16.0), seeds=20),
}
"""Prepared questions: does a learning rate of its own help the magnitude? Does a larger one help B
(LoRA+, Hayou, Ghosh, Yu 2024, arXiv 2402.12354, which recommends up to 16 times A's)?"""
