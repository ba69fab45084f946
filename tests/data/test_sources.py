"""Words of the command line become images, videos, URLs and cameras, each with a name of its own."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from brs_detr.data import sources
from brs_detr.data.sources import expand, require_sources
from brs_detr.exit_codes import MissingPackageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """a/1.png, a/deep/2.png, b/1.png, b/clip.mp4, b/notes.txt; the current folder."""
    for name in ("a/1.png", "a/deep/2.png", "b/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "b" / "clip.mp4").write_bytes(b"")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(*words):
    return [(source.kind, source.name) for source in expand(words)[0]]


def test_a_folder_is_listed_and_its_files_are_named_within_it(folder):
    assert named("a") == [("image", "1.png"), ("image", "deep/2.png")]
    assert named(str(folder / "b")) == [("image", "1.png"), ("video", "clip.mp4")]
    assert [source.address for source in expand(["a"])[0]] == ["a/1.png", "a/deep/2.png"]


def test_files_are_named_without_their_folder_where_that_is_enough(folder):
    assert named("a/1.png") == [("image", "1.png")]
    assert named("b/clip.mp4", "a/deep/2.png") == [("video", "clip.mp4"), ("image", "2.png")]
    assert named("a/1.png", "b/1.png") == [("image", "a/1.png"), ("image", "b/1.png")]
    assert named("a", "b/1.png") == [("image", "a/1.png"), ("image", "a/deep/2.png"), ("image", "1.png")]


def test_patterns_match_files_in_order_and_a_file_named_twice_is_one(folder):
    assert named("a/*.png", "a/1.png", "./a/1.png") == [("image", "1.png")]
    assert named("**/*.png") == [("image", "a/1.png"), ("image", "a/deep/2.png"), ("image", "b/1.png")]
    assert named("b/*") == [("image", "1.png"), ("video", "clip.mp4"), ("image", "notes.txt")]


def test_a_file_whose_name_is_a_pattern_or_a_number_is_a_file(folder):
    Image.new("RGB", (8, 8)).save(folder / "x[1].png")
    Image.new("RGB", (8, 8)).save(folder / "7", "PNG")
    assert named("x[1].png", "7") == [("image", "x[1].png"), ("image", "7")]
    assert [source.kind for source in expand(["8"])[0]] == ["camera"]


def test_drawings_of_an_earlier_predict_are_no_images_unless_they_are_named(folder):
    drawings = folder / "a" / "out" / "detections"
    drawings.mkdir(parents=True)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(drawings / name)
    relative = drawings.relative_to(folder)

    def kept(*words):
        found, left_out = expand(words, relative)
        return [source.name for source in found], left_out

    assert kept("a") == kept(str(folder / "a")) == (["1.png", "deep/2.png"], 2)
    assert kept("a", "a/**/*.png") == (["1.png", "2.png"], 2)
    assert kept("a/out/*/*.png", "b") == (["b/1.png", "b/clip.mp4"], 2) and kept("a/out") == ([], 2)
    both = (["1.png", "2.png"], 0)
    assert kept(str(drawings)) == kept("a/out/detections/*.png") == kept(*map(str, sorted(drawings.iterdir()))) == both
    assert kept("a/out", str(relative))[1] == 0 and len(expand(["a"])[0]) == 4


def test_urls():
    [image], _ = expand(["https://user:secret@host/a/Sch%C3%B6n%2Fx.jpg?w=1"])
    assert (image.kind, image.name) == ("url", "https://host/a/Sch%C3%B6n%2Fx.jpg?w=1")
    assert image.stem == "Schön_x.jpg" and "secret" in image.address
    assert [
        (one.kind, one.stem) for one in expand(["HTTP://host/v.MP4", "rtsp://u:p@cam:554/live", "http://h/.."])[0]
    ] == [
        ("video", "v.MP4"),
        ("camera", "live"),
        ("url", "url"),
    ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nothing.jpg", "nothing.jpg: no such image, video or folder."),
        ("none/*.jpg", "none/*.jpg: no file matches this pattern."),
        ("http://[::bad/a.png", "http://[::bad/a.png: this URL names no server."),
        ("https:///a.png", "https:///a.png: this URL names no server."),
        ("http://user:secret@/a.png", "http:///a.png: this URL names no server."),
        ("ftp://user:secret@host/a.jpg", "ftp://host/a.jpg: no such image, video or folder."),
        ("ftp://host/a.jpg", "ftp://host/a.jpg: no such image, video or folder."),
    ],
)
def test_what_names_nothing_is_refused(folder, word, said):
    with pytest.raises(FileNotFoundError) as error:
        require_sources(["a", word])
    assert str(error.value) == said


def test_a_folder_without_images_is_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no image or video in this folder\."):
        expand(["empty"])


@pytest.mark.parametrize("word", ["b/clip.mp4", "0", "rtsp://user:secret@host/live"])
def test_without_pyav_the_command_that_installs_it_is_named(folder, monkeypatch, word):
    monkeypatch.setattr(sources, "has_pyav", lambda: False)
    with pytest.raises(MissingPackageError, match="pip install av") as error:
        require_sources([word])
    assert "secret" not in str(error.value)
    assert expand(["b"])[0][1].kind == "video"  # among images it is passed over when it is read


def test_words_are_checked_without_torch():
    code = "import sys, brs_detr.data.sources as s; s.require_sources(['.']); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
