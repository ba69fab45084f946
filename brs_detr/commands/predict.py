"""`predict`: objects in a folder of images, as a json and as images with boxes."""

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
from brs_detr.engine.checkpoint import Weights, write_text
from brs_detr.ops.images import ImageBatch
from brs_detr.run.launch import choose_device
from brs_detr.run.output_dir import require_writable
from brs_detr.run.setup import limits_of, restore, val_transforms
from brs_detr.user_files import printable
from brs_detr.viz.boxes import draw_detections

LONGEST_NAME = 255  # bytes of a file name that file systems take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `predict`."""
    parser.add_argument("weights", type=Path, help="run folder (its best weights) or .safetensors file")
    parser.add_argument("images", type=Path, help="image, or folder of images")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, e.g. data.test_short_side=640")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write to")
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score that is reported (default: of each class's best F1)",
    )
    parser.add_argument("--device", help="default: a GPU if there is one")


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    """Predict every image; returns the exit code: 1 where no image could be read."""
    model, weights, config, _ = restore(options.weights, options.overrides)
    device = choose_device(options.device)
    model.to(device)
    thresholds = torch.tensor(score_thresholds(weights, options.threshold), device=device)
    transforms = val_transforms(config)
    files = image_files(options.images)
    root = options.images if options.images.is_dir() else options.images.parent
    found, drawn = [], drawing_names([path.relative_to(root) for path in files])
    require_writable(options.out, "--out")
    partial = options.out / "predictions.partial.jsonl"  # what there is if this process is killed
    with open(partial, "w", encoding="utf-8") as lines:
        try:
            for path, drawing in zip(files, drawn, strict=True):
                try:
                    image = read_image(path, limits=limits_of(config))
                except ImageError as error:
                    print(f"passed over: {error}")
                    continue
                empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
                resized, _ = transforms(image, empty)
                output = model(ImageBatch.from_list([resized], [tuple(image.shape[-2:])]).to(device), None)[0]
                keep = (output["scores"] >= thresholds[output["labels"]]).cpu()
                kept = {key: value.cpu()[keep] for key, value in output.items()}
                name = path.relative_to(root).as_posix()
                entry = {"file_name": name, "objects": describe(kept, weights.classes, weights.category_ids)}
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                found.append(entry)
                print(f"{printable(path)}: {len(kept['scores'])} objects")
                drawing_image = Image.fromarray(image.permute(1, 2, 0).numpy())
                target = options.out / "detections" / drawing
                target.parent.mkdir(parents=True, exist_ok=True)
                draw_detections(drawing_image, kept, None, weights.classes, threshold=0.0).save(target)
        finally:  # whatever ends this, Ctrl-C too, what was found until then is kept
            save(found, options.out, partial)
    return 0 if found else 1


def save(found: list[dict], out: Path, partial: Path) -> None:
    """Write predictions.json and remove the lines that it was kept as until then; say where it is."""
    write_text(out / "predictions.json", json.dumps(found, indent=1))
    partial.unlink(missing_ok=True)
    print(f"saved in {printable(out)}")


def score_thresholds(weights: Weights, threshold: float | None) -> list[float]:
    """The lowest score to report for each class: the one asked for, or the one of its best F1 in the last validation.

    A file that was never validated here (a converted one) gets 0.3; a class that validation never found right, 1.
    """
    stored = weights.extra.get("thresholds")
    if threshold is not None or not stored:
        return [0.3 if threshold is None else threshold] * len(weights.classes)
    return [stored.get(name, 1.0) for name in weights.classes]


def image_files(path: Path) -> list[Path]:
    """The image itself, or every file of a folder that is named like one, by name.

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
    """A name of its own for the drawing of each file, the same whenever the files are the same.

    a/b.jpg -> a/b.png, or a/b.jpg.png where a/b.gif is there too; where that is too long for a file system or another
    drawing's, it is cut and ends in a hash of the file's name.
    """
    stems = Counter(file.with_suffix("") for file in files)
    plain = [file.with_suffix(".png") if stems[file.with_suffix("")] == 1 else Path(f"{file}.png") for file in files]
    uses, taken, names = Counter(plain), set(), []
    for file, name in zip(files, plain, strict=True):
        if uses[name] > 1 or len(os.fsencode(name.name)) > LONGEST_NAME:
            name = next(name for name in _hashed_names(file) if name not in uses and name not in taken)
        taken.add(name)
        names.append(name)
    return names


def _hashed_names(file: Path) -> Iterable[Path]:
    for attempt in range(1000):
        digest = hashlib.sha256(os.fsencode(file) + b"\0" * attempt).hexdigest()[:16]
        start = os.fsencode(file.name)[: LONGEST_NAME - len(digest) - len("-.png")].decode("utf-8", "ignore")
        yield file.with_name(f"{start}-{digest}.png")


def describe(output: dict[str, torch.Tensor], classes: list[str], category_ids: list[int]) -> list[dict]:
    """Detections with class names and the dataset's category ids; boxes (x, y, w, h) in pixels of the image."""
    objects = []
    for (x1, y1, x2, y2), score, label in zip(
        *(output[key].tolist() for key in ("boxes", "scores", "labels")), strict=True
    ):
        box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
        objects.append(
            {"name": classes[label], "category_id": category_ids[label], "score": round(score, 4), "bbox": box}
        )
    return objects
