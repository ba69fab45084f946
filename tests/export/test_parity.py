"""What counts as a difference between two computations, and what as another order among equals."""

import math

import torch

from brs_detr.export.parity import Differences, largest_differences, unlike_suppression
from brs_detr.models.transformer.decoder import Predictions
from brs_detr.ops.boxes import Candidates
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


def candidates(*rows):
    """x1 of a box of 10 x 10 pixels, score, group."""
    boxes = torch.tensor([[x, 0.0, x + 10, 10] for x, _, _ in rows])
    scores, groups = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    return Candidates(boxes, scores, groups, groups, torch.ones_like(groups, dtype=torch.bool))


# The second overlaps the first with an IoU of 2 / 3, the third is of another group, the last lies apart.
FOUR = candidates((0.0, 0.9, 0), (2.0, 0.8, 0), (2.0, 0.7, 1), (50.0, 0.2, 0))


def check(*kept, iou=0.5, limit=9, shift=0.0, among=FOUR):
    """What is said of these rows of the candidates, and of an entry that is no detection."""
    boxes = torch.cat([among.boxes[list(kept)] + shift, torch.zeros(1, 4)])
    scores = torch.cat([among.scores[list(kept)], torch.tensor([-1.0])])
    found = {"boxes": boxes, "scores": scores, "groups": torch.cat([among.groups[list(kept)], torch.zeros(1)])}
    return unlike_suppression(found, among, among, nms_iou=iou, limit=limit)


def test_what_suppression_keeps_is_recognized():
    assert check(0, 2, 3) == (0.0, 0.0)
    assert check(0, 1, 2, 3, iou=0.7) == (0.0, 0.0)
    assert check(0, 2, limit=2) == (0.0, 0.0)  # the last one is worse than both
    found = check(0, 2, 3, shift=0.01)
    assert math.isclose(found.boxes, 0.01, rel_tol=1e-3) and found.small


def test_what_suppression_does_not_keep_is_noticed():
    assert not check(0, 1, 2, 3).small, "two that overlap"
    assert not check(0, 3).small, "one is missing"
    assert not check(0, 2).small, "the last one is missing though there is room"
    assert not check(1, 2, 3).small, "the worse of two that overlap"
    assert not check(0, 3, limit=2).small, "a better one is missing"
    assert not check(limit=2).small, "nothing"
    assert not check(0, 2, 3, shift=0.5).small, "moved boxes"


def test_at_the_threshold_either_way_counts():
    """IoU 2 / 3, as float32 has it or not."""
    assert check(0, 2, 3, iou=2 / 3).small and check(0, 1, 2, 3, iou=2 / 3).small


def test_of_equal_scores_either_may_suppress_the_other():
    twins = candidates((0.0, 0.5, 0), (2.0, 0.5, 0))
    assert check(0, among=twins).small and check(1, among=twins).small
