"""Checks of the exercises: `checks.row_norm(row_norm)` says whether yours is right, and why not.

One file an exercise notebook; core.py says how a check is made.
"""

from minidora.checks import dora_decomposition, lora_recap
from minidora.checks.core import CheckFailed, Exercise, Lesson, NotStarted
from minidora.checks.dora_decomposition import (
    decompose,
    dora_forward,
    dora_linear,
    dora_weight,
    dora_weight_detached,
    merge_dora,
    row_norm,
    update_for_weight,
)
from minidora.checks.lora_recap import (
    freeze_base,
    init_lora,
    lora_delta,
    lora_forward,
    lora_linear,
    merge_lora,
)

LESSONS: dict[int, Lesson] = {
    lesson.number: lesson for lesson in (lora_recap.lesson, dora_decomposition.lesson)
}
"""Every lesson that has exercises, by its number."""

__all__ = [
    "LESSONS",
    "CheckFailed",
    "Exercise",
    "Lesson",
    "NotStarted",
    "decompose",
    "dora_forward",
    "dora_linear",
    "dora_weight",
    "dora_weight_detached",
    "freeze_base",
    "init_lora",
    "lora_delta",
    "lora_forward",
    "lora_linear",
    "merge_dora",
    "merge_lora",
    "row_norm",
    "update_for_weight",
]
