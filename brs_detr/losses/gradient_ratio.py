"""How a classification loss divides its gradient between positives and negatives.

Average LRP loss (Oksuz et al., NeurIPS 2020), Theorem 2 and Fig. 4: under AP and aLRP loss both have the same total
magnitude at every step, the ratio is 1. Under cross entropy and focal loss it varies by orders of magnitude. Rank &
Sort adds a sorting part among the positives, so its ratio is not 1; that of its ranking part is.

The magnitudes are summed in the backward pass, where the gradient of the logits is known, and stay on the device.
"""

from __future__ import annotations

from torch import Tensor, nn, stack

from .checks import accumulation_dtype


class GradientSums:
    """Sums of the magnitudes of gradients since they were last taken."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def watch(self, logits: Tensor, positives: Tensor) -> Tensor:
        """Return the logits, whose gradient is added to the sums once it is computed.

        Args:
            logits: any shape. Use the returned tensor in the loss, and only there.
            positives: (P,) int64, entries of `logits.flatten()`; all others are negatives (ignored ones have no
                gradient). With softmax the negatives include the background of every row.
        """
        if not logits.requires_grad:
            return logits
        watched = logits.view_as(logits)

        def add(gradient: Tensor) -> None:
            size = gradient.detach().flatten().to(accumulation_dtype(gradient.device)).abs()
            own = size.index_select(0, positives).sum()
            # not the difference of two sums, of which one may be much larger than the other
            sums = stack([size.index_fill_(0, positives, 0).sum(), own])
            self.sums = sums if self.sums is None else self.sums + sums

        watched.register_hook(add)
        return watched

    def take(self) -> Tensor | None:
        """Return (2,) sums over negatives and positives, and start again; None without a backward pass since."""
        sums, self.sums = self.sums, None
        return sums


class WatchedObjective(nn.Module):
    """An objective whose logits can be watched: `gradient_sums` is None until `watch_gradients` sets it."""

    gradient_sums: GradientSums | None = None

    def watched(self, logits: Tensor, positives: Tensor) -> Tensor:
        """Return the logits, watched where that is wanted; arguments as of `GradientSums.watch`."""
        return logits if self.gradient_sums is None else self.gradient_sums.watch(logits, positives)


def watch_gradients(model: nn.Module) -> dict[str, GradientSums]:
    """Let every objective of a detector sum its gradients.

    Returns:
        the sums by head: "head", "rpn", "roi.stages.0"; "objective" is one that several sets of predictions share.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, WatchedObjective):
            module.gradient_sums = found[name.removesuffix(".objective")] = GradientSums()
    return found
