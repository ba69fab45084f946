"""The report of a run: one file that loads nothing, whatever the folder holds."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from brs_detr.run.drawings import EVALUATION, report_path
from brs_detr.run.report import html_table, write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; collects attributes, cells and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.rows, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs) and tag not in ("script", "link", "iframe")
        if tag == "tr":
            self.rows.append(["bold"] if ("class", "best") in attrs else [])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


@pytest.fixture
def run(tmp_path):
    """A run folder whose class names and paths are hostile."""
    evaluation = tmp_path / EVALUATION
    evaluation.mkdir()
    stats = {"AP": 0.5, "AP50": 0.75, "AP75": -1, "APs": 0.25}
    worse = {**stats, "AP": 0.25}
    rows = [
        {"name": "<script>alert(1)</script>", "objects": 2, "AP": 0.1, "score": 0.5},
        {"name": "a & b", "objects": 1200, "AP": 0.9, "score": None},
    ]
    content = {
        "about": {"weights": "best <b>", "epoch": 2},
        "images": 7,
        "head": "roi",
        "heads": {"decoder": worse, "roi": stats},
        "stats": stats,
        "per_class": rows,
        "notes": ["1 < 2"],
        "calibration": {"D-ECE": {"raw": 0.5, "calibrated": 0.04, "exact": 0.03}, "held_out": "5 folds"},
    }
    (evaluation / "evaluation.json").write_text(json.dumps(content))
    Image.new("RGB", (4, 3), "red").save(evaluation / "detections.png")
    lines = [
        {"kind": "val", "step": 5 * epoch, "epoch": epoch, "AP": ap} for epoch, ap in ((1, 0.4), (2, 0.5), (3, 0.3))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "va')
    (tmp_path / "config.yaml").write_text("output_dir: </pre><script>\n")
    return tmp_path


def test_the_report_is_one_well_formed_page_that_loads_nothing(run):
    text = write_report(run, run / EVALUATION, run / "report.html").read_text()
    page = Page(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert base64.b64decode(page.links[0].split(",")[1]) == (run / EVALUATION / "detections.png").read_bytes()


def test_it_shows_the_figures(run):
    page = Page(write_report(run, run / EVALUATION, run / "report.html").read_text())
    assert ["decoder", "25.0", "75.0", "–", "25.0"] in page.rows
    assert ["bold", "roi", "50.0", "75.0", "–", "25.0"] in page.rows
    classes = [row for row in page.rows if row[0] in ("a & b", "<script>alert(1)</script>")]
    assert classes == [["a & b", "1,200", "90.0", "–"], ["<script>alert(1)</script>", "2", "10.0", "0.500"]]
    assert ["bold", "2", "10", "50.0"] in page.rows and ["3", "15", "30.0"] in page.rows
    assert ["D-ECE", "0.500", "0.040", "0.030"] in page.rows
    assert "1 < 2" in page.text and "output_dir: </pre><script>" in page.text


@pytest.mark.parametrize("content", ["", "[]", "{", '{"images": 3}'])
def test_a_damaged_or_missing_evaluation_leaves_the_rest(run, content):
    (run / EVALUATION / "evaluation.json").write_text(content)
    page = Page(write_report(run, run / EVALUATION, run / "report.html").read_text())
    assert "No evaluation has been stored yet" in page.text and ["3", "15", "30.0"] in page.rows


def test_an_empty_folder_gives_a_page(tmp_path):
    page = Page(write_report(tmp_path, tmp_path / EVALUATION, tmp_path / "report.html").read_text())
    assert not page.links and not page.rows


def test_a_table_escapes_its_cells():
    assert "<b>" not in html_table(["<b>"], [["<b>"]])
    assert len(re.findall("<tr", html_table(["a"], [["1"], ["2"]], best=1))) == 3


def test_figures_that_go_elsewhere_take_the_report_with_them(tmp_path):
    assert report_path(tmp_path / EVALUATION, tmp_path) == tmp_path / "report.html"
    assert report_path(tmp_path / "mine", tmp_path) == tmp_path / "mine" / "report.html"
