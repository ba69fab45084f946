"""Small datasets written to disk for the tests of the data package, handed out as fixtures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _write_dataset(folder: Path, *, sizes, boxes, categories=((90, "c"), (1, "a"), (17, "b")), **extra) -> Path:
    """Noise images of the given (h, w), `boxes[i]` = [(category_id, x, y, w, h), ...]; returns the json."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, (h, w) in enumerate(sizes):
        name = f"{i:03d}.png"
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / "images" / name)
        images.append({"id": 1000 - 7 * i, "file_name": name, "height": h, "width": w})
        for category, *box in boxes[i]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 1000 - 7 * i,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in categories],
        **extra,
    }
    path = folder / "set.json"
    path.write_text(json.dumps(data))
    return path


def _change(path: Path, edit) -> Path:
    """Apply `edit` to the loaded json and write it back."""
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="session")
def write_dataset():
    """`write_dataset(folder, sizes=, boxes=)`, see above."""
    return _write_dataset


@pytest.fixture(scope="session")
def change():
    """`change(path, edit)`, see above."""
    return _change


def _write_image(path: Path, height: int = 40, width: int = 80, orientation: int | None = None) -> Path:
    """An image of noise, with EXIF's orientation if one is given; a PNG unless the name ends in .jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, "JPEG" if path.suffix.lower() == ".jpg" else "PNG", exif=exif)
    return path


@pytest.fixture(scope="session")
def write_image():
    """`write_image(path, height, width, orientation)`, see above."""
    return _write_image
