"""How large the files of a dataset may be before they are refused rather than fill the memory."""

from __future__ import annotations

from dataclasses import dataclass


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
