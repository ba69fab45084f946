"""Imports point one way: a lower part of the package never imports an upper one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "brs_detr"

# what each part may import of the package, besides itself
ALLOWED = {
    "losses": set(),
    "ops": {"exit_codes"},
    "assign": {"ops"},
    "models": {"assign", "config_fields", "exit_codes", "losses", "ops", "user_files"},
    "evaluation": {"ops"},
    "viz": {"evaluation", "user_files"},
    "data": {"config_fields", "exit_codes", "ops", "parsing", "threads", "user_files", "viz"},
    "engine": {"assign", "config_fields", "exit_codes", "losses", "models", "ops", "threads", "user_files"},
    "config_fields": set(),
    "config_io": {"config_fields", "exit_codes", "parsing", "user_files"},
    "config_aliases": set(),
    "recipes": {"config_io", "user_files"},
    "config": {"config_aliases", "config_fields", "config_io", "data", "engine", "models", "recipes"},
    "checkpoints": {"config", "config_io", "engine", "exit_codes", "models", "ops", "parsing", "user_files"},
    "hub": {"engine", "exit_codes", "user_files"},
    "export": {"evaluation", "models", "ops", "user_files"},
    "run": {
        "checkpoints",
        "config",
        "config_io",
        "data",
        "engine",
        "evaluation",
        "exit_codes",
        "hub",
        "losses",
        "models",
        "ops",
        "parsing",
        "user_files",
        "viz",
    },
    "exit_codes": set(),
    "threads": set(),
    "user_files": set(),
    "parsing": {"user_files"},
}
SECTIONS = (["data"], ["engine"], ["models"])
LIBRARIES_OF_LOSSES = {"torch", "torchvision"}


def imports_of(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            names |= {".".join(filter(None, [*above, node.module, alias.name])) for alias in node.names}
    return names


def files_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    for path in files_of(part):
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("brs_detr.")}
        assert ours <= ALLOWED[part] | {part}, (
            f"{path.relative_to(ROOT)} imports {sorted(ours - ALLOWED[part] - {part})}"
        )


def test_settings_are_composed_of_modules_that_need_no_torch():
    """Else a misspelt setting would be answered only after the seconds that importing torch takes."""
    composed = {name for name in imports_of(PACKAGE / "config.py") if name.split(".")[1:2] in SECTIONS}
    assert composed and all(
        name.split(".")[2] in ("config", "one_stage_config", "rcnn_config", "model_config") for name in composed
    )
    for path in [PACKAGE / f"{name}.py" for name in ("config", "config_fields", "config_io", "config_aliases")] + [
        path for (section,) in SECTIONS for path in (PACKAGE / section).glob("*config.py")
    ]:
        assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "torchvision", "numpy", "accelerate"}


def test_the_losses_can_be_lifted_out():
    standard = {"__future__", "collections", "contextlib", "dataclasses", "functools", "math", "typing", "warnings"}
    for path in files_of("losses"):
        outside = {name.split(".")[0] for name in imports_of(path)} - {"brs_detr"}
        assert outside <= LIBRARIES_OF_LOSSES | standard, f"{path.name} imports {sorted(outside)}"


def test_only_scripts_and_commands_put_parts_together():
    """Every module of the package belongs to a part with rules, or is one of those that assemble parts."""
    assembling = {"api", "predictor", "detections", "train", "evaluate", "commands", "cli", "__main__", "__init__"}
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    assert parts <= set(ALLOWED) | assembling


def test_nothing_imports_the_scripts():
    for path in PACKAGE.rglob("*.py"):
        assert not imports_of(path) & {"train", "eval"}, path


def test_files_stay_readable():
    """No module of the package is longer than 450 lines."""
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_images_are_opened_in_one_place_and_as_known_formats():
    """Pillow's own list of formats has some that start other programs (EPS: Ghostscript)."""
    opened = []
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"
                opened.append(path.relative_to(ROOT).as_posix())
        assert not any(name.startswith("PIL.Image.") for name in imports_of(path)), path
    assert sorted(opened) == ["brs_detr/data/image_io.py", "examples/onnx_detect.py", "examples/tensorrt_detect.py"]


def test_files_are_unpickled_and_yaml_is_read_in_known_places_only():
    """Both can be made to fill the memory: what comes before each call keeps them from it."""
    known = {
        "torch.load": {"models/backbones/weights_io.py", "commands/replay.py", "engine/snapshot.py"},
        "yaml.load": set(),
        "ElementTree.parse": set(),
        "gzip.decompress": set(),
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in known or path.relative_to(PACKAGE).as_posix() in known[name], f"{path}: {name}"
