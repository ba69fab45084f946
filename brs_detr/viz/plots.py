"""Plots of a run with matplotlib: losses and AP over time, precision over recall, the confusion matrix.

Figures are built without pyplot, so nothing needs a display and no state is left behind; matplotlib's default style is
used whatever the user's matplotlibrc says, because `text.usetex` or a `$` in a class name would make drawing fail.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from brs_detr.evaluation.matching import BACKGROUND, MISSED, Confusion
from brs_detr.viz.boxes import color, ink_on, short_name

DPI = 100
PANEL = (6.4, 4.0)  # inches
MAX_LEGEND = 12  # entries
FEW_CURVES = 4  # whose legend has room inside the panel
MAX_SMOOTHED = 2000  # points of a smoothed curve, more than a panel has pixels
MAX_FLOAT32 = 3.4e38
# DejaVu Sans comes with matplotlib; glyphs that it lacks are taken from these where they are installed
OTHER_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
STYLE = {
    "font.family": ["DejaVu Sans", *(name for name in OTHER_FONTS if name in get_font_names())],
    "font.size": 9,
    "text.parse_math": False,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "legend.fontsize": 8,
    "legend.framealpha": 0.85,
    "figure.dpi": DPI,
}
_styled = matplotlib.style.context(["default", STYLE])  # decorates a function

Points = list[tuple[float, float]]
Curve = tuple[str, Points, dict[str, Any]]  # name in the legend, (x, y) by ascending x, options of `Axes.plot`


@dataclass
class Panel:
    """One diagram.

    Attributes:
        title: over it.
        curves: those without points are left out.
        top: upper end of the y axis (default: that of the curves); the lower end is 0.
        legend: where it is; a single curve gets one only in "lower right", one of many curves is beside the panel.
    """

    title: str
    curves: list[Curve]
    top: float | None = None
    legend: Literal["upper right", "lower right"] = "upper right"


@_styled
def draw_curves(records: Sequence[Mapping[str, Any]], out_png: str | Path | None = None) -> Figure:
    """Draw what a run logged.

    Args:
        records: of a `metrics.jsonl`: `{"kind": "train" | "val", "step", "epoch", ...}`, training records with `loss`,
            `lr` and `terms`, validation records with `AP` and so on. Records that lack any of it are passed over.
        out_png: where to save the image, if anywhere.

    Returns:
        The figure, with a panel for everything that was logged.
    """
    train = [record for record in records if record.get("kind") == "train"]
    val = [record for record in records if record.get("kind") == "val"]
    x_name = "epoch" if all(_is_number(record.get("epoch")) for record in train + val) else "step"
    rate = Panel("learning rate", [("learning rate", _points(train, x_name, "lr"), {"color": _rgb(4)})])
    panels = [_loss_panel(train, x_name), _terms_panel(train, x_name), _precision_panel(val, x_name), rate]
    panels = [panel for panel in panels if any(points for _, points, _ in panel.curves)]
    panels = panels or [Panel("nothing has been logged yet", [])]
    columns, rows = min(2, len(panels)), math.ceil(len(panels) / 2)
    figure = Figure((columns * PANEL[0], rows * PANEL[1]), layout="constrained")
    for index, panel in enumerate(panels):
        _plot_panel(figure.add_subplot(rows, columns, index + 1), panel, x_name)
    return _save(figure, out_png)


@_styled
def draw_precision_recall(
    curves: Mapping[str, Sequence[float]], out_png: str | Path | None = None, max_classes: int = 10
) -> Figure:
    """Draw precision over recall at IoU 0.5: a curve for each class and their mean, with the area below it, AP50.

    Args:
        curves: by class name, precision at recalls evenly spaced from 0 to 1, as in `Summary.curves`.
        out_png: where to save the image, if anywhere.
        max_classes: number of classes drawn; the first ones. The mean is over all classes.

    Returns:
        The figure.
    """
    figure = Figure((8.8, 5.0), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("precision over recall at IoU 0.5" + f" (first {max_classes})" * (len(curves) > max_classes))
    axes.grid()
    shown: list[tuple[str, Any, dict[str, Any]]] = []
    for index, (name, curve) in enumerate(islice(curves.items(), max_classes)):
        shown.append((name, curve, {"color": _rgb(index)}))
    if len(curves) > 1:
        mean = np.mean(list(curves.values()), axis=0)
        shown.insert(0, (f"all {len(curves)} classes", mean, {"color": "black", "linewidth": 2.5}))
    lines = [axes.plot(np.linspace(0, 1, len(curve)), curve, **options)[0] for _, curve, options in shown]
    if lines:
        legend = figure.legend(lines, [str(i) for i in range(len(lines))], loc="outside right upper", title="AP50")
        _set_names(legend, [f"{short_name(name)}: {100 * np.mean(curve):.1f}" for name, curve, _ in shown])
    return _save(figure, out_png)


@_styled
def draw_score_study(rows: Sequence[Mapping[str, float]], out_png: str | Path | None = None) -> Figure:
    """Draw AP and the number of detections per image over the score threshold.

    Args:
        rows: as `Summary.score_study`: `score`, `detections`, `AP` and, with masks, `mask_AP`.
        out_png: where to save the image, if anywhere.

    Returns:
        The figure.
    """
    figure = Figure(PANEL, layout="constrained")
    # a linear part below the smallest threshold: 0 has no logarithm
    smallest = min((row["score"] for row in rows if row["score"] > 0), default=1e-4)
    axes = figure.add_subplot(xlabel="score threshold", ylabel="AP", ylim=(0, 1))
    axes.set_xscale("symlog", linthresh=smallest)
    axes.set_title("AP and detections over the score threshold")
    axes.grid()
    scores = [row["score"] for row in rows]
    kinds = [(name, key) for name, key in (("box AP", "AP"), ("mask AP", "mask_AP")) if rows and key in rows[0]]
    lines = [
        axes.plot(scores, [max(row[key], 0) for row in rows], marker="o", color=_rgb(i))[0]
        for i, (_, key) in enumerate(kinds)
    ]
    counts = axes.twinx()
    counts.set_ylabel("detections per image")
    lines += counts.plot(scores, [row["detections"] for row in rows], marker=".", linestyle="--", color="gray")
    axes.legend(lines, [*(name for name, _ in kinds), "detections"], loc="lower left")
    return _save(figure, out_png)


@_styled
def draw_reliability(bins: Sequence[Mapping[str, Any]], out_png: str | Path | None = None) -> Figure:
    """Draw precision over the score, raw and calibrated: on the diagonal a score of 0.8 means 80 in 100 are right.

    Args:
        bins: as `Reliability.bins`. A point's area grows with the number of its detections.
        out_png: where to save the image, if anywhere.

    Returns:
        The figure.
    """
    figure = Figure((6.0, 5.6), layout="constrained")
    axes = figure.add_subplot(
        xlabel="mean score of the bin", ylabel="precision at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02)
    )
    axes.set_title("reliability of the scores, on images that the map was not fitted on")
    axes.grid()
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1, label="exact")
    for index, (name, text) in enumerate((("raw", "raw scores"), ("calibrated", "calibrated scores"))):
        rows = [row for row in bins if row["scores"] == name]
        total = max(sum(row["detections"] for row in rows), 1)
        x, y = [row["confidence"] for row in rows], [row["precision"] for row in rows]
        axes.plot(x, y, color=_rgb(index), label=text)
        axes.scatter(x, y, s=[20 + 400 * row["detections"] / total for row in rows], color=_rgb(index), alpha=0.6)
        if name == "calibrated":
            quality = [row["quality"] for row in rows]
            axes.plot(x, quality, color=_rgb(index), linestyle=":", label="precision x IoU, LaECE's target")
    axes.legend(loc="upper left")
    return _save(figure, out_png)


@_styled
def draw_confusion(confusion: Confusion, out_png: str | Path | None = None) -> Figure:
    """Draw a confusion matrix: a row for each true class and the background, a column for each found class and missed.

    Blue is correct, red detected as another class, gray missed or without an object; the darker, the larger the share
    of the row's objects or, in the background row, of the column's detections. Names and counts are left out where
    cells are too small for them.

    Args:
        confusion: C classes.
        out_png: where to save the image, if anywhere.

    Returns:
        The figure.
    """
    rows = len(confusion.counts)
    side = min(max(1260 / rows, 1), 120 if rows <= 2 else 72)  # of a cell, in pixels
    names = [short_name(name) for name in (*confusion.classes, BACKGROUND, MISSED)] if side >= 13 else []
    extent = rows * side / DPI
    figure = Figure((max(extent + 2.6, 6.4), max(extent + 2.8, 4.0)), layout="constrained")
    axes = figure.add_subplot(xlabel="detected as", ylabel="ground truth")
    shares = confusion.counts / np.maximum(confusion.counts.sum(1, keepdims=True), 1)
    shares[-1] = confusion.counts[-1] / np.maximum(confusion.counts.sum(0), 1)
    colors = _cell_colors(shares)
    axes.imshow(colors, interpolation="nearest")
    axes.axhline(rows - 1.5, color="black", linewidth=0.8)
    axes.axvline(rows - 1.5, color="black", linewidth=0.8)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    size = min(9, side * 0.55)
    axes.set_xticks(range(len(names[:-1])), [*names[:-2], *names[-1:]], rotation=90, fontsize=size)
    axes.set_yticks(range(len(names[:-1])), names[:-1], fontsize=size)
    axes.tick_params(length=0)
    if side >= 26:
        _write_counts(axes, confusion.counts, shares, colors, side)
    figure.suptitle("confusion matrix at IoU 0.5, each class at its score of best F1", fontsize=11)
    kinds = zip(("correct", "another class", "missed, or no object there"), KINDS, strict=True)
    patches = [Patch(color=(red / 255, green / 255, blue / 255), label=text) for text, (red, green, blue) in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    return _save(figure, out_png)


def smoothed(points: Points, span: int) -> Points:
    """Compute the running median of `span` points, centered, fewer at both ends: a single spike leaves no trace.

    Of more than `MAX_SMOOTHED` points only every second, third, ... one takes part: a median sorts its span, and other
    processes of the training may be waiting.
    """
    step = -(-len(points) // MAX_SMOOTHED) or 1
    points, span = points[::step], max(1, span // step)
    values, half = [y for _, y in points], span // 2
    return [(x, statistics.median(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def _loss_panel(train: list, x_name: str) -> Panel:
    raw = _points(train, x_name, "loss")
    curves: list[Curve] = [("loss", raw, {"color": _rgb(0)})]
    if len(raw) > 30:
        smooth = smoothed(raw, max(5, len(raw) // 25))
        curves = [
            ("each report", raw, {"color": _rgb(0), "alpha": 0.35, "linewidth": 1}),
            ("running median", smooth, {"color": _rgb(0), "linewidth": 2}),
        ]
    return Panel("training loss", curves, top=_robust_top(raw))


def _terms_panel(train: list, x_name: str) -> Panel:
    """Sum the loss terms by the head they belong to, the part of their name before the first dot."""
    heads: dict[str, Points] = defaultdict(list)
    for record in train:
        sums: dict[str, float] = defaultdict(float)
        for name, value in (record.get("terms") or {}).items():
            if _is_number(value) and name != "gradient_norm":
                sums[name.partition(".")[0]] += value
        for head, value in sums.items():
            if _is_number(record.get(x_name)):
                heads[head].append((record[x_name], value))
    curves: list[Curve] = []
    for index, (name, points) in enumerate(heads.items()):
        curves.append((name, smoothed(points, max(1, len(points) // 25)), {"color": _rgb(index)}))
    return Panel("loss by head", curves, top=max((_robust_top(points) for _, points, _ in curves), default=None))


def _precision_panel(val: list, x_name: str) -> Panel:
    curves: list[Curve] = []
    for index, name in enumerate(("AP", "AP50", "AP75")):
        points = [(x, y * 100) for x, y in _points(val, x_name, name) if y >= 0]
        best = f" (best {max(y for _, y in points):.1f})" if points else ""
        curves.append((name + best, points, {"color": _rgb(index), "marker": "o", "markersize": 4}))
    return Panel("average precision, in %", curves, legend="lower right")


def _plot_panel(axes: Axes, panel: Panel, x_name: str) -> None:
    axes.set(title=panel.title, xlabel=x_name)
    axes.grid(axis="y")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.9g}"))
    curves = [curve for curve in panel.curves if curve[1]]
    for _, points, options in curves:
        dot: dict[str, Any] = {"marker": "o"} if len(points) == 1 else {}  # a line of one point would not be seen
        axes.plot(*zip(*points, strict=True), **(dot | options))
    x, y = np.array([point for _, points, _ in curves for point in points] or [(0.0, 0.0)], float).T
    axes.set_ylim(0, panel.top or _positive(1.06 * y.max()))
    if x.min() > 0:
        axes.set_xlim(left=0)
    if len(curves) > 1 or (curves and panel.legend == "lower right"):
        more = f"and {len(curves) - MAX_LEGEND} more" if len(curves) > MAX_LEGEND else None
        lines, names = axes.lines[:MAX_LEGEND], [short_name(name) for name, _, _ in curves[:MAX_LEGEND]]
        # inside, many entries would cover the curves
        place: dict[str, Any] = {"loc": panel.legend}
        if len(curves) > FEW_CURVES:
            place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        _set_names(axes.legend(lines, [str(i) for i in range(len(lines))], title=more, **place), names)


def _set_names(legend: Legend, names: Sequence[str]) -> None:
    """Write the entries of a legend afterwards: those that begin with _ would be left out when it is made."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _points(records: list, x_name: str, name: str) -> Points:
    return [(r[x_name], r[name]) for r in records if _is_number(r.get(x_name)) and _is_number(r.get(name))]


def _robust_top(points: Points) -> float:
    """Return a limit above nearly all values: one early spike must not flatten the rest."""
    values = sorted(y for _, y in points)
    if not values:
        return 1.0
    usual = values[int((len(values) - 1) * 0.95)]
    return _positive(min(values[-1] * 1.06, usual * 1.6))


def _positive(top: float) -> float:
    return top if top > 0 else 1.0


def _is_number(value: Any) -> bool:
    """Check for a finite number that float32 can hold, as all that a run logs are; axes of larger ones overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_FLOAT32


def _rgb(index: int) -> tuple[float, float, float]:
    """Return the color of class or curve `index` in matplotlib's range, 0 to 1."""
    red, green, blue = color(index)
    return red / 255, green / 255, blue / 255


KINDS = ((31, 119, 180), (208, 64, 40), (96, 104, 114))  # correct, detected as another class, missed or false


def _cell_colors(shares: np.ndarray) -> np.ndarray:
    """Blend white with each cell's color, (n, n, 3) in 0 to 1, by the square root so that few are seen too."""
    kinds = np.ones(shares.shape, int)
    np.fill_diagonal(kinds, 0)
    kinds[-1], kinds[:, -1] = 2, 2
    strength = np.sqrt(np.clip(shares, 0, 1))[..., None]
    return 1 - strength * (1 - np.array(KINDS)[kinds] / 255)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray, colors: np.ndarray, side: float) -> None:
    """Write the count in the middle of each cell, over its share where there is room."""
    for row, column in np.argwhere(counts):
        text, size = f"{counts[row, column]:,}", min(10, side / 4)
        if side >= 56:
            text += f"\n{shares[row, column]:.0%}"
        if len(text.split("\n")[0]) * size > side:  # a digit is about as wide as 0.9 points are in pixels
            continue
        red, green, blue = (colors[row, column] * 255).round().astype(int).tolist()
        ink = np.divide(ink_on((red, green, blue)), 255)
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)


def _save(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # such letters of a name become boxes
            figure.savefig(path, format="png")
    return figure
