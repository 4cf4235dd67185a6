"""The figures of lesson 6: formulas against counted FLOPs, titles against their data."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from figures import check
from torch import Tensor, nn

from minidora import DoRALinear, LoRALinear, plots, widgets
from minidora.evidence import bench
from minidora.evidence.step_cost import count_flops


def counted(forward: Callable[[Tensor], Tensor], tokens: int, in_features: int) -> int:
    x = torch.randn(tokens, in_features, requires_grad=True)
    return count_flops(lambda: torch.autograd.backward([forward(x).sum()]))


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "in_", "out", "rank"), [(160, 144, 160, 8), (1, 260, 256, 4)])
def test_step_flops_are_what_is_counted(tokens: int, in_: int, out: int, rank: int) -> None:
    """Of layers too large for is_small: a smaller W is built, which takes other FLOPs."""
    base = nn.Linear(in_, out, bias=False)
    dora = DoRALinear(copy.deepcopy(base), rank, 2.0 * rank)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "frozen nn.Linear": copy.deepcopy(base).requires_grad_(False),
        "LoRA": LoRALinear(base, rank, 2.0 * rank),
        "DoRA, ours": dora,
        "DoRA, merged form": bench.SourceForm(copy.deepcopy(dora)),
    }
    pytest.importorskip("peft")
    forms["DoRA, PEFT"] = bench._peft(dora, rank, 2.0 * rank, use_dora=True)
    predicted = plots.step_flops(in_, out, rank, tokens)
    assert {name: counted(form, tokens, in_) for name, form in forms.items()} == predicted


def test_flops_by_tokens_says_what_the_norm_adds() -> None:
    figure = plots.flops_by_tokens(512, 512, 64)
    share = 100 * (2 * 512**2 * 64 + 2 * 64**2 * 1024)
    share /= 4 * 1024 * 512**2 + 6 * 1024 * 64 * 1024
    check(figure, "512 → 512, rank 64", f"adds {share:.2g} % to LoRA's step with 1,024 tokens")
    ours = next(line for line in figure.axes[0].get_lines() if line.get_label() == "DoRA, ours")
    values = list(ours.get_ydata())
    assert values == sorted(values, reverse=True)  # the norm matters less, the more tokens
    check(plots.flops_by_tokens(1, 1, 1), "1 → 1")


def test_flops_widget_draws_the_chosen_layer() -> None:
    box = widgets.flops_by_tokens()
    *sliders, picture = box.children
    before = picture.value
    for slider, value in zip(sliders, (256, 2048, 4), strict=True):
        slider.value = value
    assert picture.value != before
    assert "256 → 2048, rank 4" in picture.value


COSTS = {
    "LoRA": (100, 2**20, 4 * 2**20),
    "the definition": (150, 16 * 2**20, 40 * 2**20),
    "between": (120, 2**20, 2**20),
    "the layer": (103, 2 * 2**20, 6 * 2**20),
}


def test_cost_ladder_names_both_ends() -> None:
    figure = plots.cost_ladder(COSTS)
    check(figure, "FLOPs 1.50 → 1.03 times LoRA's", "held 16.0 → 2.0 MiB, LoRA 1.00")
    check(figure, "peak 40.0 → 6.0 MiB, LoRA 4.0")
    widths = [bar.get_width() for bar in figure.axes[1].patches]
    assert widths == pytest.approx([1, 16, 1, 2])
    assert "from the definition to the layer, beside LoRA" in str(figure.get_label())


def test_held_by_form_draws_each_tensor_to_scale_with_its_reason() -> None:
    mib = 2**20
    figure = plots.held_by_form(
        {
            "LoRA": {"h": (mib // 100, "gradient of B")},
            "large": {"V": (8 * mib, "the norm"), "u": (2 * mib, "gradient of g")},
            "small": {"u": (2 * mib, "gradient of g")},
            "none": {},
        }
    )
    check(figure, "Held by autograd: large 10.0 MiB; none 0.0; LoRA 0.01")
    check(
        figure, "large, 10.00 MiB: V for the norm; u for gradient of g", "none, 0.00 MiB: nothing"
    )
    [axes] = figure.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert np.array(bars) == pytest.approx(np.array([(0, 0.01), (0, 8), (8, 2), (0, 2)]), abs=1e-3)
    assert axes.patches[2].get_facecolor() == axes.patches[3].get_facecolor()  # both are u
    drawn = [text.get_text() for text in axes.texts]
    assert {"V: the norm; u: gradient of g", "h: gradient of B", "nothing"} <= set(drawn)
    assert axes.get_xlabel() == "held for the backward pass (MiB; too thin to see: h)"


def test_bytes_alive_puts_the_end_of_the_forward_pass_at_one() -> None:
    mib = 2**20
    figure = plots.bytes_alive(
        {
            "first": ([mib, 2 * mib, 3 * mib, mib], 3),
            "large": ([9 * mib, 5 * mib], 1),
            "last": ([2 * mib, mib], 1),
        },
        at_peak={"first": "a product"},
    )
    check(figure, "first 3.0 MiB, large 9.0 MiB, last 2.0 MiB")
    lines = figure.axes[0].get_lines()
    assert list(lines[0].get_xdata()) == pytest.approx([0, 1 / 3, 2 / 3, 1, 2])
    assert list(lines[0].get_ydata()) == pytest.approx([0, 1, 2, 3, 1])
    assert list(lines[1].get_xdata()) == pytest.approx([0, 1, 2])
    [note] = figure.axes[0].texts
    assert note.get_text() == "a product"
    assert note.xy == pytest.approx((1, 3))


def test_digits_lost_reports_the_residual_nearest_to_a_hundredth() -> None:
    errors = {"formula": [1e-7, 1e-3, 0.1], "dense": [1e-8] * 3, "ours": [1e-7, 2e-7, 1e-6]}
    figure = plots.digits_lost([1.0, 0.01, 0.001], errors, [1e-7, 1e-3, 0.1])
    check(figure, "Where 1 % of W is left, formula is off by 1e-03, ours by 2e-07")
    assert figure.axes[0].get_xlim()[0] < figure.axes[0].get_xlim()[1]
    assert "At the smallest residual, 0.001: formula 1.0e-01" in str(figure.get_label())


def test_roundings_names_the_worst_and_the_best_form() -> None:
    errors = {"coarse": {"near": 1.4, "far": 2.02}, "fine": {"near": 1.41, "far": 1.40}}
    figure = plots.roundings(errors, {"coarse": 4, "fine": 2})
    check(figure, "coarse: up to 2.02 times", "fine: 1.41")
    assert "coarse, √4: 1.40 near, 2.02 far" in str(figure.get_label())
    expected = [lines.get_segments()[0][0][0] for lines in figure.axes[0].collections]
    assert expected == pytest.approx([2, 2**0.5])


def test_scaling_paper_says_what_the_identity_matrix_costs() -> None:
    figure = plots.scaling_paper({"one": (10.0, 6.0, 6.5, 5.0), "two": (10.0, 8.0, 8.0, 6.0)})
    check(figure, "50 to 80 % of the time saved")
    dense = figure.axes[0].get_lines()[1]
    assert list(dense.get_xdata()) == pytest.approx([0.6, 0.8])


def result(
    contender: str, features: int, ratio: float, work: str = "training step", tokens: int = 8,
    dtype: str | None = None,
) -> bench.Result:  # fmt: skip
    quartiles = (ratio - 0.1, ratio, ratio + 0.1)
    return bench.Result(features, tokens, 2, work, contender, 1.0, quartiles, dtype=dtype)


MACHINE = bench.Machine(
    device="a CPU", threads="1", dtype="float32", mode="eager", python="3", torch="2", date="today"
)
REPORT = bench.Report(
    MACHINE,
    (
        result("LoRA", 64, 1.0),
        result("DoRA", 64, 1.2),
        result("PEFT DoRA", 64, 1.1),
        result("torchtune DoRA", 64, 1.5),
        result("linear", 64, 0.5),
        result("DoRA", 128, 1.4),
        result("PEFT DoRA", 128, 2.0),
        result("DoRA", 64, 3.0, "one token"),
        result("DoRA cached", 64, 1.05, "one token"),
        result("PEFT DoRA", 64, 9.0, "one token"),
        result("DoRA", 64, 5.0, "one token", tokens=99),
    ),
)


def test_bench_ratios_says_where_others_are_faster() -> None:
    figure = plots.bench_ratios(REPORT)
    check(
        figure,
        "Our DoRA takes 1.20 to 1.40 times LoRA's time for a training step. Shapes with a lower "
        "median than ours: torchtune in 0 of 1, PEFT in 1 of 2",
    )
    [axes] = figure.axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["DoRA, ours"] == [1.2, 1.4]
    assert drawn["DoRA, PEFT"] == [1.1, 2.0]
    assert axes.get_xscale() == "log"
    quartiles = axes.collections[0].get_segments()
    assert np.array(quartiles)[:, :, 0] == pytest.approx(np.array([[1.1, 1.3], [1.3, 1.5]]))


def test_bench_ratios_of_one_token_and_of_compiled_layers() -> None:
    figure = plots.bench_ratios(REPORT, "one token")
    check(figure, "Our DoRA takes 3.00 to 3.00 times LoRA's time for one token", "g kept: 1.05")
    check(figure, "1.05 to 1.05 with g kept")
    # The tokens of the step are not those of this work: one shape, drawn once.
    [tick] = figure.axes[0].get_yticklabels()
    assert tick.get_text() == "64 features, r 2 (first of 2 runs)"
    compiled = replace(REPORT, machine=replace(MACHINE, mode="compiled"))
    check(plots.bench_ratios(compiled), "Compiled, our DoRA takes 1.20")
    with pytest.raises(ValueError, match="one of training step, one token, got 'sleep'"):
        plots.bench_ratios(REPORT, "sleep")


def test_bench_ratios_draws_half_precision_beside_the_other() -> None:
    half = (
        result("DoRA", 64, 1.7, dtype="bfloat16"),
        result("PEFT DoRA", 64, 1.6, dtype="bfloat16"),
    )
    figure = plots.bench_ratios(replace(REPORT, results=REPORT.results + half))
    check(figure, "Our DoRA takes 1.20 to 1.70 times LoRA's time", "PEFT in 2 of 3")
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks == [
        "64 features, 8 tokens, r 2", "128 features, 8 tokens, r 2",
        "64 features, 8 tokens, r 2 (bf16)",
    ]  # fmt: skip
