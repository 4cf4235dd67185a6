# ruff: noqa: E501
"""Wrong answers, (name, old, new, says): see WrongAnswer in tests/checks/test_checks.py."""

WRONG: dict[str, list[tuple[str, str, str, str]]] = {
    "adam_bytes": [
        (
            "added up",
            "return one, one, 2 * one",
            "return one + one + 2 * one",
            "expected a tuple (weights, gradients, moments)",
        ),
    ],
    "four_bit_bytes": [
        (
            "in float32",
            "math.ceil(numbers / 2)",
            "int((torch.tensor(float(numbers)) / 2).ceil())",
            "random sizes: for out_features = ",
        ),
        (
            "4.5 bits, rounded up",
            "packed + 4 * blocks",
            "math.ceil(numbers * 4.5 / 8)",
            "4.5 bits is a mean",
        ),
        ("an empty block", "math.ceil(numbers / 64)", "numbers // 64 + 1", "without an empty one"),
    ],
    "what_fits": [
        ("GB for GiB", "2**30", "1e9", "a GiB is 2**30 bytes, not 1e9"),
        ("adapters forgotten", "16 * adapters", "0", "the adapters are missing"),
        (
            "adapters' weights alone",
            "16 * adapters",
            "4 * adapters",
            "in the adapters: 4, not 16: gradients and moments are missing",
        ),
        (
            "adapters without moments",
            "16 * adapters",
            "8 * adapters",
            "in the adapters: 8, not 16: Adam's two moments are missing",
        ),
        (
            "adapters without gradients",
            "16 * adapters",
            "12 * adapters",
            "in the adapters: 12, not 16: one of the four is missing",
        ),
        (
            "full without gradients, as in the source notebook",
            "16 * parameters,",
            "12 * parameters,",
            "full, bytes a parameter: 12, not 16: one of the four is missing",
        ),
        (
            "the first that fits, and all below it",
            "[name for name, need in needs.items() if need <= gpu_gib * 2**30]",
            "list(needs)[sum(need > gpu_gib * 2**30 for need in needs.values()) and next(\n"
            "        (i for i, need in enumerate(needs.values()) if need <= gpu_gib * 2**30), 4):]",
            "one way fits and a later one does not",
        ),
        ("full: weights alone", "16 * parameters,", "4 * parameters,", "gradients and moments"),
        (
            "full: moments forgotten",
            "16 * parameters,",
            "8 * parameters,",
            "full, bytes a parameter: 8, not 16: Adam's two moments",
        ),
        (
            "full with adapters",
            "16 * parameters,",
            "16 * parameters + trained,",
            "there are no adapters when everything is trained",
        ),
        (
            "full: with what is inside step()",
            "16 * parameters,",
            "20 * parameters,",
            "what exists only inside step() is not counted",
        ),
        (
            "adapters: with what is inside step()",
            "16 * adapters",
            "20 * adapters",
            "what exists only inside step() is not counted",
        ),
        (
            "gradients for the frozen float32 base",
            '"lora-float32": 4 *',
            '"lora-float32": 8 *',
            "the frozen base has no gradients",
        ),
        (
            "adapters in the dtype of the base",
            '"lora-bfloat16": 2 * parameters + trained',
            '"lora-bfloat16": 2 * parameters + trained / 2',
            "the adapters are float32, whatever the base is",
        ),
        (
            "whole GiB",
            "if need <= gpu_gib * 2**30",
            "if round(need / 2**30) <= gpu_gib",
            ": expected",
        ),
        (
            "scales of the 4-bit base forgotten",
            "4.5 / 8 * parameters",
            "0.5 * parameters",
            "with its scales a weight takes 4.5 bits",
        ),
        ("bits for bytes", "4.5 / 8 * parameters", "4.5 * parameters", "4.5 bits, not bytes"),
        (
            "gradients for the frozen base",
            '"lora-bfloat16": 2 *',
            '"lora-bfloat16": 4 *',
            "the frozen base has no gradients",
        ),
        ("an exact fit left out", "need <= ", "need < ", "needs exactly the memory"),
        (
            "the example by heart",
            "return [name for name, need in needs.items() if need <= gpu_gib * 2**30]",
            'return ["lora-bfloat16", "lora-4bit"]',
            "the answer to the example",
        ),
        (
            "a dict returned",
            "return [name for name, need in needs.items() if need <= gpu_gib * 2**30]",
            "return needs",
            "expected a list of names, got dict",
        ),
    ],
    "largest_rank": [
        (
            "the smallest side of the last layer",
            "min(min(shape) for shape in shapes)",
            "min(shapes[-1])",
            "the smallest side of all layers",
        ),
        (
            "the smallest side of the first layer",
            "min(min(shape) for shape in shapes)",
            "min(shapes[0])",
            "the smallest side of all layers",
        ),
        ("rounded to the nearest", "free // per_rank", "round(free / per_rank)", "round down"),
        ("rounded up", "free // per_rank", "-(-free // per_rank)", "part of a rank: round down"),
        ("not rounded", "free // per_rank", "free / per_rank", "a rank is a whole number"),
        ("an exact fit left out", "free // per_rank", "(free - 1) // per_rank", "fits too"),
        (
            "magnitudes forgotten",
            "free = gpu_bytes - base_bytes - each * sum(out for out, _ in shapes)",
            "free = gpu_bytes - base_bytes",
            "the magnitudes are missing",
        ),
        (
            "one magnitude per input",
            "sum(out for out, _ in shapes)",
            "sum(in_ for _, in_ in shapes)",
            "one magnitude per input",
        ),
        (
            "magnitudes on both sides",
            "sum(out for out, _ in shapes)",
            "sum(out + in_ for out, in_ in shapes)  #",
            "magnitudes on both sides",
        ),
        (
            "magnitudes counted rank times",
            (
                "free = gpu_bytes - base_bytes - each * sum(out for out, _ in shapes)\n"
                "    per_rank = each * sum(out + in_"
            ),
            "free = gpu_bytes - base_bytes\n    per_rank = each * sum(2 * out + in_",
            "counted rank times",
        ),
        (
            "magnitudes of 4 bytes",
            "each * sum(out for",
            "4 * sum(out for",
            "the magnitudes are trained too: 16 bytes each",
        ),
        (
            "first layer only",
            "    free = ",
            "    shapes = shapes[:1]\n    free = ",
            "only the first layer",
        ),
        (
            "bounded by the outputs",
            "min(min(shape) for shape in shapes)",
            "min(shape[0] for shape in shapes)",
            "the smallest side of all layers",
        ),
        ("base forgotten", "gpu_bytes - base_bytes", "gpu_bytes", "the base is missing"),
        ("weights alone", "each = 16", "each = 4", "gradients and moments are missing"),
        ("moments forgotten", "each = 16", "each = 8", "two moments are missing"),
        ("gradients forgotten", "each = 16", "each = 12", "one of the four is missing"),
        (
            "negative ranks",
            "max(0, min(free // per_rank, useful))",
            "min(free // per_rank, useful)",
            "less than rank 1 is no rank",
        ),
        (
            "bound itself left out",
            "max(0, min(free // per_rank, useful))",
            "max(0, min(free // per_rank, useful - 1))",
            "rank 60 itself fits",
        ),
        (
            "no upper bound",
            "min(free // per_rank, useful)",
            "free // per_rank",
            "the smallest side",
        ),
        (
            "bounded by the largest side",
            "min(min(shape) for",
            "max(max(shape) for",
            "the smallest side of all layers",
        ),
        (
            "bounded by one of the layers",
            "min(min(shape) for",
            "max(min(shape) for",
            "the smallest side of all layers",
        ),
        (
            "the example by heart",
            "return max(0, min(free // per_rank, useful))",
            "return 7",
            "the answer to the example",
        ),
    ],
    "training_bytes": [
        (
            "distinct by value",
            "    trained = [p for p in model.parameters() if p.requires_grad]\n    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])\n",
            "    distinct = list({(p.dtype, str(p.tolist())): p for p in model.parameters()}.values())\n    trained = [p for p in distinct if p.requires_grad]\n    weights = sum(t.nbytes for t in [*distinct, *model.buffers()])\n",
            "two parameters of equal values are two",
        ),
    ],
}
