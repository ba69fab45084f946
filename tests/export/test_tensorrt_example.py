"""The TensorRT example where it cannot run: one sentence that says what to do."""

import subprocess
import sys

import pytest
from support import ROOT

EXAMPLE = ROOT / "examples" / "tensorrt_detect.py"


def test_without_tensorrt_or_a_gpu_it_refuses_in_one_sentence(tmp_path):
    pytest.importorskip("onnxruntime")  # of the module that it shares the resizing with
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, str(EXAMPLE), "absent.onnx", "absent.jpg", "--engine", str(tmp_path / "a.engine")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stdout == ""
    assert "tensorrt is not installed" in run.stderr or "there is no CUDA device" in run.stderr
    assert not list(tmp_path.iterdir())
