"""How a figure reaches a page: its picture, its alternative text, its width."""

import base64
import inspect
from pathlib import Path

import nbconvert
import pytest
from figures import Images
from matplotlib import style
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_notebook, new_output

from minidora import plots

ALT = 'A line that falls from 2 to 1 for a < b; "m" stays, and so does ‖W + s B A‖ & W\'.'


@pytest.fixture
def shown(monkeypatch) -> dict[str, str]:
    """What `show` hands to the notebook, by MIME type."""
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: outputs.append(data))
    figure = plots.new_figure()
    figure.subplots().plot([2, 1])
    figure.set_label(ALT)
    plots.show(figure)
    [data] = outputs
    return data


def test_nbconvert_renders_the_alternative_text_and_lets_the_picture_shrink(shown):
    output = new_output("display_data", data=shown)
    notebook = new_notebook(cells=[new_code_cell("draw()", outputs=[output])])
    page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    [image] = Images(page).found
    assert image["alt"] == ALT
    assert str(image["src"]).startswith("data:image/png;base64,iVBORw0KGgo")
    assert "max-width:100%" in str(image["style"])
    assert "width" not in image
    assert "No description has been provided" not in page


def test_plain_text_is_the_alternative_text(shown):
    assert shown["text/plain"] == ALT
    assert set(shown) == {"text/plain", "text/html"}


def test_a_figure_without_alternative_text_is_refused():
    with pytest.raises(ValueError, match="set_label"):
        plots.show(plots.new_figure())


FIGURES = {
    name: value
    for name, value in vars(plots).items()
    if name in plots.__all__ and inspect.isfunction(value) and not name.startswith("new_")
    and inspect.signature(value).return_annotation is Figure
}  # fmt: skip


def test_the_figures_are_found():
    assert len(FIGURES) >= 45


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_test_in_the_file_of_its_lesson(name):
    lesson = inspect.unwrap(FIGURES[name]).__module__.rpartition(".")[2]
    tests = Path(__file__).with_name(f"test_{lesson}.py").read_text(encoding="utf-8")
    assert f"plots.{name}(" in tests


def test_the_reader_s_own_style_changes_nothing():
    """A notebook with plt.style.use("dark_background") would draw black text on black."""
    usual = plots.png(plots.flops_by_tokens())
    with style.context(["dark_background", "fivethirtyeight"]):
        for figure in (plots.magnitude_direction(), plots.flops_by_tokens()):
            assert figure.get_facecolor() == (1, 1, 1, 1)
            assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)
            assert figure.axes[0].xaxis.label.get_color() == "black"
        assert plots.png(figure) == usual


@pytest.mark.parametrize(
    ("width", "lines"), [(8.0, 1), (4.0, 2), (2.2, 3)], ids=["one", "two", "three"]
)
def test_a_finding_takes_the_lines_that_it_needs(width, lines):
    figure = plots.new_figure(width, 3)
    finding = "LoRA's update has rank 4; the full update has all of fifty-six directions"
    plots.headline(figure, finding)
    assert plots.one_line(figure.get_suptitle()) == finding
    assert len(figure.get_suptitle().split("\n")) >= lines
    assert figure._suptitle.get_window_extent().width <= figure.bbox.width


def test_a_file_is_drawn_as_a_notebook_shows_it(tmp_path):
    figure = plots.flops_by_tokens()
    plots.save(figure, tmp_path / "figure.png")
    assert base64.b64decode(plots.png(figure)) == (tmp_path / "figure.png").read_bytes()


def test_a_folded_text_is_whole_with_and_without_html(monkeypatch):
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: outputs.append(data))
    plots.fold("Two < three", "a <b>\n c")
    [output] = outputs
    assert output["text/plain"] == "Two < three\na <b>\n c"
    assert "<summary>Two &lt; three</summary><pre>a &lt;b&gt;\n c</pre>" in output["text/html"]
