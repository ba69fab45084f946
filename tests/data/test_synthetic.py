"""The generated dataset is valid COCO, repeats byte for byte, and its colours do not give the classes away."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from brs_detr.data.coco import CocoDetection
from brs_detr.data.synthetic import CATEGORY_IDS, add_arguments, make_dataset, run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("scenes"), train=150, val=3, image_size=96, seed=4)


@pytest.fixture(scope="module")
def truth(scenes):
    return COCO(str(scenes / "annotations" / "train.json"))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_and_a_picture_does_not_depend_on_their_number(tmp_path):
    first, second, other = (
        make_dataset(tmp_path / str(i), train=count, val=2, image_size=64, seed=seed)
        for i, (count, seed) in enumerate([(3, 1), (3, 1), (2, 2)])
    )
    assert files_of(first) == files_of(second) and files_of(first) != files_of(other)
    fewer = make_dataset(tmp_path / "fewer", train=1, val=1, image_size=64, seed=1)
    name = "images/train/000000.jpg"
    assert (fewer / name).read_bytes() == (first / name).read_bytes()


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
    assert max(counts) == 4 and min(counts) <= 1 and 2 < np.mean(counts) < 3.5  # one to four a picture
    per_class = np.bincount([a["category_id"] for a in truth.dataset["annotations"]])
    assert all(per_class[key] > 40 for key in CATEGORY_IDS.values())
    borders = [a for a in truth.dataset["annotations"] if a["bbox"][0] == 0 or a["bbox"][1] == 0]
    assert len(borders) > 5


def test_colour_does_not_tell_the_class(scenes, truth):
    colours, labels = [], []
    for annotation in truth.dataset["annotations"]:
        file_name = truth.imgs[annotation["image_id"]]["file_name"]
        picture = np.asarray(Image.open(scenes / "images" / "train" / file_name), float)
        colours.append(picture[truth.annToMask(annotation) > 0].mean(0))
        labels.append(annotation["category_id"])
    colours, labels = np.array(colours), np.array(labels)
    half = len(labels) // 2
    centres = {key: colours[:half][labels[:half] == key].mean(0) for key in CATEGORY_IDS.values()}
    keys = np.array(list(centres))
    distances = np.linalg.norm(colours[half:, None] - np.array(list(centres.values()))[None], axis=2)
    assert (keys[distances.argmin(1)] == labels[half:]).mean() < 0.32  # guessing is right once in five


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(tmp_path), "--train", "2", "--val", "1", "--image-size", "64"])) == 0
    assert "2 images" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "annotations" / "val.json").read_text())["images"]) == 1
