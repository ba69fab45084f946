"""Pictures with boxes drawn in: found ones solid with name and score, true ones dashed white."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from brs_detr.evaluation.drawing import (
    GREY,
    INK,
    PAPER,
    colour,
    dashed_rectangle,
    font,
    ink_on,
    text_width,
)

TRUE = (255, 255, 255)
TEXT = 14
CROWDED = 40  # boxes from which names would hide the picture


def draw_detections(
    image: Image.Image | np.ndarray | Tensor,
    detections: Mapping[str, Any] | None,
    targets: Mapping[str, Any] | None,
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
    title: str = "",
    least_side: int = 640,
    legend: bool = True,
) -> Image.Image:
    """Draw found and true boxes into a copy of a picture.

    Args:
        image: PIL picture, (h, w, 3) uint8 array or (3, h, w) uint8 tensor.
        detections: `boxes` (n, 4) xyxy pixels of this picture, `scores` (n,), `labels` (n,); or None.
        targets: true `boxes` (m, 4) xyxy pixels and `labels` (m,); or None.
        classes: name of each label.
        threshold: detections with a lower score are left out.
        title: shown in the legend.
        least_side: smaller pictures are enlarged until their longer side has this many pixels.
        legend: add a strip below that explains colours and counts objects.

    Returns:
        An RGB picture.
    """
    picture = to_picture(image)
    scale = max(1.0, least_side / max(picture.size))
    if scale > 1:
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
    found, true = _rows(detections, threshold), _rows(targets, -math.inf)
    draw = ImageDraw.Draw(picture)
    width = 1 if len(found) > CROWDED else 2 if max(picture.size) < 1200 else 3
    for box, _, _ in true:
        limits = (*picture.size, *picture.size)
        near = [min(max(v * scale, -9.0), side + 9.0) for v, side in zip(box, limits, strict=True)]
        dashed_rectangle(draw, near, TRUE, width)
    for box, label, _ in found:
        left, top, right, bottom = (round(v * scale) for v in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour(label), width=width)
    if len(found) <= CROWDED:
        _write_names(draw, picture.size, found, classes, scale)
    if not legend:
        return picture
    return _with_legend(picture, found if detections is not None else None, true, targets is not None, classes, title)


def to_picture(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """An RGB copy of a PIL picture, an (h, w, 3) uint8 array or a (3, h, w) uint8 tensor."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image.astype(np.uint8))).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int | None = None, cell: tuple[int, int] = (520, 420), gap: int = 12
) -> Image.Image:
    """Pictures side by side on one sheet, each shrunk to fit its cell.

    Args:
        images: at least one.
        columns: default makes the sheet about as wide as high.
        cell: largest (width, height) of one picture in pixels.
        gap: pixels between cells.

    Raises:
        ValueError: there is no picture.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(images)))
    small = [image.convert("RGB") for image in images]
    for image in small:
        image.thumbnail(cell, Image.Resampling.LANCZOS)
    rows = [small[start : start + columns] for start in range(0, len(small), columns)]
    heights = [max(image.height for image in row) for row in rows]
    wide = max(sum(image.width for image in row) + gap * (len(row) - 1) for row in rows)
    sheet = Image.new("RGB", (wide + 2 * gap, sum(heights) + gap * (len(rows) + 1)), (244, 246, 248))
    y = gap
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + gap
        y += height + gap
    return sheet


def _rows(boxes: Mapping[str, Any] | None, threshold: float) -> list[tuple[list[float], int, float]]:
    """(box, label, score) with the lowest score first, so that the best is drawn on top."""
    if boxes is None or not len(boxes["boxes"]):
        return []
    corners = torch.as_tensor(boxes["boxes"]).double().tolist()
    labels = [int(label) for label in torch.as_tensor(boxes["labels"]).tolist()]
    scores = torch.as_tensor(boxes["scores"]).double().tolist() if "scores" in boxes else [1.0] * len(corners)
    rows = [r for r in zip(corners, labels, scores, strict=True) if r[2] >= threshold and all(map(math.isfinite, r[0]))]
    return sorted(rows, key=lambda row: row[2])


def _name(classes: Sequence[str], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else f"label {label}"


def _write_names(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], found: list, classes: Sequence[str], scale: float
) -> None:
    """A tag for each box, the best first, moved along its box where it would cover another tag."""
    high, taken = TEXT + 5, []
    for box, label, score in reversed(found):
        text = f"{_name(classes, label)} {score:.2f}"
        wide = text_width(text, TEXT) + 6
        left, top, right, bottom = (round(v * scale) for v in box)
        spots = [(left, top - high), (right - wide, bottom), (left, bottom), (right - wide, top - high), (left, top)]
        spots = [(min(max(0, x), max(0, size[0] - wide)), y) for x, y in spots if 0 <= y <= size[1] - high]
        tags = [(x, y, x + wide, y + high) for x, y in spots] or [(max(0, left), 0, max(0, left) + wide, high)]
        tag = next((tag for tag in tags if not any(_overlap(tag, other) for other in taken)), tags[0])
        if any(_overlap(tag, other) for other in taken):
            continue  # no room: the box speaks for itself
        taken.append(tag)
        draw.rectangle(tag, fill=colour(label))
        draw.text((tag[0] + 3, tag[1] + 1), text, fill=ink_on(colour(label)), font=font(TEXT))


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _with_legend(
    picture: Image.Image, found: list | None, true: list, has_targets: bool, classes: Sequence[str], title: str
) -> Image.Image:
    """The picture over a strip with one swatch a class, and how many boxes of it are found and true."""
    items = []
    for label in sorted({row[1] for row in (found or []) + true}):
        counts = []
        if found is not None:
            counts.append(f"{sum(row[1] == label for row in found)} found")
        if has_targets:
            counts.append(f"{sum(row[1] == label for row in true)} true")
        items.append((colour(label), f"{_name(classes, label)}: {', '.join(counts)}"))
    kinds = [text for text, shown in (("solid: found", found is not None), ("dashed: true", has_targets)) if shown]
    heading = "   ".join(([title] if title else []) + kinds)
    lines: list[list[tuple[Any, str, int]]] = [[]]
    x = 10
    for tone, text in items:
        wide = text_width(text, TEXT) + 34
        if lines[-1] and x + wide > picture.width:
            lines.append([])
            x = 10
        lines[-1].append((tone, text, x))
        x += wide
    step = TEXT + 8
    sheet = Image.new("RGB", (picture.width, picture.height + step * (1 + len(lines) * bool(items)) + 8), PAPER)
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, picture.height + 5), heading, fill=GREY, font=font(TEXT))
    for number, line in enumerate(lines, 1):
        y = picture.height + 5 + number * step
        for tone, text, x in line:
            draw.rectangle((x, y + 2, x + 12, y + 14), fill=tone)
            draw.text((x + 18, y), text, fill=INK, font=font(TEXT))
    return sheet
