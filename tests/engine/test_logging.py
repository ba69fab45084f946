"""The lines of a run's log: progress, validations, and what the package warns of through `logging`."""

import logging
import math
import os

import pytest
import torch
from accelerate import Accelerator

from brs_detr.engine.logging import RunLog, read_metrics, training_line, validation_line, warnings_in
from brs_detr.models.config import DenoisingConfig
from brs_detr.models.denoising import Denoising
from brs_detr.ops.targets import PackedTargets

PACKAGE = logging.getLogger("brs_detr")
SPEED = {"images_per_s": 12.3456, "step_s": 0.5, "data_s": 0.0123}


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path, Accelerator(cpu=True))
    log.begin()
    return log


def crowded_image(number):
    """One image with so many objects."""
    boxes = torch.tensor([[2.0, 2, 20, 20]]).repeat(number, 1)
    return PackedTargets.pack([{"boxes": boxes, "labels": torch.zeros(number, dtype=torch.long)}], [(64, 64)])


def test_a_detectors_warning_is_in_the_log_once(log, tmp_path, capsys):
    module = Denoising(8, 3, DenoisingConfig(queries=4, max_rows=8))
    with warnings_in(log):
        for _ in range(3):
            module(crowded_image(9), queries=5)
    warning = "warning: model.denoising.max_rows=8: an image has 9 objects, of which a random 4 become"
    assert (tmp_path / "log.txt").read_text().count(warning) == 1
    assert capsys.readouterr().out.count(warning) == 1


def test_lines_that_a_resumed_run_repeats_are_dropped_and_those_of_shorter_epochs_before_it_are_not(log, tmp_path):
    lines = [("train", 8, 8.0), ("val", 8, 8), ("skipped", 9, 5), ("train", 10, 5.0)]
    lines += [("val", 10, 5), ("skipped", 10, 5), ("train", 12, 6.0)]
    for kind, step, epoch in lines:
        log.metrics(kind, step, {"epoch": epoch})
    resumed = RunLog(tmp_path, log.accelerator)
    resumed.begin({"step": 10, "epoch": 4})
    assert [(line["kind"], line["step"], line["epoch"]) for line in read_metrics(resumed.metrics_path)] == lines[:4]


def test_what_is_logged_before_and_after_a_run_is_not_its_own(log, tmp_path, capfd):
    handlers = PACKAGE.handlers[:]
    with pytest.raises(ZeroDivisionError), warnings_in(log):
        PACKAGE.getChild("data").warning("inside: %d", 1)
        PACKAGE.getChild("data").info("not a warning")
        raise ZeroDivisionError
    PACKAGE.warning("after")
    assert PACKAGE.handlers == handlers
    [line] = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("warning: inside: 1")


def test_other_processes_leave_the_log_alone(log, tmp_path, capfd):
    """Loader workers that are forked from the run's process, and processes of the launch besides the main one."""
    with warnings_in(log):
        if (child := os.fork()) == 0:
            PACKAGE.warning("of a worker")
            os._exit(0)
        os.waitpid(child, 0)
    assert not (tmp_path / "log.txt").read_text() and "of a worker" in capfd.readouterr().err
    log.main = False
    with warnings_in(log):
        assert not PACKAGE.handlers


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
    line = validation_line(3, 12, metrics, 0.5, False, "roi")
    assert line == f"epoch 3/12 validation: {shown}, best head roi (best 0.5000)"
    assert validation_line(3, 12, {"AP": math.nan}, None, False) == "epoch 3/12 validation: AP nan (best nan)"


def test_a_line_of_validation_says_how_many_images_could_not_be_read():
    metrics = {"AP": 0.4, "images": 4990, "images_left_out": 10}
    assert validation_line(1, 1, metrics, 0.4, True) == (
        "epoch 1/1 validation: AP 0.4000 on 4,990 of 5,000 images (best so far)"
    )
    assert " on " not in validation_line(1, 1, metrics | {"images_left_out": 0}, 0.4, True)
