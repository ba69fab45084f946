"""LVIS's files: images named by URL, lists of categories, frequencies, and the factors of rare classes."""

import numpy as np
import pytest

from brs_detr.data.coco import CocoDetection
from brs_detr.data.federated import describe_repeats, repeat_factors
from brs_detr.evaluation.ground_truth import GroundTruth


@pytest.fixture()
def lvis(tmp_path, write_dataset, change):
    boxes = [[(1, 2, 3, 20, 20), (90, 0, 0, 9, 9)], [(1, 2, 3, 9, 9), (1, 9, 9, 9, 9)], [(17, 1, 1, 8, 8)], []]
    path = write_dataset(tmp_path, sizes=[(40, 60)] * 4, boxes=boxes)
    (tmp_path / "images").rename(tmp_path / "val2017")

    def edit(data):
        for image in data["images"]:
            image["coco_url"] = "http://images.cocodataset.org/val2017/" + image.pop("file_name")
            image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        data["images"][0] |= {"neg_category_ids": [17], "not_exhaustive_category_ids": [90]}
        for category, frequency in zip(data["categories"], "rcf", strict=True):
            category["frequency"] = frequency

    return change(path, edit)


@pytest.mark.parametrize("folder", [".", "val2017"])
def test_images_are_those_of_the_url(lvis, folder):
    dataset = CocoDetection(lvis, lvis.parent / folder, train=True)
    assert len(dataset) == 4 and dataset[0][0].shape == (3, 40, 60)
    assert ("image_elsewhere" in dataset.report) == (folder == "val2017")


def test_the_lists_reach_the_evaluation(lvis):
    truth = GroundTruth.from_dataset(CocoDetection(lvis, lvis.parent, train=False).ground_truth())
    assert truth.federated and truth.frequency == {90: "r", 1: "c", 17: "f"}
    assert truth.negative[1000] == {17} and truth.not_exhaustive[1000] == {90} and truth.negative[993] == frozenset()


def test_other_datasets_have_none(tmp_path, write_dataset):
    path = write_dataset(tmp_path, sizes=[(40, 60)], boxes=[[(1, 2, 3, 20, 20)]])
    truth = GroundTruth.from_dataset(CocoDetection(path, tmp_path / "images", train=False).ground_truth())
    assert not truth.federated and not truth.frequency


def test_factors_by_hand(lvis):
    """Class 1 is in 2 of 4 images, the others in one each; the last image has no object."""
    packed = CocoDetection(lvis, lvis.parent, train=True).packed
    assert repeat_factors(packed, 0.2).tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(repeat_factors(packed, 1.0), [2, np.sqrt(2), 2, 1])


def test_a_line_says_how_often_images_are_shown(lvis):
    """By hand as above: 2 + sqrt(2) + 2 + 1 times; both rare classes are in one image."""
    dataset = CocoDetection(lvis, lvis.parent, train=True)
    line = describe_repeats(dataset.packed, dataset.classes, 1.0)
    assert line.startswith("data.repeat_threshold=1: 4 images are shown 6 times an epoch, those of ")
    assert line.endswith(" (in 1) 2.0 times each")
    assert "every class is in a larger share" in describe_repeats(dataset.packed, dataset.classes, 0.2)
