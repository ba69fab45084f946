"""The loss of one set of predictions (a decoder layer, an RPN, a dense head): a classification loss and what it does
to the box losses.

Both objectives are called the same way, so a head does not know which one it was given. Every term comes back
weighted, finite and attached to the graph, also without positives; the plain sum of all terms is the loss.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .alrp import alrp_loss
from .average_precision import average_precision_loss
from .balance import CAP, LEAST, EpochBalance, box_scores, self_balance
from .checks import check_labels, check_number, check_per_positive, check_set, single_or_wider
from .classification import SCORE_LOSSES
from .distributed import SCOPES, process_mean, scale_for_ddp, sum_over
from .ndcg import ndcg_loss
from .rank_sort import rank_sort_loss


def _zero(*tensors: Tensor) -> Tensor:
    """A zero attached to the graph of every tensor that reads no value (a logit may be infinite)."""
    return sum(tensor[:0].float().sum() for tensor in tensors)


def _positive_rows(
    logits: Tensor,
    labels: Tensor,
    classes: int,
    valid: Tensor | None,
    rows: Tensor | None,
    quality: Tensor,
    localization: Mapping[str, Tensor],
) -> Tensor:
    """Ascending rows of the positives; all arguments checked against each other."""
    check_set(logits, labels, valid, rows)
    if rows is None:
        positive = (labels >= 0) & (labels < classes)
        rows = (positive if valid is None else positive & valid).nonzero()[:, 0]
    if len(rows) != len(quality):
        raise ValueError(
            f"quality has {len(quality)} entries for {len(rows)} positive rows: give one per positive, in row order"
        )
    for name, values in localization.items():
        check_per_positive(name, values, rows)
    check_labels(labels, classes, valid, rows)
    return rows


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like.device, torch.float32).reshape(())
    return torch.full((), float(value), device=like.device)


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


class RankingObjective(nn.Module):
    """All logits of the set in one ranking, the localization terms weighted by it.

    The ranking runs over the N * C logits of this process's whole call (all images, levels, classes), with the logit
    of each positive row's own class as a positive. A localization term is the mean over the positives, and
    - with Rank & Sort and NDCG scaled to the value of the ranking terms together (`balance.self_balance`);
    - with AP multiplied by `box_weight`, as in the official ATSS heads;
    - with aLRP the GIoU losses are part of the loss, balanced by `balance.EpochBalance`; other terms as with Rank &
    Sort.

    Args:
        loss: "rs" (Rank & Sort), "ap" (with interpolation), "alrp", "ndcg"; "brs", "bap", "balrp", "bndcg" are their
            bucketed forms.
        weight: factor of the ranking terms, and through the balance of the localization terms.
        delta: half width of the step; the papers' when None (Rank & Sort 0.5, others 1).
        score_weighted: weigh each positive's box losses with its highest class probability.
        box_weight: factor of every localization term with "ap" and "bap".
        cap: largest balance ratio, see `self_balance`.
        least: smallest ranking loss that the balance follows, see `self_balance`.
        tau: least IoU of a positive, with aLRP: its error is the GIoU loss / 2 / (1 - tau).
        period: iterations per epoch of aLRP's balance; None balances by value, as Rank & Sort does: for an objective
            that several prediction sets share, whose iterations are not to be averaged together.
        scope: "process", or "global" for one ranking over all processes. Then every value is that of the whole batch,
            and
            gradients are multiplied by the number of processes, since data-parallel training averages them: the step is
            the one that a single process with the whole batch would take.

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
        cap: float = CAP,
        least: float = LEAST,
        tau: float = 0.5,
        period: int | None = 3665,
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
        numbers = {"weight": weight, "delta": self.delta, "box_weight": box_weight, "cap": cap, "least": least}
        for name, value in numbers.items():
            check_number(name, value)
        check_number("tau", tau, below=1)
        self.score_weighted = score_weighted
        self.box_weight = box_weight
        self.cap = cap
        self.least = least
        self.tau = tau
        self.epoch_balance = EpochBalance(period) if self.family == "alrp" and period is not None else None

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        quality: Tensor,
        localization: Mapping[str, Tensor],
        valid: Tensor | None = None,
        rows: Tensor | None = None,
        localization_weight: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms of one set.

        Args:
            logits: (N, C) one sigmoid logit per class.
            labels: (N,) int64; 0..C-1 positive, C background.
            quality: (P,) IoU of each positive in row order; detached.
            localization: name -> (P,) losses of the positives, not reduced.
            valid: (N,) bool; False rows are ignored.
            rows: (P,) int64 ascending rows of the positives; spares a device synchronization.
            localization_weight, count: for score-based objectives; no effect here.

        Returns:
            {"rank", with Rank & Sort "sort", and every key of `localization`} -> scalar.

        Raises:
            ValueError: when shapes or types do not fit, a label is out of range, a positive row is background or
                ignored (on a GPU the device asserts what concerns values), or aLRP gets no "giou".
        """
        classes = logits.shape[-1]
        rows = _positive_rows(logits, labels, classes, valid, rows, quality, localization)
        logits = single_or_wider(logits).float()
        with torch.autocast(logits.device.type, enabled=False):
            positives = rows * classes + labels[rows]
            mask = None if valid is None else valid[:, None].expand(-1, classes)
            terms = self._ranking_terms(logits, positives, quality, localization, mask)
            target = sum(term for name, term in terms.items() if name in ("rank", "sort"))
            terms = {name: scale_for_ddp(term, self.scope) * self.weight for name, term in terms.items()}
            whole = sum_over(torch.full((1,), float(len(rows)), device=logits.device), self.scope).clamp(min=1)
            weights = self._box_weights(logits[rows], whole)
            for name, values in localization.items():
                if name not in terms:
                    mean = sum_over(values.float() * weights, self.scope) / whole + _zero(logits)
                    terms[name] = scale_for_ddp(self._balance(mean, target), self.scope)
        return terms

    def shared_count(self, positives: Tensor | float, like: Tensor) -> None:
        """No-op: ranking losses need no cross-process normalizer."""

    def _box_weights(self, logits: Tensor, whole: Tensor) -> Tensor:
        """Weight of each positive's box losses (P,), mean 1 over all positives that are ranked together."""
        if not self.score_weighted:
            return logits.new_ones(len(logits))
        scores = box_scores(logits)
        mean = sum_over(scores, self.scope) / whole
        return torch.where(mean > 0, scores / mean.clamp(min=torch.finfo(mean.dtype).tiny), torch.ones_like(scores))

    def _ranking_terms(
        self,
        logits: Tensor,
        positives: Tensor,
        quality: Tensor,
        localization: Mapping[str, Tensor],
        valid: Tensor | None,
    ) -> dict[str, Tensor]:
        """Terms of the ranking loss itself, not yet weighted."""
        how = {"valid": valid, "delta": self.delta, "method": self.method, "scope": self.scope}
        if self.family == "rank_sort":
            terms = rank_sort_loss(logits, positives, quality, **how)
            return {"rank": terms.ranking, "sort": terms.sorting}
        if self.family == "average_precision":
            return {"rank": average_precision_loss(logits, positives, interpolate=self.method == "exact", **how)}
        if self.family == "ndcg":
            return {"rank": ndcg_loss(logits, positives, **how)}
        if "giou" not in localization:
            raise ValueError("aLRP ranks boxes by their GIoU loss: give the objective a localization term 'giou'")
        error = localization["giou"].float() / 2 / (1 - self.tau)
        terms = alrp_loss(logits, positives, error, **how)
        if self.epoch_balance is None:
            boxes = self_balance(terms.localization, terms.classification, cap=self.cap, least=self.least)
        else:
            positives = sum_over(torch.full((), float(len(positives)), device=logits.device), self.scope)
            boxes = self.epoch_balance(*terms, positives)
        return {"rank": terms.classification, "giou": boxes}

    def _balance(self, term: Tensor, target: Tensor) -> Tensor:
        if self.family == "average_precision":
            return term * self.box_weight
        return self_balance(term, target, self.weight, cap=self.cap, least=self.least)


class ScoreObjective(nn.Module):
    """A score-based classification loss with fixed weights for the localization terms.

    Args:
        classification: "focal", "cross_entropy" (softmax, last column is background), "binary_cross_entropy" or
            "quality_focal".
        weights: factor of "cls" and of every localization term.
        alpha: weight of positives in focal loss.
        gamma: focusing exponent of focal and quality focal loss.
        normalizer: "positives" divides by the number of positives, averaged over all processes and at least 1;
            "rows" by the number of valid rows of this process.

    Raises:
        ValueError: for an unknown classification loss or normalizer, weights without "cls", or a number that is
            negative or not finite.
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
        self.classification = classification
        self.weights = dict(weights)
        self.alpha = alpha
        self.gamma = gamma
        self.normalizer = normalizer

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        quality: Tensor,
        localization: Mapping[str, Tensor],
        valid: Tensor | None = None,
        rows: Tensor | None = None,
        localization_weight: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms of one set.

        Args:
            logits: (N, C), or (N, C + 1) with the background last for cross entropy.
            labels: (N,) int64; 0..C-1 positive, C background.
            quality: (P,) IoU of each positive in row order; detached.
            localization: name -> (P,) losses of the positives, not reduced.
            valid: (N,) bool; False rows are ignored.
            rows: (P,) int64 ascending rows of the positives; spares a device synchronization.
            localization_weight: (P,) weights of the localization losses; their sum is then those terms' normalizer
                ("positives" only).
            count: replaces the mean number of positives, see `shared_count`, or the number of rows.

        Returns:
            {"cls", and every key of `localization`} -> scalar.

        Raises:
            ValueError: when a localization term has no weight, shapes or types do not fit, a label is out of range, or
                a positive row is background or ignored (on a GPU the device asserts what concerns values).
        """
        missing = [name for name in localization if name not in self.weights]
        if missing:
            raise ValueError(f"no weight for the localization term {missing[0]!r}: add it to the objective's weights")
        classes = logits.shape[-1] - (self.classification == "cross_entropy")
        rows = _positive_rows(logits, labels, classes, valid, rows, quality, localization)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            normalizer = self._normalizer(logits, valid, len(rows), count)
            if valid is not None:
                # Before the loss and not after it: an ignored infinite logit has a nan gradient otherwise.
                logits = logits.masked_fill(~valid[:, None], 0)
            row_losses = SCORE_LOSSES[self.classification](
                logits, labels, rows, quality.detach().float(), self.alpha, self.gamma
            )
            if valid is not None:
                row_losses = row_losses * valid
            terms = {"cls": row_losses.sum() / normalizer * self.weights["cls"]}
            if localization_weight is not None:
                localization_weight = localization_weight.detach().float()
                if self.normalizer == "positives":
                    normalizer = process_mean(localization_weight.sum())
            for name, values in localization.items():
                values = values.float() if localization_weight is None else values.float() * localization_weight
                terms[name] = (values.sum() + _zero(logits)) / normalizer * self.weights[name]
        return terms

    def shared_count(self, positives: Tensor | float, like: Tensor) -> Tensor:
        """What to give as `count` for several sets of as many positives, (): processes exchange it once for all sets.

        Args:
            positives: number of positives here; `like`: a tensor on the device of the exchange.
        """
        return process_mean(_scalar(positives, like))

    def _normalizer(self, logits: Tensor, valid: Tensor | None, positives: int, count: Tensor | float | None) -> Tensor:
        if count is not None:
            return _scalar(count, logits).clamp(min=1)
        if self.normalizer == "positives":
            return self.shared_count(positives, logits)
        return _scalar(len(logits) if valid is None else valid.sum(), logits).clamp(min=1)
