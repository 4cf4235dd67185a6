"""The benchmark of many trainings: both ways do the same work, and the command writes it down."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minidora.cli import app
from minidora.data import load_images
from minidora.evidence import bench_experiment
from minidora.models import CharGPT, MultilayerPerceptron


def test_both_ways_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, list[object]] = {"step": [], "alone": []}

    def keep(name: str, function: object) -> object:
        def kept(*args: object, **settings: object) -> object:
            result = function(*args, **settings)  # type: ignore[operator]
            found["step" if "step" in name else "alone"] += result if "step" in name else [result]
            return result

        return kept

    for name in ("fit", "fit_in_step", "fit_text", "fit_text_in_step"):
        monkeypatch.setattr(bench_experiment, name, keep(name, getattr(bench_experiment, name)))
    images = load_images()[:100]
    models = [MultilayerPerceptron(64, 8, 8, 10) for _ in range(2)]
    for way in bench_experiment._images(models, images):
        way()
    step, alone = ([h.epochs[-1].train_loss for h in found[key]] for key in ("step", "alone"))
    assert step == pytest.approx(alone, rel=1e-3)
    found["step"].clear(), found["alone"].clear()
    texts = [CharGPT(layers=1, heads=1, width=8) for _ in range(2)]
    for way in bench_experiment._texts(texts, torch.arange(200) % 96):
        way()
    for left, right in zip(found["step"], found["alone"], strict=True):
        assert left == pytest.approx(right, rel=1e-3)


def test_ratios_and_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter([9.0, 9.0, 0.5, 2.0] * 6)  # a round that is not counted, then one of 4 times
    monkeypatch.setattr(bench_experiment, "_seconds", lambda way, device: next(clock))
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")
    run = CliRunner().invoke(app, ["bench", "experiment", "--quick", "--output", str(tmp_path)])
    assert run.exit_code == 0, run.output
    data = json.loads((tmp_path / "experiment-cpu.json").read_text())
    assert [(row["model"], row["method"]) for row in data["results"]] == [
        (model, method)
        for model in ("perceptron", "CharGPT")
        for method in ("full", "lora", "dora")
    ]
    for row in data["results"]:
        assert row["ratio"] == 4
        assert (row["together"], row["alone"]) == (row["runs"] / 0.5, row["runs"] / 2)
        assert row["choice"] == ("in step" if row["model"] == "perceptron" else "one by one")
    assert data["machine"]["threads"]
