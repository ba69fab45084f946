"""LVIS's rules, by hand and against a slow form of its evaluation written from the paper."""

import numpy as np
import pytest
from support import evaluated

from brs_detr.evaluation.coco_eval import fast_backend_installed
from brs_detr.evaluation.federated import countable
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.ops.rle import as_text, encode

BACKENDS = ["pycocotools", pytest.param("faster", marks=pytest.mark.skipif(not fast_backend_installed(), reason="no"))]
CAT, DOG, EEL = 30, 4, 77


def lvis(annotations, negative, not_exhaustive, images=(11, 5)):
    """Annotations are (image, category, xywh); the lists are by image."""
    return {
        "images": [
            {
                "id": image,
                "height": 100,
                "width": 100,
                "coco_url": f"http://images.cocodataset.org/val2017/{image:012d}.jpg",
                "neg_category_ids": negative.get(image, []),
                "not_exhaustive_category_ids": not_exhaustive.get(image, []),
            }
            for image in images
        ],
        "categories": [
            {"id": CAT, "name": "cat", "frequency": "f"},
            {"id": DOG, "name": "dog", "frequency": "r"},
            {"id": EEL, "name": "eel", "frequency": "r"},
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": list(b), "area": b[2] * b[3], "iscrowd": 0}
            | {"segmentation": rle(b)}
            for n, (i, c, b) in enumerate(annotations, 1)
        ],
    }


def rle(box):
    bitmap = np.zeros((100, 100))
    x, y, w, h = (int(v) for v in box)
    bitmap[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    return as_text(encode(bitmap))


def found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score, "segmentation": rle(box)}


A, B, C = (0, 0, 40, 40), (50, 50, 40, 40), (0, 50, 40, 40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", [True, False])
def test_by_hand(backend, masks):
    """Of five detections of no object, only the one of a class known to be absent counts."""
    truth = lvis([(11, CAT, A), (11, DOG, B), (5, CAT, A)], {11: [EEL], 5: [DOG]}, {11: [DOG]})
    results = [
        found(11, DOG, C, 0.95),  # not all dogs of the image are annotated: ignored
        found(5, EEL, A, 0.94),  # whether there is an eel is unknown: left out
        found(11, DOG, B, 0.90),  # the dog
        found(5, DOG, A, 0.92),  # there is none: false
        found(11, CAT, A, 0.8),
        found(5, CAT, A, 0.7),
        found(11, EEL, A, 0.99),  # there is none, but no eel anywhere: the class has no AP
    ]
    summary = evaluated(truth, results, backend=backend, masks=masks, max_detections=(300,))
    by_name = {row["name"]: row for row in summary.per_class}
    for prefix in ("", "mask_") if masks else ("",):
        assert by_name["cat"][prefix + "AP"] == pytest.approx(1)
        assert by_name["dog"][prefix + "AP"] == pytest.approx(0.5)  # one false before the only true one
        assert by_name["eel"][prefix + "AP"] == -1
        stats = {name: summary.stats[prefix + name] for name in ("AP", "APr", "APc", "APf")}
        assert stats == pytest.approx({"AP": 0.75, "APr": 0.5, "APc": -1, "APf": 1})
        assert by_name["dog"][prefix + "precision"] == pytest.approx(0.5)
    assert summary.confusion is None and "APr" in summary.table() and summary.detections == 6


def test_the_best_of_all_classes_count():
    truth = GroundTruth.from_dataset(lvis([(11, CAT, A), (11, DOG, B)], {11: [EEL]}, {}))
    results = [found(11, EEL, A, 0.3), found(11, CAT, A, 0.9), found(11, DOG, A, 0.2), found(11, CAT, B, 0.5)]
    assert [d["score"] for d in countable(truth, results, 3)] == [0.3, 0.9, 0.5]
    assert [d["score"] for d in countable(truth, results, 2)] == [0.9, 0.5]


def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def counted_by_hand(truth, results, limit):
    """AP of each class over IoU .5 to .95, straight from the rules."""
    lists = {image["id"]: image for image in truth["images"]}
    positive = {(a["image_id"], a["category_id"]) for a in truth["annotations"]}
    chosen = []
    for image in lists:
        best = sorted((r for r in results if r["image_id"] == image), key=lambda r: -r["score"])[:limit]
        chosen += [
            r
            for r in best
            if (image, r["category_id"]) in positive or r["category_id"] in lists[image]["neg_category_ids"]
        ]
    answer = {}
    for category in (c["id"] for c in truth["categories"]):
        objects = [a for a in truth["annotations"] if a["category_id"] == category]
        if not objects:
            answer[category] = -1
            continue
        values = []
        for threshold in np.linspace(0.5, 0.95, 10):
            free, hits = {a["id"] for a in objects}, []
            for r in sorted((r for r in chosen if r["category_id"] == category), key=lambda r: -r["score"]):
                near = [(iou(r["bbox"], a["bbox"]), a["id"]) for a in objects if a["image_id"] == r["image_id"]]
                near = [pair for pair in near if pair[1] in free and pair[0] >= threshold - 1e-10]
                if near:
                    free.remove(max(near)[1])
                    hits.append(True)
                elif category not in lists[r["image_id"]]["not_exhaustive_category_ids"]:
                    hits.append(False)
            hits = np.array(hits, bool)
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            recall = np.cumsum(hits) / len(objects)
            points = [precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)]
            values.append(np.mean(points))
        answer[category] = np.mean(values)
    return answer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_generated_images_agree_with_the_slow_form(seed, backend):
    rng = np.random.default_rng(seed)
    images, categories = range(1, 9), (CAT, DOG, EEL)
    annotations, negative, not_exhaustive = [], {}, {}
    for image in images:
        for category in categories:
            kind = rng.choice(["present", "incomplete", "absent", "unknown"])
            if kind in ("present", "incomplete"):
                for _ in range(rng.integers(1, 4)):
                    annotations.append(
                        (image, category, [*rng.integers(0, 60, 2).tolist(), *rng.integers(15, 40, 2).tolist()])
                    )
            if kind == "incomplete":
                not_exhaustive.setdefault(image, []).append(category)
            if kind == "absent":
                negative.setdefault(image, []).append(category)
    truth = lvis(annotations, negative, not_exhaustive, images)
    scores = iter(rng.permutation(10_000) / 10_000)
    results = []
    for image, category, box in annotations:
        for _ in range(rng.integers(0, 3)):
            moved = [*(np.array(box[:2]) + rng.integers(-4, 5, 2)).tolist(), *box[2:]]
            results.append(found(image, category, moved, float(next(scores))))
    for _ in range(60):
        box = [*rng.integers(0, 60, 2).tolist(), *rng.integers(15, 40, 2).tolist()]
        results.append(found(int(rng.choice(images)), int(rng.choice(categories)), box, float(next(scores))))
    for limit in (300, 8):
        summary = evaluated(truth, results, backend=backend, max_detections=(limit,))
        expected = counted_by_hand(truth, results, limit)
        assert {row["category_id"]: row["AP"] for row in summary.per_class} == pytest.approx(expected)
