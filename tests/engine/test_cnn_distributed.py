"""CNN detectors in two processes over gloo: the step of both is that of one process, also where one has no objects.

With a ranking loss if it ranks over both; with a score-based loss if it divides by the number of positives.
"""

from pathlib import Path

import pytest
from support import torchrun

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("cnn_two_processes.py")
DETECTORS = ("retinanet", "foveabox", "atss", "paa", "faster_rcnn", "cascade_rcnn", "mask_rcnn", "yolact", "solov2")
CHECKS = [f"{check}/{detector}" for detector in DETECTORS for check in ("step", "score", "empty")] + [
    "rows/faster_rcnn"
]


@pytest.fixture(scope="module")
def output():
    """What the checks printed; they run once."""
    return torchrun(SCRIPT, 2, *CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_with_two_processes(output, check):
    assert f"holds: {check}" in output, output[-4000:]
