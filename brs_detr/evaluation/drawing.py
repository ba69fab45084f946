"""Colours, fonts and lines shared by pictures and curves; Pillow is all they need."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (0, 170, 190),
    (227, 119, 194),
    (188, 160, 20),
    (140, 86, 75),
    (90, 90, 220),
)
INK: Colour = (38, 42, 48)
GREY: Colour = (130, 136, 144)
GRID: Colour = (230, 233, 237)
PAPER: Colour = (255, 255, 255)


def colour(index: int) -> Colour:
    """A colour for class or line `index`; the first ten by hand, later ones by turning the hue by the golden ratio."""
    if index < len(PALETTE):
        return PALETTE[index]
    red, green, blue = colorsys.hsv_to_rgb(
        index * 0.618034 % 1, 0.55 + 0.3 * (index % 2), 0.65 + 0.25 * (index % 3 > 0)
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def faint(tone: Colour, share: float = 0.35) -> Colour:
    """The colour thinned towards white paper."""
    return tuple(round(255 - (255 - part) * share) for part in tone)  # type: ignore[return-value]


def ink_on(tone: Colour) -> Colour:
    """Black or white, whichever is read more easily on `tone`."""
    red, green, blue = tone
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else (255, 255, 255)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which needs no font file on the machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Width of one line in pixels."""
    return math.ceil(font(size).getlength(text))


def dashed_rectangle(
    draw: ImageDraw.ImageDraw, box: Sequence[float], tone: Colour, width: int = 2, dash: int = 6
) -> None:
    """A rectangle of dashes with dark gaps, so that it shows on light and dark ground alike."""
    left, top, right, bottom = (round(value) for value in box)
    draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=(0, 0, 0), width=width)
    for start in range(left, right, 2 * dash):
        end = min(start + dash, right)
        draw.rectangle((start, top, end, top + width - 1), fill=tone)
        draw.rectangle((start, bottom - width + 1, end, bottom), fill=tone)
    for start in range(top, bottom, 2 * dash):
        end = min(start + dash, bottom)
        draw.rectangle((left, start, left + width - 1, end), fill=tone)
        draw.rectangle((right - width + 1, start, right, end), fill=tone)
