"""`minidora experiment`: the options, the refusals, the files."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minidora.cli import app
from minidora.grid import Grid
from minidora.results import read

SMALL = ["--methods", "full,lora", "--ranks", "1,2", "--lrs", "0.01,0.02", "--length", "1"]


@pytest.fixture(autouse=True)
def device_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")  # --device writes it: undone at the end


def minidora(*words: str) -> Result:
    return CliRunner().invoke(app, ["experiment", *words])


@pytest.mark.slow
def test_runs_goes_on_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    done = minidora("run", *SMALL, "--seeds", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "12 runs in 3 groups on cpu" in done.output
    assert "12 of 12 runs" in done.output
    before = (out / "results-0.jsonl").read_bytes()
    again = minidora(*SMALL, "--seeds", "2", "--out", str(out))  # the short form
    assert again.exit_code == 0, again.output
    assert (out / "results-0.jsonl").read_bytes() == before
    shown = minidora("report", str(out))
    assert shown.exit_code == 0, shown.output
    assert (out / "report.md").read_text(encoding="utf-8").strip() in shown.output
    assert "| LoRA, rank 2 minus full fine-tuning |" in shown.output
    for name in ("scores", "differences", "budget"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    other = minidora(*SMALL, "--seeds", "3", "--out", str(out))
    assert other.exit_code == 2
    assert "seeds was [0, 1], is [0, 1, 2]" in other.output


def test_both_forms_are_one(tmp_path: Path) -> None:
    options = ["--methods", "dora", "--ranks", "1", "--lrs", "0.01", "--seeds", "7,9"]
    options += ["--targets", "layers.0,layers.2", "--magnitude-rates", "3", "--length", "1"]
    for name, words in (("a", ["run"]), ("b", [])):
        done = minidora(*words, *options, "--out", str(tmp_path / name))
        assert done.exit_code == 0, done.output
    settings = [json.loads((tmp_path / name / "grid.json").read_text()) for name in "ab"]
    assert settings[0] == settings[1]
    assert settings[0]["targets"] == ["layers.0", "layers.2"]
    rows = read(tmp_path / "a", Grid(rates=(0.01,), seeds=2).runs)[0]
    assert [(row["seed"], row["magnitude_rate"]) for row in rows] == [(7, 3.0), (9, 3.0)]


@pytest.mark.slow
def test_a_dry_run_makes_nothing(tmp_path: Path) -> None:
    done = minidora(*SMALL, "--seeds", "1", "--out", str(tmp_path / "x"), "--dry-run")
    assert done.exit_code == 0, done.output
    assert "6 runs in 3 groups on cpu" in done.output
    assert "minutes, measured here; nothing is written" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "cifar"], "there is no 'cifar'; there is digits, mnist, fashion-mnist"),
        (["--methods", "lora,vera"], "there is no 'vera'; there is full, lora, dora"),
        (["--ranks", "1,two"], "--ranks takes whole numbers with commas between, got '1,two'"),
        (["--lrs", "fast"], "--lrs takes numbers with commas between, got 'fast'"),
        (["--seeds", "many"], "--seeds takes whole numbers"),
        (["--targets", "layer.0"], "'layer.0' matches no module; nearest names: layers.0"),
        (["--question", "why"], "there is no 'why'; there is magnitude-rate, lora-plus"),
        (["--device", "tpu"], "must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "MINIDORA_DEVICE=cuda:99, but torch"),
        (["run", "--ranks", "0"], "ranks must be whole numbers from 1, got 0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    options: list[str], message: str, tmp_path: Path
) -> None:
    done = minidora(*options, "--out", str(tmp_path / "x"))
    assert done.exit_code == 2, done.output
    assert done.output.startswith("minidora: ")
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_had_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minidora import sweep

    def offline(task: str) -> None:
        raise RuntimeError(f'{task} could not be fetched: use load_images("digits")')

    monkeypatch.setattr(sweep, "load_images", offline)
    sweep._images.cache_clear()
    done = minidora("--task", "mnist", "--out", str(tmp_path / "x"))
    assert done.exit_code == 2
    assert "mnist could not be fetched" in done.output
    assert not list(tmp_path.iterdir())


def test_a_fault_within_a_run_is_no_sentence_about_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minidora import sweep

    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(sweep, "train_many", broken)
    done = minidora(*SMALL, "--seeds", "1", "--out", str(tmp_path / "x"))
    assert isinstance(done.exception, sweep.GroupFailed)  # Python prints where it happened
    assert "group 0 (" in str(done.exception)
    assert "mat1 and mat2" in str(done.exception)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = minidora(*SMALL, "--seeds", "1", "--out", str(tmp_path / "file" / "x"))
    assert done.exit_code == 2
    assert "file" in done.output.splitlines()[-1]
    assert done.output.splitlines()[-1].startswith("minidora: ")


def test_a_report_of_nothing_is_a_sentence(tmp_path: Path) -> None:
    done = minidora("report", str(tmp_path))
    assert done.exit_code == 2
    assert "holds no sweep" in done.output


def test_without_options_it_explains_itself() -> None:
    done = minidora()
    assert "Usage:" in done.output
    assert "report" in done.output
    assert os.environ["MINIDORA_DEVICE"] == "cpu"
