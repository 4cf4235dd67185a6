"""Train and evaluate small models, on a CPU or a GPU without change.

    history = fit(model, train, validation=validation, epochs=50, learning_rate=1e-3)
    score = evaluate(model, test)                # Score(loss, accuracy in percent)
    histories = fit_many(models, train, epochs=50, learning_rate=rates)    # one rate a model

Frozen parameters stay as they are, so the same call trains a whole model or its adapters.
"""

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora.data import Images, random_windows
from minidora.loop import (
    Epoch,
    History,
    RateFactors,
    Run,
    Score,
    TextRun,
    check_fit,
    check_labels,
    check_numbers,
    check_window,
    mode,
    one_thread,
    parameter_groups,
    place_of,
    progress_bar,
    share_of_rate,
)
from minidora.stack import (
    bytes_of_a_run,
    fit_in_step,
    fit_text_in_step,
    kinds,
    per_model,
    why_one_by_one,
)

Item = TypeVar("Item")

__all__ = [
    "Epoch",
    "History",
    "Score",
    "device",
    "evaluate",
    "evaluate_text",
    "fit",
    "fit_many",
    "fit_text",
    "fit_text_many",
    "one_thread",
    "progress_bar",
]


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


def fit(
    model: nn.Module,
    train: Images,
    *,
    epochs: int,
    learning_rate: float,
    rate_factors: RateFactors | None = None,
    validation: Images | None = None,
    patience: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train, in place, what requires a gradient: Adam at a constant rate on the cross-entropy.

    The model trains on the device it is on. The same seed draws the same batches for every model,
    and the random state outside is left as it was, as is the mode of each module.

    Args:
        rate_factors: {"lora_B": 16.0} trains every lora_B at 16 times the learning rate.
        validation: images to measure after each epoch. The model ends with the parameters of the
            epoch of the lowest loss on them (epoch 0, before training, counts too).
        patience: stop after so many epochs without a lower validation loss.

    Raises:
        ValueError: no image, no parameter that requires a gradient, a label the model has no
            output for, a number out of range, a factor that fits no parameter, or patience
            without validation images.
    """
    check_fit(train, validation, epochs, learning_rate, patience, batch_size)
    groups = parameter_groups(model, learning_rate, rate_factors)
    where = groups[0]["params"][0].device
    train = train.to(where)
    optimizer = torch.optim.Adam(groups, fused=True)  # one call for all of a group
    score = None if validation is None else evaluate(model, validation)
    best = Epoch(0, evaluate(model, train).loss, score)
    best_state = copy.deepcopy(model.state_dict())
    history = [best]

    with mode(model, training=True), torch.random.fork_rng([where] if where.type == "cuda" else []):
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
    total = torch.zeros((), dtype=torch.float64, device=train.x.device)
    order = torch.randperm(len(train)).to(train.x.device)
    for rows in order.split(int(batch_size)):
        logits = model(train.x[rows])  # (batch, classes)
        loss = F.cross_entropy(logits, train.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
    return float(total) / len(train)


def fit_many(
    models: Sequence[nn.Module],
    train: Images | Sequence[Images],
    *,
    epochs: int,
    learning_rate: float | Sequence[float],
    rate_factors: RateFactors | Sequence[RateFactors | None] | None = None,
    validation: Images | Sequence[Images | None] | None = None,
    patience: int | None = None,
    batch_size: int = 64,
    seed: int | Sequence[int] = 0,
    memory: int = 2**30,
    progress: bool | str = True,
) -> list[History]:
    """What fit does to each of many small models, all in step where that is faster (stack.py).

    Every model sees the batches it would see in fit and has the same losses, up to rounding.
    Models that gain nothing by company, or draw random numbers of their own (dropout), train one
    by one, and the progress bar says why.

    Args:
        train, validation, learning_rate, rate_factors, seed: as in fit; one for all models, or a
            sequence with one for each.
        memory: about how many bytes the models that train in step may take in all.
        progress: whether to show bars; a text says what the runs are.

    Raises:
        ValueError: as fit, but before any model has changed; a sequence of another length; models
            that share what they train.
    """
    given: dict[str, Any] = {"train": train, "validation": validation}
    given |= {"learning_rate": learning_rate, "rate_factors": rate_factors, "seed": seed}
    columns = [per_model(name, value, len(models)) for name, value in given.items()]
    runs = [Run(*row) for row in zip(models, *columns, strict=True)]
    for run in runs:
        check_fit(run.train, run.validation, epochs, run.learning_rate, patience, batch_size)
        parameter_groups(run.model, run.learning_rate, run.rate_factors)
    settings: dict[str, Any] = {"epochs": epochs, "patience": patience, "batch_size": batch_size}
    sizes = [(len(run.train), run.validation and len(run.validation)) for run in runs]

    def alone(place: int) -> History:
        return fit(**runs[place]._asdict(), **settings, progress=False)

    def together(places: list[int]) -> list[History]:
        return fit_in_step([runs[place] for place in places], progress, **settings)

    batches = [run.train.x[:batch_size] for run in runs]
    return _in_groups(models, sizes, batches, memory, progress, together, alone)


def _in_groups(
    models: Sequence[nn.Module],
    also: Sequence[object],
    batches: Sequence[Tensor],
    memory: int,
    progress: bool | str,
    together: Callable[[list[int]], list[Item]],
    alone: Callable[[int], Item],
) -> list[Item]:
    """What together or alone return for the places of models, in their order.

    Args:
        also: what models that train in step must have in common, beside their kind.
        batches: the inputs of one step of each.
    """
    done: dict[int, Item] = {}
    for places in kinds(models, also):
        model = models[places[0]]
        batch = batches[places[0]].to(place_of(model))
        why = why_one_by_one(model, batch)
        single = len(places) == 1 or why
        size = 1 if single else max(1, memory // bytes_of_a_run(model, batch))
        groups = [places[k : k + size] for k in range(0, len(places), size)]
        for group in groups if size > 1 else []:
            try:  # nothing is written back before the end
                done |= zip(group, together(group), strict=True)
            except RuntimeError as error:  # an operation that vmap does not know, for example
                why = str(error).partition("\n")[0]
                warnings.warn(f"{len(group)} models train one by one: {why}", stacklevel=3)
        left = [place for place in places if place not in done]
        label = (f"{progress}: " if isinstance(progress, str) else "") + "runs"
        label += f" one by one ({why})" if why else ""
        for place in progress_bar(left, label, bool(progress)) if left else []:
            done[place] = alone(place)
    return [done[place] for place in range(len(models))]


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, batch_size: int = 1000) -> Score:
    """Loss and accuracy over all images, in evaluation mode; the modes are put back afterwards.

    Raises:
        ValueError: no image, or a label that the model has no output for.
    """
    if not len(images):
        raise ValueError("images is empty: there is nothing to evaluate on")
    where = place_of(model)
    total, correct = 0.0, 0
    with mode(model, training=False):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].to(where)
            logits = model(batch.x)  # (batch, classes)
            check_labels(batch.y, logits.shape[1])
            total += float(F.cross_entropy(logits, batch.y, reduction="sum"))
            correct += int((logits.argmax(dim=1) == batch.y).sum())
    return Score(total / len(images), 100 * correct / len(images))


def fit_text(
    model: nn.Module,
    tokens: Tensor,
    *,
    steps: int,
    learning_rate: float,
    rate_factors: RateFactors | None = None,
    context: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    weight_decay: float = 0.0,
    after_step: Callable[[int], None] | None = None,
    progress: bool = True,
) -> list[float]:
    """Train, in place, what requires a gradient to predict the next character.

    AdamW; the learning rate rises over the first twentieth of the steps, then falls in a line to 0
    (the paper's schedule, table 8). The same seed draws the same windows for every model, and each
    module ends in the mode it was in.

    Args:
        tokens: (n,), int64, see data.load_text.
        after_step: called with the number of the step that was just taken, from 1.

    Returns:
        The loss of each step, in nats per character.

    Raises:
        ValueError: fewer tokens than one window, no parameter that requires a gradient, a number
            out of range, or a factor that fits no parameter.
    """
    check_numbers(learning_rate, steps=steps, context=context, batch_size=batch_size)
    check_window(tokens, context)
    groups = parameter_groups(model, learning_rate, rate_factors)
    where = groups[0]["params"][0].device
    highest = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with mode(model, training=True):
        for step in progress_bar(range(1, steps + 1), "steps", progress):
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * share_of_rate(step, steps)
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


def fit_text_many(
    models: Sequence[nn.Module],
    tokens: Tensor,
    *,
    steps: int,
    learning_rate: float | Sequence[float],
    rate_factors: RateFactors | Sequence[RateFactors | None] | None = None,
    context: int = 64,
    batch_size: int = 16,
    seed: int | Sequence[int] = 0,
    weight_decay: float = 0.0,
    memory: int = 2**32,
    progress: bool | str = True,
) -> list[list[float]]:
    """What fit_text does to each of many models, in step where that is faster: see fit_many.

    A CharGPT gains by it on a GPU. On a CPU its products are large enough to be fast alone.
    """
    given = {"learning_rate": learning_rate, "rate_factors": rate_factors, "seed": seed}
    columns = [per_model(name, value, len(models)) for name, value in given.items()]
    runs = [TextRun(*row) for row in zip(models, *columns, strict=True)]
    check_window(tokens, context)
    for run in runs:
        check_numbers(run.learning_rate, steps=steps, context=context, batch_size=batch_size)
        parameter_groups(run.model, run.learning_rate, run.rate_factors)
    settings: dict[str, Any] = {"steps": steps, "context": context, "batch_size": batch_size}
    settings["weight_decay"] = weight_decay

    def alone(place: int) -> list[float]:
        return fit_text(tokens=tokens, **runs[place]._asdict(), **settings, progress=False)

    def together(places: list[int]) -> list[list[float]]:
        return fit_text_in_step([runs[place] for place in places], tokens, progress, **settings)

    batch = random_windows(tokens, batch_size, context, torch.Generator().manual_seed(0))
    every = [None] * len(models), [batch] * len(models)
    return _in_groups(models, *every, memory, progress, together, alone)


@torch.no_grad()
def evaluate_text(model: nn.Module, tokens: Tensor, context: int = 64) -> float:
    """Mean loss over all of a text, in nats per character, each window of context on its own.

    Raises:
        ValueError: fewer tokens than one window.
    """
    check_window(tokens, context)
    where = place_of(model)
    windows = tokens.unfold(0, context + 1, context)  # (windows, context + 1)
    total = 0.0
    with mode(model, training=False):
        for batch in windows.split(256):
            batch = batch.to(where)
            logits = model(batch[:, :-1]).flatten(0, 1)
            total += float(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return total / (len(windows) * context)
