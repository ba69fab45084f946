"""Outlines of masks as COCO polygons, and the outlines of the shapes that the synthetic scenes show."""

from __future__ import annotations

import numpy as np

SHAPES = ("disc", "ring", "rectangle", "triangle", "star")


def shape_outline(shape: str, random: np.random.Generator) -> list[np.ndarray]:
    """A random member of a family of shapes: turned, squeezed, inside the unit circle.

    Args:
        shape: one of `SHAPES`.
        random: source of the variation.

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
        angles = np.pi / 5 * np.arange(10)
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
    """Signed area of a closed outline (k, 2), by the shoelace formula."""
    x, y = outline.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def mask_polygons(mask: np.ndarray, scale: float = 1.0, tolerance: float = 0.7, smallest: float = 4.0) -> list[list]:
    """Polygons of a mask in COCO's form; holes are joined to their outline by a cut of no width.

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
    """Closed paths along the pixel edges of a mask, the mask to the right of each: outlines have positive area."""
    if not mask.any():
        return []
    (top, bottom), (left, right_end) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    padded = np.pad(mask[top : bottom + 1, left : right_end + 1], 1)
    inner = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # (neighbour, start of the edge, its direction), going round a pixel clockwise as seen on the screen
    sides = (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    for neighbour, (dx, dy), step in sides:
        for y, x in np.argwhere(inner & ~neighbour).tolist():
            following.setdefault((int(left) + x + dx, int(top) + y + dy), []).append(step)
    loops = []
    while following:
        start = point = next(iter(following))
        step, path = following[start][0], []
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
    """Douglas and Peucker's line simplification of a closed outline, cut at its two farthest points."""
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
