"""LoRA: a frozen linear layer plus a trainable update of low rank.

    W' = W + s B A                             s = alpha / rank
    y  = x W^T + s (drop(x) A^T) B^T + bias    (alpha / sqrt(rank) with use_rslora)

W is (out, in) and frozen, A is (rank, in) and random, B is (out, rank) and zero: at the start
W' = W, and only rank * (in + out) numbers are trained instead of in * out.

References:
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, sec. 4.1
    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", arXiv 2312.03732 (use_rslora)
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora.adapter import Adapter


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what norms, products of factors and merges run in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keep matrix products in their own dtype: autocast would round them to half precision."""
    # The meta device has no autocast; and where it is off, switching it off takes 0.1 ms.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class LoRALinear(Adapter):
    """An nn.Linear, frozen, with a trainable low-rank update beside it.

        y = x W^T + s (drop(x) A^T) B^T + bias,    s = alpha / rank

    Args and errors: as Adapter, for a base that is an nn.Linear.

    Attributes:
        lora_A: (rank, in), Kaiming-uniform with a = sqrt(5), so uniform on +-1/sqrt(in).
        lora_B: (out, rank), zero. Both are float32, or float64 over a float64 base.

    Shapes: x (..., in) -> y (..., out), in the dtype that base would return.
    """

    adapts = nn.Linear
    base: nn.Linear

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(base, rank, alpha, dropout, use_rslora)
        device, dtype = base.weight.device, wide_dtype(base.weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=device, dtype=dtype))
        LoRALinear.reset_parameters(self)  # a subclass resets what it adds where it creates it

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: A random, B zero, so W' = W. Also fills a layer built on the meta device."""
        self.merged_weight = None
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.base.bias)

    def adapted_forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.project_down(x), self.lora_B.to(self.base.weight.dtype))  # (..., out)
        return self.apply_weight(x, self.base.weight) + low

    def project_down(self, x: Tensor) -> Tensor:
        """s drop(x) A^T, (..., in) -> (..., rank): A first, so B A is never built.

        It is scaled here, where it is small. Products run in the dtype of the base layer.
        """
        return self.scaling * F.linear(self.dropout(x), self.lora_A.to(self.base.weight.dtype))

    def delta_weight(self) -> Tensor:
        """s B A, (out, in), float32 or float64: the update of the weight (of V in DoRA)."""
        dtype = wide_dtype(self.lora_A.dtype)
        with no_autocast(self.lora_A.device):
            return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def adapted_weight(self) -> Tensor:
        """W + s B A, (out, in), in float32 or float64, before it is rounded to the dtype of W."""
        delta = self.delta_weight()
        return self.base.weight.to(delta.dtype) + delta

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features
