"""The maps of scores to precision as operations of a graph."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from brs_detr.evaluation.calibration import Calibration


class CalibratedScores(nn.Module):
    """Piecewise linear maps, one for each label: the sum of the rises of their pieces, each as far as it is passed.

    A search of the piece would need operators that runtimes lack; the sum takes one clamp.

    Args:
        calibration: with K pieces in the longest map; shorter ones are filled up with pieces that rise by 0.
    """

    start: Tensor
    low: Tensor
    width: Tensor
    rise: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        pieces = max(len(curve.scores) for curve in calibration.curves) - 1
        tables = np.zeros((3, len(calibration.curves), pieces))
        tables[1] = 1.0  # the width of a piece that does not rise
        for number, curve in enumerate(calibration.curves):
            count = len(curve.scores) - 1
            tables[:, number, :count] = curve.scores[:-1], np.diff(curve.scores), np.diff(curve.precisions)
        start = np.array([curve.precisions[0] for curve in calibration.curves])
        of_label = list(calibration.of_label)
        for name, table in zip(("start", "low", "width", "rise"), (start, *tables), strict=True):
            self.register_buffer(name, torch.from_numpy(table[of_label]).float())

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Map raw scores (B, n) of detections with these labels (B, n); -1, no detection, stays."""
        passed = ((scores[..., None] - self.low[labels]) / self.width[labels]).clamp(0, 1)
        mapped = self.start[labels] + (passed * self.rise[labels]).sum(dim=-1)
        return torch.where(scores < 0, scores, mapped)
