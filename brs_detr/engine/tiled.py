"""What a detector returns for the tiles of an image, as one output for the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from brs_detr.ops.images import Size
from brs_detr.ops.masks import as_rles
from brs_detr.ops.rle import shifted
from brs_detr.ops.tiles import Tile, join_tiles, seen_better, touches_edge


def join_outputs(
    outputs: Sequence[dict[str, Any]], grid: Sequence[Tile], size: Size, thresholds: np.ndarray
) -> dict[str, Any]:
    """Move the detections of every tile to the image and join them.

    Args:
        outputs: of each tile `boxes` (n, 4) xyxy pixels of the tile, `scores` (n,), `labels` (n,), perhaps `masks`.
        grid: the tiles, one for each output.
        size: (h, w) pixels of the image.
        thresholds: (K,) minimum score of each class. Detections below it suppress none: a large box with a low score
            would otherwise stand for its good parts. Where none reaches it, only the best one is returned.

    Returns:
        The same of the image, best first; masks as compressed run lengths.
    """
    moved = [_moved(output, tile) for output, tile in zip(outputs, grid, strict=True)]
    boxes, scores, labels, is_part = (
        torch.cat([one[key] for one in moved]) for key in ("boxes", "scores", "labels", "is_part")
    )
    tiles = torch.cat([torch.full((len(one["scores"]),), number) for number, one in enumerate(moved)])
    rows = torch.cat([one["rows"] for one in moved])  # of each detection in the output of its tile
    reached = scores.double() >= torch.from_numpy(thresholds)[labels]
    # the best one alone says what the image lacks; to join thousands that nobody is shown would take seconds
    taken = reached.nonzero()[:, 0] if reached.any() else scores.argsort(descending=True, stable=True)[:1]
    kept = taken[join_tiles(boxes[taken], scores[taken], labels[taken], tiles[taken], is_part[taken])]
    joined: dict[str, Any] = {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
    if "masks" in outputs[0]:
        runs = [as_rles(output["masks"]) for output in outputs]
        places = zip(tiles[kept].tolist(), rows[kept].tolist(), strict=True)
        joined["masks"] = [shifted(runs[number][row], grid[number].y1, grid[number].x1, size) for number, row in places]
    return joined


def _moved(output: dict[str, Any], tile: Tile) -> dict[str, torch.Tensor]:
    """Move the boxes of a tile to the image, and drop those of which a neighbor shows more."""
    boxes = output["boxes"].cpu().float()
    boxes = boxes + boxes.new_tensor([tile.x1, tile.y1, tile.x1, tile.y1])
    rows = (~seen_better(boxes, tile)).nonzero()[:, 0]
    return {
        "boxes": boxes[rows],
        "scores": output["scores"].cpu()[rows],
        "labels": output["labels"].cpu()[rows],
        "is_part": touches_edge(boxes[rows], tile).any(dim=1),
        "rows": rows,
    }
