"""What every figure shares: colours, names and how a notebook shows it.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; a method has the same colour
in every figure.
"""

import base64
import html
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

COLORS = {
    "full": "#000000",
    "lora": "#0072B2",
    "dora": "#D55E00",
    "dora_half": "#E69F00",
    "base": "#999999",
}
"""One colour a method: full fine-tuning, LoRA, DoRA, DoRA at half the rank, the frozen base."""

NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "dora_half": "DoRA, half rank",
    "base": "frozen base",
}


ALTERNATIVES = ("#000000", "#009E73", "#CC79A7", "#56B4E9")
"""Okabe and Ito's black, green, purple and sky blue, each with its own marker in MARKERS."""

MARKERS = "osD^"

PAIR = ("#009E73", "#CC79A7")
"""Okabe and Ito's green and purple, for two alternatives within a method."""

DIVERGING = "PRGn"
"""Colour map of what has a sign: purple below 0, green above, so no method's colour."""

_KINDS = (
    *("axes.", "errorbar.", "figure.", "font.", "grid.", "hatch.", "image.", "legend.", "lines."),
    *("mathtext.", "patch.", "path.", "savefig.", "scatter.", "text.", "xtick.", "ytick."),
)

STYLE: dict[Any, Any] = {
    # First matplotlib's defaults, white paper among them: a reader's own style, dark perhaps, would
    # not go with the colours above.
    **{key: value for key, value in matplotlib.rcParamsDefault.items() if key.startswith(_KINDS)},
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "figure.titlesize": 11,  # the finding
    "axes.titlesize": 10,  # what one panel of several shows
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""What every figure has in common, as matplotlib's rcParams."""

styled = matplotlib.rc_context(STYLE)
"""Decorates what draws, `png` included: ticks are made only there."""


def new_figure(width: float = 7.0, height: float = 3.6) -> Figure:
    """An empty figure in the course's style, without pyplot's global state. Sizes in inches."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def headline(figure: Figure, finding: str) -> None:
    """Write the finding above a figure: on one line, or on as many of equal length as it needs."""
    width = 0.96 * 72 * figure.get_figwidth()  # in points
    lines: list[str] = []
    for sentence in finding.split("\n"):
        for count in range(1, len(sentence.split()) + 1):
            longest = math.ceil(len(sentence) / count) + (4 if count > 1 else 0)
            parts = textwrap.wrap(sentence, longest, break_on_hyphens=False)
            if max(map(_width, parts)) <= width:
                break
        lines += parts
    figure.suptitle("\n".join(lines))


def _width(line: str) -> float:
    """Of a line of a headline, in points."""
    font = get_font(findfont(STYLE["font.family"]))
    font.set_size(STYLE["figure.titlesize"], 72)
    font.set_text(line)
    return float(font.get_width_height()[0]) / 64  # FreeType counts in 64ths


def boxed(axes: Axes) -> None:
    """A frame on all four sides, for pictures that are white at their edges."""
    axes.spines[:].set_visible(True)


def rows_only(axes: Axes) -> None:
    """Rows with names need no vertical line beside them, nor ticks."""
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


@styled
def png(figure: Figure) -> str:
    """The figure as PNG data in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


@styled
def save(figure: Figure, path: str | Path) -> None:
    """Write the figure to a file, as `show` shows it."""
    figure.savefig(path)


def picture(figure: Figure) -> str:
    """The figure as an HTML image with its alternative text, which shrinks to the page's width.

    Raises:
        ValueError: the figure has no label to use as alternative text.
    """
    alt = str(figure.get_label())
    if not alt:
        raise ValueError("the figure has no alternative text: call figure.set_label(text) first")
    return (
        f'<img alt="{html.escape(alt)}" style="max-width:100%;height:auto" '
        f'src="data:image/png;base64,{png(figure)}">'
    )


def show(figure: Figure) -> None:
    """Display a figure in a notebook: an HTML image, and its alternative text as plain text.

    HTML because neither JupyterLab nor nbconvert renders an alternative text beside image/png.

    Raises:
        ValueError: the figure has no label to use as alternative text.
    """
    from IPython.display import display

    display({"text/html": picture(figure), "text/plain": str(figure.get_label())}, raw=True)


def fold(summary: str, text: str) -> None:
    """Display a text in a notebook that opens at a click on its summary."""
    from IPython.display import display

    head, body = html.escape(summary), html.escape(text)
    page = f"<details><summary>{head}</summary><pre>{body}</pre></details>"
    display({"text/html": page, "text/plain": f"{summary}\n{text}"}, raw=True)


def one_line(text: str) -> str:
    """Text without its line breaks, as a sentence holds it."""
    return " ".join(text.split())


def listed(names: Sequence[str]) -> str:
    """Names as a sentence holds them: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
