"""Detectors of other libraries with a recipe's backbone, data and augmentation, for equal CPU seconds.

    python benchmarks/other_libraries.py demo=datasets/demo --seconds 380
    python benchmarks/other_libraries.py bccd=BCCD --seconds 290 --variant half
    python benchmarks/other_libraries.py demo=datasets/demo --seconds 380 --set model.rpn.proposals=60
    python benchmarks/other_libraries.py mine=FOLDER --recipe brs_detr_small_cpu --seconds 500 --out runs/study.json

torchvision's Faster R-CNN and RetinaNet on a feature pyramid over the same strides and, where transformers is
installed, its two-stage Deformable DETR, all of the recipe's widths. The networks, their losses, samplers and
post-processing are the libraries' own; proposals and detections an image are as many as the recipe's. Trained with the
recipe's optimizer, a cosine schedule over the CPU seconds and averaged weights, and evaluated as in `accuracy.py`, to
whose json the results are added (detector `torchvision_faster_rcnn`, loss `score`). The seconds are those of the steps
and their data, while those of `accuracy.py` hold the start of the process and its validation, too. `--variant` names
the runs of `accuracy.py` whose seconds these are, `--set` changes the recipe.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections import OrderedDict
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import FIGURES, RECIPES, RESULTS, ROOT, add_data_arguments, commit, folders_of, keep, require_word, stored
from cnn_overfit import machine

from brs_detr.config import Config, load_config
from brs_detr.data.build import open_train_set, open_val_set
from brs_detr.data.loader import EpochBatches, build_eval_loader, build_train_loader
from brs_detr.engine.optim import build_optimizer, set_learning_rate
from brs_detr.engine.predict import predict
from brs_detr.evaluation.ground_truth import GroundTruth
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.detector import PIXEL_MEAN, PIXEL_STD, to_stored_images
from brs_detr.ops.images import ImageBatch
from brs_detr.run.anchors import choose_anchors
from brs_detr.run.scoring import score_detections

WIDTH = 64  # of the pyramid, as `model.dim` in the small recipes; torchvision's 256 would be several times slower
ROI_SIDE = 7
WARMUP = 0.06  # share of the time in which the learning rate rises, about that of the small recipes


class Pyramid(nn.Module):
    """A backbone of ours with torchvision's feature pyramid."""

    out_channels = WIDTH

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = build_backbone(config.model.backbone)
        self.fpn = FeaturePyramidNetwork(self.backbone.channels, WIDTH)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Compute the maps by name, finest first."""
        maps = self.backbone(x)
        return self.fpn(OrderedDict((str(level), one) for level, one in enumerate(maps)))


class TorchvisionDetector(nn.Module):
    """A torchvision detector that takes and returns what the detectors of this project do."""

    def __init__(self, name: str, config: Config, num_classes: int) -> None:
        super().__init__()
        self.background = int(name == "faster_rcnn")  # its class 0
        pyramid = Pyramid(config)
        options: dict[str, Any] = {
            "image_mean": [value / 255 for value in PIXEL_MEAN],
            "image_std": [value / 255 for value in PIXEL_STD],
        }
        # Anchors as in the recipe's RPN, with two sizes an octave for its three.
        sides = [config.model.rpn.anchor_scale * stride for stride in pyramid.backbone.strides]
        most, rpn = config.model.detections_per_image, config.model.rpn
        if name == "faster_rcnn":
            anchors = AnchorGenerator(tuple((side, side * 2**0.5) for side in sides), ((0.5, 1.0, 2.0),) * len(sides))
            names, width = [str(level) for level in range(len(sides))], config.model.roi.fc_dim
            self.detector: nn.Module = FasterRCNN(
                pyramid,
                rpn_anchor_generator=anchors,
                box_head=TwoMLPHead(WIDTH * ROI_SIDE**2, width),
                box_predictor=FastRCNNPredictor(width, num_classes + 1),
                box_roi_pool=MultiScaleRoIAlign(names, output_size=ROI_SIDE, sampling_ratio=2),
                rpn_pre_nms_top_n_train=rpn.proposals_before_nms,  # per level in both
                rpn_post_nms_top_n_train=rpn.proposals,
                rpn_pre_nms_top_n_test=rpn.test_proposals_before_nms,
                rpn_post_nms_top_n_test=rpn.test_proposals,
                box_score_thresh=0.0,
                box_detections_per_img=most,
                **options,
            )
        else:
            sizes = tuple((side, side * 2 ** (1 / 3), side * 2 ** (2 / 3)) for side in sides)
            self.detector = RetinaNet(
                pyramid,
                num_classes,
                anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sides)),
                score_thresh=0.0,
                detections_per_img=most,
                **options,
            )

        # The images come resized. The library's own `_skip_resize` holds for training alone.
        self.detector.transform.resize = lambda image, target=None: (image, target)

    def forward(self, images: ImageBatch, targets: list[dict[str, Any]] | None = None) -> Any:
        """Compute the loss terms in training mode, else the detections in the frame of the stored images."""
        inputs = [pixels[:, :h, :w].float() / 255 for pixels, (h, w) in zip(images.pixels, images.sizes, strict=True)]
        if self.training:
            assert targets is not None
            return self.detector(
                inputs,
                [{"boxes": one["boxes"].float(), "labels": one["labels"] + self.background} for one in targets],
            )
        found = self.detector(inputs)
        return to_stored_images([{**one, "labels": one["labels"] - self.background} for one in found], images)


class TransformersDetector(nn.Module):
    """transformers' two-stage Deformable DETR with box refinement, in the sizes of a recipe.

    Its own backbone has frozen norms, which random weights cannot start from, so it gets the one of the recipe.
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

        model = config.model
        indices = tuple(round(math.log2(stride)) - 1 for stride in model.backbone.levels)  # of timm's ResNets
        self.detector = DeformableDetrForObjectDetection(
            DeformableDetrConfig(
                backbone_config=TimmBackboneConfig(backbone=model.backbone.name, out_indices=indices),
                num_labels=num_classes,
                num_queries=model.queries,
                two_stage_num_proposals=model.queries,
                d_model=model.dim,
                encoder_layers=model.encoder_layers,
                decoder_layers=model.decoder_layers,
                encoder_ffn_dim=model.ffn_dim,
                decoder_ffn_dim=model.ffn_dim,
                encoder_attention_heads=model.heads,
                decoder_attention_heads=model.heads,
                num_feature_levels=model.levels,
                dropout=0.0,
                two_stage=True,
                with_box_refine=True,
                auxiliary_loss=True,
            )
        )
        self.detector.model.backbone.model = build_backbone(model.backbone)
        self.detections_per_image = model.detections_per_image

    def forward(self, images: ImageBatch, targets: list[dict[str, Any]] | None = None) -> Any:
        """Compute the loss in training mode, else the detections in the frame of the stored images."""
        mean, std = (images.pixels.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
        inside = ~images.padding_mask()
        pixels = (images.pixels.float() - mean) / std * inside[:, None]
        if not self.training:
            return self.detections(self.detector(pixels, pixel_mask=inside), images)
        assert targets is not None
        labels = [
            {
                "class_labels": one["labels"],
                "boxes": box_convert(one["boxes"].float(), "xyxy", "cxcywh") / pixels.new_tensor([w, h, w, h]),
            }
            for one, (h, w) in zip(targets, images.sizes, strict=True)
        ]
        return {"loss": self.detector(pixels, pixel_mask=inside, labels=labels).loss}

    def detections(self, outputs: Any, images: ImageBatch) -> list[dict[str, Tensor]]:
        """Convert the best pairs of query and class to boxes, as the library's image processor does."""
        most = min(self.detections_per_image, outputs.logits[0].numel())
        scores, index = outputs.logits.sigmoid().flatten(1).topk(most)
        classes = outputs.logits.shape[-1]
        found = []
        for row, (h, w) in enumerate(images.original_sizes):
            boxes = box_convert(outputs.pred_boxes[row, index[row] // classes], "cxcywh", "xyxy")
            found.append(
                {
                    "boxes": boxes * boxes.new_tensor([w, h, w, h]),
                    "scores": scores[row],
                    "labels": index[row] % classes,
                }
            )
        return found


def build_detector(name: str, config: Config, num_classes: int) -> nn.Module:
    """Build the detector of a name of the command line."""
    if name == "transformers_deformable_detr":
        return TransformersDetector(config, num_classes)
    return TorchvisionDetector(name.removeprefix("torchvision_"), config, num_classes)


def train_and_score(name: str, config: Config, seconds: float) -> dict[str, Any]:
    """Train for some CPU seconds of this process, then evaluate on the val split."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(config.seed)
    train_set, val_set = open_train_set(config.data, config.seed), open_val_set(config.data)
    config, _ = choose_anchors(config, None, accelerator, lambda _: train_set)
    model = build_detector(name, config, train_set.num_classes)
    optimizer = build_optimizer(config.optim, model)
    loader = build_train_loader(train_set, config.train.total_batch_size, seed=config.seed)
    average = ModelEmaV3(model, decay=config.train.ema_decay, use_warmup=True)  # as `train.py` does
    started, steps = time.process_time(), 0
    for images, targets in chain.from_iterable(map(EpochBatches(loader).epoch, count())):
        share = (time.process_time() - started) / seconds
        if share >= 1:
            break
        set_learning_rate(optimizer, min(1.0, share / WARMUP + 0.01) * 0.5 * (1 + math.cos(math.pi * share)))
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
        optimizer.step()
        steps += 1
        average.update(model, step=steps)
    evaluation = build_eval_loader(val_set, config.eval.batch_size, workers=0)
    detections = predict(average.module, evaluation, accelerator, max_detections=config.eval.max_detections)
    truth = GroundTruth.from_dataset(val_set.ground_truth(), val_set.masks)
    summary, _ = score_detections(detections, train_set.category_ids, truth, config, accelerator)
    assert summary is not None
    figures = {key: summary.stats[key] for key in FIGURES if key in summary.stats}
    return {
        "heads": {"detector": figures},
        "cpu_seconds": round(seconds),
        "steps": steps,
        "machine": machine(),
        "commit": commit(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--seconds", type=float, required=True, help="CPU seconds of a training")
    names = ["torchvision_faster_rcnn", "torchvision_retinanet"]
    names += ["transformers_deformable_detr"] * (importlib.util.find_spec("transformers") is not None)
    parser.add_argument("--detectors", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variant", default="recipe", help="name under which the results are kept")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="changes of the recipe")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the json of accuracy.py")
    return parser.parse_args()


def variant_of(variant: str, settings: list[str]) -> str:
    """Name of a case's variant: that of the command line, and the changes of the recipe behind a comma."""
    changes = (text.partition("=") for text in settings)
    return require_word(",".join([variant, *(name.rpartition(".")[2] + value for name, _, value in changes)]))


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    folders = folders_of(args)
    for seed in args.seeds:
        for dataset, folder in folders.items():
            for name in args.detectors:
                case = f"{dataset} {name} score {variant_of(args.variant, args.set)} {seed}"
                if (known := stored(args.out).get(case)) is not None:
                    if known["cpu_seconds"] != round(args.seconds):
                        raise SystemExit(
                            f"other_libraries.py: the result of `{case}` is of {known['cpu_seconds']} seconds, not "
                            f"{args.seconds:g}. Give the variant another name."
                        )
                    if known["settings"] != args.set:
                        raise SystemExit(
                            f"other_libraries.py: the result of `{case}` has the settings {known['settings']}, not "
                            f"{args.set}. Give the variant another name."
                        )
                    continue
                settings = [f"data.root={folder}", f"seed={seed}", "data.workers=0", *args.set]
                config = load_config(ROOT / "configs" / RECIPES[dataset]["brs_detr"], settings)
                result = train_and_score(name, config, args.seconds)
                keep(args.out, {case: result | {"settings": args.set}})
                print(f"{case}: {result['heads']}, {result['steps']} steps", flush=True)


if __name__ == "__main__":
    main()
