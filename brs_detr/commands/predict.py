"""The `predict` command: detect objects in a folder of images; write a json and images with boxes."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from brs_detr.data.image_io import ImageError, is_image_name, read_image
from brs_detr.detections import Detections
from brs_detr.engine.checkpoint import write_text
from brs_detr.ops.masks import encode_masks
from brs_detr.ops.rle import as_text
from brs_detr.predictor import Predictor
from brs_detr.run.output_dir import require_writable
from brs_detr.user_files import printable
from brs_detr.viz.boxes import draw_detections

MAX_NAME_BYTES = 255  # of a file name on common file systems


def run(options: argparse.Namespace) -> int:
    """Predict every image and return the exit code: 1 if no image could be read."""
    predictor = Predictor.load(options.weights, device=options.device, overrides=options.overrides)
    if predictor.note and not options.raw_scores:
        print(printable(f"{predictor.note}."))
    files = image_files(options.images)
    root = options.images if options.images.is_dir() else options.images.parent
    predictions: list[dict] = []
    drawings = drawing_names([path.relative_to(root) for path in files])
    require_writable(options.out, "--out")
    partial = options.out / "predictions.partial.jsonl"  # remains if this process is killed
    with open(partial, "w", encoding="utf-8") as lines:
        try:
            for path, drawing in zip(files, drawings, strict=True):
                try:
                    image = read_image(path, limits=predictor.limits)
                except ImageError as error:
                    print(f"skipped: {error}")
                    continue
                found = predictor.predict(image, threshold=options.threshold, raw_scores=options.raw_scores)
                entry = {"file_name": path.relative_to(root).as_posix(), "objects": describe(found)}
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                predictions.append(entry)
                missed = f"; {found.note}" if found.note else ""
                missed += ". --threshold sets another" if "its threshold" in found.note else ""
                print(f"{printable(path)}: {len(found)} objects{printable(missed)}")
                target = options.out / "detections" / drawing
                target.parent.mkdir(parents=True, exist_ok=True)
                canvas = Image.fromarray(image.permute(1, 2, 0).numpy())
                draw_detections(canvas, as_tensors(found), None, predictor.classes, threshold=0.0).save(target)
        finally:  # also on an error or Ctrl-C: keep the predictions made so far
            save(predictions, options.out, partial)
    return 0 if predictions else 1


def as_tensors(found: Detections) -> dict[str, torch.Tensor]:
    """Return detections as `draw_detections` takes them."""
    names = ("boxes", "scores", "labels", *(["masks"] if found.masks is not None else []))
    return {name: torch.from_numpy(getattr(found, name)) for name in names}


def save(predictions: list[dict], out: Path, partial: Path) -> None:
    """Write predictions.json, remove the partial file, and print the folder."""
    write_text(out / "predictions.json", json.dumps(predictions, indent=1))
    partial.unlink(missing_ok=True)
    print(f"saved in {printable(out)}")


def image_files(path: Path) -> list[Path]:
    """Return the image itself, or every file under a folder with an image's ending, sorted by name.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such image or folder")
    Image.init()
    files = sorted(file for file in path.rglob("*") if is_image_name(file.name))
    if not files:
        raise FileNotFoundError(f"{path}: no image in this folder")
    return files


def drawing_names(files: list[Path]) -> list[Path]:
    """Choose a unique name for the drawing of each file; the same files always get the same names.

    a/b.jpg -> a/b.png, or a/b.jpg.png if there is also a/b.gif. A name that is too long for the file system or already
    taken is truncated and ends in a hash of the file name.
    """
    stems = Counter(file.with_suffix("") for file in files)
    plain = [file.with_suffix(".png") if stems[file.with_suffix("")] == 1 else Path(f"{file}.png") for file in files]
    uses = Counter(plain)
    taken: set[Path] = set()
    names: list[Path] = []
    for file, name in zip(files, plain, strict=True):
        if uses[name] > 1 or len(os.fsencode(name.name)) > MAX_NAME_BYTES:
            name = next(name for name in _hashed_names(file) if name not in uses and name not in taken)
        taken.add(name)
        names.append(name)
    return names


def _hashed_names(file: Path) -> Iterable[Path]:
    """Iterate over truncated names that end in a hash, another one in each attempt."""
    for attempt in range(1000):
        digest = hashlib.sha256(os.fsencode(file) + b"\0" * attempt).hexdigest()[:16]
        start = os.fsencode(file.name)[: MAX_NAME_BYTES - len(digest) - len("-.png")].decode("utf-8", "ignore")
        yield file.with_name(f"{start}-{digest}.png")


def describe(found: Detections) -> list[dict]:
    """Convert detections to dictionaries with class names and category ids; boxes are (x, y, w, h) in image pixels.

    Masks, if there are any, become COCO's compressed run lengths, `segmentation`.
    """
    objects = []
    for one in found:
        x1, y1, x2, y2 = one["box"]
        box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
        objects.append(
            {"name": one["name"], "category_id": one["category_id"], "score": round(one["score"], 4), "bbox": box}
        )
    if found.masks is not None:
        for entry, runs in zip(objects, encode_masks(torch.from_numpy(found.masks)), strict=True):
            entry["segmentation"] = as_text(runs)
    return objects
