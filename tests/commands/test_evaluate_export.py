"""`eval FILE.onnx`: the figures of the detector that the file was made from, and what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import DEMO, SMALL_DETECTOR, module_from, reset_accelerate

from brs_detr import cli
from brs_detr.commands import evaluate_export
from brs_detr.commands.export import portable_settings, validation
from brs_detr.config import ConfigError, load_config, to_dict
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.models.config import NoNMS, SoftNMS
from brs_detr.run.setup import build_detector

CLASSES, IDS = ["disc", "ring", "star"], [3, 7, 12]
SIZES = [(64, 80), (80, 64), (70, 70), (64, 80)]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerate()


def spread(model):
    return module_from(__file__.replace("commands/test_evaluate_export", "export/conftest")).spread_weights(model)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A detector with random weights, four images, and annotations that it finds in part."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    random, images, annotations = np.random.default_rng(1), [], []
    config = load_config(DEMO, [*SMALL_DETECTOR, "model.detections_per_image=20"])
    model = spread(build_detector(config, len(CLASSES), initial_weights=False))
    model.predict_with = "decoder"
    for number, (height, width) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        with torch.no_grad():
            (found,) = model([torch.from_numpy(pixels).permute(2, 0, 1)])
        for index in range(0, 12, 2):  # every other one, moved a little, so that AP is neither 0 nor 1
            x1, y1, x2, y2 = (found["boxes"][index] + random.normal(0, 0.5, 4)).tolist()
            box = [max(x1, 0), max(y1, 0), max(x2 - max(x1, 0), 2), max(y2 - max(y1, 0), 2)]
            entry = {"id": len(annotations) + 1, "image_id": number, "bbox": box, "area": box[2] * box[3]}
            annotations.append({**entry, "category_id": IDS[int(found["labels"][index])], "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in zip(IDS, CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    return SimpleNamespace(folder=folder, config=config, model=model)


DATA = ["data.val_json=val.json", "data.val_images=images"]
SAME_SIZE = ["data.test_short_side=64", "data.test_long_side=80", "eval.predict_with=decoder"]


@pytest.mark.slow
def test_a_file_has_the_figures_of_its_weights_and_prints_both(world, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    weights, data = tmp_path / "w.safetensors", [*DATA, f"data.root={world.folder}"]
    stored = load_config(DEMO, [*SMALL_DETECTOR, "model.detections_per_image=20", *SAME_SIZE, *data])
    save_weights(weights, Weights(world.model.state_dict(), CLASSES, IDS, to_dict(stored), {}))
    assert cli.main(["eval", str(weights), "--images", "0", "--out", str(tmp_path / "torch")]) == 0
    stats = json.loads((tmp_path / "torch" / "evaluation.json").read_text())["stats"]
    assert 0.02 < stats["AP"] < 0.95
    fingerprint = evaluate_export.open_val_set(stored.data).fingerprint()
    extra = {"metrics": stats, "epoch": 3, "validated_on": fingerprint}
    save_weights(weights, replace(load_weights(weights), extra=extra))

    out = tmp_path / "model.onnx"
    assert cli.main(["export", str(weights), "--any-size", "--out", str(out)]) == 0
    assert str(world.folder).encode() not in out.read_bytes()
    reset_accelerate()
    capsys.readouterr()
    assert cli.main(["eval", str(out), "--images", "0"]) == 2
    error = capsys.readouterr().err
    assert "does not hold data.root" in error and "Add data.root=..., or data=FOLDER." in error
    for size in (1, 3):
        reset_accelerate()
        words = [f"data.root={world.folder}", f"eval.batch_size={size}", "--images", "0"]
        assert cli.main(["eval", str(out), *words]) == 0
        said = capsys.readouterr().out
        report = json.loads((tmp_path / "model-evaluation" / "evaluation.json").read_text())
        for name in ("AP", "AP50", "AP75", "AR100"):
            assert report["stats"][name] == pytest.approx(stats[name], abs=1e-4), name
        assert report["about"]["precision"] == "fp32" and report["about"]["original"]["figures"]["AP"] == stats["AP"]
        line = next(line for line in said.splitlines() if line.startswith("difference"))
        assert all(abs(float(value)) <= 0.01 for value in line.split()[1:])


def facts(**changes):
    return {
        "short_side": 800,
        "long_side": 1333,
        "size": None,
        "config": portable_settings(load_config(DEMO, ["data.root=/home/me/data"])),
        **changes,
    }


def test_relative_paths_travel_in_the_file_and_absolute_ones_do_not(tmp_path):
    held = facts()["config"]["data"]
    assert held["val_json"] == "annotations/val.json" and "root" not in held
    assert portable_settings(load_config(DEMO))["data"]["root"] == "datasets/demo"
    with pytest.raises(ConfigError, match=r"m.onnx: does not hold data.root: .* Add data.root=\.\.\."):
        evaluate_export.settings(tmp_path / "m.onnx", facts(), [])
    config = evaluate_export.settings(tmp_path / "m.onnx", facts(), ["data.root=here", "eval.batch_size=3"])
    assert (config.data.root, config.data.val_json, config.data.test_short_side) == ("here", "annotations/val.json", 70)


def test_an_exported_file_is_evaluated_with_the_limits_of_its_weights(tmp_path):
    config = load_config(DEMO, ["eval.score_threshold=0.1", "eval.max_detections=50"])
    found = evaluate_export.settings(tmp_path / "m.onnx", {"config": portable_settings(config)}, [])
    assert (found.eval.score_threshold, found.eval.max_detections) == (0.1, 50)


@pytest.mark.parametrize("word", ["model.queries=5", "data.test_short_side=64", "eval.predict_with=roi"])
def test_what_is_fixed_in_a_file_is_refused(tmp_path, capsys, word):
    (tmp_path / "m.onnx").touch()
    assert cli.main(["eval", str(tmp_path / "m.onnx"), word]) == 2
    assert f"{word.partition('=')[0]}: is fixed in an exported file" in capsys.readouterr().err


def test_a_file_of_torch_export_is_refused(tmp_path, capsys):
    (tmp_path / "m.pt2").touch()
    assert cli.main(["eval", str(tmp_path / "m.pt2")]) == 2
    assert "m.pt2: a file of torch.export is not evaluated. Give its weights, or an .onnx." in capsys.readouterr().err


def test_figures_are_stored_for_the_head_that_is_exported_unless_settings_have_changed(world):
    config = replace(world.config, eval=replace(world.config.eval, predict_with="auto"))
    metrics = {"AP": 0.5, "AP50": 0.7, "loss": 3.0, "decoder_AP": 0.4, "roi_AP": 0.5}
    weights = Weights({}, CLASSES, IDS, to_dict(config), {"metrics": metrics, "predict_with": "roi", "epoch": 2})
    names = {"heads": ("decoder", "roi", "atss"), "overlapping": ("decoder",)}
    model = SimpleNamespace(predict_with="roi", nms=NoNMS(), **names)
    assert validation(model, weights, config)["figures"] == {"AP": 0.5, "AP50": 0.7}
    model.predict_with = "decoder"
    assert validation(model, weights, config)["figures"] == {"AP": 0.4}
    model.nms = SoftNMS()  # which the file is without
    assert validation(model, weights, config) is None
    model.predict_with = "atss"
    assert validation(model, weights, config) is None
    model.predict_with = "roi"
    assert validation(model, weights, config) is not None  # it suppresses in its own way, as its graph does
    assert validation(model, weights, replace(config, data=replace(config.data, test_short_side=99))) is None
    assert validation(model, weights, replace(config, eval=replace(config.eval, test_flip=True))) is None
    assert validation(model, weights, replace(config, eval=replace(config.eval, predict_with="roi", batch_size=7)))
    assert validation(model, replace(weights, extra={}), config) is None


def test_the_comparison_says_where_there_is_nothing_to_compare():
    summary = SimpleNamespace(stats={"AP": 0.5, "AP50": 0.75})
    dataset = SimpleNamespace(fingerprint=lambda: "b")
    assert "holds no figures" in evaluate_export.comparison({}, summary, dataset)
    held = {"validation": {"figures": {"AP": 0.51, "AP50": 0.75, "APl": -1.0}, "images": "a"}}
    table = evaluate_export.comparison(held, summary, dataset)
    assert "-1.00" in table and "+0.00" in table and "of other images" in table
    unannotated = SimpleNamespace(stats={"AP": -1.0, "AP50": -1.0})
    assert evaluate_export.comparison(held, unannotated, dataset) == "There are no figures to compare."
    held["validation"]["images"] = "b"
    assert "images" not in evaluate_export.comparison(held, summary, dataset)
    held["validation"]["images"] = None
    assert "do not say on which images" in evaluate_export.comparison(held, summary, dataset)
