"""Can the course run here? Each check returns one line: OK, or what is wrong and how to fix it.

    minidora doctor            # exit code 1 where the course cannot run

It imports neither minidora nor torch, because it must speak when those are broken: whatever may
crash is tried in another Python process, so that even a crash of torch becomes a line.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

PYTHON = (3, 11)
FREE_DISK = 0.5  # GB; notebooks, figures and MNIST (0.1 GB) need room


class Line(NamedTuple):
    """What one check found. NOTE is for what the course runs without."""

    verdict: Literal["OK", "NOTE", "FAIL"]
    found: str
    fix: str = ""


class ProbeError(Exception):
    """A Python process of its own failed; the text is the last line that it wrote."""


# Runs code that it is sent, a line of JSON each, and answers with what the code prints last. What
# libraries print themselves goes elsewhere.
CHILD = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), {"__name__": "doctor"})
    except BaseException as failure:
        error = traceback.format_exception_only(failure)[-1].strip().splitlines()[-1]
    print(json.dumps([error, printed.getvalue()]), file=answers, flush=True)
"""
PATIENCE = 600.0
"""Seconds until a process is taken to hang: importing torch takes minutes on a bad day."""


class Child:
    """A Python process of its own that tries things. After a failure a new one is started."""

    def __init__(self, python: str) -> None:
        self.python = python
        self.process: subprocess.Popen[str] | None = None

    def run(self, code: str) -> Any:
        """As probe."""
        if self.process is None:
            try:
                self.process = subprocess.Popen(
                    [self.python, "-c", CHILD],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                )
            except OSError as error:
                raise ProbeError(str(error)) from error
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        alarm = threading.Timer(PATIENCE, process.kill)
        alarm.start()
        try:
            process.stdin.write(json.dumps(code) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it is gone already
            line = ""
        finally:
            hung = not alarm.is_alive()
            alarm.cancel()
        if not line:
            status = self.close()
            how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
            raise ProbeError(f"took over {PATIENCE:g} s" if hung else f"Python {how}")
        failure, printed = json.loads(line)
        if failure is not None:
            self.close()  # what is imported by half, or a GPU in a bad state, is not reused
            raise ProbeError(failure)
        return json.loads(printed.strip().splitlines()[-1])

    def close(self) -> int:
        """End the process, if there is one, and say how it ended."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.close()  # which ends it, where nothing has yet
        process.stdout.close()
        return process.wait()

    def stop(self) -> None:
        """End the process without waiting for what it does."""
        if self.process is not None:
            self.process.kill()
            self.close()


child: Child | None = None
"""The process that all checks of one examination share, so that torch is imported once."""


def probe(code: str, python: str = sys.executable) -> Any:
    """Run code in a Python process of its own and return the JSON that it prints last.

    Raises:
        ProbeError: it failed, crashed, took very long, or there is no such Python.
    """
    if child is not None and python == child.python:
        return child.run(code)
    alone = Child(python)
    try:
        return alone.run(code)
    finally:
        alone.close()


def install(arguments: str) -> str:
    """The command that installs into this very environment."""
    if importlib.util.find_spec("pip") is None:  # an environment made by uv has no pip
        return f"uv pip install --python {sys.executable} {arguments}"
    return f"{sys.executable} -m pip install {arguments}"


def too_old(package: str, version: str) -> str:
    """The lower bound that minidora declares for a package, if the version is below it, or ""."""
    from packaging.requirements import Requirement

    for text in metadata.requires("minidora") or []:
        requirement = Requirement(text)
        if requirement.name == package and not requirement.specifier.contains(version, True):
            return str(requirement)
    return ""


# ---- The checks ----


def check_python() -> Line:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON:
        needed = ".".join(map(str, PYTHON))
        return Line(
            "FAIL",
            f"{version} is too old, the course needs {needed} or newer",
            "install a newer Python, remove .venv, then: make install PYTHON=python3.12",
        )
    return Line("OK", f"{version} in {sys.prefix}")


def check_torch() -> Line:
    # A product, not only the import: a torch for another CPU imports and then dies.
    code = "import json, torch; torch.ones(9, 9) @ torch.ones(9, 9); " + (
        "print(json.dumps(torch.__version__))"
    )
    fix = install("--force-reinstall torch torchvision")
    try:
        version = probe(code)
    except ProbeError as error:
        return Line("FAIL", str(error), fix)
    if needed := too_old("torch", version):
        return Line("FAIL", f"{version}, but the course needs {needed}", fix)
    return Line("OK", version)


def check_torchvision() -> Line:
    """The lessons run on scikit-learn's digits; MNIST and FashionMNIST come through torchvision."""
    fix = install("--force-reinstall torch torchvision")
    try:
        version = probe("import json, torchvision; print(json.dumps(torchvision.__version__))")
    except ProbeError as error:
        found = f"{error} (the lessons run without it, MNIST does not)"
        if "operator torchvision::nms does not exist" in str(error):
            found += (
                ". torch and torchvision are of different builds, one for the CPU and one for "
                "CUDA, or of releases that do not belong together: install both from one place"
            )
        return Line("NOTE", found, fix)
    if needed := too_old("torchvision", version):
        return Line("NOTE", f"{version}, but the course needs {needed}", fix)
    return Line("OK", version)


CUDA_PROBE = """
import json, torch
found = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    (torch.ones(9, 9, device=f"cuda:{i}") @ torch.ones(9, 9, device=f"cuda:{i}")).sum().item()
    found.append([torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)])
print(json.dumps({"build": torch.version.cuda or torch.version.hip, "devices": found}))
"""


def check_cuda() -> Line:
    try:
        cuda = probe(CUDA_PROBE)
    except ProbeError as error:
        if os.environ.get("MINIDORA_DEVICE") == "cpu":
            return Line("NOTE", f"{error} (not used: MINIDORA_DEVICE=cpu)")
        return Line(
            "FAIL",
            f"torch does not compute on this GPU: {error}",
            "export MINIDORA_DEVICE=cpu   (the course then runs on the CPU)",
        )
    if cuda["devices"]:
        return Line(
            "OK",
            "; ".join(
                f"{name}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
                for name, free, total in cuda["devices"]
            ),
        )
    if shutil.which("nvidia-smi") is None:
        return Line("OK", "no NVIDIA GPU found, the course runs on the CPU")
    if cuda["build"] is None:
        return Line(
            "NOTE",
            "there is an NVIDIA GPU, but this torch is built for the CPU only",
            install("--force-reinstall torch torchvision"),
        )
    return Line(
        "NOTE",
        f"there is an NVIDIA driver, but torch (built for CUDA {cuda['build']}) finds no GPU: "
        "the driver is too old, or the GPU is hidden (CUDA_VISIBLE_DEVICES)",
        "nvidia-smi   (shows the driver's CUDA version, which must not be older than torch's)",
    )


def check_package() -> Line:
    """The course's own first step: a DoRA layer on the course's device equals its base layer."""
    code = """
import json, torch, minidora
device = minidora.device()
base, x = torch.nn.Linear(5, 3).to(device), torch.ones(2, 5, device=device)
layer = minidora.DoRALinear(base, rank=2, alpha=4.0)
assert torch.allclose(layer(x), base(x), atol=1e-5), "a fresh DoRA layer differs from its base"
print(json.dumps(f"{minidora.__version__} on {device}"))
"""
    try:
        return Line("OK", probe(code))
    except ProbeError as error:
        fix = "unset MINIDORA_DEVICE" if "MINIDORA_DEVICE" in str(error) else install("-e .")
        return Line("FAIL", str(error), fix)


def check_kernel() -> Line:
    """The kernel that a notebook asks for, python3, must run this environment's Python."""
    fix = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        probe("import json, jupyterlab, ipykernel; print(json.dumps(0))")
    except ProbeError as error:
        return Line("FAIL", str(error), install("--force-reinstall jupyterlab"))
    argv = kernel_command()
    python = sys.executable if Path(argv[0]).name == argv[0] else argv[0]
    try:
        prefix = probe("import ipykernel, json, sys; print(json.dumps(sys.prefix))", python)
    except ProbeError as error:
        return Line("FAIL", f"the kernel python3 does not start: {error}", fix)
    if not Path(prefix).samefile(sys.prefix):
        found = f"the kernel python3 is another environment's, {prefix} and not {sys.prefix}"
        return Line("FAIL", found, fix)
    return Line("OK", f"JupyterLab {metadata.version('jupyterlab')}, kernel python3")


def kernel_command() -> list[str]:
    """What Jupyter starts for the kernel python3. A bare "python" means this Python."""
    from jupyter_client.kernelspec import KernelSpecManager

    argv: list[str] = KernelSpecManager().get_kernel_spec("python3").argv
    return argv


def check_widgets() -> Line:
    fix = install("--force-reinstall ipywidgets jupyterlab_widgets")
    try:
        version = probe("import json, ipywidgets; print(json.dumps(ipywidgets.__version__))")
    except ProbeError as error:
        return Line("FAIL", str(error), fix)
    part = Path(sys.prefix, "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager")
    if not part.is_dir():
        found = f"{version}, but its part for JupyterLab is missing: sliders would stay text"
        return Line("NOTE", found, fix)
    return Line("OK", version)


def check_disk() -> Line:
    free = shutil.disk_usage(".").free / 1e9
    if free < FREE_DISK:
        found = f"{free:.2f} GB free in {Path.cwd()}, the course needs {FREE_DISK}"
        return Line("FAIL", found, f"du -sh {Path.home()}/.cache/*   (what can be deleted)")
    return Line("OK", f"{free:.0f} GB free" if free >= 10 else f"{free:.1f} GB free")


CHECKS: dict[str, Callable[[], Line]] = {
    "Python": check_python,
    "torch": check_torch,
    "torchvision": check_torchvision,
    "CUDA": check_cuda,
    "minidora": check_package,
    "Jupyter": check_kernel,
    "ipywidgets": check_widgets,
    "disk": check_disk,
}


def examine() -> Iterator[tuple[str, Line]]:
    """Every check in turn. What needs torch is left out where torch does not work."""
    global child
    child = Child(sys.executable)
    torch_works = True
    try:
        for name, check in CHECKS.items():
            if not torch_works and name in ("torchvision", "CUDA", "minidora"):
                yield name, Line("NOTE", "not checked: it needs torch")
                continue
            try:
                line = check()
            except Exception as error:  # the doctor must outlive whatever is broken here
                line = Line("FAIL", f"{type(error).__name__}: {error}", install("-e ."))
            if name == "torch":
                torch_works = line.verdict == "OK"
            yield name, line
    finally:
        child.stop()
        child = None


def main() -> int:
    """Print one line a check; 1 if the course cannot run here, else 0."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)  # commands stay whole, to be copied
    styles = {"OK": "green", "NOTE": "yellow", "FAIL": "bold red"}
    failed = 0
    with console.status("asking (torch takes some seconds to import) ..."):
        for name, line in examine():
            verdict = (f"{line.verdict:<5}", styles[line.verdict])
            console.print(Text.assemble(verdict, f"{name:<12}", line.found))
            if line.fix:
                console.print(Text.assemble(" " * 17, ("to fix it: ", "dim"), line.fix))
            failed += line.verdict == "FAIL"
    if failed:
        console.print("The course cannot run here yet: fix what says FAIL, then ask again.")
    else:
        console.print("The course runs here.")
    return 1 if failed else 0
