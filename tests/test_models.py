"""models.py against the source notebook's printout and numpy."""

import numpy as np
import pytest
import torch

from minidora.models import MultilayerPerceptron


def test_prints_as_in_the_source_notebook() -> None:
    assert (
        str(MultilayerPerceptron(10, 20, 10, 2))
        == """MultilayerPerceptron(
  (layers): Sequential(
    (0): Linear(in_features=10, out_features=20, bias=True)
    (1): ReLU()
    (2): Linear(in_features=20, out_features=10, bias=True)
    (3): ReLU()
    (4): Linear(in_features=10, out_features=2, bias=True)
  )
)"""
    )


def test_forward_is_three_affine_maps() -> None:
    torch.manual_seed(0)
    model = MultilayerPerceptron(7, 5, 6, 3).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    h = x.numpy()
    for i in (0, 2, 4):
        h = h @ model.layers[i].weight.detach().numpy().T + model.layers[i].bias.detach().numpy()
        h = h if i == 4 else np.maximum(h, 0)
    np.testing.assert_allclose(model(x).detach().numpy(), h, rtol=1e-12)


@pytest.mark.parametrize("width", [0, -1, 2.5, True, "8"])
def test_bad_width(width: object) -> None:
    with pytest.raises(ValueError, match=rf"num_hidden_2 must be a whole number.* got {width!r}"):
        MultilayerPerceptron(8, 8, width, 2)  # type: ignore[arg-type]
