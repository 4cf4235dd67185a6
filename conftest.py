"""For every pytest run: no network, no progress bars, and the seconds of each notebook."""

import json
import os
import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import no_network  # in tests/; from here on this process has no network
import pytest

os.environ["TQDM_DISABLE"] = "1"  # nbval compares what tqdm writes to stderr
os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask its hub
if shutil.which("nvidia-smi"):
    with suppress(ImportError):  # before minidora.interpreter can choose the interpreter
        import triton  # noqa: F401
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # no GPU: kernels run in Triton's interpreter
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: threads of two workers wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

ipython_folder = pytest.StashKey[str]()


def pytest_configure(config):
    """Kernels run what lies in this folder first, so notebooks have no network either.

    It also keeps a personal IPython configuration out of the runs.
    """
    config.stash[ipython_folder] = os.environ["IPYTHONDIR"] = tempfile.mkdtemp()
    startup = Path(os.environ["IPYTHONDIR"], "profile_default", "startup")
    startup.mkdir(parents=True)
    shutil.copy(no_network.__file__, startup)


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[ipython_folder], ignore_errors=True)


# ---- How long each notebook takes, all its cells together and the start of its kernel ----
# It is reported and written down, and fails nothing: machines differ by a factor of five.

seconds: Counter[str] = Counter()


def pytest_runtest_logreport(report):
    notebook = report.nodeid.split("::")[0]
    if notebook.endswith(".ipynb"):
        seconds[notebook] += report.duration


def pytest_terminal_summary(terminalreporter, config):
    if seconds:
        path = Path(config.rootpath, "build", "notebook-seconds.json")
        path.parent.mkdir(exist_ok=True)
        rows = {name: round(seconds[name], 1) for name in sorted(seconds)}
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        for name, taken in rows.items():
            terminalreporter.write_line(f"{taken:6.1f} s  {name}")
        terminalreporter.write_line(f"written: {path.relative_to(config.rootpath)}")
