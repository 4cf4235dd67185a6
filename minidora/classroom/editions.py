"""Copies of an older edition: recognised by their cells, with the new one laid beside.

.editions.json in the learner's folder holds, for each file that was copied, the cells that it had:
so what the course changed since can be told from what the learner wrote. A copy that is not listed
is compared by its cells alone.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidora.classroom.files import write_whole

LIST = ".editions.json"
NEW = ".new"
HEADING = re.compile(r"#{1,6} +(.+)")
MUCH = 0.25
"""A copy that lacks more of the course's cells than this is taken for another edition's."""


@dataclass(frozen=True)
class Part:
    """A cell of a notebook, or a paragraph of a text, with the heading above it."""

    text: str
    heading: str
    prose: bool
    answer: bool  # an exercise's cell, which the learner writes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()[:12]


def parts(path: Path) -> list[Part]:
    """The cells of a notebook, the paragraphs of another text; none where it cannot be read."""
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".ipynb":
            return list(_parts((block, True, {}) for block in content.split("\n\n")))
        return list(
            _parts(
                ("".join(cell["source"]), cell["cell_type"] == "markdown", cell["metadata"])
                for cell in json.loads(content)["cells"]
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _parts(cells: Iterator[tuple[str, bool, dict[str, Any]]]) -> Iterator[Part]:
    heading = "the opening"
    for source, prose, metadata in cells:
        text = source.strip()
        if prose and (found := HEADING.match(text)):
            heading = found[1]
        yield Part(text, heading, prose, bool(metadata.get("nbgrader", {}).get("solution")))


def changed_since(copy: Path, course: Path, listed: list[str] | None) -> list[Part]:
    """The course's cells that are new since the copy was made; none if it is of this edition.

    Args:
        listed: the cells that the copy had when it was made; None where nobody knows.
    """
    ours, theirs = parts(course), parts(copy)
    held = {part.digest for part in theirs}
    known = {part.digest for part in ours}
    lacking = [part for part in ours if part.digest not in held and not part.answer]
    if not theirs or not lacking:
        return []
    if listed is None:
        return lacking
    if set(listed) == known:
        # What is lacking was edited by the learner, who adds to a text but does not rewrite it.
        # Where texts were rewritten, another edition was put in the copy's place.
        rewritten = [
            part
            for part in lacking
            if part.prose and not any(part.text in other.text for other in theirs)
        ]
        return lacking if rewritten or len(lacking) > MUCH * len(ours) else []
    new = [part for part in ours if part.digest not in listed]
    old = set(listed) - known
    # Somebody who has put the new one into its place has more of the new cells than of the old.
    taken_over = sum(part.digest in held for part in new) > len(old & held)
    return [] if taken_over else new


def copies(folder: Path) -> dict[str, list[str]]:
    """{course's path of a file: the cells that it had when it was copied}."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / LIST).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def note_copies(folder: Path, names: dict[str, Path]) -> None:
    """List files that were just copied: {course's path: the course's file}."""
    if names:
        listed = {name: [part.digest for part in parts(path)] for name, path in names.items()}
        text = json.dumps(copies(folder) | listed, indent=0, sort_keys=True)
        write_whole(folder / LIST, text + "\n")


def is_new(path: Path) -> bool:
    """Whether it was laid beside an older copy."""
    return NEW in path.suffixes


def lay_beside(copy: Path, course: Path) -> Path:
    """Lay the course's file beside the copy as NAME.new.ipynb; where that is another, .new.2."""
    data = course.read_bytes()
    held = {part.digest for part in parts(course)}
    number = 1
    while True:
        suffix = NEW if number == 1 else f"{NEW}.{number}"
        target = copy.with_name(f"{course.stem}{suffix}{course.suffix}")
        if not target.exists():
            write_whole(target, data)
            return target
        if held <= {part.digest for part in parts(target)}:
            return target
        number += 1


def describe(changed: list[Part]) -> str:
    """ "3 cells have changed since, in: Which axis?, Bug hunt"."""
    headings = list(dict.fromkeys(part.heading for part in changed))
    more = f" and {len(headings) - 5} more sections" if len(headings) > 5 else ""
    cells = "1 cell has" if len(changed) == 1 else f"{len(changed)} cells have"
    return f"{cells} changed since, in: {', '.join(headings[:5])}{more}"
