"""The file of torch.export: the detector without this package."""

import json
import subprocess
import sys

import pytest
import torch

from brs_detr.export.parity import compare
from brs_detr.export.suppression import keep_best
from brs_detr.export.torch_file import TorchFile, inner_outputs, keep_best_by_torchvision, write_torch
from brs_detr.ops.images import ImageBatch

ALONE = """
import json, sys, torch, torchvision
extra = {"metadata.json": "", "description.txt": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
for sizes in ([(136, 131)], [(136, 131), (70, 131), (136, 99)]):
    pixels = torch.full((len(sizes), 3, 136, 131), 77, dtype=torch.uint8)
    boxes, scores, labels = program(pixels, torch.tensor(sizes))[:3]
    assert boxes.shape[:2] == scores.shape == labels.shape and len(boxes) == len(sizes) and not boxes.requires_grad
assert not any(name.startswith("brs_detr") for name in sys.modules)
print(json.loads(extra["metadata.json"]), extra["description.txt"].splitlines()[0])
"""


def batch(*sizes):
    return ImageBatch.from_list([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes])


@pytest.mark.parametrize("iou", [0.2, 0.6])
def test_one_suppression_for_all_images_and_groups_keeps_what_one_of_each_keeps(iou):
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(3, 60, 2, generator=generator) * 100 - 20  # some lie left of the image
    boxes = torch.cat([corners, corners + 5 + torch.rand(3, 60, 2, generator=generator) * 30], dim=2)
    scores = torch.rand(3, 4, 60, generator=generator)
    scores[scores < 0.3] = -1.0  # takes no part
    expected = keep_best(boxes, scores, iou)
    assert torch.equal(keep_best_by_torchvision(boxes, scores, iou), expected)
    assert 0 < expected.sum() < (scores >= 0).sum()
    assert not keep_best_by_torchvision(boxes, torch.full_like(scores, -1.0), iou).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "atss detector"])
def test_a_file_is_the_detector_for_any_size_and_is_loaded_without_this_package(detector, build_cnn, tmp_path, name):
    model = build_cnn("atss") if name == "atss detector" else detector
    path = tmp_path / "model.pt2"
    write_torch(model, path, (150, 210), any_size=True, metadata={"classes": ["a", "b", "c"]})
    exported = TorchFile(path, inner_outputs(model, None))
    # a batch has at least two cells of the coarsest map, of stride 64, a side: torch.export guards it
    for sizes in [(150, 210)], [(136, 131), (70, 131)]:
        found = compare(model, exported, batch(*sizes))
        assert found.boxes < 0.02 and found.scores < 5e-4, (sizes, found)
    alone = subprocess.run([sys.executable, "-c", ALONE, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.strip() == f"{json.loads(json.dumps({'classes': ['a', 'b', 'c']}))} Object detector."
