"""`predict --format coco --annotations`: the ids of images come from the json, read as training reads it."""

import json

import pytest
from PIL import Image

from brs_detr.config import ConfigError
from brs_detr.data.coco import CocoDetection
from brs_detr.data.issues import DataError
from brs_detr.run.prediction_files import Labels, read_image_ids

CATEGORIES = [{"id": "7", "name": "red  cell"}, {"id": 3.0}, {"id": "11", "name": "white\ncell"}]
IMAGES = [
    {"id": "40", "file_name": "a/x.png", "width": "64", "height": 48},
    None,
    {"id": 50.0, "file_name": "b/x.png"},
    {"id": "no number", "file_name": "c.png"},
    {"id": 60, "coco_url": "http://host/val/d.png"},
]


def write(path, images, categories):
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    return path


def test_the_json_of_the_training_is_that_of_its_weights(tmp_path):
    """Ids in quotes, names with two blanks or none, entries that are no image: the training took them."""
    annotation = {"image_id": "40", "category_id": "7", "bbox": [1, 1, 9, 9]}
    content = {"images": IMAGES, "annotations": [annotation], "categories": CATEGORIES}
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "a").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "a" / "x.png")
    dataset = CocoDetection(tmp_path / "train.json", tmp_path, train=True)
    labels = Labels(dataset.classes, dataset.category_ids, {})
    found = read_image_ids(tmp_path / "train.json", labels, 2**20)
    assert found == {"a/x.png": 40, "b/x.png": 50, "val/d.png": 60, "d.png": 60}
    assert {type(image_id) for image_id in found.values()} == {int}


@pytest.mark.parametrize(
    ("images", "categories", "error", "message"),
    [
        (IMAGES, CATEGORIES[:2], ConfigError, "--annotations=.*: its categories are not those of the weights: id 11"),
        (IMAGES, [{"id": "x", "name": "a"}], DataError, "no integer id"),
        ([None, {"id": 1}], CATEGORIES, DataError, "none of its 2 image entries"),
    ],
)
def test_another_json_is_refused_in_one_sentence(tmp_path, images, categories, error, message):
    labels = Labels(("3", "red cell", "white cell"), (3, 7, 11), {})
    with pytest.raises(error, match=message):
        read_image_ids(write(tmp_path / "x.json", images, categories), labels, 2**20)
