"""The committed answers to the prepared questions: whole, of many seeds, and summed by hand."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from minidora.evidence.measures import SWEEPS, Record, own_rate
from minidora.sweep import QUESTIONS, holds, report

KEYS = {"lora-plus": "b_rate", "magnitude-rate": "magnitude_rate"}


def rows(question: str) -> Iterator[dict[str, Any]]:
    for path in sorted((SWEEPS / question).glob("results-*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answers_are_whole_and_say_where_they_come_from(
    question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")
    assert set(QUESTIONS) == set(KEYS)
    assert holds(QUESTIONS[question], SWEEPS / question)
    found = list(rows(question))
    assert len(found) == QUESTIONS[question].size
    keys = {(row["seed"], row["rate"], row[KEYS[question]]) for row in found}
    assert len(keys) == len(found)
    assert len({row["seed"] for row in found}) >= 10
    assert all(row["device"] and row["torch"] and row["commit"] for row in found)
    assert not any("dirty" in row["commit"] for row in found)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_prepared_questions_are_answered_by_their_rows(question: str) -> None:
    best: dict[tuple[float, int], dict[str, Any]] = {}
    for row in rows(question):
        key = row[KEYS[question]], row["seed"]
        if key not in best or (row["validation_accuracy"], -row["validation_loss"]) > (
            best[key]["validation_accuracy"],
            -best[key]["validation_loss"],
        ):
            best[key] = row
    seeds = sorted({seed for _, seed in best})
    measured = own_rate(Record(), question)
    assert len(measured) == 4
    for name, interval in measured.items():
        factor = float(name.split(" at ")[1].split(" times")[0])
        pair = [[best[f, seed]["test_accuracy"] for seed in seeds] for f in (factor, 1.0)]
        oracle = stats.ttest_rel(*pair).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high))
        assert interval.mean == pytest.approx(np.mean(pair[0]) - np.mean(pair[1]))


@pytest.mark.parametrize("question", QUESTIONS)
def test_no_method_was_cut_off_by_its_grid_of_rates(question: str) -> None:
    assert sum(arm.at_edge for arm in report(SWEEPS / question).arms.values()) == 0
