"""The settings of a run: sections, each beside its readers, composed and read from recipes.

`load_config("configs/x.yaml", ["optim.lr=1e-4"])` starts from the defaults (the released R50 BRS-DETR), applies
the recipe's `base:` if it names one, the recipe, then the command line. A key that does not exist, a value of the wrong
type and a pair that cannot work together are refused at once, with the file and the nearest valid name; on the command
line also a setting that would have no effect. The number of classes is no setting: it is read from the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from brs_detr.config_aliases import ALIASES, migrate
from brs_detr.config_fields import FilePath, Unused, as_word, one_of, unused_settings, variants, with_home
from brs_detr.config_io import (
    ConfigError,
    flat,
    given_settings,
    has_path,
    is_text,
    leaves,
    merge,
    nearest_setting,
    nested,
    parse_yaml,
    problems,
    setting_names,
    to_dict,
    update,
)
from brs_detr.data.config import DataConfig
from brs_detr.engine.config import EvalConfig, OptimConfig, TrainConfig
from brs_detr.models.config import DETRConfig
from brs_detr.models.model_config import MODELS, ModelConfig
from brs_detr.recipes import read_layers


@dataclass(frozen=True)
class Config:
    """The settings of a run."""

    seed: int = 0
    output_dir: FilePath = "runs/default"
    data: DataConfig = DataConfig()
    model: ModelConfig = one_of(*MODELS)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    def unused(self, _: str) -> Iterator[Unused]:
        """Yield which settings are not read under those of other sections."""
        if not isinstance(self.model, DETRConfig):
            cause = f"model.name={self.model.name}"
            yield Unused("optim.sampling_offsets_lr_factor", cause, "choose a detector with a decoder")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `a.b=value` overrides.

    Args:
        path: of the recipe, or its name (`demo`); see `recipes.find_recipe`.
        overrides: settings to change.

    Raises:
        ConfigError: unknown key, wrong type, impossible pair, unreadable file; or code of the recipe's to import, which
            `overrides` do not name.
    """
    recipe = Config()
    for source, layer in read_layers(path):
        recipe = update(recipe, _one_dataset(migrate(layer)), source, ALIASES)
    config = apply_overrides(recipe, overrides)
    _require_named_code(config, recipe, overrides, path)
    return config


def _require_named_code(config: Config, recipe: Config, overrides: Sequence[str], path: str | Path) -> None:
    """Refuse to import what only a recipe names: recipes are passed on, and no file may choose the code that runs.

    Raises:
        ConfigError: with the setting that allows it.
    """
    setting, custom = "data.augment.custom", config.data.augment.custom
    if custom is not None and custom == recipe.data.augment.custom and setting not in override_names(overrides):
        raise ConfigError(
            f"{path}: {setting}={custom} is code to import, and a recipe may come from anyone. If you trust it, add "
            f"{setting}={custom} to the command line, else {setting}=null."
        )


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Apply `a.b=value` strings to a config and check the result.

    Raises:
        ConfigError: as `check`; one of `overrides` is no setting, has no `=` or has no effect in the result. One
            of `config` may have none: a recipe is read by the command lines that change it, too.
    """
    layer = _read_overrides(config, overrides)
    config = _updated(config, layer)
    check(config)
    for name, value, complaint in _without_effect(config, layer):
        raise ConfigError(
            f"{name}={as_word(value)}: has no effect with {complaint.cause}. Leave it out, or {complaint.action}."
        )
    return config


def _without_effect(config: Config, layer: Mapping[str, Any]) -> Iterator[tuple[str, Any, Unused]]:
    """Yield (name, value, reason) of each setting in a layer that is not read under the settings of a config.

    What switches something off (null, false, an empty list) is as it was asked for where nothing is on.
    """
    unused = list(unused_settings(config))
    off = {name for name, value in leaves(config) if value is None or value is False or value == ()}
    for name, value, settings in given_settings(config, layer):
        if off.issuperset(settings):
            continue
        found = [next((one for one in unused if f"{own}.".startswith(f"{one.name}.")), None) for own in settings]
        reasons = [one for one in found if one is not None]
        if reasons and len(reasons) == len(settings):
            yield name, value, reasons[0]


def check_overrides(overrides: Sequence[str]) -> None:
    """Check names and types of `a.b=value` strings that are for the config of a file, before it is read.

    A setting passes that any detector has, or any other alternative of its section: the file says which one it is of.

    Raises:
        ConfigError: unknown name, wrong type, not of that form.
    """
    for name, value in flat(_read_overrides(Config(), overrides)):
        path = name[1:].split(".")
        # those first that have the setting, or its section: what they say of the value or of a misspelt name is raised
        configs = sorted(variants(Config(), path), key=lambda one: [not has_path(one, path[:n]) for n in (None, -1)])
        refusals = (_refusal(config, nested(path, value)) for config in configs)
        first = next(refusals)
        if first is not None and all(refusals):
            raise first


def _refusal(config: Config, layer: Mapping[str, Any]) -> ConfigError | None:
    """Return what is wrong with the settings of the command line for a config."""
    try:
        update(config, layer, "command line", ALIASES)
    except ConfigError as error:
        return error
    return None


def override_names(overrides: Sequence[str]) -> list[str]:
    """Return the names of the settings that `a.b=value` strings change, in their order."""
    return [_split_override(text)[0] for text in overrides]


def dataset_overrides(overrides: Sequence[str]) -> list[str]:
    """Return those of `a.b=value` strings that name a dataset in one word, `data=` or `data.source=`."""
    return [text for text in overrides if _split_override(text)[0] in ("data", "data.source")]


def _split_override(text: str) -> tuple[str, str, str]:
    """Split `a.b=value`, which may be written as the option `--a.b=value`, at its first `=`."""
    key, equals, value = text.partition("=")
    return key.strip().lstrip("-"), equals, value


def _read_overrides(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """Read `a.b=value` strings as one layer of settings of a config."""
    layer: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = _split_override(text)
        if not equals or not key:
            raise ConfigError(f"command line: {text!r} is not of the form section.setting=value{_written_out(text)}")
        path = key.split(".")
        if key == "data" and value and value[0] not in "{[":
            path = ["data", "source"]
        setting = nested(path, _read_value(path, value, key))
        if len(path) == 1 and not isinstance(setting[path[0]], Mapping):
            update(config, setting, "command line", ALIASES)  # a value in the place of a section would be merged over
        merge(layer, setting)
    _refuse_two_datasets(layer)
    return layer


def _updated(config: Config, layer: Mapping[str, Any]) -> Config:
    """Apply all settings of the command line at once, so that the order of `model.name` and others does not matter."""
    return with_home(update(config, _one_dataset(layer), "command line", ALIASES))


def _read_value(path: Sequence[str], written: str, key: str) -> Any:
    """Read a value of the command line: as YAML, but as it is written where the setting at `path` is text.

    A path may hold ` #`, `: ` or bytes that are not UTF-8, which YAML would read otherwise or refuse. Quotes around it
    all, brackets and the words for null mean what they mean in YAML.
    """
    text = written.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    nulls = ("null",) if key == "data" else ("", "null", "Null", "NULL", "~")  # data=~ is a folder
    if not is_quoted and text not in nulls and text[:1] not in ("[", "{") and is_text(Config(), path):
        return text
    return parse_yaml(written, f"command line, {key}") if written else None


_PATHS = ("root", "train_json", "train_images", "val_json", "val_images")


def _one_dataset(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Let `data.source` and the paths of section `data` replace each other: the later recipe or command line wins.

    Also reads `data: FOLDER` as `data: {source: FOLDER}`.
    """
    data = layer.get("data")
    if isinstance(data, str):
        data = {"source": data}
    if not isinstance(data, Mapping):
        return dict(layer)
    if data.get("source") is not None:
        data = {"val_fraction": None, **data}  # that of another dataset
    elif any(name in data for name in _PATHS):
        data = {"source": None, "val_fraction": None, **data}
    return {**layer, "data": data}


def _refuse_two_datasets(layer: Mapping[str, Any]) -> None:
    data = layer.get("data")
    given = [f"data.{name}" for name in _PATHS if name in data] if isinstance(data, Mapping) else []
    if isinstance(data, Mapping) and data.get("source") is not None and given:
        raise ConfigError(
            f"command line: data={data['source']} stands for all paths of the dataset, and {given[0]} is one of them. "
            f"Leave out {' and '.join(given)}, or leave out data= and give the paths one by one."
        )


def _written_out(word: str) -> str:
    """Say how to write a word that has no value, where it is the name of a setting or near one."""
    near = word if word in setting_names(Config()) else nearest_setting(word, Config(), ALIASES)
    return f"; write {near}=VALUE, without blanks" if near is not None and " " not in near else ""


def option_as_setting(option: str, value: str) -> str:
    """Rewrite `--data.root` with its value as `data.root=value`, where the name is complete.

    Raises:
        ConfigError: it is not; says which setting was probably meant and how that is written.
    """
    name, written = option.lstrip("-").replace("-", "_"), f"{option} {value}".strip()
    exact = name in setting_names(Config()) or name == "data"
    if exact and value:
        return f"{name}={value}"
    near = name if exact else nearest_setting(name, Config(), ALIASES)
    if near is None:
        raise ConfigError(
            f"{option}: neither an option nor near a setting. Settings are written section.setting=value; "
            "`brs-detr info RECIPE --settings` lists them."
        )
    if " " in near:
        raise ConfigError(f"{written}: {near}")
    raise ConfigError(f"{written}: settings are written section.setting=value. Write {near}={value or 'VALUE'}.")


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Restore the config that `to_dict` described, for instance the one inside a checkpoint named `source`."""
    config = update(Config(), migrate(values), source, ALIASES)
    check(config)
    return config


def dump(config: Config) -> str:
    """Format the resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def differences(old: Config, new: Config) -> list[str]:
    """List `a.b: old -> new` for every setting in which two configs differ."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{name}: {before.get(name, 'not a setting')} -> {after.get(name, 'not a setting')}"
        for name in {**before, **after}
        if name not in before or name not in after or before[name] != after[name]
    ]


def check(config: Config) -> None:
    """Refuse values out of range and pairs that cannot work together.

    Raises:
        ConfigError: naming the settings and what to change.
    """
    for problem in problems(config):
        raise ConfigError(problem)
