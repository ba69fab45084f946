"""The largest batch that fits, on a device that is played by a fake, and the training that uses it."""

import re
from types import SimpleNamespace

import pytest
import torch
from support import DEMO, SMALL_DETECTOR, SMALL_IMAGES, reset_accelerate, script
from torch import nn

from brs_detr.config import ConfigError, load_config
from brs_detr.data.synthetic import make_dataset
from brs_detr.engine import batch_search
from brs_detr.engine.batch_search import (
    available_memory,
    divisors,
    fits_on_cpu,
    fits_on_device,
    free_memory,
    largest_that_fits,
    saved_bytes,
    search_batch_size,
)
from brs_detr.engine.logging import read_metrics
from brs_detr.losses.distributed import without_other_processes, world_size

TINY = [*SMALL_DETECTOR, *SMALL_IMAGES, "train.epochs=1", "train.total_batch_size=4", "train.log_every=1"]


@pytest.mark.parametrize("share", [1, 6, 12, 16, 17, 64])
def test_bisection_finds_what_trying_every_size_finds(share):
    for limit in range(share + 2):
        tried = []

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        expected = max((size for size in range(1, share + 1) if share % size == 0 and size <= limit), default=0)
        assert largest_that_fits(divisors(share), fits) == expected
        assert len(tried) == len(set(tried)) <= len(divisors(share)).bit_length()


def accelerator(processes=1, device="xpu"):
    return SimpleNamespace(device=torch.device(device), num_processes=processes)


@pytest.fixture
def device_of(monkeypatch):
    """Plays a device that holds so many images; returns the trials as (images, whether gradients were accumulated)."""

    def play(limit, message=None):
        trials = []

        def step(model, optimizer, accelerator, batch, *, accumulate, kept):
            trials.append((batch, accumulate))
            if batch > limit:
                raise torch.OutOfMemoryError("no room") if message is None else RuntimeError(message)

        monkeypatch.setattr(batch_search, "noise_batch", lambda device, size: size)
        monkeypatch.setattr(batch_search, "trial_step", step)
        return trials

    return play


def build():
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def search(share, processes=1):
    return search_batch_size(build, lambda size: {"size": size}, accelerator(processes), share)


@pytest.mark.parametrize(("limit", "found"), [(100, 16), (16, 16), (11, 8), (1, 1), (0, 0)])
def test_the_search_ends_below_the_size_that_runs_out_of_memory(device_of, limit, found):
    trials = device_of(limit)
    assert search(16) == found
    assert all(accumulate == (size < 16) for size, accumulate in trials) and len(trials) <= 3


def test_libraries_that_run_out_of_memory_in_their_own_words_count_too(device_of):
    device_of(4, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
    assert search(8) == 4


def test_another_error_is_not_taken_for_a_lack_of_memory(device_of):
    device_of(4, "shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        search(8)


def test_all_processes_go_on_with_what_fits_in_each_of_them(device_of, monkeypatch):
    trials = device_of(8)
    monkeypatch.setattr(batch_search, "gather_object", lambda own: [*own, trials[-1][0] <= 2])
    assert search(16, processes=2) == 2


def test_a_failed_trial_leaves_no_error_that_keeps_its_tensors():
    def step():
        raise torch.OutOfMemoryError

    assert not fits_on_device(step, torch.device("cpu")) and fits_on_device(lambda: None, torch.device("cpu"))


def test_the_peak_of_a_trial_is_not_reported_as_that_of_the_training(monkeypatch):
    """Played by two functions, then on a GPU where there is one."""
    calls = []
    with monkeypatch.context() as fake:
        fake.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
        fake.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(str(device)))
        free_memory(torch.device("cuda", 0))
    assert calls == ["emptied", "cuda:0"]
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        torch.empty(2**24, device=device)
        assert torch.cuda.max_memory_allocated(device) >= 2**26
        free_memory(device)
        assert torch.cuda.max_memory_allocated(device) < 2**26


def test_what_a_step_saves_is_what_its_backward_pass_reads():
    layer, x = nn.Linear(100, 50, bias=False), torch.ones(8, 100)
    assert saved_bytes(lambda: layer(x).sum().backward(), layer) == x.nbytes  # its weights are no part of a batch
    assert saved_bytes(lambda: (layer(x).sigmoid() * 2).sum().backward(), layer) == x.nbytes + 8 * 50 * 4


def test_without_a_gpu_half_of_the_memory_that_is_there_is_used(monkeypatch):
    monkeypatch.setattr(batch_search, "available_memory", lambda: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert largest_that_fits(range(1, 20), fits_on_cpu(50.0, fixed=100)) == 4  # 100 + 2 * 50 * 4 of 500 bytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert largest_that_fits(range(1, 20), fits_on_cpu(50.0, fixed=100)) == 1


def test_of_a_control_group_the_memory_that_files_take_is_available_and_the_smallest_limit_counts(tmp_path):
    own = tmp_path / "cgroup"
    assert available_memory(tmp_path, own) > 10**6  # the machine's
    own.write_text("1:cpu:/elsewhere\n0::/pod/container\n")
    limits = {"": ("max", 9000, 0), "pod": (3000, 2500, 900), "pod/container": (4000, 3500, 3000)}
    for name, (limit, used, inactive) in limits.items():
        group = tmp_path / name
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 100\ninactive_file {inactive}\n")
    assert available_memory(tmp_path, own) == 1400  # 3000 - (2500 - 900), below 4000 - (3500 - 3000)
    (tmp_path / "pod" / "memory.max").write_text("max\n")
    assert available_memory(tmp_path, own) == 3500
    (tmp_path / "memory.max").write_text("9100\n")  # a container that sees its own group as the root
    own.write_text("0::/not/mounted/here\n")
    assert available_memory(tmp_path, own) == 100


def test_losses_of_a_trial_wait_for_no_other_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with without_other_processes():
        assert world_size() == 1
    assert world_size() == 4


def test_the_setting_takes_a_number_null_or_auto():
    for text, value in (("4", 4), ("null", None), ("auto", "auto")):
        assert load_config(DEMO, [f"train.per_device_batch_size={text}"]).train.per_device_batch_size == value
    with pytest.raises(ConfigError, match="must be an integer or auto, not 'most'"):
        load_config(DEMO, ["train.per_device_batch_size=most"])


@pytest.mark.slow
def test_a_training_with_auto_is_that_of_the_size_it_chose_and_so_is_its_resumption(tmp_path, monkeypatch):
    train, data = script("train"), make_dataset(tmp_path / "data", train=8, val=2, image_size=72)
    losses = {}
    monkeypatch.setattr(batch_search, "fits_on_cpu", lambda *memory: lambda size: size <= 3)
    for text in ("auto", "2"):
        reset_accelerate()
        folder = tmp_path / text
        words = [f"data.root={data}", f"output_dir={folder}", f"train.per_device_batch_size={text}"]
        assert train([DEMO, *TINY, *words]) == 0
        losses[text] = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert losses["auto"] == losses["2"] and len(losses["2"]) == 2
    said = (tmp_path / "auto" / "log.txt").read_text()
    assert "total batch 4 = 1 process x 2 images x 2 accumulated (auto: 2 image(s) fit at once" in said

    monkeypatch.setattr(batch_search, "fits_on_cpu", lambda *memory: pytest.fail("searched again"))
    reset_accelerate()
    words = [f"data.root={data}", f"output_dir={tmp_path / 'auto'}", "train.per_device_batch_size=auto", "--resume"]
    assert train([DEMO, *TINY, *words]) == 0
    assert "total batch 4 = 1 process x 2 images x 2 accumulated\n" in (tmp_path / "auto" / "log.txt").read_text()


@pytest.mark.slow
def test_a_device_that_holds_not_even_one_image_is_a_refusal(tmp_path, monkeypatch, capsys):
    data = make_dataset(tmp_path / "data", train=4, val=2, image_size=72)
    monkeypatch.setattr(batch_search, "fits_on_cpu", lambda *memory: lambda size: False)
    reset_accelerate()
    words = [f"data.root={data}", f"output_dir={tmp_path / 'run'}", "train.per_device_batch_size=auto"]
    assert script("train")([DEMO, *TINY, *words]) == 2
    assert re.search(r"auto: not even one image of \d+x\d+ fits into the memory", capsys.readouterr().err)
