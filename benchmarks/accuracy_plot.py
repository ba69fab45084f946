"""Draw the results of `accuracy.py`: the AP of every loss, each seed as a dot, the mean as a line; or AP by epoch.

    python benchmarks/accuracy_plot.py --detectors brs_detr --out docs/images/study.png
    python benchmarks/accuracy_plot.py --curves bccd --out docs/images/dino_curves.png

A panel is a dataset, a detector and one of its heads, with two losses or more. Only runs of one variant are drawn, the
one with most losses (the recipe as it is among equals). Curves are means over seeds, of the runs that were validated
during the training, at the epochs that all seeds have.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from itertools import chain
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results" / "accuracy.json"
ORDER = ("brs", "rs", "bap", "ap", "balrp", "alrp", "bndcg", "ndcg", "focal", "quality_focal", "score")
SCORE_BASED = ("focal", "quality_focal", "score")
HEADS = ("decoder", "roi", "atss", "head")  # of which panels are drawn, in this order
PANEL, COLUMNS = (3.6, 2.8), 3  # inches

Panels = dict[tuple[str, str], dict[str, list[float]]]  # (detector, head) -> loss -> AP of each seed, in points


def panels_of(results: dict[str, dict], dataset: str) -> tuple[dict[str, str], Panels]:
    """Collect the runs of a dataset.

    Returns:
        the variant of each detector that is drawn, and the panels.
    """
    cases = {tuple(name.split()): result for name, result in results.items() if name.split()[0] == dataset}
    losses_of: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for _, detector, loss, variant, _ in cases:
        losses_of[detector][variant].add(loss)
    drawn = {key: max(own, key=lambda name: (len(own[name]), name == "recipe")) for key, own in losses_of.items()}
    panels: Panels = defaultdict(lambda: defaultdict(list))
    for (_, detector, loss, variant, _), result in sorted(cases.items()):
        for head, figures in result["heads"].items():
            if head in HEADS and variant == drawn[detector]:
                panels[detector, head][loss].append(100 * figures["AP"])
    comparisons = {key: losses for key, losses in panels.items() if len(losses) > 1}
    return drawn, dict(sorted(comparisons.items(), key=lambda item: (item[0][0], HEADS.index(item[0][1]))))


def draw_panel(axes: Axes, title: str, losses: dict[str, list[float]]) -> None:
    """Draw the seeds and the mean of each loss; score-based losses are gray."""
    shown = [loss for loss in ORDER if loss in losses]
    for x, loss in enumerate(shown):
        color = "#6b7280" if loss in SCORE_BASED else "#1d4ed8"
        axes.plot([x] * len(losses[loss]), losses[loss], "o", color=color, alpha=0.6, markersize=4, clip_on=False)
        axes.hlines(statistics.mean(losses[loss]), x - 0.3, x + 0.3, color=color, linewidth=2)
    axes.set_xticks(range(len(shown)), [f"{loss.replace('_', ' ')} ({len(losses[loss])})" for loss in shown])
    axes.tick_params(axis="x", labelrotation=45, labelsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(title, fontsize=8, loc="left")
    axes.grid(axis="y", color="#e6e9ed")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, dict]) -> Figure:
    """Draw the panels of all datasets, line by line."""
    drawn: list[tuple[str, dict[str, list[float]]]] = []
    for dataset in dict.fromkeys(name.split()[0] for name in results):
        variants, panels = panels_of(results, dataset)
        for (detector, head), losses in panels.items():
            settings = "" if variants[detector] == "recipe" else f" ({variants[detector]})"
            name = detector if head == "head" else f"{detector}, {head}"
            drawn.append((f"{dataset}{settings}: {name}", losses))
    if not drawn:
        raise SystemExit("accuracy_plot.py: no dataset has results of two losses of one detector and variant to draw.")
    lines = math.ceil(len(drawn) / COLUMNS)
    figure = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * lines), dpi=110, layout="constrained")
    for axes, (title, losses) in zip(figure.subplots(lines, COLUMNS, squeeze=False).flat, drawn, strict=False):
        draw_panel(axes, title, losses)
    for axes in figure.axes[len(drawn) :]:
        axes.set_visible(False)
    figure.supylabel("AP of the last epoch, points", fontsize=8)
    return figure


def curves_of(results: dict[str, dict], dataset: str) -> dict[str, list[list[dict[str, float]]]]:
    """Collect the validations of each seed, by "detector loss variant", of runs that have more than one."""
    curves: dict[str, list[list[dict[str, float]]]] = defaultdict(list)
    for name, result in sorted(results.items()):
        data, detector, loss, variant, _ = name.split()
        if data == dataset and len(result.get("curve", [])) > 1:
            curves[f"{detector} {loss} {variant}"].append(result["curve"])
    return dict(curves)


def draw_curves(results: dict[str, dict], dataset: str) -> Figure:
    """Draw a panel for every head: mean AP over seeds by epoch, score-based losses dashed."""
    curves = curves_of(results, dataset)
    known = {key for seeds in curves.values() for validation in chain.from_iterable(seeds) for key in validation}
    heads = [head for head in HEADS if f"{head}_AP" in known]
    if not heads:
        raise SystemExit(
            f"--curves: no run on {dataset!r} was validated more than once. Train with train.eval_every=1."
        )
    figure = Figure(figsize=(PANEL[0] * len(heads), 1.2 * PANEL[1]), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(heads), squeeze=False)[0]
    for axes, head in zip(panels, heads, strict=True):
        for name, seeds in curves.items():
            by_epoch: dict[int, list[float]] = defaultdict(list)
            for validation in chain.from_iterable(seeds):
                if f"{head}_AP" in validation:
                    by_epoch[validation["epoch"]].append(100 * validation[f"{head}_AP"])
            epochs = [epoch for epoch, values in sorted(by_epoch.items()) if len(values) == len(seeds)]
            if not epochs:
                continue
            means = [statistics.mean(by_epoch[epoch]) for epoch in epochs]
            style = "--" if name.split()[1] in SCORE_BASED else "-"
            axes.plot(epochs, means, style, marker="o", markersize=3, label=f"{name} ({len(seeds)})")
        axes.set_title(f"{dataset}: {head}", fontsize=8, loc="left")
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(color="#e6e9ed")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=6, frameon=False)
    figure.supylabel("AP, points", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.with_suffix(".png"))
    parser.add_argument("--detectors", nargs="+", help="draw these alone")
    parser.add_argument("--curves", metavar="DATASET", help="draw AP by epoch on this dataset instead")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.results.read_text())
    if args.detectors is not None:
        results = {name: result for name, result in results.items() if name.split()[1] in args.detectors}
    (draw_curves(results, args.curves) if args.curves else draw(results)).savefig(args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
