"""What the tests of figures share: the finding, and what every figure must be."""

from html.parser import HTMLParser

import matplotlib
from matplotlib.figure import Figure

from minidora import plots


def title(figure: Figure) -> str:
    """The finding of a figure, on one line."""
    return plots.one_line(figure.get_suptitle())


def check(figure: Figure, *needed: str) -> None:
    """Title or alternative text say what is needed; all titles lie inside; the ground is white."""
    said = f"{title(figure)}\n{figure.get_label()}"
    for text in needed:
        assert text in said, said
    assert title(figure), "no finding"
    assert len(str(figure.get_label())) > 60
    with matplotlib.rc_context(plots.STYLE):
        figure.canvas.draw()
    for text in [*figure.texts, *(axes.title for axes in figure.axes), figure._suptitle]:
        extent = text.get_window_extent()
        assert extent.x0 >= 0, text
        assert extent.x1 <= figure.bbox.width, text
    assert figure.get_facecolor() == (1, 1, 1, 1)


class Images(HTMLParser):
    """The attributes of every image of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.found.append(dict(attrs))
