"""The Triton kernels against their plain forms and float64, on a GPU or in Triton's interpreter.

conftest.py sets TRITON_INTERPRET where there is no GPU. The interpreter cuts numbers off when it
stores bf16, where a GPU rounds: hence two units in the last place instead of one.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minidora import DoRALinear, LoRALinear, dora
from minidora.memory import Launches

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("minidora.fused", reason="needs Triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or the interpreter"
)


@pytest.fixture(autouse=True)
def kernels_run() -> Iterator[None]:
    """No test passes because the plain form stepped in."""
    kernels.failure = None
    yield
    assert kernels.failure is None


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers use the kernels on a CPU too, which nothing but a test wants."""
    monkeypatch.setattr(
        dora, "kernels_serve",
        lambda t: t.dtype != torch.float64 and not dora._transforms_active(),
    )  # fmt: skip


def factors(
    out: int, inner: int, rank: int, dtype: torch.dtype, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(out, inner, device=DEVICE).to(dtype)
    return (
        weight,
        0.1 * torch.randn(rank, inner, device=DEVICE),
        size * torch.randn(out, rank, device=DEVICE),
    )


def exact_norm(weight: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return (weight.double() + s * B.double() @ A.double()).norm(dim=1)


# ---- The norm ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("shape", [(33, 70, 3), (16, 300, 16), (40, 520, 29), (5, 1, 1), (1, 9, 2)])
def test_norm_equals_float64(dtype: torch.dtype, size: float, shape: tuple[int, int, int]) -> None:
    weight, A, B = factors(*shape, dtype, size)
    norm = kernels.factored_norm(weight, A, B, 4 / 3)[0]
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact_norm(weight, A, B, 4 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_float32_cannot_give(dtype: torch.dtype, large: bool) -> None:
    """Nearly cancelled to several degrees, zero, tiny, huge; tiny A beside huge B."""
    if large and dtype != torch.bfloat16:
        pytest.skip("a large rank in another dtype takes the plain form")
    rank = 70 if large else 4
    weight, A, B = factors(24, 300, rank, dtype)
    B[:12] = 0
    A[0] = weight[0].float()
    B[0, 0] = -(1 - 1e-3) / 1.5  # leaves a thousandth
    weight[1] = weight[0]
    B[1, 0] = -0.5 / 1.5  # leaves half
    weight[2] = 0
    B[2] = 0
    if dtype != torch.float16:
        weight[3] *= 1e-25
        weight[4] *= 1e25
        weight[5] = (weight[0].float() * 1e-25).to(dtype)
        B[5, 0] = -0.9e-25 / 1.5
    A[1] *= 1e-25
    B[6, 1] = 1e25
    norm = kernels.factored_norm(weight, A, B, 1.5)[0]
    exact = exact_norm(weight, A, B, 1.5)
    assert exact[0] < 2e-3 * weight[0].double().norm()
    assert norm[2] == 0
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


@pytest.fixture(autouse=True)
def wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch has no product of bf16 in float32, which a large rank wants."""
    if not CUDA:
        original = dora.product

        def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
            if left.is_cpu and dtype == torch.float32:
                return left.float() @ right.float()
            return original(left, right, dtype)

        monkeypatch.setattr(dora, "product", product)


def test_the_halves_of_a() -> None:
    _, A, _ = factors(4, 300, 70, torch.bfloat16)
    P, _ = kernels.prepare(A, 1.5, True)
    assert P.shape == (140, 300)
    torch.testing.assert_close(P[:70].float() + P[70:].float(), 1.5 * A, rtol=2**-17, atol=0)


@pytest.mark.parametrize("rank", [65, 130])
def test_norm_of_a_large_rank(rank: int) -> None:
    weight, A, B = factors(40, 300, rank, torch.bfloat16)
    norm = kernels.factored_norm(weight, A, B, 0.7)[0]
    torch.testing.assert_close(norm.double(), exact_norm(weight, A, B, 0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_weight_with_strides(dtype: torch.dtype) -> None:
    weight, A, B = factors(20, 64, 3, dtype)
    for strided in (weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :64]):
        assert not strided.is_contiguous()
        norm = kernels.factored_norm(strided, A, B, 1.0)[0]
        torch.testing.assert_close(norm.double(), exact_norm(weight, A, B, 1.0), rtol=1e-6, atol=0)


# ---- The outputs and their gradients ----


def ulps(got: Tensor, exact: Tensor, scale: Tensor, dtype: torch.dtype) -> float:
    """Largest error in units of the dtype's precision, of the size of what was added."""
    return float(((got.double() - exact).abs() / (scale * torch.finfo(dtype).eps)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "out", "rank"), [(70, 130, 5), (3, 257, 70), (1, 16, 16)])
def test_compose_and_its_backward(
    dtype: torch.dtype, bias: bool, tokens: int, out: int, rank: int
) -> None:
    torch.manual_seed(0)
    base, dy = (torch.randn(tokens, out, device=DEVICE).to(dtype) for _ in range(2))
    h = torch.randn(tokens, rank, device=DEVICE).to(dtype)
    B = torch.randn(out, rank, device=DEVICE).to(dtype).float()
    magnitude, norm = (0.5 + torch.rand(out, device=DEVICE) for _ in range(2))
    norm[1] = 0
    b = torch.randn(out, device=DEVICE).to(dtype) if bias else None

    exact_u = base.double() + h.double() @ B.double().T
    g = torch.where(norm == 0, 1.0, magnitude.double() / norm.double())
    exact_y = g * exact_u + (0 if b is None else b.double())
    size = base.double().abs() + h.double().abs() @ B.double().abs().T
    exact_m = (dy.double() * exact_u).sum(0) / norm.double().masked_fill(norm == 0, torch.inf)

    u = base.clone()
    y = kernels.compose(u, h, B, magnitude, norm, b, True)
    alone = base.clone()
    assert torch.equal(kernels.compose(alone, h, B, magnitude, norm, b, False), y)
    assert torch.equal(alone, base)
    plain_y, plain_u = kernels.plain_compose(base, h, B, magnitude, norm, b)
    y_size = g * size + (0 if b is None else b.double().abs())
    assert max(ulps(y, exact_y, y_size, dtype), ulps(plain_y, exact_y, y_size, dtype)) < 2
    assert max(ulps(u, exact_u, size, dtype), ulps(plain_u, exact_u, size, dtype)) < 2

    du, dm = kernels.compose_backward(dy, u, magnitude, norm)
    plain_du, plain_dm = kernels.plain_compose_backward(dy, plain_u, magnitude, norm)
    exact_du = g * dy.double()
    assert max(ulps(t, exact_du, exact_du.abs(), dtype) for t in (du, plain_du)) < 2
    sizes = (dy.double().abs() * size).sum(0) / norm.double().masked_fill(norm == 0, 1)
    assert max(ulps(t.sum(0), exact_m, sizes, dtype) for t in (dm, plain_dm)) < 2
    assert dm.sum(0)[1] == 0
    strided = torch.cat([dy, dy], 1)[:, :out]
    again = kernels.compose_backward(strided, u, magnitude, norm)
    assert all(torch.equal(got, want) for got, want in zip(again, (du, dm), strict=True))


# ---- One launch an operator ----


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_an_operator_is_one_launch_and_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies on meta tensors, with the launch counted instead of made."""
    launched: list[str] = []

    def count(kernel, *_, **__):  # type: ignore[no-untyped-def]
        launched.append(kernel.fn.__name__)
        return True

    monkeypatch.setattr(kernels, "launch", count)

    def half(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    def wide(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    A, B, row = wide(16, 64), wide(32, 16), wide(32)
    P, G = half(32, 64), wide(8, 16, 16)
    W, h, y = half(32, 64), half(8, 16), half(8, 32)
    calls = {
        "prepare_kernel": lambda: kernels._prepare(A, 1.0, True),
        "norm_kernel": lambda: kernels._norm(W, A, B, P, G, None, None, 1.0),
        "compose_kernel": lambda: kernels._compose(y, h, B, row, row, None, True),
        "compose_backward_kernel": lambda: kernels._compose_backward(y, y, row, row),
    }
    for name, call in calls.items():
        launched.clear()
        with Operations() as seen:
            call()
        assert launched == [name]
        assert {n.split(".")[0] for n in seen.names} <= {"empty", "empty_like"}


# ---- The layer ----


def layer(dtype: torch.dtype, bias: bool = True, dropout: float = 0.0) -> DoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=bias, device=DEVICE).to(dtype)
    made = DoRALinear(base, 6, 5.0, dropout)
    nn.init.normal_(made.lora_B, std=0.1)
    made.magnitude.data.mul_(1.2)
    return made


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_the_layer_equals_the_closed_form(
    dtype: torch.dtype, bias: bool, recompute: bool, shape: tuple[int, ...]
) -> None:
    made = layer(dtype, bias)
    made.recompute = recompute
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    with Launches() as seen:
        y = made(x)
    assert any("minidora" in name for name in seen.names) or CUDA
    dy = torch.randn_like(y)
    leaves = [x, made.lora_A, made.lora_B, made.magnitude]
    ours = [y, *torch.autograd.grad(y, leaves, dy)]

    wide = x.detach().double().requires_grad_()
    v = made.base.weight.double() + made.scaling * made.lora_B.double() @ made.lora_A.double()
    weight = (made.magnitude.double() / v.norm(dim=1).detach())[:, None] * v
    expected = wide @ weight.T + (made.base.bias.double() if bias else 0)
    theirs = [expected, *torch.autograd.grad(expected, [wide, *leaves[1:]], dy.double())]
    for got, want in zip(ours, theirs, strict=True):
        assert (got.double() - want.double()).norm() < TOLERANCE[dtype] * want.double().norm()
    with torch.no_grad():
        assert torch.equal(made(x), y)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivatives_and_dropout(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(torch.float32, dropout=dropout)
    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    leaves = [x, made.lora_A, made.lora_B, made.magnitude]

    def derivatives() -> list[Tensor]:
        torch.manual_seed(1)
        y = made(x)
        first = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.pow(2).sum() for t in first), leaves)
        torch.manual_seed(1)
        return [y, *torch.autograd.grad(made(x).pow(2).sum(), leaves), *first, *second]

    ours = derivatives()
    monkeypatch.setattr(dora, "kernels_serve", lambda tensor: False)
    for got, want in zip(ours, derivatives(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.usefixtures("everywhere")
def test_a_failure_means_the_plain_form_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(torch.float32)
    x = torch.randn(5, 24, device=DEVICE)
    expected = made(x)

    class Broken:
        def __getitem__(self, grid: object) -> object:
            raise RuntimeError("no C compiler")

    for name in ("prepare_kernel", "norm_kernel", "compose_kernel"):
        monkeypatch.setattr(kernels, name, Broken())
    monkeypatch.setattr(kernels, "failure", None)
    with pytest.warns(UserWarning, match="without its kernels: RuntimeError.*no C compiler"):
        torch.testing.assert_close(made(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = made(x)
        y.sum().backward()
    torch.testing.assert_close(y, expected)
    kernels.failure = None


def test_a_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = torch.empty(2, 24, dtype=torch.bfloat16, device="meta")
    made = layer(torch.bfloat16).to("meta")
    with Launches() as on:
        made(meta)
    monkeypatch.setattr(dora, "use_kernels", False)
    with Launches() as off:
        made(meta)
    assert any("minidora" in name for name in on.names)
    assert not any("minidora" in name for name in off.names)


def test_lora_stays_as_it_is() -> None:
    """The kernels are DoRA's: LoRA's own operations are the yardstick."""
    base = nn.Linear(24, 40, device="meta", dtype=torch.bfloat16)
    with Launches() as seen:
        LoRALinear(base, 4, 8.0)(torch.empty(2, 24, device="meta", dtype=torch.bfloat16))
    assert not any("minidora" in name for name in seen.names)


# ---- Ahead of time ----


@pytest.mark.slow
def test_a_start_is_the_one_that_triton_would_choose(tmp_path: Path) -> None:
    """Compiled for a GPU that is only pretended: same function, same arguments, in their order."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, str(Path(__file__).with_name("start_kernels.py"))]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len({row["kernel"] for row in found}) == 4
    assert [row for row in found if not row["same"]] == []
    first, second = ([row for row in found if row["turn"] == turn] for turn in (1, 2))
    assert not any(row["compiled"] or row["kept"] for row in second)
    assert {row["kept"] for row in first if not row["aligned"]} == {0}
    kept = sum(row["kept"] for row in first)
    assert (kept > 0) == kernels.TAKES_ALL  # torch 2.6's Triton starts each kernel by itself


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_every_kernel_compiles_without_spills(
    capability: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """In a process of its own, without a GPU; what is left in memory would be STACK or LOCAL.

    Triton keeps what it compiled, by the kernels' source, for the next run of this test.
    """
    cache = getattr(pytestconfig, "cache", None)
    compiled = cache.mkdir("triton") if cache else tmp_path
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(compiled)}
    program = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), capability]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    unknown = ("sm_100", "computeCapability not supported")  # the assembler, the compiler
    if capability == "100" and done.returncode and any(text in done.stderr for text in unknown):
        pytest.skip("this Triton does not know sm_100")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {row["kernel"] for row in found} == {
        "prepare_kernel", "norm_kernel", "compose_kernel", "compose_backward_kernel",
    }  # fmt: skip
    for row in found:
        assert row["LOCAL"] == 0, row
        if not triton.__version__.startswith("3.2."):  # torch 2.6's spills the largest tiles
            assert row["STACK"] <= 16, row  # four words; a spilled tile takes hundreds
        assert row["shared"] <= 100_000, row  # what the smallest of today's cards has
