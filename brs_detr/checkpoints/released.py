"""How the released Co-DINO were trained, as far as their tensors do not show it.

That is, with DETR's augmentation or with large-scale jitter (LSJ) on a gray canvas, which then belongs to the image in
tests too; for how long, and on what data. The name of a released file says it, else the user must.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from brs_detr.checkpoints.architecture import Architecture
from brs_detr.exit_codes import CheckpointError

Augmentation = Literal["detr", "lsj"]

RELEASED = re.compile(
    r"co_dino_5scale(?P<deep>_9encoder)?(?P<lsj>_lsj)?_(?P<backbone>r50|swin_l(?:arge)?)(?P<late_lsj>_lsj)?(?:_\d+xb\d+)?"
    r"_(?P<length>1x|2x|3x|16e|22e)_(?P<data>coco|lvis|o365|o365tococo|o365tolvis)(?:-[0-9a-f]{8})?$"
)
"""Names of the released Co-DINO files and recipes, of the authors and of MMDetection."""

RELEASED_VIT = re.compile(r"co_dino_5scale(?P<lsj>_lsj)?_vit_large_(?P<data>coco|lvis)$")
"""The same for ViT-L."""

CLASSES_OF = {"coco": 80, "o365tococo": 80, "o365": 365, "lvis": 1203, "o365tolvis": 1203}
SCHEDULES = {"1x": (12, 11), "2x": (24, 20), "3x": (36, 30), "16e": (16, 8)}
"""Epochs, and after how many the learning rate falls; that of the 22 epochs on Objects365 (22e) is not published."""

SWIN_DROP_PATHS = {("detr", "2x"): 0.5, ("lsj", "2x"): 0.5, ("detr", "3x"): 0.6, ("lsj", "3x"): 0.5}
"""Of the Swin-L that are trained on COCO for longer than 12 epochs."""

FINE_TUNED_DETECTIONS = 1000  # of an image of LVIS, after Objects365
FINE_TUNED_CANVAS = 1536


@dataclass(frozen=True)
class ReleasedRecipe:
    """What the tensors of a Co-DINO do not show of its training.

    Attributes:
        augmentation: of its images.
        source: where that is known from.
        canvas: side in pixels of the square on which the images lie; None: there is none.
        length: of the training, as in the names of released files, which do not say it of a ViT-L ("vit").
        data: that it was trained on, likewise.
        drop_path: rate of the backbone; None: as in 12 epochs.
    """

    augmentation: Augmentation
    source: str
    canvas: int | None = None
    length: str = "1x"
    data: str = "coco"
    drop_path: float | None = None

    def __str__(self) -> str:
        if self.canvas is None:
            return f"DETR's, {self.source}"
        return f"large-scale jitter on a canvas of {self.canvas}x{self.canvas}, {self.source}"


def training_of(
    architecture: Architecture, source: str, augmentation: Augmentation | None = None, canvas: int | None = None
) -> ReleasedRecipe | None:
    """Return how a Co-DINO was trained, None for other detectors, which all had DETR's augmentation.

    Args:
        architecture: of the checkpoint.
        source: its path. The name of a released file counts, if the architecture is that of this file.
        augmentation, canvas: as the user says; None: not said.

    Raises:
        CheckpointError: it is not known, or what the user says is contradictory.
    """
    if augmentation == "detr" and canvas is not None:
        raise CheckpointError(f"{source}: --canvas {canvas} is the side of the squares of lsj. Leave it out with detr.")
    if not architecture.dino:
        if augmentation == "lsj" or canvas is not None:
            raise CheckpointError(
                f"{source}: this is {architecture.family}, which is released with DETR's augmentation only. Leave out "
                "--augmentation lsj and --canvas."
            )
        return None
    released = from_name(architecture, source)
    if released is None:
        return as_said(architecture, source, augmentation, canvas)
    if augmentation is not None and augmentation != released.augmentation:
        raise CheckpointError(
            f"{source}: by its name it was trained with {released.augmentation}, not {augmentation}. Leave out "
            "--augmentation, or rename the file if it is another one."
        )
    if canvas is not None and released.canvas is None:
        raise CheckpointError(f"{source}: by its name it was trained with detr, without a canvas. Leave out --canvas.")
    return dataclasses.replace(released, canvas=canvas or released.canvas)


def from_name(architecture: Architecture, source: str) -> ReleasedRecipe | None:
    """Return what the name of a released Co-DINO says, None for other names and for those of another architecture."""
    if architecture.windows is not None:
        match = RELEASED_VIT.match(Path(source).stem)
        if match is None or CLASSES_OF[match["data"]] != architecture.num_classes:
            return None
        return training_of_vit("lsj" if match["lsj"] else "detr", "by its name", match["data"])
    match = RELEASED.match(Path(source).stem)
    if match is None:
        return None
    swin, deep = match["backbone"] != "r50", match["deep"] is not None
    if (
        not architecture.softmax
        or CLASSES_OF[match["data"]] != architecture.num_classes
        or deep != (architecture.encoder_layers == 9)
    ):
        return None
    if not architecture.backbone.startswith("swin_large" if swin else "resnet50"):
        return None
    lsj = bool(match["lsj"] or match["late_lsj"]) or match["data"] == "o365tolvis"
    if not lsj and match["data"] == "lvis":
        return None  # published weights are those of LSJ, but an early recipe of this name was not
    canvas = FINE_TUNED_CANVAS if match["data"] == "o365tolvis" else 1280 if swin else 1024
    kind: Augmentation = "lsj" if lsj else "detr"
    drop_path = SWIN_DROP_PATHS.get((kind, match["length"])) if swin and match["data"] == "coco" else None
    return ReleasedRecipe(kind, "by its name", canvas if lsj else None, match["length"], match["data"], drop_path)


def as_said(
    architecture: Architecture, source: str, augmentation: Augmentation | None, canvas: int | None
) -> ReleasedRecipe:
    """Return what the user says of a Co-DINO, with the side of the released models' canvas.

    Raises:
        CheckpointError: it is not said, or there are two such sides.
    """
    if augmentation is None:
        raise CheckpointError(
            f"{source}: this {architecture.family} was trained with DETR's augmentation or with large-scale jitter, "
            "which neither its tensors nor its name show. Convert it with `brs-detr convert --augmentation detr`, or "
            "`lsj`."
        )
    if architecture.windows is not None:
        data = "lvis" if architecture.num_classes == CLASSES_OF["lvis"] else "coco"
        return training_of_vit(augmentation, "as given", data, canvas)
    if augmentation == "detr":
        return ReleasedRecipe("detr", "as given")
    swin, lvis = architecture.backbone.startswith("swin"), architecture.num_classes == CLASSES_OF["lvis"]
    if canvas is None and swin and lvis:
        raise CheckpointError(
            f"{source}: was trained on LVIS with a canvas of 1280, or {FINE_TUNED_CANVAS} after Objects365, which its "
            f"tensors do not show. Add --canvas 1280 or --canvas {FINE_TUNED_CANVAS}."
        )
    fine_tuned = swin and lvis and canvas == FINE_TUNED_CANVAS
    return ReleasedRecipe(
        "lsj", "as given", canvas or (1280 if swin else 1024), data="o365tolvis" if fine_tuned else "coco"
    )


def training_of_vit(augmentation: Augmentation, source: str, data: str, canvas: int | None = None) -> ReleasedRecipe:
    """Return how a ViT-L was trained."""
    side = (canvas or FINE_TUNED_CANVAS) if augmentation == "lsj" else None
    return ReleasedRecipe(augmentation, source, side, "vit", data, 0.3 if data == "lvis" else None)


def trained_settings(training: ReleasedRecipe) -> dict[str, Any]:
    """Build what a training adds to the settings of its architecture, for `merge`."""
    data: dict[str, Any] = {}
    model: dict[str, Any] = {}
    settings: dict[str, Any] = {"data": data, "model": model}
    if training.canvas is not None:
        data |= {"augment": {"name": "lsj", "size": training.canvas}, "test_canvas": training.canvas}
    if training.length in SCHEDULES:
        epochs, step = SCHEDULES[training.length]
        settings["train"] = {"epochs": epochs, "lr_steps": [step]}
    if training.drop_path is not None:
        model["backbone"] = {"drop_path": training.drop_path}
    if training.data.startswith("o365to"):
        model["denoising"] = {"queries": 500, "box_noise": 0.4, "max_rows": 1000}
        settings["optim"] = {"lr": 1e-4}
    if training.data == "o365tococo":
        data |= {"augment": {"short_sides": list(range(480, 1537, 32)), "long_side": 2048}}
        data |= {"test_short_side": 1280, "test_long_side": 2048}
    if training.length == "vit" and training.data == "lvis":
        settings["train"] = {"epochs": 16, "lr_steps": [9, 15]}
    if training.length == "vit" and training.canvas is None:
        data |= {"augment": {"short_sides": list(range(480, 1537, 32)), "long_side": 2400}}
        data |= {"test_short_side": 1280, "test_long_side": 2048}
    if training.data == "o365tolvis":
        model["detections_per_image"] = FINE_TUNED_DETECTIONS
        settings["eval"] = {"max_detections": FINE_TUNED_DETECTIONS}
    return settings
