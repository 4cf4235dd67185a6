"""The command as it is typed: what it imports, where it is found, how it ends when interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from fresh import python

import minidora
from minidora.cli.claims import SaidBy, Verdict
from minidora.evidence import ledger

COMMAND = [sys.executable, "-c", "from minidora_command import main; main()"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


SUBCOMMANDS = [
    "doctor", "start", "lab", "status", "check", "hint", "reset", "solution", "demo", "bench",
    "bench layers", "bench experiment", "bench page",
    "experiment", "experiment run", "experiment report",
    "evidence", "evidence pretrain", "evidence run",
    "experiment", "experiment run", "experiment report",
    "claims", "build", "exercise", "exercise new",
    "notebooks", "notebooks execute", "notebooks check", "notebooks length",
]  # fmt: skip


USAGE = {
    "--help": 0,
    "--version": 0,
    "chek": 2,
    "hint": 2,
    "hint 3.2": 0,
    "hint 3": 2,
    "hint 9.9": 2,
    "demo --seeds many": 2,
    "demo --seeds 1": 2,
    "demo --output picture.xyz": 2,
    "check --seconds nan": 2,
    "status --folder ~nobody_of_this_name": 2,
    "claims --said-by nobody": 2,
    "notebooks check nowhere.ipynb": 2,
    **{f"{name} --help": 0 for name in SUBCOMMANDS},
}
"""{what is typed: its exit code} of what must not wait for torch."""

WATCHED = """
import json, sys
from minidora_command import main

found, (lines, unwanted) = {}, json.loads(sys.argv[1])
for line in lines:
    sys.argv = ["minidora", *line.split()]
    try:
        main()
    except SystemExit as end:
        found[line] = [end.code or 0, sorted(set(unwanted) & set(sys.modules))]
print(json.dumps(found))
"""


def test_help_hints_and_errors_of_usage_do_without_torch() -> None:
    unwanted = ["torch", "numpy"]
    # Before 0.21.1 typer itself imports rich, to print the default of an option.
    if tuple(map(int, version("typer").split(".")[:3])) >= (0, 21, 1):
        unwanted.append("rich")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps([list(USAGE), unwanted])],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {line: [code, []] for line, code in USAGE.items()}
    assert "Traceback" not in done.stderr
    assert "Did you mean 'check'?" in done.stderr
    assert "To divide row by row" in done.stdout


def test_the_list_of_commands_is_whole() -> None:
    text = run("--help").stdout
    listed = text[text.index("Commands:") :].splitlines()[1:]
    names = {line.split()[0] for line in listed if line.strip()}
    assert names == {name.split()[0] for name in SUBCOMMANDS}


def test_version_is_the_packages() -> None:
    assert run("--version").stdout == f"minidora {minidora.__version__}\n"


@pytest.mark.slow
def test_python_m_minidora_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minidora", "--version"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == run("--version").stdout


def test_what_is_said_of_verdicts_and_sources_is_the_ledgers() -> None:
    assert [str(one) for one in SaidBy] == list(ledger.SAID_BY)
    assert tuple(map(str, Verdict)) == ledger.VERDICTS


@pytest.mark.parametrize("broken", ["raise OSError('libcudart.so.13: cannot open')", "import nope"])
def test_a_torch_that_cannot_be_imported_is_a_sentence(tmp_path: Path, broken: str) -> None:
    (tmp_path / "torch.py").write_text(broken)
    done = run("status", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("minidora: the course cannot be loaded (")
    assert "minidora doctor says how to fix it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
@pytest.mark.parametrize("command", ["status", "doctor"])
def test_an_interrupt_while_torch_is_imported_gives_no_stack(tmp_path: Path, command: str) -> None:
    """A torch that says when it is being imported, and takes its time."""
    (tmp_path / "torch.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'here')!r}).touch()\ntime.sleep(3600)"
    )
    process = subprocess.Popen(
        [*COMMAND, command],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 1800
    while not (tmp_path / "here").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Stopped." in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp932", "ascii", "latin-1"])
def test_results_reach_a_file_whatever_the_locale(encoding: str) -> None:
    """The claims in a Python that has torch already, with what PYTHONIOENCODING gives it."""
    python(
        "import sys\n"
        f"sys.stdout.reconfigure(encoding={encoding!r}, errors='strict')\n"
        "sys.argv = ['minidora', 'claims', '--rules']\n"
        "from minidora_command import main\n"
        "main()\n"
    )
    shown = run("--help", PYTHONIOENCODING=encoding)
    assert "DoRA" in shown.stdout
