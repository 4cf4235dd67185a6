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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidora.lora import LoRALinear, no_autocast, wide_dtype


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
    return weight.device.type == "cpu" and not torch.compiler.is_compiling()


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


@torch.no_grad()
def factored_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W + s B A||_row, (out,), from products of rank size; B A is never built.

        ||W + s B A||^2 = ||W||^2 + sum_l B_jl (2 s U_jl + s^2 (B G)_jl)
        U = W A^T, (out, rank);   G = A A^T, (rank, rank)

    Computed in float32 (float64 stays), the sum over l in float64. Where W + s B A nearly cancels,
    the difference of the large terms has lost its digits. On a CPU, run eagerly, such rows are
    built and measured; on a GPU, or compiled, the relative error is about
    1e-7 ||W||^2 / ||W + s B A||^2. It carries no gradient (eq. 11).
    """
    dtype = wide_dtype(weight.dtype)
    A, B = lora_A.to(dtype), lora_B.to(dtype)

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.to(dtype)
        return F.linear(rows, A), row_norm(rows)  # (rows, rank), (rows,)

    with no_autocast(weight.device):
        if weight.dtype == dtype:
            U, norm = read(weight)
        else:  # half precision is widened a slice at a time, so that no copy of W is made
            parts = [read(rows) for rows in weight.chunk(8)]
            U, norm = (torch.cat(part) for part in zip(*parts, strict=True))
        change = torch.addmm(U, B, A @ A.T, beta=2 * scaling, alpha=scaling**2)  # (out, rank)
    square = norm.double() ** 2
    new_square = square + (B.double() * change).sum(1)
    new_norm = new_square.clamp(min=0).sqrt().to(dtype)
    if _can_branch(weight):
        cancelled = new_square < 1e-2 * square
        if cancelled.any():
            rows = weight[cancelled].to(dtype) + scaling * (B[cancelled] @ A)
            new_norm = new_norm.masked_scatter(cancelled, row_norm(rows))
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
        self.cached_g: Tensor | None = None  # set within cached_scale alone

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.magnitude.copy_(row_norm(self.base.weight))

    def adapted_forward(self, x: Tensor) -> Tensor:
        g = self.magnitude_scale()
        if self.recompute and torch.is_grad_enabled():
            y: Tensor = checkpoint(self.compose, x, g, use_reentrant=False)
            return y
        return self.compose(x, g)

    def compose(self, x: Tensor, g: Tensor) -> Tensor:
        """g * (x W^T + s (drop(x) A^T) B^T) + bias, (..., in) -> (..., out)."""
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (tokens, in)
        base = F.linear(tokens, self.base.weight)  # (tokens, out)
        h, B = self.project_down(tokens), self.lora_B.to(self.base.weight.dtype)
        low = None
        if base.dtype == g.dtype:
            base = base.addmm_(h, B.T)  # in place: no second tensor of this size
        else:
            low = F.linear(h, B)
        scaled = Compose.apply if torch.is_grad_enabled() else compose_outputs
        y: Tensor = scaled(base, low, g, self.base.bias)[0]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def weight_norm(self) -> Tensor:
        """||W + s B A||_row, (out,), in float32 or float64. It never carries a gradient."""
        return factored_norm(self.base.weight, self.lora_A, self.lora_B, self.scaling)

    def magnitude_scale(self) -> Tensor:
        """g = magnitude / ||W + s B A||_row, (out,): the factor of each output."""
        if self.cached_g is not None:
            if torch.is_grad_enabled():
                self._refuse_while_cached("a forward pass with gradients", "use torch.no_grad()")
            return self.cached_g
        norm = self.weight_norm()
        return magnitude_over_norm(self.magnitude.to(norm.dtype), norm)

    def adapted_weight(self) -> Tensor:
        """W' = g (W + s B A), (out, in), in float32 or float64: equation 5."""
        delta = self.delta_weight()
        return dora_weight(self.base.weight, delta, self.magnitude.to(delta.dtype))

    def merge(self) -> None:
        if self.cached_g is not None:
            self._refuse_while_cached("merge", "merge before or after it")
        super().merge()

    def train(self, mode: bool = True) -> "DoRALinear":
        if mode and self.cached_g is not None:
            self._refuse_while_cached("train", "leave the context first")
        return super().train(mode)

    def _refuse_while_cached(self, what: str, instead: str) -> NoReturn:
        raise RuntimeError(f"{what} within cached_scale, which holds g as it was: {instead}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached_g": None}  # a copy outlives the context


def _refuse_loading(module: nn.Module, *_: Any) -> None:
    """A copy of a model takes this hook along, but not cached_g: there it does nothing."""
    for layer in module.modules():
        if isinstance(layer, DoRALinear) and layer.cached_g is not None:
            layer._refuse_while_cached("load_state_dict", "leave the context first")


@contextmanager
def cached_scale(model: nn.Module) -> Iterator[None]:
    """Within it every DoRALinear of a model in evaluation mode uses a g computed once, here.

    For generation: one token costs as much as with LoRA, where the norm would cost more than the
    layer. Gradients, train(), load_state_dict() and merge() are refused while it is open. It
    cannot notice a write to a parameter: an optimizer's step, .data, .to().

    Raises:
        ValueError: the model has no DoRALinear, or one that is in training mode.
        RuntimeError: within it, for what is refused.
    """
    layers = [module for module in model.modules() if isinstance(module, DoRALinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no DoRALinear layer whose g could be kept")
    if any(layer.training for layer in layers):
        raise ValueError("cached_scale is for evaluation: call model.eval() first")

    # On every module, so that whichever is loaded refuses before it has changed anything.
    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_load_state_dict_pre_hook(_refuse_loading) for module, _ in modes]
    before = [layer.cached_g for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.cached_g = layer.magnitude_scale()
        yield
    finally:
        for layer, g in zip(layers, before, strict=True):
            layer.cached_g = g
        for hook in hooks:
            hook.remove()
        for module, training in modes:  # a train() that was refused had reached some of them
            module.training = training
