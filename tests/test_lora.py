"""LoRALinear against float64 closed forms and PEFT. Numbers: the properties of issue 5."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidora import DoRALinear, LoRALinear


def layer(
    in_features: int = 7, out_features: int = 5, rank: int = 3, dtype: torch.dtype = torch.float64
) -> LoRALinear:
    """A LoRA layer with a bias that is not zero, B that is not zero and s = 5 / 3."""
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(in_features, out_features, dtype=dtype), rank, alpha=5.0)
    nn.init.normal_(lora.lora_B)
    nn.init.normal_(lora.base.bias)
    return lora


def test_initialization_is_kaiming_uniform_and_zero() -> None:
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(300, 200), rank=64, alpha=8)
    assert lora.lora_A.shape == (64, 300)
    assert lora.lora_B.shape == (200, 64)
    assert not lora.lora_B.any()
    bound = 1 / math.sqrt(300)  # Kaiming-uniform with a = sqrt(5)
    assert lora.lora_A.abs().max() <= bound
    assert lora.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_p01_equals_the_base_at_the_start(dtype: torch.dtype) -> None:
    base = nn.Linear(33, 17, dtype=dtype)
    x = torch.randn(4, 33, dtype=dtype)
    expected = base(x)
    y = LoRALinear(base, rank=4, alpha=7)(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_p02_is_no_identity_once_b_is_not_zero() -> None:
    lora = layer()
    x = torch.randn(3, 7, dtype=torch.float64)
    assert not torch.allclose(lora(x), lora.base(x))


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 5 / 3), (True, 5 / math.sqrt(3))])
def test_p03_forward_and_gradients_equal_the_closed_form(use_rslora: bool, scaling: float) -> None:
    plain = layer()
    lora = LoRALinear(copy.deepcopy(plain.base), 3, alpha=5.0, use_rslora=use_rslora)
    lora.load_state_dict(plain.state_dict())
    assert lora.scaling == pytest.approx(scaling)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    weight = lora.base.weight + scaling * lora.lora_B @ lora.lora_A
    expected = x @ weight.T + lora.base.bias
    torch.testing.assert_close(lora(x), expected)
    torch.testing.assert_close(lora.effective_weight(), weight)
    torch.testing.assert_close(lora.delta_weight(), weight - lora.base.weight)
    inputs = [x, lora.lora_A, lora.lora_B]
    ours = torch.autograd.grad(lora(x).pow(3).sum(), inputs)
    theirs = torch.autograd.grad(expected.pow(3).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_p25_dropout_acts_on_the_low_rank_path_alone() -> None:
    lora = layer()
    lora.dropout.p = 0.4
    x = torch.randn(6, 7, dtype=torch.float64)
    torch.manual_seed(3)
    y = lora(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    torch.testing.assert_close(y, lora.base(x) + 5 / 3 * dropped @ lora.lora_A.T @ lora.lora_B.T)
    lora.eval()
    torch.testing.assert_close(lora(x), x @ lora.effective_weight().T + lora.base.bias)


def test_p11_merge_equals_forward_and_unmerge_is_exact() -> None:
    lora = layer(dtype=torch.bfloat16)
    weight = lora.base.weight.clone()
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    for _ in range(25):
        lora.merge()
        lora.merge()  # idempotent
        assert lora.merged
        closed = (weight.double() + 5 / 3 * lora.lora_B.double() @ lora.lora_A.double()).bfloat16()
        torch.testing.assert_close(lora.merged_weight, closed, rtol=2**-8, atol=0)
        assert torch.equal(lora(x), F.linear(x, lora.effective_weight(), lora.base.bias))
        lora.unmerge()
        assert not lora.merged
    assert torch.equal(lora.base.weight, weight)


def test_p13_merge_refuses_what_is_not_finite() -> None:
    lora = layer(dtype=torch.float16)
    lora.lora_B.data[1, 0] = 1e12  # fits float32, not float16
    with pytest.raises(ValueError, match=r"7 of 35 weights that are not finite \(in torch.float16"):
        lora.merge()
    assert not lora.merged


def test_a_merged_layer_saves_copies_and_pickles_without_applying_twice() -> None:
    lora = layer()
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = lora(x)
    lora.merge()
    assert set(lora.state_dict()) == {"lora_A", "lora_B", "base.weight", "base.bias"}
    fresh = LoRALinear(nn.Linear(7, 5, dtype=torch.float64), 3, alpha=5.0)
    fresh.load_state_dict(lora.state_dict())
    for twin in (fresh, copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        torch.testing.assert_close(twin(x), expected)
        twin.unmerge()
        torch.testing.assert_close(twin(x), expected)


def test_loading_values_ends_a_merge() -> None:
    lora, other = layer(), layer()
    other.lora_B.data.mul_(-2)
    lora.merge()
    lora.load_state_dict(other.state_dict())
    x = torch.randn(3, 7, dtype=torch.float64)
    assert not lora.merged
    torch.testing.assert_close(lora(x), other(x))


@pytest.mark.parametrize("mode", [True, False])
def test_train_and_eval_never_merge(mode: bool) -> None:
    lora = layer()
    for merged in (False, True):
        if merged:
            lora.merge()
        lora.train(mode)
        assert lora.merged is merged


def test_p21_meta_device_then_to_empty() -> None:
    with torch.device("meta"):
        lora = LoRALinear(nn.Linear(300, 20), rank=4, alpha=8)
    assert lora.lora_A.is_meta
    lora.to_empty(device="cpu")
    lora.lora_A.data.fill_(torch.nan)
    lora.reset_parameters()
    assert not lora.lora_B.any()
    assert 0 < lora.lora_A.abs().max() <= 1 / math.sqrt(300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": -1}, "rank must be a whole number of at least 1, got -1"),
        ({"rank": 2.5}, "rank must be a whole number of at least 1, got 2.5"),
        ({"rank": True}, "rank must be a whole number of at least 1, got True"),
        ({"alpha": 0}, "alpha must be a finite number above 0, got 0"),
        ({"alpha": math.nan}, "alpha must be a finite number above 0, got nan"),
        ({"alpha": "16"}, "alpha must be a finite number above 0, got '16'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"dropout": math.nan}, "dropout must be at least 0 and below 1, got nan"),
    ],
)
def test_bad_numbers_are_refused_and_leave_the_base_alone(
    arguments: dict[str, float], message: str
) -> None:
    base = nn.Linear(7, 5)
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, **{"rank": 2, "alpha": 4.0, **arguments})
    assert all(p.requires_grad for p in base.parameters())


def test_numbers_of_numpy_are_numbers() -> None:
    layer = LoRALinear(nn.Linear(7, 5), np.int64(2), np.float32(3), np.float64(0.5))  # type: ignore[arg-type]
    assert (layer.rank, layer.scaling, layer.dropout.p) == (2, 1.5, 0.5)
    assert layer(torch.ones(7)).dtype == torch.float32


def test_what_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="base must be an nn.Linear, got Conv2d"):
        LoRALinear(nn.Conv2d(3, 4, 1), rank=1, alpha=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"already adapted \(LoRALinear\)"):
        LoRALinear(layer(), rank=1, alpha=1)  # type: ignore[arg-type]
    whole = nn.Linear(3, 2)
    whole.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating point .* got torch.int8: dequantize it first"):
        LoRALinear(whole, rank=1, alpha=1)


def test_a_rank_above_the_smaller_side_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"rank 6 is above min\(in_features, out_features\) = 5"):
        LoRALinear(nn.Linear(7, 5), rank=6, alpha=1)


def test_against_peft() -> None:
    """PEFT's LoRA in float32, without dropout: outputs and all gradients."""
    import peft

    lora = layer(24, 40, 6, torch.float32)
    config = peft.LoraConfig(r=6, lora_alpha=5, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(lora.base)), config)
    inner = theirs.base_model.model[0]
    names = {"lora_A": inner.lora_A["default"].weight, "lora_B": inner.lora_B["default"].weight}
    for name, parameter in names.items():
        parameter.data.copy_(getattr(lora, name))
    x, dy = torch.randn(3, 8, 24, requires_grad=True), torch.randn(3, 8, 40)
    expected_x = x.detach().clone().requires_grad_()
    y, expected = lora(x), theirs(expected_x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in names.items():
        ours = getattr(lora, name).grad
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_hooks_of_the_base_run_around_the_adapted_layer(kind: type[LoRALinear]) -> None:
    """As they would around a plain layer with W': oracle and adapter have the same hooks."""
    torch.manual_seed(0)
    base, x = nn.Linear(7, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    seen: list[nn.Module] = []
    base.register_forward_pre_hook(lambda module, args: args[0] + 1)
    base.register_forward_pre_hook(
        lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
    )
    base.register_forward_hook(lambda module, args, y: y * args[0].sum())
    base.register_forward_hook(lambda module, args, kwargs, y: y - 3, with_kwargs=True)
    handle = base.register_forward_hook(lambda module, args, y: seen.append(module))
    plain = copy.deepcopy(base)
    lora = kind(base, 2, alpha=4.0)
    nn.init.normal_(lora.lora_B)
    plain.weight = nn.Parameter(lora.effective_weight().detach())
    torch.testing.assert_close(lora(x), plain(x))
    assert seen == [base, plain]
    lora.merge()
    torch.testing.assert_close(lora(input=x), plain(x))
    handle.remove()
    lora.enabled = False
    base.register_forward_hook(lambda module, args, y: 5 * y)  # registered later
    torch.testing.assert_close(lora(x), base(x))
    assert seen == [base, plain, base, plain]
