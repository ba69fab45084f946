"""Batches of an epoch from any position, and a run that stood at the very end of an epoch when it was killed."""

import pytest
import torch
from torch.utils.data import DataLoader

from brs_detr.data.loader import EpochBatches
from brs_detr.engine.state import latest_state, read_metadata


class Positions:
    """A batch sampler of single items that can be placed in an epoch."""

    def __init__(self, count):
        self.count, self.start = count, 0

    def set_epoch(self, epoch, start_batch=0):
        self.start = start_batch

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([[index] for index in range(self.start, self.count)])


def loader(items):
    return DataLoader(items, batch_sampler=Positions(len(items)), collate_fn=lambda batch: batch[0])


@pytest.mark.parametrize("start", [0, 3, 5, 6])
def test_an_epoch_starts_anywhere_and_past_its_end_it_is_empty(start):
    assert list(EpochBatches(loader(list(range(5)))).epoch(0, start)) == list(range(start, 5))


def test_a_state_of_the_last_step_of_an_epoch_with_ragged_accumulation_can_be_resumed(toy, tmp_path, monkeypatch):
    """Five batches, two a step: three steps, the last of one batch; killed after it, before the validation."""

    def build(folder, **options):
        trainer, accelerator = toy.build(folder, count=5, accumulate=2, save_every=3, epochs=2, **options)
        trainer.batches = EpochBatches(loader(list(toy.ToyBatches(5).epoch(0))))
        return trainer, accelerator

    def die():
        raise KeyboardInterrupt

    uninterrupted, _ = build(tmp_path / "uninterrupted")
    uninterrupted.fit()
    killed, _ = build(tmp_path / "killed")
    monkeypatch.setattr(killed, "evaluate", die)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    state, _ = latest_state(tmp_path / "killed" / "state")
    assert read_metadata(state)["step"] == 3 and read_metadata(state)["epoch"] == 0
    resumed, _ = build(tmp_path / "killed", resumed_at=read_metadata(state))
    resumed.resume(state)
    assert resumed.fit() and resumed.position.step == 6
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True)
    )
