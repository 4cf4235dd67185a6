"""The notebook this course grew from: its printed values, and its LoRA against ours.

Its cells stand here as it has them, in its order, so that its random numbers are drawn as it drew
them. The layers are its own, with their mistakes; lessons 2 to 4 show and mend them.
"""

import contextlib
import copy
import io
import math
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torch import nn

from minidora import LoRALinear

CELLS = {
    "imports": """\
import copy
import torch
import torch.nn as nn
import torch.nn.functional as F
""",
    "seed": "torch.manual_seed(0)",
    "LoraLayer": """\
class LoraLayer(nn.Module):
    def __init__(self, layer, rank, alpha):
        super().__init__()
        self.features_in = layer.in_features
        self.features_out = layer.out_features
        self.lora_A = nn.Parameter(torch.zeros((rank, self.features_out)))
        self.lora_B = nn.Parameter(torch.zeros((self.features_in, rank)))
        nn.init.normal_(self.lora_A, mean=0, std=1)
        self.scale = alpha / rank

    def forward(self, x):
        x = (x @ self.lora_B @ self.lora_A) * self.scale
        return x
""",
    "LinearWithLoRA": """\
class LinearWithLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoraLayer(linear, rank, alpha,)
    def forward(self, x):
        return self.linear(x) + self.lora(x)
""",
    "freeze_linear_layers": """\
def freeze_linear_layers(model):
    for child in model.children():
        if isinstance(child, nn.Linear):
            for param in child.parameters():
                param.requires_grad = False
        else:
            # Recursively freeze linear layers in children modules
            freeze_linear_layers(child)
""",
    "LoRA layer": """\
x = torch.randn((1, 10))
layer = nn.Linear(10, 2)
print("Original output:", layer(x))
layer_lora_1 = LinearWithLoRA(layer, rank=2, alpha=4)
print("LoRA output:", layer_lora_1(x))
""",
    "LinearDora": """\
class LinearDora(nn.Module):
    def __init__(self, layer, rank, alpha):
        super().__init__()
        self.layer = layer
        self.lora = LoraLayer(layer, rank, alpha,)
        self.m = nn.Parameter(self.layer.weight.norm(p=2, dim=0, keepdim=True))

    def forward(self, x):
        # pulling the forward pass of lora
        lora = (self.lora.lora_B @ self.lora.lora_A).view(self.layer.weight.shape)
        v_numerator = self.layer.weight + (lora * self.lora.scale)
        v_norm_denominator = v_numerator.norm(p=2, dim=0, keepdim=True)
        directional_component = v_numerator / v_norm_denominator
        new_weight = self.m * directional_component
        # x @ W + b
        return F.linear(x, new_weight, self.layer.bias)
""",
    "DoRA layer": """\
layer_dora_1 = LinearDora(layer, rank=2, alpha=4)
print("DoRA output:", layer_dora_1(x))
""",
    "MLP": """\
class MultilayerPerceptron(nn.Module):
    def __init__(self, num_features,
        num_hidden_1, num_hidden_2, num_classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_hidden_1),
            nn.ReLU(),
            nn.Linear(num_hidden_1, num_hidden_2),
            nn.ReLU(),
            nn.Linear(num_hidden_2, num_classes)
        )

    def forward(self, x):
        x = self.layers(x)
        return x

num_features = 10
num_hidden_1 = 20
num_hidden_2 = 10
num_classes = 2

model = MultilayerPerceptron(
    num_features=num_features,
    num_hidden_1=num_hidden_1,
    num_hidden_2=num_hidden_2,
    num_classes=num_classes
)

print(model)
""",
    "LoRA model": """\
model_lora = copy.deepcopy(model)

# modify the model to use LoRA
model_lora.layers[0] = LinearWithLoRA(model_lora.layers[0], rank=4, alpha=8)
model_lora.layers[2] = LinearWithLoRA(model_lora.layers[2], rank=4, alpha=8)
model_lora.layers[4] = LinearWithLoRA(model_lora.layers[4], rank=4, alpha=8)

print(model)
""",
    "LoRA frozen": """\
freeze_linear_layers(model_lora)
for name, param in model_lora.named_parameters():
    print(f"{name}: {param.requires_grad}")
""",
    "DoRA model": """\
model.layers[0] = LinearDora(model.layers[0], rank=4, alpha=8)
model.layers[2] = LinearDora(model.layers[2], rank=4, alpha=8)
model.layers[4] = LinearDora(model.layers[4], rank=4, alpha=8)

print(model)
""",
    "DoRA frozen": """\
# notice the "m" parameters in the model
freeze_linear_layers(model)
for name, param in model.named_parameters():
    print(f"{name}: {param.requires_grad}")
""",
    "output": "print(model(x))",
}  # the last cell shows its value without print

PLAIN_MODEL = """\
MultilayerPerceptron(
  (layers): Sequential(
    (0): Linear(in_features=10, out_features=20, bias=True)
    (1): ReLU()
    (2): Linear(in_features=20, out_features=10, bias=True)
    (3): ReLU()
    (4): Linear(in_features=10, out_features=2, bias=True)
  )
)
"""

PRINTED = {
    "LoRA layer": """\
Original output: tensor([[0.4465, 0.5755]], grad_fn=<AddmmBackward0>)
LoRA output: tensor([[0.4465, 0.5755]], grad_fn=<AddBackward0>)
""",
    "DoRA layer": "DoRA output: tensor([[0.4465, 0.5755]], grad_fn=<AddmmBackward0>)\n",
    "MLP": PLAIN_MODEL,
    "LoRA model": PLAIN_MODEL,  # it prints model, not model_lora
    "DoRA model": """\
MultilayerPerceptron(
  (layers): Sequential(
    (0): LinearDora(
      (layer): Linear(in_features=10, out_features=20, bias=True)
      (lora): LoraLayer()
    )
    (1): ReLU()
    (2): LinearDora(
      (layer): Linear(in_features=20, out_features=10, bias=True)
      (lora): LoraLayer()
    )
    (3): ReLU()
    (4): LinearDora(
      (layer): Linear(in_features=10, out_features=2, bias=True)
      (lora): LoraLayer()
    )
  )
)
""",
    "DoRA frozen": """\
layers.0.m: True
layers.0.layer.weight: False
layers.0.layer.bias: False
layers.0.lora.lora_A: True
layers.0.lora.lora_B: True
layers.2.m: True
layers.2.layer.weight: False
layers.2.layer.bias: False
layers.2.lora.lora_A: True
layers.2.lora.lora_B: True
layers.4.m: True
layers.4.layer.weight: False
layers.4.layer.bias: False
layers.4.lora.lora_A: True
layers.4.lora.lora_B: True
""",
    "output": "tensor([[-0.1447,  0.1464]], grad_fn=<AddmmBackward0>)\n",
}
"""What the notebook shows. Its cell "LoRA frozen" was never run and has no output."""


@pytest.fixture
def source() -> tuple[dict[str, Any], dict[str, str]]:
    """The notebook after its last cell: its names, and what each cell printed."""
    names: dict[str, Any] = {}
    printed = {}
    with torch.random.fork_rng(devices=[]):
        for title, cell in CELLS.items():
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(cell, names)
            printed[title] = out.getvalue()
    return names, printed


@pytest.mark.parametrize("title", PRINTED)
def test_printed_as_in_the_notebook(source, title):
    assert source[1][title] == PRINTED[title]


def test_the_cell_that_was_never_run_freezes_the_right_parameters(source):
    lines = [line.split(": ") for line in source[1]["LoRA frozen"].splitlines()]
    assert len(lines) == 12
    assert all((".lora." in name) == (trained == "True") for name, trained in lines)


def nonzero_pair(names, in_features=7, out_features=5, rank=3, alpha=12.0):
    """The source's layer with a nonzero zero factor, and ours over the same base, in float64."""
    torch.manual_seed(1)
    base = nn.Linear(in_features, out_features).double()
    theirs = names["LinearWithLoRA"](copy.deepcopy(base), rank, alpha).double()
    nn.init.normal_(theirs.lora.lora_B)
    return theirs, LoRALinear(base, rank, alpha)


def test_lora_equals_ours_when_the_factors_are_mapped_by_role(source):
    theirs, ours = nonzero_pair(source[0])
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora.lora_B.T)
        ours.lora_B.copy_(theirs.lora.lora_A.T)
    x = torch.randn(4, 7, dtype=torch.float64)
    weight = theirs.linear.weight + 4.0 * (theirs.lora.lora_B @ theirs.lora.lora_A).T  # 12 / 3
    torch.testing.assert_close(theirs(x), nn.functional.linear(x, weight, theirs.linear.bias))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.effective_weight(), weight, rtol=1e-12, atol=1e-12)

    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora.lora_B.grad.T)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora.lora_A.grad.T)


def test_mapping_by_name_fits_a_square_layer_and_computes_something_else(source):
    theirs, ours = nonzero_pair(source[0], in_features=6, out_features=6, rank=6)
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora.lora_A)
        ours.lora_B.copy_(theirs.lora.lora_B)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert (ours(x) - theirs(x)).norm() > 0.1 * theirs(x).norm()


def test_random_factor_has_standard_deviation_one(source):
    for width, ratio in [(10, 5.5), (784, 48.5), (4096, 110.9)]:
        assert math.sqrt(3 * width) == pytest.approx(ratio, abs=0.05)
        ours = LoRALinear(nn.Linear(width, 8), rank=8, alpha=8)
        bound = 1 / math.sqrt(width)
        assert ours.lora_A.abs().max() <= bound
        assert ours.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    theirs = source[0]["LoraLayer"](nn.Linear(8, 4096), rank=8, alpha=8)
    assert theirs.lora_A.std().item() == pytest.approx(1.0, rel=0.05)
    assert not theirs.lora_B.any()


def test_wrapper_keeps_the_very_layer_it_is_given(source):
    names = source[0]
    assert names["layer_lora_1"].linear is names["layer"]
    assert names["layer_dora_1"].layer is names["layer"]


def test_adapter_of_the_last_layer_is_larger_than_the_layer(source):
    layers = [source[0]["model_lora"].layers[i] for i in (0, 2, 4)]
    weights = [layer.linear.weight.numel() for layer in layers]
    trained = [sum(p.numel() for p in layer.lora.parameters()) for layer in layers]
    assert weights == [200, 200, 20]
    assert trained == [120, 120, 48]


def test_freeze_linear_layers_misses_what_is_no_linear_child(source):
    freeze = source[0]["freeze_linear_layers"]
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "attention": nn.MultiheadAttention(4, num_heads=2),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 5),
        }
    )
    freeze(model)
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    assert left == [
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "norm.weight",
        "norm.bias",
    ]
    single = nn.Linear(4, 5)
    freeze(single)
    assert single.weight.requires_grad


def test_lesson_2_shows_the_source_as_it_is():
    path = Path(__file__).parents[2] / "notebooks" / "02_lora_recap.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    code = "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")
    shown = ("LoraLayer", "LinearWithLoRA", "freeze_linear_layers", "LoRA layer", "LoRA model")
    for title in (*shown, "LoRA frozen"):
        assert CELLS[title].strip() in code
    outputs = "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))
    assert PRINTED["LoRA layer"] in outputs
    assert PRINTED["LoRA model"] in outputs
