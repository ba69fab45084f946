"""Windows lacks `fcntl`, `resource` and some signals; it and macOS start workers in a fresh interpreter."""

import os
import subprocess
import sys

import pytest
from support import DEMO, ROOT, SMALL_DETECTOR, SMALL_IMAGES

from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.logging import read_metrics

WITHOUT = """
import multiprocessing, signal, sys
if __name__ == "__main__":
    import psutil  # needs what Linux has
    sys.modules["fcntl"] = sys.modules["resource"] = None
    for name in ("pthread_sigmask", "SIGBUS", "SIGUSR1"):
        delattr(signal, name)
    multiprocessing.set_start_method("spawn")
"""
IMPORTS = """
    import importlib, pkgutil, brs_detr
    for module in pkgutil.walk_packages(brs_detr.__path__, "brs_detr."):
        if "triton" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
TRAINS = """
    from brs_detr.cli import run_command
    sys.exit(run_command("train", sys.argv[1:]))
"""


def run(program, tmp_path, *arguments):
    file = tmp_path / "program.py"
    file.write_text(WITHOUT + program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(file), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_every_module_can_be_imported_without_what_windows_lacks(tmp_path):
    done = run(IMPORTS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_training_with_workers_that_start_afresh(tmp_path):
    data = make_dataset(tmp_path / "data", train=8, val=4, image_size=64)
    settings = [*SMALL_DETECTOR, *SMALL_IMAGES, "data.workers=1", "train.epochs=1", "train.total_batch_size=4"]
    done = run(TRAINS, tmp_path, DEMO, *settings, f"data.root={data}", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "val"] == [2]
