"""No fast loss waits for the device: traced without data, where reading a value is an error."""

import pytest
import torch
from losses_reference import detector_like, gradient_of
from torch._subclasses.fake_tensor import FakeTensorMode

from brs_detr.losses import (
    PredictionSet,
    RankingObjective,
    ScoreObjective,
    alrp_loss,
    average_precision_loss,
    ndcg_loss,
    rank_sort_loss,
)

LOSSES = {
    "rank_sort": lambda logits, where, quality, **how: sum(rank_sort_loss(logits, where, quality, **how)),
    "average_precision": lambda logits, where, quality, **how: average_precision_loss(logits, where, **how),
    "interpolated": lambda logits, where, quality, **how: average_precision_loss(
        logits, where, interpolate=True, **how
    ),
    "alrp": lambda logits, where, quality, **how: sum(alrp_loss(logits, where, quality, **how)),
    "ndcg": lambda logits, where, quality, **how: ndcg_loss(logits, where, **how),
}


def on_gpu(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """A tensor without data that says it lies on a GPU."""
    return torch.empty(*shape, dtype=dtype, device="cuda")


needs_pretended_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() and torch.__version__ < (2, 11),
    reason="torch before 2.11 aborts when it traces CUDA tensors on a machine without a GPU",
)


@needs_pretended_gpus
@pytest.mark.parametrize("delta", [0, 0.5])
@pytest.mark.parametrize("positives", [20, 1000])
@pytest.mark.parametrize("method", ["bucketed", "exact"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_read_nothing_from_the_gpu(name, method, positives, delta):
    with FakeTensorMode():
        where, valid = on_gpu(positives, dtype=torch.int64), on_gpu(9000, dtype=torch.bool)
        loss = LOSSES[name](
            on_gpu(9000).requires_grad_(), where, on_gpu(positives), valid=valid, delta=delta, method=method
        )
        assert loss.device.type == "cuda" and loss.requires_grad


@needs_pretended_gpus
@pytest.mark.parametrize("positives", [20, 5000])
@pytest.mark.parametrize("method", ["bucketed", "exact"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_several_rankings_read_nothing_from_the_gpu(name, method, positives):
    with FakeTensorMode():
        where, valid = on_gpu(6, positives, dtype=torch.int64), on_gpu(6, 9000, dtype=torch.bool)
        loss = LOSSES[name](on_gpu(6, 9000).requires_grad_(), where, on_gpu(6, positives), valid=valid, method=method)
        assert loss.device.type == "cuda" and loss.shape == (6,) and loss.requires_grad


def objectives():
    weights = {"cls": 1.0, "l1": 5.0, "giou": 2.0}
    yield from (RankingObjective(name, score_weighted=True) for name in ("brs", "rs", "bap", "ap", "ndcg"))
    for name in ("focal", "cross_entropy", "binary_cross_entropy", "quality_focal"):
        yield ScoreObjective(name, weights)
        yield ScoreObjective(name, weights, normalizer="rows")


@needs_pretended_gpus
@pytest.mark.parametrize("objective", objectives(), ids=lambda o: getattr(o, "loss", None) or o.classification)
def test_objectives_read_nothing_from_the_gpu_when_rows_are_given(objective):
    with FakeTensorMode():
        boxes = {"l1": on_gpu(20).requires_grad_(), "giou": on_gpu(20).requires_grad_()}
        terms = objective(
            PredictionSet(
                on_gpu(900, 11).requires_grad_(),
                on_gpu(900, dtype=torch.int64),
                quality=on_gpu(20),
                box_losses=boxes,
                valid=on_gpu(900, dtype=torch.bool),
                rows=on_gpu(20, dtype=torch.int64),
            )
        )
        assert all(term.device.type == "cuda" and term.requires_grad for term in terms.values())


@needs_pretended_gpus
@pytest.mark.parametrize("objective", objectives(), ids=lambda o: getattr(o, "loss", None) or o.classification)
def test_objectives_of_several_sets_read_nothing_from_the_gpu(objective):
    with FakeTensorMode():
        boxes = {"l1": on_gpu(6, 20).requires_grad_(), "giou": on_gpu(6, 20).requires_grad_()}
        terms = objective(
            PredictionSet(
                on_gpu(6, 900, 11).requires_grad_(),
                on_gpu(6, 900, dtype=torch.int64),
                quality=on_gpu(6, 20),
                box_losses=boxes,
                rows=on_gpu(6, 20, dtype=torch.int64),
            )
        )
        assert all(term.device.type == "cuda" and term.shape == (6,) for term in terms.values())


@pytest.mark.parametrize("method", ["bucketed", "exact"])
def test_compiles_to_one_graph_with_its_gradient(method):
    logits, where, quality = detector_like(20, 300, torch.float32)

    def total(logits, where, quality):
        terms = rank_sort_loss(logits, where, quality, method=method)
        return terms.ranking + 2 * terms.sorting

    compiled = torch.compile(total, fullgraph=True, backend="eager")(logits, where, quality)
    eager = total(logits, where, quality)
    assert torch.allclose(compiled, eager)
    assert torch.allclose(gradient_of(compiled, logits), gradient_of(eager, logits), atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["bucketed", "exact"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_synchronization_on_a_real_gpu(name, method):
    logits, where, quality = detector_like(1000, 9000, torch.float32)
    reference = LOSSES[name](logits, where, quality, method=method)
    device = logits.detach().cuda().requires_grad_()
    where, quality = where.cuda(), quality.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = LOSSES[name](device, where, quality, method=method)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(loss.cpu(), reference, atol=1e-6)
    assert torch.allclose(device.grad.cpu(), gradient_of(reference, logits), atol=1e-7)
