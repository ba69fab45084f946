"""How a settings dataclass says what its values may be and when they are read: annotations, alternatives.

    @dataclass(frozen=True)
    class HeadConfig:
        nms_iou: Fraction = 0.7
        sample: Annotated[Count | None, Null("all")] = None
        assigner: Literal["max_iou", "atss"] = "max_iou"
        topk: Annotated[Count, OnlyWith("assigner", "atss")] = 9
        objective: RankingConfig | ScoreConfig = one_of(RankingConfig(), ScoreConfig())

A field whose type is a union of dataclasses is chosen by their first field, the tag: `objective: {loss: focal}` takes
the alternative whose `loss` can be "focal". `config_io` applies all this; nothing here imports torch, so that settings
are checked before it is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple


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


class Unused(NamedTuple):
    """A setting or section that is not read under the other settings.

    Attributes:
        name: dotted.
        cause: the other setting, `a.b=value`.
        action: what would have it read, as the end of "Leave it out, or ...".
    """

    name: str
    cause: str
    action: str


class OnlyWith:
    """Marks a setting that is read only where another one has one of some values.

    Args:
        setting: the other one, by its dotted name below the section of the marked one.
        values: with which it is read.
    """

    def __init__(self, setting: str, *values: Any) -> None:
        self.setting, self.values = setting, values

    def complaint(self, section: Any, prefix: str, key: str) -> Unused | None:
        """Return why setting `key` of a section with this prefix is not read, or None if it is."""
        value = section
        for part in self.setting.split("."):
            value = getattr(value, part)
        if value in self.values:
            return None
        other, *words = (f"{prefix}{self.setting}", *map(as_word, self.values))
        wanted = f"{other} to {', '.join(words[:-1])} or {words[-1]}" if words[1:] else f"{other}={words[0]}"
        return Unused(f"{prefix}{key}", f"{other}={as_word(value)}", f"set {wanted}")


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


def alternatives_of(config: Any, key: str) -> tuple[Any, ...]:
    """Return what the section `key` of a config can start from; empty where its type is no union."""
    field = next(f for f in dataclasses.fields(config) if f.name == key)
    return tuple(field.metadata.get("alternatives", ()))


def variants(config: Any, path: Sequence[str]) -> Iterator[Any]:
    """Yield a config, and the same with each alternative of the sections on the path of a setting."""
    key, *rest = path
    section = getattr(config, key, None)
    if not rest or not dataclasses.is_dataclass(section):
        yield config
        return
    for one in (section, *alternatives_of(config, key)):
        yield from (dataclasses.replace(config, **{key: inner}) for inner in variants(one, rest))


def as_word(value: Any) -> str:
    """Format a value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(as_word, value))}]" if isinstance(value, (list, tuple)) else str(value)


def marks_of(hint: Any) -> Iterator[Any]:
    """Yield the annotations of a type and of the types in it."""
    if typing.get_origin(hint) is Annotated:
        yield from hint.__metadata__
    if typing.get_origin(hint) is not Literal:
        for inner in typing.get_args(hint):
            yield from marks_of(inner)


def unused_settings(config: Any, prefix: str = "") -> Iterator[Unused]:
    """Yield the settings and sections of a config dataclass that are not read under its other settings.

    `OnlyWith` says so of a setting, and a section of those below it in a method `unused(name)`.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        marks = [mark for mark in marks_of(hints[field.name]) if isinstance(mark, OnlyWith)]
        found = (mark.complaint(config, prefix, field.name) for mark in marks)
        yield from (one for one in found if one is not None)
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from unused_settings(value, f"{prefix}{field.name}.")
    if hasattr(config, "unused"):
        yield from config.unused(prefix.rstrip("."))


def with_home(config: Any) -> Any:
    """Return a config with the user's home for the `~` of its paths: few shells put it there, and no recipe."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_home(value)
        elif isinstance(value, str) and any(isinstance(mark, UserPath) for mark in marks_of(hints[field.name])):
            changes[field.name] = os.path.expanduser(value)
    return dataclasses.replace(config, **changes)
