"""Train and evaluate small models, on a CPU or a GPU without change.

    history = fit(model, train, validation=validation, epochs=50, learning_rate=1e-3)
    score = evaluate(model, test)                # Score(loss, accuracy in percent)

Frozen parameters stay as they are, so the same call trains a whole model or its adapters.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora.data import Images, random_windows

Item = TypeVar("Item")


def device() -> torch.device:
    """Where the course computes: MINIDORA_DEVICE if it is set, else CUDA if there is one, else CPU.

    Raises:
        ValueError: MINIDORA_DEVICE is none of cpu, cuda, cuda:N.
        RuntimeError: it names a CUDA device that this machine or this torch does not have.
    """
    name = os.environ.get("MINIDORA_DEVICE", "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not index.isdecimal()):
        raise ValueError(f"MINIDORA_DEVICE must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise RuntimeError(
            f"MINIDORA_DEVICE={name}, but torch {torch.__version__} sees {count} CUDA devices: "
            "unset it to use the CPU, or run `minidora doctor`"
        )
    return torch.device(name)


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


def fit(
    model: nn.Module,
    train: Images,
    *,
    epochs: int,
    learning_rate: float,
    validation: Images | None = None,
    patience: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train, in place, what requires a gradient: Adam at a constant rate on the cross-entropy.

    The model trains on the device it is on. The same seed draws the same batches for every model,
    and the random state outside is left as it was.

    Args:
        validation: images to measure after each epoch. The model ends with the parameters of the
            epoch of the lowest loss on them (epoch 0, before training, counts too).
        patience: stop after so many epochs without a lower validation loss.

    Raises:
        ValueError: no image, no parameter that requires a gradient, a label the model has no
            output for, a number out of range, or patience without validation images.
    """
    _check(train, validation, epochs, learning_rate, patience, batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "no parameter requires a gradient: adapt(model) first, or model.requires_grad_(True)"
        )
    where = parameters[0].device
    train = train.to(where)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)  # one call for all
    score = None if validation is None else evaluate(model, validation)
    best = Epoch(0, evaluate(model, train).loss, score)
    best_state = copy.deepcopy(model.state_dict())
    history = [best]

    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        for number in progress_bar(range(1, epochs + 1), "epochs", progress):
            train_loss = _train_epoch(model, train, optimizer, batch_size)
            score = None if validation is None else evaluate(model, validation)
            history.append(Epoch(number, train_loss, score))
            if score is None or best.validation is None:
                best = history[-1]
            elif score.loss < best.validation.loss:  # never true of NaN: a diverged run is undone
                best, best_state = history[-1], copy.deepcopy(model.state_dict())
            elif patience is not None and number - best.number >= patience:
                break
    optimizer.zero_grad()
    if validation is not None:
        model.load_state_dict(best_state)
    return History(history, best)


def _train_epoch(
    model: nn.Module, train: Images, optimizer: torch.optim.Optimizer, batch_size: int
) -> float:
    """One pass in random order; the mean loss of the images, in nats."""
    model.train()
    total = torch.zeros((), device=train.x.device)
    order = torch.randperm(len(train)).to(train.x.device)
    for rows in order.split(batch_size):
        logits = model(train.x[rows])  # (batch, classes)
        loss = F.cross_entropy(logits, train.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
    return float(total) / len(train)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, batch_size: int = 1000) -> Score:
    """Loss and accuracy over all images, in evaluation mode; the mode is put back afterwards.

    Raises:
        ValueError: no image, or a label that the model has no output for.
    """
    if not len(images):
        raise ValueError("images is empty: there is nothing to evaluate on")
    where = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, correct = 0.0, 0
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(where)
        logits = model(batch.x)  # (batch, classes)
        if int(batch.y.min()) < 0 or int(batch.y.max()) >= logits.shape[1]:
            raise ValueError(
                f"labels run from {int(batch.y.min())} to {int(batch.y.max())}, "
                f"the model has outputs for 0 to {logits.shape[1] - 1}"
            )
        total += float(F.cross_entropy(logits, batch.y, reduction="sum"))
        correct += int((logits.argmax(dim=1) == batch.y).sum())
    model.train(was_training)
    return Score(total / len(images), 100 * correct / len(images))


def fit_text(
    model: nn.Module,
    tokens: Tensor,
    *,
    steps: int,
    learning_rate: float,
    context: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    weight_decay: float = 0.0,
    after_step: Callable[[int], None] | None = None,
    progress: bool = True,
) -> list[float]:
    """Train, in place, what requires a gradient to predict the next character.

    AdamW; the learning rate rises over the first twentieth of the steps, then falls in a line to 0
    (the paper's schedule, table 8). The same seed draws the same windows for every model.

    Args:
        tokens: (n,), int64, see data.load_text.
        after_step: called with the number of the step that was just taken, from 1.

    Returns:
        The loss of each step, in nats per character.

    Raises:
        ValueError: fewer tokens than one window, or no parameter that requires a gradient.
    """
    if len(tokens) <= context:
        raise ValueError(f"{len(tokens)} tokens make no window of {context} and the one after it")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "no parameter requires a gradient: adapt(model) first, or model.requires_grad_(True)"
        )
    where = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    warmup = max(1, steps // 20)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for step in progress_bar(range(1, steps + 1), "steps", progress):
        share = min(step / warmup, (steps - step + 1) / max(1, steps - warmup))
        optimizer.param_groups[0]["lr"] = learning_rate * share
        windows = random_windows(tokens, batch_size, context + 1, generator).to(where)
        logits = model(windows[:, :-1])  # (batch, context, characters)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step)
    optimizer.zero_grad()
    return losses


@torch.no_grad()
def evaluate_text(model: nn.Module, tokens: Tensor, context: int = 64) -> float:
    """Mean loss over all of a text, in nats per character, each window of context on its own."""
    was_training = model.training
    where = next(model.parameters()).device
    model.eval()
    windows = tokens.unfold(0, context + 1, context)  # (windows, context + 1)
    total = 0.0
    for batch in windows.split(256):
        batch = batch.to(where)
        logits = model(batch[:, :-1]).flatten(0, 1)
        total += float(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    model.train(was_training)
    return total / (len(windows) * context)


def progress_bar(items: Sequence[Item], label: str, show: bool = True) -> Iterable[Item]:
    """The items, with a tqdm bar while they are worked through (none under TQDM_DISABLE=1)."""
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label)  # type: ignore[no-any-return]


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


def _check(
    train: Images,
    validation: Images | None,
    epochs: int,
    learning_rate: float,
    patience: int | None,
    batch_size: int,
) -> None:
    if not len(train):
        raise ValueError("train is empty: there is nothing to learn from")
    counts = {
        "epochs": epochs,
        "batch_size": batch_size,
        "patience": 1 if patience is None else patience,
    }
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate!r}")
    if patience is not None and validation is None:
        raise ValueError(
            f"patience={patience} waits for the validation loss: pass validation images as well"
        )
