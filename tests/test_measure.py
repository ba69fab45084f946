"""`tools/measure.py` counts what it says, on a small tree written here."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("measure", ROOT / "tools" / "measure.py")
    module = sys.modules["measure"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["measure"]


def test_modules_are_counted_with_their_lines(tool, tmp_path):
    for name, lines in {"__init__.py": 1, "losses/rank.py": 70, "losses/__init__.py": 9, "cli.py": 10}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n" * lines)
    modules = tool.modules_of(tmp_path)
    assert modules == {"losses/rank.py": 70, "cli.py": 10}
    assert tool.measure(modules) == tool.Measures(2, 80, 40, 70, "losses/rank.py", 1)


def test_no_modules_are_an_error(tool, tmp_path):
    with pytest.raises(ValueError, match="no modules to measure"):
        tool.measure(tool.modules_of(tmp_path))


@pytest.mark.parametrize(
    ("module", "core"),
    [("data/coco.py", True), ("data/formats/voc.py", False), ("commands/info.py", False), ("train.py", False)],
)
def test_dataset_formats_and_commands_are_outside_the_core(tool, module, core):
    assert tool.is_core(module) is core


def test_imports_are_counted_by_statement(tool, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os\nimport brs_detr.cli\nfrom brs_detr import run\nfrom .a import b, c\nx = 1\n")
    assert tool.count_imports(script) == (4, 3)


def test_only_the_text_between_the_markers_is_replaced(tool, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n")
    assert tool.main(["--write", str(page)]) == 0
    assert page.read_text() == f"before\n{tool.BEGIN}\n{tool.table()}\n{tool.END}\nafter\n"
    with pytest.raises(ValueError, match="Add both markers"):
        tool.replace_table("no markers", "new")


def test_contributing_has_a_place_for_the_table(tool):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert tool.table() in tool.replace_table(page, tool.table())
