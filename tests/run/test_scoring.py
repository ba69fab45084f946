"""What of an evaluation counts, what is said of it, and what is kept of it for later."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from brs_detr.config import Config
from brs_detr.data.issues import DataError
from brs_detr.engine.config import EvalConfig
from brs_detr.engine.predict import join_heads, limited
from brs_detr.evaluation.calibration import Calibration, Curve
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.evaluation.reliability import assess
from brs_detr.models.config import BRSDETRConfig, RoIConfig
from brs_detr.models.ensemble import Ensemble
from brs_detr.ops.images import ImageBatch
from brs_detr.run import scoring, validation
from brs_detr.run.drawings import calibrated_results

BOX = [10.0, 10.0, 50.0, 40.0]


def annotations():
    """Three images with one object each."""
    shared = {"category_id": 5, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
    entries = [{"id": i, "image_id": i, **shared} for i in (1, 2, 3)]
    images = [{"id": i, "width": 90, "height": 90, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    return {"images": images, "annotations": entries, "categories": [{"id": 5, "name": "ring"}]}


def found(image, score=0.25, unreadable=False):
    count = 0 if unreadable else 1
    boxes = np.array([BOX] * count, np.float32).reshape(-1, 4)
    scores, labels = np.full(count, score, np.float32), np.zeros(count, np.int64)
    return {"image_id": image, "boxes": boxes, "scores": scores, "labels": labels, "unreadable": unreadable}


def outcome(monkeypatch, detections, **settings):
    monkeypatch.setattr(scoring, "predict", lambda *_, **__: detections)
    truth, config = GroundTruth.from_dataset(annotations()), Config(eval=EvalConfig(**settings))
    return scoring.score(None, [5], truth, None, config, Accelerator(cpu=True))


def test_a_image_that_cannot_be_read_counts_neither_for_nor_against(monkeypatch):
    summary, results = outcome(monkeypatch, [found(1), found(2), found(3, unreadable=True)])
    assert summary.stats["AP"] == pytest.approx(1.0) and summary.images == 2 and len(results) == 2
    assert any("1 image(s) cannot be read and are left out: image id 3" in note for note in summary.notes)
    summary, _ = outcome(monkeypatch, [found(1), found(2), found(3, unreadable=True) | {"unreadable": False}])
    assert summary.stats["AP"] == pytest.approx(0.66, abs=0.01)


def test_no_readable_image_at_all_is_an_error(monkeypatch):
    with pytest.raises(DataError, match="none of the images to evaluate can be read"):
        outcome(monkeypatch, [found(image, unreadable=True) for image in (1, 2, 3)])


def test_a_validation_keeps_the_scores_of_the_best_f1_and_says_a_note_once(monkeypatch):
    dataset = SimpleNamespace(ground_truth=annotations, json_path="val.json", report={"images_listed": 4}, masks=False)
    said, thresholds = [], {"of the weights before": 0.5}
    config = Config(eval=EvalConfig(max_detections=10))
    run = SimpleNamespace(config=config, accelerator=Accelerator(cpu=True), log=SimpleNamespace(say=said.append))
    data = SimpleNamespace(
        train_set=SimpleNamespace(category_ids=[5]),
        val_set=dataset,
        val_loader=None,
        thresholds=thresholds,
        chosen={},
        validated=[],
    )
    validate = validation.validator(run, data)
    for score in (0.25, 0.75):
        monkeypatch.setattr(scoring, "predict", lambda *_, s=score, **__: [found(image, s) for image in (1, 2, 3)])
        assert validate(None)["AP"] == pytest.approx(1.0)
        assert thresholds == {"ring": score}
    assert len(said) == 1 and "best 10 detection(s)" in said[0]


class TwoHeads(nn.Module):
    """Head "good" finds the object, head "late" misplaces it."""

    heads = ("late", "good")
    shift, ensemble, join_iou = 0.0, None, 0.6

    def detect_with_all_heads(self, images):
        return {"late": self.found(20.0), "good": self.found(self.shift)}

    def forward(self, images, targets=None):
        return self.found(20.0)

    def found(self, shift):
        boxes = torch.tensor([BOX]) + torch.tensor([shift, 0, shift, 0])
        return [{"boxes": boxes, "scores": torch.tensor([0.5]), "labels": torch.tensor([0])}]


def score_two_heads(name="auto", model=None, **options):
    truth, config = GroundTruth.from_dataset(annotations()), Config(eval=EvalConfig(predict_with=name))
    images = ImageBatch.from_list([torch.zeros(3, 90, 90)])
    batches = [(images, [{"image_id": image}]) for image in (1, 2, 3)]
    return scoring.score(model or TwoHeads(), [5], truth, batches, config, Accelerator(cpu=True), **options)


def doubled(factor):
    """The map of a raw score of 0.5 to `factor` / 2."""
    curve = Curve(np.array([0.0, 0.5, 1.0]), np.array([0.0, factor / 2, 1.0]), "isotonic", 9, 9)
    return Calibration((curve,), (0,), (0.5,), 3)


@pytest.mark.parametrize("head", ["late", "good"])
def test_scores_of_a_head_are_mapped_by_its_own_map(monkeypatch, head):
    maps = {"late": doubled(0.4), "good": doubled(0.8), "ensemble": doubled(0.2)}
    _, results = score_two_heads(head=head, calibrations=maps)
    assert [result["score"] for result in results] == pytest.approx([maps[head].curves[0].precisions[1]] * 3)
    del maps[head]  # those of a head without one stay raw
    assert [result["score"] for result in score_two_heads(head=head, calibrations=maps)[1]] == [0.5] * 3
    # a head that runs alone
    monkeypatch.setattr(TwoHeads, "predict_with", "late", raising=False)
    maps = {"good": doubled(0.8), "late": doubled(0.4)}
    assert [result["score"] for result in score_two_heads("late", calibrations=maps)[1]] == pytest.approx([0.2] * 3)


def test_scores_of_the_ensemble_are_mapped_by_its_own_map():
    raw = [result["score"] for result in score_two_heads("ensemble", learn=True)[1]]
    maps = {"late": doubled(0.4), "good": doubled(0.8), "ensemble": doubled(0.2)}
    mapped = [result["score"] for result in score_two_heads("ensemble", learn=True, calibrations=maps)[1]]
    assert mapped == pytest.approx(maps["ensemble"].apply(np.array(raw), np.zeros(len(raw))))
    assert mapped != pytest.approx(raw)


def test_an_ensemble_is_learned_from_the_scores_aps_and_objects_of_the_validation():
    model = TwoHeads()
    summary, _ = score_two_heads(model=model, learn=True)
    scores = {head: torch.full((3,), 0.5) for head in ("late", "good")}
    assert model.ensemble == Ensemble.learn(scores, {head: one["AP"] for head, one in summary.heads.items()}, 3)
    assert model.ensemble != Ensemble.learn(scores, {"late": 0.0, "good": 1.0}, 1)  # the number of objects counts


def test_every_head_is_scored_and_the_best_one_returned():
    summary, results = score_two_heads()
    assert summary.head == "good" and summary.stats["AP"] == pytest.approx(1.0)
    assert {head: stats["AP"] for head, stats in summary.heads.items()} == pytest.approx({"late": 0.0, "good": 1.0})
    assert [result["bbox"] for result in results] == [[10, 10, 40, 30]] * 3
    assert "by head; the figures above are those of good" in summary.table()


def test_a_head_that_is_named_is_returned_though_another_is_better():
    """An evaluation reports the head that the validation of the training chose."""
    summary, _ = score_two_heads(head="late")
    assert summary.head == "late" and summary.stats["AP"] == 0 and summary.heads["good"]["AP"] == pytest.approx(1.0)


def test_without_auto_only_the_wanted_head_runs(monkeypatch):
    monkeypatch.setattr(TwoHeads, "detect_with_all_heads", None)
    summary, _ = score_two_heads("decoder")
    assert summary.head is None and not summary.heads and summary.stats["AP"] == 0


def test_an_ensemble_is_scored_beside_the_heads_only_where_it_is_asked_for():
    summary, results = score_two_heads("ensemble", learn=True)
    assert summary.head == "ensemble" and set(summary.heads) == {"late", "good", "ensemble"}
    assert len(results) == 6  # the boxes of both heads, which do not overlap enough to be one
    assert [r["score"] for r in results if r["bbox"][0] == 10] == pytest.approx([1.0] * 3, abs=1e-4)  # of AP 1
    assert summary.stats["AP"] == pytest.approx(1.0) and set(summary.head_thresholds) == set(summary.heads)
    assert "ensemble" not in score_two_heads(learn=True)[0].heads


def test_an_ensemble_has_the_detections_that_the_detector_itself_makes():
    """On the host, of all images at once, or on the device, image by image."""
    model, images = TwoHeads(), None
    by_head = {
        head: [{"image_id": 1, "unreadable": False, **{key: value.numpy() for key, value in own[0].items()}}]
        for head, own in model.detect_with_all_heads(images).items()
    }
    ensemble = Ensemble.learn({head: torch.tensor([0.4, 0.5]) for head in by_head}, {"good": 0.9, "late": 0.3}, 1)
    (host,) = join_heads(by_head, ensemble, 0.6)
    device = ensemble.join({head: own[0] for head, own in model.detect_with_all_heads(images).items()}, 0.6)
    assert all((host[key] == device[key].numpy()).all() for key in device)


@pytest.mark.parametrize(("limit", "kept"), [(300, 150), (120, 120)])
def test_an_evaluation_joins_all_that_the_heads_return(monkeypatch, limit, kept):
    def many_found(self, shift):
        boxes = torch.arange(150.0)[:, None] * 20 + torch.tensor([0.0, 0.0, 10.0, 10.0])
        return [{"boxes": boxes, "scores": torch.linspace(1, 0.5, 150), "labels": torch.zeros(150).long()}]

    monkeypatch.setattr(TwoHeads, "found", many_found)
    truth = GroundTruth.from_dataset(annotations())
    batches = [(ImageBatch.from_list([torch.zeros(3, 90, 90)]), [{"image_id": image}]) for image in (1, 2, 3)]
    config = Config(eval=EvalConfig(predict_with="ensemble", max_detections=limit))
    _, results = scoring.score(TwoHeads(), [5], truth, batches, config, Accelerator(cpu=True), learn=True)
    assert len(results) == 3 * kept


CROWDED = annotations()
CROWDED["annotations"] = [{**CROWDED["annotations"][0], "id": i, "category_id": 5 + i % 4} for i in range(1, 301)]
CROWDED["categories"] = [{"id": 5 + i, "name": f"class {i}"} for i in range(4)]
DECODER, ROI, ATSS = "model.detections_per_image", "model.roi.max_detections", "model.atss.max_detections"


@pytest.mark.parametrize(
    ("head", "settings", "said"),
    [
        ("decoder", {}, f"100 detections an image, not 300: raise {DECODER} too"),
        ("roi", {"detections_per_image": 300}, f"100 detections an image, not 300: raise {ROI} too"),
        ("atss", {"detections_per_image": 300}, f"100 detections an image, not 300: raise {ATSS} too"),
        ("ensemble", {}, f"100 detections an image, not 300: raise {DECODER} and {ROI} and {ATSS} too"),
        ("decoder", {"detections_per_image": 300}, None),
        ("roi", {"roi": RoIConfig(max_detections=300)}, None),
        ("ensemble", {"detections_per_image": 300}, None),
    ],
)
def test_the_limit_of_crowded_images_is_that_of_the_head(head, settings, said):
    truth = GroundTruth.from_dataset(CROWDED)
    config = Config(model=BRSDETRConfig(**settings), eval=EvalConfig(max_detections=300))
    empty = [found(image) | {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": []} for image in (1, 2, 3)]
    summary, _ = scoring.score_detections(empty, [5, 6, 7, 8], truth, config, Accelerator(cpu=True), name=head)
    limits = [note for note in summary.notes if "detections an image" in note or "objects but" in note]
    assert len(limits) == (2 if said else 0)
    if said:
        setting = said.split("raise ")[1].removesuffix(" too")
        assert limits[0].endswith(said) and limits[1].endswith(f"raise eval.max_detections and {setting}")


def test_the_largest_limit_of_all_heads_is_that_of_the_ensemble():
    """Of which a hundred remain in any case."""
    model = BRSDETRConfig(aux_heads=("roi",), detections_per_image=10, roi=RoIConfig(max_detections=20))
    config = Config(model=model, eval=EvalConfig(max_detections=100))
    truth, ids = GroundTruth.from_dataset(CROWDED), [1, 2, 3]
    for head, most in {"ensemble": 100, "roi": 20, "decoder": 10}.items():
        assert f"at most {most} detections of an image count" in scoring.setting_notes(config, truth, ids, head)[0]


def test_limits_hold_after_joining():
    """A head is joined with all it has; what is reported is limited."""
    entry = found(1) | {"boxes": np.zeros((3, 4)), "scores": np.array([0.9, 0.5, 0.1]), "labels": np.zeros(3)}
    assert [len(limited([entry], *limits)[0]["scores"]) for limits in ((0.0, 2), (0.3, 5), (0.0, 5))] == [2, 2, 3]


def test_a_validation_keeps_the_best_head_for_the_weights(monkeypatch):
    dataset = SimpleNamespace(ground_truth=annotations, json_path="val.json", report={"images_listed": 3}, masks=False)
    images = ImageBatch.from_list([torch.zeros(3, 90, 90)])
    loader = [(images, [{"image_id": image}]) for image in (1, 2, 3)]
    run = SimpleNamespace(config=Config(), accelerator=Accelerator(cpu=True), log=SimpleNamespace(say=print))
    data = SimpleNamespace(
        train_set=SimpleNamespace(category_ids=[5]),
        val_set=dataset,
        val_loader=loader,
        thresholds={},
        chosen={},
        validated=[],
    )
    metrics = validation.validator(run, data)(TwoHeads())
    ensemble = data.chosen.pop("ensemble")
    assert list(ensemble["ap"]) == ["good", "late"]
    assert data.chosen == {"predict_with": "good", "head_thresholds": {"good": {"ring": 0.5}, "late": {}}}
    assert (metrics["AP"], metrics["good_AP"], metrics["late_AP"]) == pytest.approx((1.0, 1.0, 0.0))
    assert metrics["head"] == "good"
    monkeypatch.setattr(TwoHeads, "shift", 90.0)  # later weights of which the other head is no worse
    metrics = validation.validator(run, data)(TwoHeads())
    assert data.chosen["predict_with"] == metrics["head"] == "late"


def many(classes=2, images=40):
    """Images of which every one holds an object of each class, and detections whose raw scores stay below 0.06."""
    random = np.random.default_rng(0)
    content = {
        "images": [{"id": i, "width": 90, "height": 90, "file_name": f"{i}.png"} for i in range(1, images + 1)],
        "annotations": [],
        "categories": [{"id": 5 + label, "name": f"class {label}"} for label in range(classes)],
    }
    detections = []
    for image in range(1, images + 1):
        own = {"image_id": image, "category_id": 5, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
        for label in range(classes):
            number = len(content["annotations"]) + 1
            content["annotations"].append({**own, "id": number, "category_id": 5 + label})
        hits = random.random(2 * classes) < 0.6
        boxes = np.where(hits[:, None], BOX, [60, 60, 80, 80]).astype(np.float32)
        scores = np.where(hits, random.uniform(0.02, 0.05, 2 * classes), random.uniform(0.01, 0.03, 2 * classes))
        order = np.argsort(-scores)
        detections.append(
            {"image_id": image, "boxes": boxes[order], "scores": scores[order].astype(np.float32), "unreadable": False}
            | {"labels": np.repeat(np.arange(classes), 2)[order]}
        )
    return content, detections


def validated(monkeypatch, content, detections, **settings):
    """Validate; returns (metrics, data)."""
    monkeypatch.setattr(scoring, "predict", lambda *_, **__: detections)
    dataset = SimpleNamespace(
        ground_truth=lambda: content, json_path="val.json", report={"images_listed": 40}, masks=False
    )
    config = Config(eval=EvalConfig(**settings))
    run = SimpleNamespace(config=config, accelerator=Accelerator(cpu=True), log=SimpleNamespace(say=print))
    train_set = SimpleNamespace(category_ids=[category["id"] for category in content["categories"]])
    data = SimpleNamespace(
        train_set=train_set, val_set=dataset, val_loader=None, thresholds={}, chosen={}, validated=[]
    )
    return validation.validator(run, data)(SimpleNamespace(predict_with="head")), data


def test_a_validation_stores_the_map_of_its_scores_and_measures_it_held_out(monkeypatch):
    content, detections = many()
    metrics, data = validated(monkeypatch, content, detections)
    assert metrics["D-ECE"] < 0.2 < 0.5 < metrics["D-ECE_raw"]
    (head, stored), thresholds = *data.chosen["calibration"].items(), list(data.thresholds.values())
    maps = Calibration.from_dict(stored, 2)
    assert head == "head" and maps.images == 40
    # the threshold of the raw scores, and the same of the calibrated ones
    assert max(thresholds) < 0.05 and min(maps.thresholds) > 0.2
    assert maps.apply(np.array(thresholds), np.arange(2)).tolist() == list(maps.thresholds)
    assert validated(monkeypatch, content, detections)[1].chosen == data.chosen  # as a resumed run stores it


def test_what_a_validation_stores_and_reports_is_of_each_head_itself(monkeypatch):
    """Two heads of other scores, the better one second; then a validation of one without any true positives."""
    content, detections = many()
    worse = [image | {"scores": image["scores"] ** 2, "boxes": image["boxes"] + 2} for image in detections]
    by_head = {"first": worse, "second": detections}
    monkeypatch.setattr(scoring, "predict_with_all_heads", lambda *_, **__: by_head)
    dataset = SimpleNamespace(
        ground_truth=lambda: content, json_path="val.json", report={"images_listed": 40}, masks=False
    )
    run = SimpleNamespace(config=Config(), accelerator=Accelerator(cpu=True), log=SimpleNamespace(say=print))
    data = SimpleNamespace(
        train_set=SimpleNamespace(category_ids=[5, 6]),
        val_set=dataset,
        val_loader=None,
        thresholds={},
        chosen={},
        validated=[],
    )
    validate = validation.validator(run, data)
    metrics = validate(SimpleNamespace(heads=("first", "second"), ensemble=None))
    alone = {}
    for head, found_by in by_head.items():
        figures, own = validated(monkeypatch, content, found_by)
        alone[head] = (figures, own.chosen["calibration"]["head"])
    stored = data.chosen["calibration"]
    assert {head: stored[head] for head in alone} == {head: one for head, (_, one) in alone.items()}
    assert stored["first"] != stored["second"]
    assert metrics["head"] == "second" and metrics["D-ECE"] == alone["second"][0]["D-ECE"] != alone["first"][0]["D-ECE"]
    [last] = data.validated
    assert last.calibration.as_dict() == stored["second"]
    # later weights of which nothing is right: no map of earlier ones is stored with them
    far = [image | {"boxes": image["boxes"] + 500} for image in detections]
    by_head.update(first=far, second=far)
    validate(SimpleNamespace(heads=("first", "second"), ensemble=None))
    assert "calibration" not in data.chosen and data.validated[-1].calibration is None


def test_calibrated_results_have_the_same_ap_although_the_cut_compares_classes(monkeypatch):
    content, detections = many()
    stored = validated(monkeypatch, content, detections)[1].chosen["calibration"]["head"]
    # a map under which the second class is always ahead of the first: before the cut it would change what is kept
    curves = [{**stored["curves"][0], "scores": [0, 1], "precisions": ends} for ends in ([0, 0.5], [0.98, 0.99])]
    stored |= {"curves": curves, "of_label": [0, 1]}
    maps, truth = Calibration.from_dict(stored, 2), GroundTruth.from_dataset(content)
    config, shared = Config(eval=EvalConfig(max_detections=2)), Accelerator(cpu=True)
    cut = [{**image, **{key: image[key][:2] for key in ("boxes", "scores", "labels")}} for image in detections]
    raw, results = scoring.score_detections(cut, [5, 6], truth, config, shared)
    same, mapped = scoring.score_detections(cut, [5, 6], truth, config, shared, calibration=maps)
    assert same.stats == pytest.approx(raw.stats, abs=1e-9)
    assert [row["bbox"] for row in results] == [row["bbox"] for row in mapped]
    assert {row["category_id"] for row in mapped if row["score"] > 0.97} == {6}
    # a class that was never found has no score at which it is found best, calibrated or not
    raw.per_class[0] |= {"f1": -1.0, "score": -1.0}
    first, second = calibrated_results(raw, results, maps, [5, 6])[0].per_class
    assert first["score"] == -1 and second["score"] == maps.thresholds[1]
    # errors are of the raw scores before and after, whichever are evaluated
    (first,), (second,) = raw.folds.values(), same.folds.values()
    assert all(np.array_equal(a.scores, b.scores) for x, y in zip(first, second) for a, b in zip(x, y))


def test_the_report_says_what_the_figures_are_held_out_from(monkeypatch, tmp_path):
    content, detections = many()
    summary, _ = scoring.score_detections(
        detections, [5, 6], GroundTruth.from_dataset(content), Config(), Accelerator(cpu=True)
    )
    assert "calibration errors" not in summary.table()
    summary.reliability = assess(summary.folds["detector"], None, same_images=True)
    assert "held out: 5 folds of the images" in summary.table() and "D-ECE" in summary.table()
    names = {path.name for path in summary.save(tmp_path)}
    assert "reliability.csv" in names
    written = json.loads((tmp_path / "evaluation.json").read_text())["calibration"]
    assert written["D-ECE"]["raw"] == summary.reliability.dece[0] and written["bins"][0]["scores"] == "raw"
