"""Draw boxes on images: detections beside ground truth, and contact sheets of training samples.

Colors, fonts and lines shared by images and curves; Pillow is all they need.

A contact sheet: images with their boxes and class names, as the model will see them.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TRUE = (255, 255, 255)
TEXT = 14
CROWDED = 40  # boxes from which names would hide the image


def draw_detections(
    image: Image.Image | np.ndarray | Tensor,
    detections: Mapping[str, Any] | None,
    targets: Mapping[str, Any] | None,
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
    title: str = "",
    min_side: int = 640,
    legend: bool = True,
) -> Image.Image:
    """Draw found and true boxes into a copy of an image.

    Args:
        image: PIL image, (h, w, 3) uint8 array or (3, h, w) uint8 tensor.
        detections: `boxes` (n, 4) xyxy pixels of this image, `scores` (n,), `labels` (n,); or None.
        targets: true `boxes` (m, 4) xyxy pixels and `labels` (m,); or None.
        classes: name of each label.
        threshold: detections with a lower score are left out.
        title: shown in the legend.
        min_side: smaller images are enlarged until their longer side has this many pixels.
        legend: add a strip below that explains colors and counts objects.

    Returns:
        An RGB image.
    """
    canvas = to_image(image)
    scale = max(1.0, min_side / max(canvas.size))
    if scale > 1:
        canvas = canvas.resize([round(side * scale) for side in canvas.size], Image.Resampling.BICUBIC)
    found, true = _rows(detections, threshold), _rows(targets, -math.inf)
    draw = ImageDraw.Draw(canvas)
    width = 1 if len(found) > CROWDED else 2 if max(canvas.size) < 1200 else 3
    for box, _, _ in true:
        sides = (*canvas.size, *canvas.size)
        near = [min(max(v * scale, -9.0), side + 9.0) for v, side in zip(box, sides, strict=True)]
        dashed_rectangle(draw, near, TRUE, width)
    for box, label, _ in found:
        left, top, right, bottom = (round(v * scale) for v in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color(label), width=width)
    if len(found) <= CROWDED:
        _write_names(draw, canvas.size, found, classes, scale)
    if not legend:
        return canvas
    return _with_legend(canvas, found if detections is not None else None, true, targets is not None, classes, title)


def to_image(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """An RGB copy of a PIL image, an (h, w, 3) uint8 array or a (3, h, w) uint8 tensor."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image.astype(np.uint8))).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int | None = None, cell: tuple[int, int] = (520, 420), gap: int = 12
) -> Image.Image:
    """Images side by side on one sheet, each shrunk to fit its cell.

    Args:
        images: at least one.
        columns: default makes the sheet about as wide as high.
        cell: largest (width, height) of one image in pixels.
        gap: pixels between cells.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
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
        draw.rectangle(tag, fill=color(label))
        draw.text((tag[0] + 3, tag[1] + 1), text, fill=ink_on(color(label)), font=font(TEXT))


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _with_legend(
    image: Image.Image, found: list | None, true: list, has_targets: bool, classes: Sequence[str], title: str
) -> Image.Image:
    """The image over a strip with one swatch a class, and how many boxes of it are found and true."""
    items = []
    for label in sorted({row[1] for row in (found or []) + true}):
        counts = []
        if found is not None:
            counts.append(f"{sum(row[1] == label for row in found)} found")
        if has_targets:
            counts.append(f"{sum(row[1] == label for row in true)} true")
        items.append((color(label), f"{_name(classes, label)}: {', '.join(counts)}"))
    kinds = [text for text, shown in (("solid: found", found is not None), ("dashed: true", has_targets)) if shown]
    heading = "   ".join(([title] if title else []) + kinds)
    lines: list[list[tuple[Any, str, int]]] = [[]]
    x = 10
    for tone, text in items:
        wide = text_width(text, TEXT) + 34
        if lines[-1] and x + wide > image.width:
            lines.append([])
            x = 10
        lines[-1].append((tone, text, x))
        x += wide
    step = TEXT + 8
    sheet = Image.new("RGB", (image.width, image.height + step * (1 + len(lines) * bool(items)) + 8), PAPER)
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, image.height + 5), heading, fill=GRAY, font=font(TEXT))
    for number, line in enumerate(lines, 1):
        y = image.height + 5 + number * step
        for tone, text, x in line:
            draw.rectangle((x, y + 2, x + 12, y + 14), fill=tone)
            draw.text((x + 18, y), text, fill=INK, font=font(TEXT))
    return sheet


Color = tuple[int, int, int]

PALETTE: tuple[Color, ...] = (
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
INK: Color = (38, 42, 48)
GRAY: Color = (130, 136, 144)
GRID: Color = (230, 233, 237)
PAPER: Color = (255, 255, 255)


def color(index: int) -> Color:
    """A color for class or line `index`; the first ten by hand, later ones by turning the hue by the golden ratio."""
    if index < len(PALETTE):
        return PALETTE[index]
    red, green, blue = colorsys.hsv_to_rgb(
        index * 0.618034 % 1, 0.55 + 0.3 * (index % 2), 0.65 + 0.25 * (index % 3 > 0)
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def faint(tone: Color, share: float = 0.35) -> Color:
    """The color thinned toward white paper."""
    return tuple(round(255 - (255 - part) * share) for part in tone)  # type: ignore[return-value]


def ink_on(tone: Color) -> Color:
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
    draw: ImageDraw.ImageDraw, box: Sequence[float], tone: Color, width: int = 2, dash: int = 6
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


COLORS = ("#ff5c5c", "#4dd2ff", "#ffd24d", "#6ee06e", "#d58cff", "#ff9e4d", "#5cffd1", "#ff7ad1")


def write_samples(dataset: Sequence, path: str | Path, count: int) -> None:
    """Draw `count` images from all over a dataset as its transforms give them in the first epoch.

    Args:
        dataset: has `classes`; its items are what `write_contact_sheet` draws.
        path: image file to write.
        count: images on the sheet; fewer where the dataset has fewer.
    """
    step = max(1, len(dataset) // count)
    chosen = range(0, len(dataset), step)[:count]
    write_contact_sheet((dataset[index] for index in chosen), dataset.classes, path)


def write_contact_sheet(
    samples: Iterable[tuple[Tensor, dict]], classes: Sequence[str], path: str | Path, columns: int = 4, cell: int = 320
) -> None:
    """Draw samples side by side.

    Args:
        samples: pairs of a (3, h, w) uint8 image and a target with "boxes" (n, 4) xyxy pixels and "labels" (n,).
        classes: names by label.
        path: image file to write.
        columns: images in a row.
        cell: side in pixels of the square that each image is fitted into.
    """
    tiles = [_tile(image, target, classes, cell) for image, target in samples]
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell, max(1, rows) * cell), "#202020")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * cell, number // columns * cell))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _tile(pixels: Tensor, target: dict, classes: Sequence[str], cell: int) -> Image.Image:
    tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = (cell - 4) / max(tile.size)
    tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))))
    draw = ImageDraw.Draw(tile)
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        color = COLORS[label % len(COLORS)]
        corner = (box[0] * scale, box[1] * scale)
        draw.rectangle([*corner, box[2] * scale, box[3] * scale], outline=color, width=2)
        text = str(classes[label]).encode("latin-1", "replace").decode("latin-1")  # all that the built-in font has
        draw.rectangle(draw.textbbox((corner[0] + 2, corner[1] + 1), text), fill="black")
        draw.text((corner[0] + 2, corner[1] + 1), text, fill=color)
    return tile
