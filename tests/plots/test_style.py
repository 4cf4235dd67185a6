"""How a figure reaches a page: its picture, its alternative text, its width."""

from html.parser import HTMLParser

import nbconvert
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from minidora import plots

ALT = 'A line that falls from 2 to 1 for a < b; "m" stays, and so does ‖W + s B A‖ & W\'.'


class Images(HTMLParser):
    """The attributes of every image of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.found.append(dict(attrs))


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
