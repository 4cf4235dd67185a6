"""Checks of the exercises: `checks.row_norm(row_norm)` says whether yours is right, and why not.

One file an exercise notebook; core.py says how a check is made.
"""

from minidora.checks import (
    adam_memory,
    dora_decomposition,
    fast_dora,
    gpu_kernels,
    lora_recap,
    mlp_demo,
    why_it_works,
)
from minidora.checks.adam_memory import (
    adam_bytes,
    adapter_parameters,
    four_bit_bytes,
    largest_rank,
    training_bytes,
    what_fits,
)
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
from minidora.checks.exercise import CheckFailed, Exercise, Lesson, NotPossible, NotStarted
from minidora.checks.fast_dora import (
    compose_form,
    compose_function,
    factored_norm,
    forward_flops,
    held_bytes,
    round_once,
)
from minidora.checks.gpu_kernels import (
    backward_kernel,
    bytes_moved,
    compose_kernel,
    count_launches,
    row_norm_kernel,
    split_float32,
)
from minidora.checks.lora_recap import (
    freeze_base,
    init_lora,
    lora_delta,
    lora_forward,
    lora_linear,
    merge_lora,
)
from minidora.checks.mlp_demo import (
    accuracy,
    adapted_copy,
    chosen_scores,
    paired_interval,
    split_rows,
    train,
)
from minidora.checks.why_it_works import (
    delta_direction,
    delta_magnitude,
    draw_clusters,
    magnitude_gradient,
    pearson,
    split_gradient,
)

LESSONS: dict[int, Lesson] = {
    lesson.number: lesson
    for lesson in (
        adam_memory.lesson,
        lora_recap.lesson,
        dora_decomposition.lesson,
        mlp_demo.lesson,
        why_it_works.lesson,
        fast_dora.lesson,
        gpu_kernels.lesson,
    )
}
"""Every lesson that has exercises, by its number."""


def status() -> None:
    """What is done and what is next, by the saved notebooks of this folder: `minidora status`."""
    from minidora.classroom import report  # the one way up, because a notebook knows only checks

    report.status(None)


def hint(number: str) -> None:
    """Ask the leading question of an exercise, "3.2" for example: `minidora hint`."""
    hints = {one.number: one.hint for lesson in LESSONS.values() for one in lesson.exercises}
    print(hints.get(str(number), f"there is no exercise {number}: there are {', '.join(hints)}"))


__all__ = [
    "LESSONS",
    "CheckFailed",
    "Exercise",
    "Lesson",
    "NotPossible",
    "NotStarted",
    "accuracy",
    "adam_bytes",
    "adapted_copy",
    "adapter_parameters",
    "backward_kernel",
    "bytes_moved",
    "chosen_scores",
    "compose_form",
    "compose_function",
    "compose_kernel",
    "count_launches",
    "decompose",
    "delta_direction",
    "delta_magnitude",
    "dora_forward",
    "dora_linear",
    "dora_weight",
    "dora_weight_detached",
    "draw_clusters",
    "factored_norm",
    "forward_flops",
    "four_bit_bytes",
    "freeze_base",
    "held_bytes",
    "hint",
    "init_lora",
    "largest_rank",
    "lora_delta",
    "lora_forward",
    "lora_linear",
    "magnitude_gradient",
    "merge_dora",
    "merge_lora",
    "paired_interval",
    "pearson",
    "round_once",
    "row_norm",
    "row_norm_kernel",
    "split_float32",
    "split_gradient",
    "split_rows",
    "status",
    "train",
    "training_bytes",
    "update_for_weight",
    "what_fits",
]
