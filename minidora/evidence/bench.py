"""What the layers cost, ours beside others': ratios of versions timed alternately in one run.

Every contender holds the same W, A, B and magnitude, and must give the outputs of the float64
closed form before anything is timed. A round times each contender once, so that what slows the
machine slows all of them; a ratio is taken within a round, its median and quartiles are reported.
Bytes are counted from the storages that operations make (memory.LiveBytes).

    minidora bench layers            # all shapes, float32 on a CPU, bf16 on a GPU
    minidora bench layers --quick    # two shapes, for a look
"""

import copy
import importlib.metadata
import importlib.util
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidora.adapt import merge
from minidora.dora import DoRALinear
from minidora.evidence.first_form import FirstForm
from minidora.evidence.step_cost import step_bytes
from minidora.lora import LoRALinear
from minidora.reuse import cached_scale
from minidora.training import progress_bar

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Form = TypeVar("Form")  # what is timed: a layer, or a function of x

REFERENCE = "LoRA"
NAMES = {
    "linear": "frozen nn.Linear",
    "LoRA": "LoRA, ours",
    "DoRA": "DoRA, ours",
    "DoRA, first form": "DoRA, ours, first form",
    "DoRA recompute": "DoRA, ours, recompute",
    "DoRA cached": "DoRA, ours, within cached_scale",
    "DoRA merged": "DoRA, ours, merged",
    "PEFT LoRA": "LoRA, PEFT",
    "PEFT DoRA": "DoRA, PEFT",
    "torchtune DoRA": "DoRA, torchtune",
    "source form": "DoRA, the source notebook's form",
}


@dataclass(frozen=True)
class Case:
    """A square layer: features in and out, tokens in a training step, rank."""

    features: int
    tokens: int
    rank: int


QUICK = [Case(1024, 1024, 16), Case(2048, 64, 16)]
SMALL_CASES = [Case(64, 64, 4), Case(128, 1024, 8), Case(512, 64, 8)]  # as in the course's models
CPU_CASES = [
    *SMALL_CASES,
    Case(512, 8192, 4),
    Case(1024, 1024, 16),
    Case(1024, 2048, 64),
    Case(2048, 64, 2),
    Case(2048, 64, 16),
    Case(2048, 512, 16),
    Case(2048, 512, 512),
    Case(4096, 1024, 32),
    Case(8192, 256, 8),
]
CUDA_CASES = [
    Case(1024, 8192, 16),
    Case(2048, 512, 16),
    Case(4096, 64, 16),
    Case(4096, 4096, 16),
    Case(4096, 4096, 384),
    Case(8192, 8192, 16),
    Case(8192, 4096, 512),
]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a figure was measured on. The versions of what is not installed are None."""

    device: str
    threads: str
    dtype: str
    mode: str  # "eager" or "compiled"
    python: str
    torch: str
    peft: str | None = None
    torchtune: str | None = None
    date: str

    def found(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.found().items())


@dataclass(frozen=True)
class Result:
    """One contender on one case. Ratios are to our LoRA: lower quartile, median, upper quartile.

    Attributes:
        seconds: median time. ratio: of the time of a round to LoRA's in the same round.
        held: bytes kept for the backward pass, without x, the parameters and the output.
        peak: most bytes alive at once during the step, made by it. Both are counted before a layer
            is compiled, and None for one token.
        dtype: where it is not the machine's.
    """

    features: int
    tokens: int
    rank: int
    work: str  # "training step" or "one token"
    contender: str
    seconds: float
    ratio: tuple[float, float, float]
    held: int | None = None
    peak: int | None = None
    dtype: str | None = None

    @property
    def case(self) -> Case:
        return Case(self.features, self.tokens, self.rank)

    @property
    def note(self) -> str:
        """ " (bf16)", where the machine's dtype is another."""
        return f" ({self.dtype.replace('bfloat', 'bf')})" if self.dtype else ""

    @property
    def label(self) -> str:
        """Its case as a table names it."""
        return f"{self.features}, {self.tokens}, {self.rank}{self.note}"


@dataclass(frozen=True)
class Report:
    """What `minidora bench layers` measured, and what its JSON holds."""

    machine: Machine
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        """<cpu or cuda>-<mode>, the name of its file."""
        kind = "cuda" if self.machine.dtype == "bfloat16" else "cpu"
        return f"{kind}-{self.machine.mode}"

    def text(self) -> str:
        """As JSON."""
        rows = [asdict(row) for row in self.results]
        for row in rows:
            if row["dtype"] is None:
                del row["dtype"]
        return json.dumps({"machine": self.machine.found(), "results": rows}, indent=1) + "\n"

    @classmethod
    def read(cls, content: Any) -> "Report":
        """A report from what its JSON holds.

        Raises:
            ValueError: that is not a report.
        """
        try:
            rows = [Result(**{**row, "ratio": tuple(row["ratio"])}) for row in content["results"]]
            return cls(Machine(**content["machine"]), tuple(rows))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a report of minidora bench layers: {error!r}") from None


class SourceForm(nn.Module):
    """The source notebook's layer, its product transposed right and its norm over the inputs: W'
    is built in every pass, V divided by its norm first, and the gradient goes through the norm."""

    def __init__(self, dora: DoRALinear) -> None:
        super().__init__()
        self.dora = dora

    def forward(self, x: Tensor) -> Tensor:
        v = self.dora.base.weight + self.dora.delta_weight()
        weight = self.dora.magnitude[:, None] * (v / v.norm(dim=1, keepdim=True))
        return F.linear(x, weight.to(x.dtype), self.dora.base.bias)


def contenders(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All layers of a case, with the same values in them. What is not installed is left out."""
    torch.manual_seed(0)
    features, rank, alpha = case.features, case.rank, 2.0 * case.rank
    # No bias: torchtune scales it with the weight, so that no output would be comparable.
    base = nn.Linear(features, features, bias=False, dtype=dtype)
    dora = DoRALinear(copy.deepcopy(base), rank, alpha)
    nn.init.normal_(dora.lora_B, std=0.2 / (features * rank) ** 0.5)
    with torch.no_grad():
        dora.magnitude.mul_(1 + 0.1 * torch.randn(features))
    lora = LoRALinear(copy.deepcopy(base), rank, alpha)
    lora.load_state_dict(dora.state_dict(), strict=False)
    recompute = copy.deepcopy(dora)
    recompute.recompute = True
    layers: dict[str, nn.Module] = {
        "linear": copy.deepcopy(base).requires_grad_(False),
        "LoRA": lora,
        "DoRA": dora,
        "DoRA, first form": FirstForm(copy.deepcopy(dora)),
        "DoRA recompute": recompute,
        "source form": SourceForm(copy.deepcopy(dora)),
    }
    if importlib.util.find_spec("peft"):
        layers["PEFT LoRA"] = _peft(dora, rank, alpha, use_dora=False)
        layers["PEFT DoRA"] = _peft(dora, rank, alpha, use_dora=True)
    if importlib.util.find_spec("torchtune"):
        layers["torchtune DoRA"] = _torchtune(dora, rank, alpha)
    return {name: layer.to(device) for name, layer in layers.items()}


def _peft(dora: DoRALinear, rank: int, alpha: float, use_dora: bool) -> nn.Module:
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_dora=use_dora, target_modules=["0"])
    layer: nn.Module = peft.get_peft_model(nn.Sequential(copy.deepcopy(dora.base)), config)
    layer = layer.get_submodule("base_model.model.0")
    _fill(layer, "lora_A.default.weight", dora.lora_A)
    _fill(layer, "lora_B.default.weight", dora.lora_B)
    if use_dora:
        _fill(layer, "lora_magnitude_vector.default.weight", dora.magnitude)
    return layer


def _torchtune(dora: DoRALinear, rank: int, alpha: float) -> nn.Module:
    torchtune: Any = importlib.import_module("torchtune.modules.peft")
    features, dtype = dora.in_features, dora.base.weight.dtype
    layer: nn.Module = torchtune.DoRALinear(features, features, rank, alpha).to(dtype)
    _fill(layer, "weight", dora.base.weight)
    _fill(layer, "lora_a.weight", dora.lora_A)
    _fill(layer, "lora_b.weight", dora.lora_B)
    _fill(layer, "magnitude", dora.magnitude)
    layer.get_parameter("weight").requires_grad_(False)
    return layer


def _fill(layer: nn.Module, name: str, values: Tensor) -> None:
    layer.get_parameter(name).data.copy_(values.detach())


def check_outputs(layers: dict[str, nn.Module], x: Tensor) -> None:
    """Compare the output of every layer, its first 64 tokens, with the float64 closed form.

    The layers get all of x, as it is: a compiled layer is checked in the graph that is timed.

    Raises:
        AssertionError: a contender computes something else; its time would mean nothing.
    """
    dora = layers["DoRA"]
    assert isinstance(dora, DoRALinear)
    W, A, B = (t.detach().double() for t in (dora.base.weight, dora.lora_A, dora.lora_B))
    with torch.no_grad():
        V = W + dora.scaling * B @ A
        W_dora = (dora.magnitude.double() / V.norm(dim=1))[:, None] * V
    for name, layer in layers.items():
        weight = W if name == "linear" else V if name.endswith("LoRA") else W_dora
        y, exact = layer(x)[:64].detach().double(), x[:64].detach().double() @ weight.T
        error = float((y - exact).norm() / exact.norm())
        assert error < (1e-5 if x.dtype == torch.float32 else 2e-2), f"{name} is off by {error}"


def run_case(
    case: Case, device: torch.device, dtype: torch.dtype, compiled: bool, budget: float
) -> list[Result]:
    """Time and count one case: a training step, then one token in evaluation.

    Args:
        budget: seconds that the rounds of each of the two may take; at least 5 are run.
    """
    layers = contenders(case, device, dtype)
    x = torch.randn(case.tokens, case.features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(case.tokens, case.features, device=device, dtype=dtype)
    check_outputs(layers, x)
    counted = {name: count_bytes(layer, x, dy) for name, layer in layers.items()}
    token = x.detach()[:1]
    inference = {name: layer for name, layer in layers.items() if name != "DoRA recompute"}
    inference |= {f"DoRA {what}": copy.deepcopy(layers["DoRA"]) for what in ("merged", "cached")}
    merge(inference["DoRA merged"])
    if compiled:
        torch._dynamo.reset()
        for layer in {*layers.values(), *inference.values()}:
            layer.compile()
        check_outputs(layers, x)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        torch.autograd.backward(layer(x), dy)

    key = (case.features, case.tokens, case.rank)
    results = []
    for name, (seconds, ratio) in alternate(layers, step, device, budget).items():
        results.append(Result(*key, "training step", name, seconds, ratio, *counted[name]))
    for layer in inference.values():
        layer.eval()
    with torch.no_grad(), cached_scale(inference["DoRA cached"]):
        check_outputs(inference, token)
        times = alternate(inference, lambda layer: layer(token), device, budget)
        for name, (seconds, ratio) in times.items():
            results.append(Result(*key, "one token", name, seconds, ratio))
    return results


def count_bytes(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[int, int]:
    """(held, peak) of a training step: see step_cost.StepCost."""
    cost = step_bytes(layer, x, dy, layer.parameters())
    return cost.held, cost.peak


def alternate(
    layers: Mapping[str, Form],
    call: Callable[[Form], object],
    device: torch.device,
    budget: float,
) -> dict[str, tuple[float, tuple[float, float, float]]]:
    """Median seconds of call(layer), and quartiles of its ratio to REFERENCE's in the same round.

    Two rounds warm up, then at least 5 are timed, more while they start within budget seconds. Each
    has an order of its own: what a layer leaves in the cache and the heap changes the time of the
    next one, on a CPU by a tenth and more.
    """
    times: dict[str, list[float]] = {name: [] for name in layers}
    end = time.perf_counter() + budget
    rounds, order = 0, list(layers.items())
    shuffle = random.Random(0).shuffle
    while rounds < 7 or time.perf_counter() < end:
        shuffle(order)
        for name, layer in order:
            _synchronize(device)
            start = time.perf_counter()
            call(layer)
            _synchronize(device)
            if rounds >= 2:
                times[name].append(time.perf_counter() - start)
        rounds += 1
    result = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[REFERENCE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = (statistics.median(seconds), (low, middle, high))
    return result


def ratios(
    forms: Mapping[str, Form],
    call: Callable[[Form], object],
    device: torch.device,
    budget: float = 2.0,
) -> str:
    """What alternate measures of each form, beside the one called LoRA, as lines to print."""
    found = alternate(forms, call, device, budget)
    width = max(map(len, found))
    return "\n".join(
        f"{name:<{width}}  {middle:5.2f} times LoRA's (quartiles {low:.2f} to {high:.2f})"
        for name, (_, (low, middle, high)) in found.items()
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    cases: list[Case], device: torch.device, compiled: bool = False, budget: float = 4.0
) -> Report:
    """Run cases. On a CPU all run in float32, and those of SMALL_CASES in bf16 too."""
    main = torch.bfloat16 if device.type == "cuda" else torch.float32
    runs = [(case, main) for case in cases]
    if device.type != "cuda":
        runs += [(case, torch.bfloat16) for case in cases if case in SMALL_CASES]
    results: list[Result] = []
    for case, dtype in progress_bar(runs, "shapes"):
        named = None if dtype == main else str(dtype).removeprefix("torch.")
        rows = run_case(case, device, dtype, compiled, budget)
        results += [replace(row, dtype=named) for row in rows]
    return Report(machine(device, main, compiled), tuple(results))


def machine(device: torch.device, dtype: torch.dtype, compiled: bool) -> Machine:
    """This one."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    versions = {
        package: importlib.metadata.version(package)
        for package in ("peft", "torchtune")
        if importlib.util.find_spec(package)
    }
    return Machine(
        device=name,
        threads=str(torch.get_num_threads()),
        dtype=str(dtype).removeprefix("torch."),
        mode="compiled" if compiled else "eager",
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        date=date.today().isoformat(),
        **versions,
    )


def load_reports(folder: Path = BENCHMARKS) -> dict[str, Report]:
    """The reports in a folder, by name ("cpu-eager"): the repository's, wherever one calls from.

    An empty dict where there are none, as in a package that was installed without its repository.

    Raises:
        ValueError: a JSON file there is not one.
    """
    reports = {}
    for name, content in load_json(folder).items():
        try:
            reports[name] = Report.read(content)
        except ValueError as error:
            raise ValueError(f"{name}.json: {error}") from None
    return reports


def load_json(folder: Path) -> dict[str, Any]:
    """What the JSON files of a folder hold, by name."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
