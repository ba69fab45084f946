"""Measure the size of the code and print it as the Markdown table of CONTRIBUTING.md.

`python tools/measure.py` prints the table; `--write CONTRIBUTING.md` replaces the one between the file's two markers.
Modules are the package's Python files except `__init__.py` and `__main__.py`; lines are counted with blank lines and
docstrings. The core is what a reader of the papers looks for, the tools are everything else a user runs.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "brs_detr"
CORE = ("losses", "ops", "assign", "models", "data", "engine", "evaluation")
NOT_CORE = ("data/formats",)
SHORT = 60  # lines
BEGIN, END = "<!-- measures: begin -->", "<!-- measures: end -->"


@dataclass(frozen=True)
class Measures:
    """Sizes of a group of modules, in lines; `longest` is the path of the longest one."""

    modules: int
    lines: int
    median: int
    max_lines: int
    longest: str
    short: int


def modules_of(package: Path) -> dict[str, int]:
    """Count the lines of every module: its path below `package` -> lines."""
    files = (path for path in package.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    return {
        path.relative_to(package).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(files)
    }


def is_core(module: str) -> bool:
    """Whether a module, by its path below the package, belongs to the core."""
    return module.partition("/")[0] in CORE and not module.startswith(tuple(f"{name}/" for name in NOT_CORE))


def measure(modules: dict[str, int]) -> Measures:
    """Sum up a group of modules.

    Raises:
        ValueError: the group is empty.
    """
    if not modules:
        raise ValueError("no modules to measure. Is this the root of the repository?")
    longest = max(modules, key=lambda name: modules[name])
    short = sum(lines < SHORT for lines in modules.values())
    median = round(statistics.median(modules.values()))
    return Measures(len(modules), sum(modules.values()), median, modules[longest], longest, short)


def count_imports(script: Path, package: str = "brs_detr") -> tuple[int, int]:
    """Count the import statements at the top level of a script: all of them, and those of `package`."""
    statements = [node for node in ast.parse(script.read_text(encoding="utf-8")).body if _is_import(node)]
    return len(statements), sum(_imports_package(node, package) for node in statements)


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _imports_package(node: ast.stmt, package: str) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").partition(".")[0] == package
    return isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == package for alias in node.names)


def table() -> str:
    """Format the measures of this checkout as a Markdown table."""
    modules = modules_of(PACKAGE)
    core = {name: lines for name, lines in modules.items() if is_core(name)}
    tools = {name: lines for name, lines in modules.items() if name not in core}
    rows = {"core": measure(core), "tools": measure(tools), "package": measure(modules)}
    lines = [
        f"| | modules | lines | median | longest file | modules under {SHORT} lines |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in rows.items():
        lines.append(f"| {name} | {m.modules} | {m.lines:,} | {m.median} | {m.max_lines}, `{m.longest}` | {m.short} |")
    total, own = count_imports(PACKAGE / "train.py")
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| import statements of `brs_detr/train.py` | {total}, {own} of them of the project |",
    ]
    return "\n".join(lines)


def replace_table(text: str, new: str) -> str:
    """Put `new` between the two markers of a page.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} ... {END}. Add both markers.")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table between the markers of this page")
    options = parser.parse_args(arguments)
    if options.write is None:
        print(table())
    else:
        text = options.write.read_text(encoding="utf-8")
        options.write.write_text(replace_table(text, table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
