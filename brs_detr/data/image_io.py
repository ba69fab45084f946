"""Read an image file of any kind as 8-bit RGB.

Gray, 16-bit, CMYK, palette and alpha images are converted; an EXIF rotation is applied when, and only when, the size
the annotations expect says so. A damaged file is an error that names it, never a half-gray image.

How large the files of a dataset may be before they are refused rather than fill the memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from brs_detr.data.storage import StorageError, persist, read_bytes
from brs_detr.user_files import open_regular, printable, read_file, read_start, require_at_most

Size = tuple[int, int]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2")
# no format of Pillow's that starts another program (EPS: Ghostscript) or that is more than pixels
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
ORIENTATION_TAG = 0x0112
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageError(ValueError):
    """An image file that cannot be used; the message names the file.

    A data loader hands on a worker's error as its traceback with the message at the end: only that is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message.rpartition(f"{type(self).__name__}: ")[2].strip()))

    @property
    def reason(self) -> str:
        """The message without the file's name."""
        return str(self).rpartition(": this image ")[2].removeprefix("cannot be read: ").removesuffix(".")


class ImageInfo(NamedTuple):
    """What a file's header says, without decoding it; `frames` counts pages or moments."""

    stored_size: Size
    upright_size: Size
    orientation: int
    mode: str
    format: str
    frames: int


def read_image(
    path: str | Path,
    expected_size: Size | None = None,
    limits: Limits | None = None,
    retry_seconds: float | None = None,
) -> Tensor:
    """Read an image as RGB.

    Args:
        path: file of one of `FORMATS`; its content decides, not its name.
        expected_size: (height, width) that the annotations are drawn in. An image with an EXIF rotation is turned
            upright if that gives this size and the stored pixels do not; otherwise the pixels are taken as stored.
        limits: of the file's size and of the number of pixels; by default those of the settings.
        retry_seconds: for how long to try again where the storage fails; None takes its failure for the file's.

    Returns:
        (3, h, w) uint8.

    Raises:
        ImageError: the file is too large, damaged, cut short, or holds values that have no 8-bit meaning; where
            `retry_seconds` is None, also where it is missing or no regular file.
        StorageError: the file cannot be read, and `retry_seconds` is not None.
    """
    limits = limits or Limits()
    try:
        content = read_bytes(path, limits.max_image_bytes, "data.max_image_bytes", retry_seconds)
        pixels = _decode(content, expected_size, path, limits)
        del content
    except (ImageError, StorageError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds, some from C
        raise ImageError(f"{path}: this image cannot be read: {_reason(error, path)}.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _decode(content: bytes, expected_size: Size | None, path: str | Path, limits: Limits) -> np.ndarray:
    """(h, w, 3) uint8; a function of its own so that Pillow's copy is gone when this one is copied."""
    with _strict_pillow(), open_image(io.BytesIO(content), limits) as image:
        _require_whole(image.format, content, limits)
        image.load()
        if expected_size is not None and _needs_turning(image, expected_size):
            image = ImageOps.exif_transpose(image)
        return np.array(_to_rgb(image, path))


def open_image(file: BinaryIO, limits: Limits) -> Image.Image:
    """Read an image's header, as one of `FORMATS` only, before anything is decoded.

    Raises:
        UserFileError: it has too many pixels.
        PIL.UnidentifiedImageError: it is of none of the formats.
    """
    Image.init()  # an older Pillow, or one built without a library, lacks some of the formats
    image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    require_at_most(math.prod(image.size), limits.max_image_pixels, "data.max_image_pixels", "pixels")
    return image


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Other libraries may have told Pillow to turn a cut file gray in silence; and the limit of pixels is ours."""
    keep = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = keep


def read_image_info(path: str | Path, limits: Limits | None = None, retry_seconds: float | None = None) -> ImageInfo:
    """Read size, EXIF orientation and mode from the header, and look whether the end of the file is there.

    Args:
        path, limits, retry_seconds: as for `read_image`.

    Raises:
        ImageError: the file is missing, no regular file, too large, is no image, or ends before its image does.
        StorageError: the storage failed, and `retry_seconds` is not None.
    """
    limits = limits or Limits()
    try:
        if retry_seconds is None:
            return _inspect(path, limits)
        return persist(lambda: _inspect(path, limits), path, retry_seconds, from_the_start=True)
    except StorageError:
        raise
    except Exception as error:
        raise ImageError(f"{path}: this image cannot be read: {_reason(error, path)}.") from error


def _inspect(path: str | Path, limits: Limits) -> ImageInfo:
    with open_regular(path, limits.max_image_bytes, "data.max_image_bytes") as file, _strict_pillow():
        with open_image(file, limits) as image:
            width, height = image.size
            orientation = _orientation(image)
            upright = _turned((height, width), orientation)
            kind = image.format or ""
            info = ImageInfo((height, width), upright, orientation, image.mode, kind, _frames(image))
        if not _seems_whole(kind, file):
            raise ValueError("the file is cut short")
    return info


def is_image_name(name: str) -> bool:
    """Whether a file is named like an image of one of `FORMATS`."""
    ending = Path(name).suffix.lower()
    return ending in IMAGE_ENDINGS or Image.registered_extensions().get(ending) in FORMATS


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        start = read_start(path, 24)
        return f"it begins with {str(start)[1:]}, which is no image" if start else "the file is empty"
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    return (getattr(error, "strerror", None) or str(error)).rstrip(".") or type(error).__name__


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # only the first one is read, so a fault in a later one does no harm
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block does not damage the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation >= 5 else size


def _needs_turning(image: Image.Image, expected_size: Size) -> bool:
    stored = (image.height, image.width)
    return stored != tuple(expected_size) and _turned(stored, _orientation(image)) == tuple(expected_size)


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        return _from_integers(image, path).convert("RGB")
    if image.mode == "F":
        return _from_floats(image, path).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns about palette transparency given as bytes
    return image.convert("RGB")  # alpha is dropped: the colors under it are kept as the file has them


def _from_integers(image: Image.Image, path: str | Path) -> Image.Image:
    """0..65535 to 0..255 by one fixed factor, so that brightness compares between images."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(f"{path}: this image has values outside 0..65535; convert it to 8 or 16 bits.")
    return Image.fromarray(_to_bytes(values, lambda part: (part.astype(np.int32) + 128) // 257))


def _from_floats(image: Image.Image, path: str | Path) -> Image.Image:
    """Floats in 0..1 are stretched to 0..255; floats in 0..255 are rounded."""
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and high <= 255):  # a NaN anywhere makes both NaN, which compares false
        raise ImageError(f"{path}: this image has float values outside 0..255; convert it to 8 or 16 bits.")
    factor = 255 if high <= 1 else 1
    return Image.fromarray(_to_bytes(values, lambda part: np.rint(part.astype(np.float64) * factor)))


def _to_bytes(values: np.ndarray, convert: Callable[[np.ndarray], np.ndarray], part: int = 2**20) -> np.ndarray:
    """An array as uint8, a part at a time: intermediate results of a large image would be its largest copies."""
    flat, result = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, values.size, part):
        result[start : start + part] = convert(flat[start : start + part])
    return result.reshape(values.shape)


_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}


def has_zeroed_part(path: str | Path) -> bool:
    """Whether a JPEG holds a kilobyte of zeros in place of pixels: they decode, without an error, to one color.

    A large blank area can, in rare cases, look the same.
    """
    content = read_file(path)
    start = _pixels_begin(content) if content.startswith(b"\xff\xd8") else len(content)
    return content.find(bytes(1024), start, max(start, content.find(b"\xff\xd9", start))) >= 0


def _require_whole(kind: str | None, content: bytes, limits: Limits) -> None:
    """Find what decoding does not: bytes that never came (as zeros they decode to gray), a wrong checksum in a PNG."""
    if not _has_ending(kind, content):
        raise ValueError("the file is cut short")
    if kind == "PNG":
        with open_image(io.BytesIO(content), limits) as image:
            image.verify()


def _has_ending(kind: str | None, content: bytes) -> bool:
    start = _pixels_begin(content) if kind in ("JPEG", "MPO") else 0
    return content.find(_END_MARKERS.get(kind, b""), start) >= 0


def _pixels_begin(content: bytes) -> int:
    """Where the header of a JPEG ends; in it may lie a preview with an end marker of its own."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return min(place, len(content))


def _seems_whole(kind: str, file: BinaryIO) -> bool:
    """Whether the end marker is among the last bytes or, since phones append films to images, further ahead."""
    file.seek(max(0, file.seek(0, 2) - 65536))
    if _END_MARKERS.get(kind, b"") in file.read():
        return True
    file.seek(0)
    return _has_ending(kind, file.read())


@dataclass(frozen=True)
class Limits:
    """The limits of one dataset; each is the setting `data.` of its name.

    Attributes:
        max_image_pixels: width times height of an image, known before it is decoded.
        max_image_bytes: size of an image file.
        max_json_bytes: size of an annotation file, unpacked.
        allow_outside_images: follow file names of the json that lead out of the image folder.
    """

    max_image_pixels: int = 120_000_000
    max_image_bytes: int = 2**29
    max_json_bytes: int = 2**33
    allow_outside_images: bool = False
