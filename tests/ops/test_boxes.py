"""Boxes as offsets from references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou, nms

from brs_detr.ops import boxes as boxes_module
from brs_detr.ops.boxes import BoxCoder, clip_boxes, fast_nms, generalized_iou, kept_in_segments

corner = st.floats(-500, 500)
side = st.floats(1, 400)
box = st.tuples(corner, corner, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(box, box), min_size=1, max_size=5), st.sampled_from([(1.0,) * 4, (0.1, 0.1, 0.2, 0.2)]))
def test_decoding_undoes_encoding(pairs, stds):
    references, boxes = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    coder = BoxCoder(stds, max_factor=1000.0)
    torch.testing.assert_close(coder.decode(references, coder.encode(references, boxes)), boxes, rtol=1e-9, atol=1e-7)


def test_by_hand():
    reference = torch.tensor([[0.0, 0, 10, 20]])
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    decoded = coder.decode(reference, torch.tensor([[1.0, -1, math.log(2) / 0.2, 0]]))
    torch.testing.assert_close(decoded, torch.tensor([[6.0 - 10, 8 - 10, 6 + 10, 8 + 10]]))
    assert torch.equal(coder.encode(reference, reference), torch.zeros(1, 4))


def test_offsets_of_boxes_without_area_are_finite():
    flat, full = torch.tensor([[5.0, 5, 5, 9]]), torch.tensor([[3.0, 4, 8, 9]])
    for pair in ((flat, flat), (flat, full), (full, flat)):
        assert BoxCoder().encode(*pair).isfinite().all()


def test_growth_is_bounded():
    decoded = BoxCoder().decode(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.0, 0, 100, -100]]))
    width, height = (decoded[0, 2:] - decoded[0, :2]).tolist()
    assert math.isclose(width, 62.5, rel_tol=1e-5) and math.isclose(height, 1 / 62.5, rel_tol=1e-5)


def test_half_precision_offsets_decode_in_float32():
    reference = torch.tensor([[1000.0, 1000, 1301, 1303]])
    assert BoxCoder().decode(reference, torch.zeros(1, 4, dtype=torch.bfloat16)).equal(reference)


def slow_fast_nms(boxes, scores, nms_iou, per_class, score_threshold, max_detections):
    """Class by class and box by box, as the paper words it: a dropped box drops others all the same."""
    kept = []
    for label in range(scores.shape[1]):
        rows = sorted(range(len(boxes)), key=lambda row: -float(scores[row, label]))[:per_class]
        for place, row in enumerate(rows):
            overlaps = [float(box_iou(boxes[row][None], boxes[better][None])) for better in rows[:place]]
            if all(iou <= nms_iou for iou in overlaps) and scores[row, label] > score_threshold:
                kept.append((float(scores[row, label]), row, label))
    kept = sorted(kept, reverse=True)[:max_detections]
    return [row for _, row, _ in kept], [label for _, _, label in kept]


@pytest.mark.parametrize("per_class", [1, 8, 200])
@pytest.mark.parametrize("threshold", [-1.0, 0.6, 2.0])
def test_fast_nms_is_its_definition(per_class, threshold):
    corner = torch.rand(30, 2) * 20
    boxes, scores = torch.cat([corner, corner + 5 + torch.rand(30, 2) * 20], dim=1), torch.rand(30, 4)
    boxes[3] = boxes[7]
    limits = {"nms_iou": 0.4, "per_class": per_class, "score_threshold": threshold, "max_detections": 15}
    rows, labels = fast_nms(boxes, scores, **limits)
    assert (rows.tolist(), labels.tolist()) == slow_fast_nms(boxes, scores, **limits)


def test_fast_nms_of_empty_boxes_and_of_no_boxes():
    limits = {"nms_iou": 0.5, "per_class": 200, "score_threshold": 0.0, "max_detections": 100}
    rows, _ = fast_nms(torch.zeros(3, 4), torch.rand(3, 2), **limits)
    assert len(rows) == 6
    assert len(fast_nms(torch.zeros(0, 4), torch.zeros(0, 2), **limits)[0]) == 0


def random_boxes(*shape):
    low = torch.rand(*shape, 2) * 100 - 10
    return torch.cat([low, low + torch.rand(*shape, 2) * 40], dim=-1)


@pytest.mark.parametrize(("one_by_one", "at_once"), [(("cpu",), 0), ((), 0), ((), 100), ((), 1000)])
@pytest.mark.parametrize("lengths", [[30, 12, 5], [47], [1] * 6])
def test_each_segment_of_each_image_is_suppressed_as_if_alone(lengths, one_by_one, at_once, monkeypatch):
    """Both the loop and the calls for a GPU, with equal scores, empty boxes and boxes beyond the image."""
    monkeypatch.setattr(boxes_module, "SEGMENT_BY_SEGMENT", one_by_one)
    monkeypatch.setattr(boxes_module, "BOXES_AT_ONCE", at_once)
    boxes = random_boxes(3, sum(lengths)).round()
    boxes[0, ::4, 2:] = boxes[0, ::4, :2]
    scores = (torch.rand(3, sum(lengths)) * 8).round()
    kept = kept_in_segments(boxes, scores, lengths, 0.3)
    for image in range(3):
        parts = zip(boxes[image].split(lengths), scores[image].split(lengths), kept[image].split(lengths))
        for own, own_scores, found in parts:
            assert found.nonzero()[:, 0].tolist() == sorted(nms(own, own_scores, 0.3).tolist())
    assert 0 < int(kept.sum()) < kept.numel() or len(lengths) == 6


@pytest.mark.parametrize(("number", "calls"), [(4000, [16_000, 16_000, 4_000]), (8192, [16_384] * 4 + [8_192])])
def test_one_call_on_a_gpu_compares_a_bounded_number_of_boxes(number, calls, monkeypatch):
    """Its time and memory grow with the square: 9 images at once would take 81 times those of one."""
    monkeypatch.setattr(boxes_module, "SEGMENT_BY_SEGMENT", ())
    found = []
    monkeypatch.setattr(boxes_module, "nms", lambda boxes, *_: found.append(len(boxes)) or torch.zeros(1, dtype=int))
    kept = kept_in_segments(torch.rand(9, number, 4), torch.rand(9, number), [number - 10, 10], 0.5)
    assert found == calls and kept.shape == (9, number)
    found.clear()
    kept_in_segments(torch.rand(2, 20_000, 4), torch.rand(2, 20_000), [20_000], 0.5)
    assert found == [20_000, 20_000]  # an image is never split


def test_overlaps_of_pairs_of_any_shape_are_torchvisions():
    boxes, others = random_boxes(4, 7), random_boxes(5)
    expected = torch.stack([generalized_box_iou(own, others) for own in boxes])
    torch.testing.assert_close(generalized_iou(boxes[:, :, None], others), expected)


def test_images_are_clipped_together_as_alone():
    boxes, sizes = random_boxes(2, 20), [(50, 80), (33, 21)]
    for own, alone, size in zip(clip_boxes(boxes, sizes), boxes, sizes):
        assert torch.equal(own, clip_boxes_to_image(alone, size))
