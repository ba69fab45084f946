"""Suppression with a fixed number of rows, against the code that drops them."""

import torch
from torchvision.ops import batched_nms

from brs_detr.export.suppression import (
    NOTHING,
    best_of_any_number,
    best_rows,
    clip,
    keep_best,
    keep_in_order,
    suppress_within,
)
from brs_detr.models.heads.dense import best_scores
from brs_detr.models.transformer.two_stage import kept_by_nms


def boxes_and_scores(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 40
    return torch.cat([low, low + 5 + torch.rand(*shape, 2, generator=generator) * 30], -1), torch.rand(
        *shape, generator=generator
    )


def test_boxes_are_kept_as_in_torchvision_in_every_image_and_group():
    boxes, scores = boxes_and_scores(0, 2, 60)
    groups = torch.arange(60).expand(2, -1) % 3
    found = suppress_within(boxes, scores, groups, 3, 0.4)
    for own_boxes, own_scores, own_groups, own in zip(boxes, scores, groups, found):
        kept = torch.zeros(60, dtype=torch.bool)
        kept[batched_nms(own_boxes, own_scores, own_groups, 0.4)] = True
        assert 3 < kept.sum() < 60
        assert torch.equal(own, torch.where(kept, own_scores, NOTHING))


def test_proposals_in_order_are_kept_as_in_eager_mode():
    boxes, _ = boxes_and_scores(1, 3, 40)
    kept = keep_in_order(boxes, 0.3)
    assert 3 < kept.sum() < 120 and torch.equal(kept, kept_by_nms(boxes, 0.3))


def test_what_takes_no_part_is_not_kept_and_suppresses_nothing():
    boxes, scores = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10]]]), torch.tensor([[[NOTHING, 0.0]]])
    assert keep_best(boxes, scores, 0.5).tolist() == [[[False, True]]]


def test_the_best_are_as_many_as_asked_for_where_there_are_fewer():
    scores = torch.rand(2, 7)
    for ours, theirs in zip(best_of_any_number(scores, 5), best_scores(scores, 5)):
        assert torch.equal(ours, theirs)
    best, columns = best_of_any_number(scores, 9)
    assert torch.equal(best[:, :7], best_scores(scores, 9)[0]) and (best[:, 7:] == NOTHING).all()
    assert columns.shape == (2, 9) and columns.max() == 6


def test_each_image_has_borders_of_its_own():
    boxes = torch.tensor([-3.0, 5, 90, 40]).expand(2, 1, 4)
    assert clip(boxes, torch.tensor([[30, 50], [60, 80]])).tolist() == [[[0, 5, 50, 30]], [[0, 5, 80, 40]]]


def test_rows_of_no_detection_are_empty_and_last():
    scores, labels = torch.tensor([[0.2, NOTHING, 0.7]]), torch.tensor([[1, 2, 3]])
    boxes = torch.arange(12.0).reshape(1, 3, 4)
    best, rows, names = best_rows(scores, 5, boxes, labels)
    assert best.tolist() == [[torch.tensor(0.7).item(), torch.tensor(0.2).item(), NOTHING]]
    assert rows.tolist() == [[[8, 9, 10, 11], [0, 1, 2, 3], [0, 0, 0, 0]]] and names.tolist() == [[3, 1, 0]]
