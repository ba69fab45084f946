"""Compare an exported file in onnxruntime with the detector in torch.

Two programs round differently, and a detector selects twice: proposals by score, then (query, class) pairs by score.
Either of two that are equal up to rounding may come first, and a query's content depends on the rank of its proposal.
So the reference uses the file's own selection of proposals, after checking that it is a top-k up to rounding, and a
detection may equal any of torch's with its label and score.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from brs_detr.models.brs_detr import BRSDETR
from brs_detr.models.transformer.decoder import Predictions
from brs_detr.ops.anchors import take_rows
from brs_detr.ops.images import ImageBatch

MAX_BOX_DIFFERENCE = 0.1
"""Maximum difference of a box's corner, in pixels of the input, that counts as rounding."""
MAX_SCORE_DIFFERENCE = 1e-3
"""The same for a score in [0, 1]."""


class Differences(NamedTuple):
    """Largest differences between two computations: of boxes in pixels, of scores; inf without a counterpart."""

    boxes: float
    scores: float

    @property
    def small(self) -> bool:
        """Return True if both can be explained by rounding."""
        return self.boxes <= MAX_BOX_DIFFERENCE and self.scores <= MAX_SCORE_DIFFERENCE


class ExportedDetector:
    """An ONNX file of `onnx.write_onnx` in onnxruntime on the CPU, with its selected proposals as a further output.

    Args:
        path: path of the file. onnx and onnxruntime must be installed.
    """

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(path)
        # the first TopK of the graph selects the proposals, the second one the detections
        first_topk = next(node for node in model.graph.node if node.op_type == "TopK")
        model.graph.output.add().CopyFrom(
            onnx.helper.make_tensor_value_info(first_topk.output[1], onnx.TensorProto.INT64, None)
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: ImageBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run a batch of the file's size.

        Returns:
            boxes (B, n, 4), scores (B, n), labels (B, n), indices of the selected proposals (B, Q).
        """
        inputs = {"pixels": images.pixels.numpy(), "sizes": torch.tensor(images.sizes).numpy()}
        boxes, scores, labels, chosen = map(torch.from_numpy, self.session.run(None, inputs))
        return boxes, scores, labels, chosen


@torch.no_grad()
def compare(model: BRSDETR, exported: ExportedDetector, images: ImageBatch) -> Differences:
    """Compute the largest differences between an exported file and the detector it was made from.

    Args:
        model: the detector, in eval mode on the CPU.
        exported: the exported file.
        images: a batch of the file's size and dtype.
    """
    boxes, scores, labels, chosen = exported(images)
    padding = images.padding_mask()
    memory = model.encode(model.normalize(images.pixels, padding), padding)
    proposals = model.proposals(memory)
    of_tokens = proposals.predictions.logits[..., 0].masked_fill(~proposals.valid, -torch.inf).sigmoid()
    # rank by rank: small only if the file's selection has the top scores, in order
    choice = (of_tokens.gather(1, chosen) - of_tokens.gather(1, proposals.chosen)).abs().max()
    references = take_rows(proposals.predictions.boxes, chosen)
    layers = model.decode(memory, references)
    last = Predictions(layers.logits[-1], layers.boxes[-1])
    differences = largest_differences(last, images, boxes, scores, labels)
    return Differences(differences.boxes, max(differences.scores, float(choice)))


def largest_differences(
    predictions: Predictions, images: ImageBatch, boxes: Tensor, scores: Tensor, labels: Tensor
) -> Differences:
    """Compute how far detections are from the best ones of the predictions.

    Args:
        predictions: logits (B, Q, K), boxes (B, Q, 4) cxcywh in [0, 1].
        images: batch whose sizes the boxes are scaled by.
        boxes, scores, labels: (B, n, 4) xyxy pixels, (B, n) descending, (B, n).

    Returns:
        for scores, the largest difference rank by rank; for boxes, the largest distance of a detection to the nearest
        predicted box with its label and score.
    """
    all_scores = predictions.logits.sigmoid()
    best = all_scores.flatten(1).topk(scores.shape[1], dim=1).values
    extents = torch.tensor(images.sizes).flip(1).repeat(1, 2)[:, None]
    all_boxes = box_convert(predictions.boxes, "cxcywh", "xyxy").clamp(0, 1) * extents
    of_label = all_scores.gather(2, labels[:, None].expand(-1, all_scores.shape[1], -1))  # (B, Q, n)
    apart = (all_boxes[:, :, None] - boxes[:, None]).abs().amax(-1)
    apart = apart.masked_fill((of_label - scores[:, None]).abs() > MAX_SCORE_DIFFERENCE, torch.inf)
    return Differences(float(apart.amin(1).max()), float((scores - best).abs().max()))
