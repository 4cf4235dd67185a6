"""What the DoRA layer costs, counted in bytes, and the context that computes g once.

Bytes are counted from the storages that operations make (minidora.memory.LiveBytes); what is
asserted does not depend on the machine. Times are never asserted: see `minidora bench`.
"""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidora import DoRALinear, LoRALinear, adapt, cached_scale, dora, merge, reuse_norms
from minidora.dora import row_norm
from minidora.memory import Launches, LiveBytes

TOKENS, IN, OUT, RANK = 96, 256, 320, 8


def layers(dtype: torch.dtype, dropout: float = 0.0) -> tuple[LoRALinear, DoRALinear]:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, dtype=dtype)
    lora = LoRALinear(copy.deepcopy(base), RANK, 16.0, dropout)
    dora = DoRALinear(base, RANK, 16.0, dropout)
    nn.init.normal_(lora.lora_B)
    dora.load_state_dict(lora.state_dict(), strict=False)
    dora.magnitude.data.mul_(1.2)
    return lora, dora


def held_and_peak(layer: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a forward pass leaves behind for the backward pass (without its output), and the
    most that were alive at once in both passes. The input and the parameters existed before."""
    x = torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True)
    dy = torch.randn(TOKENS, OUT, dtype=dtype)
    gc.collect()
    with LiveBytes() as watch:
        y = layer(x)
        held = watch.now - y.untyped_storage().nbytes()
        y.backward(dy)
    return held, watch.peak


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(dtype, marks=pytest.mark.slow)
          for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    ],
)  # fmt: skip
def test_p26_held_for_backward(dtype: torch.dtype) -> None:
    lora, dora = layers(dtype)
    output = TOKENS * OUT * dtype.itemsize
    lora_held, _ = held_and_peak(lora, dtype)
    dora_held, _ = held_and_peak(dora, dtype)
    # LoRA holds (tokens, rank) and the rounded factors; DoRA one output more, and g.
    assert 0 < lora_held < output / 2
    assert output <= dora_held - lora_held <= output + 3 * OUT * 8


@pytest.mark.slow
def test_p26_recompute_holds_no_more_than_lora() -> None:
    lora, dora = layers(torch.float32)
    dora.recompute = True
    x_and_parameters = 4 * (TOKENS * IN + OUT * IN + RANK * (IN + OUT) + 2 * OUT)
    lora_held, _ = held_and_peak(lora, torch.float32)
    dora_held, _ = held_and_peak(dora, torch.float32)
    assert dora_held + x_and_parameters <= 1.01 * (lora_held + x_and_parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p26_no_temporary_of_the_size_of_w(dtype: torch.dtype) -> None:
    """A token or two through a large layer: nothing near the size of W is ever alive."""
    base = nn.Linear(1024, 2048, dtype=dtype)
    layer = DoRALinear(base, 4, 8.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 1024, dtype=dtype, requires_grad=True)
    with LiveBytes() as watch:
        layer(x).sum().backward()
    assert watch.peak < base.weight.untyped_storage().nbytes() * (
        0.05 if dtype == torch.float32 else 0.4
    )


def test_the_count_sees_what_it_should() -> None:
    """The counter itself, on a layer whose bytes are known: a trainable linear layer holds x."""
    held, _ = held_and_peak(nn.Linear(IN, OUT), torch.float32)
    assert held == 0  # x existed before
    held, _ = held_and_peak(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh()), torch.float32)
    assert held == 0  # tanh holds its output alone
    held, _ = held_and_peak(nn.Sequential(nn.Linear(IN, OUT), nn.GELU()), torch.float32)
    assert held == 4 * TOKENS * OUT  # its input


# ---- On a GPU, counted on the meta device, which takes the same path ----


def gpu_layers(rank: int = 16, bias: bool = True) -> tuple[LoRALinear, DoRALinear]:
    pytest.importorskip("triton", reason="without Triton a GPU takes the plain form")
    base = nn.Linear(4096, 4096, bias=bias, dtype=torch.bfloat16, device="meta")
    return LoRALinear(copy.deepcopy(base), rank, 32.0), DoRALinear(base, rank, 32.0)


def launches(layer: nn.Module, tokens: int = 4096) -> tuple[Launches, Launches]:
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layer.zero_grad()
    with Launches() as forward:
        y = layer(x)
    with Launches() as backward:
        y.backward(torch.empty_like(y))
    return forward, backward


def test_the_counter_counts_launches_and_their_bytes() -> None:
    x, w = torch.empty(8, 4, device="meta"), torch.empty(16, 4, device="meta")
    with Launches() as seen:
        y = x @ w.T
        y.view(4, 32)[1:].add_(1.0)
        torch.empty_like(y)
    assert seen.names == ["aten.mm.default", "aten.add_.Tensor"]
    assert seen.bytes == 4 * (8 * 4 + 16 * 4 + 8 * 16) + 4 * 2 * 3 * 32


@pytest.mark.skipif(not dora.MIXED_MM, reason="torch 2.6 lacks the products that the kernels need")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [16, 64])
def test_launches_beside_lora(bias: bool, rank: int) -> None:
    lora, dora = gpu_layers(rank, bias)
    lora_forward, lora_backward = launches(lora)
    forward, backward = launches(dora)
    assert len(lora_forward.names) >= 5
    assert len(forward.names) <= len(lora_forward.names) + 6
    assert len(backward.names) <= len(lora_backward.names) + 3
    with reuse_norms(dora):
        reused, again = launches(dora)
    assert len(reused.names) <= len(lora_forward.names) + 1
    assert len(again.names) <= len(lora_backward.names) + 3
    for seen in (forward, backward, reused, again):  # a CUDA graph cannot read a value back
        assert not {"item", "_local_scalar_dense", "equal", "nonzero"} & {
            name.split(".")[1] for name in seen.names
        }


def test_bytes_moved_beside_lora() -> None:
    lora, dora = (sum(seen.bytes for seen in launches(layer)) for layer in gpu_layers())
    assert dora <= 1.6 * lora


def test_a_step_on_a_gpu_holds_one_tensor_more_and_nothing_wide() -> None:
    found = {}
    for layer in gpu_layers():
        x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        dy = torch.empty_like(x)
        with LiveBytes() as watch:
            layer(x).backward(dy)
        found[type(layer)] = watch.peak
        largest = max(b - a for a, b in zip([0, *watch.history], watch.history, strict=False))
        assert largest < 4 * 4096 * 4096  # a float32 tensor of the size of W or of y
    assert found[DoRALinear] <= 1.03 * found[LoRALinear] + 2 * 4096 * 4096


# ---- reuse_norms ------------------------------------------------------------------------------


def trained(net: nn.Module, batches: list[Tensor], checkpointed: bool) -> list[Tensor]:
    """Outputs and accumulated gradients of micro-batches."""
    net.zero_grad()
    outputs = []
    for x in batches:
        y = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
        y.pow(2).sum().backward()
        outputs.append(y.detach())
    return outputs + [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_reuse_norms_is_bit_identical_and_computes_each_norm_once(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model().train()
    batches = [torch.randn(5, 6) for _ in range(3)]
    calls = norms_counted(monkeypatch)
    monkeypatch.setattr(dora, "SMALL", 0)  # a small W is built, and its norm is not factored
    expected = trained(net, batches, checkpointed)
    assert len(calls) == 2 * 3 * (1 + checkpointed)
    calls.clear()
    with reuse_norms(net):
        with reuse_norms(net):
            got = trained(net, batches, checkpointed)
        got = trained(net, batches, checkpointed)
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    net[0].lora_B.data.mul_(2)
    assert not torch.equal(net(batches[0]), expected[0])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_contexts_change_nothing_in_small_layers(checkpointed: bool) -> None:
    """Where W is small W' is built, within the contexts and outside."""
    net = model().train()
    batches = [torch.randn(5, 6) for _ in range(3)]
    expected = trained(net, batches, checkpointed)
    with reuse_norms(net):
        got = trained(net, batches, checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    net.eval()
    with torch.no_grad():
        outside = net(batches[0])
        with cached_scale(net):
            assert torch.equal(net(batches[0]), outside)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("context", [reuse_norms, cached_scale])
def test_a_step_of_this_models_optimizer_is_refused_and_another_passes(
    context: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    net, other = model(), model()
    for each in (net, other):
        each(torch.ones(1, 6)).sum().backward()
    before = [p.clone() for p in net.parameters()]
    mine, theirs = sgd(net), sgd(other)
    with context(net):
        theirs.step()
        with pytest.raises(RuntimeError, match=f"step within {context.__name__}.*step after it"):
            mine.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    mine.step()
    assert not all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("load_state_dict", lambda n: n.load_state_dict(n.state_dict())),
        ("merge", merge),
        ("reset_parameters", lambda n: n[0].reset_parameters()),
    ],
)
def test_reuse_norms_refuses(what: str, action: Callable[[nn.Module], object]) -> None:
    net = model().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with reuse_norms(net), pytest.raises(RuntimeError, match=f"{what} within reuse_norms"):
        action(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    action(net)


def test_reuse_norms_wants_a_dora_layer_and_leaves_no_trace_in_copies() -> None:
    with pytest.raises(ValueError, match="Linear has no DoRALinear"), reuse_norms(nn.Linear(2, 2)):
        pass
    net = model().train()
    with reuse_norms(net):
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        net.eval()
        net.train()
    for twin in twins:
        twin[0].lora_B.data.mul_(3)
        sgd(twin)
        v = twin[0].base.weight + twin[0].delta_weight()
        weight = (twin[0].magnitude / v.norm(dim=1))[:, None] * v
        torch.testing.assert_close(twin[0].effective_weight(), weight)
        twin.load_state_dict(net.state_dict())
        twin[0].merge()
    assert net[0].cached_norm is None


# ---- cached_scale -----------------------------------------------------------------------------


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = adapt(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), rank=2, alpha=6.0)
    for name, parameter in net.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    assert isinstance(net, nn.Sequential)
    return net.eval()


def norms_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = DoRALinear.weight_norm
    monkeypatch.setattr(
        DoRALinear, "weight_norm", lambda layer: (calls.append(1), original(layer))[1]
    )
    return calls


def test_cached_scale_computes_g_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(), torch.randn(5, 6)
    calls = norms_counted(monkeypatch)
    monkeypatch.setattr(dora, "SMALL", 0)  # a small W is built, and its norm is not factored
    with torch.no_grad():
        expected = net(x)
        assert len(calls) == 2
        with cached_scale(net):
            for _ in range(3):
                assert torch.equal(net(x), expected)
            with cached_scale(net):
                assert torch.equal(net(x), expected)
            assert torch.equal(net(x), expected)
        assert len(calls) == 4
        net[0].magnitude.mul_(2)
        assert not torch.equal(net(x), expected)


REFUSED: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "gradients": ("forward pass with gradients .* torch.no_grad", lambda n: n(torch.ones(1, 6))),
    "train": ("train within cached_scale", lambda n: n.train()),
    "load": ("load_state_dict within cached_scale", lambda n: n.load_state_dict(n.state_dict())),
    "load a part": ("load_state_dict", lambda n: n[2].load_state_dict(n[2].state_dict())),  # type: ignore[index]
    "merge": ("merge within cached_scale", merge),
}


@pytest.mark.parametrize("what", REFUSED)
def test_cached_scale_refuses_and_leaves_the_model_as_it_was(what: str) -> None:
    net = model()
    message, action = REFUSED[what]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with cached_scale(net), pytest.raises(RuntimeError, match=message):
        action(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert not net[0].merged
    net.train()
    net.load_state_dict(before)
    merge(net)  # allowed again


def test_cached_scale_wants_an_evaluated_dora_model() -> None:
    with pytest.raises(ValueError, match="Linear has no DoRALinear"), cached_scale(nn.Linear(2, 2)):
        pass
    net = model().train()
    with pytest.raises(ValueError, match="call model.eval"), cached_scale(net):
        pass
    assert net[0].cached_g is None


def saved_and_loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_made_within_cached_scale_is_free_of_it(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    net, x = model(), torch.randn(5, 6)
    with cached_scale(net):
        twin = copied(net)
    twin[0].magnitude.data.mul_(3)
    v = twin[0].base.weight + twin[0].delta_weight()
    expected: Tensor = x @ ((twin[0].magnitude / row_norm(v))[:, None] * v).T + twin[0].base.bias
    torch.testing.assert_close(twin[0](x), expected)
    twin.train().load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(x), net(x))
