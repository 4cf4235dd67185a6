"""Every check against the solution, other right answers, the stub, and every usual wrong answer."""

import dataclasses
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import IPython
import pytest
import torch
from answers import EXERCISES, SOLUTIONS, answer, cells, name, notebook, refusal
from torch import Tensor

from minidora import checks, dora, plots
from minidora.checks import catalog
from minidora.checks.exercise import CheckError, CheckFailed, Exercise, NotStarted
from minidora.classroom import authoring
from minidora.runner import probe


class WrongAnswer(NamedTuple):
    """A usual mistake: the solution with `old` replaced by `new`, and what the check says of it."""

    name: str
    old: str  # stands exactly once in the solution's cell
    new: str
    says: str  # part of the message


def _listed() -> list[tuple[Exercise, WrongAnswer]]:
    """The wrong answers of wrong_answers/LESSON.py."""
    lists: dict[str, list[tuple[str, str, str, str]]] = {}
    for path in sorted((Path(__file__).parent / "wrong_answers").glob("*.py")):
        lists |= runpy.run_path(str(path))["WRONG"]
    every = {exercise.name: exercise for exercise in EXERCISES}
    return [(every[name], WrongAnswer(*wrong)) for name in lists for wrong in lists[name]]


WRONG = _listed()


# ---- Solutions, stubs, wrong answers ----


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_solution_passes(exercise: Exercise, capsys: Any) -> None:
    exercise(answer(exercise))
    assert capsys.readouterr().out.startswith(f"{exercise.number} {exercise.answer} passed: ")


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_stub_is_not_started(exercise: Exercise) -> None:
    stub = authoring.with_stubs(
        cells(exercise.lesson)[exercise.name], f"exercise {exercise.number}: {exercise.answer}"
    )
    assert isinstance(refusal(exercise, stub), NotStarted)
    nbgraders = stub.replace(f'("exercise {exercise.number}: {exercise.answer}")', "()")
    assert nbgraders != stub
    assert isinstance(refusal(exercise, nbgraders), NotStarted)


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=name)
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_wrong_answer_is_refused_by_name(exercise: Exercise, wrong: WrongAnswer) -> None:
    solution = cells(exercise.lesson)[exercise.name]
    assert solution.count(wrong.old) == 1, "the mistake must be one place in the solution"
    failed = refusal(exercise, solution.replace(wrong.old, wrong.new))
    assert wrong.says in str(failed)
    assert not isinstance(failed, NotStarted)


def test_every_exercise_is_announced_as_its_check_declares_it() -> None:
    for lesson in checks.LESSONS.values():
        content = notebook(lesson.number)["cells"]
        texts = ["".join(cell["source"]) for cell in content]
        metadata = [cell["metadata"].get("nbgrader") for cell in content]
        assert len(lesson.exercises) >= 4
        points = [exercise.points for exercise in lesson.exercises]
        assert points == sorted(points), "from easy to hard"
        for index, exercise in enumerate(lesson.exercises, start=1):
            assert exercise.number == f"{lesson.number}.{index}"
            assert exercise.hint.endswith("?")
            names = [wrong.name for own, wrong in WRONG if own is exercise]
            assert len(set(names)) == len(names)
            solution = next(
                place for place, data in enumerate(metadata)
                if data and data["grade_id"] == exercise.name
            )  # fmt: skip
            assert texts[solution - 1].startswith(exercise.heading)
            assert texts[solution + 1] == f"checks.{exercise.name}({exercise.answer})"
            common = {"schema_version": 3, "task": False}
            assert metadata[solution] == common | {
                "grade_id": exercise.name, "solution": True, "grade": False, "locked": False
            }  # fmt: skip
            assert metadata[solution + 1] == common | {
                "grade_id": f"{exercise.name}_check", "solution": False, "grade": True,
                "locked": True, "points": exercise.points,
            }  # fmt: skip
        assert all(len(line) <= 100 for text in cells(lesson.number).values()
                   for line in text.splitlines())  # fmt: skip
        problems = authoring.problems(SOLUTIONS / f"{lesson.name}.ipynb", len(lesson.exercises))
        assert problems == []


# ---- Other right answers: a check must not insist on our way ----

RIGHT = {
    "adam_bytes": [
        """
        def adam_bytes(n):
            float32 = torch.finfo(torch.float32).bits // 8
            return [n * float32, n * float32, n * float32 + n * float32]
        """,
        "def adam_bytes(n): return 4.0 * n, 4.0 * n, 8.0 * n",
        """
        def adam_bytes(n):
            import numpy as np
            return tuple(np.array([1, 1, 2], dtype=np.int64) * 4 * n)
        """,
    ],
    "adapter_parameters": [
        """
        def adapter_parameters(shapes, rank):
            lora = dora = 0
            for layer in shapes:
                with torch.device("meta"):
                    A, B = torch.empty(rank, layer[1]), torch.empty(layer[0], rank)
                    m = torch.empty(layer[0])
                lora += A.numel() + B.numel()
                dora += A.numel() + B.numel() + m.numel()
            return [lora, dora]
        """,
        """
        def adapter_parameters(shapes, rank):
            import numpy as np
            lora = (rank * np.array(shapes)).sum()  # np.int64
            return lora, lora + np.array(shapes)[:, 0].sum()
        """,
    ],
    "training_bytes": [
        """
        def training_bytes(model):  # a real step, with the model's own parameters
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            optimizer = torch.optim.Adam(model.parameters())
            optimizer.step()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            state = [t for kept in optimizer.state.values() for t in kept.values()]
            weights = list(model.parameters()) + list(model.buffers())
            return tuple(sum(t.untyped_storage().nbytes() for t in part)
                         for part in (weights, gradients, state))
        """,
        """
        def training_bytes(model):
            sizes = {p: p.numel() * p.element_size() for p in model.parameters()}
            weights = sum(sizes.values())
            for buffer in model.buffers():
                weights += buffer.numel() * buffer.element_size()
            gradients = sum(size for p, size in sizes.items() if p.requires_grad)
            return weights, gradients, 2 * gradients + 4 * sum(p.requires_grad for p in sizes)
        """,
    ],
    "four_bit_bytes": [
        """
        def four_bit_bytes(out, in_):
            n = out * in_
            return (n + 1) // 2 + 4 * ((n + 63) // 64)
        """,
        """
        def four_bit_bytes(out, in_):
            packed = torch.empty(out * in_, dtype=torch.uint8, device="meta")[::2]
            return packed.nbytes + sum(4 for start in range(0, out * in_, 64))
        """,
        """
        def four_bit_bytes(out, in_):
            import numpy as np
            return np.ceil(out * in_ / np.array([2, 64])).astype(int) @ [1, 4]  # np.int64
        """,
    ],
    "what_fits": [
        """
        def what_fits(gpu_gib, parameters, adapters):
            names = []
            base = {"full": 0, "lora-float32": 4, "lora-bfloat16": 2, "lora-4bit": 0.5625}
            for name in base:
                trained = parameters if name == "full" else adapters
                need = (base[name] * parameters + 16 * trained) / 1024**3
                if not need > gpu_gib:
                    names.append(name)
            return tuple(names)
        """,
        """
        def four_bit_bytes(out, in_):
            return math.ceil(out * in_ / 2) + 4 * math.ceil(out * in_ / 64)

        def what_fits(gpu_gib, parameters, adapters):  # with one's own 1.4
            adapter = 4 * adapters + 4 * adapters + 2 * 4 * adapters
            needs = [4 * (4 * parameters)]
            for base in (4 * parameters, 2 * parameters, four_bit_bytes(1, parameters)):
                needs.append(base + adapter)
            names = ["full", "lora-float32", "lora-bfloat16", "lora-4bit"]
            return [name for name, need in zip(names, needs) if gpu_gib * 1024**3 - need >= 0]
        """,
    ],
    "largest_rank": [
        """
        def largest_rank(gpu, base, shapes):
            for rank in range(min(min(shape) for shape in shapes), 0, -1):
                numbers = sum(o + rank * (o + i) for o, i in shapes)
                if base + 16 * numbers <= gpu:
                    return rank
            return 0
        """,
        """
        def largest_rank(gpu, base, shapes):
            outs, both = sum(o for o, i in shapes), sum(o + i for o, i in shapes)
            rank = int(((gpu - base) / 16 - outs) / both)
            return min(max(rank, 0), *[min(shape) for shape in shapes])
        """,
        """
        def largest_rank(gpu, base, shapes):
            import numpy as np
            sides = np.array(shapes)
            rank = (gpu - base - 16 * sides[:, 0].sum()) // (16 * sides.sum())
            return np.clip(rank, 0, sides.min())  # np.int64
        """,
    ],
    "init_lora": [
        """
        def init_lora(in_features, out_features, rank):
            bound = 1 / in_features**0.5
            a = nn.Parameter((2 * torch.rand(rank, in_features) - 1) * bound)
            return [a, nn.Parameter(torch.zeros([out_features, rank]))]
        """,
    ],
    "lora_delta": [
        """
        def lora_delta(lora_A, lora_B, alpha):
            return torch.einsum("or,ri->oi", lora_B, lora_A) * (alpha / len(lora_A))
        """,
    ],
    "lora_forward": [
        """
        def lora_forward(x, weight, bias, lora_A, lora_B, alpha):
            s = alpha / lora_B.size(1)
            return F.linear(F.linear(x, lora_A), lora_B).mul(s).add(x @ weight.T).add(bias)
        """,
        """
        def lora_forward(x, w, b, A, B, alpha):
            return F.linear(x, w + B @ A * alpha / A.shape[0], b)
        """,
    ],
    "freeze_base": [
        """
        def freeze_base(model):
            model.requires_grad_(False)
            for module in model.modules():
                for key in ("lora_A", "lora_B"):
                    if hasattr(module, key):
                        getattr(module, key).requires_grad = True
            return model
        """,
    ],
    "merge_lora": [
        """
        def merge_lora(base, lora_A, lora_B, alpha):
            merged = nn.Linear(base.in_features, base.out_features, base.bias is not None)
            merged = merged.to(base.weight)
            with torch.no_grad():
                merged.weight.copy_(base.weight + alpha / len(lora_A) * lora_B @ lora_A)
                if base.bias is not None:
                    merged.bias.copy_(base.bias)
            return merged
        """,
        """
        def merge_lora(base, lora_A, lora_B, alpha):
            out, in_ = base.weight.shape
            like = {"device": base.weight.device, "dtype": base.weight.dtype}
            merged = nn.Linear(in_, out, bias=base.bias is not None, **like)
            state = {k: v.clone() for k, v in base.state_dict().items()}
            state["weight"] += (alpha / len(lora_A) * lora_B @ lora_A).detach()
            merged.load_state_dict(state)
            return merged
        """,
    ],
    "lora_linear": [
        """
        class LoRALinear(nn.Module):  # made anywhere, then moved; the base under a second name
            def __init__(self, base, rank, alpha):
                super().__init__()
                self.linear = base.requires_grad_(False)
                self.base, self.weight, self.bias = base, base.weight, base.bias
                self.alpha, self.rank = alpha, rank
                A = (2 * torch.rand(rank, base.in_features) - 1) / base.in_features**0.5
                self.lora_A = nn.Parameter(A.to(base.weight))
                self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
                self.to(base.weight.device, base.weight.dtype)

            @property
            def scaling(self):
                return self.alpha / self.rank

            def forward(self, x):
                update = self.scaling * (self.lora_B @ self.lora_A)
                return F.linear(x, self.weight + update, self.bias)
        """,
        """
        class LoRALinear(nn.Module):
            def __init__(self, base, rank, alpha):
                super().__init__()
                self.base, self.rank, self.scaling = base, rank, alpha / rank
                for p in base.parameters():
                    p.requires_grad = False
                w = base.weight
                bound = base.in_features**-0.5
                like = {"dtype": w.dtype, "device": w.device}
                self.lora_A = nn.Parameter(torch.rand(rank, w.shape[1], **like) * 2 * bound - bound)
                self.lora_B = nn.Parameter(torch.zeros(w.shape[0], rank, **like))

            def forward(self, x):
                return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B * self.scaling)
        """,
    ],
    "row_norm": [
        "def row_norm(w): return torch.zeros(len(w)).to(w) + w.norm(dim=1)",
        "def row_norm(weight): return torch.linalg.vector_norm(weight, dim=-1)",
        "def row_norm(weight): return torch.stack([row.norm() for row in weight])",
        "def row_norm(w): return torch.sqrt(torch.einsum('ij,ij->i', w, w))",
        "row_norm = lambda w: (w**2).sum(axis=1) ** 0.5",
    ],
    "decompose": [
        "def decompose(w): return w.norm(dim=1), F.normalize(w, dim=1)",
    ],
    "dora_weight": [
        """
        def dora_weight(weight, lora_A, lora_B, magnitude, alpha):  # detached already
            v = weight + alpha / lora_A.size(0) * lora_B @ lora_A
            return (magnitude / v.detach().norm(dim=1))[:, None] * v
        """,
        """
        def dora_weight(weight, lora_A, lora_B, magnitude, alpha):
            s = alpha / lora_A.size(0)
            return magnitude.unsqueeze(1) * F.normalize(weight + s * lora_B @ lora_A, dim=1)
        """,
    ],
    "dora_forward": [
        """
        def dora_forward(x, weight, bias, lora_A, lora_B, magnitude, alpha):
            v = weight + alpha / len(lora_A) * lora_B @ lora_A
            with torch.no_grad():
                norm = v.norm(dim=1, keepdim=True)
            return F.linear(x, magnitude.view(-1, 1) / norm * v, bias)
        """,
    ],
    "dora_weight_detached": [
        """
        def dora_weight_detached(weight, lora_A, lora_B, magnitude, alpha):
            v = weight + alpha / len(lora_A) * lora_B @ lora_A
            with torch.no_grad():
                norm = v.norm(dim=1, keepdim=True)
            return magnitude.view(-1, 1) / norm * v
        """,
    ],
    "update_for_weight": [
        "def update_for_weight(lora_B, lora_A): return lora_A.T @ lora_B.T",
        "def update_for_weight(b, a): return torch.einsum('ir,ro->oi', b, a)",
        "def update_for_weight(b, a): return (b @ a).transpose(0, 1).contiguous()",
    ],
    "merge_dora": [
        """
        def merge_dora(base, lora_A, lora_B, magnitude, alpha):
            v = base.weight.detach() + alpha / len(lora_A) * lora_B.detach() @ lora_A.detach()
            merged = copy.deepcopy(base)
            merged.weight = nn.Parameter(magnitude.detach()[:, None] * F.normalize(v, dim=1))
            return merged
        """,
    ],
    "dora_linear": [
        """
        class DoRALinear(nn.Module):
            def __init__(self, base, rank, alpha):
                super().__init__()
                base.weight.requires_grad = False
                if base.bias is not None:
                    base.bias.requires_grad = False
                self.base = base
                self.scaling = alpha / rank
                self.magnitude = nn.Parameter(base.weight.norm(dim=1).clone())
                self.lora_A = nn.Parameter(torch.empty_like(base.weight[:1]).repeat(rank, 1))
                nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
                self.lora_B = nn.Parameter(torch.zeros_like(base.weight[:, :1]).repeat(1, rank))

            def forward(self, x):
                with torch.no_grad():
                    norm = (self.base.weight + self.scaling * self.lora_B @ self.lora_A).norm(dim=1)
                y = x @ self.base.weight.T + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)
                y = self.magnitude / norm * y
                return y if self.base.bias is None else y + self.base.bias
        """,
    ],
    "accuracy": [
        """
        @torch.no_grad()
        def accuracy(model, x, y):
            before = model.training
            model.train(False)
            hits = sum(int(model(image[None])[0].argmax() == label) for image, label in zip(x, y))
            model.train(before)
            return hits / len(y) * 100
        """,
        """
        def accuracy(model, x, y):  # in batches, under inference mode; each layer's mode put back
            modes, hits = [(module, module.training) for module in model.modules()], 0
            model.eval()
            with torch.inference_mode():
                for images, labels in zip(x.split(7), y.split(7)):
                    hits += int((model(images).max(dim=-1).indices == labels).sum())
                for start in range(0, len(x), 7):
                    model(x[start:start + 7])
            for module, mode in modes:
                module.training = mode
            return hits / len(y) * 100.0
        """,
        "def accuracy(m, x, y): return 100.0 * copy.deepcopy(m).eval()(x).max(1)[1].eq(y)"
        ".sum().item() / len(y)",
    ],
    "split_rows": [
        """
        def split_rows(count, sizes, seed):
            import random
            rows = random.Random(seed).sample(range(count), sum(sizes))
            return tuple(torch.tensor([rows.pop() for _ in range(size)]) for size in sizes)
        """,
        """
        def split_rows(count, sizes, seed):
            torch.manual_seed(seed)
            order, parts, start = torch.randperm(count), [], 0
            for size in sizes:
                parts.append(order[start:start + size])
                start += size
            return parts
        """,
    ],
    "chosen_scores": [
        """
        def chosen_scores(validation, test):
            return test[torch.arange(len(test)), validation.max(1).indices]
        """,
        "def chosen_scores(v, t): return torch.stack([b[a.argmax()] for a, b in zip(v, t)])",
        "def chosen_scores(v, t): return t[v == v.max(dim=1, keepdim=True).values]",
        "def chosen_scores(v, t): return t[:, v.argmax(dim=1)].diagonal()",
    ],
    "adapted_copy": [
        """
        def adapted_copy(model, names, make):  # frozen after, but by who was there before
            new = copy.deepcopy(model)
            old = list(new.parameters())
            for name in names:
                if name not in dict(new.named_modules()):
                    raise NotImplementedError(name)
                new.set_submodule(name, make(new.get_submodule(name)))
            for parameter in old:
                parameter.requires_grad = False
            return new
        """,
        """
        def adapted_copy(model, names, make):
            twin = copy.deepcopy(model)
            for p in twin.parameters():
                p.requires_grad = False
            layers = dict(twin.named_modules())
            for name in names:
                *path, last = name.split(".")
                layers[".".join(path)]._modules[last] = make(layers[name])
            return twin
        """,
    ],
    "paired_interval": [
        """
        def paired_interval(first, second):
            if len(first) != len(second):
                raise ValueError("no pairs")
            low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
            if low <= 0 <= high:
                return low, high, "no difference detected"
            return low, high, "higher" if low > 0 else "lower"
        """,
        """
        def paired_interval(a, b):
            if len(a) != len(b):
                raise ValueError("no pairs")
            d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
            w = stats.t(len(d) - 1).isf(0.025) * (d.var() / len(d)).sqrt()
            ends = [(d.mean() - w).item(), (d.mean() + w).item()]
            verdict = "higher" if ends[0] > 0 else "lower" if ends[1] < 0 else None
            return [*ends, verdict or "no difference detected"]
        """,
        """
        def paired_interval(first, second):  # NaN where nothing varies
            d = [a - b for a, b in zip(first, second, strict=True)]
            error = stdev(d) / math.sqrt(len(d))
            low, high = stats.t.interval(0.95, len(d) - 1, loc=fmean(d), scale=error)
            if low > 0 or high < 0:
                return low, high, "higher" if low > 0 else "lower"
            return low, high, "no difference detected"
        """,
    ],
    "train": [
        """
        def train(model, x, y, epochs, batch_size, learning_rate):
            data = torch.utils.data.TensorDataset(x, y)
            optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
            history = []
            for _ in range(epochs):
                model.train()
                losses = []
                for batch, labels in torch.utils.data.DataLoader(data, batch_size):
                    each = F.cross_entropy(model(batch), labels, reduction="none")
                    optimizer.zero_grad()
                    each.mean().backward()
                    optimizer.step()
                    losses += each.tolist()
                history.append(fmean(losses))
            model.train(False)
            return history
        """,
        """
        def train(model, x, y, epochs, batch_size, learning_rate):
            model.train()
            losses = [0.0] * epochs
            for epoch in range(epochs):
                for i in range(0, len(x), batch_size):
                    logits = model(x[i : i + batch_size])
                    labels = y[i : i + batch_size]
                    part = (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).sum()
                    live = [p for p in model.parameters() if p.requires_grad]
                    slopes = torch.autograd.grad(part / len(labels), live)
                    with torch.no_grad():
                        for p, slope in zip(live, slopes):
                            p -= learning_rate * slope
                    losses[epoch] += part.item() / len(x)
            model.eval()
            return losses
        """,
    ],
    "delta_magnitude": [
        "def delta_magnitude(w, w0): return torch.dist(w.norm(dim=1), w0.norm(dim=1), 1) / len(w)",
        """
        def delta_magnitude(weight, reference):
            import math
            pairs = zip(weight.tolist(), reference.tolist())
            return sum(abs(math.hypot(*a) - math.hypot(*b)) for a, b in pairs) / len(weight)
        """,
    ],
    "delta_direction": [
        """
        def delta_direction(w, w0):
            return 1 - torch.cosine_similarity(w.double(), w0.double()).mean()
        """,
        """
        def delta_direction(weight, reference):
            u, u0 = (t / t.norm(dim=1)[:, None] for t in (weight, reference))
            return ((u - u0) ** 2).sum(1).mean() / 2
        """,
        """
        def delta_direction(weight, reference):
            w, w0 = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (weight, reference))
            cos = torch.einsum("oi,oi->o", w, w0)
            return (1 - cos).mean().item()
        """,
    ],
    "pearson": [
        """
        def pearson(x, y):
            x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
            return (x @ y) / (len(x) - 1)
        """,
        "def pearson(x, y): return torch.cosine_similarity(x - x.mean(), y - y.mean(), dim=0)",
        "def pearson(x, y): return float(torch.corrcoef(torch.stack([x, y]))[0, 1])",
    ],
    "draw_clusters": [
        """
        def draw_clusters(clusters):
            import random
            members = {}
            for row, label in enumerate(clusters.tolist()):
                members.setdefault(label, []).append(row)
            drawn = random.choices(list(members), k=len(members))
            return [row for label in drawn for row in members[label]]
        """,
        """
        def draw_clusters(clusters):
            import numpy as np
            points = clusters.numpy()
            names = np.unique(points)
            drawn = np.random.default_rng().choice(names, len(names))
            return torch.from_numpy(np.concatenate([np.flatnonzero(points == d) for d in drawn]))
        """,
        """
        def draw_clusters(clusters):
            _, which, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
            times = torch.bincount(torch.randint(len(sizes), sizes.shape), minlength=len(sizes))
            return torch.repeat_interleave(torch.arange(len(clusters)), times[which])
        """,
    ],
    "magnitude_gradient": [
        """
        def magnitude_gradient(g, v):
            return torch.einsum("oi,oi->o", g, v / v.norm(dim=1)[:, None])
        """,
        "def magnitude_gradient(g, v): return (g @ v.T).diagonal() / v.norm(dim=1)",
        """
        def magnitude_gradient(gradient, v):
            return gradient.norm(dim=1) * torch.cosine_similarity(gradient, v, dim=1)
        """,
        """
        def magnitude_gradient(gradient, v):  # autograd's own
            m = torch.ones(len(v), dtype=v.dtype, device=v.device, requires_grad=True)
            (m[:, None] * v / v.norm(dim=1, keepdim=True)).backward(gradient)
            return m.grad
        """,
    ],
    "split_gradient": [
        """
        def split_gradient(gradient, v, magnitude):
            full = []
            eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
            for g, row, m in zip(gradient, v, magnitude):
                n = row.norm()
                full.append(m / n * (eye - torch.outer(row, row) / n**2) @ g)
            full = torch.stack(full)
            return full, (magnitude / v.norm(dim=1))[:, None] * gradient - full
        """,
        """
        def split_gradient(g, v, m):
            unit, factor = torch.nn.functional.normalize(v), (m / v.norm(dim=1)).unsqueeze(1)
            removed = factor * torch.einsum("oi,oi->o", g, unit)[:, None] * unit
            return [factor * g - removed, removed]
        """,
    ],
    "forward_flops": [
        """
        def forward_flops(T, i, o, r):
            def product(a, b, c):
                return 2.0 * a * b * c
            norm = product(o, i, r) + product(r, i, r) + product(o, r, r)
            return [product(T, i, o), product(T, i, r) + product(T, r, o), norm]
        """,
    ],
    "held_bytes": [
        """
        def held_bytes(T, i, o, r, size):
            return size * T * r, size * (o * i + o * i), size * T * (o + r)
        """,
        """
        def held_bytes(tokens, in_features, out_features, rank, itemsize):
            import numpy as np
            u, h, w = np.array([tokens * out_features, tokens * rank, out_features * in_features])
            return itemsize * h, itemsize * 2 * w, itemsize * (u + h)
        """,
    ],
    "factored_norm": [
        """
        @torch.no_grad()
        def factored_norm(weight, lora_A, lora_B, scaling):
            wide = [t.double() for t in (weight.norm(dim=1), weight @ lora_A.T, lora_A, lora_B)]
            norm, U, A, B = wide
            square = norm**2 + 2 * scaling * torch.einsum("or,or->o", B, U)
            square = square + scaling**2 * torch.einsum("ok,kl,ol->o", B, A @ A.T, B)
            return torch.sqrt(torch.relu(square)).to(weight.dtype)
        """,
        """
        def factored_norm(W, A, B, s):
            with torch.no_grad():
                norms = []
                for w, b in zip(W, B):
                    norms.append((w + s * (b @ A)).norm())
                return torch.stack(norms)
        """,
    ],
    "round_once": [
        """
        def round_once(base, low, g, bias):
            wide = [t.double() for t in (base, low, g, bias)]
            return torch.addcmul(wide[3], wide[2], wide[0] + wide[1]).to(base)
        """,
    ],
    "compose_form": [
        """
        def compose_form(x, weight, bias, lora_A, lora_B, magnitude, norm, scaling):
            u = F.linear(x, weight)
            u = u.addmm_(F.linear(x, lora_A), lora_B.T, alpha=scaling)
            return torch.addcmul(bias, magnitude / norm, u)
        """,
        """
        def compose_form(x, W, b, A, B, m, n, s):
            return (F.linear(x, W) + F.linear(F.linear(x, s * A), B)) * (m / n) + b
        """,
    ],
    "compose_function": [
        """
        class Compose(torch.autograd.Function):
            @staticmethod
            def forward(base, low, g, bias):
                return torch.addcmul(bias, g, base.to(bias) + low).to(base)

            @staticmethod
            def setup_context(ctx, inputs, output):
                base, low, g, _ = inputs
                ctx.save_for_backward(base + low, g)

            @staticmethod
            def backward(ctx, dy):
                u, g = ctx.saved_tensors
                grads = (g * dy).to(u), (g * dy).to(u), (u * dy.to(g)).sum(0), dy.sum(0).to(g)
                return tuple(g if n else None for g, n in zip(grads, ctx.needs_input_grad))
        """,
        """
        class Compose(torch.autograd.Function):  # float32, whatever it is given
            @staticmethod
            def forward(ctx, base, low, g, bias):
                u = base.float() + low.float()
                ctx.save_for_backward(u.to(base.dtype), g)
                return (g.float() * u + bias.float()).to(base.dtype)

            @staticmethod
            def backward(ctx, dy):
                u, g = ctx.saved_tensors
                du = (g.float() * dy.float()).to(u.dtype)
                return du, du, (dy.float() * u.float()).sum(0), dy.float().sum(0)
        """,
    ],
    "count_launches": [
        """
        def count_launches(operations):
            def starts(name, given, made):
                if name.rpartition(".")[0].endswith("_"):
                    return True
                return "empty" not in name and any(memory not in given for memory in made)
            return sum(starts(*operation) for operation in operations)
        """,
    ],
    "bytes_moved": [
        """
        def bytes_moved(tokens, out_features, rank, itemsize):
            h, B, y = (tokens, rank), (out_features, rank), (tokens, out_features)
            g = (out_features,)
            def size(*shapes):
                return float(sum(itemsize * math.prod(shape) for shape in shapes))
            import math
            kernels = [(h, B, y), (y, y, y), (y, g, y), (y, g, y)]
            return [sum(size(*kernel) for kernel in kernels), size(y, h, B, g, g, y)]
        """,
    ],
    "split_float32": [
        """
        def split_float32(a):
            hi = a.to(torch.bfloat16)
            return [hi, torch.sub(a.double(), hi.double()).to(torch.bfloat16)]
        """,
    ],
    "compose_kernel": [
        """
        @triton.jit
        def compose_kernel(
            y, base, h, B, g, bias, tokens, n,
            rank: tl.constexpr, TOKENS: tl.constexpr, OUT: tl.constexpr,
        ):  # all of the rank at once
            t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
            o = (tl.program_id(1) * OUT + tl.arange(0, OUT))[None, :]
            r = tl.arange(0, 16)
            left = tl.load(h + t * rank + r[None, :], (t < tokens) & (r < rank)[None, :], other=0)
            right = tl.load(B + o * rank + r[:, None], (o < n) & (r < rank)[:, None], other=0)
            mask = (t < tokens) & (o < n)
            before = tl.load(base + t * n + o, mask=mask)
            low = tl.sum(left.to(tl.float32)[:, :, None] * right[None, :, :], 1)
            u = low + before.to(tl.float32)
            tl.store(base + t * n + o, u, mask=mask)
            u *= tl.load(g + o, mask=o < n)
            tl.store(y + t * n + o, u + tl.load(bias + o, mask=o < n), mask=mask)
        """,
    ],
    "row_norm_kernel": [
        """
        @triton.jit
        def row_norm_kernel(norm, W, n, m: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
            for i in range(ROWS):  # a row at a time
                row = tl.program_id(0) * ROWS + i
                if row < n:
                    total = 0.0
                    for start in range(0, m, COLS):
                        cols = start + tl.arange(0, COLS)
                        w = tl.load(W + row * m + cols, mask=cols < m, other=0.0).to(tl.float32)
                        total += tl.sum(w * w)
                    tl.store(norm + row, tl.sqrt(total))
        """,
    ],
    "backward_kernel": [
        """
        @triton.jit
        def backward_kernel(
            d_u, d_m, dy, u, g, norm, tokens, n, TOKENS: tl.constexpr, OUT: tl.constexpr
        ):  # a token at a time
            o = tl.program_id(1) * OUT + tl.arange(0, OUT)
            scale = tl.load(g + o, mask=o < n, other=0.0)
            length = tl.load(norm + o, mask=o < n, other=0.0)
            total = tl.zeros((OUT,), tl.float32)
            for i in range(TOKENS):
                at = (tl.program_id(0) * TOKENS + i) * n + o
                if tl.program_id(0) * TOKENS + i < tokens:
                    d = tl.load(dy + at, mask=o < n, other=0.0).to(tl.float32)
                    total += d * tl.load(u + at, mask=o < n, other=0.0).to(tl.float32)
                    tl.store(d_u + at, scale * d, mask=o < n)
            is_zero = length == 0
            total = tl.where(is_zero, 0.0, total) / tl.where(is_zero, 1.0, length)
            tl.store(d_m + tl.program_id(0) * n + o, total, mask=o < n)
        """,
    ],
}


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of scipy, equal differences
def test_other_right_answers_pass(exercise: Exercise) -> None:
    for source in RIGHT[exercise.name]:
        exercise(answer(exercise, source))


# ---- Answers of the wrong kind ----

ROW_NORM = next(exercise for exercise in EXERCISES if exercise.name == "row_norm")


def test_failure_is_one_line_with_one_question() -> None:
    lines = refusal(ROW_NORM, "def row_norm(w): return w.norm(dim=0)")._render_traceback_()
    assert lines[0].startswith(
        "CheckFailed: 3.1 row_norm, by hand: one norm per input (dim=0): DoRA"
    )
    assert " ".join(lines).endswith("Hint: " + ROW_NORM.hint)


def test_error_points_at_the_learners_own_line() -> None:
    source = """
    def helper(w):
        return torch.nn.functional.normalize(w, dim=7)

    def row_norm(weight):
        return helper(weight).sum(dim=1)
    """
    text = str(refusal(ROW_NORM, source))
    assert "your code raised IndexError: Dimension out of range" in text
    assert text.endswith("cell 3.1, line 3: return torch.nn.functional.normalize(w, dim=7)")


@pytest.mark.parametrize(
    "loop",
    [
        "while True:\n        pass",
        "while True:\n        try:\n            weight = weight + 1\n        except Exception:\n"
        "            pass",
    ],
)
def test_endless_loop_is_stopped_at_its_line(loop: str) -> None:
    quick = dataclasses.replace(ROW_NORM, seconds=0.2)
    text = str(refusal(quick, f"def row_norm(weight):\n    {loop}\n"))
    assert "stopped after 0.2 s: does this loop ever end?" in text
    assert "cell 3.1, line " in text


def test_loop_that_swallows_everything_is_stopped_too() -> None:
    rounds = []

    def row_norm(weight: Tensor) -> Tensor:
        while len(rounds) < 2:
            try:
                while True:
                    pass
            except:  # noqa: E722
                rounds.append(1)
        return weight

    refusal(dataclasses.replace(ROW_NORM, seconds=0.1), row_norm)
    assert len(rounds) == 2


def test_waiting_is_not_computing() -> None:
    with probe.time_limit(0.2):
        time.sleep(0.5)  # as on a machine that is busy with other things
    with pytest.raises(probe.TimeUp), probe.time_limit(0.2):
        while True:
            pass


def test_time_limit_leaves_nothing_behind() -> None:
    with probe.time_limit(0.05):
        pass
    torch.randn(300, 300) @ torch.randn(300, 300)
    assert not [thread for thread in __import__("threading").enumerate() if "watch" in thread.name]


def test_leaving_python_is_an_error_like_any_other() -> None:
    text = str(refusal(ROW_NORM, "def row_norm(w):\n    raise SystemExit(0)\n"))
    assert "your code raised SystemExit: 0" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.ones(3), "the check needs the function itself, checks.row_norm(row_norm)"),
        (dora.row_norm, "belongs to the package"),
        (lambda w: w.norm(dim=1).tolist(), "expected a tensor, got list"),
        (lambda w: w.norm(dim=1).numpy(), "expected a tensor, got ndarray"),
        (lambda w: w.norm(dim=1) * float("nan"), "expected [5, 13], got [nan, nan]"),
        (lambda w: w.norm(dim=1) + 1e-3, "expected [5, 13], got [5.001, 13]"),
        (lambda w: w.norm(dim=1)[:0], "expected the shape (out,) = (2,), got (0,)"),
        (lambda w: w.norm(dim=1) > 0, "expected [5, 13], got [1, 1]"),
        (lambda: 1, "takes 0 positional arguments but 1 was given"),
        (lambda w: object(), "expected a tensor, got object"),
    ],
)
def test_answer_of_the_wrong_kind(given: Any, says: str) -> None:
    assert says in str(refusal(ROW_NORM, given))


def test_stub_of_another_exercise_is_named() -> None:
    source = """
    def decompose(weight):
        raise NotImplementedError("exercise 3.2: decompose")

    def row_norm(weight):
        return decompose(weight)[0]
    """
    text = str(refusal(ROW_NORM, source))
    assert "it uses exercise 3.2, which is not started" in text


def test_broken_answer_that_is_called_is_named() -> None:
    source = """
    def dora_weight(weight, lora_A, lora_B, magnitude, alpha):
        return weight

    def merge_dora(base, lora_A, lora_B, magnitude, alpha):
        merged = copy.deepcopy(base)
        with torch.no_grad():
            merged.weight.copy_(dora_weight(base.weight, lora_A, lora_B, magnitude, alpha))
        return merged
    """
    exercise = next(exercise for exercise in EXERCISES if exercise.name == "merge_dora")
    text = str(refusal(exercise, source))
    assert "It calls your 3.3 dora_weight: check that first." in text
    assert "It calls" not in str(refusal(exercise, source.replace("(dora_weight(", "((")))


def test_picture_of_yours_beside_the_target(monkeypatch: Any) -> None:
    shown: list[Any] = []
    exercise = next(exercise for exercise in EXERCISES if exercise.name == "dora_weight")
    wrong = cells(3)["dora_weight"].replace("direction.norm(", "weight.norm(")
    monkeypatch.setattr(plots, "show", shown.append)
    refusal(exercise, wrong)
    assert shown == []  # a terminal cannot show it
    monkeypatch.setattr(IPython, "get_ipython", object)  # as in a notebook
    refusal(exercise, wrong)
    assert len(shown) == 1
    assert shown[0].get_suptitle() == "4 of 6 entries are off"
    assert "4 of 6" in shown[0].get_label()


# ---- Plain data ----


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).bfloat16(),
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor(True),
        torch.empty(0, 3),
        torch.randn(4, 3).T,
        torch.nn.Parameter(torch.randn(2), requires_grad=False),
        torch.empty(2, 3, device="meta"),
    ],
    ids=lambda value: f"{value.dtype}{tuple(value.shape)}",
)
def test_tensor_comes_back_as_it_was(value: Tensor) -> None:
    back = probe.unpack(json.loads(json.dumps(probe.pack(value))))
    assert type(back) is type(value)
    assert (back.dtype, back.shape, back.device) == (value.dtype, value.shape, value.device)
    assert back.requires_grad == value.requires_grad
    assert value.is_meta or torch.equal(back, value)


def test_plain_data_comes_back_and_the_rest_by_name() -> None:
    value = {"a": [1, (2.5, None)], "b": "text", "c": object()}
    back = probe.unpack(json.loads(json.dumps(probe.pack(value))))
    assert back == {"a": [1, (2.5, None)], "b": "text", "c": probe.Other("object")}


# ---- A fault of a check, and what is read without torch ----


def _broken(answer: Any) -> None:
    answer.case("by hand")
    raise KeyError("ours")


def test_fault_of_a_check_is_not_the_learners() -> None:
    broken = dataclasses.replace(ROW_NORM, body=_broken)
    broken = Exercise(**{f.name: getattr(broken, f.name) for f in dataclasses.fields(Exercise)})
    with pytest.raises(CheckError) as caught:
        broken(lambda w: w)
    assert not isinstance(caught.value, CheckFailed)
    assert "3.1 row_norm: the check itself broke (KeyError: 'ours')" in caught.value.message
    assert "in _broken" in caught.value.stack
    with pytest.raises(KeyError):
        broken(lambda w: w, debug=True)


def test_catalog_says_what_the_exercises_say_without_importing_torch() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('catalog', {catalog.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(len(module.entries()), 'torch' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(len(EXERCISES)), "False"]
    for exercise, entry in zip(EXERCISES, catalog.entries(), strict=True):
        told = dataclasses.asdict(entry)
        told.pop("lesson")
        assert told == {name: getattr(exercise, name) for name in told}
