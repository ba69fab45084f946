"""Drawn images: boxes lie where they should, whatever is drawn from, and odd inputs do not stop a run."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from brs_detr.evaluation.matching import Confusion
from brs_detr.viz.boxes import color, contact_sheet, draw_boxes, draw_detections, ink_on
from brs_detr.viz.plots import (
    draw_confusion,
    draw_curves,
    draw_precision_recall,
    draw_reliability,
    draw_score_study,
    smoothed,
)

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


def test_detections_and_ground_truth_look_different():
    box = [[40.0, 30.0, 80.0, 60.0]]
    solid = draw_detections(GRAY, found(box, [0.9], [0]), None, ["a"], **PLAIN)
    true = draw_detections(GRAY, None, {"boxes": torch.tensor(box), "labels": torch.tensor([0])}, ["a"], **PLAIN)
    middle = [(80 - step, 45) for step in range(4)]  # from the right edge inward
    assert [solid.getpixel(place) for place in middle] == [color(0)] * 2 + [(120, 120, 120)] * 2
    assert [true.getpixel(place) for place in middle] == [(0, 0, 0)] * 2 + [(255, 255, 255)] * 2
    targets = {"boxes": torch.tensor(box), "labels": torch.tensor([0])}
    both = draw_detections(GRAY, found(box, [0.9], [0]), targets, ["a"], **PLAIN)
    assert [both.getpixel(place) for place in middle] == [color(0)] * 2 + [(255, 255, 255)] * 2  # neither is hidden


def tag_boxes(image, tones):
    """(left, top, right, bottom) of what has each color."""
    pixels = np.asarray(image)
    spots = [np.argwhere((pixels == tone).all(2)) for tone in tones]
    return [(*spot.min(0)[::-1].tolist(), *(spot.max(0)[::-1] + 1).tolist()) for spot in spots]


def test_a_tag_lies_inside_the_image_wherever_its_box_is():
    for x, y in ((0, 0), (180, 0), (0, 80), (180, 80), (90, 40)):
        box = torch.tensor([[x, y, x + 19.0, y + 19.0]])
        plain = draw_boxes(GRAY, box, [color(0)])
        tagged = draw_boxes(GRAY, box, [color(0)], ["triangle 0.95"])
        assert changed(plain) == (x, y, x + 20, y + 20)
        left, top, right, bottom = changed(tagged)
        assert right - left > 80 and 14 < bottom - top < 40  # the tag, not a part of it
        assert left >= 0 and right <= 200 and top >= 0 and bottom <= 100
        (tag,) = tag_boxes(tagged, [color(0)])
        assert tag == (left, top, right, bottom)


def test_tags_do_not_cover_one_another_and_the_best_one_is_there():
    boxes = torch.tensor([[60.0, 30, 120, 60]] * 12)
    tones = [color(index) for index in range(12)]
    alone = draw_boxes(GRAY, boxes[:1], tones[-1:], ["the last"])
    together = draw_boxes(GRAY, boxes, tones, [*["others"] * 11, "the last"])
    above = (60, 12, 120, 29)  # where the first choice of all is
    assert alone.crop(above).tobytes() == together.crop(above).tobytes()
    tags = [np.argwhere((np.asarray(together) == tone).all(2)) for tone in tones[:-1]]  # beneath the last box
    placed = [spots for spots in tags if len(spots) > 200]
    assert len(placed) == 2  # below and inside; there is no room for more


def test_odd_class_names_are_drawn():
    names = ["$x^2", "line\nbreak", "\ud800", "köln", "名字", "😀", "", "x" * 300]
    for label, _ in enumerate(names):
        one = found([[40.0, 30.0, 80.0, 60.0]], [0.9], [label])
        image = draw_detections(GRAY, one, one, names, title="\udcff.jpg")
        left, top, right, bottom = tag_boxes(image.crop((0, 0, 640, 320)), [color(label)])[0]
        assert right - left <= 400 and bottom - top < 130


def test_letters_grow_with_the_image_and_small_images_are_enlarged():
    heights = []
    for size in ((80, 60), (640, 480), (2560, 1920)):
        box = torch.tensor([[0.25, 0.25, 0.5, 0.5]]) * torch.tensor(size).repeat(2)
        detections = {"boxes": box, "scores": torch.ones(1), "labels": torch.zeros(1)}
        image = draw_detections(Image.new("RGB", size), detections, None, ["disc"], legend=False)
        top, bottom = (tag_boxes(image, [color(0)])[0][i] for i in (1, 3))
        heights.append((bottom - top - image.height * 0.25) / image.height)
    assert heights == pytest.approx([heights[0]] * 3, abs=0.01) and heights[0] > 0.02


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


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def entries(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_curves_of_a_run_are_saved_with_a_panel_for_what_was_logged(tmp_path):
    figure = draw_curves(records(), tmp_path / "deep" / "curves.png")
    assert Image.open(tmp_path / "deep" / "curves.png").size == (1280, 800)
    assert titles(figure) == ["training loss", "loss by head", "average precision, in %", "learning rate"]
    loss, heads, precision, rate = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[s / 50, 5 / s] for s in range(1, 101)]  # each report
    assert heads.lines[0].get_ydata()[50] == pytest.approx(1 / 51, rel=0.01)  # smoothed
    assert precision.lines[1].get_xydata() == pytest.approx(np.array([[1, 20], [2, 40]]))
    assert entries(precision.get_legend()) == ["AP (best 20.0)", "AP50 (best 40.0)"]
    assert rate.get_ylim()[0] == 0 and rate.get_xlabel() == "epoch"
    assert titles(draw_curves([r for r in records() if r["kind"] == "val"])) == ["average precision, in %"]


def test_one_early_spike_does_not_flatten_the_loss():
    values = [1e6, *([2.0] * 50)]
    figure = draw_curves([{"kind": "train", "step": s, "loss": v} for s, v in enumerate(values)])
    assert figure.axes[0].get_ylim()[1] < 5 and figure.axes[0].get_xlabel() == "step"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"kind": "val", "step": 1, "AP": -1.0}],
        [{"kind": "train", "step": 1, "loss": None}, {"kind": "train", "step": 2, "loss": 0.0, "terms": None}],
        [{"kind": "train", "loss": float("nan"), "step": 1}, {"other": 1}],
        [{"kind": "train", "step": 1, "loss": 10**400}, {"kind": "train", "step": 2, "loss": 1e308}],
        [{"kind": "train", "step": 5, "epoch": 0.5, "loss": 3.0}],
    ],
)
def test_scant_records_still_give_an_image(lines, tmp_path):
    assert len(draw_curves(lines, tmp_path / "curves.png").axes) == 1
    assert Image.open(tmp_path / "curves.png").size == (640, 400)


def test_a_single_report_is_a_dot():
    line = draw_curves([{"kind": "train", "step": 5, "loss": 3.0}]).axes[0].lines[0]
    assert line.get_xydata().tolist() == [[5, 3]] and line.get_marker() == "o"


def test_a_legend_of_many_heads_counts_the_rest():
    terms = {f"head {i}.rank": 1.0 + i for i in range(15)}
    axes = draw_curves([{"kind": "train", "step": s, "terms": terms} for s in (1, 2)]).axes[0]
    assert len(axes.lines) == 15
    assert entries(axes.get_legend()) == [f"head {i}" for i in range(12)]
    assert axes.get_legend().get_title().get_text() == "and 3 more"


def test_precision_recall_of_many_classes(tmp_path):
    curves = {f"class {i}": [1.0 - i / 20] * 50 + [0.0] * 51 for i in range(12)}
    figure = draw_precision_recall(curves, tmp_path / "pr.png")
    assert min(Image.open(tmp_path / "pr.png").size) >= 400
    (axes,) = figure.axes
    mean, *lines = axes.lines
    assert mean.get_ydata() == pytest.approx(np.mean(list(curves.values()), axis=0))  # of all 12, 10 of them drawn
    assert [line.get_ydata().tolist() for line in lines] == list(curves.values())[:10]
    assert lines[0].get_xdata() == pytest.approx(np.linspace(0, 1, 101))
    area = [100 * sum(curve) / 101 for curve in curves.values()]
    assert entries(figure.legends[0])[:2] == [f"all 12 classes: {sum(area) / 12:.1f}", f"class 0: {area[0]:.1f}"]
    assert draw_precision_recall({}, tmp_path / "pr.png").axes[0].lines[:] == []
    assert len(draw_precision_recall({"one": [1.0] * 101}, tmp_path / "pr.png").axes[0].lines) == 1


ODD_NAMES = ["$x^2", "$\\alpha$", "_hidden", "e$", "{", "line\nbreak", "\ud800", "köln", "名字", "😀", "", "x" * 300]


def test_odd_class_names_are_written_as_they_are(tmp_path, recwarn):
    figure = draw_precision_recall({name: [0.5] * 101 for name in ODD_NAMES}, tmp_path / "pr.png", max_classes=12)
    names = [entry.rpartition(":")[0] for entry in entries(figure.legends[0])[1:]]
    assert names[:5] == ODD_NAMES[:5]
    assert names[5:11] == ["line\\x0abreak", "\\ud800", "köln", "名字", "😀", ""] and len(names[11]) == 24
    counts = np.ones((len(ODD_NAMES) + 1,) * 2, int)
    axes = draw_confusion(Confusion(ODD_NAMES, counts), tmp_path / "confusion.png").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [*names, "background"]
    assert [text.get_text() for text in axes.get_xticklabels()] == [*names, "missed"]
    assert not any(text.get_parse_math() or text.get_usetex() for text in axes.get_yticklabels())
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_plots_without_a_number_are_drawn(tmp_path):
    """A class whose precision is NaN has no curve but its entry."""
    curves = {"a": [float("nan")] * 101, "b": [0.5] * 101}
    assert "a: nan" in entries(draw_precision_recall(curves, tmp_path / "pr.png").legends[0])


def test_the_users_matplotlib_settings_are_neither_used_nor_changed(tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        draw_curves(records(), tmp_path / "curves.png")  # LaTeX would be called for, or found missing
        assert dict(matplotlib.rcParams) == before


def test_smoothing_ignores_a_spike_and_keeps_a_level():
    points = [(i, 2.0) for i in range(20)]
    points[7] = (7, 900.0)
    assert smoothed(points, 5) == [(i, 2.0) for i in range(20)]


def test_neighboring_classes_have_different_colors_and_readable_names():
    tones = [color(i) for i in range(80)]
    assert len(set(tones)) == 80
    assert ink_on((255, 255, 255)) == (0, 0, 0) and ink_on((0, 0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("masks", [True, False])
def test_score_study_has_a_line_for_each_ap_and_one_for_the_detections(tmp_path, masks):
    rows = [{"score": s, "detections": 90 * (1 - s), "AP": 0.4 - s / 4} for s in (0, 1e-4, 0.1, 0.8)]
    rows = [row | ({"mask_AP": -1.0} if masks else {}) for row in rows]
    figure = draw_score_study(rows, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000
    left, right = figure.axes
    assert len(left.lines) == 1 + masks and len(right.lines) == 1
    assert left.lines[0].get_ydata().tolist() == [row["AP"] for row in rows]


def test_the_reliability_diagram_shows_raw_and_calibrated_scores_beside_the_diagonal(tmp_path):
    row = {"low": 0.1, "high": 0.2, "detections": 5, "quality": 0.4}
    raw = [{**row, "scores": "raw", "confidence": c, "precision": p} for c, p in ((0.1, 0.4), (0.2, 0.9))]
    after = [{**row, "scores": "calibrated", "confidence": c, "precision": p} for c, p in ((0.4, 0.4), (0.9, 0.9))]
    (axes,) = draw_reliability([*raw, *after], tmp_path / "reliability.png").axes
    assert (tmp_path / "reliability.png").stat().st_size > 1000
    diagonal, of_raw, of_calibrated, quality = axes.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert of_raw.get_xydata().tolist() == [[0.1, 0.4], [0.2, 0.9]]
    assert of_calibrated.get_xydata().tolist() == [[0.4, 0.4], [0.9, 0.9]]
    assert quality.get_ydata().tolist() == [0.4, 0.4]
    draw_reliability([], tmp_path / "empty.png")


def test_long_curves_are_smoothed_from_fewer_points():
    """A median for each of 100,000 reports, of thousands of them, would take minutes, while other processes wait."""
    points = [(float(x), 1e9 if x % 1000 == 0 else x / 100) for x in range(100_000)]
    curve = smoothed(points, 4000)
    assert 1000 <= len(curve) <= 2000 and curve[0][0] == 0 and curve[-1][0] > 99_900
    assert all(y == pytest.approx(x / 100, abs=2) for x, y in curve if 3000 < x < 97_000)  # also at the spikes
    assert smoothed(points[:2000], 5) == [(x, pytest.approx(x / 100, abs=0.03)) for x, _ in points[:2000]]
