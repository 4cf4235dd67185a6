"""DoRA: a weight as magnitude times direction, with a low-rank update of the direction.

    W' = magnitude / ||W + s B A||_row * (W + s B A)            s as in LoRA
    y  = g * (x W^T + s (drop(x) A^T) B^T) + bias,              g = magnitude / norm.detach()

There is one magnitude per output neuron: the norm runs over the inputs, dim=1 of PyTorch's
(out, in) weight. It starts as the row norm of W, so g = 1 and W' = W at the start.

The first line is the definition (dora_weight, the reference); the second is how the layer
computes it (DoRALinear.forward). Both are the same function; a test holds them equal.

Reference:
    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353,
    eq. 5 (the form), eq. 11 and sec. 4.3 (the detached norm)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora.lora import LoRALinear, wide_dtype


def row_norm(weight: Tensor) -> Tensor:
    """||W||_row: (out, in) -> (out,), the length of each row, in float32 (float64 stays).

    It is exact over the whole range of float32: a row of 1e-25 has a norm there although its
    squares, 1e-50, do not. Such squares are summed in float64, on a CPU only where they occur,
    because there a float64 sum over everything takes as long as a matrix product.
    """
    dtype = wide_dtype(weight.dtype)
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        return norm.to(dtype)
    norm = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    extreme = (norm < 1e-15) | (norm > 1e15)  # squares near the ends of float32, 1e-38 and 1e38
    if extreme.any():
        exact = torch.linalg.vector_norm(weight[extreme].double(), dim=1)
        norm = norm.masked_scatter(extreme, exact.to(dtype))
    return norm


def magnitude_over_norm(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = magnitude / norm, (out,); 1 where the norm is 0, so that a zero row stays finite.

    The inner `where` keeps the gradient finite too: 0 * (1 / 0) would be NaN.
    """
    nonzero = norm > 0
    return torch.where(nonzero, magnitude / torch.where(nonzero, norm, 1.0), 1.0)


def dora_weight(
    weight: Tensor, delta: Tensor, magnitude: Tensor, detach_norm: bool = True
) -> Tensor:
    """W' = magnitude / ||W + delta||_row * (W + delta): equation 5, as it is written.

    Args:
        weight: W, (out, in).
        delta: s B A, (out, in), float32 or float64; the result has its dtype.
        magnitude: (out,).
        detach_norm: treat the norm as a constant in the backward pass (eq. 11); False gives the
            full gradient (eq. 6).
    """
    direction = weight.to(delta.dtype) + delta  # V + delta V, (out, in)
    norm = row_norm(direction)  # (out,)
    if detach_norm:
        norm = norm.detach()
    return magnitude_over_norm(magnitude, norm)[:, None] * direction


class DoRALinear(LoRALinear):
    """An nn.Linear, frozen, with a trainable magnitude and a low-rank update of its direction.

        y = g * (x W^T + s (drop(x) A^T) B^T) + bias,    g = magnitude / ||W + s B A||_row

    The norm is a constant in the backward pass (sec. 4.3), the bias is never scaled, and dropout
    acts on the low-rank path alone. A row whose norm is 0 has g = 1.

    Args, shapes and errors: as LoRALinear.

    Attributes:
        magnitude: (out,), float32 (float64 over a float64 base), starts as the row norm of W.
    """

    magnitude: nn.Parameter

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(base, rank, alpha, dropout, use_rslora)
        self.magnitude = nn.Parameter(row_norm(base.weight.detach()))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "magnitude"):  # not yet there while LoRALinear.__init__ runs
            self.magnitude.copy_(row_norm(self.base.weight))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.merged:
            return super().forward(x)
        base = F.linear(x, self.base.weight)  # (..., out)
        g = self.magnitude_scale()  # (out,), float32 or float64: so is the sum below
        y = g * torch.add(base.to(g.dtype), self.low_rank(x), alpha=self.scaling)
        if self.base.bias is not None:
            y = y + self.base.bias
        return y.to(base.dtype)

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """||W + s B A||_row, (out,), in float32 or float64. It never carries a gradient."""
        return row_norm(super().adapted_weight())

    def magnitude_scale(self) -> Tensor:
        """g = magnitude / ||W + s B A||_row, (out,): the factor of each output."""
        norm = self.weight_norm()
        return magnitude_over_norm(self.magnitude.to(norm.dtype), norm)

    def adapted_weight(self) -> Tensor:
        """W' = g (W + s B A), (out, in), in float32 or float64: equation 5."""
        delta = self.delta_weight()
        return dora_weight(self.base.weight, delta, self.magnitude.to(delta.dtype))
