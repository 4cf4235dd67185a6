"""The process in which a learner's notebook runs, apart from the one that judges it.

`python -m minidora.runner.worker` imports torch, then reads lines "PORT TOKEN". For each it
makes a copy of itself (fork; elsewhere than on Linux it serves the first line itself and ends).
The copy connects to that port on this machine and answers requests: run a cell, run a probe on
what the cells defined. minidora/classroom/grade.py is the other end.

A request is a pickle: it comes from us. A reply is JSON: it comes from a process in which anybody's
code has run, and a pickle could do anything there.
"""

import ast
import builtins
import gc
import importlib
import json
import linecache
import os
import pickle
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from IPython.core.inputtransformer2 import TransformerManager

from minidora.runner import probe

CAN_FORK = sys.platform == "linux"  # macOS has fork, but its libraries do not survive it
LENGTH = struct.Struct(">Q")  # stands before each message


def main() -> None:
    """Serve one copy of this process for each line of standard input."""
    importlib.import_module("torch._dynamo")  # what the first optimizer imports, once for all
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies that end leave nothing behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    while line := sys.stdin.readline():
        port, token = line.split()
        if CAN_FORK and os.fork():
            continue
        if hasattr(os, "setpgid"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)  # so that it is ended together with what it starts
        serve(socket.create_connection(("127.0.0.1", int(port))), token)
        os._exit(0)


def serve(connection: socket.socket, token: str) -> None:
    """Answer requests until the other end closes the connection."""
    silence()
    torch.set_num_threads(1)  # several notebooks run side by side
    send(connection, {"token": token, "pid": os.getpid()})
    main_module = types.ModuleType("__main__")
    sys.modules["__main__"] = main_module
    namespace = vars(main_module)
    shell = Magics(namespace)
    namespace.update(get_ipython=lambda: shell, display=lambda *objects, **options: None)
    while (request := receive(connection)) is not None:
        action, number = request.pop("action"), request.pop("number")
        try:
            reply = ACTIONS[action](namespace, **request)
        except BaseException as error:  # so that only the end of the process ends the talk
            reply = probe.describe(error)
        send(connection, {"number": number, **reply})


# ---- What it does on request ----


def enter(
    namespace: dict[str, Any], folder: str, closed: Sequence[str], shut: Sequence[str]
) -> dict[str, Any]:
    """Work in this folder; in a class, with the answers out of reach (see close_the_book)."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    if shut:
        close_the_book(closed, shut)
    return {}


def run_cell(namespace: dict[str, Any], index: int, source: str, seconds: float) -> dict[str, Any]:
    """Run one cell as a notebook would. {} or the error, see probe.describe."""
    file = f"<cell {index}>"
    try:
        code = TransformerManager().transform_cell(source)
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
        with probe.time_limit(seconds):
            exec(compile(code, file, "exec"), namespace)
    except SyntaxError as error:
        text = " ".join((error.text or "").split())
        return {
            "error": "raised",
            "message": f"{type(error).__name__}: {error.msg}",
            "where": f"cell {index}, line {error.lineno}: {text}",
        }
    except BaseException as error:
        return probe.describe(error)
    return {}


def run_probe(
    namespace: dict[str, Any],
    answer: str,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The reply of a probe; {"error": "missing"} where no cell defined the answer."""
    if answer not in namespace:
        return {"error": "missing", "message": answer, "where": ""}
    return probe.run(namespace[answer], name, args, kwargs, seconds)


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "enter": enter,
    "cell": run_cell,
    "probe": run_probe,
}


class Magics:
    """Stands for IPython's shell: %%time and %%capture run their cell, other magics do nothing."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace

    def run_cell_magic(self, name: str, line: str, body: str) -> None:
        if name in ("time", "capture", "timeit", "prun"):
            exec(compile(ast.parse(body), f"<%%{name}>", "exec"), self.namespace)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


# ---- A class: answers out of reach ----


def close_the_book(closed: Sequence[str], shut: Sequence[str]) -> None:
    """Take the modules that hold the answers out of this process, and shut their files.

    This stops copying, not an attack: there is no sandbox (docs/teaching.md). The verdict does not
    depend on it, for it is made in another process.

    Args:
        closed: modules to remove ("minidora.dora").
        shut: files and folders that Python code may not open from now on. It may write only to
            the working folder.
    """
    import minidora

    for name in [name for name in sys.modules if name.startswith("minidora.checks")]:
        del sys.modules[name]
    checks = types.ModuleType("minidora.checks")  # check cells do nothing here: we check
    checks.__getattr__ = lambda name: lambda *answers: None  # type: ignore[method-assign]
    sys.modules["minidora.checks"] = checks
    minidora.checks = checks  # type: ignore[attr-defined]
    for name in closed:
        if (module := sys.modules.get(name)) is not None:
            vars(module).clear()
        sys.modules[name] = None  # type: ignore[assignment]  # importing it now fails
    for name, value in list(vars(minidora).items()):
        if {getattr(value, "__module__", ""), getattr(value, "__name__", "")} & set(closed):
            delattr(minidora, name)
    gc.collect()
    folders = tuple(os.path.realpath(path) for path in shut)
    own = os.path.realpath(os.getcwd())
    starts = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.startfile")

    def inside(path: str, folder: str) -> bool:
        return path == folder or path.startswith(folder + os.sep)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if any(inside(path, folder) for folder in folders):
                raise PermissionError(f"{path} is closed while a class is graded")
            writes = args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and not inside(path, own) and not inside(path, "/dev"):
                raise PermissionError(f"{path}: only the working folder may be written to")
        elif event in starts:
            raise PermissionError("no other program may be started while a class is graded")

    sys.addaudithook(watch)


# ---- Messages ----


def silence() -> None:
    """Send what the learner's code prints nowhere, and let it read nothing."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    builtins.input = lambda *args: ""  # a question must not keep the class waiting
    sys.stdin, sys.stdout = open(os.devnull), open(os.devnull, "w")  # noqa: SIM115


def send(connection: socket.socket, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    connection.sendall(LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next request; None when the other end is gone."""
    head = _read(connection, LENGTH.size)
    if head is None:
        return None
    data = _read(connection, LENGTH.unpack(head)[0])
    return None if data is None else pickle.loads(data)


def _read(connection: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part = connection.recv(min(size - len(data), 2**20))
        if not part:
            return None
        data += part
    return data


if __name__ == "__main__":
    main()
