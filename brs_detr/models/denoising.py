"""Denoising queries: noised objects, sent through the decoder beside the main queries (DINO, Zhang et al. 2023).

In training only. Each of G groups holds every object of an image twice: in its first block as a positive, which is to
find its object again, in its second block with more noise as a negative, which is to find nothing. A group's rows see
each other and the main queries; nobody else sees them, so they change nothing but the losses.

The random numbers are drawn on the host by one generator and are an input of everything else here, all of whose sizes
are known on the host, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from brs_detr.models.config import DenoisingConfig
from brs_detr.models.transformer.attention import inverse_sigmoid
from brs_detr.ops.targets import PackedTargets

log = logging.getLogger(__name__)

EPS = 1e-3  # of the inverse sigmoid, as in Co-DINO's decoder


class Noise(NamedTuple):
    """Random numbers for N noised objects, on the host.

    Attributes:
        flip: (N,) in [0, 1); below half the label noise, the class is replaced.
        labels: (N,) int64 classes that replace it, perhaps by itself.
        signs: (N, 4) float, -1 or 1: whether a corner's coordinate x1, y1, x2, y2 moves up or left.
        parts: (N, 4) in [0, 1): how far, as a share of the noise.
    """

    flip: Tensor
    labels: Tensor
    signs: Tensor
    parts: Tensor


def draw_noise(count: int, num_classes: int, generator: torch.Generator | None = None) -> Noise:
    """Draw the random numbers for `count` noised objects on the host."""
    return Noise(
        torch.rand(count, generator=generator),
        torch.randint(num_classes, (count,), generator=generator),
        torch.randint(2, (count, 4), generator=generator).float() * 2 - 1,
        torch.rand(count, 4, generator=generator),
    )


class DenoisingLayout(NamedTuple):
    """Where the noised objects of a batch are among its (B, P) denoising rows, on the host.

    Row b * M + j of an image is that of its object j in block b; blocks 2g and 2g + 1 are those of group g. An image
    with fewer than M objects lacks the others.

    Attributes:
        num_groups: G.
        max_objects: M, the largest number of objects in an image.
        rows: (2 * G * T,) int64, the row among the flattened B * P of each noised object; block by block, in a block in
            the order of the T objects.
        present: (B, P) bool, False for rows of objects that the image lacks.
    """

    num_groups: int
    max_objects: int
    rows: np.ndarray
    present: np.ndarray

    @classmethod
    def of(cls, counts: Sequence[int], queries: int) -> DenoisingLayout:
        """Arrange `counts` objects of each image in groups of about `queries` positives altogether."""
        max_objects = max(counts)
        num_groups = max(queries // max_objects, 1) if max_objects else 1
        blocks = np.arange(2 * num_groups)
        images = np.repeat(np.arange(len(counts)), counts)
        inside = np.concatenate([np.arange(count) for count in counts])
        rows = images * 2 * num_groups * max_objects + blocks[:, None] * max_objects + inside
        present = np.zeros((len(counts), 2 * num_groups * max_objects), bool)
        present.ravel()[rows] = True
        return cls(num_groups, max_objects, rows.ravel().astype(np.int64), present)

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (G * T,) of the first blocks, ascending, and the object (0..T-1) of each."""
        rows = self.rows.reshape(self.num_groups, 2, -1)[:, 0]
        objects = np.broadcast_to(np.arange(rows.shape[1]), rows.shape).ravel()
        order = rows.ravel().argsort()
        return rows.ravel()[order], objects[order]

    def visible(self, queries: int, device: torch.device, *, ignore_missing: bool = True) -> Tensor:
        """Return what the rows attend to: (B or 1, P, P + queries) bool, first the rows, then the main queries.

        Args:
            queries: number of main queries, at least 1.
            device: of the result.
            ignore_missing: rows of objects that an image lacks are not seen.
        """
        group = torch.arange(self.present.shape[1], device=device) // max(2 * self.max_objects, 1)
        own = (group[:, None] == group)[None]
        if ignore_missing and not self.present.all():
            own = own & torch.from_numpy(self.present).to(device, non_blocking=True)[:, None]
        return torch.cat([own, own.new_ones(*own.shape[:2], queries)], dim=2)


def noised_labels(labels: Tensor, noise: Noise, label_noise: float) -> Tensor:
    """Replace the class of about half of the share `label_noise` of the labels (N,)."""
    return torch.where(noise.flip < 0.5 * label_noise, noise.labels, labels)


def noised_boxes(boxes: Tensor, negative: Tensor, noise: Noise, box_noise: float) -> Tensor:
    """Move each coordinate of the corners by a share of half the box's width or height.

    Args:
        boxes: (N, 4) cxcywh in [0, 1].
        negative: (N,) bool; a negative moves between once and twice as far as a positive at most.
        noise: of the N boxes.
        box_noise: the largest share for a positive.

    Returns:
        (N, 4) cxcywh, inside the image. Opposite sides may change places, so width or height may be below 0.
    """
    corners, half = box_convert(boxes, "cxcywh", "xyxy"), boxes[:, 2:].repeat(1, 2) / 2
    moved = corners + noise.signs * (noise.parts + negative[:, None]) * half * box_noise
    return box_convert(moved.clamp(0, 1), "xyxy", "cxcywh")


class DenoisingQueries(NamedTuple):
    """Queries of all groups, P for every image.

    content (B, P, dim); boxes (B, P, 4) cxcywh; visible as of `decoder.QuerySet`. Positives are rows (R,) int64 of the
    flattened B * P, ascending, with labels (R,), targets (R, 4) cxcywh and scales (R, 4) pixels; given (R,) is the
    class that each was given as its content. valid (B * P,) bool is False for rows that are ignored; None: all count.
    """

    content: Tensor
    boxes: Tensor
    visible: Tensor
    rows: Tensor
    labels: Tensor
    targets: Tensor
    scales: Tensor
    given: Tensor
    valid: Tensor | None


class Denoising(nn.Module):
    """Makes the denoising queries of a batch.

    Args:
        dim: width of the queries.
        num_classes: K.
        config: their number and noise.

    Attributes:
        generator: of the random numbers; None: torch's own of the host.
        draw: (count, num_classes, generator) -> `Noise`.
        ignore_missing: False to treat rows of objects that an image lacks as the released code does: as background
            that the others of its group attend to. The image with most objects decides how many there are.
        ignore_given: False to rank the random class that a positive was given below all others, as the released code
            does. It is what its content says, so it would stand above the positives of the batch for long.
    """

    def __init__(self, dim: int, num_classes: int, config: DenoisingConfig) -> None:
        super().__init__()
        self.label_embedding = nn.Embedding(num_classes, dim)
        self.config = config
        self.generator: torch.Generator | None = None
        self.draw: Callable[[int, int, torch.Generator | None], Noise] = draw_noise
        self.ignore_missing = self.ignore_given = True
        self.has_warned = False

    def forward(self, targets: PackedTargets, queries: int) -> DenoisingQueries:
        """Make the queries.

        Args:
            targets: the objects of the batch.
            queries: number of main queries of an image, which the rows attend to.
        """
        targets = self.bounded(targets)
        counts, device = [end - start for start, end in targets.spans], targets.boxes.device
        layout = DenoisingLayout.of(counts, self.config.queries)
        blocks = 2 * layout.num_groups
        noise = self.draw(blocks * sum(counts), self.label_embedding.num_embeddings, self.generator)
        noise = Noise(*(part.to(device, non_blocking=True) for part in noise))
        negative = torch.arange(blocks).repeat_interleave(sum(counts)).remainder(2).to(device, non_blocking=True)
        labels = noised_labels(targets.labels.repeat(blocks), noise, self.config.label_noise)
        boxes = noised_boxes(targets.boxes.repeat(blocks, 1), negative, noise, self.config.box_noise)

        def send(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        shape, rows = layout.present.shape, send(layout.rows)
        content = self.label_embedding(labels)
        content = content.new_zeros(shape[0] * shape[1], content.shape[1]).index_copy(0, rows, content)
        # the boxes of rows without an object are the image's center half: a logit of 0
        logits = boxes.new_zeros(shape[0] * shape[1], 4).index_copy(0, rows, inverse_sigmoid(boxes, EPS))
        all_given = labels.new_zeros(shape[0] * shape[1]).index_copy(0, rows, labels)
        positives, objects = (send(part) for part in layout.positives())
        return DenoisingQueries(
            content=content.unflatten(0, shape),
            boxes=logits.sigmoid().unflatten(0, shape),
            visible=layout.visible(queries, device, ignore_missing=self.ignore_missing),
            rows=positives,
            labels=targets.labels[objects],
            targets=targets.boxes[objects],
            scales=targets.scales[objects],
            given=all_given[positives],
            valid=send(layout.present.ravel()) if self.ignore_missing else None,
        )

    def bounded(self, targets: PackedTargets) -> PackedTargets:
        """Leave out objects of images with more than `max_rows` allows, at random."""
        most = self.config.max_rows // 2
        counts = [end - start for start, end in targets.spans]
        if max(counts) <= most:
            return targets
        if not self.has_warned:
            self.has_warned = True
            log.warning(
                "model.denoising.max_rows=%d: an image has %d objects, of which a random %d become denoising queries "
                "in each step. Raise it if there is memory; attention takes the square.",
                self.config.max_rows,
                max(counts),
                most,
            )
        kept = [
            start + torch.randperm(end - start, generator=self.generator)[:most].sort().values
            for start, end in targets.spans
        ]
        ends = np.cumsum([len(own) for own in kept]).tolist()
        chosen = torch.cat(kept).to(targets.boxes.device, non_blocking=True)
        parts = {name: getattr(targets, name)[chosen] for name in ("labels", "boxes", "scales", "images")}
        return replace(targets, **parts, spans=list(zip([0, *ends[:-1]], ends, strict=True)))

    def ignored(self, queries: DenoisingQueries, num_classes: int) -> Tensor | None:
        """Return which logits (B * P, K) a ranking leaves out: those of the random classes of positives."""
        if not self.ignore_given:
            return None
        columns = torch.arange(num_classes, device=queries.given.device)
        wrong = (queries.given != queries.labels)[:, None] & (columns == queries.given[:, None])
        rows = queries.content.shape[0] * queries.content.shape[1]
        return wrong.new_zeros(rows, num_classes).index_copy(0, queries.rows, wrong)
