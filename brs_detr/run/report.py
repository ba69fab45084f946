"""A report of a run in one file: what it reached, its curves, classes, images, calibration and settings.

The HTML file holds its images and its style, runs no script and loads nothing: it can be sent by mail. Everything that
comes from files is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from brs_detr.engine.logging import read_metrics
from brs_detr.engine.storage import write_text
from brs_detr.evaluation.summary import CLASS_COLUMNS

IMAGES = (
    (
        "Detections",
        "detections.png",
        "From the score of the best F1 of their class on, with the ground truth.",
    ),
    ("Training", "curves.png", "Losses, AP and learning rate over the training."),
    ("Precision over recall", "precision_recall.png", "At IoU 0.5, as COCO interpolates it."),
    ("Confusion", "confusion.png", "What the objects of each class were taken for, at IoU 0.5."),
)
RELIABILITY = "Precision of the detections in each range of scores; exact scores lie on the diagonal."
OVERALL = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mask_AP", "mask_AP50", "oLRP")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .5em 0; } td, th { padding: .2em .7em; text-align: right; }
th { border-bottom: 1px solid #888; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f5f6f8; } tr.best td { font-weight: bold; }
figure { margin: 1em 0; } img { max-width: 100%; } figcaption { color: #666; font-size: .9em; }
pre { background: #f5f6f8; padding: 1em; overflow-x: auto; } .note { color: #8a4b00; } .scroll { overflow-x: auto; }
"""


def write_report(run: Path, evaluation: Path, out: Path) -> Path:
    """Write the report of a run; parts whose file is missing or damaged are left out.

    Args:
        run: folder with `config.yaml`, `metrics.jsonl` and `train_samples.png`.
        evaluation: folder with `evaluation.json` and the images drawn beside it.
        out: the HTML file.

    Returns:
        `out`.

    Raises:
        StorageError: it cannot be written.
    """
    content = _read_json(evaluation / "evaluation.json")
    parts = [
        _overview(content),
        *(_image(title, evaluation / name, caption) for title, name, caption in IMAGES[:1]),
        _classes(content),
        *(_image(title, evaluation / name, caption) for title, name, caption in IMAGES[1:]),
        _calibration(content, evaluation / "reliability.png"),
        _validations(run / "metrics.jsonl"),
        _image("Training images", run / "train_samples.png", "As the detector sees them, after augmentation."),
        _settings(run / "config.yaml"),
    ]
    title = f"Report of {run.resolve().name}"
    write_text(
        out,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n",
    )
    return out


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], best: int | None = None) -> str:
    """Format a table of texts; row `best` is set in bold."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [f'<div class="scroll"><table>\n<tr>{head}</tr>']
    for number, row in enumerate(rows):
        mark = ' class="best"' if number == best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def _read_json(path: Path) -> dict[str, Any]:
    """Read an object from a json; {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _value(figure: object) -> float:
    """Return a figure, -1 where it is undefined."""
    return float(figure) if isinstance(figure, int | float) else -1.0


def _number(value: object, scale: float = 100, digits: int = 1) -> str:
    """Format a figure in percent; undefined ones (-1, None) are a dash."""
    if not isinstance(value, int | float) or value == -1:
        return "–"
    return f"{scale * value:.{digits}f}"


def _overview(content: Mapping[str, Any]) -> str:
    """Return the figures of the run, those of every head, and the notes."""
    if "stats" not in content:
        return "<p>No evaluation has been stored yet.</p>"
    about = content.get("about", {})
    facts = ", ".join(f"{key}: {value}" for key, value in about.items() if value is not None)
    heads: Mapping[str, Mapping[str, Any]] = content.get("heads") or {content.get("head") or "all": content["stats"]}
    columns = [name for name in OVERALL if name in content["stats"]]
    rows = [[name, *(_number(stats.get(column)) for column in columns)] for name, stats in heads.items()]
    best = list(heads).index(content["head"]) if content.get("head") in heads and len(heads) > 1 else None
    lines = [f"<p>{escape(facts)}; {content.get('images', 0):,} images. Figures in percent.</p>"]
    lines.append(html_table(["head" if len(heads) > 1 else "", *columns], rows, best))
    lines += [f'<p class="note">{escape(str(note))}</p>' for note in content.get("notes", [])]
    return "\n".join(lines)


def _classes(content: Mapping[str, Any]) -> str:
    """Return the table of classes, those of the lowest AP last."""
    rows = [row for row in content.get("per_class", []) if isinstance(row, dict)]
    if not rows:
        return ""
    columns = [column for column in CLASS_COLUMNS if column[0] in rows[0]]
    rows.sort(key=lambda row: -_value(row.get("AP")))
    cells = [
        [
            str(row.get("name")),
            f"{row.get('objects', 0):,}",
            *(_number(row.get(key), scale, 1 if scale > 1 else 3) for key, _, scale in columns),
        ]
        for row in rows
    ]
    return "<h2>Classes</h2>\n" + html_table(["class", "objects", *(title for _, title, _ in columns)], cells)


def _calibration(content: Mapping[str, Any], diagram: Path) -> str:
    """Return the calibration errors and their diagram."""
    errors = content.get("calibration")
    if not isinstance(errors, dict):
        return ""
    rows = [
        [name, *(_number(errors[name].get(kind), 1, 3) for kind in ("raw", "calibrated", "exact"))]
        for name in ("D-ECE", "LaECE")
        if name in errors
    ]
    header = ["error", "raw scores", "calibrated", "exact scores would show"]
    held_out = f"<p>Held out: {escape(str(errors.get('held_out', '')))}.</p>\n"
    table = html_table(header, rows) + held_out
    return "<h2>Calibration: are the scores precisions?</h2>\n" + table + _figure("Calibration", diagram, RELIABILITY)


def _validations(metrics: Path) -> str:
    """Return the table of validations, the best in bold."""
    lines = [line for line in read_metrics(metrics) if line["kind"] == "val"]
    figures = [name for name in ("AP", "AP50", "AP75", "mask_AP") if any(name in line for line in lines)]
    figures += sorted({name for line in lines for name in line if name.endswith("_AP") and name not in figures})
    if not figures:
        return ""
    best = max(range(len(lines)), key=lambda number: _value(lines[number].get("AP")))
    rows = [[f"{line['epoch']}", f"{line['step']:,}", *(_number(line.get(name)) for name in figures)] for line in lines]
    return "<h2>Validations</h2>\n" + html_table(["epoch", "step", *figures], rows, best)


def _image(title: str, path: Path, caption: str) -> str:
    """Return a section with an image of a file; "" without the file."""
    figure = _figure(title, path, caption)
    return figure and f"<h2>{escape(title)}</h2>\n{figure}"


def _figure(title: str, path: Path, caption: str) -> str:
    """Return an image of a file, held by the page itself; "" without the file."""
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{escape(title)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _settings(path: Path) -> str:
    """Return the complete config, folded."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    return f"<h2>Settings</h2>\n<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
