"""The report in a browser without a window: no error, images decoded, sections to be seen, nothing fetched."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from support import module_from

from brs_detr.run.drawings import EVALUATION
from brs_detr.run.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECTIONS = [
    "Detections",
    "Classes",
    "Training",
    "Precision over recall",
    "Confusion",
    "Calibration: are the scores precisions?",
    "Validations",
    "Training images",
    "Settings",
]
run = module_from(__file__.replace("_in_browser", "")).run  # the fixture: a run whose names are hostile

# What a reader of the page would notice. The report itself has no script: this one is put into a copy of it.
LOOK = """<script>window.onload = () => {
  const shown = element => element.getBoundingClientRect().height > 5;
  const facts = {
    images: [...document.images].map(image => image.naturalWidth),
    sections: [...document.querySelectorAll("h2")].filter(shown).map(heading => heading.textContent),
    fetched: performance.getEntriesByType("resource").map(one => one.name).filter(name => !name.startsWith("data:")),
    wider: document.documentElement.scrollWidth > window.innerWidth,
    rows: [...document.querySelectorAll("tr")].filter(shown).length,
  };
  document.body.innerHTML = "";
  document.body.appendChild(document.createElement("pre")).textContent = "FACTS" + JSON.stringify(facts) + "END";
}</script>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Call a browser with options and a page; returns what it prints, and what it says of errors."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    profile = tmp_path_factory.mktemp("profile")
    command = [browser, "--headless", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    command += ["--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,900"]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        command.append("--no-sandbox")  # which no browser has for root

    def call(*options):
        ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout, re.findall(r".*CONSOLE.*", ran.stderr)

    return call


@pytest.fixture
def page(run):
    """The report of a run with all its images."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 1500, 3), dtype=np.uint8)
    for name in ("curves", "precision_recall", "confusion", "reliability"):
        Image.fromarray(noise).save(run / EVALUATION / f"{name}.png")
    Image.fromarray(noise).save(run / "train_samples.png")
    return write_report(run, run / EVALUATION, run / "report.html")


@pytest.mark.slow
def test_a_browser_shows_every_section_and_image_and_fetches_nothing(browse, page):
    copy = page.with_name("looked_at.html")
    copy.write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    printed, errors = browse("--dump-dom", copy.as_uri())
    facts = json.loads(re.search("FACTS(.*)END", printed)[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert not errors
    assert facts["sections"] == SECTIONS
    assert sorted(facts["images"]) == [4, *[1500] * 5]
    assert facts["fetched"] == [] and not facts["wider"] and facts["rows"] == 12


@pytest.mark.slow
def test_the_page_is_drawn(browse, page, tmp_path):
    _, errors = browse(f"--screenshot={tmp_path / 'seen.png'}", page.as_uri())
    seen = np.array(Image.open(tmp_path / "seen.png").convert("L"))
    assert not errors and seen.shape == (900, 1200)
    assert (seen > 240).mean() > 0.3 and (seen < 100).sum() > 2000  # text and images on a white page


@pytest.mark.slow
def test_the_test_notices_what_it_looks_for(browse, tmp_path):
    (tmp_path / "bad.html").write_text(f"<h2>A</h2><img src='https://example.org/a.png'><script>x.y</script>{LOOK}")
    printed, errors = browse("--dump-dom", (tmp_path / "bad.html").as_uri())
    facts = json.loads(re.search("FACTS(.*)END", printed)[1])
    assert errors and facts["images"] == [0] and facts["fetched"] == ["https://example.org/a.png"]
