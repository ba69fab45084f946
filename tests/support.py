"""Set-up that tests in several folders share: the smallest settings, programs as modules, kills, a fresh Accelerate.

`tests/conftest.py` makes it importable as `support`; programs that tests start insert the folder themselves.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from brs_detr.data.coco import CocoDetection
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.trainer import Trainer
from brs_detr.evaluation.coco_eval import evaluate_coco
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.models.config import BackboneConfig
from brs_detr.models.heads.step import RegionStep, read_counts
from brs_detr.ops.boxes import Regions

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "configs" / "demo.yaml")

# Overrides of the demo's recipe, for a training of seconds; a test appends its own, of which the last one counts.
SMALL_DETECTOR = [
    "model.dim=64",
    "model.heads=2",
    "model.ffn_dim=32",
    "model.queries=10",
    "model.max_aux_queries=10",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "model.roi.fc_dim=32",
    "model.rpn.proposals_before_nms=50",
    "model.rpn.proposals=20",
]
# reports of the best validations, two seconds each, are drawn where a test reads them
SMALL_IMAGES = ["data.workers=0", "data.augment.short_sides=[64]", "data.test_short_side=64", "eval.report=false"]
# of timm's own tests: 0.4 million parameters, with batch statistics since its weights are random
SMALL_BACKBONE = BackboneConfig(name="test_resnet.r160_in1k", pretrained=False, frozen_stages=0, norm="batch")


def module_from(path):
    """The module in a file that is no part of a package."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name):
    """`main` of train.py or eval.py."""
    return module_from(ROOT / f"{name}.py").main


def opened(folder, name="val", masks=False):
    """The ground truth of a dataset in COCO format, as an evaluation opens it."""
    dataset = CocoDetection(folder / "annotations" / f"{name}.json", folder / "images", train=False, masks=masks)
    return GroundTruth.from_dataset(dataset.ground_truth(), masks)


def evaluated(content, results, masks=False, **options):
    """The summary of an evaluation against hand-made ground truth."""
    return evaluate_coco(GroundTruth.from_dataset(content, masks), results, masks=masks, **options)


def region_losses(head, features, proposals, sizes, targets, branch=None):
    """The terms of a RoI head and what its regions learned; proposals (n, 4) per image."""
    counts = torch.tensor([len(boxes) for boxes in proposals])
    most = max(1, int(counts.max()))
    boxes = torch.stack([torch.nn.functional.pad(own, (0, 0, 0, most - len(own))) for own in proposals])
    regions = Regions(boxes, torch.arange(most) < counts[:, None]).never_empty(sizes)
    step = RegionStep(head, features, regions, sizes, targets, branch)
    read_counts([step])
    return step.losses(), step.assignment


def valid_rows(levels, extents):
    """The entries (n, D) of one image, from (h, w, ..., D) and (rows, columns) per level; the definition."""
    return torch.cat(
        [level[:rows, :columns].reshape(-1, level.shape[-1]) for level, (rows, columns) in zip(levels, extents)]
    )


def torchrun(script, processes, *arguments):
    """What a script printed in so many processes over gloo."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(script), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return run.stdout + run.stderr


class Killed(BaseException):
    """Stands for SIGKILL inside a process: nothing in the package catches it."""


@contextlib.contextmanager
def killed_at(step):
    """The training inside is killed in front of this step."""
    train_step = Trainer.step

    def die(trainer, group):
        if trainer.position.step == step:
            raise Killed
        return train_step(trainer, group)

    with mock.patch.object(Trainer, "step", die):
        try:
            yield
        except Killed:
            return
    raise AssertionError(f"the training ended before step {step}")


def metrics_without_times(folder):
    """The lines of a run's metrics.jsonl without what depends on the machine's speed."""
    times, lines = ("images_per_s", "data_s", "step_s"), read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def assert_equal_weights(ours, theirs):
    """Two files of safetensors hold the same tensors, bit for bit."""
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def reset_accelerate():
    """Forget the settings of the process's first Accelerator, which every later one would take over."""
    AcceleratorState._reset_state(reset_partial_state=True)
