"""DoRALinear as the course first had it, before kernels and small layers: what `bench` compares.

Taken over from then and never changed, so that the layer of today can be timed beside it in one
run. In every layer the norm is factored, of a half-precision W in eight slices, and the outputs
are composed; there are no kernels, and a small W is not built.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora.dora import DoRALinear
from minidora.lora import no_autocast, wide_dtype


class FirstForm(nn.Module):
    """The first forward pass over the parameters of a DoRALinear."""

    def __init__(self, dora: DoRALinear) -> None:
        super().__init__()
        self.dora = dora

    def forward(self, x: Tensor) -> Tensor:
        dora = self.dora
        norm = factored_norm(dora.base.weight, dora.lora_A, dora.lora_B, dora.scaling)
        zero = norm == 0
        g = dora.magnitude.to(norm.dtype) / norm.masked_fill(zero, torch.inf) + zero
        tokens = x.reshape(-1, x.shape[-1])
        base = F.linear(tokens, dora.base.weight)  # (tokens, out)
        h, B = dora.project_down(tokens), dora.lora_B.to(dora.base.weight.dtype)
        low = None
        if base.dtype == g.dtype:
            base = base.addmm_(h, B.T)
        else:
            low = F.linear(h, B)
        scaled = Compose.apply if torch.is_grad_enabled() else compose_outputs
        y: Tensor = scaled(base, low, g, dora.base.bias)[0]
        return y.view(*x.shape[:-1], dora.out_features)


@torch.no_grad()
def factored_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W + s B A||_row, (out,), from U = W A^T and A A^T; rows that cancel are built on a CPU."""
    dtype = wide_dtype(weight.dtype)
    A, B = lora_A.to(dtype), lora_B.to(dtype)

    def read(rows: Tensor) -> "tuple[Tensor, Tensor]":  # as text: torch 2.6 cannot trace it
        rows = rows.to(dtype)
        return F.linear(rows, A), row_norm(rows)

    with no_autocast(weight.device):
        if weight.dtype == dtype:
            U, norm = read(weight)
        else:
            parts = [read(rows) for rows in weight.chunk(8)]
            U, norm = (torch.cat(part) for part in zip(*parts, strict=True))
        change = torch.addmm(U, B, A @ A.T, beta=2 * scaling, alpha=scaling**2)
    square = norm.double() ** 2
    new_square = square + (B.double() * change).sum(1)
    new_norm = new_square.clamp(min=0).sqrt().to(dtype)
    if _can_branch(weight):
        cancelled = new_square < 1e-2 * square
        if cancelled.any():
            rows = weight[cancelled].to(dtype) + scaling * (B[cancelled] @ A)
            new_norm = new_norm.masked_scatter(cancelled, row_norm(rows))
    return new_norm


def row_norm(weight: Tensor) -> Tensor:
    """||W||_row; squares that leave float32 are summed in float64."""
    dtype = wide_dtype(weight.dtype)
    if not _can_branch(weight):
        norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        return norm.to(dtype)
    norm = torch.linalg.vector_norm(weight.to(dtype), dim=1)
    usual = norm.clamp(1e-15, 1e15)
    if not torch.equal(norm, usual):
        extreme = norm != usual
        exact = torch.linalg.vector_norm(weight[extreme].double(), dim=1)
        norm = norm.masked_scatter(extreme, exact.to(dtype))
    return norm


def _can_branch(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and not torch.compiler.is_compiling()


def compose_outputs(
    base: Tensor, low: Tensor | None, g: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = g * u + bias and u = base + low."""
    u = base if low is None else base.to(g.dtype) + low
    y = g * u if bias is None else torch.addcmul(bias.to(g.dtype), g, u)
    return y.to(base.dtype), u


class Compose(torch.autograd.Function):
    """compose_outputs, holding u alone for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, low: Tensor | None, g: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        y, u = compose_outputs(base, low, g, bias)
        u = u.to(base.dtype)
        ctx.save_for_backward(u, g)
        ctx.set_materialize_grads(False)
        return y, None if low is None else u

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        u, g = ctx.saved_tensors
        product = dy.to(g.dtype) * u
        d_g = product.sum(0)
        d_u = torch.mul(g, dy, out=product).to(u.dtype)
        d_bias = dy.sum(0) if ctx.needs_input_grad[3] else None
        return d_u, d_u if ctx.needs_input_grad[1] else None, d_g, d_bias
