"""What a one-to-many head hands to the decoder as collaborative queries (Zong et al., Co-DETR, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AuxSamples(NamedTuple):
    """Positive and background samples of one head, a list entry per picture.

    Attributes:
        boxes: (n, 4) xyxy pixels, the head's anchors or proposals, detached.
        labels: (n,) int64, background = number of classes.
        targets: (n, 4) xyxy pixels of the object, zeros for background.
        features: (n, dim) what the head saw there, with gradient.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    targets: list[Tensor]
    features: list[Tensor]
