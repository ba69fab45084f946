"""Whatever lies in a folder, `predict` ends, and what it found is kept."""

import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import DEMO, SMALL_DETECTOR

from brs_detr import cli, predictor
from brs_detr.commands import predict
from brs_detr.config import load_config, to_dict
from brs_detr.data import video
from brs_detr.detections import Detections
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.ops.masks import decode_masks, encode_masks
from brs_detr.run.setup import build_detector
from brs_detr.run.weights import score_thresholds

CLASSES, LABELS = ["disc", "ring"], ([7, 3], {})
SMALL = [*SMALL_DETECTOR, "model.rpn.test_proposals=20", "data.test_short_side=64"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A detector that has learned nothing."""
    config = load_config(DEMO, SMALL)
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    tensors = build_detector(config, 2, initial_weights=False).state_dict()
    save_weights(path, Weights(tensors, ["a", "b"], [1, 2], to_dict(config)))
    return path


def image(path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path, "PNG")
    return path


def names_found(out):
    return [entry["file_name"] for entry in json.loads((out / "predictions.json").read_text())]


def test_what_is_no_image_is_passed_over_and_said(weights, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    image(folder / "a.png")
    os.mkfifo(folder / "b.jpg")
    (folder / "c.jpg").symlink_to("/dev/zero")
    with open(folder / "d.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(8 * 2**30)
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    pixels = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    (folder / "e.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + checksum + pixels)
    (folder / "f.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "g.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "h.jpg").mkdir()
    assert cli.main(["predict", str(weights), str(folder), "--out", str(tmp_path / "out")]) == 0
    assert names_found(tmp_path / "out") == ["a.png"]
    said = [
        line.rpartition("cannot be read: ")[2] for line in capsys.readouterr().out.splitlines() if "skipped" in line
    ]
    assert said[:2] == ["it is a named pipe, not a regular file.", "it is a device, not a regular file."]
    assert said[2].startswith("it has 8,589,934,592 bytes, more than data.max_image_bytes=536870912; raise")
    assert said[3].startswith("it has 169,000,000 pixels, more than data.max_image_pixels=120000000; raise")
    assert said[4].startswith("it begins with '%!PS-Adobe") and len(said) == 6


def test_limits_are_settings(weights, tmp_path, capsys):
    image(tmp_path / "a.png")
    command = ["predict", str(weights), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "data.max_image_pixels=1199"]) == 1
    assert "1,200 pixels, more than data.max_image_pixels=1199" in capsys.readouterr().out
    assert cli.main([*command, "data.max_image_pixels=1200"]) == 0


def test_names_of_any_bytes_and_length(weights, tmp_path, capsysbinary):
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        b"zellen\xfc.png",
        b"x" * 251 + b".png",
        b"y" * 250 + b".jpeg",
        b"\x1b[31mred\n.png",
        "ü".encode() * 125 + b".png",
    ]
    for name in names:
        image(os.path.join(os.fsencode(folder), name))
    image(os.fsencode(folder) + b"/" + b"y" * 250 + b".png")  # the plain name of the drawing of the .jpeg
    assert cli.main(["predict", str(weights), str(folder), "--out", str(tmp_path / "out")]) == 0
    found = [os.fsencode(name) for name in names_found(tmp_path / "out")]
    assert sorted(found) == sorted([*names, b"y" * 250 + b".png"])
    drawn = os.listdir(os.fsencode(tmp_path / "out" / "detections"))
    assert len(drawn) == 6 and b"zellen\xfc.png" in drawn
    said = capsysbinary.readouterr().out
    assert rb"zellen\xfc.png: " in said
    assert b"\x1b" not in said and rb"\x1b[31mred\x0a.png" in said


def test_names_of_drawings_are_short_different_and_the_same_again():
    files = [
        Path(name) for name in ("b.gif", "b.jpg", "b.jpg.png", "d/" + "ü" * 126 + ".png", "d/" + "ü" * 126 + ".gif")
    ]
    names = predict.drawing_names(files)
    assert names[0] == Path("b.gif.png") and len(set(names)) == 5 and names == predict.drawing_names(files)
    assert all(len(os.fsencode(name.name)) <= 255 and name.parent == file.parent for name, file in zip(names, files))
    assert predict.drawing_names([Path("a/1.jpg"), Path("b/1.jpg")]) == [Path("a/1.png"), Path("b/1.png")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_found_before_the_end_came_is_kept(weights, tmp_path, monkeypatch, error):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "abc":
        image(folder / f"{name}.png")
    calls = []

    def read(path, **limits):
        calls.append(path)
        if len(calls) == 3:
            lines = (out / "predictions.partial.jsonl").read_text().splitlines()  # what a SIGKILL would leave
            assert [json.loads(line)["file_name"] for line in lines] == ["a.png", "b.png"]
            raise error
        return torch.zeros(3, 30, 40, dtype=torch.uint8)

    monkeypatch.setattr(video, "read_image", read)
    with pytest.raises(error):
        cli.main(["predict", str(weights), str(folder), "--out", str(out)])
    assert names_found(out) == ["a.png", "b.png"] and not (out / "predictions.partial.jsonl").exists()


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "HF-HUB:nobody/nothing", "local-dir:/tmp"])
def test_weights_lead_to_no_network(weights, tmp_path, capsys, monkeypatch, name):
    original = load_weights(weights)
    config = {
        **original.config,
        "model": {**original.config["model"], "backbone": dict(original.config["model"]["backbone"])},
    }
    plain = config["model"]["backbone"]["name"]
    config["model"]["backbone"]["name"] = name
    save_weights(tmp_path / "x.safetensors", Weights(original.tensors, original.classes, original.category_ids, config))
    image(tmp_path / "a.png")

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    command = ["predict", str(tmp_path / "x.safetensors"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert f"x.safetensors: its backbone {name} is looked up elsewhere" in said and said.count("\n") == 1
    assert cli.main([*command, f"model.backbone.name={plain}"]) == 0


@pytest.mark.parametrize("encoded", [True, False])
def test_masks_are_written_and_drawn_with_their_objects(weights, tmp_path, monkeypatch, encoded):
    """Three detections, of which the second is below the threshold."""
    bitmaps = torch.zeros(3, 30, 40, dtype=torch.bool)
    bitmaps[0, 2:6, 2:12], bitmaps[2, 10:30, 20:40] = True, True

    def detect(images, targets):
        scores, labels = torch.tensor([0.9, 0.1, 0.6]), torch.tensor([0, 1, 1])
        boxes = torch.tensor([[2.0, 2, 12, 6], [0, 0, 9, 9], [20, 10, 40, 30]])
        masks = encode_masks(bitmaps) if encoded else bitmaps
        return [{"boxes": boxes, "scores": scores, "labels": labels, "masks": masks}]

    restored = predictor.restore(weights)
    monkeypatch.setattr(restored[0], "forward", detect)
    monkeypatch.setattr(predictor, "restore", lambda *_: restored)
    file = image(tmp_path / "a.png")
    out = tmp_path / "out"
    assert cli.main(["predict", str(weights), str(file), "--out", str(out), "--threshold", "0.5"]) == 0
    (entry,) = json.loads((out / "predictions.json").read_text())
    masks = [found["segmentation"] for found in entry["objects"]]
    assert torch.equal(decode_masks(masks, (30, 40)).bool(), bitmaps[[0, 2]])
    drawn = Image.open(out / "detections" / "a.png")
    assert drawn.getpixel((480, 320)) != drawn.getpixel((160, 400)) == (200, 30, 30)


def test_small_scores_that_differ_stay_different():
    """Those of a ranking loss: with four decimals they would be equal, and AP another one than that of `eval`."""
    scores, boxes = np.array([0.0312346, 0.0312344, 8.76543e-6]), np.zeros((3, 4), np.float32)
    found = Detections(boxes, scores, np.zeros(3, int), np.ones(3, int), ["a"] * 3, (8, 8))
    assert [one["score"] for one in predict.describe(found)] == scores.tolist()


def of_head(name, *heads):
    return SimpleNamespace(predict_with=name, heads=heads or ("decoder", "roi", "atss"))


def test_objects_begin_at_the_score_that_was_best_in_validation():
    validated, one = Weights({}, CLASSES, *LABELS, {"thresholds": {"ring": 0.04}}), of_head("head", "head")
    assert score_thresholds(one, validated, None) == [1.0, 0.04]
    assert score_thresholds(one, validated, 0.2) == [0.2, 0.2]
    assert score_thresholds(one, Weights({}, CLASSES, *LABELS), None) == [0.3, 0.3]


def test_each_head_has_the_thresholds_of_its_own():
    """The scores of a RoI head are ten times the decoder's: with the other one's threshold nothing would be left."""
    own = {"decoder": {"disc": 0.03, "ring": 0.04}, "roi": {"ring": 0.6}, "atss": {"disc": 0.1, "ring": 0.1}}
    extra = {"thresholds": own["roi"], "predict_with": "roi", "head_thresholds": own}
    weights = Weights({}, CLASSES, *LABELS, extra)
    found = {head: score_thresholds(of_head(head), weights, None) for head in (*own, "ensemble")}
    assert found == {"decoder": [0.03, 0.04], "roi": [1.0, 0.6], "atss": [0.1, 0.1], "ensemble": [0.3, 0.3]}


@pytest.mark.parametrize(("extra", "config"), [({"predict_with": "roi"}, {}), ({}, {"eval": {"predict_with": "roi"}})])
def test_thresholds_of_files_with_those_of_one_head_are_not_taken_for_another_head(extra, config):
    weights = Weights({}, CLASSES, [7, 3], config, {"thresholds": {"ring": 0.6}, **extra})
    assert score_thresholds(of_head("roi"), weights, None) == [1.0, 0.6]
    assert score_thresholds(of_head("decoder"), weights, None) == [0.3, 0.3]


def test_what_is_written_and_drawn_are_the_detections_of_the_chosen_head_above_its_thresholds(
    weights, tmp_path, monkeypatch
):
    """Thresholds that the first three detections of each head reach, in one file."""
    loaded, path = load_weights(weights), image(tmp_path / "a.png")
    heads, scores = ("decoder", "roi", "atss"), {}
    for head in heads:
        out = tmp_path / f"all_{head}"
        choice = f"eval.predict_with={head}"
        assert cli.main(["predict", str(weights), str(path), choice, "--threshold", "0", "--out", str(out)]) == 0
        (entry,) = json.loads((out / "predictions.json").read_text())
        scores[head] = sorted((one["score"] for one in entry["objects"]), reverse=True)
    limits = {head: dict.fromkeys("ab", scores[head][2] - 1e-4) for head in heads}
    assert len({round(own["a"], 3) for own in limits.values()}) > 1  # or any head's would do
    extra = {"thresholds": limits["roi"], "predict_with": "roi", "head_thresholds": limits}
    save_weights(tmp_path / "own.safetensors", replace(loaded, extra=extra))
    drawn = []
    monkeypatch.setattr(predict, "draw_detections", lambda image, kept, *_, **__: drawn.append(kept) or image)
    for head, options in {
        "roi": [],
        "decoder": ["eval.predict_with=decoder"],
        "atss": ["eval.predict_with=atss"],
    }.items():
        command = ["predict", str(tmp_path / "own.safetensors"), str(path), *options, "--out", str(tmp_path / head)]
        assert cli.main(command) == 0
        (entry,) = json.loads((tmp_path / head / "predictions.json").read_text())
        expected = [score for score in scores[head] if score >= limits[head]["a"]]
        assert sorted((one["score"] for one in entry["objects"]), reverse=True) == expected
        assert len(drawn[-1]["scores"]) == len(expected) >= 3


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "needs weights whose validation scored all heads. Train with eval.predict_with=auto or ensemble, or use"),
        ({"ensemble": {"ap": {}, "levels": {}}}, "is damaged or of another detector. Use one of decoder, roi, atss as"),
        ({"ensemble": 3}, "what it says of the heads' scores cannot be read. Use one of decoder, roi, atss as"),
    ],
)
def test_heads_that_no_validation_has_compared_are_not_joined(weights, tmp_path, capsys, extra, said):
    save_weights(tmp_path / "own.safetensors", replace(load_weights(weights), extra=extra))
    command = [
        "predict",
        str(tmp_path / "own.safetensors"),
        str(image(tmp_path / "a.png")),
        "eval.predict_with=ensemble",
    ]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


CURVES = [{"method": "platt", "detections": 9, "true_positives": 9, "scores": [0, 0.1, 1], "precisions": [0, 0.9, 1]}]
STORED = {"images": 3, "of_label": [0, 0], "thresholds": [0.5, 0.8], "curves": CURVES}


def predicted(weights, tmp_path, monkeypatch, extra, *options):
    """Predict one image with stored metadata; raw scores are 0.06 (class a), 0.08 (b), 0.01 (b)."""

    def detect(images, targets):
        boxes = torch.tensor([[2.0, 2, 12, 6], [0, 0, 9, 9], [20, 10, 40, 30]])
        return [{"boxes": boxes, "scores": torch.tensor([0.06, 0.08, 0.01]), "labels": torch.tensor([0, 1, 1])}]

    stored = load_weights(weights)
    path = tmp_path / "y.safetensors"
    save_weights(path, Weights(stored.tensors, stored.classes, stored.category_ids, stored.config, extra))

    def restored(file, overrides):
        model, *rest = restore(file, overrides)
        model.forward = detect
        return model, *rest

    restore = predictor.restore
    monkeypatch.setattr(predictor, "restore", restored)
    out = tmp_path / "out"
    assert cli.main(["predict", str(path), str(image(tmp_path / "a.png")), "--out", str(out), *options]) == 0
    (entry,) = json.loads((out / "predictions.json").read_text())
    return [(thing["name"], thing["score"]) for thing in entry["objects"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [("a", 0.54)]),
        (["--threshold", "0.5"], [("b", 0.72), ("a", 0.54)]),
        (["--raw-scores"], [("b", 0.08), ("a", 0.06)]),
        (["eval.calibrate=false"], [("b", 0.08), ("a", 0.06)]),
        (["--raw-scores", "--threshold", "0.07"], [("b", 0.08)]),
    ],
)
def test_scores_are_calibrated_unless_raw_ones_are_asked_for(weights, tmp_path, monkeypatch, options, expected):
    extra = {"calibration": {"decoder": STORED}, "thresholds": {"a": 0.05, "b": 0.07}}
    assert predicted(weights, tmp_path, monkeypatch, extra, *options) == expected


def test_weights_without_a_map_say_so_once(weights, tmp_path, monkeypatch, capsys):
    extra = {"calibration": {"roi": STORED}, "thresholds": {"a": 0.05, "b": 0.07}}  # of another head
    assert predicted(weights, tmp_path, monkeypatch, extra) == [("b", 0.08), ("a", 0.06)]
    assert capsys.readouterr().out.count("scores are not calibrated") == 1


def test_a_suppression_that_the_chosen_head_does_not_use_is_said(weights, tmp_path, capsys):
    words = ["predict", str(weights), str(image(tmp_path / "a.png")), "--no-images", "--out", str(tmp_path / "out")]
    stored = load_weights(weights)
    file, extra = tmp_path / "roi.safetensors", {"predict_with": "roi"}  # auto, and the last validation chose it
    save_weights(file, replace(stored, extra=extra))
    assert cli.main([*words[:1], str(file), *words[2:], "eval.nms.kind=soft"]) == 0
    assert "eval.nms.kind=soft: has no effect on head roi, which suppresses by" in capsys.readouterr().out
    assert cli.main([*words, "eval.nms.kind=soft"]) == 0
    assert "has no effect" not in capsys.readouterr().out
    assert cli.main([*words, "eval.nms.kind=soft", "eval.predict_with=roi"]) == 2
    assert "eval.nms.kind=soft: has no effect with eval.predict_with=roi." in capsys.readouterr().err


def test_no_object_above_the_threshold_names_the_best_score(weights, tmp_path, monkeypatch, capsys):
    extra = {"calibration": {"decoder": STORED}}
    assert predicted(weights, tmp_path, monkeypatch, extra, "--threshold", "0.75") == []
    assert "0 objects; the best score is 0.72, of b, below its threshold 0.75" in capsys.readouterr().out


def test_a_damaged_map_names_the_way_around_it(weights, tmp_path, monkeypatch, capsys):
    stored = load_weights(weights)
    path = tmp_path / "z.safetensors"
    extra = {"calibration": {"decoder": {**STORED, "of_label": [0]}}}
    save_weights(path, Weights(stored.tensors, stored.classes, stored.category_ids, stored.config, extra))
    file = str(image(tmp_path / "a.png"))
    assert cli.main(["predict", str(path), file, "--out", str(tmp_path / "out")]) == 2
    assert "the calibration is of 1 classes, not 2. Use raw scores: eval.calibrate=false." in capsys.readouterr().err
    assert cli.main(["predict", str(path), file, "--out", str(tmp_path / "out"), "eval.calibrate=false"]) == 0
