"""What is written is written whole or not at all, with link and mode kept, in UTF-8."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from minidora.classroom import files
from minidora.classroom.files import UserError, explain, output_file, output_folder, write_whole


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("chmod", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(files.os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_whole(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="permissions and links as POSIX has them")
def test_links_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "elsewhere" / "real.txt", tmp_path / "link.txt"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "fresh.txt", "new")
        assert os.umask(0o027) == 0o027, "the process's own umask is as it was"
    finally:
        os.umask(before)
    assert (tmp_path / "fresh.txt").stat().st_mode & 0o777 == 0o640
    dangling = tmp_path / "dangling.txt"
    dangling.symlink_to(tmp_path / "elsewhere" / "to be made.txt")
    write_whole(dangling, "new")
    assert dangling.is_symlink()
    assert dangling.read_text() == "new"


def test_text_is_utf_8_whatever_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"text": "é ± 😀 \r\n", "half of a pair": "\ud83d"}
    write_whole(path, json.dumps(value, ensure_ascii=False))
    assert json.loads(path.read_bytes().decode("utf-8")) == value
    write_whole(path, "a\r\nb\n")
    assert path.read_bytes() == b"a\r\nb\n"


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd here")
def test_a_pipe_is_written_into() -> None:
    reading, writing = os.pipe()
    write_whole(Path(f"/dev/fd/{writing}"), "text")
    os.close(writing)
    assert os.read(reading, 100) == b"text"
    os.close(reading)


def test_outputs_are_tested_before_the_work(tmp_path: Path) -> None:
    path = output_file(tmp_path / "not" / "there" / "a.csv")
    assert path.parent.is_dir()
    assert not path.exists()
    path.write_text("old")
    assert output_file(path).read_text() == "old"
    with pytest.raises(UserError, match="is a folder: name a file"):
        output_file(tmp_path)
    with pytest.raises(FileExistsError):
        output_file(path / "b.csv")
    with pytest.raises(FileExistsError):
        output_folder(path)
    assert output_folder(tmp_path / "new").is_dir()


def test_home_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_file(Path("~/a.csv")) == tmp_path / "a.csv"


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOENT, "does not exist: check the name"),
        (errno.EACCES, "may not be read or written by you"),
        (errno.EPERM, "may not be read or written by you"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "goes through a file"),
        (errno.EEXIST, "is not a folder"),
        (errno.EISDIR, "is a folder, where a file is needed"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ELOOP, "leads back to itself"),
    ],
)
def test_every_error_names_the_file_and_the_way_out(number: int, says: str) -> None:
    text = explain(OSError(number, "", "some/file"))
    assert text is not None
    assert text.startswith("some/file ")
    assert says in text


def test_what_is_not_about_files_is_not_explained() -> None:
    assert explain(OSError(errno.ECONNREFUSED, "refused")) is None
    assert explain(OSError("libcudart.so.13: cannot open")) is None
    full = explain(OSError(errno.ENOSPC, "No space left"))
    assert full is not None
    assert "no space left" in full
