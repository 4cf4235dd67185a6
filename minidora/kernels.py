# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""DoRA's own work on a GPU in three launches: Triton kernels, each beside its plain form.

    norm     = ||W + s B A||_row                  one pass over W           factored_norm
    y, u     = g * u + bias, base + h B^T         one pass over base        compose
    d_u, d_m = g * dy, sum(dy * u) / norm         one pass over dy and u    compose_backward

A layer is slow on a GPU when it launches much and computes little: each operation of PyTorch is a
launch, and reads and writes its tensors in full. These kernels keep what lies between in registers.

Sums are taken in float32. The tensor cores multiply numbers of half the width, so a float32 A is
split into two of them, A = hi + lo, and W A^T = W hi^T + W lo^T: sixteen bits of A instead of
eight. Rows that nearly cancel, or whose squares leave the range of float32, are built and summed
in float64, by the program that finds them: nobody waits for a value.

Importing this needs Triton; minidora.dora does it when the first tensor on a GPU comes along.

Reference:
    Tillet, Kung, Cox 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural
    Network Computations", MAPL 2019
"""

import ctypes
import os
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidora import dora

MAX_RANK = 64  # up to it one kernel forms W A^T itself
failure: Exception | None = None  # what a launch failed with; from then on the plain forms serve


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> bool:
    """Start a kernel on the device of a tensor. False, with one warning, where that fails."""
    global failure
    if failure is None:
        try:
            with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
                kernel[grid](*args, **options)
            return True
        except Exception as error:  # no C compiler, an old driver, too little shared memory
            failure = error
            warnings.warn(f"minidora runs without its kernels: {error!r}", stacklevel=2)
    return False


def blocks(size: int, block: int) -> int:
    return -(-size // block)


# ---- The norm: ||W + s B A||^2 = ||W||^2 + B (2 s A W^T + s^2 A A^T B^T), row by row ----


NARROW = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") in ("0", ""))


@triton.jit
def add_product(left, right, total):
    """total + left right: half precision on tensor cores, float32 as three products of TF32."""
    if not NARROW:  # the interpreter knows no products of bf16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def split(a):
    """hi + lo = a, to sixteen bits: two numbers of eight, each rounded to nearest."""
    hi = round_to_bf16(a)
    return hi.to(tl.bfloat16), round_to_bf16(a - hi).to(tl.bfloat16)


@triton.jit
def round_to_bf16(a):
    """Upper half of a float32's bits: .to() would round as well, but the interpreter's cuts off."""
    return ((a.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def store_norm(
    norm, W, A, B, rows, square, change, parts, odd, s, rest, n, w_row,
    m: tl.constexpr, rank: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Store sqrt(square + change); rows that float32 cannot give so are built, in float64."""
    new = square.to(tl.float32) + change
    usual = (new >= 0.25 * parts) & (parts > 1e-30) & (parts < 1e30) & (odd == 0)
    lost = (usual == 0) & (rows < n)
    result = tl.sqrt(new)
    if tl.sum(lost.to(tl.int32), 0) > 0:
        exact = tl.zeros_like(square)
        for start in range(0, m, COLS):
            cols = start + tl.arange(0, COLS)
            at = rows.to(tl.int64)[:, None] * w_row + cols[None, :]
            v = tl.load(W + at, lost[:, None] & (cols < m)[None, :], 0.0).to(tl.float64)
            for k in range(rank):
                b = tl.load(B + rows * rank + k, lost, 0.0).to(tl.float64)
                a = tl.load(A + k * m + cols, cols < m, 0.0).to(tl.float64)
                v += (s * b + rest * b)[:, None] * a[None, :]  # s in float64
            exact += tl.sum(v * v, 1)
        result = tl.where(lost, tl.sqrt(exact).to(tl.float32), result)
    tl.store(norm + rows, result, rows < n)


@triton.jit
def norm_kernel(
    norm, W, A, B, s, rest, n, w_row, m: tl.constexpr, rank: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """W (n, m), A (rank, m), B (n, rank): one program forms U = W A^T for its rows, and A A^T."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    square = tl.zeros((ROWS,), tl.float64)
    U = tl.zeros((ROWS, RANK), tl.float32)
    G = tl.zeros((RANK, RANK), tl.float32)
    for start in range(0, m, COLS):
        cols = start + tl.arange(0, COLS)
        at = rows.to(tl.int64)[:, None] * w_row + cols[None, :]
        w = tl.load(W + at, (rows < n)[:, None] & (cols < m)[None, :], 0.0)
        inside = (ranks < rank)[:, None] & (cols < m)[None, :]
        a = s * tl.load(A + ranks[:, None] * m + cols[None, :], inside, 0.0).to(tl.float32)
        wide = w.to(tl.float32)
        square += tl.sum(wide * wide, 1).to(tl.float64)
        if SPLIT:
            hi, lo = split(a)
            U = add_product(w, tl.trans(hi), U)
            U = add_product(w, tl.trans(lo), U)
            G = add_product(hi, tl.trans(hi), G)
            G = add_product(hi, tl.trans(lo), G)
            G = add_product(lo, tl.trans(hi), G)
            G = add_product(lo, tl.trans(lo), G)
        else:
            U = add_product(wide, tl.trans(a), U)
            G = add_product(a, tl.trans(a), G)
    inside = (rows < n)[:, None] & (ranks < rank)[None, :]
    b = tl.load(B + rows[:, None] * rank + ranks[None, :], inside, 0.0).to(tl.float32)
    change = tl.sum(b * add_product(b, G, 2 * U), 1)
    own = tl.sum(tl.where(ranks[:, None] == ranks[None, :], G, 0.0), 0)  # ||s a_k||^2
    parts = square.to(tl.float32) + tl.sum(b * b * own[None, :], 1)
    odd = (own < 1e-30) | (own > 1e30)
    odd_rows = tl.sum(((b != 0) & odd[None, :]).to(tl.int32), 1)
    store_norm(norm, W, A, B, rows, square, change, parts, odd_rows, s, rest, n, w_row, m, rank, 32)


@triton.jit
def split_kernel(out, A, s, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    hi, lo = split(s * tl.load(A + at, at < size, 0.0).to(tl.float32))
    tl.store(out + at, hi, at < size)
    tl.store(out + size + at, lo, at < size)


@triton.jit
def large_norm_kernel(
    norm, W, A, B, U, G, s, rest, n, w_row, m: tl.constexpr, rank: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The same for a large rank, given U = W [hi; lo]^T (n, 2 rank) and G = s^2 A A^T."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    square = tl.zeros((ROWS,), tl.float64)
    for start in range(0, m, COLS):
        cols = start + tl.arange(0, COLS)
        at = rows.to(tl.int64)[:, None] * w_row + cols[None, :]
        wide = tl.load(W + at, (rows < n)[:, None] & (cols < m)[None, :], 0.0).to(tl.float32)
        square += tl.sum(wide * wide, 1).to(tl.float64)
    change = tl.zeros((ROWS,), tl.float32)
    parts = square.to(tl.float32)
    odd_rows = tl.zeros((ROWS,), tl.int32)
    for k0 in range(0, rank, RANK):
        k = k0 + tl.arange(0, RANK)
        inside = (rows < n)[:, None] & (k < rank)[None, :]
        at = rows[:, None] * 2 * rank + k[None, :]
        mixed = 2 * (tl.load(U + at, inside, 0.0) + tl.load(U + at + rank, inside, 0.0))
        for j0 in range(0, rank, RANK):
            j = j0 + tl.arange(0, RANK)
            here = (rows < n)[:, None] & (j < rank)[None, :]
            b = tl.load(B + rows[:, None] * rank + j[None, :], here, 0.0).to(tl.float32)
            here = (j < rank)[:, None] & (k < rank)[None, :]
            g = tl.load(G + j[:, None] * rank + k[None, :], here, 0.0)
            mixed = add_product(b, g, mixed)
        b = tl.load(B + rows[:, None] * rank + k[None, :], inside, 0.0).to(tl.float32)
        own = tl.load(G + k * rank + k, k < rank, 0.0)
        change += tl.sum(b * mixed, 1)
        parts += tl.sum(b * b * own[None, :], 1)
        odd = (own < 1e-30) | (own > 1e30)
        odd_rows += tl.sum(((b != 0) & odd[None, :]).to(tl.int32), 1)
    store_norm(norm, W, A, B, rows, square, change, parts, odd_rows, s, rest, n, w_row, m, rank, 32)


def _norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    out, inner = weight.shape
    norm = torch.empty(out, dtype=torch.float32, device=weight.device)
    rank = max(16, triton.next_power_of_2(lora_A.shape[0]))
    rows = 32 if out >= 2048 else 16
    split_A = weight.dtype == torch.bfloat16 and inner >= 256
    cols = 2048 // rank if split_A else 1024 // rank  # as many as the registers take
    cols = max(cols, 64) if split_A else cols
    s = ctypes.c_float(scaling).value
    arguments = (s, scaling - s, out, weight.stride(0), inner, lora_A.shape[0])
    options = {"ROWS": rows, "COLS": cols, "RANK": rank, "SPLIT": split_A, "num_warps": 8}
    grid = (blocks(out, rows),)
    if not launch(norm_kernel, grid, weight, norm, weight, lora_A, lora_B, *arguments, **options):
        norm.copy_(dora.plain_norm(weight, lora_A, lora_B, scaling))
    return norm


def _split(lora_A: Tensor, scaling: float) -> Tensor:
    rank, inner = lora_A.shape
    parts = torch.empty(2 * rank, inner, dtype=torch.bfloat16, device=lora_A.device)
    size = lora_A.numel()
    if not launch(
        split_kernel, (blocks(size, 1024),), lora_A, parts, lora_A, scaling, size, BLOCK=1024
    ):
        scaled = scaling * lora_A.float()
        parts[:rank] = scaled
        parts[rank:] = scaled - parts[:rank]
    return parts


def _large_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, U: Tensor, G: Tensor, scaling: float
) -> Tensor:
    out, inner = weight.shape
    norm = torch.empty(out, dtype=torch.float32, device=weight.device)
    s = ctypes.c_float(scaling).value
    arguments = (s, scaling - s, out, weight.stride(0), inner, lora_A.shape[0])
    if not launch(
        large_norm_kernel, (blocks(out, 32),), weight,
        norm, weight, lora_A, lora_B, U, G, *arguments,
        ROWS=32, COLS=256, RANK=64,
    ):  # fmt: skip
        norm.copy_(dora.plain_norm(weight, lora_A, lora_B, scaling))
    return norm


# ---- The outputs ----


@triton.jit
def compose_kernel(
    y, base, h, B, magnitude, norm, bias, tokens, n, rank: tl.constexpr,
    TOKENS: tl.constexpr, OUT: tl.constexpr, RANK: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y = g (base + h B^T) + bias, rounded once; where KEEP is set, u = base + h B^T over base."""
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    low = tl.zeros((TOKENS, OUT), tl.float32)
    for start in range(0, rank, RANK):
        k = start + tl.arange(0, RANK)
        inside = (t < tokens)[:, None] & (k < rank)[None, :]
        left = tl.load(h + t.to(tl.int64)[:, None] * rank + k[None, :], inside, 0.0)
        inside = (k < rank)[:, None] & (o < n)[None, :]
        right = tl.load(B + o[None, :] * rank + k[:, None], inside, 0.0).to(left.dtype)
        low = add_product(left, right, low)
    at = t.to(tl.int64)[:, None] * n + o[None, :]
    inside = (t < tokens)[:, None] & (o < n)[None, :]
    u = tl.load(base + at, inside, 0.0).to(tl.float32) + low
    m = tl.load(magnitude + o, o < n, 0.0).to(tl.float32)
    length = tl.load(norm + o, o < n, 1.0)
    g = tl.where(length == 0, 1.0, tl.div_rn(m, length))
    scaled = g[None, :] * u
    if BIAS:
        scaled += tl.load(bias + o, o < n, 0.0).to(tl.float32)[None, :]
    tl.store(y + at, scaled, inside)
    if KEEP:
        tl.store(base + at, u, inside)


def plain_compose(
    base: Tensor, h: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = g u + bias and u = base + h B^T, (tokens, out), in the dtype of base."""
    u = base.float() + h.float() @ lora_B.to(h.dtype).float().T
    y = dora.magnitude_over_norm(magnitude.float(), norm) * u
    if bias is not None:
        y = y + bias.float()
    return y.to(base.dtype), u.to(base.dtype)


def _compose(
    base: Tensor, h: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor,
    bias: Tensor | None, keep: bool,
) -> Tensor:  # fmt: skip
    (tokens, out), rank = base.shape, h.shape[1]
    y = torch.empty_like(base)
    block = 64 if tokens > 16 else 16
    k = min(64 if base.itemsize == 2 else 32, max(16, triton.next_power_of_2(rank)))
    if not launch(
        compose_kernel, (blocks(out, 128), blocks(tokens, block)), base,
        y, base, h, lora_B, magnitude, norm, bias, tokens, out, rank,
        TOKENS=block, OUT=128, RANK=k, BIAS=bias is not None, KEEP=keep, num_warps=8,
    ):  # fmt: skip
        y, u = plain_compose(base, h, lora_B, magnitude, norm, bias)
        base.copy_(u)
    return y


@triton.jit
def compose_backward_kernel(
    d_u, d_m, dy, u, magnitude, norm, tokens, n, dy_row,
    TOKENS: tl.constexpr, OUT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """d_u = g dy, and one partial sum of dy u / norm for each STEPS * TOKENS tokens."""
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    m = tl.load(magnitude + o, o < n, 0.0).to(tl.float32)
    length = tl.load(norm + o, o < n, 1.0)
    g = tl.where(length == 0, 1.0, tl.div_rn(m, length))
    total = tl.zeros((OUT,), tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(1) * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        t = t.to(tl.int64)
        inside = (t < tokens)[:, None] & (o < n)[None, :]
        d = tl.load(dy + t[:, None] * dy_row + o[None, :], inside, 0.0).to(tl.float32)
        v = tl.load(u + t[:, None] * n + o[None, :], inside, 0.0).to(tl.float32)
        total += tl.sum(d * v, 0)
        tl.store(d_u + t[:, None] * n + o[None, :], g[None, :] * d, inside)
    total = tl.where(length == 0, 0.0, tl.div_rn(total, length))
    tl.store(d_m + tl.program_id(1) * n + o, total, o < n)


def plain_compose_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """d_u = g dy, (tokens, out), and d_m = sum(dy u) / norm, (1, out); 0 where the norm is 0."""
    d_u = dora.magnitude_over_norm(magnitude.float(), norm) * dy
    d_g = (dy.float() * u.float()).sum(0, keepdim=True)
    return d_u.to(dy.dtype), d_g / norm.masked_fill(norm == 0, torch.inf)


def _compose_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, out = u.shape
    parts = blocks(tokens, 128)
    d_u = torch.empty_like(u)
    d_m = torch.empty(parts, out, dtype=torch.float32, device=u.device)
    if not launch(
        compose_backward_kernel, (blocks(out, 128), parts), u,
        d_u, d_m, dy, u, magnitude, norm, tokens, out, dy.stride(0), TOKENS=16, OUT=128, STEPS=8,
    ):  # fmt: skip
        d_u, row = plain_compose_backward(dy, u, magnitude, norm)
        d_m.zero_()[0] = row[0]
    return d_u, d_m


# ---- The operators: what torch.compile, the meta device and a dispatch mode see ----

_norm_op = torch.library.custom_op("minidora::norm", _norm, mutates_args=())
_split_op = torch.library.custom_op("minidora::split", _split, mutates_args=())
_large_norm_op = torch.library.custom_op("minidora::large_norm", _large_norm, mutates_args=())
_compose_op = torch.library.custom_op("minidora::compose", _compose, mutates_args=("base",))
_compose_backward_op = torch.library.custom_op(
    "minidora::compose_backward", _compose_backward, mutates_args=()
)


@_norm_op.register_fake
@_large_norm_op.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float32)


@_split_op.register_fake
def _(lora_A: Tensor, _: float) -> Tensor:
    return lora_A.new_empty(2 * lora_A.shape[0], lora_A.shape[1], dtype=torch.bfloat16)


@_compose_op.register_fake
def _(base: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(base)


@_compose_backward_op.register_fake
def _(dy: Tensor, u: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(
        blocks(u.shape[0], 128), u.shape[1], dtype=torch.float32
    )


def _direct(tensor: Tensor) -> bool:
    """On a GPU a kernel is started directly: the dispatcher takes longer than most kernels."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


def forms_norm(weight: Tensor, lora_A: Tensor) -> bool:
    """Whether factored_norm takes this rank: a large one wants a product of bf16 in float32."""
    large = weight.dtype == torch.bfloat16 and hasattr(torch.ops.aten.mm, "dtype")
    return len(lora_A) <= MAX_RANK or large


def factored_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W + s B A||_row, (out,), in float32: one launch up to MAX_RANK, else five."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    A, B = lora_A.contiguous(), lora_B.contiguous()
    direct = _direct(weight)
    if len(A) <= MAX_RANK:
        return (_norm if direct else _norm_op)(weight, A, B, scaling)
    parts = (_split if direct else _split_op)(A, scaling)
    U = torch.mm(weight, parts.T, out_dtype=torch.float32)
    G = torch.mm(parts, parts.T, out_dtype=torch.float32).view(2, len(A), 2, len(A)).sum((0, 2))
    return (_large_norm if direct else _large_norm_op)(weight, A, B, U, G, scaling)


def compose(
    base: Tensor, h: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor,
    bias: Tensor | None, keep: bool,
) -> Tensor:  # fmt: skip
    """y = g (base + h B^T) + bias, (tokens, out); where keep is set, base becomes u."""
    call = _compose if _direct(base) else _compose_op
    return call(base, h, lora_B.contiguous(), magnitude, norm, bias, keep)


def compose_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """d_u = g dy, (tokens, out), and the magnitude's gradient in partial sums, (parts, out)."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    call = _compose_backward if _direct(u) else _compose_backward_op
    return call(dy, u, magnitude, norm)
