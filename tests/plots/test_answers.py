"""The figure of the checks: an answer beside its target."""

import math

import pytest
import torch
from figures import check

from minidora import plots


def test_yours_beside_target_counts_the_entries_that_are_off() -> None:
    target = torch.arange(6.0).view(2, 3)
    yours = target.clone()
    yours[0, 1], yours[1, 2] = 7.0, math.nan
    figure = plots.yours_beside_target(yours, target)
    check(figure, "2 of 6 entries are off")
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["yours", "target", "yours - target"]
    drawn = [axes.images[0].get_array() for axes in panels]
    assert drawn[1].tolist() == target.tolist()
    assert drawn[2].tolist()[0] == [0.0, 6.0, 0.0]
    assert {axes.images[0].get_clim() for axes in panels} == {(-7.0, 7.0)}


@pytest.mark.parametrize("shape", [(1, 1), (40, 30)])
def test_yours_beside_target_of_zeros_and_of_many(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    check(plots.yours_beside_target(zeros, zeros), f"0 of {zeros.numel()} entries are off")
