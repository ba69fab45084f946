"""`data=FOLDER`: five layouts of the same images train alike, a run goes on with one, and its evaluation finds it."""

import errno
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from dataset_layouts import LAYOUTS, write_layouts
from support import SMALL_DETECTOR, SMALL_IMAGES, reset_accelerate

from brs_detr import cli
from brs_detr.config import load_config
from brs_detr.data.build import open_train_set, open_val_set
from brs_detr.data.dataset_source import open_source
from brs_detr.data.formats import coco
from brs_detr.data.formats.coco import split_coco
from brs_detr.data.loader import build_train_loader
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine.storage import StorageError
from brs_detr.exit_codes import ExitCode
from brs_detr.run.dataset import with_source, with_subset, write_subset
from brs_detr.run.setup import build_detector

FAST = [
    *SMALL_DETECTOR,
    *SMALL_IMAGES,
    "data.augment.long_side=64",
    "data.test_long_side=64",
    "train.total_batch_size=4",
]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five layouts: #1")
    return folder, write_layouts(folder, split_coco)


def opened(layouts, name, folder):
    config = load_config("demo", [*layouts[1][name], *FAST])
    return open_source(config.data, folder), config


@pytest.fixture(scope="module")
def detector():
    return build_detector(load_config("demo", FAST), 5)


def first_losses(config, source, detector):
    dataset = open_train_set(source.settings(config.data), seed=0)
    losses = []
    for images, targets in build_train_loader(dataset, 4, seed=0):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append({name: float(value) for name, value in detector.train()(images, targets).items()})
    return dataset, losses[:2]


def test_five_layouts_of_the_same_images_have_the_same_first_losses(layouts, detector, tmp_path):
    reference = None
    for name in LAYOUTS:
        detector.load_state_dict(build_detector(load_config("demo", FAST), 5).state_dict())  # with its batch statistics
        source, config = opened(layouts, name, tmp_path / name)
        dataset, losses = first_losses(config, source, detector)
        val = open_val_set(source.settings(config.data))
        found = (dataset.classes, len(dataset), [val.file_name(i) for i in range(len(val))])
        reference = reference or (found, losses)
        assert (found[0], found[1], [file.split("/")[-1] for file in found[2]]) == reference[0], name
        for ours, theirs in zip(losses, reference[1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4), name


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_written_into_the_dataset_and_the_same_jsons_come_again(layouts, tmp_path, name):
    before = content(layouts[0] / name)
    for again in ("a", "b"):
        source, _ = opened(layouts, name, tmp_path / again)
        assert all(split.json.is_file() for split in source.splits.values())
    assert content(layouts[0] / name) == before
    first, second = (content(tmp_path / again) for again in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    assert list(first.values()) == list(second.values()) and bool(first) == (name != "coco")


def test_a_full_disk_ends_a_start_as_a_fault_of_the_storage(layouts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(coco.os, "replace", full)
    config = load_config("demo", [*layouts[1]["yolo"], *FAST])
    with pytest.raises(StorageError, match=r"not enough room on the disk \(.* free\)\. Make room there") as error:
        with_source(config, tmp_path, Accelerator(cpu=True))
    assert error.value.code == ExitCode.STORAGE and str(error.value).startswith(str(tmp_path / "dataset"))
    assert not list((tmp_path / "dataset").iterdir())


def test_what_a_killed_start_has_left_is_removed_by_the_next_training(layouts, tmp_path):
    folder, config = tmp_path / "dataset", load_config("demo", [*layouts[1]["yolo"], *FAST])
    folder.mkdir()
    left = folder / ".train.json-15315"
    left.write_text("{")
    with_source(config, tmp_path, Accelerator(cpu=True), ("val",))
    assert left.is_file()  # perhaps of another evaluation, which goes on
    with_source(config, tmp_path, Accelerator(cpu=True))
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".txt") == ["train.json", "val.json"]


def test_a_subset_has_the_images_with_objects_however_ids_are_written(tmp_path):
    """As the dataset reads them: a json that can be trained on can also be overfitted."""
    images = [
        {"id": "4", "file_name": "a"},
        {"id": 5, "file_name": "b"},
        {"file_name": "c"},
        {"id": 6, "file_name": "d"},
    ]
    owners = [("4", 0), (5.0, "0"), ([6], 0), (None, 0), (6, "1"), ("6", 1)]
    annotations = [{"image_id": owner, "iscrowd": crowd} for owner, crowd in owners]
    data = {"images": [None, *images], "annotations": [*annotations, 1], "categories": []}
    assert write_subset(data, tmp_path / "subset.json", 9) == 2
    written = json.loads((tmp_path / "subset.json").read_text())
    assert [image["file_name"] for image in written["images"]] == ["a", "b"]
    assert [annotation["image_id"] for annotation in written["annotations"]] == [4, 5.0]
    assert write_subset(data, tmp_path / "subset.json", 1) == 1


@pytest.mark.parametrize(("max_pasted", "pasted"), [(99, True), (0, False)])
def test_a_subset_keeps_the_masks_that_copy_paste_needs(tmp_path, max_pasted, pasted):
    """Of a detector without masks: otherwise `train.overfit_batches` would train without copy-paste."""
    data = make_dataset(tmp_path / "data", train=4, val=2, image_size=72)
    words = [f"data.root={data}", f"output_dir={tmp_path}", "train.overfit_batches=1", "data.augment.name=lsj"]
    words += [f"data.augment.max_pasted={max_pasted}", "data.augment.size=64", "data.test_canvas=64"]
    config = with_subset(load_config("demo", [*SMALL_DETECTOR, *words]), Accelerator(cpu=True))
    dataset = open_train_set(config.data, 0, config.model.has_masks)
    assert not config.model.has_masks and dataset.masks is pasted
    assert (dataset.transforms.other_image is not None) is pasted


@pytest.mark.slow
def test_a_run_on_a_yolo_folder_goes_on_and_is_evaluated_elsewhere(layouts, tmp_path, capsys, monkeypatch):
    """Interrupted after one of two epochs it ends as the uninterrupted one; the moved dataset is found by data=."""
    place = tmp_path / "yolo"
    shutil.copytree(layouts[0] / "yolo", place)
    words = ["data=yolo", *FAST, "train.schedule=step", "train.lr_steps=[]", "data.augment.preset=strong"]
    monkeypatch.chdir(tmp_path)

    def train(*more):
        reset_accelerate()
        assert cli.main(["train", "demo", *words, *more]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    said = train("train.epochs=2", "output_dir=whole")
    assert f"data={place}: YOLO; train 11 images (its split train), val 5 images (its split val)" in said
    assert (tmp_path / "whole" / "train_samples.png").is_file()
    train("train.epochs=1", "output_dir=parts")
    train("train.epochs=2", "output_dir=parts", "--resume", "train.allow_changes=true")
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert [v for v in losses[0] if v is not None] == [v for v in losses[1] if v is not None]
    reset_accelerate()
    place.rename(tmp_path / "moved")
    assert cli.main(["eval", "whole", "--images", "0"]) == 2
    assert f"{place}: there is no such file or folder. Set data= to" in capsys.readouterr().err
    reset_accelerate()
    assert cli.main(["eval", "whole", "--images", "0", f"data={tmp_path / 'moved'}"]) == 0
    said = capsys.readouterr().out
    assert "val 5 images" in said and (tmp_path / "whole" / "evaluation" / "dataset" / "val.json").is_file()
    assert not (tmp_path / "whole" / "evaluation" / "dataset" / "train.json").exists()
