"""What the package warns of through `logging` is part of a run's log."""

import logging
import os

import pytest
import torch
from accelerate import Accelerator

from brs_detr.engine.logging import RunLog, warnings_in
from brs_detr.models.config import DenoisingConfig
from brs_detr.models.denoising import Denoising
from brs_detr.ops.targets import PackedTargets

PACKAGE = logging.getLogger("brs_detr")


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path, Accelerator(cpu=True))


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
