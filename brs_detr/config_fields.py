"""How a settings dataclass says what its values may be: ranges in the annotations, alternatives in the fields.

    @dataclass(frozen=True)
    class HeadConfig:
        nms_iou: Fraction = 0.7
        sample: Annotated[Count | None, Null("all")] = None
        objective: RankingConfig | ScoreConfig = one_of(RankingConfig(), ScoreConfig())

A field whose type is a union of dataclasses is chosen by their first field, the tag: `objective: {loss: focal}` takes
the alternative whose `loss` can be "focal". `config_io` applies all this; nothing here imports torch, so that settings
are checked before it is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, NamedTuple


class Range(NamedTuple):
    """What a number may be; every setting without one is at least 0.

    Attributes:
        min: smallest value. max: largest value.
        above: the value is larger than this. below: the value is smaller than this.
    """

    min: float = -math.inf
    max: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def complaint(self, values: list[float]) -> str | None:
        """Return what is wrong with the numbers, or None if they are all in range."""
        if any(value < self.min for value in values):
            return f"must be at least {self.min:g}"
        if any(value <= self.above for value in values):
            return f"must be above {self.above:g}"
        if any(value >= self.below for value in values):
            return f"must be below {self.below:g}"
        if any(value > self.max for value in values):
            return f"must lie between {max(self.min, 0):g} and {self.max:g}"
        return None


class Null(NamedTuple):
    """What `null` means for an optional setting, for error messages."""

    meaning: str


class UserPath:
    """Marks a path, in which `~` stands for the user's home."""


class NotEmpty:
    """Marks a list that needs at least one entry."""


FilePath = Annotated[str, UserPath()]
Count = Annotated[int, Range(min=1)]
Counts = Annotated[tuple[Count, ...], NotEmpty()]
Positive = Annotated[float, Range(above=0)]
Fraction = Annotated[float, Range(max=1)]
BelowOne = Annotated[float, Range(below=1)]


def one_of(default: Any, *others: Any) -> Any:
    """Declare a field of a union of dataclasses.

    Args:
        default: its value when nothing is said.
        others: what the field starts from when its tag is set to theirs.
    """
    return dataclasses.field(default=default, metadata={"alternatives": (default, *others)})
