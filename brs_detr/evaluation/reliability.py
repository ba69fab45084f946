"""Calibration errors of scores, measured on held-out images.

Two errors, both at IoU 0.5 and over the detections that `predict` returns, those from the score of the best F1 of their
class on; over all detections both would be near 0 whatever the map, since nearly all detections are false and have low
scores.

- D-ECE, of scores against precision (Kueppers et al., "Multivariate Confidence Calibration for Object Detection",
  2020), all classes together in 10 bins, as Kuzucu et al. compute it; they keep detections above 0.3, which raw scores
  of a ranking loss may never reach.
- LaECE, of scores against precision x IoU (Oksuz et al., "Towards Building Self-Aware Object Detectors via Reliable
  Uncertainty Quantification and Calibration", 2023): 25 bins for each class, averaged over classes. There a true
  positive has an IoU of at least tau = 0.10; Kuzucu et al., "On Calibration of Object Detectors: Pitfalls, Evaluation
  and Baselines", 2024, take tau = 0 (LaECE_0). Both keep the detections from the LRP-optimal score of their class on.
  Here tau is 0.5, so that one matching gives all figures: compare detectors of this program by it, not with the papers.

The maps estimate precision, so LaECE cannot reach 0: what remains is about precision x (1 - IoU), the looseness of the
boxes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from brs_detr.evaluation.calibration import NEVER, Calibration, fit_calibration
from brs_detr.evaluation.matching import ClassMatches

FOLDS = 5
DECE_BINS, LAECE_BINS = 10, 25
DRAWS = 100  # of the errors that exact scores would show


class Shown(NamedTuple):
    """Detections of one class from its threshold on.

    Attributes:
        raw: (n,) scores of the detector.
        calibrated: (n,) mapped scores.
        matched: (n,) bool, True for true positives.
        ious: (n,) IoU with the object; 0 if not matched.
    """

    raw: np.ndarray
    calibrated: np.ndarray
    matched: np.ndarray
    ious: np.ndarray


@dataclass(frozen=True)
class Reliability:
    """Calibration errors in [0, 1] of raw and calibrated scores of the same detections; 0 is best.

    Attributes:
        detections: number of detections that they are of.
        dece: (raw, calibrated).
        laece: (raw, calibrated).
        exact: (D-ECE, LaECE) that as many detections would show on average if each calibrated score were its precision.
        bins: rows of the reliability diagram: `scores` ("raw" or "calibrated"), `low` and `high`, the bin's ends,
            `detections` in it, their mean `confidence`, their `precision`, and `quality`, precision x mean IoU.
        source: what the figures are held out from, a sentence.
    """

    detections: int
    dece: tuple[float, float]
    laece: tuple[float, float]
    exact: tuple[float, float]
    bins: list[dict[str, Any]]
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a json."""
        content: dict[str, Any] = {"detections": self.detections, "held_out": self.source}
        for name, (raw, calibrated), exact in zip(("D-ECE", "LaECE"), (self.dece, self.laece), self.exact, strict=True):
            content[name] = {"raw": raw, "calibrated": calibrated, "exact": exact}
        return content | {"bins": self.bins}

    def as_metrics(self) -> dict[str, float]:
        """Return the errors for the log of a training."""
        (raw, calibrated), (loose_raw, loose) = self.dece, self.laece
        return {"D-ECE_raw": raw, "D-ECE": calibrated, "LaECE_raw": loose_raw, "LaECE": loose}


def binned_error(confidences: np.ndarray, targets: np.ndarray, num_bins: int) -> float:
    """Compute sum over bins of n_j / n |mean confidence - mean target|, with bins of equal width over [0, 1].

    Args:
        confidences: (n,) in [0, 1].
        targets: (n,) what they should estimate: 0 or 1, or 0 or the IoU. With IoUs a bin's mean is precision x mean
            IoU of its true positives, LaECE's target.
        num_bins: number of bins; a confidence of 1 is in the last.

    Returns:
        The error; 0 without detections.
    """
    if not len(confidences):
        return 0.0
    bins = bin_numbers(confidences, num_bins)
    differences = np.bincount(bins, np.asarray(confidences, np.float64) - targets, num_bins)
    return float(np.abs(differences).sum() / len(confidences))


def bin_numbers(confidences: np.ndarray, num_bins: int) -> np.ndarray:
    """Return the bin (n,) of each confidence in [0, 1]."""
    return np.clip((np.asarray(confidences, np.float64) * num_bins).astype(int), 0, num_bins - 1)


def laece(confidences: Sequence[np.ndarray], ious: Sequence[np.ndarray], num_bins: int = LAECE_BINS) -> float:
    """Compute LaECE, the mean over classes of sum_j n_j / n |mean confidence - precision x mean IoU|.

    Args:
        confidences: (n,) for each class.
        ious: (n,) for each class, 0 for false positives.
        num_bins: of each class.

    Returns:
        The error; 0 without detections. A class without any does not count.
    """
    errors = [binned_error(c, target, num_bins) for c, target in zip(confidences, ious, strict=True) if len(c)]
    return float(np.mean(errors)) if errors else 0.0


def fold_of_images(image_ids: Iterable[int], folds: int = FOLDS) -> dict[int, int]:
    """Assign each image to a fold 0, 1, ...; of equal size up to one, and the same for the same ids in any order."""
    # By a hash: ids often follow the order of a video or of the folders, and folds should not.
    ordered = sorted(set(image_ids), key=lambda image: (zlib.crc32(str(image).encode()), image))
    return {image: number % folds for number, image in enumerate(ordered)}


def merge(parts: Sequence[Sequence[ClassMatches]]) -> list[ClassMatches]:
    """Merge the matches of disjoint sets of images, class by class."""
    merged = []
    for same in zip(*parts, strict=True):
        scores = np.concatenate([match.scores for match in same])
        order = np.argsort(-scores, kind="stable")
        matched = np.concatenate([match.matched for match in same])[order]
        ious = np.concatenate([match.ious for match in same])[order]
        merged.append(ClassMatches(scores[order], matched, ious, sum(match.num_objects for match in same)))
    return merged


def cross_fitted(folds: Sequence[Sequence[ClassMatches]]) -> Reliability | None:
    """Measure the calibration of a validation: each fold by the maps and thresholds fitted on the other folds.

    Args:
        folds: the matches of each class, for each fold of the images.

    Returns:
        The errors; None where a fold's others have too few true positives to fit a map.
    """
    parts = []
    for number, held in enumerate(folds):
        calibration = fit_calibration(merge([fold for other, fold in enumerate(folds) if other != number]))
        if calibration is None:
            return None
        parts.append(shown(held, calibration))
    by_class = [Shown(*map(np.concatenate, zip(*same, strict=True))) for same in zip(*parts, strict=True)]
    source = (
        f"{len(folds)} folds of the images, each with the map fitted on the others; the map in the weights is fitted "
        "on all images of the validation"
    )
    return measured(by_class, source)


def assess(
    folds: Sequence[Sequence[ClassMatches]], stored: Calibration | None, same_images: bool
) -> Reliability | None:
    """Measure the calibration without sharing images between the map and the figure.

    Args:
        folds: the matches of each class, for each fold of the images.
        stored: the maps of the weights file, if it has any.
        same_images: whether `stored` was fitted on these images; then each fold gets a map of its own.

    Returns:
        The errors; None without objects, or with too few true positives to fit a map.
    """
    if not any(match.num_objects for fold in folds for match in fold):
        return None
    return cross_fitted(folds) if stored is None or same_images else of_stored(merge(folds), stored)


def of_stored(matches: Sequence[ClassMatches], calibration: Calibration) -> Reliability:
    """Measure a stored map on other images than those of its validation.

    Args:
        matches: of each class.
        calibration: of the weights file.
    """
    source = f"the map in the weights is fitted on the {calibration.images:,} images of their validation, not these"
    return measured(shown(matches, calibration), source)


def shown(matches: Sequence[ClassMatches], calibration: Calibration) -> list[Shown]:
    """Select the detections of each class from its threshold on, with their calibrated scores."""
    selected = []
    for label, (match, threshold) in enumerate(zip(matches, calibration.thresholds, strict=True)):
        scores = calibration.apply(match.scores, np.full(len(match.scores), label))
        kept = (scores >= threshold) & (threshold < NEVER)
        selected.append(Shown(match.scores[kept], scores[kept], match.matched[kept], match.ious[kept]))
    return selected


def measured(by_class: Sequence[Shown], source: str) -> Reliability:
    """Compute the errors and the rows of the diagram."""
    raw, calibrated, matched, ious = map(np.concatenate, zip(*by_class, strict=True))
    of_classes = [part.ious for part in by_class]
    return Reliability(
        detections=len(raw),
        dece=(binned_error(raw, matched, DECE_BINS), binned_error(calibrated, matched, DECE_BINS)),
        laece=(
            laece([part.raw for part in by_class], of_classes),
            laece([part.calibrated for part in by_class], of_classes),
        ),
        exact=exact_errors(by_class),
        bins=[*diagram("raw", raw, matched, ious), *diagram("calibrated", calibrated, matched, ious)],
        source=source,
    )


def exact_errors(by_class: Sequence[Shown]) -> tuple[float, float]:
    """Estimate the mean D-ECE and LaECE of detections that are right with the probability of their calibrated score.

    They are not 0: of five detections at 0.5 two or three are right, and boxes of true positives are loose.
    """
    random = np.random.default_rng(0)  # the same figures in every run
    scores, errors = [part.calibrated for part in by_class], []
    ious = [part.ious[part.matched].mean() if part.matched.any() else 1.0 for part in by_class]
    for _ in range(DRAWS):
        drawn = [random.random(len(of_class)) < of_class for of_class in scores]
        loose = [matched * iou for matched, iou in zip(drawn, ious, strict=True)]
        errors.append((binned_error(np.concatenate(scores), np.concatenate(drawn), DECE_BINS), laece(scores, loose)))
    dece, localized = np.mean(errors, axis=0).tolist()
    return dece, localized


def diagram(
    name: str, confidences: np.ndarray, matched: np.ndarray, ious: np.ndarray, num_bins: int = DECE_BINS
) -> list[dict[str, Any]]:
    """Return a row for each bin that has detections, as `Reliability.bins` describes them."""
    bins, rows = bin_numbers(confidences, num_bins), []
    for number in np.unique(bins).tolist():
        inside = bins == number
        rows.append(
            {
                "scores": name,
                "low": number / num_bins,
                "high": (number + 1) / num_bins,
                "detections": int(inside.sum()),
                "confidence": float(confidences[inside].mean()),
                "precision": float(matched[inside].mean()),
                "quality": float(ious[inside].mean()),
            }
        )
    return rows
