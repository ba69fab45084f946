"""Checks of CNN detectors in two processes; started by test_cnn_distributed.py, prints a line for each that holds.

torchrun --nproc-per-node 2 cnn_two_processes.py CHECK/DETECTOR ...
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
from support import DEMO  # noqa: E402

from brs_detr.config import load_config  # noqa: E402
from brs_detr.models.build import build_model  # noqa: E402
from brs_detr.ops.images import ImageBatch  # noqa: E402

TINY = ["model.dim=32", "model.backbone.name=test_resnet.r160_in1k"]
TOWERS = ["model.head.stacked_convs=1"]
REGIONS = ["model.roi.fc_dim=32", "model.rpn.proposals=20", "model.rpn.proposals_before_nms=50"]
SAMPLED = ["model.rpn.sample=32", "model.roi.sample=16", "model.rpn.box_loss=l1", "model.roi.box_loss=l1"]
SOFTMAX = ["model.rpn.objective.loss=binary_cross_entropy", "model.roi.objective.loss=cross_entropy", *SAMPLED]
FOCAL = ["model.loss=focal"]
TWO_STAGES = ("faster_rcnn", "cascade_rcnn", "mask_rcnn")
# settings of a small one, those of its score-based losses
DETECTORS = {
    "retinanet": (TOWERS, ["model.loss=focal"]),
    "foveabox": (TOWERS, ["model.loss=focal"]),
    "atss": (TOWERS, ["model.loss=focal", "model.head.centerness=true", "model.head.objective.weights.centerness=1"]),
    "paa": (TOWERS, ["model.loss=focal", "model.head.iou_branch=true"]),
    "faster_rcnn": (REGIONS, SOFTMAX),
    "cascade_rcnn": (REGIONS, SOFTMAX),
    "mask_rcnn": ([*REGIONS, "model.mask.stacked_convs=1"], SOFTMAX),
    "yolact": (["model.head.prototypes=8"], ["model.loss=focal"]),
    "solov2": (
        [
            "model.head.stacked_convs=1",
            "model.head.conv_dim=32",
            "model.head.norm_groups=8",
            "model.head.mask_hidden=16",
            "model.head.mask_dim=16",
            "model.head.grids=[10,8,6]",
        ],
        ["model.loss=focal"],
    ),
}
OBJECTS = torch.tensor([[8.0, 8, 40, 40], [20, 10, 60, 50], [2, 30, 30, 62]])
CLASSES, SIDE = 3, 64


def build(detector, *settings):
    torch.manual_seed(0)
    own = [*TINY, *DETECTORS[detector][0], *settings]
    return build_model(load_config(DEMO, [f"model.name={detector}", *own]).model, CLASSES)


def batch(*objects):
    """An image with so many objects, boxes filled by their masks, for each number; the images of any numbers differ."""
    pixels, targets = [], []
    for count in objects:
        pixels.append(torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(count)))
        masks = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, OBJECTS[:count].int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": OBJECTS[:count], "labels": torch.arange(count), "masks": masks})
    sizes = [(SIDE, SIDE)] * len(objects)
    return ImageBatch(torch.stack(pixels).byte(), sizes, sizes), targets


def step(model, *arguments):
    """Loss terms and gradients by name; none is missing, all are finite."""
    model.zero_grad(set_to_none=True)
    terms = model(*arguments)
    assert all(term.isfinite() for term in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    return {name: term.detach() for name, term in terms.items()}, gradients


def check_step(accelerator, detector):
    """Ranked over both processes, each with an image, a step is that of one process with both images."""
    losses = ["brs", "alrp"] if detector == "retinanet" else ["brs"]
    for loss in losses:
        # Batch statistics would be those of other images.
        settings = [f"model.loss={loss}", "model.backbone.norm=group"]
        for counts in ((3, 1), (0, 2)):
            expected, single = step(build(detector, *settings), *batch(*counts))
            shared = accelerator.prepare_model(build(detector, *settings, "model.scope=global"))
            # each process has the values of both, not a part of them
            terms, gradients = step(shared, *batch(counts[accelerator.process_index]))
            accelerator._models.clear()
            assert_same_step(terms, gradients, expected, single)


def shared_step(accelerator, detector, settings, *arguments):
    """Loss terms, averaged over both processes, and gradients of a step of both."""
    shared = accelerator.prepare_model(build(detector, *settings))
    terms, gradients = step(shared, *arguments)
    accelerator._models.clear()
    return {name: accelerator.reduce(value.clone(), "mean") for name, value in terms.items()}, gradients


def assert_same_step(terms, gradients, expected, single):
    """Assert that two steps have the same loss terms and gradients."""
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=f"{name}: {value}")
    for name, gradient in gradients.items():
        difference = (gradient - single[name]).norm()
        assert difference <= 1e-4 * single[name].norm() + 1e-6, (name, difference)


def check_score(accelerator, detector):
    """By a score-based loss, divided by the mean number of positives, the step is that of one process with both images.

    Nothing is sampled, since each process draws anchors and regions of its own. PAA counts at least a positive per
    image, as published, but over the images of a process: where one has no objects its step is another.
    """
    own_settings = FOCAL if detector in TWO_STAGES else DETECTORS[detector][1]  # focal in both stages samples nothing
    settings = [*own_settings, "model.backbone.norm=group"]
    for counts in ((3, 1), (0, 2)) if detector != "paa" else ((3, 1),):
        expected = step(build(detector, *settings), *batch(*counts))
        own = batch(counts[accelerator.process_index])
        assert_same_step(*shared_step(accelerator, detector, settings, *own), *expected)


def check_rows(accelerator, detector):
    """By a loss over the number of rows, which each process counts for itself, the step is the mean of two.

    So is Faster R-CNN trained in the released code. It is not the step of one process with both images, where an image
    with fewer valid anchors or regions has less weight.
    """
    unsampled = [s for s in SOFTMAX if ".sample=" not in s]
    settings = [*unsampled, "model.backbone.norm=group"]
    alone = [step(build(detector, *settings), *batch(count)) for count in (3, 1)]
    expected, single = ({n: (a + b) / 2 for (n, a), b in zip(x.items(), y.values())} for x, y in zip(*alone))
    own = batch((3, 1)[accelerator.process_index])
    assert_same_step(*shared_step(accelerator, detector, settings, *own), expected, single)


def check_empty(accelerator, detector):
    """Processes whose images hold nothing, one or both, step too: no hang, no parameter without a gradient.

    DDP would refuse the second step if a parameter had no part in the first.
    """
    for settings in (["model.scope=global"], DETECTORS[detector][1]):
        model = accelerator.prepare_model(build(detector, *settings))
        for full in ({0}, set(), {1}):
            _, gradients = step(model, *batch(2 if accelerator.process_index in full else 0))
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).sum()
            torch.testing.assert_close(accelerator.reduce(norm.clone(), "mean"), norm)
        accelerator._models.clear()


def main():
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    checks = {"step": check_step, "score": check_score, "rows": check_rows, "empty": check_empty}
    for name in sys.argv[1:]:
        check, detector = name.split("/")
        checks[check](accelerator, detector)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            print(f"holds: {name}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
