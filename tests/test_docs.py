"""README, CONTRIBUTING and docs/ name paths, settings, commands and pages that exist."""

import argparse
import re
from pathlib import Path

import pytest
from support import module_from

from brs_detr.cli import COMMANDS
from brs_detr.config import Config
from brs_detr.config_io import leaves
from brs_detr.data.config import DataConfig, LSJConfig
from brs_detr.data.issues import POLICY
from brs_detr.engine.config import EvalConfig
from brs_detr.models.config import HardNMS, SoftNMS
from brs_detr.models.model_config import MODELS

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
IDS = [page.name for page in PAGES]
# files of the repository, in `...` or in a command
FOLDERS = "brs_detr|benchmarks|configs|docs|examples|tests|tools"
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]+|requirements[\w-]*\.txt)")
INVENTED = re.compile(r"[/_](?:my_|mine\b)")  # files that a page tells the reader to write
SETTING = re.compile(r"(?<![\w./-])((?:data|model|optim|train|eval)(?:\.[a-z_][a-z_0-9]*)+)(?![\w(/-])")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def settings():
    """Names of all settings and of the sections that hold them."""
    names = {name for model in MODELS for name, _ in leaves(Config(model=model))}
    for nms in (SoftNMS(), HardNMS()):
        names |= {name for name, _ in leaves(Config(eval=EvalConfig(nms=nms)))}
    names |= {name for name, _ in leaves(Config(data=DataConfig(augment=LSJConfig())))}
    names |= {f"model.{name.rpartition('.')[2]}" for name in names if ".objective." in name}  # of all heads
    return names | {".".join(name.split(".")[:n]) for name in names for n in range(1, 4)}


def slug(heading):
    """The anchor that GitHub and MkDocs make of a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_exists(page):
    paths = {path.rstrip(".") for path in PATH.findall(page.read_text(encoding="utf-8"))}
    assert not [p for p in paths if not INVENTED.search(p) and not any(ROOT.glob(p.rstrip("/")))]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_setting_exists(page):
    named = set(SETTING.findall(page.read_text(encoding="utf-8")))
    endings = ("py", "yaml", "json", "md", "data", "onnx", "safetensors", "pt2")
    files = {name for name in named if name.rpartition(".")[2] in endings}
    assert named - files <= settings()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_and_its_options_exist(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    calls = re.findall(r"python -m brs_detr (?:COMMAND|([a-z-]+)([^\n`]*))", text)
    for command, rest in ((command, rest) for command, rest in calls if command):
        parser = argparse.ArgumentParser()
        COMMANDS[command].add_arguments(parser)
        known = {option for action in parser._actions for option in action.option_strings}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.partition("#")[0])) <= known, command


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*IDS, "CHANGELOG.md"])
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, link


def test_links_are_rewritten_for_the_site():
    tool = module_from(ROOT / "tools" / "mkdocs_pages.py")
    text = "[a](docs/data.md#images) ![b](docs/images/demo.png) [c](CONTRIBUTING.md) [d](https://x.org/docs/a.md)"
    there = "[a](data.md#images) ![b](images/demo.png) [c](contributing.md) [d](https://x.org/docs/a.md)"
    assert tool.site_links(text, from_root=True) == there
    text = "[a](../README.md#results) [b](data.md) ![c](images/demo.png) [d](../CHANGELOG.md)"
    there = "[a](index.md#results) [b](data.md) ![c](images/demo.png) [d](changelog.md)"
    assert tool.site_links(text, from_root=False) == there


def test_the_table_of_faults_is_that_of_the_code():
    """Each kind of `POLICY` with what happens to it, in its order."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w ]+) \| (kept|repaired|dropped|warned) \|", text, re.MULTILINE)
    assert rows == [(kind.replace("_", " "), action) for kind, (action, _) in POLICY.items()]
