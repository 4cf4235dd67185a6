"""What training costs in bytes: predicted from shapes, and counted on a real model.

    weights + gradients + optimizer state        after every step
    + step temporaries                           inside optimizer.step() alone
    + saved activations                          until the backward pass has used them, in part
                                                 beside the gradients

    model = llama("LLaMA-7B", torch.float32)                 # on the meta device: shapes, no data
    training_memory(model, "adam").total                     # 107,814,651,020 bytes
    measure_memory(model, optimizer)                         # the same fields, counted

Every number is exact, in bytes: gb() divides by 1e9, gib() by 2**30. What is counted are the
storages of tensors. An allocator rounds each of them up (CUDA's to 512 bytes) and keeps freed
blocks, kernels have workspaces, and the driver takes its part: a GPU shows more.

References:
    Kingma, Ba 2014, "Adam", arXiv 1412.6980: two moments a parameter
    Rajbhandari et al. 2019, "ZeRO", arXiv 1910.02054, sec. 3.1: 16 bytes a parameter in mixed
        precision
    Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861
    Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339: 8-bit weights, one scale a row
    Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, sec. 3: NF4, double quantization
    The layouts of these are those that bitsandbytes 0.50.2 stores.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPTIMIZERS = ("adam", "adamw", "adamw8bit", "sgd", "sgd-momentum")
IMPLEMENTATIONS = ("single", "foreach", "fused")
QUANTIZATIONS = ("int8", "nf4", "nf4-double")


def gb(count: int) -> float:
    """Bytes in GB: 1e9 bytes, as on the label of a disk; a graphics card's GB are often GiB."""
    return count / 1e9


def gib(count: int) -> float:
    """Bytes in GiB: 2**30 bytes, as in nvidia-smi's MiB or torch.cuda's messages."""
    return count / 2**30


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training run.

    Attributes:
        weights: parameters and buffers, frozen and trainable.
        gradients: one number for each trainable parameter.
        optimizer_state: what lasts from step to step, master weights included.
        step_temporaries: the most that is alive inside step() beside all this.
    """

    weights: int
    gradients: int
    optimizer_state: int
    step_temporaries: int = 0

    @property
    def total(self) -> int:
        """What is there after a step and before the gradients are dropped."""
        return self.weights + self.gradients + self.optimizer_state

    @property
    def peak(self) -> int:
        """The most that is there inside step()."""
        return self.total + self.step_temporaries

    def table(self) -> str:
        """Its parts and their sum, a line each: bytes, GB and GiB."""
        rows = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer state": self.optimizer_state,
            "after a step": self.total,
        }
        return "\n".join(
            f"{name:16} {count:15,} bytes = {gb(count):6.1f} GB = {gib(count):6.1f} GiB"
            for name, count in rows.items()
        )


# ---- Predicted from shapes ----


def training_memory(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    implementation: str = "foreach",
    master_weights: bool = False,
    quantize: str | None = None,
) -> TrainingMemory:
    """Predict the bytes of training a model, which may stand on the meta device.

    Each parameter counts in its own dtype, frozen ones as weights alone. Every trainable parameter
    is taken to have a gradient.

    Args:
        model: plain or adapted; requires_grad says what is trained.
        optimizer: "adam", "adamw", "sgd" or "sgd-momentum" as in torch.optim, without amsgrad
            (one more moment) and, except in AdamW, without weight decay (a copy of the gradient
            inside step); "adamw8bit" as in bitsandbytes.
        implementation: how step() runs: "single" (one parameter after the other, torch's choice
            on a CPU), "foreach" (all at once, its choice on CUDA), "fused" (one kernel). The
            8-bit optimizer has its own kernel and no temporaries.
        master_weights: keep a float32 copy of each trainable parameter of a smaller dtype, and
            moments in float32. Inside step the gradients exist in float32 too.
        quantize: None, or how frozen nn.Linear weights are stored, except those named lm_head:
            "int8", "nf4" or "nf4-double" (see quantized_bytes).

    Raises:
        ValueError: an unknown name, or quantize without a frozen linear weight.
    """
    _check("optimizer", optimizer, OPTIMIZERS)
    _check("implementation", implementation, IMPLEMENTATIONS)
    weights = sum(_storages([*model.parameters(), *model.buffers()]).values())
    if quantize is not None:
        frozen = _frozen_linear_weights(model)
        if not frozen:
            raise ValueError(
                f"quantize={quantize!r}, but the model has no frozen nn.Linear weight: "
                "freeze or adapt it first, or leave quantize out"
            )
        weights -= sum(_storages(frozen).values())
        weights += sum(quantized_bytes(w.shape[0], w.shape[1], quantize) for w in frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    halves = sum(p.numel() for p in trained if p.itemsize < 4) if master_weights else 0
    # (numbers, bytes a number) as the optimizer sees them: it steps the masters where there are any
    stepped = [(p.numel(), max(p.itemsize, 4) if master_weights else p.itemsize) for p in trained]
    return TrainingMemory(
        weights=weights,
        gradients=sum(p.numel() * p.itemsize for p in trained),
        optimizer_state=4 * halves + _optimizer_state(stepped, optimizer),
        step_temporaries=4 * halves + _step_temporaries(stepped, optimizer, implementation),
    )


def _optimizer_state(stepped: list[tuple[int, int]], optimizer: str) -> int:
    """Bytes that last: Adam's m and v and its step counter, a float32 scalar; SGD's velocity."""
    if optimizer in ("adam", "adamw"):
        return sum(2 * n * size + 4 for n, size in stepped)
    if optimizer == "adamw8bit":
        # One byte a number and a float32 scale for 256 of them; tensors below 4096 numbers stay
        # float32. One table of 256 values for m and one for v serve all parameters.
        large = [n for n, _ in stepped if n >= 4096]
        small = [n for n, _ in stepped if n < 4096]
        moments = sum(n + 4 * math.ceil(n / 256) for n in large) + sum(4 * n for n in small)
        return 2 * moments + (2 * 256 * 4 if large else 0)
    return sum(n * size for n, size in stepped) if optimizer == "sgd-momentum" else 0


def _step_temporaries(stepped: list[tuple[int, int]], optimizer: str, implementation: str) -> int:
    """Bytes of Adam's denominator sqrt(v) / c + eps; SGD and the fused kernels have none.

    single: sqrt(v) and its quotient, while the parameter before still has its denominator.
    foreach: sqrt(v) of all parameters of one dtype, changed in place.
    """
    if optimizer not in ("adam", "adamw") or implementation == "fused":
        return 0
    sizes = [n * size for n, size in stepped]
    copies = 2
    if implementation == "foreach":
        by_dtype = groupby(sorted(stepped, key=lambda s: s[1]), key=lambda s: s[1])
        sizes = [sum(n * size for n, size in group) for _, group in by_dtype]
        copies = 1
    return max((last + copies * now for last, now in pairwise([0, *sizes])), default=0)


def quantized_bytes(out_features: int, in_features: int, layout: str) -> int:
    """Bytes of an (out, in) weight as bitsandbytes stores it, scales and tables included.

    "int8" (LLM.int8): 1 byte a weight, and a float32 scale for each row.
    "nf4" (QLoRA): 4 bits a weight, a float32 scale for each block of 64: 4.5 bits; and the table
        of the 16 values.
    "nf4-double": these scales as 8 bits, a float32 scale for 256 of them, their float32 mean:
        4.127 bits; and the tables of the 16 and of the 256 values.

    Raises:
        ValueError: an unknown layout.
    """
    _check("quantize", layout, QUANTIZATIONS)
    numbers = out_features * in_features
    if layout == "int8":
        return numbers + 4 * out_features
    packed, blocks = math.ceil(numbers / 2), math.ceil(numbers / 64)
    if layout == "nf4":
        return packed + 4 * blocks + 4 * 16
    return packed + blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * 16 + 4 * 256


def adapter_parameters(layers: Iterable[nn.Linear], rank: int, method: str = "dora") -> int:
    """Numbers that LoRA, rank * (in + out) a layer, or DoRA, out more, would train.

    Raises:
        ValueError: an unknown method.
    """
    _check("method", method, ("lora", "dora"))
    return sum(
        rank * (layer.in_features + layer.out_features)
        + (layer.out_features if method == "dora" else 0)
        for layer in layers
    )


def _check(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")


def _frozen_linear_weights(model: nn.Module) -> list[Tensor]:
    """What QLoRA and LLM.int8 quantize, each once: the output head stays in half precision."""
    weights = {
        id(module.weight): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name.split(".")
    }
    return [weight for weight in weights.values() if not weight.requires_grad]


# ---- Counted on a real model ----


def make_optimizer(
    name: str, model: nn.Module, implementation: str = "foreach"
) -> torch.optim.Optimizer:
    """An optimizer of torch.optim over what the model trains, as training_memory predicts it.

    Args:
        name: one of OPTIMIZERS but "adamw8bit", which is not PyTorch's.
        implementation: one of IMPLEMENTATIONS.

    Raises:
        ValueError: an unknown name, or a model without a trainable parameter.
    """
    _check("name", name, tuple(known for known in OPTIMIZERS if known != "adamw8bit"))
    _check("implementation", implementation, IMPLEMENTATIONS)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: adapt or unfreeze it")
    foreach, fused = implementation == "foreach", implementation == "fused"
    if name.startswith("sgd"):
        momentum = 0.9 if name == "sgd-momentum" else 0.0
        return torch.optim.SGD(trained, lr=0.1, momentum=momentum, foreach=foreach, fused=fused)
    adam = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return adam(trained, lr=1e-3, foreach=foreach, fused=fused)


def train_and_measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 10
) -> TrainingMemory:
    """Train a classifier on batches of 100, and count what exists in the last step."""
    _train(model, optimizer, x, y, steps)
    return measure_memory(model, optimizer)


def step_history(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 3
) -> list[int]:
    """Train a classifier on batches of 100; LiveBytes.history within the last step()."""
    _train(model, optimizer, x, y, steps)
    with LiveBytes() as watch:
        optimizer.step()
    history: list[int] = watch.history
    return history


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> None:
    """As many training steps, all but the last step() itself."""
    for step in range(steps):
        if step:
            optimizer.step()
        batch = slice(100 * step, 100 * (step + 1))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()


def measure_memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingMemory:
    """Take one optimizer.step() with the gradients that are there, and count what exists.

    Counted are the bytes of distinct storages: of parameters and buffers, of gradients, of the
    tensors in optimizer.state, and of those made inside step() (see LiveBytes).

    Raises:
        ValueError: no parameter has a gradient: run a backward pass first.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient, so step() would do nothing: backward first")
    with LiveBytes() as watch:
        optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    return TrainingMemory(
        weights=sum(_storages([*model.parameters(), *model.buffers()]).values()),
        gradients=sum(_storages(gradients).values()),
        optimizer_state=sum(_storages(state).values()),
        step_temporaries=watch.peak - watch.now,  # what is left belongs to the state
    )


class LiveBytes(TorchDispatchMode):
    """Within it, count the bytes of storages that operations make and that are still alive.

    It looks after each operation that PyTorch dispatches, so a workspace inside a kernel is not
    seen, and storages that existed before count 0.

    Attributes:
        now: bytes alive. peak: the most so far. history: now, after each operation.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler here, for seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.history: list[int] = []
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._watch((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._watch(result, new=True)
        self.peak = max(self.peak, self.now)
        self.history.append(self.now)
        return result

    def _watch(self, tensors: Any, new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if new else 0
            if key in self._alive:
                continue

            def freed(_: object, key: int = key, size: int = size) -> None:
                del self._alive[key]
                self.now -= size

            self._alive[key] = weakref.ref(storage, freed)
            self.now += size


class Launches(TorchDispatchMode):
    """Within it, list the operations that start a kernel, and count the bytes they must move.

    A GPU starts each of them and waits for it; what only describes memory anew (a view) or
    reserves it (empty) is left out. It runs on the meta device: without a GPU, and without data.

    Attributes:
        names: of the operations, in order, such as "aten.mm.default".
        moved: bytes of the inputs and outputs of each; what is changed in place is both.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.moved: list[int] = []

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(self.moved)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        written = _tensors(result)
        known = _storages(read)
        view = not func._schema.is_mutable and all(key in known for key in _storages(written))
        if "empty" in func.__name__ or (view and written):
            return result
        places = zip(func._schema.arguments, args, strict=False)
        changed = [t for place, t in places if place.is_write and isinstance(t, Tensor)]
        written += [t for t in changed if all(t is not other for other in written)]
        self.names.append(str(func))
        self.moved.append(sum(tensor.nbytes for tensor in read + written))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def activation_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of forward(), such as lambda: loss(model(x)).

    Each storage counts once; parameters and buffers of the model do not count, inputs do.
    """
    own = _storages([*model.parameters(), *model.buffers()])
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for key, size in _storages(saved).items() if key not in own)


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each distinct storage, by its address; what is no tensor is passed over."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}


# ---- Architectures ----


@dataclass(frozen=True)
class Architecture:
    """Sizes of a LLaMA: width, inner width of the MLP, blocks, width of keys and values, tokens."""

    hidden: int
    intermediate: int
    layers: int
    key_value: int
    vocabulary: int


LLAMAS = {
    "LLaMA-7B": Architecture(4096, 11008, 32, 4096, 32000),
    "LLaMA-13B": Architecture(5120, 13824, 40, 5120, 32000),
    "LLaMA2-7B": Architecture(4096, 11008, 32, 4096, 32000),
    "LLaMA3-8B": Architecture(4096, 14336, 32, 1024, 128256),
    "LLaMA2-70B": Architecture(8192, 28672, 80, 1024, 32000),
    "LLaMA3-70B": Architecture(8192, 28672, 80, 1024, 128256),
}
"""Published sizes: Touvron et al. 2023, arXiv 2302.13971 (LLaMA) and 2307.09288 (LLaMA2);
Grattafiori et al. 2024, arXiv 2407.21783 (LLaMA3)."""


def llama(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    """The parameters of a LLaMA on the meta device, under Hugging Face's names; no forward.

    Args:
        name: a key of LLAMAS.
        dtype: of every parameter.

    Raises:
        ValueError: an unknown name.
    """
    _check("name", name, tuple(LLAMAS))
    size = LLAMAS[name]
    d, ff, kv = size.hidden, size.intermediate, size.key_value

    def linear(in_features: int, out_features: int) -> nn.Linear:
        return nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)

    def norm() -> nn.RMSNorm:
        return nn.RMSNorm(d, device="meta", dtype=dtype)

    def block() -> nn.ModuleDict:
        attention = {"q_proj": linear(d, d), "k_proj": linear(d, kv), "v_proj": linear(d, kv)}
        mlp = {"gate_proj": linear(d, ff), "up_proj": linear(d, ff), "down_proj": linear(ff, d)}
        return nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict({**attention, "o_proj": linear(d, d)}),
                "mlp": nn.ModuleDict(mlp),
                "input_layernorm": norm(),
                "post_attention_layernorm": norm(),
            }
        )

    body = {
        "embed_tokens": nn.Embedding(size.vocabulary, d, device="meta", dtype=dtype),
        "layers": nn.ModuleList(block() for _ in range(size.layers)),
        "norm": norm(),
    }
    return nn.ModuleDict({"model": nn.ModuleDict(body), "lm_head": linear(d, size.vocabulary)})
