"""Imports point one way: a lower room of the house never knows an upper one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "brs_detr"

# what each part may import of the package, besides itself
ALLOWED = {
    "losses": set(),
    "ops": set(),
    "assign": {"ops"},
    "data": {"ops"},
    "evaluation": {"ops"},
    "settings": set(),
    "config_rules": {"settings"},
    "config": {"settings", "config_rules"},
    "models": {"ops", "assign", "losses"},
    "convert": {"ops", "models", "settings", "config", "engine"},
    "export": {"ops", "models"},
    "engine": {"ops", "assign", "losses", "models"},
}
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


def test_the_losses_can_be_lifted_out():
    standard = {"__future__", "collections", "dataclasses", "functools", "math", "typing", "warnings"}
    for path in files_of("losses"):
        outside = {name.split(".")[0] for name in imports_of(path)} - {"brs_detr"}
        assert outside <= LIBRARIES_OF_LOSSES | standard, f"{path.name} imports {sorted(outside)}"


def test_only_scripts_and_commands_put_parts_together():
    """Every module of the package belongs to a part with rules, or is one of those that assemble parts."""
    assembling = {"run", "launch", "scoring", "resuming", "report", "commands", "cli", "__main__", "__init__"}
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    assert parts <= set(ALLOWED) | assembling


def test_nothing_imports_the_scripts():
    for path in PACKAGE.rglob("*.py"):
        assert not imports_of(path) & {"train", "eval"}, path


def test_files_stay_readable():
    """No module of the package is longer than 450 lines."""
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path
