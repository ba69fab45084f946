"""How the losses are computed on each kind of device: the only choices that depend on it, apart from the precision.

A CPU pays for the work of an operation, so there memory is read in order, and what can be left out is left out. A GPU
pays for the number of operations, some microseconds each, and for additions to one address, which wait for each other;
the work of an operation of a million entries is nearly free.
"""

from typing import NamedTuple

import torch


class Choices(NamedTuple):
    """What differs between devices.

    Attributes:
        grid: look cells up with a grid (`cells.locate`) in place of the binary search.
        spread: sum each cell into many copies (`cells.spread_sums`), so that no address is added to often.
        max_dense: largest number of positives whose order is compared pair by pair (`dominance.sorting_terms`); above
            it, quadrant sums are taken.
    """

    grid: bool
    spread: bool
    max_dense: int


# Measured on one CPU thread: with 400 positives the matrix and the quadrant sums take the same time.
CPU = Choices(grid=True, spread=False, max_dense=400)
# Estimated, not measured: quadrant sums are some 400 operations more, 2 to 3 ms at 5 to 8 microseconds each. A matrix
# of 4096 x 4096 doubles is passed over seven times, which is 1 GB and less than a millisecond at 1 TB/s or more.
GPU = Choices(grid=False, spread=True, max_dense=4096)


def choices(device: torch.device) -> Choices:
    """Return how to compute on a device; on those that are neither a CPU nor a GPU as on a GPU."""
    return CPU if device.type == "cpu" else GPU
