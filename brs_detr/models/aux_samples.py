"""What a dense head hands on for the auxiliary queries."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AuxSamples(NamedTuple):
    """Samples of one dense head, one tensor a picture in each list.

    boxes (n, 4) xyxy pixels; labels (n,), background = num_classes; targets (n, 4) xyxy pixels, zeros for background;
    features (n, dim), attached to the graph.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    targets: list[Tensor]
    features: list[Tensor]
