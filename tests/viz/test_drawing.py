"""Drawn images: boxes lie where they should, whatever is drawn from, and odd inputs do not stop a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from brs_detr.viz.boxes import color, contact_sheet, draw_detections, ink_on
from brs_detr.viz.plots import Line, Panel, draw_curves, draw_precision_recall, legend, nice_ticks, smoothed, tick_text

GRAY = Image.new("RGB", (200, 100), (120, 120, 120))
PLAIN = {"min_side": 1, "legend": False}


def found(boxes, scores, labels):
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def changed(image, other=GRAY):
    """(left, top, right, bottom) of what differs."""
    return ImageChops.difference(image, other).getbbox()


def test_boxes_are_drawn_at_their_place_and_scale():
    crowded = found([[40.0, 30.0, 80.0, 60.0]] * 41, [0.9] * 41, [0] * 41)  # so many that no name is written
    assert changed(draw_detections(GRAY, crowded, None, ["a"], **PLAIN)) == (40, 30, 81, 61)
    large = draw_detections(GRAY, crowded, None, ["a"], min_side=400, legend=False)
    assert large.size == (400, 200)
    assert changed(large, GRAY.resize((400, 200))) == (80, 60, 161, 121)


def test_arrays_tensors_and_images_give_the_same_and_stay_untouched():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    before = array.copy()
    detections = found([[10.0, 10.0, 50.0, 40.0]], [0.9], [0])
    forms = (array, torch.from_numpy(array).permute(2, 0, 1), Image.fromarray(array))
    drawn = [draw_detections(form, detections, None, ["a"]).tobytes() for form in forms]
    assert drawn[0] == drawn[1] == drawn[2]
    assert np.array_equal(array, before)
    assert draw_detections(Image.new("L", (30, 30)), None, None, []).mode == "RGB"


def test_low_scores_are_left_out():
    low = found([[40.0, 30.0, 80.0, 60.0]], [0.2], [0])
    assert changed(draw_detections(GRAY, low, None, ["a"], **PLAIN)) is None
    assert changed(draw_detections(GRAY, low, None, ["a"], threshold=0.1, **PLAIN)) is not None


def test_found_and_true_boxes_look_different():
    box = [[40.0, 30.0, 80.0, 60.0]]
    solid = draw_detections(GRAY, found(box, [0.9], [0]), None, ["a"], **PLAIN)
    dashed = draw_detections(GRAY, None, {"boxes": torch.tensor(box), "labels": torch.tensor([0])}, ["a"], **PLAIN)
    edge = {solid.getpixel((80, y)) for y in range(32, 58)}
    assert edge == {color(0)}
    assert len({dashed.getpixel((80, y)) for y in range(32, 58)}) == 2


@pytest.mark.parametrize(
    "box", [[0.0, 0.0, 0.0, 0.0], [-50.0, -40.0, 1e9, 400.0], [30.0, 30.0, 20.0, 20.0], [float("nan")] * 4]
)
def test_odd_boxes_and_unknown_labels_do_not_stop_it(box):
    odd = found([box], [0.9], [7])
    assert draw_detections(GRAY, odd, odd, ["a"]).size[0] == 640
    empty = found([], [], [])
    assert draw_detections(GRAY, empty, empty, []).size[0] == 640


def test_a_contact_sheet_holds_every_image_inside_its_cell():
    images = [
        Image.new("RGB", size, (200, 30, 30)) for size in ((900, 300), (300, 900), (50, 50), (400, 400), (10, 10))
    ]
    sheet = contact_sheet(images, columns=2, cell=(200, 150), gap=10)
    assert sheet.width <= 2 * 200 + 30 and sheet.height <= 3 * 150 + 40
    red = np.asarray(sheet)[..., 0] - np.asarray(sheet)[..., 1].astype(int) > 100
    assert red.sum() > 8000
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def records():
    train = [
        {"kind": "train", "step": s, "epoch": s / 50, "loss": 5 / s, "lr": 1e-4, "terms": {"rpn.rank": 1 / s}}
        for s in range(1, 101)
    ]
    val = [{"kind": "val", "step": 50 * e, "epoch": e, "AP": 0.1 * e, "AP50": 0.2 * e} for e in (1, 2)]
    return train + val


def test_curves_of_a_run_are_saved_with_a_panel_for_what_was_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "\n".join(json.dumps(record) for record in records())
    path.write_text(text + '\n{"kind": "train", "st', encoding="utf-8")
    image = draw_curves(path, tmp_path / "deep" / "curves.png")
    assert Image.open(tmp_path / "deep" / "curves.png").size == image.size == (1280, 800)
    assert draw_curves([r for r in records() if r["kind"] == "val"]).size == (640, 400)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"kind": "val", "step": 1, "AP": -1.0}],
        [{"kind": "train", "step": 1, "loss": None}, {"kind": "train", "step": 2, "loss": 0.0, "terms": None}],
        [{"kind": "train", "loss": float("nan"), "step": 1}, {"other": 1}],
        [{"kind": "train", "step": 5, "epoch": 0.5, "loss": 3.0}],
    ],
)
def test_scant_records_still_give_a_image(lines):
    assert draw_curves(lines).size == (640, 400)


def test_precision_recall_of_many_classes():
    curves = {f"a class with the number {i}": [1.0 - i / 20] * 50 + [0.0] * 51 for i in range(12)}
    image = draw_precision_recall(curves)
    assert image.size == (640, 400)
    first = {name: curves[name] for name in list(curves)[:10]}
    assert draw_precision_recall(first | {"other": [0.5] * 101}).tobytes() != image.tobytes()  # in the mean
    assert draw_precision_recall({}).size == draw_precision_recall({"one": [1.0] * 101}).size == (640, 400)


def test_a_legend_names_what_fits_and_counts_the_rest():
    few = Panel("few", "x", [Line(f"line {i}", [(0, 0), (1, 1)], (0, 0, 0)) for i in range(8)])
    assert [text for _, _, text, _ in legend(few)] == [f"line {i}" for i in range(8)]
    many = Panel("many", "x", [Line(f"line {i}", [(0, 0), (1, 1)], (0, 0, 0)) for i in range(80)])
    entries = legend(many)
    assert entries[-1][2] == f"and {80 - (len(entries) - 1)} more"
    assert {row for _, row, _, _ in entries} == {0, 1, 2}
    assert legend(Panel("one", "x", few.lines[:1])) == []  # its title says what it is


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0, 0.9) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    for low, high in ((0.013, 0.94), (17, 1234), (0, 2e-4)):
        ticks = nice_ticks(low, high)
        assert 3 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
    assert nice_ticks(3, 3) == [3]
    assert [tick_text(v) for v in (0, 0.25, 12000, 0.00015, 1e-5)] == ["0", "0.25", "12,000", "1.5e-4", "1e-5"]


def test_smoothing_ignores_a_spike_and_keeps_a_level():
    points = [(i, 2.0) for i in range(20)]
    points[7] = (7, 900.0)
    assert smoothed(points, 5) == [(i, 2.0) for i in range(20)]


def test_neighboring_classes_have_different_colors_and_readable_names():
    tones = [color(i) for i in range(80)]
    assert len(set(tones)) == 80
    assert ink_on((255, 255, 255)) == (0, 0, 0) and ink_on((0, 0, 0)) == (255, 255, 255)
