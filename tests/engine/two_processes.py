"""Checks that need two processes; started by test_distributed.py through torchrun, prints a line for each that holds.

torchrun --nproc-per-node 2 two_processes.py FOLDER CHECK ...
"""

import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard

from brs_detr.config import Config, ConfigError, apply_overrides, load_config
from brs_detr.engine.distributed import average_unsharded_gradients, clip_gradients, full_tensor, gradient_norm
from brs_detr.engine.logging import read_metrics
from brs_detr.engine.predict import predict
from brs_detr.engine.state import agreed_state, read_facts
from brs_detr.engine.storage import NonFiniteError, StorageError
from brs_detr.exit_codes import ExitCode, Interruption
from brs_detr.losses.distributed import without_other_processes
from brs_detr.models.build import build_model
from brs_detr.models.denoising import Noise, draw_noise
from brs_detr.ops.images import ImageBatch
from brs_detr.run.output_dir import require_shared_folder

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
from support import DEMO, SMALL_DETECTOR, module_from  # noqa: E402

toy = module_from(HERE.with_name("toy_run.py"))
TINY = [*SMALL_DETECTOR, "model.decoder_layers=2"]


class Quadratic(nn.Module):
    """Without randomness and with a loss that is a mean over images."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images, targets):
        truth = torch.stack([target["boxes"].mean(0) for target in targets])
        return {"decoder.0.l1": (self.linear(images.pixels.float().mean((2, 3)) / 255) - truth).square().mean()}


def gradient_of(model, batches):
    model.zero_grad()
    for images, targets in batches:
        (sum(model(images, targets).values()) / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check_gradient(accelerator):
    """DDP's gradient is that of all images at once."""
    torch.manual_seed(0)
    single = Quadratic()
    everything = [next(iter(toy.ToyBatches(1, rank=rank, world=2).epoch(0))) for rank in (0, 1)]
    expected = gradient_of(single, everything)
    torch.manual_seed(0)
    shared = accelerator.prepare_model(Quadratic())
    torch.testing.assert_close(gradient_of(shared, [everything[accelerator.process_index]]), expected)


def check_gathering(accelerator):
    """Each image once, in order, in both processes, though one process has more and one image comes twice."""
    ids = [[5, 1, 9], [2, 9]][accelerator.process_index]

    class Echo(nn.Module):
        def forward(self, images, targets):
            return [
                {
                    "boxes": p.float().mean((1, 2))[[0, 1, 2, 0]][None],
                    "scores": torch.ones(1),
                    "labels": torch.zeros(1).long(),
                }
                for p in images.pixels
            ]

    batches = [
        (ImageBatch(torch.full((1, 3, 4, 4), i, dtype=torch.uint8), [(4, 4)], [(4, 4)]), [{"image_id": i}]) for i in ids
    ]
    found = predict(Echo(), batches, accelerator)
    assert [f["image_id"] for f in found] == [1, 2, 5, 9]
    assert all(np.all(f["boxes"] == f["image_id"]) for f in found)


SCORE_BASED = ["model.name=co_detr"]
WITHOUT_HEADS = (["model.aux_heads=[atss]", "model.query_boxes=encoder"], ["model.aux_heads=[]"])
DENOISING = (
    ["model.name=co_dino"],
    ["model.name=brs_dino"],
    ["model.name=brs_dino", "model.denoising.loss=rank"],
    ["model.name=brs_dino", "model.denoising.loss=rank", "model.loss=alrp"],
)
GLOBAL_DENOISING = ([*DENOISING[2], "model.scope=global"], DENOISING[0])
VARIANTS = ([], ["model.scope=global"], SCORE_BASED, *WITHOUT_HEADS, *GLOBAL_DENOISING)


def check_empty_images(accelerator):
    """Processes whose images hold nothing, all but one or all, step too: no hang, no parameter without a gradient.

    DDP would refuse the second step if a parameter had no part in the first.
    """
    config = load_config(DEMO)
    for settings in VARIANTS:
        torch.manual_seed(0)
        detector = build_model(apply_overrides(config, [*TINY, *settings]).model, 3)
        model = accelerator.prepare_model(detector)
        for full in ({0}, set(), {accelerator.num_processes - 1}, set()):
            step_on_full(accelerator, model, accelerator.process_index in full)
        accelerator._models.clear()


def step_on_full(accelerator, model, full):
    """A backward pass on an image with two objects, or with none."""
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 10, 60, 50]]) if full else torch.zeros(0, 4)
    targets = [{"boxes": boxes, "labels": torch.arange(len(boxes)), "image_id": 0}]
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), [(64, 64)], [(64, 64)])
    model.zero_grad()
    terms = model(images, targets)
    assert all(torch.isfinite(term) for term in terms.values()), terms
    sum(terms.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).sum()
    assert torch.isfinite(norm)
    torch.testing.assert_close(accelerator.reduce(norm.clone(), "mean"), norm)


OBJECTS = torch.tensor([[8.0, 8, 40, 40], [20, 10, 60, 50], [2, 30, 30, 62]])
# Dense heads sample as many regions as a batch has positives, and a batch's objects decide how many groups there are.
SAME = ["model.backbone.norm=group", "model.aux_heads=[]", "model.query_boxes=encoder", "model.denoising.queries=1"]


def denoising_step(config, counts, images, accelerator=None):
    """Terms and gradients of a step on some of two images that have `counts` objects; alone without an accelerator.

    Each object gets the same noise whatever the images.
    """
    torch.manual_seed(0)
    model = build_model(config, 3)
    noise = draw_noise(2 * sum(counts), 3, torch.Generator().manual_seed(2))
    own = torch.cat([torch.full((count,), image in images) for image, count in enumerate(counts)])
    noise = Noise(*(part.unflatten(0, (2, -1))[:, own].flatten(0, 1) for part in noise))
    model.denoising.draw = lambda *_: noise
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1)).byte()
    targets = [{"boxes": OBJECTS[: counts[i]], "labels": torch.arange(counts[i])} for i in images]
    batch = ImageBatch(pixels[images], [(64, 64)] * len(images), [(64, 64)] * len(images))
    with nullcontext() if accelerator else without_other_processes():
        shared = accelerator.prepare_model(model) if accelerator else model  # has to live until the backward pass
        terms = shared(batch, targets)
        sum(terms.values()).backward()
    return terms, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_denoising(accelerator):
    """A step of two processes is that of one with both images, denoising queries included, whatever they hold.

    A process whose image has no objects has no denoising row, but takes part in what is exchanged.
    """
    for settings in DENOISING:
        scope = [] if settings == DENOISING[0] else ["model.scope=global"]
        config = apply_overrides(load_config(DEMO), [*TINY, *settings, *scope, *SAME]).model
        for counts in ((3, 1), (0, 2)):
            expected, single = denoising_step(config, counts, [0, 1])
            terms, gradients = denoising_step(config, counts, [accelerator.process_index], accelerator)
            accelerator._models.clear()
            assert "denoising.1.giou" in terms and terms.keys() == expected.keys()
            for name, value in terms.items():
                mean = accelerator.reduce(value.detach().clone(), "mean")
                torch.testing.assert_close(mean, expected[name].detach(), rtol=1e-5, atol=1e-6)
            for name, gradient in gradients.items():
                difference = (gradient - single[name]).norm()
                assert difference <= 1e-4 * single[name].norm() + 1e-6, (settings, counts, name, difference)


def check_resume(accelerator, folder):
    """Stopped in the middle of an epoch and resumed, two processes end where they would have ended."""
    names = ("uninterrupted", "stopped")
    uninterrupted, _ = toy.build(folder / "uninterrupted", accelerator=accelerator, ema=0.9)
    uninterrupted.fit()
    reference = [p.detach().clone() for p in uninterrupted.model.parameters()]
    stopped, _ = toy.build(folder / "stopped", accelerator=accelerator, ema=0.9)
    stopped.batches.stop_at = (1, 0, stopped)  # between two reports
    assert stopped.fit() is False
    state, _ = agreed_state(folder / "stopped" / "state", accelerator)
    resumed, _ = toy.build(folder / "stopped", accelerator=accelerator, ema=0.9, resumed_at=read_facts(state))
    resumed.resume(state)
    assert 0 < resumed.position.step < uninterrupted.position.step
    resumed.fit()
    for ours, theirs in zip(resumed.model.parameters(), reference):
        assert torch.equal(ours, theirs)
    if accelerator.is_main_process:
        logged = [[line.get("terms") for line in read_metrics(folder / name / "metrics.jsonl")] for name in names]
        assert len(logged[0]) == len(logged[1])
        for ours, theirs in zip(*logged):
            assert ours is theirs is None or ours == pytest.approx(theirs, rel=1e-6)


def check_buffers(accelerator, folder):
    """Batch statistics differ between processes; validated, in each process, are those that are saved."""
    trainer, _ = toy.build(folder / "buffers", accelerator=accelerator, ema=0.9)
    for module in (accelerator.unwrap_model(trainer.model), trainer.ema.module):
        module.register_buffer("running_mean", torch.tensor([float(accelerator.process_index)]))
    seen = []
    trainer.validate = lambda module: seen.append(module.running_mean.clone()) or {"AP": 0.0}
    trainer.evaluate()
    assert seen[0].item() == 0.0


def check_non_finite(accelerator, folder):
    """One process meets a NaN: both stop, at the same step, and name its term, images and batch."""
    poison = (0, 3) if accelerator.process_index == 1 else None
    trainer, _ = toy.build(folder / "poison", accelerator=accelerator, poison=poison)
    try:
        trainer.fit()
    except NonFiniteError as error:
        assert str(error).startswith("step 1: process 1: loss term")
        (_, targets), *_ = islice(toy.ToyBatches(7, rank=1, world=2).epoch(0), 3, 4)
        ids = ", ".join(str(target["image_id"]) for target in targets)
        assert "decoder.0.l1" in str(error) and f"(images {ids})" in str(error) and "1-process1.pt" in str(error)
        assert all((folder / "poison" / f"nonfinite-1-process{process}.pt").exists() for process in (0, 1))
    else:
        raise AssertionError("nobody stopped")


class Broken:
    """Batches of which one process gets only the first few."""

    def __init__(self, batches, rank, at, interruption):
        self.batches, self.rank, self.at, self.interruption = batches, rank, at, interruption

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, start=0):
        for index, batch in enumerate(self.batches.epoch(epoch, start), start):
            if (self.rank, epoch, index) == self.at:
                raise self.interruption
            yield batch


def check_interruption(accelerator, folder):
    """One process gets no batch: both save the last completed step and end alike, and the resumed run ends the same."""
    uninterrupted, _ = toy.build(folder / "never", accelerator=accelerator)
    uninterrupted.fit()
    reference = [p.detach().clone() for p in uninterrupted.model.parameters()]
    for code in (ExitCode.STORAGE, ExitCode.INTERRUPTED):
        place = folder / f"interrupted-{code}"
        trainer, _ = toy.build(place, accelerator=accelerator)
        reason = Interruption("the storage is gone", code)
        trainer.batches = Broken(trainer.batches, accelerator.process_index, (1, 1, 3), reason)
        if code == ExitCode.INTERRUPTED:
            assert trainer.fit() is False
        else:
            with pytest.raises(Interruption, match=r"process 1: the storage is gone .*saved at step 5") as error:
                trainer.fit()
            assert error.value.code == code
        assert trainer.position.step == 5  # the first half of its accumulated batches had come
        assert_resumed_alike(accelerator, place, reference)


def check_interrupted_validation(accelerator, folder):
    """One process gets not all of its validation batches: both leave it, and a resumed run repeats it."""
    uninterrupted, _ = toy.build(folder / "validated", accelerator=accelerator)
    uninterrupted.fit()
    reference = [p.detach().clone() for p in uninterrupted.model.parameters()]
    trainer, _ = toy.build(folder / "left", accelerator=accelerator)
    parts = (toy.ToyBatches(3, rank=accelerator.process_index, world=2), accelerator.process_index)
    batches = Broken(*parts, (1, 0, 1), Interruption("the storage is gone", ExitCode.STORAGE))
    trainer.validate = lambda module: predict(module, batches.epoch(0), accelerator) and {}
    with pytest.raises(Interruption, match="process 1: the storage is gone"):
        trainer.fit()
    assert (trainer.position.epoch, trainer.position.step_in_epoch, trainer.position.step) == (0, 4, 4)
    assert_resumed_alike(accelerator, folder / "left", reference)


def assert_resumed_alike(accelerator, folder, reference):
    state, _ = agreed_state(folder / "state", accelerator)
    resumed, _ = toy.build(folder, accelerator=accelerator, resumed_at=read_facts(state))
    resumed.resume(state)
    resumed.fit()
    assert [line["epoch"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "val"] == [1, 2, 3]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.model.parameters(), reference))


def check_skipped(accelerator, folder):
    """One process meets a NaN in the second batch of a step: both leave the step out, running statistics included."""
    poison = (0, 3) if accelerator.process_index == 1 else None
    options = {"on_nonfinite": "skip", "model": toy.Normalized(), "ema": 0.9, "epochs": 1}
    trainer, _ = toy.build(folder / "skipped", accelerator=accelerator, poison=poison, **options)
    step, same = trainer.step, []

    def watched(group):
        before = [value.clone() for value in trainer.model.state_dict().values()]
        step(group)
        same.append(all(torch.equal(a, b) for a, b in zip(before, trainer.model.state_dict().values(), strict=True)))

    trainer.step = watched
    assert trainer.fit() and trainer.position.skipped == 1
    assert same == [False, True, False, False]
    assert all(torch.isfinite(value).all() for value in trainer.ema.module.state_dict().values())
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(accelerator.reduce(weights.clone(), "mean"), weights)


def check_unwritable(accelerator, folder):
    """The main process cannot write: both end with its sentence, and none waits for the other."""
    trainer, _ = toy.build(folder / "unwritable", accelerator=accelerator)
    (folder / "unwritable").mkdir(exist_ok=True)
    (folder / "unwritable" / "state").touch()
    with pytest.raises(StorageError, match=r"unwritable/state: cannot be written to: "):
        trainer.fit()
    accelerator.wait_for_everyone()


def check_shared_folder(accelerator, folder):
    """Processes that look into different folders are named, and all of them stop."""
    require_shared_folder(Config(output_dir=str(folder)), accelerator)
    accelerator.wait_for_everyone()  # the main process has removed its mark
    assert not list(folder.glob(".launch-*"))
    mine = folder / f"machine{accelerator.process_index}"
    mine.mkdir()
    with pytest.raises(ConfigError, match=r"process 1 sees another folder there than process 0\. Choose one that"):
        require_shared_folder(Config(output_dir=str(mine)), accelerator)


class Scaled(nn.Module):
    """A linear map and a factor that cannot be sharded."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.factors = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])

    def forward(self, x):
        return (self.linear(x) * self.factors[0]).sum()


def check_scaler(accelerator):
    """fp16's gradient scaler over sharded weights: an overflow in the part of one process is skipped by all."""
    torch.manual_seed(0)
    model = Scaled()
    fully_shard(model, ignored_params={model.factors[0]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow, expected in ((False, 4.0), (True, 2.0), (False, 2.0)):
        before = [p.detach().clone() for p in map(full_tensor, model.parameters())]
        scaler.scale(model(torch.ones(2, 4) * (accelerator.process_index + 1))).backward()
        if overflow and accelerator.process_index == 1:
            model.linear.weight.grad.to_local()[0, 0] = float("inf")
        average_unsharded_gradients(model)
        scaler.unscale_(optimizer)
        norm = gradient_norm(model)
        clip_gradients(model, norm, 1e-2)
        assert overflow != norm.isfinite()
        scaler.step(optimizer)
        scaler.update()
        moved = torch.stack([(full_tensor(p) - b).norm() for p, b in zip(model.parameters(), before)]).norm()
        torch.testing.assert_close(moved.detach(), torch.tensor(0.0 if overflow else 1e-3), rtol=1e-3, atol=0)
        assert scaler.get_scale() == expected
        optimizer.zero_grad()


def main():
    torch.set_num_threads(1)
    folder, chosen = Path(sys.argv[1]), sys.argv[2:]
    accelerator = Accelerator(cpu=True)
    checks = {
        "gradient": lambda: check_gradient(accelerator),
        "gathering": lambda: check_gathering(accelerator),
        "empty images": lambda: check_empty_images(accelerator),
        "denoising": lambda: check_denoising(accelerator),
        "resume": lambda: check_resume(accelerator, folder),
        "buffers": lambda: check_buffers(accelerator, folder),
        "interruption": lambda: check_interruption(accelerator, folder),
        "interrupted validation": lambda: check_interrupted_validation(accelerator, folder),
        "non-finite": lambda: check_non_finite(accelerator, folder),
        "skipped": lambda: check_skipped(accelerator, folder),
        "unwritable": lambda: check_unwritable(accelerator, folder),
        "shared folder": lambda: check_shared_folder(accelerator, folder),
        "scaler": lambda: check_scaler(accelerator),
    }
    for name in chosen:
        checks[name]()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            print(f"holds: {name}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
