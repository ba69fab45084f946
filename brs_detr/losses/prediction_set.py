"""One set of predictions as an objective takes it, and the check that its parts fit each other."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from .checks import check_labels, check_per_positive, check_set, check_subset
from .distributed import SharedCount
from .step_sums import offset_rows


class SubsetLoss(NamedTuple):
    """Losses of some of the positives, such as those of masks, of which a step predicts no more than its memory allows.

    Attributes:
        values: (S,), not reduced.
        chosen: (S,) int64, the positive that each value belongs to: 0..P-1, none twice, in any order. These are
            positions among the positives, not rows of the logits.
    """

    values: Tensor
    chosen: Tensor


BoxLosses = Mapping[str, Tensor | SubsetLoss]


class PredictionSet(NamedTuple):
    """What an objective needs to know of one set of N predictions of which P are positive, or of L such sets.

    With a leading dimension L on every tensor the sets, such as those of a decoder's L layers, are computed together,
    and every term is (L,): what L calls return. All of them have P positives and share one normalizer.

    Attributes:
        logits: (N, C) or (L, N, C), one sigmoid logit per class; C + 1 with the background last for softmax cross
            entropy.
        labels: (N,) or (L, N) int64; 0..C-1 positive, C background.
        quality: (P,) or (L, P), IoU of each positive in row order; detached.
        box_losses: name -> (P,) or (L, P), box losses of the positives, not reduced; or, of one set, a `SubsetLoss` of
            some of them.
        rows: (P,) or (L, P) int64, ascending rows of the positives of each set; None: read from the labels, for which a
            GPU is waited for.
        valid: (N,) or (L, N) bool; False rows are ignored. None: all rows count.
        box_weight: (P,) or (L, P), relative weights of the box losses, whose sum normalizes these terms; None: all
            weigh the same.
        normalizer: what score-based terms are divided by in place of the objective's own number of positives or rows.
            Sets that have as many positives may share one `SharedCount`. A ranking loss is a mean over its own
            positives and has no other divisor.
        ignored: (N, C) or (L, N, C) bool, logits of valid rows that a ranking leaves out; none of a positive's own
            class. Score-based losses refuse it.
    """

    logits: Tensor
    labels: Tensor
    quality: Tensor
    box_losses: BoxLosses
    rows: Tensor | None = None
    valid: Tensor | None = None
    box_weight: Tensor | None = None
    normalizer: Tensor | SharedCount | None = None
    ignored: Tensor | None = None

    def checked(self, classes: int) -> "CheckedSet":
        """Check all attributes against each other, and read the `rows` from the labels where they are not given.

        Args:
            classes: C.

        Raises:
            ValueError: when shapes or types do not fit, a label is out of range, or a positive row is background or
                ignored (on a GPU the device asserts what concerns values).
        """
        check_set(self.logits, self.labels, self.valid, self.rows, self.ignored)
        single = self.logits.ndim == 2

        def layered(values: Tensor) -> Tensor:
            return values[None] if single else values

        logits, labels, quality = layered(self.logits), layered(self.labels), layered(self.quality)
        optional = (self.valid, self.box_weight, self.rows, self.ignored)
        valid, box_weight, rows, ignored = (None if values is None else layered(values) for values in optional)
        if rows is None:
            rows = self._rows_of_labels(classes, labels, valid)
        if quality.shape[-1] != rows.shape[1]:
            raise ValueError(
                f"quality has {quality.shape[-1]} entries for {rows.shape[1]} positive rows: "
                "give one per positive, in row order"
            )
        check_per_positive("quality", quality, rows)
        for name, loss in self.box_losses.items():
            if not isinstance(loss, SubsetLoss):
                check_per_positive(name, loss, rows[0] if single else rows)
            elif single:
                check_subset(name, loss.values, loss.chosen, rows.shape[1])
            else:
                raise ValueError(
                    f"{name}: losses of some of the positives have no leading dimension. "
                    "Give the objective one set at a time."
                )
        if box_weight is not None:
            check_per_positive("box_weight", box_weight, rows)
        check_labels(labels, classes, valid, rows)
        box_losses = {
            name: loss if isinstance(loss, SubsetLoss) else layered(loss) for name, loss in self.box_losses.items()
        }
        entries = offset_rows(rows, logits.shape[1])
        return CheckedSet(
            logits, labels, quality, box_losses, rows, entries, valid, box_weight, self.normalizer, ignored, single
        )

    def _rows_of_labels(self, classes: int, labels: Tensor, valid: Tensor | None) -> Tensor:
        """Return the rows (L, P) whose labels (L, N) are positive.

        Raises:
            ValueError: the sets have different numbers of positives.
        """
        positive = (labels >= 0) & (labels < classes)
        layer, row = (positive if valid is None else positive & valid).nonzero().unbind(1)
        count = len(row) // len(labels)
        if len(labels) > 1 and not layer.equal(layer.new_tensor(range(len(labels))).repeat_interleave(count)):
            raise ValueError(
                "labels: the sets differ in their number of positives. Give the objective sets that have as many."
            )
        return row.view(len(labels), count)


class CheckedSet(NamedTuple):
    """A `PredictionSet` whose attributes fit each other, always with the leading dimension L; one set has L = 1.

    `entries` (L * P,) are the rows among those of all sets, entries of `labels.flatten()`; `single` says that the terms
    are expected without the leading dimension. The other attributes are those of the set.
    """

    logits: Tensor
    labels: Tensor
    quality: Tensor
    box_losses: BoxLosses
    rows: Tensor
    entries: Tensor
    valid: Tensor | None
    box_weight: Tensor | None
    normalizer: Tensor | SharedCount | None
    ignored: Tensor | None
    single: bool

    def counted(self) -> Tensor | None:
        """Return which logits take part in a ranking, (L, N, C) bool; None: all."""
        valid = None if self.valid is None else self.valid[..., None].expand_as(self.logits)
        if self.ignored is None:
            return valid
        return ~self.ignored if valid is None else valid & ~self.ignored

    def positive_labels(self) -> Tensor:
        """Return the label of each positive, (L, P)."""
        return self.labels.gather(1, self.rows)

    def box_terms(self) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor | None]]:
        """Go through the box losses in float32.

        Yields:
            the name; the losses (L, S), S = P but for a `SubsetLoss`; their weights (L, S), detached, None: all the
            same; and of a `SubsetLoss` the positives (S,) that it is of, None: all.
        """
        weights = None if self.box_weight is None else self.box_weight.detach().float()
        for name, loss in self.box_losses.items():
            if isinstance(loss, SubsetLoss):
                chosen = loss.chosen
                yield name, loss.values[None].float(), None if weights is None else weights[:, chosen], chosen
            else:
                yield name, loss.float(), weights, None

    def shaped(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return terms (L,) as the caller expects them: scalars for one set."""
        return {name: term.squeeze(0) for name, term in terms.items()} if self.single else terms
