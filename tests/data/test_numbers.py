"""Numbers in quotes are numbers, and nothing else becomes one."""

import math

import pytest

from brs_detr.data.numbers import is_number, unquote, whole_number


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), (3.0, 3), (-7, -7), (2**40, 2**40), (3.5, None), (True, None), ("3", None), (2**70, None), (None, None)],
)
def test_ids_are_whole_numbers(value, expected):
    assert whole_number(value) == expected


def test_neither_bools_nor_texts_are_numbers():
    assert is_number(1) and is_number(1.5) and not is_number(True) and not is_number("1")


def test_unquoting_finds_numbers_in_texts_and_lists():
    entry = {"id": "17", "bbox": ["1", "2.5", 3, "-4"], "iscrowd": "False", "name": "12", "area": "many"}
    assert unquote(entry, ("id", "bbox", "iscrowd", "area", "absent"))
    assert entry == {"id": 17, "bbox": [1, 2.5, 3, -4], "iscrowd": 0, "name": "12", "area": "many"}


def test_what_is_fine_stays_as_it_is():
    entry = {"id": 17, "area": math.nan, "bbox": [1, 2], "category_id": "cat", "ignore": "9" * 5000}
    assert not unquote(entry, ("id", "area", "bbox", "category_id"))
    unquote(entry, ("ignore",))  # too long for an int: no error
