"""How DoRALinear runs on a GPU: the kernels started, as operators, under one autograd Function.

    factored_norm    prepare, norm            ||W + s B A||_row and s A, rounded
    FusedDoRA        compose, its backward    the layer, with its gradients by hand

Each operator is one launch. Where a launch fails, the kernel's plain form takes over for good, with
one warning. minidora.dora imports this when the first tensor on a GPU comes along: it needs Triton.
"""

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from minidora import dora
from minidora.kernels import (
    compose_backward_kernel,
    compose_kernel,
    norm_kernel,
    plain_compose,
    plain_compose_backward,
    plain_prepare,
    prepare_kernel,
)

# Up to it one kernel forms W A^T itself. At 64 Triton 3.6 gave wrong sums of a (4096, 11008) weight
# in bf16 on an H200 (5e-4, where 32 gives 3e-7), as it does with 128 columns or eight warps.
MAX_RANK = 32
SLICES = 8  # A A^T comes as the sum of so many parts, one a program
# An older compiled kernel does not take the sizes that it was compiled for.
TAKES_ALL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
compiled_kernels: dict[tuple[Any, ...], CompiledKernel] = {}
failure: Exception | None = None  # what a launch failed with; from then on the plain forms serve


def launch(kernel: Any, grid: tuple[int, int, int], like: Tensor, *args: Any, **sizes: Any) -> bool:
    """Start a kernel on the device of a tensor. False, with one warning, where that fails."""
    global failure
    if failure is None:
        try:
            if like.is_cuda and like.device.index != torch.cuda.current_device():
                with torch.cuda.device(like.device):
                    start(kernel, grid, like.device, args, sizes)
            else:
                start(kernel, grid, like.device, args, sizes)
            return True
        except Exception as error:  # no C compiler, an old driver, too little shared memory
            failure = error
            warnings.warn(f"minidora runs without its kernels: {error!r}", stacklevel=2)
    return False


def start(
    kernel: Any, grid: tuple[int, int, int], device: torch.device, args: Any, sizes: dict[str, Any]
) -> None:
    """kernel[grid](*args, **sizes), which must be all of its parameters, in their order.

    Before each start Triton asks every argument which of the kernels that it has compiled serves,
    and that takes longer than starting it. It depends on nothing but the dtypes, the numbers and
    whether each address is a multiple of 16; so what was started with the same ones is kept here.
    """
    key, addresses = [kernel, device, *sizes.values()], 0
    for arg in args:
        if isinstance(arg, Tensor):
            key.append(arg.dtype)
            addresses |= arg.data_ptr()
        else:
            key.append(float if isinstance(arg, float) else arg)  # Triton reads no value of it
    aligned = addresses % 16 == 0
    known = compiled_kernels.get(tuple(key)) if aligned else None
    if known is not None:
        known[grid](*args, *sizes.values())
        return
    compiled = kernel[grid](*args, **sizes)
    if aligned and TAKES_ALL and isinstance(compiled, CompiledKernel):
        if len(compiled_kernels) == 4096:  # a new number of tokens is a new key
            compiled_kernels.clear()
        compiled_kernels[tuple(key)] = compiled


def operator(name: str, body: Any, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """body, as an operator where the dispatcher must see it: in a graph, on meta, under a mode.

    On a GPU it is called directly: the dispatcher takes longer than most of the kernels.
    """
    op = torch.library.custom_op(f"minidora::{name}", body, mutates_args=mutates)
    op.register_fake(fake)

    def call(first: Tensor, *rest: Any) -> Any:
        direct = first.is_cuda and not torch.compiler.is_compiling()
        return (body if direct else op)(first, *rest)

    return call


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def power(rank: int, most: int = MAX_RANK) -> int:
    return min(most, max(16, 1 << (rank - 1).bit_length()))


# ---- One launch each ----


def _prepared(lora_A: Tensor, _: float, split: bool) -> tuple[Tensor, Tensor]:
    """Room for what _prepare computes."""
    (rank, m), dtype = lora_A.shape, torch.bfloat16 if split else torch.float32
    parts = SLICES if rank <= MAX_RANK else 0
    return (
        torch.empty((1 + split) * rank, m, dtype=dtype, device=lora_A.device),
        torch.empty(parts, rank, rank, dtype=torch.float32, device=lora_A.device),
    )


def _prepare(lora_A: Tensor, scaling: float, split: bool) -> tuple[Tensor, Tensor]:
    rank, m = lora_A.shape
    P = torch.empty(
        (1 + split) * rank,
        m,
        dtype=torch.bfloat16 if split else torch.float32,
        device=lora_A.device,
    )
    gram = rank <= MAX_RANK
    G = torch.empty(SLICES if gram else 0, rank, rank, dtype=torch.float32, device=lora_A.device)
    size, cols = power(rank), 2048 // power(rank)
    if not launch(
        prepare_kernel, (SLICES, blocks(rank, size), 1), lora_A, P, G, lora_A, scaling, m, rank,
        RANK=size, COLS=cols, STEPS=blocks(m, SLICES * cols), SPLIT=split, GRAM=gram,
    ):  # fmt: skip
        plain_P, plain_G = plain_prepare(lora_A, scaling, split)
        P.copy_(plain_P)
        G.zero_()[:1] = plain_G
    return P, G


def _norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, P: Tensor, G: Tensor, U: Tensor | None,
    BG: Tensor | None, scaling: float,
) -> Tensor:  # fmt: skip
    (n, m), rank = weight.shape, len(lora_A)
    norm = torch.empty(n, dtype=torch.float32, device=weight.device)
    s = ctypes.c_float(scaling).value
    split = len(P) > rank
    # Four warps, and 64 rows where the tensor cores take bf16: with 128 columns, or eight warps,
    # Triton 3.6 gave wrong sums on an H200.
    rows, cols = (64, 64) if split else (32, 32)
    if not launch(
        norm_kernel, (blocks(n, rows), 1, 1), weight,
        norm, weight, lora_A, lora_B, P, G, U, BG, s, scaling - s, n, weight.stride(0), m, rank,
        ROWS=rows, COLS=cols, RANK=power(rank, 64 if U is None else 32), PARTS=1 + split,
        SUMS=len(G), GIVEN=U is not None, STAGES=2 if not split else 5 if rank <= 32 else 4,
    ):  # fmt: skip
        norm.copy_(dora.plain_norm(weight, lora_A, lora_B, scaling))
    return norm


def _compose(
    base: Tensor, h: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor,
    bias: Tensor | None, keep: bool,
) -> Tensor:  # fmt: skip
    (tokens, out), rank = base.shape, h.shape[1]
    y = torch.empty_like(base)
    block, k = 32 if tokens > 16 else 16, power(rank, 64 if base.itemsize == 2 else 32)
    width = 128
    if rank > MAX_RANK and tokens > 16 and base.itemsize == 2:
        block, width = 128, 64
    if not launch(
        compose_kernel, (blocks(out, width), blocks(tokens, block), 1), base,
        y, base, h, lora_B, magnitude, norm, bias, tokens, out, rank,
        TOKENS=block, OUT=width, RANK=k, BIAS=bias is not None, KEEP=keep,
    ):  # fmt: skip
        y, u = plain_compose(base, h, lora_B, magnitude, norm, bias)
        base.copy_(u)
    return y


def _compose_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, out = u.shape
    parts = blocks(tokens, 128)
    d_u = torch.empty_like(u)
    d_m = torch.empty(parts, out, dtype=torch.float32, device=u.device)
    if not launch(
        compose_backward_kernel, (blocks(out, 128), parts, 1), u,
        d_u, d_m, dy, u, magnitude, norm, tokens, out, dy.stride(0), TOKENS=16, OUT=128, STEPS=8,
    ):  # fmt: skip
        d_u, row = plain_compose_backward(dy, u, magnitude, norm)
        d_m.zero_()[0] = row[0]
    return d_u, d_m


# ---- What minidora.dora calls ----

prepare = operator("prepare", _prepare, _prepared)
norm = operator("norm", _norm, lambda W, *_: W.new_empty(len(W), dtype=torch.float32))
compose = operator("compose", _compose, lambda base, *_: torch.empty_like(base), ("base",))
compose_backward = operator(
    "compose_backward",
    _compose_backward,
    lambda dy, u, *_: (
        torch.empty_like(u),
        u.new_empty(blocks(len(u), 128), u.shape[1], dtype=torch.float32),
    ),
)


def factored_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """||W + s B A||_row, (out,), in float32, and P: the rounded s A, then what rounding left."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    A, B, rank = lora_A.contiguous(), lora_B.contiguous(), len(lora_A)
    P, G = prepare(A, scaling, weight.dtype == torch.bfloat16)
    U = BG = None
    if rank > MAX_RANK:
        U = dora.product(weight, P.T, torch.float32)
        G = dora.product(P, P.T, torch.float32).view(2, rank, 2, rank).sum((0, 2))
        BG = dora.product(prepare(B, 1.0, True)[0], prepare(G, 1.0, True)[0].T, torch.float32)
    return norm(weight, A, B, P, G, U, BG, scaling), P


def forms_norm(weight: Tensor, lora_A: Tensor) -> bool:
    """Whether factored_norm takes this rank: a large one wants a product of bf16 in float32."""
    return len(lora_A) <= MAX_RANK or (weight.dtype == torch.bfloat16 and dora.MIXED_MM)


# ---- The layer ----


class FusedDoRA(torch.autograd.Function):
    """The layer on a GPU: DoRALinear.compose with its gradients by hand, in fewer launches.

        u  = x W^T + h B^T,   h = s drop(x) A^T          y   = g u + bias
        du = g dy                                        d_m = sum(dy u) / norm
        dB = du^T h,          dh = du B,  dA = s dh^T drop(x),       dx = du W + s dh A

    It holds u, or computes it again (recompute), and treats the norm as a constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        norm: Tensor | None,
        scaling: float,
        recompute: bool,
    ) -> Tensor:
        if norm is None:
            norm, P = factored_norm(weight, lora_A, lora_B, scaling)
            A = P[: len(lora_A)].to(weight.dtype)  # s A, rounded
        else:
            A = torch.mul(lora_A, scaling, out=torch.empty_like(lora_A, dtype=weight.dtype))
        h = F.linear(flat(x if dropped is None else dropped), A)  # (tokens, rank)
        u = F.linear(flat(x), weight)  # (tokens, out)
        y = compose(u, h, lora_B.contiguous(), magnitude, norm, bias, not recompute)
        ctx.scaling = scaling
        kept = None if recompute else u
        ctx.save_for_backward(x, dropped, weight, lora_A, lora_B, magnitude, bias, norm, h, A, kept)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, norm, h, A, u = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: the plain form has one
            return (*_plain_gradients(ctx, inputs, norm, dy), None, None, None)
        x, dropped, weight, lora_A, lora_B, magnitude, bias = inputs
        tokens = flat(x)  # (tokens, in)
        low_in = tokens if dropped is None else flat(dropped)
        if u is None:
            u = F.linear(tokens, weight)
            compose(u, h, lora_B.contiguous(), magnitude, norm, bias, True)
        dy = flat(dy)
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        du, d_m = compose_backward(dy, u, magnitude, norm)
        dh = du @ lora_B.to(weight.dtype)  # (tokens, rank)
        dB = dora.product(du.t(), h, lora_B.dtype)
        dA = dora.product((ctx.scaling * dh).t(), low_in, lora_A.dtype)
        dx = d_low = None
        if ctx.needs_input_grad[0]:
            dx = du @ weight
            if dropped is None:
                dx.addmm_(dh, A)
            dx = dx if x.dim() == 2 else dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            d_low = (dh @ A).view(x.shape)
        d_m = d_m.sum(0)
        return dx, d_low, None, dA, dB, d_m.to(magnitude.dtype), None, None, None, None


def flat(x: Tensor) -> Tensor:
    """(..., n) -> (tokens, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _plain_gradients(
    ctx: Any, inputs: list[Tensor | None], norm: Tensor, dy: Tensor
) -> list[Tensor | None]:
    """FusedDoRA's gradients for its first inputs, in operations that have gradients themselves."""
    own = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x, dropped, weight, A, B, magnitude, bias = own
    if x is None or weight is None or A is None or B is None or magnitude is None:
        raise AssertionError("only dropped and bias can be missing")
    h = ctx.scaling * F.linear(x if dropped is None else dropped, A.to(weight.dtype))
    low = F.linear(h, B.to(weight.dtype))
    g = dora.magnitude_over_norm(magnitude.to(norm.dtype), norm)
    y = dora.compose_outputs(F.linear(x, weight), low, g, bias)[0]
    needed_for = ctx.needs_input_grad[: len(own)]
    wanted = [t for t, needed in zip(own, needed_for, strict=False) if needed]
    gradients = iter(
        torch.autograd.grad(y, [t for t in wanted if t is not None], dy, create_graph=True)
    )
    return [next(gradients) if needed else None for needed in needed_for]
