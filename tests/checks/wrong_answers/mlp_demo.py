# ruff: noqa: E501
"""Wrong answers, (name, old, new, says): see WrongAnswer in tests/checks/test_checks.py."""

_BY_NAME = """for name in names:
        parent, _, child = name.rpartition(".")
        layer = adapted.get_submodule(name)
        setattr(adapted.get_submodule(parent), child, make(layer))"""

_LOOP = """\
    for _ in range(epochs):
        total = 0.0
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(images)
        losses.append(total / len(x))
"""

WRONG: dict[str, list[tuple[str, str, str, str]]] = {
    "accuracy": [
        ("exp", "model(x).argmax", "model(x).exp().argmax", "large logits"),
        (
            "sigmoid",
            "model(x).argmax(dim=1)",
            "torch.sigmoid(model(x)).argmax(dim=1)",
            "large logits",
        ),
        (
            "a mean of batch means",
            "    with torch.no_grad():\n        predicted = model(x).argmax(dim=1)\n",
            (
                "    with torch.no_grad():\n"
                "        predicted = torch.cat([model(part).argmax(dim=1) for part in x.split(256)])\n"
                "    hits = (predicted == y).float().split(256)\n"
                "    predicted, y = torch.stack([part.mean() for part in hits]).mean(), 1\n"
                "    model.train(was_training)\n"
                "    return 100 * predicted.item()\n"
            ),
            "random images: expected",
        ),
        (
            "the first images only",
            "model(x).argmax(dim=1)",
            "model(x[:256]).argmax(dim=1)\n    y = y[:256]",
            "random images: expected",
        ),
        (
            "dropout alone in evaluation mode",
            "    model.eval()\n",
            (
                "    for module in model.modules():\n"
                "        if isinstance(module, nn.Dropout):\n"
                "            module.eval()\n"
            ),
            "a layer is still in training mode",
        ),
        (
            "the model frozen",
            "    model.eval()\n",
            "    model.eval().requires_grad_(False)\n",
            "is frozen now: no_grad() is enough",
        ),
        (
            "the model in float64",
            "model(x)",
            "model.double()(x.double())",
            "is not as it was: leave the model as you found it",
        ),
        ("training mode", "    model.eval()\n", "", "measured in training mode"),
        (
            "mode not put back",
            "    model.train(was_training)\n",
            "",
            "a model in training mode is left in evaluation mode",
        ),
        (
            "always training afterwards",
            "model.train(was_training)",
            "model.train()",
            "a model in evaluation mode is left in training mode",
        ),
        (
            "only the outermost mode put back",
            "model.train(was_training)",
            "model.training = was_training",
            "layer 0 is left in evaluation mode, the model is not: model.train(True)",
        ),
        ("fraction", "100 * ", "", "this is the fraction"),
        (
            "hits",
            "100 * (predicted == y).float().mean()",
            "(predicted == y).sum()",
            "number of hits",
        ),
        ("errors", "predicted == y", "predicted != y", "these are the errors"),
        ("over the images", "dim=1", "dim=0", "argmax runs over the images (dim=0)"),
        ("a tensor", ".item()", "", "expected a plain number, got a tensor"),
        (
            "the images changed",
            "    model.eval()\n",
            "    model.eval()\n    x /= x.max()\n",
            "it changes the caller's images",
        ),
        (
            "printed",
            "return 100 * (predicted == y).float().mean().item()",
            "print(100 * (predicted == y).float().mean().item())",
            "got None",
        ),
    ],
    "split_rows": [
        (
            "the last row never",
            "randperm(count,",
            "randperm(max(count - 1, sum(sizes)),",
            "row 4 is in part 1 in 0% of draws",
        ),
        (
            "tied keys",
            "    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))\n",
            "    keys = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))\n    order = keys.argsort(stable=True)\n",
            "give each row the same chance",
        ),
        (
            "one row at least",
            "    return list(",
            "    sizes = [max(1, size) for size in sizes]\n    return list(",
            "expected 0 rows",
        ),
        (
            "two splits in turn",
            "manual_seed(seed)",
            "manual_seed(seed % 2)",
            "each seed draws all parts anew",
        ),
        (
            "few splits",
            "manual_seed(seed)",
            "manual_seed(min(seed, 2))",
            "each seed draws all parts anew",
        ),
        (
            "seed 0 left to chance",
            "torch.Generator().manual_seed(seed)",
            "torch.Generator().manual_seed(seed or torch.seed())",
            "seed 0 gives other rows each time",
        ),
        (
            "drawn anew for each part",
            "return list(order[: sum(sizes)].split(sizes))",
            (
                "generator = torch.Generator().manual_seed(seed)\n"
                "    return [torch.randperm(count, generator=generator)[:size] for size in sizes]"
            ),
            "and in one before: draw once",
        ),
        (
            "drawn with replacement",
            "torch.randperm(count, generator",
            "torch.randint(count, (count,), generator",
            "a row stands twice in part 1",
        ),
        (
            "not shuffled",
            "torch.randperm(count, generator=torch.Generator().manual_seed(seed))",
            "torch.arange(count)",
            "not shuffled: the rows follow one another",
        ),
        (
            "a turned order",
            "torch.randperm(count, generator=torch.Generator().manual_seed(seed))",
            "torch.arange(count).roll(7 * seed + 3)",
            "not shuffled: the rows follow one another",
        ),
        (
            "sorted before it is cut",
            "order[: sum(sizes)].split",
            "order[: sum(sizes)].sort().values.split",
            "part 1 comes from one end of the file",
        ),
        (
            "one order for all seeds, turned",
            "manual_seed(seed))",
            "manual_seed(0)).roll(seed)",
            "rows in part 1: each seed draws all parts anew",
        ),
        (
            "one split for all seeds",
            "manual_seed(seed)",
            "manual_seed(0)",
            "rows in part 1: each seed draws all parts anew",
        ),
        (
            "one last part for all seeds",
            "    return list(order[: sum(sizes)].split(sizes))",
            (
                "    *others, last = sizes\n"
                "    fixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:last]\n"
                "    order = order[~torch.isin(order, fixed)]\n"
                "    return [*order[: sum(others)].split(others), fixed]"
            ),
            "rows in part 2: each seed draws all parts anew",
        ),
        (
            "seed not used",
            ", generator=torch.Generator().manual_seed(seed)",
            "",
            "gives other rows each time: use seed",
        ),
        (
            "only the first rows shuffled",
            "torch.randperm(count,",
            "torch.randperm(sum(sizes),",
            "only the first rows are ever drawn",
        ),
        (
            "parts of equal size",
            ".split(sizes)",
            ".chunk(len(sizes))",
            "part 1: expected 5 rows, shape (5,), got (4,)",
        ),
        (
            "the rest as one more part",
            "order[: sum(sizes)].split(sizes)",
            "order.split([*sizes, count - sum(sizes)])",
            "expected 3 parts, got 4",
        ),
        (
            "the caller's sizes changed",
            "    return list(",
            "    sizes.append(count - sum(sizes))\n    return list(",
            "it changes the caller's sizes",
        ),
        ("printed", "return list(", "print(", "got None"),
    ],
    "chosen_scores": [
        (
            "a little of the test images",
            "validation.argmax(",
            "(validation + 1e-3 * test).argmax(",
            "chosen_scores",
        ),
        ("squeezed", "[:, 0]", ".squeeze()", "does squeeze() drop it?"),
    ],
    "adapted_copy": [
        (
            "one adapter for a shape",
            '    for name in names:\n        parent, _, child = name.rpartition(".")\n        layer = adapted.get_submodule(name)\n        setattr(adapted.get_submodule(parent), child, make(layer))\n',
            '    made = {}\n    for name in names:\n        parent, _, child = name.rpartition(".")\n        layer = adapted.get_submodule(name)\n        key = str([p.shape for p in layer.parameters()])\n        made[key] = made.get(key) or make(layer)\n        setattr(adapted.get_submodule(parent), child, made[key])\n',
            "two layers of one shape share an adapter",
        ),
        (
            "no names, no copy",
            "    adapted = copy",
            "    if not names:\n        return model.requires_grad_(False)\n    adapted = copy",
            "the caller's model is frozen now: freeze the copy",
        ),
        (
            "the model itself where no name is given",
            "    adapted = copy.deepcopy(model).requires_grad_(False)\n",
            "    if not names:\n        return model\n    adapted = copy.deepcopy(model).requires_grad_(False)\n",
            "still trains: the copy is frozen, also where names is empty",
        ),
        (
            "dropout set to 0",
            "    return adapted",
            "    for module in adapted.modules():\n        if isinstance(module, nn.Dropout):\n            module.p = 0.0\n    return adapted",
            "the copy's drop.p is 0.0, not 0.25",
        ),
        (
            "dropout in evaluation mode",
            "    return adapted",
            "    for module in adapted.modules():\n        if isinstance(module, nn.Dropout):\n            module.eval()\n    return adapted",
            "the copy's drop.training is False, not True",
        ),
        ("no copy", "copy.deepcopy(model)", "model", "the caller's model has adapters now"),
        (
            "a shallow copy",
            "copy.deepcopy(model)",
            "copy.copy(model)",
            "the caller's model has adapters now",
        ),
        (
            "the caller frozen",
            "copy.deepcopy(model).requires_grad_(False)",
            "copy.deepcopy(model.requires_grad_(False))",
            "the caller's model is frozen now",
        ),
        (
            "layers of the caller wrapped",
            "layer = adapted.get_submodule(name)",
            "layer = model.get_submodule(name)",
            "the adapters wrap the caller's own layers",
        ),
        (
            "setattr with a path",
            "setattr(adapted.get_submodule(parent), child,",
            "setattr(adapted, name,",
            "the copy got a child called 'blocks.1.query'",
        ),
        (
            "top level only",
            _BY_NAME,
            (
                "for name, child in list(adapted.named_children()):\n"
                "        if name in names:\n"
                "            setattr(adapted, name, make(child))"
            ),
            "a name may lead to any depth",
        ),
        (
            "every linear layer",
            "for name in names:",
            "for name in [n for n, m in adapted.named_modules() if isinstance(m, nn.Linear)]:",
            "blocks.0.query is swapped too: it is not in names",
        ),
        (
            "names that end alike",
            "for name in names:",
            "for name in [n for n, _ in adapted.named_modules() if n.endswith(tuple(names))]:",
            "blocks.0.head is swapped too: its name only ends like one",
        ),
        (
            "the last part of a name alone",
            "for name in names:",
            (
                "for name in [n for n, _ in adapted.named_modules()\n"
                "                 if n.split('.')[-1] in [name.split('.')[-1] for name in names]]:"
            ),
            "blocks.0.query is swapped too: its name only ends like one",
        ),
        (
            "unknown names passed over",
            "for name in names:",
            "for name in [n for n, _ in adapted.named_modules() if n in names]:",
            "a name that is not there passes in silence",
        ),
        (
            "a new layer inside",
            "make(layer)",
            "make(nn.Linear(layer.in_features, layer.out_features))",
            "the copy's blocks.0.mlp.2.base.weight has other values",
        ),
        ("wrapped twice", "make(layer)", "make(make(layer))", "base is already adapted"),
        (
            "not put in",
            "setattr(adapted.get_submodule(parent), child, make(layer))",
            "layer = make(layer)",
            "no layer is swapped",
        ),
        (
            "the last one forgotten",
            "for name in names:",
            "for name in names[:-1]:",
            "blocks.0.mlp.2 (Linear) is not swapped",
        ),
        (
            "frozen at the end",
            "return adapted",
            "return adapted.requires_grad_(False)",
            "lora_A of a LoRALinear is frozen: freeze the copy before make",
        ),
        (
            "frozen by name at the end",
            "    return adapted",
            (
                "    for name, parameter in adapted.named_parameters():\n"
                '        parameter.requires_grad_("lora_" in name)\n'
                "    return adapted"
            ),
            "magnitude of a DoRALinear is frozen: freeze the copy before make",
        ),
        (
            "frozen by two adapters' names",
            "    return adapted",
            (
                "    for name, parameter in adapted.named_parameters():\n"
                '        parameter.requires_grad_("lora_" in name or "magnitude" in name)\n'
                "    return adapted"
            ),
            "shift of a Shifted is frozen: freeze the copy before make",
        ),
        (
            "nn.Linear layers alone",
            "layer = adapted.get_submodule(name)\n",
            (
                "layer = adapted.get_submodule(name)\n"
                "        if not isinstance(layer, nn.Linear):\n"
                "            continue\n"
            ),
            "embed (Embedding) is not swapped",
        ),
        (
            "unknown names passed over beside good ones",
            "    for name in names:",
            (
                "    known = [name for name, _ in adapted.named_modules()]\n"
                "    assert any(name in known for name in names)\n"
                "    for name in [name for name in names if name in known]:"
            ),
            "a name that is not there passes in silence",
        ),
        ("nothing frozen", ".requires_grad_(False)", "", "still trains: freeze the rest"),
        (
            "the layers frozen",
            "copy.deepcopy(model).requires_grad_(False)\n",
            (
                "copy.deepcopy(model)\n"
                "    for child in adapted.children():\n"
                "        child.requires_grad_(False)\n"
            ),
            "start still trains: a model may have parameters of its own",
        ),
        (
            "the caller frozen for a while",
            "copy.deepcopy(model).requires_grad_(False)\n",
            ("copy.deepcopy(model.requires_grad_(False))\n    model.requires_grad_(True)\n"),
            "the caller's blocks.0.norm.weight was frozen and trains now",
        ),
        (
            "the caller in evaluation mode",
            "copy.deepcopy(model)",
            "copy.deepcopy(model.eval())",
            "the caller's model is in another mode now",
        ),
        (
            "the caller's names used up",
            "for name in names:",
            "while names:\n        name = names.pop()",
            "it changes the caller's names",
        ),
        (
            "unknown names at the top passed over",
            "    for name in names:\n",
            (
                "    for name in names:\n"
                '        if "." not in name and not hasattr(adapted, name):\n'
                "            continue\n"
            ),
            "a name that is not there passes in silence",
        ),
        (
            "unknown blocks passed over",
            "    for name in names:\n",
            (
                "    for name in names:\n"
                '        if name.rpartition(".")[0] not in dict(adapted.named_modules()):\n'
                "            continue\n"
            ),
            "a name that is not there passes in silence",
        ),
        (
            "nn.Linear layers frozen, as in the source notebook",
            "copy.deepcopy(model).requires_grad_(False)\n",
            (
                "copy.deepcopy(model)\n"
                "    for layer in adapted.modules():\n"
                "        if isinstance(layer, nn.Linear):\n"
                "            layer.requires_grad_(False)\n"
            ),
            "embed.weight still trains: there are more than nn.Linear layers",
        ),
        ("the model returned", "return adapted", "return model", "no layer is swapped"),
        ("nothing returned", "return adapted", "print(adapted)", "got None"),
    ],
    "paired_interval": [
        ("the other way round", "a - b for", "b - a for", "the first method minus the second"),
        ("absolute differences", "a - b for", "abs(a - b) for", "keep their sign"),
        (
            "not paired",
            "stdev(differences)",
            "math.hypot(stdev(first), stdev(second))",
            "low: not paired",
        ),
        (
            "Student's test for two groups",
            "stats.t.ppf(0.975, n - 1) * stdev(differences)",
            "stats.t.ppf(0.975, 2 * n - 2) * math.hypot(stdev(first), stdev(second))",
            "low: not paired",
        ),
        (
            "not paired, and with 1.96",
            "stats.t.ppf(0.975, n - 1) * stdev(differences)",
            "1.96 * math.hypot(stdev(first), stdev(second))",
            "not paired, and 1.96",
        ),
        (
            "both sorted",
            "zip(first, second, strict=True)",
            "zip(sorted(first), sorted(second), strict=True)",
            "a pair is one seed, not one place",
        ),
        (
            "n below the spread",
            "stdev(differences)",
            "torch.tensor(differences).std(correction=0).item()",
            "the spread has n - 1 below it",
        ),
        ("spread of one difference", " / math.sqrt(n)", "", "with the spread of one difference"),
        ("divided by n", "math.sqrt(n)", "n", "divided by n"),
        (
            "a variance",
            "stdev(differences) / math.sqrt(n)",
            "stdev(differences) ** 2 / n",
            "with a variance",
        ),
        (
            "the normal distribution's 1.96",
            "stats.t.ppf(0.975, n - 1)",
            "1.959964",
            "1.96 is for very many seeds",
        ),
        ("two errors", "stats.t.ppf(0.975, n - 1)", "2", "2 is for very many seeds"),
        ("one error", "stats.t.ppf(0.975, n - 1)", "1", "is no 95 % interval"),
        ("degrees of freedom", "n - 1", "n", "it has n - 1"),
        ("one-sided", "0.975", "0.95", "2.5 % lie outside on each side"),
        (
            "a one-sided verdict",
            "    if low > 0:",
            (
                "    inner = stats.t.ppf(0.95, n - 1) * stdev(differences) / math.sqrt(n)\n"
                "    if mean - inner > 0:"
            ),
            "'higher', but the interval holds 0",
        ),
        (
            "1.96 for many seeds",
            "stats.t.ppf(0.975, n - 1)",
            "(1.959964 if n >= 30 else stats.t.ppf(0.975, n - 1))",
            "1.96 is for very many seeds",
        ),
        (
            "nothing said where nothing varies",
            "    if low > 0:",
            '    if low == high:\n        return low, high, "no difference detected"\n    if low > 0:',
            "but the interval lies on one side of 0: 'higher'",
        ),
        ("around 0", "mean = fmean(differences)", "mean = 0.0", "it lies around the mean"),
        (
            "low and high exchanged",
            "mean - half, mean + half",
            "mean + half, mean - half",
            "low and high have changed places",
        ),
        (
            "mean and half the width",
            "low, high = mean - half, mean + half",
            "low, high = mean, half",
            "this is the mean: return the two ends",
        ),
        ("by the sign of the mean", "if low > 0:", "if mean > 0:", "but the interval holds 0"),
        ("never lower", "high < 0", "high < -1e9", "the interval lies on one side of 0: 'lower'"),
        ("turned round", '"higher"', '"lower" + ""', "but the first method is higher"),
        (
            "equal",
            '"no difference detected"',
            '"equal"',
            "what was not detected may still be there",
        ),
        ("touching 0", "if low > 0:", "if low >= 0:", "'higher', but the interval holds 0"),
        ("cut to the shorter one", ", strict=True", "", "make no pairs"),
        (
            "as many pairs as the first has",
            "a - b for a, b in zip(first, second, strict=True)",
            "first[i] - second[i] for i in range(len(first))",
            "2 and 3 values make no pairs",
        ),
        (
            "one value against all",
            "differences = [a - b for a, b in zip(first, second, strict=True)]",
            "differences = (torch.tensor(first).double() - torch.tensor(second).double()).tolist()",
            "3 and 1 values make no pairs",
        ),
        (
            "the example by heart",
            "    n = len",
            '    return -1.182446, 5.182446, "no difference detected"\n    n = len',
            "the answer to the example",
        ),
        (
            "the caller's list sorted",
            "    n = len",
            "    first.sort()\n    n = len",
            "it changes the caller's first",
        ),
        (
            "printed",
            'return low, high, "no difference detected"',
            'print(low, high, "no difference detected")',
            "got None",
        ),
    ],
    "train": [
        (
            "zeroed after the step",
            "            optimizer.zero_grad()\n            loss.backward()\n            optimizer.step()\n",
            "            loss.backward()\n            optimizer.step()\n            optimizer.zero_grad()\n",
            "goes into the first step",
        ),
        (
            "frozen with a gradient",
            "optimizer.step()",
            "torch.optim.SGD(model.parameters(), learning_rate).step()",
            "bias was frozen and has moved",
        ),
        (
            "a shared parameter twice",
            "optimizer.step()",
            "for module in model.modules():\n                for p in module.parameters(recurse=False):\n                    if p.requires_grad and p.grad is not None:\n                        p.data -= learning_rate * p.grad",
            "two layers share it",
        ),
        (
            "stopped at a small loss",
            "        losses.append(total / len(x))\n",
            "        losses.append(total / len(x))\n        if losses[-1] < 2e-3:\n            break\n",
            "losses, one an epoch",
        ),
        (
            "stopped where the loss rises",
            "        losses.append(total / len(x))\n",
            "        losses.append(total / len(x))\n        if len(losses) > 4 and losses[-1] > losses[-2]:\n            break\n",
            "losses, one an epoch",
        ),
        (
            "the mode put back as found",
            f"    model.train()\n{_LOOP}    model.eval()\n",
            f"    was = model.training\n    model.train()\n{_LOOP}    model.train(was)\n",
            "the model is left in training mode: end with model.eval()",
        ),
        (
            "the last layer alone",
            "[p for p in model.parameters() if p.requires_grad]",
            "list(model.parameters())[-2:]",
            "is not frozen, but does not move",
        ),
        (
            "layers with a frozen part left out",
            "[p for p in model.parameters() if p.requires_grad]",
            (
                "[p for module in model.modules() for p in module.parameters(recurse=False)\n"
                "                  if all(q.requires_grad for q in module.parameters(recurse=False))]"
            ),
            "1.bias is not frozen, but does not move",
        ),
        (
            "gradients clipped",
            "            optimizer.step()\n",
            (
                "            torch.nn.utils.clip_grad_norm_(parameters, 5.0)\n"
                "            optimizer.step()\n"
            ),
            "one step: ",
        ),
        (
            "the loss in evaluation mode",
            (
                "            optimizer.zero_grad()\n"
                "            loss.backward()\n"
                "            optimizer.step()\n"
                "            total += loss.item() * len(images)\n"
            ),
            (
                "            optimizer.zero_grad()\n"
                "            loss.backward()\n"
                "            model.eval()\n"
                "            total += F.cross_entropy(model(images), labels).item() * len(images)\n"
                "            model.train()\n"
                "            optimizer.step()\n"
            ),
            "measured in evaluation mode",
        ),
        (
            "the model in float64",
            "    model.train()\n",
            "    model.double().train()\n    x = x.double()\n",
            "is torch.float64 afterwards",
        ),
        (
            "gradients that add up",
            "            optimizer.zero_grad()\n",
            "",
            "the gradients add up from step to step",
        ),
        (
            "gradients cleared too late",
            "            optimizer.zero_grad()\n            loss.backward()\n",
            "            loss.backward()\n            optimizer.zero_grad()\n",
            "nothing moved in the given model",
        ),
        ("no step", "            optimizer.step()\n", "", "nothing moved in the given model"),
        (
            "sum of the losses",
            "cross_entropy(model(images), labels)",
            'cross_entropy(model(images), labels, reduction="sum")',
            "the loss is the sum over the batch",
        ),
        (
            "softmax twice",
            "model(images)",
            "model(images).softmax(dim=1)",
            "cross_entropy takes logits",
        ),
        ("momentum", "lr=learning_rate", "lr=learning_rate, momentum=0.9", "a momentum of 0.9"),
        (
            "loss after the epoch",
            "total / len(x)",
            "F.cross_entropy(model(x), y).item()",
            "measured after the epoch",
        ),
        ("Adam", "torch.optim.SGD", "torch.optim.Adam", "this is Adam"),
        (
            "no batches",
            "zip(x.split(batch_size), y.split(batch_size), strict=True)",
            "[(x, y)]",
            "one step an epoch",
        ),
        (
            "batches made even",
            "zip(x.split(batch_size), y.split(batch_size), strict=True)",
            "zip(*(t.chunk(-(-len(x) // batch_size)) for t in (x, y)), strict=True)",
            "the batches are made even",
        ),
        (
            "last batch left out",
            "            loss = ",
            "            if len(images) < batch_size:\n                continue\n            loss = ",
            "the last, smaller batch is left out",
        ),
        (
            "shuffled",
            "    model.train()\n",
            (
                "    model.train()\n"
                "    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))\n"
                "    x, y = x[order], y[order]\n"
            ),
            "the images come in another order",
        ),
        ("one epoch", "range(epochs)", "range(1)", "expected 3 losses, one an epoch: 1 came"),
        (
            "everything thawed",
            "[p for p in model.parameters() if p.requires_grad]",
            "model.requires_grad_(True).parameters()",
            "0.weight was frozen and has moved",
        ),
        (
            "evaluation mode",
            "    model.train()\n",
            "",
            "it trains in evaluation mode",
        ),
        (
            "training mode afterwards",
            "    model.eval()\n",
            "",
            "the model is left in training mode: end with model.eval()",
        ),
        (
            "evaluation mode of the outermost module",
            "model.eval()",
            "model.training = False",
            "layer 0 is left in training mode, the model is not: model.eval()",
        ),
        (
            "mean of batch means",
            "loss.item() * len(images)",
            "loss.item() * len(x) / len(x.split(batch_size))",
            "a mean of batch means",
        ),
        ("the sum as the loss", "total / len(x)", "total", "this is the sum"),
        (
            "the last batch's loss",
            "losses.append(total / len(x))",
            "losses.append(loss.item())",
            "this is the last batch's",
        ),
        ("graphs kept", "loss.item()", "loss", "expected a plain number, got a tensor"),
        (
            "x changed in place",
            "    model.train()\n",
            "    model.train()\n    x -= x.mean(dim=0)\n",
            "it changes the caller's x",
        ),
        ("printed", "return losses", "print(losses)", "got None"),
    ],
}
