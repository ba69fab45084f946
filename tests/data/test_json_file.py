"""Whatever Unicode encoding or packing a json comes in, it is read; what is no dataset is refused in one sentence."""

import gzip
import json

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
