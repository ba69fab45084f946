"""One training at a time in a folder."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from brs_detr.config import ConfigError
from brs_detr.resuming import hold_folder

HOLD = "import sys, pathlib, brs_detr.resuming as r; r.hold_folder(pathlib.Path(sys.argv[1])); print('held'); input()"


def test_a_folder_is_held_by_one_process_until_it_ends_even_if_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {other.pid} on .* is training there; wait for its end or stop it"):
        hold_folder(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    hold_folder(tmp_path)
    hold_folder(tmp_path)  # the same process may go on with its own run
