"""Start the processes in which learners' code runs, and watch them from outside.

The other end of worker.py. A process has a time and a memory limit that it cannot lift: it
is ended from here. (A limit on its address space would stop CUDA, which reserves far more than it
uses; so its resident memory is looked at, five times a second.)
"""

import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import psutil

from minidora.runner import sandbox
from minidora.runner.worker import LARGEST_REPLY, serve

MOST_ITEMS = 2**20
"""Values in a reply: a short text can hold lists that fill gigabytes of memory."""

MOST_PROCESSES = 100
START_SECONDS = 300
"""How long a process may take to be ready: importing torch takes a minute on a busy machine."""


class Lost(Exception):
    """The process is gone, or was ended; the message says why."""


class NotReady(Lost):
    """No process could be started: no fault of the learner's."""


class Worker:
    """One process (worker.py), watched from here for its time and its memory."""

    def __init__(
        self,
        connection: Connection,
        process: BaseProcess | subprocess.Popen[bytes],
        memory_gib: float,
    ) -> None:
        self.connection = connection
        self.process = process
        self.root: psutil.Process | None = None  # it knows when its number goes to another
        with suppress(psutil.Error):
            self.root = psutil.Process(process.pid)
        self.memory = memory_gib * 2**30
        self.number = 0
        self.deadline = math.inf
        self.ended = ""  # why it was ended from here
        self.closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, action: str, wait: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait so many seconds for the reply.

        Raises:
            Lost: no reply in time, too much memory, or the process ended.
        """
        self.number += 1
        data = pickle.dumps((self.number, action, pickle.dumps(request)))
        self.deadline = time.monotonic() + wait
        try:
            self.connection.send_bytes(data)
            text = self.connection.recv_bytes(LARGEST_REPLY)
            if sum(map(text.count, (b",", b"[", b"{"))) > MOST_ITEMS:
                raise Lost("your code sent too much data")
            reply = dict(json.loads(text))
            if reply["number"] != self.number:
                raise Lost("your code wrote into the connection of the check")
            return reply
        except Lost:
            raise
        except (EOFError, ConnectionError):
            raise Lost(self.ended or "your code ended the Python process") from None
        except Exception:  # whatever a forged message may cause
            forged = "your code wrote into the connection of the check"
            raise Lost(self.ended or forged) from None
        finally:
            self.deadline = math.inf

    def _watch(self) -> None:
        while True:  # the first look is at once, before the process is asked anything
            processes = self._processes()
            if time.monotonic() > self.deadline:
                self.ended = "stopped: its time was over, and it could not be interrupted"
            elif sum(map(_memory, processes)) > self.memory:
                self.ended = f"stopped: it used more than {self.memory / 2**30:g} GiB of memory"
            elif len(processes) > MOST_PROCESSES:
                self.ended = f"stopped: it started more than {MOST_PROCESSES} processes"
            if self.ended:
                self._kill()
                return
            if self.closed.wait(0.2):
                return

    def _processes(self) -> list[psutil.Process]:
        """The process and all that it started."""
        if self.root is None:
            return []
        with suppress(psutil.Error):
            return [*self.root.children(recursive=True), self.root]
        return [self.root]

    def _kill(self) -> None:
        """End the process and what it started; in a sandbox the kernel ends all of it at once."""
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()
        if hasattr(os, "killpg") and isinstance(self.process, BaseProcess) and self.process.pid:
            with suppress(OSError):  # what it started and let go of
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, if it has not ended."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._kill()
        self.connection.close()
        if isinstance(self.process, BaseProcess):
            self.process.join()
        else:
            self.process.wait()


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


class WorkerPool:
    """Starts workers.

    On Linux each is a copy of one process that has imported torch already (macOS has fork, but its
    libraries do not survive it); in a sandbox each is a new process.

    Args:
        sandboxed: whether a class's notebooks run in a sandbox.
    """

    def __init__(self, sandboxed: bool = False) -> None:
        self.sandboxed = sandboxed
        if sys.platform == "linux":
            self.context = multiprocessing.get_context("forkserver")
        else:
            self.context = multiprocessing.get_context("spawn")
        self.workers: list[Worker] = []
        self.over = False
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self.files = tempfile.TemporaryDirectory(prefix="minidora-")
        if sys.platform == "linux" and not self.sandboxed:
            # It imports torch while we do something else.
            # The compiler brings Triton along, which must come in its interpreter.
            modules = ["minidora.interpreter", "minidora.runner.worker", "torch._dynamo"]
            self.context.set_forkserver_preload(modules)
            forkserver.ensure_running()
        return self

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.over = True
        for worker in self.workers:
            worker.close()
        self.files.cleanup()

    def start(self, memory_gib: float) -> Worker:
        """A new worker. Raises NotReady where none can be started."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs,))
        with self.lock:
            process.start()
        return self._ready(ours, theirs, process, memory_gib)

    def start_in_sandbox(
        self, memory_gib: float, closed: Iterable[str], opened: Iterable[str], submission: Path
    ) -> Worker:
        """As start, behind the wall of sandbox.py."""
        with self.lock:
            line = sandbox.command(closed, opened, Path(self.files.name), submission)
        ours, theirs = self.context.Pipe()
        # A session of its own: Ctrl-C is for us, and no verdict about the learner.
        process = subprocess.Popen(
            line,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._ready(ours, theirs, process, memory_gib)

    def _ready(
        self,
        ours: Connection,
        theirs: Connection,
        process: BaseProcess | subprocess.Popen[bytes],
        memory_gib: float,
    ) -> Worker:
        theirs.close()
        worker = Worker(ours, process, memory_gib)
        with self.lock:
            self.workers.append(worker)
        if self.over:  # whoever is still at work when a person stops us
            worker.close()
        try:
            worker.ask("ready", START_SECONDS)
        except Lost:
            worker.close()
            raise NotReady(
                "not judged, because there was no process to run the notebook in "
                f"({worker.ended or 'it ended at once'}). That is not your code's fault: "
                "check again when the machine has time and memory to spare"
            ) from None
        return worker
