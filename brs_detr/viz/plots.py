"""Plots of a run: loss curves, precision over recall, the confusion matrix.

Diagrams of lines with axes and a legend, drawn with Pillow alone.

A confusion matrix as an image: counts where there is room for them, shares as color.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from brs_detr.evaluation.matching import BACKGROUND, MISSED, Confusion
from brs_detr.viz.boxes import GRAY, GRID, INK, PAPER, Color, color, faint, font, ink_on, text_width


def draw_curves(metrics: str | Path | Sequence[Mapping[str, Any]], out_png: str | Path | None = None) -> Image.Image:
    """Draw what a run logged.

    Args:
        metrics: a `metrics.jsonl`, or its records: `{"kind": "train" | "val", "step", "epoch", ...}`, training records
            with `loss`, `lr` and `terms`, validation records with `AP` and so on. Records that lack any of it are
            passed over.
        out_png: where to save the image, if anywhere.

    Returns:
        The image, with a panel for everything that was logged.
    """
    records = read_records(metrics) if isinstance(metrics, str | Path) else list(metrics)
    train = [record for record in records if record.get("kind") == "train"]
    val = [record for record in records if record.get("kind") == "val"]
    by_epoch = bool(train or val) and all(_number(record.get("epoch")) for record in train + val)
    key, x_name = ("epoch", "epoch") if by_epoch else ("step", "step")
    panels = [_loss_panel(train, key, x_name), _terms_panel(train, key, x_name)]
    panels.append(_precision_panel(val, key, x_name))
    rate = Line("learning rate", _points(train, key, "lr"), color(4))
    panels.append(Panel("learning rate", x_name, [rate], low=0))
    panels = [panel for panel in panels if any(line.points for line in panel.lines)]
    return _save(draw_panels(panels or [Panel("nothing has been logged yet", x_name)]), out_png)


def draw_precision_recall(
    curves: Mapping[str, Sequence[float]], out_png: str | Path | None = None, max_classes: int = 10
) -> Image.Image:
    """Precision over recall at IoU 0.5, one curve a class and their mean, each named with its area, AP50.

    Args:
        curves: by class name, precision at recalls evenly spaced from 0 to 1, as in `Summary.curves`.
        out_png: where to save the image, if anywhere.
        max_classes: classes drawn; the first ones. The mean is that of all.
    """
    shown = {name: (curve, color(index), 2.0) for index, (name, curve) in enumerate(list(curves.items())[:max_classes])}
    if len(curves) > 1:
        means = [statistics.fmean(values) for values in zip(*curves.values(), strict=True)]
        shown = {f"all {len(curves)} classes": (means, INK, 3.2)} | shown
    lines = []
    for name, (curve, tone, width) in shown.items():
        points = [(index / (len(curve) - 1), value) for index, value in enumerate(curve)]
        lines.append(Line(f"{name} {100 * statistics.fmean(curve):.1f}", points, tone, width=width))
    title = "precision over recall, IoU 0.5, and AP50" + (
        f" (first {max_classes} classes)" if len(curves) > max_classes else ""
    )
    return _save(draw_panels([Panel(title, "recall", lines, low=0, high=1, span=(0, 1))]), out_png)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a json-lines file; a line cut short by a kill, or damaged, is passed over."""
    records = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def smoothed(points: Points, span: int) -> Points:
    """The running median over `span` points, centered, shorter at both ends; one spike leaves no trace in it."""
    values, half = [y for _, y in points], span // 2
    return [(x, statistics.median(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def _loss_panel(train: list, key: str, x_name: str) -> Panel:
    raw = _points(train, key, "loss")
    lines = [Line("loss", raw, color(0))]
    if len(raw) > 30:
        smooth = smoothed(raw, max(5, len(raw) // 25))
        lines = [
            Line("each report", raw, faint(color(0)), width=1.2),
            Line("running median", smooth, color(0), width=2.4),
        ]
    return Panel("training loss", x_name, lines, low=0, high=_robust_top(raw))


def _terms_panel(train: list, key: str, x_name: str) -> Panel:
    """The loss terms summed by the head they belong to, the part of their name before the first dot."""
    heads: dict[str, Points] = defaultdict(list)
    for record in train:
        sums: dict[str, float] = defaultdict(float)
        for name, value in (record.get("terms") or {}).items():
            if _number(value) and name != "gradient_norm":
                sums[name.partition(".")[0]] += value
        for head, value in sums.items():
            if _number(record.get(key)):
                heads[head].append((record[key], value))
    lines = []
    for index, (name, points) in enumerate(heads.items()):
        lines.append(Line(name, smoothed(points, max(1, len(points) // 25)), color(index)))
    high = max((_robust_top(line.points) or 0 for line in lines), default=0)
    return Panel("loss by head", x_name, lines, low=0, high=high or None)


def _precision_panel(val: list, key: str, x_name: str) -> Panel:
    lines = []
    for index, name in enumerate(("AP", "AP50", "AP75")):
        points = [(x, y * 100) for x, y in _points(val, key, name) if y >= 0]
        best = f" (best {max(y for _, y in points):.1f})" if points else ""
        lines.append(Line(name + best, points, color(index), dots=True))
    return Panel("average precision, in %", x_name, lines, low=0)


def _points(records: list, key: str, name: str) -> Points:
    return [(r[key], r[name]) for r in records if _number(r.get(key)) and _number(r.get(name))]


def _robust_top(points: Points) -> float | None:
    """Above nearly all values: one early spike must not flatten the rest."""
    values = sorted(y for _, y in points)
    if not values:
        return None
    usual = values[int((len(values) - 1) * 0.95)]
    return min(values[-1] * 1.06, usual * 1.6) or None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _save(image: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return image


SHARPNESS = 2  # drawn larger and shrunk, which smooths the lines
PANEL = (640, 400)
MARGIN = {"left": 66, "right": 20, "top": 74, "bottom": 50}
LEGEND_ROWS, LEGEND_STEP = 3, 18  # most rows, and pixels from one to the next

Points = list[tuple[float, float]]


@dataclass
class Line:
    """One curve: its name, (x, y) points by ascending x, and whether each point gets a dot."""

    name: str
    points: Points
    tone: Color
    dots: bool = False
    width: float = 2.0


@dataclass
class Panel:
    """One diagram. `low` and `high` fix the ends of the y axis where given, `span` those of the x axis."""

    title: str
    x_name: str
    lines: list[Line] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    span: tuple[float, float] | None = None


def draw_panels(panels: Sequence[Panel]) -> Image.Image:
    """Panels two abreast, smooth lines, axes with round numbers."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    wide, high = PANEL
    sheet = Image.new("RGB", (columns * wide * SHARPNESS, rows * high * SHARPNESS), PAPER)
    for index, panel in enumerate(panels):
        corner = (index % columns * wide, index // columns * high)
        _draw_panel(ImageDraw.Draw(sheet), panel, *corner)
    return sheet.resize((columns * wide, rows * high), Image.Resampling.LANCZOS)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """12000 -> `12,000`; 0.25 -> `0.25`; 0.00015 -> `1.5e-4`."""
    if value == 0 or abs(value) >= 0.001:
        return f"{value:,.6g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**power:.3g}e{power}"


def legend(panel: Panel) -> list[tuple[int, int, str, Line | None]]:
    """(x from the left end of the axes, row, text, line) of each entry; the last one counts those without a place."""
    lines = [line for line in panel.lines if line.points]
    if len(lines) < 2 and not any(line.dots for line in lines):
        return []
    room, entries, x, row = PANEL[0] - MARGIN["left"] - 10, [], 0, 0
    for index, line in enumerate(lines):
        wide = text_width(line.name, 12) + 34
        more = f"and {len(lines) - index} more"
        if row + 1 == LEGEND_ROWS and index + 1 < len(lines) and x + wide + text_width(more, 12) > room:
            return [*entries, (x, row, more, None)]
        if x and x + wide > room:
            x, row = 0, row + 1
        entries.append((x, row, line.name, line))
        x += wide
    return entries


def _limits(panel: Panel) -> tuple[float, float, float, float]:
    """(lowest x, highest x, lowest y, highest y) of the axes, never of no extent."""
    xs = [x for line in panel.lines for x, _ in line.points] or [0.0, 1.0]
    ys = [y for line in panel.lines for _, y in line.points] or [0.0, 1.0]
    left, right = panel.span or (min(xs), max(xs))
    if left == right:
        left, right = left - 0.5, right + 0.5
    elif 0 < left < right * 0.1:
        left = 0
    low = min(ys) if panel.low is None else panel.low
    high = max(ys) * 1.06 if panel.high is None else panel.high
    return left, right, low, high if high > low else low + 1


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, x0: int, y0: int) -> None:
    s = SHARPNESS
    left, right, low, high = _limits(panel)
    entries = legend(panel)
    top = y0 + MARGIN["top"] + LEGEND_STEP * max((row for _, row, _, _ in entries), default=0)
    box = (x0 + MARGIN["left"], top, x0 + PANEL[0] - MARGIN["right"], y0 + PANEL[1] - MARGIN["bottom"])

    def place(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, low), high)
        across = box[0] + (x - left) / (right - left) * (box[2] - box[0])
        return across * s, (box[3] - (y - low) / (high - low) * (box[3] - box[1])) * s

    draw.text((box[0] * s, (y0 + 18) * s), panel.title, fill=INK, font=font(17 * s))
    _draw_axes(draw, panel, box, place, (left, right, low, high))
    for line in panel.lines:
        spots = [place(x, y) for x, y in line.points]
        if len(spots) > 1:
            draw.line(spots, fill=line.tone, width=round(line.width * s), joint="curve")
        if line.dots or len(spots) == 1:
            for x, y in spots:
                r = 3.2 * s
                draw.ellipse((x - r, y - r, x + r, y + r), fill=line.tone, outline=PAPER, width=s)
    _draw_legend(draw, entries, (box[0], y0 + MARGIN["top"] - 21))


def _draw_axes(draw: ImageDraw.ImageDraw, panel: Panel, box: tuple, place: Any, limits: tuple) -> None:
    s, small = SHARPNESS, font(12 * SHARPNESS)
    left, right, low, high = limits
    for tick in nice_ticks(low, high):
        y = place(left, tick)[1]
        draw.line((box[0] * s, y, box[2] * s, y), fill=GRID, width=s)
        draw.text((box[0] * s - 8 * s, y), tick_text(tick), fill=GRAY, font=small, anchor="rm")
    for tick in nice_ticks(left, right, 8):
        x = place(tick, low)[0]
        draw.line((x, box[3] * s, x, box[3] * s + 4 * s), fill=GRAY, width=s)
        draw.text((x, (box[3] + 8) * s), tick_text(tick), fill=GRAY, font=small, anchor="mt")
    draw.line((box[0] * s, box[3] * s, box[2] * s, box[3] * s), fill=GRAY, width=s)
    draw.text((box[2] * s, (box[3] + 28) * s), panel.x_name, fill=GRAY, font=small, anchor="rt")


def _draw_legend(draw: ImageDraw.ImageDraw, entries: list, corner: tuple[int, int]) -> None:
    s, small = SHARPNESS, font(12 * SHARPNESS)
    for offset, row, text, line in entries:
        x, y = (corner[0] + offset) * s, (corner[1] + row * LEGEND_STEP) * s
        if line is None:
            draw.text((x, y), text, fill=GRAY, font=small, anchor="lm")
        else:
            draw.line((x, y, x + 14 * s, y), fill=line.tone, width=3 * s)
            draw.text((x + 19 * s, y), text, fill=INK, font=small, anchor="lm")


RIGHT, WRONG, NOTHING = (31, 119, 180), (208, 64, 40), (96, 104, 114)  # found, found as another class, missed or false
CELL_SIDES = ((8, 72), (14, 56), (25, 40), (45, 24), (90, 14))  # (most rows, side of a cell in pixels)
LARGEST = 1260  # side of the matrix in pixels with more rows
MIN_SIDE_NAMES, MIN_SIDE_COUNTS, MIN_SIDE_SHARES = 13, 24, 56  # sides from which names, counts and shares are written
GAP, EDGE, LONGEST_NAME, MIN_WIDTH = 6, 20, 150, 640


def draw_confusion(confusion: Confusion, out_png: str | Path | None = None) -> Image.Image:
    """Draw a confusion matrix: a row for each true class and the background, a column for each found class and missed.

    Blue is found, red found as another class, gray missed or without an object; the darker, the larger the share of
    the row's objects or, of background, of what was found as the column's class. Names and counts are left out where
    cells are too small for them.

    Args:
        confusion: C classes.
        out_png: where to save the image, if anywhere.
    """
    side = _cell_side(len(confusion.classes) + 1)
    text = min(13, side - 3)
    title = "confusion matrix at IoU 0.5, at each class's score of best F1"
    names = (
        [_shortened(name, text) for name in (*confusion.classes, BACKGROUND, MISSED)] if side >= MIN_SIDE_NAMES else []
    )
    margin = max((text_width(name, text) for name in names), default=0) + 10
    corner = (EDGE + 18 + margin, EDGE + 74 + margin)
    extent = (len(confusion.classes) + 1) * side + GAP
    width = max(corner[0] + extent + EDGE, MIN_WIDTH)
    image = Image.new("RGB", (width, corner[1] + extent + EDGE), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((EDGE, 14), title, fill=INK, font=font(17))
    _draw_key(draw, (EDGE, 46))
    draw.text((corner[0], EDGE + 52), "found as", fill=GRAY, font=font(12))
    _upright(image, "true class", 12, GRAY, (EDGE - 4, corner[1]), below=True)
    _draw_cells(draw, confusion.counts, corner, side)
    for index, name in enumerate(names[:-1]):
        y = corner[1] + _offset(index, side, len(confusion.classes)) + side / 2
        draw.text((corner[0] - 6, y), name, fill=INK, font=font(text), anchor="rm")
    for index, name in enumerate([*names[:-2], *names[-1:]]):
        x = corner[0] + _offset(index, side, len(confusion.classes)) + side / 2
        _upright(image, name, text, INK, (x, corner[1] - 4))
    if out_png is not None:
        Path(out_png).parent.mkdir(parents=True, exist_ok=True)
        image.save(out_png)
    return image


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
    draw.text((x, y + 6), "share of row; background: of column", fill=GRAY, font=font(12), anchor="lm")


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
        if counts[row, column] and side >= MIN_SIDE_COUNTS:
            _write(draw, (x + side / 2, y + side / 2), counts[row, column], shares[row, column], side, ink_on(fill))


def _write(
    draw: ImageDraw.ImageDraw, center: tuple[float, float], count: int, share: float, side: int, ink: Color
) -> None:
    """The count in the middle of a cell, over its share where there is room."""
    (x, y), two = center, side >= MIN_SIDE_SHARES
    text, size = f"{count:,}", 15 if two else 11
    if text_width(text, size) > side - 4:
        return
    draw.text((x, y - 8 * two), text, fill=ink, font=font(size), anchor="mm")
    if two:
        draw.text((x, y + 11), f"{share:.0%}", fill=ink, font=font(11), anchor="mm")


def _blend(tone: Color, share: float) -> Color:
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
    image: Image.Image, text: str, size: int, ink: Color, place: Sequence[float], *, below: bool = False
) -> None:
    """Text read from below, centered on x; it ends at y, or begins there if `below`."""
    line = Image.new("L", (text_width(text, size) + 2, size + 6), 0)
    ImageDraw.Draw(line).text((1, (size + 6) / 2), text, fill=255, font=font(size), anchor="lm")
    line = line.rotate(90, expand=True)
    x, y = place
    spot = (round(x - line.width / 2), round(y if below else y - line.height))
    image.paste(Image.new("RGB", line.size, ink), spot, line)
