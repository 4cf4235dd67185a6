"""Every command, misused in more than twenty ways: a sentence and an exit code, never a stack."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minidora import experiment, sweep
from minidora.classroom import authoring, draft, report, submissions
from minidora.classroom import folder as folders
from minidora.cli import app
from minidora.evidence import bench, ledger, pretrain
from minidora.runner.process import Lost

# What a command takes: paths that it reads or writes, numbers, and words with a meaning. A command
# line holds the slot "*" where the misuse goes.
PATHS = [
    "start *", "lab --folder *", "status --folder *", "check --folder *", "check --report * SUBS",
    "check --report REPORT *", "reset 3.1 --yes --folder *", "reset 3 --yes --folder *",
    "solution 3.1 --spoil --folder *", "demo --output *", "demo --output */figure.png",
    "bench layers --quick --output *", "evidence pretrain --output *", "evidence run --output *",
    "notebooks execute *", "notebooks check *", "notebooks length *",
    "bench page --folder *", "experiment --out *", "experiment report *", "notebooks length *",
]  # fmt: skip
NUMBERS = [
    "check --seconds * --folder WORK", "check --memory * --folder WORK", "demo --seeds *",
    "bench layers --quick --budget *", "evidence run --workers *",
    "experiment --ranks *", "experiment --seeds *", "experiment --lrs *", "experiment --length *",
    "experiment --b-rates *",
]  # fmt: skip
WORDS = [
    "check * --folder WORK", "hint *", "reset * --yes --folder WORK", "solution * --spoil",
    "claims --said-by *", "claims --verdict *", "* --help", "bench *", "evidence *", "notebooks *",
    "experiment --task *", "experiment --methods *", "experiment --device *",
    "experiment --targets *",
    "experiment --question *", "exercise new * row_max", "exercise new 3.9 *",
]  # fmt: skip
WHOLE = [
    "start", "lab", "status", "check", "hint 3.1", "reset 3.1 --yes", "solution 3.1 --spoil",
    "demo", "bench layers", "evidence pretrain", "evidence run", "claims", "claims --write",
    "build --check", "notebooks execute", "notebooks check",
]  # fmt: skip

BAD_PATHS: dict[str, Callable[[Path], str]] = {
    "an empty name": lambda here: "",
    "a zero byte": lambda here: "a\0b",
    "half of a surrogate pair": lambda here: str(here / "a\udcff\ud83d"),
    "too long a name": lambda here: str(here / ("a" * 300)),
    "a file": lambda here: touched(here / "file"),
    "a path through a file": lambda here: touched(here / "file") + "/below",
    "an empty folder": lambda here: made(here / "folder"),
    "missing parents": lambda here: str(here / "not" / "there" / "yet.csv"),
    "a link to itself": lambda here: linked(here / "link"),
    "a link to nowhere": lambda here: linked(here / "link", here / "gone" / "nowhere"),
    "where nobody may write": lambda here: "/proc/minidora",
    "the home of nobody": lambda here: "~nobody_of_this_name/x",
    "a full disk": lambda here: "/dev/full",
    "the course itself": lambda here: str(folders.ROOT),
    "the course's exercises": lambda here: str(folders.ROOT / "exercises"),
    "what looks like an option": lambda here: "--",
    "a folder of damaged notebooks": lambda here: damaged(here / "damaged"),
    "a folder where files should be": lambda here: misplaced(here / "misplaced"),
}
BAD_NUMBERS = ["", "many", "-1", "0", "nan", "inf", "-inf", "9" * 5000, "1e400", "1,5", "٣"]
BAD_WORDS = [
    "", " ", "0", "-1", "3.", ".1", "3.99", "9" * 5000, "٣.1", "\0", "\udcff", "../3", "[3]",
]  # fmt: skip


def touched(path: Path) -> str:
    path.write_bytes(b"\xff\xfe not a notebook")
    return str(path)


def made(path: Path) -> str:
    path.mkdir(exist_ok=True)
    return str(path)


def linked(path: Path, to: Path | None = None) -> str:
    path.unlink(missing_ok=True)
    path.symlink_to(to or path)
    return str(path)


def damaged(path: Path) -> str:
    """A working copy in which nothing is what it should be."""
    folders.start(path)
    contents = [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"cells": [{"source": 3}]}',
        b'{"cells": 3}',
        b"[" * 9999,
    ]
    for index, notebook in enumerate(sorted(path.rglob("*.ipynb"))):
        notebook.write_bytes(contents[index % len(contents)])
    (path / ".editions.json").write_bytes(b'{"notebooks/01_adam_memory.ipynb": 3}')
    return str(path)


def misplaced(path: Path) -> str:
    """Folders named like notebooks, and a file where the backups go."""
    folders.start(path)
    for notebook in list(path.rglob("*.ipynb"))[::2]:
        notebook.unlink()
        notebook.mkdir()
    (path / "backups").write_text("")
    return str(path)


class NoWorkers:
    """Where nothing was written, nothing need be run."""

    def start(self, *arguments: object, **options: object) -> None:
        raise Lost("no process is started in this test")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
    """An empty folder to stand in, in a machine on which no work is done."""

    def work_begins(*arguments: object, **options: object) -> None:
        raise SystemExit(0)

    for place, name in (
        (experiment, "compare"), (bench, "run"), (pretrain, "pretrain"), (pretrain, "collect"),
        (authoring, "execute"), (sweep, "run"), (sweep, "minutes"), (draft, "_with_check"),
        (ledger, "judged"), (os, "execve"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, work_begins)
    for place in (report, submissions):
        monkeypatch.setattr(place, "WorkerPool", lambda *sandboxed: nullcontext(NoWorkers()))
    monkeypatch.setattr(folders, "DEFAULT_FOLDER", tmp_path / "my-work")
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")  # which --device sets
    monkeypatch.chdir(tmp_path)
    folders.start(tmp_path / "work")
    (tmp_path / "subs").mkdir()
    yield tmp_path
    os.chdir(Path(__file__).parent)


def arguments(line: str, bad: str, here: Path) -> list[str]:
    places = {"WORK": str(here / "work"), "SUBS": str(here / "subs"), "REPORT": str(here / "r.csv")}
    return [places.get(part, part).replace("*", bad) for part in line.split()]


def no_stack(line: list[str]) -> None:
    result = CliRunner().invoke(app, line)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"minidora {line}") from result.exception
    assert result.exit_code in (0, 1, 2), line
    assert "Traceback" not in result.output
    if result.exit_code == 2:
        assert len(result.output.split()) > 4, f"minidora {line} says {result.output!r}"


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD_PATHS)
def test_paths(bad: str, here: Path) -> None:
    for line in PATHS:
        path = BAD_PATHS[bad](here)
        no_stack(arguments(line, path, here))
        for leftover in ("folder", "damaged", "misplaced"):
            shutil.rmtree(here / leftover, ignore_errors=True)


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_numbers(bad: str, here: Path) -> None:
    for line in NUMBERS:
        no_stack(arguments(line, bad, here))


@pytest.mark.parametrize("bad", BAD_WORDS)
def test_words(bad: str, here: Path) -> None:
    for line in WORDS:
        no_stack(arguments(line, bad, here))


@pytest.mark.parametrize(
    "added", ["--nonsense", "surplus arguments", "--output", "--folder", "-x", "--seeds=3=4"]
)
def test_what_no_command_knows(added: str, here: Path) -> None:
    for line in WHOLE:
        no_stack([*line.split(), *added.split()])


@pytest.mark.slow
@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:", "CPU", "cuda:-1", " "])
def test_devices(device: str, here: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINIDORA_DEVICE", device)
    for line in WHOLE:
        no_stack(line.split())


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be removed there")
def test_a_folder_that_is_gone(here: Path) -> None:
    for line in WHOLE:
        (here / "gone").mkdir()
        os.chdir(here / "gone")
        (here / "gone").rmdir()
        no_stack(line.split())


def test_a_course_without_its_notebooks(here: Path, monkeypatch: Any) -> None:
    """As it is installed from a wheel."""
    monkeypatch.setattr(folders, "ROOT", here / "site-packages")
    for line in WHOLE:
        no_stack(line.split())


def test_a_disk_that_fills_up(here: Path, monkeypatch: Any) -> None:
    """Every write fails; what was there is still there."""
    folders.start(here / "my-work")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for line in ("start other", "reset 3 --yes", "reset 3.1 --yes"):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 2, line
        assert "no space left on the disk" in result.output
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
