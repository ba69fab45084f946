"""`brs_detr.load`, `train` and `evaluate`: what a user writes in a notebook."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import DEMO, ROOT, SMALL_DETECTOR, SMALL_IMAGES, reset_accelerate

import brs_detr
from brs_detr import api, cli
from brs_detr.api import TrainingResult, as_words
from brs_detr.config import load_config
from brs_detr.config_io import ConfigError
from brs_detr.engine.checkpoint import read_extra
from brs_detr.exit_codes import CheckpointError, Failure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training of two epochs on sixteen images, in this process."""
    folder = tmp_path_factory.mktemp("api")
    assert cli.main(["make-dataset", str(folder / "data"), "--train", "16", "--val", "8"]) == 0
    reset_accelerate()
    small = ["train.epochs=2", "train.total_batch_size=4", *SMALL_DETECTOR, *SMALL_IMAGES]
    config = load_config(DEMO, small)
    overrides = {"data.root": folder / "data", "output_dir": folder / "run", "model.backbone.pretrained": False}
    yield config, overrides, api.train(config, overrides)
    reset_accelerate()


@pytest.mark.slow
def test_a_training_returns_its_folder_and_its_best_figures(run):
    _, overrides, result = run
    assert result.finished and result.folder == Path(overrides["output_dir"])
    assert result.weights == result.folder / "best.safetensors" and result.epoch in (1, 2)
    assert result.metrics == read_extra(result.weights)["metrics"] and 0 <= result.metrics["AP50"] <= 1
    assert f"epoch {result.epoch}, AP {result.metrics['AP']:.3f}, AP50 " in str(result)


@pytest.mark.slow
def test_an_evaluation_returns_the_figures_of_the_validation(run, tmp_path):
    result = run[2]
    found = api.evaluate(result.folder, out=tmp_path / "out")
    assert found.stats["AP"] == pytest.approx(result.metrics["AP"], abs=1e-9)
    assert found.folder == tmp_path / "out" and (found.folder / "evaluation.json").exists()
    assert "oLRP" in found.stats and f"saved in {found.folder}" in str(found)
    again = api.evaluate(result.weights, ["eval.max_detections=1"], out=tmp_path / "one")
    assert again.summary.detections == 8 < found.summary.detections


@pytest.mark.slow
def test_a_run_is_not_overwritten_but_resumed_or_begun_again(run):
    config, overrides, result = run
    with pytest.raises(ConfigError, match="holds a run already"):
        api.train(config, overrides)
    assert api.train(config, overrides, resume=True).metrics == result.metrics
    # in other settings of the process's Accelerator than the training before
    assert api.train(config, {**overrides, "train.precision": "bf16", "train.epochs": 1}, overwrite=True).epoch == 1


@pytest.mark.slow
def test_a_run_is_loaded_and_predicts(run):
    result = run[2]
    predictor = brs_detr.load(result.folder, device="cpu", overrides={"eval.predict_with": "roi"})
    assert predictor.engine.model.predict_with == "roi" and len(predictor.classes) == 5
    assert predictor.predict(np.zeros((60, 80, 3), np.uint8), threshold=0.0).image_size == (80, 60)


def test_the_package_imports_nothing_heavy():
    code = "import brs_detr, brs_detr.api, sys; sys.exit(bool({'torch', 'numpy', 'timm', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_load_is_all_that_the_package_itself_has():
    assert brs_detr.load is api.load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = brs_detr.nothing


def test_overrides_are_words_or_a_mapping():
    overrides = {
        "optim.lr": 1e-5,
        "train.trackers": ("tensorboard",),
        "data.root": Path("a: b"),
        "train.ema_decay": None,
    }
    config = load_config(DEMO, as_words(overrides))
    assert config.optim.lr == 1e-5 and config.train.trackers == ("tensorboard",)
    assert config.data.root == "a: b" and config.train.ema_decay is None
    assert as_words(["a.b=1"]) == ["a.b=1"] == as_words("a.b=1")
    assert as_words({"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True)}) == ["a=3", "b=0.5", "c=true"]
    with pytest.raises(ConfigError, match=r"optim\.lr: Tensor is no value of a setting"):
        as_words({"optim.lr": torch.ones(1)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: brs_detr.load(path / "nothing"), "neither a weights file nor a run folder"),
        (lambda path: api.evaluate(path / "nothing"), "neither a weights file nor a run folder"),
        (lambda path: api.evaluate(path, images=-1), "images=-1: must be at least 0"),
        (lambda path: api.evaluate(path, score_thresholds=[0.5, 1.0]), r"score_thresholds=\[0\.5, 1\.0\]: not all lie"),
        (lambda path: api.evaluate(path, score_thresholds=[float("nan")]), r"score_thresholds=\[nan\]: not all lie"),
        (lambda path: api.evaluate(path, {"eval.nothing": 1}), r"eval\.nothing"),
        (lambda path: api.evaluate(path, {"data": str(path)}), "no dataset"),
        (lambda path: brs_detr.load(path), "neither a weights file nor a run folder"),
        (lambda path: brs_detr.load(path / "nothing.onnx"), r"nothing\.onnx"),
        (lambda path: api.train("demmo"), "Did you mean demo"),
        (lambda path: api.train("demo", {"train.epoch": 3}), r"did you mean train\.epochs"),
        (lambda path: api.train("demo", {"data.root": path}), "this annotation file does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path, call, said):
    with pytest.raises((Failure, ValueError), match=said) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_header_of_a_weights_file_is_read_alone(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"{}")
    for name in ("x.safetensors", "y.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name}: not a weights file"):
            read_extra(tmp_path / name)


def test_a_result_as_text():
    assert str(TrainingResult(Path("runs/a"), False)) == "runs/a (stopped early): no validation"
