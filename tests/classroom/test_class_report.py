"""The report of a class comes out whole, whatever is handed in and whatever stops the judge."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from class_notebooks import LESSON, NAME, submission

from minidora.checks.exercise import State
from minidora.classroom import folder as folders
from minidora.classroom import grade, report, submissions
from minidora.classroom.notebook import read_notebook
from minidora.runner import process, sandbox

RIGHT = "def row_norm(weight):\n    return weight.norm(dim=1)\n"


def stubs() -> str:
    """A notebook into which nothing was written: it is graded without running it."""
    return (folders.ROOT / "exercises" / f"{NAME}.ipynb").read_text(encoding="utf-8")


def graded(folder: Path, csv_file: Path) -> dict[str, list[dict[str, str]]]:
    """{student: rows}, as a program reads them from the file."""
    said: list[str] = []
    submissions.grade(folder, csv_file, grade.Limits(), sandboxed=False, progress=said.append)
    rows: dict[str, list[dict[str, str]]] = {}
    with csv_file.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["student"], []).append(row)
    assert all(len(part) % len(LESSON.exercises) == 0 for part in rows.values())
    return rows


def test_any_names_and_messages(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = [b"Andr\xe9", "André".encode(), b"two\nlines", b"\x1b[31mred", b'a,b;"c"', b"=1+1"]
    for name in names:
        place = os.path.join(os.fsencode(folder), name)
        os.makedirs(place)
        with open(os.path.join(place, b"\xff\xfe " + NAME.encode() + b".ipynb"), "w") as file:
            file.write(stubs())
    odd = 'def row_norm(weight):\n    raise ValueError("\\ud800 \\x00 \\x1b[2J")\n'
    (folder / "odd.ipynb").write_text(submission(odd), encoding="utf-8")
    surrogate = submission("# \ud800\n" + RIGHT)
    assert "\\ud800" in surrogate
    (folder / "half.ipynb").write_text(surrogate, encoding="utf-8")
    rows = graded(folder, tmp_path / "r.csv")
    assert len(rows["André"]) == 2 * len(LESSON.exercises)  # two names that print alike
    assert set(rows) == {"André", "two lines", "\\x1b[31mred", 'a,b;"c"', "'=1+1", "odd", "half"}
    for part in rows.values():
        for row in part:
            assert all(value.isprintable() for value in row.values())
    assert rows["odd"][0]["state"] == "failing"
    assert "ValueError: " in rows["odd"][0]["message"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace('"nbformat": 4', '"nbformat": ' + "4" * 5000), ""),
        (lambda text: json.dumps({"cells": json.loads(text)["cells"] + [3]}), "no notebook of"),
        (lambda text: text[:3000], "breaks off"),
        (lambda text: "[" * 100_000, "no notebook of"),
        (lambda text: text.replace("import copy", "x = 0x" + "f" * 9999), ""),
        (lambda text: text.replace("import copy", "\\u0000import copy"), ""),
    ],
)  # fmt: skip
def test_damaged_notebooks(tmp_path: Path, damage: Any, says: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "ann.ipynb").write_text(stubs(), encoding="utf-8")
    (folder / "bob").mkdir()
    (folder / "bob" / "03_mine.ipynb").write_text(damage(stubs()), encoding="utf-8")
    rows = graded(folder, tmp_path / "r.csv")
    assert {row["points"] for row in rows["bob"]} == {"0"}
    assert says in rows["bob"][0]["message"]
    assert {row["state"] for row in rows["ann"]} == {"not started"}


def test_pipes_links_and_what_archives_add(tmp_path: Path) -> None:
    text = stubs()
    (tmp_path / "ann.IPYNB").write_text(text)
    (tmp_path / "__MACOSX" / "ann").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "ann" / f"._{NAME}.ipynb").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "bob" / "__MACOSX").mkdir(parents=True)
    (tmp_path / "bob" / "__MACOSX" / f"{NAME}.ipynb").write_text(text)
    (tmp_path / "bob" / f"._{NAME}.ipynb").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "bob" / f"{NAME}.ipynb").write_text(text)
    os.mkfifo(tmp_path / "cy.ipynb")
    (tmp_path / "dan").mkdir()
    os.mkfifo(tmp_path / "dan" / "03_pipe.ipynb")
    (tmp_path / "dan" / "folder.ipynb").mkdir()
    (tmp_path / "eve").symlink_to(tmp_path / "bob")
    (tmp_path / "fay").mkdir()
    (tmp_path / "fay" / "loop").symlink_to(tmp_path / "fay")
    (tmp_path / "fay" / f"{NAME}.ipynb").symlink_to(tmp_path / "ann.IPYNB")
    found = {one.student: one for one in submissions.collect(tmp_path)}
    assert sorted(found) == ["ann", "bob", "cy", "dan", "fay"]
    assert found["bob"].note == ""
    assert [name for name, one in found.items() if one.notebook] == ["ann", "bob", "dan"]
    assert found["dan"].notebook is not None
    assert "a pipe" in found["dan"].notebook.problem
    assert "a pipe" in read_notebook(tmp_path / "cy.ipynb").problem


def test_a_number_of_5000_digits_in_a_stub_is_no_stub(tmp_path: Path) -> None:
    content = json.loads(stubs())
    content["cells"][1]["source"] = "import math\nx = " + "1" * 5000
    (tmp_path / "ann.ipynb").write_text(json.dumps(content))
    assert not read_notebook(tmp_path / "ann.ipynb").untouched(LESSON)


# ---- Going on ----


def test_goes_on_from_what_is_there(tmp_path: Path, monkeypatch: Any) -> None:
    folder, file = tmp_path / "in", tmp_path / "r.csv"
    folder.mkdir()
    for name in ("ann", "bob", "cy"):
        (folder / f"{name}.ipynb").write_text(stubs(), encoding="utf-8")
    first = graded(folder, file)
    judged: list[str] = []
    judge = grade.judge

    def counted(workers: Any, notebook: Any, *rest: Any) -> Any:
        judged.append(notebook.path.stem)
        return judge(workers, notebook, *rest)

    monkeypatch.setattr(submissions, "judge", counted)
    assert graded(folder, file) == first
    assert judged == []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20], encoding="utf-8", newline="")
    assert graded(folder, file) == first
    assert judged == ["cy"]
    judged.clear()
    changed = json.loads(stubs())
    changed["cells"].append({"cell_type": "code", "source": "# mine", "metadata": {}})
    (folder / "bob.ipynb").write_text(json.dumps(changed), encoding="utf-8")
    graded(folder, file)
    assert judged == ["bob"]


def test_a_file_that_is_no_report_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ann.ipynb").write_text(stubs(), encoding="utf-8")
    for content in (b"my,own,table\n1,2,3\n", b"\xff\x00\xfe"):
        (tmp_path / "r.csv").write_bytes(content)
        with pytest.raises(folders.UserError, match="is no report of a class"):
            graded(tmp_path / "in", tmp_path / "r.csv")
        assert (tmp_path / "r.csv").read_bytes() == content


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_judge_keeps_what_it_graded(tmp_path: Path, number: int) -> None:
    folder, file = tmp_path / "in", tmp_path / "r.csv"
    folder.mkdir()
    (folder / "ann.ipynb").write_text(stubs(), encoding="utf-8")
    slow = "import time\nwhile True:\n    time.sleep(0.1)\n" + RIGHT
    for name in ("bob", "cy", "dan", "eve"):
        (folder / f"{name}.ipynb").write_text(submission(slow), encoding="utf-8")
    code = "from minidora.cli import app; app()"
    line = [sys.executable, "-c", code, "check", "--report", str(file), str(folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as judge:
        assert judge.stdout is not None
        for said in judge.stdout:
            if "1 of 5: ann" in said:
                break
        time.sleep(1)
        judge.send_signal(number)
        rest = judge.stdout.read()
    with file.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert {row["student"] for row in rows} == {"ann"}
    assert len(rows) == len(LESSON.exercises)
    if number == signal.SIGINT:
        assert "the same command goes on from there" in rest
    for name in ("bob", "cy", "dan", "eve"):
        (folder / f"{name}.ipynb").write_text(stubs(), encoding="utf-8")
    said_again: list[str] = []
    problem = sandbox.problem()
    submissions.grade(folder, file, grade.Limits(), not problem, said_again.append)
    assert said_again[0].startswith("1 of 5 are in")


# ---- Faults of ours ----


def test_a_check_that_breaks_reaches_report_status_and_debug(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def broken(answer: Any) -> None:
        answer(__import__("torch").ones(2, 2))
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(LESSON.exercises[0], "judge", broken)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ann.ipynb").write_text(submission(RIGHT), encoding="utf-8")
    row = graded(tmp_path / "in", tmp_path / "r.csv")["ann"][0]
    assert (row["state"], row["points"], row["fingerprint"]) == ("check error", "0", "")
    assert "ZeroDivisionError: ours" in row["message"]
    assert "in broken" in row["message"]
    folders.start(tmp_path / "work")
    copy = tmp_path / "work" / "exercises" / f"{NAME}.ipynb"
    copy.write_text(submission(RIGHT), encoding="utf-8")
    report.status(tmp_path / "work")
    said = capsys.readouterr().out
    assert "check error" in said
    assert "in broken" in said
    with pytest.raises(ZeroDivisionError):
        report.check(tmp_path / "work", ["3.1"], grade.Limits(), debug=True)


def test_a_fault_with_one_notebook_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def failing(workers: Any, notebook: Any, *rest: Any) -> Any:
        if notebook.path.stem == "ann":
            raise RuntimeError("unforeseen")
        return [grade.Result(one, State.DONE) for one in LESSON.exercises]

    monkeypatch.setattr(submissions, "judge", failing)
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.ipynb").write_text(stubs(), encoding="utf-8")
    rows = graded(tmp_path, tmp_path / "r.csv")
    assert {row["state"] for row in rows["ann"]} == {"check error"}
    assert "RuntimeError: unforeseen" in rows["ann"][0]["message"]
    assert {row["state"] for row in rows["bob"]} == {"done"}


def test_without_a_sandbox_the_first_line_says_so(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ann.ipynb").write_text(stubs(), encoding="utf-8")
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    report.grade_class(tmp_path / "r.csv", [tmp_path / "in"], grade.Limits())
    first = capsys.readouterr().out.splitlines()[0]
    assert "Deliberate cheats are not stopped" in first
    assert "apt install bubblewrap" in first
    with pytest.raises(folders.UserError, match="--require-sandbox"):
        report.grade_class(
            tmp_path / "s.csv", [tmp_path / "in"], grade.Limits(), require_sandbox=True
        )
    assert not (tmp_path / "s.csv").exists()


def test_a_long_reply_is_refused_where_it_is_made() -> None:
    with process.WorkerPool() as workers:
        worker = workers.start(4.0)
        source = "def big():\n    return ['x' * 90_000] * 1000\n"
        assert worker.ask("cell", 1800.0, index=1, source=source, seconds=1800.0) == {"number": 2}
        reply = worker.ask(
            "probe", 1800.0, answer="big", name="call", args=(), kwargs={}, seconds=1800
        )
        worker.close()
    assert reply["message"] == "your code hands back more than 64 MiB"
