"""Predictions that are written while images are predicted, and converted at the end."""

import json
from pathlib import Path

import pytest

from brs_detr.run.prediction_files import FORMATS, Labels, convert, read_records

LABELS = Labels(["cat", "dog"], [1, 2], {})


def line_of(name):
    one = {"name": "dog", "category_id": 2, "score": 0.5, "bbox": [1.0, 2.0, 3.0, 4.0]}
    return json.dumps({"file_name": name, "width": 10, "height": 20, "objects": [one]}) + "\n"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_last_line_that_was_cut_short_does_not_take_the_others_with_it(tmp_path, kind):
    """By a full disk or Ctrl-C: `convert` runs in front of the message about that."""
    lines, last = tmp_path / "lines.jsonl", line_of("c.png")
    for length in (0, 1, 40, len(last) - 1):
        lines.write_text(line_of("a.png") + line_of("b.png") + last[:length])
        assert [record["file_name"] for record in read_records(lines)] == ["a.png", "b.png"]
    stems = {f"{name}.png": Path(name) for name in "abc"}
    convert(lines, tmp_path / "out", kind, LABELS._replace(stems=stems))
    written = "".join(path.read_text() + path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written and "c.png" not in written and "c.txt" not in written
