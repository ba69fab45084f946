"""benchmarks/nuclei.py: the dataset of the measurements from its public source, here made up from masks."""

import importlib
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from support import ROOT


@pytest.fixture(scope="module")
def nuclei():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("nuclei")
    sys.path.remove(str(ROOT / "benchmarks"))


def write_source(folder, name, image, masks):
    """An image as the public repository has it."""
    for part in ("images", "masks"):
        (folder / name / part).mkdir(parents=True)
    image.save(folder / name / "images" / f"{name}.png")
    for number, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name / "masks" / f"{number:04d}.png")


def test_masks_become_tight_boxes_and_run_lengths(nuclei, tmp_path):
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 3:9, 5:8] = True
    masks[1, [10, 12, 12], [20, 20, 24]] = True
    names = ["a" * 64, "b" * 64]
    write_source(tmp_path / "source", names[0], Image.new("RGBA", (30, 20)), masks)
    write_source(tmp_path / "source", names[1], Image.new("RGBA", (30, 20)), [])
    assert nuclei.convert(tmp_path / "source", tmp_path / "out", {"train": names}) == {"train": 2}
    content = json.loads((tmp_path / "out" / "annotations" / "train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a" * 16 + ".png", "b" * 16 + ".png"]
    assert [(row["image_id"], row["bbox"], row["area"]) for row in content["annotations"]] == [
        (1, [5, 3, 3, 6], 18),
        (1, [20, 10, 5, 3], 3),
    ]
    for mask, row in zip(masks, content["annotations"], strict=True):
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]).astype(bool), mask)
        assert (tmp_path / "out" / "images" / content["images"][0]["file_name"]).is_file()


def test_the_list_of_images_is_that_of_the_measurements(nuclei):
    splits = json.loads(nuclei.IMAGES.read_text())
    assert {split: len(names) for split, names in splits.items()} == {"train": 135, "val": 34}
    names = splits["train"] + splits["val"]
    assert len({name[: nuclei.NAME_LENGTH] for name in names}) == len(names) and {len(name) for name in names} == {64}


def test_the_converted_source_equals_the_data_of_the_measurements(nuclei, shared_data, tmp_path):
    data = shared_data / "nuclei"
    expected = json.loads((data / "annotations" / "val.json").read_text())
    names = json.loads(nuclei.IMAGES.read_text())["val"][:3]
    listed = {image["source_name"]: image for image in expected["images"]}
    for name in names:
        rows = [row for row in expected["annotations"] if row["image_id"] == listed[name]["id"]]
        image = Image.open(data / "images" / listed[name]["file_name"])
        write_source(tmp_path / "source", name, image, [coco_mask.decode(row["segmentation"]) for row in rows])
    nuclei.convert(tmp_path / "source", tmp_path / "out", {"val": names})
    found = json.loads((tmp_path / "out" / "annotations" / "val.json").read_text())
    compared = ("bbox", "area", "segmentation", "iscrowd", "category_id")
    ids = {listed[name]["id"] for name in names}
    rows = [row for row in expected["annotations"] if row["image_id"] in ids]
    assert [[row[key] for key in compared] for row in found["annotations"]] == [
        [row[key] for key in compared] for row in rows
    ]
