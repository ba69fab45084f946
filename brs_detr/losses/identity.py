"""Identity update: a loss value together with a gradient that is given rather than differentiated (Chen et al., CVPR
2019, Sec. 3.2).
"""

import torch
from torch import Tensor


class _IdentityUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, first: Tensor, second: Tensor, dense: Tensor, index: Tensor, sparse: Tensor):
        ctx.save_for_backward(dense, index, sparse)
        return first.clone(), second.clone()

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor):
        dense, index, sparse = ctx.saved_tensors
        gradient = dense * first
        gradient.index_add_(0, index, sparse * second)
        return gradient, None, None, None, None, None


def attach(
    logits: Tensor, first: Tensor, second: Tensor, dense: Tensor, index: Tensor, sparse: Tensor
) -> tuple[Tensor, Tensor]:
    """Two loss values with a gradient each: scaling or dropping one of them scales or drops its own gradient only.

    Args:
        logits: (M,) what the gradients belong to.
        first, second: scalars.
        dense: (M,) gradient of `first`.
        index: (P,) entries that `second` depends on.
        sparse: (P,) gradient of `second` at those entries.

    Returns:
        (first, second), attached to the graph of `logits`.
    """
    return _IdentityUpdate.apply(logits, first, second, dense, index, sparse)
