"""A one-stage and a two-stage detector through the commands: train, resume, evaluate, predict."""

import json

import pytest
from safetensors.torch import load_file
from support import ROOT, reset_accelerate

from brs_detr import cli
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.logging import read_metrics

CONFIGS = ROOT / "configs" / "cnn"
SHORT = [
    "data.train_images=images/train",
    "data.val_images=images/val",
    "data.workers=0",
    "data.augment.short_sides=[64]",
    "data.test_short_side=64",
    "model.backbone.name=test_resnet.r160_in1k",
    "train.epochs=2",
    "train.total_batch_size=4",
    "train.log_every=1",
    "train.ema_decay=0.9",
]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerate()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images to train on, two steps an epoch, and three for validation."""
    return make_dataset(tmp_path_factory.mktemp("data"), train=8, val=3, image_size=72)


@pytest.mark.parametrize(
    ("detector", "heads", "head"), [("atss", {"head"}, "model.head"), ("faster_rcnn", {"rpn", "roi"}, "model.roi")]
)
def test_a_detector_is_trained_evaluated_and_used(detector, heads, head, data, tmp_path):
    run, recipe = tmp_path / "run", str(CONFIGS / f"{detector}_small.yaml")
    assert cli.main(["train", recipe, *SHORT, f"data.root={data}", f"output_dir={run}"]) == 0
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    assert {name.split(".")[0] for name in lines[0]["terms"]} == heads

    reset_accelerate()
    words = [str(run / "last.safetensors"), f"{head}.max_detections=100", "--images", "1"]
    assert cli.main(["eval", *words, "--out", str(tmp_path / "eval")]) == 0
    figures = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["stats"]
    logged = [line for line in lines if line["kind"] == "val"][-1]
    assert figures["AP"] == pytest.approx(logged["AP"], abs=1e-12)

    images = str(data / "images" / "val")
    words = [str(run), images, f"{head}.max_detections=3", "--threshold", "0"]
    assert cli.main(["predict", *words, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [len(entry["objects"]) for entry in found] == [3, 3, 3]
    assert len(list((tmp_path / "out" / "detections").iterdir())) == 3


@pytest.mark.parametrize("detector", ["atss", "faster_rcnn"])
def test_a_resumed_run_equals_an_uninterrupted_one(detector, data, tmp_path):
    recipe = str(CONFIGS / f"{detector}_small.yaml")
    weights = []
    for name, halves in (("at_once", [2]), ("in_two", [1, 2])):
        for epochs in halves:
            reset_accelerate()
            more = ["--resume", "train.allow_changes=true"] if epochs != halves[0] else []
            settings = [*SHORT, f"train.epochs={epochs}", "train.schedule=step", f"data.root={data}"]
            assert cli.main(["train", recipe, *settings, f"output_dir={tmp_path / name}", *more]) == 0
        weights.append(load_file(tmp_path / name / "last.safetensors"))
    at_once, in_two = weights
    assert all((in_two[name] == tensor).all() for name, tensor in at_once.items())
