"""Sharded weights: the same training as without, whole weights files, and launch files that Accelerate reads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from brs_detr import run
from brs_detr.config import Config, ConfigError
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.checkpoint import load_weights
from brs_detr.launch import start_accelerator

ROOT = Path(__file__).resolve().parents[2]
SHARDING = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "EncoderLayer,DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def launch(script, out, data, environment):
    """(exit code, output) of one epoch in two processes on CPUs."""
    settings = [
        f"data.root={data}",
        f"output_dir={out}",
        "data.workers=0",
        "train.epochs=1",
        "train.total_batch_size=4",
    ]
    settings += ["train.ema_decay=null", "train.warmup_steps=0", "train.log_every=1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(ROOT / script), str(ROOT / "configs/demo.yaml"), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    # three pictures to validate on: the processes have different numbers of forward passes to make
    return make_dataset(tmp_path_factory.mktemp("scenes"), train=4, val=3, image_size=64)


def test_sharded_training_is_the_unsharded_one_and_leaves_whole_weights(tmp_path, data):
    figures = {}
    for script, environment in (("train.py", {}), ("tests/engine/sharded_run.py", SHARDING)):
        code, output = launch(script, tmp_path / Path(script).stem, data, environment)
        assert code == 0, output[-4000:]
        lines = map(json.loads, (tmp_path / Path(script).stem / "metrics.jsonl").read_text().splitlines())
        figures[script] = next(line for line in lines if line["kind"] == "train")
    plain, sharded = figures.values()
    assert sharded["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert sharded["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-3)
    whole, parts = (load_weights(tmp_path / name / "last.safetensors") for name in ("train", "sharded_run"))
    assert {n: t.shape for n, t in parts.tensors.items()} == {n: t.shape for n, t in whole.tensors.items()}
    for name, tensor in parts.tensors.items():  # AdamW's first step moves a weight by its rate, whichever its sign
        assert (tensor.double() - whole.tensors[name].double()).abs().max() < 5e-3, name
    assert list((tmp_path / "sharded_run" / "state").glob("step-*/optimizer_0/*.distcp"))  # it really was sharded
    model, *_ = run.restore(tmp_path / "sharded_run")
    assert not model.training


@pytest.mark.parametrize("version, reason", [("2", "Accelerate has for GPUs only"), ("1", "set fsdp_version: 2")])
def test_sharding_that_would_be_left_out_in_silence_is_refused(monkeypatch, version, reason):
    for name, value in {**SHARDING, "FSDP_VERSION": version, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    on_cpus = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    monkeypatch.setattr("brs_detr.launch.Accelerator", lambda **_: on_cpus)
    with pytest.raises(ConfigError, match=reason):
        start_accelerator(Config())


@pytest.mark.parametrize("name, kind", [("fsdp", "FSDP"), ("multi_node", "MULTI_GPU")])
def test_accelerate_reads_the_launch_files(name, kind):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes % config.num_machines == 0
    if name == "fsdp":
        classes = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        source = "".join(path.read_text() for path in (ROOT / "brs_detr" / "models").glob("*.py"))
        assert all(f"class {cls}(" in source for cls in classes)
