"""Run a learner's code and hand back plain data: the side of a check that touches the answer.

A probe is a function of this file that calls the learner's function or class. It runs where the
learner's code lives: in the notebook's kernel, or in the process that `minidora check` starts.
What it found is packed into JSON and judged elsewhere (minidora/checks/exercise.py), so a check
reads the same data in a notebook and over a class, and that nothing a submission does in its own
process can reach the verdict.

Nothing in this file knows a right answer: a submission can read all of it.
"""

import base64
import copy
import ctypes
import dis
import importlib
import inspect
import json
import linecache
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

with suppress(ImportError):  # in lesson 1's sandbox, where it is an answer; no probe needs it there
    from minidora.memory import LiveBytes

LONGEST = 100_000
"""Letters of the longest text that a probe hands back."""

LARGEST = 256 * 2**20
"""Bytes of the largest tensor that a probe hands back."""


# ---- Probes ----

PROBES: dict[str, Callable[..., Any]] = {}
"""What a check may ask for, by name."""


def probe(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function a probe."""
    PROBES[function.__name__] = function
    return function


@probe
def call(answer: Callable[..., Any], *args: Any) -> Any:
    """answer(*args), which leaves its arguments as they are (see unchanged)."""
    return answer(*args)


@probe
def calls(answer: Callable[..., Any], rounds: list[list[Any]]) -> list[Any]:
    """answer(*args) for each of the rounds, all looked at after the last."""
    return [answer(*args) for args in rounds]


@probe
def surroundings(answer: Callable[..., Any], *args: Any) -> list[str]:
    """What answer(*args) changes and should not: arguments by their name, and torch's state."""
    before = [_pack_deep(argument) for argument in args]
    state: list[str] = torch_state(answer, *args)
    changed = [
        f"the caller's {argument_name(answer, index)}"
        for index, argument in enumerate(args)
        if _pack_deep(argument) != before[index]
    ]
    return changed + state


@probe
def torch_state(answer: Callable[..., Any], *args: Any) -> list[str]:
    """What answer(*args) changes of torch's state; it may change its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.seed()  # so that whoever sets a seed changes the state, again and again
        before = _torch_state()
        _applied(answer)(*args)
        after = _torch_state()
    return _changed(before, after)


def _changed(before: dict[str, Any], after: dict[str, Any], but: str = "") -> list[str]:
    return [name for name, value in before.items() if name != but and after[name] != value]


def _pack_deep(value: Any) -> Any:
    """As pack; of a module, each of the modules inside, with its own numbers."""
    return pack(list(value.modules()) if isinstance(value, nn.Module) else value)


def _applied(answer: Any) -> Callable[..., Any]:
    """What is called: `apply` of an autograd.Function."""
    function = inspect.isclass(answer) and issubclass(answer, torch.autograd.Function)
    return answer.apply if function else answer  # type: ignore[no-any-return]


def _torch_state() -> dict[str, Any]:
    """What a function may change for the whole process, by what to call it."""
    hooks = [value for name, value in vars(nn.modules.module).items() if name.startswith("_global")]
    return {
        "whether gradients are recorded": torch.is_grad_enabled(),
        "torch's inference mode": torch.is_inference_mode_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": _default_device(),
        "torch's random state": bytes(torch.get_rng_state().tolist()),
        "torch's number of threads": torch.get_num_threads(),
        "whether torch is deterministic": torch.are_deterministic_algorithms_enabled(),
        "the hooks of all modules": [list(hook) for hook in hooks if isinstance(hook, dict)],
    }


@probe
def away(answer: Callable[..., Any], *args: Any, x: Tensor | None = None, gpu: str = "") -> Any:
    """answer(*args), or [answer(*args), answer(*args)(x)], on another device than the CPU.

    Where there is no GPU, the device "meta" plays its part: tensors there hold numbers, as long as
    this runs, and refuse to meet tensors of the CPU, as those of a GPU do. What was made by NumPy,
    from a list or without `device=` is on the CPU.
    """
    real = gpu if torch.cuda.is_available() else ""
    with ExitStack() as elsewhere:
        if not real:
            elsewhere.enter_context(Elsewhere())  # type: ignore[no-untyped-call]
            elsewhere.enter_context(FromData())
        made = _applied(answer)(*(_moved(argument, real) for argument in args))
        return made if x is None else [made, made(_moved(x, real))]


class Away(Tensor):
    """A tensor that says it is on the device "meta", around the one on the CPU that it is."""

    inside: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "Away":
        made = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=torch.device("meta"),
            requires_grad=False,
        )
        made.inside = real
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.tolist:
            return args[0].inside.tolist()
        if func is Tensor.new_tensor:
            like = {"dtype": args[0].dtype, "device": args[0].device, **(kwargs or {})}
            return torch.tensor(args[1], dtype=like["dtype"]).to(like["device"])
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert a tensor of another device to numpy: .cpu() first")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return Elsewhere.work(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Lets Away tensors be computed with, and makes new ones where device="meta" is asked for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler here, for seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.work(func, args, kwargs or {})

    @staticmethod
    def work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        wanted = kwargs.get("device")
        away = [part for part in given if isinstance(part, Away)]
        near = [part for part in given if not isinstance(part, Away) and part.ndim]
        if away and near and func.overloadpacket not in MAY_MEET:
            raise RuntimeError("Expected all tensors to be on the same device, but found two")
        lands_away = bool(away) if wanted is None else torch.device(wanted).type == "meta"
        if wanted is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        args_, kwargs_ = tree_map(
            lambda part: part.inside if isinstance(part, Away) else part, (args, kwargs)
        )
        made = func(*args_, **kwargs_)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if not lands_away:
            return made
        with torch.inference_mode(False):  # in it no view could be told from what it is a view of
            made = tree_map(lambda part: Away(part) if isinstance(part, Tensor) else part, made)
        return return_and_correct_aliasing(func, args, kwargs, made) if away else made


MAY_MEET = {
    torch.ops.aten._to_copy,
    torch.ops.aten.copy_,
    torch.ops.aten.index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
}
"""What takes tensors of two devices: copies, and indexing by a tensor of the CPU."""


class FromData(TorchFunctionMode):
    """Takes torch.tensor(data, device="meta") to Elsewhere, which never gets to see it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device"):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _moved(argument: Any, gpu: str) -> Any:
    """A tensor, or a module, on the other device."""
    if gpu and isinstance(argument, Tensor | nn.Module):
        return argument.to(gpu)
    if isinstance(argument, Tensor):
        return Away(argument.detach().clone()).requires_grad_(argument.requires_grad)
    if isinstance(argument, nn.Module):
        for module in argument.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    moved = nn.Parameter(Away(value.detach().clone()), value.requires_grad)
                    module._parameters[name] = moved
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = Away(buffer.detach().clone())
    return argument


@probe
def names_used(answer: Any) -> list[str]:
    """Global names that the code of a function, or of a class's methods, looks up."""
    parts = [answer, *vars(answer).values()] if inspect.isclass(answer) else [answer]
    codes = [part.__code__ for part in parts if inspect.isfunction(part)]
    found = chain.from_iterable(map(dis.get_instructions, codes))
    return sorted({each.argval for each in found if each.opname == "LOAD_GLOBAL"})


@probe
def shared(answer: Callable[..., nn.Module], *args: Any) -> list[str]:
    """Modules and tensors of the module answer(*args) that are those of a module in args, or have
    its memory, by name."""
    given = [module for module in args if isinstance(module, nn.Module)]
    storages = {
        value.untyped_storage().data_ptr() for module in given for _, value in _tensors(module)
    }
    made = answer(*args)
    modules = made.named_modules(remove_duplicate=False)
    return [name or "all of it" for name, module in modules if module in given] + [
        name for name, value in _tensors(made) if value.untyped_storage().data_ptr() in storages
    ]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Its parameters and buffers; each under all of its names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]


@probe
def build(answer: Callable[..., Any], *args: Any) -> Any:
    """answer(*args) for a class that may change what it is given, as an adapter freezes its base.

    Returns {"made": the object, "given": the arguments afterwards}.
    """
    made = _applied(answer)(*args)
    return {"made": made, "given": list(args)}


@probe
def build_after_backward(answer: Callable[..., Any], model: nn.Module, *args: Any) -> Any:
    """As build; each parameter of the model, frozen or not, comes with a gradient of ones."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return build(answer, model, *args)


@probe
def gradients(
    answer: Callable[..., Any], args: list[Any], wrt: list[int], *cotangents: Tensor
) -> dict[str, Any]:
    """{"value": y, "gradients": [...]}: of sum(y * cotangent), for the arguments number wrt.

    Where the answer is a tuple, there is a cotangent for each part, and all parts are summed.
    The list holds None for an argument that no gradient reaches.
    """
    leaves = list(args)
    for index in wrt:
        leaves[index] = args[index].detach().clone().requires_grad_()
    value = answer(*leaves)
    parts = value if isinstance(value, tuple | list) else [value]
    live = [
        pair for pair in zip(parts, cotangents, strict=False)
        if isinstance(pair[0], Tensor) and pair[0].requires_grad and pair[0].shape == pair[1].shape
    ]  # fmt: skip
    if live:
        torch.autograd.backward([part for part, _ in live], [dy for _, dy in live])
    return {"value": value, "gradients": [leaves[index].grad for index in wrt]}


@probe
def layer(
    answer: Callable[..., nn.Module],
    args: list[Any],
    values: dict[str, Tensor],
    x: Tensor,
    cotangent: Tensor,
) -> dict[str, Any]:
    """Build answer(*args), run it on x, fill the named parameters, run it again, and backward
    through sum(y * cotangent).

    Returns {"module": ..., "start": the first y, "given": x after it, "value": y, "x": the gradient
    of x, "gradients": {name: gradient or None}}.
    """
    module, given = answer(*args), x.clone()
    with torch.no_grad():
        start = module(given)
        for name, value in values.items():
            getattr(module, name).copy_(value)
    x = x.detach().clone().requires_grad_()
    value = module(x)
    if isinstance(value, Tensor) and value.requires_grad and value.shape == cotangent.shape:
        torch.autograd.backward([value], [cotangent])
    every = module.named_parameters(remove_duplicate=False)
    grads = {name: parameter.grad if parameter.is_leaf else None for name, parameter in every}
    found = {"module": module, "start": start, "given": given, "value": value}
    return {**found, "x": x.grad, "gradients": grads}


@probe
def step(answer: Callable[..., nn.Module], args: list[Any], x: Tensor) -> dict[str, Any]:
    """Train the module answer(*args) for one step of SGD on x.

    Returns {"before": its parameters by name, "made": the module afterwards}.
    """
    made = answer(*args)
    before = {name: value.detach().clone() for name, value in made.named_parameters()}
    _one_step(made, x, torch.ones(()))
    return {"before": before, "made": made}


@probe
def step_of_parameters(answer: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """One step of SGD on the parameters answer(*args), so that each should move.

    Returns {"before": ..., "after": ..., "shared": whether two have one storage}.
    """
    made = list(answer(*args))
    before = [value.detach().clone() for value in made]
    torch.stack([value.sum() for value in made]).sum().backward()
    _descend(made)
    storages = {value.untyped_storage().data_ptr() for value in made}
    return {"before": before, "after": made, "shared": len(storages) < len(made)}


def _one_step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    live = [value for value in module.parameters() if value.requires_grad]
    if live:
        (module(x) * dy.to(x)).sum().backward()
        _descend(live)


def _descend(parameters: list[nn.Parameter]) -> None:
    """What SGD does. The first optimizer of a process would import torch._dynamo, for seconds."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)


@probe
def use(
    answer: Callable[..., nn.Module],
    args: list[Any],
    fills: list[dict[str, Tensor]],
    xs: list[Tensor],
    cotangent: Tensor,
) -> dict[str, Any]:
    """What a layer answers in the course of its life; fills are two sets of its parameters.

    Returns {"values": in six uses, "gradients": of two backward passes, "stepped": the layer after
    a step of SGD, "after": its y then, "base changed": and with another weight in its base}.
    """

    def fill(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
        with torch.no_grad():
            for name, value in values.items():
                getattr(module, name).copy_(value)
        return module

    other = copy.deepcopy(args)
    module, x = answer(*args), xs[0]
    values = []
    with torch.no_grad():
        values.append(fill(module.eval(), fills[0])(x))
        values.append(fill(module, fills[1])(x))
        values.append(module.train()(x))
        values.append(fill(copy.deepcopy(module), fills[0])(x))
        values.append(module(x))
        fill(answer(*other), fills[0])(x)
        values.append(module(x))
    leaves = [each.detach().clone().requires_grad_() for each in xs]
    outputs = [module.train(index > 0)(leaf) for index, leaf in enumerate(leaves)]
    found: dict[str, Any] = {"values": values, "gradients": []}
    for leaf, y in zip(leaves, outputs, strict=True):
        module.zero_grad()
        if y.requires_grad:
            torch.autograd.backward([y], [cotangent])
        grads = {name: getattr(module, name).grad for name in fills[0]} | {"x": leaf.grad}
        found["gradients"].append({k: v if v is None else v.clone() for k, v in grads.items()})
    module.zero_grad()
    _one_step(module, x, cotangent)
    found["stepped"] = module
    with torch.no_grad():
        found["after"] = module(x)
        module.base.weight.mul_(2)  # type: ignore[operator, union-attr]  # as loading one would
        found["base changed"] = module(x)
    return found


@probe
def passes_in_turn(
    answer: Any, calls: list[list[Tensor]], order: list[int], cotangent: Tensor
) -> dict[str, Any]:
    """All calls of an autograd.Function first, then backward passes through them, in this order.

    The cotangent is not contiguous. Returns {"values": one a call, "gradients": one list for each
    backward pass, with None where no gradient arrives}.
    """
    leaves = [[part.detach().clone().requires_grad_() for part in args] for args in calls]
    values = [_applied(answer)(*args) for args in leaves]
    gradients = []
    for index in order:
        dy = cotangent.mT.contiguous().mT
        gradients.append(
            list(
                torch.autograd.grad(
                    values[index], leaves[index], dy, retain_graph=True, allow_unused=True
                )
            )
        )
    return {"values": values, "gradients": gradients}


@probe
def cost(
    answer: Callable[..., Any],
    args: list[Any],
    wrt: list[int],
    cotangent: Tensor,
    alone: bool = False,
) -> dict[str, Any]:
    """answer(*args), or answer.apply(*args) of an autograd.Function, with its bytes.

    Args:
        wrt: numbers of the arguments that need a gradient.
        cotangent: the gradients are those of sum(y * cotangent).
        alone: nobody but the answer holds its arguments, all of them tensors. What it keeps of
            them counts as held then.

    Returns:
        "value": y; "held": bytes that the forward pass leaves behind beside y and the arguments;
        "peak": the most that was alive at once in it; "gradients": one for each of wrt, or None;
        "changed": numbers of the arguments that forward wrote into (if alone), and len(args) where
        backward wrote into the cotangent; "inference": whether y was made in inference mode.
    """
    leaves = list(args)
    for index in wrt:
        leaves[index] = args[index].detach().clone().requires_grad_()
    changed = []
    with LiveBytes() as live:
        given = [leaf.clone() for leaf in leaves] if alone else leaves
        value = _applied(answer)(*given)
        if alone:
            pairs = enumerate(zip(given, leaves, strict=True))
            changed = [index for index, pair in pairs if not torch.equal(*pair)]
        del given
    held = live.now
    before = cotangent.clone()
    if isinstance(value, Tensor):
        held -= value.untyped_storage().nbytes()
        if value.requires_grad:
            torch.autograd.backward([value], [cotangent])
    if not torch.equal(cotangent, before):
        changed.append(len(args))
    return {
        "value": value,
        "held": held,
        "peak": live.peak,
        "gradients": [leaves[index].grad for index in wrt],
        "changed": changed,
        "inference": isinstance(value, Tensor) and value.is_inference(),
    }


@probe
def no_triton(answer: Any) -> str:
    """Why no kernel of Triton can run where the answer lives; empty where one can."""
    return str(importlib.import_module("minidora.interpreter").problem)


@probe
def launched(
    answer: Any, grid: list[int], args: list[Any], constants: dict[str, int]
) -> dict[str, Any]:
    """answer[grid](*args, **constants), for a kernel of Triton, which writes into its arguments.

    Every tensor lies between two stretches of NaN, so that what is read or written beside it shows.

    Returns {"after": the arguments afterwards, "beside": numbers of those beside which it wrote}.
    """
    if not hasattr(answer, "arg_names"):
        raise TypeError("this is no kernel: @triton.jit is missing above it")
    given: list[Any] = []
    edges: dict[int, list[Tensor]] = {}
    for index, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            given.append(arg)
            continue
        ground = torch.full((2 * MARGIN + arg.numel(),), torch.nan, dtype=arg.dtype)
        given.append(ground[MARGIN:-MARGIN].view(arg.shape).copy_(arg))
        edges[index] = [ground[:MARGIN], ground[-MARGIN:]]
    answer[tuple(grid)](*given, **constants)
    clean = {index: all(bool(e.isnan().all()) for e in pair) for index, pair in edges.items()}
    return {"after": given, "beside": [index for index, is_clean in clean.items() if not is_clean]}


MARGIN = 1 << 16
"""Numbers on either side of a tensor that a kernel gets."""


class Shifted(nn.Module):
    """An adapter for any layer, whose parameters have no name that a learner could know."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer.requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(1))
        self.gain = nn.LayerNorm(1)  # which draws no numbers


# ---- Running a probe ----


def run(
    answer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """{"value": packed result, "after": packed arguments, "names": theirs}, or what went wrong:
    {"error": kind, "message": ..., "where": ...}.

    The kinds are "not started", "changed" (an argument), "state" (torch's), "time" and "raised".
    """
    function = PROBES[name]
    if name in GO_BACKWARD:  # which imports this the first time, for seconds: in nobody's time
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
    try:
        with time_limit(seconds), plain_torch():
            before = _torch_state()
            value = function(answer, *args, **kwargs)
            if changed := _changed(before, _torch_state(), but="torch's random state"):
                return {"error": "state", "message": changed[0], "where": ""}
            reply = {"value": pack(value)}
            if name in LEAVE_ARGUMENTS:
                reply["after"] = [pack(argument) for argument in args]
                reply["names"] = [argument_name(answer, index) for index in range(len(args))]
            return reply
    except KeyboardInterrupt:  # a person stopped it
        raise
    except BaseException as error:
        return describe(error)


GO_BACKWARD = {"gradients", "layer", "use", "step", "step_of_parameters", "cost"}
LEAVE_ARGUMENTS = {"call", "surroundings"}
"""Probes of an answer that may not change what it is given."""


def unchanged(name: str, args: tuple[Any, ...], reply: dict[str, Any]) -> dict[str, Any]:
    """The reply, or an error "changed" in its place where an argument came back different.

    This is looked at where the check is, with the arguments that were sent: what an answer did to
    its own copies cannot be told by the process that it runs in.
    """
    if name in LEAVE_ARGUMENTS and "error" not in reply:
        after = dict(enumerate(reply.get("after") or ()))
        for index, argument in enumerate(args):
            if json.dumps(pack(argument)) != json.dumps(after.get(index)):
                names = dict(enumerate(reply.get("names") or ()))
                message = str(names.get(index, f"argument {index + 1}"))
                return {"error": "changed", "message": message, "where": ""}
    return reply


def _default_device() -> torch.device:
    """torch.get_default_device(), which in torch 2.6 fails once the default was set back."""
    try:
        return torch.get_default_device()
    except AttributeError:
        return torch.device("cpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it is when a process begins, whatever a notebook set; as it was afterwards."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    elsewhere = _default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext(),
            torch.device("cpu") if elsewhere else nullcontext(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if not elsewhere and _default_device().type != "cpu":
            torch.set_default_device(None)


def describe(error: BaseException) -> dict[str, Any]:
    """The error as a reply, with the last line of the learner's own code that it passed."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__  # Triton's interpreter hides what was raised inside a kernel
    where = learners_line(error.__traceback__)
    message = " ".join(str(error).split())[:300]
    kind = "raised"
    if isinstance(error, TimeUp):
        kind = "time"
    elif isinstance(error, NotImplementedError) and "raise NotImpl" in where:
        kind = "not started"  # the stub; torch raises the same class, but from its own line
    else:
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return {"error": kind, "message": message, "where": where}


def learners_line(trace: TracebackType | None) -> str:
    """The deepest line outside of Python, its packages and minidora: "line 3: return x.nrom()"."""
    library = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]), "<frozen", "<string>")
    found = ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(library) and "site-packages" not in name:
            text = " ".join(linecache.getline(name, trace.tb_lineno).split())
            cell = f"{name[1:-1]}, " if name.startswith("<cell ") else ""
            found = f"{cell}line {trace.tb_lineno}" + (f": {text}" if text else "")
        trace = trace.tb_next
    return found


def argument_name(answer: Callable[..., Any], index: int) -> str:
    """The name that the learner gave to an argument."""
    try:
        return list(inspect.signature(answer).parameters)[index]
    except (IndexError, TypeError, ValueError):
        return f"argument {index + 1}"


class TimeUp(BaseException):
    """Raised inside code that runs too long. No Exception, so `except Exception` lets it pass."""


PATIENCE = 6
"""How many times its limit something may take on a machine that is busy with other things."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the code inside once its time is over, in any thread, also on Windows.

    Its time is what this process computes; what it only waits for, a busy machine included, counts
    once it has taken PATIENCE times as long.

    It arrives between two Python instructions, so a call that waits inside C (time.sleep) ends
    first; a process of its own is stopped from outside (minidora/classroom/grade.py).
    """
    thread = ctypes.c_ulong(threading.get_ident())
    over = threading.Event()

    def watch() -> None:
        computed, begun = time.process_time(), time.monotonic()
        pause = seconds / 4
        while not over.wait(pause):
            waited = time.monotonic() - begun
            if time.process_time() - computed < seconds and waited < PATIENCE * seconds:
                continue
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeUp))
            pause = 1.0  # and again, in case a bare `except:` inside a loop took it

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            over.set()
    finally:  # twice, because TimeUp may arrive in between
        over.set()
        watcher.join()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)


# ---- Plain data ----


@dataclass
class Other:
    """Stands for a value that is no plain data; kind is the name of its class."""

    kind: str


@dataclass
class Module:
    """What a check may know of an nn.Module.

    kinds: names of its class and of the classes it derives from.
    parameters: by full name (by each, if it has several), with requires_grad. tensors: buffers and
    plain tensors of the module itself. numbers: attributes that are numbers, those of the modules
    inside by full name, and its own properties.
    modules: class names by full name.
    training: whether each module, by full name, is in training mode.
    distinct: how many parameters there are, each counted once.
    """

    kinds: list[str]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    distinct: int = 0


def pack(value: Any) -> Any:
    """As JSON data: None, numbers, text, tensors, modules, and lists, tuples and dicts of them."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str):
        return value[:LONGEST].encode("utf-8", "replace").decode()
    if isinstance(value, Tensor):
        return _pack_tensor(value)
    if isinstance(value, Integral):  # NumPy's too
        short = abs(int(value)).bit_length() <= 1000
        return int(value) if short else {"other": "int of hundreds of digits"}
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[str(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, nn.Module):
        own = {**vars(value), **dict(value.named_buffers())}
        tensors = {k: v for k, v in own.items() if isinstance(v, Tensor)}
        computed = inspect.getmembers_static(type(value), lambda one: isinstance(one, property))
        own |= {name: getattr(value, name) for name, _ in computed}
        children = dict(value.named_modules(remove_duplicate=False))
        inside = [
            (f"{path}.{k}", v) for path, one in children.items() for k, v in vars(one).items()
        ]
        numbers = {k: v for k, v in [*inside, *own.items()] if isinstance(v, int | float)}
        return {
            "module": [kind.__name__ for kind in type(value).__mro__],
            "parameters": pack(dict(value.named_parameters(remove_duplicate=False))),
            "tensors": pack(tensors),
            "numbers": pack(numbers),
            "modules": {name: type(child).__name__ for name, child in children.items()},
            "training": {name: bool(child.training) for name, child in children.items()},
            "distinct": len(list(value.parameters())),
        }
    return {"other": type(value).__name__}


def unpack(data: Any) -> Any:
    """The inverse of pack. Anything else than data that pack made raises some Exception."""
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if "tensor" in data:
        return _unpack_tensor(data)
    if "dict" in data:
        return {str(key): unpack(item) for key, item in data["dict"]}
    if "list" in data:
        return [unpack(item) for item in data["list"]]
    if "tuple" in data:
        return tuple(unpack(item) for item in data["tuple"])
    if "module" in data:
        return Module(
            kinds=[str(kind) for kind in data["module"]],
            parameters=unpack(data["parameters"]),
            tensors=unpack(data["tensors"]),
            numbers=unpack(data["numbers"]),
            modules={str(name): str(kind) for name, kind in data["modules"].items()},
            training={str(name): bool(mode) for name, mode in data["training"].items()},
            distinct=int(data["distinct"]),
        )
    return Other(str(data["other"]))


def _pack_tensor(tensor: Tensor) -> dict[str, Any]:
    if tensor.layout != torch.strided or tensor.nbytes > LARGEST:
        return {"other": f"{tensor.layout} tensor of shape {tuple(tensor.shape)}"}
    content = b""
    if not tensor.is_meta:
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        flat = torch.empty(plain.numel(), dtype=plain.dtype)
        flat.copy_(plain.reshape(-1))  # contiguous() keeps the stride of a single number
        content = flat.view(torch.uint8).numpy().tobytes()
    return {
        "tensor": base64.b64encode(content).decode(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "device": tensor.device.type,
        "requires_grad": tensor.requires_grad,
        "parameter": isinstance(tensor, nn.Parameter),
    }


def _unpack_tensor(data: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, data["dtype"])
    if data["device"] == "meta":
        tensor = torch.empty(data["shape"], dtype=dtype, device="meta")
    else:
        content = bytearray(base64.b64decode(data["tensor"]))
        flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
        tensor = flat.view(dtype) if content else flat.to(dtype)
        tensor = tensor.reshape(data["shape"]).to(data["device"])
    if data["parameter"]:
        return nn.Parameter(tensor, requires_grad=bool(data["requires_grad"]))
    return tensor.requires_grad_(bool(data["requires_grad"]))
