"""`predict --format coco --annotations`: the ids of images come from the json, read as training reads it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from brs_detr.config import ConfigError
from brs_detr.data.coco import CocoDetection
from brs_detr.data.issues import DataError
from brs_detr.data.sources import Source
from brs_detr.run.prediction_files import Labels, read_image_ids, require_own_labels

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


@pytest.mark.parametrize(("name", "refused"), [("a/clip_000012", True), ("clip_000012", False), ("a/clip_12", False)])
def test_an_image_with_the_labels_of_a_frame_is_refused(name, refused):
    """The later one would replace the labels of the earlier one."""
    files = [Source("video", "", "a/clip.mp4", "a/clip.mp4"), Source("image", "", f"{name}.png", f"{name}.png")]
    stems = {one.name: Path(one.stem).with_suffix("") for one in files}
    if not refused:
        return require_own_labels(files, stems)
    with pytest.raises(ConfigError, match=r"a/clip_000012\.png and a frame of a/clip\.mp4 may have the same"):
        require_own_labels(files, stems)
