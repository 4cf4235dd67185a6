"""experiment.py: statistics against tables, scipy and simulation; fairness against what it does."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from minidora import DoRALinear, LoRALinear, experiment, training
from minidora.data import load_images, shift
from minidora.experiment import (
    Comparison,
    Method,
    Task,
    Trial,
    compare,
    detectable_difference,
    make_task,
    mean_and_error,
    methods,
    paired_difference,
    prepare,
    seeds_to_detect,
    train_many,
    tune,
    tune_many,
)
from minidora.intervals import at_as_many
from minidora.training import History, evaluate, fit_many

IMAGES = load_images()


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(IMAGES, "half turn", seed=0)


# ---- statistics ----


def test_mean_and_error_by_hand() -> None:
    # 1, 2, 3, 4: variance 5 / 3, so the error is sqrt(5 / 12)
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, (5 / 12) ** 0.5))


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_paired_interval_is_scipy_s(seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    first, second = generator.normal(90, 2, seeds), generator.normal(89, 3, seeds)
    difference = paired_difference(first.tolist(), second.tolist())
    oracle = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((oracle.low, oracle.high))
    assert difference.mean == pytest.approx((first - second).mean())


def test_paired_interval_from_a_printed_table() -> None:
    # t(0.975; 4) = 2.776. Differences 1, 2, 3, 4, 5: mean 3, error sqrt(2.5 / 5).
    difference = paired_difference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)
    assert difference.mean == 3
    assert difference.high == pytest.approx(3 + 2.776 * 0.5**0.5, abs=1e-3)
    assert difference.low == pytest.approx(3 - 2.776 * 0.5**0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 2.0, 3.0, 2.0], "higher"),
        ([-1.0, -2.0, -3.0, -2.0], "lower"),
        ([1.0, -1.0, 2.0, -1.5], "no difference detected"),
        ([0.0, 0.0, 0.0], "no difference detected"),
    ],
)
def test_verdict(values: list[float], verdict: str) -> None:
    assert paired_difference(values, [0.0] * len(values)).verdict == verdict


def test_detectable_difference_at_published_sample_sizes() -> None:
    # Paired t test, two-sided 5 %, power 80 %: an effect of half a standard deviation takes 34
    # pairs, one of 0.8 takes 15 (the usual tables of sample sizes; G*Power prints the same).
    for effect, pairs in ((0.5, 34), (0.8, 15)):
        needed = [detectable_difference(n**-0.5, n) for n in (pairs - 1, pairs)]
        assert needed[0] > effect >= needed[1]
        assert seeds_to_detect(effect, 1.0) == pairs
    assert seeds_to_detect(1000.0, 1.0) == 2


@pytest.mark.parametrize("seeds", [2, 5, 8])
def test_detectable_difference_is_found_with_the_power_stated(seeds: int) -> None:
    delta = detectable_difference(3.0 / seeds**0.5, seeds)  # a spread of 3 from seed to seed
    draws = np.random.default_rng(0).normal(delta, 3.0, (200_000, seeds))
    found = np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=0.005)


def test_detectable_difference_has_the_power_of_the_noncentral_t() -> None:
    # at a level of 50 % both tails count
    for seeds, level, power in ((4, 0.05, 0.8), (8, 0.05, 0.8), (20, 0.01, 0.9), (6, 0.5, 0.6)):
        critical = stats.t.ppf(1 - level / 2, seeds - 1)
        delta = detectable_difference(1.0, seeds, level, power)
        found = stats.nct(seeds - 1, delta)
        assert found.sf(critical) + found.cdf(-critical) == pytest.approx(power, abs=1e-5)


def test_detectable_difference_scales_with_the_error() -> None:
    assert detectable_difference(0.0, 5) == 0
    assert detectable_difference(2.0, 5) == pytest.approx(2 * detectable_difference(1.0, 5))
    assert detectable_difference(1.0, 500) == pytest.approx(1.96 + 0.8416, abs=0.01)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        mean_and_error([1.0])
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="seeds must be at least 2 .* got 1, 0.5"):
        detectable_difference(0.5, 1)
    with pytest.raises(ValueError, match="got 5, nan"):
        detectable_difference(float("nan"), 5)
    for numbers in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"difference and spread must be above 0, got"):
            seeds_to_detect(*numbers)
    with pytest.raises(ValueError, match=r"0 < level < power < 1, got level=0.05, power=1.0"):
        detectable_difference(0.5, 5, power=1.0)


# ---- the task ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["half turn", "quarter turn", "permute", "invert"])
def test_base_knows_the_old_task_and_not_the_new_one(name: str, seed: int) -> None:
    task = make_task(IMAGES, name, seed)
    assert task.original_accuracy > 88
    assert evaluate(task.base, task.test).accuracy < 60
    assert evaluate(task.base, task.validation).accuracy < 60


def test_no_image_is_in_two_parts(task: Task) -> None:
    other = make_task(IMAGES, "half turn", seed=1)
    for one in (task, other):
        adaptation, validation, test = (
            set(part.index.tolist()) for part in (one.adaptation, one.validation, one.test)
        )
        assert not adaptation & validation
        assert not adaptation & test
        assert not validation & test
        assert len(adaptation | validation | test) == 1797 - experiment.SIZES["pretraining"]
    assert set(task.test.index.tolist()) != set(other.test.index.tolist())


def test_pretraining_sees_the_rest_and_only_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(models: list[nn.Module], train: list[experiment.Images], **_: object) -> None:
        seen.extend(train)

    monkeypatch.setattr(experiment, "fit_many", watch)
    task = make_task(IMAGES, "half turn", seed=0)
    rest = [*task.adaptation.index.tolist(), *task.validation.index.tolist()]
    rest += task.test.index.tolist()
    (pretraining,) = seen
    assert sorted([*rest, *pretraining.index.tolist()]) == list(range(1797))
    assert torch.equal(pretraining.x, IMAGES.x[pretraining.index])  # not shifted
    turned = shift(IMAGES[task.test.index.cpu()], "half turn")
    assert torch.equal(task.test.x.cpu(), turned.x)


# ---- the methods ----


def test_all_methods_start_as_the_base_and_leave_it_alone(task: Task) -> None:
    before = {name: value.clone() for name, value in task.base.state_dict().items()}
    kinds = {"full": nn.Linear, "lora": LoRALinear, "dora": DoRALinear, "dora_half": DoRALinear}
    factors = {}
    for name, method in methods(rank=4).items():
        model = prepare(task.base, method, seed=3)
        assert type(model.layers[0]) is kinds[name]
        torch.testing.assert_close(model(task.test.x), task.base(task.test.x))
        if name != "full":
            factors[name] = model.layers[0].lora_A.detach().clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    assert torch.equal(factors["lora"], factors["dora"])
    for seed in (3, 4):
        torch.manual_seed(99)  # what went before does not matter, the seed does
        again = prepare(task.base, methods()["lora"], seed).layers[0].lora_A
        assert torch.equal(factors["lora"], again) is (seed == 3)
    assert factors["dora_half"].shape == (2, 64)
    assert all(torch.equal(before[name], v) for name, v in task.base.state_dict().items())


@pytest.mark.parametrize(("name", "trainable"), [("full", 17226), ("lora", 1832), ("dora", 2034)])
def test_counts_and_bytes_are_those_of_real_tensors(
    name: str, trainable: int, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LoRA: 4 * (64 + 128 + 128 + 64 + 64 + 10); DoRA: 128 + 64 + 10 magnitudes more
    result = tune(task, methods()[name], (1e-3, 1e-2, 1e-1), epochs=1)
    assert result.trainable == trainable

    model = prepare(task.base, methods()[name], seed=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    model(task.test.x).sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    assert result.state_bytes == sum(t.untyped_storage().nbytes() for t in tensors)


# ---- the search ----


def search(
    task: Task, curve: dict[float, float], monkeypatch: pytest.MonkeyPatch
) -> tuple[experiment.Result, list[float]]:
    """tune over a made-up validation accuracy; returns the rates in the order they were tried."""
    tried = []

    def fake(tasks: list[Task], method: Method, rates: list[float], *_: object) -> list[Trial]:
        tried.extend(rates)
        model = prepare(task.base, method, task.seed)
        return [Trial(rate, curve[rate], rate, model, History([], None)) for rate in rates]  # type: ignore[arg-type]

    monkeypatch.setattr(experiment, "train_many", fake)
    return tune(task, Method("lora", 2, 4.0), (0.01, 0.02, 0.04)), tried


def test_no_widening_when_the_best_is_inside(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    result, tried = search(task, {0.01: 80.0, 0.02: 90.0, 0.04: 70.0}, monkeypatch)
    assert tried == [0.01, 0.02, 0.04]
    assert (result.learning_rate, result.at_edge) == (0.02, False)


def test_widens_upwards_until_the_best_is_inside(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = {0.01: 80.0, 0.02: 90.0, 0.04: 91.0, 0.08: 93.0, 0.16: 92.0}
    result, tried = search(task, curve, monkeypatch)
    assert tried == [0.01, 0.02, 0.04, 0.08, 0.16]
    assert (result.learning_rate, result.at_edge) == (0.08, False)
    assert result.validation == curve


def test_widens_downwards_and_stops_at_the_limit(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = {0.01: 80.0, 0.02: 70.0, 0.04: 60.0, 0.005: 81.0, 0.0025: 82.0, 0.0013: 83.0}
    curve |= {0.0012: 83.0}
    result, tried = search(task, curve, monkeypatch)
    assert tried[3:5] == [0.005, 0.0025]
    assert len(tried) == 3 + experiment.WIDENINGS
    assert result.at_edge  # said, not hidden
    assert list(result.validation) == sorted(tried)


def test_of_equal_accuracies_the_lower_loss_wins(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the made-up loss is the learning rate, so 0.02 beats 0.04 without widening
    result, tried = search(task, {0.01: 80.0, 0.02: 90.0, 0.04: 90.0}, monkeypatch)
    assert (result.learning_rate, len(tried)) == (0.02, 3)


def test_test_images_are_looked_at_once_and_last(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, looked = set(task.test.index.tolist()), []

    def train(models: object, images: list[experiment.Images], **settings: object) -> object:
        for seen in (*images, *settings["validation"]):  # type: ignore[misc]
            looked.append(set(seen.index.tolist()) & test)
        return fit_many(models, images, **settings)  # type: ignore[arg-type]

    def watch(model: nn.Module, images: experiment.Images) -> object:
        looked.append(set(images.index.tolist()) & test)
        return evaluate(model, images)

    monkeypatch.setattr(experiment, "evaluate", watch)
    monkeypatch.setattr(experiment, "fit_many", train)
    tune(task, methods()["lora"], (0.005, 0.01, 0.02), epochs=2)
    assert len(looked) > 5
    assert looked.pop() == test
    assert not any(looked)


def test_bad_search(task: Task) -> None:
    for rates in ((0.01, 0.02), (0.02, 0.01, 0.04), (0.01, 0.01, 0.02)):
        with pytest.raises(ValueError, match="at least 3 in rising order"):
            tune(task, methods()["lora"], rates)
    with pytest.raises(ValueError, match=r"rank must be even and at least 2.* got 3"):
        methods(rank=3)
    with pytest.raises(ValueError, match="sizes must name pretraining, adaptation, validation"):
        make_task(IMAGES, "half turn", 0, sizes={"train": 10})
    for seeds in ([0], [1, 1]):
        with pytest.raises(ValueError, match="at least 2 seeds, all different"):
            compare(seeds)


@pytest.mark.slow
def test_tuning_many_tasks_is_tuning_each(task: Task) -> None:
    tasks = [task, make_task(IMAGES, "half turn", seed=1)]
    rates = (0.001, 0.002, 0.004)  # too low, so the grid grows
    together = tune_many(tasks, methods()["lora"], rates, epochs=6)
    assert any(len(found.validation) > len(rates) for found in together)
    for one, found in zip(tasks, together, strict=True):
        alone = tune(one, methods()["lora"], rates, epochs=6)
        assert list(found.validation) == list(alone.validation)
        # three of the 300 validation images may lie so near to two classes that rounding decides
        assert found.validation == pytest.approx(alone.validation, abs=1.01)
        assert found.learning_rate == alone.learning_rate


def test_a_factor_of_a_method_reaches_the_training(task: Task) -> None:
    rates = [Method("dora", 2, 4.0, *factors).rate_factors for factors in ((), (16.0,), (1.0, 0.5))]
    assert rates == [{}, {"lora_B": 16.0}, {"magnitude": 0.5}]
    plain, plus = (
        train_many([task], Method("lora", 2, 4.0, factor), [0.002], epochs=1)[0].model.layers[0]
        for factor in (1.0, 16.0)
    )
    moved = (plus.lora_B.abs().mean() / plain.lora_B.abs().mean()).item()
    assert 8 < moved < 24


# ---- the whole ----


def small_comparison() -> Comparison:
    return compare(
        [0, 1],
        chosen={"lora": Method("lora", 2, 4.0), "dora": Method("dora", 2, 4.0)},
        learning_rates=(0.005, 0.01, 0.02),
        epochs=3,
        progress=False,
    )


@pytest.mark.slow
def test_compare_repeats_and_keeps_the_seeds_apart() -> None:
    first, again = small_comparison(), small_comparison()
    assert first == again
    assert list(first.results) == ["lora", "dora"]
    assert [r.seed for r in first.results["dora"]] == [0, 1]
    accuracies = first.accuracies("dora")
    assert accuracies[0] != accuracies[1]
    values = first.difference("dora", "lora").values
    assert values[1] == pytest.approx(accuracies[1] - first.accuracies("lora")[1])
    assert max(first.shifted) < 60 < min(first.original)


@pytest.mark.slow
def test_demo_prints_the_table_and_writes_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from minidora.cli import app

    quick = partial(compare, learning_rates=(0.005, 0.01, 0.02), epochs=2)
    monkeypatch.setattr(experiment, "compare", quick)
    figure = tmp_path / "new" / "figure.png"
    run = CliRunner().invoke(app, ["demo", "--seeds", "2", "--output", str(figure)])
    assert run.exit_code == 0, run.output
    assert run.output.startswith(f"2 seeds on {training.device().type}")
    for text in ("full fine-tuning", "LoRA", "DoRA", "17,226", "1,832", "2,034", "frozen base"):
        assert text in run.output
    assert str(figure) in run.output.replace("\n", "")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_losses_at_as_many_numbers_are_numpys_in_the_logarithm_and_never_extrapolated():
    losses = {40: (1.0, 2.0), 10: (3.0, 5.0), 20: (2.5, 4.0)}
    for trained in (10, 13, 20, 31, 40):
        expected = [
            np.interp(
                np.log(trained), np.log([10, 20, 40]), [losses[n][seed] for n in (10, 20, 40)]
            )
            for seed in (0, 1)
        ]
        assert at_as_many(trained, losses) == pytest.approx(expected)
    assert at_as_many(9, losses) is None
    assert at_as_many(41, losses) is None
    assert at_as_many(10, {10: (1.0,)}) is None
