"""Looking at each picture of a dataset: what was converted, and what a person should look at as well."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from brs_detr.data.coco import CocoDetection
from brs_detr.data.faults import FaultLog
from brs_detr.data.pictures import PictureError, has_zeroed_part, inspect_picture

_FORMAT_OF_ENDING = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
_JPEG_OF_CAMERAS = "MPO"  # with a second picture inside that is a preview or another eye's view


def look_at(dataset: CocoDetection, index: int, log: FaultLog) -> bool:
    """Read one picture and log what is unusual about it.

    Args:
        dataset: it belongs to; marks it where it cannot be read.
        index: of the image.
        log: filled.

    Returns:
        whether it can be read.
    """
    name, path = dataset.file_name(index), dataset.path(index)
    where = f"image {dataset.packed.image_ids[index]} ({name})"
    try:
        info = inspect_picture(path, dataset.limits)
        pixels, _ = dataset.load(index)
    except PictureError as error:
        log.add("picture_unreadable", where, error.reason)
        return False
    if info.mode != "RGB":
        log.add("picture_converted", where, f"mode {info.mode}")
    kind = "JPEG" if info.format == _JPEG_OF_CAMERAS else info.format
    if _FORMAT_OF_ENDING.get(Path(name).suffix.lower(), kind) != kind:
        log.add("picture_name_misleads", where, f"it is a {info.format} file")
    if not name.isascii() or " " in name:
        log.add("picture_name_unusual", where)
    if info.frames > 1 and info.format != _JPEG_OF_CAMERAS:
        log.add("picture_has_pages", where, f"{info.frames} in the file")
    if pixels[:, ::4, ::4].float().std() < 2:
        log.add("picture_uniform", where)
    elif pixels.max() < (64 if info.mode.startswith("I") else 17):  # 14 bits of 16; 12 bits, where colours hide the 16
        log.add("picture_dark", where, f"the brightest value is {pixels.max()} of 255")
    elif share_blank_below(pixels) >= 0.25:
        log.add("picture_part_blank", where, f"the lower {share_blank_below(pixels):.0%}")
    elif has_zeroed_part(path):
        log.add("picture_part_blank", where, "the file holds zeros instead of pixels")
    return True


def share_blank_below(pixels: Tensor, period: int = 16) -> float:
    """The share of a picture's height, from below, whose rows repeat themselves, as in a cut file that was saved again.

    Args:
        pixels: (3, h, w) uint8.
        period: width in pixels of the blocks that a JPEG is made of.

    Returns:
        0 also where the uppermost row is such a one: then the picture has a frame.
    """
    if pixels.shape[2] <= 2 * period:
        return 0.0
    blank = (pixels[:, :, period:] == pixels[:, :, :-period]).all(2).all(0)
    return 0.0 if blank[0] else float(blank.flip(0).cumprod(0).sum()) / len(blank)
