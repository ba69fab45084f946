"""Trainings of `train.py` with loader workers that meet what a week brings: `interrupted_runs.py FOLDER [NAME ...]`.

Each run is forked off this process, which has imported everything, as the leader of a process group of its own. What
happens to it happens there: a signal to the group, files that become pipes or go away, a killed worker. A line is
printed for each one that holds: the exit code, what was said, a state to resume from, and after resuming the end of the
run that was never interrupted, bit for bit.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from brs_detr import train  # noqa: E402
from brs_detr.data import storage  # noqa: E402
from brs_detr.data.synthetic import make_dataset  # noqa: E402
from brs_detr.engine.logging import read_metrics  # noqa: E402
from brs_detr.engine.state import find_fault  # noqa: E402
from brs_detr.engine.trainer import Trainer  # noqa: E402
from brs_detr.run import setup  # noqa: E402

SPEC = spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
toy = module_from_spec(SPEC)
SPEC.loader.exec_module(toy)

SETTINGS = [
    "data.workers=1",
    "data.augment.short_sides=[64]",
    "data.test_short_side=64",
    "data.retry_seconds=20",
    "train.epochs=2",
    "train.total_batch_size=2",
    "train.log_every=1",
    "train.save_every=null",
    "train.ema_decay=0.9",
]
STEP = 2  # when so many steps are done of the eight of an epoch, things happen
LIMIT = 240  # seconds


class Detector(toy.ToyDetector):
    """The toy, for boxes in pixels and for images without any."""

    def forward(self, images, targets):
        none = torch.zeros(1, 4)
        return super().forward(images, targets and [{"boxes": torch.cat([t["boxes"] / 64, none])} for t in targets])


def group_gets_sigterm(trainer):
    os.killpg(0, signal.SIGTERM)


def group_gets_sigterm_while_waiting(trainer):
    files_become_pipes(trainer)
    threading.Timer(1.5, os.killpg, (0, signal.SIGTERM)).start()


def read_file(path, *arguments):
    """Reads as the product does, but a pipe blocks, as a file server does that no longer answers."""
    if Path(path).is_fifo():
        open(path, "rb").close()
    return read(path, *arguments)


def files_become_pipes(trainer):
    """Reading them blocks, see `read_file`."""
    for path in images("train"):
        path.rename(path.with_suffix(".away"))
        os.mkfifo(path)


def files_go_away(trainer):
    for path in images("train"):
        path.rename(path.with_suffix(".away"))


def files_come_back(trainer):
    files_go_away(trainer)
    threading.Timer(1.5, restore).start()


def a_worker_is_killed(trainer):
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def this_process_is_killed(trainer):
    files_become_pipes(trainer)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


# name: (what happens, further settings, exit code, what is said)
CASES = {
    "stopped": (group_gets_sigterm, [], 75, "Received SIGTERM: checkpoint saved at step 3"),
    "stopped at the start of the workers": (None, [], 75, "Received SIGTERM: checkpoint saved at step 0"),
    "stopped in validation": (None, [], 75, "Received SIGTERM: checkpoint saved at step 8"),
    "stopped while waiting": (group_gets_sigterm_while_waiting, [], 75, "Received SIGTERM: checkpoint saved at step "),
    "stopped while waiting without workers": (
        group_gets_sigterm_while_waiting,
        ["data.workers=0"],
        75,
        "saved at step 3",
    ),
    "a hung storage": (files_become_pipes, ["data.timeout=2", "data.retry_seconds=1"], 74, "s (being read: "),
    "a storage that comes back": (files_come_back, [], 0, "Retrying for 20 s"),
    "a storage that does not": (
        files_go_away,
        ["data.retry_seconds=1"],
        74,
        "No such file or directory, retried for 1 s",
    ),
    "a killed worker": (a_worker_is_killed, [], 71, "was killed by SIGKILL, most likely for lack of memory"),
    "a killed process": (this_process_is_killed, [], -9, ""),
}


def images(split):
    return sorted((data / "images" / split).glob("*.png")) + sorted((data / "images" / split).glob("*.jpg"))


def restore():
    for path in (data / "images").rglob("*.away"):
        target = next(path.with_suffix(end) for end in (".png", ".jpg") if path.with_suffix(end).name in NAMES)
        path.replace(target)


def run(name, folder, *settings):
    """The exit code of a run to its end; what it says goes to run.txt."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(folder.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        code = 99
        try:
            with mishap(name):
                command = [str(ROOT / "configs/demo.yaml"), "--resume", f"data.root={data}", f"output_dir={folder}"]
                code = train.main([*command, *SETTINGS, *settings])
        except BaseException:
            traceback.print_exc()
        # as at the end of a script, with what Python does for threads and children
        sys.exit(code)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), group_of(pid), time.monotonic() - began
        if time.monotonic() - began > LIMIT:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "no end", [], LIMIT
        time.sleep(0.05)


def group_of(leader):
    """The processes that are left of a run, a moment after its end."""
    for _ in range(50):
        left = [p for p in Path("/proc").glob("[0-9]*") if belongs(p, leader)]
        if not left:
            return []
        time.sleep(0.1)
    return left


def belongs(process, leader):
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[2]) == leader and fields[0] != "Z"


def mishap(name):
    """Patches the classes of this process so that something happens to the run."""
    if name is None:
        return mock.patch.object(Trainer, "undisturbed", None, create=True)
    if name == "stopped at the start of the workers":
        start = multiprocessing.process.BaseProcess.start

        def start_and_signal(process):
            start(process)
            os.killpg(0, signal.SIGTERM)

        return mock.patch.object(multiprocessing.process.BaseProcess, "start", start_and_signal)
    if name == "stopped in validation":
        validate = Trainer._evaluate

        def signal_and_validate(trainer):
            threading.Timer(0.0, os.killpg, (0, signal.SIGTERM)).start()
            validate(trainer)

        return mock.patch.object(Trainer, "_evaluate", signal_and_validate)
    step, happens = Trainer.step, CASES[name][0]

    def step_and_more(trainer, group):
        if trainer.position.step == STEP:
            happens(trainer)
        return step(trainer, group)

    return mock.patch.object(Trainer, "step", step_and_more)


def figures(folder):
    timings = ("images_per_s", "data_s", "step_s")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_metrics(folder / "metrics.jsonl")]


def check(name, folder):
    _, settings, expected, words = CASES[name]
    code, left, seconds = run(name, folder, *settings)
    restore()
    said = folder.with_suffix(".txt").read_text()
    assert code == expected, f"exit code {code} after {seconds:.1f} s: {said[-3000:]}"
    assert words in said, said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    assert not left, left
    if code not in (0, -9):
        states = sorted((folder / "state").iterdir())
        assert states and all(find_fault(state) is None for state in states), states
    if code:
        again, left, _ = run(None, folder)
        assert (again, left) == (0, []), folder.with_suffix(".txt").read_text()[-3000:]
    reference = data.parent / "reference"
    ours, theirs = (load_file(place / "last.safetensors") for place in (folder, reference))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert figures(folder) == figures(reference), (figures(folder), figures(reference))
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    read, storage.read_file = storage.read_file, read_file
    setup.build_detector = lambda *_, **__: Detector()  # all but the detector is as in a real run
    if sys.argv[1] == "train":  # under a launcher
        sys.exit(train.main([*sys.argv[2:], *SETTINGS]))
    place = Path(sys.argv[1])
    data = place / "data"
    make_dataset(data, train=16, val=3, image_size=64)
    NAMES = {path.name for split in ("train", "val") for path in images(split)}
    assert run(None, place / "reference")[0] == 0, (place / "reference.txt").read_text()
    for name in sys.argv[2:] or CASES:
        folder = place / name.replace(" ", "_")
        try:
            print(f"holds: {name} ({check(name, folder):.1f} s)", flush=True)
        except Exception:
            print(f"fails: {name}\n{traceback.format_exc()}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
