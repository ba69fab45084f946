"""Images of every kind, one by one and in batches, and what is said of them."""

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import DEMO, SMALL_BACKBONE, SMALL_DETECTOR

from brs_detr import cli
from brs_detr.commands.predict import describe
from brs_detr.config import load_config, to_dict
from brs_detr.config_io import ConfigError
from brs_detr.data.image_io import ImageError, read_image
from brs_detr.detections import Detections, MissingPackageError
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.export.graphs import ExportError
from brs_detr.predictor import Predictor
from brs_detr.run.setup import build_detector, restore

SIZES = [(90, 60), (60, 90), (64, 64), (90, 60), (60, 90), (90, 60), (120, 40)]  # three equal, two equal, two others
CURVES = [{"method": "platt", "detections": 9, "true_positives": 9, "scores": [0, 0.2, 1], "precisions": [0, 0.7, 1]}]
MAP = {"images": 3, "of_label": [0, 0, 0], "thresholds": [0.5, 0.6, 0.7], "curves": CURVES}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A detector with random weights whose scores lie apart, with calibrated scores for its decoder."""
    words = [*SMALL_DETECTOR, "model.rpn.test_proposals=20"]
    words += ["data.test_short_side=64", "data.test_long_side=100"]
    config = load_config(DEMO, words)
    config = replace(config, model=replace(config.model, backbone=SMALL_BACKBONE))
    model = build_detector(config, 3, initial_weights=False)
    torch.manual_seed(3)
    for head in (*model.decoder.classifiers, model.proposals.classifier):
        torch.nn.init.normal_(head.weight, std=0.5)
    for head in (*model.decoder.regressors, model.proposals.regressor):
        torch.nn.init.normal_(head[-1].weight, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    extra = {
        "calibration": {"decoder": MAP},
        "thresholds": {"cat": 1 / 7, "dog": 6 / 35},
    }  # which the map makes 0.5 and 0.6
    save_weights(path, Weights(model.state_dict(), ["cat", "dog", "eel"], [7, 9, 40], to_dict(config), extra))
    return path


@pytest.fixture(scope="module")
def predictor(weights):
    return Predictor.load(weights, device="cpu")


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(5)
    return [generator.integers(0, 256, (height, width, 3), np.uint8) for width, height in SIZES]


def assert_alike(found, expected, pixels=1e-4):
    assert found.class_names == expected.class_names and found.image_size == expected.image_size
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=pixels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 50])
def test_images_of_different_sizes_in_a_batch_give_what_each_gives_alone(predictor, images, batch_size):
    alone = [predictor.predict(image, threshold=0.0) for image in images]
    assert min(map(len, alone)) == 30 and all(found.scores.std() > 1e-3 for found in alone)
    together = predictor.predict(images, threshold=0.0, batch_size=batch_size)
    for found, expected in zip(together, alone, strict=True):
        assert_alike(found, expected)


def test_batches_hold_equal_sizes_and_no_more_than_asked_for(predictor, images, monkeypatch):
    seen, engine = [], predictor.engine
    monkeypatch.setattr(predictor, "engine", Spy(engine, seen))
    assert len(list(predictor.stream(iter(images), batch_size=2))) == len(images)
    assert [len(batch) for batch in seen] == [2, 1, 2, 1, 1]
    assert all(len(set(batch.sizes)) == 1 and batch.padded_size == batch.sizes[0] for batch in seen)


class Spy:
    """An engine that notes its batches."""

    def __init__(self, engine, seen):
        self.engine, self.seen = engine, seen

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, batch, raw_scores=False):
        self.seen.append(batch)
        return self.engine(batch, raw_scores)


def test_every_kind_of_image_gives_the_same(predictor, images, tmp_path):
    array = images[0]
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    expected = predictor.predict(array, threshold=0.0)
    kinds = [path, str(path), Image.open(path), torch.from_numpy(array).permute(2, 0, 1), array[..., ::-1][..., ::-1]]
    for found in predictor.predict(kinds, threshold=0.0):
        assert_alike(found, expected, pixels=0)
    assert expected.image_size == (90, 60) and expected.boxes.dtype == np.float32
    assert expected.category_ids.tolist() == [[7, 9, 40][label] for label in expected.labels]


def test_pillow_images_are_read_as_the_files_are(predictor, tmp_path):
    """Gray, 16 bits, a palette with a transparent color, CMYK, and a camera held upright."""
    generator = np.random.default_rng(1)
    gray, deep = generator.integers(0, 256, (40, 30), np.uint8), generator.integers(0, 65536, (40, 30), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "gray.png": (Image.fromarray(gray), {}),
        "deep.png": (Image.fromarray(deep), {}),
        "palette.gif": (Image.fromarray(gray).convert("P"), {"transparency": 3}),
        "cmyk.tif": (Image.merge("CMYK", [Image.fromarray(gray)] * 4), {}),
        "turned.jpg": (Image.fromarray(gray), {"exif": exif}),
    }
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
        pixels = predictor.pixels(tmp_path / name)
        assert torch.equal(pixels, read_image(tmp_path / name)) and tuple(pixels.shape) == (3, 40, 30)
        assert torch.equal(predictor.pixels(Image.open(tmp_path / name)), pixels), name
    assert torch.equal(predictor.pixels(gray), predictor.pixels(tmp_path / "gray.png"))
    assert 120 < predictor.pixels(tmp_path / "deep.png").float().mean() < 136  # scaled, not clipped at 255


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), r"must be uint8 \(height, width, 3\), RGB, or .* but this is float32"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"this is uint8 \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"this is uint8 \(0, 4, 3\)"),
        (torch.zeros(3, 4, 4), r"a tensor must be uint8 \(3, height, width\), RGB, but this is float32 \(3, 4, 4\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"this is uint8 \(4, 4, 3\)"),
        (None, "NoneType is no image. Give a path"),
        ({"a": 1}, "dict is no image"),
        ("https://user:secret@host/a.jpg", "^image: this is a URL, which only the command `predict` reads"),
        ("nowhere.jpg", r"nowhere\.jpg: this image cannot be read: the file does not exist"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(predictor, image, said):
    with pytest.raises(ImageError, match=said):
        predictor.predict(image)
    with pytest.raises(ImageError, match=said):
        predictor.predict([np.zeros((8, 8, 3), np.uint8), image])


def test_one_number_is_a_square_tile(predictor, images):
    square = predictor.predict_tiles(images[0], 64, threshold=0)
    assert_alike(square, predictor.predict_tiles(images[0], (64, 64), threshold=0), pixels=0)
    assert len(square) != len(predictor.predict(images[0], threshold=0))
    assert_alike(square, predictor.predict_tiles(images[0], np.int64(64), threshold=0), pixels=0)
    with pytest.raises(TypeError, match="integer"):
        predictor.predict_tiles(images[0], 64.0)


def test_the_path_of_one_image_is_no_stream(predictor):
    with pytest.raises(TypeError, match=r"a\.jpg: stream takes several images"):
        next(predictor.stream("a.jpg"))


@pytest.mark.parametrize("threshold", [50, -0.1, float("nan"), [0.5, 0.4, 0.3], "high"])
def test_a_threshold_that_is_no_score_is_refused_in_a_sentence(predictor, images, threshold):
    for find in (predictor.predict, lambda image, **options: predictor.predict_tiles(image, (64, 64), **options)):
        with pytest.raises(ValueError, match=r"scores lie between 0 and 1\. Give one number for all classes"):
            find(images[0], threshold=threshold)


def test_a_pillow_image_of_half_a_file_is_refused(predictor, images, tmp_path):
    content = io.BytesIO()
    Image.fromarray(images[0]).save(content, "JPEG")
    with pytest.raises(ImageError, match=r"image: this image cannot be read: .*truncated"):
        predictor.predict(Image.open(io.BytesIO(content.getvalue()[:700])))


def test_an_empty_list_and_a_batch_of_none(predictor, images):
    assert predictor.predict([]) == []
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        predictor.predict(images, batch_size=0)


def test_scores_are_mapped_in_order_and_cut_at_the_threshold_of_their_class(predictor, images):
    raw = predictor.predict(images[0], threshold=0.0, raw_scores=True)
    mapped = predictor.predict(images[0], threshold=0.0)
    np.testing.assert_allclose(mapped.scores, np.interp(raw.scores, [0, 0.2, 1], [0, 0.7, 1]), atol=1e-9)
    assert predictor.calibrated and predictor.thresholds().tolist() == [0.5, 0.6, 0.7]
    assert predictor.thresholds(raw_scores=True).tolist() == [1 / 7, 6 / 35, 1.0]  # nothing of class eel was right
    own = predictor.predict(images[0])
    expected = [score for score, label in zip(mapped.scores, mapped.labels) if score >= [0.5, 0.6, 0.7][label]]
    assert own.scores.tolist() == expected and 0 < len(own) < 30
    limit = float(mapped.scores[3])
    assert predictor.predict(images[0], threshold=limit).scores.tolist() == mapped.scores[:4].tolist()


def test_nothing_found_names_the_best_score(predictor, images):
    best = predictor.predict(images[0], threshold=0.0)
    found = predictor.predict(images[0], threshold=1)
    assert len(found) == 0 and found.boxes.shape == (0, 4) and list(found) == []
    start = f"the best score is {best.scores[0]:.3g}, of {best.class_names[0]}, below its threshold 1"
    assert found.note == start and start in repr(found) and best.note == ""


def test_weights_without_a_map_say_so(weights, images, tmp_path):
    stored = load_weights(weights)
    save_weights(tmp_path / "y.safetensors", replace(stored, extra={}))
    plain = Predictor.load(tmp_path / "y.safetensors", device="cpu")
    assert not plain.calibrated and "y.safetensors holds no map for head decoder" in plain.note
    assert plain.thresholds().tolist() == [0.3] * 3
    raw = Predictor.load(weights, device="cpu").predict(images[0], threshold=0.0, raw_scores=True)
    assert_alike(plain.predict(images[0], threshold=0.0), raw, pixels=0)


def test_settings_may_be_changed(weights, images):
    other = Predictor.load(weights, device="cpu", overrides=["eval.predict_with=roi", "eval.calibrate=false"])
    assert other.config.eval.predict_with == "roi" and not other.calibrated
    with pytest.raises(ConfigError, match=r"did you mean eval\.predict_with"):
        Predictor.load(weights, overrides=["eval.predict_wit=roi"])


def test_the_command_writes_the_same_detections(weights, predictor, images, tmp_path, monkeypatch):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    seen = []
    monkeypatch.setattr("brs_detr.commands.predict.describe", lambda found: seen.append(found) or describe(found))
    command = ["predict", str(weights), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(command) == 0
    assert len(seen[0]) and len(seen) == 1
    assert_alike(seen[0], predictor.predict(tmp_path / "a.png"), pixels=1e-5)


def test_a_run_folder_has_its_best_weights(weights, tmp_path, images, predictor):
    (tmp_path / "best.safetensors").write_bytes(weights.read_bytes())
    found = Predictor.load(str(tmp_path), device="cpu")
    assert found.source == tmp_path / "best.safetensors"
    assert_alike(found.predict(images[0]), predictor.predict(images[0]), pixels=0)


def some_detections(masks=None):
    boxes = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 9, 9]], np.float32)
    names = ["cat", "dog", "cat"]
    return Detections(
        boxes, np.array([0.9, 0.8, 0.7]), np.array([0, 1, 0]), np.array([7, 9, 7]), names, (40, 30), masks
    )


def test_detections_are_taken_by_index_and_by_mask():
    masks = np.zeros((3, 30, 40), bool)
    masks[2, :5] = True
    found = some_detections(masks)
    for chosen in ([2, 1], np.array([2, 1])):
        assert found.take(chosen).class_names == ["cat", "dog"] and found.take(chosen).masks[0].sum() == 200
    assert found.take(found.labels == 0).scores.tolist() == [0.9, 0.7]
    assert found.take(1).class_names == ["dog"] and found.take(slice(0, 2)).class_names == ["cat", "dog"]
    assert len(found.take([])) == 0 and found.take([]).boxes.shape == (0, 4)
    assert next(iter(found)) == {"name": "cat", "category_id": 7, "score": 0.9, "box": [1, 2, 3, 4]}
    assert repr(found).startswith("3 objects in 40x30 pixels\n  0.900 cat [1.0, 2.0, 3.0, 4.0]")


def test_detections_of_supervision():
    supervision = pytest.importorskip("supervision")
    found = some_detections(np.zeros((3, 30, 40), bool)).to_supervision()
    assert isinstance(found, supervision.Detections) and len(found) == 3 and found.mask.shape == (3, 30, 40)
    assert found.data["class_name"].tolist() == ["cat", "dog", "cat"] and found.class_id.tolist() == [0, 1, 0]
    assert found[found.confidence > 0.75].data["category_id"].tolist() == [7, 9]
    assert len(some_detections().take([]).to_supervision()) == 0


def test_without_supervision_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingPackageError, match=r"needs the package supervision\. Install it with: pip install"):
        some_detections().to_supervision()


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """The file of `export`, for images of any size and of one size."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("onnx")
    assert cli.main(["export", str(weights), "--out", str(folder / "any.onnx"), "--any-size"]) == 0
    assert (
        cli.main(["export", str(weights), "--out", str(folder / "one.onnx"), "--height", "100", "--width", "100"]) == 0
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("raw_scores", [False, True])
def test_an_exported_file_finds_what_its_weights_find(predictor, exported, images, raw_scores):
    file = Predictor.load(exported / "any.onnx", device="cpu")
    assert (file.classes, file.category_ids) == (predictor.classes, predictor.category_ids) and file.calibrated
    np.testing.assert_allclose(file.thresholds(raw_scores)[:2], predictor.thresholds(raw_scores)[:2], rtol=1e-5)
    options = {"threshold": 0.0, "raw_scores": raw_scores}
    expected = predictor.predict(images, **options)
    for batch_size in (1, 3):
        for found, own in zip(file.predict(images, batch_size=batch_size, **options), expected, strict=True):
            assert_alike(found, own, pixels=1e-3)


@pytest.mark.slow
def test_an_exported_file_of_one_size_shrinks_what_does_not_fit(exported, images):
    file = Predictor.load(exported / "one.onnx", device="cpu")
    alone = [file.predict(image, threshold=0.0) for image in images]
    for found, own in zip(file.predict(images, threshold=0.0, batch_size=4), alone, strict=True):
        assert_alike(found, own)
    large = file.predict(np.zeros((400, 900, 3), np.uint8), threshold=0.0)
    assert large.image_size == (900, 400) and large.boxes[:, 2].max() > 100


@pytest.mark.slow
def test_the_command_predicts_with_an_exported_file(exported, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    command = ["predict", str(exported / "any.onnx"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0 and (tmp_path / "out" / "detections" / "a.png").exists()
    assert cli.main([*command, "data.test_short_side=32"]) == 2


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\x08\x07" * 50])
def test_what_is_no_exported_file_is_refused_in_a_sentence(tmp_path, capsys, content):
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(content)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert cli.main(["predict", str(tmp_path / "x.onnx"), str(tmp_path / "a.png"), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "x.onnx: " in said and said.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_graph_of_others_lacks_our_metadata(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ExportError, match=r"x\.onnx: lacks the metadata that `brs-detr export` writes"):
        Predictor.load(tmp_path / "x.onnx")


def test_masks_are_cut_with_their_objects(weights, images, monkeypatch):
    bitmaps = torch.zeros(3, 60, 90, dtype=torch.bool)
    bitmaps[0, 2:6, 2:12], bitmaps[2, 10:30, 20:40] = True, True
    model, *rest = restore(weights)

    def detect(*_):
        scores, labels = torch.tensor([0.6, 0.01, 0.9]), torch.tensor([0, 1, 1])
        return [{"boxes": torch.zeros(3, 4), "scores": scores, "labels": labels, "masks": bitmaps}]

    model.forward = detect
    monkeypatch.setattr("brs_detr.predictor.restore", lambda *_: (model, *rest))
    found = Predictor.load(weights).predict(images[0], threshold=0.5)
    assert np.array_equal(found.masks, bitmaps[[2, 0]].numpy()) and found.masks.dtype == bool
