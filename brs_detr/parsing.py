"""Parse untrusted YAML and JSON: refuse duplicate keys with different values, and YAML that expands without bound.

A few lines of YAML can expand to more values than fit into memory, since aliases repeat what they refer to.
"""

from __future__ import annotations

import re
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


class SettingsLoader(yaml.SafeLoader):
    """YAML whose plain scalars are text, but for null and integers that are written as Python prints them.

    YAML 1.1, which PyYAML reads, takes `no` for false, 007 and 020 for octal numbers, 12:30 for 750 and 2024_01_15 for
    20240115: a folder of such a name would become another one. What else may stand for a number the setting decides.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._unique: set[int] = set()  # ids of the mappings that have been looked at

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Insert the mappings that `<<` names, after a look at the keys that are written: none of them twice.

        Before, since a key may be written in both, and once per mapping, since one that is merged is flattened first.
        """
        if id(node) not in self._unique:
            self._unique.add(id(node))
            self._refuse_repeated_keys(node)
        super().flatten_mapping(node)

    def _refuse_repeated_keys(self, node: yaml.MappingNode) -> None:
        keys = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            key = repr(key) if isinstance(key, (list, dict)) else key  # refused below, as keys that are not hashable
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is written twice", node.start_mark)
            keys.add(key)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return the text of a scalar; JSON escapes a character above U+FFFF as two, which are joined."""
        text = super().construct_scalar(node)
        if not re.search("[\ud800-\udbff][\udc00-\udfff]", text):
            return text
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


# integers of up to 18 digits fit into 64 bits; Python refuses to convert those of thousands of digits
SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"(?:0|-?[1-9][0-9]{0,17})\Z"), list("-0123456789")
)


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
