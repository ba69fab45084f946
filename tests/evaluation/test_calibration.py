"""Scores become precisions, and nothing else changes: the order of a class, its AP, what is selected of it."""

import json

import numpy as np
import pytest
from support import evaluated

from brs_detr.evaluation import calibration
from brs_detr.evaluation.calibration import Calibration, calibrated, fit_calibration, fit_isotonic, fit_platt
from brs_detr.evaluation.coco_eval import match_folds
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.matching import ClassMatches
from brs_detr.evaluation.reliability import merge


def matches_of(scores, matched, objects=None):
    order = np.argsort(-np.asarray(scores), kind="stable")
    matched = np.asarray(matched, bool)[order]
    return ClassMatches(np.asarray(scores)[order], matched, matched * 0.8, objects or int(matched.sum()))


def drawn(count, seed=0, precision=lambda score: score**2, low=0.0, high=1.0):
    """Detections that are right with a known probability of their score."""
    random = np.random.default_rng(seed)
    scores = random.uniform(low, high, count).astype(np.float32)
    return scores, random.random(count) < precision(scores)


def scene(seed=0, images=60, classes=(9, 4, 6)):
    """A dataset with its detections, whose scores are squeezed as those of a ranking loss, and as float32."""
    random = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for number, category in enumerate(classes):
            for row in range(random.integers(1, 4)):
                box = [60.0 * row, 70.0 * number, 40.0, 40.0]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box}
                    | {"area": 1600.0, "iscrowd": 0}
                )
                if random.random() < 0.85:
                    shifted = [box[0] + random.uniform(0, 12), *box[1:]]
                    results.append((image, category, shifted, random.normal(1.0, 1.0)))
            for _ in range(15):
                box = [*random.uniform(0, 300, 2).tolist(), 40.0, 40.0]
                results.append((image, category, box, random.normal(-2.0, 1.0)))
    content = {
        "images": [{"id": i, "width": 400, "height": 400, "file_name": f"{i}.png"} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": category, "name": f"class {category}"} for category in classes],
    }
    found = [
        {"image_id": i, "category_id": c, "bbox": b, "score": float(np.float32(0.04 / (1 + np.exp(-z))))}
        for i, c, b, z in results
    ]
    return content, found, list(classes)


def fitted(content, found, category_ids, images=60):
    truth = GroundTruth.from_dataset(content)
    folds = match_folds(truth, found, category_ids, truth.image_ids, 100)
    return fit_calibration(merge(folds), images)


def mapped(found, category_ids, maps):
    scores = np.array([row["score"] for row in found])
    labels = np.array([category_ids.index(row["category_id"]) for row in found])
    return [{**row, "score": float(s)} for row, s in zip(found, maps.apply(scores, labels), strict=True)]


@pytest.mark.parametrize("precision", [np.float64, np.float32])
def test_ap_and_everything_but_the_scores_stay(precision):
    """Also where the mapped scores are float32, as in an exported file."""
    content, found, ids = scene()
    maps = fitted(content, found, ids)
    calibrated_results = [{**row, "score": float(precision(row["score"]))} for row in mapped(found, ids, maps)]
    before, after = evaluated(content, found), evaluated(content, calibrated_results)
    assert 0.2 < before.stats["AP"] < 0.9 and len(set(maps.of_label)) == 3
    assert after.stats == pytest.approx(before.stats, abs=1e-4)
    for old, new in zip(before.per_class, after.per_class, strict=True):
        assert new["AP"] == pytest.approx(old["AP"], abs=1e-4)
        assert (new["precision"], new["recall"]) == (old["precision"], old["recall"])
    # predict compares with the stored thresholds, which the evaluation of the mapped scores has to choose too
    best = {row["category_id"]: row["score"] for row in after.per_class}
    assert [precision(value) for value in maps.thresholds] == [best[category] for category in ids]
    assert max(row["score"] for row in found) < 0.05 and after.per_class[0]["score"] > 0.2


@pytest.mark.parametrize("fit", [fit_isotonic, fit_platt])
@pytest.mark.parametrize("seed", range(4))
def test_a_map_keeps_the_order_of_all_scores(fit, seed):
    """Also of neighbors in float32, which are 2e-9 apart at 0.03, and where worse scores are right more often."""
    precision = [np.sqrt, lambda s: 1 - s, lambda s: 0 * s + 0.9, lambda s: (s > 0.03).astype(float)][seed]
    scores, matched = drawn(500, seed, precision, 0.0, 0.06)
    curve = fit(scores, matched)
    near = np.float32(0.03) + np.arange(1000, dtype=np.float32) * np.spacing(np.float32(0.03))
    every = np.unique(np.concatenate([near, scores, np.linspace(0, 1, 999, dtype=np.float32)]))
    values = curve(every)
    assert (np.diff(values) > 0).all() and values[0] >= 0 and values[-1] <= 1


def test_an_isotonic_map_estimates_precision():
    scores, matched = drawn(20_000)
    curve = fit_isotonic(scores, matched)
    at = np.linspace(0.05, 0.95, 19)
    assert curve(at) == pytest.approx(at**2, abs=0.05)
    assert (curve.method, curve.detections, curve.true_positives) == ("isotonic", 20_000, int(matched.sum()))
    assert len(curve.scores) <= calibration.MAX_BLOCKS + 2


def test_the_steps_of_the_regression_by_hand():
    """Of twenty detections at 0.1 one is right, of twenty at 0.3 16, of twenty at 0.2 17: the last two are pooled."""
    scores = np.repeat([0.1, 0.3, 0.2], 20)
    matched = np.concatenate([np.arange(20) < 1, np.arange(20) < 16, np.arange(20) < 17])
    values = fit_isotonic(scores, matched)(np.array([0.1, 0.25, 0.9]))
    high, low = 35 / 36, 1 / 28  # Platt's targets of 34 true and 26 false positives
    assert values[0] == pytest.approx((high + 19 * low) / 20, abs=2e-4)
    assert values[1] == pytest.approx((33 * high + 7 * low) / 40, abs=2e-4)
    assert values[1] < values[2] < values[1] + 0.2 * (1 - values[1])  # nearly constant beyond the last step


def test_platt_finds_the_logistic_function():
    def precision(score):
        return 1 / (1 + np.exp(-(2 * np.log(score / (1 - score)) - 1)))

    scores, matched = drawn(20_000, 1, precision, 0.01, 0.99)
    at = np.linspace(0.05, 0.95, 19)
    assert fit_platt(scores, matched)(at) == pytest.approx(precision(at), abs=0.03)


def test_which_map_a_class_gets():
    many, some = (matches_of(*drawn(count, 3)) for count in (400, 60))
    assert many.matched.sum() >= calibration.MIN_ISOTONIC > some.matched.sum() >= calibration.MIN_PLATT
    never = matches_of([0.5, 0.4], [False, False], objects=3)
    maps = fit_calibration([many, some, never])
    assert maps.of_label == (1, 0, 0) and [curve.method for curve in maps.curves] == ["isotonic", "isotonic"]
    assert maps.curves[0].detections == 462 and maps.curves[1].detections == 400
    assert maps.thresholds[2] == 1.0  # never right: nothing of it is shown
    few = fit_calibration([some, never])
    assert few.of_label == (0, 0) and [curve.method for curve in few.curves] == ["platt"]
    assert fit_calibration([matches_of([0.5] * 9, [True] * 9), never]) is None
    assert fit_calibration([matches_of([0.5] * 99, [False] * 99, objects=5)]) is None


def test_ten_that_are_all_right_do_not_show_a_precision_of_one():
    curve = fit_platt(np.linspace(0.3, 0.6, 10), np.ones(10, bool))
    assert 0.8 < curve(np.array([0.6]))[0] < 0.99


def test_what_is_stored_is_what_was_fitted():
    content, found, ids = scene(1)
    maps = fitted(content, found, ids)
    text = json.dumps(maps.as_dict())
    read = Calibration.from_dict(json.loads(text), 3)
    scores, labels = np.linspace(0, 0.05, 500), np.arange(500) % 3
    assert np.array_equal(read.apply(scores, labels), maps.apply(scores, labels))
    assert read.thresholds == maps.thresholds and read.images == 60
    assert len(text) < 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of_label": [0]}, "of 1 classes, not 2"),
        ({"of_label": [0, 7]}, "does not increase, or is missing"),
        ({"curves": 5}, "not one of this program"),
        ({"curves": [{"method": "isotonic"}]}, "not one of this program"),
        ({"scores": [0.0, 0.0]}, "does not increase"),
        ({"precisions": [0.5, 0.2]}, "does not increase"),
        ({"precisions": [0.5, float("nan")]}, "does not increase"),
        ({"scores": [0.0, 0.5, 1.0]}, "does not increase"),
    ],
)
def test_a_damaged_map_is_refused(change, message):
    curve = {"method": "platt", "detections": 20, "true_positives": 10, "scores": [0.0, 1.0], "precisions": [0.0, 0.9]}
    curve |= {key: change[key] for key in change if key in curve}
    content = {"images": 1, "of_label": [0, 0], "thresholds": [0.5, 0.5], "curves": [curve]}
    Calibration.from_dict(content | {"curves": [{**curve, "scores": [0, 1], "precisions": [0, 0.9]}]}, 2)
    with pytest.raises(ValueError, match=message):
        Calibration.from_dict(content | {key: change[key] for key in change if key in content}, 2)


def test_detections_keep_all_but_their_scores():
    maps = fit_calibration([matches_of(*drawn(8000, 3)), matches_of(*drawn(8000, 4, np.sqrt))])
    image = {"image_id": 4, "boxes": np.zeros((2, 4)), "scores": np.float32([0.5, 0.4]), "labels": np.array([0, 1])}
    (result,) = calibrated([image], maps)
    assert result["scores"].dtype == np.float64
    assert result["scores"] == pytest.approx([0.25, 0.63], abs=0.1)  # now the other class is ahead
    assert result["image_id"] == 4 and result["boxes"] is image["boxes"] and image["scores"][0] == 0.5
    (empty,) = calibrated([image | {"scores": np.zeros(0), "labels": np.zeros(0, int)}], maps)
    assert empty["scores"].shape == (0,)
