"""eval.py on a small run trained under bf16: figures that hold for any launch, files that others read, and notes."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support import DEMO, SMALL_DETECTOR, SMALL_IMAGES, reset_accelerate, script
from torch import nn

from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.predict import predict, require_all
from brs_detr.ops.images import ImageBatch

TINY = [
    *SMALL_DETECTOR,
    "model.queries=20",
    *SMALL_IMAGES,
    "train.epochs=8",
    "train.eval_every=8",
    "train.warmup_steps=0",
    "train.total_batch_size=4",
    "train.ema_decay=null",
    "train.precision=bf16",
]


train, evaluate = script("train"), script("eval")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """For each test and, since one of them asks for bf16, for whatever runs next."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve training and nine validation images; those of validation have three shapes and one crowd."""
    root = make_dataset(tmp_path_factory.mktemp("data"), train=12, val=9, image_size=72)
    path = root / "annotations" / "val.json"
    content = json.loads(path.read_text())
    for number, image in enumerate(content["images"]):
        size = ((72, 60), (60, 72), (66, 66))[number % 3]
        file = next((root / "images").rglob("val/" + Path(image["file_name"]).name))
        Image.open(file).resize(size).save(file)
        image["width"], image["height"] = size
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [min(x, 50), min(y, 50), min(w, 20), min(h, 20)]
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    content["annotations"][0] |= {"iscrowd": 1, "bbox": [0, 0, 60, 30], "area": 1800}
    path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    reset_accelerate()
    assert train([DEMO, *TINY, f"data.root={data}", f"output_dir={folder}"]) == 0
    return folder


def report(folder):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "evaluation.json").read_text(), parse_constant=refuse)


def test_the_figures_are_those_of_the_training_to_the_last_digit_whatever_the_precision(run, tmp_path):
    logged = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "val"][-1]
    for override in ("train.precision=bf16", "train.precision=no", "train.precision=fp16"):
        reset_accelerate()
        assert evaluate([str(run / "last.safetensors"), override, "--out", str(tmp_path), "--images", "0"]) == 0
        ours = report(tmp_path)
        assert ours["stats"] == {name: logged[name] for name in ours["stats"]}
        assert [note for note in ours["notes"] if "not calibrated" not in note] == []  # of too few true positives
    assert ours["stats"]["AR100"] > 0  # else the same could be said of any figures


def test_images_of_several_shapes_give_the_same_figures_in_batches_of_any_size(run, tmp_path):
    found = []
    for size in (1, 2, 7):
        assert evaluate([str(run), f"eval.batch_size={size}", "--out", str(tmp_path), "--images", "0"]) == 0
        found.append(report(tmp_path)["stats"])
    assert found[1] == pytest.approx(found[0], abs=1e-6) and found[2] == pytest.approx(found[0], abs=1e-6)


def test_pycocotools_gives_the_same_figures_for_the_json_and_the_results(run, data, tmp_path):
    """Read from the files by its own code, the crowd included."""
    assert evaluate([str(run), "--out", str(tmp_path), "--images", "2"]) == 0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations" / "val.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = report(tmp_path)["stats"]
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    np.testing.assert_allclose([stats[name] for name in names], evaluation.stats, rtol=0, atol=1e-12)
    left = {path.name for path in tmp_path.iterdir()}
    tables = {"results.json", "evaluation.json", "per_class.csv", "precision_recall.csv", "confusion.csv"}
    images = {"precision_recall.png", "confusion.png", "detections.png", "evaluated", "curves.png"}
    assert left == tables | images | {"report.html"}
    assert report(tmp_path)["about"]["annotations"] == str(data / "annotations" / "val.json")


@pytest.mark.parametrize("most", [1, 10, 300])
def test_other_limits_than_cocos_leave_every_figure_defined_and_are_said(run, tmp_path, most):
    words = [f"eval.max_detections={most}", "eval.predict_with=decoder", "--out", str(tmp_path), "--images", "0"]
    assert evaluate([str(run), *words]) == 0
    content = report(tmp_path)
    recalls = {name for name in content["stats"] if name.startswith("AR") and name[2:].isdigit()}
    assert recalls == {f"AR{limit}" for limit in {1, min(10, most), most}}
    assert all(content["stats"][name] >= 0 for name in (*recalls, "AP", "AP50", "AP75", "oLRP"))
    notes = " ".join(content["notes"])
    assert f"best {most} detection(s)" in notes and f"eval.max_detections: 100 -> {most}" in notes
    assert ("the detector returns 50 detections an image, not 300" in notes) == (most == 300)


def test_a_score_threshold_is_said_and_one_above_all_scores_gives_zero(run, tmp_path):
    assert evaluate([str(run), "--out", str(tmp_path), "--images", "1"]) == 0
    assert (tmp_path / "detections.png").exists()
    assert evaluate([str(run), "eval.score_threshold=0.999", "--out", str(tmp_path), "--images", "0"]) == 0
    content = report(tmp_path)
    assert content["stats"]["AP"] == content["stats"]["AR100"] == 0 and content["detections"] == 0
    assert any("score of 0.999 or less are left out" in note for note in content["notes"])
    assert json.loads((tmp_path / "results.json").read_text()) == []
    assert not (tmp_path / "detections.png").exists()  # of the evaluation before


def test_what_is_not_evaluated_is_said(run, data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    path = root / "annotations" / "val.json"
    content = json.loads(path.read_text())
    next((root / "images").rglob("val/" + Path(content["images"][3]["file_name"]).name)).unlink()
    content["annotations"][-1]["bbox"] = [5, 5, 0, 5]
    path.write_text(json.dumps(content))
    assert evaluate([str(run), f"data.root={root}", "--out", str(tmp_path / "out"), "--images", "0"]) == 0
    notes = report(tmp_path / "out")["notes"]
    assert any(note.startswith("1 of 9 images of") for note in notes)
    assert any(note.startswith("1 x box empty") for note in notes)


def test_a_val_set_without_objects_is_refused_by_training_and_said_by_eval(run, data, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    path = root / "annotations" / "val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    command = [DEMO, *TINY, f"data.root={root}", f"output_dir={tmp_path / 'run'}"]
    assert train(command) == 2
    error = capsys.readouterr().err.strip()
    assert "none of its 9 images holds an object" in error and "\n" not in error
    reset_accelerate()
    assert evaluate([str(run), f"data.root={root}", "--out", str(tmp_path / "out"), "--images", "1"]) == 0
    content = report(tmp_path / "out")
    assert content["stats"]["AP"] == -1 and any("nothing to measure" in note for note in content["notes"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())


class Linear(nn.Module):
    """Its score is a product that bf16 would round."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, images, targets):
        scores = self.linear(images.pixels.float().mean((2, 3)))
        return [{"boxes": torch.zeros(1, 4), "scores": row, "labels": torch.zeros(1).long()} for row in scores]


def test_prediction_is_in_float32_also_with_a_model_prepared_for_bf16():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    bare = Linear()
    images = ImageBatch(torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), [(8, 8)], [(8, 8)])
    expected = bare(images, None)[0]["scores"].item()
    prepared = accelerator.prepare_model(bare)
    with accelerator.autocast():
        assert prepared(images, None)[0]["scores"].item() != expected
    (found,) = predict(accelerator.unwrap_model(prepared), [(images, [{"image_id": 5}])], accelerator)
    assert found["scores"].item() == expected
    require_all([found], [5])
    with pytest.raises(RuntimeError, match=r"1 images were predicted but the dataset has 2: missing \[6\]"):
        require_all([found], [5, 6])
