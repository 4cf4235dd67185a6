"""Every figure of the course: plain functions that return a matplotlib Figure.

A figure's title states its finding, its axes carry units, and its label (Figure.set_label) is
the alternative text that `show` hands to the notebook. Colours are Okabe and Ito's, which stay
apart for colour-blind readers; a method has the same colour in every figure.
"""

import base64
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


def new_figure(width: float = 7.0, height: float = 3.6) -> Figure:
    """An empty figure in the course's style, without pyplot's global state. Sizes in inches."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def show(figure: Figure) -> None:
    """Display a figure in a notebook as a PNG with its alternative text.

    Raises:
        ValueError: the figure has no label to use as alternative text.
    """
    from IPython.display import display

    alt = str(figure.get_label())
    if not alt:
        raise ValueError("the figure has no alternative text: call figure.set_label(text) first")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    png = base64.b64encode(buffer.getvalue()).decode()
    display(
        {"image/png": png, "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True
    )
