"""Starting from the weights of another run, also one with other classes.

Which tensors depend on the classes is not guessed from their names or from a matching number (four boxes coordinates,
four classes): a second detector with one class more shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Transfer:
    """What `load_matching` did, by tensor name.

    Attributes:
        kept: loaded as they are.
        by_class: rows of the classes that both detectors know were copied; the other rows are fresh.
        fresh: in the model, but absent from the file or of another shape.
        unused: in the file only.
    """

    kept: list[str]
    by_class: list[str]
    fresh: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.kept)} tensors loaded as they are"]
        titles = {
            "rows of shared classes loaded, the others re-initialised": self.by_class,
            "re-initialised": self.fresh,
            "in the file but unused": self.unused,
        }
        lines += [f"{len(names)} {title}: {', '.join(names)}" for title, names in titles.items() if names]
        return "\n".join(lines)


def rows_per_class(model: nn.Module, one_class_more: nn.Module) -> dict[str, int]:
    """Rows that each class owns in the class-dependent tensors of a detector, by tensor name.

    Args:
        model: the detector.
        one_class_more: the same detector, built for one class more.
    """
    larger = one_class_more.state_dict()
    growth = {
        name: larger[name].shape[0] - tensor.shape[0] for name, tensor in model.state_dict().items() if tensor.dim()
    }
    return {name: rows for name, rows in growth.items() if rows}


@torch.no_grad()
def load_matching(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    old_classes: Sequence[str],
    classes: Sequence[str],
    class_rows: Mapping[str, int],
    objectness: Collection[str] = (),
) -> Transfer:
    """Load every tensor that fits; class-dependent ones row by row for the class names that both sides share.

    Args:
        model: the detector to fill, in place.
        tensors: state dict of another detector.
        old_classes: class names of `tensors`.
        classes: class names of `model`.
        class_rows: of `rows_per_class`; may be empty where the classes are the same.
        objectness: class-dependent tensors whose first row means "any object", whatever the classes; it is copied.
    """
    shared = [(old_classes.index(name), new) for new, name in enumerate(classes) if name in old_classes]
    same = list(old_classes) == list(classes)
    kept, by_class, fresh, filled = [], [], [], {}
    for name, target in model.state_dict().items():
        source, rows = tensors.get(name), class_rows.get(name, 0)
        if source is None:
            fresh.append(name)
        elif (same or not rows) and source.shape == target.shape:
            filled[name] = source
            kept.append(name)
        elif rows and (pairs := [(0, 0)] if name in objectness else shared) and source.shape[1:] == target.shape[1:]:
            filled[name] = _copy_rows(source, target, pairs, rows, len(old_classes), len(classes))
            by_class.append(name)
        else:
            fresh.append(name)
    model.load_state_dict(filled, strict=False)
    return Transfer(kept, by_class, fresh, sorted(set(tensors) - set(model.state_dict())))


def _copy_rows(source: Tensor, target: Tensor, shared: list[tuple[int, int]], rows: int, old: int, new: int) -> Tensor:
    """`target` with the rows of shared classes, and those behind the last class (background), taken from `source`."""
    result = target.clone()
    for before, after in shared:
        result[after * rows : (after + 1) * rows] = source[before * rows : (before + 1) * rows]
    if source.shape[0] - old * rows == target.shape[0] - new * rows:
        result[new * rows :] = source[old * rows :]
    return result
