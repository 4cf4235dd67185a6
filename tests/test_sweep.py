"""Sweeps: what is refused, what survives, and a report against sums done by hand."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh import python
from scipy import stats

from minidora import sweep
from minidora.experiment import Method, make_task, train_once
from minidora.grid import Grid, name_of
from minidora.results import append, hold, read
from minidora.sweep import report, run, run_group
from minidora.training import evaluate

TINY = Grid(methods=("full", "lora"), ranks=(1, 2), rates=(0.01, 0.02), seeds=2, length=1)


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock or a commit decides."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "commit")} for row in rows]


# ---- The grid ----


def test_the_grid_is_every_combination() -> None:
    grid = Grid(
        methods=("full", "lora", "dora"),
        ranks=(1, 4),
        rates=(0.02, 0.01),
        seeds=7,
        b_rates=(1, 4),
        magnitude_rates=(1, 10),
    )
    # full once; LoRA 2 ranks x 2 rates of B; DoRA x 2 rates of the magnitude
    assert len(grid.arms) == 1 + 4 + 8
    assert grid.rates == (0.01, 0.02)
    assert grid.size == 13 * 2 * 7
    runs = Counter(
        (m, seed) for method, seeds in grid.groups for m, seed in product([method], seeds)
    )
    assert set(runs) == set(product(grid.arms, range(7)))
    assert set(runs.values()) == {1}
    assert [grid.runs(k) for k in (0, len(grid.groups) - 1)] == [5 * 2, 2 * 2]
    assert Method("dora", 4, 8.0, 4, 10) in grid.arms
    assert name_of(grid.arms[-1]) == (
        "DoRA, rank 4, B at 4 times the rate, magnitude at 10 times the rate"
    )


def test_groups_do_not_depend_on_what_remains(tmp_path: Path) -> None:
    run(TINY, tmp_path / "whole", progress=False)
    whole = read(tmp_path / "whole", TINY.runs)
    assert list(whole) == [0, 1, 2]
    for group, rows in whole.items():
        again = run_group(TINY, group)
        assert numbers(again) == numbers(rows)  # bit for bit: == on floats
        assert all(row["group"] == group for row in again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "cifar"}, "task: there is no 'cifar'; there is digits, mnist, fashion-mnist, ch"),
        ({"methods": ("lora", "vera")}, "methods: there is no 'vera'; there is full, lora, dora"),
        ({"methods": "lora"}, "methods must be a list, got 'lora'"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("lora", "lora")}, "methods names one thing twice"),
        ({"ranks": (0,)}, "ranks must be whole numbers from 1, got 0"),
        ({"ranks": (2.5,)}, "ranks must be whole numbers from 1, got 2.5"),
        ({"ranks": (True,)}, "ranks must be whole numbers from 1, got True"),
        ({"rates": (0.1, -1.0)}, "rates must be finite numbers above 0, got -1.0"),
        ({"rates": (math.nan,)}, "rates must be finite numbers above 0, got nan"),
        ({"rates": ("fast",)}, "rates must be finite numbers above 0, got 'fast'"),
        ({"b_rates": (math.inf,)}, "b_rates must be finite numbers above 0, got inf"),
        ({"magnitude_rates": ()}, "magnitude_rates is empty"),
        ({"seeds": 0}, "seeds is empty"),
        ({"seeds": (1, 1)}, "seeds names one thing twice"),
        ({"seeds": (-1,)}, "seeds must be whole numbers from 0, got -1"),
        ({"length": -3}, "length must be a whole number of at least 1, got -3"),
        ({"targets": ("layers.9",)}, "'layers.9' matches no module"),
        ({"task": "chargpt", "targets": ("layers.0",)}, "'layers.0' matches no module"),
    ],
)
def test_a_bad_grid_says_what_exists(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**change)


# ---- One group ----


def test_a_row_is_what_training_alone_gives() -> None:
    group = next(g for g, (m, _) in enumerate(TINY.groups) if m.rank == 2)
    rows = run_group(TINY, group)
    assert [(row["seed"], row["rate"]) for row in rows] == list(product((0, 1), (0.01, 0.02)))
    tasks = [make_task(sweep._images("digits"), "half turn", seed) for seed in (0, 1)]
    for row in rows:
        task = tasks[row["seed"]]
        trial = train_once(task, Method("lora", 2, 4.0), row["rate"], epochs=1)
        assert row["validation_loss"] == pytest.approx(trial.loss, rel=1e-3)
        assert row["test_loss"] == pytest.approx(evaluate(trial.model, task.test).loss, rel=1e-3)
        assert row["trained"] == 916
        assert row["seconds"] > 0
        for key in ("device", "torch", "python", "minidora", "commit"):
            assert row[key], key


def test_targets_reach_the_training() -> None:
    rows = run_group(replace(TINY, methods=("lora",), ranks=(1,), targets=("layers.2",)), 0)
    assert {row["trained"] for row in rows} == {128 + 64}


def test_a_text_s_row_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    short = tuple(part[:2000] for part in sweep._texts())
    monkeypatch.setattr(sweep, "_texts", lambda: short)
    grid = Grid("chargpt", ("lora",), ranks=(1,), rates=(0.003,), seeds=1, length=2)
    (row,) = run_group(grid, 0)
    assert 1 < row["test_loss"] < 3  # the pretrained model's, hardly moved
    assert "test_accuracy" not in row


# ---- What survives ----


@pytest.mark.slow
def test_20_kills_lose_nothing_that_was_finished(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    script = Path(__file__).with_name("killed_sweep.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "runs")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *kills, end = map(json.loads, done.stdout.splitlines())
    assert len(kills) == 20
    assert end["rows"] == end["size"] == 20
    assert sum(kill["after"] < kill["before"] for kill in kills) == 0
    assert any(0 < kill["after"] < 20 for kill in kills)  # some came in the middle
    rows = [row for group in read(tmp_path / "runs", lambda group: 4).values() for row in group]
    keys = {(row["kind"], row["rank"], row["rate"], row["seed"]) for row in rows}
    assert len(rows) == len(keys) == 20  # each run once


def fill(folder: Path, groups: range, size: int = 3) -> Path:
    for group in groups:
        append(folder, 0, [{"group": group, "row": row} for row in range(size)])
    return folder / "results-0.jsonl"


def test_a_file_cut_off_at_any_byte_goes_on_whole(tmp_path: Path) -> None:
    file = fill(tmp_path, range(3))
    content = file.read_bytes()
    (tmp_path / "grid.json").write_text('{"a": 1}')
    two = len(b"".join(content.splitlines(keepends=True)[:6]))
    for end in range(two, len(content) + 1):
        file.write_bytes(content[:end])
        done = {0, 1, 2} if end == len(content) else {0, 1}
        assert set(read(tmp_path, lambda group: 3)) == done
        with hold(tmp_path, {"a": 1}, lambda group: 3, 0, 1) as found:
            assert found == done
            if 2 not in found:
                fill(tmp_path, range(2, 3))
        assert file.read_bytes() == content


def test_damage_that_no_kill_explains_is_an_error(tmp_path: Path) -> None:
    file = fill(tmp_path, range(3))
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged in (
        [*lines[:4], *lines[5:]],  # a line of group 1 is gone
        [*lines[:4], b"{}\n", *lines[5:]],
        [*lines[:4], b"x\n", *lines[5:]],
    ):
        file.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match=r"results-0.jsonl, line 4: a damaged group"):
            read(tmp_path, lambda group: 3)


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """A folder in which the first group of TINY is done."""
    run(replace(TINY, methods=("full",)), tmp_path / "full", progress=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    settings = json.loads((tmp_path / "full" / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps({**settings, "methods": ["full", "lora"]}))
    (folder / "results-0.jsonl").write_bytes((tmp_path / "full" / "results-0.jsonl").read_bytes())
    return folder


def test_what_is_there_is_not_run_again(settled: Path) -> None:
    before, seen = (settled / "results-0.jsonl").read_bytes(), []
    run(TINY, settled, after_group=seen.append, progress=False)
    assert (settled / "results-0.jsonl").read_bytes().startswith(before)
    assert [rows[0]["group"] for rows in seen] == [1, 2]
    run(TINY, settled, after_group=lambda rows: pytest.fail("it ran again"), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 3}, r"seeds was \[0, 1\], is \[0, 1, 2\]"),
        ({"rates": (0.01,)}, r"rates was \[0.01, 0.02\], is \[0.01\]"),
        ({"ranks": (1,), "length": 2}, r"ranks was \[1, 2\], is \[1\]; length was 1, is 2"),
        ({"task": "chargpt"}, 'task was "digits", is "chargpt"'),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    change: dict[str, Any], message: str, settled: Path
) -> None:
    before = {path.name: path.read_bytes() for path in settled.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(replace(TINY, **change), settled, progress=False)
    for name, content in before.items():
        assert (settled / name).read_bytes() == content


def test_another_device_is_another_sweep(settled: Path) -> None:
    settings = json.loads((settled / "grid.json").read_text())
    (settled / "grid.json").write_text(json.dumps({**settings, "device": "cuda:elsewhere"}))
    with pytest.raises(ValueError, match='device was "cuda:elsewhere", is "c'):
        run(TINY, settled, progress=False)


def test_a_second_process_is_refused(settled: Path) -> None:
    code = f"""
from pathlib import Path
from minidora.results import hold
try:
    with hold(Path({str(settled)!r}), {{}}, lambda group: 4, 0, 1):
        print("entered")
except RuntimeError as error:
    print(error)
"""
    settings = json.loads((settled / "grid.json").read_text())
    with hold(settled, settings, TINY.runs, 0, 1):
        second = python(code)
    assert second.startswith(f"another process is at work in {settled}")


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no sweep: there is no grid.json"):
        report(tmp_path)
    (tmp_path / "results-0.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no sweep"):
        run(TINY, tmp_path, progress=False)
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(ValueError, match="grid.json is not what a sweep wrote"):
        report(tmp_path)


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "run_group", lambda grid, group: [{"group": group}] * 4)
    run(TINY, "~/runs", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@pytest.mark.slow
def test_torchrun_shares_the_groups_out(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(
        f"""
import torch
from minidora.grid import Grid
from minidora.sweep import run
torch.set_num_threads(1)
run(Grid(methods=("full", "lora"), ranks=(1, 2), rates=(0.01, 0.02), seeds=2, length=1),
    {str(tmp_path / "runs")!r}, progress=False)
"""
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINIDORA_DEVICE": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script)],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    parts = [(tmp_path / "runs" / f"results-{rank}.jsonl").read_text() for rank in (0, 1)]
    groups = [{json.loads(line)["group"] for line in part.splitlines()} for part in parts]
    assert groups == [{0, 2}, {1}]
    alone = tmp_path / "alone"
    run(TINY, alone, progress=False)
    together = read(tmp_path / "runs", TINY.runs)
    assert {g: numbers(rows) for g, rows in together.items()} == {
        g: numbers(rows) for g, rows in read(alone, TINY.runs).items()
    }


# ---- The report ----


def made_up(grid: Grid, folder: Path, seed: int = 0) -> dict[int, list[dict[str, Any]]]:
    """Rows with random results, in a folder like a sweep's."""
    generator = np.random.default_rng(seed)
    sizes = {"full": 17226, "lora": 458, "dora": 660}
    groups = {}
    folder.mkdir()
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(grid).items()}
    (folder / "grid.json").write_text(json.dumps({**settings, "device": "cpu"}))
    for group, (method, seeds) in enumerate(grid.groups):
        rows = []
        for one, rate in product(seeds, grid.rates):
            values = generator.uniform(50, 100, 2).tolist()
            extra = 202 if method.kind == "dora" else 0
            rows.append(
                {
                    "seed": one,
                    "rate": rate,
                    "group": group,
                    "trained": (method.rank * 458 + extra) or sizes["full"],
                    "validation_accuracy": values[0],
                    "validation_loss": values[1] / 50,
                    "test_accuracy": values[1],
                    "test_loss": generator.uniform(0.1, 1.0),
                }
            )
        groups[group] = rows
        append(folder, 0, rows)
    return groups


def test_a_report_is_its_rows_summed_by_hand(tmp_path: Path) -> None:
    grid = Grid(methods=("full", "lora", "dora"), ranks=(1, 2), rates=(0.01, 0.02, 0.04), seeds=6)
    rows = [row for group in made_up(grid, tmp_path / "r").values() for row in group]
    found = report(tmp_path / "r")
    assert (found.done, found.seeds) == (grid.size, tuple(range(6)))
    chosen: dict[str, list[dict[str, Any]]] = {}
    for group, (method, seeds) in enumerate(grid.groups):
        for seed in seeds:
            of_this = [row for row in rows if (row["group"], row["seed"]) == (group, seed)]
            best = sorted(of_this, key=lambda row: row["validation_accuracy"])[-1]
            chosen.setdefault(name_of(method), []).append(best)
    for name, best in chosen.items():
        arm = found.arms[name]
        assert arm.scores == tuple(row["test_accuracy"] for row in best)
        assert arm.rates == tuple(row["rate"] for row in best)
        assert arm.at_edge == sum(row["rate"] != 0.02 for row in best)
    assert set(found.differences) == {
        *((f"{a}, rank {r}", "full fine-tuning") for a in ("LoRA", "DoRA") for r in (1, 2)),
        *((f"DoRA, rank {r}", f"LoRA, rank {r}") for r in (1, 2)),
    }
    pair = [chosen[name] for name in ("DoRA, rank 2", "LoRA, rank 2")]
    first, second = ([row["test_accuracy"] for row in part] for part in pair)
    oracle = stats.ttest_rel(first, second).confidence_interval(0.95)
    difference = found.differences["DoRA, rank 2", "LoRA, rank 2"]
    assert (difference.low, difference.high) == pytest.approx((oracle.low, oracle.high))
    # DoRA at rank 1 trains 660 numbers; LoRA 458 at rank 1 and 916 at rank 2. At rank 2 DoRA
    # trains more than LoRA at its largest rank here, so there is nothing to compare with.
    assert list(found.at_equal_budget) == ["DoRA, rank 1"]
    lora = [
        np.interp(math.log(660), np.log([458, 916]), [a["test_loss"], b["test_loss"]])
        for a, b in zip(chosen["LoRA, rank 1"], chosen["LoRA, rank 2"], strict=True)
    ]
    dora = [row["test_loss"] for row in chosen["DoRA, rank 1"]]
    assert found.at_equal_budget["DoRA, rank 1"].mean == pytest.approx(
        np.mean(dora) - np.mean(lora)
    )
    text = found.markdown()
    scores = found.arms["DoRA, rank 1"].scores
    expected = f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1) / 6**0.5:.2f}"
    assert f"| DoRA, rank 1 | 660 | {expected} |" in text
    assert f"| DoRA, rank 2 minus LoRA, rank 2 | {difference.mean:+.2f} |" in text


def test_a_multiple_of_a_rate_is_compared_with_1(tmp_path: Path) -> None:
    grid = Grid(methods=("lora", "dora"), magnitude_rates=(1, 10), b_rates=(1, 4), seeds=2)
    made_up(grid, tmp_path / "r")
    names = set(report(tmp_path / "r").differences)
    lora, dora = "LoRA, rank 4", "DoRA, rank 4"
    b, m = "B at 4 times the rate", "magnitude at 10 times the rate"
    assert names == {
        (f"{lora}, {b}", lora),
        (dora, lora),
        *((f"{dora}, {what}", dora) for what in (b, m, f"{b}, {m}")),
    }


def test_a_report_of_what_is_there_takes_the_seeds_that_are_whole(tmp_path: Path) -> None:
    grid = Grid(methods=("full", "lora"), rates=(0.01,), seeds=10)
    groups = made_up(grid, tmp_path / "r")
    file = tmp_path / "r" / "results-0.jsonl"
    file.write_text("")
    for group in (0, 1, 2):  # both methods for the first five seeds; one for the others
        append(tmp_path / "r", 0, groups[group])
    found = report(tmp_path / "r")
    assert (found.done, found.seeds) == (15, tuple(range(5)))
    file.write_text("")
    append(tmp_path / "r", 0, groups[0])
    with pytest.raises(ValueError, match="5 of 20 runs are done, .* at least 2 seeds of every"):
        report(tmp_path / "r")


def test_a_run_that_diverged_is_never_the_best(tmp_path: Path) -> None:
    grid = Grid("chargpt", ("lora",), rates=(0.01, 0.02), seeds=2)
    groups = made_up(grid, tmp_path / "r")
    (tmp_path / "r" / "results-0.jsonl").write_text("")
    for row in groups[0]:
        row.pop("validation_accuracy")
        row["validation_loss"] = math.nan if row["rate"] == 0.02 else 9.0
    append(tmp_path / "r", 0, groups[0])
    found = report(tmp_path / "r")
    assert found.arms["LoRA, rank 4"].rates == (0.01, 0.01)
    assert found.score == "test loss"
    assert [r["rate"] for r in read(tmp_path / "r", grid.runs)[0]] == [0.01, 0.02] * 2
