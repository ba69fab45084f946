"""The model card of a run, filled in from its weights file and what lies beside it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from brs_detr.engine.checkpoint import Weights
from brs_detr.user_files import printable

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "mask_AP", "mask_AP50")
MAX_CLASSES = 100  # shown in the table


def model_card(
    weights: Weights,
    repository: str,
    *,
    class_figures: Mapping[int, Mapping[str, Any]] | None = None,
    license: str | None = None,
    has_curves: bool = False,
) -> str:
    """Write the card: what it finds, how well, how to use it, and with which settings it was trained.

    Args:
        weights: of the run.
        repository: user/name, for the example.
        class_figures: what `class_figures` returns.
        license: identifier of the hub, such as "apache-2.0"; None leaves it out.
        has_curves: whether `curves.png` lies beside the card.
    """
    figures = {name: weights.extra.get("metrics", {}).get(name) for name in FIGURES}
    figures = {name: value for name, value in figures.items() if isinstance(value, (int, float)) and value >= 0}
    epoch = weights.extra.get("epoch")
    parts = [
        _front_matter(weights, repository, figures, license),
        f"# {_plain(repository.rpartition('/')[2])}",
        f"A detector (`{_detector(weights)}`{_backbone(weights)}) that finds {_classes_in_words(weights.classes)}, "
        "trained with brs-detr.",
        _usage(repository, weights),
        _figures(figures, epoch),
        _scores(weights),
        _per_class(weights, class_figures or {}),
        "![Training curves](curves.png)" if has_curves else "",
        _settings(weights.config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(weights: Weights, repository: str, figures: Mapping[str, float], license: str | None) -> str:
    """Write what the hub reads: task, library, tags and figures."""
    content: dict[str, Any] = {"license": license} if license else {}
    content |= {
        "library_name": "brs-detr",
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "brs-detr", _detector(weights)],
    }
    if figures:
        metrics = [{"type": name, "name": name, "value": round(float(value), 4)} for name, value in figures.items()]
        result = {
            "task": {"type": "object-detection"},
            "dataset": {"type": "custom", "name": "validation split of the training"},
            "metrics": metrics,
        }
        content["model-index"] = [{"name": repository.rpartition("/")[2], "results": [result]}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _usage(repository: str, weights: Weights) -> str:
    return (
        "## Use\n\n```python\nfrom brs_detr import load\n\n"
        f'found = load("hf://{repository}").predict("image.jpg")\n'
        "print(found.boxes, found.scores, found.class_names)\n```\n\n"
        f'To fine-tune: `brs-detr train RECIPE data.root=... train.init_from="hf://{repository}"`.'
    )


def _figures(figures: Mapping[str, float], epoch: Any) -> str:
    if not figures:
        return "## Figures\n\nNo validation is stored with these weights."
    rows = [f"| {name} | {value:.3f} |" for name, value in figures.items()]
    when = f" after epoch {epoch}" if isinstance(epoch, int) else ""
    return "\n".join([f"## Figures\n\nOn the validation split of the training{when}:\n\n| | |\n|---|---|", *rows])


def _scores(weights: Weights) -> str:
    """Say what a score means."""
    if weights.extra.get("calibration"):
        return (
            "Scores are calibrated on the validation images: of detections with a score of 0.8 about 80 in 100 were "
            "right (IoU of at least 0.5)."
        )
    return "Scores are not calibrated: compare them with each other only."


def class_figures(weights: Weights, path: Path) -> dict[int, dict[str, Any]]:
    """Read the figures of classes from an evaluation with the very figures that the weights hold.

    Any `eval` may have written there: of other weights, images, settings, or another head.

    Args:
        weights: of the card.
        path: of an `evaluation.json`.

    Returns:
        The rows by category id; empty where there is no evaluation, or it is another one.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        found, epoch = {**content["stats"], "images": content["images"]}, content["about"]["epoch"]
        stored = {name: value for name, value in weights.extra["metrics"].items() if name in (*FIGURES, "images")}
        is_other = epoch != weights.extra["epoch"] or "AP" not in stored
        # where another device has computed them, they are rounded otherwise
        is_other = is_other or any(abs(found[name] - value) > 5e-4 for name, value in stored.items())
        return {} if is_other else {row["category_id"]: row for row in content["per_class"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, cut off, or of an earlier version
        return {}


def _per_class(weights: Weights, found: Mapping[int, Mapping[str, Any]]) -> str:
    """Write the table of classes, with their AP where it is known."""
    lines = ["## Classes", "", "With AP in this validation:" if found else "Not evaluated one by one:", ""]
    lines += ["| class | category id | AP | AP50 |", "|---|---|---|---|"]
    for name, number in list(zip(weights.classes, weights.category_ids, strict=True))[:MAX_CLASSES]:
        row = found.get(number, {})
        lines.append(f"| {_plain(name)} | {number} | {_cell(row.get('AP'))} | {_cell(row.get('AP50'))} |")
    if len(weights.classes) > MAX_CLASSES:
        lines.append(f"\n... and {len(weights.classes) - MAX_CLASSES} more.")
    return "\n".join(lines)


def _settings(config: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None, width=110)
    fence = "```" if "```" not in text else "`````"
    return f"## Settings\n\n<details><summary>config.yaml</summary>\n\n{fence}yaml\n{text}{fence}\n\n</details>"


def _detector(weights: Weights) -> str:
    model = weights.config.get("model", {})
    return str(model.get("name", "detector")) if isinstance(model, Mapping) else "detector"


def _backbone(weights: Weights) -> str:
    model = weights.config.get("model", {})
    backbone = model.get("backbone", {}) if isinstance(model, Mapping) else {}
    return f", backbone `{backbone['name']}`" if isinstance(backbone, Mapping) and "name" in backbone else ""


def _classes_in_words(classes: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(_plain(name) for name in classes[:most])
    return shown + (f" and {len(classes) - most} more classes" if len(classes) > most else "")


def _cell(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    return f"{number:.3f}" if math.isfinite(number) and number >= 0 else ""


def _plain(text: str) -> str:
    """Escape what Markdown or HTML would read as more than text: class names come from any dataset."""
    escaped = html.escape(printable(text), quote=False)
    return "".join(f"\\{character}" if character in "\\`*_[]|#!" else character for character in escaped)
