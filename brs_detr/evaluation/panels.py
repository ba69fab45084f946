"""Diagrams of lines with axes and a legend, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

from brs_detr.evaluation.drawing import GREY, GRID, INK, PAPER, Colour, font, text_width

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
        draw.text((box[0] * s - 8 * s, y), tick_text(tick), fill=GREY, font=small, anchor="rm")
    for tick in nice_ticks(left, right, 8):
        x = place(tick, low)[0]
        draw.line((x, box[3] * s, x, box[3] * s + 4 * s), fill=GREY, width=s)
        draw.text((x, (box[3] + 8) * s), tick_text(tick), fill=GREY, font=small, anchor="mt")
    draw.line((box[0] * s, box[3] * s, box[2] * s, box[3] * s), fill=GREY, width=s)
    draw.text((box[2] * s, (box[3] + 28) * s), panel.x_name, fill=GREY, font=small, anchor="rt")


def _draw_legend(draw: ImageDraw.ImageDraw, entries: list, corner: tuple[int, int]) -> None:
    s, small = SHARPNESS, font(12 * SHARPNESS)
    for offset, row, text, line in entries:
        x, y = (corner[0] + offset) * s, (corner[1] + row * LEGEND_STEP) * s
        if line is None:
            draw.text((x, y), text, fill=GREY, font=small, anchor="lm")
        else:
            draw.line((x, y, x + 14 * s, y), fill=line.tone, width=3 * s)
            draw.text((x + 19 * s, y), text, fill=INK, font=small, anchor="lm")
