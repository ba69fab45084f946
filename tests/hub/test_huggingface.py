"""A run on the hub: what is uploaded, how it is loaded again, and what is said without a network."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub import errors
from support import DEMO, SMALL_DETECTOR

import brs_detr
from brs_detr import cli
from brs_detr.config import load_config, to_dict
from brs_detr.engine.checkpoint import Weights, load_weights, save_weights
from brs_detr.hub import huggingface
from brs_detr.hub.model_card import model_card
from brs_detr.run.setup import build_detector

CLASSES = ["red | cell", "<b>white</b>"]
METRICS = {"AP": 0.41234, "AP50": 0.7, "AP75": -1.0, "images": 30}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, as a training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    words = [*SMALL_DETECTOR, "data.root=/home/alice/secret/cells", r"output_dir=C:\alice\runs\cells"]
    config = load_config(DEMO, words)
    tensors = build_detector(config, 2, initial_weights=False).state_dict()
    extra = {"epoch": 7, "metrics": METRICS, "validated_on": "x"}
    save_weights(folder / "best.safetensors", Weights(tensors, CLASSES, [4, 9], to_dict(config), extra))
    lines = [{"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-4} for step in range(1, 5)]
    lines.append({"kind": "val", "step": 4, "epoch": 1, "AP": 0.4, "AP50": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation").mkdir()
    rows = [{"category_id": 4, "AP": 0.5, "AP50": 0.75}, {"category_id": 9, "AP": -1, "AP50": None}]
    content = {"about": {"weights": "best.safetensors", "epoch": 7}, "stats": METRICS, "images": 30}
    content["per_class"] = rows
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that keeps what is uploaded in a folder."""
    calls = SimpleNamespace(created=[], folder=tmp_path / "hub", message="", fault=None)

    class Api:
        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            if calls.fault is not None:
                raise calls.fault
            calls.created.append((repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.folder.mkdir()
            for path in folder_path.iterdir():
                (calls.folder / path.name).write_bytes(path.read_bytes())
            calls.message = commit_message
            return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    def download(repository, name, *, revision=None):
        if calls.fault is not None:
            raise calls.fault
        calls.revision = revision
        return str(calls.folder / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface, "is_reachable", lambda *_: True)
    return calls


def test_what_is_pushed_is_loaded_again(run, hub, capsys):
    assert cli.main(["push", str(run), "alice/cells", "--private", "--license", "apache-2.0"]) == 0
    assert hub.created == [("alice/cells", True, True)]
    assert 'load("hf://alice/cells")' in capsys.readouterr().out
    assert {path.name for path in hub.folder.iterdir()} == {
        "README.md",
        "config.yaml",
        "curves.png",
        "model.safetensors",
    }
    for source in ("hf://alice/cells", "hf://alice/cells@v1.0"):
        found = brs_detr.load(source, device="cpu")
        assert found.classes == CLASSES and found.category_ids == [4, 9]
    assert hub.revision == "v1.0"
    assert load_config(hub.folder / "config.yaml").model == load_config(DEMO, SMALL_DETECTOR).model


def test_folders_of_this_machine_stay_here(run, hub):
    assert cli.main(["push", str(run), "alice/cells"]) == 0
    for path in hub.folder.iterdir():
        assert b"alice/secret" not in path.read_bytes() and b"C:\\\\alice" not in path.read_bytes(), path
    assert load_weights(hub.folder / "model.safetensors").config["data"]["root"] == "cells"
    assert load_weights(run / "best.safetensors").config["data"]["root"] == "/home/alice/secret/cells"


def test_the_card_is_filled_in_from_the_run(run, hub):
    assert cli.main(["push", str(run), "alice/cells", "--license", "apache-2.0"]) == 0
    card = (hub.folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "apache-2.0" and facts["pipeline_tag"] == "object-detection"
    metrics = facts["model-index"][0]["results"][0]["metrics"]
    assert [(one["type"], one["value"]) for one in metrics] == [("AP", 0.4123), ("AP50", 0.7)]  # AP75 is of no object
    assert "| AP | 0.412 |" in body and "after epoch 7" in body and 'load("hf://alice/cells")' in body
    assert "| red \\| cell | 4 | 0.500 | 0.750 |" in body and "| &lt;b&gt;white&lt;/b&gt; | 9 |  |  |" in body
    assert "not calibrated" in body and "![Training curves](curves.png)" in body and "  queries: 10\n" in body
    assert huggingface_hub.ModelCard(card).data.library_name == "brs-detr"  # the hub's own reader takes it


@pytest.mark.parametrize(
    "change",
    [
        {"stats": {**METRICS, "AP": 0.018}},  # of another dataset or head
        {"about": {"weights": "last.safetensors", "epoch": 8}},
        {"stats": {"AP50": 0.7}},
        {"images": 4},
        None,  # a write that was cut off
    ],
)
def test_the_card_has_no_ap_of_classes_from_an_evaluation_with_other_figures(run, tmp_path, capsys, change):
    content = json.loads((run / "evaluation" / "evaluation.json").read_text())
    shutil.copytree(run, tmp_path / "run")
    text = '{"about": {' if change is None else json.dumps({**content, **change})
    (tmp_path / "run" / "evaluation" / "evaluation.json").write_text(text)
    assert cli.main(["push", str(tmp_path / "run"), "alice/cells", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not evaluated one by one" in card and "| red \\| cell | 4 |  |  |" in card and "| AP | 0.412 |" in card
    assert "evaluation.json: has other figures than best.safetensors" in capsys.readouterr().out


def test_the_card_of_weights_without_a_validation():
    bare = Weights({}, [f"class {index}" for index in range(300)], list(range(300)), {"model": {"name": "atss"}}, {})
    card = model_card(bare, "a/b")
    assert "No validation is stored" in card and "and 292 more classes" in card and "... and 200 more." in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1]) and "curves.png" not in card
    calibrated = Weights({}, ["a"], [1], {}, {"calibration": {"decoder": {}}})
    assert "of detections with a score of 0.8 about 80 in 100 were right" in model_card(calibrated, "a/b")


def test_out_writes_the_folder_and_asks_nobody(run, hub, tmp_path):
    hub.fault = AssertionError("asked the hub")
    assert cli.main(["push", str(run), "alice/cells", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").exists() and not hub.folder.exists()


def test_out_replaces_an_earlier_push_and_no_other_files(run, hub, tmp_path, capsys):
    own, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, own)
    (own / "config.yaml").write_text("of the run")
    assert cli.main(["push", str(own), "alice/cells", "--out", str(own)]) == 2
    said = capsys.readouterr().err
    assert "holds best.safetensors, which push has not written. Name a new" in said and said.count("\n") == 1
    assert (own / "config.yaml").read_text() == "of the run"
    for _ in range(2):
        assert cli.main(["push", str(own), "alice/cells", "--out", str(out)]) == 0
    (out / "notes.txt").touch()
    assert cli.main(["push", str(own), "alice/cells", "--out", str(out)]) == 2


@pytest.mark.parametrize("words", [["push", "RUN", "alice"], ["push", "RUN", "a/b/c"], ["push", "nothing", "a/b"]])
def test_what_cannot_be_pushed(run, hub, capsys, words):
    assert cli.main([str(run) if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("Write user/repository" in said or "neither a weights file" in said)
    assert hub.created == []


@pytest.mark.parametrize("fault", [errors.LocalTokenNotFoundError("no token"), RuntimeError("connection reset")])
def test_a_refusal_of_the_hub_names_the_login(run, hub, capsys, fault):
    hub.fault = fault
    assert cli.main(["push", str(run), "alice/cells"]) == 2
    said = capsys.readouterr().err
    assert f"alice/cells: cannot be uploaded ({fault}). Log in with `hf auth login`" in said and said.count("\n") == 1


def test_without_a_network_nothing_is_tried(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface, "is_reachable", lambda *_: False)
    for command in (["push", str(run), "alice/cells"], ["eval", "hf://alice/cells"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert "does not answer" in said and "Connect to the network" in said and said.count("\n") == 1
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(run / "best.safetensors"))
    assert brs_detr.load("hf://alice/cells", device="cpu").classes == CLASSES  # of a download before


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (errors.EntryNotFoundError("404"), "this repository has no model.safetensors. Use one that `brs-detr push`"),
        (errors.LocalEntryNotFoundError("lost"), "cannot be downloaded (lost). Try again later"),
        (OSError("disk"), "cannot be downloaded (disk). Try again later"),
    ],
)
def test_weights_that_a_repository_lacks(hub, capsys, fault, said):
    hub.fault = fault
    assert cli.main(["eval", "hf://alice/cells"]) == 2
    text = capsys.readouterr().err
    assert f"hf://alice/cells: {said}" in text and text.count("\n") == 1
