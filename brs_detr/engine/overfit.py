"""A small piece of a dataset, to see whether a detector can learn it by heart."""

from __future__ import annotations

import json
from pathlib import Path

from brs_detr.engine.checkpoint import write_text


def write_subset(source: Path, target: Path, pictures: int) -> int:
    """Write a COCO json with the first pictures of another that have objects.

    Args:
        source: COCO json.
        target: file to write.
        pictures: how many; fewer where the dataset has fewer.

    Returns:
        The number of pictures written.
    """
    data = json.loads(source.read_text(encoding="utf-8"))
    occupied = {annotation["image_id"] for annotation in data["annotations"] if not annotation.get("iscrowd")}
    images = [image for image in data["images"] if image["id"] in occupied][:pictures]
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in data["annotations"] if annotation["image_id"] in ids]
    write_text(target, json.dumps({**data, "images": images, "annotations": annotations}))
    return len(images)
