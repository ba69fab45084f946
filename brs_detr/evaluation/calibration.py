"""Maps of raw scores to precision, so that a score of 0.8 means: of such detections 80 in 100 are right.

A ranking loss orders detections and gives their scores no absolute meaning: a good one may be 0.03. A validation knows
the precision at IoU 0.5 of its detections, so a monotone map from score to precision is fitted to them: isotonic
regression (Zadrozny and Elkan, 2002) for each class with enough true positives, one map for the other classes, and
Platt's logistic map (1999) where all classes together have too few for that. Every map is strictly increasing: the
order of detections in a class stays, and with it AP.

The target is precision, not precision x IoU, the target of LaECE (see `reliability.py`). A user reads a score as the
chance that the detection is right, and under the other target the best possible score is the mean IoU, about 0.85.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize

from brs_detr.evaluation.matching import ClassMatches

MIN_ISOTONIC = 50
"""Least number of true positives to which an isotonic map is fitted; with fewer its steps follow single detections."""
MIN_PLATT = 10
"""The same for a logistic map, which has two parameters; below it nothing is fitted."""
MIN_BLOCK = 10
"""Least number of detections a knot stands for; more where there are so many that the file would grow."""
MAX_BLOCKS = 200
PLATT_KNOTS = 33
MIN_SLOPE = 1e-4
"""Share of the raw score in every map. Without it scores within a step of the regression would become equal."""
END_SLOPE = 0.1
"""Share by which a map approaches 0 and 1 between its first or last knot and the least or largest score seen."""
NEVER = 1.0
"""Threshold of a class without a true positive in the validation."""


@dataclass(frozen=True)
class Curve:
    """A strictly increasing, piecewise linear map of raw scores to precision.

    Attributes:
        scores: (K,) float64 knots, raw scores ascending from 0 to 1.
        precisions: (K,) float64, their precisions in [0, 1], strictly increasing.
        method: "isotonic" or "platt".
        detections: number of detections that it was fitted to.
        true_positives: how many of them were.
    """

    scores: np.ndarray
    precisions: np.ndarray
    method: str
    detections: int
    true_positives: int

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Map raw scores (n,) in [0, 1] to precisions (n,) float64."""
        return np.interp(np.asarray(scores, np.float64), self.scores, self.precisions)


@dataclass(frozen=True)
class Calibration:
    """The maps of one head of a detector.

    Attributes:
        curves: the maps.
        of_label: number of the map of each label; labels may share one.
        thresholds: for each label the calibrated score of its best F1 at IoU 0.5, 1 where nothing was right.
        images: number of images that the maps were fitted on.
    """

    curves: tuple[Curve, ...]
    of_label: tuple[int, ...]
    thresholds: tuple[float, ...]
    images: int = 0

    def apply(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Map raw scores (n,) of detections with these labels (n,) to calibrated scores (n,) float64.

        Call it after the cut to the best detections of an image: it may reorder detections of different classes.
        """
        # float64, since many distinct float32 scores would become equal where a map is flat
        result, numbers = np.zeros(len(scores)), np.asarray(self.of_label, int)[np.asarray(labels, int)]
        for number in np.unique(numbers):
            chosen = numbers == number
            result[chosen] = self.curves[number](np.asarray(scores)[chosen])
        return result

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the metadata of a weights or ONNX file."""
        curves = [
            {
                "method": curve.method,
                "detections": curve.detections,
                "true_positives": curve.true_positives,
                "scores": curve.scores.tolist(),
                "precisions": curve.precisions.tolist(),
            }
            for curve in self.curves
        ]
        thresholds, of_label = list(self.thresholds), list(self.of_label)
        return {"images": self.images, "of_label": of_label, "thresholds": thresholds, "curves": curves}

    @staticmethod
    def from_dict(content: Any, num_classes: int) -> Calibration:
        """Read what `as_dict` returned.

        Raises:
            ValueError: it is something else, of another number of classes, or a map does not increase.
        """
        try:
            curves = tuple(
                Curve(
                    np.array(entry["scores"], np.float64),
                    np.array(entry["precisions"], np.float64),
                    str(entry["method"]),
                    int(entry["detections"]),
                    int(entry["true_positives"]),
                )
                for entry in content["curves"]
            )
            of_label = tuple(int(number) for number in content["of_label"])
            thresholds = tuple(float(value) for value in content["thresholds"])
            images = int(content["images"])
        except (KeyError, TypeError, ValueError):
            raise ValueError("the calibration is not one of this program") from None
        if len(of_label) != num_classes or len(thresholds) != num_classes:
            raise ValueError(f"the calibration is of {len(of_label)} classes, not {num_classes}")
        if not all(0 <= number < len(curves) for number in of_label) or not all(map(_is_increasing, curves)):
            raise ValueError("a map of the calibration does not increase, or is missing")
        return Calibration(curves, of_label, thresholds, images)


def _is_increasing(curve: Curve) -> bool:
    """Check that the knots are finite and strictly increasing; a NaN compares as False."""
    x, y = curve.scores, curve.precisions
    shaped = x.ndim == y.ndim == 1 and len(x) == len(y) >= 2
    return shaped and bool((np.diff(x) > 0).all() and (np.diff(y) > 0).all() and x[0] >= 0 <= y[0] and y[-1] <= 1)


def fit_calibration(matches: Sequence[ClassMatches], images: int = 0) -> Calibration | None:
    """Fit the maps of a detector to the detections of a validation.

    Args:
        matches: of label 0, 1, ..., at IoU 0.5.
        images: number of images that they are of.

    Returns:
        The maps; None where there are fewer than `MIN_PLATT` true positives.
    """
    scores = np.concatenate([match.scores for match in matches])
    matched = np.concatenate([match.matched for match in matches])
    found = int(matched.sum())
    if found < MIN_PLATT:
        return None
    curves, of_label = [fit_isotonic(scores, matched) if found >= MIN_ISOTONIC else fit_platt(scores, matched)], []
    for match in matches:
        own = match.matched.sum() >= MIN_ISOTONIC and len(matches) > 1
        of_label.append(len(curves) if own else 0)
        if own:
            curves.append(fit_isotonic(match.scores, match.matched))
    best = [match.best_f1() for match in matches]
    thresholds = tuple(
        float(curves[number](np.array(row["score"]))) if row["f1"] > 0 else NEVER
        for number, row in zip(of_label, best, strict=True)
    )
    return Calibration(tuple(curves), tuple(of_label), thresholds, images)


def fit_isotonic(scores: np.ndarray, matched: np.ndarray) -> Curve:
    """Fit precision as an increasing function of the score by isotonic regression.

    The regression is a step function. Its steps become knots at their mean score, with straight lines between them, so
    that scores within a step keep their order.

    Args:
        scores: (n,) raw scores, n > 0.
        matched: (n,) bool, True for true positives.
    """
    order = np.argsort(scores, kind="stable")
    x, y = np.asarray(scores, np.float64)[order], _smoothed(matched)[order]
    # Detections of equal score are one point: an order among them would be that of the images.
    x, first, counts = np.unique(x, return_index=True, return_counts=True)
    y = np.add.reduceat(y, first) / counts
    blocks = isotonic_regression(y, weights=counts).blocks
    number = _merged(blocks, counts, max(MIN_BLOCK, len(scores) // MAX_BLOCKS))
    total = np.bincount(number, counts)
    knots = np.bincount(number, x * counts) / total, np.bincount(number, y * counts) / total
    return _curve(*knots, (x[0], x[-1]), "isotonic", matched)


def _merged(blocks: np.ndarray, counts: np.ndarray, least: int) -> np.ndarray:
    """Return the block (n,) of each point, neighbors merged until each has `least` detections; the last may not."""
    sums = np.add.reduceat(counts, blocks[:-1])
    starts, held = [int(blocks[0])], 0
    for start, count in zip(blocks[:-1].tolist(), sums.tolist(), strict=True):
        if held >= least:
            starts.append(start)
            held = 0
        held += count
    if held < least and len(starts) > 1:
        starts.pop()
    marks = np.zeros(len(counts), int)
    marks[starts[1:]] = 1
    return np.cumsum(marks)


def fit_platt(scores: np.ndarray, matched: np.ndarray) -> Curve:
    """Fit precision = sigmoid(a logit(score) + b), a > 0, by maximum likelihood (Platt, 1999), as knots.

    Args:
        scores: (n,) raw scores, n > 0.
        matched: (n,) bool, True for true positives.
    """
    logits, targets = _logit(scores), _smoothed(matched)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * logits + parameters[1]
        slope = 1 / (1 + np.exp(-z)) - targets
        return float((np.logaddexp(0, z) - targets * z).mean()), np.array([(slope * logits).mean(), slope.mean()])

    # The bound keeps the order of the scores even where the worse ones are right more often.
    a, b = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=[(1e-3, None), (None, None)], method="L-BFGS-B").x
    grid = np.linspace(logits.min(), logits.max(), PLATT_KNOTS)
    x, y = 1 / (1 + np.exp(-grid)), 1 / (1 + np.exp(-(a * grid + b)))
    return _curve(x, y, (x[0], x[-1]), "platt", matched)


def _logit(scores: np.ndarray) -> np.ndarray:
    """Invert the sigmoid; 1e-7 is about the distance of a float32 score to 1."""
    p = np.clip(np.asarray(scores, np.float64), 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def _smoothed(matched: np.ndarray) -> np.ndarray:
    """Return Platt's targets, (P + 1) / (P + 2) for P true and 1 / (N + 2) for N false positives.

    Ten detections that are all right do not show a precision of 1.
    """
    true = int(matched.sum())
    return np.where(matched, (true + 1) / (true + 2), 1 / (len(matched) - true + 2))


def _curve(x: np.ndarray, y: np.ndarray, ends: tuple[float, float], method: str, matched: np.ndarray) -> Curve:
    """Build a map from knots with ascending x, nearly constant beyond them.

    Args:
        x: (K,) scores.
        y: (K,) precisions.
        ends: least and largest score of the detections.
        method: of the map.
        matched: (n,) bool, of the detections.
    """
    # Not quite constant, since half of the best detections lie beyond the last knot, and float32, which an exported
    # file uses, would make their scores equal.
    low, high = y[0] * (1 - END_SLOPE), y[-1] + (1 - y[-1]) * END_SLOPE
    # where the first knot is the least score, the knot counts
    inside = [min(ends[0], x[0] * (1 - 1e-6)), *x, max(ends[1], x[-1] * (1 + 1e-6))]
    x = np.array([0.0, *inside, 1.0])
    y = np.array([low * (1 - END_SLOPE), low, *y, high, high + (1 - high) * END_SLOPE])
    y = (1 - MIN_SLOPE) * y + MIN_SLOPE * x
    # nine digits are more than float32 has, and a third of the text of seventeen
    points = [(float(f"{a:.9g}"), float(f"{b:.9g}")) for a, b in zip(x, y, strict=True)]
    knots = points[:1]
    for point in points[1:]:
        if point[0] > knots[-1][0] and point[1] > knots[-1][1]:
            knots.append(point)
    scores, precisions = np.array(knots, np.float64).T
    return Curve(scores.copy(), precisions.copy(), method, len(matched), int(matched.sum()))


def calibrated(detections: Sequence[Mapping[str, Any]], calibration: Calibration) -> list[dict[str, Any]]:
    """Return the detections of images, as `engine.predict` returns them, with calibrated scores (n,) float64."""
    return [{**image, "scores": calibration.apply(image["scores"], image["labels"])} for image in detections]
