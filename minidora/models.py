"""The models of the lessons."""

from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""The layers that the DoRA paper adapts in LLaMA (Table 8)."""


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
            if not isinstance(width, Integral) or isinstance(width, bool) or width < 1:
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


class Block(nn.Module):
    """Causal self-attention, then a two-layer MLP; each reads a normalized copy of the stream.

    Its linear layers bear the names of PAPER_TARGETS (and o_proj, which the paper leaves out).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        h = self.attention_norm(x)
        q, k, v = (
            projection(h).view(batch, time, self.heads, -1).transpose(1, 2)  # (B, heads, T, size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, size)
        x = x + self.o_proj(y.transpose(1, 2).reshape(batch, time, width))
        h = self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x))))
        return x + h  # type: ignore[no-any-return]


class CharGPT(nn.Module):
    """A small pre-norm GPT over characters (see data.encode), as small as can be looked into.

    Shapes: tokens (batch, time), int64, time at most context -> logits (batch, time, characters).

    Reference:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2)
    """

    def __init__(
        self,
        characters: int = 96,
        context: int = 64,
        layers: int = 6,
        heads: int = 6,
        width: int = 96,
    ) -> None:
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(characters, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, characters, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the stream is smaller, so that it does not grow with the layers.
                added = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if added else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(
                f"{time} characters at once: the model knows {self.context} positions at most"
            )
        x = self.token_embedding(tokens) + self.position_embedding.weight[:time]  # (B, T, width)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]


CHECKPOINT = Path(__file__).with_name("checkpoints") / "chargpt.safetensors"


def load_pretrained(device: torch.device | str = "cpu") -> CharGPT:
    """The CharGPT that `minidora evidence pretrain` trained on Python's documentation."""
    from safetensors.torch import load_file

    model = CharGPT()
    model.load_state_dict(load_file(CHECKPOINT))
    return model.to(device)
