"""The texts, CharGPT and fit_text; the checkpoint and the runs of pretrain.py."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from minidora.adapt import adapt
from minidora.cli import app
from minidora.data import (
    CHARACTERS,
    TEXTS,
    decode,
    encode,
    load_text,
    random_windows,
    split_text,
)
from minidora.evidence import pretrain
from minidora.models import CHECKPOINT, CharGPT, load_pretrained
from minidora.training import evaluate_text, fit_text

SMALL = {"context": 16, "layers": 2, "heads": 2, "width": 16}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_travel_with_the_package(name: str) -> None:
    tokens = load_text(name)
    assert tokens.dtype == torch.int64
    assert len(tokens) > 400_000
    assert tokens.min() >= 0
    assert tokens.max() < len(CHARACTERS) == 96
    assert torch.equal(encode(decode(tokens[:1000])), tokens[:1000])
    assert (Path(pretrain.__file__).parents[1] / "texts" / "LICENSE").read_text().strip()


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of documentation, source, got 'novel'"):
        load_text("novel")
    with pytest.raises(ValueError, match="no token for 'é'"):
        encode("café")


def test_split_text_shares_nothing_and_loses_nothing() -> None:
    tokens = torch.arange(1000)
    train, held_out = split_text(tokens, held_out=0.1, blocks=4)
    assert len(held_out) == 100
    assert sorted([*train.tolist(), *held_out.tolist()]) == tokens.tolist()
    generator = torch.Generator().manual_seed(0)
    windows = random_windows(tokens, 20_000, 10, generator)
    assert windows.shape == (20_000, 10)
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()
    assert windows.max() == 999  # the last window can be drawn
    assert windows.min() == 0


def test_chargpt_is_causal_and_starts_near_uniform() -> None:
    torch.manual_seed(0)
    model = CharGPT(**SMALL).eval()
    tokens = torch.randint(96, (3, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 96
    logits, other = model(tokens), model(changed)
    assert logits.shape == (3, 16, 96)
    torch.testing.assert_close(logits[:, :10], other[:, :10])
    assert not torch.allclose(logits[:, 10:], other[:, 10:])
    assert F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() == pytest.approx(
        math.log(96), abs=0.1
    )
    with pytest.raises(ValueError, match="17 characters at once: the model knows 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_chargpt_has_the_papers_targets() -> None:
    model = adapt(CharGPT(**SMALL), rank=2, target_modules=pretrain.TARGETS["five"])
    adapted = {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == set(pretrain.TARGETS["five"])


def test_fit_text_learns_a_pattern_and_follows_its_schedule() -> None:
    tokens = encode("abcdefgh" * 40)
    rates: list[float] = []
    torch.manual_seed(0)
    model = CharGPT(**SMALL)
    losses = fit_text(
        model, tokens, steps=80, learning_rate=1e-2, context=16, seed=1,
        after_step=rates.append, progress=False,
    )  # fmt: skip
    assert rates == list(range(1, 81))
    assert losses[0] == pytest.approx(math.log(96), abs=0.2)
    assert losses[-1] < 0.3
    loss = evaluate_text(model, tokens, context=16)
    windows = tokens.unfold(0, 17, 16)
    expected = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.manual_seed(0)
    again = fit_text(
        CharGPT(**SMALL), tokens, steps=80, learning_rate=1e-2, context=16, seed=1, progress=False
    )
    assert again == pytest.approx(losses, rel=1e-3)


def test_fit_text_refuses_what_it_cannot_train() -> None:
    model = CharGPT(**SMALL)
    with pytest.raises(ValueError, match="16 tokens make no window of 16"):
        fit_text(model, torch.zeros(16).long(), steps=1, learning_rate=1e-3, context=16)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        fit_text(
            model.requires_grad_(False),
            torch.zeros(99).long(),
            steps=1,
            learning_rate=1e-3,
            context=16,
        )


def test_the_checkpoint_reloads_bit_for_bit_and_has_its_loss(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert CHECKPOINT.stat().st_size <= 3_000_000
    model = load_pretrained()
    save_file(model.state_dict(), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == CHECKPOINT.read_bytes()
    curve = json.loads(CHECKPOINT.with_suffix(".json").read_text())
    _, validation, _ = pretrain.texts("documentation")
    assert evaluate_text(model, validation) == pytest.approx(curve["validation_loss"], abs=2e-3)
    assert curve["validation_loss"] < 2.0 < curve["losses"][0]


def test_full_gradient_dora_differs_from_dora_in_the_norm_alone() -> None:
    run = pretrain.Run("gradient", "dora, full gradient", "qv", 2, 1e-3, 0)
    full, detached = (
        pretrain.build(run),
        pretrain.build(pretrain.Run("compare", "dora", "qv", 2, 1e-3, 0)),
    )
    full.load_state_dict(detached.state_dict())
    for model in (full, detached):
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "magnitude")):
                torch.manual_seed(len(name))
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    tokens = torch.randint(96, (2, 32))
    torch.testing.assert_close(full(tokens), detached(tokens), rtol=1e-3, atol=1e-4)
    name = "blocks.0.q_proj.lora_A"
    gradients = [
        torch.autograd.grad(model(tokens).pow(2).mean(), model.get_parameter(name))[0]
        for model in (full, detached)
    ]
    assert not torch.allclose(*gradients, rtol=1e-2)


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [encode("abcdefgh" * n) for n in (40, 20, 20)]
    monkeypatch.setattr(pretrain, "texts", lambda name: pieces)


@pytest.mark.slow
def test_runs_resume_and_keep_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_text: None
) -> None:
    monkeypatch.setattr(pretrain, "STEPS", 2)
    monkeypatch.setattr(pretrain, "RECORD_AT", (1, 2))
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", InProcess)
    path = tmp_path / "runs.jsonl"
    settings = (("full", "all"), ("lora", "qv"), ("dora", "qv"))
    runs = [pretrain.Run("compare", *setting, 2, 1e-3, 0) for setting in settings]
    pretrain._run_missing(runs[:1], path, 1)
    first = path.read_text()
    pretrain._run_missing(runs, path, 1)
    assert path.read_text().startswith(first)
    rows = pretrain.read_results(path)
    assert [row["method"] for row in rows] == ["full", "lora", "dora"]
    for row, layers in zip(rows, (30, 12, 12), strict=True):  # five, or q and v, of six blocks
        assert len(row["points"]) == 2 * 2 * layers  # two axes, two steps
        assert all(turn > 0 for *_, turn in row["points"][-12:])
    full, lora, dora = rows
    assert full["trainable"] == sum(p.numel() for p in load_pretrained().parameters())
    assert lora["trainable"] == 12 * 2 * (96 + 96)
    assert dora["trainable"] - lora["trainable"] == 12 * 96


class InProcess:
    """An executor that runs in this process, so that a test can shorten the runs."""

    def __init__(self, *_: object, **__: object) -> None:
        self.map = map

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_best_rates_takes_the_lowest_mean_over_tuning_seeds() -> None:
    def row(rate: float, loss: float, purpose: str = "tune") -> dict[str, object]:
        return {
            "purpose": purpose, "method": "lora", "targets": "qv",
            "learning_rate": rate, "validation_loss": loss,
        }  # fmt: skip

    rows = [row(1e-3, 1.0), row(1e-3, 3.0), row(1e-2, 1.5), row(1e-2, 1.6), row(1.0, 0.0, "ranks")]
    assert pretrain.best_rates(rows) == {("lora", "qv"): 1e-2}
    assert isinstance(load_pretrained(), nn.Module)


@pytest.mark.slow
def test_both_commands_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_text: None
) -> None:
    """Whole, on little text and with few steps: tuning first, then the rest at its rates."""
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", InProcess)
    for name, value in {
        "STEPS": 1, "RECORD_AT": (1,), "PRETRAIN_STEPS": 40, "TUNING_SEEDS": (100,),
        "SEEDS": (0,), "RANK_SEEDS": (0,), "RANKS": (1, 8),
    }.items():  # fmt: skip
        monkeypatch.setattr(pretrain, name, value)

    def evidence(*arguments: str) -> None:
        result = CliRunner().invoke(app, ["evidence", *arguments])
        assert result.exit_code == 0, result.output

    evidence("pretrain", "--output", str(tmp_path / "c/model.safetensors"))
    curve = json.loads((tmp_path / "c/model.json").read_text())
    assert len(curve["losses"]) == 2
    assert curve["losses"][1] < curve["losses"][0]
    assert (tmp_path / "c/model.safetensors").stat().st_size == CHECKPOINT.stat().st_size

    run = ("run", "--workers", "1", "--output", str(tmp_path / "e/runs.jsonl"))
    evidence(*run)
    rows = pretrain.read_results(tmp_path / "e/runs.jsonl")
    rates = pretrain.best_rates(rows)
    assert [row["purpose"] for row in rows] == ["tune"] * 20 + ["compare"] * 5 + ["gradient"] + [
        "ranks"
    ] * 2
    for row in rows[20:]:
        method = row["method"].split(",")[0]
        assert row["learning_rate"] == rates[method, row["targets"]]
    before = (tmp_path / "e/runs.jsonl").read_text()
    evidence(*run)  # nothing is missing
    assert (tmp_path / "e/runs.jsonl").read_text() == before
