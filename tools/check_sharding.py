"""Kill and resume trainings with sharded weights and on several machines, and compare with uninterrupted runs.

`python tools/check_sharding.py [CASE ...]` runs `train.py` as docs/training.md launches it, on CPUs and at toy size.
Two machines are two launchers on this one, and `tests/engine/sharded_run.py` replaces `train.py` under FSDP, since
Accelerate itself shards on GPUs only. Prints a result for each case; the exit code is 0 only if all hold. Cases:

killed      SIGKILL to all processes, four times at random times, then resumed: equal, bit for bit
damaged     a flipped bit in the newest state: reported, the state before it resumed, the same result
stopped     SIGTERM to all processes: they save; resumed, the same result
processes   a state of two processes resumed with four: an error; with allow_changes, the losses of two
machines    two machines train as one does, and evaluate; one is lost, the other ends too; resumed, the same result
both        two machines with sharded weights train as one does
folder      two machines that do not share output_dir: an error in one sentence
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from brs_detr.data.synthetic import make_dataset  # noqa: E402
from brs_detr.engine.logging import read_metrics  # noqa: E402

# Equal for any number of processes: one ranking over all of them, no batch statistics.
SETTINGS = ["model.scope=global", "model.backbone.norm=group", "data.root=data", "data.workers=0"]
SETTINGS += ["train.epochs=3", "train.total_batch_size=4", "train.ema_decay=null", "train.warmup_steps=0"]
SETTINGS += ["train.save_every=2", "train.log_every=1"]
TIMINGS = ("images_per_s", "data_s", "step_s")
SHARDED, PLAIN = ("fsdp", "tests/engine/sharded_run.py"), ("multi_node", "train.py")


class Launch:
    """`accelerate launch` of a run in a scratch folder: one launcher for each of `machines`, each with its own group.

    Args:
        place: scratch folder, holds `data`.
        out: the run's folder in it.
        kind: (launch file, script).
        folders: working directory of each launcher; `place` for all if None.
    """

    def __init__(self, place, out, kind, *extra, processes=2, machines=1, folders=None, overrides=("--resume",)):
        file, script = kind
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.log = place / out, place / f"{out}.log"
        self.launchers = []
        for rank in range(machines):
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
            command += ["--config_file", str(ROOT / f"configs/accelerate/{file}.yaml"), "--machine_rank", str(rank)]
            command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
            command += ["--num_machines", str(machines), "--num_processes", str(processes), str(ROOT / script)]
            arguments = [str(ROOT / "configs/demo.yaml"), *SETTINGS, f"output_dir={out}"] if script != "eval.py" else []
            where = place if folders is None else folders[rank]
            with open(self.log, "a", encoding="utf-8") as log:
                self.launchers.append(
                    subprocess.Popen(
                        [*command, *arguments, *extra, *overrides],
                        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                        stdout=log,
                        stderr=log,
                        cwd=where,
                    )
                )

    def wait(self, seconds=300) -> int:
        """Return the highest exit code; kill the launchers when the time is up."""
        until = time.monotonic() + seconds
        try:
            return max(abs(launcher.wait(max(0.1, until - time.monotonic()))) for launcher in self.launchers)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return 124

    def wait_for_step(self, step: int) -> bool:
        """Wait until a step is logged; return False if the run ended before."""
        path = self.folder / "metrics.jsonl"
        while all(launcher.poll() is None for launcher in self.launchers):
            if path.exists() and any(line["step"] >= step for line in metrics(self.folder)):
                return True
            time.sleep(0.01)
        return False

    def signal(self, number: int, *, machine: int | None = None) -> None:
        """Send a signal to the processes of one machine, or of all: a launcher's processes are no group of its own."""
        launchers = self.launchers if machine is None else [self.launchers[machine]]
        for process in [process for launcher in launchers for process in family(launcher.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def printed(self, text: str) -> bool:
        """Return True if a text was printed by this run or those before it in its folder."""
        return text in self.log.read_text(encoding="utf-8")


def family(process: int) -> list[int]:
    """Return a process and all its descendants."""
    with contextlib.suppress(OSError):
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
        return [process, *(member for child in " ".join(lists).split() for member in family(int(child)))]
    return []


def metrics(folder: Path) -> list[dict]:
    """Read the complete lines of metrics.jsonl without their timings."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def differences(one: Path, other: Path) -> list[str]:
    """List the differences between two finished runs: weights, metrics, and the tensors of the last state."""
    faults = []
    for name in ("last.safetensors", "best.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        faults += [f"{name}: {key}" for key in a.keys() | b.keys() if not torch.equal(a[key], b[key])][:1]
    faults += [f"{a} and {b}" for a, b in zip_longest(metrics(one), metrics(other)) if a != b][:1]
    states = [sorted((run / "state").glob("step-*"))[-1] for run in (one, other)]
    for part in sorted(states[0].glob("*.safetensors")):  # equal tensors are equal bytes
        same = part.read_bytes() == (states[1] / part.name).read_bytes()
        faults += [] if same else [part.name]
    return faults


def same_end(place: Path, launch: Launch, reference: str) -> list[str]:
    """Wait for a run and compare it with another."""
    code = launch.wait()
    return [f"ended with {code}: {launch.log}"] if code else differences(place / reference, launch.folder)


def alone(place: Path, name: str, kind: tuple[str, str], processes: int = 2) -> str:
    """Train an uninterrupted run, once, and return its name."""
    if not (place / name / "last.safetensors").exists() and Launch(place, name, kind, processes=processes).wait():
        raise SystemExit((place / f"{name}.log").read_text())
    return name


def killed(place: Path) -> list[str]:
    chance, reference = random.Random(0), alone(place, "sharded", SHARDED)
    for step in (1, 3, 5, 8):
        launch = Launch(place, "killed", SHARDED)
        if not launch.wait_for_step(step):
            return [f"ended before step {step}: {launch.log}"]
        time.sleep(chance.uniform(0, 1))
        launch.signal(signal.SIGKILL)
        launch.wait()
    return same_end(place, Launch(place, "killed", SHARDED), reference)


def stopped_after(place: Path, name: str, kind: tuple[str, str], step: int, number: int) -> Launch:
    """Start a run, send a signal once a step is logged, and wait for its end."""
    launch = Launch(place, name, kind)
    launch.wait_for_step(step)
    launch.signal(number)
    launch.wait()
    return launch


def damaged(place: Path) -> list[str]:
    reference = alone(place, "sharded", SHARDED)
    stopped_after(place, "damaged", SHARDED, 5, signal.SIGKILL)
    newest = sorted((place / "damaged" / "state").glob("step-*"))[-1]
    part = newest / "optimizer.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    launch = Launch(place, "damaged", SHARDED)
    faults = same_end(place, launch, reference)
    named = launch.printed(f"{newest.name}: damaged ({part.name} has changed since it was written)")
    return faults + ([] if named else ["the damaged state was not reported"])


def stopped(place: Path) -> list[str]:
    reference = alone(place, "sharded", SHARDED)
    launch = stopped_after(place, "stopped", SHARDED, 3, signal.SIGTERM)
    if not launch.printed(": checkpoint saved at step"):
        return [f"nothing was saved: {launch.log}"]
    return same_end(place, Launch(place, "stopped", SHARDED), reference)


def processes(place: Path) -> list[str]:
    reference = alone(place, "sharded", SHARDED)
    stopped_after(place, "more", SHARDED, 5, signal.SIGKILL)
    refused = Launch(place, "more", SHARDED, processes=4)
    if refused.wait() == 0 or not refused.printed("launch processes: 2 -> 4"):
        return [f"four processes did not fail: {refused.log}"]
    if code := Launch(place, "more", SHARDED, "train.allow_changes=true", processes=4).wait():
        return [f"ended with {code}: {refused.log}"]
    pairs = zip(metrics(place / reference), metrics(place / "more"), strict=True)
    losses = [(a["loss"], b["loss"]) for a, b in pairs if a["kind"] == "train"]
    print("  losses of two processes and of two, then four:", *(f"{a:.4f}/{b:.4f}" for a, b in losses))
    return [f"{a} and {b}" for a, b in losses if abs(a - b) > 1e-3 * a]


def machines(place: Path) -> list[str]:
    reference = alone(place, "one", ("multi_node", "train.py"))
    faults = same_end(place, Launch(place, "two", PLAIN, machines=2), reference)
    score = Launch(place, "score", ("multi_node", "eval.py"), "two/last.safetensors", machines=2, overrides=())
    if code := score.wait():
        return [*faults, f"eval.py ended with {code}: {score.log}"]
    measured = json.loads((place / "two/evaluation/evaluation.json").read_text(encoding="utf-8"))["stats"]
    printed = [line for line in metrics(place / "two") if line["kind"] == "val"][-1]
    faults += [f"{k}: {measured[k]} not {printed[k]}" for k in ("AP", "AP50", "oLRP") if measured[k] != printed[k]]
    launch = Launch(place, "lost", PLAIN, machines=2)
    launch.wait_for_step(4)
    launch.signal(signal.SIGKILL, machine=1)
    began = time.monotonic()
    launch.wait(120)
    seconds, code = time.monotonic() - began, launch.launchers[0].returncode
    print(f"  the machine that was left ended after {seconds:.0f} s with {code}")
    faults += ["the machine that was left did not end by itself"] if code in (None, 0, -signal.SIGKILL) else []
    return faults + same_end(place, Launch(place, "lost", PLAIN, machines=2), reference)


def both(place: Path) -> list[str]:
    reference = alone(place, "sharded", SHARDED)
    return same_end(place, Launch(place, "both", SHARDED, machines=2), reference)


def folder(place: Path) -> list[str]:
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").symlink_to(place / "data")
    launch = Launch(place, "apart", PLAIN, machines=2, folders=[place, elsewhere])
    code = launch.wait()
    if code == 0 or not launch.printed("process 1 sees another folder there than process 0"):
        return [f"ended with {code}: {launch.log}"]
    return []


CASES = {case.__name__: case for case in (killed, damaged, stopped, processes, machines, both, folder)}


def main() -> int:
    """Run the cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names from the list above; default: all")
    chosen = parser.parse_args().cases or list(CASES)
    place, bad = Path(tempfile.mkdtemp(prefix="check_sharding-")), 0
    make_dataset(place / "data", train=14, val=5, image_size=64)
    for name in chosen:
        began = time.monotonic()
        faults = CASES[name](place)
        for fault in faults:
            print(f"  DIFFERENT: {fault}")
        print(f"{name}: {'DOES NOT HOLD' if faults else 'holds'} ({time.monotonic() - began:.0f} s)", flush=True)
        bad += bool(faults)
    if bad:
        print(f"logs: {place}")
    else:
        shutil.rmtree(place)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
