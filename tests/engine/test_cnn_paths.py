"""Each CNN detector from the data to drawn detections: trained, killed, resumed, evaluated, used, trained further."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import DEMO, assert_equal_weights, killed_at, metrics_without_times, reset_accelerate

from brs_detr import cli
from brs_detr.config import apply_overrides
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.state import latest_state
from brs_detr.models.one_stage import OneStageDetector
from brs_detr.models.one_stage_masks import OneStageMaskDetector
from brs_detr.ops.images import ImageBatch
from brs_detr.run.setup import build_detector, load_initial_weights, restore
from brs_detr.viz.boxes import draw_detections

pytestmark = pytest.mark.slow

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
    "yolact": [*SGD, "model.head.prototypes=8", "model.head.max_detections=20"],
    "solov2": [
        "model.head.stacked_convs=1",
        "model.head.conv_dim=32",
        "model.head.norm_groups=8",
        "model.head.mask_hidden=16",
        "model.head.mask_dim=16",
        "model.head.grids=[10,8,6]",
        "model.head.max_detections=20",
    ],
}
WITH_MASKS = ("mask_rcnn", "yolact", "solov2")
STEPS = 6  # of two epochs
KILLED_AT = 4  # in the middle of the second epoch; a state was saved there


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


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_killed_run_ends_as_if_it_had_not_been(detector, runs, tmp_path):
    command = runs.command(detector, tmp_path)
    with killed_at(KILLED_AT):
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
        assert_equal_weights(tmp_path / name, reference / name)
    assert metrics_without_times(tmp_path) == metrics_without_times(reference)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_is_evaluated_and_used(detector, runs, tmp_path):
    run, masks = runs.finished(detector), detector in WITH_MASKS
    logged = [line for line in metrics_without_times(run) if line["kind"] == "val"][-1]
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
        with Image.open(out / "detections" / Path(entry["file_name"]).with_suffix(".png")) as ours:
            with Image.open(path) as image:
                plain = draw_detections(image, None, None, [], legend=False)
            width, height = plain.size
            assert ours.size[0] == width and ours.crop((0, 0, width, height)).tobytes() != plain.tobytes()


def class_outputs(model, detector):
    """What a detector says of each class (..., C) about an image and two regions, whatever the order of its rows."""
    generator = torch.Generator().manual_seed(0)
    batch = ImageBatch.from_list([torch.randint(0, 256, (3, 64, 64), generator=generator)])
    regions = [torch.tensor([[4.0, 4, 40, 50], [10, 20, 60, 60]])]
    with torch.no_grad():
        features = model.eval().encode_batch(batch)
        if isinstance(model, OneStageMaskDetector):
            return [torch.cat([level.flatten(0, -2) for level in model.head(*features).logits])]
        if isinstance(model, OneStageDetector):
            return [torch.cat([level.flatten(0, -2) for level in model.head(features).logits])]
        heads = model.roi.stages if detector == "cascade_rcnn" else [model.roi]
        outputs = [head(features, regions) for head in heads]
        classes = [output.logits[:, : model.num_classes] for output in outputs]
        if detector == "cascade_rcnn":
            return classes
        boxes = outputs[0].deltas.transpose(1, 2)
        if model.mask is None:
            return [*classes, boxes]
        masks = [model.mask(features, regions, torch.full((2,), label)) for label in range(model.num_classes)]
        return [*classes, boxes, torch.stack(masks, dim=-1)]


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_detector_trained_further_knows_the_classes_that_it_knew(detector, runs):
    """In another order, without some of them, and with new ones; as many rows as before, so that no shape helps."""
    run = runs.finished(detector)
    old, weights, config, _ = restore(run)
    classes = [weights.classes[3], "new", weights.classes[0], "newer", weights.classes[4]]
    shared = {0: 3, 2: 0, 4: 4}
    config = apply_overrides(config, [f"train.init_from={run}"])
    new = build_detector(config, len(classes), initial_weights=False)
    report = load_initial_weights(new, config, classes)
    assert report is not None and report.by_class and not report.fresh and not report.unused
    for ours, theirs in zip(class_outputs(new, detector), class_outputs(old, detector), strict=True):
        for after, before in shared.items():
            torch.testing.assert_close(ours[..., after], theirs[..., before], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(ours[..., 1], theirs[..., 1])


@pytest.mark.parametrize("detector", DETECTORS)
def test_info_and_a_dry_run_know_the_detector(detector, runs, tmp_path, capsys):
    command = runs.command(detector, tmp_path)
    assert cli.main(["info", *command[1:]]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{detector} with loss ") and "Hungarian" not in said
    assert cli.main([*command, "--dry-run"]) == 0
    assert "dry run: 1 batch(es) of 2 image(s) of " in capsys.readouterr().out


def test_what_only_the_detr_family_can_do_is_refused_in_a_sentence(runs, tmp_path, capsys):
    run = runs.finished("atss")
    commands = {
        "Only detectors of the released architecture can be converted.": [
            "convert",
            str(run / "best.safetensors"),
            str(tmp_path / "model.pth"),
            "--to-official",
        ],
        "eval.predict_with=roi: this detector has head. Use auto.": ["eval", str(run), "eval.predict_with=roi"],
    }
    for reason, command in commands.items():
        assert cli.main(command) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and reason in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_the_only_head_of_a_detector_may_be_named(runs, tmp_path):
    assert restore(runs.finished("atss"), ["eval.predict_with=head"])[0].predict_with == "head"


def test_masks_are_checked_where_they_are_learned(runs, tmp_path, capsys):
    other = tmp_path / "data"
    shutil.copytree(runs.data, other)
    path = other / "annotations" / "train.json"
    annotations = json.loads(path.read_text())
    del annotations["annotations"][0]["segmentation"]
    path.write_text(json.dumps(annotations))
    command = ["check-data", DEMO, f"data.root={other}", "--samples", "0"]
    assert cli.main(command) == 0 and "mask missing" not in capsys.readouterr().out
    assert cli.main([*command, "model.name=mask_rcnn"]) == 0
    assert "1 x mask missing" in capsys.readouterr().out


def test_overfitting_trains_and_evaluates_the_masks_of_the_subset(runs, tmp_path):
    command = runs.command("mask_rcnn", tmp_path, "train.overfit_batches=1", "train.epochs=1", "train.ema_decay=null")
    assert cli.main(command) == 0
    subset = json.loads((tmp_path / "overfit.json").read_text())
    assert len(subset["images"]) == 2 and all(entry["segmentation"] for entry in subset["annotations"])
    logged = metrics_without_times(tmp_path)
    assert logged[0]["terms"]["roi.mask"] > 0
    assert "mask_AP" in logged[-1]


def test_a_batch_with_masks_that_was_not_finite_can_be_run_again(runs, tmp_path, capsys):
    command = runs.command("mask_rcnn", tmp_path, "optim.lr=1e30", "optim.clip_norm=null", "train.warmup_steps=0")
    assert cli.main(command) == 3
    capsys.readouterr()
    (saved,) = tmp_path.glob("nonfinite-*.pt")
    stored = torch.load(saved, weights_only=True)
    assert all(len(target["masks"]) == len(target["boxes"]) for target in stored["batches"][0]["targets"])
    assert cli.main(["replay", str(saved)]) == 0
    assert "the first module whose output is not finite: " in capsys.readouterr().out
