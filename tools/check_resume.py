"""Kill a training many times, resume it each time, and compare the result with that of an uninterrupted run.

`python tools/check_resume.py [--kills 20] [--seed 0] [setting=value ...]` trains `train.py` with the demo's detector,
or with `model.name=NAME` another one, on a small generated dataset with masks: loader workers, averaged weights, two
accumulated batches per step, states written in the middle of an epoch.
The signals alternate: SIGKILL at a random time, SIGKILL while a state or a weights file is being written, and SIGTERM
at a random time, after which the training must end with exit code 75. Each is sent to the process group.
The last lines are the result; the exit code is 0 only if everything is equal, bit for bit: weights, averaged weights,
optimizer, and every logged number but the timings. About five minutes on two cores.
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
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("settings", nargs="*", help="further settings, e.g. model.name=mask_rcnn optim.name=sgd")
    options = parser.parse_intermixed_args()
    settings = [*SETTINGS, *options.settings]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_dataset(place / "data", train=41, val=6, image_size=64)
        began = time.perf_counter()
        start(place, "reference", settings).wait()
        duration = time.perf_counter() - began
        print(f"uninterrupted: {duration:.0f} s")
        if not kill_and_resume(place, settings, options.kills, random.Random(options.seed)):
            return 1
        faults = compare(place / "reference", place / "killed")
    for fault in faults:
        print(f"DIFFERENT: {fault}")
    print(f"{options.kills} kills in a row: {'NOT THE SAME RUN' if faults else 'the same run, bit for bit'}")
    return 1 if faults else 0


def start(place: Path, name: str, settings: list[str]) -> subprocess.Popen[bytes]:
    """Start the training in a process group of its own, always with the same command."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/demo.yaml"), "--resume"]
    command += [f"data.root={place / 'data'}", f"output_dir={place / name}", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(place / f"{name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=place)


def kill_and_resume(place: Path, settings: list[str], kills: int, chance: random.Random) -> bool:
    """Kill and resume, then let the run finish; print its output and return False if it ended with an error."""
    folder, done = place / "killed", 0
    while done < kills:
        process = start(place, "killed", settings)
        number = signal.SIGTERM if done % 3 == 2 else signal.SIGKILL
        wait = wait_for_writing if done % 3 == 1 else wait_for_training
        moment = wait(folder, process, chance)
        if process.poll() is not None:
            if process.returncode or done < kills // 2:
                print(f"ended with {process.returncode} after {done} kills:\n{(place / 'killed.log').read_text()}")
                return False
            print(f"the run ended after {done} of {kills} kills. Give it more epochs.")
            return False
        os.killpg(process.pid, number)
        code, expected = process.wait(), ExitCode.INTERRUPTED if number == signal.SIGTERM else -number
        if code not in (expected, ExitCode.OK):  # 0: the signal came after the last step
            print(f"{number.name} {moment}: ended with {code}:\n{(place / 'killed.log').read_text()}")
            return False
        done += 1
        print(f"{number.name} {done}: {moment}; states {[state.name for state in states(folder)]}", flush=True)
    code = start(place, "killed", settings).wait()
    if code:
        print(f"the last run ended with {code}:\n{(place / 'killed.log').read_text()}")
    return code == 0


def states(folder: Path) -> list[Path]:
    """List the folder of states, unfinished ones included."""
    return sorted((folder / "state").glob("*step-*")) if (folder / "state").is_dir() else []


def wait_for_training(folder: Path, process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Wait until something is logged by this process, then a random time."""
    log = folder / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    wait_until(lambda: log.exists() and log.stat().st_size > before, process)
    time.sleep(chance.uniform(0, 4))
    return "at a random time"


def wait_for_writing(folder: Path, process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Wait until one of the next few unfinished states and weights files appears, then a few milliseconds."""
    seen = writes(folder)
    name = "nothing"
    for _ in range(chance.randrange(1, 6)):
        new = wait_until(lambda known=frozenset(seen): writes(folder) - known, process) or set()
        name = min((path.name for path, _ in new), default=name)
        seen |= new
    time.sleep(chance.uniform(0, 0.03))
    return f"while writing {name}"


def writes(folder: Path) -> set[tuple[Path, int]]:
    """List the files and folders that are being written, with their times: their names end in .partial."""
    places = [*folder.glob(".*.partial"), *(folder / "state").glob(".*.partial")]
    return {(path, modified(path)) for path in places if modified(path)}


def modified(path: Path) -> int:
    """Return the time a file was last written; 0 if it does not exist any more."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def wait_until(reached: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    """Poll every millisecond until `reached` returns a true value, which is returned, or the process ends (None)."""
    while process.poll() is None:
        if value := reached():
            return value
        time.sleep(0.001)
    return None


def compare(reference: Path, killed: Path) -> list[str]:
    """List the differences between the results of two runs."""
    faults = []
    newest = states(reference)[-1].name
    parts = [f"state/{newest}/{part}.safetensors" for part in ("model", "ema", "optimizer")]
    for name in ("last.safetensors", "best.safetensors", *parts):
        one, other = load_file(reference / name), load_file(killed / name)
        differ = [key for key in one.keys() | other.keys() if not torch.equal(one[key], other[key])]
        faults += [f"{name}: {len(differ)} tensors, {differ[0]} first"] if differ else []
    name = f"state/{newest}/trainer.json"
    faults += [] if (reference / name).read_bytes() == (killed / name).read_bytes() else [name]
    ours, theirs = (metrics(folder) for folder in (reference, killed))
    faults += [f"metrics.jsonl: {a} and {b}" for a, b in zip(ours, theirs) if a != b]
    faults += [f"metrics.jsonl: {len(ours)} and {len(theirs)} lines"] if len(ours) != len(theirs) else []
    return faults


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl without their timings."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
