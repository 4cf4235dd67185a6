"""training.py against closed forms in numpy, and its promises about seeds, freezing, stopping."""

import copy
import math
import os

import numpy as np
import pytest
import torch
from fresh import run
from torch import nn

import minidora
from minidora import adapt
from minidora.data import Images
from minidora.models import CharGPT, MultilayerPerceptron
from minidora.training import (
    device,
    evaluate,
    evaluate_text,
    fit,
    fit_text,
    one_thread,
    progress_bar,
)


def blobs(count: int = 60, features: int = 6, classes: int = 3, seed: int = 0) -> Images:
    """Points around one centre a class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    centres = 2 * torch.randn(classes, features, generator=torch.Generator().manual_seed(7))
    x = centres[y] + torch.randn(count, features, generator=generator)
    return Images(x, y, torch.arange(count))


def perceptron(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MultilayerPerceptron(6, 8, 7, 3)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def cross_entropy(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]


def test_one_full_batch_step_is_adam_s_first_step() -> None:
    images = blobs()
    layer = nn.Linear(6, 3).double()
    images = Images(images.x.double(), images.y, images.index)
    W, b = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    x, y = images.x.numpy(), images.y.numpy()
    history = fit(layer, images, epochs=1, learning_rate=0.03, batch_size=60, progress=False)

    logits = x @ W.T + b
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (p - np.eye(3)[y]) / len(y)  # dL/dlogits
    # After one step the two moments, freed of their bias, are g and g^2.
    for g, before, after in (
        (error.T @ x, W, layer.weight),
        (error.sum(axis=0), b, layer.bias),
    ):
        expected = before - 0.03 * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(after.detach().numpy(), expected, rtol=1e-9)
    loss = cross_entropy(logits, y).mean()
    assert history.epochs[0].train_loss == pytest.approx(loss, rel=1e-9)  # before training
    assert history.epochs[1].train_loss == pytest.approx(loss, rel=1e-6)  # of the one batch
    assert history.best is history.epochs[-1]
    assert all(p.grad is None for p in layer.parameters())


def test_several_full_batch_steps_are_a_plain_loop_s() -> None:
    images = blobs()
    images = Images(images.x.double(), images.y, images.index)
    model, plain = perceptron().double(), perceptron().double()
    fit(model, images, epochs=4, learning_rate=0.03, batch_size=60, progress=False)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.03, foreach=False)
    for _ in range(4):
        optimizer.zero_grad()
        loss = -plain(images.x).log_softmax(dim=1)[torch.arange(60), images.y].mean()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_evaluate_is_the_mean_over_all_images(batch_size: int) -> None:
    images, model = blobs(), perceptron().double()
    images = Images(images.x.double(), images.y, images.index)
    logits = model(images.x).detach().numpy()
    y = images.y.numpy()
    score = evaluate(model, images, batch_size)
    assert score.loss == pytest.approx(cross_entropy(logits, y).mean(), rel=1e-12)
    assert score.accuracy == pytest.approx(100 * (logits.argmax(axis=1) == y).mean())


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_switches_dropout_off_and_the_mode_back(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), perceptron()).train(training)
    assert evaluate(model, blobs()) == evaluate(model, blobs())
    assert model.training is training
    assert model[1].training is training


# ---- modes and buffers ----

TOKENS = torch.randint(96, (200,), generator=torch.Generator().manual_seed(0))


class Failing(nn.Module):
    """Raises at its n-th call from now."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyError("a forward pass that fails")
        return x


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def small_gpt() -> CharGPT:
    torch.manual_seed(0)
    return CharGPT(context=16, layers=2, heads=2, width=8)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", ["evaluate", "fit", "evaluate_text", "fit_text"])
@pytest.mark.parametrize("root", [True, False])
def test_each_module_keeps_its_own_mode(what: str, fails: bool, root: bool) -> None:
    text = what.endswith("text")
    model = nn.Sequential(
        small_gpt() if text else perceptron(), nn.Dropout(0.1), Failing(2 if fails else 10**6)
    )
    model.train(root)
    model[1].train(not root)  # neither all in training nor all in evaluation mode
    before = modes(model)
    assert len(set(before)) == 2
    calls = {
        "evaluate": lambda: evaluate(model, blobs(), batch_size=20),
        "fit": lambda: fit(model, blobs(), epochs=2, learning_rate=0.01, progress=False),
        "evaluate_text": lambda: [evaluate_text(model, TOKENS, 16) for _ in range(4)],
        "fit_text": lambda: fit_text(
            model, TOKENS, steps=4, learning_rate=0.01, context=16, progress=False
        ),
    }
    if fails:
        with pytest.raises(KeyError, match="fails"):
            calls[what]()
    else:
        calls[what]()
    assert modes(model) == before


def test_while_it_trains_what_was_put_into_evaluation_mode_stays_there() -> None:
    seen = []
    model = nn.Sequential(perceptron(), nn.Dropout(0.5))
    model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    model[1].eval()
    fit(model, blobs(), epochs=1, learning_rate=0.01, batch_size=60, progress=False)
    assert seen == [False, False]  # epoch 0 and the step
    model.eval()  # all of it: then training means training
    fit(model, blobs(), epochs=1, learning_rate=0.01, batch_size=60, progress=False)
    assert seen[2:] == [False, True]


NORMS = {
    "BatchNorm": lambda: nn.BatchNorm1d(8),
    "without parameters": lambda: nn.BatchNorm1d(8, affine=False),
    "InstanceNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten()
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(8))),
}


def normed(norm: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), NORMS[norm](), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():  # not the start's 0 and 1
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_frozen_norm_keeps_its_statistics(method: str, norm: str) -> None:
    model = adapt(normed(norm), method, rank=2, alpha=4, target_modules="[03]")
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert start
    fit(model, blobs(), epochs=3, learning_rate=0.05, progress=False)
    for name, buffer in model.named_buffers():
        # torch 2.6 rounds an InstanceNorm's statistics at every call, in evaluation mode too
        torch.testing.assert_close(buffer, start[name], rtol=1e-5, atol=1e-6)
    # So the adapters alone carry what was learned.
    adapters = minidora.adapter_state_dict(model)
    fresh = adapt(normed(norm), method, rank=2, alpha=4, target_modules="[03]")
    fresh.load_state_dict(adapters, strict=False)
    assert evaluate(fresh, blobs()).loss == pytest.approx(evaluate(model, blobs()).loss, rel=1e-5)
    with minidora.disable_adapters(model):
        expected = evaluate(normed(norm), blobs())
        assert evaluate(model, blobs()).loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_is_trained_moves_its_statistics(norm: str) -> None:
    model = normed(norm)
    start = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    fit(model, blobs(), epochs=1, learning_rate=0.01, progress=False)
    assert start
    assert not any(torch.equal(model.get_buffer(name), old) for name, old in start.items())


def test_a_norm_trained_beside_adapters_moves_its_statistics() -> None:
    model = adapt(normed("BatchNorm"), "lora", rank=2, target_modules=["0"])
    model[1].requires_grad_(True)
    before = model[1].running_mean.clone()
    fit(model, blobs(), epochs=1, learning_rate=0.01, progress=False)
    assert not torch.equal(model[1].running_mean, before)


def test_fit_text_keeps_a_frozen_norm_s_statistics() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt, self.norm = small_gpt(), nn.BatchNorm1d(96)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.norm(self.gpt(tokens).transpose(1, 2)).transpose(1, 2)

    model = adapt(Text(), "lora", rank=2, target_modules=["q_proj"])
    fit_text(model, TOKENS, steps=3, learning_rate=0.01, context=16, progress=False)
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(96))


def test_fit_text_is_a_plain_loop_with_the_paper_s_schedule() -> None:
    model, plain = small_gpt().double(), small_gpt().double()
    losses = fit_text(
        model, TOKENS, steps=40, learning_rate=0.01, context=16, batch_size=4, seed=3,
        weight_decay=0.1, progress=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1, foreach=False)
    generator = torch.Generator().manual_seed(3)
    for step in range(40):
        # up in 2 steps, a twentieth of 40, then down in a line to 1 / 38 in the last
        optimizer.param_groups[0]["lr"] = 0.01 * (0.5 if step == 0 else min(1, (40 - step) / 38))
        starts = torch.randint(len(TOKENS) - 16, (4, 1), generator=generator)
        windows = TOKENS[starts + torch.arange(17)]
        logits = plain(windows[:, :-1]).log_softmax(dim=2)
        loss = -logits.gather(2, windows[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-7), step


# ---- rates of their own ----


def test_rate_factors_are_rates_of_their_own() -> None:
    for text in (False, True):
        torch.manual_seed(0)
        model = adapt(small_gpt() if text else perceptron(), "dora", rank=2, alpha=4)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        factors = {"lora_B": 4.0, "magnitude": 0.25}
        if text:  # one step: the rate's whole height
            fit_text(
                model,
                TOKENS,
                steps=1,
                learning_rate=1e-3,
                context=16,
                rate_factors=factors,
                progress=False,
            )
        else:
            fit(
                model,
                blobs(),
                epochs=1,
                batch_size=60,
                learning_rate=1e-3,
                rate_factors=factors,
                progress=False,
            )
        for name, parameter in model.named_parameters():
            rate = 1e-3 * factors.get(name.rpartition(".")[2], 1.0)
            moved = (parameter - start[name]).abs().max().item()
            if name.endswith(("lora_B", "magnitude")):  # A has no gradient in the first step
                assert moved == pytest.approx(rate, rel=2e-2), name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_frozen_stays_bit_for_bit_and_every_adapter_moves(method: str) -> None:
    model = adapt(perceptron(), method, rank=2, alpha=4)
    before = values(model)
    fit(model, blobs(), epochs=3, learning_rate=1e-2, progress=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


def test_seed_decides_and_nothing_outside_is_disturbed() -> None:
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    runs = []
    for seed in (0, 0, 1):
        # dropout too must follow the seed
        model = adapt(copy.deepcopy(BASE), "dora", rank=2, alpha=4, dropout=0.3)
        with torch.no_grad():  # the same A in each
            for name, parameter in model.named_parameters():
                if name.endswith("lora_A"):
                    parameter.fill_(0.1)
        torch.manual_seed(5)
        fit(model, blobs(), epochs=2, learning_rate=1e-2, seed=seed, batch_size=16, progress=False)
        runs.append(values(model))
        assert torch.equal(torch.rand(3), expected_next)
    first, again, other = runs
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


BASE = perceptron()


def test_learns() -> None:
    model = perceptron()
    history = fit(model, blobs(), epochs=30, learning_rate=1e-2, progress=False)
    assert evaluate(model, blobs(seed=1)).accuracy > 85
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss / 3
    assert [epoch.number for epoch in history.epochs] == list(range(31))


def test_stops_early_and_goes_back_to_the_best_epoch() -> None:
    train = blobs()
    wrong = Images(train.x, (train.y + 1) % 3, train.index)  # learning can only harm here
    model = perceptron()
    fit(model, train, epochs=10, learning_rate=1e-2, progress=False)
    before = values(model)
    history = fit(
        model, train, epochs=50, learning_rate=1e-2, validation=wrong, patience=4, progress=False
    )
    assert [epoch.number for epoch in history.epochs] == [0, 1, 2, 3, 4]
    assert history.best.number == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_model_has_the_parameters_of_the_best_epoch() -> None:
    model, validation = perceptron(), blobs(seed=1)
    history = fit(
        model, blobs(), epochs=40, learning_rate=0.1, validation=validation, progress=False
    )
    losses = [epoch.validation.loss for epoch in history.epochs if epoch.validation]
    assert len(losses) == 41
    assert history.best.number == int(np.argmin(losses)) < 40
    assert evaluate(model, validation) == history.best.validation


def test_a_run_that_diverges_ends_at_its_best_epoch() -> None:
    model = perceptron()
    history = fit(
        model, blobs(), epochs=3, learning_rate=1e30, validation=blobs(seed=1), progress=False
    )
    assert not math.isfinite(history.epochs[-1].train_loss)
    assert history.best.number == 0
    assert math.isfinite(evaluate(model, blobs()).loss)


def test_bad_input() -> None:
    images, model = blobs(), perceptron()

    def run(**change: object) -> None:
        arguments: dict[str, object] = {"epochs": 1, "learning_rate": 0.01, "progress": False}
        fit(model, images, **{**arguments, **change})  # type: ignore[arg-type]

    for name in ("epochs", "batch_size"):
        for value in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match=rf"{name} must be a whole number.*got {value!r}"):
                run(**{name: value})
    for rate in (0.0, -1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"learning_rate must be .* above 0, got {rate!r}"):
            run(learning_rate=rate)
    with pytest.raises(ValueError, match="patience must be a whole number"):
        run(patience=0, validation=images)
    with pytest.raises(ValueError, match="patience=3 waits for the validation loss"):
        run(patience=3)
    with pytest.raises(ValueError, match="train is empty"):
        fit(model, images[:0], epochs=1, learning_rate=0.01)
    with pytest.raises(ValueError, match="images is empty"):
        evaluate(model, images[:0])
    with pytest.raises(
        ValueError, match=r"labels run from 0 to 3, the model has outputs for 0 to 2"
    ):
        fit(model, blobs(classes=4), epochs=1, learning_rate=0.01)
    with pytest.raises(ValueError, match=r"labels run from -1 to 1"):
        evaluate(model, Images(images.x, images.y - 1, images.index))
    for factors in ({"lora_B": 2.0}, {"eight": 2.0}):  # "weight" ends so, but it is no name
        with pytest.raises(ValueError, match=r"rate_factors: no trained parameter .* end"):
            run(rate_factors=factors)
    for factor in (0.0, math.nan, -1.0):
        with pytest.raises(ValueError, match=rf"rate_factors\['weight'\] must be .* got {factor}"):
            run(rate_factors={"weight": factor})
    for rate in ("0.1", None, torch.tensor(0.1)):
        with pytest.raises(ValueError, match="learning_rate must be a finite number above 0"):
            run(learning_rate=rate)
    run(epochs=np.int64(1), batch_size=np.int64(8), learning_rate=np.float32(0.01))
    with pytest.raises(ValueError, match="no parameter requires a gradient: adapt"):
        fit(model.requires_grad_(False), images, epochs=1, learning_rate=0.01)


def test_bad_text() -> None:
    model = small_gpt()
    for change in ({"steps": 0}, {"context": 2.5}, {"batch_size": True}, {"learning_rate": -1.0}):
        (name,) = change
        arguments = {"steps": 1, "learning_rate": 0.01, "context": 16, "progress": False}
        with pytest.raises(ValueError, match=f"{name} must be"):
            fit_text(model, TOKENS, **{**arguments, **change})
    for call in (
        lambda: fit_text(model, TOKENS[:16], steps=1, learning_rate=0.01, context=16),
        lambda: evaluate_text(model, TOKENS[:16], context=16),
    ):
        with pytest.raises(ValueError, match="16 tokens make no window of 16"):
            call()


def test_one_thread_puts_the_number_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_progress_bar_shows_or_hides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress_bar(range(3), "seeds", show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    # tqdm, which torch brings along, reads the environment when it is imported: once more, then.
    code = "import sys; [sys.modules.pop(name) for name in list(sys.modules) if 'tqdm' in name]; "
    code += "from minidora.training import progress_bar; list(progress_bar(range(3), 'seeds'))"
    in_notebook = f"import ipykernel; {code}"  # text, and not on stderr, which looks like a warning
    for source, disable, out, err in (
        (code, "", False, True),
        (code, "1", False, False),
        (in_notebook, "", True, False),
    ):
        done = run(source, {**os.environ, "TQDM_DISABLE": disable})
        assert done.returncode == 0, done.stderr
        assert ("seeds: 100%" in done.stdout, "seeds: 100%" in done.stderr) == (out, err), done


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIDORA_DEVICE", raising=False)
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")
    assert device() == torch.device("cpu")
    for name in ("tpu", "cuda:", "cuda:x", "cpu:0:1"):
        monkeypatch.setenv("MINIDORA_DEVICE", name)
        with pytest.raises(ValueError, match=f"must be cpu, cuda or cuda:N, got '{name}'"):
            device()
    monkeypatch.setenv("MINIDORA_DEVICE", "cuda:99")
    with pytest.raises(RuntimeError, match="MINIDORA_DEVICE=cuda:99, but torch"):
        device()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_as_the_cpu_does() -> None:
    scores = []
    for place in ("cpu", "cuda"):
        model = perceptron().to(place)
        fit(model, blobs(), epochs=10, learning_rate=1e-2, seed=3, progress=False)
        scores.append(evaluate(model, blobs(seed=1)))
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-3)
