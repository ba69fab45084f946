"""Evaluation against COCO's own code, hand-made cases with known answers, and the repaired contents of faulty files."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support import evaluated, opened

from brs_detr.evaluation.coco_eval import evaluate_coco, fast_backend_installed
from brs_detr.evaluation.results import detections_to_results


def dataset(boxes, images=(1,), categories=((7, "cell"),), size=100):
    """A COCO dict; boxes are (image, category, xywh[, iscrowd])."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": size, "width": size} for i in images],
        "categories": [{"id": i, "name": n} for i, n in categories],
        "annotations": [
            {
                "id": n,
                "image_id": image,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": int(bool(crowd)),
            }
            for n, (image, category, box, *crowd) in enumerate(boxes, 1)
        ],
    }


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def noisy_results(truth, seed=0):
    """Detections around, beside and on top of the true boxes, with scores in steps so that some tie."""
    rng = np.random.default_rng(seed)
    results = []
    for a in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = a["bbox"]
            dx, dy = rng.normal(0, 0.15, 2) * (w, h)
            sw, sh = np.exp(rng.normal(0, 0.15, 2))
            category = a["category_id"] if rng.random() < 0.8 else rng.choice([c["id"] for c in truth["categories"]])
            box = [x + dx, y + dy, w * sw, h * sh]
            results.append(result(a["image_id"], int(category), map(float, box), float(rng.integers(1, 40) / 40)))
    return results


def official(truth, results, limits=(1, 10, 100)):
    """The twelve numbers pycocotools prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


BACKENDS = ["pycocotools", pytest.param("faster", marks=pytest.mark.skipif(not fast_backend_installed(), reason="no"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bccd", "nuclei", "tiny_coco"])
def test_the_twelve_numbers_are_cocos(shared_data, name, backend):
    truth = json.loads((shared_data / name / "annotations" / "val.json").read_text())
    results = noisy_results(truth)
    summary = evaluate_coco(opened(shared_data / name), results, backend=backend, extended=False)
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
    assert " ".join(summary.stats) == names
    np.testing.assert_allclose(list(summary.stats.values()), official(truth, results), rtol=0, atol=1e-12)


def three_images():
    """Two classes with objects of all three areas, two crowds, areas that are not w times h."""
    places = [(i, 7 + j % 2, (20 + 120 * j, 15 + 40 * i, side, side * 1.2)) for i in (1, 2, 3) for j, side in SIDES]
    truth = dataset(places, (1, 2, 3), ((7, "cell"), (8, "disc"), (9, "none")), size=1000)
    for row in truth["annotations"]:
        row["area"] *= 0.8  # as of a mask
    truth["annotations"][4]["iscrowd"] = 1
    truth["annotations"][9]["iscrowd"] = 1
    return truth


SIDES = list(enumerate((12, 25, 40, 80, 110, 130)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limits", [(1, 10, 100), (100, 2, 1)])
def test_every_figure_of_three_images_is_cocos(backend, limits):
    """The twelve numbers of all classes, and those of each class alone."""
    truth = three_images()
    results = [r for seed in range(3) for r in noisy_results(truth, seed)]
    assert len({r["score"] for r in results}) < len(results)  # some tie
    summary = evaluated(truth, results, backend=backend, max_detections=limits)
    reference = three_images()
    expected = official(reference, results, sorted(limits))
    assert [name for name in summary.stats if name[:2] == "AR" and name[2:].isdigit()] == [
        f"AR{limit}" for limit in sorted(limits)
    ]
    assert len(set(np.round(expected, 6))) >= 9 and (expected[:6] > 0).all()  # so that none passes for another
    np.testing.assert_allclose(list(summary.stats.values())[:12], expected, rtol=0, atol=1e-12)
    for row in summary.per_class:
        own = {k: [r for r in reference[k] if r.get("category_id", r["id"]) == row["category_id"]] for k in KINDS}
        mine = [r for r in results if r["category_id"] == row["category_id"]]
        expected = official(reference | own, mine, sorted(limits)) if mine and own["annotations"] else np.full(12, -1.0)
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        np.testing.assert_allclose([row[name] for name in names], expected[:6], rtol=0, atol=1e-12)
        assert row["AR"] == pytest.approx(expected[8], abs=1e-12)
        assert row["objects"] == sum(not r["iscrowd"] for r in own["annotations"])


KINDS = ("annotations", "categories")


def test_a_loose_box_counts_at_half_and_not_at_three_quarters():
    """IoU 0.72 with the object: found at 0.50 to 0.70, five of ten thresholds, but not at 0.75."""
    truth = dataset([(1, 7, (0, 0, 100, 100))], size=200)
    summary = evaluated(truth, [result(1, 7, (0, 0, 100, 72), 0.9)])
    for figures in (summary.stats, summary.per_class[0]):
        assert (figures["AP50"], figures["AP75"], figures["AP"]) == pytest.approx((1.0, 0.0, 0.5))
    assert (summary.stats["ARs"], summary.stats["ARm"], summary.stats["ARl"]) == pytest.approx((-1, -1, 0.5))


def test_the_files_area_decides_on_the_size():
    """A box of 100 x 100 pixels whose mask has 900 is a small object."""
    truth = dataset([(1, 7, (0, 0, 100, 100))], size=200)
    truth["annotations"][0]["area"] = 900
    stats = evaluated(truth, [result(1, 7, (0, 0, 100, 100), 0.9)]).stats
    assert [stats[name] for name in ("APs", "APm", "APl")] == pytest.approx([1, -1, -1])
    assert [stats[name] for name in ("ARs", "ARm", "ARl")] == pytest.approx([1, -1, -1])


@pytest.mark.skipif(not fast_backend_installed(), reason="faster-coco-eval is not installed")
def test_both_backends_agree_class_by_class(shared_data):
    truth = opened(shared_data / "tiny_coco")
    results = noisy_results(truth.dataset, seed=3)
    slow, fast = (
        evaluate_coco(truth, results, backend=b, max_detections=(2, 5, 300)) for b in ("pycocotools", "faster")
    )
    for a, b in zip(slow.per_class, fast.per_class, strict=True):
        assert a == pytest.approx(b, abs=1e-12)
    assert slow.stats == pytest.approx(fast.stats, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_none_and_useless_detections(backend):
    truth = dataset([(1, 7, (10, 10, 30, 30)), (2, 7, (0, 0, 50, 40))], images=(1, 2, 3))
    perfect = [result(a["image_id"], 7, a["bbox"], 0.9) for a in truth["annotations"]]
    assert evaluated(truth, perfect, backend=backend).stats["AP"] == pytest.approx(1.0)
    for useless in ([], [result(3, 7, (0, 0, 5, 5), 0.9)]):
        summary = evaluated(truth, useless, backend=backend)
        assert {summary.stats[k] for k in ("AP", "AP50", "AP75", "AR100")} == {0.0}
        assert summary.stats["oLRP"] == 1.0
        assert summary.table()


def test_a_dataset_without_objects_has_no_measure():
    summary = evaluated(dataset([]), [result(1, 7, (0, 0, 5, 5), 0.5)])
    assert set(summary.stats.values()) == {-1.0}
    assert " -" in summary.table()
    assert "none of the images has an object" in summary.table()


def test_average_precision_of_a_hand_made_ranking():
    """hit, false, hit for two objects: precision 1 up to recall 0.5, then 2/3; 51 and 50 of COCO's 101 points."""
    truth = dataset([(1, 7, (0, 0, 20, 20)), (1, 7, (50, 50, 20, 20))])
    results = [result(1, 7, (0, 0, 20, 20), 0.9), result(1, 7, (80, 0, 9, 9), 0.8), result(1, 7, (50, 50, 20, 20), 0.7)]
    row = evaluated(truth, results).per_class[0]
    assert row["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (row["precision"], row["recall"], row["score"]) == pytest.approx((2 / 3, 1.0, 0.7))
    assert row["f1"] == pytest.approx(0.8)


def test_order_of_results_does_not_matter(shared_data):
    truth = opened(shared_data / "bccd")
    results = noisy_results(truth.dataset)
    for n, r in enumerate(results):
        r["score"] = (n * 7919 % len(results) + 1) / (len(results) + 1)  # no ties
    assert evaluate_coco(truth, results).stats == pytest.approx(evaluate_coco(truth, results[::-1]).stats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [float, str, lambda i: i + 2**53, lambda i: i + 2**62, lambda i: i + 2**64])
def test_ids_may_be_of_any_size_and_those_of_results_quoted(backend, form):
    """Neighbors above 2^53, which are one number in floating point, stay two images and two classes."""
    truth = dataset([(i, 7 + i % 2, (i, 2 * i, 30, 30)) for i in range(1, 9)], range(1, 9), ((7, "a"), (8, "b")))
    results = noisy_results(truth, seed=5)
    expected = evaluated(truth, results, backend="pycocotools")
    assert 0 < expected.stats["AP"] < 1
    for row in truth["images"] + truth["categories"]:
        row["id"] = int(form(row["id"]))
    for rows, written in ((truth["annotations"], lambda i: int(form(i))), (results, form)):
        for row in rows:
            row["image_id"], row["category_id"] = written(row["image_id"]), written(row["category_id"])
    summary = evaluated(truth, results, backend=backend)
    assert summary.stats == pytest.approx(expected.stats, abs=1e-12)
    assert summary.confusion.counts.tolist() == expected.confusion.counts.tolist()


def test_columns_and_lists_are_the_same():
    truth = dataset([(1, 7, (10, 10, 30, 30)), (2, 7, (0, 0, 50, 40))], images=(1, 2))
    results = noisy_results(truth, seed=1)
    columns = {k: np.array([r[k] for r in results]) for k in ("image_id", "category_id", "bbox", "score")}
    assert evaluated(truth, results).stats == evaluated(truth, columns).stats


def test_chosen_images_only():
    truth = dataset([(1, 7, (10, 10, 30, 30)), (2, 7, (0, 0, 50, 40))], images=(1, 2))
    results = [result(1, 7, (10, 10, 30, 30), 0.9)]
    assert evaluated(truth, results).stats["AR100"] == pytest.approx(0.5)
    summary = evaluated(truth, results, image_ids=[1])
    assert summary.stats["AR100"] == pytest.approx(1.0)
    assert (summary.images, summary.per_class[0]["objects"]) == (1, 1)


def test_crowds_neither_count_nor_punish():
    truth = dataset([(1, 7, (0, 0, 20, 20)), (1, 7, (40, 40, 50, 50), 1)])
    results = [result(1, 7, (0, 0, 20, 20), 0.5), *(result(1, 7, (45, 40 + i, 20, 20), 0.9) for i in range(5))]
    summary = evaluated(truth, results)
    assert summary.stats["AP"] == pytest.approx(1.0)
    assert summary.per_class[0]["precision"] == pytest.approx(1.0)
    assert summary.per_class[0]["objects"] == 1


def test_every_faulty_file_can_be_evaluated(shared_data):
    folder = shared_data / "dirty"
    names = [path.relative_to(folder / "annotations").with_suffix("") for path in folder.glob("annotations/**/*.json")]
    assert names
    for name in names:
        truth = opened(folder, name)
        perfect = [result(a["image_id"], a["category_id"], a["bbox"], 0.9) for a in truth.dataset["annotations"]]
        summary = evaluate_coco(truth, perfect, max_detections=(1, 10, 300))
        assert summary.stats["AP"] > 0.99, name


def test_more_objects_than_counted_detections_is_said():
    truth = dataset([(1, 7, (i % 10 * 10, i // 10 * 10, 8, 8)) for i in range(30)])
    assert not evaluated(truth, [result(1, 7, (0, 0, 8, 8), 0.5)]).notes
    (note,) = evaluated(truth, [result(1, 7, (0, 0, 8, 8), 0.5)], max_detections=(1, 5, 20)).notes
    assert "has 30 objects" in note and "only 20" in note


def test_results_that_do_not_belong_are_refused():
    truth = dataset([(1, 7, (0, 0, 20, 20))])
    with pytest.raises(ValueError, match=r"1 image ids .*\[5\]"):
        evaluated(truth, [result(5, 7, (0, 0, 2, 2), 0.5)])
    with pytest.raises(ValueError, match=r"1 category ids .*\[1\]"):
        evaluated(truth, [result(1, 1, (0, 0, 2, 2), 0.5)])
    with pytest.raises(ValueError, match=r"1 image ids .*None"):
        evaluated(truth, [result("one", 7, (0, 0, 2, 2), 0.5)])


def test_detections_that_are_not_numbers_are_left_out_and_reported():
    truth = dataset([(1, 7, (0, 0, 20, 20))])
    results = [result(1, 7, (0, 0, 20, 20), 0.5), result(1, 7, (0, 0, float("nan"), 2), 0.9)]
    summary = evaluated(truth, results)
    assert summary.stats["AP"] == pytest.approx(1.0)
    assert "NaN" in summary.notes[0]


def test_detections_become_results_with_original_categories():
    detections = {
        "boxes": torch.tensor([[10.0, 20.0, 40.0, 60.0], [0.0, 0.0, 1.0, 2.0]]),
        "scores": torch.tensor([0.75, 0.5], dtype=torch.bfloat16),
        "labels": torch.tensor([1, 0]),
    }
    first, second = detections_to_results(42, detections, [3, 90])
    assert first == {"image_id": 42, "category_id": 90, "bbox": [10.0, 20.0, 30.0, 40.0], "score": 0.75}
    assert second["category_id"] == 3
    arrays = {key: value.float().numpy() for key, value in detections.items()} | {"labels": np.array([1, 0])}
    assert detections_to_results(42, arrays, [3, 90]) == [first, second]
    json.dumps([first, second])
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    assert detections_to_results(1, empty, [3]) == []
    with pytest.raises(ValueError, match="was trained on these classes"):
        detections_to_results(42, detections, [3])


def test_nothing_is_printed_and_files_are_written(tmp_path, capfd):
    truth = dataset([(1, 7, (0, 0, 20, 20))], categories=((7, "cell"), (9, "Zürich, [city]")))
    summary = evaluated(truth, [result(1, 7, (0, 0, 20, 20), 0.5), result(1, 7, (50, 50, 20, 20), 0.6)])
    assert capfd.readouterr().out == ""
    paths = summary.save(tmp_path / "new", {"weights": "a.safetensors"})
    assert [path.name for path in paths] == [
        "evaluation.json",
        "per_class.csv",
        "precision_recall.csv",
        "confusion.csv",
    ]
    report = json.loads(paths[0].read_text(encoding="utf-8"))
    assert report["about"] == {"weights": "a.safetensors"}
    assert (report["stats"], report["per_class"]) == (summary.stats, summary.per_class)
    assert report["confusion"]["counts"] == summary.confusion.counts.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert report["confusion"]["found"] == ["cell", "Zürich, [city]", "missed"]
    cell, city = rows_of(paths[1])
    assert float(cell["AP50"]) == pytest.approx(0.5)
    assert city["name"] == "Zürich, [city]" and city["AP50"] == city["score"] == ""  # not -1, which would be averaged
    points = [float(row["cell"]) for row in rows_of(paths[2])]
    assert len(points) == 101 and sum(points) / 101 == pytest.approx(summary.stats["AP50"])
    assert rows_of(paths[3])[0] == {"true / found": "cell", "cell": "1", "Zürich, [city]": "0", "missed": "0"}
    assert "Zürich, [city]" in summary.table()


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_average_is_that_of_the_classes_with_objects(shared_data):
    """A class that the images do not hold has no figures and does not lower the mean, however much of it is found."""
    truth = opened(shared_data / "tiny_coco")
    summary = evaluate_coco(truth, noisy_results(truth.dataset))
    present = {a["category_id"] for a in truth.dataset["annotations"] if not a["iscrowd"]}
    assert 0 < len(present) < len(truth.names)
    for row in summary.per_class:
        assert (row["AP"] >= 0) == (row["category_id"] in present)
        assert (row["f1"] >= 0) == (row["oLRP"] >= 0) == (row["AP"] >= 0)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "oLRP"):
        values = [row[name] for row in summary.per_class if row[name] >= 0]
        assert summary.stats[name] == pytest.approx(sum(values) / len(values), abs=1e-12), name
    curves = list(summary.curves.values())
    assert len(curves) == len(present)
    assert np.mean(curves) == pytest.approx(summary.stats["AP50"], abs=1e-12)


def test_two_classes_of_one_name_keep_figures_of_their_own():
    truth = dataset([(1, 7, (0, 0, 20, 20)), (1, 9, (40, 0, 20, 20))], categories=((7, "cell"), (9, "cell")))
    summary = evaluated(truth, [result(1, 7, (0, 0, 20, 20), 0.5), result(1, 9, (40, 0, 20, 20), 0.25)])
    assert list(summary.curves) == ["cell (7)", "cell (9)"]
    assert summary.thresholds() == {"cell": 0.25}
    assert summary.confusion.counts.diagonal().tolist() == [1, 1, 0]
