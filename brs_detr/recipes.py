"""Find a recipe by its name and read it: those in the working directory's `configs/` first, then the package's own.

`demo`, `demo.yaml` and `configs/demo.yaml` name the same recipe. What is often given in a recipe's place (a dataset, a
run, a setting) is refused with the command that was probably meant. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brs_detr.config_io import ConfigError, parse_yaml
from brs_detr.user_files import MODEST_BYTES, UserFileError, printable, read_file

ENDINGS = (".yaml", ".yml")
GROUPS = ("cnn",)  # folders inside configs/ whose recipes are found by their names too
_PACKAGE = Path(__file__).resolve().parent
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_WEIGHTS_OF_RUN = ("best.safetensors", "last.safetensors")


def packaged_folder() -> Path:
    """Return the folder of the program's own recipes: inside an installed package, at the top of a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """List the recipes in the working directory's `configs/` and the package's own, without ending."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def nearest_recipe(name: str | Path) -> str | None:
    """Return the recipe whose name is most like that of a file, if one is."""
    stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    return next(iter(difflib.get_close_matches(stem, recipe_names(), n=1, cutoff=0.5)), None)


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        name: path of a file, or the name of a recipe with or without `configs/` and ending.

    Raises:
        ConfigError: there is none, or it is something else than a recipe; names the nearest recipe and all of them.
    """
    path = Path(name)
    _refuse_other_kinds(path)
    if os.path.isfile(path):
        return path
    groups = {Path("."), Path("configs"), *(Path(group) for group in GROUPS), *(Path("configs", g) for g in GROUPS)}
    if path.parent in groups:
        for folder in _folders():
            for candidate in (folder / path.name, *(folder / f"{path.name}{ending}" for ending in ENDINGS)):
                if path.name and os.path.isfile(candidate) and candidate.suffix in ENDINGS:
                    return candidate
    if os.path.isdir(path):
        raise ConfigError(_about_folder(path))
    if not os.path.lexists(path):
        raise ConfigError(_about_unknown_name(str(name)))
    return path  # a pipe, a device: refused when it is read


def is_recipe(name: Path) -> bool:
    """Check whether a word is meant as a recipe, not as a dataset or weights: by its ending, or a name without one."""
    return name.suffix in ENDINGS or not (name.suffix or name.exists())


def read_layers(name: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the recipe's base, if it names one, then the recipe, each with the name to use in errors.

    Raises:
        ConfigError: a file is missing, cannot be read, or is not a recipe.
    """
    path = find_recipe(name)
    recipe = _read(path)
    base = recipe.pop("base", None)
    if base is not None:
        parent_path = path.parent / str(base)
        parent_path = parent_path if os.path.isfile(parent_path) else find_recipe(str(base))
        parent = _read(parent_path)
        if "base" in parent:
            raise ConfigError(f"{parent_path}: a base may not have a base of its own; copy its settings here")
        yield str(parent_path), parent
    yield str(path), recipe


def _folders() -> list[Path]:
    tops = (Path("configs"), packaged_folder())
    return [folder for top in tops for folder in (top, *(top / name for name in GROUPS)) if folder.is_dir()]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_file(path, MODEST_BYTES).decode("utf-8")
    except (UserFileError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the recipe cannot be read ({error}); recipes lie in configs/") from None
    except OSError as error:
        raise ConfigError(f"{path}: the recipe cannot be read ({error.strerror}); recipes lie in configs/") from None
    recipe = parse_yaml(text, str(path))
    if isinstance(recipe, dict) and ("names" in recipe or isinstance(recipe.get("train"), (str, list))):
        raise ConfigError(
            f"{path}: this describes a YOLO dataset, not a recipe. Name a recipe first, e.g. brs_detr_small data={path}"
        )
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: a recipe is a list of `section: settings`, not {type(recipe).__name__}")
    return recipe


def _refuse_other_kinds(path: Path) -> None:
    """Refuse a file whose name says that it is a dataset or weights: its content would only give a parser's error."""
    endings = [suffix.lower() for suffix in path.suffixes[-2:]]
    if ".json" in endings:
        raise ConfigError(
            f"{path}: this is a dataset, not a recipe. Name a recipe first, e.g. "
            f"brs_detr_small data={path} data.val_fraction=0.1"
        )
    if endings[-1:] and endings[-1] in _WEIGHTS:
        raise ConfigError(
            f"{path}: these are weights, not a recipe. Name a recipe first, e.g. "
            f"brs_detr_small train.init_from={path}; `brs-detr eval {path}` evaluates them"
        )


def is_run_folder(path: Path) -> bool:
    """Check whether a folder holds weights or states of a training."""
    return any((path / name).is_file() for name in _WEIGHTS_OF_RUN) or (path / "state").is_dir()


def _about_folder(path: Path) -> str:
    if is_run_folder(path):
        again = f"{path / 'config.yaml'} --resume goes on with it"
        return f"{path}: this is the folder of a run, not a recipe: {again}, `brs-detr eval {path}` evaluates it"
    return f"{path}: this is a folder, not a recipe. Name a recipe first, e.g. brs_detr_small data={path}"


def _about_unknown_name(name: str) -> str:
    if re.match(r"-*[a-z_]+(\.[a-z_0-9]+)*=", name):
        return f"{printable(name)}: this is a setting. Name the recipe before it, e.g. demo {printable(name)}"
    near = nearest_recipe(name)
    hint = f"Did you mean {near}? " if near else ""
    return (
        f"{printable(name)}: the recipe cannot be read (No such file or directory). {hint}"
        f"The recipes are {', '.join(recipe_names())}."
    )
