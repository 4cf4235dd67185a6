"""A Python with torch and nothing else, for tests of what an import brings or needs.

torch takes seconds to be imported. On Linux one process imports it, and every program runs in a
copy of that process (macOS has fork, but its libraries do not survive it).
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = r"""
import json, os, sys, traceback
import torch

assert "triton" not in sys.modules and "minidora" not in sys.modules

def run(code, environment, out, err):
    os.dup2(os.open(out, os.O_WRONLY), 1)
    os.dup2(os.open(err, os.O_WRONLY), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    status = 1
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if not child:
        run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for each process of pytest-xdist."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=Path(__file__).parents[1],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.wait)
    atexit.register(server.kill)
    return server


def run(code: str, environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """A program that has ended."""
    if sys.platform != "linux":
        line = [sys.executable, "-c", f"import torch\n{code}"]
        return subprocess.run(
            line, env=environment, capture_output=True, encoding="utf-8", check=False
        )
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        request = [code, dict(environment), str(out), str(err)]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            code, status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )


def python(code: str, environment: Mapping[str, str] = os.environ) -> str:
    """What a program prints, which must end without an error."""
    done = run(code, environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
