# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""DoRA's own work on a GPU in four launches: Triton kernels, each beside its plain form.

    P, G     = [hi; lo] = s A,  s^2 A A^T         one pass over A           prepare
    norm     = ||W + s B A||_row                  one pass over W           norm
    y, u     = g * u + bias, base + h B^T         one pass over base        compose
    d_u, d_m = g * dy, sum(dy * u) / norm         one pass over dy and u    compose_backward

A layer is slow on a GPU when it launches much and computes little: each operation of PyTorch is a
launch, and reads and writes its tensors in full. These kernels keep what lies between in registers.

Sums are taken in float32. The tensor cores multiply numbers of half the width, so a float32 A is
split into two of them, A = hi + lo, and W A^T = W hi^T + W lo^T: 17 bits of A (the sign of lo is
one) instead of eight. Rows that nearly cancel, or whose squares leave the range of float32, are
built and summed in float64, by the program that finds them: the CPU waits for no value.

Nothing here starts a kernel: minidora.fused does. The plain form of the norm is dora.plain_norm.
Importing this needs Triton.

Reference:
    Tillet, Kung, Cox 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural
    Network Computations", MAPL 2019
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidora.dora import magnitude_over_norm

NARROW = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") in ("0", ""))


@triton.jit
def add_product(left, right, total):
    """total + left right: half precision on tensor cores, float32 as three products of TF32."""
    if not NARROW:  # the interpreter knows no products of bf16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


# ---- The norm: ||W + s B A||^2 = ||W||^2 + B (2 W P^T + G B^T), row by row ----


@triton.jit
def round_to_bf16(a):
    """Upper half of a float32's bits, to nearest: .to() of the interpreter cuts off instead."""
    return ((a.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def prepare_kernel(
    P, G, A, s, m: tl.constexpr, rank: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr,
    STEPS: tl.constexpr, SPLIT: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """P = s A, (rank, m), or its halves [hi; lo], (2 rank, m); and one part of P P^T."""
    k = tl.program_id(1) * RANK + tl.arange(0, RANK)
    g = tl.zeros((RANK, RANK), tl.float32)
    for step in range(STEPS):
        cols = (tl.program_id(0) * STEPS + step) * COLS + tl.arange(0, COLS)
        at = k[:, None] * m + cols[None, :]
        inside = (k < rank)[:, None] & (cols < m)[None, :]
        a = s * tl.load(A + at, inside, 0.0).to(tl.float32)
        if SPLIT:  # to 17 bits: two numbers of eight, and the sign of lo
            hi = round_to_bf16(a)
            tl.store(P + at, hi, inside)
            tl.store(P + rank * m + at, round_to_bf16(a - hi), inside)
        else:
            tl.store(P + at, a, inside)
        if GRAM:
            g = add_product(a, tl.trans(a), g)
    if GRAM:
        at = (k[:, None] * rank + k[None, :]) + tl.program_id(0) * rank * rank
        tl.store(G + at, g, (k < rank)[:, None] & (k < rank)[None, :])


def plain_prepare(lora_A: Tensor, scaling: float, split: bool) -> tuple[Tensor, Tensor]:
    """P and the whole of P P^T, which is s^2 A A^T."""
    a = scaling * lora_A.float()
    hi = a.bfloat16()
    return torch.cat([hi, (a - hi.float()).bfloat16()]) if split else a, a @ a.T


@triton.jit
def norm_kernel(
    norm, W, A, B, P, G, U, BG, s, rest, n, w_row, m: tl.constexpr, rank: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    SUMS: tl.constexpr, GIVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W (n, m), A (rank, m), B (n, rank), P (PARTS rank, m), G (SUMS, rank, rank).

    U = W P^T is formed here, or GIVEN as (n, PARTS rank), with BG = B G. Rows that this sum
    cannot give to float32's accuracy are built from their elements and summed in float64.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = rows.to(tl.int64)[:, None] * w_row
    r = tl.arange(0, PARTS * RANK)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    u = tl.zeros((ROWS, PARTS * RANK), tl.float32)
    for start in tl.range(0, m, COLS, num_stages=STAGES):
        cols = start + tl.arange(0, COLS)
        w = tl.load(W + line + cols[None, :], (rows < n)[:, None] & (cols < m)[None, :], 0.0)
        wide = w.to(tl.float32)
        if not GIVEN:
            in_p = (r < PARTS * rank)[None, :] & (cols < m)[:, None]
            p = tl.load(P + r[None, :] * m + cols[:, None], in_p, 0.0)
            u = add_product(w if PARTS == 2 else wide, p, u)
        squares += wide * wide
    parts = tl.sum(squares, 1)
    new = parts
    if not GIVEN:
        in_u = (rows < n)[:, None] & (r < PARTS * rank)[None, :]
        left = tl.load(B + rows[:, None] * rank + (r % rank)[None, :], in_u, 0.0).to(tl.float32)
        new += tl.sum(2 * left * u, 1)
    odd = tl.zeros((ROWS,), tl.int32)
    for k0 in range(0, rank, RANK):
        k = k0 + tl.arange(0, RANK)
        inside = (rows < n)[:, None] & (k < rank)[None, :]
        b = tl.load(B + rows[:, None] * rank + k[None, :], inside, 0.0).to(tl.float32)
        square = (k < rank)[:, None] & (k < rank)[None, :]
        if GIVEN:  # b P P^T comes as (2, n, 2, rank): one product for each half of B and of G
            at = rows[:, None] * 2 * rank + k[None, :]
            mixed = 2 * (tl.load(U + at, inside, 0.0) + tl.load(U + at + rank, inside, 0.0))
            for half in tl.static_range(2):
                at_half = BG + half * n * 2 * rank + at
                mixed += tl.load(at_half, inside, 0.0) + tl.load(at_half + rank, inside, 0.0)
            own = tl.load(G + k * rank + k, k < rank, 0.0)  # ||s a_k||^2
        else:
            g = tl.zeros((RANK, RANK), tl.float32)
            for i in range(SUMS):
                g += tl.load(G + (i * rank + k[:, None]) * rank + k[None, :], square, 0.0)
            mixed = add_product(b, g, tl.zeros((ROWS, RANK), tl.float32))
            own = tl.sum(tl.where(k[:, None] == k[None, :], g, 0.0), 0)
        new += tl.sum(b * mixed, 1)
        parts += tl.sum(b * b * own[None, :], 1)
        odd += tl.sum(((b != 0) & ((own < 1e-30) | (own > 1e30))[None, :]).to(tl.int32), 1)
    usual = (new >= 0.25 * parts) & (parts > 1e-30) & (parts < 1e30) & (odd == 0)
    lost = (usual == 0) & (rows < n)
    result = tl.sqrt(new)
    if tl.sum(lost.to(tl.int32), 0) > 0:
        exact = tl.zeros((ROWS,), tl.float64)
        for start in range(0, m, 8):
            some = start + tl.arange(0, 8)
            in_v = lost[:, None] & (some < m)[None, :]
            at_v = rows.to(tl.int64)[:, None] * w_row + some[None, :]
            v = tl.load(W + at_v, in_v, 0.0).to(tl.float64)
            for i in range(rank):
                c = tl.load(B + rows * rank + i, lost, 0.0).to(tl.float64)
                a = tl.load(A + i * m + some, some < m, 0.0).to(tl.float64)
                v += (s * c + rest * c)[:, None] * a[None, :]  # s in float64
            exact += tl.sum(v * v, 1)
        result = tl.where(lost, tl.sqrt(exact).to(tl.float32), result)
    tl.store(norm + rows, result, rows < n)


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
    y = magnitude_over_norm(magnitude.float(), norm) * u
    if bias is not None:
        y = y + bias.float()
    return y.to(base.dtype), u.to(base.dtype)


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
    sums = tl.zeros((TOKENS, OUT), tl.float32)
    for step in tl.range(0, STEPS, num_stages=3):
        t = (tl.program_id(1) * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        t = t.to(tl.int64)
        inside = (t < tokens)[:, None] & (o < n)[None, :]
        d = tl.load(dy + t[:, None] * dy_row + o[None, :], inside, 0.0).to(tl.float32)
        v = tl.load(u + t[:, None] * n + o[None, :], inside, 0.0).to(tl.float32)
        sums += d * v
        tl.store(d_u + t[:, None] * n + o[None, :], g[None, :] * d, inside)
    total = tl.where(length == 0, 0.0, tl.div_rn(tl.sum(sums, 0), length))
    tl.store(d_m + tl.program_id(1) * n + o, total, o < n)


def plain_compose_backward(
    dy: Tensor, u: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """d_u = g dy, (tokens, out), and d_m = sum(dy u) / norm, (1, out); 0 where the norm is 0."""
    d_u = magnitude_over_norm(magnitude.float(), norm) * dy
    d_g = (dy.float() * u.float()).sum(0, keepdim=True)
    return d_u.to(dy.dtype), d_g / norm.masked_fill(norm == 0, torch.inf)
