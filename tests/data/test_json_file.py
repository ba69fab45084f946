"""Whatever Unicode encoding or packing a json comes in, it is read; what is no dataset is refused in one sentence.

Numbers in quotes are numbers, and nothing else becomes one.

The box around a mask equals that of pycocotools, and malformed masks give none.
"""

import gzip
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle

from brs_detr.data.issues import DataError
from brs_detr.data.json_file import as_int, coerce_numbers, is_number, load_json, mask_box
from brs_detr.ops.rle import pack_segmentation

DATA = {
    "images": [{"id": 1, "file_name": "Fläche.png"}],
    "annotations": [{"id": 1, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3, 4, 5, 6]]}],
    "categories": [],
}
TEXT = json.dumps(DATA, ensure_ascii=False)


def write(tmp_path, content):
    path = tmp_path / "set.json"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_unicode_encoding_packed_or_not(tmp_path, encoding, packed):
    content = TEXT.encode(encoding)
    data = load_json(write(tmp_path, gzip.compress(content) if packed else content))
    assert data["images"] == DATA["images"] and data["annotations"] == [{"id": 1, "bbox": [1, 2, 3, 4]}]


REFUSED = {
    "it is empty": b"",
    "it begins with '<html>": b"<html>404</html>",
    "it begins with 'version https://git-lfs": b"version https://git-lfs.github.com/spec/v1\n",
    "line 1 column": TEXT[:-20].encode(),
    "Extra data": TEXT.encode() + b"}",
    "not a JSON file in UTF-8": TEXT.encode("latin-1"),
    "recursion": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"images": [' + b"9" * 5000 + b"]}",
    "cannot be read": gzip.compress(TEXT.encode() * 50)[:100],
    "this is a list": b"[]",
    "it is 42": b"42",
    r"no list `images` \(it has data\)": json.dumps({"data": DATA}).encode(),
    "its `categories` is an object": json.dumps({**DATA, "categories": {"1": "cell"}}).encode(),
    "its `annotations` is null": json.dumps({**DATA, "annotations": None}).encode(),
    "key `annotations` twice": TEXT[:-1].encode() + b', "annotations": []}',
    "key `bbox` twice": TEXT.replace('"bbox"', '"bbox": [0, 0, 1, 1], "bbox"').encode(),
    r"\(?key `annotations` twice": TEXT[:-1].encode() + b', "annot\\u0061tions": []}',
    "begins with zeros": bytes(1000),
    "more than 100 times as many": gzip.compress(b'{"images": [' + b"0," * 60_000_000),
    "its list `images` is empty": json.dumps({**DATA, "images": []}).encode(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_dataset_is_refused_with_the_reason(tmp_path, reason):
    path = write(tmp_path, REFUSED[reason])
    with pytest.raises(DataError, match=reason) as error:
        load_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_folder_and_an_absent_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_json(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load_json(tmp_path / "absent.json")


@pytest.mark.parametrize("bbox", ["absent", None, [], [0, 0, 0, 0]])
def test_an_annotation_without_a_box_gets_that_of_its_mask(tmp_path, bbox):
    annotation = {"bbox": bbox, "segmentation": [[1, 2, 9, 2, 9, 7]]}
    if bbox == "absent":
        del annotation["bbox"]
    content = json.dumps({**DATA, "annotations": [annotation]}).encode()
    assert load_json(write(tmp_path, content))["annotations"] == [{"bbox": [1, 2, 8, 5], "box_from_mask": True}]


def test_a_key_that_is_repeated_with_its_value_is_fine(tmp_path):
    text = json.dumps(DATA)[:-1] + ', "categories": []}'
    assert load_json(write(tmp_path, text.encode()))["categories"] == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_json_above_the_limit_is_refused_with_the_setting(tmp_path, packed):
    content = json.dumps({**DATA, "info": "x" * 10_000}).encode()
    path = write(tmp_path, gzip.compress(content) if packed else content)
    load_json(path, len(content))
    with pytest.raises(DataError, match=rf"more than data\.max_json_bytes={len(content) - 1}; raise the setting"):
        load_json(path, len(content) - 1)


def test_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"x\.json: .*a named pipe, not a regular file"):
        load_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), (3.0, 3), (-7, -7), (2**40, 2**40), (3.5, None), (True, None), ("3", None), (2**70, None), (None, None)],
)
def test_ids_are_integers(value, expected):
    assert as_int(value) == expected


def test_neither_bools_nor_texts_are_numbers():
    assert is_number(1) and is_number(1.5) and not is_number(True) and not is_number("1")


def test_unquoting_finds_numbers_in_texts_and_lists():
    entry = {"id": "17", "bbox": ["1", "2.5", 3, "-4"], "iscrowd": "False", "name": "12", "area": "many"}
    assert coerce_numbers(entry, ("id", "bbox", "iscrowd", "area", "absent"))
    assert entry == {"id": 17, "bbox": [1, 2.5, 3, -4], "iscrowd": 0, "name": "12", "area": "many"}


def test_what_is_fine_stays_as_it_is():
    entry = {"id": 17, "area": math.nan, "bbox": [1, 2], "category_id": "cat", "ignore": "9" * 5000}
    assert not coerce_numbers(entry, ("id", "area", "bbox", "category_id"))
    coerce_numbers(entry, ("ignore",))  # too long for an int: no error


def runs_of(mask):
    """Uncompressed run lengths down the columns, as COCO writes crowds."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int)])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@settings(max_examples=200, deadline=None)
def test_both_kinds_of_run_lengths(mask):
    coded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    expected = rle.toBbox(coded).tolist() if mask.any() else None
    size = list(mask.shape)
    assert mask_box({"size": size, "counts": coded["counts"].decode()}) == expected
    assert mask_box({"size": size, "counts": runs_of(mask)}) == expected


@given(st.lists(st.integers(0, 5000), min_size=3, max_size=30))
@settings(max_examples=100, deadline=None)
def test_long_runs_in_compressed_text(runs):
    runs = [runs[0], *(run + 1 for run in runs[1:])]
    height = sum(runs)
    coded = rle.frPyObjects({"size": [height, 1], "counts": runs}, height, 1)
    assert mask_box({"size": [height, 1], "counts": coded["counts"].decode()}) == rle.toBbox(coded).tolist()


@pytest.mark.parametrize(
    "polygons",
    [
        [[1, 2, 9, 2, 9, 7], [3, 0, 4, 0, 4, 1]],
        [1, 2, 9, 0, 9, 7],
        [[1, 2], [9, 0], [9, 7]],
        [[[1, 2], [9, 0], [9, 7]]],
    ],
)
def test_polygons_however_they_are_nested(polygons):
    assert mask_box(polygons) == [1, 0, 8, 7]


@pytest.mark.parametrize(
    "mask",
    [
        [],
        [[1, 2]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, float("nan")]],
        "none",
        {"size": [4, 4]},
        {"size": [0, 0], "counts": [1, 2]},
        {"size": [4, 4], "counts": [20, 30]},
        {"size": [4, 4], "counts": [-3, 5]},
        {"size": [4, 4], "counts": "é"},
        {"size": [4, 4], "counts": "2O24"},
        {"size": [4, 4], "counts": "o" * 1000},
        {"size": [2**32, 0], "counts": [0, 2]},
        {"size": [4, 4], "counts": [16]},
        {"size": "4x4", "counts": [1]},
    ],
)
def test_what_is_no_mask_has_no_box(mask):
    assert mask_box(mask) is None


def test_masks_are_dropped_packed_or_kept(tmp_path):
    polygon, damaged = [[1, 2, 9, 2, 9, 7]], {"size": [4, 4], "counts": "o"}
    annotations = [{"bbox": [1, 2, 8, 5], "segmentation": s} for s in (polygon, damaged, [])]
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"images": [{}], "annotations": annotations, "categories": []}))
    entries = {masks: load_json(path, masks=masks)["annotations"] for masks in ("drop", "pack", "keep")}
    assert entries["drop"] == [{"bbox": [1, 2, 8, 5]}] * 3
    assert [e.get("segmentation") for e in entries["pack"]] == [pack_segmentation(polygon), b"", None]
    assert [e.get("segmentation") for e in entries["keep"]] == [polygon, damaged, None]


def test_a_json_without_annotations_is_one_to_predict_and_not_to_train_on(tmp_path):
    """COCO's test images come so."""
    path = tmp_path / "image_info.json"
    path.write_text('{"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}]}')
    with pytest.raises(DataError, match="it has no list `annotations`"):
        load_json(path)
    assert load_json(path, annotated=False)["annotations"] == []
    path.write_text('{"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}], "annotations": {}}')
    with pytest.raises(DataError, match="its `annotations` is an object, not a list"):
        load_json(path, annotated=False)
