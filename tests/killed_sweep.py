"""Run a sweep that is killed 20 times, and say what was left each time.

    python tests/killed_sweep.py FOLDER        # a line of JSON a kill, then one of the whole

torch is imported once; each attempt is a fork of this process, and none but the forks train.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from minidora import sweep
from minidora.grid import Grid

GRID = Grid(methods=("full", "lora"), ranks=(1, 2, 4, 8), rates=(0.01, 0.02), seeds=2, length=1)
KILLS = 20
sweep.SIZES = dict.fromkeys(sweep.SIZES, 60)  # images: a kill matters, not what is learned


def attempt(folder: Path) -> int:
    """Start the sweep in a process of its own."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        sweep.run(GRID, folder, progress=False)
        os._exit(0)
    return pid


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("results-*.jsonl"))


def main(folder: Path) -> None:
    sweep._images("digits"), sweep.machine(), torch.vmap(torch.sin)(torch.ones(2))  # imports
    chance = random.Random(0)
    kills = 0
    while kills < KILLS:
        before, pid = lines(folder), attempt(folder)
        # Half of the kills come at any moment, half soon after a group was written: on a busy
        # machine the first half may never see one.
        ended, wait_for = (0, 0), before + chance.choice((0, 4))
        while lines(folder) < wait_for and ended == (0, 0):
            ended = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3))
        if ended == (0, 0):
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        if ended[1] == 0:  # it had finished: the next one begins anew
            (folder / "results-0.jsonl").write_bytes(b"")
            continue
        kills += 1
        print(json.dumps({"before": before, "after": lines(folder)}))
    assert os.waitpid(attempt(folder), 0)[1] == 0
    print(json.dumps({"rows": lines(folder), "size": GRID.size}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
