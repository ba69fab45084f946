"""A few lines of YAML or JSON cannot stand for more than they say."""

import json

import pytest
import yaml

from brs_detr.config import load_config
from brs_detr.config_io import ConfigError, parse_yaml
from brs_detr.data.formats.base import Notes
from brs_detr.data.formats.yolo import find_dataset
from brs_detr.data.issues import DataError
from brs_detr.parsing import TwoValuesError, dict_of_pairs, load_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
REFUSED = {
    "aliases of aliases": LAUGHS,
    "merged mappings": "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)),
    "a long text often": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n",
    "itself": "a: &a [*a]\n",
    "depth": "[" * 5000 + "]" * 5000,
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("loader", [yaml.SafeLoader, yaml.BaseLoader])
def test_yaml_that_stands_for_too_much_is_refused(case, loader):
    with pytest.raises(yaml.YAMLError, match=r"values|part of|nested"):
        load_yaml(REFUSED[case], loader)


def test_a_few_aliases_are_fine():
    text = "a: &a [1, 2]\nb: {x: *a, y: *a}\n"
    assert parse_yaml(text, "x") == yaml.safe_load(text) == {"a": [1, 2], "b": {"x": [1, 2], "y": [1, 2]}}
    assert parse_yaml("", "x") is None and parse_yaml("~", "x") is None


def test_a_recipe_and_a_dataset_of_laughs_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(f"{LAUGHS}data: {{root: *a11}}\ntrain: *a11\nnames: [a]\n")
    with pytest.raises(ConfigError, match="more than 200,000 values") as error:
        load_config(path)
    assert len(str(error.value)) < 300
    with pytest.raises(DataError, match="more than 200,000 values"):
        find_dataset(path, Notes())


def test_a_mapping_takes_over_what_another_says():
    text = "a: {b: &b {<<: &c {x: 1, y: 1}, x: 2}}\nd: {<<: *b, y: 3}\ne: {<<: [*c, {y: 4, z: 4}]}"
    expected = {"a": {"b": {"x": 2, "y": 1}}, "d": {"x": 2, "y": 3}, "e": {"x": 1, "y": 1, "z": 4}}
    assert parse_yaml(text, "x") == yaml.safe_load(text) == expected
    for twice in ("{<<: {a: 1}, a: 1, a: 2}", "{<<: {a: 1, a: 2}}", "{<<: {a: 1}, <<: {b: 1}}", "{<<: 1}"):
        with pytest.raises(ConfigError):
            parse_yaml(twice, "x")


def test_many_keys_do_not_take_the_square_of_their_number():
    """A hundred thousand keys took an hour when each was compared with all before it."""
    text = json.dumps({f"k{i}": 0 for i in range(20_000)}, separators=(",", ": "))
    assert len(parse_yaml(text, "x")) == 20_000
    for twice in ("{a: 1, a: 2}", "{[1]: 1}", "? [a]\n: 1\n? [a]\n: 2"):
        with pytest.raises(ConfigError):
            parse_yaml(twice, "x")


@pytest.mark.parametrize(("key", "value"), [("nc", 10**9), ("kpt_shape", [10**9] * 50)])
def test_numbers_that_no_dataset_has_are_refused(tmp_path, write_tiny_yolo, key, value):
    settings = write_tiny_yolo(tmp_path, **{key: value})
    with pytest.raises(DataError, match=rf"data\.yaml: {key}"):
        find_dataset(settings, Notes())


@pytest.fixture
def write_tiny_yolo():
    from PIL import Image

    def write(folder, **settings):
        (folder / "images").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
        (folder / "data.yaml").write_text(yaml.safe_dump({"train": "images", **settings}))
        return folder / "data.yaml"

    return write


def test_pairs_become_what_they_are_without_a_hook():
    text = '{"a": [{"b": 1, "b": 1}], "c": NaN}'
    assert str(json.loads(text, object_pairs_hook=dict_of_pairs)) == str(json.loads(text))
    with pytest.raises(TwoValuesError, match=r"`b\\x1b` twice"):
        json.loads('[{"b\\u001b": [], "b\\u001b": [1]}]', object_pairs_hook=dict_of_pairs)
