"""LVIS's rules for images that are annotated for some classes only (Gupta et al., 2019, section 3 and its code).

In an image, a class is annotated, or known to be absent (`neg_category_ids`), or unknown. Of the annotated ones some
miss objects (`not_exhaustive_category_ids`). So:

1. of all classes together the best 300 detections of an image count (`max_detections`);
2. detections of an unknown class do not count;
3. detections of a class that misses objects count where they match one, but are no false positives elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from brs_detr.evaluation.ground_truth import GroundTruth


def countable(truth: GroundTruth, detections: Sequence[dict[str, Any]], max_detections: int) -> list[dict[str, Any]]:
    """Select the detections that rules 1 and 2 leave, in their order.

    Args:
        truth: a federated ground truth.
        detections: COCO results with `image_id`, `category_id` and `score`.
        max_detections: maximum number of detections per image, of all classes.
    """
    annotated = {(a["image_id"], a["category_id"]) for a in truth.dataset["annotations"]}
    rows_of = defaultdict(list)
    for row, detection in enumerate(detections):
        rows_of[detection["image_id"]].append(row)
    kept: list[int] = []
    for image, rows in rows_of.items():
        best = np.argsort([-detections[row]["score"] for row in rows], kind="stable")[:max_detections]
        absent = truth.negative.get(image, frozenset())
        for row in (rows[i] for i in best):
            category = detections[row]["category_id"]
            if category in absent or (image, category) in annotated:
                kept.append(row)
    return [detections[row] for row in sorted(kept)]


def incomplete_pairs(truth: GroundTruth) -> set[tuple[int, int]]:
    """Return the (image id, category id) of rule 3."""
    return {(image, category) for image, categories in truth.not_exhaustive.items() for category in categories}


def frequency_means(truth: GroundTruth, per_class: Sequence[dict[str, Any]], measure: str = "AP") -> dict[str, float]:
    """Average a measure over the rare, common and frequent classes that have one: {"APr": .., "APc": .., "APf": ..}."""
    means = {}
    for group in ("r", "c", "f"):
        values = [row[measure] for row in per_class if truth.frequency.get(row["category_id"]) == group]
        values = [value for value in values if value > -1]
        means[measure + group] = float(np.mean(values)) if values else -1.0
    return means
