"""The figures and the slider of lesson 1: what is drawn against what was handed over."""

import pytest
from figures import check
from matplotlib.figure import Figure

from minidora import plots, widgets
from minidora.memory import TrainingMemory, training_memory

GB = 10**9
ROWS = {
    "Adam": TrainingMemory(4 * GB, 4 * GB, 8 * GB, 4 * GB),
    "SGD": TrainingMemory(4 * GB, 4 * GB, 0, 0),
}


def texts(figure: Figure) -> list[str]:
    return [text.get_text().strip() for text in figure.axes[0].texts]


def bars(figure: Figure) -> list[tuple[float, float]]:
    """(left, width) of each bar."""
    return [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]


def test_training_bill_adds_up_the_84_gb_of_the_claim():
    parts = {"weights": 28, "Adam's m and v": 56, "gradients": 28}
    figure = plots.training_bill(parts, counted=2)
    check(figure, "Weights and Adam's m and v: 84 GB; with gradients 112 GB")
    check(figure, "too much for an 80 GB card")
    assert bars(figure) == [(0, 28), (28, 56), (84, 28)]
    cards = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert cards == [24, 80]
    check(plots.training_bill({"weights": 7, "gradients": 7}, 1), "a 24 GB card has room")


def test_memory_bars_state_their_totals():
    figure = plots.memory_bars(ROWS, "a layer")
    check(figure, "a layer: 16.0 GB with Adam, 8.0 GB with SGD")
    check(figure, "Adam 16.0 GB (weights 4.0, gradients 4.0, optimizer state 8.0")
    assert texts(figure) == ["16.0 GB, 20.0 in step()", "8.0 GB"]
    assert bars(figure) == [(0, 4), (4, 4), (8, 8), (16, 4), (0, 4), (4, 4)]


def test_step_timeline_draws_and_states_every_way():
    figure = plots.step_timeline({"single": [0, 25, 0], "foreach": [0, 100], "fused": [0]}, 100)
    check(figure, "inside one step of Adam: single 0.25, foreach 1.00 and fused 0.00")
    check(figure, "single at most 0.25, foreach at most 1.00, fused at most 0.00")
    drawn = {axes.get_title(): list(axes.lines[0].get_ydata()) for axes in figure.axes}
    assert drawn == {
        "single: 3 operations": [0, 0, 0.25, 0, 0],
        "foreach: 2 operations": [0, 0, 1, 0],
        "fused: 1 operations": [0, 0, 0],
    }


def test_gpu_fit_names_the_smallest_card():
    needs = {
        "M": {"full": 180 * GB + 1, "DoRA": 12 * GB},
        "N": {"full": 25 * GB, "DoRA": 1},
    }
    figure = plots.gpu_fit(needs)
    check(figure, "M: no card up to 180 GB has room for full; a 12 GB card for DoRA")
    check(figure, "N, DoRA: 0.0 GB, an 8 GB card")
    assert texts(figure) == [
        "180.0 GB\nover 180 GB",
        "12.0 GB\n12 GB card",
        "25.0 GB\n40 GB card",
        "0.0 GB\n8 GB card",
    ]


@pytest.mark.parametrize(
    ("need", "said"), [(8, "an 8"), (80, "an 80"), (180, "a 180"), (12, "a 12"), (141, "a 141")]
)
def test_a_card_has_the_article_that_is_spoken(need, said):
    check(plots.gpu_fit({"M": {"full": need * GB}}), f"{said} GB card has room")


@pytest.mark.slow
def test_memory_explorer_draws_the_parts_beside_the_cards():
    figure = plots.memory_explorer()
    check(figure, "LLaMA-7B, DoRA of rank 32, bfloat16, adamw (foreach): fits a 16 GB card")
    model = plots.adapted_llama("LLaMA-7B", "dora", 32, "bfloat16")
    memory = training_memory(model, "adamw", implementation="foreach")
    parts = [getattr(memory, part) / GB for part in plots.MEMORY_PARTS]
    assert [width for left, width in bars(figure) if left == 0][:4] == pytest.approx(
        [parts[0], parts[0], parts[1], parts[2]]
    )
    together = [label.get_text() for label in figure.axes[0].get_yticklabels()][-1]
    assert together.startswith(f"together\n{sum(parts):.2f} GB")
    assert texts(figure) == ["16 GB card", "12 GB card", "8 GB card"]
    (card,) = plots.memory_explorer("LLaMA-7B", rank=1, precision="nf4").axes[0].collections
    (line,) = card.get_segments()
    assert list(line[:, 0]) == [8, 8]
    assert line[:, 1].min() > -0.65  # below the card's name
    check(
        plots.memory_explorer("LLaMA3-70B", "full", precision="float32"),
        "needs 8 cards of 180 GB",
    )


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"precision": "fp8"}, "precision must be one of float32, .* got 'fp8'"),
        ({"rank": 0}, "rank"),
        ({"name": "GPT"}, "GPT"),
    ],
)
def test_memory_explorer_refuses_what_it_cannot_count(choice, said):
    with pytest.raises(ValueError, match=said):
        plots.memory_explorer(**choice)


def test_the_explorer_of_the_widget():
    *controls, picture = widgets.memory_explorer().children
    by_name = {control.description.partition(" = ")[0]: control for control in controls}
    assert "DoRA of rank 32, bfloat16, adamw" in picture.value
    by_name["weights"].value = "nf4-double"
    by_name["rank"].value = 8
    assert "DoRA of rank 8, nf4-double" in picture.value
    assert "fits an 8 GB card" in picture.value
    by_name["method"].value = "full"  # refused in words, without a traceback
    assert "no frozen nn.Linear weight" in picture.value
    by_name["weights"].value = "bfloat16 + masters"
    assert "full fine-tuning, bfloat16 + masters" in picture.value
