"""Images of every kind come out as the RGB a person sees, and damaged ones never come out at all."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from brs_detr.data import image_io
from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError, is_image_name, read_image, read_image_info


def ramp(h=12, w=20):
    return np.linspace(0, 255, h * w).round().astype(np.uint8).reshape(h, w)


def save(tmp_path, array, name="x.png", mode=None, **options):
    image = Image.fromarray(array)
    image = image.convert(mode) if mode else image
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_gray_has_three_equal_channels(tmp_path):
    pixels = read_image(save(tmp_path, ramp()))
    assert pixels.shape == (3, 12, 20) and pixels.dtype == torch.uint8
    assert all(np.array_equal(channel, ramp()) for channel in pixels)


def test_sixteen_bits_are_scaled_not_saturated(tmp_path):
    pixels = read_image(save(tmp_path, ramp().astype(np.uint16) * 257))
    assert np.array_equal(pixels[0], ramp())


@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_floats_in_either_range(tmp_path, scale):
    path = save(tmp_path, ramp().astype(np.float32) * np.float32(scale), "x.tiff")
    assert np.array_equal(read_image(path)[0], ramp())


def test_alpha_is_dropped_and_colors_stay(tmp_path):
    rgba = np.dstack([ramp(), ramp()[::-1], ramp()[:, ::-1], np.zeros_like(ramp())])
    assert np.array_equal(read_image(save(tmp_path, rgba)).permute(1, 2, 0), rgba[..., :3])


def test_palette_png_under_a_jpeg_name(tmp_path):
    path = save(tmp_path, np.dstack([ramp() // 51 * 51] * 3), "x.png", mode="P").rename(tmp_path / "x.jpg")
    assert (read_image(path).int() - torch.from_numpy(ramp() // 51 * 51)).abs().max() == 0


def test_cmyk_is_not_inverted(tmp_path):
    white = np.full((8, 8, 3), 250, np.uint8)
    assert read_image(save(tmp_path, white, "x.jpg", mode="CMYK")).min() > 230


COLORS = np.random.default_rng(0).integers(0, 256, (37, 29, 3), dtype=np.uint8)
KINDS = {
    "jpeg": ("RGB", "x.jpg", {"quality": 80}),
    "4:4:4": ("RGB", "x.jpg", {"subsampling": 0}),
    "progressive": ("RGB", "x.jpg", {"progressive": True}),
    "gray jpeg": ("L", "x.jpg", {}),
    "cmyk": ("CMYK", "x.jpg", {}),
    "palette": ("P", "x.png", {}),
    "palette with a transparent color": ("P", "x.png", {"transparency": 3}),
    "palette with transparency": ("P", "x.png", {"transparency": bytes(range(256))}),
    "gray and alpha": ("LA", "x.png", {}),
    "alpha": ("RGBA", "x.png", {}),
    "one bit": ("1", "x.png", {}),
    "gif": ("P", "x.gif", {}),
    "lossless webp": ("RGBA", "x.webp", {"lossless": True}),
    "lab": ("LAB", "x.tif", {}),
    "ycbcr": ("YCbCr", "x.tif", {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strip", [1, 29 * 6, 29 * 37])
def test_images_in_strips_are_those_in_one_piece(tmp_path, monkeypatch, kind, strip):
    mode, name, options = KINDS[kind]
    image = Image.fromarray(COLORS)
    (image if mode == "RGB" else image.convert(mode) if mode != "LAB" else Image.merge("LAB", image.split())).save(
        tmp_path / name, **options
    )
    with Image.open(tmp_path / name) as opened:
        expected = np.array((opened.convert("RGBA") if "transparency" in opened.info else opened).convert("RGB"))
        with monkeypatch.context() as patch:
            patch.setattr(image_io, "STRIP", strip)
            for pixels in (read_image(tmp_path / name), image_io.image_pixels(opened)):
                assert np.array_equal(pixels.permute(1, 2, 0), expected) and pixels.stride() == (1, 29 * 3, 3)


@pytest.mark.parametrize("kind", ["16 bits", "float", "turned"])
def test_images_that_need_more_than_their_colors_in_strips(tmp_path, monkeypatch, kind):
    if kind == "16 bits":
        path = save(tmp_path, ramp().astype(np.uint16) * 257)
    elif kind == "float":  # the range of all pixels decides how they are scaled, not that of a strip
        path = save(tmp_path, ramp().astype(np.float32), "x.tiff")
    else:
        path = rotated(tmp_path, 6)
    monkeypatch.setattr(image_io, "STRIP", 40)
    expected = np.rot90(ramp(), -1) if kind == "turned" else ramp()
    assert np.array_equal(read_image(path, expected.shape)[0], expected)


def rotated(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(tmp_path, ramp(), exif=exif)


def test_exif_rotation_applied_only_when_the_expected_size_says_so(tmp_path):
    path = rotated(tmp_path, 6)
    assert np.array_equal(read_image(path, (12, 20))[0], ramp())
    assert np.array_equal(read_image(path)[0], ramp())
    assert np.array_equal(read_image(path, (20, 12))[0], np.rot90(ramp(), -1))


@pytest.mark.parametrize(
    ("size", "stored", "upright", "turned"),
    [
        ((200, 150), (300, 400), (400, 300), True),  # a scaled copy of the upright image
        ((150, 200), (300, 400), (400, 300), False),
        ((200, 200), (300, 400), (400, 300), False),  # of neither shape
        ((200, 150), (400, 300), (400, 300), False),  # no EXIF
        ((50, 50), (100, 100), (100, 100), False),  # nothing tells
        ((100, 99), (99, 100), (100, 99), True),  # almost square: by its size alone
        ((50, 50), (99, 100), (100, 99), False),
        ((99, 100), (99, 100), (100, 99), False),
    ],
)
def test_the_shape_of_a_scaled_copy_tells_whether_exif_applies(size, stored, upright, turned):
    assert image_io.is_of_turned(size, stored, upright) == turned


def test_expected_size_turns_nothing_without_exif(tmp_path):
    assert read_image(save(tmp_path, ramp()), (20, 12)).shape == (3, 12, 20)


def test_header_tells_both_sizes(tmp_path):
    info = read_image_info(rotated(tmp_path, 8))
    assert (info.stored_size, info.upright_size, info.orientation) == ((12, 20), (20, 12), 8)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_a_cut_file_is_an_error_even_where_truncation_is_allowed(tmp_path, name, allow, monkeypatch):
    path = save(tmp_path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", allow)
    for read in (read_image, read_image_info):
        with pytest.raises(ImageError, match=name):
            read(path)


@pytest.mark.parametrize("content", [b"", b"this is text", None])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "y.jpg"
    if content is not None:
        path.write_bytes(content)
    for read in (read_image, read_image_info):
        with pytest.raises(ImageError, match=r"y\.jpg: this image cannot be read"):
            read(path)


def noise_jpeg(h=64, w=64):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize("read", [read_image, read_image_info])
def test_a_film_behind_the_image_does_no_harm(tmp_path, read):
    path = tmp_path / "x.jpg"
    path.write_bytes(noise_jpeg() + bytes(200_000))
    read(path)


def test_the_end_of_a_preview_is_not_that_of_the_image(tmp_path):
    """A file whose second half never came, as zeros, with a preview in its header."""
    intact, preview = noise_jpeg(), noise_jpeg(8, 8)
    header = intact[:2] + b"\xff\xe2" + (len(preview) + 2).to_bytes(2) + preview
    path = tmp_path / "x.jpg"
    path.write_bytes(header + intact[2:])
    read_image(path)
    path.write_bytes(header + intact[2 : len(intact) // 2] + bytes(len(intact) // 2))
    with pytest.raises(ImageError, match="truncated"):
        read_image(path)


def test_a_wrong_checksum_in_a_png_is_an_error(tmp_path):
    path = save(tmp_path, ramp(64, 64))
    content = bytearray(path.read_bytes())
    content[content.index(b"IEND") - 6] ^= 1  # the checksum of the pixels
    path.write_bytes(content)
    with pytest.raises(ImageError, match="checksum"):
        read_image(path)


def test_the_reason_comes_with_what_the_file_begins_with(tmp_path):
    path = tmp_path / "x.jpg"
    for content, reason in (
        (b"<html>404", "it begins with '<html>404', which is not an image"),
        (b"", "the file is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(ImageError) as error:
            read_image(path)
        assert error.value.reason == reason
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)


def test_frames_are_counted_and_the_first_is_read(tmp_path):
    first, second = (Image.fromarray(np.dstack([values] * 3)) for values in (ramp(), ramp()[::-1].copy()))
    first.save(tmp_path / "x.tif", save_all=True, append_images=[second])
    assert read_image_info(tmp_path / "x.tif").frames == 2
    assert np.array_equal(read_image(tmp_path / "x.tif")[0], ramp())


@pytest.mark.parametrize("read", [read_image, read_image_info])
def test_too_many_pixels_or_bytes_are_refused_with_the_setting(tmp_path, read):
    path = save(tmp_path, ramp(40, 50))
    read(path, limits=Limits(max_image_pixels=2000))
    with pytest.raises(ImageError, match=r"x\.png: .* it has 2,000 pixels, more than data\.max_image_pixels=1999"):
        read(path, limits=Limits(max_image_pixels=1999))
    size = path.stat().st_size
    read(path, limits=Limits(max_image_bytes=size))
    with pytest.raises(ImageError, match=rf"more than data\.max_image_bytes={size - 1}; raise the setting"):
        read(path, limits=Limits(max_image_bytes=size - 1))


def test_the_limit_of_pixels_is_ours_not_that_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = save(tmp_path, ramp(40, 50))
    assert read_image(path).shape == (3, 40, 50) and read_image_info(path).stored_size == (40, 50)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("read", [read_image, read_image_info])
def test_a_pipe_and_an_endless_device_are_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "endless.jpg"):
        with pytest.raises(ImageError, match="not a regular file"):
            read(tmp_path / name)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("name", ["x.jpg", "x.eps"])
def test_no_image_starts_another_program(tmp_path, name, monkeypatch):
    """Pillow would have Ghostscript draw it, whatever its name."""
    (tmp_path / name).write_bytes(EPS)
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, **_: started.append(command))
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
    for read in (read_image, read_image_info):
        with pytest.raises(ImageError, match="it begins with '%!PS-Adobe"):
            read(tmp_path / name)
    assert not started and not is_image_name("x.eps") and is_image_name("x.JPEG")


def test_a_name_cannot_do_more_than_be_printed(tmp_path):
    path = tmp_path / "a\x1b[31m\nb.jpg"
    path.write_bytes(b"")
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert r"a\x1b[31m\x0ab.jpg: this image" in str(error.value) and str(error.value).isprintable()
    assert error.value.reason == "the file is empty"


@pytest.mark.parametrize("kind", ["RGB", "I;16"])
def test_decoding_takes_ten_bytes_a_pixel_at_most(tmp_path, kind):
    side = 4000
    array = np.zeros((side, side, 3) if kind == "RGB" else (side, side), np.uint8 if kind == "RGB" else np.uint16)
    path = save(tmp_path, array)
    script = (
        "import resource, sys; from brs_detr.data.image_io import read_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_image(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert grown * (1 if sys.platform == "darwin" else 1024) < 10 * side * side
