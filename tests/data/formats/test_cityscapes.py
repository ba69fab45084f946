"""Cityscapes' id maps become objects with masks, groups become crowds."""

import json

import numpy as np
import pytest
from PIL import Image

from brs_detr import cli
from brs_detr.data.coco import CocoDetection
from brs_detr.data.formats.cityscapes import instances, read_cityscapes
from brs_detr.data.image_io import ImageError, read_integers
from brs_detr.data.issues import DataError


def id_map():
    """A car, a person cut in two by a pole, a group of bicycles, a caravan (not evaluated), road."""
    ids = np.full((40, 80), 7, np.int32)
    ids[10:20, 5:25] = 26001
    ids[5:35, 40:50] = 24000
    ids[:, 44:46] = 17
    ids[30:38, 55:75] = 33
    ids[1:4, 1:4] = 29003
    return ids


@pytest.fixture()
def root(tmp_path):
    for split in ("train", "val"):
        for city in ("ulm", "bonn"):
            name = f"{city}_000000_000019"
            image = tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
            ids = tmp_path / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png"
            for path in (image, ids):
                path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image)
            Image.fromarray(id_map().astype(np.uint16)).save(ids)
    return tmp_path


def test_objects_groups_and_what_is_left_out():
    found = {a["category_id"]: a for a in instances(id_map())}
    assert set(found) == {24, 26, 33}
    assert found[26]["bbox"] == [5, 10, 20, 10] and found[26]["area"] == 200 and not found[26]["iscrowd"]
    assert found[24]["bbox"] == [40, 5, 10, 30] and found[24]["area"] == 30 * 8
    assert found[33]["iscrowd"] and found[33]["bbox"] == [55, 30, 20, 8]


def test_the_command_writes_what_training_reads(root, tmp_path, capsys):
    out = tmp_path / "coco"
    assert cli.main(["convert-dataset", "cityscapes", str(root), str(out)]) == 0
    assert "train.json: 2 images, 6 objects, 8 classes" in capsys.readouterr().out
    data = json.loads((out / "val.json").read_text())
    assert [image["file_name"].split("/")[:2] for image in data["images"]] == [["val", "bonn"], ["val", "ulm"]]
    dataset = CocoDetection(out / "train.json", root / "leftImg8bit", train=True, masks=True)
    target = dataset.load(0)[1]
    masks = {dataset.category_ids[label]: mask for label, mask in zip(target["labels"].tolist(), target["masks"])}
    assert np.array_equal(masks[24].numpy(), id_map() == 24000) and np.array_equal(masks[26].numpy(), id_map() == 26001)
    assert dataset.report["crowd"] == 2


def test_images_without_annotations_are_counted(root):
    next((root / "gtFine" / "val" / "ulm").iterdir()).unlink()
    imported = read_cityscapes(root)
    assert len(imported.splits["val"]) == 1 and len(imported.splits["train"]) == 2
    assert len(imported.notes.places["images left out without readable annotations"]) == 1


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="not Cityscapes"):
        read_cityscapes(tmp_path)


def test_ids_are_read_as_they_are(tmp_path, root):
    path = next((root / "gtFine" / "val" / "ulm").iterdir())
    assert np.array_equal(read_integers(path), id_map())
    with pytest.raises(ImageError, match="one channel"):
        read_integers(next((root / "leftImg8bit" / "val" / "ulm").iterdir()))
    with pytest.raises(ImageError, match="absent"):
        read_integers(tmp_path / "absent.png")
