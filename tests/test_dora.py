"""DoRALinear against float64 closed forms, weight_norm(dim=0) and PEFT.

Numbers in names are those of the list of properties that a DoRA layer is held to. Every layer has
a bias that is not zero, magnitudes away from the norm, s != 1 and a shape that is not square: the
well-known bugs hide where one of these is missing.
"""

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidora import DoRALinear, LoRALinear, cached_scale, dora
from minidora.dora import Compose, dora_weight, factored_norm, magnitude_over_norm, row_norm

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]
SLOW_BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.slow)


def perturb(layer: DoRALinear, spread: float = 0.2) -> DoRALinear:
    """Move an adapter away from its start, where most mistakes are invisible."""
    with torch.no_grad():
        layer.lora_B.normal_(std=0.5 / math.sqrt(layer.in_features * layer.rank))
        layer.magnitude.mul_(1 + spread * torch.randn_like(layer.magnitude))
    return layer


def make(
    in_features: int = 7,
    out_features: int = 5,
    rank: int = 3,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    dropout: float = 0.0,
) -> DoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    if bias:
        nn.init.normal_(base.bias)
    return perturb(DoRALinear(base, rank, alpha=5.0, dropout=dropout))


def closed_form(layer: DoRALinear, detach: bool = True) -> Tensor:
    """W' in float64, written out from equation 5 without a line of the package's code."""
    v = layer.base.weight.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    norm = v.pow(2).sum(dim=1).sqrt()
    return (layer.magnitude.double() / (norm.detach() if detach else norm))[:, None] * v


def parameters(layer: DoRALinear) -> list[nn.Parameter]:
    return [layer.lora_A, layer.lora_B, layer.magnitude]


# ---- the forward pass -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "out", "in_", "small"),
    [(1, 1, 1, True), (500, 100, 140, True), (64, 200, 250, True), (500, 200, 250, False),
     (1, 300, 300, False)],
)  # fmt: skip
def test_a_small_weight_is_built_and_gives_the_same(
    tokens: int,
    out: int,
    in_: int,
    small: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two forms, chosen by size, against float64: outputs and gradients of each."""
    layer = make(in_, out, rank=1, dtype=dtype)
    x = torch.randn(1, tokens, in_, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, tokens, out, dtype=dtype)
    assert layer.is_small(x) == small

    def results(form: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = form(x)
        return [y, *torch.autograd.grad(y, [x, *parameters(layer)], dy)]

    exact = copy.deepcopy(layer).double()
    wide, bias = x.detach().double().requires_grad_(), exact.base.bias
    expected = F.linear(wide, closed_form(exact), bias)
    leaves = [wide, *parameters(exact)]
    expected_results = [expected, *torch.autograd.grad(expected, leaves, dy.double())]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for choice in (True, False):
        monkeypatch.setattr(layer, "is_small", lambda x, choice=choice: choice)
        for got, want in zip(results(layer), expected_results, strict=True):
            assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [130, 64])
def test_p01_equals_the_base_at_the_start(dtype: torch.dtype, autocast: bool, tokens: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(257, 129, dtype=dtype)
    nn.init.normal_(base.bias)
    x = torch.randn(tokens, 257, dtype=dtype)
    layer = DoRALinear(base, rank=4, alpha=7)
    assert torch.equal(layer.magnitude_scale(), torch.ones_like(layer.magnitude))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, product, y = base(x), F.linear(x, base.weight), layer(x)
    assert y.dtype == expected.dtype
    bound = 2 * torch.finfo(y.dtype).eps * (product.abs() + expected.abs())
    if not layer.is_small(x):
        assert ((y - (product + base.bias.to(y.dtype))).abs() <= bound).all()
    # With a bias some processors sum a product in another order, in float32 or float64.
    wide = torch.promote_types(dtype, torch.float32)
    terms = x.to(wide).abs() @ base.weight.to(wide).abs().T + base.bias.to(wide).abs()
    assert ((y - expected).abs() <= bound + 257 * torch.finfo(wide).eps * terms).all()


def test_p02_is_no_identity_once_the_adapter_has_moved() -> None:
    layer = make()
    x = torch.randn(3, 7, dtype=torch.float64)
    assert (layer(x) - layer.base(x)).abs().max() > 0.1


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_p03_p04_forward_and_gradients_equal_the_closed_form(
    dtype: torch.dtype, bias: bool, recompute: bool
) -> None:
    layer = make(24, 40, 6, dtype, bias)
    layer.recompute = recompute
    x = torch.randn(3, 8, 24, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 8, 40, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(dy)
    got = [y, x.grad, *(p.grad for p in parameters(layer))]

    exact = x.detach().double().requires_grad_()
    expected_y = exact @ closed_form(layer).T + (layer.base.bias.double() if bias else 0.0)
    gradients = torch.autograd.grad(expected_y, [exact, *parameters(layer)], dy.double())
    for name, ours, theirs in zip(
        ("y", "x", "lora_A", "lora_B", "magnitude"), got, [expected_y, *gradients], strict=True
    ):
        assert ours is not None
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_p03_without_gradients_the_output_is_the_same(dtype: torch.dtype, bias: bool) -> None:
    layer = make(24, 40, 6, dtype, bias)
    x = torch.randn(3, 8, 24, dtype=dtype)
    expected = layer(x)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x[0]), layer(x)[0]) or dtype in (torch.float32, torch.float64)


def test_p04_the_norm_is_detached_and_by_the_known_term() -> None:
    """Equations 6 and 11: the full gradient is the detached one less its part along each row."""
    layer = make()
    x = torch.randn(9, 7, dtype=torch.float64)
    delta = layer.delta_weight().detach().requires_grad_()

    def gradient(detach_norm: bool) -> Tensor:
        weight = dora_weight(layer.base.weight, delta, layer.magnitude, detach_norm)
        return torch.autograd.grad(F.linear(x, weight).pow(2).sum(), delta)[0]

    detached, full = gradient(True), gradient(False)
    v = F.normalize((layer.base.weight + delta).detach(), dim=1)
    along = (detached * v).sum(1, keepdim=True) * v
    torch.testing.assert_close(full, detached - along)
    assert along.norm() > 0.05 * detached.norm()
    assert not layer.weight_norm().requires_grad


@pytest.mark.parametrize("detach_norm", [False, True])
def test_dora_weight_equals_weight_norm(detach_norm: bool) -> None:
    """Salimans and Kingma's w = g v / ||v||, per output neuron, is DoRA with the full gradient."""
    layer = make()
    v = (layer.base.weight + layer.delta_weight()).detach()
    oracle = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5, dtype=torch.float64), dim=0)
    oracle.parametrizations.weight.original0.data.copy_(layer.magnitude[:, None])
    oracle.parametrizations.weight.original1.data.copy_(v)
    delta = torch.zeros_like(v, requires_grad=True)
    weight = dora_weight(v, delta, layer.magnitude, detach_norm)
    torch.testing.assert_close(weight, oracle.weight)
    direction = torch.randn_like(v)
    weight.backward(direction)
    oracle.weight.backward(direction)
    torch.testing.assert_close(
        layer.magnitude.grad, oracle.parametrizations.weight.original0.grad[:, 0]
    )
    same = torch.allclose(delta.grad, oracle.parametrizations.weight.original1.grad)  # type: ignore[arg-type]
    assert same is not detach_norm


def test_against_peft() -> None:
    """PEFT 0.21's DoRA in float32, without dropout: outputs and all gradients."""
    import peft

    layer = make(24, 40, 6, torch.float32)
    config = peft.LoraConfig(r=6, lora_alpha=5, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base)), config)
    inner = theirs.base_model.model[0]
    names = {
        "lora_A": inner.lora_A["default"].weight,
        "lora_B": inner.lora_B["default"].weight,
        "magnitude": inner.lora_magnitude_vector["default"].weight,
    }
    for name, parameter in names.items():
        parameter.data.copy_(getattr(layer, name))
    x = torch.randn(3, 8, 24)
    dy = torch.randn(3, 8, 40)
    y, expected = layer(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.backward(dy)
    expected.backward(dy)
    for name, parameter in names.items():
        torch.testing.assert_close(
            getattr(layer, name).grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=name
        )


def test_pefts_dropout_reaches_the_base_product_too() -> None:
    """PEFT in training: W x + (g - 1) W drop(x) + g s B A drop(x), as lesson 3 says."""
    import peft

    layer = make(12, 9, 4, torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=5, lora_dropout=0.5, use_dora=True, target_modules=["0"]
    )
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base)), config)
    inner = theirs.base_model.model[0]
    inner.lora_A["default"].weight.data.copy_(layer.lora_A)
    inner.lora_B["default"].weight.data.copy_(layer.lora_B)
    inner.lora_magnitude_vector["default"].weight.data.copy_(layer.magnitude)
    W, s, g = layer.base.weight, layer.scaling, layer.magnitude_scale()
    x = torch.randn(5, 12)
    torch.manual_seed(1)
    y = theirs.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    ours = g * (x @ W.T + s * (dropped @ layer.lora_A.T) @ layer.lora_B.T) + layer.base.bias
    torch.testing.assert_close(y, ours + (g - 1) * ((dropped - x) @ W.T), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, ours, atol=1e-2)
    torch.testing.assert_close(theirs.eval()(x), layer(x), rtol=1e-4, atol=1e-5)


def test_p05_magnitude_is_the_row_norm_at_the_start_and_after_a_reset() -> None:
    layer = make()
    expected = layer.base.weight.pow(2).sum(1).sqrt()
    assert not torch.allclose(layer.magnitude, expected)
    layer.reset_parameters()
    assert layer.magnitude.shape == (5,)
    torch.testing.assert_close(layer.magnitude.data, expected)
    layer.base = nn.Linear(7, 5, dtype=torch.float64)
    layer.reset_parameters()
    torch.testing.assert_close(layer.magnitude.data, layer.base.weight.data.pow(2).sum(1).sqrt())
    assert DoRALinear(nn.Linear(3, 2).bfloat16(), 1, 1.0).magnitude.dtype == torch.float32


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)])
def test_p10_shapes(shape: tuple[int, ...]) -> None:
    layer = make()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = x @ closed_form(layer).T + layer.base.bias
    torch.testing.assert_close(y, expected)
    leaves = [x, *parameters(layer)]
    ours = torch.autograd.grad(y.pow(2).sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.pow(2).sum(), leaves))
    assert ours[0].shape == shape


@pytest.mark.parametrize("dims", [2, 3])
def test_p10_input_and_gradient_that_are_not_contiguous(dims: int) -> None:
    layer = make()
    x = torch.randn(7, 6, 4, dtype=torch.float64).permute(2, 1, 0)[::2]
    dy = torch.randn(5, 6, 2, dtype=torch.float64).permute(2, 1, 0)
    if dims == 2:
        x, dy = x[:, 0], dy[:, 0]
    x.requires_grad_()
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    y, expected = layer(x), x @ closed_form(layer).T + layer.base.bias
    torch.testing.assert_close(y, expected)
    leaves = [x, *parameters(layer)]
    ours = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves, dy))


def test_a_wrong_input_gets_the_error_of_a_linear_layer() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make()(torch.randn(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("autocast", [None, *HALF])
def test_p23_output_dtype_is_that_of_the_base(
    dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    layer = make(24, 40, 6, dtype)
    x = torch.randn(3, 24, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x)
        assert y.dtype == layer.base(x).dtype
        norm = layer.weight_norm()
        assert norm.dtype == torch.float32
    v = layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(norm.double(), v.norm(dim=1), rtol=1e-6, atol=0)
    expected = x.double() @ closed_form(layer).T + layer.base.bias.double()
    assert (y.double() - expected).norm() < 0.02 * expected.norm()
    leaves = [x, *parameters(layer)]
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, dy)
    assert [grad.dtype for grad in ours] == [dtype, *[torch.float32] * 3]
    theirs = torch.autograd.grad(expected, leaves, dy.double())
    for got, want in zip(ours, theirs, strict=True):
        assert (got.double() - want.double()).norm() < 0.02 * want.double().norm()


@pytest.mark.parametrize("dtype", HALF)
def test_p20_p23_a_layer_moved_to_half_precision(dtype: torch.dtype) -> None:
    """.to(dtype) rounds the adapter too; the norm of what it then holds stays float32."""
    layer = make(24, 40, 6, torch.float32).to(dtype)
    assert all(p.dtype == dtype for p in layer.parameters())
    x = torch.randn(3, 24, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    norm = layer.weight_norm()
    assert norm.dtype == torch.float32
    v = layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(norm.double(), v.norm(dim=1), rtol=1e-6, atol=0)
    expected = x.double() @ closed_form(layer).T + layer.base.bias.double()
    leaves = [x, *parameters(layer)]
    dy = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, leaves, dy)]
    theirs = [expected, *torch.autograd.grad(expected, leaves, dy.double())]
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want.double()).norm() < TOLERANCE[dtype] * want.double().norm()


@pytest.mark.parametrize("spread", [0.0, 0.002, 0.2])
@pytest.mark.parametrize(("in_features", "out_features"), [(256, 1024), (1024, 256), (4096, 512)])
def test_accuracy_in_bf16(spread: float, in_features: int, out_features: int) -> None:
    """At most 1.6 times the error of a plain bf16 linear layer; one rounding more gives 1.7."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, dtype=torch.bfloat16)
    layer = perturb(DoRALinear(base, 16, alpha=32.0), spread)
    x = torch.randn(512, in_features, dtype=torch.bfloat16)
    assert 512 * out_features >= 1e5

    def error(y: Tensor, weight: Tensor) -> float:
        exact = x.double() @ weight.T + base.bias.double()
        return float((y.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())

    with torch.no_grad():
        ours = error(layer(x), closed_form(layer))
        plain = error(base(x), base.weight.double())
    assert ours <= 1.6 * plain, f"{ours / plain:.2f} times the error of a plain layer"


@pytest.mark.parametrize("recompute", [False, True])
def test_p25_dropout_acts_on_the_low_rank_path_alone(recompute: bool) -> None:
    layer = make(dropout=0.4)
    layer.recompute = recompute
    x = torch.randn(6, 3, 7, dtype=torch.float64)
    v = layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A
    g = layer.magnitude / v.norm(dim=1).detach()
    torch.manual_seed(3)
    y = layer(x)
    gradients = torch.autograd.grad(y.pow(2).sum(), parameters(layer))
    torch.manual_seed(3)
    low = layer.scaling * F.dropout(x, 0.4) @ layer.lora_A.T @ layer.lora_B.T
    expected = g * (x @ layer.base.weight.T + low) + layer.base.bias
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.pow(2).sum(), parameters(layer))
    )
    layer.eval()
    torch.testing.assert_close(layer(x), x @ closed_form(layer).T + layer.base.bias)


# ---- the norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("scaling", [0.0, 0.1, 1.0, 3.0])
def test_p06_factored_norm_equals_the_dense_norm(
    dtype: torch.dtype, rank: int, scaling: float
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 130).to(dtype)
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    lora_A, lora_B = torch.randn(rank, 130, dtype=adapter), torch.randn(96, rank, dtype=adapter)
    dense = (weight.double() + scaling * lora_B.double() @ lora_A.double()).norm(dim=1)
    norm = factored_norm(weight, lora_A, lora_B, scaling)
    assert norm.dtype == adapter
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(norm.double(), dense, rtol=tolerance, atol=0)


@pytest.mark.parametrize("residual", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_p06_a_row_that_nearly_cancels_keeps_its_digits_on_a_cpu(residual: float) -> None:
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(4, 50), torch.randn(30, 4)
    weight = -(lora_B @ lora_A)
    weight[::2] += residual * torch.randn(15, 50)
    weight[1::2] += torch.randn(15, 50)
    exact = (weight.double() + lora_B.double() @ lora_A.double()).norm(dim=1)
    norm = factored_norm(weight, lora_A, lora_B, 1.0)
    # What is left is the rounding of W and B A themselves, here about 1e-7 of their size.
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6 + 2e-6 / residual, atol=0)


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e-12, 1.0, 1e12, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p07_rows_of_any_size_are_treated_alike(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 50)
    weight[::2] *= size
    weight = weight.to(dtype)
    exact = weight.double().norm(dim=1)
    torch.testing.assert_close(row_norm(weight).double(), exact, rtol=1e-6, atol=0)
    base = nn.Linear(50, 6, bias=False, dtype=dtype)
    base.weight.data.copy_(weight)
    layer = DoRALinear(base, 2, alpha=4.0)
    x = torch.randn(3, 50).to(dtype)
    torch.testing.assert_close(layer(x), base(x))
    layer.magnitude.data.mul_(1.5)
    torch.testing.assert_close(layer(x), 1.5 * base(x), rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e-12, 1.0, 1e12, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p07_rows_of_any_size_with_an_update_as_large(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scale = torch.ones(6)
    scale[::2] = size
    base = nn.Linear(50, 6, bias=False, dtype=dtype)
    base.weight.data.copy_(scale[:, None] * torch.randn(6, 50))
    layer = DoRALinear(base, 2, alpha=4.0)
    layer.lora_B.data.copy_(scale[:, None] * torch.randn(6, 2))
    delta = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    exact = (layer.base.weight.double() + delta).norm(dim=1)
    torch.testing.assert_close(layer.weight_norm().double(), exact, rtol=1e-6, atol=0)
    x, dy = torch.randn(3, 50).to(dtype), torch.randn(3, 6).to(dtype)
    y, expected = layer(x), x.double() @ closed_form(layer).T
    small = torch.finfo(dtype).eps
    for row in range(6):  # each by its own size
        error = (y[:, row].double() - expected[:, row]).norm()
        assert error < 4 * small * expected[:, row].norm()
    ours = torch.autograd.grad(y, parameters(layer), dy)
    theirs = torch.autograd.grad(expected, parameters(layer), dy.double())
    for got, want in zip(ours, theirs, strict=True):
        assert (got.double() - want.double()).norm() < 20 * small * want.double().norm()


def test_p07_a_zero_row_gives_finite_values_and_learns() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    base.weight.data[1] = 0.0
    layer = DoRALinear(base, rank=2, alpha=4.0)
    assert layer.magnitude_scale()[1] == 1.0
    x = torch.randn(64, 6)
    target = x @ torch.randn(6, 4)
    optimizer = torch.optim.Adam(parameters(layer), lr=0.02)
    losses = []
    for _ in range(300):
        loss = (layer(x) - target)[:, 1].pow(2).mean()  # of the zero row alone
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters(layer))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_magnitude_over_norm_is_one_and_flat_where_the_norm_is_zero() -> None:
    magnitude = torch.tensor([0.0, 3.0, 6.0], requires_grad=True)
    g = magnitude_over_norm(magnitude, torch.tensor([0.0, 0.0, 2.0]))
    assert g.tolist() == [1.0, 1.0, 3.0]
    g.sum().backward()
    assert magnitude.grad is not None
    assert magnitude.grad.tolist() == [0.0, 0.0, 0.5]


# ---- gradients and training -------------------------------------------------------------------


def test_p08_every_parameter_gets_a_gradient_and_moves() -> None:
    layer = DoRALinear(nn.Linear(7, 5), 3, alpha=5.0)
    start = [p.detach().clone() for p in parameters(layer)]
    optimizer = torch.optim.SGD(parameters(layer), lr=0.1)
    x, target = torch.randn(32, 7), torch.randn(32, 5)
    for _ in range(2):  # the gradient of A is zero while B is
        optimizer.zero_grad()
        (layer(x) - target).pow(2).mean().backward()
        assert layer.magnitude.grad is not None
        assert layer.magnitude.grad.abs().min() > 0
        optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(parameters(layer), start, strict=True))


def test_p09_accumulated_gradients_are_the_sum() -> None:
    layer = make()
    batches = torch.randn(4, 6, 7, dtype=torch.float64)
    for batch in batches:
        layer(batch).pow(2).sum().backward()
    accumulated = [p.grad.clone() for p in parameters(layer) if p.grad is not None]
    layer.zero_grad()
    whole = torch.autograd.grad(layer(batches).pow(2).sum(), parameters(layer))
    torch.testing.assert_close(accumulated, list(whole))


def test_p09_gradcheck_once_and_twice() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def compose(base: Tensor, low: Tensor | None, g: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = Compose.apply(base, low, g, bias)[0]
        return y

    torch.manual_seed(0)
    for low, bias in [(leaf(3, 4), leaf(4)), (None, leaf(4)), (leaf(3, 4), None), (None, None)]:
        arguments = (leaf(3, 4), low, leaf(4), bias)
        assert torch.autograd.gradcheck(compose, arguments)
        assert torch.autograd.gradgradcheck(compose, arguments)
    layer = make()
    for layer.recompute in (False, True):
        assert torch.autograd.gradcheck(layer, leaf(3, 7))
        assert torch.autograd.gradgradcheck(layer, leaf(3, 7))


@pytest.mark.parametrize("recompute", [False, True])
def test_p09_gradient_checkpointing_and_a_layer_used_twice(recompute: bool) -> None:
    layer = make(7, 7)
    layer.recompute = recompute
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    leaves = [x, *parameters(layer)]
    plain = torch.autograd.grad(layer(layer(x).tanh()).pow(2).sum(), leaves)
    weight, bias = closed_form(layer), layer.base.bias
    closed = F.linear(F.linear(x, weight, bias).tanh(), weight, bias)
    torch.testing.assert_close(plain, torch.autograd.grad(closed.pow(2).sum(), leaves))
    y = checkpoint(layer, checkpoint(layer, x, use_reentrant=False).tanh(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.pow(2).sum(), leaves), plain)


def test_an_unfrozen_base_is_trained_too() -> None:
    layer = make()
    layer.base.requires_grad_(True)
    x = torch.randn(4, 7, dtype=torch.float64)
    leaves = [layer.base.weight, layer.base.bias]
    ours = torch.autograd.grad(layer(x).pow(2).sum(), leaves)
    closed = x @ closed_form(layer).T + layer.base.bias
    torch.testing.assert_close(ours, torch.autograd.grad(closed.pow(2).sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, SLOW_BF16])
@pytest.mark.parametrize("recompute", [False, True])
def test_p27_compiles_whole(dtype: torch.dtype, recompute: bool) -> None:
    layer = make(24, 40, 6, dtype)
    layer.recompute = recompute
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24, dtype=dtype, requires_grad=True)
    y, expected = compiled(x), layer(x)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    leaves = [x, *parameters(layer)]
    ours = torch.autograd.grad(y.float().pow(2).sum(), leaves)
    theirs = torch.autograd.grad(expected.float().pow(2).sum(), leaves)
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, SLOW_BF16])
@pytest.mark.parametrize("cached", [False, True])
def test_p27_compiles_whole_without_gradients(dtype: torch.dtype, cached: bool) -> None:
    layer = make(24, 40, 6, dtype).eval()
    x = torch.randn(3, 24, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), cached_scale(layer) if cached else nullcontext():
        expected = layer(x)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(compiled(x), expected, rtol=tolerance, atol=tolerance)
    if cached:  # the graph that holds g must not outlive the context
        layer.magnitude.data.mul_(2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=tolerance, atol=tolerance)
            assert not torch.allclose(compiled(x), expected, rtol=0.1)


# ---- merging, saving, moving ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_p11_p14_merge_equals_forward_and_unmerge_is_exact(dtype: torch.dtype) -> None:
    layer = make(24, 40, 6, dtype)
    weight = layer.base.weight.clone()
    x = torch.randn(9, 24, dtype=dtype)
    expected = layer(x)
    for _ in range(25):
        layer.merge()
        layer.merge()  # idempotent
        closed = closed_form(layer)
        size = layer.base.weight.double().abs() + layer.delta_weight().double().abs()
        work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        error = (layer.effective_weight().double() - closed).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * closed.abs() + 10 * work * size).all()
        assert torch.equal(layer(x), F.linear(x, layer.effective_weight(), layer.base.bias))
        layer.unmerge()
    assert torch.equal(layer.base.weight, weight)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_p22_copies_and_saved_layers_never_apply_an_adapter_twice(merged: bool) -> None:
    layer = make()
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = layer(x)
    if merged:
        layer.merge()
    assert set(layer.state_dict()) == {
        "lora_A",
        "lora_B",
        "magnitude",
        "base.weight",
        "base.bias",
    }
    fresh = DoRALinear(nn.Linear(7, 5, dtype=torch.float64), 3, alpha=5.0)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), expected)
        twin.unmerge()
        torch.testing.assert_close(twin(x), expected)
        twin.magnitude.data.mul_(2)  # its own
        torch.testing.assert_close(layer(x), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*magnitude"):
        lora = LoRALinear(nn.Linear(7, 5, dtype=torch.float64), 3, alpha=5.0)
        fresh.load_state_dict(lora.state_dict())


def _fused(layer: DoRALinear, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    layer(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
    optimizer(parameters(layer)).step()


CHANGES: dict[str, Callable[[DoRALinear], object]] = {
    "write to .data": lambda layer: layer.lora_B.data.mul_(-2),
    "replace .data": lambda layer: setattr(layer.magnitude, "data", layer.magnitude.data * 2),
    "change the base": lambda layer: layer.base.weight.data.add_(0.5),
    "load": lambda layer: layer.load_state_dict(
        {key: value * 1.5 for key, value in layer.state_dict().items()}
    ),
    "load, assign": lambda layer: layer.load_state_dict(
        {key: value * 1.5 for key, value in layer.state_dict().items()}, assign=True
    ),
    "replace the base": lambda layer: setattr(
        layer, "base", nn.Linear(7, 5, dtype=torch.float64).requires_grad_(False)
    ),
    "to float32 and back": lambda layer: layer.float().double(),
    "AdamW fused": lambda layer: _fused(layer, lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "AdamW foreach": lambda layer: _fused(layer, lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "SGD fused": lambda layer: _fused(layer, lambda p: torch.optim.SGD(p, 0.1, fused=True)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_p20_nothing_goes_stale(change: str, training: bool) -> None:
    layer = make().train(training)
    x = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
    CHANGES[change](layer)
    with torch.no_grad():
        after = layer(x)
        assert not torch.equal(after, before) or change.startswith("to ")
        torch.testing.assert_close(after, x @ closed_form(layer).T + layer.base.bias)


def test_p21_meta_device_then_to_empty() -> None:
    with torch.device("meta"):
        layer = DoRALinear(nn.Linear(30, 20), rank=4, alpha=8)
    assert layer(torch.empty(3, 30, device="meta")).shape == (3, 20)
    layer.to_empty(device="cpu")
    weight = torch.randn(20, 30)
    layer.base.weight.data.copy_(weight)
    layer.base.bias.data.zero_()
    layer.reset_parameters()
    x = torch.randn(3, 30)
    assert torch.equal(layer.magnitude, row_norm(weight))
    torch.testing.assert_close(layer(x), x @ weight.T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_the_closed_form(dtype: torch.dtype) -> None:
    layer = make(24, 40, 6, dtype).cuda()
    x = torch.randn(3, 8, 24, dtype=dtype, device="cuda", requires_grad=True)
    y = layer(x)
    expected = x.double() @ closed_form(layer).T + layer.base.bias.double()
    leaves = [x, *parameters(layer)]
    dy = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, leaves, dy)]
    theirs = [expected, *torch.autograd.grad(expected, leaves, dy.double())]
    for got, want in zip(ours, theirs, strict=True):
        assert (got.double() - want.double()).norm() < TOLERANCE[dtype] * want.double().norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [6, 40])  # 40: a float32 W's norm is not the kernels' then
@pytest.mark.parametrize("bias", [True, False])
def test_cuda_autocast_equals_the_plain_form(
    rank: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 base under autocast to bf16: with the kernels, without them, and in float64."""
    fused = pytest.importorskip("minidora.fused", reason="needs Triton")
    launched: list[str] = []
    launch = fused.launch

    def noting(kernel: Any, *args: Any, **options: Any) -> bool:
        done: bool = launch(kernel, *args, **options)
        launched.extend([kernel.fn.__name__] if done else [])
        return done

    monkeypatch.setattr(fused, "launch", noting)
    layer = make(72, 40, rank, torch.float32, bias).cuda()
    x = torch.randn(3, 24, 72, device="cuda", requires_grad=True)
    dy = torch.randn(3, 24, 40, dtype=torch.bfloat16, device="cuda")
    leaves = [x, *parameters(layer)]

    def step() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    with_kernels = step()
    assert {"compose_kernel", "compose_backward_kernel"} <= set(launched)
    monkeypatch.setattr(dora, "use_kernels", False)
    launched.clear()
    without = step()
    assert not launched
    expected = x.double() @ closed_form(layer).T
    if bias:
        expected = expected + layer.base.bias.double()
    exact = [expected, *torch.autograd.grad(expected, leaves, dy.double())]
    for ours, plain, want in zip(with_kernels, without, exact, strict=True):
        assert ours.dtype == plain.dtype
        for one, other in ((ours, plain), (ours, want), (plain, want)):
            difference = one.double() - other.double()
            assert difference.norm() < TOLERANCE[torch.bfloat16] * want.double().norm()


# ---- torch.func -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_class", [LoRALinear, DoRALinear])
def test_func_transforms_equal_a_loop(layer_class: type[LoRALinear], dtype: torch.dtype) -> None:
    """vmap over stacked models, grad inside it, jvp: what trains many adapters at once."""
    torch.manual_seed(0)
    base = nn.Linear(24, 40, dtype=dtype)
    layers = [layer_class(copy.deepcopy(base), 4, 8.0) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(3, 5, 24, dtype=dtype)
    stacked, buffers = torch.func.stack_module_state(layers)

    def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layers[0], (values, buffers), (one,))
        return y.float().pow(2).sum()

    tolerance = TOLERANCE[dtype]
    gradients = torch.func.vmap(torch.func.grad(loss))(stacked, x)
    for k, layer in enumerate(layers):
        layer.zero_grad()
        layer(x[k]).float().pow(2).sum().backward()
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                error = (gradients[name][k] - parameter.grad).norm()
                assert error <= 2 * tolerance * parameter.grad.norm(), name
    one = {name: value[0].float().to(value.dtype) for name, value in stacked.items()}
    tangent = {name: torch.randn_like(value) for name, value in one.items()}
    slope = torch.func.jvp(lambda values: loss(values, x[0]), (one,), (tangent,))[1]
    first = torch.func.grad(loss)(one, x[0])
    expected = sum((first[name].float() * tangent[name].float()).sum() for name in one)
    torch.testing.assert_close(slope, expected, rtol=20 * tolerance, atol=20 * tolerance)
