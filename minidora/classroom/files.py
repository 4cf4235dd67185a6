"""Files of the person at the terminal: written whole or not at all, and what a failure means."""

import errno
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path


class UserError(Exception):
    """Something that the person at the terminal can fix; the message says how."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for an exception that prints itself: in a notebook, without the stack."""
        return [f"{type(self).__name__}: {self}"]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it holds all of the content, or what it held before.

    A link stays a link, and a file keeps its permissions. Text is UTF-8 with the line ends given;
    half of a surrogate pair, which UTF-8 does not have, becomes its escape, as in JSON: \\ud83d.

    Raises:
        OSError: nothing was written.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe; a folder raises
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode & 0o7777
    except FileNotFoundError:
        os.umask(mask := os.umask(0))
        mode = 0o666 & ~mask
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:  # an interrupt too must leave nothing behind
        with suppress(OSError):
            os.unlink(name)
        raise


def output_file(path: Path) -> Path:
    """A path to write to when the work is done, tested now; its folders are made.

    Raises:
        UserError: it is a folder.
        OSError: nothing can be written there.
    """
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file, {path / 'FILE'} for example")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.is_file():
        with tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent):
            pass
    return path


def output_folder(path: Path) -> Path:
    """As output_file, for a folder that files go into."""
    path = path.expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path


def explain(error: OSError) -> str | None:
    """What the person at the terminal can do about it; None where it is not about their files."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "there is no space left on the disk: free some, then run this again"
    if error.filename is None:
        gone = error.errno == errno.ENOENT  # what os.getcwd raises
        return "the folder that you are in is gone: go to another one" if gone else None
    reasons = {
        errno.ENOENT: "does not exist: check the name, or make the folder first",
        errno.EACCES: "may not be read or written by you: choose another place, or change its "
        "permissions",
        errno.EROFS: "is on a read-only file system: choose another place",
        errno.ENOTDIR: "goes through a file as if it were a folder: choose another place",
        errno.EEXIST: "is there already, but it is not a folder: choose another name",
        errno.EISDIR: "is a folder, where a file is needed: name a file in it",
        errno.ENAMETOOLONG: "is too long for this file system: choose a shorter name",
        errno.ELOOP: "is a link that leads back to itself: remove it, or choose another name",
    }
    reasons[errno.EPERM] = reasons[errno.EACCES]
    reason = reasons.get(error.errno or 0)
    name = os.fsdecode(error.filename) if not isinstance(error.filename, int) else "the file"
    return f"{name} {reason}" if reason else None


def typed(arguments: str) -> str:
    """`minidora ARGUMENTS` as it works from here: with the command's path where that is needed."""
    script = Path(sysconfig.get_path("scripts"), "minidora.exe" if os.name == "nt" else "minidora")
    if not script.exists():
        return f"{quoted(sys.executable)} -m minidora {arguments}"
    found = shutil.which("minidora")
    if found is not None and os.path.samefile(found, script):
        return f"minidora {arguments}"
    with suppress(ValueError):
        script = script.relative_to(Path.cwd())
    return f"{quoted(script)} {arguments}"


def quoted(path: Path | str) -> str:
    """A path as a shell takes it."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))
