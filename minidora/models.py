"""The models of the lessons."""

from torch import Tensor, nn


class MultilayerPerceptron(nn.Module):
    """Three linear layers with a ReLU between them, as in the notebook this course grew from.

    Args:
        num_features, num_hidden_1, num_hidden_2, num_classes: widths, each at least 1.

    Attributes:
        layers: nn.Sequential; the linear layers are layers[0], layers[2] and layers[4].

    Shapes: x (..., num_features) -> logits (..., num_classes).

    Raises:
        ValueError: a width is no whole number of at least 1.
    """

    def __init__(
        self, num_features: int, num_hidden_1: int, num_hidden_2: int, num_classes: int
    ) -> None:
        super().__init__()
        widths = {
            "num_features": num_features,
            "num_hidden_1": num_hidden_1,
            "num_hidden_2": num_hidden_2,
            "num_classes": num_classes,
        }
        for name, width in widths.items():
            if not isinstance(width, int) or isinstance(width, bool) or width < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {width!r}")
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_hidden_1),
            nn.ReLU(),
            nn.Linear(num_hidden_1, num_hidden_2),
            nn.ReLU(),
            nn.Linear(num_hidden_2, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]
