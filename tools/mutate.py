"""Inject one bug at a time into a copy of the checkout and see whether the tests notice.

`python tools/mutate.py [--only TEXT] [--jobs 2] [--table benchmarks/results/mutations.md]` takes the bugs of
`mutations.toml`. The tests that are to see them have to pass first on the copy as it is; then each bug gets a copy of
its own, in a temporary folder with nothing beside it, as a fresh clone has it, and `pytest -x` runs the tests named
with the bug. A bug is caught when a test fails, cannot even be collected, or runs out of time. The last lines are the
verdict and the bugs that survived; the exit code is 0 only if none did. It takes half an hour, more or less.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUGS = Path(__file__).with_name("mutations.toml")
PASSED, USAGE, NOTHING_RUN = 0, 4, 5  # exit codes of pytest
# imported once; what is to be mutated is not among them
LIBRARIES = ("torch.distributed.fsdp", "torchvision.transforms.v2", "timm", "accelerate", "safetensors.torch")
LIBRARIES += ("scipy.optimize", "pycocotools.cocoeval", "hypothesis.strategies", "hypothesis.extra.numpy")
OPTIONS = ("-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:anyio", "--hypothesis-seed=0")


class TableError(ValueError):
    """A bug that cannot be injected or tested as the table says; the message names it and what to correct."""


@dataclass(frozen=True)
class Bug:
    """One entry of the table: in `path`, the text `old`, which occurs once, becomes `new`; `tests` should notice."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What became of a bug: "survived", or else by which test it was caught ("time-out" where one did not end)."""

    bug: Bug
    caught_by: str | None
    seconds: float


def read_bugs(table: Path = BUGS) -> list[Bug]:
    """The bugs of a table, in its order.

    Raises:
        TableError: an entry lacks a value, or two have one name.
    """
    bugs = []
    for file in tomllib.loads(table.read_text(encoding="utf-8"))["file"]:
        for entry in file["bug"]:
            values = {"tests": file.get("tests"), **entry}
            if missing := [key for key in ("name", "old", "new", "tests") if values.get(key) is None]:
                raise TableError(f"{table.name}: {entry} of {file['path']} has no {missing[0]!r}. Add it.")
            bugs.append(Bug(values["name"], file["path"], values["old"], values["new"], tuple(values["tests"])))
    names = [bug.name for bug in bugs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TableError(f"{table.name}: two bugs are named {twice[0]!r}. Give each a name of its own.")
    return bugs


def mutated(bug: Bug, root: Path) -> str:
    """The content of the bug's file below `root` with the bug in it.

    Raises:
        TableError: the file or a test path does not exist, or `old` does not occur exactly once.
    """
    if gone := [path for path in (bug.path, *bug.tests) if not (root / path.partition("::")[0]).exists()]:
        raise TableError(f"{bug.name!r}: there is no {gone[0]}. Correct the path in {BUGS.name}.")
    content = (root / bug.path).read_text(encoding="utf-8")
    if (count := content.count(bug.old)) != 1:
        raise TableError(
            f"{bug.name!r}: the old text occurs {count} times in {bug.path}, not once: {bug.old!r}. "
            f"Correct the entry in {BUGS.name}."
        )
    return content.replace(bug.old, bug.new)


def copy_checkout(root: Path, target: Path) -> None:
    """Copy what git tracks or would track, with the changes of the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in set(listed.stdout.decode().split("\0")) - {""}:
        if (root / name).is_file():  # not one that was removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def start_tests(checkout: Path, tests: Sequence[str], log: Path) -> BaseProcess:
    """Start pytest in a checkout until its first failure, its output going to `log`; the exit code is pytest's.

    The process is forked from this one, which has the large libraries in memory: importing them again for each bug
    would take most of the time.
    """
    process = get_context("fork").Process(target=_run_pytest, args=(checkout, tests, log))
    process.start()
    return process


def _run_pytest(checkout: Path, tests: Sequence[str], log: Path) -> None:
    os.setsid()  # a group of its own, so that what the tests have started can be ended with them
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # not what a caller may have put there; open to the end of the process
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(checkout)
    os.environ["PYTHONPATH"], sys.path[0] = str(checkout), str(checkout)
    code = pytest.main([*OPTIONS, *tests])
    sys.stdout.flush()
    os._exit(int(code))


def finish(process: BaseProcess, seconds: float) -> int | None:
    """The exit code of `start_tests`, or None where the tests have not ended after `seconds` and were killed."""
    process.join(max(0.0, seconds))
    code = process.exitcode
    if code is None:
        with contextlib.suppress(ProcessLookupError):  # it has no group of its own in its first moment
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return code


class Trial:
    """The tests of one bug, running in a copy of `checkout` that has the bug in it.

    Raises:
        TableError: the bug does not apply; and by `verdict`, its tests cannot be run.
    """

    def __init__(self, bug: Bug, checkout: Path):
        content = mutated(bug, checkout)
        self.bug, self.start = bug, time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        copy, self.log = Path(self.folder.name, "checkout"), Path(self.folder.name, "log")
        shutil.copytree(checkout, copy)
        (copy / bug.path).write_text(content, encoding="utf-8")
        self.process = start_tests(copy, bug.tests, self.log)

    def verdict(self, timeout: float) -> Verdict:
        """Wait for the end of the tests, at most until `timeout` seconds after they began."""
        code = finish(self.process, self.start + timeout - time.monotonic())
        output = self.log.read_text(encoding="utf-8", errors="replace")
        self.folder.cleanup()
        if code in (USAGE, NOTHING_RUN):
            tests = ", ".join(self.bug.tests)
            raise TableError(f"{self.bug.name!r}: no test of {tests} was run. Correct the paths in {BUGS.name}.")
        caught_by = None if code == PASSED else "time-out" if code is None else first_failure(output, code)
        return Verdict(self.bug, caught_by, time.monotonic() - self.start)


def run_bugs(bugs: Sequence[Bug], checkout: Path, jobs: int, timeout: float) -> Iterator[Verdict]:
    """Verdicts of all bugs in their order, `jobs` of them tested at the same time."""
    trials: deque[Trial] = deque()
    try:
        for bug in bugs:
            trials.append(Trial(bug, checkout))
            if len(trials) == jobs:
                yield trials.popleft().verdict(timeout)
        while trials:
            yield trials.popleft().verdict(timeout)
    finally:
        for trial in trials:  # after an error or Ctrl-C
            finish(trial.process, 0)


def first_failure(output: str, code: int) -> str:
    """The test that failed, by pytest's summary."""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return found[1] if found else f"exit code {code}"


def table_of(verdicts: Sequence[Verdict]) -> str:
    """A Markdown page: how many bugs were caught, and by what."""
    caught = sum(verdict.caught_by is not None for verdict in verdicts)
    lines = [
        "# Injected bugs",
        "",
        f"{caught} of {len(verdicts)} bugs were caught by the tests of a fresh clone.",
        "",
        "`python tools/mutate.py --table benchmarks/results/mutations.md` writes this page. It injects the bugs of "
        "`tools/mutations.toml` into a copy of the checkout, one at a time, and runs the tests that should notice. It "
        "is not part of `make test`. Paths are below `brs_detr/` and `tests/`.",
        "",
        "| file | bug | first test that failed |",
        "|---|---|---|",
    ]
    for verdict in verdicts:
        test = "**survived**" if verdict.caught_by is None else f"`{verdict.caught_by.removeprefix('tests/')}`"
        cells = (f"`{verdict.bug.path.removeprefix('brs_detr/')}`", verdict.bug.name, test)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the bugs and end")
    parser.add_argument("--only", action="append", metavar="TEXT", help="bugs whose name or file has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="bugs at the same time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one bug")
    parser.add_argument("--table", type=Path, help="write the outcome of all bugs to this Markdown file")
    options = parser.parse_args(arguments)
    bugs = [bug for bug in read_bugs() if not options.only or any(o in bug.name + bug.path for o in options.only)]
    if options.list:
        print(*(f"{bug.path}: {bug.name}" for bug in bugs), sep="\n")
        return 0
    if not bugs or (options.table and options.only):
        parser.error("no bug has that in its name or file" if not bugs else "--table needs all bugs, so not --only")
    for bug in bugs:
        mutated(bug, ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # pytest collects garbage several times, and would go through all of the libraries
    with tempfile.TemporaryDirectory() as folder:
        checkout, log, verdicts = Path(folder, "checkout"), Path(folder, "log"), []
        copy_checkout(ROOT, checkout)
        process = start_tests(checkout, sorted({test for bug in bugs for test in bug.tests}), log)
        if finish(process, 1e6) != PASSED:
            print(log.read_text(encoding="utf-8"), "The tests fail without any bug. Correct that first.", sep="\n")
            return 1
        print(f"{len(bugs)} bugs; without them the tests pass", flush=True)
        for verdict in run_bugs(bugs, checkout, options.jobs, options.timeout):
            verdicts.append(verdict)
            outcome = "SURVIVED" if verdict.caught_by is None else f"caught by {verdict.caught_by}"
            print(f"{verdict.bug.path}: {verdict.bug.name}: {outcome} ({verdict.seconds:.0f} s)", flush=True)
    gc.unfreeze()
    survivors = [verdict.bug for verdict in verdicts if verdict.caught_by is None]
    print(f"{len(bugs) - len(survivors)} of {len(bugs)} bugs caught, {len(survivors)} survived")
    print(*(f"  {bug.path}: {bug.name}" for bug in survivors), sep="\n")
    if options.table:
        options.table.write_text(table_of(verdicts), encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TableError as error:
        sys.exit(str(error))
