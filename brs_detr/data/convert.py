"""`convert-dataset`: Pascal VOC and YOLO folders to COCO annotations; the pictures stay where they are."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from brs_detr.data.faults import DataError
from brs_detr.data.voc import read_voc
from brs_detr.data.yolo import read_yolo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `convert-dataset`."""
    parser.add_argument("format", choices=("voc", "yolo"), help="what the folder is")
    parser.add_argument("source", help="folder of the dataset, or its data.yaml")
    parser.add_argument("out", help="folder to write SPLIT.json to")
    parser.add_argument("--classes", help="VOC: comma-separated names in the order wanted (default: by alphabet)")
    parser.add_argument("--one-based", action="store_true", help="VOC: corners count from 1 and are both included")
    parser.add_argument("--keep-difficult", action="store_true", help="VOC: difficult objects are ordinary objects")


def run(args: argparse.Namespace) -> int:
    """`convert-dataset`: write the annotations, say what was skipped and what to put in a recipe."""
    try:
        if args.format == "voc":
            classes = [name.strip() for name in (args.classes or "").split(",") if name.strip()]
            options = {"one_based": args.one_based, "keep_difficult": args.keep_difficult}
            datasets, pictures, skipped = read_voc(args.source, classes=classes, **options)
        else:
            datasets, pictures, skipped = read_yolo(args.source)
    except DataError as error:
        print(f"cannot be converted: {error}", file=sys.stderr)
        return 1
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for split, data in datasets.items():
        path = Path(args.out) / f"{split}.json"
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        counts = (len(data["images"]), len(data["annotations"]), len(data["categories"]))
        print("{}: {:,} images, {:,} objects, {} classes".format(path, *counts))
    for line in skipped[:20]:
        print(f"skipped: {line}")
    if len(skipped) > 20:
        print(f"... and {len(skipped) - 20:,} more skipped")
    print(f"pictures: {pictures} (check with: python -m brs_detr check-data JSON --images {pictures})")
    return 0
