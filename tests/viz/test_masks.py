"""Objects are tinted where their masks are, and nowhere else."""

import numpy as np
import torch
from PIL import Image

from brs_detr.viz.boxes import color, draw_detections, tint, write_contact_sheet


def test_a_tint_stays_inside_its_mask_and_has_an_outline():
    image = Image.new("RGB", (40, 30), (100, 100, 100))
    masks = torch.zeros(2, 30, 40, dtype=torch.uint8)
    masks[0, 5:15, 10:30] = 1
    drawn = np.asarray(tint(image, masks, [(255, 0, 0), (0, 0, 255)]))
    assert (drawn[masks[0].numpy() == 0] == 100).all()
    assert drawn[5, 10].tolist() == [255, 0, 0] and drawn[10, 20].tolist() == [170, 55, 55]
    assert np.asarray(image).max() == 100


def test_masks_are_resized_with_the_image_and_follow_the_score():
    masks = torch.zeros(2, 30, 40, dtype=torch.bool)
    masks[0, :, :20], masks[1, :, 20:] = True, True
    boxes = torch.tensor([[0.0, 0, 20, 30], [20, 0, 40, 30]])
    found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.2]), "labels": torch.tensor([0, 1]), "masks": masks}
    drawn = draw_detections(
        Image.new("RGB", (40, 30)), found, None, ["a", "b"], threshold=0.5, min_side=400, legend=False
    )
    pixels = np.asarray(drawn)
    assert pixels[200, 100].tolist() == [round(0.45 * c) for c in color(0)] and pixels[150, 300].max() == 0


def test_contact_sheets_show_masks(tmp_path):
    masks = torch.ones(1, 30, 40, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[0.0, 0, 40, 30]]), "labels": torch.tensor([1]), "masks": masks}
    image = torch.zeros(3, 30, 40, dtype=torch.uint8)
    for name, sample in (("with", target), ("without", {k: v for k, v in target.items() if k != "masks"})):
        write_contact_sheet([(image, sample)], ["a", "b"], tmp_path / f"{name}.png")
    with_masks, without = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("with", "without"))
    assert with_masks.mean() > without.mean() + 10
