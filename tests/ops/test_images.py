"""Padding adds zeros at the right and bottom, and nothing else."""

import pytest
import torch

from brs_detr.ops.images import ImageBatch


def batch():
    images = [torch.randint(1, 256, (3, h, w), dtype=torch.uint8) for h, w in ((4, 9), (7, 5))]
    return images, ImageBatch.from_list(images, [(40, 90), (70, 50)])


def test_images_are_where_they_were_and_the_rest_is_zero():
    images, padded = batch()
    assert padded.padded_size == (7, 9) and padded.sizes == [(4, 9), (7, 5)] and len(padded) == 2
    for row, image in zip(padded.pixels, images, strict=True):
        assert torch.equal(row[:, : image.shape[1], : image.shape[2]], image)
        assert row.float().sum() == image.float().sum()
    assert padded.pixels.dtype == torch.uint8 and padded.original_sizes == [(40, 90), (70, 50)]


def test_mask_is_true_exactly_where_padded():
    _, padded = batch()
    assert torch.equal(padded.padding_mask(), (padded.pixels == 0).all(1))


def test_original_sizes_default_to_the_sizes_and_moving_keeps_them():
    images, _ = batch()
    moved = ImageBatch.from_list(images).to("cpu")
    assert moved.original_sizes == moved.sizes == [(4, 9), (7, 5)]


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        ImageBatch.from_list([])
