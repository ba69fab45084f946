"""SOLOv2's head: every cell of a grid predicts a class and the kernel of a 1x1 convolution that draws its mask.

Source: Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", NeurIPS 2020; trained with Rank & Sort as by
Oksuz et al., "Rank & Sort Loss", ICCV 2021, supplement S3.4: all logits in one ranking, sorted by the Dice coefficients
of the masks, since there are no boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brs_detr.assign.assignment import BatchAssignment, count_per_image, join
from brs_detr.assign.solo import mass_centers, solo_assign
from brs_detr.losses.objective import PredictionSet
from brs_detr.models.heads.dense import build_objective
from brs_detr.models.heads.fovea import size_ranges
from brs_detr.models.heads.towers import init_convs
from brs_detr.models.one_stage_config import SOLOv2HeadConfig
from brs_detr.ops.images import Size
from brs_detr.ops.masks import dice_coefficient, matrix_nms, require_masks, shrink_masks

DICE_EPS = 0.002  # 0.001 for each of the two sums of squares, as in the released code


class SOLOv2Output(NamedTuple):
    """What the head predicts.

    Attributes:
        logits: per level (B, g, g, C) of each cell's class.
        kernels: per level (B, g, g, E) of each cell's mask.
        features: (B, E, h, w) over the padded batch; a mask's logits are their products with its kernel.
        frame: (h, w) pixels of the padded batch.
    """

    logits: list[Tensor]
    kernels: list[Tensor]
    features: Tensor
    frame: Size


class SOLOv2Losses(NamedTuple):
    """Named loss terms whose sum is the head's loss, and the objects of its cells."""

    terms: dict[str, Tensor]
    assignment: BatchAssignment


class MaskBranch(nn.Module):
    """The feature of all masks from the backbone's levels of the pyramid (section 3.2, "unified mask feature").

    Each level is convolved and enlarged step by step to the size of the finest; the coarsest, which sees most of the
    image, also reads where its cells lie.

    Args:
        dim: channels of the levels.
        hidden: channels before the last convolution.
        outputs: E.
        levels: number of levels.
        groups: of the GroupNorms.
    """

    def __init__(self, dim: int, hidden: int, outputs: int, levels: int, groups: int) -> None:
        super().__init__()
        branches: list[list[nn.Module]] = []
        for level in range(levels):
            first = dim + 2 if 0 < level == levels - 1 else dim
            widths = [first] + [hidden] * max(level, 1)
            branches.append([_conv(a, b, groups) for a, b in pairwise(widths)])
        self.branches = nn.ModuleList(nn.ModuleList(branch) for branch in branches)
        self.output = _conv(hidden, outputs, groups, kernel=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map a list of (B, dim, h, w), finest first, to (B, E, h, w) of the finest."""
        total = torch.zeros((), device=features[0].device)
        for level, (x, branch) in enumerate(zip(features, self.branches)):  # further maps are not used
            if 0 < level == len(self.branches) - 1:
                x = with_coordinates(x)
            for step, conv in enumerate(branch.children(), start=1):
                x = F.interpolate(conv(x), size=features[max(level - step, 0)].shape[-2:], mode="bilinear")
            total = total + x
        masks: Tensor = self.output(total)
        return masks


class SOLOv2Head(nn.Module):
    """Class and mask of an object at the grid cells around its center of mass.

    Args:
        dim: channels of the feature maps.
        num_classes: C.
        strides: pixels per cell of each map, which the sizes of the objects of a level are multiples of.
        mask_levels: number of finest maps that the masks are made from.
        config: see `SOLOv2HeadConfig`.
    """

    def __init__(
        self, dim: int, num_classes: int, strides: Sequence[int], mask_levels: int, config: SOLOv2HeadConfig
    ) -> None:
        super().__init__()
        self.num_classes, self.config, self.grids = num_classes, config, config.grids
        self.size_ranges = size_ranges(strides, config.object_sizes)
        # A mask of as few cells is no object; the grids of the finest and coarsest level read maps of their neighbors'.
        inner = [strides[min(max(level, 1), max(len(strides) - 2, 0))] for level in range(len(strides))]
        areas = [config.min_area * stride for stride in inner]
        self.min_areas = [area for area, grid in zip(areas, self.grids, strict=True) for _ in range(grid * grid)]
        self.objective = build_objective(config.objective)
        self.class_tower = _tower(dim, config)
        self.kernel_tower = _tower(dim + 2, config)
        self.score = nn.Conv2d(config.conv_dim, num_classes, 3, padding=1)
        self.kernel = nn.Conv2d(config.conv_dim, config.mask_dim, 3, padding=1)
        self.masks = MaskBranch(dim, config.mask_hidden, config.mask_dim, mask_levels, config.norm_groups)
        init_convs(self, self.score)

    def forward(self, features: Sequence[Tensor], frame: Size) -> SOLOv2Output:
        """Predict from feature maps (B, dim, h, w) of a padded batch of (h, w) = `frame` pixels."""
        maps = list(features)
        if len(maps) > 2:  # as published: the grids of neighboring levels are made from maps of similar size
            height, width = maps[0].shape[-2:]
            maps[0] = F.interpolate(maps[0], size=((height + 1) // 2, (width + 1) // 2), mode="bilinear")
            maps[-1] = F.interpolate(maps[-1], size=maps[-2].shape[-2:], mode="bilinear")
        logits, kernels = [], []
        for x, grid in zip(maps, self.grids, strict=True):
            cells = F.interpolate(with_coordinates(x), size=(grid, grid), mode="bilinear")
            logits.append(self.score(self.class_tower(cells[:, :-2])).permute(0, 2, 3, 1))
            kernels.append(self.kernel(self.kernel_tower(cells)).permute(0, 2, 3, 1))
        return SOLOv2Output(logits, kernels, self.masks(features), frame)

    def losses(self, output: SOLOv2Output, sizes: Sequence[Size], targets: Sequence[dict]) -> SOLOv2Losses:
        """Compute the loss terms of the batch, as one prediction set of all cells, those of the padding included.

        Args:
            output: of `forward`.
            sizes: (h, w) pixels of each image; not used, since the grids divide the padded batch.
            targets: per image {"boxes": (M, 4) xyxy pixels, "labels": (M,), "masks": (M, h, w) bitmaps}.

        Returns:
            scalar terms, finite and attached to the graph also when there is no object at all; and the assignment.
        """
        require_masks(targets)
        assignment = join([self.assign(target, output.frame) for target in targets], targets)
        rows = assignment.positives()
        dice = self.dice(output, targets, rows, assignment.assigned[rows])
        terms = self.objective(
            PredictionSet(
                _cells(output.logits).flatten(0, 1),
                assignment.classes(self.num_classes),
                quality=dice.detach(),
                box_losses={"mask": 1 - dice},
                rows=rows,
            )
        )
        return SOLOv2Losses(terms, assignment)

    def assign(self, target: dict, frame: Size) -> Tensor:
        """Give the cells of all levels to the objects of one image: (N,) int64."""
        centers = mass_centers(target["masks"])
        return solo_assign(target["boxes"].float(), centers, frame, self.grids, self.size_ranges, self.config.sigma)

    def dice(self, output: SOLOv2Output, targets: Sequence[dict], rows: Tensor, objects: Tensor) -> Tensor:
        """Compute the Dice coefficient of each positive cell's mask and its object's.

        Args:
            output: of `forward`.
            targets: as for `losses`.
            rows: (P,) int64, positive cells of the batch, ascending.
            objects: (P,) int64, their objects, counted through all images.

        Returns:
            (P,), in the order of the rows.
        """
        kernels, size = _cells(output.kernels), (output.features.shape[2], output.features.shape[3])
        counts = count_per_image(rows, [kernels.shape[1]] * len(kernels))
        start, values = 0, []
        for own, objs, features, target in zip(
            kernels.flatten(0, 1)[rows].split(counts), objects.split(counts), output.features, targets, strict=True
        ):
            masks = shrink_masks(target["masks"], output.frame, size)[objs - start]
            values.append(dice_coefficient(draw(own, features), masks, DICE_EPS))
            start += len(target["boxes"])
        return torch.cat(values)

    @torch.no_grad()
    def predict(self, output: SOLOv2Output, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        """Detect objects, best first, per image.

        Returns:
            {"scores": (n,), "labels": (n,), "masks": (n, h, w) probabilities over the padded batch}.
        """
        scores = _cells([peaks(level.float().sigmoid()) for level in output.logits])
        kernels = _cells(output.kernels)
        return [self.detect(*image) for image in zip(scores, kernels, output.features, strict=True)]

    def detect(self, scores: Tensor, kernels: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Choose the detections of one image by the scores (N, C) of its cells, with kernels (N, E)."""
        config = self.config
        # Cut before the masks are drawn, and not after as in the released code: without a threshold, one that a ranking
        # loss gives no reason for, there would be a mask for every cell and class.
        score, index = scores.flatten().topk(min(config.before_nms, scores.numel()))
        index = index[score > config.score_threshold]
        cell, label = index // self.num_classes, index % self.num_classes
        masks = draw(kernels[cell], features)
        inside = masks > 0.5
        area = inside.sum(dim=(1, 2))
        # a mask's own certainty, its mean probability inside, multiplies its score
        score = scores[cell, label] * (masks * inside).sum(dim=(1, 2)) / area.clamp(min=1)
        large = area > torch.tensor(self.min_areas, device=area.device)[cell]
        order = score.where(large, -1.0).argsort(descending=True, stable=True)[: int(large.sum())]
        score = matrix_nms(inside[order], label[order], score[order], config.nms_sigma)
        best = score.argsort(descending=True, stable=True)[: config.max_detections]
        best = best[score[best] > config.final_threshold]
        return {"scores": score[best], "labels": label[order][best], "masks": masks[order][best]}


def draw(kernels: Tensor, features: Tensor) -> Tensor:
    """Compute masks (n, h, w) in 0..1 from kernels (n, E) and features (E, h, w): a 1x1 convolution."""
    return torch.einsum("ne,ehw->nhw", kernels, features).float().sigmoid()


def peaks(scores: Tensor) -> Tensor:
    """Set scores (B, g, g, C) to 0 where the cell above, to the left, or between both has a higher one."""
    x = scores.permute(0, 3, 1, 2)
    highest = F.max_pool2d(x, kernel_size=2, stride=1, padding=1)[:, :, :-1, :-1]
    return torch.where(x == highest, x, 0.0).permute(0, 2, 3, 1)


def with_coordinates(x: Tensor) -> Tensor:
    """Append the columns' and rows' centers, from -1 to 1, to a map (B, dim, h, w): (B, dim + 2, h, w)."""
    height, width = x.shape[-2:]
    # Rounded at the end only: in bfloat16 the numbers of the columns have steps of 1 from 128 on.
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns, rows = (
        (torch.arange(side, device=x.device, dtype=dtype) + 0.5) * (2 / side) - 1 for side in (width, height)
    )
    y, x_ = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([x, torch.stack([x_, y]).to(x.dtype).expand(len(x), -1, -1, -1)], dim=1)


def _cells(levels: Sequence[Tensor]) -> Tensor:
    """Join the cells of all levels (B, g, g, D), row-major: (B, N, D)."""
    return torch.cat([level.flatten(1, 2) for level in levels], dim=1)


def _tower(inputs: int, config: SOLOv2HeadConfig) -> nn.Sequential:
    """Stack 3x3 convolutions with norm and ReLU."""
    widths = [inputs] + [config.conv_dim] * config.stacked_convs
    return nn.Sequential(*(_conv(a, b, config.norm_groups) for a, b in pairwise(widths)))


def _conv(inputs: int, outputs: int, groups: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(groups, outputs), nn.ReLU())
