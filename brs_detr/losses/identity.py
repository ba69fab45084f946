"""Identity update: a loss value with a gradient that is given, not differentiated (Rank & Sort, Oksuz et al., ICCV
2021).
"""

import torch
from torch import Tensor


class _IdentityUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        first: Tensor,
        second: Tensor,
        dense: Tensor,
        index: Tensor,
        sparse: Tensor,
        sound: Tensor,
    ):
        ctx.save_for_backward(dense, index, sparse, sound)
        return first * sound, second * sound

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor):
        dense, index, sparse, sound = ctx.saved_tensors
        gradient = dense * (first * sound)
        gradient.index_add_(0, index, sparse * (second * sound))
        return gradient, None, None, None, None, None, None


def attach_two(
    logits: Tensor, first: Tensor, second: Tensor, dense: Tensor, index: Tensor, sparse: Tensor, sound: Tensor
) -> tuple[Tensor, Tensor]:
    """Two loss values with a gradient each: scaling or dropping one of them scales or drops its own gradient only.

    Args:
        logits: (M,) what the gradients belong to.
        first, second: scalars.
        dense: (M,) gradient of `first`.
        index: (P,) distinct entries that `second` depends on.
        sparse: (P,) gradient of `second` at those entries.
        sound: () 1, or NaN to make both values and all gradients NaN.

    Returns:
        (first, second) in the logits' dtype, attached to their graph.
    """
    first, second, dense, sparse, sound = (x.to(logits.dtype) for x in (first, second, dense, sparse, sound))
    return _IdentityUpdate.apply(logits, first, second, dense, index, sparse, sound)


def attach(logits: Tensor, value: Tensor, gradient: Tensor, sound: Tensor) -> Tensor:
    """One loss value with its gradient (M,); `sound` as for `attach_two`."""
    none = torch.empty(0, dtype=torch.int64, device=logits.device)
    return attach_two(logits, value, torch.zeros_like(value), gradient, none, gradient[:0], sound)[0]
