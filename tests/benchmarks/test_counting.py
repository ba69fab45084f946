"""benchmarks/counting.py: exact counts of functions small enough to count by hand."""

import inspect
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from brs_detr.assign.assignment import BatchAssignment
from brs_detr.losses.cells import MIN_GRID_QUERIES, locate


@pytest.fixture(scope="module")
def counting(benchmark_module):
    return benchmark_module("counting")


@pytest.fixture
def count(counting):
    """Run a function of (4, 6) numbers on the imagined GPU; return the counter."""

    def run(function, x=None):
        x = torch.arange(24.0).view(4, 6) if x is None else x
        with counting.StepCounter() as counter:
            x = x.to("cuda", non_blocking=True)
            function(x)
        return counter

    return run


def waits(counter):
    return sorted(wait.operation for wait in counter.waits.elements())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(6, 4).t()[1:, None].expand(3, 2, 6),
        lambda x: [part.flatten() for part in x.split(2)],
        lambda x: torch.empty_like(x).detach().to(torch.float32),
        lambda x: x.contiguous().reshape(2, 12).unbind(),
        lambda x: x.to("cuda").cuda(),
        lambda x: (x.shape, x.device, len(x), x.new_empty(3)),
        lambda x: torch.arange(3) + 1,  # of the host
        lambda x: torch.tensor([1.0, 2.0]).sum().item(),
        lambda x: torch.empty(4, 6, pin_memory=True).copy_(x, non_blocking=True),
        lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True),
    ],
)
def test_views_allocations_and_what_the_host_computes_start_nothing(count, function):
    counter = count(function)
    assert (counter.total, waits(counter), counter.copies.total()) == (0, [], 0)


@pytest.mark.parametrize(
    "number, function",
    [
        (3, lambda x: (x * 2 + 1).relu()),
        (1, lambda x: x.t().contiguous()),
        (1, lambda x: x.t().reshape(24)),
        (2, lambda x: x.add_(1).mul_(2)),
        (1, lambda x: x.to(torch.float64)),
        (2, lambda x: torch.arange(4, device=x.device) + 1),
        (1, lambda x: torch.zeros(4, device="cuda")),
        (1, lambda x: x.new_zeros(4)),
        (1, lambda x: x @ x.t()),
        (1, lambda x: x[None] @ x.t()[None]),  # of three dimensions: a product and views
        (2, lambda x: torch.where(x > 0, x, x)),
        (1, lambda x: x.fill_(2.0)),
        (1, lambda x: torch._foreach_add([x, x, x], 1.0)),
        (2, lambda x: x.masked_fill(x > 3, 0.0)),
        (2, lambda x: x.sort(dim=1)[0].cumsum(1)),
    ],
)
def test_an_operation_counts_once(count, number, function):
    counter = count(function)
    assert (counter.forward.total(), counter.backward.total()) == (number, 0), counter.operators
    assert not counter.waits and not counter.copies


@pytest.mark.parametrize(
    "operation, function",
    [
        ("tolist", lambda x: x.tolist()),
        ("_local_scalar_dense", lambda x: x[0, 0].item()),
        ("_local_scalar_dense", lambda x: bool((x > 3).any())),
        ("_local_scalar_dense", lambda x: int(x.sum())),
        ("copy to the host", lambda x: x.cpu().numpy()),
        ("copy to the host", lambda x: x.to("cpu").tolist()),
        ("nonzero", lambda x: (x > 3).nonzero()),
        ("nonzero", lambda x: torch.where(x > 3)),
        ("boolean index", lambda x: x[x > 3]),
        ("masked_select", lambda x: x.masked_select(x > 3)),
        ("bincount", lambda x: torch.bincount(x.long().flatten(), minlength=30)),
        ("_unique2", lambda x: torch.unique(x)),
        ("repeat_interleave", lambda x: x[0].repeat_interleave(x[0].long())),
        ("equal", lambda x: torch.equal(x, x + 1)),
        ("copy to the host", lambda x: torch.empty(4, 6).copy_(x)),
        ("event", lambda x: torch.cuda.Event().synchronize()),
        ("nms", lambda x: torchvision.ops.nms(x[:, :4], x[:, 0], 0.5)),
    ],
)
def test_what_the_host_has_to_know_is_waited_for(count, operation, function):
    counter = count(function)
    assert waits(counter) == [operation] and not counter.copies


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[0].repeat_interleave(x[0].long(), output_size=15),
        lambda x: x.__setitem__(x > 3, 0.0),  # a masked fill
        lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
        lambda x: x.topk(2).indices,
        lambda x: x.to("cpu", non_blocking=True),
    ],
)
def test_what_stays_on_the_device_is_not_waited_for(count, function):
    assert waits(count(function)) == []


@pytest.mark.parametrize(
    "number, function",
    [
        (1, lambda x: torch.tensor([1, 2], device=x.device)),
        (1, lambda x: torch.as_tensor([1, 2], device="cuda")),
        (1, lambda x: x.new_tensor([1.0, 2.0])),
        (1, lambda x: torch.ones(2).to(x.device)),
        (1, lambda x: torch.ones(2).to(x)),
        (1, lambda x: torch.ones(2).cuda()),
        (1, lambda x: x[torch.tensor([0, 1])]),  # an index of the host
        (1, lambda x: x.copy_(torch.zeros(4, 6))),
        (0, lambda x: torch.ones(2).to(x.device, non_blocking=True)),
        (0, lambda x: x.copy_(torch.zeros(4, 6), non_blocking=True)),
        (0, lambda x: torch.full((2,), 3.0, device=x.device)),
    ],
)
def test_copies_to_the_device_are_waited_for_unless_they_are_queued(count, number, function):
    counter = count(function)
    assert counter.copies.total() == number and not counter.waits


def test_the_backward_pass_belongs_to_the_section_that_it_differentiates(counting):
    current = ["first"]
    counter = counting.StepCounter(sections=lambda frame: current[0])
    with counter:
        x = torch.ones(4, device="cuda").requires_grad_()
        y = x.exp()
        current[0] = "second"
        loss = y.sin().sum()
        current[0] = "third"
        loss.backward()
    assert counter.forward == {"first": 2, "second": 2}
    # sum: an expanded view; sin: the cosine and a product; exp: a product. The gradients begin with a tensor of ones.
    assert counter.backward == {"second": 2, "first": 1, "gradients": 1}
    assert counter.operators["second", "aten.cos.default"] == 1


def test_sections_are_recognized_by_files_that_exist(benchmark_module):
    sections = benchmark_module("sections")
    assert [name for name in sections.SECTIONS if not Path(sections.PACKAGE, name).exists()] == []


def test_places_are_lines_of_the_package(count):
    lines, first = inspect.getsourcelines(BatchAssignment.positives)
    line = first + next(i for i, text in enumerate(lines) if "nonzero()" in text)

    def read(x):
        labels = torch.zeros(2, dtype=torch.int64, device=x.device)
        BatchAssignment(labels, x, labels).positives()

    counter = count(read)
    (wait,) = counter.waits
    assert str(wait) == f"brs_detr/assign/assignment.py:{line} (nonzero)"
    assert dict(counter.forward) == {"other": 1, "assignment": 2}


def test_the_code_takes_the_branches_of_a_gpu(count):
    # On a CPU a grid is searched, in a dozen operations one of which is read.
    points, many = torch.linspace(0, 1, 50)[None], torch.rand(1, 2 * MIN_GRID_QUERIES)
    results = []
    counter = count(lambda x: results.append(locate(points.to(x.device, non_blocking=True), x)), many)
    assert [name for _, name in counter.operators] == ["aten.searchsorted.Tensor"] and not counter.waits
    assert torch.equal(results[0].as_subclass(torch.Tensor), locate(points, many))


def test_a_step_on_the_imagined_gpu_computes_the_same(counting):
    def train(model, x):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)
            optimizer.step()
        return [p.detach().as_subclass(torch.Tensor) for p in model.parameters()]

    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    images = torch.rand(5, 3, 6, 6)
    expected = train(make(), images)
    model = counting.on_device(make())
    assert all(isinstance(p, nn.Parameter) and p.device.type == "cuda" for p in model.parameters())
    with counting.StepCounter() as counter:
        found = train(model, images.to("cuda", non_blocking=True))
    torch.testing.assert_close(found, expected)
    assert not counter.waits and not counter.copies
    # as on a GPU, all parameters are clipped and stepped by a few operations on lists
    assert counter.operators["optimizer", "aten._foreach_addcdiv_.ScalarList"] == 2
    assert not any("linalg_vector_norm" in name and number > 2 for (_, name), number in counter.operators.items())


def test_peak_memory_is_that_of_living_tensors(counting):
    with counting.PeakMemory() as memory:
        x = torch.zeros(1000)
        for _ in range(3):
            y = x + 1
            del y
    assert memory.peak == 8000 and memory.live == 4000
