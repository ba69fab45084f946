"""Several machines, as docs/training.md launches them: here two launchers of one process each on this one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.checkpoint import load_weights
from brs_detr.engine.logging import read_metrics

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
LAUNCH += ["--config_file", str(ROOT / "configs/accelerate/multi_node.yaml"), "--num_processes", "2"]
TRAIN = [str(ROOT / "train.py"), str(ROOT / "configs/demo.yaml"), "data.workers=0", "train.epochs=1"]
TRAIN += ["train.total_batch_size=4", "train.warmup_steps=0", "train.log_every=1"]


def start(out, data, *launch):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*LAUNCH, *launch, *TRAIN, f"data.root={data}", f"output_dir={out}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_two_machines_train_and_validate_as_two_processes_of_one(tmp_path):
    data = make_dataset(tmp_path / "data", train=4, val=3, image_size=64)
    port = free_port()
    launchers = [start(tmp_path / "one", data, "--num_machines", "1", "--main_process_port", "0")]
    for machine in ("0", "1"):
        place = ["--machine_rank", machine, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        launchers.append(start(tmp_path / "two", data, *place))
    for launcher in launchers:
        output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, output[-4000:]
    timings = ("images_per_s", "data_s", "step_s")
    logged = [
        [{k: v for k, v in line.items() if k not in timings} for line in read_metrics(tmp_path / out / "metrics.jsonl")]
        for out in ("one", "two")
    ]
    assert len(logged[0]) == 2 and logged[0] == logged[1]
    one, two = (load_weights(tmp_path / out / "last.safetensors").tensors for out in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
