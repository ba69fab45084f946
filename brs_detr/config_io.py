"""Strict updates of nested dataclasses from YAML: the machinery under `config.py`, which knows no particular setting.

Unknown keys are refused with the nearest valid name, values are converted to the annotated type or refused, and every
message names the file (or "command line") and the setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml

from brs_detr.config_fields import NotEmpty, Null, Range, alternatives_of, marks_of
from brs_detr.exit_codes import Failure
from brs_detr.parsing import SettingsLoader, load_yaml

NO_ALIASES: Mapping[str, str] = types.MappingProxyType({})


class ConfigError(Failure, ValueError):
    """A setting that cannot be used; the message says which, where, and what to write instead."""


def update(
    config: Any,
    layer: Any,
    source: str,
    aliases: Mapping[str, str] = NO_ALIASES,
    *,
    prefix: str = "",
    root: Any = None,
) -> Any:
    """Return a copy of a config dataclass with the values of a nested mapping; strict about keys and types.

    Args:
        config: any dataclass. Its class may name in `SHARED_SECTION` a section of its own and of its sections, whose
            settings can be given here once for all of them.
        layer: mapping from its field names to values or, for its sections, to further mappings.
        source: named in errors: the file, or "command line".
        aliases: what to say of names that other programs use; see `suggest`.
        prefix: dotted name of `config` itself, "" for the root.
        root: the outermost dataclass, searched for the nearest valid name.

    Raises:
        ConfigError: unknown key, value of the wrong type.
    """
    root = config if root is None else root
    if not isinstance(layer, Mapping):
        example = aliases.get(prefix, "")
        example = f": {example}" if " " in example else f", e.g. {example}={str(layer)[:80]}" if example else ""
        raise ConfigError(
            f"{source}: {prefix or 'the recipe'} is a section, not a value; write its settings one by one{example}"
        )
    tags = _shared_tags(config)
    for key in sorted(layer, key=lambda key: key not in tags):  # which other settings there are depends on the tags
        if shared := _shared_layer(config, str(key), layer[key]):
            config = update(config, shared, source, aliases, prefix=prefix, root=root)
    hints = typing.get_type_hints(type(config), include_extras=True)
    names = [f.name for f in dataclasses.fields(config)]
    changes = {}
    for key, value in layer.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in names:
            if _shared_by(config, key):
                continue
            full = _full_name(name, value)
            siblings = [f"{prefix}.{known}" if prefix else known for known in names]
            hint = suggest(full, root, aliases, siblings) or f"; settings here are {', '.join(siblings)}"
            raise ConfigError(f"{source}: {full} is not a setting{hint}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            chosen = _choose(config, key, value, name, source)
            _refuse_settings_of_others(config, key, chosen, value, name, source)
            # names are suggested from the alternative that was chosen
            new_root = _replaced(root, name.split("."), chosen)
            changes[key] = update(chosen, value, source, aliases, prefix=name, root=new_root)
        else:
            changes[key] = _coerce(value, hints[key], name, source)
    return dataclasses.replace(config, **changes)


def _choose(config: Any, key: str, layer: Any, name: str, source: str) -> Any:
    """Return the section `key` of a config, or the alternative that the tag in `layer` asks for.

    Settings that differ from the former alternative's are kept where the new one has them too.
    """
    current, alternatives = getattr(config, key), alternatives_of(config, key)
    tag = dataclasses.fields(current)[0].name
    if not alternatives or not isinstance(layer, Mapping) or tag not in layer:
        return current
    former, chosen = (_alternative(alternatives, tag, value) for value in (getattr(current, tag), layer[tag]))
    if chosen is None:
        options = list(dict.fromkeys(option for item in alternatives for option in _tag_options(item, tag)))
        _coerce(layer[tag], Literal[tuple(options)], f"{name}.{tag}", source)  # raises
    if chosen is former:
        return current
    return _carry_over(former, current, dataclasses.replace(chosen, **{tag: layer[tag]}))


def _refuse_settings_of_others(config: Any, key: str, chosen: Any, layer: Any, name: str, source: str) -> None:
    """Raise for a setting that only other alternatives of section `key` have, with their tags."""
    alternatives, tag = alternatives_of(config, key), dataclasses.fields(chosen)[0].name
    own = {f.name for f in dataclasses.fields(chosen)}
    for wanted in layer if isinstance(layer, Mapping) else ():
        others = [item for item in alternatives if wanted in {f.name for f in dataclasses.fields(item)}]
        if wanted not in own and others and not _shared_by(chosen, str(wanted)):
            tags = list(dict.fromkeys(option for item in others for option in _tag_options(item, tag)))
            raise ConfigError(
                f"{source}: {name}.{wanted} is not a setting of {name}.{tag}={getattr(chosen, tag)}; it is one of "
                f"{', '.join(map(str, tags))}"
            )


def _replaced(config: Any, path: Sequence[str], section: Any) -> Any:
    """Return a config with another section at a path."""
    first, *rest = path
    value = _replaced(getattr(config, first), rest, section) if rest else section
    return dataclasses.replace(config, **{first: value})


def _alternative(alternatives: Sequence[Any], tag: str, value: Any) -> Any:
    """Return the alternative whose tag is the value, else the first one whose tag can be; None if there is none."""
    exact = [item for item in alternatives if getattr(item, tag) == value]
    possible = [item for item in alternatives if value in _tag_options(item, tag)]
    return next(iter(exact + possible), None)


def _tag_options(item: Any, tag: str) -> tuple[Any, ...]:
    return typing.get_args(typing.get_type_hints(type(item))[tag])


def _carry_over(former: Any, current: Any, chosen: Any) -> Any:
    """Return `chosen` with the settings in which `current` differs from `former`, where all three have them."""
    changes = {}
    for field in dataclasses.fields(chosen)[1:]:
        if not all(hasattr(item, field.name) for item in (former, current)):
            continue
        before, now, target = (getattr(item, field.name) for item in (former, current, chosen))
        if before == now or not _same_kind(target, now):
            continue
        changes[field.name] = _carry_all(before, now, target) if dataclasses.is_dataclass(now) else now
    return dataclasses.replace(chosen, **changes)


def _same_kind(first: Any, second: Any) -> bool:
    """Return True for values of one type, an optional one included, and sections of which one has further settings."""
    if first is None or second is None:
        return not dataclasses.is_dataclass(first) and not dataclasses.is_dataclass(second)
    return isinstance(first, type(second)) or isinstance(second, type(first))


def _carry_all(before: Any, now: Any, target: Any) -> Any:
    """Return `_carry_over` of a section, its first setting included.

    A section with another name, such as that of a backbone, was written for what it names, and is kept as it is.
    """
    first = dataclasses.fields(now)[0].name
    renamed = first == "name" and type(now) is type(target) and before.name != now.name
    if type(before) is not type(now) or renamed:
        return now
    kept = _carry_over(before, now, target)
    if getattr(before, first) == getattr(now, first):
        return kept
    return dataclasses.replace(kept, **{first: getattr(now, first)})


def _shared_by(config: Any, key: str) -> list[tuple[str, ...]]:
    """Return the paths of the sections, named `SHARED_SECTION`, to which a setting given for all of them belongs."""
    wanted = getattr(type(config), "SHARED_SECTION", None)
    return [path for path in _sections(config, wanted) if has_path(config, (*path, key))] if wanted else []


def _sections(config: Any, wanted: str) -> Iterator[tuple[str, ...]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == wanted:
            yield (field.name,)
        elif dataclasses.is_dataclass(value):
            yield from ((field.name, *path) for path in _sections(value, wanted))


def has_path(config: Any, path: Sequence[str]) -> bool:
    """Check whether a config has such a setting or section."""
    for key in path:
        if not hasattr(config, key):
            return False
        config = getattr(config, key)
    return True


def _shared_layer(config: Any, key: str, value: Any) -> dict[str, Any]:
    """Return the layer of a setting given once for all sections named `SHARED_SECTION`; empty for another setting."""
    shared: dict[str, Any] = {}
    for path in () if hasattr(config, key) else _shared_by(config, key):
        merge(shared, nested(path, {key: value}))
    return shared


def _shared_tags(config: Any) -> set[str]:
    """Return the first setting of each section named `SHARED_SECTION`, which chooses between alternatives of it."""
    wanted = getattr(type(config), "SHARED_SECTION", None)
    sections = [functools.reduce(getattr, path, config) for path in _sections(config, wanted)] if wanted else []
    return {dataclasses.fields(section)[0].name for section in sections}


def nested(path: Sequence[str], value: Any) -> Any:
    """Return the mapping of mappings in which `path` leads to a value."""
    for key in reversed(path):
        value = {key: value}
    return value


def merge(layer: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add the values of a nested mapping to another one, which it changes; a value replaces a former one."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(layer.get(key), dict):
            merge(layer[key], value)
        else:
            layer[key] = dict(value) if isinstance(value, Mapping) else value


def given_settings(config: Any, layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, list[str]]]:
    """Iterate over the settings in a layer that `update` has accepted for a config.

    Yields:
        (dotted name as it was given, value, names of the settings that it is): several for one given once for all
        sections named `SHARED_SECTION`.
    """
    for key, value in layer.items():
        name, own = f"{prefix}{key}", getattr(config, key, None)
        if dataclasses.is_dataclass(own):
            yield from given_settings(own, value, f"{name}.")
        elif hasattr(config, key):
            yield name, value, [name]
        else:
            paths = _shared_by(config, key)
            for rest, inner in flat(value):
                yield name + rest, inner, [f"{prefix}{'.'.join((*path, key))}{rest}" for path in paths]


def flat(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (".a.b", value) of each value of a nested mapping; ("", value) of one that is none."""
    if not isinstance(value, Mapping):
        yield "", value
        return
    for key, inner in value.items():
        yield from ((f".{key}{rest}", leaf) for rest, leaf in flat(inner))


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested plain values (tuples as lists), ready for YAML and JSON."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over (dotted name, value) of every setting of a nested dataclass."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def problems(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield what is wrong with the values of a config dataclass: ranges, then what its sections say of their own.

    A section says so in a method `problems(name)`; see `config_fields` for ranges.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from problems(value, f"{name}.")
        else:
            yield from _range_problems(name, value, hints[field.name])
    if hasattr(config, "problems"):
        yield from config.problems(prefix.rstrip("."))


def _range_problems(name: str, value: Any, hint: Any) -> Iterator[str]:
    marks = list(marks_of(hint))
    shown = list(value) if isinstance(value, tuple) else value
    if value == () and any(isinstance(mark, NotEmpty) for mark in marks):
        yield f"{name} needs at least one entry"
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
    # No setting is meant to be negative.
    for limits in [mark for mark in marks if isinstance(mark, Range)] + [Range(min=0)]:
        if complaint := limits.complaint(numbers):
            null = next((f", or null: {mark.meaning}" for mark in marks if isinstance(mark, Null)), "")
            yield f"{name}={shown} {complaint}{null}"


def is_text(config: Any, path: Sequence[str]) -> bool:
    """Check whether a setting is any text, such as a path, in a config or with another alternative of its sections."""
    places = [config]
    for key in path[:-1]:
        places = [place for place in places if key in {field.name for field in dataclasses.fields(place)}]
        inner = [section for place in places for section in (getattr(place, key), *alternatives_of(place, key))]
        places = [section for section in inner if dataclasses.is_dataclass(section)]
    hints = [typing.get_type_hints(type(place), include_extras=True).get(path[-1]) for place in places]
    return any(str in map(_bare, _options(hint)) for hint in hints)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, and of any other type itself."""
    bare = _bare(hint)
    return typing.get_args(bare) if typing.get_origin(bare) in (types.UnionType, typing.Union) else (bare,)


def parse_yaml(text: str, source: str) -> Any:
    """Parse a YAML text; ConfigError naming `source` where it is not YAML."""
    try:
        return load_yaml(text, SettingsLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def setting_names(root: Any) -> list[str]:
    """List the dotted names of all settings of a config."""
    return [name for name, _ in leaves(root)]


def nearest_setting(name: str, root: Any, aliases: Mapping[str, str], siblings: Sequence[str] = ()) -> str | None:
    """Guess the setting that a wrong name means, or return a sentence (with blanks) where it is not a setting here.

    Args:
        name: dotted, as it was written.
        root: the outermost dataclass.
        aliases: by a name, or the last word of one, the setting or the sentence.
        siblings: dotted names of the section where it was looked for.

    Returns:
        None where nothing is near.
    """
    name = name.replace("-", "_")
    last, everywhere = name.rsplit(".", 1)[-1], setting_names(root)
    if near := difflib.get_close_matches(name, everywhere, n=1, cutoff=0.9):  # a slip of the finger
        return near[0]
    for key in (name, last, last.lower()):
        if key in aliases:
            return aliases[key]
    right_word = [leaf for leaf in everywhere if leaf.rsplit(".", 1)[-1] == last]  # in the wrong section
    parts, known = name.split("."), {part for leaf in everywhere for part in leaf.split(".")}
    if not right_word or parts[0] in known:
        for part in set(parts) - known:  # a section that other programs, or this one formerly, have
            if " " in aliases.get(part, ""):
                return aliases[part]
    near = difflib.get_close_matches(name, right_word, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(name, everywhere, n=1, cutoff=0.6)
    return near[0] if near else None


def suggest(name: str, root: Any, aliases: Mapping[str, str], siblings: Sequence[str] = ()) -> str:
    """Format `nearest_setting` as the end of an error, "" where nothing is near."""
    near = nearest_setting(name, root, aliases, siblings)
    if near is None:
        return ""
    return f": {near}" if " " in near else f"; did you mean {near}?"


def _full_name(name: str, value: Any) -> str:
    """Return the dotted name of the first setting under an unknown section, to look for the nearest one."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    return name


def _coerce(value: Any, hint: Any, name: str, source: str, words: Sequence[str] = ()) -> Any:
    """Convert `value` to the annotated type, or raise a ConfigError, which names the `words` that are allowed too.

    Strings are parsed as numbers or booleans only where the field's type asks for it.
    """
    hint = _bare(hint)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        words = [word for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option)]
        if value is None or value in words:
            return value
        return _coerce(value, options[0], name, source, words)
    if origin is Literal:
        if value in options:
            return value
        near = difflib.get_close_matches(str(value), options, n=1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{source}: {name} must be one of {', '.join(options)}, not {_short(value)}{hint_text}")
    if origin is tuple:
        fixed = options[-1] is not Ellipsis
        if isinstance(value, (list, tuple)) and (not fixed or len(value) == len(options)):
            return tuple(_coerce(item, options[0], name, source) for item in value)
        wanted = f"a list of {len(options)} numbers" if fixed else "a list like [1, 2]"
        raise ConfigError(f"{source}: {name} must be {wanted}, not {_short(value)}")
    converted = _scalar(value, hint)
    if converted is None:
        kind = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[hint]
        kind = " or ".join([kind, *words])
        raise ConfigError(f"{source}: {name} must be {kind}, not {_short(value)}")
    return converted


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _scalar(value: Any, kind: type) -> Any:
    """Convert `value` to bool, int, float or str; None where it is not of that kind."""
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
    if isinstance(value, bool) or value is None:
        return None
    if kind is str:
        return str(value) if isinstance(value, (str, int, float)) else None
    if kind is int:
        written = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,18}", value)  # 007 is 7, as in YAML 1.2
        return int(value) if isinstance(value, int) or written else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number - number == 0 else None  # neither inf nor nan
