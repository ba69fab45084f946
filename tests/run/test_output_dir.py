"""One training at a time in a folder, no accidental overwriting, no resuming with other settings."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import reset_accelerate

from brs_detr.config import Config, ConfigError, apply_overrides, to_dict
from brs_detr.data.issues import DataError
from brs_detr.engine.batch_plan import split_batch_size
from brs_detr.engine.config import TrainConfig
from brs_detr.run.output_dir import (
    changes_of_measure,
    check_output_dir,
    check_resumable,
    lock_output_dir,
    remove_run,
    require_same_data,
)
from brs_detr.train import train

HOLD = """
import sys, pathlib, brs_detr.run.output_dir as r
r.lock_output_dir(pathlib.Path(sys.argv[1]))
print('held')
input()
"""


def test_a_folder_is_held_by_one_process_until_it_ends_even_if_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"process {other.pid} on .* is training there\. Wait for it to end"):
        lock_output_dir(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    lock_output_dir(tmp_path)
    lock_output_dir(tmp_path)  # the same process may go on with its own run


def test_a_training_that_has_ended_leaves_the_folder_to_others_while_its_process_lives_on(tmp_path):
    """In a notebook, for one; here the training ends with an error."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text("{}")
    words = [f"data.root={tmp_path}", "data.train_json=train.json", "data.val_json=val.json"]
    words += [f"output_dir={tmp_path / 'run'}", "model.backbone.pretrained=false", "model.backbone.norm=batch"]
    reset_accelerate()
    with pytest.raises(DataError):
        train(apply_overrides(Config(), [*words, "model.backbone.frozen_stages=0"]))
    assert (tmp_path / "run" / ".lock").is_file()  # it was locked; to open it here would release it
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    other = subprocess.run(command, cwd=Path(__file__).parents[2], input="\n", capture_output=True, text=True)
    assert other.stdout == "held\n", other.stderr


def run_metadata(config, plan):
    return {"config": to_dict(config), "launch": dataclasses.asdict(plan)}


def test_another_launch_is_another_run_unless_allowed(tmp_path):
    config, saved = Config(), split_batch_size(16, 2, 4)
    assert check_resumable(config, saved, run_metadata(config, saved), tmp_path) == []
    other = split_batch_size(16, 2, 2)
    with pytest.raises(ConfigError, match=r"launch processes: 4 -> 2; launch accumulate: 2 -> 4.*allow_changes=true"):
        check_resumable(config, other, run_metadata(config, saved), tmp_path)
    config = Config(train=TrainConfig(allow_changes=True))
    assert len(check_resumable(config, other, run_metadata(config, saved), tmp_path)) == 2


def test_what_a_training_only_shows_of_its_validations_may_change(tmp_path):
    plan = split_batch_size(16, 2, 4)
    saved = run_metadata(Config(), plan)
    config = apply_overrides(Config(), ["eval.report=false", "eval.calibrate=false"])
    assert check_resumable(config, plan, saved, tmp_path) == []
    with pytest.raises(ConfigError, match=r"other settings \(eval\.max_detections: "):
        check_resumable(apply_overrides(config, ["eval.max_detections=50"]), plan, saved, tmp_path)


@pytest.mark.parametrize("objective", ["brs", "cross_entropy"])
def test_a_run_saved_with_the_mask_loss_that_follows_from_its_objective_goes_on(tmp_path, objective):
    overrides = ["model.name=mask_rcnn", f"model.roi.objective.loss={objective}"]
    if objective == "cross_entropy":
        overrides.append("model.roi.box_loss=l1")
    plan, config = split_batch_size(16, 2, 4), apply_overrides(Config(), overrides)
    for chosen, same in (("dice", objective == "brs"), ("binary_cross_entropy", objective != "brs")):
        saved = run_metadata(apply_overrides(config, [f"model.mask.loss={chosen}"]), plan)
        if same:
            assert check_resumable(config, plan, saved, tmp_path) == []
        else:
            with pytest.raises(ConfigError, match=rf"model.mask.loss: {chosen} -> "):
                check_resumable(config, plan, saved, tmp_path)


def test_settings_of_validation_and_of_training_alone_are_separate(tmp_path):
    saved, data = run_metadata(Config(), split_batch_size(16, 2, 4)), {"train": "a", "val": "b"}
    changes = {
        "eval.predict_with=roi": ["eval.predict_with: auto -> roi"],
        "model.roi.nms_iou=0.6": ["model.roi.nms_iou: 0.5 -> 0.6"],
        "model.roi.objective.weight=2": [],
        "model.matcher.cls=4": [],
        "model.backbone.activation_checkpointing=true": [],
        "model.roi.max_rois=64": [],
        "model.rpn.proposals=100": [],
        "model.rpn.test_proposals=100": ["model.rpn.test_proposals: 1000 -> 100"],
        "optim.lr=1": [],
    }
    for override, expected in changes.items():
        config = apply_overrides(Config(), [override])
        assert changes_of_measure(config, data, {**saved, "data": data}, tmp_path) == expected
        assert changes_of_measure(config, data, saved, tmp_path) == expected  # of an earlier version
    other = {"train": "c", "val": "d"}
    assert changes_of_measure(Config(), other, {**saved, "data": data}, tmp_path) == [
        f"the images or objects of {Config().data.val_json}"
    ]


def test_changed_data_are_named_if_they_are_allowed_and_other_classes_are_refused(tmp_path):
    """The weights' rows are those of the stored classes, in their order."""
    config, allowed = Config(), Config(train=TrainConfig(allow_changes=True))
    saved = {"data": {"train": "a", "val": "b"}, "classes": ["cat", "dog"]}
    assert require_same_data(config, saved, saved, tmp_path) == []
    assert require_same_data(config, saved, {}, tmp_path) == []  # of an earlier version
    other = {**saved, "data": {"train": "c", "val": "b"}}
    with pytest.raises(ConfigError, match=r"changed since .*allow_changes=true"):
        require_same_data(config, other, saved, tmp_path)
    assert require_same_data(allowed, other, saved, tmp_path) == [config.data.train_json]
    for started in (config, allowed):
        with pytest.raises(ConfigError, match=r"its classes or their order .*train\.init_from"):
            require_same_data(started, {**other, "classes": ["dog", "cat"]}, saved, tmp_path)


@pytest.mark.parametrize("flag", [None, "resume", "overwrite"])
def test_a_folder_with_a_run_is_refused_unless_allowed_and_stays_as_it_is(tmp_path, flag):
    state = tmp_path / "state" / "step-00000001" / "manifest.json"
    state.parent.mkdir(parents=True)
    state.touch()
    config = Config(output_dir=str(tmp_path), train=TrainConfig(**({flag: True} if flag else {})))
    if flag is None:
        with pytest.raises(ConfigError, match=r"holds a run already\. Add --resume"):
            check_output_dir(config)
    else:
        check_output_dir(config)
    assert state.exists()


def test_a_run_that_is_removed_leaves_nothing_that_would_be_mistaken_for_a_later_ones(tmp_path):
    """And nothing else is removed: what the user has put there stays."""
    names = "state/step-00000001/manifest.json best.safetensors last.safetensors nonfinite-7-process1.pt report.html "
    names += "evaluation/evaluation.json evaluation/results.json evaluation/curves.png evaluation/evaluated/12.png"
    own = "notes.txt evaluation/notes.txt evaluation/evaluated/first.png model.onnx"
    for name in (*names.split(), *own.split()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_run(tmp_path)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(own.split())
    remove_run(tmp_path / "empty")
