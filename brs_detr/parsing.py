"""Parsing YAML and JSON that someone else may have written: no silent choice between two values, no endless values.

A few lines of YAML can stand for more values than there is memory, since an alias repeats what it names.
"""

from __future__ import annotations

from typing import Any

import yaml

from brs_detr.user_files import printable

MOST_VALUES = 200_000


class TwoValuesError(ValueError):
    """An object of a JSON has a key twice, with different values; which of them was meant, nobody knows."""


def dict_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads`: the object as a dictionary, as without a hook.

    Raises:
        TwoValuesError: a key has two values. Without a hook the last one would be taken.
    """
    entry = dict(pairs)
    if len(entry) < len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            if first.setdefault(key, value) != value:
                name = printable(key[:60])
                raise TwoValuesError(
                    f"one of its objects has the key `{name}` twice, with two values; keep one of them"
                )
    return entry


def load_yaml(text: str, loader: type) -> Any:
    """The value that a YAML text stands for.

    Args:
        text: of one document.
        loader: a class of yaml's that makes nothing but plain values.

    Raises:
        yaml.YAMLError: it is no YAML, or its aliases repeat one another until there are too many values.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _require_few(node)
        return reader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        reader.dispose()


def _require_few(root: yaml.Node) -> None:
    """Count the values as often as aliases repeat them, without walking through the repetitions."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in inside:
            raise yaml.YAMLError("an alias in it stands for what it is a part of")
        if id(node) not in sizes:
            inside.add(id(node))
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            own = len(node.value) // 64 if isinstance(node, yaml.ScalarNode) else 0  # a long text counts as many values
            sizes[id(node)] = 1 + own + sum(map(size, parts))
            inside.remove(id(node))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise yaml.YAMLError(f"it stands for more than {MOST_VALUES:,} values")
