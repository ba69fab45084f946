"""A contact sheet: pictures with their boxes and class names, as the model will see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = ("#ff5c5c", "#4dd2ff", "#ffd24d", "#6ee06e", "#d58cff", "#ff9e4d", "#5cffd1", "#ff7ad1")


def write_samples(dataset: Sequence, path: str | Path, count: int) -> None:
    """Draw `count` pictures from all over a dataset as its transforms give them in the first epoch.

    Args:
        dataset: has `classes`; its items are what `write_sheet` draws.
        path: picture file to write.
        count: pictures on the sheet; fewer where the dataset has fewer.
    """
    step = max(1, len(dataset) // count)
    chosen = range(0, len(dataset), step)[:count]
    write_sheet((dataset[index] for index in chosen), dataset.classes, path)


def write_sheet(
    samples: Iterable[tuple[Tensor, dict]], classes: Sequence[str], path: str | Path, columns: int = 4, cell: int = 320
) -> None:
    """Draw samples side by side.

    Args:
        samples: pairs of a (3, h, w) uint8 picture and a target with "boxes" (n, 4) xyxy pixels and "labels" (n,).
        classes: names by label.
        path: picture file to write.
        columns: pictures in a row.
        cell: side in pixels of the square that each picture is fitted into.
    """
    tiles = [_tile(image, target, classes, cell) for image, target in samples]
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell, max(1, rows) * cell), "#202020")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * cell, number // columns * cell))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _tile(image: Tensor, target: dict, classes: Sequence[str], cell: int) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    scale = (cell - 4) / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    draw = ImageDraw.Draw(picture)
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        colour = COLOURS[label % len(COLOURS)]
        corner = (box[0] * scale, box[1] * scale)
        draw.rectangle([*corner, box[2] * scale, box[3] * scale], outline=colour, width=2)
        text = str(classes[label]).encode("latin-1", "replace").decode("latin-1")  # all that the built-in font has
        draw.rectangle(draw.textbbox((corner[0] + 2, corner[1] + 1), text), fill="black")
        draw.text((corner[0] + 2, corner[1] + 1), text, fill=colour)
    return picture
