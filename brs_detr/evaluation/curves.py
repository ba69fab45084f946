"""Curves of a run as one picture: loss, its parts, average precision and learning rate; and precision over recall."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from brs_detr.evaluation.drawing import GREY, GRID, INK, PAPER, Colour, colour, faint, font, text_width

SHARPNESS = 2  # drawn larger and shrunk, which smooths the lines
PANEL = (640, 400)
MARGIN = {"left": 66, "right": 20, "top": 74, "bottom": 50}

Points = list[tuple[float, float]]


@dataclass
class Line:
    """One curve: its name, (x, y) points by ascending x, and whether each point gets a dot."""

    name: str
    points: Points
    tone: Colour
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


def draw_curves(metrics: str | Path | Sequence[Mapping[str, Any]], out_png: str | Path | None = None) -> Image.Image:
    """Draw what a run logged.

    Args:
        metrics: a `metrics.jsonl`, or its records: `{"kind": "train" | "val", "step", "epoch", ...}`, training records
            with `loss`, `lr` and `terms`, validation records with `AP` and so on. Records that lack any of it are
            passed over.
        out_png: where to save the picture, if anywhere.

    Returns:
        The picture, with a panel for everything that was logged.
    """
    records = read_records(metrics) if isinstance(metrics, str | Path) else list(metrics)
    train = [record for record in records if record.get("kind") == "train"]
    val = [record for record in records if record.get("kind") == "val"]
    by_epoch = bool(train or val) and all(_number(record.get("epoch")) for record in train + val)
    key, x_name = ("epoch", "epoch") if by_epoch else ("step", "step")
    panels = [_loss_panel(train, key, x_name), _terms_panel(train, key, x_name)]
    panels.append(_precision_panel(val, key, x_name))
    rate = Line("learning rate", _points(train, key, "lr"), colour(4))
    panels.append(Panel("learning rate", x_name, [rate], low=0))
    panels = [panel for panel in panels if any(line.points for line in panel.lines)]
    return _save(draw_panels(panels or [Panel("nothing has been logged yet", x_name)]), out_png)


def draw_precision_recall(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], out_png: str | Path | None = None, most: int = 10
) -> Image.Image:
    """Precision over recall at IoU 0.5, one curve a class.

    Args:
        curves: by class name, (precision, recall) of equal length, as in `Summary.curves`.
        out_png: where to save the picture, if anywhere.
        most: classes drawn; the first ones.
    """
    lines = []
    for index, (name, (precision, recall)) in enumerate(list(curves.items())[:most]):
        points = sorted(zip(recall, precision, strict=True), key=lambda point: point[0])
        lines.append(Line(name, _thin(points, 400), colour(index)))
    title = "precision over recall, IoU 0.5" + (f" (first {most} classes)" if len(curves) > most else "")
    return _save(draw_panels([Panel(title, "recall", lines, low=0, high=1, span=(0, 1))]), out_png)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a json-lines file; a line cut short by a kill is passed over."""
    records = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def smoothed(points: Points, span: int) -> Points:
    """The running median over `span` points, centred, shorter at both ends; one spike leaves no trace in it."""
    values, half = [y for _, y in points], span // 2
    return [(x, statistics.median(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


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


def _loss_panel(train: list, key: str, x_name: str) -> Panel:
    raw = _points(train, key, "loss")
    lines = [Line("loss", raw, colour(0))]
    if len(raw) > 30:
        smooth = smoothed(raw, max(5, len(raw) // 25))
        lines = [
            Line("each report", raw, faint(colour(0)), width=1.2),
            Line("running median", smooth, colour(0), width=2.4),
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
        lines.append(Line(name, smoothed(points, max(1, len(points) // 25)), colour(index)))
    high = max((_robust_top(line.points) or 0 for line in lines), default=0)
    return Panel("loss by head", x_name, lines, low=0, high=high or None)


def _precision_panel(val: list, key: str, x_name: str) -> Panel:
    lines = []
    for index, name in enumerate(("AP", "AP50", "AP75")):
        points = [(x, y * 100) for x, y in _points(val, key, name) if y >= 0]
        best = f" (best {max(y for _, y in points):.1f})" if points else ""
        lines.append(Line(name + best, points, colour(index), dots=True))
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


def _thin(points: Points, most: int) -> Points:
    return points if len(points) <= most else [points[i * (len(points) - 1) // (most - 1)] for i in range(most)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _save(picture: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return picture


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
    box = (x0 + MARGIN["left"], y0 + MARGIN["top"], x0 + PANEL[0] - MARGIN["right"], y0 + PANEL[1] - MARGIN["bottom"])

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
    _draw_legend(draw, panel, box)


def _draw_axes(draw: ImageDraw.ImageDraw, panel: Panel, box: tuple, place: Any, limits: tuple) -> None:
    s, small = SHARPNESS, font(12 * SHARPNESS)
    left, right, low, high = limits
    for tick in nice_ticks(low, high):
        y = place(left, tick)[1]
        draw.line((box[0] * s, y, box[2] * s, y), fill=GRID, width=s)
        draw.text((box[0] * s - 8 * s, y), tick_text(tick), fill=GREY, font=small, anchor="rm")
    for tick in nice_ticks(left, right, 8):
        x = place(tick, low)[0]
        draw.line((x, box[3] * s, x, box[3] * s + 4 * s), fill=GREY, width=s)
        draw.text((x, (box[3] + 8) * s), tick_text(tick), fill=GREY, font=small, anchor="mt")
    draw.line((box[0] * s, box[3] * s, box[2] * s, box[3] * s), fill=GREY, width=s)
    draw.text((box[2] * s, (box[3] + 28) * s), panel.x_name, fill=GREY, font=small, anchor="rt")


def _draw_legend(draw: ImageDraw.ImageDraw, panel: Panel, box: tuple) -> None:
    lines = [line for line in panel.lines if line.points]
    if len(lines) < 2 and not any(line.dots for line in lines):
        return
    s, x = SHARPNESS, box[0]
    for index, line in enumerate(lines):
        wide = text_width(line.name, 12) + 34
        if x + wide > box[2] + 10:
            left = len(lines) - index
            draw.text((x * s, (box[1] - 21) * s), f"and {left} more", fill=GREY, font=font(12 * s), anchor="lm")
            return
        y = (box[1] - 21) * s
        draw.line((x * s, y, (x + 14) * s, y), fill=line.tone, width=3 * s)
        draw.text(((x + 19) * s, y), line.name, fill=INK, font=font(12 * s), anchor="lm")
        x += wide
