"""The loss of one set of predictions: a classification loss and what it does to the box losses.

A set is what a decoder layer, an RPN or a dense head predicts for a batch. Both objectives take one `PredictionSet`, so
a head does not know which one it was given. Every term comes back weighted, finite and attached to the graph, also
without positives; the plain sum of all terms is the loss. L sets may be given as one, with a leading dimension L: all
that follows is computed with that dimension, and one set is the case L = 1.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .alrp import alrp_loss
from .average_precision import average_precision_loss
from .balance import MIN_TARGET, EpochBalance, box_scores, self_balance
from .checks import check_number, single_or_wider
from .classification import SCORE_LOSSES
from .distributed import SCOPES, SharedCount, process_mean, scalar, scale_for_ddp, sum_over
from .gradient_ratio import WatchedObjective
from .ndcg import ndcg_loss
from .prediction_set import BoxLosses, CheckedSet, PredictionSet, SubsetLoss
from .rank_sort import rank_sort_loss

__all__ = ["BoxLosses", "PredictionSet", "RankingObjective", "ScoreObjective", "SubsetLoss"]


def _zero(logits: Tensor) -> Tensor:
    """Return a zero attached to the logits' graph that reads no value (a logit may be infinite)."""
    return logits[:, :0].float().sum()


class RankingLoss(NamedTuple):
    """How a name is computed: the loss function's family, its method, the half width its paper uses."""

    family: str
    method: str
    delta: float


RANKING_LOSSES = {
    "brs": RankingLoss("rank_sort", "bucketed", 0.5),
    "rs": RankingLoss("rank_sort", "exact", 0.5),
    "bap": RankingLoss("average_precision", "bucketed", 1.0),
    "ap": RankingLoss("average_precision", "exact", 1.0),
    "balrp": RankingLoss("alrp", "bucketed", 1.0),
    "alrp": RankingLoss("alrp", "exact", 1.0),
    "bndcg": RankingLoss("ndcg", "bucketed", 1.0),
    "ndcg": RankingLoss("ndcg", "exact", 1.0),
}


# largest values of the losses that aLRP can take as error, in order of preference; a mask's is 1 - Dice
LARGEST = {"giou": 2.0, "iou": 1.0, "mask": 1.0}


class RankingObjective(WatchedObjective):
    """All logits of the set in one ranking, the box terms weighted by it.

    The ranking runs over the N * C logits of this process's call (all images, levels, classes), with the logit
    of each positive row's own class as a positive. A box term is the mean over the positives, and
    - with Rank & Sort and NDCG scaled to the value of the ranking terms together (`balance.self_balance`);
    - with AP multiplied by `box_weight`, as in the official ATSS heads;
    - with aLRP the GIoU losses (or IoU losses, or without boxes those of masks) are part of the loss, balanced by
      `balance.EpochBalance`; other terms as with Rank & Sort.
    A set's own `box_weight` is divided by its mean first; the losses in aLRP, being errors of the ranking, have none.
    A `SubsetLoss` has the weights of its own positives, divided by their mean, and is balanced like any other box term.

    Args:
        loss: "rs" (Rank & Sort), "ap" (with interpolation), "alrp", "ndcg"; "brs", "bap", "balrp", "bndcg" are their
            bucketed forms.
        weight: factor of the ranking terms, and through the balance of the box terms.
        delta: half width of the step; the papers' when None (Rank & Sort 0.5, others 1).
        score_weighted: weigh each positive's box losses with its highest class probability.
        box_weight: factor of every box term with "ap" and "bap", and of aLRP's if that is not balanced.
        box_weights: fixed factors of the box terms by name, instead of any balance and of the localization in aLRP's
            gradient: for a set that is so easy to rank that boxes balanced with it would stop learning.
        min_target: smallest ranking loss that the balance follows, see `self_balance`.
        tau: least IoU of a positive, with aLRP: its error is (1 - IoU) / (1 - tau), or the GIoU loss / 2 / (1 - tau).
        period: iterations per epoch of aLRP's balance; None balances by value, as Rank & Sort does: for an objective
            that several prediction sets share, whose iterations are not to be averaged together.
        balanced: False: aLRP's localization part is only multiplied by `box_weight` (the paper's Table 2 without SB).
        scope: "process", or "global" for one ranking over all processes. Then every value is that of the full batch,
            and gradients are multiplied by the number of processes, since data-parallel training averages them: the
            step is the one that a single process with the full batch would take.

    Raises:
        ValueError: for an unknown loss or scope, or a number that is negative, not finite, or (`tau`) not below 1.
    """

    def __init__(
        self,
        loss: str = "brs",
        weight: float = 2.0,
        *,
        delta: float | None = None,
        score_weighted: bool = False,
        box_weight: float = 2.0,
        box_weights: Mapping[str, float] | None = None,
        min_target: float = MIN_TARGET,
        tau: float = 0.5,
        period: int | None = 3665,
        balanced: bool = True,
        scope: str = "process",
    ):
        super().__init__()
        if loss not in RANKING_LOSSES:
            raise ValueError(f"unknown ranking loss {loss!r}: choose one of {', '.join(RANKING_LOSSES)}")
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
        self.scope = scope
        self.loss = loss
        self.family, self.method, paper_delta = RANKING_LOSSES[loss]
        self.weight = weight
        self.delta = paper_delta if delta is None else delta
        numbers = {"weight": weight, "delta": self.delta, "box_weight": box_weight, "min_target": min_target}
        numbers |= {f"box_weights[{name!r}]": value for name, value in (box_weights or {}).items()}
        for name, value in numbers.items():
            check_number(name, value)
        check_number("tau", tau, below=1)
        self.score_weighted = score_weighted
        self.box_weight = box_weight
        self.box_weights = None if box_weights is None else dict(box_weights)
        self.min_target = min_target
        self.tau = tau
        self.balanced = balanced
        self.epoch_balance = (
            EpochBalance(period, min_target=min_target) if self.family == "alrp" and period is not None else None
        )

    def forward(self, predictions: PredictionSet) -> dict[str, Tensor]:
        """Compute the loss terms of one set.

        Returns:
            {"rank", with Rank & Sort "sort", and every key of the set's `box_losses`} -> scalar, or (L,) for L sets.

        Raises:
            ValueError: the set is refused, see `PredictionSet.checked`, aLRP gets no "giou", "iou" or "mask", or a box
                loss has no weight among `box_weights`.
        """
        known = predictions.box_losses if self.box_weights is None else self.box_weights
        missing = [name for name in predictions.box_losses if name not in known]
        if missing:
            raise ValueError(f"no weight for the box loss {missing[0]!r}: add it to box_weights")
        classes = predictions.logits.shape[-1]
        checked = predictions.checked(classes)
        rows, entries = checked.rows, checked.entries
        logits = single_or_wider(checked.logits).float()
        with torch.autocast(logits.device.type, enabled=False):
            labels = checked.positive_labels()
            logits = self.watched(logits, entries * classes + labels.flatten())
            positives = rows * classes + labels
            terms = self._ranking_terms(logits, positives, checked.quality, checked.box_losses, checked.counted())
            target = terms["rank"] + terms["sort"] if "sort" in terms else terms["rank"]
            terms = {name: scale_for_ddp(term, self.scope) * self.weight for name, term in terms.items()}
            of_positives = logits.detach().flatten(0, 1)[entries]
            if checked.ignored is not None:
                of_positives = of_positives.masked_fill(checked.ignored.flatten(0, 1)[entries], -torch.inf)
            of_positives = of_positives.view(*rows.shape, classes)
            of_all = self._box_weights(of_positives, checked.box_weight)
            for name, values, given, chosen in checked.box_terms():
                if name in terms:
                    continue
                weights, total = of_all if chosen is None else self._box_weights(of_positives[:, chosen], given)
                mean = sum_over(values * weights, self.scope) / total + _zero(logits)
                terms[name] = scale_for_ddp(self._balance(name, mean, target), self.scope)
        return checked.shaped(terms)

    def _box_weights(self, logits: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weigh the box losses of positives with the logits (L, P, C) and weights (L, P) or None.

        Returns:
            (L, P) weights whose mean is 1 over all positives that are ranked together, and the number (), at least 1,
            of these in each set.
        """
        shape = logits.shape[:2]
        total = sum_over(torch.full((1,), float(shape[1]), device=logits.device), self.scope).clamp(min=1)
        weights = None if given is None else given.detach().float()
        if self.score_weighted:
            scores = box_scores(logits)
            weights = scores if weights is None else scores * weights
        if weights is None:
            return logits.new_ones(shape), total
        mean = sum_over(weights, self.scope)[:, None] / total
        tiny = torch.finfo(mean.dtype).tiny
        return torch.where(mean > 0, weights / mean.clamp(min=tiny), torch.ones_like(weights)), total

    def _ranking_terms(
        self,
        logits: Tensor,
        positives: Tensor,
        quality: Tensor,
        box_losses: BoxLosses,
        valid: Tensor | None,
    ) -> dict[str, Tensor]:
        """Compute the terms (L,) of the ranking loss itself, not yet weighted."""
        delta, method, scope = self.delta, self.method, self.scope
        if self.family == "rank_sort":
            ranking, sorting = rank_sort_loss(
                logits, positives, quality, valid=valid, delta=delta, method=method, scope=scope
            )
            return {"rank": ranking, "sort": sorting}
        if self.family == "average_precision":
            term = average_precision_loss(
                logits, positives, valid=valid, delta=delta, method=method, interpolate=method == "exact", scope=scope
            )
            return {"rank": term}
        if self.family == "ndcg":
            return {"rank": ndcg_loss(logits, positives, valid=valid, delta=delta, method=method, scope=scope)}
        name = next((name for name in LARGEST if name in box_losses), "giou")
        losses = box_losses.get(name)
        if losses is None or isinstance(losses, SubsetLoss):
            raise ValueError(
                "aLRP ranks boxes by their GIoU loss, or masks by 1 - Dice: give the objective box losses named 'giou' "
                "or 'mask', one per positive"
            )
        error = losses.float() / LARGEST[name] / (1 - self.tau)
        classification, localization = alrp_loss(
            logits, positives, error, valid=valid, delta=delta, method=method, scope=scope
        )
        if self.box_weights is not None:
            return {"rank": classification}
        return {"rank": classification, name: self._balance_alrp(classification, localization, positives.shape[1])}

    def _balance_alrp(self, classification: Tensor, localization: Tensor, positives: int) -> Tensor:
        """Balance the two parts (L,) of aLRP over an epoch, or without a period by their values, or not at all."""
        if not self.balanced:
            return localization * self.box_weight
        if self.epoch_balance is None:
            return self_balance(localization, classification, min_target=self.min_target)
        count = sum_over(torch.full((1,), float(positives), device=localization.device), self.scope)
        # One set after the other, each an iteration of its own: a factor of theirs may change between two of them.
        parts = zip(classification.unbind(), localization.unbind())
        return torch.stack([self.epoch_balance(*part, count) for part in parts])

    def _balance(self, name: str, term: Tensor, target: Tensor) -> Tensor:
        """Weigh means (L,) of a box loss, by default so that they equal `target`, the values of the ranking terms."""
        if self.box_weights is not None:
            return term * self.box_weights[name]
        if self.family == "average_precision":
            return term * self.box_weight
        return self_balance(term, target, self.weight, min_target=self.min_target)


class ScoreObjective(WatchedObjective):
    """A score-based classification loss with fixed weights for the box terms.

    Args:
        classification: "focal", "cross_entropy" (softmax, last column is background), "binary_cross_entropy" or
            "quality_focal".
        weights: factor of "cls" and of every box term.
        alpha: weight of positives in focal loss.
        gamma: focusing exponent of focal and quality focal loss: 0, or at least 1.
        normalizer: "positives" divides by the number of positives, averaged over all processes and at least 1;
            "rows" by the number of valid rows of this process.

    Raises:
        ValueError: for an unknown classification loss or normalizer, weights without "cls", a number that is negative
            or not finite, or a gamma between 0 and 1.
    """

    def __init__(
        self,
        classification: str,
        weights: Mapping[str, float],
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
        normalizer: str = "positives",
    ):
        super().__init__()
        if classification not in SCORE_LOSSES:
            raise ValueError(f"unknown classification loss {classification!r}: choose one of {', '.join(SCORE_LOSSES)}")
        if normalizer not in ("positives", "rows"):
            raise ValueError(f"unknown normalizer {normalizer!r}: choose positives or rows")
        if "cls" not in weights:
            raise ValueError('weights need an entry "cls" for the classification loss')
        for name, value in {**weights, "gamma": gamma}.items():
            check_number(name, value)
        if 0 < gamma < 1:  # the factor (1 - p)^gamma of logits beyond 17 has no derivative in float32
            raise ValueError(f"gamma must be 0 or at least 1, not {gamma}")
        self.classification = classification
        self.weights = dict(weights)
        self.alpha = alpha
        self.gamma = gamma
        self.normalizer = normalizer

    def forward(self, predictions: PredictionSet) -> dict[str, Tensor]:
        """Compute the loss terms of one set.

        A set's `box_weight` normalizes the box terms by its sum where the normalizer is "positives". A `SubsetLoss` is
        the mean over its own values, whatever the normalizer, as Mask R-CNN's mask loss is one over the masks.

        Returns:
            {"cls", and every key of the set's `box_losses`} -> scalar, or (L,) for L sets.

        Raises:
            ValueError: a box loss has no weight, there are `ignored` logits, or the set is refused, see
                `PredictionSet.checked`.
        """
        if predictions.ignored is not None:
            raise ValueError("ignored: score-based losses count all logits of a row. Ignore rows by valid.")
        missing = [name for name in predictions.box_losses if name not in self.weights]
        if missing:
            raise ValueError(f"no weight for the box loss {missing[0]!r}: add it to the objective's weights")
        classes = predictions.logits.shape[-1] - (self.classification == "cross_entropy")
        checked = predictions.checked(classes)
        labels, entries, valid = checked.labels, checked.entries, checked.valid
        columns = checked.logits.shape[2]
        with torch.autocast(checked.logits.device.type, enabled=False):
            logits = checked.logits.float()
            logits = self.watched(logits, entries * columns + checked.positive_labels().flatten())
            normalizer = self._normalizer(checked)
            if valid is not None:
                # Before the loss and not after it: an ignored infinite logit has a nan gradient otherwise.
                logits = logits.masked_fill(~valid[..., None], 0)
            # These losses compare no rows, so those of all sets are computed as one.
            row_losses = SCORE_LOSSES[self.classification](
                logits.flatten(0, 1),
                labels.flatten(),
                entries,
                checked.quality.detach().float().flatten(),
                self.alpha,
                self.gamma,
            ).view_as(labels)
            if valid is not None:
                row_losses = row_losses * valid
            terms = {"cls": row_losses.sum(1) / normalizer * self.weights["cls"]}
            if checked.box_weight is not None and self.normalizer == "positives":
                normalizer = process_mean(checked.box_weight.detach().float().sum(1))
            for name, values, weights, chosen in checked.box_terms():
                divisor = normalizer
                if chosen is not None:
                    divisor = process_mean((torch.ones_like(values) if weights is None else weights).sum(1))
                values = values if weights is None else values * weights
                terms[name] = (values.sum(1) + _zero(logits)) / divisor * self.weights[name]
        return checked.shaped(terms)

    def _normalizer(self, checked: CheckedSet) -> Tensor:
        """Return what the terms are divided by, at least 1: (), or (L,) where each set has its own valid rows."""
        logits, given, valid = checked.logits, checked.normalizer, checked.valid
        if given is None and self.normalizer == "positives":
            given = SharedCount(checked.rows.shape[1])
        if isinstance(given, SharedCount):
            return given.mean(logits.device)
        if given is not None:
            return scalar(given, logits.device).clamp(min=1)
        if valid is not None:
            return valid.sum(1).float().clamp(min=1)
        return scalar(max(1, logits.shape[1]), logits.device)
