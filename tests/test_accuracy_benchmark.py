"""benchmarks/accuracy.py: the figures of its table, and what its runs are made of; no training runs here."""

import argparse
import importlib
import json
import math
import statistics
import sys

import numpy as np
import pytest
from support import ROOT

from brs_detr.config import load_config
from brs_detr.evaluation.ground_truth import GroundTruth


@pytest.fixture(scope="module")
def accuracy():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("accuracy")
    sys.path.remove(str(ROOT / "benchmarks"))


def result(ap, head="decoder", seconds=100):
    return {"heads": {head: {"AP": ap, "AP50": 2 * ap}}, "cpu_seconds": seconds, "steps": 875, "machine": "m"}


def test_an_interval_is_that_of_student(accuracy):
    values = [0.02, 0.05, 0.01, 0.04]
    # t of 3 degrees of freedom at 97.5 % from a printed table
    half = 3.1824 * statistics.stdev(values) / 2
    mean, width = accuracy.interval(values).split(" ± ")
    assert float(mean) == pytest.approx(3.0) and float(width) == pytest.approx(100 * half, abs=0.05)
    assert accuracy.interval([0.02]) == "+2.0"  # of one seed nothing is known


def test_differences_are_those_of_equal_seeds(accuracy):
    results = {
        "demo brs_detr brs recipe 0": result(0.40),
        "demo brs_detr brs recipe 1": result(0.30),
        "demo brs_detr brs recipe 2": result(0.90),  # no focal run of this seed
        "demo brs_detr focal recipe 0": result(0.38),
        "demo brs_detr focal recipe 1": result(0.27),
        "demo brs_detr brs cost8 0": result(0.41),
    }
    lines = accuracy.table(results).splitlines()
    brs = next(line for line in lines if line.startswith("| brs | recipe"))
    assert "| 3 | 53.3 ± 32.1 |" in brs and "+2.5 ± 6.4 (focal, 2)" in brs
    assert next(line for line in lines if "cost8" in line).count("+1.0 (recipe, 1)") == 1
    assert "(focal" not in next(line for line in lines if line.startswith("| focal"))


def test_older_results_without_a_head_are_left_out_of_its_line(accuracy):
    heads = {"decoder": {"AP": 0.5, "AP50": 0.7}, "ensemble": {"AP": 0.6, "AP50": 0.8}}
    results = {
        "bccd brs_detr brs half 0": result(0.4),
        "bccd brs_detr brs half 1": result(0.4) | {"heads": heads},
        "bccd brs_detr score half 0": result(0.3),
        "bccd brs_detr score half 1": result(0.3),
    }
    lines = [line for line in accuracy.table(results).splitlines() if "| ensemble |" in line]
    assert lines == ["| brs | half | ensemble | 1 | 60.0 | 80.0 |  | 100 |"]


def test_a_line_is_compared_with_the_first_runs_that_share_a_seed(accuracy):
    results = {
        "demo brs_detr brs recipe 3": result(0.50),
        "demo brs_detr brs recipe 4": result(0.50),
        "demo brs_detr brs curve 0": result(0.45),
        "demo brs_detr score curve 0": result(0.40),
    }
    line = next(line for line in accuracy.table(results).splitlines() if line.startswith("| brs | curve"))
    assert "+5.0 (score, 1)" in line


@pytest.mark.parametrize("name", ["two words", ""])
def test_the_name_of_a_variant_is_one_word(accuracy, tmp_path, monkeypatch, name):
    out = tmp_path / "accuracy.json"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", f"demo={tmp_path}", "--variant", name, "--out", str(out)])
    with pytest.raises(SystemExit, match="not one word"):
        accuracy.main()
    with pytest.raises(ValueError):
        accuracy.keep(out, {f"demo atss brs {name} 0": result(0.4, "head")})
    assert not out.exists()


def test_results_of_several_studies_are_joined_in_one_file(accuracy, tmp_path):
    out = tmp_path / "results" / "accuracy.json"
    accuracy.keep(out, {"demo atss brs recipe 0": result(0.4, "head")})
    accuracy.keep(out, {"demo atss rs recipe 0": result(0.3, "head")})
    assert list(accuracy.stored(out)) == list(json.loads(out.read_text())) and len(accuracy.stored(out)) == 2
    assert "| rs | recipe | head | 1 | 30.0 |" in out.with_suffix(".md").read_text()


def test_suppression_keeps_the_best_of_a_class(accuracy):
    image = {
        "boxes": np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [20, 0, 30, 10]], np.float32),
        "scores": np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        "labels": np.array([0, 0, 1, 0]),
        "image_id": 3,
    }
    kept = accuracy.suppress(image)
    assert kept["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6]) and kept["image_id"] == 3


@pytest.mark.parametrize("dataset", ["demo", "bccd", "nuclei"])
@pytest.mark.parametrize(
    "detector", ["brs_detr", "atss", "faster_rcnn", "retinanet", "foveabox", "paa", "cascade_rcnn"]
)
def test_every_case_has_a_recipe_that_takes_its_settings(accuracy, dataset, detector):
    losses = ["brs", "rs", "ap", "alrp", *(["focal", "quality_focal"] if detector == "brs_detr" else ["score"])]
    for loss in losses:
        case = accuracy.Case(dataset, detector, loss, "recipe", 1)
        config = load_config(
            ROOT / "configs" / accuracy.recipe_of(case), accuracy.settings_of(case, {"recipe": [], "other": ["seed=3"]})
        )
        assert config.model.name == detector
    assert str(case) == f"{dataset} {detector} {losses[-1]} recipe 1"


@pytest.mark.parametrize("dataset", ["demo", "bccd", "nuclei"])
@pytest.mark.parametrize(
    ("detector", "loss", "name"),
    [
        ("brs_detr", "score", "co_detr"),
        ("brs_dino", "score", "co_dino"),
        ("brs_dino", "brs", "brs_dino"),
        ("brs_dino", "ap", "brs_dino"),
    ],
)
def test_the_published_counterpart_differs_in_its_losses_alone(accuracy, dataset, detector, loss, name):
    case = accuracy.Case(dataset, detector, loss, "recipe", 0)
    path = ROOT / "configs" / accuracy.recipe_of(case)
    model = load_config(path, accuracy.settings_of(case, {"recipe": []})).model
    assert (model.name, model.matcher.cls) == (name, 4)
    assert model.objective.loss == {"co_detr": "focal", "co_dino": "quality_focal"}.get(name, loss)
    small = load_config(path).model
    for setting in ("queries", "levels", "query_boxes", "proposal_nms_iou", "max_aux_queries"):
        assert getattr(model, setting) == getattr(small, setting)
    assert (model.backbone, model.rpn.proposals) == (small.backbone, small.rpn.proposals)


def test_a_variant_without_denoising_sets_nothing_of_it(accuracy):
    case = accuracy.Case("demo", "brs_dino", "brs", "none", 0)
    settings = accuracy.settings_of(case, {"none": ["model.denoising.loss=none"]})
    config = load_config(ROOT / "configs" / accuracy.recipe_of(case), settings)
    assert config.model.denoising.loss == "none"


def test_a_variant_without_a_recipe_run_is_compared_with_the_published_losses(accuracy):
    results = {
        "bccd brs_detr brs half 0": result(0.50),
        "bccd brs_detr score half 0": result(0.45),
        "bccd brs_detr score half 1": result(0.47),
    }
    lines = accuracy.table(results).splitlines()
    assert "+5.0 (score, 1)" in next(line for line in lines if line.startswith("| brs | half"))
    assert "(" not in next(line for line in lines if line.startswith("| score | half"))


def test_runs_of_other_lengths_are_not_compared(accuracy):
    results = {"bccd brs_detr brs recipe 0": result(0.5), "bccd brs_detr brs half 0": result(0.4) | {"steps": 416}}
    half = "bccd brs_detr score half 0"
    line = next(line for line in accuracy.table(results).splitlines() if "| half |" in line)
    assert "(recipe" not in line
    lines = accuracy.table(results | {half: result(0.3) | {"steps": 416}}).splitlines()
    assert "+10.0 (score, 1)" in next(line for line in lines if line.startswith("| brs | half |"))


def test_seconds_of_a_training_that_was_killed_with_the_script_are_unknown(accuracy, tmp_path, monkeypatch):
    """What it took before is lost, so the rest must not stand for the whole."""
    case, folder = accuracy.Case("demo", "atss", "brs", "recipe", 0), tmp_path / "one"

    class Killed:
        def __init__(self, *args, **options):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accuracy.subprocess, "Popen", Killed)
        with pytest.raises(KeyboardInterrupt):
            accuracy.train(case, tmp_path, [], folder)
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("")
    assert math.isnan(accuracy.train(case, tmp_path, [], folder))
    assert accuracy.train(case, tmp_path, [], tmp_path / "other") < 30


def test_a_change_to_a_variant_is_compared_with_that_variant(accuracy):
    results = {
        "demo brs_detr brs recipe 0": result(0.50),
        "demo brs_detr brs nms0.6 0": result(0.45),
        "demo brs_detr brs nms0.6,ema0.99 0": result(0.44),
    }
    lines = accuracy.table(results).splitlines()
    assert "-1.0 (nms0.6, 1)" in next(line for line in lines if "ema0.99" in line)
    assert "-5.0 (recipe, 1)" in next(line for line in lines if line.startswith("| brs | nms0.6 |"))


def test_a_name_of_other_settings_is_refused(accuracy):
    case = accuracy.Case("demo", "brs_detr", "brs", "half", 0)
    variants = {"half": ["train.epochs=8"]}
    kept = {str(case): result(0.5) | {"settings": ["model.loss=brs", "train.epochs=8", "train.eval_every=2"]}}
    accuracy.refuse_other_settings([case], variants, kept)  # a curve is no other training
    accuracy.refuse_other_settings([case], variants, {})
    with pytest.raises(SystemExit, match=r"`demo brs_detr brs half 0` has the settings .*epochs=4.*another name"):
        kept[str(case)]["settings"][1] = "train.epochs=4"
        accuracy.refuse_other_settings([case], variants, kept)


def test_a_name_of_another_recipe_is_refused(accuracy):
    case = accuracy.Case("demo", "brs_detr", "brs", "recipe", 0)
    kept = {str(case): result(0.5) | {"settings": ["model.loss=brs"], "recipe": "demo"}}
    accuracy.refuse_other_settings([case], {"recipe": []}, kept)
    kept[str(case)]["recipe"] = "brs_detr_small"
    with pytest.raises(SystemExit, match="has the recipe brs_detr_small, not demo"):
        accuracy.refuse_other_settings([case], {"recipe": []}, kept)


def test_datasets_without_recipes_are_given_one(accuracy, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RECIPES", dict(accuracy.RECIPES))
    own = tmp_path / "own.yaml"
    own.write_text("base: demo.yaml\n")

    def folders(*data, recipe=None):
        return accuracy.folders_of(argparse.Namespace(data=data, recipe=recipe))

    assert folders(f"demo={tmp_path}", f"mine={tmp_path}/a=b", recipe="brs_detr_small_cpu") == {
        "demo": tmp_path,
        "mine": tmp_path / "a=b",
    }
    assert accuracy.recipe_of(accuracy.Case("demo", "brs_detr", "brs", "recipe", 0)) == "demo.yaml"
    recipe = ROOT / "configs" / accuracy.recipe_of(accuracy.Case("mine", "brs_detr", "brs", "recipe", 0))
    assert recipe.samefile(ROOT / "configs" / "brs_detr_small_cpu.yaml")
    other = ROOT / "configs" / accuracy.recipe_of(accuracy.Case("mine", "atss", "brs", "recipe", 0))
    assert other.samefile(ROOT / "configs" / "cnn" / "atss_small.yaml")
    folders(f"yours={tmp_path}", recipe=own)  # a file, as train.py takes it
    assert accuracy.recipe_of(accuracy.Case("yours", "brs_dino", "score", "recipe", 0)) == str(own)


@pytest.mark.parametrize(
    ("data", "message"),
    [("other=x", "other: has no recipe; demo, bccd, nuclei have"), ("x", "NAME=FOLDER"), ("my data=x", "one word")],
)
def test_datasets_that_cannot_be_studied_are_refused(accuracy, data, message):
    with pytest.raises(SystemExit, match=message):
        accuracy.folders_of(argparse.Namespace(data=[data], recipe=None))


def test_panels_are_of_the_variant_that_a_detector_has_most_losses_of(accuracy):
    plot = importlib.import_module("accuracy_plot")
    results = {
        "bccd brs_detr brs half 0": result(0.5),
        "bccd brs_detr score half 0": result(0.4),
        "bccd brs_detr brs half_encoder 0": result(0.3),
        "bccd brs_detr brs recipe 0": result(0.6),
        "bccd brs_detr brs recipe 1": result(0.6),
        "bccd brs_detr brs recipe 2": result(0.6),
        "bccd torchvision_faster_rcnn score recipe 0": result(0.2, "detector"),
    }
    variants, panels = plot.panels_of(results, "bccd")
    assert variants["brs_detr"] == "half"
    assert panels == {("brs_detr", "decoder"): {"brs": [50.0], "score": [40.0]}}


def test_a_result_keeps_the_validations_of_its_run(accuracy, tmp_path, monkeypatch):
    lines = [
        {"kind": "val", "step": 52, "epoch": 2, "AP": 0.3, "AP50": 0.5, "decoder_AP": 0.2, "roi_AP": 0.3},
        {"kind": "train", "step": 60, "epoch": 3, "loss": 4.0},
        {"kind": "val", "step": 104, "epoch": 4, "AP": 0.4, "AP50": 0.6, "decoder_AP": 0.4, "roi_AP": 0.35},
    ]

    def train(case, data, settings, folder):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folder.with_suffix(".seconds").write_text("12.3")
        return 12.3

    monkeypatch.setattr(accuracy, "train", train)
    monkeypatch.setattr(accuracy, "figures_by_head", lambda weights, data: {"decoder": {"AP": 0.4}})
    case = accuracy.Case("bccd", "brs_detr", "brs", "half", 0)
    found = accuracy.run(case, tmp_path / "data", ["train.epochs=4"], tmp_path / "work")
    assert found["curve"] == [
        {"epoch": 2, "AP": 0.3, "decoder_AP": 0.2, "roi_AP": 0.3},
        {"epoch": 4, "AP": 0.4, "decoder_AP": 0.4, "roi_AP": 0.35},
    ]
    assert found["steps"] == 104 and found["cpu_seconds"] == 12
    assert accuracy.folder_of(case, tmp_path / "work").is_dir()  # until the result is kept


def test_a_result_is_kept_before_its_training_is_deleted(accuracy, tmp_path, monkeypatch, capsys):
    out, work = tmp_path / "accuracy.json", tmp_path / "work"

    def trained(case, data, settings, folder):
        accuracy.folder_of(case, folder).mkdir(parents=True)
        accuracy.folder_of(case, folder).with_suffix(".seconds").touch()
        return result(0.4)

    monkeypatch.setattr(accuracy, "run", trained)
    arguments = ["accuracy.py", f"demo={tmp_path}", "--seeds", "0", "--out", str(out), "--work", str(work)]
    monkeypatch.setattr(sys, "argv", arguments)
    with monkeypatch.context() as full, pytest.raises(OSError, match="no space"):
        full.setattr(accuracy, "keep", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        accuracy.main()
    assert len(list(work.iterdir())) == 2 and not out.exists()
    monkeypatch.setattr(accuracy, "run", lambda *_: result(0.4))
    accuracy.main()
    assert not list(work.iterdir()) and list(accuracy.stored(out)) == ["demo brs_detr brs recipe 0"]


def test_the_study_can_be_repeated_from_the_settings_in_its_results(accuracy):
    own = ("torchvision", "transformers")
    checked = 0
    for name, kept in accuracy.stored(accuracy.RESULTS).items():
        *words, seed = name.split()
        case = accuracy.Case(*words, int(seed))
        if case.detector.startswith(own) or any("copy of the code" in setting for setting in kept["settings"]):
            continue
        load_config(ROOT / "configs" / accuracy.recipe_of(case), kept["settings"])
        checked += 1
    assert checked > 100


def test_curves_are_means_over_seeds_by_epoch(accuracy):
    plot = importlib.import_module("accuracy_plot")

    def with_curve(*values):
        epochs = [{"epoch": 2 * (i + 1), "AP": ap, "roi_AP": ap} for i, ap in enumerate(values)]
        return result(values[-1], "roi") | {"curve": epochs}

    results = {
        "bccd brs_detr brs half 0": with_curve(0.2, 0.5),
        "bccd brs_detr brs half 1": with_curve(0.3, 0.6),
        "bccd brs_detr score half 0": with_curve(0.1, 0.4),
        "bccd brs_detr rs half 0": with_curve(0.4),  # validated once
        "demo brs_detr brs recipe 0": with_curve(0.7, 0.8),
    }
    (axes,) = plot.draw_curves(results, "bccd").axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn == {
        "brs_detr brs half (2)": ([2, 4], pytest.approx([25, 55])),
        "brs_detr score half (1)": ([2, 4], pytest.approx([10, 40])),
    }
    assert {line.get_label(): line.get_linestyle() for line in axes.lines}["brs_detr score half (1)"] == "--"
    results["bccd brs_detr brs half 2"] = with_curve(0.7, 0.8, 0.9)  # longer: the epochs of all are drawn
    (axes,) = plot.draw_curves(results, "bccd").axes
    (line,) = (line for line in axes.lines if line.get_label() == "brs_detr brs half (3)")
    assert list(line.get_xdata()) == [2, 4] and list(line.get_ydata()) == pytest.approx([40, 190 / 3])


def test_a_figure_of_nothing_is_refused(accuracy):
    plot = importlib.import_module("accuracy_plot")
    with pytest.raises(SystemExit, match="no run on 'coco' was validated more than once"):
        plot.draw_curves({"demo brs_detr brs recipe 0": result(0.5)}, "coco")
    with pytest.raises(SystemExit, match="no dataset has results of two losses"):
        plot.draw({"demo brs_detr brs recipe 0": result(0.5)})


def test_joined_heads_of_an_image_know_nothing_of_its_own_half(accuracy):
    rng = np.random.default_rng(0)
    sides = np.array([8.0, 16.0, 12.0])
    boxes = [rng.uniform(0, 60, (3, 2)) for _ in range(6)]

    def truth(skipped):
        rows = [(image, corner, side) for image, own in enumerate(boxes) for corner, side in zip(own, sides)]
        rows = [row for row in rows if row[0] not in skipped]
        annotations = [
            {"id": i, "image_id": image, "category_id": 1, "bbox": [*corner, side, side], "area": side**2, "iscrowd": 0}
            for i, (image, corner, side) in enumerate(rows, start=1)
        ]
        images = [{"id": image, "height": 80, "width": 80} for image in range(len(boxes))]
        content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
        return GroundTruth.from_dataset(content)

    def detected(shift, high):
        images = []
        for image, own in enumerate(boxes):
            corners = own + shift
            scores = np.sort(rng.uniform(0, high, 3).astype(np.float32))[::-1].copy()
            found = np.concatenate([corners, corners + sides[:, None]], axis=1).astype(np.float32)
            labels = np.zeros(3, np.int64)
            images.append({"image_id": image, "unreadable": False, "boxes": found, "scores": scores, "labels": labels})
        return images

    found = {"decoder": detected(0.0, 0.9), "roi": detected(0.5, 0.01)}
    joined = accuracy.join_by_other_half(found, [1], truth(()), 0.6)
    assert [image["image_id"] for image in joined] == list(range(6))
    # without the objects of the first half the second one learns nothing, the first one the same
    blind = accuracy.join_by_other_half(found, [1], truth((0, 2, 4)), 0.6)
    for image in (0, 2, 4):
        np.testing.assert_array_equal(joined[image]["scores"], blind[image]["scores"])
    assert any(not np.array_equal(joined[image]["scores"], blind[image]["scores"]) for image in (1, 3, 5))
