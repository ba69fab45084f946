"""`predict` on lists, tiles, videos and in every format: boxes as of one image after the other."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import DEMO, SMALL_DETECTOR

from brs_detr import cli
from brs_detr.commands import predict as command
from brs_detr.config import load_config, to_dict
from brs_detr.data import sources, video
from brs_detr.data.config import Limits
from brs_detr.detections import Detections
from brs_detr.engine.checkpoint import Weights, save_weights
from brs_detr.engine.tiled import join_outputs
from brs_detr.ops.masks import decode_masks, encode_masks
from brs_detr.ops.tiles import tile_grid
from brs_detr.predictor import Predictor
from brs_detr.run.prediction_files import Labels
from brs_detr.run.setup import build_detector

SMALL = [*SMALL_DETECTOR, "model.rpn.test_proposals=20", "data.test_short_side=64", "data.test_long_side=128"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A detector that has learned nothing; its categories are 4 and 9."""
    # an RPN with random weights scores all anchors alike: rounding would decide which query begins where
    config = load_config(DEMO, [*SMALL, "model.query_boxes=encoder"])
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    tensors = build_detector(config, 2, initial_weights=False).state_dict()
    save_weights(path, Weights(tensors, ["a", "b"], [4, 9], to_dict(config)))
    return path


def pixels(seed, width, height):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images of three shapes, one of them unreadable, and names of other scripts."""
    path = tmp_path_factory.mktemp("images")
    for seed, (name, size) in enumerate(
        {"a.png": (90, 70), "図.png": (80, 64), "ж.png": (90, 70), "d.png": (64, 80), "e.png": (90, 70)}.items()
    ):
        Image.fromarray(pixels(seed, *size)).save(path / name)
    (path / "broken.jpg").write_bytes(b"<html></html>")
    return path


def predict(weights, out, *words):
    assert cli.main(["predict", str(weights), *map(str, words), "--out", str(out), "--threshold", "0"]) == 0
    return json.loads((out / "predictions.json").read_text()) if (out / "predictions.json").exists() else None


def numbers(entry):
    return np.array([[one["category_id"], one["score"], *one["bbox"]] for one in entry["objects"]])


def assert_same(found, expected):
    """The same objects in the same order, but for those whose scores are equal to the last digit written."""
    assert [one["file_name"] for one in found] == [one["file_name"] for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = numbers(ours), numbers(theirs)
        assert ours.shape == theirs.shape and len(ours)
        np.testing.assert_allclose(ours[np.lexsort(ours.T[::-1])], theirs[np.lexsort(theirs.T[::-1])], atol=0.011)


def test_a_list_by_batch_4_has_the_boxes_of_one_by_one(weights, folder, tmp_path, capsys):
    alone = predict(weights, tmp_path / "1", folder)
    files = sorted(file for file in folder.iterdir())
    batched = predict(weights, tmp_path / "4", *files, "--batch", "4", "--no-images")
    assert capsys.readouterr().out.count("skipped: ") == 2
    assert [one["file_name"] for one in alone] == ["a.png", "d.png", "e.png", "ж.png", "図.png"]
    assert [(one["width"], one["height"]) for one in alone] == [(90, 70), (64, 80), (90, 70), (90, 70), (80, 64)]
    assert_same(batched, alone)
    assert not (tmp_path / "4" / "detections").exists() and len(list((tmp_path / "1" / "detections").iterdir())) == 5


def test_a_folder_with_the_results_in_it_gives_the_same_results_again(weights, folder, tmp_path, monkeypatch, capsys):
    own = tmp_path / "images"
    shutil.copytree(folder, own)
    monkeypatch.chdir(own)
    first = predict(weights, Path("predictions"), ".")
    capsys.readouterr()
    assert predict(weights, Path("predictions"), ".") == first and len(first) == 5
    assert "predictions/detections: 5 images or videos are left out, as drawings are" in capsys.readouterr().out
    assert cli.main(["predict", str(weights), "predictions"]) == 2
    assert "predictions: only drawings are in it. Name predictions/detections to" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [[], ["eval.test_scales=[48,64]", "eval.test_flip=true"]])
def test_boxes_of_a_batch_equal_those_of_one_image_to_1e_4_pixels(weights, folder, settings):
    predictor = Predictor.load(weights, device="cpu", overrides=settings)
    images = [pixels(seed, *size) for seed, size in enumerate([(90, 70), (64, 80), (90, 70), (90, 70), (90, 70)])]
    alone = [predictor.predict(image, threshold=0) for image in images]
    for batched, one in zip(predictor.predict(images, threshold=0, batch_size=4), alone, strict=True):
        np.testing.assert_allclose(batched.boxes, one.boxes, atol=1e-4, rtol=0)
        np.testing.assert_allclose(batched.scores, one.scores, atol=1e-6)
        assert batched.labels.tolist() == one.labels.tolist()


def test_words_with_an_equals_sign_are_settings_unless_they_are_files(weights, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels(1, 40, 40)).save(tmp_path / "seed=1", "PNG")
    assert len(predict(weights, tmp_path / "o", "seed=1", "data.max_image_pixels=1600", folder / "a.png")) == 1
    assert cli.main(["predict", str(weights), str(folder), "data.max_image_pixel=1"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "--batch=0: must be at least 1"),
        (["--threshold", "50"], "--threshold=50: scores lie between 0 and 1. Give one of them, as 0.5."),
        (["--threshold", "nan"], "--threshold=nan: scores lie between 0 and 1."),
        (["--max-frames", "0"], "--max-frames=0: must be at least 1"),
        (["--tiles", "16x64"], "--tiles=16x64: a side needs at least 32 pixels"),
        (["--tiles", "64", "--tile-overlap", "1"], "--tile-overlap=1: must lie between 0 and 0.9"),
        (["--whole-image"], "Add --tiles"),
        (["--tile-overlap", "0.5"], "--tile-overlap: there are no tiles to overlap. Add --tiles"),
        (["--annotations", "x.json"], "--annotations: only --format coco"),
        (["data.source=x"], "data.source: has no effect, as this command opens no dataset. Leave it out"),
        (["eval.score_threshold=0.9"], "eval.score_threshold: has no effect, as it acts in evaluations only."),
        (["eval.max_detections=1"], "eval.max_detections: has no effect, as it acts in evaluations only."),
        (["train.epochs=3"], "train.epochs: has no effect, as it acts in trainings only. Leave it out."),
        (["optim.lr=1"], "optim.lr: has no effect, as it acts in trainings only. Leave it out."),
        (["missing.jpg"], "missing.jpg: no such image, video or folder."),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_torch_is_loaded(weights, folder, capsys, words, said):
    assert cli.main(["predict", str(weights), str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_limits_of_tiles_are_those_of_the_operator():
    from brs_detr.commands import arguments
    from brs_detr.ops import tiles

    assert arguments.MIN_TILE == tiles.MIN_TILE
    tile_grid((64, 64), (32, 32), arguments.MAX_OVERLAP)
    with pytest.raises(ValueError):
        tile_grid((64, 64), (32, 32), arguments.MAX_OVERLAP + 0.01)


def test_an_image_smaller_than_a_tile_has_the_boxes_of_no_tiling(weights, folder, tmp_path):
    plain = predict(weights, tmp_path / "plain", folder, "--no-images")
    tiled = predict(weights, tmp_path / "tiled", folder, "--no-images", "--tiles", "90x80", "--whole-image")
    assert tiled == plain


def test_an_image_of_12_megapixels_by_tiles(weights, tmp_path):
    """Its tiles, cut out and predicted one by one, have the same boxes, which `join_outputs` puts together."""
    path = tmp_path / "large.png"
    image = np.kron(pixels(3, 100, 75), np.ones((40, 40, 1), np.uint8))
    Image.fromarray(image).save(path, compress_level=1)
    (found,) = predict(weights, tmp_path / "out", path, "--tiles", "1500", "--batch", "4", "--no-images")
    assert (found["width"], found["height"]) == (4000, 3000)
    predictor = Predictor.load(weights, device="cpu")
    grid = tile_grid((3000, 4000), (1500, 1500), 0.2)
    outputs = []
    for tile in grid:
        alone = predictor.predict(image[tile.y1 : tile.y2, tile.x1 : tile.x2], threshold=0)
        parts = {name: torch.from_numpy(getattr(alone, name)) for name in ("boxes", "scores", "labels")}
        outputs.append(parts)
    joined = join_outputs(outputs, grid, (3000, 4000), np.zeros(2))
    ours = numbers(found)
    boxes = joined["boxes"].numpy()
    expected = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    assert len(ours) == len(expected) > len(grid)
    order, other = np.lexsort(ours[:, 2:].T[::-1]), np.lexsort(expected.T[::-1])
    np.testing.assert_allclose(ours[order, 2:], expected[other], atol=0.02)
    assert expected[:, 0].min() < 1500 < 2500 < (expected[:, 0] + expected[:, 2]).max() <= 4000 + 1e-3


def test_masks_of_tiles_are_moved_to_the_image():
    grid = tile_grid((64, 112), (64, 64), 0.2)
    assert [tile.x1 for tile in grid] == [0, 48]
    bitmap = torch.zeros(1, 64, 64, dtype=torch.uint8)
    bitmap[0, 20:30, 30:44] = 1
    box, one = torch.tensor([[30.0, 20, 44, 30]]), torch.tensor([0])
    output = {"boxes": box, "scores": torch.tensor([0.9]), "labels": one, "masks": encode_masks(bitmap)}
    joined = join_outputs([output, output], grid, (64, 112), np.zeros(1))
    masks = decode_masks(joined["masks"], (64, 112))
    assert joined["boxes"].tolist() == [[30, 20, 44, 30], [78, 20, 92, 30]]
    assert torch.equal(masks[0, :, :64], bitmap[0]) and torch.equal(masks[1, :, 48:], bitmap[0])
    assert masks.sum() == 2 * 140


def test_a_low_score_does_not_take_the_place_of_parts():
    grid = [*tile_grid((64, 112), (64, 64), 0.2)]
    wide = torch.tensor([[0.0, 10, 64, 30]])
    whole = {"boxes": torch.tensor([[0.0, 10, 112, 30]]), "scores": torch.tensor([0.1]), "labels": torch.tensor([0])}
    part = {"boxes": wide, "scores": torch.tensor([0.9]), "labels": torch.tensor([0])}
    from brs_detr.ops.tiles import Tile

    grid.append(Tile(0, 0, 112, 64))
    for threshold, scores in ((0.05, [0.1]), (0.5, [0.9, 0.9])):
        found = join_outputs([part, part, whole], grid, (64, 112), np.array([threshold]))
        assert found["scores"].tolist() == pytest.approx(scores)


def test_of_tiles_without_a_detection_only_the_best_one_is_joined():
    """Each of the others would take part in the suppression, and have its mask moved, for nobody to see."""
    grid = tile_grid((640, 640), (64, 64), 0.2)
    generator = torch.Generator().manual_seed(0)
    bitmap = torch.zeros(30, 64, 64, dtype=torch.uint8)
    bitmap[:, 25:35, 25:35] = 1
    outputs = [
        {
            "boxes": torch.tensor([[25.0, 25, 35, 35]]).expand(30, 4),
            "scores": 0.4 * torch.rand(30, generator=generator),
            "labels": torch.arange(30),
            "masks": encode_masks(bitmap),
        }
        for _ in grid
    ]
    outputs[7]["scores"][3] = 0.45
    joined = join_outputs(outputs, grid, (640, 640), np.full(30, 0.5))
    assert joined["scores"].tolist() == pytest.approx([0.45]) and joined["labels"].tolist() == [3]
    x, y = grid[7].x1, grid[7].y1
    assert joined["boxes"].tolist() == [[x + 25, y + 25, x + 35, y + 35]] and len(joined["masks"]) == 1
    nothing = [{name: value[:0] for name, value in output.items()} for output in outputs]
    assert len(join_outputs(nothing, grid, (640, 640), np.zeros(30))["scores"]) == 0


def written(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_coco_results_are_read_by_pycocotools(weights, folder, tmp_path):
    from pycocotools.coco import COCO

    expected = {one["file_name"]: numbers(one) for one in predict(weights, tmp_path / "json", folder, "--no-images")}
    results = predict(weights, tmp_path / "out", folder, "--no-images", "--format", "coco")
    assert written(tmp_path / "out") == ["images.json", "predictions.json"]
    listed = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [one["id"] for one in listed["images"]] == [1, 2, 3, 4, 5] and listed["images"][0]["width"] == 90
    assert listed["categories"] == [{"id": 4, "name": "a"}, {"id": 9, "name": "b"}]
    for image in listed["images"]:
        own = [one for one in results if one["image_id"] == image["id"]]
        np.testing.assert_allclose(numbers({"objects": own}), expected[image["file_name"]])
    truth = {"images": [{"id": 70 + n, "file_name": f"val/{name}"} for n, name in enumerate(["a.png", "ж.png"])]}
    truth |= {"annotations": [], "categories": listed["categories"]}
    (tmp_path / "val.json").write_text(json.dumps(truth))
    words = [folder, "--no-images", "--format", "coco", "--annotations", tmp_path / "val.json"]
    results = predict(weights, tmp_path / "out2", *words)
    assert written(tmp_path / "out2") == ["predictions.json"] and {one["image_id"] for one in results} == {70, 71}
    dataset = COCO(str(tmp_path / "val.json")).loadRes(str(tmp_path / "out2" / "predictions.json"))
    assert len(dataset.getAnnIds(imgIds=[71])) == len(expected["ж.png"])
    truth["categories"][0]["name"] = "c"
    (tmp_path / "val.json").write_text(json.dumps(truth))
    assert cli.main(["predict", str(weights), *map(str, words), "--out", str(tmp_path / "out3")]) == 2


def test_yolo_and_csv_say_the_same_as_json(weights, folder, tmp_path):
    expected = predict(weights, tmp_path / "json", folder, "--no-images")
    predict(weights, tmp_path / "yolo", folder, "--no-images", "--format", "yolo")
    predict(weights, tmp_path / "csv", folder, "--no-images", "--format", "csv")
    assert (tmp_path / "yolo" / "classes.txt").read_text() == "a\nb\n"
    rows = list(csv.DictReader((tmp_path / "csv" / "predictions.csv").open(encoding="utf-8", newline="")))
    for entry in expected:
        width, height = entry["width"], entry["height"]
        text = (tmp_path / "yolo" / "labels" / Path(entry["file_name"]).with_suffix(".txt")).read_text()
        own = [row for row in rows if row["file_name"] == entry["file_name"]]
        assert len(own) == len(text.splitlines()) == len(entry["objects"])
        for line, row, one in zip(text.splitlines(), own, entry["objects"], strict=True):
            label, x, y, w, h, score = map(float, line.split())
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            assert box == pytest.approx(one["bbox"], abs=1e-3) and score == one["score"]
            assert [4, 9][int(label)] == one["category_id"] == int(row["category_id"])
            corners = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
            assert corners == pytest.approx([*box[:2], box[0] + box[2], box[1] + box[3]], abs=0.01)
            assert (row["name"], row["width"], row["frame"]) == (one["name"], str(width), "")


@pytest.fixture
def clip(tmp_path):
    """30 frames of 12.5 a second."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "in" / "clip.mp4"
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(30):
            small = pixels(number, 12, 8)
            frame = Image.fromarray(small).resize((96, 64))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return path


def test_a_video_has_the_boxes_of_its_frames_one_by_one(weights, clip, tmp_path, capsys):
    import av

    out = tmp_path / "out"
    assert predict(weights, out, clip, "--batch", "4") is None
    assert written(out) == ["clip.jsonl", "detections/clip.mp4"]
    lines = [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(30))
    assert [line["time"] for line in lines] == pytest.approx([number / 12 for number in range(30)], abs=1e-4)
    assert "clip.mp4: 30 frames, " in capsys.readouterr().out
    for number, frame in enumerate(video.read_sources(sources.expand([str(clip)])[0], Limits())):
        Image.fromarray(frame.pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:02d}.png")
    alone = predict(weights, tmp_path / "alone", tmp_path / "*.png", "--no-images")
    assert_same([{**line, "file_name": ""} for line in lines], [{**one, "file_name": ""} for one in alone])
    with av.open(str(out / "detections" / "clip.mp4")) as drawn:
        stream = drawn.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (12, 96, 64)
        assert len(list(drawn.decode(stream))) == 30


def test_a_video_among_images_in_the_other_formats(weights, clip, folder, tmp_path):
    words = [clip, folder / "a.png", "--max-frames", "3", "--no-images", "--batch", "4"]
    predict(weights, tmp_path / "yolo", *words, "--format", "yolo")
    assert written(tmp_path / "yolo") == [
        "classes.txt",
        "labels/a.txt",
        *(f"labels/clip_00000{n}.txt" for n in range(3)),
    ]
    predict(weights, tmp_path / "csv", *words, "--format", "csv")
    rows = list(csv.DictReader((tmp_path / "csv" / "predictions.csv").open(newline="")))
    assert {row["frame"] for row in rows} == {"0", "1", "2", ""}
    listed = predict(weights, tmp_path / "coco", *words, "--format", "coco")
    images = json.loads((tmp_path / "coco" / "images.json").read_text())["images"]
    assert [(one["id"], one.get("frame")) for one in images] == [(1, 0), (2, 1), (3, 2), (4, None)]
    assert {one["image_id"] for one in listed} == {1, 2, 3, 4}
    predict(weights, tmp_path / "json", *words)
    assert written(tmp_path / "json") == ["clip.jsonl", "predictions.json"]
    assert predict(weights, tmp_path / "json", clip, "--max-frames", "1", "--no-images") is None
    assert written(tmp_path / "json") == ["clip.jsonl"]


def test_a_video_is_refused_beside_ids_of_images(weights, clip, folder, tmp_path, capsys):
    words = [str(folder / "a.png"), str(clip), "--format", "coco", "--annotations", "x.json", "--out", str(tmp_path)]
    assert cli.main(["predict", str(weights), *words]) == 2
    error = capsys.readouterr().err
    assert "--annotations: clip.mp4 is a video, whose frames have no ids" in error and error.count("\n") == 1


def test_a_url_that_is_a_video_is_skipped_beside_ids_of_images(weights, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video, "fetch", lambda *_: None)  # the server says that it is one
    categories = [{"id": 4, "name": "a"}, {"id": 9, "name": "b"}]
    truth = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [], "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(truth))
    words = ["http://host/live", folder / "a.png", "--format", "coco", "--annotations", tmp_path / "val.json"]
    found = predict(weights, tmp_path / "out", *words, "--no-images")
    assert {one["image_id"] for one in found} == {7}
    assert "skipped: http://host/live: the server sends a video, whose frames have no ids" in capsys.readouterr().out


def test_a_camera_ends_by_ctrl_c_and_keeps_its_frames(weights, clip, tmp_path, monkeypatch):
    """A camera whose fourth frame does not come before Ctrl-C."""
    import brs_detr.data.video

    def frames_of(source, limits, max_frames):
        yield from read_video(source._replace(kind="video", address=str(clip)), limits, 3)
        raise KeyboardInterrupt

    read_video = brs_detr.data.video.read_video
    monkeypatch.setattr(brs_detr.data.video, "read_video", frames_of)
    monkeypatch.chdir(tmp_path)
    predict(weights, tmp_path / "out", "0")
    assert written(tmp_path / "out") == ["camera_0.jsonl", "detections/camera_0.mp4"]
    assert len((tmp_path / "out" / "camera_0.jsonl").read_text().splitlines()) == 3


def test_the_first_batch_of_a_video_is_counted_and_timed(monkeypatch, capsys):
    """16 frames that took 8 seconds, as one batch, after 100 seconds of images."""
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    report = command.Report(Labels([], [], {}))
    found = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), np.zeros(0, int), [], (8, 8))
    now[0] = 100.0
    clip = sources.Source("video", "clip.mp4", "clip.mp4", "clip.mp4")
    frames = [*report.timed(video.Frame(clip, torch.zeros(3, 8, 8), number) for number in range(16))]
    now[0] = 108.0
    for frame in frames:
        report.add(frame, found)
    report.close()
    assert "clip.mp4: 16 frames, 0 objects, 2.0 frames/s" in capsys.readouterr().out


class NoReader(io.StringIO):
    """A pipe that nobody reads: `| head` has ended."""

    def write(self, text):
        raise BrokenPipeError


def test_every_image_is_predicted_where_nobody_reads_the_lines(weights, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", NoReader())
    assert len(predict(weights, tmp_path / "out", folder, "--no-images")) == 5
    assert written(tmp_path / "out") == ["predictions.json"]


def test_nothing_that_can_be_read_is_exit_code_1(weights, tmp_path, capsys):
    pytest.importorskip("av", reason="PyAV is not installed")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert cli.main(["predict", str(weights), str(tmp_path / "empty.mp4"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "skipped: empty.mp4: this video cannot be read: the file is empty." in said.out
    assert "error: nothing was written: none of the 1 source(s) could be read" in said.err
    assert written(tmp_path / "out") == []
