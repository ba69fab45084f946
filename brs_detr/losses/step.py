"""The smoothed step that turns a difference of logits into "ranked above"."""

from torch import Tensor


def smooth_step(x: Tensor, delta: float) -> Tensor:
    """H(x): 0 below -delta, 1 above delta, linear between (Bucketed Ranking-based Losses, Eq. 2).

    Args:
        x: differences s_j - s_i of logits, any shape.
        delta: half width; at 0 the step is x >= 0, so a tie counts as ranked above.

    Returns:
        Tensor of x's shape and dtype.
    """
    if delta == 0:
        return (x >= 0).to(x.dtype)
    return (x / (2 * delta) + 0.5).clamp(0, 1)
