"""The confusion matrix against a slow reading of its rule, hand-made cases, and the class table it must agree with."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from support import opened

from brs_detr.evaluation.coco_eval import evaluate_coco
from brs_detr.evaluation.matching import Confusion, confusion_matrix
from brs_detr.viz.plots import draw_confusion

NAMES = {3: "ring", 7: "disc", 20: "star"}
ALL = dict.fromkeys(NAMES, 0.0)


def truth(category, box, image=1, crowd=0):
    return {"image_id": image, "category_id": category, "bbox": list(box), "iscrowd": int(crowd)}


def found(category, box, score=0.9, image=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def overlap(detection, true):
    (ax, ay, aw, ah), (bx, by, bw, bh) = detection["bbox"], true["bbox"]
    both = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
    return both / (aw * ah) if true["iscrowd"] else both / (aw * ah + bw * bh - both)


def slow_counts(truths, detections, lowest, limit):
    """The rule word by word, one detection after the other."""
    label = {category: index for index, category in enumerate(NAMES)}
    counts = [[0] * (len(NAMES) + 1) for _ in range(len(NAMES) + 1)]
    for image in {row["image_id"] for row in truths + detections}:
        objects = [t for t in truths if t["image_id"] == image]
        ranked = sorted((d for d in detections if d["image_id"] == image), key=lambda d: -d["score"])
        ranked = [
            d for n, d in enumerate(ranked) if sum(e["category_id"] == d["category_id"] for e in ranked[:n]) < limit
        ]
        ranked = [d for d in ranked if d["category_id"] in lowest and d["score"] >= lowest[d["category_id"]]]
        owner, left_out = {}, set()  # object -> detection
        for own in (True, False):
            for d, detection in enumerate(ranked):
                if d in owner.values() or d in left_out:
                    continue
                best = None
                for t, true in enumerate(objects):
                    same = true["category_id"] == detection["category_id"]
                    if true["iscrowd"] or t in owner or overlap(detection, true) < 0.5 or (own and not same):
                        continue
                    if best is None or overlap(detection, true) >= overlap(detection, objects[best]):
                        best = t
                if best is not None:
                    owner[best] = d
            if own:
                left_out = {
                    d
                    for d, detection in enumerate(ranked)
                    for true in objects
                    if d not in owner.values() and true["iscrowd"] and true["category_id"] == detection["category_id"]
                    if overlap(detection, true) >= 0.5
                }
        for t, true in enumerate(objects):
            if not true["iscrowd"]:
                column = label[ranked[owner[t]]["category_id"]] if t in owner else -1
                counts[label[true["category_id"]]][column] += 1
        for d, detection in enumerate(ranked):
            if d not in owner.values() and d not in left_out:
                counts[-1][label[detection["category_id"]]] += 1
    return counts


boxes = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))
category, images = st.sampled_from(list(NAMES)), st.integers(1, 2)
truths = st.lists(st.builds(truth, category, boxes, images, st.booleans()), max_size=8)
detections = st.lists(st.builds(found, category, boxes, st.integers(1, 9).map(lambda s: s / 10), images), max_size=16)
thresholds = st.dictionaries(category, st.integers(1, 9).map(lambda s: s / 10))


@settings(max_examples=300, deadline=None)
@given(truths, detections, thresholds, st.sampled_from([1, 2, 100]))
def test_counts_are_those_of_the_slow_rule(truths, detections, lowest, limit):
    """Also with crowds, tied scores, tied overlaps, classes without a threshold and more detections than count."""
    ours = confusion_matrix(truths, detections, NAMES, lowest, max_detections=limit)
    assert ours.counts.tolist() == slow_counts(truths, detections, lowest, limit)
    objects = [sum(t["category_id"] == key and not t["iscrowd"] for t in truths) for key in NAMES]
    assert ours.counts[:-1].sum(1).tolist() == objects


def test_found_confused_missed_and_false():
    truths = [truth(3, (0, 0, 10, 10)), truth(7, (20, 0, 10, 10)), truth(20, (40, 0, 10, 10))]
    rows = [found(3, (0, 0, 10, 10)), found(20, (20, 0, 10, 10)), found(7, (60, 0, 10, 10))]
    counts = confusion_matrix(truths, rows, NAMES, ALL).counts
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]]


def test_the_right_class_comes_before_a_better_score():
    """One box found as two classes is no confusion but one right and one false detection."""
    rows = [found(7, (0, 0, 10, 10), 0.9), found(3, (0, 0, 10, 10), 0.2)]
    assert confusion_matrix([truth(3, (0, 0, 10, 10))], rows, NAMES, ALL).counts.tolist() == [
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 1, 0, 0],
    ]


def test_of_two_objects_in_one_place_the_last_one_is_confused():
    truths = [truth(3, (0, 0, 10, 10)), truth(7, (0, 0, 10, 10))]
    counts = confusion_matrix(truths, [found(20, (0, 0, 10, 10))], NAMES, ALL).counts
    assert counts.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_crowd_is_neither_missed_nor_makes_detections_of_its_class_false():
    truths = [truth(3, (0, 0, 40, 40), crowd=1)]
    assert not confusion_matrix(truths, [], NAMES, ALL).counts.any()
    rows = [found(3, (5, 5, 10, 10)), found(3, (20, 20, 10, 10)), found(7, (5, 5, 10, 10))]
    assert confusion_matrix(truths, rows, NAMES, ALL).counts.tolist() == [[0] * 4, [0] * 4, [0] * 4, [0, 1, 0, 0]]


def test_no_detections_and_no_objects():
    assert confusion_matrix([truth(7, (0, 0, 5, 5))], [], NAMES, ALL).counts.tolist()[1] == [0, 0, 0, 1]
    assert confusion_matrix([], [found(7, (0, 0, 5, 5))], NAMES, ALL).counts.tolist()[-1] == [0, 1, 0, 0]
    assert not confusion_matrix([], [], NAMES, ALL).counts.any()


def noisy(data, seed=0):
    """Detections around the true boxes, a third of them of another class, with scores in steps so that some tie."""
    rng = np.random.default_rng(seed)
    keys, results = [category["id"] for category in data["categories"]], []
    for a in data["annotations"]:
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = a["bbox"]
            dx, dy = rng.normal(0, 0.12, 2) * (w, h)
            key = a["category_id"] if rng.random() < 0.7 else rng.choice(keys)
            box = [x + dx, y + dy, w, h]
            results.append(found(int(key), map(float, box), float(rng.integers(1, 40) / 40), a["image_id"]))
    return results


@pytest.mark.parametrize("name", ["bccd", "nuclei", "tiny_coco"])
def test_the_diagonal_over_its_row_is_recall_and_over_its_column_precision(shared_data, name):
    truth = opened(shared_data / name)
    summary = evaluate_coco(truth, noisy(truth.dataset))
    counts = summary.confusion.counts
    compared = 0
    for row, count, column in zip(summary.per_class, counts, counts.T, strict=False):
        assert count.sum() == row["objects"]
        if row["f1"] > 0:
            label = summary.confusion.classes.index(row["name"])
            assert count[label] / count.sum() == pytest.approx(row["recall"], abs=1e-12)
            assert count[label] / column.sum() == pytest.approx(row["precision"], abs=1e-12)
            compared += 1
        else:
            assert not column.any()
    assert compared > 0


def test_the_most_frequent_confusions_are_named_with_the_number_of_objects():
    confusion = Confusion(["ring", "disc", "star"], np.array([[9, 2, 0, 1], [0, 8, 0, 4], [7, 2, 1, 0], [3, 3, 3, 0]]))
    assert confusion.most_frequent(2) == ["star found as ring: 7 of 10", "ring found as disc: 2 of 12"]
    assert len(confusion.most_frequent(9)) == 3
    assert Confusion(["ring"], np.array([[9, 2], [1, 0]])).most_frequent(3) == []
    assert Confusion([], np.zeros((1, 1), int)).most_frequent(3) == []


@pytest.mark.parametrize("classes", [1, 8, 80, 365])
def test_the_image_has_a_place_for_every_count_and_a_size_to_look_at(classes, tmp_path):
    names = [f"class {index} with a name that goes on and on" for index in range(classes)]
    empty = np.zeros((classes + 1, classes + 1), int)
    path = tmp_path / "deep" / "confusion.png"
    draw_confusion(Confusion(names, empty), path)
    blank = Image.open(path).convert("RGB")
    assert min(blank.size) >= 400 and max(blank.size) <= 1800
    places = {}
    for row, column in ((0, 0), (classes - 1, 0), (classes, 0), (0, classes), (classes - 1, classes - 1)):
        counts = empty.copy()
        counts[row, column] = 1234
        draw_confusion(Confusion(names, counts), path)
        places[row, column] = ImageChops.difference(Image.open(path).convert("RGB"), blank).getbbox()
    assert all(places.values()) and len(set(places.values())) == len(places)
    for (row, column), (left, top, _, _) in places.items():  # rows go down, columns to the right
        assert (left > places[0, 0][0]) == (column > 0) and (top > places[0, 0][1]) == (row > 0)


def test_cells_are_colored_by_what_became_of_the_objects_and_hold_counts_and_shares():
    axes = draw_confusion(Confusion(["ring", "disc"], np.array([[9, 3, 0], [0, 1, 1], [1, 1, 0]]))).axes[0]
    colors = np.asarray(axes.images[0].get_array())
    blue, red, gray = colors[0, 0], colors[0, 1], colors[1, 2]
    assert blue.argmax() == 2 and red.argmax() == 0 and np.ptp(gray) < 0.1
    assert (colors[[0, 1, 2], [2, 0, 2]] == 1).all()  # nothing there: white
    texts = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert texts == {
        (0, 0): "9\n75%",
        (0, 1): "3\n25%",
        (1, 1): "1\n50%",
        (1, 2): "1\n50%",
        (2, 0): "1\n10%",  # of what was detected as a ring
        (2, 1): "1\n20%",
    }
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ring", "disc", "background"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ring", "disc", "missed"]
