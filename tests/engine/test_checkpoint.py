"""Weights files: complete or absent, and sufficient by themselves."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from brs_detr.engine.checkpoint import Weights, find_weights, load_matching, load_weights, rows_per_class, save_weights
from brs_detr.engine.snapshot import _load_optimizer
from brs_detr.exit_codes import CheckpointError

WEIGHTS = Weights({"a": torch.arange(6.0).view(2, 3)}, ["cat", "dög"], [3, 90], {"seed": 1}, {"epoch": 4})


def test_a_file_holds_everything_that_was_given(tmp_path):
    save_weights(tmp_path / "w.safetensors", WEIGHTS)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(loaded.tensors["a"], WEIGHTS.tensors["a"])
    assert (loaded.classes, loaded.category_ids) == (["cat", "dög"], [3, 90])
    assert (loaded.config, loaded.extra) == ({"seed": 1}, {"epoch": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_tied_and_transposed_tensors_can_be_saved(tmp_path):
    tensor = torch.rand(3, 4)
    weights = Weights({"a": tensor, "b": tensor, "c": tensor.T}, ["x"], [1])
    save_weights(tmp_path / "w.safetensors", weights)
    loaded = load_weights(tmp_path / "w.safetensors").tensors
    assert torch.equal(loaded["a"], loaded["b"]) and torch.equal(loaded["c"], tensor.T)


def test_the_optimizers_state_has_the_layout_of_its_weights_again():
    """Fused and grouped steps need it; and only then is the next step that of the uninterrupted run, bit for bit."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 1)).to(memory_format=torch.channels_last)
    second, images = copy.deepcopy(first), torch.randn(2, 4, 9, 9)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    one, other = (torch.optim.AdamW(model.parameters(), lr=0.01) for model in (first, second))
    step(first, one)
    stored = {
        name: {key: value.contiguous() for key, value in one.state[parameter].items()}
        for name, parameter in first.named_parameters()
    }
    second.load_state_dict(first.state_dict())
    _load_optimizer(other, dict(second.named_parameters()), stored)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert other.state[theirs]["exp_avg"].stride() == one.state[mine]["exp_avg"].stride() == mine.stride()
    step(first, one)
    step(second, other)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_crash_while_writing_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, WEIGHTS)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_weights(path, Weights({"a": torch.zeros(1)}, [], []))
    assert load_weights(path).classes == ["cat", "dög"]


def test_what_cannot_be_used_is_named(tmp_path):
    damaged, foreign = tmp_path / "damaged.safetensors", tmp_path / "foreign.safetensors"
    save_weights(damaged, WEIGHTS)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    save_file({"a": torch.zeros(1)}, foreign)
    for path, reason in ((damaged, "damaged"), (foreign, "no class names"), (tmp_path / "none", "no such")):
        with pytest.raises(CheckpointError, match=reason) as error:
            load_weights(path)
        assert str(path) in str(error.value)


def test_a_run_folder_means_its_best_weights_else_its_last(tmp_path):
    with pytest.raises(CheckpointError, match=r"best\.safetensors"):
        find_weights(tmp_path)
    (tmp_path / "last.safetensors").touch()
    assert find_weights(tmp_path).name == "last.safetensors"
    (tmp_path / "best.safetensors").touch()
    assert find_weights(tmp_path).name == "best.safetensors"
    assert find_weights(tmp_path / "last.safetensors").name == "last.safetensors"


class Detector(nn.Module):
    """Class scores, class-specific boxes, scores with a background row, and four box outputs that are no classes."""

    def __init__(self, classes):
        super().__init__()
        self.scores = nn.Linear(2, classes)
        self.boxes = nn.Linear(2, 4 * classes)
        self.softmax = nn.Linear(2, classes + 1)
        self.box = nn.Linear(2, 4)
        self.body = nn.Linear(2, 2)


def test_fine_tuning_keeps_what_fits_and_copies_shared_classes_row_by_row():
    old_classes, classes = ["cat", "dog", "cow", "hen"], ["dog", "emu", "hen", "yak"]  # four of each: as many as a box
    old, new = Detector(4), Detector(4)
    fresh = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    report = load_matching(new, old.state_dict(), old_classes, classes, rows_per_class(new, Detector(5)))
    for name in ("box", "body"):
        assert torch.equal(getattr(new, name).weight, getattr(old, name).weight)
    for before, after in ((1, 0), (3, 2)):
        assert torch.equal(new.scores.weight[after], old.scores.weight[before])
        assert torch.equal(new.boxes.bias[4 * after : 4 * after + 4], old.boxes.bias[4 * before : 4 * before + 4])
    assert torch.equal(new.softmax.weight[4], old.softmax.weight[4])  # the background row
    assert torch.equal(new.scores.weight[1], fresh["scores.weight"][1])  # emu is new
    assert sorted(report.kept) == ["body.bias", "body.weight", "box.bias", "box.weight"]
    assert len(report.by_class) == 6 and not report.fresh and not report.unused


def test_fine_tuning_reports_what_was_re_initialized_and_what_was_not_used():
    old, new = Detector(3), Detector(5)
    tensors = {**old.state_dict(), "gone": torch.zeros(1)}
    del tensors["body.weight"]
    report = load_matching(new, tensors, ["a", "b", "c"], list("vwxyz"), rows_per_class(new, Detector(6)))
    assert set(report.fresh) == {f"{n}.{k}" for n in ("scores", "boxes", "softmax") for k in ("weight", "bias")} | {
        "body.weight"
    }
    assert report.unused == ["gone"]
    assert "7 re-initialized" in str(report) and "gone" in str(report)


def test_the_first_row_of_an_objectness_tensor_survives_other_classes():
    old, new = Detector(3), Detector(5)
    name = next(iter(rows_per_class(old, Detector(4))))
    fresh = new.state_dict()[name].clone()
    load_matching(
        new, old.state_dict(), list("abc"), list("vwxyz"), rows_per_class(new, Detector(6)), objectness=(name,)
    )
    loaded, rows = new.state_dict()[name], rows_per_class(new, Detector(6))[name]
    assert torch.equal(loaded[:rows], old.state_dict()[name][:rows])
    assert torch.equal(loaded[rows : 5 * rows], fresh[rows : 5 * rows])


def test_the_rows_of_a_class_are_found_behind_each_anchor():
    """Six rows of three classes: those of two anchors, here numbered 10 * anchor + class."""
    old, new = nn.Conv2d(1, 2 * 3, 1), nn.Conv2d(1, 2 * 2, 1)
    old.bias.data = torch.tensor([0.0, 1, 2, 10, 11, 12])
    fresh = new.bias.detach().clone()
    rows = rows_per_class(new, nn.Conv2d(1, 2 * 3, 1))
    load_matching(new, old.state_dict(), list("abc"), ["x", "b"], rows, by_anchor=("bias",))
    assert torch.equal(new.bias, torch.stack([fresh[0], torch.tensor(1.0), fresh[2], torch.tensor(11.0)]))


@pytest.mark.parametrize("rows", [3, 4, 12, 13])  # one box for all classes or one anchor; then two and four anchors
def test_a_tensor_with_other_rows_per_class_is_re_initialized(rows):
    old, new = nn.Linear(1, rows), nn.Linear(1, 2 * 4)
    fresh = new.bias.detach().clone()
    counts = rows_per_class(new, nn.Linear(1, 2 * 5))
    report = load_matching(new, old.state_dict(), list("abc"), list("abcd"), counts, by_anchor=("bias",))
    assert torch.equal(new.bias, fresh) and set(report.fresh) == {"weight", "bias"}


def test_the_same_classes_load_without_any_rule():
    old, new = Detector(3), Detector(3)
    report = load_matching(new, old.state_dict(), list("abc"), list("abc"), {})
    assert len(report.kept) == len(old.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values()))
