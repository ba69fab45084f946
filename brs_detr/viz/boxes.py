"""Draw boxes and masks on images: detections beside ground truth, training samples, and contact sheets of them.

torchvision draws the boxes and their tags; the colors are those of the plots, too.
"""

from __future__ import annotations

import colorsys
import functools
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from brs_detr.user_files import printable

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
INK, GRAY, PAPER = (38, 42, 48), (130, 136, 144), (255, 255, 255)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
TEXT = 14  # height of letters on images of up to 640 pixels
CROWDED = 40  # boxes from which tags would hide the image
OPACITY = 0.45  # of the tint: the object's own texture stays visible
MAX_NAME = 24  # characters of a class name


def color(index: int) -> Color:
    """Return the color of class or curve `index`: ten fixed ones, then hues that turn by the golden ratio."""
    if index < len(PALETTE):
        return PALETTE[index]
    red, green, blue = colorsys.hsv_to_rgb(
        index * 0.618034 % 1, 0.55 + 0.3 * (index % 2), 0.65 + 0.25 * (index % 3 > 0)
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def ink_on(tone: Color) -> Color:
    """Return black or white, whichever is read more easily on `tone`."""
    red, green, blue = tone
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else WHITE


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
    """Draw detections in the colors of their classes, over ground truth in white, into a copy of an image.

    Args:
        image: PIL image, (h, w, 3) uint8 array or (3, h, w) uint8 tensor.
        detections: `boxes` (n, 4) xyxy pixels of this image, `scores` (n,), `labels` (n,), and perhaps `masks`
            (n, h, w) bitmaps of this image; or None.
        targets: ground truth `boxes` (m, 4) xyxy pixels and `labels` (m,); or None.
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
    true_boxes, true_labels, _, _ = _select(targets, -math.inf)
    boxes, labels, scores, order = _select(detections, threshold)
    if detections is not None and "masks" in detections:
        canvas = tint(canvas, detections["masks"][order], [color(label) for label in labels])
    width = text_size(canvas) // TEXT * (1 if len(boxes) > CROWDED else 2)
    for tone, thickness in ((WHITE, 2 * width), (BLACK, width)):  # two tones show on any ground, white under detections
        canvas = draw_boxes(canvas, true_boxes * scale, [tone] * len(true_boxes), width=thickness)
    names = [_name(classes, label) for label in labels]
    tags = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)] if len(boxes) <= CROWDED else None
    canvas = draw_boxes(canvas, boxes * scale, [color(label) for label in labels], tags, width=width)
    if not legend:
        return canvas
    counts = {"detected": labels} if detections is not None else {}
    counts |= {"true": true_labels} if targets is not None else {}
    return _with_legend(canvas, counts, classes, title)


def draw_boxes(
    image: Image.Image, boxes: Tensor, colors: Sequence[Color], tags: Sequence[str] | None = None, width: int = 2
) -> Image.Image:
    """Draw boxes, and over them a tag beside each, into a copy of an image.

    Args:
        image: RGB.
        boxes: (n, 4) xyxy pixels, finite; later ones are drawn over earlier ones.
        colors: of each box and its tag.
        tags: text for each box; that of a later box is placed first, and one without room beside others is left out.
        width: of the lines in pixels.

    Returns:
        An RGB image of the same size.
    """
    if not len(boxes):
        return image.copy()
    sides = torch.tensor(image.size).repeat(2)
    corners = torch.minimum(boxes.round().clamp(min=-width - 1), sides + width)  # no coordinate too large for Pillow
    corners[:, 2:] = torch.maximum(corners[:, :2], corners[:, 2:])
    pixels = draw_bounding_boxes(pil_to_tensor(image), corners, colors=list(colors), width=width)
    places = _place_tags(corners.tolist(), tags or [], image.size, text_size(image))
    if places:
        tones = [colors[index] for index in places]
        pixels = draw_bounding_boxes(  # boxes without lines, only their tags
            pixels,
            torch.tensor(list(places.values())),
            labels=[(tags or [])[index] for index in places],
            colors=tones,
            width=0,
            font=font_path(),
            font_size=text_size(image),
            label_colors=[ink_on(tone) for tone in tones],
            fill_labels=True,
        )
    return to_pil_image(pixels)


def _place_tags(
    boxes: list[list[float]], tags: Sequence[str], size: tuple[int, int], text: int
) -> dict[int, tuple[float, float, float, float]]:
    """Place the tags by number of the box: above or below it, or inside, where no other tag is."""
    places: dict[int, tuple[float, float, float, float]] = {}
    for index in reversed(range(len(tags))):
        x0, y0, x1, y1 = boxes[index]
        wide, high = text_width(tags[index], text) + 4, text + 4
        spots = [(x0, y0 - high), (x1 - wide, y1), (x0, y1), (x1 - wide, y0 - high), (x0, y0), (x0, y1 - high)]
        for x, y in spots:
            x = min(max(0.0, x), max(0.0, size[0] - wide))
            tag = (x, y, x + wide, y + high)
            if 0 <= y <= max(0, size[1] - high) and not any(_overlap(tag, other) for other in places.values()):
                places[index] = tag
                break
    return places


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class LabeledImages(Protocol):
    """A dataset of pairs of an image and its target, as `write_contact_sheet` draws them, with the classes' names."""

    @property
    def classes(self) -> Sequence[str]:
        """Return the names by label."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, dict[str, Any]]: ...


def write_samples(dataset: LabeledImages, path: str | Path, count: int) -> None:
    """Draw `count` images from all over a dataset as its transforms give them in the first epoch.

    Args:
        dataset: images with ground truth.
        path: image file to write.
        count: images on the sheet; fewer where the dataset has fewer.
    """
    step = max(1, len(dataset) // count)
    chosen = range(0, len(dataset), step)[:count]
    write_contact_sheet((dataset[index] for index in chosen), dataset.classes, path)


def write_contact_sheet(
    samples: Iterable[tuple[Tensor, dict]], classes: Sequence[str], path: str | Path, columns: int = 4, cell: int = 320
) -> None:
    """Draw samples with their ground truth side by side.

    Args:
        samples: at least one pair of a (3, h, w) uint8 image and a target with "boxes" (n, 4) xyxy pixels and "labels"
            (n,), and perhaps "masks" (n, h, w).
        classes: names by label.
        path: image file to write.
        columns: images in a row.
        cell: side in pixels of the square that each image is fitted into.
    """
    tiles = []
    for pixels, target in samples:
        tile = to_image(pixels)
        scale = cell / max(tile.size)
        tile = tile.resize([max(1, round(side * scale)) for side in tile.size], Image.Resampling.BICUBIC)
        boxes, labels, _, order = _select(target, -math.inf)
        if "masks" in target:
            tile = tint(tile, target["masks"][order], [color(label) for label in labels])
        tags = [_name(classes, label) for label in labels]
        tiles.append(draw_boxes(tile, boxes * scale, [color(label) for label in labels], tags))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(tiles, columns=columns, cell=(cell, cell), gap=0).save(path)


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int | None = None, cell: tuple[int, int] = (520, 520), gap: int = 12
) -> Image.Image:
    """Put images side by side on one sheet, each shrunk to fit its cell.

    Args:
        images: at least one.
        columns: default makes the sheet about as wide as high.
        cell: (width, height) of each image's place in pixels.
        gap: pixels between cells.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    columns = columns or math.ceil(math.sqrt(len(images)))
    sides = [number * (side + gap) + gap for number, side in zip((columns, -(-len(images) // columns)), cell)]
    sheet = Image.new("RGB", (sides[0], sides[1]), (32, 32, 32))
    for number, image in enumerate(images):
        small = image.convert("RGB")
        small.thumbnail(cell, Image.Resampling.LANCZOS)
        row, column = divmod(number, columns)
        sheet.paste(small, (gap + column * (cell[0] + gap), gap + row * (cell[1] + gap)))
    return sheet


def to_image(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Convert a PIL image, an (h, w, 3) uint8 array or a (3, h, w) uint8 tensor to an RGB copy."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image.astype(np.uint8))).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def short_name(name: str) -> str:
    """Shorten a class name to `MAX_NAME` characters on one line."""
    name = printable(name)
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def text_size(image: Image.Image) -> int:
    """Return the height of letters in pixels: `TEXT`, and more on large images, which are looked at shrunk."""
    return max(TEXT, round(TEXT * max(image.size) / 640))


def text_width(text: str, size: int) -> int:
    """Measure the width of one line in pixels."""
    return math.ceil(_font(size).getlength(text))


@functools.cache
def font_path() -> str:
    """Find DejaVu Sans as matplotlib brings it, without the cost of importing matplotlib; else the system's."""
    spec = importlib.util.find_spec("matplotlib")
    path = Path((spec and spec.origin) or "").parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return str(path) if path.is_file() else path.name  # Pillow looks for a bare name in the system's folders


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_path(), size)


def _select(boxes: Mapping[str, Any] | None, threshold: float) -> tuple[Tensor, list[int], list[float], Tensor]:
    """Select finite boxes (n, 4), labels, scores and indices, the lowest score first, so that the best is on top."""
    if boxes is None or not len(boxes["boxes"]):
        return torch.zeros(0, 4), [], [], torch.zeros(0, dtype=torch.long)
    corners, labels = (torch.as_tensor(boxes[key]).cpu() for key in ("boxes", "labels"))
    scores = torch.as_tensor(boxes.get("scores", torch.ones(len(corners)))).cpu().double()
    order = scores.argsort(stable=True)
    order = order[(scores >= threshold)[order] & corners.isfinite().all(1)[order]]
    return corners[order].double(), labels[order].long().tolist(), scores[order].tolist(), order


def _name(classes: Sequence[str], label: int) -> str:
    return short_name(classes[label]) if 0 <= label < len(classes) else f"label {label}"


def _with_legend(
    image: Image.Image, counts: Mapping[str, Sequence[int]], classes: Sequence[str], title: str
) -> Image.Image:
    """Add a strip below the image: a swatch per class and how many boxes of it there are of each kind."""
    size = text_size(image)
    kinds = {"detected": "colors: detections", "true": "white: ground truth"}
    heading = "   ".join([*([printable(title)] if title else []), *(kinds[kind] for kind in counts)])
    entries: list[tuple[tuple[int, int], Color | None, str]] = [((0, 0), None, heading)]
    x, y = 0, 0
    for label in sorted({label for labels in counts.values() for label in labels}):
        text = f"{_name(classes, label)}: " + ", ".join(f"{list(n).count(label)} {kind}" for kind, n in counts.items())
        wide = text_width(text, size) + 3 * size
        x, y = (0, y + 1) if y == 0 or x + wide > image.width else (x, y)
        entries.append(((x, y), color(label), text))
        x += wide
    step = round(1.5 * size)
    sheet = Image.new("RGB", (image.width, image.height + step * (y + 1) + size), PAPER)
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for (x, y), tone, text in entries:
        left, middle = x + size, image.height + size // 2 + step * y + step // 2
        if tone is not None:
            draw.rectangle((left, middle - size // 2, left + size, middle + size // 2), fill=tone)
            left += round(1.5 * size)
        draw.text((left, middle), text, fill=GRAY if tone is None else INK, font=_font(size), anchor="lm")
    return sheet


def tint(image: Image.Image, masks: Tensor, colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Blend each mask's color into a copy of an image, and outline it, so that touching objects can be told apart.

    Args:
        image: RGB, of any size.
        masks: (n, h, w) bitmaps, which are resized to the image; later ones cover earlier ones.
        colors: of each mask.

    Returns:
        An RGB image of the same size.
    """
    pixels = np.array(image, np.float32)
    size = pixels.shape[:2]
    for mask, color in zip(masks.cpu(), colors, strict=True):
        if not mask.any():
            continue
        inside = F.interpolate(mask[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0] >= 0.5
        # pixels of the object with a neighbor outside: a minimum over 3 x 3 erodes it
        eroded = -F.max_pool2d(-inside[None].float(), 3, stride=1, padding=1)[0] > 0
        area, border = inside.numpy(), (inside & ~eroded).numpy()
        pixels[area] += OPACITY * (np.array(color, np.float32) - pixels[area])
        pixels[border] = color
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
