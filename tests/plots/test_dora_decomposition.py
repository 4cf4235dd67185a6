"""The figures and sliders of lesson 3 show the numbers that closed forms and autograd give."""

import cmath
import html
import inspect
import math

import pytest
import torch
from figures import check, title
from matplotlib.figure import Figure

from minidora import plots, widgets
from minidora.dora import dora_weight

W = complex(*plots.ROW)  # a row of the plane as a complex number: another way to the same angles


def tips(figure: Figure) -> list[complex]:
    """Where the arrows of the first axes end."""
    return [complex(*text.xy) for text in figure.axes[0].texts if hasattr(text, "xy")]


def starts(figure: Figure) -> set[complex]:
    """Where they start."""
    return {complex(*text.xyann) for text in figure.axes[0].texts if hasattr(text, "xy")}


@pytest.mark.parametrize(
    ("angle", "length", "magnitude"), [(110, 1.5, 2.0), (250, 2.0, 3.0), (0, 0.4, 0.5), (30, 0, 4)]
)
def test_magnitude_direction_draws_both_updates(
    angle: float, length: float, magnitude: float
) -> None:
    figure = plots.magnitude_direction(angle, length, magnitude)
    lora = W + cmath.rect(length, math.radians(angle))
    dora = cmath.rect(magnitude, cmath.phase(lora))
    assert tips(figure) == pytest.approx([W, lora, dora])
    assert starts(figure) == {0}
    widths = [text.arrow_patch.get_linewidth() for text in figure.axes[0].texts]
    assert widths == sorted(widths, reverse=True)  # what is drawn later hides nothing

    widths = [bar.get_width() for bar in figure.axes[1].patches]
    assert widths == pytest.approx([2.0, abs(lora), magnitude])
    turn = round(math.degrees(cmath.phase(lora / W)))
    wanted = f"{turn:+d}".replace("-", "−") if turn else "0"
    assert f"by {wanted}°: LoRA's length becomes {abs(lora):.2f}, DoRA's is m" in title(figure)


def test_magnitude_direction_where_nothing_is_left_of_the_row() -> None:
    figure = plots.magnitude_direction(180 + math.degrees(cmath.phase(W)), 2.0, 1.0)
    assert tips(figure) == [W]  # no arrow for a row of length 0
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx([2, 0, 0], abs=1e-9)
    assert "no direction" in title(figure)


def ends(axes, marker: str) -> list[complex]:  # type: ignore[no-untyped-def]
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [complex(*line.get_xydata()[-1]) for line in lines if len(line.get_xdata()) == 1]


def test_turn_and_length_moves_rows_along_parallel_lines_and_scales_them() -> None:
    figure = plots.turn_and_length(direction=35.0, steps=(0.7, -2.0, 1.1), share=1.3)
    check(figure, "along a line parallel to one direction a", "any length on the ray")
    left, right = figure.axes
    old, lora, dora = ends(left, "o"), ends(left, "s"), ends(right, "s")
    assert old == [complex(*row) for row in plots.ROWS]
    a = cmath.rect(1, math.radians(35))
    assert [(new - row) / a for new, row in zip(lora, old, strict=True)] == pytest.approx(
        [0.7, -2.0, 1.1]
    )
    # DoRA: LoRA's angle, m's length.
    assert [cmath.phase(v) for v in dora] == pytest.approx([cmath.phase(v) for v in lora])
    assert [abs(v) for v in dora] == pytest.approx([1.3 * abs(row) for row in old])
    turns = [round(math.degrees(cmath.phase(n / o))) for n, o in zip(lora, old, strict=True)]
    for turn in turns:
        assert f"{turn:+d}".replace("-", "−") in str(figure.get_label())


def test_two_norms_puts_rows_beside_and_columns_above() -> None:
    weight = torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]])
    top, _, side = plots.two_norms(weight).axes[:3]
    assert [bar.get_width() for bar in side.patches] == pytest.approx([5, 13])
    assert [bar.get_height() for bar in top.patches] == pytest.approx([3, math.sqrt(41), 12])
    assert "3 norms, one per input" in top.get_title()
    assert "2 norms,\none per output (DoRA)" in side.get_title()


@pytest.mark.parametrize("angle", [0.0, 35.0, 90.0, 140.0, 180.0])
def test_gradient_split_agrees_with_autograd(angle: float) -> None:
    # The loss W' . direction has the gradient `direction` at W', and m / ||v|| is 1 here.
    direction = -torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))]])
    row = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    after = {}
    for detach_norm in (False, True):
        delta = torch.zeros_like(row, requires_grad=True)
        weight = dora_weight(row, delta, torch.tensor([2.0]).double(), detach_norm)
        (weight * direction.double()).sum().backward()
        assert delta.grad is not None
        after[detach_norm] = complex(*(row - delta.grad)[0].tolist())

    figure = plots.gradient_split(angle)
    drawn = [2 + 0j, after[True], after[False]]
    if abs(after[False] - 2) < 1e-6:  # no part across the row: no arrow
        drawn.pop()
    assert tips(figure) == pytest.approx(drawn, abs=1e-6)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[1].endswith(f"{abs(after[True]):.2f}")
    assert legend[2].endswith(f"{abs(after[False]):.2f}")
    marked = figure.axes[1].lines[1].get_data()
    cosine = abs(after[False] - 2) / abs(after[True] - 2)
    assert (marked[0][0], marked[1][0]) == pytest.approx((angle, cosine), abs=1e-6)


def test_held_for_backward_states_what_detaching_saves() -> None:
    mib = 2**20
    full = {"merged form": 8 * mib, "compose form": 5 * mib}
    detached = {"merged form": 8 * mib, "compose form": mib // 2}
    figure = plots.held_for_backward(full, detached, 4096)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [8, 8, 5, 0.5, 4096 / mib]
    check(figure, "saves 4.50 MiB in the compose form, about 0 in the merged form")
    full["merged form"] += mib // 2
    figure = plots.held_for_backward(full, detached, 4096)
    check(figure, "in the compose form, 0.50 in the merged form")


def test_singular_values_counts_both_ranks() -> None:
    torch.manual_seed(0)
    product = torch.randn(64, 4).double() @ torch.randn(4, 48).double()
    spectra = {
        ".T": torch.linalg.svdvals(product.T),
        ".view": torch.linalg.svdvals(product.view(48, 64)),
    }
    check(plots.singular_values(spectra), "rank 4 by .T, rank 24 by .view")


def test_magnitude_share_draws_both_percentages() -> None:
    figure = plots.magnitude_share((4, 32), (12.5, 1.5625), 0.013)
    of_lora, of_model = figure.axes[0].lines
    assert list(of_lora.get_ydata()) == [12.5, 1.5625]
    assert list(of_model.get_ydata()) == [0.013, 0.013]
    check(figure, "0.013 % of the model and 1.56 to 12.5 % of LoRA")


def test_magnitude_share_finds_the_ends_in_any_order() -> None:
    check(plots.magnitude_share((8, 4, 16), (6.25, 12.5, 3.1), 0.013), "3.1 to 12.5 % of LoRA")


def test_dora_diagram_names_the_shapes() -> None:
    figure = plots.dora_diagram(48, 64, 4)
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    for shape in ("(64, 48)", "A\n(4, 48)", "B\n(64, 4)", "m\n(64,)", "· g\n(64,)", "+ bias"):
        assert any(shape in text for text in texts), shape


def test_dora_diagram_leads_w_m_and_the_factors_into_the_formula() -> None:
    figure = plots.dora_diagram(48, 64, 4)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    formula = next(text for text in axes.texts if "no gradient" in text.get_text())
    area = formula.get_window_extent().padded(18)  # its width differs with matplotlib's version
    links = [text for text in axes.texts if hasattr(text, "arrow_patch")]
    dotted = [link for link in links if link.arrow_patch.get_linestyle() == ":"]
    assert len(dotted) == 3  # W, m, and A, B and s together
    for link in dotted:
        assert area.contains(*axes.transData.transform(link.xy))


def test_what_is_drawn_without_data_states_its_finding() -> None:
    check(plots.dora_diagram(48, 64, 4), "g scales both paths together", "also give g")
    check(plots.two_norms(torch.randn(3, 5)), "its 3 row norms (dim=1), not its 5 column norms")


def picture(widget: widgets.VBox) -> str:
    return str(widget.children[-1].value)


@pytest.mark.parametrize(
    ("front", "draw", "values"),
    [
        (widgets.magnitude_direction, plots.magnitude_direction, [250.0, 1.0, 3.0]),
        (widgets.gradient_split, plots.gradient_split, [150.0]),
    ],
)
def test_sliders_draw_the_figure_of_their_values(front, draw, values) -> None:
    widget = front()
    *sliders, _ = widget.children
    starts = [slider.value for slider in sliders]
    assert plots.png(draw(*starts)) in picture(widget)
    assert starts == [
        p.default for p in inspect.signature(draw).parameters.values()
    ]  # the lesson's static figure is the sliders' start

    for number, (slider, value) in enumerate(zip(sliders, values, strict=True)):
        slider.value = value
        now = values[: number + 1] + starts[number + 1 :]
        figure = draw(*now)
        assert plots.png(figure) in picture(widget)
        assert f'alt="{html.escape(str(figure.get_label()), quote=True)}"' in picture(widget)
    for slider in sliders:  # both ends can be drawn
        slider.index = 0
        slider.index = len(slider.options) - 1
