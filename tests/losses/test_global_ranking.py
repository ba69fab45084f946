"""One ranking over all processes: values and gradients as of one process that holds everything."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from losses_reference import gradient_of

from brs_detr.losses import (
    PredictionSet,
    RankingObjective,
    alrp_loss,
    average_precision_loss,
    ndcg_loss,
    rank_sort_loss,
)

CLASSES = 5


def shards(world: int):
    """Per process: logits, labels, box losses, qualities, mask; the last process holds no positives."""
    generator = torch.Generator().manual_seed(world)
    parts = []
    for k in range(world):
        rows = 40 + 30 * k
        logits = torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)
        labels = torch.full((rows,), CLASSES)
        if k < world - 1:
            labels[: 5 + 2 * k] = torch.randint(CLASSES, (5 + 2 * k,), generator=generator)
        count = int((labels < CLASSES).sum())
        valid = torch.rand(rows, generator=generator) < 0.8
        valid[:count] = True
        boxes = torch.rand(count, generator=generator, dtype=torch.float64)
        quality = torch.rand(count, generator=generator, dtype=torch.float64)
        parts.append((logits, labels, boxes, quality, valid))
    return parts


def losses(part, scope: str):
    """Values and gradients of every loss by both methods, with the scope given."""
    logits, labels, boxes, quality, valid = part
    logits = logits.clone().requires_grad_()
    boxes = boxes.clone().requires_grad_()
    rows = (labels < CLASSES).nonzero()[:, 0]
    where = rows * CLASSES + labels[rows]
    mask = valid[:, None].expand_as(logits)
    results = []
    for method in ("exact", "bucketed"):
        for delta in (0.0, 0.5):
            how = {"valid": mask, "delta": delta, "method": method, "scope": scope}
            terms = [
                *rank_sort_loss(logits, where, quality, **how),
                average_precision_loss(logits, where, interpolate=True, **how),
                *alrp_loss(logits, where, boxes, **how),
                ndcg_loss(logits, where, **how),
            ]
            for k, term in enumerate(terms):
                leaf = boxes if k == 4 else logits
                results.append((term.detach(), gradient_of(term, leaf)))
    return results


def objectives(part, scope: str):
    """Value and gradients of every objective; also with fixed box weights, where some logits are left out."""
    logits, labels, boxes, quality, valid = part
    own = torch.nn.functional.one_hot(labels, CLASSES + 1)[:, :CLASSES].bool()
    results = []
    for fixed in (False, True):
        options = {"box_weights": {"giou": 2.0}} if fixed else {}
        ignored = (logits > 0.7) & ~own if fixed else None
        for name in ("rs", "brs", "bap", "alrp"):
            leaves = [logits.float().requires_grad_(), boxes.float().requires_grad_()]
            objective = RankingObjective(name, score_weighted=True, scope=scope, **options)
            found = PredictionSet(
                leaves[0], labels, quality=quality, box_losses={"giou": leaves[1]}, valid=valid, ignored=ignored
            )
            terms = objective(found)
            sum(terms.values()).backward()
            results.append((torch.stack(list(terms.values())).detach(), leaves[0].grad, leaves[1].grad))
    return results


def layers(part, scope: str):
    """Values and gradients of every loss of three rankings in one call, and the number of exchanges."""
    logits, labels, boxes, quality, valid = part
    rows = (labels < CLASSES).nonzero()[:, 0]
    where = (rows * CLASSES + labels[rows]).expand(3, -1)
    scale = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    mask = valid[:, None].expand_as(logits).expand(3, -1, -1)
    results, exchanges = [], []
    for method in ("exact", "bucketed"):
        for loss in (
            rank_sort_loss,
            alrp_loss,
            lambda logits, where, quality, **how: [ndcg_loss(logits, where, **how)],
        ):
            leaf = (logits * scale[:, None, None]).requires_grad_()
            with Exchanges() as counted:
                terms = loss(
                    leaf, where, torch.stack([quality, boxes, quality]), valid=mask, method=method, scope=scope
                )
            results.append((torch.stack([*terms]).detach(), gradient_of(terms[0].sum() + terms[-1].sum(), leaf)))
            with Exchanges() as single:
                loss(leaf[0], where[0], quality, valid=mask[0], method=method, scope=scope)
            exchanges.append((counted.count, single.count))
    return results, exchanges


class Exchanges:
    """Counts the exchanges between processes while it is entered."""

    def __enter__(self):
        self.count, self.given = 0, (dist.all_reduce, dist.all_gather)
        dist.all_reduce, dist.all_gather = map(self.counting, self.given)
        return self

    def counting(self, function):
        def call(*args):
            self.count += 1
            return function(*args)

        return call

    def __exit__(self, *error):
        dist.all_reduce, dist.all_gather = self.given


def work(rank: int, world: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    part = shards(world)[rank]
    torch.save((losses(part, "global"), objectives(part, "global"), layers(part, "global")), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_equals_one_process_with_everything(world, tmp_path):
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    parts = shards(world)
    joined = tuple(torch.cat([part[k] for part in parts]) for k in range(5))
    spread = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]

    for k, (value, gradient) in enumerate(losses(joined, "process")):
        assert all(torch.allclose(results[k][0], value, atol=1e-12) for results, _, _ in spread)
        together = torch.cat([results[k][1] for results, _, _ in spread])
        assert torch.allclose(together, gradient, atol=1e-12)

    for k, (values, of_logits, of_boxes) in enumerate(objectives(joined, "process")):
        assert all(torch.allclose(results[k][0], values, atol=1e-5) for _, results, _ in spread)
        # Data-parallel training averages over processes.
        assert torch.allclose(torch.cat([results[k][1] for _, results, _ in spread]) / world, of_logits, atol=1e-6)
        assert torch.allclose(torch.cat([results[k][2] for _, results, _ in spread]) / world, of_boxes, atol=1e-5)

    for k, (values, gradient) in enumerate(layers(joined, "process")[0]):
        assert all(torch.allclose(results[k][0], values, atol=1e-12) for _, _, (results, _) in spread)
        together = torch.cat([results[k][1] for _, _, (results, _) in spread], 1)
        assert torch.allclose(together, gradient, atol=1e-12)
    assert all(counted == single > 0 for _, _, (_, exchanges) in spread for counted, single in exchanges)


def test_without_distribution_global_means_this_process():
    part = shards(2)[0]
    for (value, gradient), (same, same_gradient) in zip(losses(part, "global"), losses(part, "process")):
        assert torch.equal(value, same) and torch.equal(gradient, same_gradient)


def test_wrong_scope_is_named():
    with pytest.raises(ValueError, match="unknown scope 'all'"):
        rank_sort_loss(torch.zeros(3), torch.tensor([0]), torch.ones(1), scope="all")
    with pytest.raises(ValueError, match="unknown scope 'all'"):
        RankingObjective(scope="all")
