"""Wrong answers, (name, old, new, says): see WrongAnswer in tests/checks/test_checks.py."""

_PEARSON = "(x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()"

_CENTRE = "x, y = x - x.mean(), y - y.mean()"

_DRAWN = "labels[torch.randint(len(labels), (len(labels),))]"

_ALONG = "(gradient * v).sum(dim=1) / v.norm(dim=1)"

_SPLIT = "along = (gradient * v).sum(dim=1, keepdim=True) / norm**2 * v"

WRONG: dict[str, list[tuple[str, str, str, str]]] = {
    "delta_magnitude": [
        ("signs kept", "(after - before).abs()", "(after - before)", "gains and losses cancel"),
        (
            "absolute value of the mean",
            "(after - before).abs().mean()",
            "(after - before).mean().abs()",
            "gains and losses cancel",
        ),
        (
            "length of the change",
            "(after - before).abs()",
            "(weight - reference).norm(dim=1)",
            "how long W - W0 is",
        ),
        (
            "norms over the outputs",
            "weight.norm(dim=1), reference.norm(dim=1)",
            "weight.norm(dim=0), reference.norm(dim=0)",
            "one norm per input (dim=0)",
        ),
        (
            "norm of the whole matrix",
            "weight.norm(dim=1), reference.norm(dim=1)",
            "weight.norm(), reference.norm()",
            "one norm for the whole matrix",
        ),
        ("no mean", ".abs().mean()", ".abs()", "one number per row: take their mean"),
        ("sum", ".mean()", ".sum()", "this is the sum"),
        (
            "mean over the inputs",
            ".mean()",
            ".sum() / weight.shape[1]",
            "divided by the wrong number",
        ),
        ("squares", ".abs()", ".square()", "these are squares"),
        (
            "relative change",
            "(after - before).abs()",
            "((after - before) / before).abs()",
            "a relative change",
        ),
        ("largest change", ".abs().mean()", ".abs().max()", "the largest change"),
        (
            "entries compared",
            "(after - before).abs()",
            "(weight - reference).abs()",
            "the mean change of an entry",
        ),
        (
            "the example by heart",
            "return (after - before).abs().mean()",
            "return torch.tensor(6.0)",
            "the answer to the example",
        ),
        (
            "in place",
            "(after - before).abs().mean()",
            "weight.sub_(reference).norm(dim=1).mean()",
            "it changes the caller's weight",
        ),
    ],
    "delta_direction": [
        ("1 - forgotten", "(1 - cos)", "cos", "this is the mean cosine"),
        (
            "over the outputs",
            "(w * w0).sum(dim=1) / (w.norm(dim=1) * w0.norm(dim=1))",
            "(w * w0).sum(dim=0) / (w.norm(dim=0) * w0.norm(dim=0))",
            "cosines of the columns (dim=0)",
        ),
        (
            "the matrix as one vector",
            "(w * w0).sum(dim=1) / (w.norm(dim=1) * w0.norm(dim=1))",
            "(w * w0).sum() / (w.norm() * w0.norm())",
            "one cosine for the whole matrix",
        ),
        ("no mean", "(1 - cos).mean()", "1 - cos", "one number per row"),
        ("sum", ".mean()", ".sum()", "this is the sum"),
        ("mean over the inputs", ".mean()", ".sum() / w.shape[1]", "divided by the wrong number"),
        ("absolute cosine", "(1 - cos)", "(1 - cos.abs())", "|cos| takes a reversed row"),
        ("squared cosine", "(1 - cos)", "(1 - cos**2)", "cos is squared"),
        (
            "dot product",
            " / (w.norm(dim=1) * w0.norm(dim=1))",
            "",
            "not divided by both lengths",
        ),
        (
            "W not normalized",
            "(w.norm(dim=1) * w0.norm(dim=1))",
            "w0.norm(dim=1)",
            "divided by the lengths in W0 alone",
        ),
        ("angle", "(1 - cos)", "cos.acos()", "this is the angle"),
        (
            "direction of the change",
            "w, w0 = weight.double(), reference.double()",
            "w, w0 = weight.double() - reference.double(), reference.double()",
            "the cosine of W - W0 and W0",
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
            "with nothing added to it",
        ),
        (
            "float64 after the cosine",
            "w, w0 = weight.double(), reference.double()\n"
            "    cos = (w * w0).sum(dim=1) / (w.norm(dim=1) * w0.norm(dim=1))",
            "w, w0 = weight, reference\n"
            "    cos = ((w * w0).sum(dim=1) / (w.norm(dim=1) * w0.norm(dim=1))).double()",
            "compute the cosine in float64",
        ),
        (
            "the example by heart",
            "return (1 - cos).mean()",
            "return torch.tensor(0.8)",
            "the answer to the example",
        ),
    ],
    "pearson": [
        ("covariance", _PEARSON, "(x * y).mean()", "this is the covariance"),
        ("covariance by n - 1", _PEARSON, "(x * y).sum() / (len(x) - 1)", "this is the covariance"),
        ("sum of products", _PEARSON, "(x * y).sum()", "this is the sum of products"),
        (
            "n above, n - 1 below",
            _PEARSON,
            "(x * y).mean() / (x.std() * y.std())",
            "divided by n and by n - 1",
        ),
        (
            "n - 1 above, n below",
            _PEARSON,
            "(x * y).sum() / (len(x) - 1) / (x.std(correction=0) * y.std(correction=0))",
            "divided by n and by n - 1",
        ),
        ("squared", _PEARSON, f"({_PEARSON}) ** 2", "this is r squared"),
        ("sign lost", _PEARSON, f"({_PEARSON}).abs()", "the sign is lost"),
        (
            "Spearman's",
            "x, y = x",
            "x, y = (t.argsort().argsort().float() for t in (x, y))\n    x, y = x",
            "Spearman's correlation",
        ),
        ("means kept", _CENTRE, "", "the means are not subtracted"),
        ("mean of y kept", _CENTRE, "x = x - x.mean()", "the mean of y is not subtracted"),
        ("root forgotten", ".sqrt()", "", "the root is missing"),
        (
            "variances below",
            _PEARSON,
            "(x * y).sum() / (len(x) - 1) / (x.var() * y.var())",
            "variances",
        ),
        ("slope", _PEARSON, "(x * y).sum() / x.square().sum()", "this is the slope of y over x"),
        (
            "slope the other way",
            _PEARSON,
            "(x * y).sum() / y.square().sum()",
            "the slope of x over y",
        ),
        (
            "the whole table",
            f"return {_PEARSON}",
            "return torch.corrcoef(torch.stack([x, y]))",
            "this is the table of all correlations",
        ),
        (
            "means subtracted from sums",
            f"{_CENTRE}\n    return {_PEARSON}",
            "def s(a, b):\n"
            "        return (a * b).mean() - a.mean() * b.mean()\n"
            "    return s(x, y) / (s(x, x) * s(y, y)).sqrt()",
            "subtract the means before you multiply",
        ),
        ("in place", _CENTRE, "x, y = x.sub_(x.mean()), y - y.mean()", "it changes the caller's x"),
        (
            "the example by heart",
            f"return {_PEARSON}",
            "return torch.tensor(-5 / 6)",
            "the answer to the example",
        ),
    ],
    "draw_clusters": [
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
    "magnitude_gradient": [
        ("not divided", " / v.norm(dim=1)", "", "not divided by the length"),
        ("squared length", "v.norm(dim=1)", "v.norm(dim=1) ** 2", "divided by the squared length"),
        ("cosine", "v.norm(dim=1)", "v.norm(dim=1) / gradient.norm(dim=1)", "cosine of equation 8"),
        ("other length", "v.norm(dim=1)", "gradient.norm(dim=1)", "divided by ||gradient||"),
        (
            "sign lost",
            "(gradient * v).sum(dim=1)",
            "(gradient * v).sum(dim=1).abs()",
            "sign is lost",
        ),
        ("step instead of gradient", "return ", "return -", "the sign is wrong"),
        (
            "over the outputs",
            _ALONG,
            "(gradient * v).sum(dim=0) / v.norm(dim=0)",
            "summed over the outputs (dim=0)",
        ),
        (
            "whole matrix",
            _ALONG,
            "(gradient * v).sum() / v.norm()",
            "one number for the whole matrix",
        ),
        ("norm of the whole matrix", "v.norm(dim=1)", "v.norm()", "norm of the whole matrix"),
        ("matrix product", "(gradient * v).sum(dim=1)", "gradient @ v.T", "pairs each row"),
        ("length of the gradient", _ALONG, "gradient.norm(dim=1)", "how long the gradient is"),
        (
            "not added up",
            _ALONG,
            "gradient * v / v.norm(dim=1, keepdim=True)",
            "products of entries",
        ),
        (
            "the part itself",
            _ALONG,
            f"({_ALONG} / v.norm(dim=1))[:, None] * v",
            "the part of the gradient along V'",
        ),
        ("axis kept", _ALONG, f"({_ALONG})[:, None]", "the shape is (out, 1)"),
        (
            "the example by heart",
            f"return {_ALONG}",
            "return torch.tensor([3.0, -5.0])",
            "the answer to the example",
        ),
    ],
    "split_gradient": [
        (
            "nothing removed",
            "factor * (gradient - along)",
            "factor * gradient",
            "this is equation 11",
        ),
        ("in the other order", "return full, removed", "return removed, full", "other way round"),
        (
            "no factor",
            "factor * (gradient - along)",
            "gradient - along",
            "factor magnitude / ||V'||",
        ),
        ("not divided by the norm", "[:, None] / norm\n", "[:, None]\n", "not divided by ||V'||"),
        (
            "magnitude forgotten",
            "magnitude[:, None] / norm",
            "1 / norm",
            "the magnitude is missing",
        ),
        ("sign lost", "magnitude[:, None] /", "magnitude.abs()[:, None] /", "has lost its sign"),
        (
            "factor for one part",
            "factor * (gradient - along)",
            "factor * gradient - along",
            "all of it",
        ),
        ("not divided by the squared norm", " / norm**2 * v", " * v", "not divided by ||V'||^2"),
        ("divided by the norm once", " / norm**2 * v", " / norm * v", "by ||V'||, not ||V'||^2"),
        ("added", "(gradient - along)", "(gradient + along)", "the part along V' is added"),
        (
            "equation 6 to the letter",
            _SPLIT,
            "along = v @ v.T @ gradient / norm**2",
            "read as a matrix product",
        ),
        (
            "equation 6 to the letter, with one norm",
            _SPLIT,
            "along = v @ v.T @ gradient / v.norm() ** 2",
            "read as a matrix product",
        ),
        (
            "all pairs of rows",
            _SPLIT,
            "along = (gradient @ v.T) / norm**2 @ v",
            "pairs each row with all",
        ),
        (
            "all rows as one",
            _SPLIT,
            "along = (gradient * v).sum() / v.norm() ** 2 * v",
            "all rows are projected as one",
        ),
        (
            "column by column",
            _SPLIT,
            "along = (gradient * v).sum(dim=0) / v.norm(dim=0) ** 2 * v",
            "column by column (dim=0)",
        ),
        (
            "on the gradient",
            _SPLIT,
            "along = (gradient * v).sum(1, keepdim=True) / gradient.norm(dim=1, keepdim=True) ** 2"
            " * gradient",
            "projected on the gradient",
        ),
        ("removed without the factor", "factor * along", "along", "removed: the factor magnitude"),
        ("removed with its sign changed", "factor * along", "-factor * along", "the sign is wrong"),
        ("equation 11 as the second", "factor * along", "factor * gradient", "all of equation 11"),
        ("full alone", "return full, removed", "return full", "expected a tuple (full, removed)"),
        (
            "the example by heart",
            "return full, removed",
            "return torch.tensor([[6.4, -4.8, 2.0], [2.0, 0.0, 0.0]]), torch.tensor("
            "[[3.6, 4.8, 0.0], [0.0, 0.0, 3.0]])",
            "the answer to the example",
        ),
        ("in place", "(gradient - along)", "gradient.sub_(along)", "the caller's gradient"),
    ],
}
