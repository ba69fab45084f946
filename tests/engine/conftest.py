"""The toy run as a module and as a program to be started and killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import module_from

TOY = Path(__file__).with_name("toy_run.py")
ROOT = TOY.parents[2]


@pytest.fixture(scope="session")
def toy():
    """The module `toy_run`."""
    return module_from(TOY)


class Program:
    """Starts `toy_run.py` in a process of its own."""

    def __init__(self):
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self, folder, *arguments, processes=1):
        launcher = [sys.executable]
        if processes > 1:
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={processes}",
                "--master-port=0",
            ]
        command = [*launcher, str(TOY), str(folder), *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, folder, *arguments, processes=1):
        """(exit code, output) of a run to its end."""
        process = self.start(folder, *arguments, processes=processes)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def interrupt(self, folder, *arguments, number=signal.SIGKILL, after=0.0):
        """Send a signal some seconds after the training has begun; (exit code, output)."""
        process = self.start(folder, *arguments)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.strip() == "running":
                break
        time.sleep(after)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=300)
        return process.returncode, "".join(lines) + rest


@pytest.fixture(scope="session")
def program():
    return Program()


@pytest.fixture
def weights():
    """Reads a safetensors file."""
    return lambda path: load_file(path)
