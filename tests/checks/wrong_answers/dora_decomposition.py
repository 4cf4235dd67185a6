# ruff: noqa: E501
"""Wrong answers, (name, old, new, says): see WrongAnswer in tests/checks/test_checks.py."""

WRONG: dict[str, list[tuple[str, str, str, str]]] = {
    "row_norm": [
        (
            "lengths through the direction",
            "weight.norm(dim=1)",
            "(weight * (weight / weight.norm(dim=1, keepdim=True))).sum(dim=1)",
            "a row of zeros",
        ),
        ("detached", ".norm", ".detach().norm", "no gradient reaches weight"),
    ],
    "decompose": [
        ("for square weights only", "magnitude[:, None]", "magnitude", "size of tensor"),
        (
            "product returned",
            "return magnitude, direction",
            "return magnitude[:, None] * direction",
            "expected a tuple (magnitude, direction)",
        ),
    ],
    "dora_weight": [
        (
            "detached",
            "return (magnitude / norm)[:, None] * direction",
            "return ((magnitude / norm)[:, None] * direction).detach()",
            "no gradient reaches magnitude",
        ),
        (
            "float64 afterwards",
            "return (magnitude / norm)[:, None] * direction",
            "return ((magnitude / norm)[:, None] * direction).double()",
            "computed in float32",
        ),
        (
            "for square weights only",
            "(magnitude / norm)[:, None]",
            "(magnitude / norm)",
            "size of tensor",
        ),
    ],
    "dora_forward": [
        ("g on the inputs", "g * (x @ weight.T", "((g * x) @ weight.T", "size of tensor"),
        (
            "for one batch axis only",
            "x @ lora_A.T @ lora_B.T",
            "(lora_B @ (lora_A @ x.T)).T",
            "x with 3 axes",
        ),
        (
            "for two axes or more",
            "x @ lora_A.T @ lora_B.T",
            "(lora_B @ (lora_A @ x.mT)).mT",
            "x with 1 axis",
        ),
        (
            "update detached, norm not",
            "(x @ lora_A.T @ lora_B.T)",
            "(x @ lora_A.T @ lora_B.T).detach()",
            "gradient of lora_A: it comes through the norm alone",
        ),
        (
            "x detached under W",
            "g * (x @ weight.T",
            "g * (x.detach() @ weight.T",
            "gradient of x: it comes through the update alone",
        ),
        (
            "everything detached",
            "g = magnitude /",
            "g = magnitude.detach() /",
            "no gradient reaches magnitude",
        ),
    ],
    "dora_weight_detached": [
        ("not detached", ".detach()", "", "the norm is not detached"),
        (
            "everything detached",
            "return (magnitude / norm)[:, None] * direction",
            "return ((magnitude / norm)[:, None] * direction).detach()",
            "no gradient reaches magnitude",
        ),
        (
            "the direction detached too",
            "(lora_B @ lora_A)\n",
            "(lora_B @ lora_A)\n    direction = direction.detach()\n",
            "no gradient reaches lora_A",
        ),
        (
            "the direction detached instead",
            "norm(dim=1).detach()  # (out,)\n    return (magnitude / norm)[:, None] * direction",
            "norm(dim=1)\n    return (magnitude / norm)[:, None] * direction.detach()",
            "the direction is detached",
        ),
        (
            "magnitude detached with it",
            "(magnitude / norm)",
            "(magnitude / norm).detach()",
            "no gradient reaches magnitude",
        ),
        (
            "under no_grad",
            "direction = weight + alpha / rank * (lora_B @ lora_A)",
            (
                "with torch.no_grad():\n        direction = weight + alpha / rank * (lora_B @ lora_A)"
            ),
            "no gradient reaches lora_A",
        ),
    ],
    "update_for_weight": [
        ("detached", "(lora_B @ lora_A).T", "(lora_B @ lora_A).T.detach()", "reaches lora_B"),
    ],
    "merge_dora": [
        (
            "only the base at B = 0",
            "merged.weight.copy_((magnitude / norm)[:, None] * direction)",
            "merged.weight.copy_((magnitude / norm)[:, None] * direction if lora_B.any() else base.weight)",
            "B = 0",
        ),
        ("into the caller's layer", "copy.deepcopy(base)", "base", "it changes the caller's base"),
        ("norm of W", "direction.norm(", "base.weight.norm(", "the norm of W:"),
        (
            "LoRA's merge",
            "(magnitude / norm)[:, None] * direction",
            "direction",
            "what LoRA merges",
        ),
        ("alpha alone", "alpha / lora_A.shape[0]", "alpha", "scaled by alpha alone"),
        (
            "bias scaled",
            "    return merged",
            "        merged.bias *= magnitude / norm\n    return merged",
            "the bias is scaled",
        ),
        (
            "a new layer with a bias of its own",
            "merged = copy.deepcopy(base)",
            "merged = nn.Linear(base.in_features, base.out_features)",
            "the bias is not the base's",
        ),
        (
            "the bias shared",
            "    return merged",
            "    merged.bias = base.bias\n    return merged",
            "bias is the given layer's own: a step of training would change both",
        ),
        (
            "a weight in float64",
            "    return merged",
            "    merged.weight = nn.Parameter(merged.weight.double())\n    return merged",
            "weight is float64 where the given layer has float32: it must be able to run",
        ),
        ("added to W", "merged.weight.copy_(", "merged.weight.add_(", "W is added"),
        ("magnitude forgotten", "(magnitude / norm)", "(1 / norm)", "these rows have"),
        ("weight returned", "return merged", "return merged.weight", "expected an nn.Linear"),
    ],
    "dora_linear": [
        (
            "attached in evaluation mode",
            "direction.norm(dim=1).detach()",
            "direction.norm(dim=1)\n        norm = norm.detach() if self.training else norm",
            "the first in evaluation mode",
        ),
        (
            "a shallow copy of the base",
            "base.requires_grad_(False)",
            "copy.copy(base.requires_grad_(False))",
            "base is a copy",
        ),
        (
            "a norm renewed in training only",
            "        norm = direction.norm(dim=1).detach()  # (out,)",
            "        if self.training or not hasattr(self, 'kept'):\n            self.kept = direction.norm(dim=1).detach()\n        norm = self.kept",
            "in evaluation mode, after A and B changed",
        ),
        (
            "an epsilon beside the norm",
            "norm = direction.norm(dim=1).detach()",
            "norm = direction.norm(dim=1).detach() + 1e-8",
            "with a small number added",
        ),
        (
            "float32 inside",
            "norm = direction.norm(dim=1).detach()",
            "norm = direction.float().norm(dim=1).detach().to(x.dtype)",
            "computed in float32",
        ),
        (
            "a private copy of W",
            "direction = self.base.weight +",
            "direction = self.__dict__.setdefault('kept', self.base.weight.clone()) +",
            "self.base with other weights",
        ),
        (
            "squeezed",
            "F.linear(x, weight, self.base.bias)",
            "F.linear(x, weight, self.base.bias).squeeze()",
            "squeeze()",
        ),
        (
            "magnitude under another name",
            "self.magnitude = nn.Parameter(base.weight.norm(dim=1))",
            "self.m = nn.Parameter(base.weight.norm(dim=1))",
            "it has no parameter called magnitude",
        ),
        (
            "a norm kept from the first call",
            "norm = direction.norm(dim=1).detach()  # (out,)",
            (
                "self.norm = getattr(self, 'norm', direction.norm(dim=1).detach())\n"
                "        norm = self.norm"
            ),
            "divided by the norm of W: the norm is that of W + s B A, and changes",
        ),
        (
            "a weight of its own, and trained",
            "        self.scaling = alpha / rank\n",
            (
                "        self.scaling = alpha / rank\n"
                "        self.weight = nn.Parameter(base.weight.detach().clone())\n"
            ),
            "weight trains too: only the adapter should",
        ),
        (
            "a copy of the base",
            "self.base = base.requires_grad_(False)",
            "self.base = copy.deepcopy(base.requires_grad_(False))",
            "base is a copy: keep the layer that was given",
        ),
        (
            "the base changed by forward",
            "direction = self.base.weight + self.scaling * (self.lora_B @ self.lora_A)",
            (
                "direction = self.base.weight\n"
                "        direction += self.scaling * (self.lora_B @ self.lora_A)"
            ),
            "forward changes base.weight",
        ),
        (
            "x detached",
            "F.linear(x, weight",
            "F.linear(x.detach(), weight",
            "no gradient reaches x",
        ),
        (
            "a bias taken for granted",
            "F.linear(x, weight, self.base.bias)",
            "x @ weight.T + self.base.bias",
            "no bias: your code raised TypeError",
        ),
        (
            "a magnitude without its sign",
            "(self.magnitude / norm)",
            "(self.magnitude.abs() / norm)",
            "the magnitude has lost its sign",
        ),
        (
            "A on one side of zero",
            "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            "nn.init.uniform_(self.lora_A, 0, base.in_features**-0.5)",
            "lora_A is not drawn uniformly from +-1/sqrt(in)",
        ),
        (
            "magnitude no parameter",
            "nn.Parameter(base.weight.norm(dim=1))",
            "base.weight.norm(dim=1)",
            "magnitude is a plain tensor",
        ),
        (
            "magnitude one per input",
            "base.weight.norm(dim=1)",
            "base.weight.norm(dim=0)",
            "one per input (dim=0)",
        ),
        (
            "magnitude starts at 1",
            "nn.Parameter(base.weight.norm(dim=1))",
            "nn.Parameter(base.weight.new_ones(base.out_features))",
            "starts at 1",
        ),
        (
            "magnitude frozen",
            "nn.Parameter(base.weight.norm(dim=1))",
            "nn.Parameter(base.weight.norm(dim=1), requires_grad=False)",
            "magnitude is frozen",
        ),
        ("base not frozen", "base.requires_grad_(False)", "base", "is not frozen"),
        (
            "B not zero",
            "new_zeros(base.out_features, rank)",
            "new_ones(base.out_features, rank)",
            "lora_B is not zero at the start",
        ),
        ("scaling kept as alpha", "alpha / rank", "alpha", "expected scaling 1.5"),
        ("not detached", ".detach()", "", "the norm is not detached"),
        (
            "norm of W",
            "direction.norm(",
            "self.base.weight.norm(",
            "divided by the norm of W: the norm is that of W + s B A",
        ),
        ("update not scaled", "self.scaling * (", "(", "the scaling is missing"),
        (
            "bias scaled",
            "F.linear(x, weight, self.base.bias)",
            "F.linear(x, direction, self.base.bias) * self.magnitude / norm",
            "the bias is scaled by g",
        ),
        ("bias forgotten", "weight, self.base.bias", "weight", "the bias is missing"),
        (
            "A on the CPU, whatever the base is on",
            "base.weight.new_empty(rank, base.in_features)",
            "torch.empty(rank, base.in_features, dtype=base.weight.dtype)",
            "works on a CPU only",
        ),
    ],
}
