"""Only regular files of a bounded size are read, and no name can do more than be printed."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from brs_detr.checkpoints.architecture import name_classes
from brs_detr.config import load_config
from brs_detr.config_io import ConfigError
from brs_detr.data.formats.base import read_lines
from brs_detr.data.json_file import load_json
from brs_detr.engine.checkpoint import load_weights
from brs_detr.exit_codes import CheckpointError
from brs_detr.models.backbones.weights_io import read_official, read_weights
from brs_detr.user_files import UserFileError, open_regular, printable, read_file, read_start, unpack_gzip

ROOT = Path(__file__).resolve().parents[1]


def other_kinds(folder):
    """A pipe, a link to a pipe, a link to an endless device, a socket."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket may only have a hundred letters
    try:
        listener.bind("socket")
    finally:
        os.chdir(here)
        listener.close()
    return {"pipe": "a named pipe", "link": "a named pipe", "endless": "a device"}


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    for name, kind in other_kinds(tmp_path).items():
        for read in (open_regular, read_file, lambda path: read_start(path, 3)):
            with pytest.raises(UserFileError, match=f"it is {kind}, not a regular file"):
                read(tmp_path / name)
    with pytest.raises(OSError):
        read_file(tmp_path / "socket")
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_file(tmp_path / "b", 3) == b"abc" and read_start(tmp_path / "b", 2) == b"ab"


def test_a_file_above_the_limit_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(8 * 2**30)
    with pytest.raises(UserFileError, match=r"8,589,934,592 bytes, more than data\.x=1000; raise the setting"):
        read_file(tmp_path / "holes", 1000, "data.x")
    with pytest.raises(UserFileError, match="more than 1,000 bytes"):
        read_file(tmp_path / "holes", 1000)


def test_a_file_that_does_not_end_where_it_says_is_refused():
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("there is no /proc")
    with pytest.raises(UserFileError, match="grew"):
        read_file("/proc/self/maps")


def test_gzip_is_unpacked_up_to_a_limit():
    content = os.urandom(5000)
    assert unpack_gzip(gzip.compress(content) + gzip.compress(b"more"), 5004) == content + b"more"
    with pytest.raises(UserFileError, match=r"5,000 bytes unpacked, more than data\.x=4999"):
        unpack_gzip(gzip.compress(content), 4999, "data.x")
    with pytest.raises(EOFError):
        unpack_gzip(gzip.compress(content)[:100])


def test_a_bomb_of_gzip_stops_at_its_ratio():
    bomb = gzip.compress(bytes(10**6)) * 200  # of many members, too
    with pytest.raises(UserFileError, match="more than 100 times as many; unpack it with gunzip"):
        unpack_gzip(bomb)


def test_names_are_printed_as_they_are_or_as_codes():
    assert printable("Straße 日本.jpg") == "Straße 日本.jpg"
    assert printable(Path("a\x1b[31m\n\u202e\udcfc.jpg")) == r"a\x1b[31m\x0a\u202e\xfc.jpg"


def packed(path):
    """A file of torch.save with its tensors compressed, as torch.load unpacks them too."""
    stream = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(100_000)}}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    return path


def test_compressed_tensors_are_refused(tmp_path):
    path = packed(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="compressed"):
        read_weights(path)
    with pytest.raises(CheckpointError, match="compressed"):
        read_official(path)


# what each reader says of a named pipe
READERS = {
    "recipe": (load_config, ConfigError),
    "lines": (read_lines, ValueError),
    "dataset": (load_json, ValueError),
    "classes": (lambda path: name_classes(3, {}, path, "x"), CheckpointError),
    "weights": (load_weights, CheckpointError),
    "official": (read_official, CheckpointError),
    "backbone": (read_weights, FileNotFoundError),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_a_pipe(tmp_path, reader):
    read, error = READERS[reader]
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(error, match=r"x\.yaml"):
        read(tmp_path / "x.yaml")


def test_a_key_with_two_values_is_refused_wherever_a_dataset_is_read(tmp_path):
    (tmp_path / "x.json").write_text(
        '{"images": [], "categories": [{"id": 1, "name": "a", "id": 2}], "annotations": []}'
    )
    with pytest.raises(ValueError, match=r"x\.json: one of its objects has the key `id` twice"):
        load_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="key `id` twice"):
        name_classes(1, {}, tmp_path / "x.json", "x")


def test_damaged_notes_of_a_weights_file_are_one_sentence(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    for notes in ("[" * 100_000, "{}", json.dumps({"classes": 3, "category_ids": [1]}), "not json"):
        save_file({"a": torch.zeros(1)}, path, metadata={"brs_detr": notes})
        with pytest.raises(CheckpointError, match=r"metadata entry brs_detr|class names and category ids"):
            load_weights(path)


def test_an_error_is_one_line_whatever_the_name_in_it():
    command = [sys.executable, "-m", "brs_detr", "info", b"no\x1b[31m\nwhere\xfc.yaml"]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONUTF8": "1"}, capture_output=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(rb"error: no\x1b[31m\x0awhere\xfc.yaml: ") and ended.stderr.count(b"\n") == 1
