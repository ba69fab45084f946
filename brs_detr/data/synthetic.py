"""Generate a detection dataset of geometric shapes on cluttered, textured backgrounds, in COCO's format.

Color, texture, size and position are drawn independently of the class; strokes, blobs and corners that belong to no
class are drawn between the objects; objects occlude one another and are truncated by the image border. Boxes and
polygons are those of the visible part. Each image depends on (seed, split, number) alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from brs_detr.data.formats.coco import require_free
from brs_detr.data.issues import DataError

_DESCRIPTION = "BRS-DETR synthetic scenes"
_BEGINNING = f'{{"info": {{"description": "{_DESCRIPTION}'  # first characters of every json that is written here
# ids with gaps and out of order, as in real datasets: code that takes an id for a label fails on it
CATEGORY_IDS = {"disc": 7, "ring": 3, "rectangle": 20, "triangle": 11, "star": 42}
SUPERSAMPLING = 3  # masks are drawn this much larger, for soft edges and boxes of fractions of a pixel
MIN_VISIBLE = 0.55  # fraction of an object's area that others must leave visible, so that its class can be seen
MIN_INSIDE = 0.75  # fraction of an object's area that must lie within the image
MIN_CONTRAST = 80.0  # distance in RGB between an object and the mean color behind it


def make_dataset(
    out_dir: str | Path,
    *,
    train: int = 1000,
    val: int = 200,
    image_size: int = 80,
    max_objects: int = 4,
    seed: int = 0,
) -> Path:
    """Write `images/{train,val}/*.jpg` and `annotations/{train,val}.json`.

    Args:
        out_dir: folder to write to; made if absent.
        train, val: number of images.
        image_size: long side in pixels; the short side is 3/4 of it or more.
        max_objects: maximum number of objects in an image; about one image in 40 has no object.
        seed: the same seed gives the same bytes on one machine.

    Returns:
        the folder.

    Raises:
        DataError: the folder holds a dataset that was not made here; nothing has been written.
    """
    out = Path(out_dir)
    _require_own(out)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    # before the images: a folder in which this command was interrupted is its own, too
    (out / "annotations" / "train.json").write_text(f'{_BEGINNING}"}}}}')
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        (out / "images" / name).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            random = np.random.default_rng([seed, split, number])
            image, objects = draw_scene(random, image_size, max_objects)
            file_name = f"{number:06d}.jpg"
            Image.fromarray(image).save(out / "images" / name / file_name, quality=92)
            image_id = 1000 * (split + 1) + 3 * number
            height, width = image.shape[:2]
            images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
            annotations += [{"id": len(annotations) + 1 + i, "image_id": image_id, **o} for i, o in enumerate(objects)]
        categories = [{"id": key, "name": shape, "supercategory": "shape"} for shape, key in CATEGORY_IDS.items()]
        info = {"description": f"{_DESCRIPTION}, seed {seed}"}
        data = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"{name}.json").write_text(json.dumps(data))
    return out


def _require_own(out: Path) -> None:
    """Refuse a folder in which annotations or images of the user would be overwritten; earlier scenes are replaced.

    Raises:
        DataError: names the file or folder.
    """
    jsons = [out / "annotations" / f"{split}.json" for split in ("train", "val")]
    require_free(jsons, _BEGINNING)
    if any(path.exists() for path in jsons):
        return
    for folder in (out / "images" / "train", out / "images" / "val"):  # of other jsons, or of none
        if folder.is_dir() and any(folder.iterdir()):
            raise DataError(f"{folder}: this folder holds files that this command has not made. Choose another folder.")


def draw_scene(random: np.random.Generator, image_size: int, max_objects: int) -> tuple[np.ndarray, list[dict]]:
    """Draw one image and its objects.

    Args:
        random: source of all random numbers.
        image_size: long side in pixels.
        max_objects: maximum number of objects.

    Returns:
        (h, w, 3) uint8 and the COCO annotations without ids.
    """
    sides = [image_size, round(image_size * random.uniform(0.75, 1))]
    height, width = sides if random.random() < 0.5 else sides[::-1]
    canvas = _background(random, height, width)
    for _ in range(random.integers(1, 5)):
        _draw_clutter(random, canvas)
    count = 0 if random.random() < 0.025 else random.integers(1, max_objects + 1)
    shapes: list[str] = []
    visible: list[np.ndarray] = []  # masks of the parts that later objects leave visible
    full: list[float] = []
    for _ in range(count):
        placed = _place(random, canvas, visible, full)
        if placed is not None:
            shape, mask, area = placed
            visible = [other & ~mask for other in visible] + [mask]
            shapes, full = shapes + [shape], full + [area]
    canvas += random.normal(0, random.uniform(2, 10), canvas.shape)
    objects = [_annotation(shape, mask) for shape, mask in zip(shapes, visible, strict=True)]
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects


def _background(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw (h, w, 3) float32: a color gradient, smooth noise of three grain sizes, and sometimes stripes or squares."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    first, second = random.uniform(30, 225, (2, 3))
    angle = random.uniform(0, 2 * np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / max(height, width)
    canvas = first + (second - first) * np.clip(along - along.min(), 0, 1)[..., None]
    for grain in (3, 8, 20):
        coarse = random.uniform(-1, 1, (grain, grain)).astype(np.float32)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        canvas += smooth[..., None] * random.uniform(5, 25) * random.uniform(0.5, 1, 3)
    kind, period = random.integers(0, 4), random.uniform(6, 24)
    strength = random.uniform(8, 30) * random.uniform(0.3, 1, 3)
    across = (x * np.sin(angle) - y * np.cos(angle)) * 2 * np.pi / period
    if kind == 0:
        canvas += np.sin(across)[..., None] * strength
    elif kind == 1:
        canvas += (
            np.sign(np.sin(across) * np.sin(along * 2 * np.pi * max(height, width) / period))[..., None] * strength
        )
    return canvas.astype(np.float32)


def _draw_clutter(random: np.random.Generator, canvas: np.ndarray) -> None:
    """Paint a distractor, which belongs to no class: a stroke, an arc, a wobbly blob or an angle."""
    height, width = canvas.shape[:2]
    size = min(height, width)
    mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    thickness = int(SUPERSAMPLING * random.uniform(0.8, 3))
    center = random.uniform(0, 1, 2) * (width, height)
    kind = random.integers(0, 4)
    if kind == 0:
        ends = random.uniform(-0.2, 1.2, (2, 2)) * (width, height) * SUPERSAMPLING
        draw.line([tuple(end) for end in ends], 255, thickness)
    elif kind == 1:
        low, high = (center - random.uniform(0.05, 0.3) * size), (center + random.uniform(0.05, 0.3) * size)
        start = random.uniform(0, 360)
        box = [*(low * SUPERSAMPLING), *(high * SUPERSAMPLING)]
        draw.arc(box, start, start + random.uniform(40, 200), 255, thickness)
    elif kind == 2:
        turn = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        wobble = sum(random.uniform(0.1, 0.3) * np.sin(k * turn + random.uniform(0, 7)) for k in (2, 3, 4))
        radius = random.uniform(0.04, 0.14) * size * (1 + wobble)
        points = center + radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
        draw.polygon([tuple(point) for point in points * SUPERSAMPLING], 255)
    else:
        angles = random.uniform(0, 2 * np.pi) + np.array([0, random.uniform(0.6, 2.2)])
        tips = center + random.uniform(0.08, 0.25) * size * np.stack([np.cos(angles), np.sin(angles)], 1)
        points = np.stack([tips[0], center, tips[1]]) * SUPERSAMPLING
        draw.line([tuple(point) for point in points], 255, 2 * thickness, joint="curve")
    _paint(random, canvas, mask, random.uniform(20, 235, 3))


def _place(
    random: np.random.Generator, canvas: np.ndarray, visible: list[np.ndarray], full: list[float]
) -> tuple[str, np.ndarray, float] | None:
    """Paint an object where it does not occlude others too much.

    Returns:
        its shape, its visible mask on the supersampled grid, and the area of the full shape on that grid; None if
        there is no room.
    """
    height, width = canvas.shape[:2]
    for _ in range(8):  # attempts: a crowded image may have no room at all
        shape = SHAPES[random.integers(len(SHAPES))]
        radius = min(height, width) * np.exp(random.uniform(np.log(0.09), np.log(0.32)))
        center = random.uniform(0, 1, 2) * (width, height)
        outlines = [(center + radius * o) * SUPERSAMPLING for o in shape_outline(shape, random)]
        image = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
        draw = ImageDraw.Draw(image)
        for outline, fill in zip(outlines, (255, 0), strict=False):
            draw.polygon([tuple(point) for point in outline], fill)
        mask = np.asarray(image) > 0
        area = abs(polygon_area(outlines[0])) - sum(abs(polygon_area(hole)) for hole in outlines[1:])
        hidden = any((other & ~mask).sum() < MIN_VISIBLE * a for other, a in zip(visible, full, strict=True))
        if hidden or mask.sum() < max(MIN_INSIDE * area, 25 * SUPERSAMPLING**2):
            continue
        behind = canvas[mask[::SUPERSAMPLING, ::SUPERSAMPLING]]
        color = _contrasting(random, behind.mean(0) if len(behind) else canvas.mean((0, 1)))
        _paint(random, canvas, image, color)
        return shape, mask, area
    return None


def _contrasting(random: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """Draw a random color (3,) that differs clearly from the one behind it."""
    while True:
        color = random.uniform(15, 240, 3)
        if np.linalg.norm(color - behind) > MIN_CONTRAST:
            return color


def _paint(random: np.random.Generator, canvas: np.ndarray, mask: Image.Image, color: np.ndarray) -> None:
    """Blend a shaded, sometimes striped, color into the canvas with soft edges."""
    angle, slope, striped = random.uniform(0, 2 * np.pi), random.uniform(0, 0.5), random.random() < 0.3
    strength, period = random.uniform(0.08, 0.2), random.uniform(3, 10)
    small = mask.reduce(SUPERSAMPLING)
    extent = small.getbbox()
    if extent is None:
        return
    left, top, right, bottom = extent
    alpha = np.asarray(small.crop((left, top, right, bottom)), np.float32)[..., None] / 255
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    along = x * np.cos(angle) + y * np.sin(angle)
    shade = 1 + slope * (along - along.mean()) / max(right - left, bottom - top, 10)
    if striped:
        shade += strength * np.sin(along * 2 * np.pi / period)
    region = canvas[top:bottom, left:right]
    region += alpha * (color * shade[..., None] - region)


def _annotation(shape: str, visible: np.ndarray) -> dict[str, Any]:
    """Annotate a visible mask; the box is that of the polygons, which specks of the mask do not enlarge."""
    polygons = mask_polygons(visible, SUPERSAMPLING)
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return {
        "category_id": CATEGORY_IDS[shape],
        "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(float(visible.sum()) / SUPERSAMPLING**2, 2),
        "iscrowd": 0,
        "segmentation": polygons,
    }


def run(args: argparse.Namespace) -> int:
    """Run `make-dataset`: write the dataset and print a summary."""
    out = make_dataset(
        args.out,
        train=args.train,
        val=args.val,
        image_size=args.image_size,
        max_objects=args.max_objects,
        seed=args.seed,
    )
    for name in ("train", "val"):
        data = json.loads((out / "annotations" / f"{name}.json").read_text())
        print(f"{out}/annotations/{name}.json: {len(data['images']):,} images, {len(data['annotations']):,} objects")
    return 0


SHAPES = ("disc", "ring", "rectangle", "triangle", "star")


def shape_outline(shape: str, random: np.random.Generator) -> list[np.ndarray]:
    """Draw the outlines of a shape within the unit circle, randomly rotated and squeezed.

    Args:
        shape: one of `SHAPES`.
        random: source of all random numbers.

    Returns:
        closed outlines (k, 2), the outer one first, then holes.
    """
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    outlines = [circle]
    if shape == "ring":
        outlines.append(circle[::-1] * random.uniform(0.45, 0.65))
    elif shape == "rectangle":
        corner = np.array([1.0, random.uniform(0.5, 1.0)])
        outlines = [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * corner / np.hypot(*corner)]
    elif shape == "triangle":
        angles = 2 * np.pi / 3 * np.arange(3) + random.uniform(-0.3, 0.3, 3)
        outlines = [np.stack([np.cos(angles), np.sin(angles)], 1)]
    elif shape == "star":
        angles = np.pi / 5 * np.arange(10.0)
        radius = np.where(np.arange(10) % 2, random.uniform(0.38, 0.5), 1.0)
        outlines = [np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)]
    elif shape != "disc":
        raise ValueError(f"{shape} is not one of {', '.join(SHAPES)}")
    squeeze = np.diag([1.0, random.uniform(0.75, 1.0)])
    return [outline @ _rotation(random) @ squeeze @ spin for spin in [_rotation(random)] for outline in outlines]


def _rotation(random: np.random.Generator) -> np.ndarray:
    angle = random.uniform(0, 2 * np.pi)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def polygon_area(outline: np.ndarray) -> float:
    """Compute the signed area of a closed outline (k, 2) by the shoelace formula."""
    x, y = outline.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def mask_polygons(mask: np.ndarray, scale: float = 1.0, tolerance: float = 0.7, smallest: float = 4.0) -> list[list]:
    """Trace a mask as COCO's polygons; holes are joined to their outline by a cut of no width.

    Args:
        mask: (h, w) bool.
        scale: coordinates are divided by it.
        tolerance: how far, in pixels of the mask, the polygon may leave the pixel edges.
        smallest: parts and holes of a smaller area, in pixels of the mask, are left out.

    Returns:
        one flat list [x0, y0, x1, y1, ...] per part of the mask.
    """
    loops = [loop for loop in _pixel_loops(mask) if abs(polygon_area(loop)) >= smallest]
    parts = [loop for loop in loops if polygon_area(loop) > 0]
    holes = [loop for loop in loops if polygon_area(loop) < 0]
    parts, holes = ([_simplify(loop, tolerance) for loop in group] for group in (parts, holes))
    for hole in holes:
        distances = [np.linalg.norm(part[:, None] - hole[None], axis=2) for part in parts]
        nearest = int(np.argmin([distance.min() for distance in distances]))
        i, j = np.unravel_index(distances[nearest].argmin(), distances[nearest].shape)
        around = np.roll(hole, -j, axis=0)
        part = parts[nearest]
        parts[nearest] = np.concatenate([part[: i + 1], around, around[:1], part[i:]])
    return [np.round(part / scale, 2).ravel().tolist() for part in parts]


def _pixel_loops(mask: np.ndarray) -> list[np.ndarray]:
    """Trace closed paths along the pixel edges of a mask, which lies to the right: outlines have positive area."""
    if not mask.any():
        return []
    (top, bottom), (left, right_end) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    padded = np.pad(mask[top : bottom + 1, left : right_end + 1], 1)
    inner = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # (neighbor, start of the edge, its direction), going round a pixel clockwise as seen on the screen
    sides = (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    for neighbor, (dx, dy), step in sides:
        for y, x in np.argwhere(inner & ~neighbor).tolist():
            following.setdefault((int(left) + x + dx, int(top) + y + dy), []).append(step)
    loops = []
    while following:
        start = point = next(iter(following))
        step = following[start][0]
        path: list[tuple[int, int]] = []
        while True:
            steps = following[point]
            right = (-step[1], step[0])  # where two parts touch at a corner, stay with the one we follow
            turned = right if right in steps else steps[0] if step not in steps else step
            steps.remove(turned)
            if not steps:
                del following[point]
            if turned != step or not path:
                path.append(point)
            step = turned
            point = (point[0] + step[0], point[1] + step[1])
            if point == start:
                break
        loops.append(np.array(path, float))
    return loops


def _simplify(loop: np.ndarray, tolerance: float) -> np.ndarray:
    """Simplify a closed outline, cut at its two farthest points, by the algorithm of Douglas and Peucker."""
    far = int(np.linalg.norm(loop - loop[0], axis=1).argmax())
    closed = np.concatenate([loop, loop[:1]])
    keep = np.zeros(len(closed), bool)
    keep[[0, far, -1]] = True
    pending = [(0, far), (far, len(closed) - 1)]
    while pending:
        a, b = pending.pop()
        if b - a < 2:
            continue
        (px, py), (qx, qy) = closed[a], closed[b]
        x, y = closed[a + 1 : b].T
        distance = np.abs((qx - px) * (y - py) - (qy - py) * (x - px)) / max(np.hypot(qx - px, qy - py), 1e-9)
        worst = int(distance.argmax())
        if distance[worst] > tolerance:
            middle = a + 1 + worst
            keep[middle] = True
            pending += [(a, middle), (middle, b)]
    return closed[:-1][keep[:-1]]
