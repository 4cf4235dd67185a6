"""The set-up, with an interpreter that only pretends: nothing is installed by these tests."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# It writes down how it was called; `-m venv` makes a .venv whose python is this script again.
PRETENDER = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
  *"sys.version_info <"*) exit ${TOO_OLD:-0} ;;
  *platform*) echo 3.9.18 ;;
  *ensurepip*) exit ${NO_ENSUREPIP:-0} ;;
  *"-m uv"*) exit ${NO_UV:-0} ;;
  "-m venv"*)
    for last; do :; done
    mkdir -p "$last/bin" && cp "$0" "$last/bin/python" && cp "$0" "$last/bin/minidora" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """make("install", NO_UV="1") runs make in a copy of the set-up: exit code, text, the calls."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    pretender = tmp_path / "python"
    pretender.write_text(PRETENDER)
    pretender.chmod(0o755)
    log = tmp_path / "log"

    def run(*arguments, cwd=tmp_path, **variables):
        log.write_text("")
        env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        done = subprocess.run(
            ["make", "PYTHON=./python", *arguments],
            cwd=cwd,
            env=env | {"LOG": str(log)} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, log.read_text()

    return run


def test_install_makes_the_environment_once_and_again_only_for_pyproject(make, tmp_path):
    code, text, calls = make("install")
    assert code == 0, text
    assert "-m venv --clear .venv" in calls
    assert "-m uv pip install --python .venv/bin/python -e .\n" in calls

    (tmp_path / "minidora").mkdir()  # other files come and go
    (tmp_path / "README.md").write_text("new")
    assert make("-q", "install")[0] == 0

    stamp = (tmp_path / ".venv/.installed").stat().st_mtime
    os.utime(tmp_path / "pyproject.toml", (stamp + 10, stamp + 10))
    code, text, calls = make("install")
    assert "pip install" in calls
    assert "-m venv" not in calls  # into the environment that is there


def test_the_developers_packages_serve_the_course_too(make):
    calls = make("notebooks")[2]
    assert "-e .[dev]\n" in calls
    assert make("-q", "install")[0] == 0


def test_pip_installs_where_uv_cannot(make):
    code, text, calls = make("install", NO_UV="1")
    assert code == 0, text
    assert calls.endswith("-m pip install -e .\n")


def test_a_folder_with_an_apostrophe_and_a_space(make, tmp_path):
    folder = tmp_path / "Ada's course"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "python"):
        shutil.copy(tmp_path / name, folder)
    code, text, _ = make("install", cwd=folder)
    assert code == 0, text
    assert (folder / ".venv/.installed").read_text() == f"{folder.resolve()}\n"
    code, text, calls = make("install", cwd=folder)
    assert code == 0, text
    assert "pip" not in calls  # it is up to date


def test_the_oldest_versions_have_an_environment_of_their_own(make, tmp_path):
    code, text, calls = make("test-oldest")
    assert code == 0, text
    assert "-m venv --clear .venv-oldest" in calls
    assert "--python .venv-oldest/bin/python --resolution lowest-direct -e .[dev]" in calls
    assert "pytest" in calls
    assert not (tmp_path / ".venv").exists()
    shutil.rmtree(tmp_path / ".venv-oldest")
    code, text, calls = make("test-oldest", NO_UV="1")
    assert code != 0  # pip would install the newest, and the suite would prove nothing
    assert "pytest" not in calls


def test_a_folder_that_moved_gets_a_new_environment(make, tmp_path):
    make("install")
    (tmp_path / ".venv/.installed").write_text("elsewhere\n")
    assert "-m venv --clear .venv" in make("install")[2]


def test_an_environment_made_by_hand_is_kept(make, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(tmp_path / "python", tmp_path / ".venv/bin/python")
    code, text, calls = make("install")
    assert code == 0, text
    assert "-m venv" not in calls
    assert "pip install" in calls


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["PYTHON=python-none"], {}, "There is no python-none here. Install Python 3.11 or newer"),
        ([], {"TOO_OLD": "1"}, "minidora needs Python 3.11 or newer; ./python is 3.9.18."),
        ([], {"NO_ENSUREPIP": "1"}, "apt install python3-venv"),
    ],
)
def test_what_is_missing_is_said_in_words(make, tmp_path, arguments, variables, said):
    code, text, calls = make("install", *arguments, **variables)
    assert code != 0
    assert said in text
    assert "pip install" not in calls
    assert not (tmp_path / ".venv").exists()


def test_lab_opens_the_learners_copy_and_hands_on_its_options(make):
    calls = make("lab", "ARGS=--no-browser --port=9999")[2]
    copied, opened = calls.splitlines()[-2:]
    assert copied == "start"  # minidora start: the learner's own copy, before it is opened
    assert opened == "lab --folder my-work --no-browser --port=9999"  # minidora lab


def test_help_lists_every_target(make):
    text = make("help")[1]
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if ".PHONY" in line)
    for target in phony.split()[1:]:
        assert (f"make {target} " in text) == (target not in ("missing", "suite"))


def test_ci_is_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


def test_the_wheel_holds_the_package_and_the_command(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"minidora/dora.py", "minidora/doctor.py", "minidora_command.py"} <= set(names)
    assert not [name for name in names if not name.startswith("minidora")]


def test_what_the_browser_tests_lack_is_one_command(tmp_path):
    """Without Chromium, and perhaps without Playwright: it ends before anything is started."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-pno:nbval", "-pno:cacheprovider", "tests/browser"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "the tests in a browser need more than the course does: " in said
    assert "apt install chromium" in said
    has_playwright = importlib.util.find_spec("playwright") is not None
    assert ("-e '.[browser]'" in said) == (not has_playwright)
