"""Frames of videos, what is no video, and videos that are written."""

import os
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from brs_detr.data.config import Limits
from brs_detr.data.sources import Source
from brs_detr.data.video import VideoError, VideoWriter, _pixels, read_video

av = pytest.importorskip("av", reason="PyAV is not installed")
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def video(path, frames=30, size=(64, 48), rate=Fraction(25, 2)):
    """Frames of three colors in turn."""
    writer = VideoWriter(path, rate)
    for number in range(frames):
        writer.write(Image.new("RGB", size, COLORS[number % 3]))
    writer.close()
    return source(path)


def source(path):
    return Source("video", str(path), path.name, path.name)


def test_what_is_written_is_read_frame_by_frame_with_its_time(tmp_path):
    clip = video(tmp_path / "clip.mp4")
    assert os.listdir(tmp_path) == ["clip.mp4"]
    frames = list(read_video(clip, Limits()))
    assert [frame.index for frame in frames] == list(range(30)) and frames[0].rate == Fraction(25, 2)
    assert [frame.time for frame in frames] == pytest.approx([number / 12.5 for number in range(30)], abs=1e-3)
    for frame in frames:
        assert frame.pixels.shape == (3, 48, 64) and frame.pixels.dtype == torch.uint8
        mean = frame.pixels.float().mean((1, 2))
        assert mean[frame.index % 3] > 200 and mean.sum() < 320


def test_max_frames_ends_a_video(tmp_path):
    assert len(list(read_video(video(tmp_path / "clip.mp4"), Limits(), max_frames=7))) == 7


def test_sides_are_made_even_and_names_may_be_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("ü" * 125 + ".mp4")
    (frame, *_) = read_video(video(path, frames=2, size=(63, 49)), Limits())
    assert frame.pixels.shape == (3, 48, 62)


def test_a_video_that_no_encoder_takes_leaves_nothing(tmp_path):
    writer = VideoWriter(tmp_path / "wide.mp4", Fraction(5))
    with pytest.raises(VideoError, match=r"wide\.mp4: this video cannot be written: .* Add --no-images\."):
        writer.write(Image.new("RGB", (70_000, 64)))
    writer.close()
    assert not os.listdir(tmp_path)


def test_a_video_that_breaks_off_gives_the_frames_before(tmp_path):
    whole = tmp_path / "whole.mkv"
    with av.open(str(whole), "w") as container:  # Matroska can be read without its end
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(40):
            noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    count = 0
    try:
        for _ in read_video(source(cut), Limits()):
            count += 1
    except VideoError as error:
        assert f"cut.mkv: it breaks off after {count} frames" in str(error)
    assert 10 < count < 40


def without_frames(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def playlist(path):
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{path.parent}/other.mp4\n#EXT-X-ENDLIST\n")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "this video cannot be read"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html></html>" * 90), "this video cannot be read"),
        (lambda path: video(path.with_name("x.mp4")) and path.write_bytes(b"\0" * 4096), "this video cannot be read"),
        (without_frames, "it has no video stream"),
        (playlist, "this video cannot be read"),
        (lambda path: os.mkfifo(path), "it is a named pipe"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, make, said):
    video(tmp_path / "other.mp4")  # that the playlist leads to
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(VideoError, match=r"^bad\.mp4: ") as error:
        list(read_video(source(path), Limits()))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_frames_above_the_limit_are_refused(tmp_path):
    clip = video(tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match=r"3,072 pixels, more than data\.max_image_pixels=3071"):
        list(read_video(clip, Limits(max_image_pixels=3071)))


def test_a_camera_that_is_absent_is_named():
    with pytest.raises(VideoError, match="7654: this camera cannot be read: No such file"):
        list(read_video(Source("camera", "7654", "7654", "camera_7654"), Limits()))


def test_a_video_that_players_turn_is_turned(tmp_path):
    """Its left half is red; as a phone that is held upright, the file says: turn by 90 degrees clockwise."""
    path = tmp_path / "clip.mp4"
    writer = VideoWriter(path, Fraction(10))
    image = Image.new("RGB", (64, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 32, 32))
    writer.write(image)
    writer.close()
    plain, turned = (0x10000, 0, 0, 0, 0x10000), (0, 0x10000, 0, -0x10000, 0)
    content = path.read_bytes()
    start = content.index(struct.pack(">5i", *plain), content.index(b"tkhd"))
    path.write_bytes(content[:start] + struct.pack(">5i", *turned) + content[start + 20 :])
    (frame,) = read_video(source(path), Limits())
    assert frame.pixels.shape == (3, 64, 32)
    assert frame.pixels[0, :28].float().mean() > 200 > 50 > frame.pixels[0, 36:].float().mean()


class Turned:
    """A frame whose video says by how much players turn it."""

    def __init__(self, rotation):
        self.rotation = rotation

    def to_ndarray(self, format):
        return np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2)


def test_frames_are_turned_upright():
    """PyAV states the rotation counter-clockwise: that of a phone held upright is -90."""
    assert _pixels(Turned(0))[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert _pixels(Turned(-90))[0].tolist() == [[3, 0], [4, 1], [5, 2]]
    assert _pixels(Turned(180))[0].tolist() == [[5, 4, 3], [2, 1, 0]]
