"""What dense heads share, by a head of nine anchors a cell and several classes, as RetinaNet's."""

import pytest
import torch
from einops import rearrange
from torch import nn

from brs_detr.assign.atss import ATSSAssigner
from brs_detr.assign.max_iou import MaxIoUAssigner
from brs_detr.losses.classification import PRIOR_BIAS
from brs_detr.losses.objective import RankingObjective, ScoreObjective
from brs_detr.models.heads.dense import DenseHead, DenseOutput
from brs_detr.ops.anchors import AnchorGrid
from brs_detr.ops.boxes import BoxCoder

CLASSES, DIM, STRIDES, SIZES = 4, 8, (8, 16), [(48, 64), (40, 56)]


class RetinaHead(DenseHead):
    """RetinaNet's head with one convolution a branch (Lin et al., "Focal Loss", section 4)."""

    def __init__(self, objective, assigner=None, **options):
        super().__init__(
            CLASSES,
            AnchorGrid(STRIDES, (4.0, 5.04, 6.35), (0.5, 1.0, 2.0)),
            objective=objective,
            assigner=assigner or MaxIoUAssigner(positive=0.5, negative=0.4, low_quality=0.0),
            coder=BoxCoder(),
            **options,
        )
        self.score = nn.Conv2d(DIM, self.anchors.per_cell * CLASSES, 3, padding=1)
        self.delta = nn.Conv2d(DIM, self.anchors.per_cell * 4, 3, padding=1)
        for layer in (self.score, self.delta):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.score.bias, PRIOR_BIAS)

    def forward(self, features):
        logits = [rearrange(self.score(x), "b (a c) y x -> b y x a c", c=CLASSES) for x in features]
        return DenseOutput(logits, [rearrange(self.delta(x), "b (a box) y x -> b y x a box", box=4) for x in features])


def feature_maps():
    return [torch.randn(2, DIM, 6, 8), torch.randn(2, DIM, 3, 4)]


def targets():
    return [
        {"boxes": torch.tensor([[4.0, 4, 36, 36], [20, 10, 60, 40]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (ScoreObjective("focal", {"cls": 1.0, "l1": 1.0}), {"box_loss": "l1"}),
        (RankingObjective("brs"), {}),
        (RankingObjective("alrp", period=None), {}),
        (RankingObjective("bap"), {"assigner": ATSSAssigner(topk=9)}),
    ],
    ids=["focal", "brs", "alrp", "atss"],
)
def test_a_head_of_nine_anchors_and_several_classes_learns_by_any_objective(objective, options):
    head, features = RetinaHead(objective, **options), feature_maps()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    names = {"l1"} if options.get("box_loss") == "l1" else {"giou"}
    for _ in range(30):
        terms, assignment = head.losses(head(features), SIZES, targets())
        assert names < terms.keys() and all(term.isfinite() for term in terms.values())
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        assert all(p.grad.isfinite().all() for p in head.parameters())
    assert sorted(set(assignment.labels[assignment.rows].tolist())) == [1, 3]
    for found, (h, w) in zip(head.eval().predict(head(features), SIZES), SIZES, strict=True):
        boxes = found["boxes"]
        assert len(boxes) == len(found["scores"]) == len(found["labels"]) == head.max_detections
        assert (boxes >= 0).all() and (boxes[:, 2] <= w).all() and (boxes[:, 3] <= h).all()
        assert (found["scores"].diff() <= 0).all() and set(found["labels"].tolist()) <= set(range(CLASSES))
    first = head.predict(head(features), SIZES)[0]
    assert set(first["labels"][:2].tolist()) <= {1, 3}  # the classes that the image shows rank first


def test_one_anchor_of_one_class_becomes_one_detection_of_its_box():
    """Anchor 5 of cell (2, 3) of the second level, class 2; every other score lies below the threshold."""
    head = RetinaHead(None, score_threshold=0.5)
    logits = [torch.full((1, h, w, 9, CLASSES), -5.0) for h, w in ((6, 8), (3, 4))]
    deltas = [torch.zeros(1, h, w, 9, 4) for h, w in ((6, 8), (3, 4))]
    logits[1][0, 2, 3, 5, 2] = 1.0
    deltas[1][0, 2, 3, 5, 0] = -0.25  # to the left by a quarter of its width
    (found,) = head.predict(DenseOutput(logits, deltas), [(500, 500)])
    x1, y1, x2, y2 = head.anchors([(6, 8), (3, 4)])[1][2, 3, 5].tolist()
    expected = torch.tensor([[x1 - (x2 - x1) / 4, y1, x2 - (x2 - x1) / 4, y2]]).clamp(0, 500)
    torch.testing.assert_close(found["boxes"], expected)
    assert found["labels"].tolist() == [2] and found["scores"].tolist() == [pytest.approx(0.7311, abs=1e-4)]


def test_anchors_between_the_thresholds_are_ignored_and_levels_are_counted_in_anchors():
    seen = []

    class Recorder(MaxIoUAssigner):
        def __call__(self, anchors, level_counts, objects):
            seen.append((len(anchors), level_counts))
            return super().__call__(anchors, level_counts, objects)

    head = RetinaHead(RankingObjective("brs"), Recorder(positive=0.5, negative=0.4))
    output = head(feature_maps())
    terms, assignment = head.losses(output, SIZES, targets())
    assert seen == [((48 + 12) * 9, [48 * 9, 12 * 9]), ((35 + 12) * 9, [35 * 9, 12 * 9])]  # 40 x 56 are 5 x 7 and 3 x 4
    ignored = assignment.valid.logical_not().nonzero()[:, 0]
    assert len(ignored) and not set(ignored.tolist()) & set(assignment.rows.tolist())
    logits = [level.detach().clone(memory_format=torch.contiguous_format) for level in output.logits]
    cell = int(ignored[ignored < 48 * 9][0])
    logits[0].view(2, -1, CLASSES)[0, cell] = 50.0
    again = head.losses(DenseOutput(logits, output.deltas), SIZES, targets()).terms
    assert all(torch.equal(terms[name], again[name]) for name in terms)
