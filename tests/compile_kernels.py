"""Compile every kernel ahead of time, as it would be launched, and print its resources as JSON.

    python compile_kernels.py 80 90        # compute capabilities; no GPU is needed

A program of its own: where TRITON_INTERPRET is set, as in the other tests, nothing compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minidora import fused as kernels

warnings.simplefilter("ignore")
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CUOBJDUMP = next(p for p in Path(triton.__file__).parent.rglob("cuobjdump*") if p.is_file())
compiled: list[dict[str, Any]] = []


def compile_instead(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any
) -> bool:
    """Takes the place of kernels.launch: compiles with the types and sizes of this launch."""
    warps = options.pop("num_warps", 4)
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    constants |= {name: value for name, value in values.items() if value is None}
    signature = {
        name: "constexpr" if name in constants
        else TYPES[value.dtype] if isinstance(value, Tensor)
        else "fp32" if isinstance(value, float) else "i32"
        for name, value in values.items()
    }  # fmt: skip
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    try:
        source = ASTSource(kernel, signature, places, attributes)
    except TypeError:  # Triton 3.2 of torch 2.6: constants by name, outside the signature
        outer = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        source = ASTSource(kernel, outer, constants)
    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(
        source, target=target, options={"num_warps": warps, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    name = kernel.fn.__name__
    compiled.append(
        {"kernel": name, "capability": capability, "types": sorted(set(signature.values()))}
        | {"shared": result.metadata.shared, **found}
    )
    return True


kernels.launch = compile_instead  # type: ignore[assignment]
for number in sys.argv[1:]:
    capability = int(number)
    for dtype in TYPES:

        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        def wide(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta")

        split = dtype == torch.bfloat16
        for rank in (16, 32, 64, 384) if split else (16, 32, 64):
            A, B = wide(rank, 4096), wide(4096, rank)
            P, G = kernels._prepare(A, 2.0, split)
            large = rank > kernels.MAX_RANK
            U, BG = (wide(4096, 2 * rank), wide(8192, 2 * rank)) if large else (None, None)
            kernels._norm(meta(4096, 4096), A, B, P, G, U, BG, 2.0)
        for rank in (16, 384):
            kernels._compose(
                meta(4096, 4096), meta(4096, rank), wide(4096, rank),
                wide(4096), wide(4096), meta(4096), True,
            )  # fmt: skip
        kernels._compose_backward(meta(4096, 4096), meta(4096, 4096), wide(4096), wide(4096))
print(json.dumps(compiled))
