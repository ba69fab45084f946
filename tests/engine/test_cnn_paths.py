"""Each CNN detector from the data to drawn detections: trained, killed, resumed, evaluated, used, trained further."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import DEMO, reset_accelerate

from brs_detr import cli
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.state import latest_state
from brs_detr.engine.trainer import Trainer

TINY = [
    "model.dim=32",
    "model.backbone.name=test_resnet.r160_in1k",
    "data.workers=0",
    "data.augment.short_sides=[56,64]",
    "data.test_short_side=60",
    "train.epochs=2",
    "train.total_batch_size=2",
    "train.log_every=1",
    "train.save_every=2",
    "train.ema_decay=0.9",
]
TOWERS = ["model.head.stacked_convs=1", "model.head.max_detections=20"]
REGIONS = ["model.roi.fc_dim=32", "model.roi.max_detections=20"]
SGD = ["optim.name=sgd", "optim.lr=0.002"]
# The loss and the optimizer too are one of each kind somewhere.
DETECTORS = {
    "retinanet": [*TOWERS, *SGD, "model.loss=alrp", "model.head.objective.balance=epoch"],
    "foveabox": TOWERS,
    "atss": [*TOWERS, *SGD],
    "paa": [*TOWERS, "model.loss=focal", "model.head.iou_branch=true"],
    "faster_rcnn": [*REGIONS, *SGD, "model.rpn.sample=64", "model.roi.sample=32"],
    "cascade_rcnn": REGIONS,
    "mask_rcnn": [*REGIONS, *SGD, "model.mask.stacked_convs=1", "model.mask.max_masks=3"],
}
STEPS = 6  # of two epochs
KILLED_AT = 4  # in the middle of the second epoch; a state was saved there
TIMINGS = ("images_per_s", "data_s", "step_s")


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing in the package catches it."""


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerate()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six images to train on, three steps an epoch, and three for validation; all objects have polygons."""
    return make_dataset(tmp_path_factory.mktemp("data"), train=6, val=3, image_size=64)


@dataclass(frozen=True)
class Runs:
    """Trainings of a detector, made when they are first asked for."""

    data: Path
    folder: Path

    def command(self, detector, folder, *more):
        settings = [f"data.root={self.data}", f"output_dir={folder}", f"model.name={detector}"]
        return ["train", DEMO, *TINY, *settings, *DETECTORS[detector], *more]

    @cache  # noqa: B019
    def finished(self, detector):
        """The folder of a run that nothing interrupted."""
        reset_accelerate()
        folder = self.folder / detector
        assert cli.main(self.command(detector, folder)) == 0
        return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    return Runs(data, tmp_path_factory.mktemp("runs"))


def metrics(folder):
    """The lines of metrics.jsonl without their timings."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_equal_files(ours, theirs):
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_killed_run_ends_as_if_it_had_not_been(detector, runs, tmp_path, monkeypatch):
    step = Trainer.step

    def die(trainer, group):
        if trainer.position.step == KILLED_AT:
            raise Killed
        return step(trainer, group)

    command = runs.command(detector, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", die)
        with pytest.raises(Killed):
            cli.main(command)
    state, _ = latest_state(tmp_path / "state")
    assert state.name == f"step-{KILLED_AT:08}"
    memory = load_file(state / "optimizer.safetensors")
    kind = "momentum_buffer/" if "optim.name=sgd" in command else "exp_avg/"
    assert any(name.startswith(kind) and tensor.any() for name, tensor in memory.items())
    if "model.loss=alrp" in command:
        weights = load_file(state / "model.safetensors")
        # one period, the first epoch, has passed: the factor is no longer the first one, and a step is summed up
        assert weights["head.objective.epoch_balance.factor"] != 50
        assert weights["head.objective.epoch_balance.sums"][2] == 1

    reset_accelerate()
    assert cli.main([*command, "--resume"]) == 0
    reference = runs.finished(detector)
    for name in (
        "last.safetensors",
        "best.safetensors",
        *(f"state/step-{STEPS:08}/{n}.safetensors" for n in ("model", "ema", "optimizer")),
    ):
        assert_equal_files(tmp_path / name, reference / name)
    assert metrics(tmp_path) == metrics(reference)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_is_evaluated_and_used(detector, runs, tmp_path):
    run, masks = runs.finished(detector), detector == "mask_rcnn"
    logged = [line for line in metrics(run) if line["kind"] == "val"][-1]
    assert cli.main(["eval", str(run / "last.safetensors"), "--out", str(tmp_path / "eval"), "--images", "2"]) == 0
    figures = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["stats"]
    same = [name for name in figures if name in logged]
    assert {"AP", "AP50"} <= set(same)
    assert {name: figures[name] for name in same} == pytest.approx({name: logged[name] for name in same}, abs=1e-12)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results and all(("segmentation" in result) == masks for result in results)

    images = sorted((runs.data / "images" / "val").iterdir())
    out = tmp_path / "out"
    assert cli.main(["predict", str(run), str(images[0].parent), "--out", str(out), "--threshold", "0"]) == 0
    found = json.loads((out / "predictions.json").read_text())
    assert len(found) == len(images) and all(entry["objects"] for entry in found)
    assert all(("segmentation" in thing) == masks for entry in found for thing in entry["objects"])
    for entry, path in zip(found, images, strict=True):
        drawn = out / "detections" / Path(entry["file_name"]).with_suffix(".png")
        with Image.open(drawn) as ours, Image.open(path) as plain:
            assert ours.convert("RGB").tobytes() != plain.convert("RGB").tobytes()
