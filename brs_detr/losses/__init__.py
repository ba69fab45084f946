"""Ranking losses, score-based losses and the objective that applies them to one set of predictions.

Needs torch and torchvision.ops only.
"""

from .alrp import ALRP, alrp_loss
from .average_precision import average_precision_loss
from .balance import EpochBalance, self_balance
from .boxes import paired_giou_loss, paired_iou
from .distributed import SharedCount
from .gradient_ratio import GradientSums, watch_gradients
from .ndcg import ndcg_loss
from .objective import RankingObjective, ScoreObjective
from .prediction_set import PredictionSet, SubsetLoss
from .rank_sort import RankSort, rank_sort_loss

__all__ = [
    "ALRP",
    "EpochBalance",
    "GradientSums",
    "PredictionSet",
    "RankSort",
    "RankingObjective",
    "ScoreObjective",
    "SharedCount",
    "SubsetLoss",
    "alrp_loss",
    "average_precision_loss",
    "ndcg_loss",
    "paired_giou_loss",
    "paired_iou",
    "rank_sort_loss",
    "self_balance",
    "watch_gradients",
]
