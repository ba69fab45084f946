"""Matching against COCO's own match arrays; LRP on cases worked out by hand."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from brs_detr.evaluation.matching import ClassMatches, match_classes, optimal_lrp

boxes = st.tuples(*(st.integers(0, 6) for _ in range(2)), *(st.integers(1, 5) for _ in range(2)))
truths = st.lists(st.tuples(boxes, st.booleans(), st.integers(1, 2)), max_size=6)
found = st.lists(st.tuples(boxes, st.integers(1, 99), st.integers(1, 2)), max_size=12, unique_by=lambda d: d[1])


@settings(max_examples=150, deadline=None)
@given(truths=truths, found=found, limit=st.sampled_from([2, 100]))
def test_matches_are_cocos(truths, found, limit):
    base = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 7}]}
    truth = [
        {"id": n, "image_id": i, "category_id": 7, "bbox": list(b), "area": b[2] * b[3], "iscrowd": int(c)}
        for n, (b, c, i) in enumerate(truths, 1)
    ]
    detections = [
        {"id": n, "image_id": i, "category_id": 7, "bbox": list(b), "score": s / 100, "area": b[2] * b[3], "iscrowd": 0}
        for n, (b, s, i) in enumerate(found, 1)
    ]
    ours = match_classes(truth, detections, [7], max_detections=limit)[7]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for annotations in (truth, detections):
            side = COCO()
            side.dataset = base | {"annotations": json.loads(json.dumps(annotations))}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.maxDets = [limit]
        evaluation.evaluate()
    images = [image for image in evaluation.evalImgs if image is not None]
    rows = [
        (score, bool(match))
        for image in images
        for score, match, ignored in zip(image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0], strict=True)
        if not ignored
    ]
    assert list(zip(ours.scores.tolist(), ours.matched.tolist(), strict=True)) == sorted(rows, reverse=True)
    assert ours.num_objects == sum(not t["iscrowd"] for t in truth)
    assert ((ours.ious >= 0.5) == ours.matched).all()


def row_of(*box, **more):
    return {"image_id": 1, "category_id": 7, "bbox": list(box), "iscrowd": 0, **more}


def test_of_equal_overlaps_the_last_object_is_taken():
    """The first detection overlaps both objects by 15 / 25, the second one only the first object."""
    truths = [row_of(5, 0, 20, 20), row_of(15, 0, 20, 20)]
    detections = [row_of(10, 0, 20, 20, score=0.9), row_of(5, 0, 20, 20, score=0.8)]
    matches = match_classes(truths, detections, [7])[7]
    assert matches.matched.tolist() == [True, True]
    assert matches.ious.tolist() == pytest.approx([0.6, 1.0])


def test_an_overlap_of_exactly_the_threshold_is_a_match():
    matches = match_classes([row_of(0, 0, 20, 20)], [row_of(0, 0, 20, 10, score=0.9)], [7])[7]
    assert matches.matched.tolist() == [True] and matches.ious.tolist() == [0.5]


def test_an_object_is_found_once_and_by_the_best_score():
    detections = [row_of(0, 0, 20, 20, score=0.3), row_of(0, 0, 20, 18, score=0.9), row_of(0, 0, 20, 20, score=0.5)]
    matches = match_classes([row_of(0, 0, 20, 20)], detections, [7])[7]
    assert matches.scores.tolist() == [0.9, 0.5, 0.3] and matches.matched.tolist() == [True, False, False]
    assert match_classes([row_of(0, 0, 20, 20)], detections, [7], max_detections=2)[7].scores.tolist() == [0.9, 0.5]


def ranked(found, ious, objects):
    found = np.array(found, bool)
    return ClassMatches(np.linspace(0.9, 0.1, len(found)), found, np.array(ious, float), objects)


def test_lrp_of_a_hand_made_ranking():
    """Taking 1: (0.2/0.5 + 0 + 2)/3 = 0.8; 2: (0.4 + 1 + 2)/4 = 0.85; 3: (1.0 + 1 + 1)/4 = 0.75."""
    result = optimal_lrp(ranked([1, 0, 1], [0.8, 0, 0.7], objects=3))
    assert result.error == pytest.approx(0.75)
    assert result.localization == pytest.approx(0.25)
    assert result.false_positives == pytest.approx(1 / 3)
    assert result.false_negatives == pytest.approx(1 / 3)
    assert result.score == pytest.approx(0.1)


def test_lrp_is_zero_for_perfect_one_for_useless_and_undefined_without_objects():
    assert optimal_lrp(ranked([1, 1], [1, 1], objects=2)).error == 0
    assert optimal_lrp(ranked([0, 0], [0, 0], objects=2)).error == 1
    assert optimal_lrp(ranked([], [], objects=2)).error == 1
    assert optimal_lrp(ranked([0], [0], objects=0)).error == -1


def test_lrp_is_the_weighted_sum_of_its_parts():
    """Equation 4 of the paper: Z LRP = N_TP LRP_loc / (1 - tau) + |detections| FP + |objects| FN."""
    rng = np.random.default_rng(0)
    hits = rng.random(40) < 0.6
    matches = ranked(hits, np.where(hits, rng.uniform(0.5, 1, 40), 0), objects=35)
    best = optimal_lrp(matches)
    taken = int((matches.scores >= best.score).sum())
    true = int(hits[:taken].sum())
    total = true * best.localization / 0.5 + taken * best.false_positives + 35 * best.false_negatives
    assert best.error == pytest.approx(total / (taken + 35 - true))


def test_detections_of_one_score_are_taken_together():
    """Two tied detections, one of them false: no threshold keeps only the right one."""
    tied = ClassMatches(np.array([0.5, 0.5]), np.array([True, False]), np.array([1.0, 0.0]), 1)
    assert tied.best_f1()["precision"] == pytest.approx(0.5)
    assert optimal_lrp(tied).error == pytest.approx(0.5)
