"""The lines that a training prints."""

import math

from brs_detr.engine.logging import training_line, validation_line

SPEED = {"images_per_s": 12.3456, "step_s": 0.5, "data_s": 0.0123}


def test_a_line_of_training_sums_the_terms_of_a_head_and_says_what_is_left():
    terms = {"decoder.cls": 0.5, "decoder.l1": 0.25, "rpn.cls": 1.0}
    line = training_line(1.75, terms, 2e-4, SPEED, 600)
    assert line == ("loss 1.75 (decoder 0.75 rpn 1) lr 0.0002 12.3 images/s step 0.5 s (data 0.012 s) ETA 5 min 00 s")
    assert training_line(math.nan, {}, 1e-3, SPEED, 0).startswith("loss nan () lr 0.001 ")


def test_a_line_of_validation_shows_ap_of_boxes_masks_and_heads_and_the_best_so_far():
    metrics = {"AP": 0.4, "AP50": 0.6, "AP75": 0.45, "APs": 0.2, "mask_AP": 0.35, "roi_AP": 0.41, "AR100": 0.5}
    shown = "AP 0.4000 AP50 0.6000 AP75 0.4500 mask_AP 0.3500 roi_AP 0.4100"
    assert validation_line(2, 12, metrics, 0.4, True) == f"epoch 2/12 validation: {shown} (best so far)"
    assert validation_line(3, 12, metrics, 0.5, False) == f"epoch 3/12 validation: {shown} (best 0.5000)"
    assert validation_line(3, 12, {"AP": math.nan}, None, False) == "epoch 3/12 validation: AP nan (best nan)"


def test_a_line_of_validation_says_how_many_images_could_not_be_read():
    metrics = {"AP": 0.4, "images": 4990, "images_left_out": 10}
    assert validation_line(1, 1, metrics, 0.4, True) == (
        "epoch 1/1 validation: AP 0.4000 on 4,990 of 5,000 images (best so far)"
    )
    assert " on " not in validation_line(1, 1, metrics | {"images_left_out": 0}, 0.4, True)
