"""The wheel: everything that a run needs is inside, and it works in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("dev", "export", "openvino", "track", "video")
FILES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements.txt"]
FILES += [f"requirements-{extra}.txt" for extra in EXTRAS]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def setuptools_version():
    try:
        return int(metadata.version("setuptools").split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout gets no build folder."""
    if setuptools_version() < 77:
        pytest.skip("building needs setuptools 77 or newer")
    copy = tmp_path_factory.mktemp("copy")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in ("brs_detr", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, copy / "out"], cwd=copy, check=True, capture_output=True, timeout=300)
    return next((copy / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the unpacked wheel, and the environment in which Python imports the package from there."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site, {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def test_the_wheel_holds_the_package_and_the_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "brs_detr").rglob("*.py")}
    recipes = {f"brs_detr/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(recipes) >= 15
    wanted = modules | recipes | {"brs_detr/py.typed"}
    rest = {name for name in names if ".dist-info/" not in name}
    assert rest == wanted, f"missing {sorted(wanted - rest)}, not wanted {sorted(rest - wanted)}"


def test_the_wheel_says_what_it_needs_and_what_it_installs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        stated = archive.read(path).decode()
        entry_points = archive.read(path.replace("METADATA", "entry_points.txt")).decode()
    for line in (ROOT / "requirements.txt").read_text().split():
        assert f"Requires-Dist: {line}\n" in stated
    for extra in EXTRAS:
        for line in (ROOT / f"requirements-{extra}.txt").read_text().split():
            assert f'Requires-Dist: {line}; extra == "{extra}"\n' in stated
    assert "brs-detr = brs_detr.cli:main" in entry_points


def test_the_installed_package_finds_its_recipes_in_an_empty_folder(installed, tmp_path):
    site, environment = installed
    code = "import brs_detr.recipes as r; print(r.find_recipe('demo')); print(*r.recipe_names())"
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    found, names = subprocess.run([sys.executable, "-c", code], check=True, **options).stdout.splitlines()
    assert Path(found) == site / "brs_detr" / "configs" / "demo.yaml"
    assert "brs_detr_r50_12e_coco" in names.split()
    started = subprocess.run([sys.executable, "-m", "brs_detr", "train", "demo"], **options)
    assert started.returncode == 2
    assert started.stderr.startswith(
        "error: datasets/demo/annotations/train.json: this annotation file does not exist."
    )
