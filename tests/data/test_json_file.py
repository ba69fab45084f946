"""Whatever Unicode encoding or packing a json comes in, it is read; what is no dataset is refused in one sentence."""

import gzip
import json
import os

import pytest

from brs_detr.data.faults import DataError
from brs_detr.data.json_file import load_json

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
