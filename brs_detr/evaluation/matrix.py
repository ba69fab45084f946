"""A confusion matrix as a picture: counts where there is room for them, shares as colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from brs_detr.evaluation.confusion import BACKGROUND, MISSED, Confusion
from brs_detr.evaluation.drawing import GREY, GRID, INK, PAPER, Colour, font, ink_on, text_width

RIGHT, WRONG, NOTHING = (31, 119, 180), (208, 64, 40), (96, 104, 114)  # found, found as another class, missed or false
CELL_SIDES = ((8, 72), (14, 56), (25, 40), (45, 24), (90, 14))  # (most rows, side of a cell in pixels)
LARGEST = 1260  # side of the matrix in pixels with more rows
LEAST_NAMED, LEAST_COUNTED, LEAST_SHARED = 13, 24, 56  # sides from which names, counts and shares are written
GAP, EDGE, LONGEST_NAME, LEAST_WIDE = 6, 20, 150, 640


def draw_confusion(confusion: Confusion, out_png: str | Path | None = None) -> Image.Image:
    """Draw a confusion matrix: a row for each true class and the background, a column for each found class and missed.

    Blue is found, red found as another class, grey missed or without an object; the darker, the larger the share of
    the row's objects or, of background, of what was found as the column's class. Names and counts are left out where
    cells are too small for them.

    Args:
        confusion: C classes.
        out_png: where to save the picture, if anywhere.
    """
    side = _cell_side(len(confusion.classes) + 1)
    text = min(13, side - 3)
    title = "confusion matrix at IoU 0.5, at each class's score of best F1"
    names = [_shortened(name, text) for name in (*confusion.classes, BACKGROUND, MISSED)] if side >= LEAST_NAMED else []
    margin = max((text_width(name, text) for name in names), default=0) + 10
    corner = (EDGE + 18 + margin, EDGE + 74 + margin)
    extent = (len(confusion.classes) + 1) * side + GAP
    width = max(corner[0] + extent + EDGE, LEAST_WIDE)
    picture = Image.new("RGB", (width, corner[1] + extent + EDGE), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((EDGE, 14), title, fill=INK, font=font(17))
    _draw_key(draw, (EDGE, 46))
    draw.text((corner[0], EDGE + 52), "found as", fill=GREY, font=font(12))
    _upright(picture, "true class", 12, GREY, (EDGE - 4, corner[1]), below=True)
    _draw_cells(draw, confusion.counts, corner, side)
    for index, name in enumerate(names[:-1]):
        y = corner[1] + _offset(index, side, len(confusion.classes)) + side / 2
        draw.text((corner[0] - 6, y), name, fill=INK, font=font(text), anchor="rm")
    for index, name in enumerate([*names[:-2], *names[-1:]]):
        x = corner[0] + _offset(index, side, len(confusion.classes)) + side / 2
        _upright(picture, name, text, INK, (x, corner[1] - 4))
    if out_png is not None:
        Path(out_png).parent.mkdir(parents=True, exist_ok=True)
        picture.save(out_png)
    return picture


def _cell_side(rows: int) -> int:
    return next((side for most, side in CELL_SIDES if rows <= most), max(1, LARGEST // rows))


def _offset(index: int, side: int, classes: int) -> int:
    """Start of a row or column; background and missed stand a little apart."""
    return index * side + GAP * (index == classes)


def _draw_key(draw: ImageDraw.ImageDraw, place: tuple[int, int]) -> None:
    x, y = place
    for tone, text in ((RIGHT, "right"), (WRONG, "another class"), (NOTHING, "missed, or no object there")):
        draw.rectangle((x, y, x + 12, y + 12), fill=tone)
        draw.text((x + 18, y + 6), text, fill=INK, font=font(12), anchor="lm")
        x += text_width(text, 12) + 36
    draw.text((x, y + 6), "share of row; background: of column", fill=GREY, font=font(12), anchor="lm")


def _draw_cells(draw: ImageDraw.ImageDraw, counts: np.ndarray, corner: tuple[int, int], side: int) -> None:
    classes = len(counts) - 1
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shares[-1] = counts[-1] / np.maximum(counts.sum(0), 1)
    roomy = side >= 8
    for row, column in np.ndindex(*counts.shape):
        if (row == column == classes) or not (counts[row, column] or roomy):
            continue
        x, y = (start + _offset(index, side, classes) for start, index in zip(corner, (column, row)))
        tone = NOTHING if classes in (row, column) else RIGHT if row == column else WRONG
        fill = _blend(tone, float(shares[row, column])) if counts[row, column] else _blend(GRID, 0.4)
        draw.rectangle((x, y, x + side - 1 - roomy, y + side - 1 - roomy), fill=fill)
        if counts[row, column] and side >= LEAST_COUNTED:
            _write(draw, (x + side / 2, y + side / 2), counts[row, column], shares[row, column], side, ink_on(fill))


def _write(
    draw: ImageDraw.ImageDraw, centre: tuple[float, float], count: int, share: float, side: int, ink: Colour
) -> None:
    """The count in the middle of a cell, over its share where there is room."""
    (x, y), two = centre, side >= LEAST_SHARED
    text, size = f"{count:,}", 15 if two else 11
    if text_width(text, size) > side - 4:
        return
    draw.text((x, y - 8 * two), text, fill=ink, font=font(size), anchor="mm")
    if two:
        draw.text((x, y + 11), f"{share:.0%}", fill=ink, font=font(11), anchor="mm")


def _blend(tone: Colour, share: float) -> Colour:
    """From white to `tone`, by the square root of the share so that few are seen too."""
    part = min(1.0, share) ** 0.5
    return tuple(round(255 - (255 - value) * part) for value in tone)  # type: ignore[return-value]


def _shortened(name: str, size: int) -> str:
    if text_width(name, size) <= LONGEST_NAME:
        return name
    while name and text_width(name + "…", size) > LONGEST_NAME:
        name = name[:-1]
    return name + "…"


def _upright(
    picture: Image.Image, text: str, size: int, ink: Colour, place: Sequence[float], *, below: bool = False
) -> None:
    """Text read from below, centred on x; it ends at y, or begins there if `below`."""
    line = Image.new("L", (text_width(text, size) + 2, size + 6), 0)
    ImageDraw.Draw(line).text((1, (size + 6) / 2), text, fill=255, font=font(size), anchor="lm")
    line = line.rotate(90, expand=True)
    x, y = place
    spot = (round(x - line.width / 2), round(y if below else y - line.height))
    picture.paste(Image.new("RGB", line.size, ink), spot, line)
