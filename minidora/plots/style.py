"""What every figure shares: colours, names and how a notebook shows it.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; a method has the same colour
in every figure.
"""

import base64
import html
import io

from matplotlib.figure import Figure

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


def new_figure(width: float = 7.0, height: float = 3.6) -> Figure:
    """An empty figure in the course's style, without pyplot's global state. Sizes in inches."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def png(figure: Figure) -> str:
    """The figure as PNG data in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


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


def one_line(text: str) -> str:
    """Text without its line breaks, as a sentence holds it."""
    return " ".join(text.split())
