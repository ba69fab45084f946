"""Parse untrusted YAML and JSON: refuse duplicate keys with different values, and YAML that expands without bound.

A few lines of YAML can expand to more values than fit into memory, since aliases repeat what they refer to.
"""

from __future__ import annotations

from typing import Any

import yaml

from brs_detr.user_files import printable

MAX_VALUES = 200_000  # of a YAML document; the data.yaml of a thousand classes has a few thousand


class TwoValuesError(ValueError):
    """An object of a JSON has a key twice, with different values, so its meaning is ambiguous."""


def dict_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dictionary from the pairs of a JSON object (an `object_pairs_hook` for `json.loads`).

    Raises:
        TwoValuesError: a key has two different values. Without the hook the last one would be used.
    """
    entry = dict(pairs)
    if len(entry) < len(pairs):  # the slow check only for objects with a repeated key
        first: dict[str, Any] = {}
        for key, value in pairs:
            if first.setdefault(key, value) != value:
                name = printable(key[:60])
                raise TwoValuesError(
                    f"one of its objects has the key `{name}` twice, with two values; keep one of them"
                )
    return entry


def load_yaml(text: str, loader: type) -> Any:
    """Parse a YAML document.

    Args:
        text: text of one document.
        loader: a loader class of yaml that constructs plain values only.

    Raises:
        yaml.YAMLError: the text is not YAML, or its aliases expand to too many values.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        _limit_values(node)
        return reader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        reader.dispose()


def _limit_values(root: yaml.Node) -> None:
    """Count the values with the repetitions by aliases, visiting each node only once, and refuse too many."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in inside:
            raise yaml.YAMLError("an alias refers to a node that it is a part of")
        if id(node) not in sizes:
            inside.add(id(node))
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            own = len(node.value) // 64 if isinstance(node, yaml.ScalarNode) else 0  # a long string counts as several
            sizes[id(node)] = 1 + own + sum(map(size, parts))
            inside.remove(id(node))
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise yaml.YAMLError(f"it expands to more than {MAX_VALUES:,} values")
