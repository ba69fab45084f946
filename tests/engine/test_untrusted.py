"""Nothing that a run or a user hands us is unpickled: a pickle planted in any file is refused and not executed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from brs_detr.commands.replay import read_saved
from brs_detr.config import ConfigError
from brs_detr.engine import state as state_module
from brs_detr.engine.checkpoint import load_weights
from brs_detr.engine.state import find_fault, latest_state, read_metadata
from brs_detr.exit_codes import CheckpointError
from brs_detr.models.backbones.weights_io import read_official, read_weights

EARLIER = ["custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "optimizer.bin", "random_states_0.pkl", "scaler.pt"]


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def planted(kind, mark, path):
    """Write a file that makes the folder `mark` when its pickle is executed."""
    if kind == "raw":
        path.write_bytes(pickle.dumps(Command(mark)))
    else:
        content = {"state_dict": Command(mark), "facts": {"config": Command(mark)}}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


def sign(state):
    """Make the manifest fit what lies in a state."""
    sums = {file.name: state_module._checksum(file) for file in state.iterdir() if file.name != "manifest.json"}
    content = {"files": sums, "facts": read_metadata(state)}
    (state / "manifest.json").write_text(json.dumps(content | {"sha256": state_module._sum_of(content)}))
    assert find_fault(state) is None


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The newest state of a run."""
    folder = tmp_path_factory.mktemp("finished")
    trainer, _ = toy.build(folder, ema=0.9, epochs=1)
    trainer.fit()
    return latest_state(folder / "state")[0]


def test_the_mark_is_made_where_a_pickle_is_executed(tmp_path):
    planted("raw", tmp_path / "mark", tmp_path / "file")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("kind", ["raw", "zip", "legacy"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_pickle_in_any_file_of_a_state_is_not_executed(toy, finished, tmp_path, kind, earlier):
    mark = tmp_path / "mark"
    names = [path.name for path in finished.iterdir() if path.name != "manifest.json"]
    for name in [*names, *EARLIER]:
        state = tmp_path / "state" / finished.name
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(finished, state)
        if earlier:  # read as a state of an earlier version is
            (state / "trainer.json").unlink()
            for other in EARLIER:
                planted(kind, mark, state / other)
        planted(kind, mark, state / name)
        sign(state)
        trainer, _ = toy.build(tmp_path / "run", ema=0.9, epochs=1)
        if earlier or name in names:
            with pytest.raises(CheckpointError):
                trainer.resume(state)
        else:
            trainer.resume(state)  # a file beside those that are read
        assert not mark.exists(), name


@pytest.mark.parametrize("kind", ["raw", "zip", "legacy"])
@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("best.safetensors", load_weights, CheckpointError),  # of eval.py, predict, train.init_from
        ("nonfinite-3.pt", read_saved, ConfigError),
        ("backbone.pth", read_weights, ValueError),
        ("backbone.safetensors", read_weights, Exception),
        ("official.pth", read_official, CheckpointError),
        ("official.safetensors", read_official, CheckpointError),
    ],
)
def test_a_pickle_in_a_file_of_the_users_is_not_executed(tmp_path, kind, name, read, error):
    planted(kind, tmp_path / "mark", tmp_path / name)
    with pytest.raises(error):
        read(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_nothing_in_the_package_unpickles():
    """Of pickle only the error is used; every torch.load reads tensors and plain values alone.

    Only what a loader's worker sends to its own parent is a pickle, as everything that multiprocessing sends is.
    """
    for path in Path(state_module.__file__).parents[1].rglob("*.py"):
        if path.name == "shared_memory.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not any(
            word in text for word in ("pickle.load", "Unpickler(", "weights_only=False", "load_state(str")
        ), path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


class Registered:
    """What an earlier version registered with Accelerate."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        raise AssertionError("this is of the past")


def test_a_state_of_an_earlier_version_goes_on_bit_for_bit(toy, tmp_path):
    uninterrupted, accelerator = toy.build(tmp_path / "uninterrupted", ema=0.9, epochs=2)
    uninterrupted.metadata["who"] = "toy"
    save = uninterrupted.save_state
    state = tmp_path / "state" / "step-00000003"

    def save_as_before():
        if uninterrupted.position.step == 3:
            position = {k: v for k, v in vars(uninterrupted.position).items() if k != "skipped_in_a_row"}
            pending = [(list(names), values.cpu()) for names, values in uninterrupted.meter.pending]
            average = uninterrupted.ema.module.state_dict()
            accelerator._custom_objects = [Registered({**position, "ema": average}), Registered({"pending": pending})]
            accelerator.save_state(str(state))
            accelerator._custom_objects = []
        save()

    uninterrupted.save_state = save_as_before
    uninterrupted.fit()
    assert {path.name for path in state.iterdir()} >= {"optimizer.bin", "custom_checkpoint_1.pkl", "model.safetensors"}
    sums = {file.name: state_module._checksum(file) for file in state.iterdir()}
    facts = {"who": "toy", "step": 3, "epoch": 0}
    (state / "manifest.json").write_text(json.dumps({"files": sums, "facts": facts}))
    assert latest_state(tmp_path / "state") == (state, [])
    resumed, _ = toy.build(tmp_path / "resumed", ema=0.9, epochs=2, resumed_at=read_metadata(state))
    resumed.resume(state)
    assert resumed.fit() and resumed.position == uninterrupted.position
    pairs = [(uninterrupted.model, resumed.model), (uninterrupted.ema.module, resumed.ema.module)]
    for ours, theirs in pairs:
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_sharded_state_of_an_earlier_version_is_refused_in_a_sentence(toy, finished, tmp_path):
    state = tmp_path / finished.name
    shutil.copytree(finished, state)
    (state / "pytorch_model_fsdp_0").mkdir()
    trainer, _ = toy.build(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"saved with FSDP by an earlier version.*train\.init_from"):
        trainer.resume(state)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "{", '{"position": {"step": "x"}, "meter": [], "scaler": null, "trained": []}']
)
def test_values_that_make_no_sense_are_refused_in_a_sentence(toy, finished, tmp_path, text):
    state = tmp_path / finished.name
    shutil.copytree(finished, state)
    (state / "trainer.json").write_text(text)
    trainer, _ = toy.build(tmp_path / "run", ema=0.9)
    with pytest.raises(CheckpointError, match=r"trainer\.json"):
        trainer.resume(state)


def test_another_detector_or_other_frozen_parts_are_named(toy, finished, tmp_path):
    other = toy.ToyDetector()
    other.head = torch.nn.Linear(8, 5)
    trainer, _ = toy.build(tmp_path / "wider", model=other)
    with pytest.raises(
        CheckpointError, match=r"2 tensors of the model do not match.*head\.bias \(4,\) there and \(5,\) here"
    ):
        trainer.resume(finished)
    frozen = toy.ToyDetector()
    frozen.backbone.requires_grad_(False)
    trainer, _ = toy.build(tmp_path / "frozen", model=frozen)
    with pytest.raises(CheckpointError, match=r"2 parameters are trained in only one.*backbone\.bias.*train\.freeze"):
        trainer.resume(finished)
