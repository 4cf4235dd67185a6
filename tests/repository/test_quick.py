"""What `make quick` leaves out, which is what is marked slow."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_most_tests_and_some_of_each_file_are_quick(collected: dict[Path, list[bool]]) -> None:
    files = {path for path in TESTS.rglob("test_*.py") if path.parent.name != "browser"}
    if len(collected) < 0.9 * len(files):  # some skip themselves, where a package is missing
        pytest.skip("this is not the whole suite")
    assert [str(path) for path, slow in collected.items() if all(slow)] == []
    marks = [mark for slow in collected.values() for mark in slow]
    assert marks.count(False) >= 0.6 * len(marks)
