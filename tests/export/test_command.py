"""`python -m brs_detr export` and the example that reads what it writes, as a user types them."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import module_from

from brs_detr import cli
from brs_detr.commands import export
from brs_detr.config import Config, apply_overrides, load_config, to_dict
from brs_detr.data.transforms import EvalTransforms
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.export.parity import Differences, Match
from brs_detr.run.setup import build_detector

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["ring", "disc", "star"]
TINY = ["model.decoder_layers=1", "model.ffn_dim=32", "model.queries=12", "model.detections_per_image=10"]


CURVE = {"method": "platt", "detections": 20, "true_positives": 10, "scores": [0, 0.3, 1], "precisions": [0, 0.8, 0.9]}
MAPS = {"images": 9, "of_label": [0, 0, 0], "thresholds": [0.05, 0.05, 1.0], "curves": [CURVE]}
CALIBRATED = {"calibration": {"decoder": MAPS}}


@pytest.fixture(scope="module")
def weights(spread, tmp_path_factory):
    """A weights file of a small detector with random weights."""
    config = apply_overrides(load_config(ROOT / "configs" / "demo.yaml"), TINY)
    model = spread(build_detector(config, len(CLASSES), initial_weights=False))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    extra = {"thresholds": {"ring": 0.2, "disc": 0.1}}
    save_weights(path, Weights(model.state_dict(), CLASSES, [7, 3, 12], to_dict(config), extra))
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """An image of just the size of the detector's input: neither resizing nor padding, which round, come in."""
    path = tmp_path_factory.mktemp("images") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def no_export(monkeypatch):
    """Exporting, which takes seconds, replaced by writing an empty file."""
    monkeypatch.setattr(export, "write_onnx", lambda model, path, size, **options: path.write_bytes(b""))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "extra"), [("roi", {}), ("decoder", CALIBRATED)])
def test_what_is_exported_is_checked_and_the_example_finds_what_predict_finds(
    weights, image, tmp_path, capsys, head, extra
):
    """The head is the one that the weights name as the best."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    loaded, out = load_weights(weights), tmp_path / "new" / "model.onnx"
    weights = tmp_path / "best.safetensors"
    save_weights(weights, replace(loaded, extra={**loaded.extra, "predict_with": head, **extra}))
    command = ["export", str(weights), "--out", str(out), "--height", "70", "--width", "70", "--image", str(image)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"\): boxes [\d.e+-]+ pixels, scores [\d.e+-]+", said)) == 3 and str(image) in said
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"] and f"exporting head {head} for" in said

    example = [sys.executable, str(ROOT / "examples" / "onnx_detect.py"), str(out), str(image)]
    printed = subprocess.run(example, capture_output=True, text=True, check=True).stdout.splitlines()
    assert cli.main(["predict", str(weights), str(image), "--out", str(tmp_path / "torch")]) == 0
    (expected,) = json.loads((tmp_path / "torch" / "predictions.json").read_text())
    assert len(printed) == len(expected["objects"]) > 0
    assert ("scores are not calibrated" in said) == (not extra)
    for line, one in zip(printed, expected["objects"]):
        found = re.fullmatch(r"(\S+)  x (\S+) y (\S+) width (\S+) height (\S+)  (\w+) \(category (\d+)\)", line)
        assert (found[6], int(found[7])) == (one["name"], one["category_id"])
        assert float(found[1]) == pytest.approx(one["score"], abs=2e-4)
        assert [float(found[i]) for i in (2, 3, 4, 5)] == pytest.approx(one["bbox"], abs=0.03)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(60, 44), (90, 123)])
def test_the_example_resizes_as_predict_does(antialias, size):
    """To a gray level, with and without the low-pass filter, smaller and larger."""
    pytest.importorskip("onnxruntime")
    example = module_from(ROOT / "examples" / "onnx_detect.py")
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 12) * 255, size=(75, 103), mode="bilinear")[0].byte()
    facts = {"short_side": min(size), "long_side": max(size), "antialias": antialias, "size": None}
    ours = example.resize(Image.fromarray(smooth.permute(1, 2, 0).numpy()), facts)
    theirs, _ = EvalTransforms(min(size), max(size), antialias)(smooth, {"boxes": torch.zeros(0, 4)})
    assert ours.size == (theirs.shape[2], theirs.shape[1])
    apart = torch.from_numpy(np.array(ours)).permute(2, 0, 1).int() - theirs.int()
    assert apart.abs().max() <= 1


def test_a_file_that_computes_something_else_is_not_written(weights, tmp_path, capsys, monkeypatch, no_export):
    monkeypatch.setattr(export, "installed", lambda name: True)
    monkeypatch.setattr(export, "ExportedDetector", lambda path: None)
    monkeypatch.setattr(export, "compare", lambda *arguments: Differences(3.5, 0.0))
    monkeypatch.setattr(export.importlib.metadata, "version", lambda name: "1")
    assert cli.main(["export", str(weights), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "was not written: onnxruntime 1 differs from torch by 3.5 pixels" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_file_is_written_unchecked(weights, tmp_path, capsys, monkeypatch, no_export):
    monkeypatch.setattr(export, "installed", lambda name: name != "onnxruntime")
    assert cli.main(["export", str(weights), "--out", str(tmp_path / "model.onnx")]) == 0
    assert "not checked: onnxruntime is not installed (pip install onnxruntime)" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").exists()


def test_without_the_exporters_packages_nothing_begins(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "installed", lambda name: False)
    assert cli.main(["export", str(weights), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval.predict_with=ensemble", "--out", "model.onnx"], "needs weights whose validation scored all heads"),
        (["--out", "model.pt"], "must end in .onnx, or in .pt2 for torch"),
        (["--out", "model.onnx", "--format", "torch"], "must end in .pt2"),
        (["--out", "model.pt2", "--precision", "fp16"], "--precision=fp16: is for ONNX files"),
        (["--out", "model.onnx", "--precision", "int8"], "there is none of datasets/demo/annotations/train.json. Give"),
        (["--out", "model.onnx", "--precision", "int8", "data=new"], "data: has no effect, as this command opens no"),
        (["--out", "model.onnx", "--any-size", "--width", "64"], "Leave out --height and --width"),
        (["--out", "model.onnx", "--height", "12"], "--height=12: the coarsest feature map of this detector needs"),
        (["--out", "model.onnx", "--opset", "9"], "--opset=9"),
        (["--out", "model.pt2", "--opset", "18"], "--opset=18: is for ONNX files"),
        (["--out", "model.onnx", "--calibration-images", "x"], "--calibration-images: is for --precision int8. Add"),
        (["--out", "/dev/null/model.onnx"], "--out=/dev/null: cannot be written to"),
        (["--out", "model.onnx", "--image", "absent.jpg"], "absent.jpg: this image cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(weights, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "installed", lambda name: True)
    assert cli.main(["export", str(weights), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_image_fits_the_default_input_at_its_test_size(weights, tmp_path, monkeypatch, no_export):
    asked = {}
    monkeypatch.setattr(export, "write_onnx", lambda model, path, size, **options: asked.update(options, size=size))
    monkeypatch.setattr(export, "check", lambda model, path, *rest: path.write_bytes(b""))
    overrides = ["data.test_short_side=60", "data.test_long_side=90"]
    assert cli.main(["export", str(weights), *overrides, "--out", str(tmp_path / "model.onnx")]) == 0
    facts = asked["metadata"]
    assert asked["size"] == facts["size"] == (90, 90) and asked["pixels"] == torch.uint8
    assert facts["classes"] == CLASSES and facts["category_ids"] == [7, 3, 12]
    assert facts["thresholds"] == [0.2, 0.1, 1.0]  # star: never found right in validation
    assert (facts["short_side"], facts["long_side"], facts["antialias"]) == (60, 90, True)


def test_ranges_are_measured_on_images_that_the_training_json_lists(tmp_path):
    """Both splits lie in one folder, as of YOLO, VOC and `data.val_fraction`."""
    folder, names = tmp_path / "images", [f"{number:04}.jpg" for number in range(30)]
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    listed = [{"id": number, "file_name": f"{number:04}.jpg"} for number in (9, 1, 40, 5)]  # 40 is not there
    content = {"images": listed, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    paths = [f"data.root={tmp_path}", "data.train_json=train.json", "data.train_images=images"]
    config, options = load_config(ROOT / "configs" / "demo.yaml", paths), argparse.Namespace(calibration_images=None)
    assert [path.name for path in export.calibration_files(options, config)] == ["0001.jpg", "0005.jpg", "0009.jpg"]
    options.calibration_images = folder
    assert [path.name for path in export.calibration_files(options, config)] == names


@pytest.mark.parametrize(("count", "last"), [(100, 99), (101, 99), (199, 197), (999, 989)])
def test_images_for_the_ranges_are_evenly_spaced_up_to_the_last(tmp_path, count, last):
    for number in range(count):
        (tmp_path / f"{number:04}.jpg").touch()
    files = export.calibration_files(argparse.Namespace(calibration_images=tmp_path), Config())
    numbers = np.array([int(path.stem) for path in files])
    assert len(files) == 100 and numbers[0] == 0 and numbers[-1] == last
    assert set(np.diff(numbers)) <= {count // 100, count // 100 + 1}


@pytest.mark.parametrize(("precision", "found"), [("fp16", 10), ("int8", 5), ("int8", 4)])
def test_a_file_is_narrowed_after_its_check_and_only_kept_if_it_finds_the_same(
    weights, image, tmp_path, capsys, monkeypatch, no_export, precision, found
):
    """Ten detections, of which half must be found again; both files are replaced by fakes."""
    module, order = export.narrow.__globals__, []
    monkeypatch.setattr(export, "installed", lambda name: True)
    monkeypatch.setattr(export, "check", lambda *arguments: order.append("checked"))
    monkeypatch.setitem(module, "write_float16", lambda source, target, kept: target.write_bytes(b"fp16"))

    def write_int8(source, target, batches):
        order.extend(batch["pixels"].shape for batch in batches)
        target.write_bytes(b"int8")

    monkeypatch.setitem(module, "write_int8", write_int8)
    monkeypatch.setitem(module, "ExportedDetector", lambda path: lambda batch: order.append(path.suffix))
    monkeypatch.setitem(module, "match_best", lambda *arguments: Match(10, found, 0.5, 0.01))
    out = tmp_path / "out" / "model.onnx"
    command = ["export", str(weights), "--out", str(out), "--height", "72", "--width", "90", "--precision", precision]
    (tmp_path / "broken.png").write_bytes(b"no image")
    shutil.copy(image, tmp_path / "good.png")
    if precision == "int8":
        command += ["--calibration-images", str(tmp_path)]
    code = cli.main(command)
    said = capsys.readouterr()
    assert order[0] == "checked" and f"{precision} against fp32" in said.out
    assert f"noise (54x90): {found} of 10 found, boxes 0.5 pixels, scores 0.01" in said.out
    if precision == "int8":
        assert order[1] == (1, 3, 72, 90) and "good.png (70x70)" in said.out and "skipped: " in said.out
    if found < 5:
        assert code == 2 and f"only {found * 3} of the 30 best detections" in said.err
        assert not list(out.parent.iterdir())
    else:
        assert (
            code == 0
            and out.read_bytes() == precision.encode()
            and [p.name for p in out.parent.iterdir()] == [out.name]
        )
