"""What README.md tells people to type is typed here, or is `make test`, which runs these tests."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import websocket
from jupyter_server import PATIENCE, running

import minidora
from minidora import checks, doctor, plots
from minidora.evidence import bench

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def test_every_command_is_run_here_or_by_ci():
    assert commands() == [
        "make lab",  # test_make_lab, with --no-browser
        "make test",  # .ci/run
        *PIP_LINES,  # test_pip_lines, test_jupyter_lab
        "make demo",  # test_make_demo, with fewer seeds
        "make doctor",  # test_make_doctor
        ".venv/bin/minidora status",  # test_minidora_start_and_status
        ".venv/bin/minidora evidence pretrain",  # test_pretrain.py
        ".venv/bin/minidora evidence run",
    ]
    assert "`make lab ARGS=--no-browser`" in README


@pytest.fixture
def installed():
    """The commands install anew where pyproject.toml changed; a test must not."""
    stale = subprocess.run(["make", "-q", "install"], cwd=ROOT, env=CLEAN, check=False).returncode
    if stale or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("needs the .venv of `make install`, up to date; `make test` has it")


def run(command, **options):
    return subprocess.run(
        shlex.split(command), env=CLEAN, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.slow
def test_make_demo(installed):
    figure = ROOT / "demo/half_turn.png"
    figure.unlink(missing_ok=True)
    done = run("make demo ARGS=--seeds=2", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout
    accuracy = {
        name: float(re.search(rf"{name} +│ +([\d.]+) ±", done.stdout)[1])
        for name in ("frozen base", "full fine-tuning", "LoRA", "DoRA")
    }
    assert accuracy.pop("frozen base") < 60
    assert min(accuracy.values()) > 90
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_make_doctor(installed):
    done = run("make doctor", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if "to fix it" not in line] == list(doctor.CHECKS)
    assert last == "The course runs here."


@pytest.mark.slow
def test_minidora_start_and_status(installed, tmp_path):
    """In another folder, so that a learner's own my-work/ is left alone."""
    started = run(f"{ROOT}/.venv/bin/minidora start {tmp_path}/my-work", cwd=ROOT)
    assert started.returncode == 0, started.stdout + started.stderr
    names = {path.name for path in (ROOT / "exercises").glob("*.ipynb")}
    assert {path.name for path in (tmp_path / "my-work/exercises").glob("*.ipynb")} == names
    status = run(f"{ROOT}/.venv/bin/minidora status --folder {tmp_path}/my-work", cwd=ROOT)
    assert status.returncode == 0, status.stdout + status.stderr
    assert "not started" in status.stdout


# ---- JupyterLab, started, asked over this machine's own address, stopped ----
# Both ways make my-work/, which git ignores and which stays: another process may be using it.


def probe_jupyter(command, folder):
    """The paths that a started JupyterLab shows, and what its terminal says to `minidora`."""
    with running(command, folder) as server:
        found = [
            entry["path"]
            for path in ("", "notebooks", "exercises")
            for entry in json.loads(server.ask(f"api/contents/{path}"))["content"]
        ]
        said = type_into_terminal(server, "minidora --version")
    log = (folder / "log").read_text()
    assert "pip install" not in log
    assert "preferred_dir" not in log
    return found, said


def type_into_terminal(server, line):
    """What a new terminal in JupyterLab answers to a line."""
    name = json.loads(server.ask("api/terminals", "POST"))["name"]
    connection = websocket.create_connection(
        f"ws://{server.address}/terminals/websocket/{name}",
        header={"Authorization": server.key},
        timeout=PATIENCE,
    )
    connection.send(json.dumps(["stdin", f"{line}; echo e''nd\r"]))
    said = ""
    while "end\r\n" not in said:
        kind, *text = json.loads(connection.recv())
        said += "".join(text) if kind == "stdout" else ""
    connection.close()
    return said


@pytest.mark.slow
@pytest.mark.parametrize("way", ["make", "by hand"])
def test_jupyterlab_opens_the_copy_and_its_terminal_knows_the_command(installed, tmp_path, way):
    assert run(PIP_LINES[2], cwd=ROOT).returncode == 0
    line = "make lab ARGS=--no-browser" if way == "make" else PIP_LINES[3]
    found, said = probe_jupyter(line, tmp_path)
    assert {"notebooks/01_adam_memory.ipynb", "exercises/03_dora_decomposition.ipynb"} <= {*found}
    assert "solutions" not in found
    assert f"minidora {minidora.__version__}" in said


# ---- By hand, with pip ----

PIP_LINES = [
    "python3 -m venv .venv",
    ".venv/bin/pip install -e .",
    ".venv/bin/minidora start",
    ".venv/bin/minidora lab",
]


@pytest.mark.slow
def test_pip_lines(tmp_path):
    """In a copy, offline: pip installs minidora alone, all else is in reach from here."""
    for name in ("minidora", "minidora_command.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    assert PIP_LINES[0].startswith("python3 ")  # here the Python whose packages are in reach
    environment = run(PIP_LINES[0].replace("python3", sys.executable, 1), cwd=tmp_path)
    assert environment.returncode == 0, environment.stderr
    packages = next(tmp_path.glob(".venv/lib/python*/site-packages"))
    here = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (packages / "here.pth").write_text(f"{here}\n")
    done = run(f"{PIP_LINES[1]} --no-index --no-deps --no-build-isolation", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    where = "import minidora, minidora_command; print(minidora.__file__)"
    used = run(f"{tmp_path}/.venv/bin/python -c {shlex.quote(where)}", cwd=tmp_path / "minidora")
    assert used.stdout.strip() == str(tmp_path / "minidora/__init__.py"), used.stderr
    assert "doctor" in run(f"{tmp_path}/.venv/bin/minidora --help", cwd=tmp_path).stdout


def test_the_ten_lines(capsys):
    [code] = blocks("python")
    assert len([line for line in code.splitlines() if line]) == 10
    exec(code, {})
    before, parameters, after = capsys.readouterr().out.splitlines()
    before, after = (float(re.search(r"accuracy=([\d.]+)", line)[1]) for line in (before, after))
    assert 30 < before < 60
    assert after > 90
    assert "trainable=2034, total=19260" in parameters


# ---- What it states ----


def test_the_picture_on_top_is_ours():
    figure = plots.magnitude_direction(magnitude=1.4)
    assert figure.get_suptitle()
    first_screen = README[: README.index("make lab")]
    assert "](docs/dora.png)" in first_screen
    assert (ROOT / "docs/dora.png").read_bytes().startswith(b"\x89PNG")
    assert "DoRA fine-tunes" in first_screen


def test_hours_are_those_of_the_lessons_and_exercises():
    lessons = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        lessons += int(re.search(r"(\d+) minutes", first)[1])
    every = [exercise for lesson in checks.LESSONS.values() for exercise in lesson.exercises]
    hours = re.search(
        r"about (\d+) hours to read and try, their (\d+) exercises about (\d+)", README
    )
    assert int(hours[2]) == len(every)
    assert abs(int(hours[1]) - lessons / 60) < 1
    assert abs(int(hours[3]) - sum(exercise.minutes for exercise in every) / 60) < 1


def test_rows_of_the_benchmark_are_those_of_the_reports():
    def values(name, contender, of):
        """In float32."""
        rows = [row for row in bench.load_reports()[name].results if row.dtype is None]
        return [of(r) for r in rows if (r.work, r.contender) == ("training step", contender)]

    def spread(name, contender):
        ratios = values(name, contender, lambda row: row.ratio[1])
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    def most(what, contender):
        return f"{max(values('cpu-eager', contender, lambda row: getattr(row, what))) / 2**20:.1f}"

    words = {9: "nine", 12: "twelve"}
    assert f"over {words[len(values('cpu-eager', 'DoRA', id))]} shapes" in README
    for start, cells in {
        "| eager,": (spread("cpu-eager", "DoRA"), spread("cpu-eager", "PEFT DoRA")),
        "| compiled,": (spread("cpu-compiled", "DoRA"), spread("cpu-compiled", "PEFT DoRA")),
        "| MiB held": (most("held", "DoRA"), most("held", "PEFT DoRA")),
        "| MiB at the peak": (most("peak", "DoRA"), most("peak", "PEFT DoRA")),
    }.items():
        [line] = [line for line in README.splitlines() if line.startswith(start)]
        assert line.endswith(f"| {cells[0]} | {cells[1]} |"), (line, cells)


def test_every_lesson_and_every_link_is_there():
    lessons = {str(path.relative_to(ROOT)) for path in (ROOT / "notebooks").glob("*.ipynb")}
    links = set(re.findall(r"\]\(([^)]+)\)", README))
    assert lessons <= links
    assert [link for link in links if ":" not in link and not (ROOT / link).exists()] == []
