"""Prediction in full float32, and which detections of it are kept."""

import pytest
import torch
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from torch import nn

from brs_detr.engine.predict import full_float32, predict
from brs_detr.ops.images import ImageBatch
from brs_detr.ops.masks import encode_masks


class Fixed(nn.Module):
    """Four detections on every image, not in the order of their scores; box k is at (k, k)."""

    def forward(self, images, targets):
        boxes = torch.arange(4.0)[:, None].expand(4, 4)
        scores, labels = torch.tensor([0.2, 0.8, 0.4, 0.6]), torch.tensor([5, 6, 7, 8])
        return [{"boxes": boxes, "scores": scores, "labels": labels} for _ in range(len(images))]


def predicted(model=None, **limits):
    """What is kept on images 3 and 1, the second of which cannot be read."""
    batch = ImageBatch(torch.zeros(2, 3, 4, 4), [(4, 4)] * 2, [(4, 4)] * 2)
    targets = [{"image_id": 3}, {"image_id": 1, "unreadable": True}]
    return predict(model or Fixed(), [(batch, targets)], Accelerator(cpu=True), **limits)


def test_the_best_detections_are_kept_best_first_with_their_boxes_and_labels():
    unreadable, found = predicted(max_detections=3)
    assert (unreadable["image_id"], found["image_id"]) == (1, 3)
    torch.testing.assert_close(torch.from_numpy(found["scores"]), torch.tensor([0.8, 0.6, 0.4]))
    assert found["labels"].tolist() == [6, 8, 7] and found["boxes"][:, 0].tolist() == [1, 3, 2]
    assert unreadable["unreadable"] and not len(unreadable["scores"])


def test_detections_at_the_score_threshold_are_dropped():
    _, found = predicted(score_threshold=float(torch.tensor(0.4)))
    assert found["labels"].tolist() == [6, 8]


def test_the_detector_stays_in_its_mode():
    for mode in (True, False):
        model = Fixed().train(mode)
        predicted(model)
        assert model.training is mode


def test_inside_no_product_is_rounded_and_afterwards_all_is_as_before():
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [library.allow_tf32 for library in libraries]
    try:
        libraries[0].allow_tf32, libraries[1].allow_tf32 = True, False
        with full_float32():
            assert [library.allow_tf32 for library in libraries] == [False, False]
        assert [library.allow_tf32 for library in libraries] == [True, False]
    finally:
        libraries[0].allow_tf32, libraries[1].allow_tf32 = before


class Recorded(Fixed):
    """As `Fixed`; keeps what products were allowed to round."""

    def forward(self, images, targets):
        libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
        self.allowed = [library.allow_tf32 for library in libraries]
        return super().forward(images, targets)


def test_a_prediction_is_made_inside_whatever_the_process_allows():
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before, model = [library.allow_tf32 for library in libraries], Recorded()
    try:
        for library in libraries:
            library.allow_tf32 = True
        predicted(model)
        assert model.allowed == [False, False] and all(library.allow_tf32 for library in libraries)
    finally:
        for library, allowed in zip(libraries, before, strict=True):
            library.allow_tf32 = allowed


class Masked(Fixed):
    """As `Fixed`; mask k has k + 1 pixels."""

    def __init__(self, encoded):
        super().__init__()
        self.encoded = encoded

    def forward(self, images, targets):
        masks = torch.arange(16).view(1, 4, 4) < torch.arange(1, 5)[:, None, None]
        return [
            out | {"masks": encode_masks(masks) if self.encoded else masks} for out in super().forward(images, targets)
        ]


@pytest.mark.parametrize("encoded", [True, False])
def test_masks_stay_with_their_detections(encoded):
    unreadable, found = predicted(Masked(encoded), max_detections=3, score_threshold=0.5)
    assert [int(coco_mask.area(rle)) for rle in found["masks"]] == [2, 4] and unreadable["masks"] == []
