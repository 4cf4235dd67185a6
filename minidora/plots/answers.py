"""An answer beside its target: the figure of the checks."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minidora.plots.style import DIVERGING, headline, new_figure, styled


@styled
def yours_beside_target(yours: Tensor, target: Tensor) -> Figure:
    """An answer, the right one and their difference, three matrices in the same colours.

    Args:
        yours, target: two-dimensional, of the same shape, on the CPU; a NaN stays white.
    """
    yours, target = yours.double(), target.double()
    panels = {"yours": yours, "target": target, "yours - target": yours - target}
    limit = float(torch.stack([yours, target]).nan_to_num(0, 0, 0).abs().max()) or 1.0
    figure = new_figure(7.0, 2.6)
    all_axes = figure.subplots(1, 3)
    for axes, (name, value) in zip(all_axes, panels.items(), strict=True):
        image = axes.imshow(value.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit)
        axes.set(title=name, xlabel="column", ylabel="row")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        for row, entries in enumerate(value.tolist() if value.numel() <= 30 else []):
            for column, entry in enumerate(entries):
                c = "white" if abs(entry) > 0.6 * limit else "black"
                axes.text(column, row, f"{entry:.2g}", ha="center", va="center", c=c)
    figure.colorbar(image, ax=list(all_axes), shrink=0.8, label="entry")
    off = ~((yours - target).abs() <= 1e-5 * limit)
    finding = f"{int(off.sum())} of {off.numel()} entries are off"
    headline(figure, finding)
    figure.set_label(f"Heat maps of your matrix, the right one and the difference: {finding}.")
    return figure
