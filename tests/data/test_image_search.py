"""Images are found under the names that labeling tools give them, and never confused with one another."""

import os
import unicodedata
import urllib.parse

import numpy as np
import pytest

from brs_detr.data.annotations import Images
from brs_detr.data.image_search import guess_folder, leads_outside, resolve_image_paths, usual_folder
from brs_detr.data.issues import DataError, IssueLog


def make(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"image")


def find(folder, *names):
    """Names as they are after the search (None where nothing was found), and the log."""
    sizes = np.zeros((len(names), 2), np.int32)
    images, log = Images(np.arange(len(names)), list(names), sizes, sizes), IssueLog()
    found = resolve_image_paths(images, folder, log)
    return [name if there else None for name, there in zip(images.names, found, strict=True)], log


def test_names_that_are_right_are_left_alone(tmp_path):
    make(tmp_path, "a.jpg", "sub/a.jpg", "sub dir/ü.jpg")
    names, log = find(tmp_path, "a.jpg", "sub/a.jpg", "sub dir/ü.jpg", "./a.jpg", str(tmp_path / "a.jpg"))
    assert names == ["a.jpg", "sub/a.jpg", "sub dir/ü.jpg", "./a.jpg", str(tmp_path / "a.jpg")] and not log.counts


@pytest.mark.parametrize(
    "name",
    [
        "Sub\\Zellé 1.jpg",
        "sub/ZELLÉ 1.JPG",
        urllib.parse.quote("sub/zellé 1.jpg"),
        unicodedata.normalize("NFD", "sub/zellé 1.jpg"),
        "sub/zellé 1.jpg ",
    ],
)
def test_the_same_path_written_otherwise_is_found_also_beside_right_ones(tmp_path, name):
    make(tmp_path, "b.jpg", "sub/zellé 1.jpg")
    names, log = find(tmp_path, "b.jpg", name)
    assert names == ["b.jpg", "sub/zellé 1.jpg"] and log.counts == {"image_elsewhere": 1}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("../../upload/3/a.jpg", "a.jpg"),
        ("C:\\Users\\me\\a.jpg", "a.jpg"),
        ("/home/me/data/day/a.jpg", "day/a.jpg"),
        ("https://host/bucket/a.jpg?token=1", "bucket/a.jpg"),
        ("/data/local-files/?d=set/day/a.jpg", "day/a.jpg"),
        ("a.jpg", "day/a.jpg"),
        ("day/a.png", "day/a.jpg"),
        ("a", "a.jpg"),
    ],
)
def test_folders_of_another_machine_are_seen_through_where_no_name_is_right(tmp_path, name, file):
    make(tmp_path, file, "day/b.jpg", "a.txt")
    assert find(tmp_path, name)[0] == [file]


def test_a_missing_image_among_right_ones_is_not_replaced_by_one_from_another_folder(tmp_path):
    make(tmp_path, "b.jpg", "masks/a.png", "val/a.jpg")
    names, log = find(tmp_path, "a.jpg", "b.jpg")
    assert names == [None, "b.jpg"] and log.counts == {"image_missing": 1}


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.jpg"], ["one/a.jpg", "two/a.jpg"]),  # whose image is it?
        (["one/a.jpg", "two/a.jpg"], ["a.jpg"]),  # which one is meant?
        (["one/a.jpg"], ["two/a.jpg"]),  # folders that contradict each other
        (["a.jpg", "a.png"], ["x/a"]),
    ],
)
def test_what_is_ambiguous_is_missing(tmp_path, files, names):
    make(tmp_path, *files)
    assert find(tmp_path, *names)[0] == [None] * len(names)


def test_one_image_is_not_given_to_two_names(tmp_path):
    make(tmp_path, "a.jpg")
    assert find(tmp_path, "a.jpg", "A.jpg")[0] == ["a.jpg", None]


def test_an_entry_that_is_listed_twice_is_found_twice(tmp_path):
    make(tmp_path, "a.jpg")
    assert find(tmp_path, "x/a.jpg", "x/a.jpg")[0] == ["a.jpg", "a.jpg"]


def test_only_files_are_images(tmp_path):
    make(tmp_path, "real.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "link.jpg").symlink_to("real.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = ["folder.jpg", "dangling.jpg", "loop.jpg", "pipe.jpg", "nul\0.jpg", "x" * 5000 + "/a.jpg", "link.jpg"]
    assert find(tmp_path, *names)[0] == [None] * 6 + ["link.jpg"]


def test_names_that_are_no_unicode(tmp_path):
    name = os.fsdecode(b"b\xe4r.jpg")
    make(tmp_path, name)
    assert find(tmp_path, name)[0] == [name]


def test_the_folder_that_holds_most_of_the_names_is_named(tmp_path):
    make(tmp_path, "train2017/a.jpg", "train2017/b.jpg", "val2017/a.jpg")
    assert guess_folder(["x/a.png", "b.jpg"], tmp_path) == (tmp_path / "train2017", 2)
    assert guess_folder(["c.jpg"], tmp_path) is None


def test_usual_places(tmp_path):
    make(tmp_path, "images/day/a.jpg", "images/night/b.jpg", "train/c.jpg", "annotations/instances_train.json")
    json_path = tmp_path / "annotations" / "instances_train.json"
    assert usual_folder(json_path, ["c.jpg"]) == tmp_path / "train"
    assert usual_folder(json_path, ["upload/a.jpg", "upload/b.jpg"]) == tmp_path / "images"


@pytest.mark.parametrize(
    ("json", "folder"),
    [
        ("annotations/{}.json", "{}/images"),
        ("{}_annotations.json", "{}"),
        ("annotations/instances_{}2017.json", "images/{}"),
        ("{}/labels.json", "{}/data"),
    ],
)
def test_of_two_splits_numbered_alike_each_has_its_own_images(tmp_path, json, folder):
    for split, count in (("train", 6), ("val", 4)):
        make(tmp_path, *(f"{folder.format(split)}/{i}.jpg" for i in range(count)), json.format(split))
    for split, count in (("train", 6), ("val", 4)):
        found = usual_folder(tmp_path / json.format(split), [f"{i}.jpg" for i in range(count)])
        assert found == tmp_path / folder.format(split)


@pytest.mark.parametrize(
    ("masks", "folder"), [("mask/val/a.png", "raw/val"), ("mask/val/a.jpg", None), ("images/val/a.jpg", "images/val")]
)
def test_of_two_folders_of_a_split_that_of_the_images_is_taken_or_none(tmp_path, masks, folder):
    make(tmp_path, "annotations/val.json", "raw/val/a.jpg", masks)
    json_path = tmp_path / "annotations" / "val.json"
    if folder is not None:
        assert usual_folder(json_path, ["a.jpg"]) == tmp_path / folder
        return
    with pytest.raises(DataError, match=r"could be in any of 2 folders: mask/val, raw/val. Say so."):
        usual_folder(json_path, ["a.jpg"], "Say so.")


def test_images_of_the_dataset_next_door_are_not_taken(tmp_path):
    make(tmp_path, "ours/set.json", "theirs/images/0001.jpg")
    with pytest.raises(DataError, match="Give the image folder with --images"):
        usual_folder(tmp_path / "ours" / "set.json", ["0001.jpg"])


OUTSIDE = ["../a.jpg", "sub/../../a.jpg", "/etc/hostname", "./.././a.jpg", "../images2/a.jpg"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_folder_is_not_followed(tmp_path, name):
    make(tmp_path, "a.jpg", "images2/a.jpg", "images/b.jpg", "images/sub/c.jpg")
    names, log = find(tmp_path / "images", name, "b.jpg")
    assert names == [None, "b.jpg"] and log.counts == {"image_outside": 1}


def test_a_name_may_lead_out_of_the_folder_if_allowed(tmp_path):
    make(tmp_path, "a.jpg", "images/b.jpg")
    names = ["../a.jpg", str(tmp_path / "a.jpg")]
    images, log = Images(np.arange(2), names, np.zeros((2, 2)), np.zeros((2, 2))), IssueLog()
    assert resolve_image_paths(images, tmp_path / "images", log, allow_outside=True).all() and not log.counts


def test_a_way_out_and_back_and_links_within_are_no_way_out(tmp_path):
    make(tmp_path, "elsewhere/a.jpg", "images/b..c.jpg", "images/sub/b.jpg")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    names = ["sub/../b..c.jpg", "../images/sub/b.jpg", "linked/a.jpg"]
    assert find(tmp_path / "images", *names)[0] == names
    assert not leads_outside("a/b", "/") and not leads_outside("/etc/x", "/")


def test_the_usual_folder_is_not_found_by_a_name_that_leads_out(tmp_path):
    make(tmp_path, "a.jpg")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DataError, match="no image was found in the usual folders"):
        usual_folder(tmp_path / "annotations" / "x.json", ["/etc/hostname"])
