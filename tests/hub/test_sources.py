"""Weights by name: found, downloaded at their first use, converted in memory, and used by every command."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, reset_accelerate

import brs_detr
from brs_detr import cli
from brs_detr.checkpoints.keys import to_official
from brs_detr.checkpoints.official import expected_shapes
from brs_detr.config import ConfigError, apply_overrides, load_config, to_dict
from brs_detr.engine.checkpoint import Weights, save_weights
from brs_detr.exit_codes import CheckpointError
from brs_detr.hub import published, sources
from brs_detr.hub.download import DownloadError
from brs_detr.hub.published import TABLE, find, nearest
from brs_detr.hub.sources import SourceError, address_in_folder, local_path, require_source
from brs_detr.models.backbones import availability, timm_backbone
from brs_detr.models.config import CoDINOConfig, SoftNMS
from brs_detr.run.setup import build_detector, restore
from brs_detr.run.training import initial_detector
from brs_detr.run.weights import folder_for_results, locate, read

NAME, LSJ = "co_deformable_detr_r50_1x_coco", "co_dino_5scale_r50_lsj_8xb2_1x_coco"
NARROW = ["dim=64", "ffn_dim=32", "queries=12", "encoder_layers=1", "decoder_layers=2", "roi.fc_dim=64"]
NARROW = [f"model.{setting}" for setting in NARROW] + ["model.backbone.pretrained=false"]

DINO = CoDINOConfig(
    dim=64,
    ffn_dim=32,
    queries=12,
    encoder_layers=1,
    decoder_layers=2,
    roi=replace(CoDINOConfig.roi, fc_dim=64),
)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A narrow Co-Deformable-DETR of COCO's 80 classes, as the authors publish theirs; each tensor is one number."""
    shapes = expected_shapes(load_config(ROOT / "configs" / "co_detr_r50_12e_coco.yaml", NARROW).model, 80)
    numbers = torch.linspace(0.01, 0.9, len(shapes))
    ours = {name: number.clone().expand(shape) for (name, shape), number in zip(shapes.items(), numbers)}
    path = tmp_path_factory.mktemp("official") / "official.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": to_official(ours)[0]}, path)
    return path


@pytest.mark.parametrize(
    ("path", "cached"),
    [
        ("/data/hf_cache/models--alice--cells/snapshots/1a2b/model.safetensors", True),
        ("/home/me/.cache/huggingface/hub/models--alice--cells/snapshots/1a2b/model.safetensors", True),
        ("/home/me/models--alice/model.safetensors", False),
        ("/home/me/snapshots/model.safetensors", False),
    ],
)
def test_a_file_of_the_hub_is_known_wherever_its_cache_is(path, cached):
    assert sources.in_cache(Path(path)) is cached


@pytest.fixture
def served(server, official, monkeypatch):
    """The table's first entry with the address of the test's server."""
    server.content = official.read_bytes()
    monkeypatch.setitem(published.TABLE, NAME, replace(TABLE[NAME], url=server.url))
    return server


def test_the_table_says_where_each_file_is_and_what_it_reaches():
    assert len(TABLE) == 17 and {entry.ap for entry in TABLE.values()} >= {49.5, 56.9, 58.5, 54.8, 64.1}
    for name, entry in TABLE.items():
        assert entry.name == name and bool(entry.url) != bool(entry.folder) and entry.license in ("MIT", "Apache-2.0")
        assert (entry.license == "MIT") == (entry.url == "")
        assert not entry.url or (entry.sha256[:8] in entry.url and entry.url.startswith("https://"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("co_deformable_detr_r50_1x_coc", NAME),
        ("co_deformable_r50_1x_coco", NAME),
        ("Co_Deformable_DETR_Swin_Tiny_3x_COCO.pth", "co_deformable_detr_swin_tiny_3x_coco"),
    ],
)
def test_a_typo_names_the_nearest(typed, meant, capsys):
    assert nearest(typed)[0] == meant
    with pytest.raises(SourceError, match=f"run folder .*Did you mean {meant}"):
        require_source(typed)
    for command in (["eval", typed], ["predict", typed, __file__], ["train", "demo", f"train.init_from={typed}"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and (f"Did you mean {meant}" in said or command[0] == "train")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://nobody", "not the name of a repository. Write hf://user/repository"),
        ("hf://a/b/c", "not the name of a repository"),
        ("runs/demmo", "runs/demmo: neither a weights file nor a run folder"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_asked_for(monkeypatch, source, said):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a connection was tried"))
    with pytest.raises(SourceError, match=said.replace(".", r"\.")) as caught:
        local_path(source)
    assert "\n" not in str(caught.value)


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).write_text("")
    assert local_path(NAME) == Path(NAME)


def test_a_name_is_downloaded_once_and_converted_in_memory(served, cache, capsys):
    file = locate(NAME)
    assert file == cache / "weights" / f"{NAME}.pth" == locate(f"{NAME}.pth") and len(served.requests) == 1
    said = capsys.readouterr().out
    assert "(MIT license)" in said and "no checksum is published to compare with. SHA-256 " in said
    weights = read(file)
    assert weights.classes[0] == "person" and weights.category_ids[-1] == 90 and weights.extra["epoch"] == 12
    assert folder_for_results(file) == Path("evaluation") != folder_for_results(cache.parent / "x.safetensors")


def test_a_wrong_checksum_leaves_nothing_in_the_cache(served, cache, monkeypatch):
    monkeypatch.setitem(published.TABLE, NAME, replace(TABLE[NAME], sha256="00000000"))
    with pytest.raises(DownloadError, match=rf"SHA-256 .*, not 00000000.*{NAME}\.pth by hand from https"):
        locate(NAME)
    assert list((cache / "weights").iterdir()) == []


def test_what_is_downloaded_but_is_no_detector_is_named(server, served, tmp_path):
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    server.content = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(CheckpointError, match=f"{NAME}.pth: not a Co-Deformable-DETR"):
        brs_detr.load(NAME)


def test_load_predicts_with_a_name_and_with_the_file(served, official):
    image = np.zeros((60, 80, 3), np.uint8)
    overrides = ["data.test_short_side=64"]
    for source in (NAME, official):
        found = brs_detr.load(source, device="cpu", overrides=overrides)
        assert len(found.classes) == 80 and not found.calibrated
        assert found.predict(image).image_size == (80, 60)  # such weights compute nothing


def test_the_command_predicts_with_a_name(served, tmp_path, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    command = ["predict", NAME, str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "data.test_short_side=64"]
    assert cli.main(command) == 0 and (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.parametrize("by_name", [True, False])
def test_a_training_begins_from_a_name_or_an_official_file(served, official, monkeypatch, by_name):
    reset_accelerate()
    source = NAME if by_name else str(official)
    config = load_config("co_detr_r50_12e_coco", [*NARROW[:-1], f"train.init_from={source}"])
    assert config.model.backbone.pretrained  # which need not be fetched, as the weights hold the backbone's
    monkeypatch.setattr(timm_backbone, "require_reachable", lambda _: pytest.fail("looked for pretrained weights"))
    model, transfer = initial_detector(config, ["dog", "unicorn"])
    assert not transfer.fresh or all("score" in name or "classif" in name for name in transfer.fresh)
    assert len(transfer.kept) > 300 and transfer.by_class
    weights = read(locate(source)).tensors
    name = next(name for name in transfer.by_class if name.startswith("decoder.classifiers.0.weight"))
    assert torch.equal(model.state_dict()[name][0], weights[name][16])  # dog
    assert not torch.equal(model.state_dict()[name][1], weights[name][16])


@pytest.mark.parametrize("words", [["norm=batch"], ["deformable_stages=[3]"]])
def test_complete_weights_need_no_pretrained_ones_for_what_those_lack(tmp_path, monkeypatch, words):
    """Counts of batches, where the norms were frozen, and the offsets of deformable convolutions."""
    reset_accelerate()
    config = load_config("co_detr_r50_12e_coco", NARROW[:-1])
    model = build_detector(config, 1, initial_weights=False)
    save_weights(tmp_path / "w.safetensors", Weights(model.state_dict(), ["dog"], [1], to_dict(config)))
    monkeypatch.setattr(timm_backbone, "require_reachable", lambda _: pytest.fail("looked for pretrained weights"))
    other = [f"model.backbone.{word}" for word in words] + [f"train.init_from={tmp_path / 'w.safetensors'}"]
    _, transfer = initial_detector(apply_overrides(config, other), ["dog"])
    assert transfer.fresh and all(name.startswith("backbone.") for name in transfer.fresh)


@pytest.fixture(scope="module")
def official_dino(tmp_path_factory):
    """A narrow Co-DINO of 80 classes, likewise, with the name of the label table in MMDetection."""
    shapes = expected_shapes(DINO, 80)
    numbers = torch.linspace(0.01, 0.9, len(shapes))
    tensors = to_official({name: n.clone().expand(shape) for (name, shape), n in zip(shapes.items(), numbers)})[0]
    tensors["query_head.label_embedding.weight"] = torch.arange(80.0)[:, None].expand(80, 64)
    tensors["query_head.dn_generator.label_embedding.weight"] = tensors.pop("query_head.label_embedding.weight")
    path = tmp_path_factory.mktemp("official") / "official.pth"
    torch.save({"meta": {}, "state_dict": tensors}, path)
    return path


@pytest.fixture
def served_dino(server, official_dino, monkeypatch):
    """The entry of the published Co-DINO with LSJ, with the address of the test's server."""
    server.content = official_dino.read_bytes()
    entry = replace(TABLE[LSJ], url=server.url, sha256=hashlib.sha256(server.content).hexdigest())
    monkeypatch.setitem(published.TABLE, LSJ, entry)
    return server


def test_a_co_dino_by_name_has_the_canvas_of_its_training(served_dino, official_dino):
    model, weights, _, _ = restore(LSJ)
    assert model.test_canvas == 1024 and model.nms == SoftNMS(iou=0.8) and len(weights.classes) == 80
    assert len(brs_detr.load(LSJ, device="cpu").classes) == 80
    with pytest.raises(CheckpointError, match=r"official\.pth: this Co-DINO was trained .* `brs-detr convert --augm"):
        brs_detr.load(official_dino)


def test_a_co_dino_is_fine_tuned_on_other_classes(served_dino):
    """Rows of shared classes are kept, of the proposals and the label table too; the others are new."""
    reset_accelerate()
    config = replace(load_config("co_detr_r50_12e_coco", [f"train.init_from={LSJ}"]), model=DINO)
    model, transfer = initial_detector(config, ["unicorn", "dog", "cat"])
    weights = read(locate(LSJ)).tensors
    assert not transfer.fresh and not transfer.unused
    state = model.state_dict()
    for name in ("denoising.label_embedding.weight", "proposals.classifier.weight", "decoder.classifiers.1.bias"):
        assert name in transfer.by_class
        assert torch.equal(state[name][1:], weights[name][[16, 15]])  # dog, cat
        assert not torch.isin(state[name][0], weights[name]).any()


FOLDER = """<div class="flip-entry" id="entry-1"><a href="https://drive.google.com/file/d/1abcDEF-ghi_jkl/view?usp=drive_web">
<div class="flip-entry-title">co_deformable_detr_swin_tiny_1x_coco.pth</div></a></div>
<div class="flip-entry"><a href="https://drive.google.com/file/d/2abcDEF-ghi_jkl/view"><div class="x"></div>
<div class="flip-entry-title">co_deformable_detr_r50_1x_coco.pth</div></a></div>"""


def test_the_address_is_looked_up_in_the_folder(monkeypatch):
    monkeypatch.setattr(
        sources, "read_page", lambda url, **_: FOLDER if url.endswith(f"{TABLE[NAME].folder}#list") else ""
    )
    assert "?id=2abcDEF-ghi_jkl&" in address_in_folder(TABLE[NAME], "")
    with pytest.raises(DownloadError, match=r"does not list co_deformable_detr_swin_base_1x_coco\.pth\. By hand"):
        address_in_folder(find("co_deformable_detr_swin_base_1x_coco"), "By hand.")


def test_no_network_names_the_page_and_the_place(monkeypatch, capsys, cache):
    def fail(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    assert cli.main(["eval", NAME]) == 2
    said = capsys.readouterr().err
    assert "drive.google.com cannot be reached" in said and f"put it at {cache / 'weights' / NAME}.pth" in said
    assert said.count("\n") == 1 and not (cache / "weights").exists()


@pytest.mark.parametrize(
    ("name", "said"), [("results.json", "is a json"), ("a.yaml", "is a recipe"), ("a.onnx", "is an exp")]
)
def test_files_of_another_kind_are_called_what_they_are(tmp_path, capsys, name, said):
    (tmp_path / name).write_text("[]")
    # an exported file can be evaluated, but not exported again
    command = ["export", "--out", str(tmp_path / "b.onnx")] if name.endswith("onnx") else ["eval"]
    assert cli.main([*command, str(tmp_path / name)]) == 2
    text = capsys.readouterr().err
    assert f"{name}: this {said}" in text and "damaged" not in text and text.count("\n") == 1


def test_another_backbone_starts_from_its_own_weights(served, monkeypatch):
    """And so pretrained ones are looked for, with an answer of one sentence where there is no network."""
    monkeypatch.setattr(availability, "is_cached", lambda _: False)
    monkeypatch.setattr(availability, "connects", lambda *_: False)
    words = [*NARROW[:-1], "model.backbone.name=resnet34.tv_in1k", f"train.init_from={NAME}"]
    with pytest.raises(
        ConfigError, match=r"pretrained weights of resnet34\.tv_in1k cannot be downloaded .*checkpoint=PATH"
    ):
        initial_detector(load_config("co_detr_r50_12e_coco", words), ["dog"])
