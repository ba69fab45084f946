"""Auxiliary queries: positives of the dense heads, sent through the decoder with their one-to-many targets.

Co-DETR (Zong et al. 2023), section 3.3, "customized positive queries generation". They exist in training only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.models.transformer.two_stage import BoxEmbedding
from brs_detr.ops.images import Size
from brs_detr.ops.targets import pixel_scales


class AuxSamples(NamedTuple):
    """Positive and background samples of one head, a list entry per image; they may become queries.

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


def aux_samples(assignment: HeadAssignment, features: Sequence[Tensor], max_samples: int | None = None) -> AuxSamples:
    """Split what a head learned by image.

    Args:
        assignment: of the head.
        features: per image (n, dim) what the head saw at each reference, with gradient.
        max_samples: at most this many samples of an image, the first ones; None: all.
    """
    targets = assignment.targets.new_zeros(len(assignment.labels), 4).index_copy(0, assignment.rows, assignment.targets)
    columns = assignment.references, assignment.per_image(assignment.labels), assignment.per_image(targets), features
    return AuxSamples(*([part[:max_samples] for part in column] for column in columns))


class AuxQueries(NamedTuple):
    """Queries of one dense head, n for every image, positives first.

    boxes (B, n, 4) cxcywh, may exceed [0, 1]; features (B, n, dim); rows (P,) int64, positives among the flattened
    B * n; labels (P,); targets (P, 4) cxcywh; scales (P, 4) pixels (w, h, w, h). Background queries fill up to n.
    """

    boxes: Tensor
    features: Tensor
    rows: Tensor
    labels: Tensor
    targets: Tensor
    scales: Tensor


def select_queries(
    heads: Sequence[AuxSamples],
    counts: Sequence[Sequence[int]],
    sizes: Sequence[Size],
    num_classes: int,
    *,
    max_queries: int = 300,
    min_queries: int = 9,
    priority: Callable[[int], Tensor] = torch.rand,
) -> list[AuxQueries]:
    """Choose the auxiliary queries of each dense head, without waiting for the device.

    A head gets n queries an image, n = its largest number of positives in any image, within [min_queries,
    max_queries]. Positives go first (a random subset where there are more than n), random background samples fill the
    rest; an image with fewer samples than n repeats them.

    Args:
        heads: samples of each dense head.
        counts: positives of each image among the samples of each head.
        sizes: (h, w) of the images.
        num_classes: K, the background label.
        max_queries, min_queries: bounds of n.
        priority: n -> (n,) numbers in [0, 1) on the CPU; the smallest are chosen first.

    Returns:
        One set of queries a head.
    """
    scales = pixel_scales(sizes, heads[0].labels[0].device) if heads else torch.zeros(0, 4)
    return [
        _select(
            _never_empty(samples, scales, num_classes), own, scales, num_classes, max_queries, min_queries, priority
        )
        for samples, own in zip(heads, counts, strict=True)
    ]


def _never_empty(samples: AuxSamples, scales: Tensor, num_classes: int) -> AuxSamples:
    """Give an image without any sample one background sample: the full image, without a feature."""
    if all(len(labels) for labels in samples.labels):
        return samples
    full = torch.cat([torch.zeros_like(scales[:, :2]), scales[:, 2:]], dim=1)[:, None]
    spare = AuxSamples(
        boxes=list(full),
        labels=[labels.new_full((1,), num_classes) for labels in samples.labels],
        targets=[torch.zeros_like(box) for box in full],
        features=[features.new_zeros(1, features.shape[1]) for features in samples.features],
    )
    columns = zip(samples, spare, strict=True)
    return AuxSamples(*([one if len(one) else s for one, s in zip(column, spares)] for column, spares in columns))


def _select(
    samples: AuxSamples,
    counts: Sequence[int],
    scales: Tensor,
    num_classes: int,
    max_queries: int,
    min_queries: int,
    priority: Callable[[int], Tensor],
) -> AuxQueries:
    """Choose the queries of one head; `counts` are its numbers of positives, `scales` (B, 4) pixels."""
    n, device = min(max(*counts, min_queries), max_queries), scales.device
    lengths = torch.tensor([len(labels) for labels in samples.labels])
    labels = torch.cat(samples.labels)
    drawn = torch.cat([priority(len(own)) for own in samples.labels]).to(device, non_blocking=True)
    # Background after the positives, random order within both. All images in one sort, whose numbers leave, in float64,
    # all digits to the order within them.
    images = torch.arange(len(counts), dtype=torch.float64).repeat_interleave(lengths).to(device, non_blocking=True)
    order = (drawn + (labels >= num_classes) + 3 * images).argsort(stable=True)
    slots = torch.arange(n) % lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    positive = slots.numpy() < np.array(counts)[:, None]
    rows = torch.from_numpy(np.flatnonzero(positive)).to(device, non_blocking=True)
    chosen = order[(slots + starts[:, None]).to(device, non_blocking=True)]
    boxes, targets = (
        box_convert(torch.cat(part)[chosen].float(), "xyxy", "cxcywh") / scales[:, None]
        for part in (samples.boxes, samples.targets)
    )
    return AuxQueries(
        boxes=boxes,
        features=torch.cat(samples.features).index_select(0, chosen.flatten()).unflatten(0, chosen.shape),
        rows=rows,
        labels=labels[chosen].flatten()[rows],
        targets=targets.flatten(0, 1)[rows],
        scales=scales[rows // n],
    )


class AuxQueryEmbedding(nn.Module):
    """Turns a dense head's samples into decoder queries: position from the box, content from box and feature.

    The head's own offset is one scalar shared by all channels, as in the released models (there an acknowledged slip).

    Args:
        dim: width of the queries.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.box_embedding = BoxEmbedding(dim)
        self.offset = nn.Parameter(torch.empty(1).uniform_(-(2**0.5), 2**0.5))
        self.feature_projection = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.feature_projection.weight)
        self.feature_norm = nn.LayerNorm(dim)

    def forward(self, boxes: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Embed boxes (B, n, 4) cxcywh and features (B, n, dim) as position and content, both (B, n, dim)."""
        position, content = self.box_embedding(boxes)
        return position + self.offset, content + self.feature_norm(self.feature_projection(features))


class AuxBoxEmbedding(nn.Module):
    """Turns a dense head's samples into Co-DINO's decoder queries: content from the box alone.

    Args:
        dim: width of the queries.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.box_embedding = BoxEmbedding(dim, parts=1)

    def forward(self, boxes: Tensor, features: Tensor) -> tuple[None, Tensor]:
        """Embed boxes (B, n, 4) cxcywh as content (B, n, dim); the decoder makes the positions."""
        return None, self.box_embedding(boxes)[0]
