"""A disk that is full, limited or gone: one sentence, nothing half written, the former files as they were."""

import contextlib
import errno
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from brs_detr.engine import state as state_module
from brs_detr.engine import tensor_file
from brs_detr.engine.checkpoint import Weights, find_weights, load_weights, save_weights
from brs_detr.engine.logging import RunLog, read_metrics
from brs_detr.engine.state import find_fault, latest_state, read_metadata, tidy
from brs_detr.engine.storage import NonFiniteError, StorageError, remove_partials, write_file, write_text
from brs_detr.engine.tensor_file import read_tensors, write_tensors
from brs_detr.exit_codes import CheckpointError
from brs_detr.run.training import WRITTEN

WEIGHTS = Weights({"a": torch.arange(6.0).view(2, 3)}, ["cat", "dog"], [3, 90], {"seed": 1}, {"epoch": 4})


@contextlib.contextmanager
def file_limit(size):
    """No file may grow beyond so many bytes, as under `ulimit -f`."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_state_that_cannot_be_written_leaves_the_former_ones(toy, tmp_path):
    trainer, _ = toy.build(tmp_path)
    assert trainer.fit()
    before = content(tmp_path / "state")
    trainer.position.step += 1
    with file_limit(1000), pytest.raises(StorageError) as error:
        trainer.save_state()
    assert str(error.value).startswith(f"{tmp_path / 'state'}: cannot be written to: a file would become larger")
    assert "ulimit -f" in str(error.value) and " free" in str(error.value) and error.value.errno == errno.EFBIG
    assert content(tmp_path / "state") == before
    trainer.save_state()
    assert read_metadata(latest_state(tmp_path / "state")[0])["step"] == trainer.position.step


@pytest.mark.parametrize("enough", [True, False])
def test_on_a_full_disk_the_oldest_state_makes_room_where_that_is_enough(toy, tmp_path, monkeypatch, enough):
    trainer, _ = toy.build(tmp_path)
    trainer.fit()
    folder = tmp_path / "state"
    newest = latest_state(folder)[0]
    usage = SimpleNamespace(free=0 if enough else -(10**6), total=10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    def crowded(path, write):
        return full() if len(list(folder.glob("step-*"))) > 1 else write_file(path, write)

    monkeypatch.setattr(tensor_file, "write_file", crowded)
    trainer.position.step += 1
    before = content(folder)
    if enough:
        trainer.save_state()
        assert [path.name for path in sorted(folder.iterdir())] == [newest.name, f"step-{trainer.position.step:08d}"]
        assert "not enough room on the disk. Removed step-" in (tmp_path / "log.txt").read_text()
    else:
        with pytest.raises(StorageError, match=r"not enough room on the disk \(.* needed\)"):
            trainer.save_state()
        assert content(folder) == before


def test_half_written_and_half_deleted_states_go_and_are_not_counted(toy, tmp_path):
    folder = tmp_path / "state"
    trainer, _ = toy.build(tmp_path, epochs=2)
    trainer.fit()
    oldest = sorted(folder.iterdir())[0]
    shutil.copytree(oldest, folder / "step-00000005")
    (folder / "step-00000005" / "model.safetensors").unlink()  # an earlier version deleted files one by one
    (folder / "step-00000007").mkdir()
    shutil.copytree(oldest, folder / "step-00000099")  # damaged, from which the run went back
    (folder / "step-00000099" / "manifest.json").write_text("[]")
    for name in (".step-00000004.partial", ".step-00000002.deleted"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    trainer.position.step += 1
    trainer.save_state()
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000008", "step-00000009"]
    assert all(find_fault(state) is None for state in folder.iterdir())


def test_a_state_whose_deletion_was_interrupted_is_no_state(toy, tmp_path, monkeypatch):
    trainer, _ = toy.build(tmp_path)
    trainer.fit()
    folder = tmp_path / "state"
    removed = []

    def interrupted(path, **_):
        if path.exists():  # as a kill in the middle of it
            removed.append(path.name)
            next(path.iterdir()).unlink()

    monkeypatch.setattr(state_module.shutil, "rmtree", interrupted)
    trainer.position.step += 1
    trainer.save_state()
    monkeypatch.undo()
    assert removed and all(find_fault(state) is None for state in state_module.states(folder))
    assert len(state_module.states(folder)) == 2
    tidy(folder)
    assert len(list(folder.iterdir())) == 2


def test_a_log_that_cannot_be_written_ends_no_run(toy, tmp_path, capsys):
    _, accelerator = toy.build(tmp_path)
    log = RunLog(tmp_path, accelerator)
    log.begin()
    log.say("before" * 10)
    log.metrics("train", 1, {"loss": 1.0})
    for size in (20, 70):
        with file_limit(size):
            log.say("on a full disk")
            log.metrics("train", 2, {"loss": 2.0})
    error = capsys.readouterr().err
    assert error.count("log.txt misses lines") == 1 and error.count("metrics.jsonl misses lines") == 1
    log.say("after")
    log.metrics("train", 3, {"loss": 3.0})
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].endswith(" after")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")][-1] == 3


def test_a_tracker_that_fails_ends_no_run(toy, tmp_path, capsys, monkeypatch):
    trainer, accelerator = toy.build(tmp_path, epochs=1)
    monkeypatch.setattr(accelerator, "log", full)
    monkeypatch.setattr(accelerator, "end_training", full)
    assert trainer.fit()
    trainer.log.end()
    assert capsys.readouterr().err.count("train.trackers: metrics are missing (OSError:") == 1


def test_an_output_folder_removed_during_the_run_is_created_again(toy, tmp_path, capsys):
    folder = tmp_path / "run"
    trainer, _ = toy.build(folder)
    validate, times = trainer.validate, []

    def removing(module):
        times.append(0)
        if len(times) == 2:
            shutil.rmtree(folder)
        return validate(module)

    trainer.validate = removing
    assert trainer.fit()
    assert f"{folder}: was removed while the run was writing to it" in capsys.readouterr().err
    assert latest_state(folder / "state")[0].name == "step-00000012"
    assert (folder / "best.safetensors").is_file() and (folder / "last.safetensors").is_file()


def test_two_processes_may_write_the_same_file_at_the_same_time(tmp_path):
    """As `eval` and a training that reports its best validation: each file is complete, the last one stays."""
    path = tmp_path / "report.html"

    def write(file):
        file.write(b"first")
        write_file(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"
        file.write(b", complete")

    write_file(path, write)
    assert content(tmp_path) == {Path("report.html"): b"first, complete"}


def test_only_unfinished_files_of_a_training_are_removed(tmp_path):
    """Those of an earlier version too; not what an export or an evaluation is writing into the same folder."""
    weights = tmp_path / "best.safetensors"
    with pytest.raises(SystemExit):
        write_file(weights, lambda file: sys.exit())
    assert content(tmp_path) == {}

    def killed(file):
        shutil.copy(file.name, f"{file.name}-copy")  # what a kill would leave

    write_file(weights, killed)
    [left] = tmp_path.glob("*-copy")
    left.rename(tmp_path / left.name.removesuffix("-copy"))
    (tmp_path / ".last.safetensors.partial").touch()
    others = [".model.onnx.partial", ".best.safetensors.onnx.partial", ".report.html.01234567.partial"]
    for name in others:
        (tmp_path / name).touch()
    remove_partials(tmp_path, WRITTEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "best.safetensors"])


def test_files_get_the_permissions_of_the_umask(tmp_path):
    former = os.umask(0o027)
    try:
        save_weights(tmp_path / "w.safetensors", WEIGHTS)
    finally:
        os.umask(former)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


def test_weights_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    save_weights(tmp_path / "w.safetensors", WEIGHTS)

    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)\. Ask its owner"):
        load_weights(tmp_path / "w.safetensors")
    monkeypatch.setattr("pathlib.Path.is_file", denied)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        find_weights(tmp_path)


def test_a_flipped_bit_anywhere_in_a_weights_file_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS)
    intact = path.read_bytes()
    silent = []
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            loaded = load_weights(path)
        except CheckpointError:
            continue
        same = torch.equal(loaded.tensors["a"], WEIGHTS.tensors["a"])
        silent += [] if same and (loaded.classes, loaded.config) == (WEIGHTS.classes, WEIGHTS.config) else [place]
    assert silent == []


def test_any_reader_of_safetensors_reads_every_type(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(kind): torch.tensor([[0, 1, 1]]).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.rand(2, 3).T}
    write_tensors(tmp_path / "t.safetensors", tensors, {"a": "ü"})
    for found in (load_file(tmp_path / "t.safetensors"), read_tensors(tmp_path / "t.safetensors")[0]):
        assert found.keys() == tensors.keys()
        assert all(found[key].dtype == t.dtype and torch.equal(found[key], t) for key, t in tensors.items())


def metadata(**changes):
    values = {"brs_detr": {"classes": ["cat"], "category_ids": [3]}, "config": {}, "extra": {}} | changes
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def test_a_weights_file_without_a_checksum_still_loads(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata=metadata())
    assert load_weights(tmp_path / "old.safetensors").classes == ["cat"]


@pytest.mark.parametrize(
    "changes",
    [
        {"brs_detr": "{"},
        {"brs_detr": []},
        {"brs_detr": {"classes": ["cat"], "category_ids": [3, 4]}},
        {"brs_detr": {"classes": "cat", "category_ids": [3, 4, 5]}},
        {"brs_detr": {"classes": [1], "category_ids": [1]}},
        {"brs_detr": {"classes": ["cat"], "category_ids": ["1"]}},
        {"brs_detr": {"classes": [], "category_ids": []}},
        {"config": [1]},
        {"config": "[" * 100_000},
        {"extra": "null"},
        {"extra": {"thresholds": [1]}},
        {"extra": {"thresholds": {"cat": "high"}}},
    ],
)
def test_odd_metadata_is_refused_in_a_sentence(tmp_path, changes):
    save_file({"a": torch.ones(2)}, tmp_path / "odd.safetensors", metadata=metadata(**changes))
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: its "):
        load_weights(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("beginning", [b"", b"\xff" * 8, (10**12).to_bytes(8, "little"), b"\x05" + bytes(7) + b"hello"])
def test_no_safetensors_file_at_all(tmp_path, beginning):
    (tmp_path / "w.safetensors").write_bytes(beginning)
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path / "w.safetensors")


def test_weights_that_are_not_finite_are_neither_written_nor_used(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS)
    poisoned = {"good": torch.ones(2), "bn.running_var": torch.tensor([1.0, float("nan")])}
    with pytest.raises(NonFiniteError, match=r"w\.safetensors: is not written: bn\.running_var held NaN"):
        save_weights(path, Weights(poisoned, ["cat"], [1]))
    assert load_weights(path).classes == ["cat", "dog"]
    save_file(poisoned, path, metadata=metadata())
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN .*bn\.running_var"):
        load_weights(path)


@pytest.mark.parametrize("part", ["model", "average", "optimizer"])
def test_a_state_with_numbers_that_are_not_finite_is_not_written(toy, tmp_path, part):
    trainer, _ = toy.build(tmp_path, ema=0.9, epochs=1)
    trainer.fit()
    before = content(tmp_path / "state")
    weight = {"average": trainer.ema.module.head.weight}.get(part, trainer.model.head.weight)
    victim = trainer.optimizer.state[weight]["exp_avg"] if part == "optimizer" else weight.data
    victim[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"head\.weight held NaN or infinite"):
        trainer.save_state()
    assert content(tmp_path / "state") == before


def test_a_manifest_covers_itself(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, epochs=1)
    trainer.fit()
    state = latest_state(tmp_path / "state")[0]
    path = state / "manifest.json"
    intact, facts = path.read_bytes(), read_metadata(state)
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)
        assert find_fault(state) is not None or read_metadata(state) == facts, damaged
    for odd in ("[]", "null", '{"files": [], "facts": {}}', '{"files": {"a": 1}, "facts": {"step": 1, "epoch": 1}}'):
        path.write_text(odd)
        assert "manifest.json" in find_fault(state)
    plain = json.loads(intact)
    del plain["sha256"]  # of an earlier version
    path.write_text(json.dumps(plain))
    assert find_fault(state) is None


def test_odd_lines_of_metrics_are_passed_over(toy, tmp_path):
    good = b'{"kind": "train", "step": 1, "loss": 1.0}\n'
    odd = b'\xff\xfe\n[1]\n{"step": 1}\n{"kind": "val", "step": 1}\n{"kind": "train", "step": "x"}\n' + b"[" * 99_999
    (tmp_path / "metrics.jsonl").write_bytes(good + odd + b"\n" + good)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 1.0]
    toy.build(tmp_path, resumed_at={"step": 4, "epoch": 1})
    assert (tmp_path / "metrics.jsonl").read_bytes() == good + good


def test_text_that_cannot_be_written_leaves_the_former_text(tmp_path):
    write_text(tmp_path / "config.yaml", "short")
    with file_limit(10), pytest.raises(StorageError):
        write_text(tmp_path / "config.yaml", "longer than ten bytes")
    assert content(tmp_path) == {(tmp_path / "config.yaml").relative_to(tmp_path): b"short"}


@pytest.mark.parametrize("fault", ["best weights", "validation"])
def test_a_failed_validation_loses_no_step(toy, tmp_path, weights, fault):
    """The best weights cannot be written, or the detector runs out of memory: both are repeated after a resume."""
    names = ("last.safetensors", "best.safetensors")
    reference, _ = toy.build(tmp_path / "never", save_every=None)
    reference.fit()
    trainer, _ = toy.build(tmp_path / "failed", save_every=None)
    save, validate = trainer.save, trainer.validate

    def exhausted(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def save_or_fail(name, *arguments):
        if name == names[1] and trainer.position.epoch == 2:
            raise StorageError(errno.ENOSPC, "not enough room on the disk")
        save(name, *arguments)

    if fault == "validation":
        trainer.validate = lambda module: exhausted(module) if trainer.position.epoch == 2 else validate(module)
    else:
        trainer.save = save_or_fail
    with pytest.raises(torch.OutOfMemoryError if fault == "validation" else StorageError):
        trainer.fit()
    states = tmp_path / "failed" / "state"
    assert [path.name for path in sorted(states.iterdir())] == ["step-00000004", "step-00000008"]
    assert "validation failed: state saved at step 8" in (tmp_path / "failed" / "log.txt").read_text()
    facts = read_metadata(latest_state(states)[0])
    resumed, _ = toy.build(tmp_path / "failed", save_every=None, resumed_at=facts)
    resumed.resume(latest_state(states)[0])
    assert (resumed.position.epoch, resumed.position.step_in_epoch, resumed.position.worse) == (1, 4, 0)
    assert resumed.fit()
    for name in names:
        ours, theirs = weights(tmp_path / "failed" / name), weights(tmp_path / "never" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    logged = [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("failed", "never")]
    assert [(line["kind"], line["step"]) for line in logged[0]] == [(line["kind"], line["step"]) for line in logged[1]]


def test_an_error_that_cannot_be_followed_by_a_state_is_still_the_one_reported(toy, tmp_path, monkeypatch):
    trainer, _ = toy.build(tmp_path, save_every=None)
    trainer.validate = lambda module: 1 / 0
    monkeypatch.setattr(tensor_file, "write_file", full)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
