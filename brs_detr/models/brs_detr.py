"""BRS-DETR: Co-DETR trained with the Bucketed Rank & Sort loss on every prediction set.

Backbone -> channel mapper -> deformable encoder -> two-stage proposals -> deformable decoder. In training an RPN, a RoI
head and an ATSS head read the encoder's maps too; their positives become extra decoder queries. Every head is handed an
objective, so the same module with focal objectives, samplers and centerness is Co-DETR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from brs_detr.assign.assignment import HeadAssignment
from brs_detr.assign.hungarian import HungarianMatcher
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.losses.distributed import SharedCount
from brs_detr.losses.objective import PredictionSet
from brs_detr.models.config import BRSDETRConfig
from brs_detr.models.detector import Detector, to_stored_images, without_overlaps
from brs_detr.models.heads.atss import ATSSHead
from brs_detr.models.heads.dense import Objective
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.neck import ChannelMapper
from brs_detr.models.transformer.collaborative import AuxQueryEmbedding, aux_samples, select_queries
from brs_detr.models.transformer.decoder import Predictions, QueryDecoder, best_pairs
from brs_detr.models.transformer.encoder import DeformableEncoder, Memory
from brs_detr.models.transformer.two_stage import BoxEmbedding, Proposals, TwoStageHead
from brs_detr.ops.anchors import cell_features
from brs_detr.ops.images import ImageBatch, Size
from brs_detr.ops.targets import PackedTargets, pixel_scales

MAX_ROI_SAMPLES = 2000  # regions of an image among which auxiliary queries are chosen


def detections_from(
    predictions: Predictions, original_sizes: Sequence[Size], max_detections: int
) -> list[dict[str, Tensor]]:
    """Convert the `max_detections` best (query, class) pairs of each image to pixels, without NMS.

    Args:
        predictions: logits (B, Q, K), boxes (B, Q, 4) cxcywh in [0, 1].
        original_sizes: (h, w) of the stored images.
        max_detections: pairs to keep an image.

    Returns:
        One dict an image: boxes (n, 4) xyxy pixels of the stored image, scores (n,), labels (n,), best first.
    """
    boxes, scores, labels = best_pairs(predictions, max_detections)
    detections = []
    for row, (h, w) in enumerate(original_sizes):
        pixels = boxes[row] * boxes.new_tensor([w, h, w, h])
        detections.append({"boxes": pixels, "scores": scores[row], "labels": labels[row]})
    return detections


class BRSDETR(Detector):
    """The detector, assembled from its parts (see `build.py`).

    Args:
        config: see `BRSDETRConfig`; `build.py` makes the parts from it.
        num_classes: K.
        backbone, neck, encoder, proposals, decoder: the path to the detections.
        rpn, roi, atss: the auxiliary dense heads on the encoder's maps.
        objective: of the decoder layers, encoder proposals and auxiliary query sets.
        matcher: assigns predictions of the decoder and of the encoder proposals to objects.
    """

    heads = ("decoder", "roi", "atss")
    overlapping = ("decoder",)
    objectness = ("proposals.classifier.weight", "proposals.classifier.bias")
    by_anchor = ("atss.score.weight", "atss.score.bias")

    def __init__(
        self,
        config: BRSDETRConfig,
        num_classes: int,
        *,
        backbone: nn.Module,
        neck: ChannelMapper,
        encoder: DeformableEncoder,
        proposals: TwoStageHead,
        decoder: QueryDecoder,
        rpn: RPNHead,
        roi: RoIHead,
        atss: ATSSHead,
        objective: Objective,
        matcher: HungarianMatcher,
    ) -> None:
        super().__init__(num_classes)
        dim = config.dim
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.proposals, self.decoder = proposals, decoder
        self.query_content = nn.Embedding(config.queries, dim)
        self.box_embedding = BoxEmbedding(dim)
        self.coarsest = nn.Sequential(nn.Conv2d(dim, dim, 3, 2, 1), nn.GroupNorm(config.norm_groups, dim))
        self.rpn, self.roi, self.atss = rpn, roi, atss
        self.aux_embeddings = nn.ModuleDict({"roi": AuxQueryEmbedding(dim), "atss": AuxQueryEmbedding(dim)})
        self.objective, self.matcher = objective, matcher
        self.max_aux_queries = config.max_aux_queries
        self.detections_per_image = config.detections_per_image
        self.query_boxes = config.query_boxes
        self.strides = rpn.strides[:-1]
        # The released code ranks all K columns of the class-agnostic encoder proposals, of which K - 1 only ever serve
        # as negatives; "first" ranks column 0 alone.
        self.rank_all_encoder_columns = config.encoder_ranking == "all"
        # Two-stage branches start as copies of the decoder's (section "initialization" of the released code).
        self.proposals.classifier.load_state_dict(decoder.classifiers[0].state_dict())
        self.proposals.regressor.load_state_dict(decoder.regressors[0].state_dict())

    def encode(self, x: Tensor, padding: Tensor) -> Memory:
        """Encode normalized (B, 3, H, W) images with their (B, H, W) padding."""
        return self.encoder(self.neck(self.backbone(x)), padding)

    def pyramid(self, memory: Memory) -> list[Tensor]:
        """Return what the dense heads see: the encoder's maps and a coarser one."""
        maps = memory.maps()
        return [*maps, self.coarsest(maps[-1])]

    def references(self, proposals: Proposals, regions: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        """Return the boxes (B, Q, 4) cxcywh in [0, 1] that the decoder's queries begin with.

        Args:
            proposals: of the encoder.
            regions: (n, 4) xyxy pixels of each image, best first: the RPN's proposals.
            sizes: (h, w) of the images.
        """
        padded = pad_sequence(list(regions), batch_first=True)
        inside = box_convert(padded, "xyxy", "cxcywh") / pixel_scales(sizes, padded.device)[:, None]
        lengths = torch.tensor([len(own) for own in regions], device=padded.device)
        valid = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return self.proposals.with_regions(inside, valid, proposals.references)

    def decode(self, memory: Memory, references: Tensor) -> Predictions:
        """Run the decoder from (B, Q, 4) references; returns the predictions of every layer."""
        position, _ = self.box_embedding(references)
        count = references.shape[1]
        content = self.query_content.weight[:count].expand(references.shape[0], -1, -1)
        return self.decoder(content, position, references, memory)

    def detect(self, memory: Memory, images: ImageBatch, head: str | None = None) -> list[dict[str, Tensor]]:
        """Return the detections of the decoder's last layer, or of the dense head that is named."""
        head = head or self.predict_with
        if head == "decoder":
            proposals = self.proposals(memory)
            references = proposals.references
            if self.query_boxes == "rpn":
                regions = self.rpn.proposals(self.rpn(self.pyramid(memory)), images.sizes)
                references = self.references(proposals, regions, images.sizes)
            layers = self.decode(memory, references)
            last = Predictions(layers.logits[-1], layers.boxes[-1])
            detections = detections_from(last, images.original_sizes, self.detections_per_image)
            return without_overlaps(detections, images.original_sizes, self.nms)
        maps = self.pyramid(memory)
        if head == "roi":
            detections = self.roi.predict(maps[:4], self.rpn.proposals(self.rpn(maps), images.sizes), images.sizes)
        else:
            detections = self.atss.predict(self.atss(maps), images.sizes)
        return to_stored_images(detections, images)

    def losses(self, memory: Memory, sizes: Sequence[Size], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Compute all loss terms of a step, weighted; their sum is the training loss (Eq. 17 of the BRS paper)."""
        packed = PackedTargets.pack(targets, sizes)
        proposals = self.proposals(memory)
        maps = self.pyramid(memory)
        anchors = self.rpn(maps)
        regions = self.rpn.proposals(anchors, sizes)
        from_rpn = self.query_boxes == "rpn"
        references = self.references(proposals, regions, sizes) if from_rpn else proposals.references
        layers = self.decode(memory, references)
        heads = {
            "rpn": self.rpn.losses(anchors, sizes, targets),
            "roi": self.roi.losses(maps[:4], regions, sizes, targets),
            "atss": self.atss.losses(self.atss(maps), sizes, targets),
        }
        losses = {f"{name}.{term}": value for name, head in heads.items() for term, value in head.terms.items()}

        class_agnostic = torch.zeros_like(packed.labels)
        sets = [(proposals.predictions.logits, proposals.predictions.boxes, class_agnostic)]
        sets += [(logits, boxes, packed.labels) for logits, boxes in zip(layers.logits, layers.boxes)]
        names = ["encoder", *(f"decoder.{i}" for i in range(len(layers.logits)))]
        matches = self.matcher([(logits.detach(), boxes.detach(), labels) for logits, boxes, labels in sets], packed)
        for name, (logits, boxes, labels), (rows, objects) in zip(names, sets, matches, strict=True):
            if name in names[:2]:  # every decoder layer matches as many objects as the first
                count = SharedCount(len(rows))
            if name == "encoder" and not self.rank_all_encoder_columns:
                logits = logits[..., :1]
            matched = packed.boxes[objects], packed.scales[objects]
            losses |= self.set_losses(name, Predictions(logits, boxes), rows, labels[objects], *matched, count)
        losses |= self.aux_losses(memory, maps, heads["roi"].assignment, heads["atss"].assignment, sizes)
        return losses

    def aux_losses(
        self, memory: Memory, maps: list[Tensor], roi: HeadAssignment, atss: HeadAssignment, sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """Compute the terms of the auxiliary query sets at every decoder layer.

        They attend to the encoder's maps like the main queries, each head's set in a pass of its own. What the RoI head
        saw are its pooled features, what the ATSS head saw are the cells of `maps`.
        """
        losses: dict[str, Tensor] = {}
        assert roi.features is not None  # `RoIHead.losses` returns them
        samples = [
            aux_samples(roi, roi.features, MAX_ROI_SAMPLES),
            aux_samples(atss, cell_features(maps, sizes, self.atss.strides)),
        ]
        chosen = select_queries(samples, sizes, self.num_classes, max_queries=self.max_aux_queries)
        for head, queries in zip(("roi", "atss"), chosen, strict=True):
            position, content = self.aux_embeddings[head](queries.boxes, queries.features)
            layers = self.decoder(content, position, queries.boxes, memory)
            count = SharedCount(len(queries.rows))
            for i, predictions in enumerate(zip(layers.logits, layers.boxes)):
                sampled = queries.rows, queries.labels, queries.targets, queries.scales, count
                losses |= self.set_losses(f"aux_{head}.{i}", Predictions(*predictions), *sampled)
        return losses

    def set_losses(
        self,
        name: str,
        predictions: Predictions,
        rows: Tensor,
        labels: Tensor,
        targets: Tensor,
        scales: Tensor,
        count: SharedCount | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms of one prediction set.

        Args:
            name: prefix of the terms.
            predictions: logits (B, Q, K), boxes (B, Q, 4) cxcywh.
            rows: (P,) positives among the B * Q rows.
            labels: (P,). targets: (P, 4) cxcywh. scales: (P, 4) pixels.
            count: P, shared with other sets of as many positives.

        Returns:
            `name.term` -> scalar. Quality and GIoU are those of the boxes in pixels.
        """
        logits = rearrange(predictions.logits, "b q k -> (b q) k")
        boxes = rearrange(predictions.boxes, "b q box -> (b q) box")[rows]
        all_labels = torch.full((len(logits),), logits.shape[1], dtype=torch.int64, device=logits.device)
        all_labels = all_labels.index_copy(0, rows, labels)
        pixels, target_pixels = (box_convert(b * scales, "cxcywh", "xyxy") for b in (boxes, targets))
        terms = self.objective(
            PredictionSet(
                logits,
                all_labels,
                quality=paired_iou(pixels.detach(), target_pixels),
                box_losses={
                    "l1": (boxes - targets).abs().sum(-1),
                    "giou": paired_giou_loss(pixels, target_pixels),
                },
                rows=rows,
                normalizer=count,
            )
        )
        return {f"{name}.{term}": value for term, value in terms.items()}
