"""What an evaluation found, as numbers, as text tables and as files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HEADLINE = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASS_COLUMNS = (
    ("AP", "AP", 100),
    ("AP50", "AP50", 100),
    ("AP75", "AP75", 100),
    ("APs", "APs", 100),
    ("APm", "APm", 100),
    ("APl", "APl", 100),
    ("AR", "AR", 100),
    ("precision", "P", 100),
    ("recall", "R", 100),
    ("f1", "F1", 100),
    ("score", "at score", 1),
    ("oLRP", "oLRP", 100),
)


@dataclass
class Summary:
    """An evaluation's outcome; every measure in [0, 1], or -1 where the dataset holds no such object.

    Attributes:
        stats: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100 (by the limits asked for), ARs, ARm, ARl; and, in an
            extended evaluation, oLRP with its parts oLRPloc, oLRPfp, oLRPfn (errors: less is better).
        per_class: one row a class: name, category_id, images, objects, the measures above, and precision, recall and
            f1 at IoU 0.5 and the score where f1 is largest.
        notes: what a reader of the numbers should know, one sentence each.
        curves: by class name, `(precision, recall)` lists at IoU 0.5.
        images: number of evaluated images.
        detections: number of detections.
    """

    stats: dict[str, float]
    per_class: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    images: int = 0
    detections: int = 0

    def table(self, classes: bool = True) -> str:
        """The figures in percent: the overall line, the classes (unless there is one) and the notes."""
        recalls = [name for name in self.stats if name.startswith("AR")]
        errors = [name for name in self.stats if name.startswith("oLRP")]
        blocks = [f"{self.images:,} images, {self.detections:,} detections"]
        for names in (HEADLINE, recalls, errors):
            if names:
                blocks.append(text_table(list(names), [[percent(self.stats[name]) for name in names]]))
        if classes and len(self.per_class) > 1:
            used = [c for c in CLASS_COLUMNS if any(row.get(c[0], -1) >= 0 for row in self.per_class)]
            header = ["class", "objects", *(title for _, title, _ in used)]
            rows = [
                [row["name"], f"{row['objects']:,}", *(_figure(row.get(key, -1), scale) for key, _, scale in used)]
                for row in self.per_class
            ]
            blocks.append(text_table(header, rows))
        blocks += [f"note: {note}" for note in self.notes]
        return "\n\n".join(blocks)

    def thresholds(self) -> dict[str, float]:
        """By class name, the score at which detections have their best F1 at IoU 0.5; none for a class never found.

        Ranking losses order detections and do not calibrate them: a good score may be 0.03, so the cut is measured.
        """
        return {row["name"]: row["score"] for row in self.per_class if row.get("f1", -1) > 0}

    def save(self, folder: str | Path) -> list[Path]:
        """Write `evaluation.json` and `per_class.csv` into `folder`; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "evaluation.json", folder / "per_class.csv"]
        content = {key: value for key, value in asdict(self).items() if key != "curves"}
        paths[0].write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with paths[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.per_class[0]) if self.per_class else ["name"])
            writer.writeheader()
            writer.writerows(self.per_class)
        return paths


def percent(value: float) -> str:
    """0.4137 -> `41.4`; `-` for the -1 of a measure that does not exist."""
    return _figure(value, 100)


def _figure(value: float, scale: int) -> str:
    return "-" if value < 0 else f"{value * scale:.1f}" if scale == 100 else f"{value:.2f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one to the left where it holds words."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    words = bool(rows) and header[0] == "class"

    def line(cells: Sequence[str]) -> str:
        first = str(cells[0]).ljust(widths[0]) if words else str(cells[0]).rjust(widths[0])
        return "  ".join([first, *(str(c).rjust(w) for c, w in zip(cells[1:], widths[1:]))]).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])
