"""A run that is killed and resumed ends exactly where the run that was never killed ends."""

import contextlib
import dataclasses
import random
import shutil
import signal
import sys
from operator import attrgetter

import pytest
import torch
from support import Killed

from brs_detr.engine.logging import read_metrics
from brs_detr.engine.state import find_fault, latest_state, read_metadata
from brs_detr.exit_codes import CheckpointError

ARGUMENTS = ("--ema", "0.9", "--save-every", "3", "--count", "9")  # 5 steps an epoch, saved in the middle of one


def losses(folder):
    """What a run logged, without its timings."""
    timings = ("images_per_s", "data_s", "step_s")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same_end(folder, reference, weights):
    for name in (
        "last.safetensors",
        "best.safetensors",
        f"state/{latest_state(folder / 'state')[0].name}/model.safetensors",
    ):
        ours, theirs = weights(folder / name), weights(reference / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert losses(folder) == losses(reference)


@pytest.fixture(scope="module")
def reference(program, tmp_path_factory):
    """The run that was never killed."""
    folder = tmp_path_factory.mktemp("reference")
    code, output = program.run(folder, *ARGUMENTS)
    assert code == 0, output
    return folder


def test_the_same_command_twice_gives_the_same_run(program, reference, tmp_path, weights):
    assert program.run(tmp_path, *ARGUMENTS)[0] == 0
    assert_same_end(tmp_path, reference, weights)


def resume(toy, folder):
    """A trainer placed where the run in the folder stands."""
    state, _ = latest_state(folder / "state")
    options = {"ema": 0.9, "save_every": 3, "count": 9}
    trainer, _ = toy.build(folder, resumed_at=None if state is None else read_metadata(state), **options)
    if state is not None:
        trainer.resume(state)
    return trainer


def test_what_is_restored_and_which_states_stay(toy, tmp_path):
    """Position, weights and averaged weights; of the states the last two; batches from where the epoch stood."""
    trainer, _ = toy.build(tmp_path, epochs=1, ema=0.9, save_every=1, count=9)
    trainer.fit()
    states = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert states == ["step-00000004", "step-00000005"]
    shutil.rmtree(tmp_path / "state" / states[1])
    resumed = resume(toy, tmp_path)
    assert (resumed.position.step, resumed.position.step_in_epoch, resumed.position.epoch) == (4, 4, 0)
    starts, epoch = [], resumed.batches.epoch
    resumed.schedule = trainer.schedule  # of one epoch
    resumed.batches.epoch = lambda *place: starts.append(place) or epoch(*place)
    resumed.train_epoch()
    assert starts == [(0, 8)]  # four steps of two batches each
    for ours, theirs in ((resumed.model, trainer.model), (resumed.ema.module, trainer.ema.module)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_the_average_is_restored_with_its_buffers(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, epochs=1, ema=0.9, model=toy.Normalized())
    trainer.fit()
    resumed, _ = toy.build(tmp_path, epochs=1, ema=0.9, model=toy.Normalized())
    resumed.resume(latest_state(tmp_path / "state")[0])
    ours, theirs, plain = (module.state_dict() for module in (resumed.ema.module, trainer.ema.module, trainer.model))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(ours["norm.running_mean"], plain["norm.running_mean"])  # an average of its own


def test_killed_twenty_times_in_a_row(toy, reference, tmp_path, weights, monkeypatch):
    """At random calls of everything that a run does: fetching, stepping, writing a file, renaming a folder."""
    moment, countdown = random.Random(1), [10**9]

    def mortal(function):
        def call(*arguments, **keywords):
            countdown[0] -= 1
            if countdown[0] < 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    for name in ("os.replace", "os.fsync", "shutil.rmtree", "hashlib.file_digest", "torch.manual_seed"):
        monkeypatch.setattr(name, mortal(attrgetter(name.partition(".")[2])(sys.modules[name.partition(".")[0]])))
    for _ in range(20):
        countdown[0] = 10**9
        trainer = resume(toy, tmp_path)
        countdown[0] = moment.randrange(1, 60)
        with contextlib.suppress(Killed):
            trainer.fit()
    countdown[0] = 10**9
    assert resume(toy, tmp_path).fit()
    assert_same_end(tmp_path, reference, weights)


def test_killed_at_random_moments(program, reference, tmp_path, weights):
    """SIGKILL, in the middle of an epoch or of writing, as often as it takes, then to the end."""
    moment = random.Random(0)
    kills = 0
    for _ in range(2):
        code, output = program.interrupt(
            tmp_path, "--resume", *ARGUMENTS, "--pause", 0.05, after=moment.uniform(0, 0.9)
        )
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), output
    assert kills > 0
    code, output = program.run(tmp_path, "--resume", *ARGUMENTS)
    assert code == 0, output
    assert_same_end(tmp_path, reference, weights)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_has_an_exit_code_of_its_own(program, reference, tmp_path, weights, number):
    code, output = program.interrupt(tmp_path, *ARGUMENTS, "--pause", 0.2, number=number, after=1.0)
    assert code == 75, output
    assert "checkpoint saved at step" in output
    assert latest_state(tmp_path / "state")[0] is not None
    assert program.run(tmp_path, "--resume", *ARGUMENTS)[0] == 0
    assert_same_end(tmp_path, reference, weights)


def test_a_stop_signal_during_validation_ends_after_it_without_another_step(toy, tmp_path):
    trainer, _ = toy.build(tmp_path)
    validate = trainer.validate

    def stopped(module):
        trainer.asked_to_stop = True
        return validate(module)

    trainer.validate = stopped
    assert not trainer.fit()
    assert (trainer.position.epoch, trainer.position.step_in_epoch) == (1, 0)
    assert read_metadata(latest_state(tmp_path / "state")[0])["step"] == trainer.position.step == 4


@pytest.mark.parametrize(
    ("former", "place", "now", "length", "expected"),
    [
        (1, (12, 1, 4), 2, "epochs", (1, 2)),  # 8 steps an epoch, then 4
        (2, (6, 1, 2), 1, "epochs", (1, 4)),
        (1, (13, 1, 5), 2, "epochs", (1, 2)),
        (1, (16, 1, 8), 2, "epochs", (1, 4)),  # before the validation of the epoch
        (1, (16, 2, 0), 2, "epochs", (2, 0)),
        (1, (13, 1, 5), 2, "steps", (3, 1)),
        (2, (6, 1, 2), 1, "steps", (0, 6)),
        (1, (16, 1, 8), 2, "steps", (3, 4)),
        (1, (16, 2, 0), 2, "steps", (4, 0)),
        (2, (0, 0, 0), 1, "steps", (0, 0)),
        (1, (13, 1, 5), 1, "steps", (1, 5)),
    ],
)
def test_with_another_number_of_steps_an_epoch_the_rate_goes_on_from_the_same_place(
    toy, tmp_path, capsys, former, place, now, length, expected
):
    """Of another total batch or training set: the schedule ends with the training, at a rate of almost 0."""
    before, _ = toy.build(tmp_path, accumulate=former, count=8)
    vars(before.position).update(zip(("step", "epoch", "step_in_epoch"), place, strict=True))
    before.save_state()
    epochs = 24 // (8 // now) if length == "steps" else 3
    trainer, _ = toy.build(tmp_path, epochs=epochs, accumulate=now, count=8)
    trainer.config = dataclasses.replace(trainer.config, steps=24 if length == "steps" else None)
    trainer.resume(latest_state(tmp_path / "state")[0])
    position, rates, step = trainer.position, [], trainer.step
    assert (position.step, position.epoch, position.step_in_epoch) == (place[0], *expected)
    assert ("another number of optimizer steps" in capsys.readouterr().out) == (former != now and place[0] > 0)
    trainer.step = lambda group: (step(group), rates.append(trainer.lr))[0]
    assert trainer.fit()
    done, total = expected[0] * (8 // now) + expected[1], epochs * (8 // now)
    assert rates == pytest.approx([1e-2 * trainer.schedule.factor(index) for index in range(done, total)])
    assert position.step == place[0] + total - done and position.epoch == epochs


def test_the_warm_up_does_not_begin_again_when_an_epoch_has_fewer_steps(toy, tmp_path):
    before, _ = toy.build(tmp_path, accumulate=1, count=8)
    vars(before.position).update(step=8, epoch=1)
    before.save_state()
    trainer, _ = toy.build(tmp_path, accumulate=8, count=8)
    trainer.resume(latest_state(tmp_path / "state")[0])
    trainer.step(list(trainer.batches.epoch(1)))
    whole = dataclasses.replace(trainer.schedule, warmup_steps=0)
    assert trainer.lr == pytest.approx(1e-2 * whole.factor(1))  # step 1 of 3, but 8 of 3 steps of the warm-up are done


@pytest.mark.parametrize("former", ["adamw", "sgd"])
def test_another_optimizer_begins_with_averages_of_its_own(toy, tmp_path, capsys, former):
    """Neither its first step nor its states depend on what the former one has kept."""
    names = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}
    later = "sgd" if former == "adamw" else "adamw"
    for name, epochs in ((former, 1), (later, 2)):
        trainer, _ = toy.build(tmp_path, epochs=epochs, optimizer=name)
        if name == later:
            trainer.resume(latest_state(tmp_path / "state")[0])
        assert trainer.fit()
        assert all(kept.keys() == names[name] for kept in trainer.optimizer.state.values())
        assert ("another kind. The averages of this one start at zero" in capsys.readouterr().out) == (name == later)


def test_a_finished_run_that_is_resumed_says_so(toy, tmp_path, capsys):
    assert toy.build(tmp_path, epochs=1)[0].fit()
    trainer, _ = toy.build(tmp_path, epochs=1)
    trainer.resume(latest_state(tmp_path / "state")[0])
    assert trainer.fit()
    assert "this run is complete: 1 of 1 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(toy, reference, tmp_path, weights, damage):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    newest, _ = latest_state(tmp_path / "state")
    victim = newest / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: len(content) // 2])
    used, complaints = latest_state(tmp_path / "state")
    assert used.name < newest.name
    assert len(complaints) == 1 and str(newest) in complaints[0] and victim.name in complaints[0]
    assert resume(toy, tmp_path).fit()
    assert_same_end(tmp_path, reference, weights)


def test_when_every_state_is_damaged_the_run_does_not_start_over(reference, tmp_path):
    shutil.copytree(reference / "state", tmp_path / "state")
    for state in (tmp_path / "state").iterdir():
        (state / "model.safetensors").write_bytes(b"")
        assert find_fault(state)
    with pytest.raises(CheckpointError, match="every saved state is damaged"):
        latest_state(tmp_path / "state")


def test_a_state_in_the_middle_of_being_written_is_no_state(reference, tmp_path):
    shutil.copytree(reference / "state", tmp_path / "state")
    newest, _ = latest_state(tmp_path / "state")
    newest.rename(newest.with_name(f".{newest.name}.partial"))
    assert latest_state(tmp_path / "state")[0].name < newest.name


def test_a_kill_while_a_state_of_the_same_step_is_written_leaves_one_of_them(toy, tmp_path, monkeypatch):
    """The last step of an epoch is saved twice: after the step and after the validation."""
    replace, renamed = shutil.os.replace, []

    def mortal(source, target):
        if target.name.startswith("step-"):
            renamed.append(target.name)
            if len(renamed) == moment:
                raise Killed
        replace(source, target)

    monkeypatch.setattr("os.replace", mortal)
    for moment in (2, 3, 4):
        folder = tmp_path / str(moment)
        renamed.clear()
        trainer, _ = toy.build(folder, epochs=1, count=6, save_every=3)
        with contextlib.suppress(Killed):
            trainer.fit()
        state, complaints = latest_state(folder / "state")
        assert read_metadata(state)["step"] == 3 and not complaints
        if moment == 4:  # not killed
            assert [path.name for path in (folder / "state").iterdir()] == ["step-00000003"]


def test_metrics_survive_a_kill_while_they_are_cut_to_the_state(toy, reference, tmp_path, monkeypatch):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    former = read_metrics(tmp_path / "metrics.jsonl")

    def killed(*_):
        raise Killed

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(Killed):
        resume(toy, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == former != []


def test_no_state_is_no_error(tmp_path):
    assert latest_state(tmp_path / "state") == (None, [])
