"""For every pytest run, of tests and of notebooks: no network, no progress bars, a time budget."""

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import no_network  # in tests/; from here on this process has no network
import pytest

os.environ["TQDM_DISABLE"] = "1"  # nbval compares what tqdm writes to stderr
os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask its hub
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

seconds: Counter[str] = Counter()


def pytest_addoption(parser):
    parser.addoption(
        "--notebook-budget",
        type=float,
        metavar="SECONDS",
        help="with nbval: fail if a notebook takes longer",
    )


def pytest_runtest_logreport(report):
    notebook = report.nodeid.split("::")[0]
    if notebook.endswith(".ipynb"):
        seconds[notebook] += report.duration


def over_budget(config):
    budget = config.getoption("--notebook-budget")
    return [name for name in seconds if budget is not None and seconds[name] > budget]


def pytest_sessionfinish(session):
    if over_budget(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for name in sorted(seconds):
        late = name in over_budget(config)
        text = f"{seconds[name]:6.1f} s  {name}"
        if late:
            text += f", over the budget of {config.getoption('--notebook-budget'):g} s"
        terminalreporter.write_line(text, red=late)
