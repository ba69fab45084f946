"""Arguments of the commands that are not `train` and `eval`, and what can be checked of them without importing torch.

So a misspelt setting, a missing file and `--help` are answered at once; `cli.py` has the table of commands.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from brs_detr.config import (
    Config,
    ConfigError,
    apply_overrides,
    check_overrides,
    dataset_overrides,
    load_config,
    override_names,
)
from brs_detr.data.config import Limits
from brs_detr.data.issues import DataError
from brs_detr.data.layouts import is_yolo_yaml, recognize
from brs_detr.data.sources import require_sources
from brs_detr.hub.huggingface import require_repository
from brs_detr.hub.sources import local_path, require_source
from brs_detr.recipes import find_recipe, is_recipe, is_run_folder, nearest_recipe
from brs_detr.user_files import printable

IN_TORCH = (
    "run folder (its best weights), .safetensors, official .pth, or a name: of a published checkpoint, hf://user/repo"
)
WEIGHTS = f"{IN_TORCH}; or an exported .onnx"
SHEET_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # which Pillow writes
OF_EVALUATIONS = ("eval.score_threshold", "eval.max_detections")  # `export` stores them in the file
TILE_OVERLAP = 0.2
MIN_TILE, MAX_OVERLAP = 32, 0.9  # as `ops/tiles.py`, which needs torch


def info(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `info`."""
    parser.add_argument("config", help="config file, e.g. configs/brs_detr_r50_12e_coco.yaml, or its name")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, e.g. model.queries=900")
    parser.add_argument("--settings", action="store_true", help="print the value of every setting")
    parser.add_argument("--classes", type=positive, help="number of classes (default: from the training json, else 80)")


def predict(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `predict`; settings are among the sources until `check_predict` takes them out."""
    parser.add_argument("weights", type=Path, help=WEIGHTS)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="images, folders, patterns in quotes, videos, http(s) and rtsp URLs, number of a camera or /dev/videoN; "
        "and settings to change, e.g. data.test_short_side=640",
    )
    parser.set_defaults(overrides=[])
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write to")
    parser.add_argument(
        "--format",
        choices=("json", "coco", "yolo", "csv"),
        default="json",
        help="of the predictions (default json; videos: a line for each frame in NAME.jsonl)",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="JSON", help="COCO json with the ids of the images, for --format coco"
    )
    parser.add_argument("--no-images", action="store_true", help="write no drawings, and no drawn videos")
    parser.add_argument(
        "--threshold",
        type=float,
        help="minimum score (default: the one of each class's best F1 in validation)",
    )
    parser.add_argument("--raw-scores", action="store_true", help="scores as the detector's, not calibrated")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images, or tiles, at once (default 1)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="end a video or camera after N frames")
    parser.add_argument(
        "--tiles", type=_size, metavar="WxH", help="look at large images in tiles of so many pixels, e.g. 1024x1024"
    )
    parser.add_argument(
        "--tile-overlap",
        type=float,
        metavar="F",
        help="share of a tile's side that neighbors have in common (default 0.2): objects of that size are seen whole",
    )
    parser.add_argument(
        "--whole-image", action="store_true", help="with --tiles, look at the image as a whole, too: for large objects"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")


def _size(text: str) -> tuple[int, int]:
    """Read (width, height) from WxH, or from one number for a square."""
    match = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: not of the form WxH, e.g. 1024x1024")
    return int(match[1]), int(match[2] or match[1])


def export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("weights", type=Path, help=IN_TORCH)
    parser.add_argument(
        "overrides", nargs="*", default=[], help="settings to change, e.g. model.detections_per_image=50"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write: .onnx, or torch's .pt2")
    parser.add_argument(
        "--format", choices=("onnx", "torch"), help="ONNX, or torch.export (default: by the ending of --out)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="of layers with weights in an ONNX file; int8 needs images to measure ranges on (default: fp32)",
    )
    parser.add_argument(
        "--calibration-images",
        type=Path,
        metavar="FOLDER",
        help="images for --precision int8 (default: those that data.train_json lists)",
    )
    parser.add_argument("--height", type=int, help="input height in pixels (default: data.test_long_side)")
    parser.add_argument("--width", type=int, help="input width in pixels (default: data.test_long_side)")
    parser.add_argument("--any-size", action="store_true", help="export with dynamic height and width")
    parser.add_argument(
        "--pixels", choices=("uint8", "float32"), default="uint8", help="input type; values are 0..255 in both cases"
    )
    parser.add_argument("--opset", type=int, help="ONNX opset version (default: 18)")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="check with this image too; may be repeated"
    )


def benchmark(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark`."""
    parser.add_argument("target", type=Path, help="run folder, .safetensors file, recipe or exported .onnx")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, e.g. eval.predict_with=roi")
    parser.add_argument(
        "--size", type=height_and_width, metavar="HxW", help="of the images (default: the largest test size, landscape)"
    )
    parser.add_argument("--batch", type=positive, default=1, help="images at once (default 1)")
    parser.add_argument("--threads", type=positive, help="threads of the CPU (default: as torch chooses)")
    parser.add_argument("--runs", type=positive, default=20, help="runs that are timed (default 20)")
    parser.add_argument("--warmup", type=positive, default=3, help="runs before them (default 3)")
    parser.add_argument("--device", help="default: a GPU if there is one")


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def at_least_zero(text: str) -> int:
    """Parse an integer that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not an integer of at least 0")
    return int(text)


def height_and_width(text: str) -> tuple[int, int]:
    """Parse a size as 800x1333, height first."""
    height, times, width = text.lower().partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"{text} is no size. Write height and width, e.g. 800x1333.")
    return positive(height), positive(width)


def check_data(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check-data`."""
    parser.add_argument(
        "target",
        metavar="CONFIG_OR_DATASET",
        help="recipe (.yaml), COCO annotation file (.json), or what data= takes: a dataset's folder or data.yaml",
    )
    parser.add_argument("--images", help="image folder of a json (default: searched in the usual places)")
    parser.add_argument("--sheet", default="check-data.png", help="contact sheet to write (default check-data.png)")
    parser.add_argument(
        "--samples", type=at_least_zero, default=16, help="images on the contact sheet (default 16; 0: no sheet)"
    )
    parser.add_argument("--show", type=at_least_zero, default=5, help="examples printed of each issue (default 5)")
    parser.add_argument("--csv", help="file to write every issue to")
    parser.add_argument("--strict", action="store_true", help="also fail if anything is dropped or warned about")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, e.g. data.root=/data/coco")


def make_dataset(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `make-dataset`."""
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--train", type=positive, default=1000, help="training images (default 1000)")
    parser.add_argument("--val", type=positive, default=200, help="validation images (default 200)")
    parser.add_argument("--image-size", type=positive, default=80, help="long side in pixels (default 80)")
    parser.add_argument(
        "--max-objects", type=positive, default=4, help="maximum number of objects in an image (default 4)"
    )
    parser.add_argument("--seed", type=at_least_zero, default=0)


def convert_dataset(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert-dataset`."""
    parser.add_argument("format", choices=("voc", "yolo", "cityscapes", "coco"), help="format; coco: split a json")
    parser.add_argument("source", help="folder of the dataset; for YOLO also its data.yaml or obj.data; a COCO json")
    parser.add_argument("out", nargs="?", help="folder to write SPLIT.json to (coco, default: beside the json)")
    parser.add_argument("--out", dest="out_option", metavar="OUT", help="the same as an option")
    names = "class names in the desired order: a text file with one name per line, or names separated by commas"
    parser.add_argument("--classes", metavar="NAMES", help=f"{names} (default: VOC alphabetically, YOLO as numbered)")
    fraction = "split this fraction of train off as val, always the same images; only if there is no val split"
    parser.add_argument("--val-fraction", type=float, metavar="F", help=f"{fraction} (coco, default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images (default 0)")
    parser.add_argument("--images", help="coco: image folder (default: searched in the usual places)")
    max_bytes = "maximum size of an image file (default: that of data.max_image_bytes); only headers are read"
    parser.add_argument("--max-image-bytes", type=int, metavar="N", default=Limits.max_image_bytes, help=max_bytes)
    parser.add_argument("--one-based", action="store_true", help="VOC: corners count from 1 and are both included")
    parser.add_argument("--keep-difficult", action="store_true", help="VOC: difficult objects are ordinary objects")


def convert(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert`."""
    parser.add_argument("source", type=Path, help="official .pth file (with --to-official: a .safetensors file)")
    parser.add_argument("target", type=Path, help=".safetensors file to write (with --to-official: a .pth file)")
    parser.add_argument(
        "--num-classes-from",
        type=Path,
        metavar="FILE",
        help="COCO json that the checkpoint was trained on, for checkpoints of other classes than COCO's 80",
    )
    parser.add_argument(
        "--augmentation",
        choices=("detr", "lsj"),
        help="Co-DINO: of its training, which the tensors do not show: DETR's or large-scale jitter (default: by the "
        "name of a released file)",
    )
    parser.add_argument(
        "--canvas",
        type=positive,
        metavar="PIXELS",
        help="Co-DINO, lsj: side of the square on which images lie (default: that of the released model)",
    )
    parser.add_argument("--to-official", action="store_true", help="write official names instead")


def push(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push`."""
    parser.add_argument("weights", type=Path, help="run folder (its best weights) or weights file")
    parser.add_argument("repository", metavar="USER/REPOSITORY", help="created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", help="for the card, e.g. apache-2.0 (default: none is stated)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="only write what would be uploaded to this folder")


def check_push(options: argparse.Namespace) -> None:
    """Refuse weights that do not exist, and what cannot be the name of a repository."""
    require_source(options.weights)
    require_repository(options.repository)


def replay(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `replay`."""
    parser.add_argument("batch", type=Path, help="nonfinite-STEP.pt of a run")
    parser.add_argument("--device", help="default: a GPU if there is one")


def check_info(options: argparse.Namespace) -> None:
    """Refuse a recipe that cannot be used."""
    load_config(options.config, options.overrides)


def check_weights(options: argparse.Namespace, without_effect: Collection[str] = ()) -> None:
    """Refuse weights that do not exist and settings with a wrong name or type, as `predict` and `export` get them.

    Which detector the settings are of, and whether they fit, the config in the file has to say. Weights that are given
    by name are downloaded at their first use.

    Args:
        options: with `weights` and `overrides`.
        without_effect: settings that the command does not read, besides those of trainings.

    Raises:
        ConfigError: a setting, or a dataset, which these commands do not open.
    """
    require_source(options.weights)
    check_overrides(options.overrides)
    if given := override_names(dataset_overrides(options.overrides)):
        raise ConfigError(
            f"{given[0]}: has no effect, as this command opens no dataset. Leave it out; export --precision int8 takes "
            "--calibration-images FOLDER."
        )
    for name in override_names(options.overrides):
        if name in without_effect or name.startswith(("train.", "optim.")):
            acts_in = "evaluations" if name.startswith("eval.") else "trainings"
            raise ConfigError(f"{name}: has no effect, as it acts in {acts_in} only. Leave it out.")
    options.weights = local_path(options.weights)


def dataset_setting(path: Path) -> str:
    """Write a path as the dataset argument of a command line, quoted."""
    return f"data={json.dumps(str(path))}"


def check_predict(options: argparse.Namespace) -> None:
    """Take the settings out of the sources of `predict`, and refuse what cannot be used.

    Raises:
        ConfigError: an option or setting, or a video without PyAV.
        FileNotFoundError: a source names nothing.
    """
    is_override = {word: is_setting(word) and not os.path.lexists(word) for word in options.sources}
    options.overrides = [*options.overrides, *(word for word in options.sources if is_override[word])]
    options.sources = [word for word in options.sources if not is_override[word]]
    if options.batch < 1:
        raise ConfigError(f"--batch={options.batch}: must be at least 1.")
    if options.threshold is not None and not 0 <= options.threshold <= 1:  # a NaN compares as False
        raise ConfigError(f"--threshold={options.threshold:g}: scores lie between 0 and 1. Give one of them, as 0.5.")
    if options.max_frames is not None and options.max_frames < 1:
        raise ConfigError(f"--max-frames={options.max_frames}: must be at least 1.")
    if options.tile_overlap is not None and options.tiles is None:
        raise ConfigError("--tile-overlap: there are no tiles to overlap. Add --tiles, or leave it out.")
    if options.tile_overlap is None:
        options.tile_overlap = TILE_OVERLAP
    if not 0 <= options.tile_overlap <= MAX_OVERLAP:
        raise ConfigError(f"--tile-overlap={options.tile_overlap:g}: must lie between 0 and {MAX_OVERLAP}.")
    if options.tiles is not None and min(options.tiles) < MIN_TILE:
        raise ConfigError(f"--tiles={'x'.join(map(str, options.tiles))}: a side needs at least {MIN_TILE} pixels.")
    if options.whole_image and options.tiles is None:
        raise ConfigError("--whole-image: without --tiles, an image is looked at as a whole already. Add --tiles.")
    if options.annotations is not None and options.format != "coco":
        raise ConfigError("--annotations: only --format coco has ids of images. Add it, or leave this out.")
    require_sources(options.sources)
    check_weights(options, OF_EVALUATIONS)  # last, as it may download them


def is_setting(word: str) -> bool:
    """Check whether a word of the command line has the form section.setting=value."""
    return re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) is not None


def check_benchmark(options: argparse.Namespace) -> None:
    """Refuse a recipe that cannot be used, and weights that do not exist.

    Raises:
        ConfigError: a setting; or all heads of a recipe are to be joined, whose scores no validation has compared.
    """
    if is_recipe(options.target):
        config = load_config(options.target, options.overrides)
        if config.eval.predict_with == "ensemble":
            raise ConfigError(
                f"{options.target}: eval.predict_with=ensemble needs weights whose validation scored all heads, and a "
                f"recipe has random ones. Give a run, or use one of {', '.join(config.model.detection_limits)}."
            )
    else:
        check_weights(argparse.Namespace(weights=options.target, overrides=options.overrides), OF_EVALUATIONS)


def check_dataset(options: argparse.Namespace) -> None:
    """Refuse settings that cannot be used with the recipe or json of `check-data`, and a sheet that is no image."""
    if options.samples and Path(options.sheet).suffix.lower() not in SHEET_ENDINGS:  # before every image is decoded
        raise ConfigError(f"--sheet={options.sheet}: the ending is not one of {', '.join(SHEET_ENDINGS)}. Add .png.")
    target = Path(options.target)
    if not (target.suffix or target.exists() or is_setting(options.target)):
        _require_recipe(target)
    if target.is_dir() or is_yolo_yaml(target):
        apply_overrides(Config(), [*options.overrides, dataset_setting(target)])
        _require_dataset(target)
    elif is_recipe(target):
        config = load_config(target, options.overrides)
        if config.data.source is not None:
            recognize(config.data.source)
    elif any(word.lstrip("-").startswith("data.val_fraction=") for word in options.overrides):
        apply_overrides(Config(), [*options.overrides, dataset_setting(target)])
    else:
        apply_overrides(Config(), options.overrides)


def _require_dataset(target: Path) -> None:
    """Refuse a folder or yaml that is no dataset."""
    try:
        recognize(target)
    except DataError:
        if not is_run_folder(target):
            raise
        raise ConfigError(
            f"{printable(target)}: this is the folder of a run, not a dataset. `brs-detr check-data "
            f"{printable(target / 'config.yaml')}` checks the one it was trained on."
        ) from None


def _require_recipe(target: Path) -> None:
    """Refuse what is neither there nor the name of a recipe: most often a folder that is spelled otherwise."""
    try:
        find_recipe(target)
    except ConfigError:
        near = None if target.is_absolute() else nearest_recipe(target)
        hint = f"Did you mean the recipe {near}? " if near else ""
        raise ConfigError(
            f"{printable(target)}: there is no such folder, json or recipe. {hint}Name the folder of a dataset, a COCO "
            "json or a recipe."
        ) from None
