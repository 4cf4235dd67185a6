"""Every test draws the same numbers in each run, on each machine and in any order."""

import gc
import os
import random
import signal
import zlib
from collections import defaultdict
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: what the tests start would not hear Ctrl-C either.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_draws(request: pytest.FixtureRequest) -> None:
    """MINIDORA_TEST_SEED=1 tries other draws: a check must not owe its verdict to one of them."""
    import torch  # here, for neither pytest-xdist's first process nor tests/browser needs it

    from minidora.checks.expect import repeat_draws

    name = zlib.crc32(request.node.nodeid.encode())
    seed = (name + int(os.environ.get("MINIDORA_TEST_SEED", 0))) % 2**32
    repeat_draws(seed)
    torch.manual_seed(seed)
    random.seed(seed)


slow_ones = pytest.StashKey[dict[Path, list[bool]]]()


@pytest.hookimpl(tryfirst=True)  # before -m leaves any out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = config.stash[slow_ones] = defaultdict(list)
    for item in items:
        found[item.path].append(item.get_closest_marker("slow") is not None)


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage, of which tests ask for many, visits it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries of C++ complain at the end of what was not freed


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> dict[Path, list[bool]]:
    """Whether each test is marked slow, by file, of all that pytest found."""
    return pytestconfig.stash[slow_ones]
