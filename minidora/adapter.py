"""What every kind of adapter shares: a frozen layer, a trainable update, and merging the two.

A kind of adapter, such as LoRALinear, adds its parameters and its formula. Here is what does not
depend on it: which layers can be adapted, the layer's own hooks, merging and its undoing, and what
a saved adapter must agree with.
"""

import math
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(rank: int, alpha: float, dropout: float) -> None:
    """Refuse what no kind of adapter can take.

    Raises:
        ValueError: rank, alpha or dropout is out of range.
    """
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if not isinstance(alpha, Real) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"alpha must be a finite number above 0, got {alpha!r}: "
            "it scales the update by alpha / rank (a common choice is alpha = 2 * rank)"
        )
    if not isinstance(dropout, Real) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")


def weight_hook(base: nn.Module) -> Any:
    """The hook that computes base.weight before each call: of pruning, or an older norm."""
    for hook in base._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            return hook
        if isinstance(hook, WeightNorm | SpectralNorm) and hook.name == "weight":
            return hook
    return None


def run_pre_hooks(module: nn.Module, x: Tensor) -> Tensor:
    """The input that the forward pre-hooks of a module make of x."""
    for key, hook in tuple(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            changed: Any = hook(module, (x,), {})
            changed = None if changed is None else changed[0]
        else:
            changed = hook(module, (x,))
        if changed is not None:
            x = changed[0] if isinstance(changed, tuple) else changed
    return x


def run_hooks(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The output that the forward hooks of a module make of y, computed from x."""
    for key, hook in tuple(module._forward_hooks.items()):
        options: tuple[Any, ...] = ({},) if key in module._forward_hooks_with_kwargs else ()
        changed: Any = hook(module, (x,), *options, y)
        if changed is not None:
            y = changed
    return y


class Adapter(nn.Module):
    """A frozen layer with a trainable update of its weight: what every kind of adapter shares.

    The layer answers in one of three ways: alone (enabled is False), with a weight W' computed
    once (merged), or with W and the update side by side. A kind of adapter, such as LoRALinear,
    creates its parameters and defines the methods that raise NotImplementedError here.

    Args:
        base: the layer to adapt, of the class named in adapts; its parameters are frozen in place.
        rank: inner size of the update, at least 1.
        alpha: numerator of the scaling s, above 0.
        dropout: probability that an input of the low-rank path is zeroed in training, in [0, 1).
        use_rslora: s = alpha / sqrt(rank) instead of alpha / rank.

    Attributes:
        base: the frozen layer; base.weight is always the original W, also when merged.
        scaling: s.
        enabled: False lets the base layer answer alone (see disable_adapters).

    Raises:
        TypeError, ValueError: see check_base and check_arguments.
    """

    adapts: ClassVar[type[nn.Module]]  # the class of the layers that this kind of adapter takes
    base: Any  # one of these layers; a kind of adapter says which, and creates its factors
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    merged_weight: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.check_base(base)
        check_arguments(rank, alpha, dropout)
        self.base = base
        most = min(self.base.weight.shape[0], self.base.weight.shape[1:].numel())
        if rank > most:
            warnings.warn(
                f"rank {rank} is above min(in_features, out_features) = {most}: B A can be any "
                "matrix already at that rank, so the extra rank only costs memory",
                stacklevel=3,
            )
        base.requires_grad_(False)
        # Hooks on gradients are torch's own business: they see this layer in the place of base.
        self._backward_hooks = base._backward_hooks
        self._backward_pre_hooks = base._backward_pre_hooks
        self._is_full_backward_hook = base._is_full_backward_hook
        self.rank = int(rank)
        self.alpha = alpha
        self.scaling = float(alpha / math.sqrt(rank) if use_rslora else alpha / rank)
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        # Not persistent: a saved layer always holds W and the adapter, never W' beside the adapter.
        self.register_buffer("merged_weight", None, persistent=False)
        Adapter.train(self, base.training)
        self.refresh_base()

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        """Refuse a layer that this kind of adapter cannot wrap, before anything is changed.

        What is adapted must be a function of W, x and the bias that is known here, and W' must be
        something that can be written in the place of W.

        Raises:
            TypeError: base is adapted already, or not an instance of cls.adapts.
            ValueError: base computes something else, or has a W that cannot be read or written.
        """
        kind, name = cls.adapts, type(base).__name__
        if isinstance(base, Adapter):
            raise TypeError(
                f"base is already adapted ({name}): merge_and_unload the model "
                "first, or start again from the plain one"
            )
        if not isinstance(base, kind):
            raise TypeError(f"base must be an nn.{kind.__name__}, got {name}")
        calls = (type(base).forward, type(base).__call__)
        if calls != (kind.forward, nn.Module.__call__) or "forward" in vars(base):
            raise ValueError(
                f"this {name} has a forward of its own (its class defines one, or offloading put "
                f"one there), so what it makes of its weight is unknown: replace it by an "
                f"nn.{kind.__name__} that computes the same, or leave it out with exclude_modules"
            )
        weight: Any = base.weight
        if isinstance(weight, UninitializedParameter):
            raise ValueError(f"this {name} has no weight yet: run the model once, then adapt it")
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"base.weight must be floating point (float64, float32, bfloat16, float16), "
                f"got {weight.dtype}: dequantize it first"
            )
        if weight.layout != torch.strided or hasattr(weight, "__tensor_flatten__"):
            raise ValueError(
                f"base.weight must be a plain dense tensor, got {type(weight).__name__} "
                f"({weight.layout}): adapt the model before it is sharded, quantized or made sparse"
            )
        if weight.is_inference():
            raise ValueError(
                "base.weight was made in inference mode, so nothing can be trained through it: "
                "build the model outside torch.inference_mode"
            )
        stored = "weight" in base._parameters or "weight" in base._buffers
        if not (stored or parametrize.is_parametrized(base, "weight") or weight_hook(base)):
            raise ValueError(
                f"the weight of this {name} is neither a parameter nor a parametrization of "
                "torch.nn.utils.parametrize, so W' could not be written in its place"
            )

    def refresh_base(self) -> None:
        """Compute base.weight anew where a hook does so before each call (see weight_hook)."""
        if hook := weight_hook(self.base):
            hook(self.base, ())

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if "weight" not in self.base._parameters:  # W is computed, and it is frozen:
            self.base.eval()  # the buffers of spectral_norm move in training mode
        return self

    def reset_parameters(self) -> None:
        """Start anew, at W' = W. Also fills a layer built on the meta device."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Answer in the place of base, whose own hooks run as if it had been called."""
        x = run_pre_hooks(self.base, input)
        if not self.enabled:
            y = self.apply_weight(x, self.base.weight)
        elif self.merged_weight is not None:
            y = self.apply_weight(x, self.merged_weight)
        else:
            y = self.adapted_forward(x)
        return run_hooks(self.base, x, y)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """What base computes, with this weight in place of its own and with its bias."""
        raise NotImplementedError

    def adapted_forward(self, x: Tensor) -> Tensor:
        """What base would compute with W', from W and the update."""
        raise NotImplementedError

    def adapted_weight(self) -> Tensor:
        """W', in the shape of W and in float32 or float64, before it is rounded to W's dtype."""
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """W', in the shape and dtype of W: the weight this layer acts with, merged or not."""
        if self.merged_weight is not None:
            return self.merged_weight
        self.refresh_base()
        dtype: torch.dtype = self.base.weight.dtype
        return self.adapted_weight().to(dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute W' once and answer with it. W is kept beside it, so unmerge is exact.

        W' does not follow later changes of the adapter or W: unmerge to train on. Merging again
        computes it anew.

        Raises:
            ValueError: W' has values that are not finite; nothing is changed.
        """
        self.refresh_base()
        weight = self.adapted_weight().to(self.base.weight.dtype)
        if not weight.is_meta and not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise ValueError(
                f"merging would give {bad} of {weight.numel()} weights that are not finite "
                f"(in {weight.dtype}): the adapter has diverged or does not fit that dtype; "
                "the layer is left as it was"
            )
        self.merged_weight = weight

    def unmerge(self) -> None:
        """Forget W' and answer with W and the adapter again. Exact: W was never changed."""
        self.merged_weight = None

    def unload(self) -> nn.Module:
        """The base with W', merged before, as its weight, whatever it was before; see merge."""
        base, weight = self.base, self.merged_weight
        assert weight is not None
        hook = weight_hook(base)
        if parametrize.is_parametrized(base, "weight"):
            parametrize.remove_parametrizations(base, "weight")
        elif hook is not None:
            removals = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}
            removals.get(type(hook), prune.remove)(base, "weight")
        # A new parameter: a weight tied to this one elsewhere (an embedding) keeps its values.
        del base.weight
        base.weight = nn.Parameter(weight, requires_grad=False)
        plain: nn.Module = base.train(self.training)
        return plain

    @property
    def merged(self) -> bool:
        """Whether the layer answers with a weight that merge() computed."""
        return self.merged_weight is not None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # With another scaling the same parameters are another W': see misfit.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1], {})
        metadata["scaling"] = self.scaling

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unmerge()  # W' belongs to the values that are being replaced
        super()._load_from_state_dict(*args)
        prefix, unexpected = args[1], args[5]
        if f"{prefix}scaling" in unexpected:  # not a value to load: misfit reads it
            unexpected.remove(f"{prefix}scaling")

    def misfit(self, state: Mapping[str, Any], prefix: str) -> str | None:
        """Why the values under this prefix of a state dict are not for this layer, or None."""
        own = dict(self.named_parameters(recurse=False))
        found = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
        given = {name for name in found if "." not in name} - {"scaling"}
        if given & {"weight", "bias"}:
            return "they are the weights of the plain layer: load them before the model is adapted"
        if given and (missing := own.keys() - given):
            return f"{', '.join(sorted(missing))} is missing: was it trained with another method?"
        if more := given - own.keys():
            return f"it has no {', '.join(sorted(more))}: was it trained with another method?"
        for name in sorted(given):
            if (shape := state[found[name]].shape) != own[name].shape:
                return f"{name} is {tuple(shape)}, here {tuple(own[name].shape)}: another rank?"
        metadata = getattr(state, "_metadata", {}).get(prefix[:-1], {})
        scaling = float(state.get(f"{prefix}scaling", metadata.get("scaling", self.scaling)))
        if not math.isclose(scaling, self.scaling, rel_tol=1e-6):
            return f"they were trained with a scaling of {scaling:g}, here it is {self.scaling:g}"
        base = {name for name in found if name.startswith("base.")} - {"base.bias"}
        if "magnitude" in own and base and not given and (base != {"base.weight"} or self.moved()):
            return "a base weight without its magnitude: load it before the adapter is trained"
        return None

    def moved(self) -> bool:
        """Whether the update is away from zero, where the layer starts."""
        return not self.lora_B.is_meta and bool(self.lora_B.any())

    # Some modules read a layer instead of calling it (nn.MultiheadAttention, the fast path of
    # nn.TransformerEncoderLayer). They get the weight that this layer acts with; no dropout there.
    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.effective_weight() if self.enabled else self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, merged={self.merged}"
