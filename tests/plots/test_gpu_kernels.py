"""Figures of lesson 7: findings, and data that can be read off."""

import pytest
from figures import check

from minidora import plots


def test_launches_and_bytes_names_the_most() -> None:
    forms = {"LoRA": (10, 100.0), "DoRA, first form": (50, 300.0), "PEFT DoRA": (20, 450.0)}
    figure = plots.launches_and_bytes(forms)
    check(
        figure,
        "DoRA (first form) starts 5.0 times LoRA's kernels, PEFT DoRA moves 4.5 times its bytes",
        "LoRA: 10 and 100 MiB",
    )
    bars = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert bars == [[10, 50, 20], [100, 300, 450]]


def test_roofline_puts_each_form_at_its_flops_a_byte() -> None:
    # 200 FLOPs a byte are the knee of 1000 TFLOP/s over 5 TB/s.
    forms = {"LoRA": (800e12, 2e12, 1.0), "DoRA, first form": (200e12, 2e12, 1.0)}
    figure = plots.roofline(forms, "X100", 1000e12, 5e12)
    check(
        figure,
        "Left of the knee at 200 FLOPs a byte, where memory is the limit: DoRA (first form)",
        "LoRA: 400 FLOPs a byte, 800 TFLOP/s, 80% of the roof",
        "DoRA, first form: 100 FLOPs a byte, 200 TFLOP/s, 40% of the roof",
    )
    roof, lora, first = figure.axes[0].lines
    assert list(roof.get_xdata())[1] == pytest.approx(200)
    assert list(roof.get_ydata())[1:] == pytest.approx([1000, 1000])
    assert [*lora.get_xdata(), *lora.get_ydata()] == pytest.approx([400, 800])
    assert [*first.get_xdata(), *first.get_ydata()] == pytest.approx([100, 200])


def test_tiles_count_programs_and_masked_lanes() -> None:
    figure = plots.tiles(20, 30, 16, 8)
    check(figure, "8 programs of 16 x 8 cover 20 x 30; masks leave out 41% of their lanes")
    *programs, edge = figure.axes[0].patches
    assert len(programs) == 8
    assert (edge.get_width(), edge.get_height()) == (30, 20)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert "program\n(1, 3)" in texts
    for text in figure.axes[0].texts:  # each label inside the matrix, not across its edge
        box = text.get_window_extent().transformed(figure.axes[0].transData.inverted())
        assert 0 < min(box.x0, box.x1) < max(box.x0, box.x1) < 30
        assert 0 < min(box.y0, box.y1) < max(box.y0, box.y1) < 20


def test_product_errors_names_what_is_accurate_enough() -> None:
    errors = {"one part": 2e-5, "two parts": 1e-7, "float32": 6e-8}
    figure = plots.product_errors(errors, needed=1e-6)
    check(figure, "Accurate enough for the norm: two parts, float32", "one part: 2.0e-05")
    right, wrong, _ = figure.axes[0].lines
    assert list(right.get_xdata()) == [1e-7, 6e-8]
    assert list(wrong.get_ydata()) == [0]


def test_aims_count_what_was_met_in_every_run() -> None:
    rows = [("one", 1.1, (1.05, 1.0)), ("two", 1.1, (1.05, 1.2)), ("three", 1.0, (2.0,))]
    figure = plots.aims(rows)
    check(figure, "1 of 3 aims are met in every run", "two: 1.05 and 1.20, at most 1.10 asked")
    drawn = [list(line.get_xdata()) for line in figure.axes[0].lines][:3]
    assert drawn == [[1.05, 1.0], [1.05, 1.2], [2.0]]
    colors = [line.get_color() for line in figure.axes[0].lines][:3]
    assert colors[0] != colors[1] == colors[2]
