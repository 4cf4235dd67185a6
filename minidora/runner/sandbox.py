"""The wall around a submission: bubblewrap, which shows its process Python and nothing of ours.

A process inside sees Python with its packages, the part of minidora that answers nothing, and
the folder of one submission, all read-only; beside that an empty /tmp and an empty folder to work
in. It has no network, no capabilities, and sees no process but its own. When the program that
started it ends, however that happens, the kernel ends all that runs inside.
"""

import ast
import functools
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
HIDDEN = {"checks", "classroom", "evidence", "cli", "doctor", "__main__", "__pycache__"}
"""Parts of the package that are in no sandbox."""

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


def command(closed: Iterable[str], folder: Path, submission: Path | None) -> list[str]:
    """The command line that starts a worker (worker.py) behind the wall.

    Args:
        closed: modules that hold answers, of minidora or another package. They are not there, and
            neither is what imports them.
        folder: where files of this function may lie while the process runs.
        submission: the folder or file to show at /student/submission.
    """
    closed = frozenset(closed)
    files = folder / "-".join(["open", *sorted(closed)])
    files.mkdir(exist_ok=True)
    (files / "package.py").write_text(open_part(closed), encoding="utf-8")
    (files / "checks.py").write_text(CHECKS, encoding="utf-8")
    package = ["--tmpfs", str(PACKAGE)]
    for path in open_files(closed):
        package += ["--ro-bind", str(path), str(path)]
    package += ["--ro-bind", str(files / "package.py"), str(PACKAGE / "__init__.py")]
    package += ["--ro-bind", str(files / "checks.py"), str(PACKAGE / "checks" / "__init__.py")]
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


CHECKS = '''"""Check cells do nothing here: the checks are made outside of the sandbox."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *answers: None
'''


# ---- The part of minidora that holds no answer ----


@functools.cache
def open_files(closed: frozenset[str]) -> list[Path]:
    """What of the package a submission may see: no closed module, and none that imports one."""
    imports = {
        path: _imported(path)
        for path in sorted(PACKAGE.iterdir())
        if path.stem not in HIDDEN and path.name != "__init__.py"
    }
    shut = set(closed) | {f"minidora.{name}" for name in HIDDEN}
    while True:
        more = {f"minidora.{path.stem}" for path, needs in imports.items() if needs & shut} - shut
        if not more:
            return [path for path in imports if f"minidora.{path.stem}" not in shut]
        shut |= more


def _imported(path: Path) -> set[str]:
    """Modules of minidora, by its first two names, that a module or package imports at once."""
    found = set()
    for file in [path] if path.suffix == ".py" else path.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "minidora":
                names = [f"minidora.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found |= {".".join(name.split(".")[:2]) for name in names}
    return found - {f"minidora.{path.stem}"}


def open_part(closed: frozenset[str]) -> str:
    """minidora/__init__.py without its imports from modules that are not there."""
    there = {f"minidora.{path.stem}" for path in open_files(closed)}
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not isinstance(node, ast.ImportFrom) or node.module in there
    ]
    return ast.unparse(tree) + "\n__all__ = [name for name in __all__ if name in globals()]\n"


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
    places = [*site.getsitepackages(), site.getusersitepackages()]
    return [Path(place) for place in places if place in sys.path and Path(place).is_dir()]


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
    }
