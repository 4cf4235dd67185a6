"""What every slider has in common; what each draws is tested with its figure."""

import pytest
from figures import Images
from ipywidgets import Dropdown, SelectionSlider

from minidora import plots, widgets
from minidora.geometry import Dot

DOTS = [Dot(0, f"blocks.{k}.q_proj", step, step + k, step) for k in range(2) for step in (1, 2)]
WIDGETS = {
    "memory_explorer": widgets.memory_explorer,
    "trained_share": widgets.trained_share,
    "magnitude_direction": widgets.magnitude_direction,
    "gradient_split": widgets.gradient_split,
    "seeds_needed": widgets.seeds_needed,
    "movement": lambda: widgets.movement({"lora": DOTS}),
    "flops_by_tokens": widgets.flops_by_tokens,
}


def test_all_widgets_are_here():
    public = {
        name
        for name, value in vars(widgets).items()
        if getattr(value, "__module__", "") == "minidora.widgets" and not name.startswith("_")
    }
    assert public == set(WIDGETS)


@pytest.fixture
def displayed(monkeypatch):
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: outputs.append(data))
    return outputs


@pytest.mark.parametrize("name", WIDGETS)
def test_a_widget_says_what_it_needs_where_its_kernel_is_gone(name, displayed):
    WIDGETS[name]()
    [output] = displayed  # an output of its own: without a kernel the widget shows none
    assert "Run All Cells" in output["text/html"]
    assert output["text/plain"] == widgets.WITHOUT_KERNEL


@pytest.mark.parametrize("name", WIDGETS)
def test_its_picture_shrinks_and_is_described(name, displayed):
    *_, picture = WIDGETS[name]().children
    [image] = Images(picture.value).found
    assert "max-width:100%" in image["style"]
    assert len(image["alt"]) > 60


@pytest.mark.parametrize("name", WIDGETS)
def test_nothing_can_be_typed_and_the_picture_follows_a_drag(name, displayed):
    *controls, _ = WIDGETS[name]().children
    for control in controls:
        assert isinstance(control, Dropdown | SelectionSlider)
        assert getattr(control, "continuous_update", True)
        assert not getattr(control, "readout", False)


@pytest.mark.parametrize("name", WIDGETS)
def test_the_label_of_a_slider_holds_its_value(name, displayed):
    *controls, _ = WIDGETS[name]().children
    for slider in (control for control in controls if isinstance(control, SelectionSlider)):
        slider.index = len(slider.options) - 1
        said, _, value = slider.description.partition(" = ")
        assert said == slider.tooltip
        assert float(value) == pytest.approx(slider.value, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDGETS)
def test_both_ends_of_every_slider_can_be_drawn(name, displayed):
    *controls, picture = WIDGETS[name]().children
    for control in controls:
        for index in (0, len(control.options) - 1):
            control.index = index
            [image] = Images(picture.value).found
            assert image["alt"]


def test_the_explorer_keeps_the_model_it_has_built(displayed, monkeypatch):
    from minidora.plots import adam_memory

    adam_memory.adapted_llama.cache_clear()
    built = []
    llama = adam_memory.llama
    monkeypatch.setattr(adam_memory, "llama", lambda *a: built.append(a) or llama(*a))
    *controls, picture = widgets.memory_explorer().children
    optimizer = next(control for control in controls if control.description == "optimizer")
    before = picture.value
    optimizer.value = "sgd"
    assert picture.value != before
    assert plots.memory_explorer(optimizer="sgd")
    assert len(built) == 1
