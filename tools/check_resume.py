"""Kill a training many times, resume it each time, and compare its end with that of a run that was never killed.

`python tools/check_resume.py [--kills 20] [--seed 0]` trains `train.py` with the demo's detector on a small generated
dataset: loader workers, averaged weights, two accumulated batches a step, states written in the middle of an epoch.
In turn there is SIGKILL at a random time, SIGKILL while a state or a weights file is being written, and SIGTERM at a
random time, after which the training must end with exit code 75. Each goes to the whole process group, workers
included. The last lines are the verdict; the exit code is 0 only if all is equal, bit for bit: weights, averaged
weights, optimizer, and every logged figure but the timings. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from brs_detr.data.synthetic import make_dataset  # noqa: E402
from brs_detr.engine.logging import read_metrics  # noqa: E402
from brs_detr.exit_codes import ExitCode  # noqa: E402

SETTINGS = [
    "data.workers=2",
    "train.epochs=6",
    "train.total_batch_size=4",
    "train.per_device_batch_size=2",
    "train.save_every=3",
    "train.log_every=2",
    "train.ema_decay=0.9",
    "train.warmup_steps=5",
]
TIMINGS = ("images_per_s", "data_s", "step_s")


def main() -> int:
    """Run the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_dataset(place / "data", train=41, val=6, image_size=64)
        began = time.perf_counter()
        start(place, "whole").wait()
        duration = time.perf_counter() - began
        print(f"never killed: {duration:.0f} s")
        if not kill_and_resume(place, options.kills, random.Random(options.seed)):
            return 1
        faults = compare(place / "whole", place / "killed")
    for fault in faults:
        print(f"DIFFERENT: {fault}")
    print(f"{options.kills} kills in a row: {'NOT THE SAME RUN' if faults else 'the same run, bit for bit'}")
    return 1 if faults else 0


def start(place: Path, name: str) -> subprocess.Popen:
    """The training, as a process group of its own, always with the same command."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/demo.yaml"), "--resume"]
    command += [f"data.root={place / 'data'}", f"output_dir={place / name}", *SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(place / f"{name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=place)


def kill_and_resume(place: Path, kills: int, chance: random.Random) -> bool:
    """Kill and resume, then let the run end; False, with what it said, where a run ended by itself with an error."""
    folder, done = place / "killed", 0
    while done < kills:
        process = start(place, "killed")
        number = signal.SIGTERM if done % 3 == 2 else signal.SIGKILL
        wait = wait_for_writing if done % 3 == 1 else wait_for_training
        moment = wait(folder, process, chance)
        if process.poll() is not None:
            if process.returncode or done < kills // 2:
                print(f"ended with {process.returncode} after {done} kills:\n{(place / 'killed.log').read_text()}")
                return False
            print(f"the run has ended after {done} kills: fewer than asked for; give it more epochs")
            return False
        os.killpg(process.pid, number)
        code, expected = process.wait(), ExitCode.INTERRUPTED if number == signal.SIGTERM else -number
        if code not in (expected, ExitCode.OK):  # the last step may have been done
            print(f"{number.name} {moment}: ended with {code}:\n{(place / 'killed.log').read_text()}")
            return False
        done += 1
        print(f"{number.name} {done}: {moment}; states {[state.name for state in states(folder)]}", flush=True)
    code = start(place, "killed").wait()
    if code:
        print(f"the last run ended with {code}:\n{(place / 'killed.log').read_text()}")
    return code == 0


def states(folder: Path) -> list[Path]:
    """What lies in the folder of states, unfinished ones included."""
    return sorted((folder / "state").glob("*step-*")) if (folder / "state").is_dir() else []


def wait_for_training(folder: Path, process: subprocess.Popen, chance: random.Random) -> str:
    """Wait until something is logged by this process, then a random time."""
    log = folder / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    wait_until(lambda: log.exists() and log.stat().st_size > before, process)
    time.sleep(chance.uniform(0, 4))
    return "at a random time"


def wait_for_writing(folder: Path, process: subprocess.Popen, chance: random.Random) -> str:
    """Wait until one of the next few unfinished states and weights files appears, then some milliseconds."""
    seen = writes(folder)
    name = "nothing"
    for _ in range(chance.randrange(1, 6)):
        new = wait_until(lambda known=frozenset(seen): writes(folder) - known, process) or set()
        name = min((path.name for path, _ in new), default=name)
        seen |= new
    time.sleep(chance.uniform(0, 0.03))
    return f"while writing {name}"


def writes(folder: Path) -> set[tuple[Path, int]]:
    """Files and folders that are being written, with the time: their names end in .partial."""
    places = [*folder.glob(".*.partial"), *(folder / "state").glob(".*.partial")]
    return {(path, modified(path)) for path in places if modified(path)}


def modified(path: Path) -> int:
    """When a file was last written; 0 once it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def wait_until(reached: Callable[[], Any], process: subprocess.Popen) -> Any:
    """Wait, looking every millisecond, until something is so or the process has ended; returns what was so."""
    while process.poll() is None:
        if found := reached():
            return found
        time.sleep(0.001)
    return None


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between the ends of two runs."""
    faults = []
    newest = states(whole)[-1].name
    parts = [f"state/{newest}/{part}.safetensors" for part in ("model", "ema", "optimizer")]
    for name in ("last.safetensors", "best.safetensors", *parts):
        one, other = load_file(whole / name), load_file(killed / name)
        differ = [key for key in one.keys() | other.keys() if not torch.equal(one[key], other[key])]
        faults += [f"{name}: {len(differ)} tensors, {differ[0]} first"] if differ else []
    name = f"state/{newest}/trainer.json"
    faults += [] if (whole / name).read_bytes() == (killed / name).read_bytes() else [name]
    one, other = (figures(folder) for folder in (whole, killed))
    faults += [f"metrics.jsonl: {a} and {b}" for a, b in zip(one, other) if a != b]
    faults += [f"metrics.jsonl: {len(one)} and {len(other)} lines"] if len(one) != len(other) else []
    return faults


def figures(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without their timings."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
