"""Whatever lies in a folder, `predict` ends, and what it found is kept."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import DEMO, SMALL_DETECTOR

from brs_detr import cli
from brs_detr.commands import predict
from brs_detr.config import load_config, to_dict
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.ops.masks import decode_masks, encode_masks
from brs_detr.run.setup import build_detector

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

    monkeypatch.setattr(predict, "read_image", read)
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

    restored = predict.restore(weights)
    monkeypatch.setattr(restored[0], "forward", detect)
    monkeypatch.setattr(predict, "restore", lambda *_: restored)
    file = image(tmp_path / "a.png")
    out = tmp_path / "out"
    assert cli.main(["predict", str(weights), str(file), "--out", str(out), "--threshold", "0.5"]) == 0
    (entry,) = json.loads((out / "predictions.json").read_text())
    masks = [found["segmentation"] for found in entry["objects"]]
    assert torch.equal(decode_masks(masks, (30, 40)).bool(), bitmaps[[0, 2]])
    drawn = Image.open(out / "detections" / "a.png")
    assert drawn.getpixel((480, 320)) != drawn.getpixel((160, 400)) == (200, 30, 30)
