"""`make test-browser`: the course in JupyterLab and Chromium, as a learner opens it."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_server import ROOT, Server, running

from minidora_command import load

MISSING = [
    (("playwright", "axe_playwright_python"), load("doctor").install("-e '.[browser]'")),
    (("chromium",), "apt install chromium"),
]


def pytest_sessionstart() -> None:
    commands = [
        command
        for names, command in MISSING
        if not all(shutil.which(name) or importlib.util.find_spec(name) for name in names)
    ]
    if commands:
        how = " && ".join(commands)
        pytest.exit(f"the tests in a browser need more than the course does: {how}", returncode=1)


@pytest.fixture(scope="session")
def work(tmp_path_factory: Any) -> Path:
    """A learner's copy of the course."""
    from minidora.classroom import folder as folders

    folder: Path = tmp_path_factory.mktemp("learner") / "my-work"
    folders.start(folder)
    return folder


@pytest.fixture(scope="session")
def server(work: Path) -> Iterator[Server]:
    """JupyterLab on that copy, with settings of its own."""
    settings = work.parent / "settings"
    notification = settings / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    notification.parent.mkdir(parents=True)
    notification.write_text('{"fetchNews": "false"}')  # else it asks, in a box over the notebook
    command = f"{sys.executable} -m minidora lab --folder '{work}' --no-browser"
    with running(
        f"{command} --LabApp.expose_app_in_browser=True",
        settings,
        JUPYTERLAB_SETTINGS_DIR=str(settings),
        JUPYTERLAB_WORKSPACES_DIR=str(settings),
        OMP_NUM_THREADS="1",
        IPYTHONDIR=os.environ["IPYTHONDIR"],  # its kernels have no network
    ) as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Where screenshots are kept; git ignores it."""
    folder = ROOT / "build/browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
