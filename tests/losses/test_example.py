"""The example runs as it stands and its loss falls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_torchvision_retinanet_runs_in_under_eighty_lines():
    script = ROOT / "examples" / "torchvision_retinanet.py"
    assert len(script.read_text().splitlines()) < 80
    command = [sys.executable, str(script), "--steps", "11"]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    first, last = printed.stdout.strip().splitlines()
    ranking = [float(line.split("ranking")[1].split()[0]) for line in (first, last)]
    assert ranking[1] < ranking[0]
