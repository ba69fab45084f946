"""Paired boxes: overlaps that can be worked out by hand, and torchvision's matrices on the diagonal."""

import torch
from torchvision.ops import box_iou, generalized_box_iou

from brs_detr.losses import paired_giou_loss, paired_iou


def random_boxes(n: int) -> torch.Tensor:
    corner = torch.rand(n, 2) * 50
    return torch.cat([corner, corner + torch.rand(n, 2) * 40 + 1], 1)


def test_half_overlap_by_hand():
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    shifted = torch.tensor([[1.0, 0.0, 3.0, 2.0]])
    assert torch.allclose(paired_iou(box, shifted), torch.tensor([1 / 3]))
    assert torch.allclose(paired_giou_loss(box, shifted), torch.tensor([2 / 3]))


def test_far_apart_boxes_approach_two():
    near, far = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[1e4, 1e4, 1e4 + 1, 1e4 + 1]])
    assert paired_giou_loss(near, far).item() > 1.999


def test_diagonal_of_torchvision_matrices():
    a, b = random_boxes(20), random_boxes(20)
    assert torch.allclose(paired_iou(a, b), box_iou(a, b).diagonal())
    assert torch.allclose(paired_giou_loss(a, b), 1 - generalized_box_iou(a, b).diagonal(), atol=1e-6)


def test_empty_boxes_are_finite_with_finite_gradients():
    box = torch.zeros(1, 4, requires_grad=True)
    assert paired_iou(box, torch.zeros(1, 4)).item() == 0
    paired_giou_loss(box, torch.zeros(1, 4)).sum().backward()
    assert box.grad.isfinite().all()


def test_half_precision_is_computed_in_single():
    a, b = random_boxes(5), random_boxes(5)
    assert paired_iou(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert paired_giou_loss(a.half(), b.half()).dtype == torch.float32


def test_no_pairs():
    empty = torch.zeros(0, 4)
    assert paired_iou(empty, empty).shape == paired_giou_loss(empty, empty).shape == (0,)
