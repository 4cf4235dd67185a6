# ruff: noqa: E501
"""Wrong answers, (name, old, new, says): see WrongAnswer in tests/checks/test_checks.py."""

_SAVED = """\
save_for_backward(u.to(base.dtype), g)
        return (g * u + bias).to(base.dtype)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ### BEGIN SOLUTION
        u, g = ctx.saved_tensors
"""


def _saving(tensors: str, unpack: str) -> str:
    """_SAVED with other tensors kept for the backward pass, and taken out there."""
    changed = _SAVED.replace("u.to(base.dtype), g)", f"{tensors})")
    return changed.replace("u, g = ctx.saved_tensors", unpack)


WRONG: dict[str, list[tuple[str, str, str, str]]] = {
    "forward_flops": [
        (
            "in float32",
            "return layer, low_rank, norm",
            "return tuple(int(torch.tensor(float(n))) for n in (layer, low_rank, norm))",
            "large odd sizes",
        ),
        ("the sum", "return layer, low_rank, norm", "return layer + low_rank + norm", "got int"),
    ],
    "held_bytes": [
        (
            "another rule for a large layer",
            "    compose = output + hidden",
            "    compose = output + hidden if in_features < 2000 else hidden",
            "many in_features",
        ),
    ],
    "factored_norm": [
        (
            "little taken for nothing",
            "square.clamp(min=0)",
            "square.where(square > 1e-6 * weight.norm(dim=1) ** 2, 0 * square)",
            "little left of W",
        ),
        ("G of the wrong side", "lora_A @ lora_A.T", "lora_A.T @ lora_A", "cannot be multiplied"),
        ("no clamp", ".clamp(min=0)", "", "NaN where W = -s B A"),
        ("absolute value", ".clamp(min=0)", ".abs()", "pushed below 0 counts as 0"),
        (
            "a floor above 0",
            ".clamp(min=0)",
            ".clamp(min=1e-12)",
            "is there an epsilon or a clamp?",
        ),
        ("a tiny floor", ".clamp(min=0)", ".clamp(min=1e-30)", "pushed below 0 counts as 0"),
        ("an epsilon", ".clamp(min=0)", ".clamp(min=0).add(1e-10)", "small"),
        (
            "an epsilon unless it is 0",
            "square.clamp(min=0).sqrt()",
            "torch.where(square > 0, square + 1e-10, 0).sqrt()",
            "small",
        ),
        (
            "in inference mode",
            "def factored_norm(",
            "@torch.inference_mode()\ndef factored_norm(",
            "made in inference mode: no product with it can be trained",
        ),
        ("not detached", ".detach()", "", "a gradient runs through the norm"),
        (
            "the factors detached, W not",
            "square.clamp(min=0).sqrt().detach()",
            "(square.detach() + 0 * weight.sum()).clamp(min=0).sqrt()",
            "a gradient runs through the norm",
        ),
        (
            "B A built after all",
            "square.clamp(min=0).sqrt().detach()",
            "(weight + scaling * (lora_B @ lora_A)).norm(dim=1).detach()",
            "times the bytes of W",
        ),
        ("W squared", "weight.norm(dim=1) ** 2", "(weight**2).sum(dim=1)", "no W squared"),
        ("over the outputs", "weight.norm(dim=1)", "weight.norm(dim=0)", "must match the size"),
    ],
    "round_once": [
        ("clamped", "(g * u + bias).to", "(g * u + bias).clamp(-1e4, 1e4).to", "expected"),
        (
            "clamped to what fp16 holds",
            "(g * u + bias).to",
            "(g * u + bias).clamp(-65504, 65504).to",
            "rounding gives inf",
        ),
        (
            "each path rounded",
            "(g * u + bias).to",
            "((g * base.to(g.dtype)).to(base.dtype) + g * low + bias).to",
            "g base is rounded on its own",
        ),
        ("sum in bf16", "base.to(g.dtype) + low", "base + low", "base + low is rounded first"),
        ("g rounded", "g * u", "g.to(base.dtype) * u", "g is rounded: keep it in float32"),
        (
            "everything in bf16",
            "(g * u + bias).to(base.dtype)",
            "g.to(base.dtype) * (base + low) + bias.to(base.dtype)",
            "everything is rounded",
        ),
        (
            "bias after rounding",
            "(g * u + bias).to(base.dtype)",
            "(g * u).to(base.dtype) + bias.to(base.dtype)",
            "rounded before the bias",
        ),
        ("not rounded", "(g * u + bias).to(base.dtype)", "g * u + bias", "y has the dtype of base"),
        ("bias scaled", "g * u + bias", "g * (u + bias)", "the bias is scaled by g"),
        ("bias forgotten", "g * u + bias", "g * u", "the bias is missing"),
        ("always bf16", ".to(base.dtype)", ".bfloat16()", "y has the dtype of base, torch.float16"),
        ("low forgotten", "base.to(g.dtype) + low", "base.to(g.dtype)", "low is missing"),
        (
            "bias rounded",
            "g * u + bias",
            "g * u + bias.to(base.dtype)",
            "the bias is rounded",
        ),
    ],
    "compose_form": [
        (
            "g times each part",
            "g * u + bias",
            "g * (x @ weight.T) + g * (h @ lora_B.T) + bias",
            "2 tensors of the size of an output",
        ),
        (
            "g - 1 and g, as in PEFT",
            "g * u + bias",
            "(g - 1) * (x @ weight.T) + g * (h @ lora_B.T) + x @ weight.T + bias",
            "2 tensors of the size of an output",
        ),
        (
            "W' built",
            "g * u + bias",
            "x @ (g[:, None] * (weight + scaling * (lora_B @ lora_A))).T + bias",
            "times the bytes of W are held",
        ),
        (
            "B A built",
            "x @ weight.T + h @ lora_B.T",
            "x @ (weight + scaling * (lora_B @ lora_A)).T",
            "times the bytes of W are held",
        ),
        (
            "x detached under W",
            "x @ weight.T",
            "x.detach() @ weight.T",
            "gradient of x: it comes through the update alone",
        ),
        (
            "x detached in the update",
            "(x @ lora_A.T)",
            "(x.detach() @ lora_A.T)",
            "gradient of x: it comes through x W^T alone",
        ),
        (
            "the sum detached",
            "g * u + bias",
            "g * u.detach() + bias",
            "no gradient reaches x",
        ),
    ],
    "compose_function": [
        (
            "nothing if low is frozen",
            "        u, g = ctx",
            "        if not ctx.needs_input_grad[1]:\n            return None, None, None, None\n        u, g = ctx",
            "no gradient reaches base",
        ),
        (
            "nothing if base is frozen",
            "        u, g = ctx",
            "        if not ctx.needs_input_grad[0]:\n            return None, None, None, None\n        u, g = ctx",
            "no gradient reaches low",
        ),
        (
            "base and low saved as well",
            _SAVED,
            _saving("u.to(base.dtype), g, base, low", "u, g, _, _ = ctx.saved_tensors"),
            "3 times the bytes of an output are held: save u and g alone",
        ),
        (
            "base kept as an attribute",
            "        ctx.save_for_backward(",
            "        ctx.base = base\n        ctx.save_for_backward(",
            "2 times the bytes of an output are held: save u and g alone",
        ),
        (
            "g rounded for low alone",
            "return du, du, dg",
            "return du, g.to(dy.dtype) * dy, dg",
            "gradient of low: g is rounded",
        ),
        (
            "bf16 by name",
            "save_for_backward(u.to(base.dtype), g)",
            "save_for_backward(u if base.dtype == torch.float32 else u.bfloat16(), g)",
            "fp16",
        ),
        (
            "low changed in place",
            "        ctx.save_for_backward(",
            "        low.zero_()\n        ctx.save_for_backward(",
            "it changes low in place",
        ),
        (
            "dy changed in place",
            "du = (g * dy).to(u.dtype)\n        dg = (dy.to(g.dtype) * u).sum(0)\n",
            "dg = (dy.to(g.dtype) * u).sum(0)\n        du = dy.mul_(g)\n",
            "it changes dy in place",
        ),
        (
            "u held in float32",
            "save_for_backward(u.to(base.dtype), g)",
            "save_for_backward(u, g)",
            "save u and g alone, u in the dtype",
        ),
        (
            "base held instead of u",
            "save_for_backward(u.to(base.dtype), g)",
            "save_for_backward(base, g)",
            "low is missing, u = base + low",
        ),
        (
            "both terms saved",
            _SAVED,
            _saving("base, low, g", "base, low, g = ctx.saved_tensors\n        u = base + low"),
            "2 times the bytes of an output are held: save u and g alone",
        ),
        (
            "g rounded backward",
            "(g * dy).to(u.dtype)",
            "g.to(u.dtype) * dy",
            "gradient of base: g is rounded",
        ),
        ("summed over the outputs", "* u).sum(0)", "* u).sum(1)", "invalid gradient at index 2"),
        ("mean over the tokens", "* u).sum(0)", "* u).mean(0)", "gradient of g: a mean"),
        ("summed in bf16", "(dy.to(g.dtype) * u)", "(dy * u)", "summed in half precision"),
        ("g forgotten", "(g * dy).to(u.dtype)", "dy", "gradient of base: g is missing"),
        ("low without a gradient", "return du, du, dg", "return du, None, dg", "reaches low"),
        ("in another order", "dg, dy.sum(0)", "dy.sum(0), dg", "keep the order of the arguments"),
        ("bias summed token by token", "dg, dy.sum(0)", "dg, sum(dy)", "rounded after each"),
        (
            "bias scaled backward",
            "dg, dy.sum(0)",
            "dg, (g * dy).sum(0)",
            "gradient of bias: scaled",
        ),
        ("bias scaled forward", "g * u + bias", "g * (u + bias)", "the bias is scaled by g"),
        (
            "three gradients",
            "return du, du, dg, dy.sum(0)",
            "return du, dg, dy.sum(0)",
            "number of gra",
        ),
        ("not rounded", "(g * u + bias).to(base.dtype)", "g * u + bias", "y has the dtype of base"),
        (
            "sum rounded",
            "base.to(g.dtype) + low",
            "(base + low).to(g.dtype)",
            "the sum base + low is rounded first",
        ),
    ],
}
