"""What every training loop of the course rests on: scores, modes, checks, a progress bar.

training.py has the loops, and stack.py the one that trains many models at once.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from minidora.data import Images

Item = TypeVar("Item")


class Score(NamedTuple):
    """loss: mean cross-entropy in nats. accuracy: in percent."""

    loss: float
    accuracy: float


class Epoch(NamedTuple):
    """One pass over the training images; epoch 0 is the model before training.

    train_loss is the mean over the batches as they were trained on, at epoch 0 over all images.
    validation is measured after the epoch; None without validation images.
    """

    number: int
    train_loss: float
    validation: Score | None


@dataclass(frozen=True)
class History:
    """How a training run went.

    Attributes:
        epochs: one entry an epoch, from epoch 0.
        best: the epoch whose parameters the model has now: that of the lowest validation loss,
            or the last one without validation images.
    """

    epochs: list[Epoch]
    best: Epoch


RateFactors = Mapping[str, float]
"""{end of a parameter's name: factor}: it trains at factor times the learning rate."""


class Run(NamedTuple):
    """What one model of fit_many trains with: arguments of fit."""

    model: nn.Module
    train: Images
    validation: Images | None
    learning_rate: float
    rate_factors: RateFactors | None
    seed: int


class TextRun(NamedTuple):
    """What one model of fit_text_many trains with: arguments of fit_text."""

    model: nn.Module
    learning_rate: float
    rate_factors: RateFactors | None
    seed: int


def share_of_rate(step: int, steps: int) -> float:
    """The learning rate at a step, from 1, as a share of the highest: up for 5 %, then down."""
    warmup = max(1, steps // 20)
    return min(step / warmup, (steps - step + 1) / max(1, steps - warmup))


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within it the model is in that mode; then each module has its own again, whatever happened.

    While the model trains, two kinds of modules stay in evaluation mode: those that were put there
    in a model that is in training mode, and those whose buffers belong to frozen parameters. A
    frozen BatchNorm so keeps its statistics, which are not among the adapters that are saved.
    """
    before = [(module, module.training) for module in model.modules()]
    still = frozen_with_buffers(model)
    try:
        was_training = model.training
        model.train(training)
        for module, mode_before in before:
            if training and (module in still or (was_training and not mode_before)):
                module.training = False
        yield
    finally:
        for module, mode_before in before:
            module.training = mode_before


def frozen_with_buffers(model: nn.Module) -> set[nn.Module]:
    """Modules with buffers, none of whose parameters is trained.

    One without parameters of its own goes by the nearest module around it that has some within,
    and is frozen where any of those is.
    """
    frozen = set()
    for name, module in model.named_modules():
        if all(buffer is None for buffer in module._buffers.values()):
            continue
        own = [p.requires_grad for p in module.parameters(recurse=False)]
        wider = module
        while not list(wider.parameters()) and name:
            name = name.rpartition(".")[0]
            wider = model.get_submodule(name)
        if not any(own) if own else not all(p.requires_grad for p in wider.parameters()):
            frozen.add(module)
    return frozen


def progress_bar(items: Sequence[Item], label: str, show: bool = True) -> Iterable[Item]:
    """The items, with a tqdm bar while they are worked through (none under TQDM_DISABLE=1).

    The bar is text: one that is a widget leaves an error where a notebook is opened again.
    """
    if not show:
        return items
    from tqdm import tqdm

    in_notebook = "ipykernel" in sys.modules  # which shows stderr as if it were a warning
    stream = sys.stdout if in_notebook else sys.stderr
    return tqdm(items, desc=label, file=stream)  # type: ignore[no-any-return]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch uses one CPU thread.

    The lessons' models are so small that handing out the work to several threads costs more than
    the work, and many times more while another program runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def place_of(model: nn.Module) -> torch.device:
    """The device of a model: that of its first parameter, the CPU without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def parameter_groups(
    model: nn.Module, learning_rate: float, rate_factors: RateFactors | None
) -> list[dict[str, Any]]:
    """What requires a gradient, for an optimizer: one group a learning rate."""
    factors = factors_by_name(model, rate_factors)
    if not factors:
        raise ValueError(
            "no parameter requires a gradient: adapt(model) first, or model.requires_grad_(True)"
        )
    groups: dict[float, list[nn.Parameter]] = {}
    for name, factor in factors.items():
        groups.setdefault(factor, []).append(model.get_parameter(name))
    return [{"params": ps, "lr": learning_rate * factor} for factor, ps in groups.items()]


def factors_by_name(model: nn.Module, rate_factors: RateFactors | None) -> dict[str, float]:
    """{name: factor} of every parameter that requires a gradient; 1.0 where none is named.

    Raises:
        ValueError: an entry is the end of no such name, or no finite number above 0.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = dict.fromkeys(names, 1.0)
    for end, factor in (rate_factors or {}).items():
        matching = [name for name in names if name == end or name.endswith("." + end)]
        if not matching:
            raise ValueError(
                f"rate_factors: no trained parameter ends in {end!r}; the names end in "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}"
            )
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"rate_factors[{end!r}] must be finite and above 0, got {factor!r}")
        found |= dict.fromkeys(matching, float(factor))
    return found


def check_labels(y: Tensor, classes: int) -> None:
    """Raise ValueError for a label that the model has no output for."""
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(
            f"labels run from {int(y.min())} to {int(y.max())}, "
            f"the model has outputs for 0 to {classes - 1}"
        )


def check_numbers(learning_rate: float, **counts: int) -> None:
    """Raise ValueError for a count that is not a whole number of at least 1, or a bad rate."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    if not (isinstance(learning_rate, Real) and 0 < learning_rate < math.inf):
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate!r}")


def check_window(tokens: Tensor, context: int) -> None:
    if len(tokens) <= context:
        raise ValueError(f"{len(tokens)} tokens make no window of {context} and the one after it")


def check_fit(
    train: Images,
    validation: Images | None,
    epochs: int,
    learning_rate: float,
    patience: int | None,
    batch_size: int,
) -> None:
    if not len(train):
        raise ValueError("train is empty: there is nothing to learn from")
    if validation is not None and not len(validation):
        raise ValueError("validation is empty: pass None, or images to choose the epoch by")
    counts = {"epochs": epochs, "batch_size": batch_size}
    check_numbers(learning_rate, **counts, patience=1 if patience is None else patience)
    if patience is not None and validation is None:
        raise ValueError(
            f"patience={patience} waits for the validation loss: pass validation images as well"
        )
