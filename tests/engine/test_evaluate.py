"""Prediction in full float32."""

import torch

from brs_detr.engine.evaluate import full_float32


def test_inside_no_product_is_rounded_and_afterwards_all_is_as_before():
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [library.allow_tf32 for library in libraries]
    try:
        libraries[0].allow_tf32, libraries[1].allow_tf32 = True, False
        with full_float32():
            assert [library.allow_tf32 for library in libraries] == [False, False]
        assert [library.allow_tf32 for library in libraries] == [True, False]
    finally:
        libraries[0].allow_tf32, libraries[1].allow_tf32 = before
