"""Co-DINO and BRS-DINO from the data to drawn detections: trained, killed, resumed, evaluated and used."""

import json
from itertools import pairwise

import pytest
import torch
from support import (
    DEMO,
    SMALL_DETECTOR,
    SMALL_IMAGES,
    assert_equal_weights,
    killed_at,
    metrics_without_times,
    reset_accelerate,
)

from brs_detr import cli
from brs_detr.api import load
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.distributed import seed_step
from brs_detr.engine.state import latest_state
from brs_detr.models.denoising import Denoising, draw_noise

pytestmark = pytest.mark.slow

TINY = [
    *SMALL_DETECTOR,
    *SMALL_IMAGES,
    "model.backbone.name=test_resnet.r160_in1k",
    "train.epochs=2",
    "train.total_batch_size=4",  # two batches a step
    "train.per_device_batch_size=2",
    "train.log_every=1",
    "train.save_every=2",
    "train.ema_decay=0.9",
]
# The bound is low enough for the choice of objects to be random, too.
BOUNDED = ["model.denoising.queries=2", "model.denoising.max_rows=4"]
DETECTORS = {
    "co_dino": [*BOUNDED, "data.workers=1"],
    "brs_dino": [*BOUNDED, "model.denoising.loss=rank"],
}
STEPS = 6  # of two epochs
KILLED_AT = 4  # in the middle of the second epoch; a state was saved there


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerate()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve images to train on, three steps an epoch, and three for validation."""
    return make_dataset(tmp_path_factory.mktemp("data"), train=12, val=3, image_size=64)


def command(data, detector, folder, *more):
    settings = [f"data.root={data}", f"output_dir={folder}", f"model.name={detector}"]
    return ["train", DEMO, *TINY, *settings, *DETECTORS[detector], *more]


@pytest.fixture(scope="module", params=DETECTORS)
def run(request, data, tmp_path_factory):
    """The folder of a run that nothing interrupted; it is named as its detector."""
    reset_accelerate()
    folder = tmp_path_factory.mktemp("runs") / request.param
    assert cli.main(command(data, request.param, folder)) == 0
    return folder


def test_a_killed_run_ends_as_if_it_had_not_been(run, data, tmp_path, monkeypatch):
    """Noise and the objects that are left out are drawn again as they would have been; other draws are another run."""
    drawn = []

    def noted(self, *arguments):
        drawn.append(denoise(self, *arguments))
        return drawn[-1]

    denoise, own = Denoising.forward, command(data, run.name, tmp_path)
    with monkeypatch.context() as patch, killed_at(KILLED_AT):
        patch.setattr(Denoising, "forward", noted)
        cli.main(own)
    assert len(drawn) == 2 * KILLED_AT and {one.boxes.shape[1] for one in drawn} == {4}
    assert not torch.equal(drawn[0].boxes, drawn[1].boxes)  # the batches of a step have noise of their own
    state, _ = latest_state(tmp_path / "state")
    assert state.name == f"step-{KILLED_AT:08}"

    reset_accelerate()
    assert cli.main([*own, "--resume"]) == 0
    names = ("last", "best", *(f"state/step-{STEPS:08}/{name}" for name in ("model", "ema", "optimizer")))
    for name in names:
        assert_equal_weights(tmp_path / f"{name}.safetensors", run / f"{name}.safetensors")
    assert metrics_without_times(tmp_path) == metrics_without_times(run)
    logged = [line["terms"] for line in metrics_without_times(run) if line["kind"] == "train"]
    assert len(logged) == STEPS and all("denoising.0.giou" in terms for terms in logged)


def test_the_log_says_once_that_objects_are_left_out_of_denoising(run):
    said = (run / "log.txt").read_text()
    assert said.count("warning: model.denoising.max_rows=4: an image has") == 1


def test_each_process_and_each_step_draws_noise_of_its_own():
    """As from any generator of torch on the host: the trainer seeds it for each step and process."""
    drawn = []
    for step, process in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_step(0, step, process)
        drawn.append(draw_noise(50, 5).parts)
    assert torch.equal(drawn[0], drawn[3])
    assert all(not torch.isclose(one, other).any() for one, other in pairwise(drawn))


@pytest.mark.parametrize("head", ["decoder", "roi", "atss", "ensemble"])
def test_a_run_is_evaluated_and_used_with_each_head(run, data, tmp_path, head):
    use = f"eval.predict_with={head}"
    arguments = ["--out", str(tmp_path / "eval"), "--images", "0"]
    assert cli.main(["eval", str(run / "last.safetensors"), use, *arguments]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert {result["image_id"] for result in results} and all(0 <= result["score"] <= 1 for result in results)
    images = sorted((data / "images" / "val").iterdir())
    found = load(run, overrides=[use]).predict(images, threshold=0.0)
    assert all(found) and all(0 <= thing["score"] <= 1 for own in found for thing in own)


def test_info_and_a_dry_run_know_the_detector(run, data, tmp_path, capsys):
    own = command(data, run.name, tmp_path)
    assert cli.main(["info", *own[1:]]) == 0
    assert capsys.readouterr().out.startswith(f"{run.name} with loss ")
    assert cli.main([*own, "--dry-run"]) == 0
    assert "dry run: " in capsys.readouterr().out
