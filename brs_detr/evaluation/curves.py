"""Curves of a run as one picture: loss, its parts, average precision and learning rate; and precision over recall."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from brs_detr.evaluation.drawing import INK, colour, faint
from brs_detr.evaluation.panels import Line, Panel, Points, draw_panels


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
    curves: Mapping[str, Sequence[float]], out_png: str | Path | None = None, most: int = 10
) -> Image.Image:
    """Precision over recall at IoU 0.5, one curve a class and their mean, each named with its area, AP50.

    Args:
        curves: by class name, precision at recalls evenly spaced from 0 to 1, as in `Summary.curves`.
        out_png: where to save the picture, if anywhere.
        most: classes drawn; the first ones. The mean is that of all.
    """
    shown = {name: (curve, colour(index), 2.0) for index, (name, curve) in enumerate(list(curves.items())[:most])}
    if len(curves) > 1:
        means = [statistics.fmean(values) for values in zip(*curves.values(), strict=True)]
        shown = {f"all {len(curves)} classes": (means, INK, 3.2)} | shown
    lines = []
    for name, (curve, tone, width) in shown.items():
        points = [(index / (len(curve) - 1), value) for index, value in enumerate(curve)]
        lines.append(Line(f"{name} {100 * statistics.fmean(curve):.1f}", points, tone, width=width))
    title = "precision over recall, IoU 0.5, and AP50" + (f" (first {most} classes)" if len(curves) > most else "")
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
    """The running median over `span` points, centred, shorter at both ends; one spike leaves no trace in it."""
    values, half = [y for _, y in points], span // 2
    return [(x, statistics.median(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


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


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _save(picture: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return picture
