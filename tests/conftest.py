"""Shared fixtures: where the optional reference data lies, and one thread so that timings and sums repeat."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `support`
SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_dir(name: str) -> Path:
    """A folder of the reference data that may lie beside the repository; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data {name} is not beside this checkout")
    return path


def pytest_collection_modifyitems(items):
    """Files with many slow tests first: where each process takes whole files, one that comes last keeps all waiting."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """Folder of arrays recorded from the official implementations."""
    return shared_dir("golden")


@pytest.fixture(scope="session")
def shared_data():
    """Folder of small real datasets in COCO format."""
    return shared_dir("data")
