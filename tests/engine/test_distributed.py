"""Two processes over gloo: gradients, gathering, an empty process, resuming, stopping together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")
CHECKS = ("gradient", "gathering", "empty rank", "resume", "buffers", "non-finite")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the checks printed; they run once."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    folder = tmp_path_factory.mktemp("two")
    run = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    return run.stdout + run.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_with_two_processes(output, check):
    assert f"holds: {check}" in output, output[-4000:]
