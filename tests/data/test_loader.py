"""Every image once per epoch, equally many steps on every process, and a resumed epoch goes on where it was."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brs_detr.data.coco import CocoDetection
from brs_detr.data.loader import EvalBatches, TrainBatches, build_eval_loader, build_train_loader
from brs_detr.data.transforms import EvalTransforms, TrainTransforms


def sizes_of(wide, tall):
    return np.array([(10, 20)] * wide + [(20, 10)] * tall)


def batches_of(sizes, batch_size, world_size, epoch=0, start=0, seed=0):
    ranks = []
    for rank in range(world_size):
        sampler = TrainBatches(sizes, batch_size, seed, rank, world_size)
        sampler.set_epoch(epoch, start)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == max(0, len(sampler) - start)
    return ranks


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_image_once_full_batches_equal_steps(wide, tall, batch_size, world_size, epoch):
    if wide + tall == 0:
        return
    sizes = sizes_of(wide, tall)
    ranks = batches_of(sizes, batch_size, world_size, epoch)
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert all(len(batch) == batch_size and {e for _, e in batch} == {epoch} for batch in batches)
    counts = Counter(index for batch in batches for index, _ in batch)
    assert set(counts) == set(range(len(sizes)))
    assert sum(counts.values()) - len(sizes) < batch_size * world_size  # no more repeats than the last step needs


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_do_not_mix_orientations_but_at_the_end(world_size):
    sizes = sizes_of(37, 26)
    mixed = [
        batch
        for rank in batches_of(sizes, 4, world_size)
        for batch in rank
        if len({index < 37 for index, _ in batch}) == 2
    ]
    assert len(mixed) <= 1 + world_size - 1


def test_epochs_and_seeds_shuffle_differently_and_repeat_exactly():
    sizes = sizes_of(20, 20)
    first = batches_of(sizes, 4, 1, epoch=1)
    assert first == batches_of(sizes, 4, 1, epoch=1)
    indices = lambda ranks: [[i for i, _ in batch] for batch in ranks[0]]  # noqa: E731
    assert indices(first) != indices(batches_of(sizes, 4, 1, epoch=2))
    assert indices(first) != indices(batches_of(sizes, 4, 1, epoch=1, seed=1))


@pytest.mark.parametrize("start", [0, 1, 5, 10, 99])
def test_a_resumed_epoch_is_the_tail_of_the_complete_one(start):
    sizes = sizes_of(21, 20)
    complete, resumed = batches_of(sizes, 4, 2, 3), batches_of(sizes, 4, 2, 3, start)
    assert [rank[start:] for rank in complete] == resumed


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_evaluation_shows_each_image_exactly_once(count, batch_size, world_size, group):
    shapes = [(index % 3, 1) for index in range(count)] if group else None
    batches = [b for rank in range(world_size) for b in EvalBatches(count, batch_size, rank, world_size, shapes)]
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    if group:
        assert all(len({shapes[index] for index in batch}) == 1 for batch in batches)


@pytest.fixture()
def path(tmp_path, write_dataset):
    sizes = [(40, 60), (60, 40), (40, 60), (44, 50), (60, 40), (80, 120), (50, 50)]
    return write_dataset(tmp_path, sizes=sizes, boxes=[[(1, 2, 3, 20, 20), (17, 8, 9, 25, 25)] for _ in sizes])


def train_loader(path, workers, **options):
    dataset = CocoDetection(
        path,
        path.parent / "images",
        train=True,
        transforms=TrainTransforms(short_sides=(32, 48), long_side=80, crop_short_sides=(40,), crop_size=(20, 40)),
    )
    return build_train_loader(dataset, batch_size=2, workers=workers, **options)


def drain(loader, epoch, start=0):
    loader.batch_sampler.set_epoch(epoch, start)
    return [
        (images.pixels, [t["boxes"] for t in targets], [t["image_id"] for t in targets]) for images, targets in loader
    ]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and all(map(torch.equal, x[1], y[1])) and x[2] == y[2]
        for x, y in zip(a, b, strict=True)
    )


def test_batches_do_not_depend_on_workers_nor_on_resuming(path):
    alone, helped = train_loader(path, 0), train_loader(path, 2)
    torch.manual_seed(5)
    epochs = [drain(alone, epoch) for epoch in (0, 1)]
    assert torch.initial_seed() == 5 and not same(*epochs)
    for epoch in (0, 1):
        assert same(epochs[epoch], drain(helped, epoch))  # the second time in the same, living workers
    assert same(epochs[1][2:], drain(train_loader(path, 2), 1, start=2))


def test_loading_leaves_the_global_random_state_alone(path):
    state = torch.get_rng_state()
    drain(train_loader(path, 1), 0)
    drain(train_loader(path, 0), 0)
    assert torch.equal(state, torch.get_rng_state())


def test_batch_is_zero_padded_uint8_with_targets(path):
    images, targets = next(iter(train_loader(path, 0)))
    assert images.pixels.dtype == torch.uint8 and len(images) == len(targets) == 2
    assert (images.pixels * images.padding_mask()[:, None]).sum() == 0
    assert [target["original_size"] for target in targets] == images.original_sizes
    for target, (h, w) in zip(targets, images.sizes, strict=True):
        assert (target["boxes"][:, 2] <= w).all() and (target["boxes"][:, 3] <= h).all()


def test_grouped_evaluation_has_no_padding(path):
    dataset = CocoDetection(path, path.parent / "images", train=False, transforms=EvalTransforms(40, 60))
    seen = []
    for images, targets in build_eval_loader(dataset, batch_size=3):
        assert not images.padding_mask().any()
        seen += [target["image_id"] for target in targets]
    assert sorted(seen) == sorted(dataset.image_ids)
    loader = build_eval_loader(dataset, batch_size=3)
    assert sorted({len(images) for images, _ in loader}, reverse=True)[:1] + [1] == [
        3,
        1,
    ]  # (40, 60) has three images


def test_evaluation_groups_by_the_file_where_the_json_states_another_size(path, change):

    change(path, lambda data: data["images"][0].update(width=600, height=400))
    dataset = CocoDetection(path, path.parent / "images", train=False)
    assert all(not images.padding_mask().any() for images, _ in build_eval_loader(dataset, batch_size=4))


def repeating(repeats, batch_size=4, world_size=1, epoch=0, start=0):
    ranks = []
    for rank in range(world_size):
        sampler = TrainBatches(sizes_of(len(repeats), 0), batch_size, 3, rank, world_size, np.asarray(repeats, float))
        sampler.set_epoch(epoch, start)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == max(0, len(sampler) - start)
    return ranks


@given(st.lists(st.floats(1, 7), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_images_repeat_by_their_factor_in_epochs_of_one_length(repeats, batch_size, world_size, epoch):
    ranks = repeating(repeats, batch_size, world_size, epoch)
    samples = [sample for rank in ranks for batch in rank for sample in batch]
    counts = Counter(index for index, *_ in samples)
    extra = len(samples) - sum(repeats)  # of the last step, and of rounding up
    assert -1e-5 <= extra < batch_size * world_size + 1
    assert all(counts[i] >= int(r + 1e-9) for i, r in enumerate(repeats) if r == int(r))
    assert all(int(r) <= counts[i] for i, r in enumerate(repeats))
    assert sum(max(0, counts[i] - int(np.ceil(r))) for i, r in enumerate(repeats)) <= extra + 1
    assert len(set(samples)) == len(samples)  # each occurrence is augmented in its own way
    assert {epoch} == {sample[1] for sample in samples}


def test_a_factor_of_two_and_a_half_is_that_on_average():
    counts = Counter(i for epoch in range(400) for b in repeating([1, 2.5, 1.25, 1], 1, 1, epoch)[0] for i, *_ in b)
    mean = [counts[i] / 400 for i in range(4)]  # the epochs have 6 images for a sum of 5.75
    assert mean[0] <= 1.15 and abs(mean[1] - 2.55) < 0.15 and abs(mean[2] - 1.3) < 0.15


@pytest.mark.parametrize("start", [0, 1, 4, 99])
def test_a_resumed_epoch_with_repeats_is_the_tail_of_the_complete_one(start):
    repeats = [1.0, 3.3, 1.7, 2.0, 1.1, 1.0, 1.0]
    complete, resumed = repeating(repeats, 2, 2, 5), repeating(repeats, 2, 2, 5, start)
    assert [rank[start:] for rank in complete] == resumed
    assert complete != repeating(repeats, 2, 2, 6)


def test_factors_of_one_show_every_image_once():
    counts = Counter(i for batch in repeating([1.0] * 12)[0] for i, *_ in batch)
    assert counts == Counter(range(12))


def test_repeated_images_are_augmented_differently_and_resumed_alike(path):
    complete = drain(
        train_loader(path, 0, repeat_threshold=4.0), 1
    )  # both classes are in all images: all factors are 2
    assert len(complete) == 7
    shown = Counter(number for _, _, numbers in complete for number in numbers)
    assert set(shown.values()) == {2}
    first = {}
    for pixels, _, numbers in complete:
        for image, number in zip(pixels, numbers, strict=True):
            assert number not in first or not torch.equal(first[number], image)
            first.setdefault(number, image)
    assert same(complete[3:], drain(train_loader(path, 2, repeat_threshold=4.0), 1, start=3))
