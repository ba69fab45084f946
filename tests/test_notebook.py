"""The notebook, cell by cell, with fewer images: what it shows is what a reader gets."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_stored_without_outputs():
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in cells() if cell["cell_type"] == "code"
    )


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    code = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    assert code[0].startswith("IMAGES, EPOCHS = 300, 8")
    code[0] = code[0].replace("300, 8", "24, 1")
    *statements, last = "\n".join(code).strip().split("\n")
    program = "\n".join([*statements, f"shown = {last}", "print(type(shown).__name__, shown.size)"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "by head" in done.stdout and done.stdout.splitlines()[-1].startswith("Image (6")
    assert (tmp_path / "quickstart" / "run" / "report.html").is_file()
