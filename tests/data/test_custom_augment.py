"""A transform of the user's own: called with tv_tensors, seeded, and checked in what it returns."""

import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from brs_detr import cli
from brs_detr.api import train
from brs_detr.config import Config, ConfigError, apply_overrides, from_dict, load_config, to_dict
from brs_detr.data.build import build_train_transforms, open_train_set, open_val_set
from brs_detr.data.config import AugmentConfig, DataConfig
from brs_detr.data.custom_augment import CustomAugmentError, CustomTransform
from brs_detr.data.loader import build_train_loader

MODULE = """
import random
import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

unchanged = lambda image, target: (image, target)
composed = v2.Compose([
    v2.RandomHorizontalFlip(1), v2.RandomZoomOut(fill=9, side_range=(1.5, 1.5), p=1), v2.ClampBoundingBoxes(),
    v2.SanitizeBoundingBoxes(),
])

def noisy(image, target):
    value = torch.randint(256, ()) + np.random.randint(256) + random.randrange(256)
    return torch.full_like(image, int(value) % 256), target

def empty(image, target):
    return image, {name: value[:0] for name, value in target.items()}

def bad(image, target):
    raise KeyError("no such thing")

class Unmade:
    pass

number = 3
RETURNS = {}

def returns(image, target):
    return RETURNS["edit"](image, target)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module lies in the working directory, which is not on the path of an installed program."""
    name = f"own_augment_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def sample(h=40, w=60, masks=True):
    boxes = torch.tensor([[5.0, 6, 20, 30], [30, 0, 60, 40]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 0]), "image_id": 17, "original_size": (h, w)}
    return torch.zeros(3, h, w, dtype=torch.uint8), target | (
        {"masks": torch.ones(2, h, w, dtype=torch.uint8)} if masks else {}
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("masks", [False, True])
def test_a_composition_of_torchvision_moves_everything(own, masks):
    image, target = CustomTransform(f"{own}:composed")(*sample(masks=masks), seeded())
    assert image.shape == (3, 60, 90) and type(image) is torch.Tensor and target["image_id"] == 17
    widths = target["boxes"][:, 2] - target["boxes"][:, 0]
    assert widths.tolist() == [15, 30] and target["labels"].tolist() == [1, 0]
    assert ("masks" in target) == masks and (not masks or target["masks"].shape == (2, 60, 90))
    assert all(type(value) is torch.Tensor for value in target.values() if isinstance(value, torch.Tensor))


def test_it_is_given_copies_as_tv_tensors(own):
    image, target = sample()
    seen = {}

    def edit(pixels, objects):
        seen.update(objects, image=pixels)
        objects["boxes"][0] += 1
        return pixels, objects

    transform = CustomTransform(f"{own}:returns")
    transform.transform.__globals__["RETURNS"]["edit"] = edit
    transform(image, target, seeded())
    assert isinstance(seen["image"], tv_tensors.Image) and isinstance(seen["masks"], tv_tensors.Mask)
    assert seen["boxes"].format == tv_tensors.BoundingBoxFormat.XYXY and tuple(seen["boxes"].canvas_size) == (40, 60)
    assert target["boxes"][0].tolist() == [5, 6, 20, 30]


def test_all_usual_random_numbers_follow_the_generator_and_are_put_back(own):
    transform = CustomTransform(f"{own}:noisy")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    values = [transform(*sample(), seeded(i))[0][0, 0, 0].item() for i in range(20)]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()
    torch.rand(2), np.random.rand(2), random.random()
    assert values == [transform(*sample(), seeded(i))[0][0, 0, 0].item() for i in range(20)] and len(set(values)) > 10


def test_it_may_drop_all_objects(own):
    _, target = CustomTransform(f"{own}:empty")(*sample(), seeded())
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 40, 60)


def box(*values):
    return lambda image, target: (image, {**target, "boxes": torch.tensor([values, [0, 0, 5, 5]])})


@pytest.mark.parametrize(
    ("edit", "fact"),
    [
        (lambda image, target: image, "did not return (image, target)"),
        (lambda image, target: (image, None), "did not return (image, target)"),
        (lambda image, target: (np.zeros((3, 4, 4)), target), "returned ndarray as image"),
        (lambda image, target: (image / 255, target), "uint8; it is normalized later"),
        (lambda image, target: (image[:1], target), "returned an image of (1, 40, 60)"),
        (lambda image, target: (image, {**target, "labels": target["labels"][:1]}), "labels of (1,)"),
        (lambda image, target: (image, {"boxes": target["boxes"]}), "returned NoneType as labels"),
        (lambda image, target: (image, {**target, "labels": target["labels"] / 1}), "returned labels of torch.float32"),
        (lambda image, target: (image, {**target, "masks": None}), "returned no masks. Return target['masks'] of the"),
        (lambda image, target: (image, {**target, "masks": target["masks"][:1]}), "masks of (1, 40, 60) for 2 boxes"),
        (lambda image, target: (image[:, :20, :30], {**target, "masks": target["masks"][:, :20, :30]}), "outside"),
        (box(float("nan"), 0, 3, 3), "not finite"),
        (box(0.0, 0, float("inf"), 3), "not finite"),
        (box(-5.0, 0, 3, 3), "outside the image. End with v2.ClampBoundingBoxes()"),
        (box(5.0, 5, 5, 9), "without width or height"),
        (lambda image, target: v2.ConvertBoundingBoxFormat("XYWH")(image, target), "in the format XYWH"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_what_to_do(own, edit, fact):
    transform = CustomTransform(f"{own}:returns")
    transform.transform.__globals__["RETURNS"]["edit"] = edit
    with pytest.raises(CustomAugmentError) as error:
        transform(*sample(), seeded())
    assert str(error.value).startswith(f"data.augment.custom={own}:returns: on image 17 it ")
    assert fact in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_rounding_over_the_edge_is_cut_off(own):
    transform = CustomTransform(f"{own}:returns")
    transform.transform.__globals__["RETURNS"]["edit"] = box(-0.4, 0, 60.3, 40)
    assert transform(*sample(), seeded())[1]["boxes"][0].tolist() == [0, 0, 60, 40]


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("no_such_module:x", "cannot be imported (No module named 'no_such_module'). Write package.module:name"),
        ("{own}:nothing", "has no attribute 'nothing'"),
        ("{own}:number", "this is a int, not a transform"),
        ("{own}:Unmade", "this is a class; name an instance or a function"),
    ],
)
def test_what_is_no_transform_is_refused_in_a_sentence(own, name, fact):
    with pytest.raises(CustomAugmentError) as error:
        build_train_transforms(DataConfig(augment=AugmentConfig(custom=name.format(own=own))))
    assert fact in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["augment.py", "a.b", "os.system('x')", ":x", "a:", "a:b c", "../a:b"])
def test_only_names_are_taken(name):
    with pytest.raises(ConfigError, match="is not of the form package"):
        load_config("demo", [f"data.augment.custom={json.dumps(name)}"])


def test_a_started_worker_imports_it_again(own):
    transform = pickle.loads(pickle.dumps(CustomTransform(f"{own}:unchanged")))  # a lambda: not picklable itself
    assert torch.equal(transform(*sample(), seeded())[0], sample()[0])


def dataset(tmp_path, write_dataset, custom):
    path = write_dataset(tmp_path, sizes=[(40, 60)] * 6, boxes=[[(1, 2, 3, 20, 20)]] * 6)
    augment = AugmentConfig(short_sides=(48,), long_side=90, crop_policy=False, custom=custom)
    return open_train_set(
        DataConfig(root=str(tmp_path), train_json=path.name, train_images="images", augment=augment), 3
    )


def drain(loader):
    loader.batch_sampler.set_epoch(1)
    images = [batch.pixels.clone() for batch, _ in loader]
    loader.close()
    return images


def test_batches_do_not_depend_on_workers(own, tmp_path, write_dataset):
    data = dataset(tmp_path, write_dataset, f"{own}:noisy")
    alone, helped = (drain(build_train_loader(data, 2, workers=workers)) for workers in (0, 2))
    assert all(map(torch.equal, alone, helped)) and len({int(batch[0, 0, 0, 0]) for batch in alone}) > 1


def test_an_error_in_a_worker_stays_one_sentence(own, tmp_path, write_dataset):
    loader = build_train_loader(dataset(tmp_path, write_dataset, f"{own}:bad"), 2, workers=1)
    with pytest.raises(CustomAugmentError) as error:
        drain(loader)
    loader.close()
    said = str(error.value)
    assert said.startswith(f"data.augment.custom={own}:bad: on image ") and "KeyError: 'no such thing'" in said
    assert "\n" not in said


def test_code_that_only_a_recipe_names_is_refused_and_not_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.py").write_text(
        "open('imported', 'w').close()\ntransform = lambda image, target: (image, target)"
    )
    (tmp_path / "recipe.yaml").write_text("data: {augment: {custom: 'theirs:transform'}}\n")
    monkeypatch.chdir(tmp_path)
    setting = "data.augment.custom=theirs:transform"
    for command in (["train", "recipe.yaml"], ["train", "recipe.yaml", "--resume"], ["check-data", "recipe.yaml"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert f"recipe.yaml: {setting} is code to import" in said and f"add {setting} to the command line" in said
        assert said.count("\n") == 1
    with pytest.raises(ConfigError, match="is code to import"):
        train("recipe.yaml", {"seed": 1})
    assert load_config("recipe.yaml", [setting]).data.augment.custom == "theirs:transform"
    assert load_config("recipe.yaml", [f"--{setting}"]).data.augment.custom == "theirs:transform"
    assert load_config("recipe.yaml", ["data.augment.custom=null"]).data.augment.custom is None
    assert not (tmp_path / "imported").exists()


def test_the_settings_of_weights_import_nothing_unless_one_trains_with_them(tmp_path, write_dataset, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "open('imported', 'w').close()\ntransform = lambda image, target: (image, target)"
    )
    path = write_dataset(tmp_path, sizes=[(40, 60)], boxes=[[(1, 2, 3, 20, 20)]])
    monkeypatch.chdir(tmp_path)
    stored = to_dict(apply_overrides(Config(), ["data.augment.custom=theirs:transform"]))
    config = from_dict(stored, "weights")
    data = replace(config.data, root=str(tmp_path), val_json=path.name, val_images="images", train_json=path.name)
    open_val_set(data)
    assert not (tmp_path / "imported").exists()
    open_train_set(replace(data, train_images="images"), 0)
    assert (tmp_path / "imported").exists()


def test_check_data_answers_a_wrong_name_in_a_line(own, tmp_path, write_dataset, capsys):
    path = write_dataset(tmp_path, sizes=[(40, 60)], boxes=[[(1, 2, 3, 20, 20)]])
    words = [f"data.root={tmp_path}", f"data.train_json={path.name}", "data.train_images=images"]
    assert cli.main(["check-data", "demo", *words, f"data.augment.custom={own}:nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
