"""Recorded heads of the official CNN detectors, as inputs of ours: head outputs, targets, losses, gradients."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from brs_detr.models.heads.dense import DenseOutput
from brs_detr.models.heads.roi import RoIOutput

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden" / "cnn"
STRIDES = (8, 16, 32, 64, 128)
# Theirs -> ours; "bbox" has a name of its own for every box loss.
TERMS = {"loss_rank": "rank", "loss_sort": "sort", "loss_cls": "rank"}
TERMS |= {f"loss_{head}_{name}": name for head in ("rpn", "roi") for name in ("rank", "sort")}
TERMS |= {"loss_rpn_cls": "rank", "loss_mask": "mask"}
TERMS |= {"ranking_loss": "rank", "sorting_loss": "sort"}  # YOLACT


# dense heads: cls.{level}; RoI heads: cls; the stages of a cascade: s{stage}.cls, in the test test.s{stage}.cls; YOLACT
OUTPUT = re.compile(r"((test\.)?s\d\.)?(cls|reg)(\.\d)?|mask\.pred_gt_class|coeff\.\d|proto")


def our_name(name, box_term):
    """Our name of an official loss, with the stage of a cascade: "s1.loss_roi_rank" is "1.rank"."""
    stage, _, term = name.rpartition(".")
    ours = TERMS.get(term, box_term)
    return f"{stage[1:]}.{ours}" if stage else ours


@dataclass
class Recorded:
    """One file: `arrays` by name, `info` from its JSON, and the outputs as leaves that collect gradients."""

    arrays: dict
    info: dict
    leaves: dict

    @property
    def classes(self):
        return self.info.get("num_classes", 1)  # 1: objectness

    def sizes(self, key="pad_shape"):
        """(h, w) of each image; padded to multiples of 32, as the official code decides which anchors are valid."""
        return [tuple(meta[key][:2]) for meta in self.info["img_metas"]]

    def targets(self):
        return [
            {"boxes": self.arrays[f"gt_bboxes.{i}"].reshape(-1, 4), "labels": self.arrays[f"gt_labels.{i}"].long()}
            for i in range(len(self.info["img_metas"]))
        ]

    def output(self):
        """The recorded outputs as a head's, attached to the leaves."""

        def rows(name, columns):
            levels = [self.leaves[f"{name}.{level}"].permute(0, 2, 3, 1) for level in range(len(STRIDES))]
            return [x.unflatten(-1, (-1, columns)) for x in levels]

        return DenseOutput(rows("cls", self.classes), rows("reg", 4))

    def proposals(self, key="proposals"):
        """(n, 4) boxes of each image that enter a RoI head."""
        return [self.arrays[f"{key}.{image}"].reshape(-1, 4) for image in range(len(self.info["img_metas"]))]

    def rois(self, key="rois"):
        """(n, 4) boxes of each image from the recorded rows (image, box)."""
        rows = self.arrays[key]
        return [rows[rows[:, 0] == image, 1:] for image in range(len(self.info["img_metas"]))]

    def regions(self, stage=""):
        """The recorded outputs for RoIs, attached to the leaves."""
        cls, reg = self.leaves[f"{stage}cls"], self.leaves[f"{stage}reg"]
        return RoIOutput(cls, reg.unflatten(1, (-1, 4)))

    def target_labels(self, image):
        """Official class of every anchor of an image, level after level; ignored and padding anchors are -1."""
        labels, weights = [], []
        for level in range(len(STRIDES)):
            labels.append(self.arrays[f"target.labels.{level}"][image].long())
            weight = self.arrays.get(f"target.label_weights.{level}")
            weights.append(torch.ones_like(labels[-1]) if weight is None else weight[image])
        return torch.where(torch.cat(weights) > 0, torch.cat(labels), -1)

    def assert_losses(self, loss, terms, box_term="giou", tolerance=1e-5):
        """Every term, and the gradient of their sum with respect to every output, is the recorded one."""
        official = {name: sum(values) for name, values in self.info["losses"][loss].items()}
        names = {our_name(name, box_term): value for name, value in official.items()}
        assert names.keys() == terms.keys()
        for name, value in names.items():
            assert float(terms[name].detach()) == pytest.approx(value, rel=tolerance, abs=1e-7), name
        sum(terms.values()).backward()
        for name, leaf in self.leaves.items():
            if name.startswith("test."):
                continue
            expected = self.arrays[f"{loss}.grad.{name.replace('mask.', 'mask_')}"]
            error = (leaf.grad - expected).abs().sum()
            assert error <= tolerance * expected.abs().sum() + 1e-12, f"{name}: {error / expected.abs().sum():.1e}"

    def assert_no_positives(self, terms):
        """Zeros that give every output a gradient of zero."""
        assert all(float(value.detach()) == 0 for value in terms.values())
        sum(terms.values()).backward()
        learnt = [leaf for name, leaf in self.leaves.items() if not name.startswith("test.")]
        assert all((leaf.grad == 0).all() for leaf in learnt)


def load(name) -> Recorded:
    """Read a recorded file; skips the test where the folder is absent."""
    if not FOLDER.exists():
        pytest.skip("recorded CNN heads are not beside this checkout")
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    info = json.loads((FOLDER / f"{name}.json").read_text())
    leaves = {key: value.clone().requires_grad_() for key, value in arrays.items() if OUTPUT.fullmatch(key)}
    return Recorded(arrays, info, leaves)
