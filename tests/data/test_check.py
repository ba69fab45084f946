"""Every deliberate fault is named, and only what cannot be trained on fails.

What a person should look at in the images themselves is named.
"""

import argparse
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from brs_detr.commands.arguments import check_data
from brs_detr.data import check, coco
from brs_detr.data.check import blank_bottom_fraction, inspect_image
from brs_detr.data.coco import CocoDetection
from brs_detr.data.issues import POLICY, IssueLog
from brs_detr.data.json_file import load_json
from brs_detr.data.transforms import EvalTransforms
from brs_detr.viz.boxes import color, write_contact_sheet

EXPECTED = {
    "01": "image_without_objects",
    "02": "crowd",
    "03": "box_clipped",
    "04": "box_outside",
    "05": "box_outside",
    "06": "box_empty",
    "07": "box_empty",
    "08": "box_negative",
    "09": "box_not_finite",
    "10": "box_not_finite",
    "11": "box_not_four_numbers",
    "12": "box_missing",
    "13": "number_as_text",
    "14": "box_missing",
    "15": "area_missing",
    "16": "iscrowd_missing",
    "17": "area_not_positive",
    "18": "box_duplicate",
    "19": "image_id_unknown",
    "20": "category_id_unknown",
    "21": "annotation_id_duplicate",
    "22": "image_id_duplicate",
    "23": "image_unreadable",
    "24": "image_converted",
    "25": "image_converted",
    "26": "image_converted",
    "27": "image_converted",
    "28": "image_not_turned",
    "29": "image_turned",
    "30": "size_mismatch",
    "31": "image_missing",
    "32": "image_unreadable",
    "33": "image_unreadable",
    "34": "image_name_misleads",
    "35": "image_name_unusual",
}


def arguments(*words):
    parser = argparse.ArgumentParser()
    check_data(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.mark.parametrize("number", EXPECTED)
def test_each_dirty_file_has_its_fault_named(shared_data, number):
    folder = shared_data / "dirty"
    (path,) = (folder / "annotations" / "one_fault").glob(f"{number}_*.json")
    log = IssueLog(max_examples=None)
    check.check_dataset(check.Source(str(path), str(folder / "images"), EvalTransforms()), log)
    beside = {"image_not_listed", "category_unused"}  # true of these files as well, and not their fault
    kinds = set(log.counts) - beside
    assert EXPECTED[number] in kinds and kinds <= {EXPECTED[number], "image_converted"}
    assert [issue.where for issue in log.issues if issue.kind == EXPECTED[number]] != []


def test_a_json_is_read_once(shared_data, tmp_path, monkeypatch):
    path, reads = shared_data / "dirty" / "annotations" / "control.json", []
    for module in (check, coco):
        monkeypatch.setattr(module, "load_json", lambda name, *a, **k: reads.append(name) or load_json(name, *a, **k))
    folder = shared_data / "dirty" / "images"
    assert check.run(arguments(path, "--images", folder, "--sheet", tmp_path / "sheet.png", "--samples", "0")) == 0
    assert reads == [str(path)]


def test_the_clean_control_has_none(shared_data):
    folder = shared_data / "dirty"
    log = IssueLog(max_examples=None)
    source = check.Source(str(folder / "annotations" / "control.json"), str(folder / "images"), EvalTransforms())
    check.check_dataset(source, log)
    assert set(log.counts) <= {"image_not_listed"}


def test_all_faults_at_once_are_trainable_and_listed(shared_data, tmp_path, capsys):
    path = shared_data / "dirty" / "annotations" / "faulty.json"
    words = (path, "--sheet", tmp_path / "sheet.png", "--csv", tmp_path / "faults.csv")
    assert check.run(arguments(*words)) == 0
    out = capsys.readouterr().out
    for kind in set(EXPECTED.values()):
        assert kind.replace("_", " ") in out and POLICY[kind][1] in out
    assert Image.open(tmp_path / "sheet.png").size[0] == 4 * 320
    rows = list(csv.DictReader((tmp_path / "faults.csv").open(encoding="utf-8")))
    assert set(EXPECTED.values()) <= {row["kind"] for row in rows}
    assert check.run(arguments(*words, "--strict")) == 1


@pytest.mark.parametrize("wreck", ["no image", "no box", "no json", "unreadable"])
def test_what_cannot_be_trained_on_fails_with_a_sentence(tmp_path, write_dataset, change, wreck, capsys):
    path = write_dataset(tmp_path, sizes=[(40, 50)], boxes=[[(1, 2, 3, 20, 20)]])
    image = tmp_path / "images" / "000.png"
    if wreck == "no image":
        image.unlink()
    elif wreck == "unreadable":
        image.write_bytes(b"")
    elif wreck == "no box":
        change(path, lambda data: data.update(annotations=[]))
    else:
        path.write_text("nothing")
    assert check.run(arguments(path, "--images", tmp_path / "images", "--sheet", tmp_path / "s.png")) == 1
    assert "error: dataset is not trainable: " in capsys.readouterr().err


def test_a_json_without_a_recipe_has_its_masks_checked_if_it_has_any(tmp_path, write_dataset, change, capsys):
    path = write_dataset(tmp_path, sizes=[(64, 96)], boxes=[[(1, 5, 6, 20, 10), (1, 40, 6, 20, 10), (17, 0, 0, 8, 8)]])
    words = arguments(path, "--samples", 0)
    assert check.run(words) == 0
    assert "masks are not looked at" in capsys.readouterr().out
    change(path, lambda data: [annotation.update(segmentation=[]) for annotation in data["annotations"]])
    assert check.run(words) == 0  # as tools write it that export boxes only
    assert "masks are not looked at" in capsys.readouterr().out

    def edit(data):
        data["annotations"][0]["segmentation"] = {"size": [64, 96], "counts": "0"}
        data["annotations"][1]["segmentation"] = [[5, 6, 25, 6, 25, 16, 5, 16]]

    change(path, edit)
    assert check.run(arguments(path, "--samples", 0, "--csv", tmp_path / "faults.csv")) == 0
    out = capsys.readouterr().out
    assert "2 of 3 objects have masks" in out
    for kind in ("mask empty", "mask not in box", "mask missing"):
        assert f"1 x {kind}" in out
    with open(tmp_path / "faults.csv") as file:
        rows = {row["kind"]: row["where"] for row in csv.DictReader(file)}
    assert rows["mask_not_in_box"].startswith("annotation 2 (") and rows["mask_empty"].startswith("annotation 1 (")
    assert check.run(arguments(path, "--samples", 0, "--strict")) == 1


def test_recipes_are_resolved_by_the_caller(tmp_path, write_dataset, capsys):
    path = write_dataset(tmp_path, sizes=[(40, 50)], boxes=[[(1, 2, 3, 20, 20)]])
    source = check.Source(str(path), str(tmp_path / "images"), EvalTransforms())
    sheet = tmp_path / "sheet.png"
    assert check.run(arguments("my.yaml", "--sheet", sheet), lambda target: [source, source]) == 0
    assert sheet.exists() and (tmp_path / "sheet-2.png").exists()
    assert capsys.readouterr().out.count("will be trained on") == 2


def test_splits_with_other_categories_are_refused(tmp_path, write_dataset, capsys):
    sources = []
    for name, categories in (("train", ((1, "a"), (2, "b"))), ("val", ((1, "a"), (3, "b")))):
        path = write_dataset(tmp_path / name, sizes=[(40, 50)], boxes=[[(1, 2, 3, 20, 20)]], categories=categories)
        sources.append(check.Source(str(path), str(path.parent / "images"), EvalTransforms()))
    assert check.run(arguments("my.yaml", "--samples", 0), lambda target: sources) == 1
    assert "id 2 is 'b' there and absent here, id 3 is absent there and 'b' here" in capsys.readouterr().err


def test_all_splits_are_checked_even_where_the_first_is_refused(tmp_path, write_dataset, capsys):
    paths = [write_dataset(tmp_path / name, sizes=[(40, 50)], boxes=[[(1, 2, 3, 20, 20)]]) for name in ("a", "b")]
    paths[0].write_text("{")
    sources = [check.Source(str(path), str(path.parent / "images"), EvalTransforms()) for path in paths]
    assert check.run(arguments("my.yaml", "--samples", 0), lambda target: sources) == 1
    out, err = capsys.readouterr()
    assert "not a JSON file" in err and f"{paths[1]}: 1 of 1 images" in out


def test_a_split_for_evaluation_is_opened_as_evaluation_opens_it(tmp_path, write_dataset, capsys):
    path = write_dataset(tmp_path, sizes=[(40, 50), (20, 20)], boxes=[[(1, -2, 3, 20, 20)], []])
    source = check.Source(str(path), str(tmp_path / "images"), EvalTransforms(), train=False)
    assert check.run(arguments("my.yaml", "--samples", 0), lambda target: [source]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 images and 1 of 1 annotations will be evaluated on" in out and "clipped" not in out


@pytest.mark.parametrize("annotations", ["none", "crowds"])
def test_a_split_for_evaluation_needs_an_object(tmp_path, write_dataset, change, annotations, capsys):
    path = write_dataset(tmp_path, sizes=[(40, 50)], boxes=[[(1, 2, 3, 20, 20)]])
    edit = {"none": list.clear, "crowds": lambda entries: entries[0].update(iscrowd=1)}[annotations]
    source = check.Source(
        str(change(path, lambda data: edit(data["annotations"]))),
        str(tmp_path / "images"),
        EvalTransforms(),
        train=False,
    )
    assert check.run(arguments("my.yaml", "--samples", 0), lambda target: [source]) == 1
    assert "none of its annotations can be evaluated" in capsys.readouterr().err


def test_the_limits_of_a_recipe_are_those_of_the_check(tmp_path, write_dataset):
    path = write_dataset(tmp_path, sizes=[(20, 20), (50, 50)], boxes=[[(1, 2, 3, 10, 10)], []])
    limits = {"min_side": 8, "keep_empty": False}
    source = check.Source(str(path), str(tmp_path / "images"), EvalTransforms(), options=limits)
    assert check.check_dataset(source, IssueLog()).report["images"] == 1


def test_images_of_both_splits_are_named_and_those_of_the_other_are_not_called_unlisted(
    tmp_path, write_dataset, capsys
):
    path = write_dataset(tmp_path, sizes=[(40, 50)] * 3, boxes=[[(1, 2, 3, 20, 20)]] * 3)
    data = json.loads(path.read_text())
    for name, images in (("train", data["images"][:2]), ("val", data["images"][1:])):
        (tmp_path / f"{name}.json").write_text(json.dumps({**data, "images": images}))
    sources = [
        check.Source(str(tmp_path / f"{name}.json"), str(tmp_path / "images"), EvalTransforms())
        for name in ("train", "val")
    ]
    assert check.run(arguments("my.yaml", "--samples", 0), lambda target: sources) == 0
    out = capsys.readouterr().out
    assert "1 x image in both splits" in out and "image 993 (001.png)" in out and "image not listed" not in out
    assert check.run(arguments("my.yaml", "--samples", 0, "--strict"), lambda target: sources) == 1


def test_one_color_is_worth_a_look(tmp_path, write_dataset):
    path = write_dataset(tmp_path, sizes=[(40, 50)], boxes=[[(1, 2, 3, 20, 20)]])
    Image.fromarray(np.full((40, 50, 3), 128, np.uint8)).save(tmp_path / "images" / "000.png")
    log = IssueLog()
    check.check_dataset(check.Source(str(path), str(tmp_path / "images"), EvalTransforms()), log)
    assert log.counts["image_uniform"] == 1


def test_the_sheet_shows_boxes_where_they_are(tmp_path):
    target = {"boxes": torch.tensor([[20.0, 40, 60, 80]]), "labels": torch.tensor([0])}
    write_contact_sheet(
        [(torch.zeros(3, 100, 100, dtype=torch.uint8), target)], ["ü-名\ud800"], tmp_path / "s.png", 1, cell=200
    )
    pixels = np.asarray(Image.open(tmp_path / "s.png"))
    assert pixels.shape == (200, 200, 3)  # twice as large
    ys, xs = np.where((pixels == color(0)).all(2))
    assert (xs.min(), xs.max(), ys.max()) == (40, 120, 160)
    assert (pixels[120, 40] == color(0)).all() and not pixels[120, 80].any()
    assert ys.min() < 78  # its tag is above the box


def test_reading_twice_gives_the_same_report(tmp_path, write_dataset):
    path = write_dataset(tmp_path, sizes=[(40, 50)], boxes=[[(1, -2, 3, 20, 20)]])
    reports = [CocoDetection(path, tmp_path / "images", train=True).report for _ in range(2)]
    assert reports[0] == reports[1] and reports[0]["box_clipped"] == 1


def noise(h=64, w=96, high=256):
    return np.random.default_rng(0).integers(0, high, (h, w, 3), dtype=np.uint8)


@pytest.fixture()
def looks(tmp_path, write_dataset):
    """Puts a file in the place of an image and returns what there is to say about it."""
    path = write_dataset(tmp_path, sizes=[(64, 96)], boxes=[[(1, 5, 5, 40, 40)]])

    def look(save):
        save(tmp_path / "images" / "000.png")
        log = IssueLog()
        dataset = CocoDetection(path, tmp_path / "images", train=True, log=log)
        return inspect_image(dataset, 0, log), {
            kind: log.counts[kind] for kind in log.counts if kind != "category_unused"
        }

    return look


def test_an_ordinary_image(looks):
    assert looks(Image.fromarray(noise()).save) == (True, {})


def test_twelve_bits_in_sixteen_are_dark(looks):
    values = noise()[..., 0].astype(np.uint16) * 16
    assert looks(Image.fromarray(values).save) == (True, {"image_converted": 1, "image_dark": 1})


def test_a_night_image_of_8_bits_is_not_called_dark(looks):
    assert looks(Image.fromarray(noise(high=40)).save) == (True, {})


def test_pages_and_frames(looks):
    frames = [Image.fromarray(noise(high=250)), Image.fromarray(noise(high=200))]
    found = looks(lambda path: frames[0].save(path, "TIFF", save_all=True, append_images=frames[1:]))
    assert found == (True, {"image_has_pages": 1, "image_name_misleads": 1})


def test_a_half_that_is_gray(looks):
    pixels = noise()
    pixels[30:] = 128
    assert looks(Image.fromarray(pixels).save) == (True, {"image_part_blank": 1})


def test_a_jpeg_whose_body_is_zeros_but_for_its_end(looks, tmp_path):
    Image.fromarray(noise()).save(tmp_path / "intact.jpg", quality=95)
    content = (tmp_path / "intact.jpg").read_bytes()
    content = content[: len(content) // 2] + bytes(len(content) // 2 - 2) + content[-2:]
    ok, found = looks(lambda path: path.write_bytes(content))
    assert ok and found == {"image_part_blank": 1, "image_name_misleads": 1}


def test_what_cannot_be_decoded_is_named_and_counted_once(looks, tmp_path):
    content = bytearray()
    Image.fromarray(noise()).save(tmp_path / "intact.png")
    content += (tmp_path / "intact.png").read_bytes()
    content[len(content) // 2] ^= 255
    assert looks(lambda path: path.write_bytes(content)) == (False, {"image_unreadable": 1})


def test_the_blank_share_counts_from_below_and_not_within_a_frame():
    pixels = torch.from_numpy(noise(40)).permute(2, 0, 1).clone()
    assert blank_bottom_fraction(pixels) == 0
    pixels[:, 30:] = 7
    assert blank_bottom_fraction(pixels) == 0.25
    pixels[:, :5] = 7
    assert blank_bottom_fraction(pixels) == 0
