"""What one training step of a layer makes a GPU do, counted without one, and the time it needs.

    works = count(4096, 4096, 16)    # form -> Work: launches, bytes and FLOPs of each
    H200.floor(works["LoRA"])        # seconds that the card needs at least

The layers run on the meta device, in bf16 and without a bias, as `make gpu` measured them. A
launch takes at least as long as its bytes take to memory, and as its FLOPs take the processor;
launches follow each other. What is above that floor is for the kernels, and for Python, to answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora import reuse_norms
from minidora.dora import DoRALinear
from minidora.evidence import first_form
from minidora.evidence.bench import load_json
from minidora.evidence.first_form import FirstForm
from minidora.evidence.gpu_page import FOLDER, MISSING
from minidora.interpreter import problem
from minidora.lora import LoRALinear
from minidora.memory import Launches


@dataclass(frozen=True)
class Work:
    """Of one training step: launches forward and backward, and bytes and FLOPs of each launch.

    narrow: whether a launch's products take half precision, as tensor cores do.
    """

    forward: int
    backward: int
    moved: tuple[int, ...]
    flops: tuple[int, ...]
    narrow: tuple[bool, ...]

    @property
    def launches(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Card:
    """Peaks of a GPU: FLOPs a second in half precision and in float32, bytes a second."""

    name: str
    narrow: float
    wide: float
    bandwidth: float

    def floor(self, work: Work) -> float:
        """Seconds of a step in which nothing but memory and products takes time."""
        return sum(
            max(moved / self.bandwidth, flops / (self.narrow if narrow else self.wide))
            for moved, flops, narrow in zip(work.moved, work.flops, work.narrow, strict=True)
        )


H200 = Card("H200", narrow=989e12, wide=67e12, bandwidth=4.8e12)
"""NVIDIA's data sheet of the H200 SXM: dense bf16 (half of the figure with sparsity), float32
without tensor cores, memory bandwidth."""


# ---- The forms ----


class PeftForm(nn.Module):
    """PEFT 0.21's DoRA, written out: float32 adapters, B A by an identity matrix, a sum of three.

    With dora=False its LoRA. tests/evidence/test_gpu_counts.py counts PEFT itself beside it.
    """

    def __init__(self, layer: DoRALinear, dora: bool) -> None:
        super().__init__()
        self.layer, self.dora = layer, dora

    def forward(self, x: Tensor) -> Tensor:
        W, A, B, s = (
            self.layer.base.weight, self.layer.lora_A, self.layer.lora_B, self.layer.scaling
        )  # fmt: skip
        base, x32 = F.linear(x, W), x.to(A.dtype)
        if not self.dora:
            return (base + F.linear(F.linear(x32, A), B) * s).to(x.dtype)
        eye = torch.eye(len(A.T), dtype=A.dtype, device=A.device)
        update = F.linear(F.linear(eye, A), B).T  # B A
        norm = torch.linalg.norm(W.to(A.dtype) + s * update.detach(), dim=1)
        g = (self.layer.magnitude / norm).view(1, -1)
        low = F.linear(F.linear(x32, A), B)
        y: Tensor = base + ((g - 1) * base + g * low * s)
        return y.to(x.dtype)


def _layer(kind: type[LoRALinear], features: int, rank: int) -> Any:
    base = nn.Linear(features, features, bias=False, dtype=torch.bfloat16, device="meta")
    return kind(base, rank, 2.0 * rank)


def count(features: int, tokens: int, rank: int) -> dict[str, Work]:
    """A training step of each form of a square layer. Our kernels need Triton to be counted."""
    linear = nn.Linear(features, features, bias=False, dtype=torch.bfloat16, device="meta")
    ours = _layer(DoRALinear, features, rank)

    def reused(x: Tensor) -> Tensor:
        with reuse_norms(ours):
            counter.clear()  # the norm itself is the first micro-batch's
            y: Tensor = ours(x)
            return y

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": linear.requires_grad_(False),
        "LoRA": _layer(LoRALinear, features, rank),
        "PEFT LoRA": PeftForm(_layer(DoRALinear, features, rank), dora=False),
        "PEFT DoRA": PeftForm(_layer(DoRALinear, features, rank), dora=True),
        "DoRA, first form": FirstForm(ours),
    }
    if not problem:
        forms |= {"DoRA": ours, "DoRA, norms reused": reused}
    works = {}
    for name, form in forms.items():
        x = torch.empty(tokens, features, dtype=torch.bfloat16, device="meta", requires_grad=True)
        ours.zero_grad()  # adding to a gradient would be a launch more
        with _Counter() as counter:
            y = form(x)
            forward = len(counter.names)
            y.backward(torch.empty_like(y))
        works[name] = Work(
            forward,
            len(counter.names) - forward,
            tuple(counter.moved),
            tuple(counter.flops),
            tuple(counter.narrow),
        )
    return works


def norm_bytes(features: int, rank: int) -> dict[str, float]:
    """Bytes that the norm of a bf16 weight moves, in units of the weight, by form."""
    layer = _layer(DoRALinear, features, rank)
    weight, A, B = layer.base.weight, layer.lora_A, layer.lora_B

    def dense() -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(weight.float() + layer.scaling * (B @ A), dim=1)
        return norm

    def kernels() -> Tensor:
        from minidora import fused

        return fused.factored_norm(weight, A, B, layer.scaling)[0]

    def first() -> Tensor:
        return first_form.factored_norm(weight, A, B, layer.scaling)

    forms: dict[str, Callable[[], Tensor]] = {
        "W + s B A built": dense,
        "first form, in slices": first,
    }
    if not problem:
        forms["our kernels"] = kernels
    moved = {}
    for name, form in forms.items():
        with torch.no_grad(), Launches() as counter:
            form()
        moved[name] = counter.bytes / weight.nbytes
    return moved


class _Counter(Launches):
    """Launches, with the FLOPs of each and whether half precision goes into its products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[int] = []
        self.narrow: list[bool] = []

    def clear(self) -> None:
        for kept in (self.names, self.moved, self.flops, self.narrow):
            kept.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = len(self.names)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.names) > before:
            flops, factor = _products(self.names[-1], args)
            self.flops.append(flops)
            self.narrow.append(factor is not None and factor.itemsize == 2)
        return result


def _products(name: str, args: Any) -> tuple[int, Tensor | None]:
    """FLOPs of the matrix products in a launch, and one of their factors; sums are not counted."""
    operation = name.split(".")[1].rstrip("_")
    if operation in ("mm", "addmm"):
        left, right = args[-2:] if operation == "addmm" else args[:2]
        return 2 * left.shape[0] * math.prod(right.shape), left
    if operation == "compose" and name.startswith("minidora"):  # h B^T
        h, B = args[1:3]
        return 2 * h.shape[0] * math.prod(B.shape), h
    if operation == "norm" and name.startswith("minidora"):  # W P^T and B G
        W, _, B, P = args[:4]
        return 2 * W.shape[0] * math.prod(P.shape) + 2 * len(B) * B.shape[1] ** 2, W
    return 0, None


# ---- Beside the measurement ----


@dataclass(frozen=True)
class Row:
    """A form: its work, the card's floor, and the measured seconds as a CUDA graph and eager.

    Both are ratios to our LoRA in the same run times LoRA's seconds in the last one.
    """

    name: str
    work: Work
    floor: float
    graph: float
    eager: float


def measured(features: int, tokens: int, rank: int) -> list[Row]:
    """Every form that was counted and measured on the H200; none without the repository."""
    reports = load_json(FOLDER)
    if not reports:
        return []
    shape = (features, tokens, rank)
    rows = {
        report: {
            row["contender"]: row
            for row in reports[report]["results"]
            if (row["features"], row["tokens"], row["rank"]) == shape
        }
        for report in ("gpu-layers", "gpu-layers-before")
    }
    lora = rows["gpu-layers"]["LoRA"]
    found = {
        name: (row["graph_ratio"] * lora["graph_seconds"], row["ratio"][1] * lora["seconds"])
        for name, row in {**rows["gpu-layers-before"], **rows["gpu-layers"]}.items()
    }
    works = count(*shape)
    return [
        Row(name, work, H200.floor(work), *found[name])
        for name, work in works.items()
        if name in found
    ]


def table(works: dict[str, Work]) -> str:
    """Launches and bytes of each form as lines of text, with ratios to LoRA's."""
    lora = works["LoRA"]
    lines = [f"{'':20} forward  backward      MiB moved  / LoRA's"]
    for name, work in works.items():
        ratio = sum(work.moved) / sum(lora.moved)
        lines.append(
            f"{name:20} {work.forward:7}  {work.backward:8}  {sum(work.moved) / 2**20:13.0f}"
            f"  {ratio:8.2f}"
        )
    if problem:
        lines.append(f"Our kernels are not counted here. {problem}")
    return "\n".join(lines)


def comparison(rows: list[Row]) -> str:
    """The floor beside what was measured, in ms and as ratios to LoRA's, as lines of text."""
    if not rows:
        return MISSING
    [lora] = [row for row in rows if row.name == "LoRA"]
    lines = [f"{'':20}   at least, ms    measured: graph, ms     eager, ms"]
    for row in rows:
        cells = (
            f"{1e3 * time:8.3f} ({time / reference:4.2f})"
            for time, reference in (
                (row.floor, lora.floor), (row.graph, lora.graph), (row.eager, lora.eager)
            )
        )  # fmt: skip
        lines.append(f"{row.name:20}" + "      ".join(cells))
    return "\n".join(lines)
