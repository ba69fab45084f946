"""Random subsets of an assignment."""

import pytest
import torch

from brs_detr.assign.max_iou import BACKGROUND, IGNORED
from brs_detr.assign.random_sampler import RandomSampler


def in_order(count, device):
    return torch.arange(count, device=device)


@pytest.mark.parametrize(
    ("positives", "backgrounds", "kept"),
    [(50, 500, (5, 15)), (2, 500, (2, 18)), (50, 3, (5, 3)), (0, 500, (0, 20)), (0, 0, (0, 0))],
)
def test_background_fills_what_positives_leave(positives, backgrounds, kept):
    assigned = torch.tensor([7] * positives + [BACKGROUND] * backgrounds + [IGNORED] * 9, dtype=torch.int64)
    assigned = assigned[torch.randperm(len(assigned))]
    drawn = RandomSampler(20, 0.25)(assigned)
    assert ((drawn >= 0).sum().item(), (drawn == BACKGROUND).sum().item()) == kept
    assert torch.equal(drawn[drawn != IGNORED], assigned[drawn != IGNORED])


def test_first_by_index_when_the_order_is_given():
    assigned = torch.tensor([-1, 3, -2, 1, -1, 0, -1, -1])
    assert RandomSampler(4, 0.5, in_order)(assigned).tolist() == [-1, 3, -2, 1, -1, -2, -2, -2]


def test_every_entry_is_equally_likely():
    assigned = torch.tensor([0] * 4 + [BACKGROUND] * 6)
    hits = sum((RandomSampler(4, 0.5)(assigned) != IGNORED).float() for _ in range(2000)) / 2000
    torch.testing.assert_close(hits, torch.tensor([0.5] * 4 + [1 / 3] * 6), atol=0.06, rtol=0)
