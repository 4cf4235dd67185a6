"""DoRA: a weight as magnitude times direction, with a low-rank update of the direction.

    W' = magnitude / ||W + s B A||_row * (W + s B A)            s as in LoRA
    y  = g * (x W^T + s (drop(x) A^T) B^T) + bias,              g = magnitude / norm.detach()

There is one magnitude per output neuron: the norm runs over the inputs, dim=1 of PyTorch's
(out, in) weight. It starts as the row norm of W, so g = 1 and W' = W at the start.

The first line is the definition (dora_weight, the reference); the second is how the layer
computes it (DoRALinear.compose): W' is never built, and neither is B A (factored_norm). Both are
the same function; tests hold them equal, and lesson 6 derives one from the other.

Reference:
    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353,
    eq. 5 (the form), eq. 11 and sec. 4.3 (the detached norm)
"""

import importlib
import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidora.lora import LoRALinear, no_autocast, wide_dtype

use_kernels = os.environ.get("MINIDORA_KERNELS", "1") != "0"
"""Whether layers on a GPU use minidora.kernels; False is plain PyTorch everywhere."""


HALF = (torch.bfloat16, torch.float16)
# Products of half precision in float32 are CUDA's, and not yet torch 2.6's.
MIXED_MM = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None
_loaded: bool | None = None  # whether minidora.fused could be imported; None is not yet tried


def _kernels_load() -> bool:
    """Import minidora.fused at its first use: Triton takes as long to import as the rest."""
    global _loaded
    if _loaded is None:
        try:
            importlib.import_module("minidora.fused")
            _loaded = True
        except Exception as error:
            _loaded = False
            if torch.cuda.is_available():
                warnings.warn(f"DoRA runs without its kernels: {error!r}", stacklevel=2)
    return _loaded


def kernels_serve(tensor: Tensor) -> bool:
    """Whether minidora.kernels serves what is computed from this tensor: CUDA, and meta for it.

    Never in a graph of torch.compile, which fuses the plain form by itself.
    """
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type in ("cuda", "meta")
        and tensor.dtype != torch.float64
        and use_kernels
        and torch.version.hip is None
        and not _transforms_active()
        and _kernels_load()
        and not (tensor.is_cuda and _interpreting())
    )


def _interpreting() -> bool:
    """Whether Triton runs in its interpreter here (minidora.interpreter): that is for a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def _transforms_active() -> bool:
    """Whether torch.func is at work: it needs operations that it knows."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def row_norm(weight: Tensor) -> Tensor:
    """||W||_row: (out, in) -> (out,), the length of each row, in float32 (float64 stays).

    It holds over the whole range of float32: a row of 1e-25 has a norm there although its
    squares, 1e-50, do not. Such squares are summed in float64; on a CPU, run eagerly, only where
    they occur, because there a float64 sum over everything takes as long as a matrix product.
    """
    dtype = wide_dtype(weight.dtype)
    if not _can_branch(weight):
        norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        return norm.to(dtype)
    norm = torch.linalg.vector_norm(weight.to(dtype), dim=1)
    usual = norm.clamp(1e-15, 1e15)  # beyond it squares near the ends of float32, 1e-38 and 1e38
    if not torch.equal(norm, usual):
        extreme = norm != usual
        exact = torch.linalg.vector_norm(weight[extreme].double(), dim=1)
        norm = norm.masked_scatter(extreme, exact.to(dtype))
    return norm


def _can_branch(weight: Tensor) -> bool:
    """Whether looking at values is free: on a GPU it waits for the device, in a graph it breaks."""
    return (
        weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _transforms_active()
    )


def magnitude_over_norm(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = magnitude / norm, (out,); 1 where the norm is 0, so that a zero row stays finite.

    There the quotient is magnitude / inf, which is 0 and has the gradient 0.
    """
    zero = norm == 0
    return magnitude / norm.masked_fill(zero, torch.inf) + zero


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


def factored_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W + s B A||_row, (out,), from products of rank size; B A is never built.

        ||W + s B A||^2 = ||W||^2 + sum_l B_jl (2 s U_jl + s^2 (B G)_jl)
        U = W A^T, (out, rank);   G = A A^T, (rank, rank)

    In float32 (float64 stays), to a relative error below 1e-6 for every row. Where the terms
    nearly cancel, or leave the range of float32, their sum has lost its digits: such rows are
    built and summed in float64, on a GPU by the kernel that finds them. It carries no gradient
    (eq. 11).
    """
    if torch.compiler.is_compiling() and MIXED_MM and weight.is_cuda and weight.dtype in HALF:
        return graph_norm(weight, lora_A, lora_B, scaling)
    if kernels_serve(weight):
        from minidora import fused

        if fused.forms_norm(weight, lora_A):
            with torch.no_grad():
                norm: Tensor = fused.factored_norm(weight, lora_A, lora_B, scaling)[0]
                return norm
    # no_grad does not stop forward-mode derivatives; detach does.
    return plain_norm(weight, lora_A, lora_B, scaling).detach()


@torch.no_grad()
def plain_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """factored_norm in PyTorch's own operations.

    Where values cannot be looked at (in a graph, under torch.func, on a GPU) no row is built, and
    the relative error is about 1e-7 ||W||^2 / ||W + s B A||^2.
    """
    dtype = wide_dtype(weight.dtype)
    A, B = lora_A.to(dtype), lora_B.to(dtype)

    def read(rows: Tensor) -> "tuple[Tensor, Tensor]":  # as text: torch 2.6 cannot trace it
        rows = rows.to(dtype)
        return F.linear(rows, A), row_norm(rows)  # (rows, rank), (rows,)

    with no_autocast(weight.device):
        if weight.dtype == dtype:
            U, norm = read(weight)
        else:  # half precision is widened a slice at a time, so that no large copy of W is made
            parts = [read(rows) for rows in weight.chunk(8 if weight.numel() > 2**20 else 1)]
            U, norm = (torch.cat(part) for part in zip(*parts, strict=True))
        change = torch.addmm(U, B, A @ A.T, beta=2 * scaling, alpha=scaling**2)  # (out, rank)
    square = norm.double() ** 2
    new_square = square + (B.double() * change).sum(1)
    new_norm = new_square.clamp(min=0).sqrt().to(dtype)
    if _can_branch(weight):
        a = torch.linalg.vector_norm(A, dim=1, dtype=torch.float64)  # ||a_l||
        own = torch.linalg.vector_norm(B * a.to(dtype), dim=1, dtype=torch.float64)
        terms = square + (scaling * own) ** 2
        lost = ~(new_square >= terms / 4)  # also where they are not finite
        if not a.clamp(1e-15, 1e15).equal(a):
            lost |= (B != 0).double() @ ((a < 1e-15) | (a > 1e15)).double() > 0
        if lost.any():
            rows = weight[lost].double() + scaling * (B[lost].double() @ A.double())
            exact = torch.linalg.vector_norm(rows, dim=1)
            new_norm = new_norm.masked_scatter(lost, exact.to(dtype))
    return new_norm


@torch.no_grad()
def graph_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """factored_norm for a graph on a GPU: few products in half precision, the rest one fused pass.

    A float32 number is the sum of two halves, hi + lo, to 17 bits or more, so that
    W (s A)^T = W hi^T + W lo^T on tensor cores. Branch-free: see plain_norm.
    """
    A, rank = scaling * lora_A.float(), len(lora_A)
    hi = A.to(weight.dtype)
    P = torch.cat([hi, (A - hi.float()).to(weight.dtype)])  # (2 rank, in)
    U = product(weight, P.T, torch.float32).view(-1, 2, rank).sum(1)  # (out, rank)
    G = product(P, P.T, torch.float32).view(2, rank, 2, rank).sum((0, 2))  # (rank, rank)
    B = lora_B.float()
    # A product of float32 would be rounded to TF32 where that is allowed; so it is written out.
    BG = (B[:, :, None] * G).sum(1) if rank <= 32 else (B.double() @ G.double()).float()
    square = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64) ** 2
    new_square = square + (B * (2 * U + BG)).sum(1)
    new_norm: Tensor = new_square.clamp(min=0).sqrt().float()
    return new_norm


def compose_outputs(
    base: Tensor, low: Tensor | None, g: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = g * u + bias, rounded once to the dtype of base, and u = base + low, (tokens, out).

    u is in the dtype of g. In float32 it comes as base, with low in it, and low is None.
    """
    u = base if low is None else base.to(g.dtype) + low
    y = g * u if bias is None else torch.addcmul(bias.to(g.dtype), g, u)
    return y.to(base.dtype), u


class Compose(torch.autograd.Function):
    """The y of compose_outputs, holding u alone for the backward pass.

    In half precision the sum is taken in float32, since g rounded to bf16 would cost every output
    a digit; autograd would then hold u in float32. This holds it in the dtype of base, which is
    enough for the gradient of g.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, low: Tensor | None, g: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        y, u = compose_outputs(base, low, g, bias)
        u = u.to(base.dtype)
        ctx.save_for_backward(u, g)
        ctx.set_materialize_grads(False)
        # A rounded u is returned too: autograd can differentiate twice through what it returned.
        return y, None if low is None else u

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        u, g = ctx.saved_tensors
        if dy is None:  # only where the rounded u alone has a gradient, in a second derivative
            return du, du, None, None
        product = dy.to(g.dtype) * u  # (tokens, out)
        d_g = product.sum(0)
        # Its memory serves once more, unless autograd is recording for a second derivative.
        d_u = g * dy if torch.is_grad_enabled() else torch.mul(g, dy, out=product)
        d_u = d_u.to(u.dtype) if du is None else d_u.to(u.dtype) + du
        d_bias = dy.sum(0) if ctx.needs_input_grad[3] else None
        return d_u, d_u if ctx.needs_input_grad[1] else None, d_g, d_bias


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right in another dtype, without a rounding to theirs on the way where torch can."""
    if left.dtype in HALF and dtype == torch.float32 and left.device.type != "cpu" and MIXED_MM:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


class DoRALinear(LoRALinear):
    """An nn.Linear, frozen, with a trainable magnitude and a low-rank update of its direction.

        y = g * (x W^T + s (drop(x) A^T) B^T) + bias,    g = magnitude / ||W + s B A||_row

    The norm is a constant in the backward pass (sec. 4.3), the bias is never scaled, and dropout
    acts on the low-rank path alone. A row whose norm is 0 has g = 1.

    Args, shapes and errors: as LoRALinear.

    Attributes:
        magnitude: (out,), float32 (float64 over a float64 base), starts as the row norm of W.
        recompute: False holds one output-sized tensor for the backward pass; True computes it
            again there, one more product with W, and holds two numbers for each output.
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
        self.recompute = False
        self.cached_norm: Tensor | None = None  # set within reuse_norms and cached_scale alone
        self.cached_g: Tensor | None = None  # set within cached_scale alone

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.refuse_while_cached("reset_parameters", "leave the context first")
        super().reset_parameters()
        self.magnitude.copy_(row_norm(self.base.weight))

    def adapted_forward(self, x: Tensor) -> Tensor:
        if kernels_serve(x):
            weight, bias = self.base.weight, self.base.bias
            dtype = _product_dtype(weight)
            x_as_weight = x.to(dtype)
            if _fusable(x_as_weight, weight, bias, self.lora_A):
                return self.fused(x_as_weight, weight.to(dtype), bias)
        if self.is_small(x):
            return self.dense(x)
        g = self.magnitude_scale()
        if self.recompute and torch.is_grad_enabled():
            y: Tensor = checkpoint(self.compose, x, g, use_reentrant=False)
            return y
        return self.compose(x, g)

    def is_small(self, x: Tensor) -> bool:
        """Whether W is so small that calls cost more than arithmetic: then W' is built."""
        numbers = self.base.weight.numel()
        few = x.numel() <= FEW_TOKENS * self.in_features and self.cached_g is None
        return (
            numbers <= (4 * SMALL if few else SMALL)
            and _can_branch(x)
            and not (self.recompute or (self.training and self.dropout.p > 0))
            and not torch.is_autocast_enabled("cpu")
        )

    def dense(self, x: Tensor) -> Tensor:
        """x W'^T + bias with W' of equation 5, in float32 or float64: few calls, for a small W.

        Also within reuse_norms, and for the smallest within cached_scale: the norm is cheap here,
        and so nothing changes.
        """
        self._refuse_gradients_while_cached()
        W, A, B = self.base.weight, self.lora_A, self.lora_B
        dtype = wide_dtype(W.dtype)
        V = torch.addmm(W.to(dtype), B.to(dtype), A.to(dtype), alpha=self.scaling)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64)
            half = torch.linalg.vector_norm(W, dim=1, dtype=torch.float64).mul_(0.5)
            usual = not (norm <= half).any()
            if not usual:  # rows that nearly cancel have lost their digits in V
                exact = torch.addmm(W.double(), B.double(), A.double(), alpha=self.scaling)
                norm = torch.linalg.vector_norm(exact, dim=1)
            norm = norm.to(dtype)
        m = self.magnitude.to(dtype)
        g = m / norm if usual else magnitude_over_norm(m, norm)
        bias = self.base.bias
        y = F.linear(x.to(dtype), g[:, None] * V, None if bias is None else bias.to(dtype))
        return y.to(W.dtype)

    def compose(self, x: Tensor, g: Tensor) -> Tensor:
        """g * (x W^T + s (drop(x) A^T) B^T) + bias, (..., in) -> (..., out)."""
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (tokens, in)
        base = F.linear(tokens, self.base.weight)  # (tokens, out)
        h, B = self.project_down(tokens), self.lora_B.to(self.base.weight.dtype)
        low = None
        if base.dtype == g.dtype and not _transforms_active():
            base = base.addmm_(h, B.T)  # in place: no second tensor of this size
        else:
            low = F.linear(h, B)
        by_hand = torch.is_grad_enabled() and not _transforms_active()
        if low is None and torch.compiler.is_compiling():
            by_hand = False  # a graph holds the same, and torch 2.6 cannot trace a None returned
        scaled = Compose.apply if by_hand else compose_outputs
        y: Tensor = scaled(base, low, g, self.base.bias)[0]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same on a GPU, with the kernels of minidora.kernels."""
        from minidora import fused

        norm = self.cached_norm
        if norm is None and (
            weight is not self.base.weight or not fused.forms_norm(weight, self.lora_A)
        ):
            norm = self.weight_norm()
        dropped = self.dropout(x) if self.training and self.dropout.p > 0 else None
        recompute = self.recompute or not torch.is_grad_enabled()
        y: Tensor = fused.FusedDoRA.apply(
            x, dropped, weight, self.lora_A, self.lora_B, self.magnitude, bias, norm,
            self.scaling, recompute,
        )  # fmt: skip
        return y

    def weight_norm(self) -> Tensor:
        """||W + s B A||_row, (out,), in float32 or float64. It never carries a gradient."""
        return factored_norm(self.base.weight, self.lora_A, self.lora_B, self.scaling)

    def magnitude_scale(self) -> Tensor:
        """g = magnitude / ||W + s B A||_row, (out,): the factor of each output."""
        if self.cached_g is not None:
            self._refuse_gradients_while_cached()
            return self.cached_g
        norm = self.weight_norm() if self.cached_norm is None else self.cached_norm
        return magnitude_over_norm(self.magnitude.to(norm.dtype), norm)

    def adapted_weight(self) -> Tensor:
        """W' = g (W + s B A), (out, in), in float32 or float64: equation 5."""
        delta = self.delta_weight()
        return dora_weight(self.base.weight, delta, self.magnitude.to(delta.dtype))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        state, prefix = args[:2]
        weight = state.get(f"{prefix}base.weight")
        if weight is not None and f"{prefix}magnitude" not in state and not self.moved():
            # A base loaded alone, before any training: the layer starts from it.
            self.magnitude.data.copy_(row_norm(weight.to(self.base.weight.dtype)))

    def merge(self) -> None:
        self.refuse_while_cached("merge", "merge before or after it")
        super().merge()

    def train(self, mode: bool = True) -> "DoRALinear":
        if mode and self.cached_g is not None:
            self.refuse_while_cached("train", "leave the context first")
        return super().train(mode)

    def _refuse_gradients_while_cached(self) -> None:
        if self.cached_g is not None and torch.is_grad_enabled():
            self.refuse_while_cached("a forward pass with gradients", "use torch.no_grad()")

    def refuse_while_cached(self, what: str, instead: str) -> None:
        if self.cached_g is not None:
            raise RuntimeError(f"{what} within cached_scale, which holds g as it was: {instead}")
        if self.cached_norm is not None:
            raise RuntimeError(
                f"{what} within reuse_norms, which holds the norms as they were: {instead}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy outlives the context.
        return {**self.__dict__, "cached_norm": None, "cached_g": None}


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that products with W run in: autocast's, where it is on."""
    if weight.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return weight.dtype


def _fusable(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor) -> bool:
    """Whether FusedDoRA takes them: plain tensors with something in them, and a frozen base."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    plain = type(x) in PLAIN_TYPES and type(weight) in PLAIN_TYPES and type(lora_A) in PLAIN_TYPES
    return frozen and plain and x.device == weight.device and x.numel() > 0 and weight.numel() > 0


SMALL = 2**14  # numbers in a weight, such as 128 x 128; four times as many for few tokens
FEW_TOKENS = 128
PLAIN_TYPES = (Tensor, nn.Parameter)
