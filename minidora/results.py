"""A folder of results that survives a kill at any moment: settings, a lock, lines of JSON.

    with hold(folder, settings, group_size, rank=0, world=1) as done:
        for group in ... not in done: append(folder, rank, rows)

Rows come in groups, written in one piece and flushed. What a kill has left of a group at the end of
a file is passed over when reading, and cut off before the next group is added.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@contextmanager
def hold(
    folder: Path, settings: Row, size: Callable[[int], int], rank: int, world: int
) -> Iterator[set[int]]:
    """Make the folder, or go on in it; gives the groups that are done. Nobody else may meanwhile.

    Args:
        settings: what the folder is for; a folder for anything else is refused.
        size: the number of rows of a group.
        rank, world: of this process, where torchrun started several. All of them enter together,
            and the first holds the folder until the last has finished.

    Raises:
        ValueError: another setting, named with both values; or damaged lines.
        RuntimeError: another process holds the folder.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, rank), _barrier(world) as wait:
        if rank == 0:
            _settle(folder, settings)
        wait()
        _settle(folder, settings)
        done = set(read(folder, size))
        path = _file(folder, rank)
        with path.open("ab") as file:
            file.truncate(sum(map(len, _whole(path, size))))
        wait()  # until all have read: from here on the files grow
        yield done
        wait()


def append(folder: Path, rank: int, rows: Iterable[Row]) -> None:
    """Add the rows of one group, in one piece, and wait until they are on the disk."""
    with _file(folder, rank).open("ab") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path, size: Callable[[int], int]) -> dict[int, list[Row]]:
    """{group: its rows} of every complete group, in order.

    Raises:
        ValueError: a line that a kill cannot explain.
    """
    found: dict[int, list[Row]] = {}
    for path in sorted(folder.glob("results-*.jsonl")):
        groups: dict[int, list[Row]] = {}
        for line in _whole(path, size):
            row = json.loads(line)
            groups.setdefault(row["group"], []).append(row)
        found = {**groups, **found}  # of a group that two files hold, the first
    return dict(sorted(found.items()))


def read_settings(folder: Path) -> Row:
    """What the folder is for.

    Raises:
        ValueError: there is no grid.json, or it is not one.
    """
    path = folder / "grid.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no sweep: there is no grid.json in it")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is not what a sweep wrote: {error}") from None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"results-{rank}.jsonl"


def _settle(folder: Path, settings: Row) -> None:
    """Write the settings into a new folder; an old one must have the same."""
    path = folder / "grid.json"
    if not path.exists() and not list(folder.glob("results-*.jsonl")):
        part = path.with_suffix(".part")
        part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        part.replace(path)  # whole or not at all
    before = read_settings(folder)
    changed = [
        f"{name} was {json.dumps(before.get(name))}, is {json.dumps(settings.get(name))}"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(f"{folder} holds another sweep ({'; '.join(changed)}): name a new folder")


@contextmanager
def _lock(folder: Path, rank: int) -> Iterator[None]:
    """The system drops it when the process ends, however it ends."""
    with (folder / f"lock-{rank}").open("a") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"another process is at work in {folder}: wait for it, or name another folder"
            ) from None
        yield


@contextmanager
def _barrier(world: int) -> Iterator[Callable[[], object]]:
    """A function that waits for all processes of torchrun; alone there is nobody to wait for."""
    if world == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))  # as long as the slowest takes
    try:
        yield partial(dist.barrier)
    finally:
        dist.destroy_process_group()


def _whole(path: Path, size: Callable[[int], int]) -> list[bytes]:
    """The lines of a file up to the end of its last complete group.

    Raises:
        ValueError: what follows is more than the beginning of one group.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    groups = [_group(line) for line in lines]
    end = 0
    while end < len(lines) and (group := groups[end]) is not None:
        count = size(group)
        if groups[end : end + count] != [group] * count:
            break
        end += count
    rest = groups[end:]
    if len(set(rest[:-1])) > 1 or None in rest[:-1]:
        raise ValueError(
            f"{path}, line {end + 1}: a damaged group, with others behind it. Delete its lines "
            "(or all from there on), and run again"
        )
    return lines[:end]


def _group(line: bytes) -> int | None:
    """The group of a line; None of one that is not whole."""
    try:
        return int(json.loads(line)["group"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
