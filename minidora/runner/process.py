"""Start the processes in which learners' code runs, and watch them from outside.

The other end of worker.py. A process has a time and a memory limit that it cannot lift: it
is ended from here. (A limit on its address space would stop CUDA, which reserves far more than it
uses; so its resident memory is looked at, ten times a second.)
"""

import json
import os
import pickle
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Self

import psutil

from minidora.runner.worker import CAN_FORK, LENGTH

LARGEST_REPLY = 2**30
START_SECONDS = 300
"""How long a process may take to be ready: importing torch takes a minute on a busy machine."""


class Lost(Exception):
    """The process is gone, or was ended; the message says why."""


class Worker:
    """One process (minidora/runner/worker.py), watched from here for its time and its memory."""

    def __init__(self, connection: socket.socket, memory_gib: float) -> None:
        self.connection = connection
        self.process: psutil.Process | None = None  # until it has said hello
        self.memory = memory_gib * 2**30
        self.number = 0
        self.buffer = b""

    def says_hello(self, token: str) -> bool:
        """Whether the other end is the process that we started, and not somebody else."""
        try:
            hello = json.loads(self._message(time.monotonic() + 10))
            if secrets.compare_digest(str(hello["token"]), token):
                self.process = psutil.Process(int(hello["pid"]))
        except (Lost, OSError, ValueError, KeyError, TypeError, psutil.Error):
            pass
        return self.process is not None

    def ask(self, action: str, wait: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait so many seconds for the reply.

        Raises:
            Lost: no reply in time, too much memory, or the process ended.
        """
        self.number += 1
        data = pickle.dumps({"action": action, "number": self.number, **request})
        deadline = time.monotonic() + wait
        try:
            self.connection.settimeout(wait)
            self.connection.sendall(LENGTH.pack(len(data)) + data)
            reply = dict(json.loads(self._message(deadline)))
            if reply["number"] != self.number:
                raise Lost("your code wrote into the connection of the check")
            return reply
        except Lost:
            raise
        except OSError:
            raise Lost("your code ended the Python process") from None
        except Exception:  # whatever a forged message may cause
            raise Lost("your code wrote into the connection of the check") from None

    def _message(self, deadline: float) -> bytes:
        size = LENGTH.unpack(self._read(LENGTH.size, deadline))[0]
        if size > LARGEST_REPLY:
            raise Lost("your code sent too much data")
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self.buffer) < size:
            if time.monotonic() > deadline:
                raise Lost("stopped: its time was over, and it could not be interrupted")
            if not select.select([self.connection], [], [], 0.1)[0]:
                if sum(map(_memory, self._processes())) > self.memory:
                    raise Lost(f"stopped: it used more than {self.memory / 2**30:g} GiB of memory")
                continue
            part = self.connection.recv(2**20)
            if not part:
                raise Lost("your code ended the Python process")
            self.buffer += part
        message, self.buffer = self.buffer[:size], self.buffer[size:]
        return message

    def _processes(self) -> list[psutil.Process]:
        """The process and all that it started."""
        if self.process is None:
            return []
        with suppress(psutil.Error):
            return [*self.process.children(recursive=True), self.process]
        return [self.process]

    def close(self) -> None:
        """End the process and what it started."""
        self.connection.close()
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()
        if self.process is not None and hasattr(os, "killpg"):
            with suppress(OSError):  # what it started and let go of
                os.killpg(self.process.pid, signal.SIGKILL)


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


class WorkerPool:
    """Starts workers. On Linux each is a copy of one process that has imported torch already."""

    def __init__(self) -> None:
        self.parent: subprocess.Popen[str] | None = None
        self.parents: list[subprocess.Popen[str]] = []
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self._parent()  # so that it imports torch while we do something else
        return self

    def __exit__(self, *exception: object) -> None:
        for parent in self.parents:
            parent.kill()
            parent.wait()

    def start(self, memory_gib: float) -> Worker:
        """A new worker. Raises Lost where none can be started."""
        token = secrets.token_hex(16)
        with socket.create_server(("127.0.0.1", 0)) as server:
            parent = self._order(server.getsockname()[1], token)
            server.settimeout(1.0)
            for _ in range(START_SECONDS):
                if parent.poll() is not None and CAN_FORK:
                    break
                with suppress(TimeoutError):
                    worker = Worker(server.accept()[0], memory_gib)
                    if worker.says_hello(token):
                        return worker
                    worker.close()
        ended = parent.poll()
        parent.kill()
        why = f"was not ready after {START_SECONDS} s" if ended is None else f"ended with {ended}"
        raise Lost(
            f"not judged, for the process to run the notebook in {why}. That is not your code's "
            "fault: check again when the machine has time and memory to spare"
        )

    def _order(self, port: int, token: str) -> subprocess.Popen[str]:
        with self.lock:
            parent = self._parent()
            assert parent.stdin is not None
            with suppress(OSError):
                parent.stdin.write(f"{port} {token}\n")
                parent.stdin.flush()
            if not CAN_FORK:
                self.parent = None  # it serves this one
            return parent

    def _parent(self) -> subprocess.Popen[str]:
        if self.parent is None or self.parent.poll() is not None:
            self.parent = subprocess.Popen(
                [sys.executable, "-m", "minidora.runner.worker"],
                stdin=subprocess.PIPE,
                text=True,
                env={**os.environ, "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"},
            )
            self.parents.append(self.parent)
        return self.parent
