"""The wall itself: what a process behind it sees, and when it ends."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from sandboxed import needs_sandbox

from minidora import checks
from minidora.classroom import folder as folders
from minidora.classroom import submissions
from minidora.classroom.grade import Limits
from minidora.runner import probe, sandbox
from minidora.runner.process import Worker, WorkerPool

CLOSED = checks.LESSONS[3].closed


@pytest.fixture(scope="module")
def worker(tmp_path_factory: Any) -> Iterator[Worker]:
    own = tmp_path_factory.mktemp("student")
    (own / "data.txt").write_text("mine")
    with WorkerPool(sandboxed=True) as workers:
        inside = workers.start_in_sandbox(4.0, CLOSED, (), own)
        inside.ask("enter", 60.0, folder=sandbox.WORK, show=sandbox.SUBMISSION, hide=True)
        yield inside


def value(worker: Worker, source: str) -> Any:
    """What an expression is inside."""
    source = f"import os, sys, socket\nraise ValueError(repr({source}))"
    reply = worker.ask("cell", 60.0, index=1, source=source, seconds=30.0)
    return reply["message"].removeprefix("ValueError: ")


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("sorted(os.listdir('/student'))", "['submission', 'work']"),
        ("sorted(os.listdir('.'))", "['data.txt']"),
        ("open('data.txt').read()", "'mine'"),
        ("os.environ['TMPDIR']", "'/tmp'"),
        ("[name for name in os.listdir('/tmp') if 'pytest' in name]", "[]"),
        ("len([name for name in os.listdir('/proc') if name.isdigit()]) < 4", "True"),
        ("[name for _, name in socket.if_nameindex()]", "['lo']"),
        (
            "[line.split()[1] for line in open('/proc/self/status') if line[:6] == 'CapEff']",
            "['0000000000000000']",
        ),
        ("os.path.exists('/bin/sh') or os.path.exists('/usr/bin/env')", "False"),
        ("'SECRET' in os.environ", "False"),
    ],
)
def test_what_is_inside(worker: Worker, source: str, found: str) -> None:
    assert value(worker, source) == found


@needs_sandbox
@pytest.mark.parametrize(
    "place",
    [
        "/x",
        "/dev/x",
        "/student/x",
        "/student/submission/data.txt",
        "/usr/lib/x",
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/hostname",
        f"{sandbox.PACKAGE}/dora.py",
        f"{sandbox.PACKAGE}/__init__.py",
        os.__file__,
    ],
)
def test_nothing_outside_of_its_folder_can_be_written(worker: Worker, place: str) -> None:
    said = value(worker, f"open({place!r}, 'a')")
    assert re.search("Read-only file system|Permission denied|No such file", said), said


@needs_sandbox
def test_the_package_without_answers(worker: Worker) -> None:
    listed = value(worker, f"sorted(os.listdir({str(sandbox.PACKAGE)!r}))")
    assert listed == "['__init__.py', 'checks', 'memory.py', 'runner']"
    assert value(worker, f"os.listdir({str(sandbox.PACKAGE / 'checks')!r})") == "['__init__.py']"
    assert value(worker, "__import__('minidora').device().type") == "'cpu'"
    closed = [name for name in CLOSED if name != "peft"]  # of which an empty folder is left
    for name in (*closed, "peft.tuners", "minidora.checks.spec", "minidora.intervals"):
        assert "No module named" in value(worker, f"__import__({name!r}, fromlist=['x']).x")


@pytest.mark.parametrize("lesson", checks.LESSONS.values(), ids=lambda lesson: lesson.name)
def test_no_closed_file_is_shown(lesson: Any, tmp_path: Path) -> None:
    line = sandbox.command(lesson.closed, lesson.opened, tmp_path, None)
    for name in lesson.closed:
        path = sandbox.PACKAGE.joinpath(*name.split(".")[1:])
        assert f"{path}.py" not in line


def test_every_probe_that_a_check_names_is_one() -> None:
    text = "".join(
        path.read_text(encoding="utf-8") for path in (sandbox.PACKAGE / "checks").glob("*.py")
    )
    named = set(re.findall(r"probe\(\s*(?:probe\.)?(\w+),", text))
    named -= {"function", "self", "by", "look"}  # arguments
    assert len(named) > 5
    assert named <= set(probe.PROBES)


OUTLIVE = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        code = "import time; time.sleep(600)"
        os.execv(sys.executable, [sys.executable, "-c", code, MARK])
    os._exit(0)
time.sleep(1)
"""

JUDGE = """
import sys
from pathlib import Path
from minidora.runner.process import WorkerPool
mark, source, *closed = sys.argv[1:]
with WorkerPool(sandboxed=True) as workers:
    worker = workers.start_in_sandbox(4.0, closed, (), Path(mark))
    source = f"MARK = {mark!r}" + source
    print(worker.ask("cell", 60.0, index=1, seconds=30.0, source=source), flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@needs_sandbox
def test_no_process_outlives_its_judge(tmp_path: Path) -> None:
    """Not even what let go of everything, when the judge is killed without a chance to clean up."""
    line = [sys.executable, "-c", JUDGE, str(tmp_path), OUTLIVE, *CLOSED]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as judge:
        assert judge.stdout is not None
        assert judge.stdout.readline() == "{'number': 2}\n"
        assert marked(tmp_path)
        judge.kill()
    for _ in range(600):
        if not marked(tmp_path):
            break
        time.sleep(0.1)
    assert marked(tmp_path) == []


def marked(mark: Path) -> list[int]:
    """Processes whose last argument is the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process.pid] if process.cmdline()[-1:] == [str(mark)] else []
    return found


@needs_sandbox
@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="only root can become another")
def test_it_works_for_an_ordinary_user_too() -> None:
    line = [*sandbox._walls(), sys.executable, "-c", "print(2 + 2)"]
    done = subprocess.run(line, user=65534, group=65534, extra_groups=[], capture_output=True)
    if b"Permission denied" in done.stderr:
        pytest.skip("this Python lies where only root can read it")
    assert (done.stdout, done.returncode) == (b"4\n", 0), done.stderr


@pytest.mark.slow
@needs_sandbox
def test_every_solution_passes_behind_the_wall(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")
    shutil.copytree(folders.ROOT / "solutions", tmp_path / "in" / "ann")
    rows = submissions.grade(tmp_path / "in", tmp_path / "r.csv", Limits(), sandboxed=True)
    assert len(rows) == sum(len(lesson.exercises) for lesson in checks.LESSONS.values())
    assert [row for row in rows if row["state"] != "done"] == []


# ---- The container ----


@pytest.mark.slow
def test_install_lines_of_the_container(tmp_path: Path) -> None:
    """In an environment of its own, which takes the other packages from this one.

    The package is not editable there: its files lie among the other packages.
    """
    lines = (folders.ROOT / "docs" / "class.Dockerfile").read_text(encoding="utf-8").splitlines()
    runs = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    course, venv, said = tmp_path / "course", tmp_path / "venv", tmp_path / "apt"
    course.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "minidora_command.py"):
        shutil.copy(folders.ROOT / name, course)
    shutil.copytree(folders.ROOT / "minidora", course / "minidora")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(map(str, sandbox._packages())))
    for name, text in (("apt-get", f'echo "$@" >> {said}'), ("useradd", "exit 0")):
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (venv / "bin" / name).chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": ""}
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **offline, "PATH": path}
    for run in runs:
        done = subprocess.run(
            run, shell=True, cwd=course, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "install -y --no-install-recommends bubblewrap" in said.read_text()
    where = "import minidora, pathlib; print(pathlib.Path(minidora.__file__).parents[1])"
    line = [str(venv / "bin" / "python"), "-c", where]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == str(packages), done.stderr
    if sandbox.problem() and os.environ.get("CI") != "true":
        pytest.skip(sandbox.problem())
    (tmp_path / "in" / "ann").mkdir(parents=True)
    name = f"{checks.LESSONS[1].name}.ipynb"
    shutil.copy(folders.ROOT / "solutions" / name, tmp_path / "in" / "ann")
    command = [str(venv / "bin" / "minidora"), "check", "--require-sandbox"]
    line = [*command, "--report", "r.csv", "in"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == len(checks.LESSONS[1].exercises)
    assert all(",done," in row for row in rows), rows
