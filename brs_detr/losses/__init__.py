"""Ranking losses, score-based losses and the objective that applies them to one set of predictions. Needs torch
only.
"""

from .balance import score_weights, self_balance
from .boxes import paired_giou_loss, paired_iou
from .objective import RankingObjective, ScoreObjective
from .rank_sort import RankSort, rank_sort_loss

__all__ = [
    "RankSort",
    "RankingObjective",
    "ScoreObjective",
    "paired_giou_loss",
    "paired_iou",
    "rank_sort_loss",
    "score_weights",
    "self_balance",
]
