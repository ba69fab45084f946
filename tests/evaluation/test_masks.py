"""Mask figures against COCO's own code and by hand; the correlation of ranks; the study of score thresholds."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import spearmanr
from support import evaluated, opened

from brs_detr.evaluation.coco_eval import evaluate_coco, fast_backend_installed
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.matching import ClassMatches
from brs_detr.evaluation.results import detections_to_results
from brs_detr.ops.rle import as_text, encode

BACKENDS = ["pycocotools", pytest.param("faster", marks=pytest.mark.skipif(not fast_backend_installed(), reason="no"))]
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def noisy_masks(truth, images=12, seed=0):
    """Move the masks of objects by some pixels, with tied scores and boxes that cannot stand in for them."""
    rng = np.random.default_rng(seed)
    coco = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
    chosen = {image["id"] for image in truth["images"][:images]}
    results = []
    for a in truth["annotations"]:
        if a["image_id"] not in chosen:
            continue
        for _ in range(rng.integers(0, 3)):
            mask = np.roll(coco.annToMask(a), rng.integers(-3, 4, 2), axis=(0, 1))
            x, y, w, h = a["bbox"]
            results.append(
                {
                    "image_id": a["image_id"],
                    "category_id": a["category_id"],
                    "bbox": [x + rng.normal(0, 3), y, w, h],
                    "score": float(rng.integers(1, 30) / 30),
                    "segmentation": as_text(encode(mask)),
                }
            )
    return results, sorted(chosen)


def official(truth, results, images):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        masks = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
        evaluation = COCOeval(coco, coco.loadRes(masks), "segm")
        evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nuclei", "tiny_coco"])
def test_mask_figures_are_cocos(shared_data, name, backend):
    truth = json.loads((shared_data / name / "annotations" / "val.json").read_text())
    results, images = noisy_masks(truth)
    ours = opened(shared_data / name, masks=True)
    summary = evaluate_coco(ours, results, image_ids=images, masks=True, backend=backend)
    expected, precision = official(truth, results, images)
    np.testing.assert_allclose([summary.stats[f"mask_{n}"] for n in NAMES], expected, rtol=0, atol=1e-12)
    at_90 = precision[8, :, :, 0, -1]
    assert summary.stats["mask_AP90"] == pytest.approx(at_90[at_90 > -1].mean())
    plain = evaluate_coco(ours, results, image_ids=images, backend=backend)
    assert {k: v for k, v in summary.stats.items() if "mask" not in k} == plain.stats
    assert summary.stats["mask_AP"] != pytest.approx(plain.stats["AP"], abs=1e-3)


def square(x, y, side, size=60):
    bitmap = np.zeros((size, size))
    bitmap[y : y + side, x : x + side] = 1
    return bitmap


def one_image(masks, size=60):
    """Objects of one class, each with the full image as box, so that they differ in their masks only."""
    return {
        "images": [{"id": 3, "height": size, "width": size, "file_name": "a.png"}],
        "categories": [{"id": 5, "name": "cell"}],
        "annotations": [
            {
                "id": n,
                "image_id": 3,
                "category_id": 5,
                "bbox": [0, 0, size, size],
                "area": float(m.sum()),
                "iscrowd": 0,
                "segmentation": as_text(encode(m)),
            }
            for n, m in enumerate(masks, 1)
        ],
    }


def result(mask, score, size=60):
    return {
        "image_id": 3,
        "category_id": 5,
        "bbox": [0, 0, size, size],
        "score": score,
        "segmentation": as_text(encode(mask)),
    }


def test_optimal_lrp_of_masks_by_hand():
    """Two objects; one found exactly, one with IoU 320 / 400 = .8, and a false positive of lower score."""
    truth = one_image([square(0, 0, 20), square(30, 30, 20)])
    second = square(30, 30, 20)
    second[46:] = 0
    results = [result(square(0, 0, 20), 0.9), result(second, 0.8), result(square(0, 40, 10), 0.7)]
    stats = evaluated(truth, results, masks=True).stats
    assert stats["mask_oLRPloc"] == pytest.approx(0.1)  # mean of 0 and .2
    assert stats["mask_oLRP"] == pytest.approx((0.2 / 0.5) / 2) and stats["mask_oLRPfp"] == stats["mask_oLRPfn"] == 0
    assert stats["mask_correlation"] == pytest.approx(1.0)
    assert stats["mask_AP50"] == pytest.approx(1.0) and 0.4 < stats["mask_AP90"] < 0.6


def test_the_area_of_a_mask_is_that_of_its_pixels():
    """A false mask of 100 pixels, best score first, is a small one, though its box has 3,600."""
    truth = one_image([square(0, 0, 20)])
    stats = evaluated(truth, [result(square(40, 40, 10), 0.9), result(square(0, 0, 20), 0.8)], masks=True).stats
    assert stats["mask_APs"] == stats["mask_AP"] == pytest.approx(0.5)


def test_the_table_and_the_files_show_both(tmp_path):
    truth = one_image([square(0, 0, 20), square(30, 30, 20)])
    truth["categories"].append({"id": 9, "name": "none"})
    results = [result(square(0, 0, 20), 0.9), result(square(31, 30, 20), 0.8)]
    summary = evaluated(truth, results, masks=True, score_thresholds=(0.1, 0.85, 0.95))
    text = summary.table()
    assert "boxes" in text and "masks" in text and "mask AP" in text and "AP90" in text
    summary.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["stats"]["mask_AP"] == summary.stats["mask_AP"]
    assert saved["per_class"][1]["mask_correlation"] is None
    rows = list(csv.DictReader((tmp_path / "score_thresholds.csv").open()))
    assert [row["score"] for row in rows] == ["0.1", "0.85", "0.95"]
    assert [float(row["detections"]) for row in rows] == [2, 1, 0]


def test_a_higher_threshold_is_an_evaluation_of_fewer_detections():
    truth = one_image([square(0, 0, 20), square(30, 30, 20), square(0, 30, 20)])
    results = [result(square(0, i, 20), s) for i, s in ((0, 0.9), (2, 0.4), (30, 0.5))]
    study = evaluated(truth, results, masks=True, score_thresholds=(0.0, 0.4, 0.45)).score_study
    alone = [evaluated(truth, [r for r in results if r["score"] > t], masks=True).stats for t in (0.0, 0.4, 0.45)]
    assert [row["mask_AP"] for row in study] == [stats["mask_AP"] for stats in alone]
    assert [row["detections"] for row in study] == [3, 2, 2] and study[0]["AP"] == alone[0]["AP"]


@pytest.mark.parametrize(
    ("rle", "what"),
    [
        ({"size": [60, 50], "counts": "0"}, "60x60"),
        ({"size": [60, 60], "counts": "o" * 40}, "60x60"),
        (None, "60x60"),
    ],
)
def test_masks_that_are_not_of_their_image_are_refused(rle, what):
    truth = one_image([square(0, 0, 20)])
    with pytest.raises(ValueError, match=what):
        evaluated(truth, [result(square(0, 0, 20), 0.5) | {"segmentation": rle}], masks=True)
    with pytest.raises(ValueError, match="no `segmentation`"):
        evaluated(truth, [{k: v for k, v in result(square(0, 0, 20), 0.5).items() if k != "segmentation"}], masks=True)


def test_ground_truth_without_masks_is_refused():
    truth = GroundTruth.from_dataset(one_image([square(0, 0, 20)]))
    with pytest.raises(ValueError, match="without masks"):
        evaluate_coco(truth, [result(square(0, 0, 20), 0.5)], masks=True)


def test_detections_carry_their_masks():
    masks = [encode(square(0, 0, 20)), encode(square(9, 9, 3))]
    detections = {"boxes": np.zeros((2, 4)), "scores": np.array([0.9, 0.1]), "labels": np.array([0, 0]), "masks": masks}
    results = detections_to_results(3, detections, [5])
    assert [r["segmentation"]["counts"] for r in results] == [m["counts"].decode() for m in masks]
    json.dumps(results)


def matches(scores, ious):
    order = np.argsort(-np.array(scores), kind="stable")
    ious = np.array(ious)[order]
    return ClassMatches(np.array(scores)[order], ious >= 0.5, np.where(ious >= 0.5, ious, 0), len(ious))


def test_correlations_by_hand():
    assert matches([0.9, 0.8, 0.7], [0.9, 0.7, 0.6]).rank_correlation() == pytest.approx(1)
    assert matches([0.9, 0.8, 0.7], [0.6, 0.7, 0.9]).rank_correlation() == pytest.approx(-1)
    # ranks 3 2 1 and 1 3 2: 1 - 6 (4 + 1 + 1) / (3 (9 - 1)); the false positive does not count
    assert matches([0.9, 0.8, 0.7, 0.95], [0.6, 0.9, 0.7, 0.1]).rank_correlation() == pytest.approx(-0.5)
    assert matches([0.9, 0.8], [0.9, 0.1]).rank_correlation() is None
    assert matches([0.9, 0.9], [0.9, 0.8]).rank_correlation() is None
    assert matches([], []).rank_correlation() is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(5, 10)), min_size=3, max_size=20))
@settings(max_examples=100, deadline=None)
def test_correlation_is_spearmans(pairs):
    scores, ious = ([value / 10 for value in column] for column in zip(*pairs))
    found = matches(scores, ious).rank_correlation()
    if len(set(scores)) == 1 or len(set(ious)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(scores, ious).statistic)
