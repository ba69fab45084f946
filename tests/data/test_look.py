"""What a person should look at in the pictures themselves is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from brs_detr.data.coco import CocoDetection
from brs_detr.data.faults import FaultLog
from brs_detr.data.look import look_at, share_blank_below


def noise(h=64, w=96, high=256):
    return np.random.default_rng(0).integers(0, high, (h, w, 3), dtype=np.uint8)


@pytest.fixture()
def looks(tmp_path, write_dataset):
    """Puts a file in the place of a picture and returns what there is to say about it."""
    path = write_dataset(tmp_path, sizes=[(64, 96)], boxes=[[(1, 5, 5, 40, 40)]])

    def look(save):
        save(tmp_path / "images" / "000.png")
        log = FaultLog()
        dataset = CocoDetection(path, tmp_path / "images", train=True, log=log)
        return look_at(dataset, 0, log), {kind: log.counts[kind] for kind in log.counts if kind != "category_unused"}

    return look


def test_an_ordinary_picture(looks):
    assert looks(Image.fromarray(noise()).save) == (True, {})


def test_twelve_bits_in_sixteen_are_dark(looks):
    values = noise()[..., 0].astype(np.uint16) * 16
    assert looks(Image.fromarray(values).save) == (True, {"picture_converted": 1, "picture_dark": 1})


def test_a_night_picture_of_8_bits_is_not_called_dark(looks):
    assert looks(Image.fromarray(noise(high=40)).save) == (True, {})


def test_pages_and_frames(looks):
    frames = [Image.fromarray(noise(high=250)), Image.fromarray(noise(high=200))]
    found = looks(lambda path: frames[0].save(path, "TIFF", save_all=True, append_images=frames[1:]))
    assert found == (True, {"picture_has_pages": 1, "picture_name_misleads": 1})


def test_a_half_that_is_grey(looks):
    pixels = noise()
    pixels[30:] = 128
    assert looks(Image.fromarray(pixels).save) == (True, {"picture_part_blank": 1})


def test_a_jpeg_whose_body_is_zeros_but_for_its_end(looks, tmp_path):
    Image.fromarray(noise()).save(tmp_path / "whole.jpg", quality=95)
    content = (tmp_path / "whole.jpg").read_bytes()
    content = content[: len(content) // 2] + bytes(len(content) // 2 - 2) + content[-2:]
    ok, found = looks(lambda path: path.write_bytes(content))
    assert ok and found == {"picture_part_blank": 1, "picture_name_misleads": 1}


def test_what_cannot_be_decoded_is_named_and_counted_once(looks, tmp_path):
    content = bytearray()
    Image.fromarray(noise()).save(tmp_path / "whole.png")
    content += (tmp_path / "whole.png").read_bytes()
    content[len(content) // 2] ^= 255
    assert looks(lambda path: path.write_bytes(content)) == (False, {"picture_unreadable": 1})


def test_the_blank_share_counts_from_below_and_not_within_a_frame():
    pixels = torch.from_numpy(noise(40)).permute(2, 0, 1).clone()
    assert share_blank_below(pixels) == 0
    pixels[:, 30:] = 7
    assert share_blank_below(pixels) == 0.25
    pixels[:, :5] = 7
    assert share_blank_below(pixels) == 0
