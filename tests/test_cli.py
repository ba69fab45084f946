"""The commands as a user types them, on a dataset of a few drawn images."""

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support import DEMO, ROOT, SMALL_DETECTOR, SMALL_IMAGES, reset_accelerate, script

from brs_detr import cli
from brs_detr.commands import info
from brs_detr.config import from_dict, load_config
from brs_detr.data.storage import ReadError
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.state import latest_state, read_metadata
from brs_detr.engine.trainer import Trainer
from brs_detr.run.setup import build_detector
from brs_detr.run.weights import read

TINY = [
    *SMALL_DETECTOR,
    "model.rpn.test_proposals=20",
    *SMALL_IMAGES,
    "train.epochs=2",
    "train.total_batch_size=4",
    "train.per_device_batch_size=2",
    "train.log_every=1",
    "train.save_every=2",
    "train.ema_decay=0.9",
    "optim.lr=0.001",
]


train, evaluate = script("train"), script("eval")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerate()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten training images (two and a half steps an epoch) and seven for validation, of two shapes."""
    return make_dataset(tmp_path_factory.mktemp("data"), train=10, val=7, image_size=72)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    assert train([DEMO, *TINY, f"data.root={data}", f"output_dir={folder}"]) == 0
    return folder


def figures(folder):
    return json.loads((folder / "evaluation.json").read_text())["stats"]


def test_a_run_leaves_weights_metrics_config_and_log(run):
    assert {"best.safetensors", "last.safetensors", "metrics.jsonl", "log.txt", "config.yaml", "state"} <= {
        path.name for path in run.iterdir()
    }
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert {name.split(".")[0] for name in lines[0]["terms"]} >= {"decoder", "encoder", "rpn", "roi", "atss"}
    assert [line["epoch"] for line in lines if line["kind"] == "val"] == [1, 2]


def test_eval_of_the_weights_equals_the_figure_of_the_training(run, tmp_path):
    assert evaluate([str(run / "last.safetensors"), "--out", str(tmp_path), "--images", "2"]) == 0
    logged = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "val"][-1]
    ours = figures(tmp_path)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"):
        assert ours[name] == pytest.approx(logged[name], abs=1e-12), name
    assert {"results.json", "evaluation.json", "per_class.csv", "detections.png"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_results_are_in_the_format_of_coco_with_the_ids_of_the_dataset(run, data, tmp_path):
    evaluate([str(run), "--out", str(tmp_path), "--images", "0"])
    truth = json.loads((data / "annotations" / "val.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    images = {image["id"]: image for image in truth["images"]}
    assert {r["image_id"] for r in results} <= set(images)
    assert {r["category_id"] for r in results} <= {category["id"] for category in truth["categories"]}
    for result in results:
        x, y, w, h = result["bbox"]
        image = images[result["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= image["width"] + 1e-3 and y + h <= image["height"] + 1e-3


def test_the_figures_do_not_depend_on_the_batch_size(run, tmp_path):
    found = []
    for size in (1, 2, 7):
        evaluate([str(run), f"eval.batch_size={size}", "--out", str(tmp_path / str(size)), "--images", "0"])
        found.append(figures(tmp_path / str(size)))
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)


def test_several_scales_and_a_flip_in_eval_and_predict(run, data, tmp_path):
    """One scale is no change; several do not depend on the batch size, and `predict` finds what `eval` counts."""
    views = ["eval.test_scales=[48,64]", "eval.test_flip=true"]
    raw, short = ["eval.calibrate=false", "--images", "0"], "eval.test_scales=[64]"
    cases = {"plain": [], "one": [short], "views": views, "batch": [*views, "eval.batch_size=7"]}
    for name, settings in cases.items():
        assert evaluate([str(run), *settings, *raw, "--out", str(tmp_path / name)]) == 0
    assert figures(tmp_path / "one") == figures(tmp_path / "plain") != figures(tmp_path / "views")
    assert figures(tmp_path / "batch") == pytest.approx(figures(tmp_path / "views"), abs=1e-6)
    words = ["--annotations", str(data / "annotations" / "val.json"), "--format", "coco", "--no-images", "--raw-scores"]
    command = ["predict", str(run), str(data / "images" / "val"), *views, *words, "--threshold", "0"]
    assert cli.main([*command, "--out", str(tmp_path / "predict")]) == 0
    counted = json.loads((tmp_path / "views" / "results.json").read_text())
    found = json.loads((tmp_path / "predict" / "predictions.json").read_text())
    for image in {result["image_id"] for result in counted}:
        ours, theirs = ([r for r in results if r["image_id"] == image][:20] for results in (found, counted))
        assert len(ours) == len(theirs) == 20
        for one, other in zip(ours, theirs, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        best, same = ours[0]["bbox"], [r["bbox"] for r in theirs if abs(r["score"] - ours[0]["score"]) < 2e-4]
        assert min(max(abs(a - b) for a, b in zip(best, box, strict=True)) for box in same) < 0.02


def test_a_graph_has_one_view(run, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    for setting in ("eval.test_flip=true", "eval.test_scales=[64]"):
        assert cli.main(["export", str(run), setting, "--out", str(tmp_path / "x.onnx")]) == 2
        assert "a graph has one view of an image" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_a_run_killed_in_the_middle_of_an_epoch_ends_the_same(run, data, tmp_path, monkeypatch):
    """With the real detector and loader, and with another number of workers after the kill."""
    step = Trainer.step

    def die(self, group):
        if self.position.step == 5:  # saved at step 4, in the middle of the second epoch
            raise KeyboardInterrupt
        return step(self, group)

    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", die)
        with pytest.raises(KeyboardInterrupt):
            train(command)
    reset_accelerate()
    assert train([*command, "data.workers=1", "--resume"]) == 0
    ours, theirs = load_file(tmp_path / "last.safetensors"), load_file(run / "last.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for mine, other in zip(read_metrics(tmp_path / "metrics.jsonl"), read_metrics(run / "metrics.jsonl"), strict=True):
        assert mine.get("loss") == other.get("loss") and mine.get("AP") == other.get("AP")


def test_a_path_that_cannot_be_used_is_named_in_one_sentence(data, tmp_path, capsys):
    json_path, images = data / "annotations" / "val.json", data / "images" / "val"
    command = ["check-data", str(json_path), "--images", str(images), "--samples", "0", "--csv"]
    for bad, reason in ((tmp_path, "Is a directory"), (json_path / "x.csv", "Not a directory")):
        assert cli.main([*command, str(bad)]) == 2
        assert capsys.readouterr().err == f"error: {bad}: {reason}\n"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("brs_detr_small_cpu", "\n1,000 steps of batch 4, adamw lr 0.002, weight decay 0.0001, cosine schedule\n"),
        (
            "cnn/atss_r50_brs_12e_coco",
            "\n12 epochs of batch 16, sgd lr 0.008, weight decay 0.0001, step schedule [8, 11]\n",
        ),
    ],
)
def test_info_gives_the_length_that_is_trained(recipe, said):
    assert said in info.heading(load_config(ROOT / "configs" / f"{recipe}.yaml"), 80, "as in COCO") + "\n"


def test_what_holds_no_image_and_no_json_is_refused_in_one_sentence(run, tmp_path, capsys):
    assert cli.main(["predict", str(run), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no image or video in this folder.\n"
    (tmp_path / "train.json").write_text("<html>")
    assert cli.main(["info", DEMO, *TINY, f"data.root={tmp_path}", "data.train_json=train.json"]) == 2
    assert "this is not a JSON file" in capsys.readouterr().err


def test_a_run_is_not_overwritten_by_accident(run, data, capsys):
    assert train([DEMO, *TINY, f"data.root={data}", f"output_dir={run}"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (run / "best.safetensors").exists()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwriting_a_run_by_one_that_cannot_begin_leaves_it_as_it_is(run, data, tmp_path, capsys):
    """Whatever refuses it: the paths, the dataset, the weights to start from, or a validation without objects."""
    bare = tmp_path / "bare"
    shutil.copytree(data, bare)
    annotations = json.loads((data / "annotations" / "val.json").read_text())
    (bare / "annotations" / "val.json").write_text(json.dumps({**annotations, "annotations": []}))
    others = tmp_path / "others"
    shutil.copytree(data, others)
    categories = [{**category, "name": f"another {category['id']}"} for category in annotations["categories"]]
    (others / "annotations" / "val.json").write_text(json.dumps({**annotations, "categories": categories}))
    torch.save({}, tmp_path / "damaged.pth")
    before = contents(run)
    for settings, said in (
        (["data.root=nowhere"], "does not exist"),
        ([f"data.root={others}"], "its categories are not those of"),
        ([f"data.root={data}", f"model.backbone.checkpoint={tmp_path / 'damaged.pth'}"], "damaged.pth"),
        ([f"data.root={bare}"], "validation has nothing to measure"),
    ):
        reset_accelerate()
        assert train([DEMO, *TINY, *settings, f"output_dir={run}", "--overwrite"]) == 2
        assert said in capsys.readouterr().err and contents(run) == before, said


def test_overwriting_starts_with_files_of_its_own(run, data, tmp_path):
    """It may start from the weights that it overwrites, and its log has what was said before it began."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    start = f"train.init_from={folder / 'best.safetensors'}"
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={folder}", start, "train.epochs=1", "seed=7"]
    assert train([*command, "--overwrite"]) == 0
    assert load_config(folder / "config.yaml").seed == 7
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["step-00000002", "step-00000003"]
    log = (folder / "log.txt").read_text()
    assert log.index("process(es)") < log.index("10 of 10 images") < log.index("epoch 1/1 step 1/3")
    assert "epoch 2" not in log and log.count("process(es)") == 1


def test_the_flags_of_a_start_are_not_stored_so_that_its_config_yaml_removes_no_run(data, tmp_path, capsys):
    folder = tmp_path / "run"
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={folder}", "train.epochs=1"]
    for flags in (["--overwrite"], ["--resume"], ["--resume", "train.overwrite=true"]):
        reset_accelerate()
        assert train([*command, *flags]) == 0
        state, _ = latest_state(folder / "state")
        stored = [load_config(folder / "config.yaml"), from_dict(read_metadata(state)["config"], "state")]
        stored += [from_dict(read(folder / name).config, name) for name in ("best.safetensors", "last.safetensors")]
        assert not any(config.train.resume or config.train.overwrite for config in stored), flags
    reset_accelerate()
    assert train([str(folder / "config.yaml"), "train.epochs=2"]) == 2
    assert "holds a run already" in capsys.readouterr().err and state.is_dir()


def test_resuming_a_run_of_which_only_the_weights_are_left_leaves_it_as_it_is(run, data, tmp_path, capsys):
    """Its states were deleted to save space: starting from scratch would replace the weights by those of an epoch."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "state")
    before = contents(folder)
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={folder}", "--resume"]
    assert train(command) == 2
    error = capsys.readouterr().err
    assert f"{folder}: no saved state to resume from, but weights (best.safetensors, last.safetensors)" in error
    assert "Add --overwrite" in error and contents(folder) == before
    reset_accelerate()
    assert train([*command, "--overwrite", "train.epochs=1"]) == 0
    assert [line["epoch"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "val"] == [1]


def test_a_run_killed_between_its_first_weights_and_its_first_state_begins_again(data, tmp_path, monkeypatch, capsys):
    """Unless it is one whose states were deleted, though it had a single validation, too."""
    folder = tmp_path / "run"
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={folder}", "train.epochs=1", "train.save_every=null"]

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save_state", killed)
        train(command)
    assert (folder / "last.safetensors").is_file() and not list((folder / "state").glob("step-*"))
    reset_accelerate()
    assert train([*command, "--resume"]) == 0
    assert [path.name for path in (folder / "state").iterdir()] == ["step-00000003"]
    (folder / "state" / "step-00000003").rename(tmp_path / "state")  # the folder itself stays
    before = contents(folder)
    reset_accelerate()
    assert train([*command, "--resume"]) == 2
    assert "no saved state to resume from, but weights" in capsys.readouterr().err and contents(folder) == before


def test_a_changed_recipe_is_not_resumed_unless_allowed(run, data, capsys):
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={run}", "optim.lr=0.5", "--resume"]
    assert train(command) == 2
    assert "optim.lr: 0.001 -> 0.5" in capsys.readouterr().err
    reset_accelerate()
    assert train([*command, "train.allow_changes=true"]) == 0


def test_changed_annotations_of_a_resumed_run_are_logged(run, data, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run, folder)
    shutil.copytree(data, other)
    path = other / "annotations" / "train.json"
    annotations = json.loads(path.read_text())
    path.write_text(json.dumps({**annotations, "annotations": annotations["annotations"][1:]}))
    command = [DEMO, *TINY, f"data.root={other}", f"output_dir={folder}", "--resume", "train.allow_changes=true"]
    before = len((folder / "log.txt").read_text())  # tests before this one may have resumed the run
    assert train(command) == 0
    said = (folder / "log.txt").read_text()[before:]
    assert "changed since: the annotations or images of annotations/train.json" in said
    assert said.count("changed since") == 1


def test_the_best_ap_of_another_measure_does_not_count_any_more(run, data, tmp_path, monkeypatch, capsys):
    """Else the best weights stay those that a harder measure cannot beat."""
    folder, ap = tmp_path / "run", iter([0.6, 0.5, 0.4])
    shutil.copytree(run, folder)
    monkeypatch.setattr("brs_detr.train.validator", lambda run, data: lambda module: {"AP": next(ap)})
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={folder}", "--resume", "train.allow_changes=true"]
    for epochs, settings, best in ((3, [], 3), (4, ["eval.predict_with=decoder"], 4)):
        reset_accelerate()
        assert train([*command, f"train.epochs={epochs}", *settings]) == 0
        assert read(folder / "best.safetensors").extra["epoch"] == best
    said = capsys.readouterr().out
    assert said.count("AP is measured differently") == 1
    assert "(eval.predict_with: auto -> decoder), so the best one so far, 0.6000, no longer counts" in said
    reset_accelerate()
    assert train([*command, "train.epochs=5", "eval.predict_with=decoder"]) == 0  # 0.4 under the same measure
    assert read(folder / "best.safetensors").extra["epoch"] == 4


def test_fine_tuning_from_other_classes_says_what_it_did(run, data, tmp_path, capsys):
    other = tmp_path / "data"
    for split in ("train", "val"):
        annotations = json.loads((data / "annotations" / f"{split}.json").read_text())
        gone = annotations["categories"].pop()["id"]
        annotations["annotations"] = [a for a in annotations["annotations"] if a["category_id"] != gone]
        (other / "annotations").mkdir(parents=True, exist_ok=True)
        (other / "annotations" / f"{split}.json").write_text(json.dumps(annotations))
    (other / "images").symlink_to(data / "images")
    command = [DEMO, *TINY, f"data.root={other}", f"output_dir={tmp_path / 'run'}", f"train.init_from={run}"]
    assert train([*command, "train.epochs=1"]) == 0
    said = capsys.readouterr().out
    assert "tensors loaded unchanged" in said and "rows of shared classes loaded" in said
    assert "re-initialized:" not in said.replace("the others re-initialized:", "")


def test_overfitting_uses_the_training_images_for_validation(data, tmp_path):
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", "train.overfit_batches=1", "train.epochs=1"]
    assert train(command) == 0
    subset = json.loads((tmp_path / "overfit.json").read_text())
    assert len(subset["images"]) == 4
    reset_accelerate()
    assert evaluate([str(tmp_path), "--out", str(tmp_path / "out"), "--images", "0"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {r["image_id"] for r in results} <= {image["id"] for image in subset["images"]}


def test_a_dry_run_reports_memory_and_leaves_no_run(data, tmp_path, capsys):
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path / 'run'}"]
    crop = {"crop_policy": "true", "crop_min": 32, "crop_max": 64, "crop_short_sides": "[64]", "long_side": 200}
    assert train([*command, "--dry-run", *(f"data.augment.{key}={value}" for key, value in crop.items())]) == 0
    said = capsys.readouterr().out
    # a crop of 32 x 64 resized to a short side of 64, in either direction: two images are padded to both
    assert "peak memory" in said and "of 128x128 with" in said
    assert "an optimizer step of " in said and "step of 0 parameters" not in said
    reset_accelerate()
    assert train([*command, "--dry-run"]) == 0
    assert not (tmp_path / "run" / "state").exists()


def test_a_profile_says_where_the_time_went_and_leaves_no_run(data, tmp_path, capsys):
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path / 'run'}", "--profile"]
    assert train(command) == 0
    said = capsys.readouterr().out
    for part in ("forward", "backward", "optimizer", "waiting for data", "aten::"):
        assert part in said
    with gzip.open(tmp_path / "run" / "profile" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step: forward", "step: backward"} <= names
    assert not (tmp_path / "run" / "profile" / "best.safetensors").exists()


def test_a_run_starts_with_a_sheet_of_what_the_detector_sees(run):
    with Image.open(run / "train_samples.png") as sheet:
        assert sheet.size == (4 * 320, 3 * 320)  # ten images, four in a row


def test_a_run_is_not_resumed_on_other_annotations(run, data, tmp_path, capsys):
    """The dataset may lie elsewhere, but it must be the same one."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(run, tmp_path / "run")
    command = [DEMO, *TINY, f"data.root={tmp_path / 'data'}", f"output_dir={tmp_path / 'run'}", "--resume"]
    assert train(command) == 0
    path = tmp_path / "data" / "annotations" / "train.json"
    annotations = json.loads(path.read_text())
    annotations["annotations"][0]["bbox"][2] -= 2
    path.write_text(json.dumps(annotations))
    reset_accelerate()
    assert train(command) == 2
    assert "annotations/train.json changed since" in capsys.readouterr().err


def test_a_length_in_steps_is_rounded_up_to_epochs_and_too_few_are_warned_of(data, tmp_path, capsys):
    tiny = [setting for setting in TINY if not setting.startswith("train.epochs=")]
    command = [DEMO, *tiny, f"data.root={data}", f"output_dir={tmp_path}"]
    assert train([*command, "train.steps=4", "train.eval_every=null", "train.save_every=null"]) == 0
    said = capsys.readouterr().out
    assert "2 epochs of 3 optimizer steps, 6 in all; validation every epoch" in said
    assert "warning: 6 optimizer steps is very short" in said
    reset_accelerate()
    assert train([*command, "train.steps=4", "train.schedule=step", "train.lr_steps=[1]"]) == 2
    assert "train.schedule=cosine" in capsys.readouterr().err


def test_a_batch_that_was_not_finite_can_be_run_again(data, tmp_path, capsys):
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", "optim.lr=1e30", "train.warmup_steps=0"]
    assert train(command) == 3
    error = capsys.readouterr().err
    (saved,) = tmp_path.glob("nonfinite-*.pt")
    assert f"python -m brs_detr replay {saved}" in error
    term = re.search(r"loss terms? ([\w.]+)", error)[1]
    assert cli.main(["replay", str(saved)]) == 0
    said = capsys.readouterr().out
    assert "the first module whose output is not finite: " in said and term in said
    stored = torch.load(saved, weights_only=True)
    assert f"images {', '.join(str(t['image_id']) for t in stored['batches'][0]['targets'])};" in said
    # weights that are sound again: nothing to be found, and the exit code says so
    sound = build_detector(from_dict(stored["facts"]["config"], "test"), len(stored["facts"]["classes"]))
    torch.save({**stored, "weights": sound.state_dict()}, tmp_path / "sound.pt")
    assert cli.main(["replay", str(tmp_path / "sound.pt")]) == 1
    assert "everything is finite here" in capsys.readouterr().out
    assert cli.main(["replay", str(tmp_path / "config.yaml")]) == 2
    assert "not a batch saved by training" in capsys.readouterr().err


def test_bf16_trains(data, tmp_path):
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", "train.epochs=1", "train.precision=bf16"]
    assert train(command) == 0
    assert all(line["loss"] > 0 for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.root=nowhere", "does not exist"),
        ("optim.lrr=1", "did you mean optim.lr"),
        ("train.trackers=[nothing]", "train.trackers: nothing is not known"),
        ("train.trackers=[dvclive]", "train.trackers: dvclive is not installed"),
        ("output_dir=/dev/null/run", "output_dir=/dev/null/run: cannot be written to"),
        ("model.backbone.name=resnet5", "model.backbone.name=resnet5: timm has no such model"),
        ("model.backbone.frozen_stages=9", "model.backbone.frozen_stages=9"),
        ("model.backbone.levels=[3]", "model.backbone.levels"),
        ("model.backbone.checkpoint=nowhere.pth", "model.backbone.checkpoint: there is no file nowhere.pth"),
        pytest.param(
            "train.precision=fp16", "needs a GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU")
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(data, tmp_path, capsys, override, reason):
    assert train([DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", override]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and reason in error[0]


def test_overfitting_without_the_data_is_refused_in_one_sentence(tmp_path, capsys):
    command = [DEMO, *TINY, "data.root=nowhere", f"output_dir={tmp_path}", "train.overfit_batches=1"]
    assert train(command) == 2
    assert "does not exist" in capsys.readouterr().err


def test_pretrained_weights_that_cannot_be_had_are_named(data, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("brs_detr.models.backbones.timm_backbone.timm.create_model", offline)
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", "model.backbone.pretrained=true"]
    assert train(command) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "cannot be downloaded" in error and "\n" not in error


def test_a_setting_that_changes_shapes_is_refused_when_weights_are_loaded(run, capsys):
    assert evaluate([str(run), "model.ffn_dim=64"]) == 2
    error = capsys.readouterr().err.strip()
    assert "another shape than the model's" in error and "(32," in error and "\n" not in error


def test_eval_needs_and_opens_no_tracker_of_the_training(run, tmp_path):
    assert evaluate([str(run), "train.trackers=[dvclive]", "--out", str(tmp_path), "--images", "0"]) == 0
    arguments = [str(run), "train.trackers=[tensorboard]", f"output_dir={tmp_path}", "--out", str(tmp_path / "out")]
    assert evaluate([*arguments, "--images", "0"]) == 0
    assert not list(tmp_path.rglob("events.*"))


def test_a_image_that_proves_damaged_is_left_out_of_the_figures(run, data, tmp_path, capsys):
    """Both of its entry and of what is found on it: the other images count as they always did."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    truth = json.loads((root / "annotations" / "val.json").read_text())
    victim = truth["images"][2]
    file = root / "images" / "val" / victim["file_name"].split("/")[-1]
    Image.open(file).save(file, format="PNG")  # checksummed, so that any damage is an error; the name does not matter
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    arguments = [str(run), f"data.root={root}", "--images", "7", "--out"]
    assert evaluate([*arguments, str(tmp_path / "damaged")]) == 0
    written = json.loads((tmp_path / "damaged" / "evaluation.json").read_text())
    assert f"1 image(s) cannot be read and are left out: image id {victim['id']}" in written["notes"]
    assert (written["images"], written["images_left_out"]) == (6, 1)
    assert "\n6 of 7 images, " in capsys.readouterr().out
    truth["images"].remove(victim)
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] != victim["id"]]
    (root / "annotations" / "val.json").write_text(json.dumps(truth))
    assert evaluate([*arguments, str(tmp_path / "without")]) == 0
    assert figures(tmp_path / "damaged") == pytest.approx(figures(tmp_path / "without"), abs=1e-12)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_the_training_has_the_exit_code_of_an_interruption(data, tmp_path, monkeypatch, capsys, number):
    def interrupted(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("it goes on")

    former = signal.getsignal(number)
    monkeypatch.setattr("brs_detr.run.dataset.open_train_set", interrupted)
    with pytest.raises(SystemExit) as end:
        train([DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}"])
    assert end.value.code == 75 and signal.getsignal(number) is former
    expected = f"Received {number.name} outside the training: nothing to save. Run the same command again.\n"
    assert capsys.readouterr().err.endswith(expected)


def test_sigterm_after_the_training_says_how_its_run_goes_on(run, data, monkeypatch, capsys):
    monkeypatch.setattr("brs_detr.train.fit", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        train([DEMO, *TINY, f"data.root={data}", f"output_dir={run}", "--resume", "--overwrite"])
    said = capsys.readouterr()
    assert end.value.code == 75 and said.err.endswith("nothing to save. Resume with --resume.\n")
    assert "train.overwrite: not used, since there is a state to resume" in said.out


def test_a_storage_that_fails_has_a_code_of_its_own_in_every_command(run, data, tmp_path, monkeypatch, capsys):
    def gone(path, *_, **__):
        raise ReadError(f"{path}: the storage does not give this file: Input/output error.")

    monkeypatch.setattr("brs_detr.data.coco.read_image", gone)
    monkeypatch.setattr("brs_detr.data.video.read_image", gone)
    out = ["--out", str(tmp_path / "out")]
    assert train([DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path / 'run'}"]) == 74
    reset_accelerate()
    assert evaluate([str(run), f"data.root={data}", "data.workers=1", *out]) == 74
    assert cli.main(["predict", str(run), str(data / "images" / "val"), *out]) == 74
    said = capsys.readouterr().err
    assert said.count("the storage does not give this file: Input/output error.") == 3 and "Traceback" not in said


@pytest.mark.parametrize("head", ["roi", "atss", "ensemble"])
def test_the_boxes_of_an_auxiliary_head_can_be_evaluated(run, tmp_path, head):
    found = {}
    for name in ("decoder", head):
        assert evaluate([str(run), f"eval.predict_with={name}", "--out", str(tmp_path / name), "--images", "0"]) == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert found[head] != found["decoder"]


def test_predicted_images_of_one_name_in_two_folders_do_not_replace_each_other(run, data, tmp_path):
    images = sorted((data / "images" / "val").iterdir())
    names = ["a/1.png", "b/1.png", "b/1.jpg", "2.png"]
    for name, image in zip(names, images):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(image).save(tmp_path / "in" / name)
    assert cli.main(["predict", str(run), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted(entry["file_name"] for entry in found) == sorted(names)
    drawn = {
        p.relative_to(tmp_path / "out" / "detections").as_posix() for p in tmp_path.glob("out/detections/**/*.png")
    }
    assert drawn == {"a/1.png", "b/1.png.png", "b/1.jpg.png", "2.png"}
    assert cli.main(["predict", str(run), str(tmp_path / "in"), "--out", "/dev/null/out"]) == 2


def test_other_categories_in_validation_are_refused_with_the_difference(data, tmp_path, capsys):
    annotations = json.loads((data / "annotations" / "val.json").read_text())
    annotations["categories"].append({"id": 99, "name": "unicorn"})
    (tmp_path / "val.json").write_text(json.dumps(annotations))
    command = [
        DEMO,
        *TINY,
        f"data.root={data}",
        f"output_dir={tmp_path / 'run'}",
        f"data.val_json={tmp_path / 'val.json'}",
    ]
    assert train(command) == 2
    assert "id 99 is absent there and 'unicorn' here" in capsys.readouterr().err


def test_frozen_parts_stay_as_they_are(run, data, tmp_path, capsys):
    command = [DEMO, *TINY, f"data.root={data}", "train.epochs=1", f"train.init_from={run / 'last.safetensors'}"]
    assert train([*command, f"output_dir={tmp_path}", "train.freeze=[encoder, neck]", "train.ema_decay=null"]) == 0
    before, after = load_file(run / "last.safetensors"), load_file(tmp_path / "last.safetensors")
    frozen = [name for name in before if name.startswith(("encoder.", "neck."))]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("decoder."))
    reset_accelerate()
    assert train([*command, f"output_dir={tmp_path / 'x'}", "train.freeze=[encodre]"]) == 2
    assert "the parts are backbone, neck, encoder" in capsys.readouterr().err


def test_three_processes_find_what_one_finds(run, tmp_path):
    """Also with more processes than some shapes have images."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        str(ROOT / "eval.py"),
    ]
    command = [*launch, str(run), "eval.batch_size=2", "--out", str(tmp_path / "three"), "--images", "0"]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    evaluate([str(run), "--out", str(tmp_path / "one"), "--images", "0"])
    assert figures(tmp_path / "three") == pytest.approx(figures(tmp_path / "one"), abs=1e-6)


def test_trackers_get_what_metrics_gets(data, tmp_path):
    pytest.importorskip("tensorboard")
    command = [
        DEMO,
        *TINY,
        f"data.root={data}",
        f"output_dir={tmp_path}",
        "train.epochs=1",
        "train.trackers=[tensorboard]",
        "eval.report=true",
    ]
    assert train(command) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert {"train/loss", "train/lr", "train/terms/decoder.0.rank", "val/AP"} <= set(events.Tags()["scalars"])
    assert {"detections", "precision_recall"} <= set(events.Tags()["images"])
    settings = yaml.safe_load(next(tmp_path.rglob("hparams.yml")).read_text())
    assert settings["optim.lr"] == 0.001 and settings["model.objective.loss"] == "brs"


def test_a_run_that_is_overwritten_or_refused_leaves_no_events(data, tmp_path):
    """TensorBoard draws all events of a folder as one curve; files of the user's stay there."""
    pytest.importorskip("tensorboard")
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", "train.epochs=1"]
    command += ["train.trackers=[tensorboard]", "train.eval_every=null"]
    found = []
    for flags, code in (([], 0), (["--resume", "optim.lr=1"], 2), (["--overwrite"], 0)):
        reset_accelerate()
        assert train([*command, *flags]) == code
        found.append({path for path in tmp_path.rglob("events.*")})
        (tmp_path / "brs_detr" / "notes.txt").touch()
    assert found[0] == found[1] and len(found[2]) == len(found[0]) and not found[2] & found[0]
    assert (tmp_path / "brs_detr" / "notes.txt").is_file() and len(list(tmp_path.rglob("hparams.yml"))) == 1


def test_the_best_validation_leaves_figures_images_and_a_report(data, tmp_path):
    assert train([DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", "eval.report=true"]) == 0
    best = max(
        (line["AP"], -line["epoch"]) for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "val"
    )
    stored = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert stored["stats"]["AP"] == best[0] and stored["about"]["epoch"] == -best[1]
    assert len(list((tmp_path / "evaluation" / "evaluated").iterdir())) == 7
    assert f"<td>{100 * best[0]:.1f}</td>" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_drawn_is_a_warning(data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("brs_detr.run.validation.write_evaluation", fail)
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path}", "eval.report=true", "train.epochs=1"]
    assert train(command) == 0
    assert "the report of the best validation is incomplete" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "best.safetensors").is_file() and not (tmp_path / "report.html").exists()


def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-u", "-m", "brs_detr", "info", DEMO, "--settings"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


def test_settings_may_follow_options(capsys):
    assert cli.main(["info", DEMO, "optim.lr=0.5", "--settings", "seed=3"]) == 0
    said = capsys.readouterr().out
    assert "lr: 0.5" in said and "seed: 3" in said
    with pytest.raises(SystemExit):
        cli.main(["info", DEMO, "--settings", "--sed", "3"])


def test_info_prints_the_settings_as_a_recipe(tmp_path, capsys):
    assert cli.main(["info", DEMO, "optim.lr=0.5", "--settings"]) == 0
    (tmp_path / "same.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "same.yaml") == load_config(DEMO, ["optim.lr=0.5"])


def test_info_shows_the_official_parameter_count_without_a_network(capsys):
    assert cli.main(["info", str(ROOT / "configs" / "brs_detr_r50_12e_coco.yaml")]) == 0
    said = capsys.readouterr().out
    assert "65,126,564" in said and "22,223 cells" in said


def test_predict_writes_a_json_and_images(run, data, tmp_path):
    arguments = ["predict", str(run), str(data / "images" / "val"), "--out", str(tmp_path), "--threshold", "0"]
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert len(found) == 7 and len(list((tmp_path / "detections").iterdir())) == 7
    names = {"disc", "ring", "rectangle", "triangle", "star"}
    assert {thing["name"] for entry in found for thing in entry["objects"]} <= names


def test_check_data_reads_a_recipe(data, tmp_path, capsys):
    sheet = str(tmp_path / "sheet.png")
    assert cli.main(["check-data", DEMO, f"data.root={data}", "--sheet", sheet, "--samples", "2"]) == 0
    assert "10 of 10 images" in capsys.readouterr().out


def test_check_data_takes_limits_as_settings(data, capsys):
    path, images = data / "annotations" / "val.json", data / "images" / "val"
    command = ["check-data", str(path), "--images", str(images), "--samples", "0"]
    assert cli.main([*command, "data.max_image_pixels=100"]) == 1
    assert "more than data.max_image_pixels=100" in capsys.readouterr().err
    assert cli.main([*command, "data.max_json_bytes=100"]) == 1
    assert "more than data.max_json_bytes=100" in capsys.readouterr().err
    assert cli.main(["check-data", DEMO, f"data.root={data}", "data.max_image_pixels=100"]) == 1
    assert "more than data.max_image_pixels=100" in capsys.readouterr().err
    assert cli.main(["info", DEMO, "data.max_image_pixels=0"]) == 2


def test_a_fault_of_the_user_ends_in_one_sentence(capsys):
    assert cli.main(["info", "nowhere.yaml"]) == 2
    assert cli.main(["predict", "nowhere", "nowhere"]) == 2
    assert [line[:7] for line in capsys.readouterr().err.splitlines()] == ["error: "] * 2


@contextlib.contextmanager
def file_limit(size):
    """No file may grow beyond so many bytes, as under `ulimit -f`."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_disk_that_takes_no_more_ends_with_a_code_of_its_own_and_loses_nothing(run, data, tmp_path, capsys):
    """The training's state, and the results of an evaluation; afterwards the run goes on from its last state."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={folder}", "--resume", "train.allow_changes=true"]
    former = sorted(path.name for path in (folder / "state").iterdir())
    with file_limit(300_000):  # config.yaml and the logs are smaller, a state is larger
        assert train([*command, "train.epochs=3"]) == 74
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {folder / 'state'}: cannot be written to: ") and "\n" not in error
    assert sorted(path.name for path in (folder / "state").iterdir()) == former
    reset_accelerate()
    assert train([*command, "train.epochs=3"]) == 0
    assert not list(folder.rglob("*.partial"))
    reset_accelerate()
    for limit, place in ((9_000, tmp_path / "out"), (100, "/dev/shm")):  # the shared memory is files, too
        reset_accelerate()
        with file_limit(limit):
            assert evaluate([str(folder), f"data.root={data}", "--out", str(tmp_path / "out")]) == 74
        error = capsys.readouterr().err
        assert f"error: {place}: " in error and "Traceback" not in error


def test_settings_that_do_not_fit_a_state_are_refused_by_tensor(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    command = [DEMO, *TINY, f"data.root={data}", f"output_dir={tmp_path / 'run'}", "--resume"]
    for change, named in (("model.queries=12", "tensors of the model"), ("train.freeze=[backbone]", "train.freeze")):
        reset_accelerate()
        assert train([*command, "train.allow_changes=true", "train.epochs=3", change]) == 2
        assert named in capsys.readouterr().err
