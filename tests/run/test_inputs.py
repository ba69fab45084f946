"""A random backbone of which norms or stages are frozen is refused, and nothing else is."""

import pytest
import torch
from support import DEMO, ROOT, SMALL_DETECTOR, SMALL_IMAGES, reset_accelerate, script

from brs_detr import cli
from brs_detr.config import ConfigError, load_config
from brs_detr.data.synthetic import make_dataset
from brs_detr.exit_codes import CheckpointError
from brs_detr.run.inputs import is_random_and_frozen, require_learning_backbone
from brs_detr.run.weights import read

RECIPES = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "cnn").glob("*.yaml")]
FROZEN = ["model.backbone.norm=frozen", "model.backbone.frozen_stages=1"]
train = script("train")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    reset_accelerate()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A training of an epoch of two steps."""
    data = make_dataset(tmp_path_factory.mktemp("data"), train=4, val=2, image_size=64)
    settings = [*SMALL_DETECTOR, *SMALL_IMAGES, "train.epochs=1", "train.total_batch_size=2", f"data.root={data}"]
    return [DEMO, *settings]


def test_no_recipe_is_refused():
    assert not any(is_random_and_frozen(load_config(path)) for path in RECIPES)


@pytest.mark.parametrize("recipe", ["brs_detr_r50_12e_coco", "brs_detr_small", "atss_r50_brs_12e_coco"])
def test_without_weights_the_settings_to_change_are_named(recipe):
    with pytest.raises(ConfigError) as error:
        require_learning_backbone(load_config(recipe, ["model.backbone.pretrained=false"]))
    text = str(error.value)
    assert "model.backbone.norm=frozen and model.backbone.frozen_stages=1" in text
    for setting in ("norm=batch", "frozen_stages=0", "pretrained=true", "checkpoint=FILE"):
        assert f"model.backbone.{setting}" in text
    assert "train.init_from=FILE" in text and "\n" not in text


@pytest.mark.parametrize(
    "change",
    [
        ["model.backbone.norm=batch", "model.backbone.frozen_stages=0"],
        ["model.backbone.norm=group", "model.backbone.frozen_stages=0"],
        ["model.backbone.checkpoint=FILE"],
        ["train.init_from=FILE"],
        ["model.backbone.pretrained=true"],
    ],
)
def test_what_the_error_proposes_is_accepted(change):
    require_learning_backbone(load_config("brs_detr_small", ["model.backbone.pretrained=false", *change]))


@pytest.mark.parametrize("frozen", [*([one] for one in FROZEN), FROZEN])
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])  # to resume where there is no state is to start
def test_the_command_refuses_to_start(command, tmp_path, capsys, frozen, flag):
    assert train([*command, f"output_dir={tmp_path}", *frozen, flag]) == 2
    said = capsys.readouterr().err
    assert all(setting in said.partition(" would keep ")[0] for setting in frozen), said
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_trial_shows_the_cost_of_a_step_all_the_same(command, tmp_path, capsys):
    assert train([*command, f"output_dir={tmp_path}", *FROZEN, "--dry-run"]) == 0
    assert "warning: parts of the random backbone are frozen" in capsys.readouterr().out


def test_weights_from_elsewhere_start_continue_and_are_used(command, tmp_path, capsys):
    """A detector with frozen parts from a run of its own, interrupted, resumed, evaluated, described."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train([*command, f"output_dir={first}", "model.backbone.norm=group"]) == 0
    start = ["model.backbone.norm=group", FROZEN[1], f"train.init_from={first}", f"output_dir={second}"]
    reset_accelerate()
    assert train([*command, *start]) == 0
    reset_accelerate()
    again = ["--resume", "train.epochs=2", "train.allow_changes=true"]
    assert train([*command, *start, *again]) == 0
    reset_accelerate()
    alone = [setting for setting in start if "init_from" not in setting]  # the state has the weights
    assert train([*command, *alone, *again[:1], "train.epochs=3", again[2]]) == 0
    assert cli.main(["info", DEMO, *FROZEN, "--classes", "3"]) == 0
    torch.manual_seed(0)
    assert cli.main(["eval", str(second)]) == 0 and "warning: parts" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("a.json", "this is a json"), ("a.onnx", "this is an exported file")])
def test_a_file_of_another_kind_is_no_weights_to_start_from_and_no_folder_is_begun(
    command, tmp_path, capsys, name, said
):
    (tmp_path / name).write_text("{}")
    assert train([*command, f"train.init_from={tmp_path / name}", f"output_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert f"train.init_from={tmp_path / name}: {said}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_web_page_in_place_of_weights_is_named(tmp_path, name):
    (tmp_path / name).write_text("<!DOCTYPE html><html><body>Too many requests</body></html>")
    with pytest.raises(CheckpointError, match="this is a web page, not a weights file"):
        read(tmp_path / name)
