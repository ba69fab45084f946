"""Two and three processes over gloo: gradients, gathering, images without objects, resuming, stopping together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")
CHECKS = (
    "gradient",
    "gathering",
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


def launch(processes, folder, *checks):
    """What the checks printed."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(SCRIPT), str(folder), *checks]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the checks with two processes printed; they run once."""
    return launch(2, tmp_path_factory.mktemp("two"), *CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_with_two_processes(output, check):
    assert f"holds: {check}" in output, output[-4000:]


def test_images_without_objects_in_some_or_all_of_three_processes(tmp_path):
    output = launch(3, tmp_path, "empty images")
    assert "holds: empty images" in output, output[-4000:]
