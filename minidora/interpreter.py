"""Triton in its interpreter, which runs a kernel on a CPU: one program after the other, in Python.

    from minidora.interpreter import tl, triton

    @triton.jit
    def kernel(y, x, n, BLOCK: tl.constexpr): ...

    kernel[(4,)](y, x, n, BLOCK=16)

TRITON_INTERPRET must be set before Triton is imported the first time, and importing this file does
both. Kernels of minidora.fused on a GPU want a process in which it was not imported.

Triton has packages for Linux only (macOS and Windows have none, and torch's wheels for CPUs bring
none). Where it cannot be imported, `problem` says why, stand-ins take its place, and a kernel that
is started prints that sentence and does nothing.

Reference:
    https://triton-lang.org, "Debugging Triton": the interpreter
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor


class NoKernel:
    """Stands for a kernel where there is no Triton: it can be written, not run."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__, self.__module__ = function.__name__, function.__module__

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **constants: print(f"{self.__name__} did not run. {problem}")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self[()]()


class NoTriton:
    """Stands for triton and triton.language, as far as writing a kernel needs them."""

    constexpr = int
    float16 = float32 = bfloat16 = float64 = int32 = None

    @staticmethod
    def jit(function: Callable[..., Any]) -> NoKernel:
        return NoKernel(function)

    @staticmethod
    def cdiv(size: int, block: int) -> int:
        return -(-size // block)


def _load() -> tuple[Any, Any, str]:
    """triton, triton.language, and why kernels cannot run here."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        import triton.language as tl
    except Exception as error:  # a broken installation raises more than ImportError
        why = f"Triton cannot be imported here ({type(error).__name__}: {error})"
        return NoTriton, NoTriton, f"{why}: it has packages for Linux only (pip install triton)."
    if type(tl.sum).__name__ != "InterpretedFunction":  # imported before, to compile
        return (
            NoTriton,
            NoTriton,
            "Triton was imported before, to compile kernels for a GPU: restart this kernel and "
            "run the cells from the top.",
        )
    return triton, tl, ""


triton, tl, problem = _load()


def difference(got: Tensor, want: Tensor) -> str:
    """The largest difference, relative to the largest entry; or that no kernel ran."""
    if problem:
        return f"nothing to compare. {problem}"
    off = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return f"{float(off):.0e} of the largest entry"
