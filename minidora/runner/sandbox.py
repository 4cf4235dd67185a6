"""The wall around a submission: bubblewrap, which shows its process Python and nothing of ours.

A process inside sees Python with its packages, the part of minidora that answers nothing, and
the folder of one submission, all read-only; beside that an empty /tmp and an empty folder to work
in. It has no network, no capabilities, and sees no process but its own. When the program that
started it ends, however that happens, the kernel ends all that runs inside.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
OPEN = ("runner", "memory.py")
"""What of the package is in a sandbox: all else may hold an answer."""

SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/alternatives")
"""Shared libraries, where they exist."""

WORK = "/student/work"
SUBMISSION = "/student/submission"
FILES_MIB = 256
"""What a process may write to its working folder, and to /tmp: these files lie in memory."""


def problem() -> str:
    """Why there can be no sandbox here, and what to do about it; empty where there can."""
    if sys.platform != "linux":
        return "bubblewrap runs on Linux alone: grade on Linux, in a virtual machine for example"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian and Ubuntu: apt install bubblewrap)"
    tried = subprocess.run([*_walls(), sys.executable, "-c", ""], capture_output=True, text=True)
    if tried.returncode:
        said = " ".join(tried.stderr.split()) or f"it ended with {tried.returncode}"
        return f"bubblewrap cannot start here ({said}): it takes version 0.8 and user namespaces"
    return ""


def command(
    closed: Iterable[str], opened: Iterable[str], folder: Path, submission: Path | None
) -> list[str]:
    """The command line that starts a worker (worker.py) behind the wall.

    Args:
        closed: modules that hold this lesson's answers, of minidora or another package.
        opened: modules of minidora to show beside OPEN.
        folder: where files of this function may lie while the process runs.
        submission: the folder or file to show at /student/submission.
    """
    for name, text in (("package.py", INIT), ("checks.py", CHECKS)):
        if not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
    package = ["--tmpfs", str(PACKAGE)]
    for name in (*OPEN, *(f"{module.split('.')[1]}.py" for module in opened)):
        if f"minidora.{Path(name).stem}" not in closed:
            package += ["--ro-bind", str(PACKAGE / name), str(PACKAGE / name)]
    package += ["--ro-bind", str(folder / "package.py"), str(PACKAGE / "__init__.py")]
    package += ["--ro-bind", str(folder / "checks.py"), str(PACKAGE / "checks" / "__init__.py")]
    package += ["--remount-ro", str(PACKAGE)]
    for name in closed:
        if not name.startswith("minidora."):
            for packages in _packages():
                if (packages / name).is_dir():
                    package += ["--tmpfs", str(packages / name)]
                    package += ["--remount-ro", str(packages / name)]
    if submission is not None:
        target = SUBMISSION if submission.is_dir() else f"{SUBMISSION}/{submission.name}"
        package += ["--ro-bind", str(submission.resolve()), target]
    return [*_walls(package), sys.executable, "-m", "minidora.runner.worker"]


INIT = '''"""minidora in a sandbox: what holds an answer is not here."""

import torch


def device():
    """A sandbox has no GPU."""
    return torch.device("cpu")
'''

CHECKS = '''"""Check cells do nothing here: the checks are made outside of the sandbox."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *answers: None
'''


# ---- The wall ----


def _walls(package: Iterable[str] = ()) -> list[str]:
    """bwrap with Python alone inside, then these mounts, then nothing more to write to."""
    line = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    line += ["--new-session", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"]
    line += ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", WORK, "/dev/shm"):
        line += ["--size", str(FILES_MIB * 2**20), "--tmpfs", folder]
    for path in [*map(Path, SYSTEM), *_python()]:
        line += _shown(path)
    line += package
    for folder in ("/proc", "/dev", "/"):  # as root, one may write into /proc even here
        line += ["--remount-ro", folder]
    line += ["--clearenv", "--chdir", WORK]
    for name, value in _environment().items():
        line += ["--setenv", name, value]
    return [*line, "--"]


def _shown(path: Path) -> list[str]:
    """The mount of a path that is the same inside; a link stays a link, like /lib on Debian."""
    if path.is_symlink():
        return ["--symlink", os.readlink(path), str(path)]
    return ["--ro-bind", str(path), str(path)] if path.exists() else []


def _python() -> list[Path]:
    """Files and folders of the interpreter, its library, and the packages that it finds."""
    found = [Path(sysconfig.get_path("stdlib")), *_packages()]
    for prefix in map(Path, dict.fromkeys((sys.base_prefix, sys.prefix))):
        found += [*sorted((prefix / "bin").glob("python*")), prefix / "pyvenv.cfg"]
        if prefix != Path("/usr"):
            found += [prefix / "lib", prefix / "lib64"]
    return found


def _packages() -> list[Path]:
    """Folders of installed packages, also of another environment that this one looks into."""
    names = ("site-packages", "dist-packages")
    return [Path(place) for place in sys.path if Path(place).name in names and Path(place).is_dir()]


def _environment() -> dict[str, str]:
    """Everything that is set inside."""
    path = [str(PACKAGE.parent), *map(str, _packages())]
    return {
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "USER": "student",
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSAFEPATH": "1",
        "MINIDORA_DEVICE": "cpu",
        "TRITON_INTERPRET": "1",
    }
