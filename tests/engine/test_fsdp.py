"""Sharded weights: the same training as without, resuming, stopping, unsharded weights files, the launch files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, compare_versions
from safetensors.torch import save_file

from brs_detr.config import Config, ConfigError, apply_overrides, load_config
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.checkpoint import load_weights
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.state import latest_state
from brs_detr.run import setup
from brs_detr.run.launch import start_accelerator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OLD = compare_versions("accelerate", "<", "1.13")
DEMO = str(ROOT / "configs" / "demo.yaml")
LAUNCH_FILE = ROOT / "configs" / "accelerate" / "fsdp.yaml"
PLAIN = {"ACCELERATE_USE_FSDP": "false"}
BASE = [
    "data.workers=0",
    "train.epochs=1",
    "train.total_batch_size=4",
    "train.ema_decay=null",
    "train.warmup_steps=0",
    "train.log_every=1",
    "train.save_every=null",
]
ACCUMULATED = ["train.per_device_batch_size=1", "train.epochs=2", "train.save_every=1"]
SWIN = ["model.backbone.name=swin_tiny_patch4_window7_224", "train.freeze=[backbone.patch_embed]", "model.loss=rs"]
CO_DETR = ["model.name=co_detr", "model.backbone.norm=frozen", "model.backbone.frozen_stages=1"]
CO_DETR += ["train.freeze=[encoder, decoder.layers.0]", "model.backbone.checkpoint=WEIGHTS"]
BRS_DINO = ["model.name=brs_dino", "model.denoising.loss=rank", "model.denoising.queries=10"]
GLOBAL = [*BRS_DINO, "model.scope=global", "train.freeze=[backbone]"]
BF16 = ["train.precision=bf16"]
PAIRS = {  # settings of the run without and of the run with sharded weights
    "accumulated": (ACCUMULATED, ACCUMULATED),
    "swin": (SWIN, [*SWIN, "model.backbone.activation_checkpointing=true"]),
    "co_detr": (CO_DETR, CO_DETR),
    "global": (GLOBAL, GLOBAL),
    "bf16": (BF16, BF16),
}


def sharding():
    """The environment that `accelerate launch` makes of configs/accelerate/fsdp.yaml."""
    settings = yaml.safe_load(LAUNCH_FILE.read_text())["fsdp_config"]
    return {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": str(settings["fsdp_version"]),
        "FSDP_AUTO_WRAP_POLICY": settings["fsdp_auto_wrap_policy"],
        "FSDP_TRANSFORMER_CLS_TO_WRAP": settings["fsdp_transformer_layer_cls_to_wrap"],
        "FSDP_RESHARD_AFTER_FORWARD": str(settings["fsdp_reshard_after_forward"]).lower(),
        "FSDP_STATE_DICT_TYPE": settings["fsdp_state_dict_type"],
    }


SHARDED = sharding()


class Runs:
    """The folder of all runs; `codes[name]` are the exit codes, one a process."""

    def __init__(self, folder):
        self.folder = folder
        self.codes = {}

    def training(self, name):
        return [line for line in read_metrics(self.folder / name / "metrics.jsonl") if line["kind"] == "train"]

    def validation(self, name):
        return [line for line in read_metrics(self.folder / name / "metrics.jsonl") if line["kind"] == "val"]

    def weights(self, name):
        return load_weights(self.folder / name / "last.safetensors").tensors

    def printed(self, name, process=0):
        return (self.folder / f"{name}.{process}.txt").read_text()


def with_weights(settings, folder):
    """The settings, with the path of the backbone's weights; without any, frozen parts are refused."""
    return [setting.replace("WEIGHTS", str(folder / "backbone.safetensors")) for setting in settings]


def jobs_of(folder, data):
    """Every run that a test below looks at, in order."""

    def job(name, *settings, environment=SHARDED, out=None, flags=("--overwrite",), **more):
        place = [f"data.root={data}", f"output_dir={folder / (out or name)}"]
        arguments = [DEMO, *BASE, *place, *with_weights(settings, folder), *flags]
        return {"name": name, "arguments": arguments, "environment": environment, **more}

    jobs = []
    for name, (without, sharded) in PAIRS.items():
        tiny = {"tiny_swin": name == "swin"}
        jobs.append(job(f"{name}-plain", *without, environment=PLAIN, **tiny))
        jobs.append(job(name, *sharded, **tiny))
    resume = {"flags": ["--resume"], "out": "killed"}
    score = {"name": "score", "script": "eval", "arguments": [str(folder / "co_detr")], "environment": SHARDED}
    return [
        *jobs,
        job("killed", *ACCUMULATED, kill=3),
        job("unsharded", *ACCUMULATED, environment=PLAIN, **resume),
        job("resumed", *ACCUMULATED, **resume),
        job("begun", *ACCUMULATED, kill=3),
        job("changed", *ACCUMULATED, "train.allow_changes=true", environment=PLAIN, flags=["--resume"], out="begun"),
        job("bf16-killed", *BF16, "train.save_every=1", environment=PLAIN, kill=1),
        job("bf16-resumed", *BF16, "train.save_every=1", environment=PLAIN, flags=["--resume"], out="bf16-killed"),
        job("poisoned", poison=1),
        job("sigterm", terminate=0),
        job("ema", "train.ema_decay=0.9"),
        job("dry", *ACCUMULATED, flags=["--dry-run"]),
        score,
    ]


def make_data(folder):
    """Three images to validate on: the processes have different numbers of forward passes to make.

    Objects lie all over them, so that a detector finds some after two steps.
    """
    data = make_dataset(folder / "data", train=8, val=3, image_size=64)
    path = data / "annotations" / "val.json"
    content = json.loads(path.read_text())
    places = [
        (x, y, side) for side in (12, 16, 24, 32, 48) for x in range(0, 65 - side, 8) for y in range(0, 65 - side, 8)
    ]
    content["annotations"] = [
        {"image_id": i["id"], "category_id": c["id"], "bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
        for i in content["images"]
        for c in content["categories"]
        for x, y, side in places
    ]
    content["annotations"] = [{"id": number, **a} for number, a in enumerate(content["annotations"], 1)]
    path.write_text(json.dumps(content))
    return data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if OLD:
        pytest.skip("FSDP needs accelerate 1.13 or newer")
    folder = tmp_path_factory.mktemp("runs")
    data = make_data(folder)
    save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), folder / "backbone.safetensors")
    (folder / "jobs.json").write_text(json.dumps(jobs_of(folder, data)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("many_runs.py")), str(folder / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Runs(folder)
    codes = [json.loads((folder / f"codes.{process}.json").read_text()) for process in (0, 1)]
    found.codes = {name: [code[name] for code in codes] for name in codes[0]}
    return found


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "bf16"])
def test_sharded_training_is_the_unsharded_one(runs, name):
    assert runs.codes[name] == runs.codes[f"{name}-plain"] == [0, 0], runs.printed(name)
    plain, sharded = runs.training(f"{name}-plain"), runs.training(name)
    assert len(plain) == len(sharded) == (4 if name == "accumulated" else 2)
    for number, (ours, theirs) in enumerate(zip(sharded, plain)):
        # weights that differ in their last bits may later match one query otherwise
        near = 5e-2 if number else 1e-4
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=near, abs=near)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=near)


def flat(tensors, names):
    return torch.cat([tensors[name].double().flatten() for name in names])


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("bf16", "swin")])
def test_sharded_weights_go_where_the_unsharded_ones_go(runs, name):
    """AdamW divides a gradient by its size, so rounding may turn a step whose gradient is 0."""
    config = apply_overrides(load_config(DEMO), [*BASE, *with_weights(PAIRS[name][0], runs.folder)])
    start = setup.build_detector(config, 5).state_dict()
    plain, sharded = runs.weights(f"{name}-plain"), runs.weights(name)
    assert {key: t.shape for key, t in sharded.items()} == {key: t.shape for key, t in plain.items()}
    trained = [key for key in plain if not torch.equal(plain[key], start[key])]
    frozen = [key for key in plain if key not in trained]
    assert all(torch.equal(sharded[key], start[key]) for key in frozen)
    frozen_parts = {"co_detr": ("encoder.", "decoder.layers.0.", "backbone.layer1."), "global": ("backbone.",)}
    for part in frozen_parts.get(name, ()):
        assert not any(key.startswith(part) and "num_batches" not in key for key in trained)
    moved = flat(plain, trained) - flat(start, trained)
    assert (flat(sharded, trained) - flat(plain, trained)).norm() < 0.01 * moved.norm()


def test_layers_of_the_classes_in_the_launch_file_are_sharded_one_by_one(runs):
    assert "layers sharded one by one: 6 PadThenRollBlock, 1 EncoderLayer, 2 DecoderLayer\n" in runs.printed("swin")
    kinds = "FSDPBRSDETR FSDPDecoderLayer FSDPEncoderLayer FSDPPadThenRollBlock"
    assert f"sharded: {kinds}\n" in runs.printed("swin") and "sharded:\n" in runs.printed("swin-plain")
    assert "1 EncoderLayer, 2 DecoderLayer; not in this detector: PadThenRollBlock\n" in runs.printed("global")


def test_bf16_with_sharded_weights_stays_close(runs):
    """The first step sees the same weights; then rounding to bf16 turns single decisions of the matching."""
    assert runs.codes["bf16"] == runs.codes["bf16-plain"] == [0, 0], runs.printed("bf16")
    first, theirs = runs.training("bf16")[0], runs.training("bf16-plain")[0]
    assert first["terms"] == pytest.approx(theirs["terms"], rel=1e-4, abs=1e-4)
    assert first["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-2)
    assert runs.training("bf16")[1]["loss"] == pytest.approx(runs.training("bf16-plain")[1]["loss"], rel=0.1)
    assert all(tensor.dtype != torch.bfloat16 for tensor in runs.weights("bf16").values())


def test_killed_in_an_epoch_and_resumed_a_sharded_run_is_the_one_never_killed(runs):
    assert runs.codes["killed"] == [-9, -9] and runs.codes["resumed"] == [0, 0], runs.printed("resumed")
    assert "state/step-00000003" in runs.printed("resumed")
    timings = ("images_per_s", "data_s", "step_s")
    for line, theirs in zip(runs.training("killed"), runs.training("accumulated"), strict=True):
        assert {k: v for k, v in line.items() if k not in timings} == {k: theirs[k] for k in theirs if k not in timings}
    ours, theirs = runs.weights("killed"), runs.weights("accumulated")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert runs.validation("killed") == runs.validation("accumulated")


def test_killed_and_resumed_under_bf16_without_sharding_too(runs):
    assert runs.codes["bf16-killed"] == [-9, -9] and runs.codes["bf16-resumed"] == [0, 0], runs.printed("bf16-resumed")
    ours, theirs = runs.weights("bf16-killed"), runs.weights("bf16-plain")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_sharded_state_is_refused_by_a_launch_that_does_not_shard(runs):
    assert runs.codes["unsharded"] == [2, 2]
    assert "launch sharded (FSDP): True -> False" in runs.printed("unsharded")


def test_a_launch_that_does_not_shard_goes_on_with_a_sharded_state_if_that_is_allowed(runs):
    assert runs.codes["changed"] == [0, 0], runs.printed("changed")
    plain, changed = runs.training("accumulated-plain"), runs.training("begun")
    assert [line["step"] for line in changed] == [line["step"] for line in plain]
    assert changed[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=5e-2)


def test_a_damaged_state_is_named_and_the_state_before_it_used(runs, tmp_path):
    shutil.copytree(runs.folder / "accumulated" / "state", tmp_path / "state")
    newest, _ = latest_state(tmp_path / "state")
    part = newest / "optimizer.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    used, complaints = latest_state(tmp_path / "state")
    assert used.name < newest.name
    assert len(complaints) == 1 and part.name in complaints[0]


def test_a_loss_that_is_not_finite_in_one_process_stops_all(runs):
    assert runs.codes["poisoned"] == [3, 3]
    for process in (0, 1):
        said = runs.printed("poisoned", process)
        assert "step 1: process 1: loss term encoder.l1 is not finite" in said and "nonfinite-1-process1.pt" in said
        saved = torch.load(runs.folder / "poisoned" / f"nonfinite-1-process{process}.pt", weights_only=True)
        full = runs.weights("accumulated")
        assert {name: t.shape for name, t in saved["weights"].items()} == {name: t.shape for name, t in full.items()}


def test_a_signal_to_one_process_stops_all_with_a_saved_state(runs):
    assert runs.codes["sigterm"] == [75, 75]
    assert latest_state(runs.folder / "sigterm" / "state")[0].name == "step-00000001"


def test_an_averaged_model_is_refused_in_one_sentence(runs):
    assert runs.codes["ema"] == [2, 2] and "error: train.ema_decay" in runs.printed("ema")


def test_a_dry_run_steps_all_parameters(runs):
    assert runs.codes["dry"] == [0, 0]
    model = setup.build_detector(load_config(DEMO), 5)
    parameters = sum(p.numel() for p in model.parameters())
    assert f"an optimizer step of {parameters:,} parameters" in runs.printed("dry")


def test_evaluating_the_weights_gives_what_the_training_printed(runs):
    """eval.py under the launch file of FSDP: it does not shard."""
    assert runs.codes["score"] == [0, 0], runs.printed("score")
    figures = json.loads((runs.folder / "co_detr" / "evaluation" / "evaluation.json").read_text())["stats"]
    [validated] = runs.validation("co_detr")
    assert validated["AP50"] > 0
    for name in ("AP", "AP50", "AR100", "oLRP"):
        assert figures[name] == pytest.approx(validated[name], abs=1e-6), name


REFUSED = [("2", "accelerate 1.13 or newer" if OLD else "supports FSDP on GPUs only"), ("1", "Set fsdp_version: 2")]


@pytest.mark.parametrize("version, reason", REFUSED)
def test_sharding_that_would_be_left_out_in_silence_is_refused(monkeypatch, version, reason):
    for name, value in {**SHARDED, "FSDP_VERSION": version, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    on_cpus = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    monkeypatch.setattr("brs_detr.run.launch.Accelerator", lambda **_: on_cpus)
    with pytest.raises(ConfigError, match=reason):
        start_accelerator(Config())


@pytest.mark.parametrize("name, kind", [("fsdp", "FSDP"), ("multi_node", "MULTI_GPU")])
def test_accelerate_reads_the_launch_files(name, kind):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes % config.num_machines == 0
