"""What `make gpu` measures in its own process: kernels, layers, a LLaMA, full fine-tuning's bytes.

A part is a function of the rows that it adds to and of the clock that it asks for time.
minidora/evidence/gpu.py runs them.
"""

import contextlib
import copy
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidora import adapt, dora, reuse_norms
from minidora.evidence import bench
from minidora.memory import llama, training_memory

DEVICE = torch.device("cuda")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class State(StrEnum):
    """How a part, a lesson or a test run ended."""

    COMPLETE = "complete"
    FAILED = "failed"
    OUT_OF_TIME = "out of time"
    NOT_RUN = "not run"


class Unfinished(Exception):
    """A part did not do all of its work; what it has measured is kept. Its text is the state."""


@dataclass
class Clock:
    end: float

    def left(self) -> float:
        return self.end - time.perf_counter()

    def check(self) -> None:
        if self.left() < 0:
            raise Unfinished(State.OUT_OF_TIME)


Rows = list[dict[str, Any]]


def free_memory() -> int:
    """Give back what earlier work holds on the card; the bytes that are still allocated.

    cuBLAS keeps a workspace of 64 MiB for each stream that it has run on.
    """
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


# ---- Kernels against float64, at real sizes ----


KERNEL_SIZES = [(4096, 4096, 16), (11008, 4096, 32), (4096, 11008, 64), (4096, 4096, 384)]
"""(out, in, rank). Almost all of their time is Triton's, which compiles for each size anew."""


def kernels_against_float64(rows: Rows, clock: Clock) -> None:
    """Largest relative error of the norm, and of y, d_u, d_m by their norms, for each size."""
    from minidora import fused

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for out, inner, rank in KERNEL_SIZES:
            clock.check()
            start = time.perf_counter()
            weight = torch.randn(out, inner, device=DEVICE).div(inner**0.5).to(dtype)
            A = torch.randn(rank, inner, device=DEVICE) / inner**0.5
            B = torch.randn(out, rank, device=DEVICE) * 0.3 / rank**0.5
            weight[0] = 0
            weight[1] *= 1e-25
            B[:2] = 0
            row = -(1 - 1e-3) * weight[2].float()
            A[0], B[2], B[2, 0] = row, 0, 0.5
            norm = dora.factored_norm(weight, A, B, 2.0).double()
            exact = (weight.double() + 2 * B.double() @ A.double()).norm(dim=1)
            nonzero = exact > 0
            given = "cuBLAS" if fused.forms_norm(weight, A) else "PyTorch"
            path = "kernel" if rank <= fused.MAX_RANK else given
            errors = {"norm": float(((norm - exact).abs()[nonzero] / exact[nonzero]).max())}
            tokens = 2048
            base = torch.randn(tokens, out, device=DEVICE).to(dtype)
            h = torch.randn(tokens, rank, device=DEVICE).to(dtype)
            m, bias = exact.float() * 1.1, torch.randn(out, device=DEVICE).to(dtype)
            dy = torch.randn(tokens, out, device=DEVICE).to(dtype)
            u64 = base.double() + h.double() @ B.to(dtype).double().T
            g64 = torch.where(norm == 0, 1.0, m.double() / norm)
            u = base.clone()
            y = fused.compose(u, h, B, m, norm.float(), bias, True)
            du, dm = fused.compose_backward(dy, u, m, norm.float())
            dm64 = (dy.double() * u64).sum(0) / norm.masked_fill(norm == 0, torch.inf)
            expected = {"y": g64 * u64 + bias.double(), "d_u": g64 * dy.double(), "d_m": dm64}
            for name, got in {"y": y, "d_u": du, "d_m": dm.sum(0)}.items():
                want = expected[name]
                errors[name] = float((got.double() - want).norm() / want.norm())
            rows.append(
                {
                    "out": out, "in": inner, "rank": rank, "dtype": str(dtype), "path": path,
                    **errors, "seconds": time.perf_counter() - start,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)


# ---- One layer ----


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps its workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def graph_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call, replayed as a CUDA graph: the GPU's time without Python's."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times: list[float] = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return statistics.median(times)


LAYER_CASES = [*bench.CUDA_CASES[3:6], *bench.CUDA_CASES[:3], bench.CUDA_CASES[6]]
COMPILED_CASES = [bench.CUDA_CASES[3], bench.CUDA_CASES[1]]


def layers(rows: Rows, clock: Clock) -> None:
    """A training step of one layer in bf16: eager (alternating) and as a CUDA graph."""
    for case in LAYER_CASES:
        clock.check()
        found = bench.contenders(case, DEVICE, torch.bfloat16)
        kept = ("linear", "LoRA", "DoRA", "DoRA, first form", "PEFT LoRA", "PEFT DoRA")
        found = {name: layer for name, layer in found.items() if name in kept}
        x = torch.randn(case.tokens, case.features, device=DEVICE, dtype=torch.bfloat16)
        x.requires_grad_()
        dy = torch.randn_like(x)
        bench.check_outputs(found, x)
        counted = {name: bench.count_bytes(layer, x, dy) for name, layer in found.items()}
        step = _stepper(x, dy)
        eager = bench.alternate(found, step, DEVICE, 1.5)
        graphs = {}
        for name, layer in found.items():
            clock.check()
            with contextlib.suppress(RuntimeError):
                graphs[name] = graph_seconds(functools.partial(step, layer))
        with reuse_norms(found["DoRA"]):
            reused = bench.alternate({k: found[k] for k in ("LoRA", "DoRA")}, step, DEVICE, 0.5)
            graphs["DoRA, norms reused"] = graph_seconds(functools.partial(step, found["DoRA"]))
        eager["DoRA, norms reused"] = reused["DoRA"]
        for name, (seconds, ratio) in eager.items():
            graph = graphs.get(name)
            held, peak = counted.get(name, (None, None))
            rows.append(
                {
                    **asdict(case), "contender": name, "seconds": seconds, "ratio": ratio,
                    "graph_seconds": graph, "held": held, "peak": peak,
                    "graph_ratio": graph / graphs["LoRA"] if graph else None,
                }
            )  # fmt: skip
            print(case, name, f"eager {ratio[1]:.3f} graph {rows[-1]['graph_ratio']}", flush=True)


def _stepper(x: Tensor, dy: Tensor) -> Callable[[nn.Module], None]:
    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        torch.autograd.backward(layer(x), dy)

    return step


def compiled(rows: Rows, clock: Clock) -> None:
    """A training step of one layer after layer.compile(), alternating."""
    for case in COMPILED_CASES:
        clock.check()
        torch._dynamo.reset()
        found = bench.contenders(case, DEVICE, torch.bfloat16)
        kept = ("linear", "LoRA", "DoRA", "DoRA, first form", "PEFT DoRA")
        found = {name: layer for name, layer in found.items() if name in kept}
        x = torch.randn(case.tokens, case.features, device=DEVICE, dtype=torch.bfloat16)
        x.requires_grad_()
        for layer in found.values():
            layer.compile()
        bench.check_outputs(found, x)
        times = bench.alternate(found, _stepper(x, torch.randn_like(x)), DEVICE, 2.0)
        for name, (seconds, ratio) in times.items():
            rows.append({**asdict(case), "contender": name, "seconds": seconds, "ratio": ratio})
            print("compiled", case, name, f"{ratio[1]:.3f}", flush=True)


# ---- A whole LLaMA ----


class Llama(nn.Module):
    """The forward pass of the shapes of memory.llama, with random weights: for time and bytes."""

    def __init__(self, name: str, dtype: torch.dtype, blocks: int | None = None) -> None:
        super().__init__()
        shapes: Any = llama(name, dtype)
        if blocks is not None:
            shapes["model"]["layers"] = shapes["model"]["layers"][:blocks]
        self.net = shapes.to_empty(device=DEVICE)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        self.head_width = 128
        self.checkpointing = False
        positions = torch.arange(8192, device=DEVICE, dtype=torch.float32)
        rates = 1e4 ** (-torch.arange(0, 128, 2, device=DEVICE, dtype=torch.float32) / 128)
        angles = torch.outer(positions, rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        body: Any = self.net["model"]
        x = body["embed_tokens"](ids)
        for block in body["layers"]:
            if self.checkpointing:
                x = checkpoint(self.block, block, x, use_reentrant=False)
            else:
                x = self.block(block, x)
        logits = self.net["lm_head"](body["norm"](x))
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    def block(self, block: Any, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, tokens, -1, self.head_width).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            low, high = y.chunk(2, -1)
            turned = torch.cat((-high, low), -1)
            return y * self.cos[:tokens] + turned * self.sin[:tokens]  # type: ignore[index]

        attention, mlp = block["self_attn"], block["mlp"]
        n = block["input_layernorm"](x)
        q, k = rotate(heads(attention["q_proj"](n))), rotate(heads(attention["k_proj"](n)))
        v = heads(attention["v_proj"](n))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention["o_proj"](seen.transpose(1, 2).reshape(batch, tokens, -1))
        n = block["post_attention_layernorm"](x)
        hidden = F.silu(mlp["gate_proj"](n)) * mlp["up_proj"](n)
        return x + mlp["down_proj"](hidden)  # type: ignore[no-any-return]


def _adapted(base: Llama, method: str, rank: int = 32) -> nn.Module:
    """A model that shares the frozen weights of base, adapted by ours or by PEFT."""
    memo = {id(p): p for p in base.parameters()} | {id(b): b for b in base.buffers()}
    model = copy.deepcopy(base, memo)
    if not method.startswith("peft"):
        adapt(model, method, rank=rank, alpha=2.0 * rank, target_modules=TARGETS)
    else:
        import peft

        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, use_dora=method == "peft_dora", target_modules=TARGETS
        )
        peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


LLAMA_SETTINGS = [
    (4096, False, False), (2048, False, False), (2048, True, False), (2048, True, True),
    (4096, True, True), (2048, False, True),
]  # fmt: skip
"""(tokens, checkpointing, norms reused)."""


def llama_steps(rows: Rows, clock: Clock) -> None:
    """Seconds of a training step of a LLaMA with random weights, methods in turn, batch 1."""
    free = torch.cuda.mem_get_info()[0]
    name = "LLaMA-7B" if free > 60 * 2**30 else "a quarter of LLaMA-7B"
    base = Llama("LLaMA-7B", torch.bfloat16, None if name == "LLaMA-7B" else 8)
    base.requires_grad_(False)
    methods = ["lora", "dora"]
    with contextlib.suppress(ImportError):
        import peft  # noqa: F401

        methods += ["peft_dora", "peft_lora"]
    models = {method: _adapted(base, method) for method in methods}
    optimizers = {
        method: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for method, model in models.items()
    }
    for tokens, checkpointing, reuse in LLAMA_SETTINGS:
        clock.check()
        words = base.net.get_parameter("model.embed_tokens.weight").shape[0]
        ids = torch.randint(0, words, (1, tokens), device=DEVICE)
        chosen = ["lora", "dora"] if reuse else methods
        times: dict[str, list[float]] = {method: [] for method in chosen}
        peaks = {}
        for turn in range(7):
            for method in chosen:
                if turn > 3:
                    clock.check()
                model = models[method]
                for part in model.modules():
                    if isinstance(part, Llama):
                        part.checkpointing = checkpointing
                optimizers[method].zero_grad(set_to_none=True)
                gc.collect() if turn == 0 else None
                torch.cuda.synchronize()
                static = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                held = reuse and method == "dora"
                with reuse_norms(model) if held else contextlib.nullcontext():
                    model(ids).backward()
                optimizers[method].step()
                torch.cuda.synchronize()
                if turn > 1:
                    times[method].append(time.perf_counter() - start)
                    peaks[method] = torch.cuda.max_memory_allocated() - static
                optimizers[method].zero_grad(set_to_none=True)
        for method in chosen:
            ratios = [a / b for a, b in zip(times[method], times["lora"], strict=True)]
            row = {
                "model": name, "tokens": tokens, "checkpointing": checkpointing,
                "reuse_norms": reuse, "rank": 32, "method": method,
                "seconds": statistics.median(times[method]), "ratio": statistics.median(ratios),
                "step_peak": peaks[method],
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)


def full_fine_tuning(rows: Rows, clock: Clock) -> None:
    """Bytes of full fine-tuning, predicted by lesson 1 and measured, where the card is enough."""
    for implementation in ("fused", "foreach"):
        clock.check()
        start = free_memory()
        free = torch.cuda.mem_get_info()[0]
        for blocks in (32, 8, 2):
            shapes: Any = llama("LLaMA-7B", torch.float32)
            shapes["model"]["layers"] = shapes["model"]["layers"][:blocks]
            predicted = training_memory(shapes, "adam", implementation=implementation)
            if predicted.peak < 0.97 * free:
                break
        model = shapes.to_empty(device=DEVICE)
        weights = torch.cuda.memory_allocated() - start
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
            parameter.grad = torch.full_like(parameter, 1e-3)
        fused = implementation == "fused"
        optimizer = torch.optim.Adam(model.parameters(), fused=fused, foreach=not fused)
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        rows.append(
            {
                "implementation": implementation, "blocks": blocks,
                "predicted": asdict(predicted),
                "predicted_total": predicted.total, "predicted_peak": predicted.peak,
                "weights": weights, "after_step": torch.cuda.memory_allocated() - start,
                "peak_in_step": torch.cuda.max_memory_allocated() - start,
                "allocated_before": start,
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
        del model, optimizer, shapes, parameter
