"""Many small models as one, so that a training step is launched once and not once for each.

    stack = Stack(models)                        # K models of one kind
    logits = stack(x)                            # x (K, batch, ...) -> (K, batch, ...)
    gradient = stack.gradient(losses)            # losses (K,) -> (K, numbers)
    ManyAdam(stack, rates).step(gradient)

A small model costs a GPU more in launches than in arithmetic, and Python more in calls. All that
the K models train lies in one tensor, a row for each, so that Adam is nine operations. torch.vmap
turns the forward pass of one model into that of K: a product of matrices becomes K products. Row k
never meets another row, so a run that diverges leaves the others alone.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from minidora.data import Images, random_windows
from minidora.loop import (
    Epoch,
    History,
    Run,
    Score,
    TextRun,
    check_labels,
    factors_by_name,
    frozen_with_buffers,
    mode,
    place_of,
    progress_bar,
    share_of_rate,
)
from minidora.memory import activation_bytes

CPU_TRAINED = 2**15
"""The most numbers trained, and below the most products in a forward pass, with which a model gains
from company on a CPU: larger ones are bound by memory and arithmetic, not by calls."""
CPU_PRODUCTS = 2**25
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Stack:
    """K models of one kind (see kinds) as one function of K inputs.

    Attributes:
        numbers: (K, P), what requires a gradient: row k is all that model k trains. Copies; the
            models stay as they are until write_back.
        frozen: {name: (K, ...)}, the other parameters and the buffers.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.template = models[0]
        named = dict(self.template.named_parameters())
        self.shapes = {name: p.shape for name, p in named.items() if p.requires_grad}
        tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in models]
        self.numbers = torch.stack(
            [torch.cat([ts[name].detach().flatten() for name in self.shapes]) for ts in tensors]
        )
        self.frozen = {
            name: torch.stack([ts[name].detach() for ts in tensors])
            for name in tensors[0]
            if name not in self.shapes
        }
        self._split()

    def _split(self) -> None:
        """Name the parts of numbers: views of shape (K, *shape), of which gradients are taken."""
        parts = self.numbers.split([shape.numel() for shape in self.shapes.values()], dim=1)
        self.parameters = {
            name: part.view(-1, *shape).requires_grad_()
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def __call__(self, x: Tensor) -> Tensor:
        """The K models' answers: (K, batch, ...) -> (K, batch, ...)."""

        def one(parameters: dict[str, Tensor], frozen: dict[str, Tensor], x: Tensor) -> Any:
            return functional_call(self.template, (parameters, frozen), (x,))

        return vmap(one)(self.parameters, self.frozen, x)  # type: ignore[no-any-return]

    def gradient(self, losses: Tensor) -> Tensor:
        """(K,) losses -> (K, P): the sum's gradient, in which row k comes from loss k alone."""
        parameters = list(self.parameters.values())
        parts = torch.autograd.grad(
            losses.sum(), parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def spread(self, values: Sequence[Sequence[float]]) -> Tensor:
        """One value for each parameter of each model -> (K, P), one for each number."""
        sizes = torch.tensor([shape.numel() for shape in self.shapes.values()])
        rows = torch.tensor(values, dtype=torch.float64).repeat_interleave(sizes, dim=1)
        return rows.to(self.numbers)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self.numbers = self.numbers[rows]
        self.frozen = {name: values[rows] for name, values in self.frozen.items()}
        self._split()

    @torch.no_grad()
    def write_back(self, models: Sequence[nn.Module], numbers: Tensor) -> None:
        """Copy row k of numbers, (K, P), into the parameters of model k."""
        for model, row in zip(models, numbers, strict=True):
            parts = row.split([shape.numel() for shape in self.shapes.values()])
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
                model.get_parameter(name).copy_(part.view(shape))


class ManyAdam:
    """Adam (AdamW with weight_decay) on K runs at once, each at its own rate.

    m = 0.9 m + 0.1 G      v = 0.999 v + 0.001 G^2      numbers -= rate * m' / (sqrt(v') + 1e-8)

    m' and v' are m / (1 - 0.9^t) and v / (1 - 0.999^t) after t steps. Every run takes the step
    that torch.optim.Adam would, up to rounding.

    Args:
        stack: whose numbers, (K, P), it changes in place.
        rates: (K, P), the learning rate of each.
    """

    def __init__(self, stack: Stack, rates: Tensor, weight_decay: float = 0.0) -> None:
        self.stack, self.rates, self.weight_decay = stack, rates, weight_decay
        self.m, self.v = torch.zeros_like(stack.numbers), torch.zeros_like(stack.numbers)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradient: Tensor, share: float = 1.0) -> None:
        """Take one step, at that share of the rates."""
        self.steps += 1
        self.m.lerp_(gradient, 1 - 0.9)
        self.v.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        # The gradient's memory serves for the update: a new tensor this large costs more.
        update = torch.sqrt(self.v, out=gradient).div_(math.sqrt(1 - 0.999**self.steps)).add_(1e-8)
        torch.div(self.m, update, out=update).mul_(self.rates * (share / (1 - 0.9**self.steps)))
        if self.weight_decay:
            self.stack.numbers.mul_(1 - share * self.weight_decay * self.rates)
        self.stack.numbers.sub_(update)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone; the stack has dropped the others already."""
        self.rates = self.rates[rows]
        self.m, self.v = self.m[rows], self.v[rows]


class _ManyImages:
    """The images of K runs, of equal numbers each. Runs that share them share their memory.

    Attributes:
        which: (K,), int64: the place of each run's images among those that differ.
    """

    def __init__(self, images: Sequence[Images], where: torch.device) -> None:
        different = list({id(one): one for one in images}.values())
        places = {id(one): place for place, one in enumerate(different)}
        self.which = torch.tensor([places[id(one)] for one in images], device=where)
        self.x = torch.stack([one.x for one in different]).to(where)  # (different, n, pixels)
        self.y = torch.stack([one.y for one in different]).to(where)  # (different, n)

    def __len__(self) -> int:
        return self.y.shape[1]

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows (K, batch) -> x (K, batch, pixels) and y (K, batch): each run's own rows."""
        which = self.which[:, None]
        return self.x[which, rows], self.y[which, rows]

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The rows from start to before end, the same for every run."""
        return self.x[self.which, start:end], self.y[self.which, start:end]

    def keep(self, rows: list[int]) -> None:
        """Go on with these runs alone."""
        self.which = self.which[rows]


def _cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """logits (K, batch, classes), y (K, batch) -> (K, batch), in nats."""
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return losses.view(y.shape)


def per_model(name: str, value: Any, count: int) -> list[Any]:
    """One value a model: those of a sequence, or one value for all.

    Raises:
        ValueError: a sequence of another length.
    """
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} models: one a model")
    return list(value)


def kinds(models: Sequence[nn.Module], also: Sequence[object]) -> list[list[int]]:
    """The places of models that can be stacked, one list a kind.

    Of one kind are models whose modules have the same types and settings (an alpha too: it is no
    tensor) and whose tensors have the same shapes, dtypes and devices. also[k] must agree as well.

    Raises:
        ValueError: two models train the same parameter, or are the same.
    """
    owners: dict[int, int] = {}
    for place, model in enumerate(models):
        for tensor in (p for p in model.parameters() if p.requires_grad):
            if owners.setdefault(id(tensor), place) != place:
                raise ValueError(
                    f"models {owners[id(tensor)]} and {place} train the same parameter: "
                    "give each its own, with copy.deepcopy"
                )
    found: dict[object, list[int]] = {}
    for place, (model, other) in enumerate(zip(models, also, strict=True)):
        found.setdefault((_kind(model), other), []).append(place)
    return list(found.values())


def _kind(model: nn.Module) -> object:
    own = vars(nn.Module()).keys() - {"training"}
    modules = tuple(
        (name, type(module), *((k, _plain(v)) for k, v in vars(module).items() if k not in own))
        for name, module in model.named_modules()
    )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, tuple(
        (name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors
    )


def _plain(value: object) -> object:
    """What a setting is compared by: its value where that is plain, else its identity."""
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_plain, value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    return id(value)


def why_one_by_one(model: nn.Module, batch: Tensor) -> str:
    """What speaks against training copies of the model in a stack; empty if nothing does.

    Args:
        batch: what one step of a run reads: images (batch, pixels) or tokens (batch, time).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(getattr(module, hooks) for module in model.modules() for hooks in HOOKS):
        return "it has hooks, which only one model's modules would run"
    buffered = {m for m in model.modules() if any(b is not None for b in m._buffers.values())}
    if buffered - frozen_with_buffers(model):
        return "it has buffers that training may move"
    if any(isinstance(module, _DropoutNd) and module.p for module in model.modules()):
        return "its dropout draws numbers that would differ from those it draws alone"
    if len({p.dtype for p in trained}) > 1:
        return "what it trains has several dtypes"
    if trained[0].device.type == "cpu":
        count, total = (sum(p.numel() for p in ps) for ps in (trained, model.parameters()))
        inputs = batch.shape[0] if batch.is_floating_point() else batch.numel()
        if count > CPU_TRAINED or inputs * total > CPU_PRODUCTS:
            return "a model of this size is no slower alone on a CPU"
    return ""


def bytes_of_a_run(model: nn.Module, batch: Tensor) -> int:
    """About what one run of a stack holds at most, when it trains on batches like this one.

    What it trains is there 7 times: values, gradient as parts and in one, m, v, the best values so
    far and the models' own. What autograd keeps is doubled by the gradients of the backward pass.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in [*model.parameters(), *model.buffers()]) - trained
    with mode(model, training=False):  # nothing moves but what is asked for
        return 7 * trained + frozen + 2 * activation_bytes(model, lambda: model(batch))


def fit_in_step(
    runs: Sequence[Run], progress: bool | str, *, epochs: int, patience: int | None, batch_size: int
) -> list[History]:
    """fit for runs of one kind: each operation is launched once for all of them."""
    models = [run.model for run in runs]
    stack, where = Stack(models), place_of(models[0])
    train = _ManyImages([run.train for run in runs], where)
    checked = [run.validation for run in runs if run.validation is not None]
    validation = _ManyImages(checked, where) if checked else None
    adam = ManyAdam(stack, _rates(stack, runs))
    generators = [torch.Generator().manual_seed(int(run.seed)) for run in runs]

    scores: Sequence[Score | None] = [None] * len(runs)
    scores = scores if validation is None else _evaluate_in_step(stack, validation)
    losses = [score.loss for score in _evaluate_in_step(stack, train)]
    best = [Epoch(0, loss, score) for loss, score in zip(losses, scores, strict=True)]
    histories = [[epoch] for epoch in best]
    best_numbers = stack.numbers.clone()  # (K, P)
    live = list(range(len(runs)))  # the runs that still train: one row of the stack each
    label = f"{progress if isinstance(progress, str) else 'epochs'}, {len(runs)} runs at once"
    with mode(stack.template, training=True):
        for number in progress_bar(range(1, epochs + 1), label, bool(progress)):
            orders = torch.stack([torch.randperm(len(train), generator=g) for g in generators])
            losses = _train_epoch_in_step(stack, train, orders.to(where), adam, batch_size)
            scores = [None] * len(live)
            scores = scores if validation is None else _evaluate_in_step(stack, validation)
            better, going = [], []
            for row, run in enumerate(live):
                histories[run].append(epoch := Epoch(number, losses[row], scores[row]))
                lowest, score = best[run].validation, scores[row]
                if score is None or lowest is None or score.loss < lowest.loss:
                    best[run] = epoch
                    better.append(row)
                elif patience is not None and number - best[run].number >= patience:
                    continue
                going.append(row)
            best_numbers[[live[row] for row in better]] = stack.numbers[better]
            if len(going) < len(live):
                live, generators = [live[r] for r in going], [generators[r] for r in going]
                for part in (stack, adam, train):
                    part.keep(going)
                if validation is not None:
                    validation.keep(going)
            if not live:
                break
    stack.write_back(models, best_numbers)
    return [History(epochs, chosen) for epochs, chosen in zip(histories, best, strict=True)]


def _rates(stack: Stack, runs: Sequence[Run | TextRun]) -> Tensor:
    """(K, P): the learning rate of each number of each run."""
    factors = [factors_by_name(run.model, run.rate_factors).values() for run in runs]
    return stack.spread(
        [[run.learning_rate * f for f in row] for run, row in zip(runs, factors, strict=True)]
    )


def _train_epoch_in_step(
    stack: Stack, train: _ManyImages, orders: Tensor, adam: ManyAdam, batch_size: int
) -> list[float]:
    """_train_epoch for every row of the stack. orders: (K, n), the images of each in its order."""
    totals = torch.zeros(len(orders), dtype=torch.float64, device=orders.device)
    for rows in orders.split(int(batch_size), dim=1):  # (K, batch)
        x, y = train.rows(rows)
        losses = _cross_entropies(stack(x), y).mean(1)  # (K,)
        adam.step(stack.gradient(losses))
        totals += losses.detach() * rows.shape[1]
    return (totals / len(train)).tolist()


@torch.no_grad()
def _evaluate_in_step(stack: Stack, images: _ManyImages) -> list[Score]:
    """evaluate for every row of the stack, in parts of about 65,536 images over all rows."""
    count, size = len(images.which), max(1, 2**16 // len(images.which))
    totals, correct = torch.zeros(2, count, dtype=torch.float64, device=images.which.device)
    with mode(stack.template, training=False):
        for start in range(0, len(images), size):
            x, y = images.part(start, start + size)
            logits = stack(x)  # (K, part, classes)
            check_labels(y, logits.shape[2])
            totals += _cross_entropies(logits, y).sum(1)
            correct += (logits.argmax(dim=2) == y).sum(1)
    n = len(images)
    return [
        Score(t / n, 100 * c / n) for t, c in zip(totals.tolist(), correct.tolist(), strict=True)
    ]


def fit_text_in_step(
    runs: Sequence[TextRun],
    tokens: Tensor,
    progress: bool | str,
    *,
    steps: int,
    context: int,
    batch_size: int,
    weight_decay: float,
) -> list[list[float]]:
    """fit_text for runs of one kind: each operation is launched once for all of them."""
    models = [run.model for run in runs]
    stack, where = Stack(models), place_of(models[0])
    adam = ManyAdam(stack, _rates(stack, runs), weight_decay)
    generators = [torch.Generator().manual_seed(int(run.seed)) for run in runs]
    found = []
    label = f"{progress if isinstance(progress, str) else 'steps'}, {len(runs)} runs at once"
    # vmap has no rule for the CPU's own kernel of attention, and would call it once a run.
    attention = sdpa_kernel(SDPBackend.MATH) if where.type == "cpu" else nullcontext()
    with mode(stack.template, training=True), attention:
        for step in progress_bar(range(1, steps + 1), label, bool(progress)):
            drawn = [random_windows(tokens, batch_size, context + 1, g) for g in generators]
            windows = torch.stack(drawn).to(where)  # (K, batch, context + 1)
            logits = stack(windows[:, :, :-1])  # (K, batch, context, characters)
            y = windows[:, :, 1:].flatten(1)
            losses = _cross_entropies(logits.flatten(1, 2), y).mean(1)
            adam.step(stack.gradient(losses), share_of_rate(step, steps))
            found.append(losses.detach())
    stack.write_back(models, stack.numbers.detach())
    return torch.stack(found, dim=1).tolist()
