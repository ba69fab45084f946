"""The results of an evaluation, as numbers, text tables and files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brs_detr.evaluation.matching import ClassMatches, Confusion
from brs_detr.evaluation.reliability import Reliability

MASK = "mask_"  # begins the names of the figures of masks
HEADLINE = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl", "APr", "APc", "APf")
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
    (MASK + "AP", "mask AP", 100),
    (MASK + "AP50", "mask AP50", 100),
    (MASK + "oLRP", "mask oLRP", 100),
)
STUDY = ("AP", "AP50", "AP75", "APr", "APc", "APf")  # in the table of score thresholds
CONFUSIONS = 5  # shown below the table of classes


@dataclass
class Summary:
    """Results of an evaluation; every measure is in [0, 1], or -1 if the dataset has no such object.

    Attributes:
        stats: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100 (by `max_detections`), ARs, ARm, ARl; and, in an
            extended evaluation, AP90, oLRP with its parts oLRPloc, oLRPfp, oLRPfn (errors: less is better), and the
            correlation of scores and IoUs of the true positives by rank, in [-1, 1], absent if no class has one. Those
            of masks begin with `mask_`. For LVIS also APr, APc, APf of rare, common and frequent classes.
        per_class: one row per class: name, category_id, images, objects, the measures above, and precision, recall and
            f1 at IoU 0.5 and the score where f1 is largest. `correlation` is None where it is undefined.
        notes: what a reader of the numbers should know, one sentence each.
        curves: by class name, for classes with objects, precision at IoU 0.5 over recalls 0, 0.01, ..., 1 as COCO
            interpolates it: the best at this recall or a higher one. Their mean is AP50.
        images: number of evaluated images.
        images_listed: number of images of the dataset, at least `images`; 0 if unknown.
        detections: number of detections.
        confusion: the confusion matrix; None unless the evaluation is extended.
        head: the detector's head whose detections these are; None: it has one.
        heads: the overall figures of every head by its name, if all were evaluated.
        head_thresholds: what `thresholds` returns, of every head likewise.
        score_study: one row per score threshold: the threshold `score`, the mean number of `detections` per image above
            it, and the overall figures of these.
        folds: by head, for each fold of the images, the matches of each label with raw scores, to fit and measure a
            calibration; not saved.
        reliability: how far scores are from precision; None where it was not measured.
    """

    stats: dict[str, float]
    per_class: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    images: int = 0
    images_listed: int = 0
    detections: int = 0
    confusion: Confusion | None = None
    score_study: list[dict[str, float]] = field(default_factory=list)
    head: str | None = None
    heads: dict[str, dict[str, float]] = field(default_factory=dict)
    head_thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    folds: dict[str, list[list[ClassMatches]]] = field(default_factory=dict)
    reliability: Reliability | None = None

    @property
    def images_left_out(self) -> int:
        """Return the number of images of the dataset that could not be evaluated."""
        return max(0, self.images_listed - self.images)

    def table(self, classes: bool = True) -> str:
        """Format the results in percent: the overall measures, the classes (if more than one) and the notes."""
        recalls = [name for name in self.stats if name.startswith("AR")]
        errors = [name for name in self.stats if name.startswith("oLRP")]
        precisions = [name for name in HEADLINE if name in self.stats]
        counted = f"{self.images:,} of {self.images_listed:,}" if self.images_left_out else f"{self.images:,}"
        blocks = [f"{counted} images, {self.detections:,} detections"]
        for names in (precisions, recalls, errors):
            if names:
                blocks.append(self._overall(names))
        for prefix, what in (("", "boxes"), (MASK, "masks")):
            if prefix + "correlation" in self.stats:
                value = self.stats[prefix + "correlation"]
                blocks.append(f"correlation of scores and IoUs of {what}, by rank: {value:.2f}")
        if classes and len(self.per_class) > 1:
            used = [c for c in CLASS_COLUMNS if any(row.get(c[0], -1) >= 0 for row in self.per_class)]
            header = ["class", "objects", *(title for _, title, _ in used)]
            rows = [
                [row["name"], f"{row['objects']:,}", *(_figure(row.get(key, -1), scale) for key, _, scale in used)]
                for row in self.per_class
            ]
            blocks.append(text_table(header, rows))
            confused = self.confusion.most_frequent(CONFUSIONS) if self.confusion is not None else []
            if confused:
                blocks.append("\n".join(["most frequent confusions", *(f"  {line}" for line in confused)]))
        if self.score_study:
            names = [n for n in (*STUDY, *(MASK + n for n in STUDY)) if n in self.score_study[0]]
            header = ["score above", "detections", *(name.replace(MASK, "mask ") for name in names)]
            rows = [
                [f"{row['score']:g}", f"{row['detections']:.1f}", *(percent(row[name]) for name in names)]
                for row in self.score_study
            ]
            blocks.append("by score threshold, with detections per image\n" + text_table(header, rows))
        if self.reliability is not None:
            blocks.append(reliability_table(self.reliability))
        if self.heads:
            names = [name for name in HEADLINE if name in self.stats]
            rows = [[head, *(percent(stats[name]) for name in names)] for head, stats in self.heads.items()]
            blocks.append(f"by head; the figures above are those of {self.head}\n" + text_table(["head", *names], rows))
        blocks += [f"note: {note}" for note in self.notes]
        return "\n\n".join(blocks)

    def _overall(self, names: Sequence[str]) -> str:
        """Format some overall measures; boxes and masks below one another, if there are masks."""
        if MASK + names[0] not in self.stats:
            return text_table(list(names), [[percent(self.stats[name]) for name in names]])
        rows = [
            [what, *(percent(self.stats[prefix + name]) for name in names)]
            for prefix, what in (("", "boxes"), (MASK, "masks"))
        ]
        return text_table(["", *names], rows)

    def thresholds(self) -> dict[str, float]:
        """Return by class name the score of the best F1 at IoU 0.5, without classes that have no true positive.

        They are of the scores that were evaluated; a good raw score of a ranking loss may be 0.03. Two classes of the
        same name share the lower score.
        """
        score_thresholds: dict[str, float] = {}
        for row in self.per_class:
            if row.get("f1", -1) > 0:
                score_thresholds[row["name"]] = min(row["score"], score_thresholds.get(row["name"], row["score"]))
        return score_thresholds

    def save(self, folder: str | Path, about: Mapping[str, Any] | None = None) -> list[Path]:
        """Write the results to `folder` and return the paths of the files.

        Args:
            folder: for `evaluation.json`, `per_class.csv` (with empty cells for undefined measures) and, if there are
                any, `precision_recall.csv`, `confusion.csv`, `reliability.csv` and `score_thresholds.csv`.
            about: further entries of the json, such as the evaluated weights.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"about": dict(about or {})}
        content |= {"images": self.images, "images_left_out": self.images_left_out}
        content["detections"] = self.detections
        if self.heads:
            content |= {"head": self.head, "heads": self.heads}
        content |= {"stats": self.stats, "per_class": self.per_class, "notes": self.notes}
        columns = list(self.per_class[0]) if self.per_class else ["name"]
        rows = [[_cell(row[column], column) for column in columns] for row in self.per_class]
        tables: dict[str, list[Sequence[Any]]] = {"per_class.csv": [columns, *rows]}
        if self.curves:
            recalls = [n / 100 for n in range(101)]
            tables["precision_recall.csv"] = [["recall", *self.curves], *zip(recalls, *self.curves.values())]
        if self.confusion is not None:
            tables["confusion.csv"] = [*self.confusion.table()]
            content["confusion"] = self.confusion.as_dict()
        if self.reliability is not None:
            content["calibration"] = self.reliability.as_dict()
            columns = list(self.reliability.bins[0]) if self.reliability.bins else ["scores"]
            tables["reliability.csv"] = [columns, *([row[c] for c in columns] for row in self.reliability.bins)]
        if self.score_study:
            content["score_study"] = self.score_study
            columns = list(self.score_study[0])
            rows = [[_cell(row[column], column) for column in columns] for row in self.score_study]
            tables["score_thresholds.csv"] = [columns, *rows]
        (folder / "evaluation.json").write_text(_json(content) + "\n", "utf-8", "backslashreplace")
        for name, table in tables.items():
            with (folder / name).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(table)
        return [folder / name for name in ("evaluation.json", *tables)]


def reliability_table(reliability: Reliability) -> str:
    """Format the calibration errors of raw and calibrated scores."""
    rows = [
        [name, *(f"{value:.2f}" for value in (*pair, exact))]
        for name, pair, exact in zip(
            ("D-ECE", "LaECE"), (reliability.dece, reliability.laece), reliability.exact, strict=True
        )
    ]
    table = text_table(["", "raw", "calibrated", "if exact"], rows)
    title = f"calibration errors of {reliability.detections:,} detections, from the score of their class's best F1 on"
    return f"{title}\n{table}\nheld out: {reliability.source}"


def _cell(value: Any, column: str) -> Any:
    """Return the cell of a csv file, empty for an undefined measure; a correlation may be negative."""
    undefined = value is None or (isinstance(value, float) and value < 0 and not column.endswith("correlation"))
    return "" if undefined else value


def _json(content: Any) -> str:
    """Format as indented json, but with lists of plain values on one line: a matrix of 80 classes has 6,561 values."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\n *([^][{}]*?)\n *\]", r"[\1]", text)
    return re.sub(r"\[[^][{}]*\]", lambda match: re.sub(r"\n *", " ", match[0]), text)


def percent(value: float) -> str:
    """Format 0.4137 as `41.4`, and the -1 of an undefined measure as `-`."""
    return _figure(value, 100)


def _figure(value: float, scale: int) -> str:
    return "-" if value < 0 else f"{value * scale:.1f}" if scale == 100 else f"{value:.3f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with aligned columns; the first one is left-aligned if its header is "class" or empty."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    words = bool(rows) and header[0] in ("class", "")

    def line(cells: Sequence[str]) -> str:
        first = str(cells[0]).ljust(widths[0]) if words else str(cells[0]).rjust(widths[0])
        return "  ".join([first, *(str(c).rjust(w) for c, w in zip(cells[1:], widths[1:]))]).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])
