"""The process in which a learner's notebook runs, apart from the one that judges it.

It answers requests that come over a connection: run a cell, run a probe on what the cells defined.
process.py is the other end. A request is a pickle: it comes from us. A reply is JSON: it comes
from a process in which anybody's code has run, and a pickle could do anything there.

`python -m minidora.runner.worker` is how it starts in a sandbox, with the connection as its
standard input; elsewhere multiprocessing calls serve.
"""

import ast
import builtins
import importlib
import json
import os
import pickle
import signal
import sys
import tempfile
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from IPython.core.compilerop import CachingCompiler
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from minidora.runner import probe

LARGEST_REPLY = 64 * 2**20
"""Bytes of what a learner's code may hand back to a check."""

LEFT_OUT = {
    "!", "bash", "cmd", "conda", "config", "debug", "edit", "load_ext", "mamba", "matplotlib",
    "micromamba", "perl", "pip", "pypy", "python", "python2", "python3", "ruby", "script", "sh",
    "sx", "system", "uv",
}  # fmt: skip
"""Magics that do nothing: they start other programs, or change what only a person sees."""


def main() -> None:
    serve(Connection(os.dup(0)))


def serve(connection: Connection) -> None:
    """Answer requests until the other end closes the connection."""
    silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # so that it is ended together with what it starts
    # Kernels run in Triton's interpreter: a check sends them tensors of the CPU.
    os.environ.update(MPLBACKEND="Agg", TQDM_DISABLE="1", TRITON_INTERPRET="1")
    torch.set_num_threads(1)  # several notebooks run side by side
    with tempfile.TemporaryDirectory(prefix="minidora-ipython-") as settings:
        shell = Shell.start(settings)
        while True:
            try:
                number, action, data = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                reply = ACTIONS[action](shell, **pickle.loads(data))
            except BaseException as error:  # so that only the end of the process ends the talk
                reply = probe.describe(error)
            data = json.dumps({"number": number, **reply}).encode()
            if len(data) > LARGEST_REPLY:
                reply = {"error": "lost", "message": "your code hands back more than 64 MiB"}
                data = json.dumps({"number": number, **reply}).encode()
            connection.send_bytes(data)


# ---- What it does on request ----


def enter(shell: "Shell", folder: str, show: str, hide: bool) -> dict[str, Any]:
    """Work in this folder, with what is in `show` beside it.

    Args:
        hide: the notebook gets copies of its own of what this process runs on, should it import
            them: what it patches there has no effect here.
    """
    os.chdir(folder)
    sys.path.insert(0, folder)
    for name in os.listdir(show) if show else ():
        os.symlink(os.path.join(show, name), name)
    if hide:
        for name in [name for name in sys.modules if name.split(".")[0] == "minidora"]:
            del sys.modules[name]
    return {}


def run_cell(shell: "Shell", index: int, source: str, seconds: float) -> dict[str, Any]:
    """Run one cell as a notebook does. {} or the error, see probe.describe."""
    error = None
    if "optim" in source:  # the first optimizer imports this, for seconds: in nobody's time
        importlib.import_module("torch._dynamo")
    try:
        with probe.time_limit(seconds):
            error = shell.run(index, source)
    except BaseException as raised:
        error = raised
    if isinstance(error, SyntaxError) and error.filename == f"<cell {index}>":
        error = shell.syntax_error(source) or error
        text = " ".join((error.text or "").split())
        return {
            "error": "raised",
            "message": f"{type(error).__name__}: {error.msg}",
            "where": f"cell {index}, line {error.lineno}: {text}",
        }
    return {} if error is None else probe.describe(error)


def run_probe(
    shell: "Shell",
    answer: str,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The reply of a probe; {"error": "missing"} where no cell defined the answer."""
    if answer not in shell.user_ns:
        return {"error": "missing", "message": answer, "where": ""}
    with shell.builtin_trap:
        return probe.run(shell.user_ns[answer], name, args, kwargs, seconds)


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "ready": lambda shell: {},
    "enter": enter,
    "cell": run_cell,
    "probe": run_probe,
}


# ---- IPython ----


class Cells(CachingCompiler):
    """Names each cell by its number in the notebook, for the places of errors."""

    cell = 0

    def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
        return f"<cell {self.cell}>"


class Shell(InteractiveShell):
    """IPython as in a notebook, but nobody reads what it shows, and it starts no program."""

    error: BaseException | None = None

    @classmethod
    def start(cls, settings: str) -> "Shell":
        """The shell of this process; its namespace is __main__."""
        main_module = types.ModuleType("__main__")
        quiet = Config()
        quiet.HistoryManager.enabled = False
        shell = cls.instance(
            config=quiet,
            ipython_dir=settings,
            compiler_class=Cells,
            user_module=main_module,
            user_ns=vars(main_module),
        )
        assert isinstance(shell, Shell)
        return shell

    def run(self, index: int, source: str) -> BaseException | None:
        """Run a cell; returns the error that ended it."""
        self.error = None
        assert isinstance(self.compile, Cells)
        self.compile.cell = index
        result = self.run_cell(source, store_history=True)  # type: ignore[no-untyped-call]
        error: BaseException | None = result.error_before_exec or result.error_in_exec
        return error or self.error

    def syntax_error(self, source: str) -> SyntaxError | None:
        """What Python says of a cell, which is more than IPython's "incomplete input"."""
        try:
            ast.parse(self.transform_cell(source))  # type: ignore[no-untyped-call]
        except SyntaxError as error:
            return error
        return None

    def showtraceback(self, exc_tuple: Any = None, *args: Any, **kwargs: Any) -> None:
        self.error = sys.exc_info()[1] if exc_tuple is None else exc_tuple[1]

    def showsyntaxerror(self, *args: Any, **kwargs: Any) -> None:
        self.error = sys.exc_info()[1]

    def run_line_magic(self, magic_name: str, line: str, _stack_depth: int = 1) -> Any:
        if magic_name not in LEFT_OUT:
            try:
                return super().run_line_magic(magic_name, line, _stack_depth + 1)
            except UsageError:  # a magic of a frontend that is not here
                pass
        return None

    def run_cell_magic(self, magic_name: str, line: str, cell: str) -> Any:
        if magic_name not in LEFT_OUT:
            return super().run_cell_magic(magic_name, line, cell)  # type: ignore[no-untyped-call]
        return None

    def system(self, cmd: str) -> None:
        pass

    def getoutput(self, cmd: str, split: bool = True, depth: int = 0) -> Any:
        return [] if split else ""

    def enable_gui(self, gui: Any = None) -> None:
        pass


def silence() -> None:
    """Send what the learner's code prints nowhere, and let it read nothing."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    builtins.input = lambda *args: ""  # a question must not keep the class waiting
    sys.stdin, sys.stdout = open(os.devnull), open(os.devnull, "w")  # noqa: SIM115


if __name__ == "__main__":
    main()
