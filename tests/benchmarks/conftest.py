"""The benchmarks as modules: they import each other by their bare names, as they do when they are started."""

import importlib
import sys

import pytest
from support import ROOT


@pytest.fixture(scope="session")
def benchmark_module():
    """Import a file of `benchmarks/` by its name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))
