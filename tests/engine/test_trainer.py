"""The training loop: accumulation, clipping, non-finite steps, averaging, early stopping."""

import dataclasses
import errno
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from brs_detr.engine import trainer as loop
from brs_detr.engine.distributed import seed_step
from brs_detr.engine.logging import LossMeter, RatioMeter, read_metrics
from brs_detr.engine.nonfinite import RunningStatistics
from brs_detr.engine.state import latest_state, read_metadata
from brs_detr.engine.storage import NonFiniteError
from brs_detr.losses import PredictionSet, RankingObjective
from brs_detr.losses.balance import EpochBalance
from brs_detr.ops.images import ImageBatch
from brs_detr.ops.targets import TargetError, check_targets


class Mean(nn.Module):
    """A loss that is a mean over images, without randomness: here accumulation must change nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images, targets):
        truth = torch.stack([target["boxes"].mean(0) for target in targets])
        return {"decoder.0.l1": (self.linear(images.pixels.float().mean((2, 3)) / 255) - truth).square().mean()}


def merged(batches):
    """The same images as one batch."""
    pixels = torch.cat([images.pixels for images, _ in batches])
    sizes = [(4, 4)] * len(pixels)
    return ImageBatch(pixels, sizes, sizes), [target for _, targets in batches for target in targets]


def one_step(toy, folder, group):
    """Parameters after one optimizer step over a group of batches."""
    trainer, accelerator = toy.build(folder)
    trainer.clip_norm = None  # clipped, a wrong factor would not show
    torch.manual_seed(1)
    trainer.model = Mean()
    trainer.optimizer = accelerator.prepare(
        torch.optim.SGD([{"params": trainer.model.parameters(), "initial_lr": 1.0}])
    )
    trainer.step(group)
    return torch.cat([p.flatten() for p in trainer.model.parameters()])


def test_accumulated_batches_equal_one_large_batch(toy, tmp_path):
    group = list(toy.ToyBatches(4).epoch(0))
    torch.testing.assert_close(one_step(toy, tmp_path, group), one_step(toy, tmp_path, [merged(group)]))


def test_a_step_of_the_run_depends_on_seed_step_and_process_only():
    draws = {}
    for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]:
        torch.rand(17)
        seed_step(*key)
        draws[key] = torch.rand(5)
        seed_step(*key)
        assert torch.equal(draws[key], torch.rand(5))
    values = torch.stack(list(draws.values()))
    assert len({tuple(row.tolist()) for row in values}) == 4


def test_every_step_draws_other_numbers_and_the_same_ones_when_repeated(toy, tmp_path):
    trainer, accelerator = toy.build(tmp_path)
    trainer.optimizer = accelerator.prepare(
        torch.optim.SGD([{"params": trainer.model.parameters(), "initial_lr": 0.0}])
    )
    group, losses = list(toy.ToyBatches(2).epoch(0)), []
    for step in (3, 4, 3):
        trainer.position.step = step
        trainer.step(group)
        losses.append(trainer.meter.mean(accelerator)["decoder.0.l1"])
    assert losses[0] == losses[2] != losses[1]


def test_a_step_is_seeded_by_the_seed_the_step_and_the_process_and_has_its_own_rate(toy, tmp_path, monkeypatch):
    trainer, _ = toy.build(tmp_path)
    seeds = []
    monkeypatch.setattr(loop, "seed_step", lambda *key: seeds.append(key))
    monkeypatch.setattr(type(trainer.accelerator), "process_index", 3)
    for step in (0, 2):  # the third is the first at the full rate
        trainer.position.step = trainer.position.step_in_epoch = step
        trainer.step(list(toy.ToyBatches(2).epoch(0)))
        assert trainer.lr == pytest.approx(1e-2 * trainer.schedule.factor(step))
    assert seeds == [(5, 0, 3), (5, 2, 3)]
    assert trainer.schedule.factor(0) < trainer.schedule.factor(1) < trainer.schedule.factor(2)


def test_a_step_leaves_no_gradient_to_the_next(toy, tmp_path):
    trainer, _ = toy.build(tmp_path)
    trainer.step(list(toy.ToyBatches(2).epoch(0)))
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_the_gradient_is_clipped_and_its_norm_logged(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, epochs=1)
    trainer.clip_norm = 1e-6
    before = [p.detach().clone() for p in trainer.model.parameters()]
    optimizer = torch.optim.SGD([{"params": trainer.model.parameters(), "initial_lr": 1.0}])
    trainer.optimizer = trainer.accelerator.prepare(optimizer)
    trainer.step(next(iter([list(toy.ToyBatches(2).epoch(0))])))
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(trainer.model.parameters(), before)))
    assert 0 < moved <= 1.01e-6
    assert trainer.meter.mean(trainer.accelerator)["gradient_norm"] > 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_what_reproduces_it(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, poison=(1, 4))
    with pytest.raises(NonFiniteError) as error:
        trainer.fit()
    text = str(error.value)
    ids = [target["image_id"] for _, targets in list(toy.ToyBatches(7).epoch(1))[4:5] for target in targets]
    assert "step 6:" in text  # 4 steps an epoch; batch 4 belongs to the third of the second
    assert "decoder.0.l1" in text and f"images {ids[0]}, {ids[1]}" in text and "nonfinite-6.pt" in text
    stored = torch.load(tmp_path / "nonfinite-6.pt", weights_only=True)
    model = toy.ToyDetector()
    model.load_state_dict(stored["weights"])
    seed_step(stored["seed"], stored["step"], 0)
    keys = ("pixels", "sizes", "original_sizes")
    losses = [model(ImageBatch(*(batch[key] for key in keys)), batch["targets"]) for batch in stored["batches"]]
    assert not all(math.isfinite(value.item()) for terms in losses for value in terms.values())


def test_a_batch_that_could_not_be_written_to_its_end_leaves_no_file_of_its_name(toy, tmp_path, monkeypatch):
    trainer, _ = toy.build(tmp_path, poison=(0, 0))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NonFiniteError, match=r"step 0: .*the batch is not saved .*not enough room on the disk"):
        trainer.fit()
    assert not list(tmp_path.glob("*nonfinite-*"))


def test_a_gradient_that_is_not_finite_is_named_by_its_parameter(toy, tmp_path):
    trainer, _ = toy.build(tmp_path)
    trainer.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"gradient of head\.weight"):
        trainer.fit()


def test_skipping_goes_on_and_counts(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, poison=(1, 4), on_nonfinite="skip")
    assert trainer.fit()
    assert trainer.position.skipped == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "skipped"] == [6]
    assert all(line["loss"] is None or math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")


def with_scaler(trainer, monkeypatch):
    """The trainer as under fp16, with the scaler on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator = trainer.accelerator
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: scaler.unscale_(trainer.optimizer.optimizer))
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    return scaler


def test_skipping_goes_on_under_a_gradient_scaler(toy, tmp_path, monkeypatch):
    trainer, _ = toy.build(tmp_path, poison=(1, 4), on_nonfinite="skip")
    with_scaler(trainer, monkeypatch)
    assert trainer.fit()
    assert trainer.position.skipped == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_an_overflow_is_the_scalers_business_but_not_for_ever(toy, tmp_path, monkeypatch):
    """A gradient that is not finite at any scale would otherwise be a training in which nothing is ever learned."""
    trainer, _ = toy.build(tmp_path, epochs=9)
    scaler = with_scaler(trainer, monkeypatch)  # from 4 to 1 in two steps
    trainer.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 2: .*gradient of head\.weight"):
        trainer.fit()
    assert trainer.position.step == 2 and scaler.get_scale() == 1.0


def test_gradients_are_unscaled_once_and_clipped_to_the_norm(toy, tmp_path, monkeypatch):
    """The scaler refuses to unscale twice; clipping sees true gradients, not scaled ones."""
    trainer, _ = toy.build(tmp_path)
    scaler = with_scaler(trainer, monkeypatch)
    trainer.clip_norm = 1e-3
    norms = []
    step = trainer.optimizer.step
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda: norms.append(nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])) or step(),
    )
    trainer.step(list(toy.ToyBatches(1).epoch(0)))
    assert norms[0] == pytest.approx(1e-3, rel=1e-2) and scaler.get_scale() == 4.0


def test_every_line_of_metrics_can_be_read_by_a_program(toy, tmp_path):
    trainer, _ = toy.build(tmp_path)
    trainer.fit()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12]
    for line in train:
        assert line["loss"] == pytest.approx(sum(line["terms"].values()))
        assert line.keys() >= {"epoch", "lr", "gradient_norm", "images_per_s", "data_s", "step_s"}
    assert [line["epoch"] for line in lines if line["kind"] == "val"] == [1, 2, 3]


class Ranked(nn.Module):
    """A linear map of each image to 40 logits; the first of all is a positive."""

    def __init__(self, loss):
        super().__init__()
        self.linear, self.head = nn.Linear(3, 40), nn.Module()
        self.head.objective = RankingObjective(loss)

    def forward(self, images, targets):
        logits = self.linear(images.pixels.float().mean((2, 3)) / 255).reshape(-1, 1)
        labels = torch.ones(len(logits), dtype=torch.int64)
        rows = torch.tensor([0])
        labels[rows] = 0
        giou = {"giou": logits[rows, 0].sigmoid()}
        terms = self.head.objective(
            PredictionSet(logits, labels, quality=torch.full((1,), 0.5), box_losses=giou, rows=rows)
        )
        return {f"head.{name}": term for name, term in terms.items()}


def test_the_ratio_of_gradients_is_logged_where_it_is_wanted(toy, tmp_path):
    """It is 1 with aLRP (Theorem 2), and is no part of the loss."""
    torch.manual_seed(0)
    trainer, _ = toy.build(tmp_path, model=Ranked("alrp"), gradient_ratio=True)
    trainer.fit()
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["gradient_ratio"]["head"] for line in lines] == pytest.approx([1] * 6, abs=1e-6)
    for line in lines:
        assert line["terms"].keys() == {"head.rank", "head.giou"}
        assert line["loss"] == pytest.approx(sum(line["terms"].values()))
    torch.manual_seed(0)
    trainer, _ = toy.build(tmp_path / "without", model=Ranked("alrp"))
    trainer.fit()
    without = [line for line in read_metrics(tmp_path / "without" / "metrics.jsonl") if line["kind"] == "train"]
    assert all("gradient_ratio" not in line for line in without)
    assert [line["loss"] for line in without] == [line["loss"] for line in lines]


def test_a_ratio_that_is_turned_off_on_resume_is_no_part_of_the_loss(toy, tmp_path):
    """The state may hold the sums of steps that were not reported yet."""
    trainer, _ = toy.build(tmp_path, model=Ranked("alrp"), gradient_ratio=True, save_every=1)
    trainer.train_epoch()
    trainer.meter.add({"head.rank": torch.tensor(1.0), **trainer.ratios.take(torch.tensor(0.0))})
    trainer.save_state()
    resumed, _ = toy.build(tmp_path, model=Ranked("alrp"), resumed_at={"step": trainer.position.step, "epoch": 1})
    resumed.resume(latest_state(tmp_path / "state")[0])
    assert any(name.startswith("negatives of ") for names, _ in resumed.meter.pending for name in names)
    resumed._report()
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (line["loss"], line["terms"]) == (1.0, {"head.rank": 1.0}) and "gradient_ratio" not in line


def test_the_ratio_is_null_without_a_positive():
    meter, losses = RatioMeter(Ranked("alrp")), LossMeter()
    losses.add({"head.rank": torch.zeros(()), **meter.take(torch.zeros(()))})
    means = losses.mean(Accelerator(cpu=True))
    assert meter.pop(means) == {"head": None}
    assert means.keys() == {"head.rank"}


def test_the_best_weights_are_those_of_the_best_validation(toy, tmp_path, weights):
    trainer, _ = toy.build(tmp_path)
    scores, seen = iter([0.3, 0.5, 0.4]), []

    def validate(module):
        seen.append({name: value.detach().clone() for name, value in module.state_dict().items()})
        return {"AP": next(scores)}

    trainer.validate = validate
    trainer.fit()
    for name, position in (("best", 1), ("last", 2)):
        stored = weights(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(stored[key], seen[position][key]) for key in stored)


def test_early_stopping_waits_for_the_given_number_of_validations(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, epochs=9)
    trainer.config = dataclasses.replace(trainer.config, patience=2)
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.6, 0.6])
    trainer.validate = lambda module: {"AP": next(scores)}
    trainer.fit()
    assert trainer.position.epoch == 4  # 0.4 and 0.5 are both not better than 0.5


def test_a_run_that_ended_early_trains_no_further_when_it_is_resumed(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, epochs=9)
    trainer.config = dataclasses.replace(trainer.config, patience=2)
    trainer.validate = lambda module: {"AP": 0.5}
    trainer.fit()
    state, _ = latest_state(tmp_path / "state")
    resumed, _ = toy.build(tmp_path, epochs=9, resumed_at=read_metadata(state))
    resumed.config = trainer.config
    resumed.resume(state)
    assert resumed.fit() and resumed.position.epoch == trainer.position.epoch == 3


def test_it_is_validated_every_so_many_epochs_and_at_the_end(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, epochs=5)
    trainer.length = dataclasses.replace(trainer.length, eval_every=2)
    trainer.fit()
    assert [line["epoch"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "val"] == [2, 4, 5]


def test_the_average_follows_the_weights_but_not_in_a_skipped_step(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, ema=0.9, poison=(0, 1), accumulate=1, on_nonfinite="skip")
    trainer.position.step = 7
    average = trainer.ema.module.head.weight
    average.data.add_(1.0)  # so that the weights before the step would show in it
    sound, poisoned = list(toy.ToyBatches(2, poison=(0, 1)).epoch(0))
    former, decay = average.detach().clone(), trainer.ema.get_decay(7)
    trainer.step([sound])
    expected = decay * former + (1 - decay) * trainer.model.head.weight
    assert 0 < decay < 1 and not torch.equal(average, former)
    torch.testing.assert_close(average, expected)
    trainer.step([poisoned])
    assert torch.equal(average, trainer.ema.module.head.weight) and trainer.position.skipped == 1
    torch.testing.assert_close(average, expected)


def test_the_averaged_weights_are_what_is_validated_and_saved(toy, tmp_path, weights):
    trainer, _ = toy.build(tmp_path, ema=0.9)
    validated = []
    trainer.validate = lambda module: validated.append(module) or {"AP": 0.0}
    trainer.fit()
    assert validated[0] is trainer.ema.module
    stored, raw = weights(tmp_path / "last.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(stored[key], value) for key, value in trainer.ema.module.state_dict().items())
    assert any(not torch.equal(stored[key], raw[key]) for key in raw)


def test_figures_of_fewer_images_say_so_in_their_own_line(toy, tmp_path, capsys):
    trainer, _ = toy.build(tmp_path, epochs=1)
    trainer.validate = lambda module: {"AP": 0.25, "images": 4998, "images_left_out": 2}
    trainer.fit()
    assert "epoch 1/1 validation: AP 0.2500 on 4,998 of 5,000 images (best so far)" in capsys.readouterr().out
    line = next(line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "val")
    assert (line["images"], line["images_left_out"]) == (4998, 2)


def test_the_best_head_is_named_in_the_log_and_in_the_metrics(toy, tmp_path, capsys, weights):
    trainer, _ = toy.build(tmp_path, epochs=1)
    trainer.validate = lambda module: {"AP": 0.25, "decoder_AP": 0.125, "roi_AP": 0.25, "head": "roi"}
    trainer.fit()
    said = "epoch 1/1 validation: AP 0.2500 decoder_AP 0.1250 roi_AP 0.2500, best head roi (best so far)"
    assert said in capsys.readouterr().out and said in (tmp_path / "log.txt").read_text()
    line = next(line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "val")
    assert line["head"] == "roi"


def test_a_head_without_any_loss_in_an_epoch_is_named(toy, tmp_path, capsys):
    trainer, _ = toy.build(tmp_path, epochs=1)
    forward = trainer.model.forward
    nothing = {"roi.rank": torch.zeros(()), "roi.giou": torch.zeros(())}
    trainer.model.forward = lambda *inputs: {**forward(*inputs), **nothing}
    assert trainer.fit()
    said = capsys.readouterr().out
    assert "warning: roi loss was zero throughout epoch 1" in said


def test_an_epoch_that_was_entered_in_its_middle_names_no_head(toy, tmp_path, capsys):
    """The steps before the resume may have had a loss."""
    trainer, _ = toy.build(tmp_path, epochs=1)
    forward = trainer.model.forward
    trainer.model.forward = lambda *inputs: {**forward(*inputs), "roi.rank": torch.zeros(())}
    trainer.position.step = trainer.position.step_in_epoch = 2
    assert trainer.fit()
    assert "warning" not in capsys.readouterr().out


def test_heads_with_a_loss_are_not(toy, tmp_path, capsys):
    assert toy.build(tmp_path, epochs=1)[0].fit()
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("aside", [False, True])
def test_a_skipped_step_leaves_no_trace_in_running_statistics(toy, tmp_path, weights, capsys, aside):
    """The first batch of the group is sound and the second poisoned: both are undone."""
    options = {"on_nonfinite": "skip", "ema": 0.9, "poison": (0, 3), "accumulate": 2}
    trainer, _ = toy.build(tmp_path, model=toy.Normalized(aside), **options)
    step, seen = trainer.step, []

    def watched(group):
        before = [buffer.clone() for buffer in trainer.model.buffers()]
        step(group)
        same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.buffers(), strict=True))
        seen.append(same)

    trainer.step = watched
    assert trainer.fit() and trainer.position.skipped == 1
    assert [number for number, same in enumerate(seen) if same] == [1]
    assert trainer.model.norm.num_batches_tracked == 3 * 7 - 2
    for module in (trainer.model, trainer.ema.module):
        assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    for name in ("best", "last"):
        assert all(torch.isfinite(value).all() for value in weights(tmp_path / f"{name}.safetensors").values())
    saved = torch.load(tmp_path / "nonfinite-1.pt", weights_only=True)["weights"]
    assert all(torch.isfinite(value).all() for value in saved.values())
    said = capsys.readouterr().out
    assert ("running statistics norm.running_mean are not" if aside else "loss term decoder.0.l1 is not") in said


def test_a_skipped_step_is_not_counted_by_the_balance_of_alrp():
    """Another head's loss may have been the one that was not finite."""
    model = nn.Sequential(nn.Linear(1, 1), EpochBalance(period=2))
    statistics = RunningStatistics(model)
    parts = torch.tensor(1.0), torch.tensor(3.0)
    model[1](*parts)
    statistics.keep()
    model[1](*parts)  # the second one changes the factor
    assert model[1].factor != 50 and not model[1].sums.any()
    statistics.restore()
    assert model[1].factor == 50 and model[1].sums.tolist() == [1, 3, 1]


def always_poisoned(trainer):
    """Every batch holds a NaN."""
    epoch = trainer.batches.epoch

    def poisoned(*place):
        for images, targets in epoch(*place):
            targets[0]["boxes"][0, 0] = math.nan
            yield images, targets

    trainer.batches.epoch = poisoned


@pytest.mark.parametrize(("most", "steps"), [(5, 5), (20, 12)])
def test_a_run_that_only_skips_does_not_end_well(toy, tmp_path, most, steps):
    """Three epochs of four steps: fewer than twenty, of which not one was taken."""
    trainer, _ = toy.build(tmp_path, on_nonfinite="skip", max_skipped=most)
    always_poisoned(trainer)
    with pytest.raises(NonFiniteError, match=rf"{steps} steps in a row were skipped"):
        trainer.fit()
    assert trainer.position.skipped == steps


def test_a_step_that_is_taken_resets_the_count(toy, tmp_path):
    trainer, _ = toy.build(tmp_path, on_nonfinite="skip", max_skipped=2, poison=(0, 0), accumulate=1)
    trainer.batches.poison = None
    epoch = trainer.batches.epoch

    def every_other(*place):
        for index, (images, targets) in enumerate(epoch(*place)):
            if index % 2:
                targets[0]["boxes"][0, 0] = math.nan
            yield images, targets

    trainer.batches.epoch = every_other
    assert trainer.fit() and trainer.position.skipped == 9


def test_best_weights_that_were_deleted_are_missed(toy, tmp_path, capsys, weights):
    trainer, _ = toy.build(tmp_path)
    scores = iter([0.5, 0.3, 0.2])

    def validate(module):
        (tmp_path / "best.safetensors").unlink() if trainer.position.epoch == 2 else None
        return {"AP": next(scores)}

    trainer.validate = validate
    trainer.fit()
    assert "best.safetensors is gone, whose AP was 0.5000" in capsys.readouterr().out
    assert trainer.position.best == 0.2 and (tmp_path / "best.safetensors").is_file()
    (tmp_path / "best.safetensors").unlink()
    resumed, _ = toy.build(tmp_path, epochs=4, resumed_at=read_metadata(latest_state(tmp_path / "state")[0]))
    resumed.resume(latest_state(tmp_path / "state")[0])
    resumed.validate = lambda module: {"AP": 0.1}
    resumed.fit()
    assert "best.safetensors is gone, whose AP was 0.2000" in capsys.readouterr().out
    assert resumed.position.best == 0.1 and (tmp_path / "best.safetensors").is_file()


def test_a_run_stopped_early_whose_best_weights_were_deleted_goes_on(toy, tmp_path, capsys):
    trainer, _ = toy.build(tmp_path, epochs=6)
    trainer.config = dataclasses.replace(trainer.config, patience=2)
    scores = iter([0.5, 0.3, 0.2, 0.1, 0.1, 0.1])
    trainer.validate = lambda module: {"AP": next(scores)}
    trainer.fit()
    assert trainer.position.epoch == 3 and "Early stopping" in capsys.readouterr().out
    state = latest_state(tmp_path / "state")[0]
    (tmp_path / "best.safetensors").unlink()
    resumed, _ = toy.build(tmp_path, epochs=6, resumed_at=read_metadata(state))
    resumed.config, resumed.validate = trainer.config, trainer.validate
    resumed.resume(state)
    resumed.fit()
    assert "best.safetensors is gone" in capsys.readouterr().out
    assert resumed.position.epoch == 6 and (tmp_path / "best.safetensors").is_file()


def test_targets_are_checked_before_the_step_and_a_wrong_one_ends_the_training(toy, tmp_path):
    trainer, _ = toy.build(tmp_path)
    seen = []

    def check(targets):
        seen.append([target["image_id"] for target in targets])
        assert all(target["labels"].device.type == "cpu" for target in targets)
        if len(seen) == 3:
            check_targets([{**targets[0], "labels": torch.tensor([0, 5])}], 3)

    trainer.check_targets = check
    with pytest.raises(TargetError, match=r"label of image \d+: 5 is out of range for 3 classes"):
        trainer.fit()
    assert trainer.position.step == 1 and len(seen) == 3  # two batches a step
