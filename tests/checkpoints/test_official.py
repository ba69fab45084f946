"""Files a user may hand over: complete and official ones convert exactly, all others are refused in one sentence."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brs_detr import cli
from brs_detr.checkpoints.architecture import COCO_IDS, COCO_NAMES, name_classes
from brs_detr.checkpoints.keys import to_official
from brs_detr.checkpoints.official import expected_shapes, from_official
from brs_detr.config import Config, to_dict
from brs_detr.data.config import AugmentConfig, LSJConfig
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.exit_codes import CheckpointError
from brs_detr.models.backbones.weights_io import read_official
from brs_detr.models.config import BRSDETRConfig, SoftNMS
from brs_detr.run.setup import restore
from brs_detr.run.weights import read

RELEASED = "co_dino_5scale_lsj_r50_3x_coco.pth"


def official_state(config, classes):
    """A ResNet-50 detector with official names; every tensor differs from every other, though it is one number."""
    shapes = expected_shapes(config, classes)
    numbers = torch.linspace(0.01, 0.9, len(shapes))
    ours = {name: number.clone().expand(shape) for (name, shape), number in zip(shapes.items(), numbers)}
    return to_official(ours)[0]


@pytest.fixture
def save(tmp_path, small_model):
    """Writes an official file, optionally changed, and returns its path."""

    def write(classes=3, change=lambda state: None, meta=None, prefix="", softmax=False, name="official.pth"):
        state = official_state(small_model(softmax), classes)
        change(state)
        path = tmp_path / name
        torch.save({"meta": meta or {}, "state_dict": {prefix + k: v for k, v in state.items()}}, path)
        return path

    return write


@pytest.fixture
def save_dino(save, tmp_path, small_dino):
    """The same of a Co-DINO."""

    def write(name, classes=80, change=lambda state: None, meta=None, **settings):
        state = official_state(small_dino(**settings), classes)
        change(state)
        torch.save({"meta": meta or {}, "state_dict": state}, tmp_path / name)
        return tmp_path / name

    return write


def convert(source, *options):
    """Run the command; returns the exit code and where it writes."""
    target = source.with_name("out.safetensors")
    return cli.main(["convert", str(source), str(target), *map(str, options)]), target


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_there_and_back_every_number_is_the_same(save, capsys, softmax, prefix):
    source = save(80, softmax=softmax, prefix=prefix)
    assert convert(source)[0] == 0
    assert ("with softmax" if softmax else "with sigmoids") in capsys.readouterr().out
    back, run = source.with_name("back.pth"), source.with_name("run")
    run.mkdir()
    source.with_name("out.safetensors").rename(run / "best.safetensors")
    assert cli.main(["convert", str(run), str(back), "--to-official"]) == 0
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (source, back))
    first = {name.removeprefix(prefix): value for name, value in first.items()}
    assert set(first) == set(second)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({}, "Co-DINO"),
        ({"denoising": "none"}, "Co-DINO without denoising"),
        ({"softmax": False}, "BRS-DINO"),
        ({"softmax": False, "denoising": "rank"}, "BRS-DINO"),
    ],
)
def test_there_and_back_every_number_of_a_co_dino_is_the_same(save_dino, capsys, settings, family):
    source = save_dino(RELEASED, **settings)
    assert convert(source, "--augmentation", "lsj")[0] == 0
    assert f": {family}, backbone" in capsys.readouterr().out
    back, run = source.with_name("back.pth"), source.with_name("run")
    run.mkdir()
    source.with_name("out.safetensors").rename(run / "best.safetensors")
    assert cli.main(["convert", str(run), str(back), "--to-official"]) == 0
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (source, back))
    assert set(first) == set(second) and all(torch.equal(second[name], value) for name, value in first.items())
    assert ("query_head.label_embedding.weight" in first) == (settings.get("denoising") != "none")


def test_a_converted_co_dino_is_a_detector(save_dino, capsys):
    code, target = convert(save_dino(RELEASED))
    said = capsys.readouterr().out
    assert code == 0 and "augmentation: large-scale jitter on a canvas of 1024x1024, by its name" in said
    model, _, config, _ = restore(target)
    assert (model.test_canvas, model.nms) == (1024, SoftNMS(iou=0.8))
    assert config.data.augment == LSJConfig(size=1024) and config.train.epochs == 36
    with torch.no_grad():
        found = model([torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)])[0]
    assert found["boxes"].shape[1] == 4


@pytest.mark.parametrize(
    ("options", "canvas", "said"),
    [
        (["--augmentation", "detr"], None, "augmentation: DETR's, as given"),
        (["--augmentation", "lsj"], 1024, "canvas of 1024x1024, as given"),
        (["--augmentation", "lsj", "--canvas", "640"], 640, "canvas of 640x640, as given"),
    ],
)
def test_the_augmentation_is_stored_with_the_weights(save_dino, capsys, options, canvas, said):
    code, target = convert(save_dino("epoch_12.pth"), *options)
    assert code == 0 and said in capsys.readouterr().out
    data = restore(target)[2].data
    assert data.test_canvas == canvas and (data.test_short_side, data.test_long_side) == (800, 1333)
    assert data.augment == (AugmentConfig() if canvas is None else LSJConfig(size=canvas))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("epoch_12.pth", [], "neither its tensors nor its name show. Convert it with `brs-detr convert --augmentation"),
        ("co_dino_5scale_swin_large_1x_coco.pth", [], "neither its tensors nor its name show"),
        ("co_dino_5scale_r50_1x_coco.pth", ["--augmentation", "lsj"], "by its name it was trained with detr, not lsj"),
        (RELEASED, ["--augmentation", "detr"], "by its name it was trained with lsj, not detr"),
        ("co_dino_5scale_r50_1x_coco.pth", ["--canvas", "1024"], "trained with detr, without a canvas"),
        ("a.pth", ["--augmentation", "detr", "--canvas", "9"], "--canvas 9 is the side of the squares of lsj"),
    ],
)
def test_an_augmentation_that_is_unknown_or_wrong_is_said(save_dino, capsys, name, options, said):
    code, target = convert(save_dino(name), *options)
    error = capsys.readouterr().err
    assert code == 2 and said in error and len(error.splitlines()) == 1 and not target.exists()


def test_weights_read_in_memory_know_their_augmentation_by_their_name(save_dino):
    weights = read(save_dino("co_dino_5scale_r50_lsj_8xb2_1x_coco-69a72d67.pth"))
    assert weights.config["data"]["test_canvas"] == 1024 and weights.config["model"]["name"] == "co_dino"
    with pytest.raises(CheckpointError, match=r"epoch_12\.pth: .* `brs-detr convert --augmentation detr`, or `lsj`"):
        read(save_dino("epoch_12.pth"))


@pytest.mark.parametrize(("options", "code"), [(["--augmentation", "detr"], 0), (["--augmentation", "lsj"], 2)])
def test_a_co_deformable_detr_has_one_augmentation(save, capsys, options, code):
    assert convert(save(80, softmax=True), *options)[0] == code
    error = capsys.readouterr().err
    assert ("this is Co-Deformable-DETR, which is released with DETR's augmentation only" in error) == (code == 2)


@pytest.mark.parametrize(
    "change",
    [
        {"aux_heads": ("roi",)},
        {"atss": replace(BRSDETRConfig.atss, scales_per_octave=2)},
        {"roi": replace(BRSDETRConfig.roi, class_agnostic=True, fc_dim=64)},
    ],
)
def test_a_detector_that_could_not_be_read_back_has_no_official_file(small_model, tmp_path, capsys, change):
    config = replace(small_model(False), **change)
    tensors = {name: torch.zeros(shape) for name, shape in expected_shapes(config, 3).items()}
    weights = Weights(tensors, ["a", "b", "c"], [1, 2, 3], to_dict(Config(model=config)), {})
    save_weights(tmp_path / "mine.safetensors", weights)
    command = ["convert", str(tmp_path / "mine.safetensors"), str(tmp_path / "back.pth"), "--to-official"]
    assert cli.main(command) != 0
    assert "Only detectors of the released architecture can be converted" in capsys.readouterr().err
    assert not (tmp_path / "back.pth").exists()


def test_options_of_the_way_in_are_none_of_the_way_out(tmp_path, capsys):
    command = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "a.pth"), "--to-official"]
    assert cli.main([*command, "--augmentation", "lsj"]) == 2
    assert "leave them out with --to-official" in capsys.readouterr().err


def test_training_begins_from_classes_without_names(save_dino):
    """As those of Objects365 are: no class of one's own is one of them."""
    source = save_dino("a.pth", 3)
    with pytest.raises(CheckpointError, match=r"has 3 classes without names\. Give the json"):
        from_official(read_official(source), str(source), augmentation="detr")
    weights, _ = from_official(read_official(source), str(source), augmentation="detr", names_required=False)
    assert len(set(weights.classes)) == 3 and all("a.pth" in name for name in weights.classes)


def test_a_converted_file_is_a_detector_with_coco_classes(save, capsys):
    code, target = convert(save(80, meta={"CLASSES": COCO_NAMES, "epoch": 12, "best": np.float64(0.5)}))
    report = capsys.readouterr().out
    assert code == 0 and "ours alone: none" in report and "a count of batches" in report
    weights = load_weights(target)
    assert weights.extra["epoch"] == 12
    assert (weights.classes[0], weights.category_ids[0]) == ("person", 1)
    assert (weights.classes[79], weights.category_ids[79]) == ("toothbrush", 90)
    model = restore(target)[0]
    with torch.no_grad():
        found = model([torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)])[0]
    assert found["boxes"].shape == (100, 4)


def test_coco_has_80_classes_with_ids_up_to_90():
    assert len(COCO_NAMES) == len(set(COCO_NAMES)) == len(COCO_IDS) == 80
    assert (COCO_IDS[COCO_NAMES.index("stop sign")], COCO_IDS[COCO_NAMES.index("bench")]) == (13, 15)


def test_other_classes_are_named_by_the_json(save, tmp_path, capsys):
    source = save(3)
    assert convert(source)[0] == 2
    assert "has 3 classes without names. Give the json" in capsys.readouterr().err
    categories = [{"id": 9 - i, "name": f"c{i}"} for i in range(3)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"categories": categories}))
    code, target = convert(source, "--num-classes-from", path)
    weights = load_weights(target)
    assert code == 0 and weights.category_ids == [9, 8, 7] and weights.classes == ["c0", "c1", "c2"]
    path.write_text(json.dumps({"categories": categories[:2]}))
    assert convert(source, "--num-classes-from", path)[0] == 2
    assert f"has 3 classes, but {path} names 2" in capsys.readouterr().err
    path.write_text("[]")
    assert convert(source, "--num-classes-from", path)[0] == 2
    assert "not a json in COCO's format" in capsys.readouterr().err


def test_class_names_of_the_file_are_kept():
    named = name_classes(2, {"CLASSES": ("cat", "dog")}, None, "file")
    assert (named.names, named.ids) == (["cat", "dog"], [1, 2]) and "assumed" in named.remark
    named = name_classes(1, {"dataset_meta": {"classes": ("cat",)}}, None, "file")
    assert named.names == ["cat"]
    with pytest.raises(CheckpointError, match="has 3 classes but names 2"):
        name_classes(3, {"CLASSES": ("cat", "dog")}, None, "file")


def drop(name):
    return lambda state: state.pop(name)


def put(name, *shape):
    return lambda state: state.__setitem__(name, torch.zeros(1).expand(*shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("rpn_head.rpn_conv.weight"), "1 missing (rpn.conv.weight)"),
        (drop("query_head.query_embedding.weight"), "the tensor query_head.query_embedding.weight is missing"),
        (put("query_head.surplus.weight", 3), "1 unknown (query_head.surplus.weight)"),
        (put("rpn_head.rpn_conv.weight", 7, 64, 3, 3), "1 of another shape (rpn.conv.weight (7, 64, 3, 3) instead of"),
        (put("query_head.label_embedding.weight", 80, 64), "1 unknown (denoising.label_embedding.weight)"),
        (put("roi_head.0.mask_head.conv.weight", 3), "Co-DETR with a mask head"),
        (put("bbox_head.1.atss_cls.weight", 3), "more than two auxiliary heads"),
        (put("roi_head.0.bbox_head.fc_cls.weight", 9, 64), "a RoI head of 9 columns without centerness beside 80"),
        (put("bbox_head.0.atss_centerness.weight", 1, 64, 3, 3), "80 columns with centerness beside 80 classes"),
        (put("backbone.layer3.6.conv3.weight", 1024, 256, 1, 1), "the backbone is one of"),
    ],
)
def test_other_architectures_and_incomplete_ones_are_refused(save, capsys, change, message):
    code, target = convert(save(80, change))
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1
    assert not target.exists() and not list(target.parent.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("query_head.transformer.decoder.norm.weight"), "1 missing (decoder.norm.weight)"),
        (drop("query_head.transformer.query_embed.weight"), "tensor query_head.transformer.query_embed.weight is miss"),
        (put("query_head.transformer.pos_trans.weight", 128, 128), "1 unknown (box_embedding.projection.weight)"),
        (put("query_head.label_embedding.weight", 79, 64), "1 of another shape (denoising.label_embedding.weight (79,"),
        (put("mask_iou_head.fcs.0.weight", 3), "this is Co-DINO on a ViT with instance masks; only Co-Deformable-DETR"),
        (put("backbone.pos_embed", 1, 5, 64), "this is a detector on a plain ViT"),
        (put("roi_head.0.mask_head.conv.weight", 3), "Co-DETR with a mask head"),
    ],
)
def test_incomplete_co_dinos_are_refused(save_dino, capsys, change, message):
    code, target = convert(save_dino("epoch_12.pth", change=change), "--augmentation", "detr")
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1 and not target.exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bbox_head.transformer.level_embeds"], "a DETR of MMDetection"),
        (["transformer.encoder.layers.0.linear1.weight", "class_embed.weight"], "a DETR from another code base"),
        (["backbone.conv1.weight", "roi_head.bbox_head.fc_cls.weight"], "a two-stage detector"),
        (["conv1.weight", "fc.weight"], "its 2 tensors are named conv1.weight, fc.weight"),
        (["decoder.classifiers.0.weight"], "a detector of this project already"),
    ],
)
def test_files_of_other_detectors_are_called_by_their_name(tmp_path, capsys, names, message):
    torch.save({"state_dict": {name: torch.zeros(1) for name in names}}, tmp_path / "other.pth")
    assert convert(tmp_path / "other.pth")[0] == 2
    assert message in capsys.readouterr().err


def damaged(folder):
    """Name of a bad file and what is said about it."""
    torch.save({"state_dict": {"a": torch.zeros(9999)}}, folder / "cut.pth")
    (folder / "cut.pth").write_bytes((folder / "cut.pth").read_bytes()[:20000])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("<html>not found</html>")
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (folder / "pickle.pth").write_bytes(pickle.dumps({"state_dict": [1, 2, 3]}))
    (folder / "folder").mkdir()
    torch.save({"state_dict": {}}, folder / "nothing.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": Path("/")}, folder / "objects.pth")
    return {
        "cut.pth": "cut short, damaged",
        "empty.pth": "cut short, damaged",
        "text.pth": "not a PyTorch checkpoint",
        "cut.safetensors": "damaged or cut short",
        "pickle.pth": "not a PyTorch checkpoint",
        "nothing.pth": "holds no named tensors",
        "objects.pth": "holds Python objects besides tensors and is not opened",
        "folder": "this is a folder, not a checkpoint file. Name the .pth in it.",
        "absent.pth": "no such checkpoint file",
    }


def test_damaged_files_are_refused_in_one_sentence(tmp_path, capsys):
    for name, message in damaged(tmp_path).items():
        code, target = convert(tmp_path / name)
        error = capsys.readouterr().err
        assert code == 2 and error.startswith(f"error: {tmp_path / name}: ") and message in error, name
        assert len(error.splitlines()) == 1 and not target.exists()


def test_nothing_in_a_file_is_executed(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": {"a": Harmful()}}, tmp_path / "bad.pth")
    assert convert(tmp_path / "bad.pth")[0] == 2
    assert not (tmp_path / "executed").exists()


def test_the_written_file_is_another_one(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]) == 2
    assert "must differ from the source and end in .safetensors" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors")]) == 2
