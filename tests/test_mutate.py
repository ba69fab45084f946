"""`tools/mutate.py`: its table fits the code, and its outcomes are right."""

import ast
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    module = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutate"]


def test_every_bug_of_the_table_can_be_injected(tool):
    """Its text occurs once, its tests exist, and what comes out is Python."""
    bugs = tool.read_bugs()
    assert len(bugs) >= 60
    for bug in bugs:
        ast.parse(tool.mutated(bug, ROOT))
        assert bug.old != bug.new, bug.name


@pytest.fixture
def shop(tool, tmp_path):
    """A checkout with one function and one test, and a bug that the test cannot see."""
    (tmp_path / "shop.py").write_text("def total(a, b):\n    return a + b\n")
    (tmp_path / "test_shop.py").write_text(
        "from shop import total\n\n\ndef test_total():\n    assert total(2, 2) == 4\n"
    )
    return tmp_path, tool.Bug("times", "shop.py", "a + b", "a * b", ("test_shop.py",))


def test_outcomes(tool, shop):
    checkout, unseen = shop
    bugs = [unseen, replace(unseen, name="minus", new="a - b"), replace(unseen, name="no Python", new="a +")]
    survived, caught, broken = tool.run_bugs(bugs, checkout, jobs=2, timeout=300)
    assert survived.caught_by is None and caught.caught_by == "test_shop.py::test_total"
    assert broken.caught_by == "test_shop.py"
    assert "a + b" in (checkout / "shop.py").read_text()
    page = tool.table_of([survived, caught, broken])
    assert "2 of 3 bugs were caught" in page and "| `shop.py` | times | **survived** |" in page


def test_a_bug_whose_tests_do_not_end_is_caught(tool, shop):
    checkout, bug = shop
    (verdict,) = tool.run_bugs(
        [replace(bug, old="return a + b", new="while True:\n        pass")], checkout, 1, timeout=2
    )
    assert verdict.caught_by == "time-out"


def test_a_table_that_does_not_fit_is_refused(tool, shop, tmp_path):
    checkout, bug = shop
    for change, message in (
        ({"old": "a"}, "occurs 3 times in shop.py, not once"),
        ({"old": "a - b"}, "occurs 0 times"),
        ({"path": "till.py"}, "there is no till.py"),
        ({"tests": ("test_till.py",)}, "there is no test_till.py"),
    ):
        with pytest.raises(tool.TableError, match=message):
            tool.mutated(replace(bug, **change), checkout)
    with pytest.raises(tool.TableError, match=r"no test of test_shop\.py::test_sum was run"):
        list(tool.run_bugs([replace(bug, tests=("test_shop.py::test_sum",))], checkout, 1, timeout=300))
    table = tmp_path / "bugs.toml"
    entry = '[[file]]\npath = "shop.py"\ntests = ["test_shop.py"]\n' + '[[file.bug]]\nname = "x"\nold = "a"\n'
    for text, message in ((entry, "no 'new'"), ((entry + 'new = "b"\n') * 2, "two bugs are named 'x'")):
        table.write_text(text)
        with pytest.raises(tool.TableError, match=message):
            tool.read_bugs(table)
