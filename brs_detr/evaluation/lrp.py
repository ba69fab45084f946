"""Localisation Recall Precision error (Oksuz et al., 2018 and 2021): one number for missed, false and loose boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from brs_detr.evaluation.matches import ClassMatches


@dataclass(frozen=True)
class OptimalLRP:
    """The LRP error at the score that makes it least, 0 best and 1 worst; -1 for a class without objects.

    Attributes:
        error: oLRP.
        localisation: mean 1 - IoU of the found objects there.
        false_positives: 1 - precision there.
        false_negatives: 1 - recall there.
        score: the optimal threshold.
    """

    error: float
    localisation: float
    false_positives: float
    false_negatives: float
    score: float


def optimal_lrp(matches: ClassMatches, threshold: float = 0.5) -> OptimalLRP:
    """oLRP of one class: min over scores of (sum_TP (1 - IoU) / (1 - threshold) + FP + FN) / (TP + FP + FN).

    Args:
        matches: made at the same `threshold`.
        threshold: IoU from which an object counts as found.

    Raises:
        ValueError: threshold is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"LRP needs an IoU threshold in [0, 1), not {threshold}")
    if matches.objects == 0:
        return OptimalLRP(-1.0, -1.0, -1.0, -1.0, -1.0)
    hits = np.cumsum(matches.found)
    if not len(hits) or not hits[-1]:
        return OptimalLRP(1.0, 1.0, 1.0, 1.0, 1.0)
    false = np.arange(1, len(hits) + 1) - hits
    missed = matches.objects - hits
    loose = np.cumsum(np.where(matches.found, 1 - matches.ious, 0.0))
    errors = (loose / (1 - threshold) + false + missed) / (hits + false + missed)
    # a threshold takes all detections of one score or none
    last = np.flatnonzero(np.append(matches.scores[1:] != matches.scores[:-1], True))
    best = int(last[errors[last].argmin()])
    found = max(int(hits[best]), 1)
    return OptimalLRP(
        float(errors[best]),
        float(loose[best] / found) if hits[best] else 1.0,
        float(false[best] / (best + 1)),
        float(missed[best] / matches.objects),
        float(matches.scores[best]),
    )
