"""Each check of the doctor, sound and with its failure simulated; then the command as one types it.

Only the last tests import torch: elsewhere probe answers what the test says.
"""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from minidora import doctor
from minidora.doctor import ProbeError

NMS = "RuntimeError: operator torchvision::nms does not exist"
KERNEL = "RuntimeError: CUDA error: no kernel image is available for execution on the device"


@pytest.fixture
def answer(monkeypatch):
    """answer(value) lets every probe return it, answer(ProbeError(...)) lets it fail."""

    def set_answer(value):
        def probe(code, python=sys.executable):
            if isinstance(value, Exception):
                raise value
            return value

        monkeypatch.setattr(doctor, "probe", probe)

    monkeypatch.delenv("MINIDORA_DEVICE", raising=False)
    return set_answer


def cuda(*devices, build="13.2"):
    return {"build": build, "devices": [list(device) for device in devices]}


# check, what its probe answers -> verdict, part of what it says, part of the command that fixes it
CASES = [
    ("torch", "99.0+cu132", "OK", "99.0+cu132", ""),
    ("torch", "1.13.1", "FAIL", "1.13.1, but the course needs torch>=", "pip install"),
    ("torch", ProbeError("No module named 'torch'"), "FAIL", "No module", "install --force-re"),
    ("torch", ProbeError("Python was killed by signal 4"), "FAIL", "signal 4", "install --force"),
    ("torchvision", "99.0", "OK", "99.0", ""),
    ("torchvision", "0.1.0", "NOTE", "the course needs torchvision>=", "pip install"),
    ("torchvision", ProbeError("No module"), "NOTE", "MNIST does not", "torch torchvision"),
    ("torchvision", ProbeError(NMS), "NOTE", "for the CPU and one for CUDA", "torch torchvision"),
    ("CUDA", cuda(), "OK", "no NVIDIA GPU found, the course runs on the CPU", ""),
    ("CUDA", cuda(("A100", 30e9, 40e9)), "OK", "A100, 40.0 GB, 30.0 GB free", ""),
    ("CUDA", ProbeError(KERNEL), "FAIL", "torch does not compute on this", "MINIDORA_DEVICE=cpu"),
    ("minidora", "0.1.0 on cpu", "OK", "0.1.0 on cpu", ""),
    ("minidora", ProbeError("MINIDORA_DEVICE must be"), "FAIL", "must be", "unset MINIDORA_DEVICE"),
    ("minidora", ProbeError("No module named 'tqdm'"), "FAIL", "'tqdm'", "install -e ."),
    ("Jupyter", sys.prefix, "OK", "kernel python3", ""),
    ("Jupyter", "/", "FAIL", "another environment's, / and not", "ipykernel install --sys-prefix"),
    ("Jupyter", ProbeError("No module"), "FAIL", "No module", "--force-reinstall jupyterlab"),
    ("ipywidgets", "8.1.9", "OK", "8.1.9", ""),
    ("ipywidgets", ProbeError("No module"), "FAIL", "No module", "--force-reinstall ipywidgets"),
]


@pytest.mark.parametrize(("name", "probed", "verdict", "found", "fix"), CASES)
def test_check(name, probed, verdict, found, fix, answer, monkeypatch):
    answer(probed)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    line = doctor.CHECKS[name]()
    assert line.verdict == verdict
    assert found in line.found
    assert fix in line.fix
    assert bool(line.fix) == (verdict != "OK")


def test_cuda_that_torch_does_not_see(answer, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda program: "/usr/bin/nvidia-smi")
    answer(cuda(build=None))
    line = doctor.check_cuda()
    assert line.verdict == "NOTE"
    assert "built for the CPU only" in line.found
    answer(cuda())
    line = doctor.check_cuda()
    assert line.verdict == "NOTE"
    assert "the driver is too old, or the GPU is hidden" in line.found


def test_a_gpu_that_fails_does_not_matter_to_who_uses_the_cpu(answer, monkeypatch):
    answer(ProbeError(KERNEL))
    monkeypatch.setenv("MINIDORA_DEVICE", "cpu")
    assert doctor.check_cuda().verdict == "NOTE"


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 2, "final", 0))
    line = doctor.check_python()
    assert line.verdict == "FAIL"
    assert "3.10.2 is too old, the course needs 3.11" in line.found
    assert "PYTHON=" in line.fix


def test_kernel_whose_python_is_gone(monkeypatch):
    real = doctor.probe
    monkeypatch.setattr(doctor, "kernel_command", lambda: ["/gone/bin/python", "-m", "x"])
    monkeypatch.setattr(
        doctor, "probe", lambda code, python=None: real(code, python) if python else 0
    )
    line = doctor.check_kernel()
    assert line.verdict == "FAIL"
    assert "/gone/bin/python" in line.found
    assert "ipykernel install --sys-prefix" in line.fix


def test_widgets_without_their_part_for_jupyterlab(answer, monkeypatch, tmp_path):
    answer("8.1.9")
    monkeypatch.setattr(doctor.sys, "prefix", str(tmp_path))
    line = doctor.check_widgets()
    assert line.verdict == "NOTE"
    assert "jupyterlab_widgets" in line.fix


@pytest.mark.parametrize(("free", "verdict"), [(0.1e9, "FAIL"), (0.6e9, "OK"), (80e9, "OK")])
def test_disk(free, verdict, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(100e9, 0, free))
    line = doctor.check_disk()
    assert line.verdict == verdict
    assert f"{free / 1e9:.1f}"[:2] in line.found


def test_an_environment_without_pip_is_mended_with_uv(monkeypatch):
    assert f"{sys.executable} -m pip install torch" == doctor.install("torch")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.install("torch") == f"uv pip install --python {sys.executable} torch"


def test_a_check_that_breaks_is_a_line(monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "CHECKS", {"disk": broken})
    [(name, line)] = doctor.examine()
    assert (name, line.verdict, line.found) == ("disk", "FAIL", "OSError: no such device")


def test_probe_says_how_a_process_ended():
    assert doctor.probe("print('noise'); print('[1, 2]')") == [1, 2]
    with pytest.raises(ProbeError, match=r"^ValueError: rank$"):
        doctor.probe("raise ValueError('rank')")
    with pytest.raises(ProbeError, match="killed by signal 11"):
        doctor.probe("import os; os.kill(os.getpid(), 11)")


def run_doctor(*stand_ins):
    """`minidora doctor`; modules in the folders stand_ins take the place of the real ones."""
    return subprocess.run(
        [Path(sys.executable).with_name("minidora"), "doctor"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, stand_ins))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_speaks_when_torch_is_broken(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    done = run_doctor(tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "FAIL torch       OSError: libcudart.so.13: cannot open" in done.stdout
    assert "NOTE minidora    not checked: it needs torch" in done.stdout
    assert "The course cannot run here yet" in done.stdout


def test_a_torchvision_of_another_build_is_explained(tmp_path, monkeypatch, capsys):
    (tmp_path / "torchvision.py").write_text(f"raise RuntimeError({NMS.split(': ')[1]!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "CHECKS", {"torchvision": doctor.check_torchvision})
    assert doctor.main() == 0  # the lessons do without it
    out = capsys.readouterr().out
    assert f"NOTE torchvision {NMS} (the lessons run without it" in out
    assert "install both from one place" in out
    assert out.endswith("The course runs here.\n")
