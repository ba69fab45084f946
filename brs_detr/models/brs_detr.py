"""BRS-DETR: Co-DETR trained with the Bucketed Rank & Sort loss on every prediction set.

Backbone -> channel mapper -> deformable encoder -> two-stage proposals -> deformable decoder. In training an RPN, a RoI
head and an ATSS head read the encoder's maps too; their positives become extra decoder queries. Every head is handed an
objective, so the same module with focal objectives, samplers and centerness is Co-DETR; without auxiliary heads it is a
two-stage Deformable DETR; with denoising queries and a decoder that makes positions and norms it is Co-DINO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import box_convert

from brs_detr.assign.hungarian import HungarianMatcher, PredictedSet
from brs_detr.losses.boxes import paired_giou_loss, paired_iou
from brs_detr.losses.distributed import SharedCount
from brs_detr.losses.objective import PredictionSet, RankingObjective
from brs_detr.models.config import BRSDETRConfig, DETRConfig, NoNMS
from brs_detr.models.denoising import Denoising, DenoisingQueries
from brs_detr.models.detector import Detector, to_stored_images, without_overlaps
from brs_detr.models.heads.atss import ATSSHead
from brs_detr.models.heads.dense import Objective
from brs_detr.models.heads.roi import RoIHead
from brs_detr.models.heads.rpn import RPNHead
from brs_detr.models.heads.step import DenseStep, RegionStep, read_counts
from brs_detr.models.neck import ChannelMapper
from brs_detr.models.transformer.collaborative import (
    AuxBoxEmbedding,
    AuxQueries,
    AuxQueryEmbedding,
    aux_samples,
    select_queries,
)
from brs_detr.models.transformer.decoder import Predictions, QueryDecoder, QuerySet, best_pairs
from brs_detr.models.transformer.encoder import DeformableEncoder, Memory
from brs_detr.models.transformer.two_stage import BoxEmbedding, Proposals, TwoStageHead
from brs_detr.ops.boxes import Regions
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
        config: see `DETRConfig`; `build.py` makes the parts from it.
        num_classes: K.
        strides: pixels per cell of the encoder's maps.
        backbone, neck, encoder, proposals, decoder: the path to the detections.
        rpn, roi, atss: the auxiliary dense heads on the encoder's maps; None: there is no such head.
        objective: of the decoder layers, encoder proposals and auxiliary query sets.
        matcher: assigns predictions of the decoder and of the encoder proposals to objects.
        denoising, denoising_objective: the denoising queries and their objective; None: there are no such queries.
    """

    heads = ("decoder", "roi", "atss")
    overlapping = ("decoder",)
    by_anchor = ("atss.score.weight", "atss.score.bias")

    def __init__(
        self,
        config: DETRConfig,
        num_classes: int,
        *,
        strides: Sequence[int],
        backbone: nn.Module,
        neck: ChannelMapper,
        encoder: DeformableEncoder,
        proposals: TwoStageHead,
        decoder: QueryDecoder,
        rpn: RPNHead | None,
        roi: RoIHead | None,
        atss: ATSSHead | None,
        objective: Objective,
        matcher: HungarianMatcher,
        denoising: Denoising | None = None,
        denoising_objective: Objective | None = None,
    ) -> None:
        super().__init__(num_classes)
        dim = config.dim
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.proposals, self.decoder = proposals, decoder
        self.query_content = nn.Embedding(config.queries, dim)
        self.box_embedding = BoxEmbedding(dim) if decoder.position is None else None
        dense = any(head is not None for head in (rpn, roi, atss))
        self.coarsest = (
            nn.Sequential(nn.Conv2d(dim, dim, 3, 2, 1), nn.GroupNorm(config.norm_groups, dim)) if dense else None
        )
        self.rpn, self.roi, self.atss = rpn, roi, atss
        named = {"roi": roi, "atss": atss}
        embedding = AuxQueryEmbedding if decoder.position is None else AuxBoxEmbedding
        self.aux_embeddings = nn.ModuleDict({name: embedding(dim) for name, head in named.items() if head})
        self.denoising, self.denoising_objective = denoising, denoising_objective
        self.heads = ("decoder", *self.aux_embeddings)
        self.objective, self.matcher = objective, matcher
        self.max_aux_queries = config.max_aux_queries
        self.detections_per_image, self.candidates = config.detections_per_image, config.candidates
        self.query_boxes = config.query_boxes
        self.strides = tuple(strides)
        # The released code ranks all K columns of the class-agnostic encoder proposals, of which K - 1 only ever serve
        # as negatives; "first" ranks column 0 alone.
        self.rank_all_encoder_columns = not isinstance(config, BRSDETRConfig) or config.encoder_ranking == "all"
        classifier = ("proposals.classifier.weight", "proposals.classifier.bias")
        self.objectness = classifier if proposals.class_agnostic else ()
        # Two-stage branches start as copies of the decoder's (section "initialization" of the released code).
        self.proposals.classifier.load_state_dict(decoder.classifiers[0].state_dict())
        self.proposals.regressor.load_state_dict(decoder.regressors[0].state_dict())

    @property
    def num_candidates(self) -> int:
        """Number of (query, class) pairs of an image that become detections, or enter their suppression."""
        return self.detections_per_image if isinstance(self.nms, NoNMS) else self.candidates

    def encode(self, x: Tensor, padding: Tensor) -> Memory:
        """Encode normalized (B, 3, H, W) images with their (B, H, W) padding."""
        return self.encoder(self.neck(self.backbone(x)), padding)

    def pyramid(self, memory: Memory) -> list[Tensor]:
        """Return what the dense heads see: the encoder's maps and a coarser one."""
        maps = memory.maps()
        return maps if self.coarsest is None else [*maps, self.coarsest(maps[-1])]

    def regions(self, maps: list[Tensor], sizes: Sequence[Size]) -> Regions:
        """Return the RPN's proposals, of which this detector has one."""
        assert self.rpn is not None
        return self.rpn.regions(self.rpn(maps), sizes)

    def references(self, proposals: Proposals, regions: Regions, sizes: Sequence[Size]) -> Tensor:
        """Return the boxes (B, Q, 4) cxcywh in [0, 1] that the decoder's queries begin with.

        Args:
            proposals: of the encoder.
            regions: of each image, best first: the RPN's proposals.
            sizes: (h, w) of the images.
        """
        inside = box_convert(regions.boxes, "xyxy", "cxcywh") / pixel_scales(sizes, regions.boxes.device)[:, None]
        return self.proposals.with_regions(inside, regions.valid, proposals.references)

    def queries(self, references: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return content and position (B, Q, dim) of the queries that begin at references (B, Q, 4).

        The position is None where the decoder makes it in each layer.
        """
        content = self.query_content.weight[: references.shape[1]].expand(references.shape[0], -1, -1)
        return content, None if self.box_embedding is None else self.box_embedding(references)[0]

    def decode(self, memory: Memory, references: Tensor) -> Predictions:
        """Run the decoder from (B, Q, 4) references; returns the predictions of every layer."""
        return self.decoder(*self.queries(references), references, memory)

    def decode_together(
        self,
        memory: Memory,
        references: Tensor,
        noised: DenoisingQueries | None,
        aux_queries: Mapping[str, AuxQueries],
    ) -> dict[str, Predictions]:
        """Run the decoder once for the main queries, the denoising queries and those of each auxiliary head.

        Returns:
            by "decoder", "denoising" and "aux_" with the head's name, as `decode`.
        """
        inputs = {"decoder": (*self.queries(references), references)}
        if noised is not None:
            inputs["denoising"] = noised.content, None, noised.boxes
        for head, own in aux_queries.items():
            position, content = self.aux_embeddings[head](own.boxes, own.features)
            inputs[f"aux_{head}"] = content, position, own.boxes
        contents, positions, boxes = zip(*inputs.values(), strict=True)
        sets = [QuerySet(own.shape[1]) for own in boxes]
        if noised is not None:
            sets[1] = QuerySet(sets[1].queries, noised.visible)
        position = None if self.box_embedding is None else torch.cat(positions, dim=1)
        found = self.decoder(torch.cat(contents, dim=1), position, torch.cat(boxes, dim=1), memory, sets)
        return dict(zip(inputs, found.split([one.queries for one in sets]), strict=True))

    def detect(self, memory: Memory, images: ImageBatch, head: str | None = None) -> list[dict[str, Tensor]]:
        """Return the detections of the decoder's last layer, or of the dense head that is named."""
        head = head or self.predict_with
        if head == "decoder":
            proposals = self.proposals(memory)
            references = proposals.references
            if self.query_boxes == "rpn":
                regions = self.regions(self.pyramid(memory), images.sizes)
                references = self.references(proposals, regions, images.sizes)
            layers = self.decode(memory, references)
            last = Predictions(layers.logits[-1], layers.boxes[-1])
            detections = detections_from(last, images.original_sizes, self.num_candidates)
            return without_overlaps(detections, images.original_sizes, self.nms, self.detections_per_image)
        maps = self.pyramid(memory)
        if head == "roi":
            assert self.roi is not None
            detections = self.roi.predict(
                maps[: len(self.strides)], self.regions(maps, images.sizes).per_image(), images.sizes
            )
        else:
            assert self.atss is not None
            detections = self.atss.predict(self.atss(maps), images.sizes)
        return to_stored_images(detections, images)

    def losses(self, memory: Memory, sizes: Sequence[Size], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Compute all loss terms of a step, weighted; their sum is the training loss (Eq. 17 of the BRS paper).

        The dense heads come first, since their positives are queries, too, but their losses last, so that they are
        computed while the matching is solved on the host.
        """
        packed = PackedTargets.pack(targets, sizes)
        proposals, maps = self.proposals(memory), self.pyramid(memory)
        dense, regions = self.dense_steps(maps, sizes, targets)
        aux_queries = self.select(dense, maps, sizes)
        references = proposals.references
        if self.query_boxes == "rpn":
            references = self.references(proposals, regions, sizes)
        noised = None if self.denoising is None else self.denoising(packed, references.shape[1])
        decoded = self.decode_together(memory, references, noised, aux_queries)

        matched_sets = self.matched_sets(proposals.predictions, decoded["decoder"], packed)
        matching = self.matcher.begin([one.detach() for one in matched_sets.values()], packed)
        losses = {f"{name}.{term}": value for name, head in dense.items() for term, value in head.losses().items()}
        unmatched = {} if noised is None else self.denoising_losses(decoded["denoising"], noised)
        for head, aux in aux_queries.items():
            name = f"aux_{head}"
            unmatched |= self.set_losses(name, decoded[name], aux.rows, aux.labels, aux.targets, aux.scales)
        for (name, one), (rows, objects) in zip(matched_sets.items(), matching.solve(), strict=True):
            logits = one.logits
            if name == "encoder" and not self.rank_all_encoder_columns:
                logits = logits[..., :1]
            matched = one.labels[objects], packed.boxes[objects], packed.scales[objects]
            losses |= self.set_losses(name, Predictions(logits, one.boxes), rows, *matched)
        return losses | unmatched

    def matched_sets(self, tokens: Predictions, layers: Predictions, targets: PackedTargets) -> dict[str, PredictedSet]:
        """Return what is matched with the objects: the tokens, to one class if they are class-agnostic, and queries."""
        labels = torch.zeros_like(targets.labels) if self.proposals.class_agnostic else targets.labels
        return {"encoder": PredictedSet(*tokens, labels), "decoder": PredictedSet(*layers, targets.labels)}

    def dense_steps(
        self, maps: list[Tensor], sizes: Sequence[Size], targets: Sequence[dict[str, Any]]
    ) -> tuple[dict[str, DenseStep | RegionStep], Regions]:
        """Let the dense heads look at the maps and learn what is whose; also return the RPN's proposals, if any."""
        heads: dict[str, DenseStep | RegionStep] = {}
        if self.rpn is None:
            nothing = maps[0].new_zeros(len(sizes), 0, 4)
            regions = Regions(nothing, nothing.new_zeros(nothing.shape[:2], dtype=torch.bool))
        else:
            anchors = self.rpn(maps)
            regions = self.rpn.regions(anchors, sizes)
            heads["rpn"] = DenseStep(self.rpn, anchors, sizes, targets)
        if self.roi is not None:
            heads["roi"] = RegionStep(self.roi, maps[: len(self.strides)], regions.never_empty(sizes), sizes, targets)
        if self.atss is not None:
            heads["atss"] = DenseStep(self.atss, self.atss(maps), sizes, targets)
        read_counts(heads.values())
        return heads, regions

    def select(
        self, heads: Mapping[str, DenseStep | RegionStep], maps: list[Tensor], sizes: Sequence[Size]
    ) -> dict[str, AuxQueries]:
        """Choose the auxiliary queries of each head.

        What the RoI head saw are its pooled features, what the ATSS head saw are the cells of `maps`. Where the decoder
        makes the positions of queries, nobody reads either, and the samples have features of width 0.
        """
        samples, counts = {}, []
        for name in self.aux_embeddings:
            learned = heads[name].assignment
            if self.box_embedding is None:  # the content of the queries is that of their boxes alone
                features = [boxes.new_zeros(len(boxes), 0) for boxes in learned.references]
            else:
                features = heads[name].features(maps)
            assert learned.counts is not None  # `read_counts` has read them
            samples[name] = aux_samples(learned, features, MAX_ROI_SAMPLES if name == "roi" else None)
            counts.append([min(count, len(own)) for count, own in zip(learned.counts, samples[name].labels)])
        limit = self.max_aux_queries
        chosen = select_queries(list(samples.values()), counts, sizes, self.num_classes, max_queries=limit)
        return dict(zip(samples, chosen, strict=True))

    def denoising_losses(self, predictions: Predictions, noised: DenoisingQueries) -> dict[str, Tensor]:
        """Compute the terms of the denoising queries in each layer.

        They are sets of their own: knowing the objects, they would stand above all matched queries in a common ranking.
        """
        assert self.denoising is not None
        matched = noised.rows, noised.labels, noised.targets, noised.scales
        ranked = isinstance(self.denoising_objective, RankingObjective)
        ignored = self.denoising.ignored(noised, self.num_classes) if ranked else None
        return self.set_losses(
            "denoising",
            predictions,
            *matched,
            objective=self.denoising_objective,
            valid=noised.valid,
            ignored=ignored,
        )

    def set_losses(
        self,
        name: str,
        predictions: Predictions,
        rows: Tensor,
        labels: Tensor,
        targets: Tensor,
        scales: Tensor,
        *,
        objective: Objective | None = None,
        valid: Tensor | None = None,
        ignored: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms of one prediction set, or of each of its L layers.

        Args:
            name: prefix of the terms.
            predictions: logits (B, Q, K), boxes (B, Q, 4) cxcywh; or (L, B, Q, K), (L, B, Q, 4).
            rows: (P,) positives among the B * Q rows; with layers also (L, P), and so with all that follow.
            labels: (P,). targets: (P, 4) cxcywh. scales: (P, 4) pixels.
            objective: of the set; None: that of the decoder.
            valid: (B * Q,) bool, False for queries that are ignored. ignored: (B * Q, K) bool, logits that a ranking
                leaves out. Both without layers.

        Returns:
            `name.term` -> scalar, with layers `name.layer.term`. Quality and GIoU are those of the boxes in pixels.
        """
        logits = rearrange(predictions.logits, "... b q k -> ... (b q) k")
        layers = logits.shape[:-2]
        rows, labels = rows.expand(*layers, -1), labels.expand(*layers, -1)
        boxes = rearrange(predictions.boxes, "... b q box -> ... (b q) box")
        boxes = boxes.gather(-2, rows[..., None].expand(*rows.shape, 4))
        all_labels = torch.full(logits.shape[:-1], logits.shape[-1], dtype=torch.int64, device=logits.device)
        all_labels = all_labels.scatter(-1, rows, labels)
        pixels, target_pixels = (box_convert(b * scales, "cxcywh", "xyxy") for b in (boxes, targets))
        pairs = pixels.flatten(0, -2), target_pixels.expand_as(pixels).flatten(0, -2)
        found = PredictionSet(
            logits,
            all_labels,
            quality=paired_iou(pairs[0].detach(), pairs[1]).view(rows.shape),
            box_losses={"l1": (boxes - targets).abs().sum(-1), "giou": paired_giou_loss(*pairs).view(rows.shape)},
            rows=rows,
            normalizer=SharedCount(rows.shape[-1]),  # one for all layers
            valid=None if valid is None else valid.expand(*layers, -1),
            ignored=None if ignored is None else ignored.expand_as(logits),
        )
        terms = (objective or self.objective)(found)
        if not layers:
            return {f"{name}.{term}": value for term, value in terms.items()}
        by_layer = zip(*(value.unbind() for value in terms.values()), strict=True)
        return {f"{name}.{i}.{term}": value for i, own in enumerate(by_layer) for term, value in zip(terms, own)}
