"""What counts as a difference between two computations, and what as another order among equals."""

import math

import torch

from brs_detr.export.parity import Differences, largest_differences
from brs_detr.models.transformer.decoder import Predictions
from brs_detr.ops.images import ImageBatch

IMAGES = ImageBatch(torch.zeros(1, 3, 100, 200), [(100, 200)], [(100, 200)])


def predictions():
    """Two queries, three classes: scores 0.9, 0.6 for class 1 and 0.6 for class 2, all others tiny."""
    scores = torch.tensor([[[0.001, 0.9, 0.002], [0.003, 0.6, 0.6]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.25, 0.5, 0.1, 0.4]]])
    return Predictions(scores.logit(), boxes)


def detections(order=(0, 1, 2), shift=0.0):
    """The three best, in pixels of an image 200 wide and 100 high."""
    boxes = torch.tensor([[80.0, 40, 120, 60], [40, 30, 60, 70], [40, 30, 60, 70]]) + shift
    scores, labels = torch.tensor([0.9, 0.6, 0.6]), torch.tensor([1, 1, 2])
    return boxes[list(order)][None], scores[None], labels[list(order)][None]


def test_equal_scores_may_come_in_any_order():
    for order in ((0, 1, 2), (0, 2, 1)):
        found = largest_differences(predictions(), IMAGES, *detections(order))
        assert found.boxes < 1e-4 and found.scores < 1e-6 and found.small


def test_a_shifted_box_is_as_far_off_as_it_is_shifted():
    found = largest_differences(predictions(), IMAGES, *detections(shift=0.5))
    assert math.isclose(found.boxes, 0.5, abs_tol=1e-4) and not found.small


def test_a_box_under_the_wrong_label_has_no_counterpart():
    boxes, scores, _ = detections()
    found = largest_differences(predictions(), IMAGES, boxes, scores, torch.tensor([[1, 1, 0]]))
    assert math.isinf(found.boxes) and not found.small


def test_a_score_is_compared_rank_by_rank():
    boxes, scores, labels = detections()
    found = largest_differences(predictions(), IMAGES, boxes, scores - torch.tensor([0, 0, 0.01]), labels)
    assert math.isclose(found.scores, 0.01, abs_tol=1e-6)


def test_what_is_not_a_number_is_not_small():
    assert not Differences(math.nan, 0.0).small and not Differences(0.0, math.nan).small
