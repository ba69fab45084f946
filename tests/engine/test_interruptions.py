"""What a week brings to a training with loader workers: see `interrupted_runs.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interrupted_runs.py")
CASES = (
    "stopped",
    "stopped at the start of the workers",
    "stopped in validation",
    "stopped while waiting",
    "stopped while waiting without workers",
    "a hung storage",
    "a storage that comes back",
    "a storage that does not",
    "a killed worker",
    "a killed process",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the runs printed; they are made once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("runs")), *CASES]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    return made.stdout + made.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="forks and looks into /proc")
@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_a_code_of_its_own_saved_and_resumes_to_the_same_end(output, case):
    assert f"holds: {case} (" in output, output[-6000:]
