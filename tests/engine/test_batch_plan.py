"""The total batch is the recipe's, however many processes there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brs_detr.engine.batch_plan import plan_length, split_batch_size
from brs_detr.engine.config import TrainConfig


@given(per=st.integers(1, 8), accumulate=st.integers(1, 8), processes=st.integers(1, 8))
def test_the_parts_make_up_the_total(per, accumulate, processes):
    plan = split_batch_size(per * accumulate * processes, per, processes)
    assert (plan.per_device, plan.accumulate, plan.processes) == (per, accumulate, processes)


def test_without_a_limit_a_process_holds_its_full_share():
    assert split_batch_size(16, None, 4).per_device == 4
    assert str(split_batch_size(16, 2, 4)) == "total batch 16 = 4 processes x 2 images x 2 accumulated"


@pytest.mark.parametrize(
    ("most", "processes", "held"), [(4, 4, 4), (4, 8, 2), (3, 1, 2), (16, 16, 1), (5, 2, 4), (32, 1, 16)]
)
def test_a_process_holds_at_most_what_it_may_and_the_total_stays(most, processes, held):
    plan = split_batch_size(16, most, processes)
    assert plan.per_device == held
    assert plan.processes * plan.per_device * plan.accumulate == 16


def test_a_total_that_cannot_be_shared_is_refused_with_what_could():
    with pytest.raises(ValueError, match="multiple of 3"):
        split_batch_size(16, None, 3)


@given(batches=st.integers(1, 50), accumulate=st.integers(1, 8), steps=st.integers(1, 999))
def test_a_length_in_steps_is_the_fewest_full_epochs_that_reach_it(batches, accumulate, steps):
    length = plan_length(
        batches, split_batch_size(accumulate, 1, 1), TrainConfig(epochs=12, steps=steps, eval_every=None)
    )
    assert length.steps >= steps > length.steps - length.steps_per_epoch
    assert length.steps_per_epoch * accumulate >= batches > (length.steps_per_epoch - 1) * accumulate
    assert 1 <= length.eval_every <= length.epochs
    assert length.epochs // length.eval_every <= max(20, 2 * 20 - 1)


def test_without_steps_the_epochs_are_those_of_the_recipe():
    length = plan_length(10, split_batch_size(2, 1, 1), TrainConfig(epochs=12, eval_every=1))
    assert str(length) == "12 epochs of 5 optimizer steps, 60 in all; validation every epoch"
