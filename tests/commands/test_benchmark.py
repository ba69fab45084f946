"""What `benchmark` prints for recipes, weights and exported files."""

import re

import pytest
import torch
from support import DEMO, SMALL_DETECTOR, module_from
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from brs_detr import cli
from brs_detr.commands import benchmark
from brs_detr.ops.images import ImageBatch

FAST = ["--runs", "2", "--warmup", "1"]


def test_a_recipe_is_timed_with_random_weights_and_its_costs_are_counted(capsys):
    assert (
        cli.main(["benchmark", DEMO, *SMALL_DETECTOR, "--size", "64x96", "--batch", "2", "--threads", "1", *FAST]) == 0
    )
    said = capsys.readouterr().out
    assert "random weights" in said and "batches of 2 image(s) of 64x96 (height x width)" in said
    assert re.search(r"^torch \S+ on \S+.*, head decoder$", said, re.M)
    parameters, flops = (re.search(rf"^{name}: ([\d,.]+)", said, re.M)[1] for name in ("parameters", "GFLOPs"))
    assert int(parameters.replace(",", "")) > 1e6 and 0.05 < float(flops) < 5
    assert "not counted: sampling of deformable attention" in said
    median, slow = re.search(r"median ([\d.]+), 90 % of the runs below ([\d.]+)", said).groups()
    rate = re.search(r"images/s: ([\d.]+)", said)[1]
    assert 0 < float(median) <= float(slow) and float(rate) == pytest.approx(1000 / float(median), rel=0.02)


def test_a_dataset_is_refused_with_weights_as_nothing_of_it_is_read(tmp_path, capsys):
    (tmp_path / "x.safetensors").touch()
    assert cli.main(["benchmark", str(tmp_path / "x.safetensors"), "data=new"]) == 2
    assert "data: has no effect, as this command opens no dataset. Leave it out" in capsys.readouterr().err


def test_the_operations_of_a_convolution_are_counted_as_on_paper():
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        nn.Conv2d(3, 8, 3, padding=1)(torch.zeros(1, 3, 10, 20))
    assert counter.get_total_flops() == 2 * 3 * 3 * 3 * 8 * 10 * 20


def test_time_is_per_image_and_from_the_runs_after_the_warm_up(monkeypatch):
    clock, calls = iter([0.0, 0.010, 1.0, 1.030, 2.0, 2.020, 3.0, 3.020]), []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    subject = benchmark.Subject("x", calls.append, (8, 8), torch.device("cpu"), [])
    options = type("Options", (), {"warmup": 3, "runs": 4, "batch": 10})
    lines = benchmark.timing(subject, ImageBatch(torch.zeros(10, 3, 8, 8), [(8, 8)] * 10, [(8, 8)] * 10), options)
    assert len(calls) == 7
    assert lines[0].startswith("ms per image: median 2.00, 90 % of the runs below 2.70 (4 runs after 3")
    assert lines[1] == "images/s: 500.0"


def test_an_exported_file_is_timed_in_onnxruntime(exported_file, capsys):
    assert cli.main(["benchmark", str(exported_file), "--size", "96x131", *FAST]) == 0
    said = capsys.readouterr().out
    assert "onnxruntime on CPU" in said and "fp32, head decoder" in said and "images/s: " in said
    assert re.search(r"parameters: [\d,]+ in the file, [\d.]+ MB", said) and "GFLOPs: not counted in a file" in said


@pytest.fixture(scope="module")
def exported_file(tmp_path_factory):
    """A small detector with the metadata of `export`."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    from brs_detr.export.onnx import write_onnx
    from brs_detr.models.build import build_model

    small = module_from(__file__.replace("commands/test_benchmark", "export/conftest"))
    path = tmp_path_factory.mktemp("file") / "small.onnx"
    facts = {"classes": ["a", "b", "c"], "category_ids": [1, 2, 3], "head": "decoder", "size": None}
    facts |= {"short_side": 96, "long_side": 131, "antialias": True, "thresholds": [0.5] * 3, "calibration": None}
    write_onnx(small.spread_weights(build_model(small.SMALL, 3)), path, (96, 131), any_size=True, metadata=facts)
    assert onnx.load(path)
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([DEMO, "eval.test_scales=[64,80]"], "eval.test_scales: the time is that of one size of an image"),
        (["absent.safetensors"], "neither a weights file nor a run folder"),
        ([DEMO, "--size", "800"], "800 is no size. Write height and width"),
        ([DEMO, "--batch", "0"], "0 is not a positive integer"),
        ([DEMO, "model.nonsense=1"], "model.nonsense is not a setting"),
        ([DEMO, "eval.predict_with=ensemble"], "Give a run, or use one of decoder, roi, atss."),
    ],
)
def test_what_cannot_be_timed_is_refused(words, said, capsys):
    try:
        code = cli.main(["benchmark", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2 and said in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    (tmp_path / "page.onnx").write_text("<html>not found</html>")
    assert cli.main(["benchmark", str(tmp_path / "page.onnx")]) == 2
    error = capsys.readouterr().err
    assert "page.onnx: onnxruntime cannot open it" in error and error.count("\n") == 1
    assert cli.main(["benchmark", str(tmp_path / "page.onnx"), "eval.predict_with=roi"]) == 2
    assert "an exported file has no settings to change" in capsys.readouterr().err
