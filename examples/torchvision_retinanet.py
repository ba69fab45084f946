"""Train torchvision's own RetinaNet with Rank & Sort: the only change is `RankSortHead.compute_loss`.

`python examples/torchvision_retinanet.py --steps 60`; images are made here, no weights are downloaded.
"""

import argparse

import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from brs_detr.losses import paired_giou_loss, paired_iou, rank_sort_loss, self_balance


class RankSortHead(RetinaNetHead):
    """RetinaNet's head with one ranking over all images, anchors and classes, and the boxes balanced against it."""

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        matched = torch.stack(matched_idxs)  # (B, A): ground truth of each anchor, -1 background, -2 ignored
        logits, codes = head_outputs["cls_logits"], head_outputs["bbox_regression"]  # (B, A, C), (B, A, 4)
        image, anchor = (matched >= 0).nonzero(as_tuple=True)
        chosen = [(target, row[row >= 0]) for target, row in zip(targets, matched)]
        labels = torch.cat([target["labels"][rows] for target, rows in chosen])
        wanted = torch.cat([target["boxes"][rows] for target, rows in chosen])
        coder = self.regression_head.box_coder
        boxes = coder.decode_single(codes[image, anchor], torch.stack(anchors)[image, anchor])

        positives = (image * logits.shape[1] + anchor) * logits.shape[2] + labels
        valid = (matched != -2)[..., None].expand_as(logits)
        ranking, sorting = rank_sort_loss(logits, positives, paired_iou(boxes, wanted), valid=valid)
        giou = paired_giou_loss(boxes, wanted).sum() / max(len(wanted), 1)
        return {"ranking": ranking, "sorting": sorting, "giou": self_balance(giou, ranking + sorting)}


def make_model(classes: int) -> RetinaNet:
    """A small RetinaNet with fresh weights."""
    extra, stages = LastLevelP6P7(256, 256), [2, 3, 4]
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, returned_layers=stages, extra_blocks=extra
    )
    model = RetinaNet(backbone.requires_grad_(), classes, min_size=128, max_size=128)
    model.head = RankSortHead(256, model.anchor_generator.num_anchors_per_location()[0], classes)
    return model


def make_image(classes: int, size: int = 128):
    """Dark noise with one to three bright rectangles; the class is the color channel."""
    image, boxes, labels = torch.rand(3, size, size) * 0.3, [], torch.randint(classes, (int(torch.randint(1, 4, ())),))
    for label in labels:
        x, y, width, height = torch.randint(25, 55, (4,)).tolist()
        image[label, y : y + height, x : x + width] += 0.6
        boxes.append([x, y, x + width, y + height])
    return image.clamp(max=1), {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": labels}


def main(steps: int, batch: int = 4, classes: int = 3) -> None:
    """Train on fresh images and print the loss terms."""
    torch.manual_seed(0)
    model = make_model(classes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for step in range(steps):
        images, targets = zip(*(make_image(classes) for _ in range(batch)))
        terms = model(list(images), list(targets))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}", *(f"{name} {term.item():.3f}" for name, term in terms.items()), sep="  ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
