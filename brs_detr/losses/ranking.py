"""Ranking losses: public functions.

Each ranks all logits of one call together. Positives are named by index, so that a positive whose quality is 0 stays a
positive.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import locate, make_cells, sums_above, tally
from .identity import attach
from .negatives import BucketedNegatives, ExactNegatives
from .pairwise import rank_sort_pairwise
from .sorting import dense_sorting

METHODS = ("pairwise", "bucketed", "exact")


class RankSort(NamedTuple):
    """Ranking and sorting terms of Rank & Sort; both scalars carry their own gradient."""

    ranking: Tensor
    sorting: Tensor


def _flatten(logits: Tensor, positives: Tensor, valid: Tensor | None, method: str, delta: float):
    """Check the arguments and return flat logits of at least float32 and the flat mask."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if delta < 0:
        raise ValueError(f"delta is the half width of the step and must be at least 0, got {delta}")
    if positives.ndim != 1 or positives.dtype != torch.int64:
        raise ValueError(
            "positives must be (P,) int64 indices into logits.flatten(), "
            f"got {positives.dtype} of shape {tuple(positives.shape)}"
        )
    if valid is not None:
        if valid.shape != logits.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be a bool mask of the logits' shape {tuple(logits.shape)}, "
                f"got {valid.dtype} of shape {tuple(valid.shape)}"
            )
        valid = valid.reshape(-1)
    flat = logits.reshape(-1)
    return flat if flat.dtype == torch.float64 else flat.float(), valid


def _zero(flat: Tensor) -> Tensor:
    """A zero on the graph of the logits that reads none of them (they may be infinite)."""
    return flat[:0].sum()


def rank_sort_loss(
    logits: Tensor,
    positives: Tensor,
    quality: Tensor,
    *,
    valid: Tensor | None = None,
    delta: float = 0.5,
    method: str = "bucketed",
) -> RankSort:
    """Rank & Sort loss (Oksuz et al., ICCV 2021) of all logits together; bucketed: Yavuz et al., ECCV 2024."""
    flat, valid = _flatten(logits, positives, valid, method, delta)
    if len(quality) != len(positives):
        raise ValueError(f"quality has {len(quality)} entries for {len(positives)} positives: give one per positive")
    count = len(positives)
    if count == 0:
        return RankSort(_zero(flat), _zero(flat))
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        x = flat.detach().double()
        quality = quality.detach().double()
        if method == "pairwise":
            negative = torch.ones_like(x, dtype=torch.bool) if valid is None else valid.clone()
            negative[positives] = False
            ranking, sorting, dense, sparse = rank_sort_pairwise(x, positives, quality, negative, delta)
            sparse = sparse[positives]
            index = positives
        else:
            scores = x[positives]
            x = x - scores.mean()
            scores, order = x[positives].sort(stable=True)
            index = positives[order]
            quality = quality[order]
            cells = make_cells(scores, delta)
            negatives = (BucketedNegatives if method == "bucketed" else ExactNegatives)(cells, x, positives, valid)
            false_positives = negatives.counts()
            rank = sums_above(cells, tally(cells, locate(cells, scores), scores)) + false_positives
            error = false_positives / rank
            dense = negatives.spread(1 / (rank * count))
            dense[index] = -error / count
            errors, sparse = dense_sorting(scores, quality, delta)
            ranking, sorting, sparse = error.mean(), errors.mean(), sparse / count
    dtype = flat.dtype
    terms = attach(flat, ranking.to(dtype), sorting.to(dtype), dense.to(dtype), index, sparse.to(dtype))
    return RankSort(*terms)
