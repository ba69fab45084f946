"""The table of faults is documented, and counts are right."""

from pathlib import Path

import pytest

from brs_detr.data.issues import POLICY, DataIssue, IssueLog

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.mark.parametrize("kind", POLICY)
def test_every_fault_is_in_the_documentation_word_for_word(kind):
    action, text = POLICY[kind]
    assert f"| {kind.replace('_', ' ')} | {action} | {text} |" in DOCUMENT.read_text(encoding="utf-8")


def test_a_log_counts_all_and_keeps_the_first_few():
    log = IssueLog(max_examples=2)
    for i in range(5):
        log.add("box_empty", f"annotation {i}", "w 0")
    assert log.counts["box_empty"] == 5 and [issue.where for issue in log.issues] == ["annotation 0", "annotation 1"]
    assert log.lines() == [
        "5 x box empty, first: annotation 0 (w 0); a box of width or height 0 is dropped",
    ]
    assert str(log.issues[0]) == "annotation 0: box empty (w 0): dropped"


def test_what_may_spoil_the_training_is_said_first():
    log = IssueLog()
    for kind in ("image_not_listed", "area_missing", "box_empty", "image_dark"):
        log.add(kind, "x")
    names = [line.split(",")[0] for line in log.lines()]
    assert names == ["1 x image dark", "1 x box empty", "1 x area missing", "1 x image not listed"]
    assert [line.split(",")[0] for line in log.lines(["repaired"])] == ["1 x area missing"]


def test_texts_of_a_json_are_made_short_and_printable():
    log = IssueLog()
    log.add("image_missing", "line\nbreak \0 \ud83d 日本", "x" * 10_000)
    (issue,) = log.issues
    assert issue.where == r"line\x0abreak \x00 \ud83d 日本" and len(issue.detail) < 300


def test_an_unknown_kind_is_refused():
    with pytest.raises(KeyError):
        IssueLog().add("box_blue")
    assert DataIssue("box_clipped", "x").action == "repaired"
