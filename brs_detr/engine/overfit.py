"""A small piece of a dataset, to see whether a detector can learn it by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brs_detr.engine.checkpoint import write_text


def write_subset(data: dict[str, Any], target: Path, pictures: int) -> int:
    """Write a COCO json with the first pictures of another that have objects.

    Args:
        data: content of a COCO json.
        target: file to write.
        pictures: how many; fewer where the dataset has fewer.

    Returns:
        The number of pictures written.
    """
    entries = {key: [entry for entry in data[key] if isinstance(entry, dict)] for key in ("images", "annotations")}
    occupied = {annotation.get("image_id") for annotation in entries["annotations"] if not annotation.get("iscrowd")}
    images = [image for image in entries["images"] if image.get("id") in occupied][:pictures]
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in entries["annotations"] if annotation.get("image_id") in ids]
    write_text(target, json.dumps({**data, "images": images, "annotations": annotations}))
    return len(images)
