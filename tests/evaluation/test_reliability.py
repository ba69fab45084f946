"""Calibration errors by hand, and no image on both sides of them."""

from dataclasses import replace

import numpy as np
import pytest

from brs_detr.evaluation import reliability
from brs_detr.evaluation.calibration import fit_calibration
from brs_detr.evaluation.matching import ClassMatches
from brs_detr.evaluation.reliability import (
    Shown,
    assess,
    binned_error,
    cross_fitted,
    diagram,
    exact_errors,
    fold_of_images,
    laece,
    merge,
    shown,
)


def class_matches(scores, matched, ious=0.8):
    order = np.argsort(-scores, kind="stable")
    matched = matched[order]
    return ClassMatches(scores[order], matched, matched * ious, int(matched.sum()) + 5)


def folds_of(precision, classes=3, count=400, seed=0):
    """Five folds of detections whose raw scores are a tenth of what their precision depends on."""
    random = np.random.default_rng(seed)
    folds = []
    for _ in range(5):
        scores = random.random((classes, count))
        folds.append([class_matches(own / 10, random.random(count) < precision(own)) for own in scores])
    return folds


def test_the_binned_error_by_hand():
    """Two at 0.9 of which one is right, two at 0.1 of which none is: 2/4 |0.9 - 0.5| + 2/4 |0.1 - 0|."""
    confidences = np.array([0.9, 0.1, 0.9, 0.1])
    assert binned_error(confidences, np.array([True, False, False, False]), 10) == pytest.approx(0.25)
    # in one bin the two differences cancel in part
    assert binned_error(confidences, np.array([True, False, False, False]), 1) == pytest.approx(0.25)
    assert binned_error(confidences, np.array([True, True, False, False]), 1) == pytest.approx(0.0)
    assert binned_error(confidences, np.array([True, True, False, False]), 10) == pytest.approx(0.4)
    assert binned_error(np.zeros(0), np.zeros(0), 10) == 0
    assert binned_error(np.array([1.0, 0.97]), np.array([True, True]), 25) == pytest.approx(0.015)  # one bin


def test_laece_by_hand():
    """Class 1: one of two at 0.8 is right with IoU 0.9, |0.8 - 0.5 x 0.9|; class 2: 0; class 3 has none."""
    confidences = [np.array([0.8, 0.8]), np.array([0.7]), np.zeros(0)]
    ious = [np.array([0.9, 0.0]), np.array([0.7]), np.zeros(0)]
    assert laece(confidences, ious) == pytest.approx((0.35 + 0) / 2)
    assert laece([np.zeros(0)], [np.zeros(0)]) == 0
    # 0.835 and 0.845 are in bins of their own, [0.80, 0.84) and [0.84, 0.88): the differences do not cancel
    assert laece([np.array([0.835, 0.845])], [np.array([1.0, 0.68])]) == pytest.approx(0.165)


def test_folds_are_the_same_for_the_same_images_and_of_equal_size():
    ids = [5, 900_000_000_001, 17, 3, *range(100, 140)]
    folds = fold_of_images(ids)
    assert folds == fold_of_images(reversed(ids)) and set(folds) == set(ids)
    sizes = np.bincount(list(folds.values()), minlength=5)
    assert sizes.max() - sizes.min() <= 1
    neighbors = [folds[image] for image in range(100, 140)]
    assert neighbors != [(neighbors[0] + n) % 5 for n in range(40)]  # not in the order of the ids
    assert set(fold_of_images([1, 2]).values()) == {0, 1}


def test_a_fold_is_measured_with_a_map_that_has_not_seen_it(monkeypatch):
    folds, fits = folds_of(lambda s: s), []

    def fit(matches):
        fits.append(np.concatenate([match.scores for match in matches]))
        return fit_calibration(matches)

    monkeypatch.setattr(reliability, "fit_calibration", fit)
    assert cross_fitted(folds) is not None
    assert len(fits) == 5
    for fold, seen in zip(folds, fits, strict=True):
        own = np.concatenate([match.scores for match in fold])
        assert not np.isin(own, seen).any() and len(own) + len(seen) == 6000


def test_scores_a_tenth_of_the_precision_are_calibrated():
    measured = cross_fitted(folds_of(lambda s: s))
    raw, calibrated = measured.dece
    assert raw > 0.5 and calibrated < 0.05
    assert measured.laece[1] < measured.laece[0]
    assert measured.laece[1] == pytest.approx(measured.exact[1], abs=0.05)  # true positives have an IoU of 0.8
    assert measured.detections == sum(row["detections"] for row in measured.bins if row["scores"] == "raw")
    content = measured.as_dict()
    assert content["D-ECE"] == {"raw": raw, "calibrated": calibrated, "exact": measured.exact[0]}
    assert measured.as_metrics()["LaECE_raw"] == measured.laece[0]


def test_a_map_that_memorizes_noise_is_found_out():
    """Nothing can be learned of scores that say nothing; on its own images the map seems better than on others."""
    folds = folds_of(lambda s: 0 * s + 0.5, classes=1, count=40, seed=2)
    everything = merge(folds)
    held, own = cross_fitted(folds), reliability.of_stored(everything, fit_calibration(everything))
    assert held.dece[1] > own.dece[1]


def test_too_few_true_positives_give_no_figures():
    assert cross_fitted(folds_of(lambda s: 0 * s)) is None


def test_a_stored_map_is_measured_on_other_images_only():
    folds, others = folds_of(lambda s: s), folds_of(lambda s: s**2, seed=1)
    stored = fit_calibration(merge(folds), images=77)
    assert "5 folds" in assess(folds, stored, same_images=True).source
    assert "5 folds" in assess(folds, None, same_images=False).source
    measured = assess(others, stored, same_images=False)
    assert "77 images" in measured.source
    assert measured.dece[1] > 0.1  # of another distribution, for which the map is wrong
    unannotated = [[replace(match, num_objects=0) for match in fold] for fold in folds_of(lambda s: 0 * s)]
    assert assess(unannotated, stored, same_images=False) is None


def test_shown_are_the_detections_of_the_best_f1():
    matches = merge(folds_of(lambda s: s))
    for match, part in zip(matches, shown(matches, fit_calibration(matches)), strict=True):
        best = match.best_f1()
        assert part.matched.mean() == best["precision"] and part.matched.sum() / match.num_objects == best["recall"]
        assert part.raw.min() == best["score"]


def test_exact_scores_of_few_detections_show_an_error_too():
    """Sixteen at 0.5: E |right / 16 - 0.5| = 8 binomial(16, 8) / 2^16 / 16 = 0.098."""
    part = Shown(np.full(16, 0.5), np.full(16, 0.5), np.ones(16, bool), np.full(16, 0.8))
    dece, localized = exact_errors([part])
    assert dece == pytest.approx(0.098, abs=0.02)
    assert localized == pytest.approx(0.126, abs=0.03)  # E |0.8 right / 16 - 0.5|, from the binomial distribution
    assert exact_errors([part]) == (dece, localized)


def test_rows_of_the_diagram():
    rows = diagram("raw", np.array([0.05, 0.15, 0.95, 1.0]), np.array([0, 1, 1, 1]), np.array([0, 0.6, 0.8, 1.0]))
    assert [(row["low"], row["high"], row["detections"]) for row in rows] == [(0, 0.1, 1), (0.1, 0.2, 1), (0.9, 1, 2)]
    assert rows[-1]["confidence"] == pytest.approx(0.975) and rows[-1]["quality"] == pytest.approx(0.9)
    assert [row["precision"] for row in rows] == [0, 1, 1]
