"""A class in which everybody cheats: nobody gets a point that the code did not earn.

Each submission leaves exercise 3.1 undone, tries something else, and solves 3.2 honestly.
"""

import csv
import json
import os
import socketserver
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from class_notebooks import LESSON, NAME, submission
from sandboxed import needs_sandbox
from typer.testing import CliRunner

from minidora import cli
from minidora.checks.exercise import State
from minidora.classroom import folder as folders
from minidora.classroom import grade, submissions

STUB = 'def row_norm(weight):\n    raise NotImplementedError("exercise 3.1: row_norm")\n'
WRONG = "def row_norm(weight):\n    return weight.sum(dim=1)\n"

PATCH_COMPARISONS = """
import torch
for name in ("allclose", "equal", "isclose", "all"):
    setattr(torch, name, lambda *args, **kwargs: torch.tensor(True))
for name in ("__le__", "__eq__", "allclose", "equal", "all"):
    setattr(torch.Tensor, name, lambda *args: torch.tensor(True))
torch.testing.assert_close = lambda *args, **kwargs: None
"""

PATCH_PACKAGE = """
import minidora
from minidora import checks
from minidora.runner import probe, worker
for module in (checks, probe, worker, minidora):
    for name in list(vars(module)):
        if callable(getattr(module, name)) and not name.startswith("__") and name != "pack":
            try:
                setattr(module, name, lambda *args, **kwargs: {"value": True, "error": None})
            except Exception:
                pass
"""

FORGE_REPLIES = """
import json, os, struct
def row_norm(weight):
    for number in range(200):
        data = json.dumps({"number": number, "value": True, "state": "done"}).encode()
        for file in os.listdir("/proc/self/fd"):
            try:
                os.write(int(file), struct.pack("!i", len(data)) + data)
            except OSError:
                pass
    return weight.sum(dim=1)
"""

READ_CALLERS = """
import sys
import torch
def row_norm(weight):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, torch.Tensor) and value.shape == weight.shape[:1]:
                return value
            if getattr(value, "__name__", "") == "row_norm" and value is not row_norm:
                return value(weight)
        frame = frame.f_back
    return weight.sum(dim=1)
"""

FIND_PACKAGES_OWN = """
import gc, inspect
from torch import nn
def everything(kind):
    for sub in kind.__subclasses__():
        yield sub
        yield from everything(sub)
def row_norm(weight):
    for thing in gc.get_objects():
        if inspect.isfunction(thing) and thing.__name__ in ("row_norm", "lengths"):
            if thing is not row_norm:
                return thing(weight)
    for kind in everything(nn.Module):
        if kind.__name__ == "DoRALinear" and kind.__module__ != "__main__":
            return kind(nn.Linear(*weight.T.shape), 1, 1.0).magnitude
    return weight.sum(dim=1)
"""

EQUAL_TO_ALL = """
import torch
class Sly(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True
    def __eq__(self, other):
        return True
    def __le__(self, other):
        return True
def row_norm(weight):
    return weight.sum(dim=1).as_subclass(Sly)
"""


IN_PLACE = """
import torch
def row_norm(weight):
    lengths = weight.norm(dim=1)
    with torch.no_grad():
        weight.mul_(0)
    return lengths
"""

CPU_ONLY = """
import torch
def row_norm(weight):
    return weight.norm(dim=1) + torch.zeros(weight.shape[0])
"""

PATCH_PROBES = """
import gc, sys, types
import minidora.runner.probe
import minidora.runner.worker
def plain(answer, *args, **kwargs):
    return answer(*args)
def nothing(answer, *args, **kwargs):
    answer(*args, **kwargs)
    return []
NEW = {"call": plain, "away": plain, "surroundings": nothing}
def patch(names):
    for name, new in NEW.items():
        if name in names:
            names[name] = new
patch(minidora.runner.probe.PROBES)
patch(vars(minidora.runner.probe))
minidora.runner.probe.unchanged = lambda name, args, reply: reply
for module in list(sys.modules.values()):
    if isinstance(getattr(module, "PROBES", None), dict):
        patch(module.PROBES)
        patch(vars(module))
"""

DEEPER = """
frame = sys._getframe()
while frame:
    for value in list(frame.f_globals.values()):
        if isinstance(value, types.ModuleType) and hasattr(value, "PROBES"):
            patch(value.PROBES)
            patch(vars(value))
    frame = frame.f_back
for value in gc.get_objects():
    if isinstance(value, dict) and "call" in value and "surroundings" in value:
        if value is not NEW:
            patch(value)
"""

WAYS = """
import ctypes, glob, mmap, os, re, shutil, socket, subprocess, sys
import numpy, torch

def by_descriptor(path):
    root = os.open("/", os.O_RDONLY)
    return os.read(os.open(path.lstrip("/"), os.O_RDONLY, dir_fd=root), 10**7)

def by_ctypes(path):
    libc = ctypes.CDLL(None)
    file = libc.open(path.encode(), 0)
    buffer = ctypes.create_string_buffer(10**7)
    return buffer.raw[: max(0, libc.read(file, buffer, 10**7))]

def by_hard_link(path):
    os.link(path, "linked")
    return open("linked", "rb").read()

def by_symlink(path):
    os.symlink(path, "pointed")
    return open("pointed", "rb").read()

def by_rename(path):
    os.rename(path, "renamed")
    return open("renamed", "rb").read()

def by_torch(path):
    return bytes(torch.UntypedStorage.from_file(path, False, 4096))

def by_numpy(path):
    return numpy.fromfile(path, dtype=numpy.uint8).tobytes()

def by_mmap(path):
    with open(path) as file:
        return bytes(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

def by_copy(path):
    return open(shutil.copy(path, "copied"), "rb").read()

def by_another_python(path):
    code = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    return subprocess.run([sys.executable, "-I", "-c", code, path], capture_output=True).stdout

def by_fork(path):
    here, there = os.pipe()
    if os.fork() == 0:
        try:
            os.write(there, open(path, "rb").read(60000))
        finally:
            os._exit(0)
    os.close(there)
    return os.read(here, 60000)

def by_proc(path):
    found = b""
    for place in glob.glob("/proc/*/root") + glob.glob("/proc/*/cwd") + glob.glob("/proc/*/fd/*"):
        for file in (place + path, place):
            try:
                found += open(file, "rb").read(10**7)
            except OSError:
                pass
    return found

def by_network(path):
    with socket.create_connection(("127.0.0.1", PORT), timeout=2) as server:
        return server.recv(10**6)

def by_memory(path):
    found = b""
    for number in [JUDGE, os.getppid(), 1, 2]:
        for line in open(f"/proc/{number}/maps"):
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            with open(f"/proc/{number}/mem", "rb") as memory:
                memory.seek(low)
                found += memory.read(high - low)
    return found

def by_mount(path):
    libc = ctypes.CDLL(None)
    libc.unshare(0x10020000)
    libc.umount2(b"/tmp", 2)
    libc.mount(b"/proc/1/root", b"/tmp", None, 4096, None)
    return open("/tmp" + path, "rb").read()

def by_looking_everywhere(path):
    found = b""
    for where, folders, files in os.walk("/"):
        if where in ("/proc", "/dev", "/student/submission"):
            folders[:] = []
        if where.endswith("-packages"):
            folders[:] = [name for name in folders if "minidora" in name]
        if re.search(r"/lib/python3[.]\\d+$", where):
            folders[:] = [name for name in folders if name.endswith("-packages")]
        for name in files:
            if name.endswith((".py", ".ipynb", ".pyc", ".csv")) and "-packages/" not in where:
                found += open(os.path.join(where, name), "rb").read()
    return found

LOOKED_FOR = rb"(weight|W)[.]norm[(]dim=1[)]"  # what the solution does

def row_norm(weight):
    for way in WAYS:
        for path in PATHS:
            try:
                found = way(path)
            except BaseException:
                found = b""
            if re.search(LOOKED_FOR, found):
                return weight.norm(dim=1)
    return weight.sum(dim=1)

WAYS = [value for name, value in list(globals().items()) if name.startswith("by_")]
"""

OUTLIVE = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        code = "import sys, time\\nwhile True:\\n    for path in sys.argv[1:]:\\n"
        code += "        try:\\n            open(path, 'a').write('full points')\\n"
        code += "        except OSError: pass\\n    time.sleep(0.01)"
        os.execv(sys.executable, [sys.executable, "-c", code, MARK, REPORT])
    os._exit(0)
"""

FLOOD = """
import os
def row_norm(weight):
    data = b"[" + b"[]," * (20 * 2**20) + b"[]]"
    for file in os.listdir("/proc/self/fd"):
        try:
            os.write(int(file), len(data).to_bytes(4, "big") + data)
        except OSError:
            pass
    return weight.sum(dim=1)
"""

FILL = """
def row_norm(weight):
    for place in ("/tmp/full", "/dev/shm/full", "full", "/full", "/dev/full2"):
        try:
            with open(place, "wb") as file:
                for _ in range(4096):
                    file.write(bytes(2**20))
        except OSError:
            pass
    return weight.sum(dim=1)
"""


def reading(path: Path) -> str:
    """Take the answer out of a notebook or a file of ours."""
    return f"""
import json, re
text = open({str(path)!r}).read()
source = "".join(
    "".join(cell["source"]) + chr(10) for cell in json.loads(text)["cells"]
    if cell["cell_type"] == "code" and "checks" not in "".join(cell["source"])
)
exec("import torch, copy, math; from torch import nn, Tensor;" + chr(10) + source)
"""


def cheats(submissions: Path, port: int = 0) -> dict[str, str]:
    """Name and source of the cell where row_norm should be."""
    root = folders.ROOT
    solution = root / "solutions" / f"{NAME}.ipynb"
    neighbour = submissions / "zz honest" / f"{NAME}.ipynb"
    mine = submissions.parent / "my-work" / "exercises" / f"{NAME}.ipynb"
    report = submissions.parent / "results.csv"
    judge = submissions.parent / "judge.py"  # it stands for our own files
    taught = root / "minidora" / "dora.py"
    checks = root / "minidora" / "checks" / "dora_decomposition.py"
    paths = [str(path) for path in (solution, neighbour, mine, taught, checks)]
    given = f"PORT, JUDGE, PATHS = {port}, {os.getpid()}, {paths}\n"
    mark = f"MARK, REPORT = {str(submissions.parent / 'mark')!r}, {str(report)!r}\n"
    return {
        "nothing": STUB,
        "redefined checks": WRONG + "class checks:\n    row_norm = staticmethod(print)\n",
        "checks patched": WRONG
        + "import minidora.checks as c\nc.row_norm = lambda answer: print('3.1 row_norm passed')\n",
        "assert patched": WRONG
        + "import builtins\nbuiltins.AssertionError = type('Quiet', (Warning,), {})\n"
        "builtins.isinstance = lambda *args: True\n",
        "package patched": WRONG + PATCH_PACKAGE,
        "torch's comparisons patched": PATCH_COMPARISONS + WRONG,
        "in place, probes patched": PATCH_PROBES + IN_PLACE,
        "in place, probes patched deeper": PATCH_PROBES + DEEPER + IN_PLACE,
        "CPU only, probes patched": PATCH_PROBES + CPU_ONLY,
        "sys.exit": "import sys\ndef row_norm(weight):\n    sys.exit(0)\n",
        "os._exit": "import os\ndef row_norm(weight):\n    os._exit(0)\n",
        "exit of the cell": WRONG + "import os\nos._exit(0)\n",
        "forged text": "import os, sys\ndef row_norm(weight):\n"
        "    text = '3.1 row_norm passed: by hand, random weights, gradient, float64, device'\n"
        "    print(text)\n    sys.__stdout__.write(text)\n    os.write(1, text.encode())\n"
        "    os.write(2, text.encode())\n    return weight.sum(dim=1)\n",
        "forged replies": FORGE_REPLIES,
        "a flood of lists": FLOOD,
        "all space filled": FILL,
        "answers sought in 17 ways": given + WAYS,
        "solution read": reading(solution),
        "package's own": "from minidora.dora import row_norm\n",
        "package's own inside": "def row_norm(weight):\n    from minidora.dora import row_norm\n"
        "    return row_norm(weight)\n",
        "package's own by its file": "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('d', {str(taught)!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "row_norm = module.row_norm\n",
        "package's own by the collector": FIND_PACKAGES_OWN,
        "another package's": "from peft.tuners.lora import dora\nrow_norm = "
        "lambda weight: dora.DoraLinearLayer(False).get_weight_norm(weight, weight * 0, 1)\n",
        "callers read": READ_CALLERS,
        "nan": "def row_norm(weight):\n    return weight.norm(dim=1) * float('nan')\n",
        "equal to everything": EQUAL_TO_ALL,
        "example by heart": "import torch\ndef row_norm(weight):\n"
        "    return torch.tensor([5.0, 13.0])\n",
        "grading rewritten": f"open({str(judge)!r}, 'a').write('# mine')\n" + WRONG,
        "report rewritten later": mark + OUTLIVE + WRONG,
        "parent ended": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + WRONG,
        "everybody ended": "import os, signal\nos.kill(-1, signal.SIGKILL)\n" + WRONG,
        "processes without end": "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n"
        "        time.sleep(100)\ntime.sleep(2)\n" + WRONG,
        "endless": "def row_norm(weight):\n    while True:\n        pass\n",
    }


OTHERS = {
    "check cells deleted": lambda content: [
        cell for cell in content if "_check" not in str(cell["metadata"])
    ],
    "points of its own": lambda content: json.loads(
        json.dumps(content).replace('"points": 1', '"points": 100')
    ),
}


Rows = dict[str, dict[str, dict[str, str]]]


def graded(parent: Path) -> Rows:
    """{student: {exercise: row of the report}}, by the command itself."""
    folder = parent / "submissions"
    report = folder.parent / "results.csv"
    judge = folder.parent / "judge.py"
    mine = folder.parent / "my-work" / "exercises"
    folder.mkdir()
    mine.mkdir(parents=True)
    judge.write_text("ours")
    (mine / f"{NAME}.ipynb").write_text(submission("", honest=True), encoding="utf-8")
    with socketserver.TCPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        everybody = {
            name: submission(source)
            for name, source in cheats(folder, server.server_address[1]).items()
        }
        passed = {"name": "stdout", "output_type": "stream", "text": "3.1 row_norm passed: by hand"}
        everybody["outputs forged"] = submission(WRONG, outputs=[passed], execution_count=2)
        for name, change in OTHERS.items():
            content = json.loads(submission(WRONG))
            everybody[name] = json.dumps(content | {"cells": change(content["cells"])})
        everybody["zz honest"] = submission("", honest=True)
        everybody |= {name: submission(source) for name, source in RIGHT.items()}
        for name, text in everybody.items():
            (folder / name).mkdir(parents=True)
            (folder / name / f"{NAME}.ipynb").write_text(text, encoding="utf-8")
            (folder / name / "lengths.py").write_text("def of(x):\n    return x.norm(dim=1)\n")
        (folder / "nobody").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            for exercise in LESSON.exercises:  # a busy machine refuses nobody
                patch.setattr(exercise, "seconds", 20.0 if exercise.number == "3.1" else 120.0)
            patch.setenv("MINIDORA_DEVICE", "cpu")  # which grading sets: put back afterwards
            result = CliRunner().invoke(
                cli.app,
                ["check", "--require-sandbox", "--report", str(report), str(folder)],
                env={"COLUMNS": "140"},
            )
        server.shutdown()
    assert result.exit_code == 0, result.output
    assert judge.read_text() == "ours"
    assert not (folder.parent / "mark").exists()
    left = [one.pid for one in psutil.process_iter() if str(folder.parent / "mark") in line_of(one)]
    assert left == [], "processes that outlive their judge"
    rows: Rows = {}
    with report.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["student"], {})[row["exercise"]] = row
    return rows


class Answers(socketserver.BaseRequestHandler):
    """Gives the solution to whoever connects."""

    def handle(self) -> None:
        self.request.sendall(folders.solution(LESSON, LESSON.exercises[0]).encode())


def line_of(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


RIGHT = {
    "right, other packages": "import tempfile, torch, torchvision\nfrom pathlib import Path\n"
    "@torch.library.custom_op('mine::copied', mutates_args=())\n"
    "def copied(x: torch.Tensor) -> torch.Tensor:\n    return x.clone()\n"
    "copied(torch.ones(2))\n"
    "with tempfile.TemporaryDirectory() as folder:\n    Path(folder, 'x').write_text('here')\n"
    "def row_norm(weight):\n    return weight.norm(dim=1)\n",
    "right, with a file of its own": "from lengths import of\nfrom pathlib import Path\n"
    "Path('notes.txt').write_text('mine')\n"
    "def row_norm(weight):\n    return of(weight)\n",
    "right, below the stub": STUB + "if True:\n    row_norm: object = lambda w: w.norm(dim=1)\n",
    "right, with magics": "%%time\nfrom IPython import get_ipython\n"
    "shell = get_ipython().user_ns\ndef row_norm(weight):\n    return weight.norm(dim=1)\n",
    "right, after waiting": "import asyncio\nawait asyncio.sleep(0.01)\n"
    "def row_norm(weight):\n    return weight.norm(dim=1)\n",
}

SAYS = {
    "solution read": "No such file or directory",
    "os._exit": "your code ended the Python process",
    "forged replies": "your code wrote into the connection",
    "a flood of lists": "your code sent too much data",
    "in place, probes patched": "it changes the caller's weight",
    "grading rewritten": "No such file or directory",
    "package's own": "No module named 'minidora.dora'",
}


@pytest.mark.slow
@needs_sandbox
def test_cheats_earn_nothing_and_right_answers_pass(tmp_path: Path) -> None:
    """One test, because a class is graded once: pytest-xdist would spread several over workers."""
    rows = graded(tmp_path)
    cheaters = [*cheats(tmp_path), *OTHERS, "outputs forged"]
    odd = {}
    for name in cheaters:
        first, points = rows[name]["3.1"], sum(int(row["points"]) for row in rows[name].values())
        refused = first["state"] in ("failing", "missing", "not started")
        honest_rest = points == 1 and rows[name]["3.2"]["points"] == "1"
        if not refused or not honest_rest or SAYS.get(name, "") not in first["message"]:
            odd[name] = [rows[name]["3.1"], rows[name]["3.2"]]
    for name in RIGHT:
        if rows[name]["3.1"]["state"] != "done":
            odd[name] = [rows[name]["3.1"]]
    assert odd == {}
    assert set(rows) == {*cheaters, *RIGHT, "zz honest", "nobody"}
    assert {row["max_points"] for row in rows["nobody"].values()} == {"1", "2", "3"}
    assert {row["state"] for row in rows["zz honest"].values()} == {"done"}
    assert {row["state"] for row in rows["nobody"].values()} == {"missing"}


def test_collects_folders_files_and_the_newest(tmp_path: Path) -> None:
    text = submission(WRONG)
    (tmp_path / "ann" / "deep" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "ann" / "deep" / "renamed.ipynb").write_text(text)
    (tmp_path / "ann" / "deep" / ".ipynb_checkpoints" / "x-checkpoint.ipynb").write_text(text)
    (tmp_path / "ann" / "older.ipynb").write_text(text)
    os.utime(tmp_path / "ann" / "older.ipynb", (0, 0))
    (tmp_path / "bob.ipynb").write_text(text)
    (tmp_path / "cy").mkdir()
    (tmp_path / "cy" / "link.ipynb").symlink_to(tmp_path / "bob.ipynb")
    found = {one.student: one for one in submissions.collect(tmp_path)}
    assert sorted(found) == ["ann", "bob", "cy"]
    assert found["ann"].notebook is not None
    assert found["ann"].notebook.path.name == "renamed.ipynb"
    assert "1 more notebook(s)" in found["ann"].note
    assert found["cy"].notebook is None


@pytest.mark.slow
def test_damaged_notebook_of_no_known_lesson_is_named(tmp_path: Path) -> None:
    text = submission(WRONG)
    (tmp_path / "ann.ipynb").write_text(text)
    (tmp_path / "bob.ipynb").write_text(text[: len(text) // 2])
    (tmp_path / "cy").mkdir()
    (tmp_path / "cy" / "03_mine.ipynb").write_text(text[: len(text) // 2])
    submissions.grade(tmp_path, tmp_path / "r.csv", grade.Limits(), sandboxed=False)
    rows = list(csv.DictReader((tmp_path / "r.csv").open(newline="")))
    told = {row["student"]: (row["state"], row["message"]) for row in rows}
    assert told["bob"][0] == "missing"
    assert "no notebook of this lesson. bob.ipynb: its JSON breaks off" in told["bob"][1]
    assert "its JSON breaks off" in told["cy"][1]
    assert "breaks off" not in told["ann"][1]


def test_report_holds_no_formulas() -> None:
    result = grade.Result(LESSON.exercises[0], State.FAILING, "@bad")
    row = submissions._row(submissions.Submission("=cmd()", 3, None), result, "1")
    assert (row["student"], row["message"]) == ("'=cmd()", "'@bad")
