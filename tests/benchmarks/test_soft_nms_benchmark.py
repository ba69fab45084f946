"""benchmarks/soft_nms.py: what it times is Soft-NMS of boxes that do overlap."""

import torch
from torchvision.ops import box_iou


def test_candidates_overlap_within_their_class(benchmark_module):
    benchmark = benchmark_module("soft_nms")
    boxes, scores, labels = benchmark.candidates(120, 5, 2)
    assert boxes.shape == (2, 120, 4) and (boxes[..., 2:] > boxes[..., :2]).all()
    assert (scores.diff(dim=1) <= 0).all() and set(labels.unique().tolist()) == set(range(5))
    for image in range(2):
        overlap = box_iou(boxes[image], boxes[image]).fill_diagonal_(0) > benchmark.IOU
        assert (overlap & (labels[image][:, None] == labels[image])).any(dim=1).float().mean() > 0.2


def test_both_are_timed_on_the_same_boxes(benchmark_module):
    benchmark = benchmark_module("soft_nms")
    drawn = benchmark.candidates(60, 3, 1)
    calls = []
    times = benchmark.medians([lambda: calls.append("soft"), lambda: calls.append("hard")], torch.device("cpu"), 3)
    assert len(times) == 2 and calls == ["soft", "hard"] * 5
    assert len(benchmark.soft(*drawn)) >= len(benchmark.hard(*drawn)[0])  # it lowers scores and drops few
