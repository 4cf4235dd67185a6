# ruff: noqa: E501
"""Wrong answers, (name, old, new, says): see WrongAnswer in tests/checks/test_checks.py."""

_PEARSON = "(x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()"

_CENTRE = "x, y = x - x.mean(), y - y.mean()"

_DRAWN = "labels[torch.randint(len(labels), (len(labels),))]"

WRONG: dict[str, list[tuple[str, str, str, str]]] = {
    "delta_direction": [
        (
            "half the squared sine of a small angle",
            "(1 - cos).mean()",
            "(1 - cos**2).mean() / 2 if (1 - cos).mean() < 0.02 else (1 - cos).mean()",
            "a small change",
        ),
        (
            "in float32",
            "weight.double(), reference.double()",
            "weight, reference",
            "compute the cosine in float64",
        ),
        (
            "an epsilon",
            "w0.norm(dim=1))",
            "w0.norm(dim=1) + 1e-8)",
            "or with a small number added",
        ),
        (
            "float64 after the cosine",
            "w, w0 = weight.double(), reference.double()\n"
            "    cos = (w * w0).sum(dim=1) / (w.norm(dim=1) * w0.norm(dim=1))",
            "w, w0 = weight, reference\n"
            "    cos = ((w * w0).sum(dim=1) / (w.norm(dim=1) * w0.norm(dim=1))).double()",
            "compute the cosine in float64",
        ),
    ],
    "pearson": [
        (
            "none of two points",
            "    x, y = x - x.mean(), y - y.mean()",
            "    if len(x) < 3:\n        return x.new_zeros(())\n    x, y = x - x.mean(), y - y.mean()",
            "two points",
        ),
        (
            "means subtracted from sums",
            f"{_CENTRE}\n    return {_PEARSON}",
            "def s(a, b):\n"
            "        return (a * b).mean() - a.mean() * b.mean()\n"
            "    return s(x, y) / (s(x, x) * s(y, y)).sqrt()",
            "subtract the means before you multiply",
        ),
    ],
    "draw_clusters": [
        (
            "the last never",
            "torch.randint(len(labels), (len",
            "torch.randint(max(len(labels) - 1, 1), (len",
            "draw among all labels, the last too",
        ),
        (
            "labels below 0 left out",
            "clusters.unique()",
            "clusters.unique()\n    labels = labels[labels >= 0]",
            "draw",
        ),
        (
            "rounded to a label",
            "torch.randint(len(labels), (len(labels),))",
            "(torch.rand(len(labels)) * (len(labels) - 1)).round().long()",
            "each of the 5 has the same chance",
        ),
        (
            "points drawn",
            "torch.cat([(clusters == label).nonzero()[:, 0] for label in drawn])",
            "torch.randint(len(clusters), (len(clusters),))",
            "is torn apart",
        ),
        (
            "one point of each",
            "nonzero()[:, 0]",
            "nonzero()[:1, 0]",
            "is torn apart",
        ),
        (
            "without replacement",
            "torch.randint(len(labels), (len(labels),))",
            "torch.randperm(len(labels))",
            "draw with replacement",
        ),
        (
            "doubles lost in a mask",
            "torch.cat([(clusters == label).nonzero()[:, 0] for label in drawn])",
            "torch.isin(clusters, drawn).nonzero()[:, 0]",
            "must stand twice",
        ),
        ("a single cluster", "(len(labels),)", "(1,)", "draw as many as there are"),
        ("as many as points", "(len(labels),)", "(len(clusters),)", "draw as many as there are"),
        (
            "large clusters preferred",
            _DRAWN,
            "clusters[torch.randint(len(clusters), (len(labels),))]",
            "has the same chance",
        ),
        (
            "labels counted from 0",
            "clusters.unique()",
            "torch.arange(int(clusters.max()) + 1)",
            "among labels that occur",
        ),
        (
            "one cluster repeated",
            _DRAWN,
            "labels[torch.randint(len(labels), (1,))].repeat(len(labels))",
            "each is drawn independently",
        ),
        (
            "seldom one after itself",
            f"drawn = {_DRAWN}",
            "picks = [int(torch.randint(len(labels), (1,)))]\n"
            "    while len(picks) < len(labels):\n"
            "        pick = int(torch.randint(len(labels), (1,)))\n"
            "        if pick != picks[-1] or torch.rand(1) < 0.5:\n"
            "            picks.append(pick)\n"
            "    drawn = labels[picks]",
            "each is drawn independently",
        ),
        ("seed set", "drawn =", "torch.manual_seed(0)\n    drawn =", "the same draw each time"),
        (
            "labels returned",
            "return torch.cat([(clusters == label).nonzero()[:, 0] for label in drawn])",
            "return drawn",
            "return the rows, not their labels",
        ),
        (
            "mask returned",
            "return torch.cat([(clusters == label).nonzero()[:, 0] for label in drawn])",
            "return torch.isin(clusters, drawn)",
            "row numbers are whole numbers",
        ),
        ("rows as a column", "nonzero()[:, 0]", "nonzero()", "in one axis"),
    ],
    "split_gradient": [
        ("full alone", "return full, removed", "return full", "expected a tuple (full, removed)"),
    ],
    "delta_magnitude": [
        (
            "lengths through the direction",
            "weight.norm(dim=1), reference.norm(dim=1)",
            "[(w * (w / w.norm(dim=1, keepdim=True))).sum(dim=1) for w in (weight, reference)]",
            "rows of zeros",
        ),
        (
            "of rows that changed",
            "(after - before).abs().mean()",
            "(after - before).abs()[after != before].mean()",
            "two lengths as they were",
        ),
        (
            "the median of many rows",
            "(after - before).abs().mean()",
            "(after - before).abs().quantile(0.5) if len(after) > 16 else (after - before).abs().mean()",
            "larger sizes",
        ),
    ],
}
