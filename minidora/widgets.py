"""Sliders over the figures of plots, under the same names.

Each function returns a widget that draws its figure anew while a slider moves. A widget needs a
running kernel, so a lesson always shows the figure itself beside it, and a line of text that stays
where the kernel is gone.
"""

from collections.abc import Callable, Mapping, Sequence

from ipywidgets import HTML, Dropdown, SelectionSlider, VBox, Widget
from matplotlib.figure import Figure

from minidora import plots
from minidora.geometry import Dot
from minidora.memory import IMPLEMENTATIONS, LLAMAS, OPTIMIZERS

WITHOUT_KERNEL = (
    "The sliders need a running kernel: if none are shown below, choose Run > Run All Cells."
)

# ---- Lesson 1: what training costs in memory ----


def memory_explorer() -> VBox:
    """Choose a model, a method and an optimizer: see plots.memory_explorer."""

    def draw(**choices: str | int) -> Figure:
        try:
            return plots.memory_explorer(**choices)  # type: ignore[arg-type]
        except ValueError as error:  # full fine-tuning of a quantized base
            figure = plots.new_figure(8.2, 1.0)
            figure.text(0.5, 0.5, str(error), ha="center", va="center", wrap=True)
            figure.set_label(str(error))
            return figure

    return _picture(
        draw,
        name=_menu("model", "LLaMA-7B", list(LLAMAS)),
        method=_menu("method", "dora", ["full", "lora", "dora"]),
        rank=_powers_of_two("rank", 32, 256),
        precision=_menu("weights", "bfloat16", plots.PRECISIONS),
        optimizer=_menu("optimizer", "adamw", OPTIMIZERS),
        implementation=_menu("step()", "foreach", IMPLEMENTATIONS),
    )


# ---- Lesson 2: a low-rank update ----


def trained_share() -> VBox:
    """Choose a layer and a rank: see plots.trained_share."""

    def draw(in_features: int, out_features: int, rank: int) -> Figure:
        return plots.trained_share([(in_features, out_features)], rank)

    return _picture(
        draw,
        in_features=_powers_of_two("inputs", 1024, 16384),
        out_features=_powers_of_two("outputs", 1024, 16384),
        rank=_powers_of_two("rank", 16, 1024),
    )


# ---- Lesson 3: magnitude times direction ----


def magnitude_direction() -> VBox:
    """Turn and lengthen the update, set the magnitude: see plots.magnitude_direction."""
    return _picture(
        plots.magnitude_direction,
        angle=_evenly("update, angle (°)", 110.0, 360.0, 5.0),
        length=_evenly("update, length", 1.5, 2.0, 0.1),
        magnitude=_evenly("magnitude m", 2.0, 4.0, 0.1),
    )


def gradient_split() -> VBox:
    """Turn the step against the row: see plots.gradient_split."""
    return _picture(plots.gradient_split, angle=_evenly("step to row (°)", 50.0, 180.0, 5.0))


# ---- Lesson 4: a whole model, trained and compared ----


def seeds_needed() -> VBox:
    """Set how much the difference spreads from seed to seed: see plots.seeds_needed."""
    return _picture(plots.seeds_needed, spread=_evenly("spread (points)", 1.0, 5.0, 0.1, first=1))


# ---- Lesson 5: how magnitude and direction move ----


def movement(groups: Mapping[str, Sequence[Dot]]) -> VBox:
    """Move through the steps of a run: see plots.movement."""
    steps = sorted({dot.step for dots in groups.values() for dot in dots})
    return _picture(
        lambda upto: plots.movement(groups, upto),
        upto=_choices("up to step", steps[-1], steps),
    )


# ---- Lesson 6: what the layers cost ----


def flops_by_tokens() -> VBox:
    """Choose a layer and a rank: see plots.flops_by_tokens."""
    return _picture(
        plots.flops_by_tokens,
        in_features=_powers_of_two("inputs", 4096, 16384),
        out_features=_powers_of_two("outputs", 4096, 16384),
        rank=_powers_of_two("rank", 16, 1024),
    )


# ---- What all of them are made of ----


def _picture(draw: Callable[..., Figure], **sliders: Widget) -> VBox:
    """The sliders, and below them draw(**their values) as a picture with its alternative text.

    Before them it displays WITHOUT_KERNEL: an output of its own, which a notebook keeps.
    """
    from IPython.display import display

    picture = HTML()

    def update(_: object = None) -> None:
        figure = draw(**{name: slider.value for name, slider in sliders.items()})
        picture.value = plots.picture(figure)

    for slider in sliders.values():
        slider.observe(update, names="value")
    update()
    display(
        {"text/html": f"<p><i>{WITHOUT_KERNEL}</i></p>", "text/plain": WITHOUT_KERNEL}, raw=True
    )
    return VBox([*sliders.values(), picture])


LOOK = {"style": {"description_width": "12em"}, "layout": {"width": "26em"}}


def _choices(description: str, value: float, options: Sequence[float]) -> SelectionSlider:
    """A slider over given numbers, "rank = 32" before it.

    It has no readout: those of ipywidgets can be typed into, and then show what is not so.
    """
    slider = SelectionSlider(
        options=[(f"{option:g}", option) for option in options],
        value=value,
        readout=False,
        tooltip=description,  # without one it says "null"
        **LOOK,
    )

    def name(_: object = None) -> None:
        slider.description = f"{description} = {slider.label}"

    slider.observe(name, names="value")
    name()
    return slider


def _menu(description: str, value: str, options: Sequence[str]) -> Dropdown:
    return Dropdown(options=options, value=value, description=description, **LOOK)


def _powers_of_two(description: str, value: int, largest: int) -> SelectionSlider:
    """A slider over 1, 2, 4, ..."""
    return _choices(description, value, [2**k for k in range(largest.bit_length())])


def _evenly(
    description: str, value: float, last: float, step: float, first: int = 0
) -> SelectionSlider:
    """A slider over first * step, ..., last."""
    numbers = [round(k * step, 6) for k in range(first, round(last / step) + 1)]
    return _choices(description, value, numbers)
