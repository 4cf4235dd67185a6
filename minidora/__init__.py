"""minidora: learn DoRA (weight-decomposed low-rank adaptation) by building it."""

from minidora.adapt import (
    adapt,
    adapter_state_dict,
    count_parameters,
    disable_adapters,
    merge,
    merge_and_unload,
    unmerge,
)
from minidora.dora import DoRALinear
from minidora.lora import LoRALinear
from minidora.reuse import cached_scale, reuse_norms
from minidora.training import device

__version__ = "0.1.0"

__all__ = [
    "DoRALinear",
    "LoRALinear",
    "adapt",
    "adapter_state_dict",
    "cached_scale",
    "count_parameters",
    "device",
    "disable_adapters",
    "merge",
    "merge_and_unload",
    "reuse_norms",
    "unmerge",
]
