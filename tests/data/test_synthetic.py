"""The generated dataset is valid COCO, repeats byte for byte, and its colors do not give the classes away.

A polygon drawn again gives the mask it came from.
"""

import argparse
import json
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from brs_detr import cli
from brs_detr.commands import arguments
from brs_detr.data.coco import CocoDetection
from brs_detr.data.synthetic import (
    CATEGORY_IDS,
    SHAPES,
    make_dataset,
    mask_polygons,
    polygon_area,
    run,
    shape_outline,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("scenes"), train=150, val=3, image_size=96, seed=4)


@pytest.fixture(scope="module")
def truth(scenes):
    return COCO(str(scenes / "annotations" / "train.json"))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_and_a_image_does_not_depend_on_their_number(tmp_path):
    first, second, other = (
        make_dataset(tmp_path / str(i), train=count, val=2, image_size=64, seed=seed)
        for i, (count, seed) in enumerate([(3, 1), (3, 1), (2, 2)])
    )
    assert files_of(first) == files_of(second) and files_of(first) != files_of(other)
    fewer = make_dataset(tmp_path / "fewer", train=1, val=1, image_size=64, seed=1)
    name = "images/train/000000.jpg"
    assert (fewer / name).read_bytes() == (first / name).read_bytes()


def test_only_a_folder_of_this_command_is_written_to_again(tmp_path, capsys):
    own, other, images = (tmp_path / name for name in ("own", "other", "images alone"))
    assert cli.main(["make-dataset", str(own), "--train", "2", "--val", "1", "--image-size", "64"]) == 0
    assert cli.main(["make-dataset", str(own), "--train", "1", "--val", "1", "--image-size", "64"]) == 0
    for file in (other / "annotations" / "val.json", images / "images" / "train" / "000000.jpg"):
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    for folder, named in ((other, "annotations/val.json"), (images, "images/train")):
        before = files_of(folder)
        assert cli.main(["make-dataset", str(folder), "--train", "1", "--val", "1"]) == 2
        assert f"error: {folder / named}: this f" in capsys.readouterr().err and files_of(folder) == before


def test_a_folder_in_which_the_command_was_interrupted_is_its_own(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Image.Image, "save", Mock(side_effect=KeyboardInterrupt))
        make_dataset(tmp_path, train=1, val=1, image_size=64)
    (tmp_path / "images" / "train" / "000000.jpg").write_bytes(b"half")
    make_dataset(tmp_path, train=1, val=1, image_size=64)
    assert len(CocoDetection(tmp_path / "annotations" / "train.json", tmp_path / "images" / "train", train=False)) == 1


def test_ids_have_gaps_and_are_listed_out_of_order(truth):
    ids = [category["id"] for category in truth.dataset["categories"]]
    assert ids != sorted(ids) and sorted(ids) != list(range(min(ids), min(ids) + len(ids))) and len(ids) >= 4


def test_training_finds_no_fault(scenes):
    for split in ("train", "val"):
        dataset = CocoDetection(scenes / "annotations" / f"{split}.json", scenes / "images" / split, train=True)
        assert set(dataset.report) <= {
            "images",
            "images_listed",
            "objects",
            "annotations_listed",
            "image_without_objects",
            "category_unused",
        }
        for i in range(len(dataset)):
            assert dataset[i][0].shape[1:] == dataset[i][1]["original_size"]


def test_boxes_areas_and_polygons_agree(truth):
    for annotation in truth.dataset["annotations"]:
        x, y, w, h = annotation["bbox"]
        image = truth.imgs[annotation["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= image["width"] + 0.01 and y + h <= image["height"] + 0.01
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
        assert np.allclose([*points.min(0), *points.max(0)], [x, y, x + w, y + h], atol=0.011)
        mask = truth.annToMask(annotation)
        assert abs(float(mask.sum()) - annotation["area"]) <= 4 + 0.1 * annotation["area"]


def test_large_small_touching_and_cut_objects_all_occur(truth):
    side = np.sqrt([a["area"] for a in truth.dataset["annotations"]])
    assert side.min() < 10 and side.max() > 30
    counts = [len(truth.getAnnIds(key)) for key in truth.imgs]
    assert max(counts) == 4 and min(counts) <= 1 and 2 < np.mean(counts) < 3.5  # one to four an image
    per_class = np.bincount([a["category_id"] for a in truth.dataset["annotations"]])
    assert all(per_class[key] > 40 for key in CATEGORY_IDS.values())
    borders = [a for a in truth.dataset["annotations"] if a["bbox"][0] == 0 or a["bbox"][1] == 0]
    assert len(borders) > 5


def test_color_does_not_tell_the_class(scenes, truth):
    colors, labels = [], []
    for annotation in truth.dataset["annotations"]:
        file_name = truth.imgs[annotation["image_id"]]["file_name"]
        image = np.asarray(Image.open(scenes / "images" / "train" / file_name), float)
        colors.append(image[truth.annToMask(annotation) > 0].mean(0))
        labels.append(annotation["category_id"])
    colors, labels = np.array(colors), np.array(labels)
    half = len(labels) // 2
    centers = {key: colors[:half][labels[:half] == key].mean(0) for key in CATEGORY_IDS.values()}
    keys = np.array(list(centers))
    distances = np.linalg.norm(colors[half:, None] - np.array(list(centers.values()))[None], axis=2)
    assert (keys[distances.argmin(1)] == labels[half:]).mean() < 0.32  # guessing is right once in five


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    arguments.make_dataset(parser)
    assert run(parser.parse_args([str(tmp_path), "--train", "2", "--val", "1", "--image-size", "64"])) == 0
    assert "2 images" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "annotations" / "val.json").read_text())["images"]) == 1


@pytest.mark.parametrize(
    "words", ["--max-objects 0", "--image-size 0", "--seed -1", "--train -3", "--val 0", "--seed x"]
)
def test_numbers_of_no_dataset_are_refused_before_anything_is_written(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["make-dataset", str(tmp_path / "out"), *words.split()])
    option, value = words.split()
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"argument {option}: {value} is not a" in said and not (tmp_path / "out").exists()


def draw(polygons, shape):
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *shape))).astype(bool)


def test_area_of_a_square_and_of_its_reverse():
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]], float)
    assert polygon_area(square) == 4 and polygon_area(square[::-1]) == -4


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=150, deadline=None)
def test_exact_outlines_enclose_exactly_the_mask(mask):
    polygons = mask_polygons(mask, tolerance=0, smallest=0)
    assert sum(polygon_area(np.reshape(polygon, (-1, 2))) for polygon in polygons) == mask.sum()
    if polygons:
        assert np.array_equal(draw(polygons, mask.shape), mask)


def test_a_hole_stays_a_hole():
    mask = np.zeros((30, 40), bool)
    mask[5:25, 5:35] = True
    mask[10:20, 12:30] = False
    polygons = mask_polygons(mask)
    assert len(polygons) == 1 and np.array_equal(draw(polygons, mask.shape), mask)


def test_two_parts_are_two_polygons_and_specks_are_none():
    mask = np.zeros((20, 20), bool)
    mask[2:8, 2:8] = mask[12:18, 3:9] = mask[0, 19] = True
    assert len(mask_polygons(mask)) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lie_in_the_unit_circle_and_vary(shape):
    random = np.random.default_rng(0)
    first, second = shape_outline(shape, random), shape_outline(shape, random)
    assert len(first) == (2 if shape == "ring" else 1) and not np.allclose(first[0], second[0])
    assert np.linalg.norm(first[0], axis=1).max() <= 1 + 1e-9
    assert abs(polygon_area(first[0])) > 0.5 * (0.75**2)
