"""Classes come from the json alone, by ascending id; how two jsons differ is said by id."""

import pytest

from brs_detr.data.annotations import categories_differ, read_categories
from brs_detr.data.issues import DataError, IssueLog


def read(*categories):
    log = IssueLog()
    return *read_categories({"categories": list(categories)}, "set.json", log), dict(log.counts)


def test_ids_of_any_order_and_spelling():
    ids, names, faults = read({"id": 90, "name": "c"}, {"id": "-1", "name": "a"}, {"id": 17.0, "name": "b"})
    assert (ids, names, faults) == ([-1, 17, 90], ["a", "b", "c"], {"number_as_text": 1})


def test_names_are_one_line_of_printable_text():
    _, names, faults = read(
        {"id": 1, "name": " Straße,\n 日本 "}, {"id": 2, "name": "half \ud83d"}, {"id": 3, "name": 7}
    )
    assert names == ["Straße, 日本", "half ?", "7"] and faults == {}


@pytest.mark.parametrize("name", [None, "", " \n"])
def test_without_a_name_the_id_is_the_name(name):
    assert read({"id": 5, "name": name})[1:] == (["5"], {"category_name_missing": 1})


@pytest.mark.parametrize("entry", ["red", None, {"name": "red"}, {"id": "red"}, {"id": 1.5}])
def test_an_entry_without_an_id_is_refused_with_an_example(entry):
    with pytest.raises(DataError, match=r'set\.json: the category .* should look like \{"id": 1'):
        read(entry)


def test_differences_are_named_by_id():
    train = ([1, 2, 3], ["a", "b", "c"])
    assert categories_differ(train, train) is None
    assert categories_differ(train, ([3, 1, 4], ["c", "A", "d"])) == (
        "id 1 is 'a' there and 'A' here, id 2 is 'b' there and absent here, id 4 is absent there and 'd' here"
    )


def test_of_many_differences_the_first_are_named():
    ids = list(range(300))
    text = categories_differ((ids, [f"a{i}" for i in ids]), (ids, [f"b{i}" for i in ids]))
    assert text.count("there") == 5 and text.endswith("and 295 more")
