"""Two and three processes over gloo: gradients, gathering, images without objects, resuming, stopping together."""

from pathlib import Path

import pytest
from support import torchrun

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_processes.py")
CHECKS = (
    "gradient",
    "gathering",
    "denoising",
    "resume",
    "buffers",
    "non-finite",
    "skipped",
    "unwritable",
    "shared folder",
    "scaler",
    "interruption",
    "interrupted validation",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the checks with two processes printed; they run once."""
    return torchrun(SCRIPT, 2, tmp_path_factory.mktemp("two"), *CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_with_two_processes(output, check):
    assert f"holds: {check}" in output, output[-4000:]


def test_images_without_objects_in_some_or_all_of_three_processes(tmp_path):
    output = torchrun(SCRIPT, 3, tmp_path, "empty images")
    assert "holds: empty images" in output, output[-4000:]
