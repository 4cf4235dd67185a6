"""Start every kernel on a GPU that is only pretended, and print what reached it as JSON.

    python start_kernels.py        # no GPU is needed; the kernels are compiled for sm_90

A program of its own: where TRITON_INTERPRET is set, as in the other tests, nothing compiles. A row
is a start: whether minidora.fused.start handed over what Triton would have handed over by itself.
"""

import json
import warnings
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from minidora import fused
from minidora.kernels import compose_backward_kernel, compose_kernel, norm_kernel, prepare_kernel

warnings.simplefilter("ignore")
received: list[tuple[Any, ...]] = []


class Pretended:
    """What Triton asks of a GPU's driver."""

    class Launcher:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            received.append(((x, y, z), rest))

    launcher_cls = Launcher

    @property
    def utils(self) -> "Pretended":
        return self

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        loaded.append(object())  # the function that a start names
        return (1, loaded[-1], 32, 0, 1024)[
            :HANDLES
        ]  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


loaded: list[object] = []
# Triton 3.3 expects no number of threads.
HANDLES = 5 if "n_max_threads" in CompiledKernel._init_handles.__code__.co_names else 4
driver.set_active(Pretended())  # type: ignore[no-untyped-call]


def row(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


def starts() -> Any:
    """Kernels with arguments that differ from others in all that a compiled kernel depends on."""
    half = torch.bfloat16
    for dtype in (torch.float32, half):
        for tokens, out in ((16, 64), (17, 64), (16, 65), (1, 64), (16, 1)):
            u, vector = row(tokens, out, dtype=dtype), row(out)
            h, B = row(tokens, 16, dtype=dtype), row(out, 16)
            sizes = {"TOKENS": 16, "OUT": 128, "RANK": 16}
            for bias in (None, row(out, dtype=dtype)):
                yield (
                    compose_kernel, (u.clone(), u, h, B, vector, vector, bias, tokens, out, 16),
                    {**sizes, "BIAS": bias is not None, "KEEP": True},
                )  # fmt: skip
    # another order of the same dtypes, a flag, and an address that is no multiple of 16
    u, h, B, vector = row(16, 64), row(16, 16), row(64, 16), row(64)
    shifted = row(65)[1:]
    for keep, m in ((True, vector), (False, vector), (True, shifted), (True, vector)):
        yield (
            compose_kernel, (u.clone(), u, h, B, m, vector, None, 16, 64, 16),
            {"TOKENS": 16, "OUT": 128, "RANK": 16, "BIAS": False, "KEEP": keep},
        )  # fmt: skip
    A, P, G = row(16, 64), row(32, 64, dtype=half), row(8, 16, 16)
    for s in (2.0, 1.0, 0.7):
        yield (
            prepare_kernel, (P, G, A, s, 64, 16),
            {"RANK": 16, "COLS": 128, "STEPS": 1, "SPLIT": True, "GRAM": True},
        )  # fmt: skip
    W, norm = row(64, 64, dtype=half), row(64)
    for stride in (64, 65, 128):
        yield (
            norm_kernel, (norm, W, A, B, P, G, None, None, 2.0, 0.0, 64, stride, 64, 16),
            {"ROWS": 64, "COLS": 64, "RANK": 16, "PARTS": 2, "SUMS": 8, "GIVEN": False,
             "STAGES": 2},
        )  # fmt: skip
    for stride in (64, 80):
        yield (
            compose_backward_kernel, (u, row(1, 64), u, u, vector, vector, 16, 64, stride),
            {"TOKENS": 16, "OUT": 128, "STEPS": 8},
        )  # fmt: skip


def same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Whether two starts name the same function and hand it the same: tensors by identity."""
    (grid, (function, metadata, _, _, _, *args)), (grid_2, (function_2, metadata_2, *rest)) = (
        ours,
        theirs,
    )
    return (
        (grid, function, metadata) == (grid_2, function_2, metadata_2)
        and len(args) == len(rest[3:])
        and all(
            a is b if isinstance(a, Tensor) else a == b and type(a) is type(b)
            for a, b in zip(args, rest[3:], strict=True)
        )
    )


report = []
for turn in (1, 2):  # the second meets what the first has kept
    for kernel, args, sizes in starts():
        known, functions = len(fused.compiled_kernels), len(loaded)
        received.clear()
        fused.start(kernel, (3, 2, 1), torch.device("cpu"), args, sizes)
        kernel[(3, 2, 1)](*args, **sizes)
        ours, theirs = received
        report.append(
            {
                "kernel": kernel.fn.__name__,
                "turn": turn,
                "aligned": all(a.data_ptr() % 16 == 0 for a in args if isinstance(a, Tensor)),
                "kept": len(fused.compiled_kernels) - known,
                "compiled": len(loaded) - functions,
                "same": same(ours, theirs),
            }
        )
print(json.dumps(report))
