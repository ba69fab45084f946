"""A recipe is found by its name; what is given in its place is refused with what was probably meant."""

from pathlib import Path

import pytest

from brs_detr.config import ConfigError, load_config
from brs_detr.recipes import find_recipe, packaged_folder, recipe_names

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo", "configs/demo.yaml"])
def test_a_packaged_recipe_is_found_from_anywhere(name):
    assert find_recipe(name) == CONFIGS / "demo.yaml" == packaged_folder() / "demo.yaml"


@pytest.mark.parametrize(
    "name", ["atss_r50_brs_12e_coco", "cnn/atss_r50_brs_12e_coco.yaml", "configs/cnn/atss_r50_brs_12e_coco"]
)
def test_a_recipe_of_a_group_is_found_with_and_without_its_folder(name):
    assert find_recipe(name) == CONFIGS / "cnn" / "atss_r50_brs_12e_coco.yaml"


def test_every_packaged_recipe_is_listed():
    assert recipe_names() == sorted(path.stem for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("cnn/*.yaml")])


def test_a_recipe_of_the_working_directory_comes_first(empty_folder):
    (empty_folder / "configs").mkdir()
    (empty_folder / "configs" / "demo.yaml").write_text("seed: 7")
    (empty_folder / "configs" / "own.yml").write_text("base: brs_detr_r50_12e_coco\nseed: 8")
    (empty_folder / "demo").mkdir()  # a folder of that name is not meant
    assert load_config("demo").seed == 7
    assert load_config("own").seed == 8


def test_a_base_is_found_beside_the_recipe_first_and_else_by_its_name(empty_folder):
    (empty_folder / "mine.yaml").write_text("base: demo\nseed: 3")
    config = load_config("mine.yaml")
    assert (config.seed, config.data.root) == (3, "datasets/demo")
    (empty_folder / "demo.yaml").write_text("output_dir: own")
    (empty_folder / "mine.yaml").write_text("base: demo.yaml")
    assert load_config("mine.yaml").output_dir == "own"
    (empty_folder / "mine.yaml").write_text("base: dmeo")
    with pytest.raises(ConfigError, match=r"dmeo: the recipe cannot be read .* Did you mean demo"):
        load_config("mine.yaml")


@pytest.mark.parametrize("name", ["dmeo", "dmeo.yaml", "configs/dmeo.yaml", "elsewhere/dmeo.yaml"])
def test_an_unknown_name_is_refused_with_the_nearest_and_all(name):
    with pytest.raises(ConfigError) as error:
        load_config(name)
    text = str(error.value)
    assert text.startswith(f"{name}: the recipe cannot be read") and "Did you mean demo?" in text
    assert all(known in text for known in recipe_names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.json", "train.json: this is a dataset, not a recipe. Name a recipe first"),
        ("train.json.gz", "this is a dataset, not a recipe"),
        ("images", "images: this is a folder, not a recipe. Name a recipe first"),
        ("run", "run: this is the folder of a run, not a recipe: run/config.yaml --resume goes on with it"),
        ("run/best.safetensors", "these are weights, not a recipe"),
        ("data.root=x", "data.root=x: this is a setting. Name the recipe before it"),
        ("missing.json", "missing.json: this is a dataset, not a recipe"),
        ("", "this is a folder, not a recipe"),
    ],
)
def test_what_is_not_a_recipe_is_refused_with_what_was_meant(empty_folder, name, message):
    for folder in ("images", "run/state"):
        (empty_folder / folder).mkdir(parents=True)
    for file in ("train.json", "train.json.gz", "run/best.safetensors"):
        (empty_folder / file).write_text("{}")
    with pytest.raises(ConfigError) as error:
        load_config(name)
    assert message in str(error.value) and "\n" not in str(error.value)
