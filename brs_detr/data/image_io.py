"""Read image files of any common format as 8-bit RGB tensors.

Gray, 16-bit, CMYK, palette and alpha images are converted. An EXIF rotation is applied if, and only if, the size given
by the annotations requires it. A damaged file raises an error that names it, and is never returned half gray. Files
above the limits of `Limits` are refused before they fill the memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from brs_detr.data.config import Limits
from brs_detr.data.storage import ReadError, persist, read_bytes
from brs_detr.exit_codes import Failure
from brs_detr.threads import shared_by_threads
from brs_detr.user_files import open_regular, printable, read_file, read_start, require_at_most

Size = tuple[int, int]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2")
# excludes Pillow's formats that start another program (EPS: Ghostscript) or that hold more than pixels
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
ORIENTATION_TAG = 0x0112
STRIP = 2**18  # pixels that are converted at once: 1 MB in the four bytes a pixel of Pillow
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageError(Failure, ValueError):
    """An unusable image file; the message names it.

    The DataLoader re-raises a worker's error with the traceback as its message; only the last part is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message.rpartition(f"{type(self).__name__}: ")[2].strip()))

    @property
    def reason(self) -> str:
        """Return the message without the file name."""
        return str(self).rpartition(": this image ")[2].removeprefix("cannot be read: ").removesuffix(".")


class ImageInfo(NamedTuple):
    """Contents of an image file's header; `frames` is the number of pages or animation frames."""

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
        path: file in one of `FORMATS`; the format is detected from the content, not from the name.
        expected_size: (height, width) that the annotations are drawn in. An image with an EXIF rotation is turned
            upright if that gives this size or its aspect ratio, and the stored pixels do not; otherwise the pixels are
            used as stored.
        limits: maximum file size and number of pixels; by default those of `Limits`.
        retry_seconds: how long to retry when the storage fails; None treats the failure as one of the file.

    Returns:
        (3, h, w) uint8, with the three values of a pixel beside each other in memory (strides 1, 3 w, 3): so Pillow
        writes them, and so torch resizes fastest.

    Raises:
        ImageError: the file is too large, damaged, truncated, or has values without an 8-bit equivalent; if
            `retry_seconds` is None, also if it is missing or not a regular file.
        ReadError: the file cannot be read, and `retry_seconds` is not None.
    """
    limits = limits or Limits()
    try:
        content = read_bytes(path, limits.max_image_bytes, "data.max_image_bytes", retry_seconds)
        return _decode(content, expected_size, path, limits)
    except (ImageError, ReadError):
        raise
    except Exception as error:  # Pillow's decoders raise many types, some of them from C code
        raise ImageError(f"{path}: this image cannot be read: {_reason(error, path)}.") from error


def decode_image(content: bytes, name: str, limits: Limits | None = None) -> Tensor:
    """Decode the content of an image file that was not read from a disk; `name` names it in errors.

    Returns:
        (3, h, w) uint8.

    Raises:
        ImageError: it is damaged, truncated, too large or not an image.
    """
    try:
        return _decode(content, None, name, limits or Limits())
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types, some of them from C code
        raise ImageError(f"{name}: this image cannot be read: {_reason(error, name, content[:24])}.") from error


def _decode(content: bytes, expected_size: Size | None, path: str | Path, limits: Limits) -> Tensor:
    """Decode to (3, h, w) uint8, one pixel after the other in memory."""
    with _strict_pillow(), open_image(io.BytesIO(content), limits) as image:
        _require_complete(image.format, content, limits)
        image.load()
        if expected_size is not None and _needs_turning(image, expected_size):
            return _rgb_pixels(ImageOps.exif_transpose(image), path)
        return _rgb_pixels(image, path)


def image_pixels(image: Image.Image, name: str = "image") -> Tensor:
    """Convert an image that Pillow has opened, as `read_image` converts the same file.

    Args:
        image: of any mode; an EXIF rotation is not applied.
        name: names it in errors.

    Returns:
        (3, h, w) uint8.

    Raises:
        ImageError: it cannot be decoded, or has values without an 8-bit equivalent.
    """
    try:
        image.load()
        return _rgb_pixels(image, name)
    except ImageError:
        raise
    except Exception as error:  # Pillow decodes only now, and its decoders raise many types
        raise ImageError(
            f"{name}: this image cannot be read: {str(error).rstrip('.') or type(error).__name__}."
        ) from None


def read_integers(path: str | Path, limits: Limits | None = None) -> np.ndarray:
    """Read an image of one channel whose values are numbers, not brightness, such as object ids.

    Returns:
        (h, w) int32.

    Raises:
        ImageError: the file cannot be read, or its values are not integers of one channel.
    """
    limits = limits or Limits()
    try:
        content = read_bytes(path, limits.max_image_bytes, "data.max_image_bytes", None)
        with _strict_pillow(), open_image(io.BytesIO(content), limits) as image:
            _require_complete(image.format, content, limits)
            values = np.asarray(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types, some of them from C code
        raise ImageError(f"{path}: this image cannot be read: {_reason(error, path)}.") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise ImageError(f"{path}: this image has {image.mode} pixels. Object ids are integers of one channel.")
    return values.astype(np.int32)


def open_image(file: BinaryIO, limits: Limits) -> Image.Image:
    """Read an image's header without decoding the pixels; only `FORMATS` are accepted.

    Raises:
        UserFileError: the image has too many pixels.
        PIL.UnidentifiedImageError: the format is not one of `FORMATS`.
    """
    Image.init()  # an older Pillow, or one built without a library, lacks some of the formats
    image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    require_at_most(math.prod(image.size), limits.max_image_pixels, "data.max_image_pixels", "pixels")
    return image


@shared_by_threads
@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Make Pillow raise for truncated files, which other libraries may have switched off, and drop its pixel limit."""
    keep = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = keep


def read_image_info(path: str | Path, limits: Limits | None = None, retry_seconds: float | None = None) -> ImageInfo:
    """Read size, EXIF orientation and mode from the header, and check that the end of the file is present.

    Args:
        path, limits, retry_seconds: as for `read_image`.

    Raises:
        ImageError: the file is missing, not a regular file, too large, not an image, or truncated.
        ReadError: the storage failed, and `retry_seconds` is not None.
    """
    limits = limits or Limits()
    try:
        if retry_seconds is None:
            return _inspect(path, limits)
        return persist(lambda: _inspect(path, limits), path, retry_seconds, from_the_start=True)
    except ReadError:
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
        if not _seems_complete(kind, file):
            raise ValueError("the file is truncated")
    return info


def is_image_name(name: str) -> bool:
    """Return True if a file name has the ending of one of `FORMATS`."""
    ending = Path(name).suffix.lower()
    return ending in IMAGE_ENDINGS or Image.registered_extensions().get(ending) in FORMATS


def _reason(error: Exception, path: str | Path, start: bytes | None = None) -> str:
    """Say why an image cannot be read; `start` are its first bytes, None: they are read from the path."""
    if isinstance(error, Image.UnidentifiedImageError):
        start = read_start(path, 24) if start is None else start
        return f"it begins with {str(start)[1:]}, which is not an image" if start else "the file is empty"
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    return (getattr(error, "strerror", None) or str(error)).rstrip(".") or type(error).__name__


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # only the first frame is read, so damage in a later one does no harm
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block does not damage the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation >= 5 else size


def same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Return True if two (h, w) have the same aspect ratio within 2 %: resizing rounds the sides to integers."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= 0.02 * a[0] * b[1]


def is_of_turned(size: Size, stored: Size, upright: Size) -> bool:
    """Return True if boxes drawn in `size` are of the image as its EXIF rotation turns it, in its size or a scaled one.

    Args:
        size: (h, w) that the annotations are drawn in.
        stored, upright: (h, w) of the pixels in the file, and of the turned image.
    """
    if size in (stored, upright):
        return size != stored
    return same_aspect(size, upright) and not same_aspect(size, stored)


def _needs_turning(image: Image.Image, expected_size: Size) -> bool:
    stored = (image.height, image.width)
    return is_of_turned((expected_size[0], expected_size[1]), stored, _turned(stored, _orientation(image)))


def _rgb_pixels(image: Image.Image, path: str | Path) -> Tensor:
    """Convert a decoded image to (3, h, w) uint8 RGB, one pixel after the other in memory.

    In strips that the cache holds: a conversion as a piece and Pillow's export join many small blocks, which together
    take longer than decoding a large JPEG.
    """
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _from_integers(image, path)  # Pillow would clip at 255 instead of scaling
    elif image.mode == "F":
        image = _from_floats(image, path)
    width, height = image.size
    rows = max(1, STRIP // max(1, width))
    if height <= rows:
        pixels = np.array(_to_rgb(image))
    else:
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height)))
            pixels[top : top + rows] = np.asarray(_to_rgb(strip))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits a channel pixel by pixel."""
    if image.mode == "RGB":
        return image  # `convert` would copy it
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns about palette transparency given as bytes
    return image.convert("RGB")  # alpha is dropped: the colors under it are kept as the file has them


def _from_integers(image: Image.Image, path: str | Path) -> Image.Image:
    """Convert 0..65535 to 0..255 by a fixed factor, so that the brightness of images stays comparable."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(f"{path}: this image has values outside 0..65535; convert it to 8 or 16 bits.")
    # 257 = 65535 / 255, and adding half of it rounds; int32, since 65535 + 128 overflows 16 bits
    return Image.fromarray(_to_bytes(values, lambda part: (part.astype(np.int32) + 128) // 257))


def _from_floats(image: Image.Image, path: str | Path) -> Image.Image:
    """Scale floats in 0..1 to 0..255; round floats in 0..255."""
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and high <= 255):  # a NaN anywhere makes both NaN, which compares false
        raise ImageError(f"{path}: this image has float values outside 0..255; convert it to 8 or 16 bits.")
    factor = 255 if high <= 1 else 1
    return Image.fromarray(_to_bytes(values, lambda part: np.rint(part.astype(np.float64) * factor)))


def _to_bytes(values: np.ndarray, convert: Callable[[np.ndarray], np.ndarray], part: int = 2**20) -> np.ndarray:
    """Convert an array to uint8 in parts: the intermediate results of a large image would be its largest copies."""
    flat, result = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, values.size, part):
        result[start : start + part] = convert(flat[start : start + part])
    return result.reshape(values.shape)


_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}


def has_zeroed_part(path: str | Path) -> bool:
    """Return True if a JPEG has a kilobyte of zeros among its pixels: they decode to one color without an error.

    A large blank area can, in rare cases, be stored the same way.
    """
    content = read_file(path)
    # a kilobyte: interrupted downloads and disk faults leave runs of full disk blocks, compressed pixels hardly any
    start = _start_of_pixels(content) if content.startswith(b"\xff\xd8") else len(content)
    return content.find(bytes(1024), start, max(start, content.find(b"\xff\xd9", start))) >= 0


def _require_complete(kind: str | None, content: bytes, limits: Limits) -> None:
    """Detect what decoding does not: missing bytes (they decode to gray as zeros) and a wrong checksum in a PNG."""
    if not _has_ending(kind, content):
        raise ValueError("the file is truncated")
    if kind == "PNG":
        with open_image(io.BytesIO(content), limits) as image:
            image.verify()


def _has_ending(kind: str | None, content: bytes) -> bool:
    start = _start_of_pixels(content) if kind in ("JPEG", "MPO") else 0
    return content.find(_END_MARKERS.get(kind or "", b""), start) >= 0


def _start_of_pixels(content: bytes) -> int:
    """Return the offset where the header of a JPEG ends; a preview in the header has an end marker of its own."""
    offset = 2
    # segments of the header: FF, type, two bytes of length; FF DA begins the compressed pixels
    while content[offset : offset + 1] == b"\xff" and content[offset + 1 : offset + 2] != b"\xda":
        offset += 2 + int.from_bytes(content[offset + 2 : offset + 4])
    return min(offset, len(content))


def _seems_complete(kind: str, file: BinaryIO) -> bool:
    """Search the end marker in the last 64 KiB, then in the rest of the file: phones append videos to images."""
    file.seek(max(0, file.seek(0, 2) - 65536))
    if _END_MARKERS.get(kind, b"") in file.read():
        return True
    file.seek(0)
    return _has_ending(kind, file.read())
