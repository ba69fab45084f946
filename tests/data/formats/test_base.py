"""What the converters share: file search, text decoding, box cleaning, held-out splits."""

import os
from pathlib import Path

import pytest

from brs_detr.data.formats.base import (
    ImportedDataset,
    Notes,
    Sample,
    clean_boxes,
    decode,
    find_files,
    hold_out,
    read_lines,
    split_named,
    to_coco,
    validate,
)
from brs_detr.data.formats.coco import split_coco
from brs_detr.data.issues import DataError

CAT = {"category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}


def samples(*names, objects=(CAT,)):
    return [Sample(Path("/data", name), (40, 80), list(objects)) for name in names]


def test_files_are_found_through_links_once_and_without_hidden_ones(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.jpeg", ".hidden.jpg", ".checkpoints/d.jpg", "__MACOSX/e.jpg", "f.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "g.jpg").write_bytes(b"")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    found = find_files(tmp_path / "in", (".jpg", ".jpeg", ".png"), Notes())
    assert [str(path.relative_to(tmp_path / "in")) for path in found] == [
        "a.png",
        "b.JPG",
        "linked/g.jpg",
        "sub/c.jpeg",
    ]


def test_a_file_name_that_is_no_text_is_noted(tmp_path):
    name = os.fsencode(tmp_path) + b"/b\xe4d.jpg"
    try:
        with open(name, "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    notes = Notes()
    assert find_files(tmp_path, (".jpg",), notes) == [] and "not UTF-8" in notes.lines()[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_text_of_any_usual_encoding_is_read(encoding):
    assert decode("Käfer".encode(encoding)) == "Käfer"


def test_a_declared_encoding_is_believed_unless_it_is_impossible():
    assert decode("猫".encode("gbk"), "gbk") == "猫"  # these two bytes are UTF-8 for another letter
    assert decode(b"cats", "utf-16") == "cats" and decode(b"cats", "no-such-code") == "cats"


def test_line_ends_of_all_systems(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b" a \r\n\r\nb\rc\n")
    assert read_lines(path) == ["a", "", "b", "c", ""]


@pytest.mark.parametrize(
    ("folder", "split"),
    [("train", "train"), ("Train2017", "train"), ("valid", "val"), ("validation", "val"), ("val_images", "val")]
    + [("testing", "test"), ("test-set", "test"), ("trains", None), ("value", None), ("trainval", None), ("x", None)],
)
def test_folders_that_name_a_split(folder, split):
    assert split_named(folder) == split


def cleaned(*boxes, **extra):
    notes = Notes()
    objects = [(str(i), {"category_id": 1, "bbox": list(box), "iscrowd": 0, **extra}) for i, box in enumerate(boxes)]
    return clean_boxes(objects, (40, 80), notes), notes


def test_overshoot_of_rounding_is_taken_back_and_real_overhang_kept():
    (rounding, overhang), notes = cleaned((-0.0001, 0, 80.0003, 40.002), (70, 30, 20, 20))
    assert rounding["bbox"] == [0, 0, 80, 40] and overhang["bbox"] == [70, 30, 20, 20] and not notes.places


@pytest.mark.parametrize(
    ("box", "reason"),
    [((float("nan"), 0, 1, 1), "finite"), ((0, 0, float("inf"), 1), "finite"), ((5, 5, 0, 4), "no width")]
    + [((5, 5, -3, 4), "no width"), ((80, 5, 3, 4), "outside"), ((-9, 5, 3, 4), "outside")],
)
def test_what_is_no_box_is_left_out_with_its_reason(box, reason):
    kept, notes = cleaned(box)
    assert kept == [] and reason in notes.lines()[0]


def test_repeats_are_left_out_but_not_the_same_box_of_another_outline():
    kept, notes = cleaned((1, 1, 5, 5), (1, 1, 5, 5))
    assert len(kept) == 1 and notes.lines() == ["1 x boxes left out that repeat another of the image: 1"]
    outlines = [[1, 1, 6, 1, 6, 6], [1, 1, 6, 6, 1, 6]]
    objects = [("", {"category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": [outline]}) for outline in outlines]
    assert len(clean_boxes(objects, (40, 80), Notes())) == 2


def test_hold_out_is_a_partition_that_does_not_depend_on_order_or_place():
    names = [f"{i}.jpg" for i in range(20)]
    first = ImportedDataset({1: "cat"}, {"train": samples(*names)})
    hold_out(first, 0.25)
    assert [len(first.splits[split]) for split in ("train", "val")] == [15, 5]
    second = ImportedDataset(
        {1: "cat"}, {"train": [s._replace(path=Path("/else", s.path.name)) for s in samples(*names[::-1])]}
    )
    hold_out(second, 0.25)
    stems = [{sample.path.name for sample in imported.splits["val"]} for imported in (first, second)]
    assert stems[0] == stems[1] and not stems[0] & {sample.path.name for sample in first.splits["train"]}


def test_images_whose_names_repeat_are_held_out_alike_in_every_place_and_format():
    names = [f"images/cam{i % 4}/{i // 4}.jpg" for i in range(20)]

    def held(place):
        moved = {
            split: [s._replace(path=Path(place, s.path.relative_to("/data"))) for s in group]
            for split, group in (("train", samples(*names)), ("test", samples("test/0.jpg")))
        }
        imported = ImportedDataset({1: "cat"}, moved)
        as_json = split_coco(to_coco(imported)[0]["train"], 0.25)["val"]["images"]
        hold_out(imported, 0.25)
        return {str(s.path.relative_to(place)) for s in imported.splits["val"]}, {i["file_name"] for i in as_json}

    assert len({frozenset(choice) for place in ("/data", "/mnt/other/data") for choice in held(place)}) == 1


def test_images_of_unique_names_are_held_out_as_ever():
    imported = ImportedDataset({1: "cat"}, {"train": samples(*(f"cam{i % 4}/{i}.jpg" for i in range(20)))})
    hold_out(imported, 0.25)
    assert sorted(int(sample.path.stem) for sample in imported.splits["val"]) == [8, 9, 10, 13, 17]


@pytest.mark.parametrize(("fraction", "held"), [(0.001, 1), (0.999, 2)])
def test_hold_out_leaves_something_on_both_sides(fraction, held):
    imported = ImportedDataset({1: "cat"}, {"train": samples("a.jpg", "b.jpg", "c.jpg")})
    hold_out(imported, fraction)
    assert len(imported.splits["val"]) == held


@pytest.mark.parametrize(
    ("splits", "fraction"),
    [({"train": 3, "val": 1}, 0.5), ({"train": 3}, 0), ({"train": 3}, 1), ({"train": 1}, 0.5), ({"test": 3}, 0.5)],
)
def test_hold_out_is_refused_where_it_means_nothing(splits, fraction):
    groups = {name: samples(*(f"{i}.jpg" for i in range(count))) for name, count in splits.items()}
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out(ImportedDataset({1: "cat"}, groups), fraction)


def test_coco_ids_are_those_of_images_and_names_relative_to_what_they_share():
    splits = {"train": samples("b/2.jpg", "a/1.jpg"), "val": samples("b/2.jpg")}
    datasets, base = to_coco(ImportedDataset({7: "cat", 1: "dog"}, splits))
    assert base == "/data"
    assert [(i["id"], i["file_name"]) for i in datasets["train"]["images"]] == [(2, "b/2.jpg"), (1, "a/1.jpg")]
    assert datasets["val"]["images"][0]["id"] == 2 == datasets["val"]["annotations"][0]["image_id"]
    assert [a["id"] for a in datasets["train"]["annotations"]] == [1, 2]
    assert [c["id"] for c in datasets["train"]["categories"]] == [1, 7]


def test_inspection_names_leaks_similar_classes_and_empty_splits():
    imported = ImportedDataset({1: "cat", 2: "Cat"}, {"train": samples("a.jpg"), "val": samples("a.jpg"), "test": []})
    validate(imported, "here")
    assert set(imported.splits) == {"train", "val"}
    text = "\n".join(imported.notes.lines())
    assert "in train and in val: /data/a.jpg" in text and "cat and Cat" in text and "without an image: test" in text
    with pytest.raises(DataError, match="here: there is no object"):
        validate(ImportedDataset({1: "cat"}, {"train": samples("a.jpg", objects=())}), "here")
