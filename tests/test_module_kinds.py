"""Layers and models of many kinds: adapted right, or refused by name with nothing changed.

Each kind of KINDS builds a module from 6 features to 6, with at least one linear layer. Models of
one kind, and random chains of kinds, are adapted, trained a step, merged, copied, reloaded and
unloaded. The oracle is the model as it was, with W' of the papers' formulas, in float64, as the
weight of each adapted layer: torch.func.functional_call runs it, and no line of the package does.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import minidora
from minidora import DoRALinear, LoRALinear, adapt, disable_adapters
from minidora.adapt import adapter_layers

WIDTH = 6
F64 = torch.float64


def linear(out: int = WIDTH, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, out, bias=bias, dtype=F64)


# ---- kinds that work ---------------------------------------------------------------------------


class Named(nn.Linear):
    """A subclass that computes what its parent does."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, dtype=F64)
        self.label = "named"


class Squared(nn.Module):
    """A parametrization written by a user."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.abs() + 0.1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


class Twice(nn.Module):
    """One layer (or block) under two names."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.again = shared, nn.Tanh(), shared

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.between(self.first(x)))
        return y


class Tied(nn.Module):
    """Two layers with one weight, and a third reader of it that is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = linear(), linear(bias=False)
        self.two.weight = self.one.weight
        self.table = nn.Embedding(WIDTH, WIDTH, dtype=F64)
        self.table.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.tanh(self.one(x))) + self.table(torch.tensor([1]))
        return y


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {"list": nn.ModuleList([linear(), nn.Sequential(nn.ReLU(), linear())])}
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts["list"]:  # type: ignore[union-attr]
            x = x + part(x)
        return x


class Checkpointed(Wrapper):
    """The oracle does without: its weights are in place during the call alone."""

    without = False

    def forward(self, x: Tensor) -> Tensor:
        if self.without:
            return super().forward(x)
        y: Tensor = torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)
        return y


class ByKeyword(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(input=x)
        return y


def hooked(register: Callable[[nn.Linear], object]) -> nn.Linear:
    layer = linear()
    register(layer)
    return layer


def pruned(times: int) -> nn.Linear:
    layer = linear()
    for _ in range(times):
        prune.random_unstructured(layer, "weight", 0.3)
    return layer


def with_old_norm(norm: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(linear())


def with_buffer() -> nn.Linear:
    layer = linear()
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


def with_weight(change: Callable[[Tensor], Tensor]) -> nn.Linear:
    layer = linear()
    layer.weight = nn.Parameter(change(layer.weight.detach()))
    return layer


def with_frozen_norm() -> nn.Module:
    norm = nn.BatchNorm1d(WIDTH, dtype=F64)
    norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return nn.Sequential(linear(), nn.Flatten(0, -2), norm.eval().requires_grad_(False), linear())


def compiled_in_place() -> nn.Module:
    block = nn.Sequential(linear(), nn.Tanh(), linear())
    block.compile(backend="eager")
    return block


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": linear,
    "without a bias": lambda: linear(bias=False),
    "subclass": Named,
    "weight_norm": lambda: weight_norm(linear()),
    "spectral_norm": lambda: spectral_norm(linear()),
    "orthogonal": lambda: orthogonal(linear()),
    "parametrized by a user": lambda: parametrize.register_parametrization(
        linear(), "weight", Squared()
    ),
    "parametrized bias": lambda: parametrize.register_parametrization(linear(), "bias", Squared()),
    "older weight_norm": lambda: with_old_norm(old_weight_norm),
    "older spectral_norm": lambda: with_old_norm(old_spectral_norm),
    "pruned": lambda: pruned(1),
    "pruned three times": lambda: pruned(3),
    "pre-hook": lambda: hooked(
        lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    ),
    "forward hook": lambda: hooked(
        lambda layer: layer.register_forward_hook(lambda m, args, y: y.sin() + m.bias)
    ),
    "hooks with keywords": lambda: hooked(
        lambda layer: layer.register_forward_hook(
            lambda m, args, kwargs, y: y + args[0], with_kwargs=True
        )
    ),
    "hook on gradients": lambda: hooked(
        lambda layer: layer.register_full_backward_hook(
            lambda m, dx, dy: (dx[0] if dx[0] is None else 3 * dx[0],)
        )
    ),
    "pruned and hooked": lambda: prune.l1_unstructured(  # type: ignore[no-any-return]
        hooked(lambda layer: layer.register_forward_hook(lambda m, args, y: 2 * y)), "weight", 5
    ),
    "tied weights": Tied,
    "shared layer": lambda: Twice(linear()),
    "shared block": lambda: Twice(nn.Sequential(linear(), nn.Tanh())),
    "frozen BatchNorm": with_frozen_norm,
    "attention": Attention,
    "encoder layer": lambda: nn.TransformerEncoderLayer(
        WIDTH, 2, 8, dropout=0.0, batch_first=True, dtype=F64
    ),
    "nested": Nested,
    "wrapped": lambda: Wrapper(Wrapper(nn.Sequential(linear(), nn.GELU(), linear()))),
    "called by keyword": lambda: ByKeyword(linear()),
    "checkpointed": lambda: Checkpointed(nn.Sequential(linear(), nn.Tanh())),
    "DataParallel": lambda: nn.DataParallel(nn.Sequential(linear(), nn.Tanh())),
    "compiled block": lambda: torch.compile(
        nn.Sequential(linear(), nn.Tanh(), linear()), backend="eager"
    ),
    "compiled layer": lambda: torch.compile(linear(), backend="eager"),
    "compiled in place": compiled_in_place,
    "traced by torch.fx": lambda: fx.symbolic_trace(nn.Sequential(linear(), nn.ReLU(), linear())),
    "weight in a buffer": with_buffer,
    "transposed weight": lambda: with_weight(lambda w: w.T.contiguous().T),
    "a zero row": lambda: with_weight(lambda w: w * (torch.arange(WIDTH) != 2)[:, None]),
}


def build(kinds: list[str], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(KINDS[kind]() for kind in kinds))


def plainly_weighted(model: nn.Module, names: list[str]) -> nn.Module:
    """The oracle: what computes the weight of these layers is removed, by torch's own means."""
    for name in names:
        layer = model.get_submodule(name)
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
        elif prune.is_pruned(layer):
            prune.remove(layer, "weight")
        elif hasattr(layer, "weight_g"):
            remove_weight_norm(layer)
        elif hasattr(layer, "weight_u"):
            remove_spectral_norm(layer)
    return model


def closed_form(layer: LoRALinear, weight: Tensor) -> Tensor:
    """W' with its gradients, from the papers' formulas."""
    v = weight + layer.alpha / layer.rank * (layer.lora_B @ layer.lora_A)
    if not isinstance(layer, DoRALinear):
        return v
    norm = v.detach().pow(2).sum(1).sqrt()
    return torch.where(norm == 0, 1, layer.magnitude / norm)[:, None] * v


class Oracle:
    """The model as it was, run with W' in the place of each adapted layer's weight."""

    def __init__(self, plain: nn.Module, adapted: nn.Module) -> None:
        self.layers = dict(adapter_layers(adapted))
        self.weights = {
            name: plain.get_submodule(name).weight.detach().clone() for name in self.layers
        }
        self.plain = plainly_weighted(plain, list(self.layers))
        for module in self.plain.modules():
            if isinstance(module, Checkpointed):
                module.without = True

    def __call__(self, x: Tensor) -> Tensor:
        weights = {
            f"{name}.weight": closed_form(layer, self.weights[name])  # type: ignore[arg-type]
            for name, layer in self.layers.items()
        }
        y: Tensor = torch.func.functional_call(self.plain, weights, (x,), tie_weights=False)
        return y


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """All that training must not move."""
    values = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    values.update(model.named_buffers())
    return {name: value.detach().clone() for name, value in values.items()}


def class_names(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def modes(model: nn.Module) -> list[bool]:
    return [type(m) is nn.BatchNorm1d or m.training for m in model.modules()]


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its older functions
        yield


def train(model: nn.Module, mode: bool = True) -> nn.Module:
    """The mode of everything but a frozen BatchNorm."""
    for module in model.train(mode).modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model


def check(kinds: list[str], method: str, seed: int) -> None:
    def fresh() -> nn.Module:
        return train(build(kinds, seed), False)

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)

    x = torch.randn(3, 4, WIDTH, dtype=F64)
    plain, model = fresh(), fresh()
    pretrained = plain(x).detach()
    close(model(x), pretrained)
    target = "all-linear" if len(list(model.modules())) > 2 else ["0"]
    adapt(model, method, rank=2, alpha=3.0, target_modules=target)
    close(model(x), pretrained)

    oracle = Oracle(plain, model)
    for parameter in trainable(model):
        parameter.data += 0.2 * torch.randn_like(parameter)
    before = snapshot(model)
    for mode in (True, False):
        train(model, mode)
        train(oracle.plain, mode)
        inputs = [x.clone().requires_grad_(), *trainable(model)]
        expected = oracle(inputs[0])
        y = model(inputs[0])
        close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.pow(3).sum(), inputs, allow_unused=True),
            torch.autograd.grad(expected.pow(3).sum(), inputs, allow_unused=True),
            rtol=1e-8,
            atol=1e-10,
        )
    train(model)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    model(x).pow(2).mean().backward()
    optimizer.step()
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    train(model, False)
    with torch.no_grad():
        expected, y = oracle(x), model(x)
        close(y, expected)
        with disable_adapters(model):
            close(model(x), pretrained)
        close(copy.deepcopy(model)(x), expected)
        again = adapt(fresh(), method, rank=2, alpha=3.0, target_modules=target)
        again.load_state_dict(minidora.adapter_state_dict(model), strict=False)
        close(again(x), expected)
        again = adapt(train(build(kinds, seed + 1), False), method, rank=2, alpha=3.0)
        again.load_state_dict(model.state_dict())
        close(again(x), expected)
        minidora.merge(again)
        close(again(x), expected)

        minidora.merge(model)
        close(model(x), expected)
        with disable_adapters(model):
            close(model(x), pretrained)
        minidora.unmerge(model)
        assert torch.equal(model(x), y)
        assert minidora.merge_and_unload(train(model)) is model
        assert modes(model) == modes(train(oracle.plain))
        assert class_names(model) == class_names(oracle.plain)
        assert model.state_dict().keys() == oracle.plain.state_dict().keys()
        close(train(model, False)(x), expected)
        close(copy.deepcopy(model)(x), expected)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_module_equals_the_closed_form(kind: str, method: str) -> None:
    with quietly():
        check([kind], method, seed=0)


@pytest.mark.slow
@settings(
    deadline=None,
    derandomize=True,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    kinds=st.lists(
        st.sampled_from([k for k in KINDS if "compiled" not in k]), min_size=2, max_size=4
    ),
    method=st.sampled_from(["lora", "dora"]),
    seed=st.integers(0, 1000),
)
def test_random_models_equal_the_closed_form(kinds: list[str], method: str, seed: int) -> None:
    with quietly():
        check(kinds, method, seed)


# ---- kinds that are refused: no closed form exists, or nothing can take the layer's place --------


class Triangular(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.tril(), self.bias)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(super().__call__(x))  # type: ignore[no-any-return]


class Transposing(nn.Linear):
    """Its weight is computed by its class."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.original.T  # type: ignore[operator, return-value]


class Sharded(Tensor):
    """Like DTensor and torchao's tensors: made of other tensors, as torch is told here."""

    def __tensor_flatten__(self) -> object:
        raise NotImplementedError


def transposing() -> nn.Linear:
    layer = linear()
    layer.original = layer.weight
    del layer.weight
    layer.__class__ = Transposing
    return layer


class Listing(nn.Module):
    """Its layers are called from a plain list, where nothing can be put in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.stack = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = layer(x)
        return x


def offloaded() -> nn.Linear:
    layer = linear()
    layer.forward = lambda x: nn.Linear.forward(layer, x)  # type: ignore[method-assign]
    return layer


def computed_by_a_hook() -> nn.Linear:
    layer = linear()
    layer.g = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.weight = layer.g * 2
    layer.register_forward_pre_hook(lambda m, args: setattr(m, "weight", m.g * 2))
    return layer


def stored_as(make: Callable[[Tensor], Tensor]) -> nn.Linear:
    layer = linear()
    layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
    return layer


def made_in_inference_mode() -> nn.Linear:
    with torch.inference_mode():
        return linear()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own forward": (lambda: Triangular(6, 6), "1: this Triangular has a"),
    "own call": (lambda: Called(6, 6), "1: this Called has a forward of its own"),
    "fake quantization": (
        lambda: torch.ao.nn.qat.Linear(6, 6, qconfig=torch.ao.quantization.default_qat_qconfig),
        "1: this Linear has a forward of its own",
    ),
    "offloading": (offloaded, "1: this Linear has a forward of its own .* offloading"),
    "lazy": (lambda: nn.LazyLinear(6), "1: this LazyLinear has no weight yet: run the model once"),
    "weight of the class": (transposing, "1: the weight of this Transposing is"),
    "weight of a hook": (computed_by_a_hook, "1: the weight of this Linear is neither a parameter"),
    "float8": (
        lambda: stored_as(lambda w: w.to(torch.float8_e4m3fn)),
        "1: base.weight must be floating point .* got torch.float8_e4m3fn: dequantize",
    ),
    "int8": (lambda: stored_as(lambda w: w.to(torch.int8)), "1: .* got torch.int8: dequantize"),
    "complex": (lambda: stored_as(lambda w: w.to(torch.complex64)), "1: .* got torch.complex64"),
    "sparse": (lambda: stored_as(lambda w: w.to_sparse()), "1: .* dense tensor, .*sparse_coo"),
    "sharded": (
        lambda: stored_as(lambda weight: weight.as_subclass(Sharded)),
        "1: base.weight must be a plain dense tensor, got ",
    ),
    "inference mode": (made_in_inference_mode, "1: base.weight was made in inference mode"),
    "plain list": (Listing, r"1.a: Listing.stack holds this layer too, .* use nn.ModuleList"),
}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_kind_is_named_and_nothing_is_changed(kind: str, method: str) -> None:
    make, message = REFUSED[kind]
    with quietly():
        model = nn.Sequential(pruned(1), make(), weight_norm(linear()))
        modules = list(model.modules())
        before = [(p, p.requires_grad) for p in model.parameters()]
        states = [dict(vars(module)) for module in modules]
        with pytest.raises(ValueError, match=message):
            adapt(model, method, rank=2)
    assert list(model.modules()) == modules
    assert all(p.requires_grad == grad for p, grad in before)
    for module, kept in zip(modules, states, strict=True):
        assert vars(module).keys() == kept.keys()
        assert module.training is kept["training"]
