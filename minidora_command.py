"""The `minidora` command starts here, beside the package and not in it.

Importing minidora imports torch. A torch that is broken or missing is what `minidora doctor` is
for, so that one command runs without the package; every other one is in minidora/cli.py.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    if sys.argv[1:] == ["doctor"]:
        doctor = Path(__file__).with_name("minidora") / "doctor.py"
        runpy.run_path(str(doctor), run_name="__main__")
        return
    from minidora.cli import app

    app()
