"""IoU and GIoU loss of paired boxes: the quality label of a positive and its box loss, one number per pair.

torchvision's `generalized_box_iou_loss` does not return the IoU, and computes in half precision for half inputs, so
both are written out here in float32.
"""

import torch
from torch import Tensor


def _overlap(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersection and union areas (P,) of paired xyxy boxes."""
    width_height = (torch.min(boxes[:, 2:], targets[:, 2:]) - torch.max(boxes[:, :2], targets[:, :2])).clamp(min=0)
    intersection = width_height[:, 0] * width_height[:, 1]
    return intersection, _area(boxes) + _area(targets) - intersection


def _area(boxes: Tensor) -> Tensor:
    """Return the areas (P,) of xyxy boxes; a box whose corners are swapped has area 0, not a negative one."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def _single_precision(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def paired_iou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Compute the intersection over union of the i-th box with the i-th target.

    Args:
        boxes: (P, 4) xyxy in any unit.
        targets: (P, 4) xyxy in the same unit.

    Returns:
        (P,) in [0, 1], float32 or wider; 0 where both boxes are empty.
    """
    with torch.autocast(boxes.device.type, enabled=False):
        intersection, union = _overlap(_single_precision(boxes), _single_precision(targets))
        # Two empty boxes: 0 / tiny is 0, where 0 / 0 would be NaN.
        return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def paired_giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute 1 - GIoU of the i-th box with the i-th target (Rezatofighi et al., CVPR 2019, Algorithm 1).

    Args:
        boxes: (P, 4) xyxy in any unit.
        targets: (P, 4) xyxy in the same unit.
        eps: smallest union and enclosing area, in that unit squared.

    Returns:
        (P,) in [0, 2], float32 or wider, not reduced.
    """
    with torch.autocast(boxes.device.type, enabled=False):
        boxes, targets = _single_precision(boxes), _single_precision(targets)
        intersection, union = _overlap(boxes, targets)
        union = union.clamp(min=eps)
        hull = (torch.max(boxes[:, 2:], targets[:, 2:]) - torch.min(boxes[:, :2], targets[:, :2])).clamp(min=0)
        enclosing = (hull[:, 0] * hull[:, 1]).clamp(min=eps)
        return 1 - intersection / union + (enclosing - union) / enclosing
