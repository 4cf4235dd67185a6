"""Starts JupyterLab as the course's commands do, and stops it: for several tests."""

import json
import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("TQDM_DISABLE", "TRITON_INTERPRET", "HF_HUB_OFFLINE")  # conftest.py sets these
LEARNERS = {
    key: value
    for key, value in os.environ.items()
    if key not in OURS and not key.startswith("MAKE")
}

PATIENCE = int(os.environ.get("PATIENCE", "1800"))
"""Seconds until something is taken to hang."""


@dataclass(frozen=True)
class Server:
    """A JupyterLab that runs."""

    address: str  # 127.0.0.1:8888
    token: str

    @property
    def key(self) -> str:
        return f"token {self.token}"

    def ask(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(
            f"http://{self.address}/{path}", headers={"Authorization": self.key}, method=method
        )
        return urllib.request.urlopen(request, timeout=PATIENCE).read()


@contextmanager
def running(command: str, folder: Path, **variables: str) -> Iterator[Server]:
    """The server that a command of the course starts; its settings and its log are in a folder."""
    (folder / "jupyter_server_config.json").write_text(
        json.dumps({"ServerApp": {"open_browser": False}})
    )
    mine = {
        "JUPYTER_RUNTIME_DIR": str(folder),
        "JUPYTER_CONFIG_DIR": str(folder),
        "PATH": "/usr/local/bin:/usr/bin:/bin",  # without .venv/bin
    }
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            shlex.split(command),
            cwd=ROOT,
            env=LEARNERS | mine | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE

        def still_starting() -> None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

        while True:
            try:
                told = json.loads(next(folder.glob("jpserver-*.json")).read_text())
                break
            except (StopIteration, json.JSONDecodeError):  # not there yet, or half written
                still_starting()
        server = Server(f"127.0.0.1:{told['port']}", told["token"])
        while True:  # the file is written a little before the port answers
            try:
                server.ask("api")
                break
            except urllib.error.URLError:
                still_starting()
        yield server
        server.ask("api/shutdown", "POST")
        process.wait(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
