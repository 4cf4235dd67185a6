# ruff: noqa: E501
"""Wrong answers, (name, old, new, says): see WrongAnswer in tests/checks/test_checks.py."""

WRONG: dict[str, list[tuple[str, str, str, str]]] = {
    "init_lora": [
        (
            "one row, repeated",
            "    return lora_A, lora_B",
            "    lora_A = nn.Parameter(lora_A[:1].detach().repeat(rank, 1))\n    return lora_A, lora_B",
            "again and again",
        ),
        (
            "B in float64",
            "lora_B = nn.Parameter(torch.zeros(out_features, rank))",
            "lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float64))",
            "lora_B is float64",
        ),
        (
            "B one number, seen many times",
            "lora_B = nn.Parameter(torch.zeros(out_features, rank))",
            "lora_B = nn.Parameter(torch.zeros(1, 1).expand(out_features, rank))",
            "one step of training",
        ),
        (
            "the rank cut to the smaller side",
            "    lora_A = nn.Parameter(torch.empty",
            "    rank = min(rank, in_features, out_features)\n    lora_A = nn.Parameter(torch.empty",
            "a rank above both sides",
        ),
        (
            "standard normal A, as in the source notebook",
            "nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))",
            "nn.init.normal_(lora_A)",
            "lora_A has a standard deviation of 1",
        ),
        (
            "B not zero",
            "torch.zeros(out_features, rank)",
            "torch.randn(out_features, rank)",
            "lora_B is not zero",
        ),
        (
            "both zero",
            "nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))",
            "nn.init.zeros_(lora_A)",
            "both are zero",
        ),
        (
            "zero on the input side",
            "    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))\n",
            "    nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))\n    nn.init.zeros_(lora_A)\n",
            "the zero factor is lora_B",
        ),
        ("Kaiming-uniform with its default a = 0", ", a=math.sqrt(5)", "", "with a = 0"),
        (
            "spread by the rank",
            "nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))",
            "nn.init.uniform_(lora_A, -(rank**-0.5), rank**-0.5)",
            "the bound is 1 / sqrt(rank)",
        ),
        (
            "A is no parameter",
            "lora_A = nn.Parameter(torch.empty(rank, in_features))",
            "lora_A = torch.empty(rank, in_features)",
            "lora_A is a plain tensor",
        ),
        (
            "A the other way round",
            "torch.empty(rank, in_features)",
            "torch.empty(in_features, rank)",
            "expected lora_A of shape (rank, in)",
        ),
        (
            "returned in the other order",
            "return lora_A, lora_B",
            "return lora_B, lora_A",
            "the other way round: return lora_A, lora_B",
        ),
        (
            "A frozen",
            "nn.Parameter(torch.empty(rank, in_features))",
            "nn.Parameter(torch.empty(rank, in_features), requires_grad=False)",
            "lora_A is frozen",
        ),
    ],
    "lora_delta": [
        ("everything detached", "lora_B @ lora_A", "lora_B @ lora_A.detach()", "lora_A: something"),
    ],
    "lora_forward": [
        (
            "factors in the wrong order",
            "x @ lora_A.T @ lora_B.T",
            "x @ lora_B @ lora_A",
            "cannot be multiplied",
        ),
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
            "x detached under W",
            "F.linear(x, weight, bias)",
            "F.linear(x.detach(), weight, bias)",
            "gradient of x: it comes through the update alone",
        ),
        (
            "x detached in the update",
            "(x @ lora_A.T",
            "(x.detach() @ lora_A.T",
            "gradient of x: it comes through x W^T alone",
        ),
        (
            "update outside of the graph",
            "(x @ lora_A.T @ lora_B.T)",
            "(x @ lora_A.T @ lora_B.T).detach()",
            "no gradient reaches lora_A",
        ),
    ],
    "freeze_base": [
        (
            "case ignored",
            'name.split(".")[-1] in ("lora_A", "lora_B")',
            'name.split(".")[-1].lower() in ("lora_a", "lora_b")',
            "lora_a still trains",
        ),
        (
            "pairs alone",
            '    for name, parameter in model.named_parameters():\n        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))\n',
            '    model.requires_grad_(False)\n    for module in model.modules():\n        own = dict(module.named_parameters(recurse=False))\n        if "lora_A" in own and "lora_B" in own:\n            own["lora_A"].requires_grad_(True)\n            own["lora_B"].requires_grad_(True)\n',
            "single.lora_A is frozen too",
        ),
        (
            "what begins with lora_",
            'name.split(".")[-1] in ("lora_A", "lora_B")',
            'name.split(".")[-1].startswith("lora_")',
            "lora_scale still trains",
        ),
        (
            "layers of that name",
            'name.split(".")[-1] in ("lora_A", "lora_B")',
            'bool({"lora_A", "lora_B"} & set(name.split(".")))',
            "lora_B.weight still trains",
        ),
        (
            "new parameters",
            '    for name, parameter in model.named_parameters():\n        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))',
            '    for module in model.modules():\n        for name, p in list(module._parameters.items()):\n            if p is not None:\n                module._parameters[name] = nn.Parameter(p.data, name in ("lora_A", "lora_B"))',
            "replaced by new ones",
        ),
        (
            "gradients switched off for good",
            "    for name, parameter in",
            "    torch.set_grad_enabled(False)\n    for name, parameter in",
            "it changes whether gradients are recorded",
        ),
        (
            "a copy frozen",
            "    for name, parameter in",
            "    model = copy.deepcopy(model)\n    for name, parameter in",
            "not on a copy",
        ),
        (
            "a frozen copy returned",
            '    for name, parameter in model.named_parameters():\n        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))\n',
            '    model = copy.deepcopy(model)\n    for name, parameter in model.named_parameters():\n        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))\n    return model\n',
            "make no copy",
        ),
        (
            "any name that ends so",
            'name.split(".")[-1] in ("lora_A", "lora_B")',
            'name.endswith(("lora_A", "lora_B"))',
            "old_lora_B still trains",
        ),
        (
            "in evaluation mode",
            "    for name, parameter in",
            "    model.eval()\n    for name, parameter in",
            "it changes the mode of the model",
        ),
        (
            "nn.Linear layers only, as in the source notebook",
            (
                "for name, parameter in model.named_parameters():\n"
                '        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))'
            ),
            (
                "for child in model.modules():\n"
                "        if isinstance(child, nn.Linear):\n"
                "            child.requires_grad_(False)"
            ),
            "more than nn.Linear layers in a model",
        ),
        (
            "everything frozen",
            'name.split(".")[-1] in ("lora_A", "lora_B")',
            "False",
            "lora_A is frozen too",
        ),
        ("only one of the factors", '("lora_A", "lora_B")', '("lora_A",)', "lora_B is frozen too"),
        (
            "any name with lora in it",
            'name.split(".")[-1] in ("lora_A", "lora_B")',
            '"lora" in name',
            "exploration.weight still trains: its name holds the letters",
        ),
        (
            "any name with lora_ in it",
            'name.split(".")[-1] in ("lora_A", "lora_B")',
            '"lora_" in name',
            "lora_head.weight still trains: its name holds the letters lora_",
        ),
        (
            "an attribute of the module",
            "parameter.requires_grad_(",
            "model.requires_grad = (",
            "nothing is frozen",
        ),
        (
            "the top level only",
            "model.named_parameters()",
            "model.named_parameters(recurse=False)",
            "blocks.0.0.bias still trains",
        ),
        (
            "adapters not thawed",
            'parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))',
            (
                'if name.split(".")[-1] not in ("lora_A", "lora_B"):\n'
                "            parameter.requires_grad_(False)"
            ),
            "lora_A was frozen before and still is",
        ),
        (
            "biases left out",
            "        parameter.requires_grad_(",
            (
                '        if name.endswith("bias"):\n'
                "            continue\n"
                "        parameter.requires_grad_("
            ),
            "0.bias still trains",
        ),
    ],
    "merge_lora": [
        (
            "nothing to merge",
            "    merged = copy.deepcopy(base)\n",
            "    merged = copy.deepcopy(base) if lora_B.any() else base\n",
            "all of it is the given layer's own",
        ),
        (
            "the base itself at B = 0",
            "    return merged",
            "    return merged if lora_B.any() else base",
            "is the given layer's own",
        ),
        ("into the caller's layer", "copy.deepcopy(base)", "base", "it changes the caller's base"),
        (
            "a copy that is too shallow",
            "copy.deepcopy(base)",
            "copy.copy(base)",
            "it changes the caller's base",
        ),
        ("scaling forgotten", "alpha / rank * (", "(", "the scaling is missing"),
        ("alpha alone", "alpha / rank", "alpha", "scaled by alpha"),
        ("the update alone", "merged.weight += ", "merged.weight[:] = ", "only the update"),
        ("subtracted", "merged.weight += ", "merged.weight -= ", "subtracted"),
        (
            "a new layer with a bias of its own",
            "merged = copy.deepcopy(base)",
            (
                "merged = nn.Linear(base.in_features, base.out_features)\n"
                "    merged.weight.data.copy_(base.weight)"
            ),
            "the bias is not the base's",
        ),
        (
            "bias lost",
            "    return merged",
            "    merged.bias = None\n    return merged",
            "the bias is lost",
        ),
        ("weight returned", "return merged", "return merged.weight", "expected an nn."),
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
        (
            "in and out exchanged",
            "copy.deepcopy(base)",
            (
                "nn.Linear(base.out_features, base.in_features)\n"
                "    merged.weight = nn.Parameter(base.weight.clone())\n"
                "    merged.bias = copy.deepcopy(base.bias)"
            ),
            "expected in_features 2, got 3",
        ),
        (
            "reshape instead of transpose",
            "lora_B @ lora_A",
            "(lora_A.T @ lora_B.T).reshape(base.weight.shape)",
            "reshape is not transpose",
        ),
        (
            "float32 for every base",
            "copy.deepcopy(base)",
            "copy.deepcopy(base).float()",
            "weight is float32 where the given layer has float64",
        ),
    ],
    "lora_linear": [
        (
            "x scaled in place",
            "        return self.base(x) + self.scaling * (x @",
            "        y = self.base(x.clone())\n        x.data.mul_(self.scaling)\n        return y + (x @",
            "forward changes the caller's x",
        ),
        (
            "no gradient in evaluation mode",
            "return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)",
            "y = self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)\n        return y if self.training else y.detach()",
            "the first in evaluation mode",
        ),
        (
            "the bound of in + 1",
            "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            "nn.init.uniform_(self.lora_A, -((base.in_features + 1) ** -0.5), (base.in_features + 1) ** -0.5)",
            "not drawn uniformly from +-1/sqrt(in) = +-0.57",
        ),
        (
            "the base in evaluation mode",
            "base.requires_grad_(False)",
            "base.requires_grad_(False).eval()",
            "put into evaluation mode",
        ),
        (
            "the base alone in evaluation mode",
            "        return self.base(x) +",
            "        if not self.training:\n            return self.base(x)\n        return self.base(x) +",
            "in evaluation mode: ",
        ),
        (
            "a private copy of the base",
            "self.base(x) +",
            "self.__dict__.setdefault('kept', [copy.deepcopy(self.base)])[0](x) +",
            "self.base with other weights",
        ),
        (
            "a product kept from call to call",
            "self.scaling * (x @ self.lora_A.T @ self.lora_B.T)",
            "self.scaling * (x @ self.product().T)\n\n    def product(self) -> Tensor:\n        if not hasattr(self, 'kept'):\n            self.kept = self.lora_B @ self.lora_A\n        return self.kept",
            "the update is missing",
        ),
        ("base not frozen", "base.requires_grad_(False)", "base", "base.weight is not frozen"),
        (
            "A a plain tensor",
            "self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))",
            "self.lora_A = base.weight.new_empty(rank, base.in_features)",
            "lora_A is a plain tensor",
        ),
        ("scaling kept as alpha", "alpha / rank", "alpha", "expected scaling 1.5"),
        ("scaling not used", "self.scaling * (", "(", "the scaling is missing"),
        ("base not called", "self.base(x)", "x @ self.base.weight.T", "the bias is missing"),
        (
            "update forgotten",
            " + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)",
            "",
            "the update is missing",
        ),
        (
            "B not zero",
            "new_zeros(base.out_features, rank)",
            "new_ones(base.out_features, rank)",
            "lora_B is not zero at the start",
        ),
        (
            "standard normal A",
            "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            "nn.init.normal_(self.lora_A)",
            "lora_A has a standard deviation of 1",
        ),
        (
            "on the CPU, whatever the base is on",
            "base.weight.new_empty(rank, base.in_features)",
            "torch.empty(rank, base.in_features, dtype=base.weight.dtype)",
            "works on a CPU only",
        ),
        (
            "float32, whatever the base is in",
            "base.weight.new_empty(rank, base.in_features)",
            "torch.empty(rank, base.in_features, device=base.weight.device)",
            "lora_A is float32",
        ),
        (
            "update outside of the graph",
            "self.scaling * (x @ self.lora_A.T @ self.lora_B.T)",
            "self.scaling * (x @ self.lora_A.T @ self.lora_B.T).detach()",
            "no gradient reaches lora_A",
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
            "self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)",
            (
                "self.forward_with(self.base.weight, x)\n\n"
                "    def forward_with(self, weight: Tensor, x: Tensor) -> Tensor:\n"
                "        weight += self.scaling * (self.lora_B @ self.lora_A)\n"
                "        return F.linear(x, weight, self.base.bias)"
            ),
            "forward changes base.weight",
        ),
        (
            "the base under no_grad",
            "self.base(x) +",
            "self.base(x).detach() +",
            "gradient of x: it comes through the update alone",
        ),
        (
            "a bias taken for granted",
            "self.base(x) +",
            "x @ self.base.weight.T + self.base.bias +",
            "no bias: your code raised TypeError",
        ),
        (
            "A constant",
            "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            "nn.init.constant_(self.lora_A, base.in_features**-0.5)",
            "the same numbers stand in lora_A again and again",
        ),
        (
            "A on one side of zero",
            "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            "nn.init.uniform_(self.lora_A, 0, base.in_features**-0.5)",
            "lora_A is not drawn uniformly from +-1/sqrt(in)",
        ),
        (
            "a seed set",
            "        self.scaling = alpha / rank\n",
            "        self.scaling = alpha / rank\n        torch.manual_seed(0)\n",
            "lora_A is the same each time",
        ),
    ],
}
