"""The gradients of lesson 5, against autograd and equation 7."""

import pytest
import torch
import torch.nn.functional as F

from minidora.adapt import adapt
from minidora.data import load_text, random_windows
from minidora.evidence.gradients import batches, weight_gradients
from minidora.models import CharGPT

TEXT = load_text("source")[:2000]


def small() -> CharGPT:
    torch.manual_seed(0)
    return CharGPT(context=16, layers=2, heads=2, width=16).double()


def loss_of(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def test_of_a_plain_layer_it_is_the_weights_own_gradient() -> None:
    model = small()
    (windows,) = batches(TEXT, 1, size=4, context=16)
    layers = [block.v_proj for block in model.blocks]
    found = weight_gradients(model, layers, windows)
    loss_of(model, windows).backward()
    for gradient, layer in zip(found, layers, strict=True):
        assert torch.allclose(gradient, layer.weight.grad, rtol=1e-10, atol=1e-14)
    before = loss_of(model, windows)
    assert not any(layer._forward_hooks for layer in layers)
    assert torch.equal(loss_of(model, windows), before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_of_an_adapted_layer_it_gives_the_gradients_of_what_is_trained(kind: str) -> None:
    model = adapt(small(), kind, rank=2, alpha=4.0, target_modules=["q_proj"])
    layer = model.blocks[1].q_proj
    with torch.no_grad():
        layer.lora_B.normal_()
        if kind == "dora":
            layer.magnitude.mul_(1.3)
    (windows,) = batches(TEXT, 1, size=4, context=16)
    (gradient,) = weight_gradients(model, [layer], windows)
    loss_of(model, windows).backward()
    if kind == "dora":  # equation 7
        unit = F.normalize(layer.effective_weight().detach(), dim=1)
        assert torch.allclose((gradient * unit).sum(1), layer.magnitude.grad, rtol=1e-8, atol=1e-13)
    else:
        of_B = layer.scaling * gradient @ layer.lora_A.detach().T
        assert torch.allclose(of_B, layer.lora_B.grad, rtol=1e-8, atol=1e-13)


def test_batches_are_the_same_each_time_and_differ() -> None:
    first, again = ([*batches(TEXT, 3, size=2, context=8)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(first[0], random_windows(TEXT, 2, 9, generator))
