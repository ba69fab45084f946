"""Soft-NMS against a loop over pairs, recorded data of another implementation, and what it must not depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou

from brs_detr.ops.soft_nms import decay, soft_nms, survives

CASES = {
    "linear80": {"iou": 0.8},
    "linear50": {"iou": 0.5},
    "gaussian": {"iou": 0.5, "sigma": 0.5},
    "linear50_min05": {"iou": 0.5, "min_score": 0.05},
}


def slow_soft_nms(boxes, scores, labels, *, iou, min_score=0.001, sigma=None):
    """The paper's loop, box by box: the boxes that fall below the minimum are removed at once."""
    left = {row: float(score) for row, score in enumerate(scores) if score >= min_score and score > 0}
    kept = []
    while left:
        best = max(left, key=lambda row: left[row])
        kept.append((best, left.pop(best)))
        for row in list(left):
            if labels[row] != labels[best]:
                continue
            overlap = float(box_iou(boxes[best][None], boxes[row][None]))
            if sigma is not None:
                left[row] *= math.exp(-overlap * overlap / sigma)
            elif overlap >= iou:
                left[row] *= 1 - overlap
            if left[row] < min_score or left[row] == 0:
                del left[row]
    return [row for row, _ in kept], [score for _, score in kept]


def crowd(seed, count, classes=3, side=40):
    """Boxes of which many overlap, with distinct scores; in float64, where no two overlaps are equal by rounding."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * side
    sides = 5 + 20 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    scores = (torch.randperm(count, generator=generator).double() + 1) / (count + 1)
    return torch.cat([corners, corners + sides], 1), scores, torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_it_keeps_what_the_recorded_implementation_keeps(golden, name):
    recorded = load_file(golden / "co_dino" / "soft_nms.safetensors")
    kept, scores = soft_nms(recorded["boxes"], recorded["scores"], recorded["labels"], **CASES[name])
    assert torch.equal(kept, recorded[f"{name}.keep"])
    dets = recorded[f"{name}.dets"]
    assert torch.equal(recorded["boxes"][kept], dets[:, :4])
    torch.testing.assert_close(scores, dets[:, 4], rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    st.sampled_from([0.0, 0.001, 0.2, 2.0]),
    st.sampled_from([None, 0.5]),
)
def test_it_is_the_loop_over_pairs(seed, count, iou, min_score, sigma):
    boxes, scores, labels = crowd(seed, count)
    kept, decayed = soft_nms(boxes, scores, labels, iou=iou, min_score=min_score, sigma=sigma)
    expected, expected_scores = slow_soft_nms(boxes, scores, labels, iou=iou, min_score=min_score, sigma=sigma)
    assert kept.tolist() == expected
    assert decayed.tolist() == pytest.approx(expected_scores, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.8]), st.sampled_from([None, 0.5]))
def test_order_other_images_and_other_classes_do_not_matter(seed, iou, sigma):
    boxes, scores, labels = crowd(seed, 24)
    rows, decayed = decay(boxes[None], scores[None], labels[None], iou=iou, sigma=sigma)
    new = dict(zip(rows[0].tolist(), decayed[0].tolist(), strict=True))
    assert len(new) == 24 and (decayed.diff() <= 0).all()
    assert all(new[row] <= score for row, score in enumerate(scores.tolist()))  # scores only fall
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    shuffled, _ = soft_nms(boxes[order], scores[order], labels[order], iou=iou, sigma=sigma)
    assert torch.equal(order[shuffled], soft_nms(boxes, scores, labels, iou=iou, sigma=sigma)[0])
    for label in range(3):  # each class alone
        own = (labels == label).nonzero()[:, 0]
        alone, alone_scores = decay(boxes[own][None], scores[own][None], labels[own][None], iou=iou, sigma=sigma)
        assert own[alone[0]].tolist() == [row for row in rows[0].tolist() if labels[row] == label]
        assert alone_scores[0].tolist() == pytest.approx([new[row] for row in own[alone[0]].tolist()])
    # beside a larger image, filled up with scores below 0
    other, other_scores, other_labels = crowd(seed + 1, 30)
    filled = [torch.cat([one, one.new_full((6, *one.shape[1:]), -1)]) for one in (boxes, scores, labels)]
    both = [torch.stack(pair) for pair in zip(filled, (other, other_scores, other_labels), strict=True)]
    batch_rows, batch_scores = decay(*both, iou=iou, sigma=sigma)
    kept = survives(batch_scores[0], 0.001)
    assert torch.equal(batch_rows[0][kept], soft_nms(boxes, scores, labels, iou=iou, sigma=sigma)[0])


def test_the_first_ones_are_those_of_all():
    boxes, scores, labels = crowd(0, 50)
    kept, decayed = soft_nms(boxes, scores, labels, iou=0.3)
    few, few_scores = soft_nms(boxes, scores, labels, iou=0.3, max_detections=7)
    assert torch.equal(few, kept[:7]) and torch.equal(few_scores, decayed[:7]) and len(kept) > 7


def test_by_hand():
    """Overlaps with the best box: 1/3, 1 and, in another class, 1."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    scores, labels = torch.tensor([0.9, 0.6, 0.8, 0.3]), torch.tensor([0, 0, 0, 1])
    kept, decayed = soft_nms(boxes, scores, labels, iou=0.3)
    assert kept.tolist() == [0, 1, 3]  # a duplicate has nothing left
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.6 * 2 / 3, 0.3]))
    kept, decayed = soft_nms(boxes, scores, labels, iou=0.34)
    assert kept.tolist() == [0, 1, 3] and decayed.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert soft_nms(boxes, scores, labels, iou=0.3, min_score=0.5)[0].tolist() == [0]


def test_boxes_without_area_and_no_boxes():
    boxes = torch.zeros(3, 4)
    kept, scores = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.zeros(3, dtype=torch.long), iou=0.5)
    assert kept.tolist() == [1, 2, 0] and scores.isfinite().all()
    kept, scores = soft_nms(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.long), iou=0.5)
    assert kept.shape == scores.shape == (0,) and kept.dtype == torch.int64


class NoCopiesToTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_until_boxes_are_selected():
    boxes, scores, labels = crowd(0, 20)
    with NoCopiesToTheHost():
        decay(boxes[None], scores[None], labels[None], iou=0.5)
