"""fit_many against one call of fit for each model, and its promises to those who share a step."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minidora import DoRALinear, adapt
from minidora.data import Images
from minidora.models import CharGPT, MultilayerPerceptron
from minidora.stack import ManyAdam, Stack, bytes_of_a_run, kinds, why_one_by_one
from minidora.training import History, evaluate, fit, fit_many, fit_text, fit_text_many

METHODS = ["full", "lora", "dora"]


def blobs(count: int = 60, seed: int = 0, classes: int = 3) -> Images:
    """Points around one centre a class, in float64: there rounding is 1e-16 and not 1e-7."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    centres = 2 * torch.randn(classes, 6, generator=torch.Generator().manual_seed(7))
    x = centres[y] + torch.randn(count, 6, generator=generator)
    return Images(x.double(), y, torch.arange(count))


class Counting(MultilayerPerceptron):
    """A perceptron that counts its forward calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return super().forward(x)


def perceptron(method: str = "full", seed: int = 0, rank: int = 2, **settings: float) -> nn.Module:
    torch.manual_seed(seed)
    model = Counting(6, 8, 7, 3).double()
    return model if method == "full" else adapt(model, method, rank=rank, alpha=4, **settings)


def one_by_one(models: list[nn.Module], train: object, **settings: object) -> list[History]:
    """The oracle: fit, called for each."""

    def of(value: object, k: int) -> object:
        return value[k] if isinstance(value, list) else value

    return [
        fit(m, of(train, k), progress=False, **{key: of(v, k) for key, v in settings.items()})
        for k, m in enumerate(models)
    ]


def agree(first: list[History], second: list[History], rel: float = 1e-9) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.best.number == b.best.number
        assert len(a.epochs) == len(b.epochs)
        for left, right in zip(a.epochs, b.epochs, strict=True):
            assert left.number == right.number
            assert left.train_loss == pytest.approx(right.train_loss, rel=rel, nan_ok=True)
            if left.validation is None or right.validation is None:
                assert left.validation is right.validation is None
                continue
            assert left.validation.loss == pytest.approx(right.validation.loss, rel, nan_ok=True)
            assert left.validation.accuracy == right.validation.accuracy


@pytest.fixture(autouse=True)
def no_warning() -> object:
    """A warning says that a group went one by one: then these tests would show nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("method", METHODS)
def test_equals_one_call_of_fit_for_each(method: str) -> None:
    settings = {
        "epochs": 12,
        "learning_rate": [0.003, 0.01, 0.03, 0.1, 0.01],
        "seed": [0, 1, 2, 3, 3],
        "validation": [blobs(30, seed=k) for k in (11, 12, 13, 14, 14)],
        "patience": 2,
        "batch_size": 16,  # 60 images: the last batch is smaller
    }
    trains = [blobs(seed=k) for k in range(4)] + [blobs(seed=3)]
    models = [perceptron(method, seed=k) for k in range(5)]
    alone = copy.deepcopy(models)
    together = fit_many(models, trains, progress=False, **settings)
    agree(together, one_by_one(alone, trains, **settings))
    assert len({len(history.epochs) for history in together}) > 1  # some stopped before others
    for ours, theirs in zip(models, alone, strict=True):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=name)
            assert p.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_to_float32(method: str) -> None:
    images = Images(blobs().x.float(), blobs().y, blobs().index)
    models = [perceptron(method, seed=k).float() for k in range(3)]
    settings = {"epochs": 3, "learning_rate": 0.01, "seed": [0, 1, 2], "batch_size": 16}
    alone = copy.deepcopy(models)
    together = fit_many(models, images, progress=False, **settings)
    agree(together, one_by_one(alone, images, **settings), rel=1e-4)


def test_one_launch_a_step_for_all_of_a_kind() -> None:
    models = [perceptron(seed=k) for k in range(6)]
    Counting.calls = 0
    fit_many(models, blobs(), epochs=5, learning_rate=0.01, batch_size=16, progress=False)
    steps, before, memory = 5 * 4, 1, 1  # 60 images: 4 batches; epoch 0; the bytes of one run
    assert Counting.calls == steps + before + memory
    Counting.calls = 0
    fit_many(models, blobs(), epochs=5, learning_rate=0.01, validation=blobs(9), progress=False)
    assert Counting.calls == 5 * (1 + 1) + 2 + 1


def test_kinds_train_apart_and_come_back_in_order() -> None:
    models = [perceptron("lora", rank=1 + k % 2, seed=k) for k in range(4)]
    models += [perceptron("dora", seed=4), perceptron("full", seed=5)]
    alone = copy.deepcopy(models)
    together = fit_many(models, blobs(), epochs=2, learning_rate=0.01, progress=False)
    agree(together, one_by_one(alone, blobs(), epochs=2, learning_rate=0.01))
    assert kinds(models, [None] * 6) == [[0, 2], [1, 3], [4], [5]]


def test_what_differs_in_no_tensor_is_another_kind() -> None:
    same = [perceptron("lora") for _ in range(2)]
    assert kinds(same, [None] * 2) == [[0, 1]]
    for change in (
        lambda m: setattr(m.layers[0], "scaling", 7.0),
        lambda m: setattr(m.layers[0], "enabled", False),
        lambda m: setattr(m.layers, "1", nn.GELU()),
        lambda m: m.layers[4].bias.requires_grad_(True),
        lambda m: m.layers[0].eval(),
        lambda m: setattr(m, "forward", lambda x: x),
    ):
        other = perceptron("lora")
        change(other)
        assert kinds([same[0], other], [None] * 2) == [[0], [1]]
    assert kinds(same, [1, 2]) == [[0], [1]]


def test_a_diverged_run_leaves_the_others_alone() -> None:
    settings = {"epochs": 6, "validation": blobs(30, seed=9), "progress": False, "seed": [0, 1, 2]}
    models = [perceptron(seed=k) for k in range(3)]
    alone = copy.deepcopy(models)
    found = fit_many(models, blobs(), learning_rate=[0.01, 1e300, 0.02], **settings)
    assert not math.isfinite(found[1].epochs[-1].train_loss)
    assert found[1].best.number == 0
    assert math.isfinite(evaluate(models[1], blobs()).loss)
    settings |= {"seed": [0, 2]}
    others = fit_many([alone[0], alone[2]], blobs(), learning_rate=[0.01, 0.02], **settings)
    agree([found[0], found[2]], others)
    assert all(epoch.train_loss < 3 for epoch in found[0].epochs)


def test_rate_factors_are_rates_of_their_own() -> None:
    factors = [None, {"lora_B": 16.0}, {"lora_B": 4.0, "magnitude": 0.25}]
    models = [perceptron("dora", seed=k) for k in range(3)]
    alone = copy.deepcopy(models)
    settings = {"epochs": 4, "learning_rate": 0.01, "rate_factors": factors}
    together = fit_many(models, blobs(), progress=False, **settings)
    agree(together, one_by_one(alone, blobs(), **settings))
    # The first step of Adam is the learning rate, so its size shows which rate was taken.
    model = perceptron("dora")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit_many(
        [model, perceptron("dora")],
        blobs(),
        epochs=1,
        batch_size=60,
        learning_rate=0.01,
        rate_factors=[factors[2], None],
        progress=False,
    )
    for name, p in model.named_parameters():
        if name.endswith(("lora_B", "magnitude")):
            rate = 0.04 if name.endswith("lora_B") else 0.0025
            assert (p - start[name]).abs().max().item() == pytest.approx(rate, rel=1e-4), name


def test_adam_is_torch_s_adam() -> None:
    models = [perceptron(seed=k) for k in range(3)]
    stack = Stack(models)
    adam = ManyAdam(stack, stack.spread([[0.1] * 6, [0.01] * 6, [0.5] * 6]), weight_decay=0.1)
    rows = [row.clone() for row in stack.numbers.detach()]
    oracles = [
        torch.optim.AdamW([row], lr=lr, weight_decay=0.1)
        for row, lr in zip(rows, (0.1, 0.01, 0.5), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(stack.numbers.shape, dtype=torch.float64, generator=generator)
        for row, grad, oracle in zip(rows, gradient.clone(), oracles, strict=True):
            row.grad = grad
            oracle.step()
        adam.step(gradient)
    torch.testing.assert_close(stack.numbers.detach(), torch.stack(rows), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [1, 3])
def test_memory_splits_the_models_and_changes_no_run(share: int) -> None:
    models = [perceptron("lora", seed=k) for k in range(6)]
    alone = copy.deepcopy(models)
    images = blobs()
    memory = share * bytes_of_a_run(models[0], images.x[:16])
    settings = {"epochs": 3, "learning_rate": 0.01, "batch_size": 16}
    Counting.calls = 0
    together = fit_many(models, images, memory=memory, progress=False, **settings)
    if share == 3:
        assert Counting.calls == 2 * (3 * 4 + 1) + 1
    agree(together, one_by_one(alone, images, **settings))


def test_a_run_s_bytes_grow_with_what_it_holds() -> None:
    small, large = perceptron("lora", rank=1), perceptron("full")
    x = blobs().x
    assert bytes_of_a_run(small, x) > sum(p.nbytes for p in small.parameters())
    assert bytes_of_a_run(large, x) - bytes_of_a_run(large, x[:10]) > 50 * (8 + 7 + 3) * 8


def test_what_cannot_train_in_step_trains_one_by_one_and_equally() -> None:
    class Normed(nn.Sequential):
        pass

    def normed() -> nn.Module:
        return Normed(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()

    def dropping() -> nn.Module:
        return perceptron("lora", dropout=0.3)

    def hooked() -> nn.Module:
        model = perceptron()
        model.layers[0].register_forward_hook(lambda module, args, out: 2 * out)
        return model

    for build, reason in ((normed, "buffers"), (dropping, "dropout"), (hooked, "hooks")):
        models = [build() for _ in range(2)]
        alone = copy.deepcopy(models)
        assert reason in why_one_by_one(models[0], blobs().x)
        settings = {"epochs": 2, "learning_rate": 0.01, "seed": [3, 4]}
        together = fit_many(models, blobs(), progress=False, **settings)
        agree(together, one_by_one(alone, blobs(), **settings), rel=1e-12)


def test_what_vmap_does_not_know_trains_one_by_one_and_says_so() -> None:
    class Branching(MultilayerPerceptron):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    models = [Branching(6, 8, 7, 3).double() for _ in range(2)]
    alone = copy.deepcopy(models)
    with pytest.warns(UserWarning, match="2 models train one by one: .*vmap"):
        together = fit_many(models, blobs(), epochs=2, learning_rate=0.01, progress=False)
    agree(together, one_by_one(alone, blobs(), epochs=2, learning_rate=0.01))


def test_a_large_model_trains_alone_on_a_cpu() -> None:
    small, large = MultilayerPerceptron(64, 128, 64, 10), MultilayerPerceptron(784, 512, 256, 10)
    assert why_one_by_one(small, torch.zeros(64, 64)) == ""
    assert "size" in why_one_by_one(large, torch.zeros(64, 784))
    assert "size" in why_one_by_one(adapt(large, "lora", rank=1), torch.zeros(256, 784))
    tokens = torch.zeros(16, 64, dtype=torch.int64)
    assert "size" in why_one_by_one(adapt(CharGPT(), "lora", rank=1), tokens)
    with torch.device("meta"):  # any device but the CPU
        assert why_one_by_one(MultilayerPerceptron(784, 512, 256, 10), torch.zeros(64, 784)) == ""


def test_a_frozen_part_may_be_shared_and_a_trained_one_not() -> None:
    base = perceptron()
    models = [adapt(copy.deepcopy(base), "lora", rank=2)]
    models.append(copy.deepcopy(models[0]))
    models[1].layers[0].base.weight = models[0].layers[0].base.weight  # frozen
    fit_many(models, blobs(), epochs=1, learning_rate=0.01, progress=False)
    models[1].layers[0].lora_A = models[0].layers[0].lora_A
    for pair in (models, [base, base]):
        with pytest.raises(ValueError, match="models 0 and 1 train the same parameter: .*deepcopy"):
            fit_many(pair, blobs(), epochs=1, learning_rate=0.01, progress=False)


# ---- Texts ----

TOKENS = torch.randint(96, (300,), generator=torch.Generator().manual_seed(0))


def gpt(method: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = CharGPT(context=16, layers=2, heads=2, width=8).double()
    return model if method == "full" else adapt(model, method, rank=2, alpha=4)


@pytest.mark.parametrize("method", METHODS)
def test_texts_equal_one_call_of_fit_text_for_each(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [gpt(method, seed=k) for k in range(3)]
    alone = copy.deepcopy(models)
    settings = {"steps": 8, "context": 16, "batch_size": 4, "weight_decay": 0.1, "progress": False}
    rates, seeds = [0.001, 0.01, 0.03], [5, 6, 6]
    calls = []
    forward = CharGPT.forward
    monkeypatch.setattr(CharGPT, "forward", lambda *a: calls.append(0) or forward(*a))
    found = fit_text_many(models, TOKENS, learning_rate=rates, seed=seeds, **settings)
    assert len(calls) == 8 + 1  # one a step for all, and one to measure the bytes of a run
    for k, model in enumerate(alone):
        expected = fit_text(model, TOKENS, learning_rate=rates[k], seed=seeds[k], **settings)
        assert found[k] == pytest.approx(expected, rel=1e-9)
        for p, q in zip(models[k].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_large_texts_train_one_by_one_on_a_cpu_and_bad_input_is_refused() -> None:
    torch.manual_seed(0)
    models = [adapt(CharGPT(), "lora", rank=1) for _ in range(2)]
    alone = copy.deepcopy(models)
    found = fit_text_many(models, TOKENS, steps=1, learning_rate=0.01, progress=False)
    assert found[0] == fit_text(alone[0], TOKENS, steps=1, learning_rate=0.01, progress=False)
    for change in ({"steps": 0}, {"learning_rate": [0.1, -1.0]}, {"context": 400}):
        with pytest.raises(ValueError, match=r"steps must|learning_rate must|no window of 400"):
            fit_text_many(models, TOKENS, **{"steps": 1, "learning_rate": 0.1, **change})


def test_bad_input_changes_nothing() -> None:
    models = [perceptron(seed=k) for k in range(2)]
    before = copy.deepcopy([model.state_dict() for model in models])

    def run(**change: object) -> None:
        arguments: dict[str, object] = {"epochs": 1, "learning_rate": 0.01, "progress": False}
        fit_many(models, **{"train": blobs(), **arguments, **change})  # type: ignore[arg-type]

    for change, message in (
        ({"learning_rate": [0.01]}, "learning_rate has 1 entries for 2 models"),
        ({"train": [blobs()] * 3}, "train has 3 entries for 2 models"),
        ({"learning_rate": [0.01, -1.0]}, "learning_rate must be .* got -1.0"),
        ({"train": [blobs(), blobs()[:0]]}, "train is empty"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"patience": 2}, "patience=2 waits for the validation loss"),
        ({"rate_factors": [None, {"lora_B": 2.0}]}, "no trained parameter ends in 'lora_B'"),
        ({"rate_factors": {"weight": math.inf}}, r"rate_factors\['weight'\] must be finite"),
        ({"train": blobs(classes=4)}, "labels run from 0 to 3, the model has outputs for 0 to 2"),
        ({"train": [blobs(), blobs(classes=4)]}, "labels run from 0 to 3"),
        ({"validation": [blobs(), blobs()[:0]]}, "validation is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**change)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert fit_many([], blobs(), epochs=1, learning_rate=0.01) == []


def test_nothing_outside_is_disturbed() -> None:
    models = [perceptron(seed=k).eval() for k in range(2)]
    models[1].train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_many(models, blobs(), epochs=1, learning_rate=0.01, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert [model.training for model in models] == [False, True]
    assert isinstance(perceptron("dora").layers[0], DoRALinear)
    assert np.isfinite(evaluate(models[0], blobs()).loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_trains_as_the_cpu_does(method: str) -> None:
    settings = {"epochs": 6, "learning_rate": [0.01, 0.03, 0.1], "seed": [0, 1, 2]}
    settings |= {"validation": blobs(30, seed=9), "patience": 2, "batch_size": 16}
    models = [perceptron(method, seed=k) for k in range(3)]
    copies = [copy.deepcopy(model).cuda() for model in models]
    together = fit_many(copies, blobs(), progress=False, **settings)
    agree(together, one_by_one(models, blobs(), **settings), rel=1e-7)
    texts = [gpt(method, seed=k).float().cuda() for k in range(2)]  # its attention has kernels
    alone = copy.deepcopy(texts)
    settings = {"steps": 4, "learning_rate": 0.003, "context": 16, "progress": False}
    found = fit_text_many(texts, TOKENS, **settings)
    for losses, model in zip(found, alone, strict=True):
        assert losses == pytest.approx(fit_text(model, TOKENS, **settings), rel=1e-3)
