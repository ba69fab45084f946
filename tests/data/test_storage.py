"""A storage that fails for a while is asked again; only what was read and cannot be decoded is damaged."""

import errno
import os
import threading
from pathlib import Path

import pytest

from brs_detr.data import coco, image_io, storage
from brs_detr.data.coco import CocoDetection
from brs_detr.data.image_io import ImageError, read_image, read_image_info
from brs_detr.data.loader import build_train_loader
from brs_detr.data.storage import ReadError, read_bytes
from brs_detr.exit_codes import ExitCode


@pytest.fixture()
def path(tmp_path, write_dataset):
    return write_dataset(tmp_path, sizes=[(40, 60)] * 3, boxes=[[(1, 2, 3, 20, 20)]] * 3)


def fail(monkeypatch, *numbers):
    """The next reads fail with these error numbers; returns how often files were read."""
    read, left, count = storage.read_file, list(numbers), [0]

    def failing(path, *limits):
        count[0] += 1
        if left:
            raise OSError(left[0], os.strerror(left.pop(0)), str(path))
        return read(path, *limits)

    monkeypatch.setattr(storage, "read_file", failing)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    return count


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_a_storage_that_fails_for_a_while_changes_nothing(path, monkeypatch, number):
    dataset = CocoDetection(path, path.parent / "images", train=True, retry_seconds=60)
    expected, _ = dataset[1]
    count = fail(monkeypatch, number, number, number)
    image, _ = dataset[1]
    assert count[0] == 4 and image.equal(expected)
    assert not dataset.met_while_reading() and "image_unreadable" not in dataset.report


@pytest.mark.parametrize("train", [True, False])
def test_a_file_that_went_away_for_good_is_neither_replaced_nor_left_out(path, train):
    dataset = CocoDetection(path, path.parent / "images", train=train, retry_seconds=0.2)
    file = Path(dataset.path(1))
    file.rename(file.with_suffix(".away"))
    with pytest.raises(ReadError, match=rf"{file.name}: the storage .*No such file or directory, retried for 0\.2 s"):
        dataset[1]
    file.with_suffix(".away").rename(file)
    dataset[1]  # it is remembered as nothing
    assert not dataset.met_while_reading() and not dataset.being_read()


def test_an_image_that_has_become_a_pipe_is_the_storages_fault_but_not_one_from_the_start(path):
    dataset = CocoDetection(path, path.parent / "images", train=True, retry_seconds=0.2)
    file = Path(dataset.path(1))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ReadError, match="named pipe, not a regular file, retried for"):
        dataset[1]
    with pytest.raises(ImageError, match="named pipe"):
        read_image_info(file, retry_seconds=60)
    with pytest.raises(ImageError, match="named pipe"):
        read_image(file)  # nobody has asked for retries


def test_a_file_that_comes_back_is_read(tmp_path):
    (tmp_path / "b").write_bytes(b"content")  # renamed, so that it appears with its content
    threading.Timer(0.3, (tmp_path / "b").rename, (tmp_path / "a",)).start()
    assert read_bytes(tmp_path / "a", None, "", retry_seconds=60) == b"content"


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_a_file_that_is_read_and_cannot_be_decoded_is_damaged(path, content):
    dataset = CocoDetection(path, path.parent / "images", train=True, retry_seconds=60)
    Path(dataset.path(1)).write_bytes(content)
    dataset[1]
    assert dataset.report["image_unreadable"] == 1


def test_what_is_no_file_by_its_name_is_not_tried_again(tmp_path):
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path, retry_seconds=60)


def test_a_header_is_tried_again_but_not_that_of_a_file_which_is_absent_from_the_start(path, monkeypatch):
    file, inspect = path.parent / "images" / "000.png", image_io._inspect
    errors = [OSError(errno.EIO, "Input/output error")]
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)

    def failing(path, limits):
        if errors:
            raise errors.pop()
        return inspect(path, limits)

    monkeypatch.setattr(image_io, "_inspect", failing)
    assert read_image_info(file, retry_seconds=60).stored_size == (40, 60)
    errors += [OSError(errno.EIO, "Input/output error")] * 99
    with pytest.raises(ReadError, match="Input/output error"):
        read_image_info(file, retry_seconds=0.0)
    errors.clear()
    with pytest.raises(ImageError, match="does not exist"):
        read_image_info(file.with_name("no.png"), retry_seconds=60)


def test_a_worker_hands_on_the_error_with_its_words_and_code(path):
    dataset = CocoDetection(path, path.parent / "images", train=True, retry_seconds=0.0)
    loader = build_train_loader(dataset, batch_size=2, workers=1)
    for index in range(3):
        Path(dataset.path(index)).unlink()
    with pytest.raises(ReadError) as error:
        next(iter(loader))
    loader.close()
    assert error.value.code == ExitCode.STORAGE
    assert str(error.value).startswith(str(path.parent)) and "Traceback" not in str(error.value)


def test_the_dataset_says_what_is_being_read(path, monkeypatch):
    dataset, seen = CocoDetection(path, path.parent / "images", train=False), []
    read = coco.read_image
    monkeypatch.setattr(coco, "read_image", lambda *a: (seen.append(dataset.being_read()), read(*a))[1])
    dataset[2]
    assert seen == [[dataset.path(2)]] and dataset.being_read() == []
