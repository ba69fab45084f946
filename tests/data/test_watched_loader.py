"""Waiting for a batch has an end, the workers end with their process, and a full shared memory is no hang."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from brs_detr.data import shared_memory
from brs_detr.data.coco import CocoDetection
from brs_detr.data.loader import build_train_loader
from brs_detr.data.watched_loader import LoaderTimeout, WatchedLoader, WorkerError
from brs_detr.exit_codes import ExitCode, Interruption


class Numbers(Dataset):
    """0, 1, 2, ...; something happens in the worker at one of them."""

    def __init__(self, happens=lambda: None, at=None, count=8):
        self.happens, self.at, self.count = happens, at, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.at:
            self.happens()
        return torch.tensor(index)

    def being_read(self):
        return ["a.jpg"]


@pytest.fixture(params=[0, 2])
def workers(request):
    return request.param


def hang():
    time.sleep(3600)


def loader(dataset, workers, timeout=None):
    return WatchedLoader(dataset, workers=workers, timeout=timeout, batch_size=2)


def taken(loader):
    return [number for batch in loader for number in batch.tolist()]


def test_every_batch_comes_in_order_in_every_epoch(workers):
    watched = loader(Numbers(), workers, timeout=60)
    assert [taken(watched) for _ in range(3)] == [list(range(8))] * 3
    watched.close()
    assert not multiprocessing.active_children()


def test_a_wait_ends_after_the_timeout_and_names_what_is_being_read(workers):
    watched, got = loader(Numbers(hang, at=5), workers, timeout=1.0), []
    with pytest.raises(LoaderTimeout, match=r"no batch arrived for 1 s \(being read: a\.jpg\)") as error:
        got += [batch.tolist() for batch in watched]
    began = time.monotonic()
    watched.close()
    assert error.value.code == ExitCode.STORAGE and time.monotonic() - began < 5
    assert not multiprocessing.active_children()


def test_a_wait_ends_when_a_stop_is_requested(workers):
    watched, requested = loader(Numbers(hang, at=5), workers), threading.Event()
    watched.interrupted = requested.is_set
    iterator = iter(watched)
    assert [next(iterator).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    threading.Timer(0.5, requested.set).start()
    with pytest.raises(Interruption, match="stop requested while waiting") as error:
        next(iterator)
    watched.close()
    assert error.value.code == ExitCode.INTERRUPTED


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "SIGKILL, most likely for lack of memory"), (signal.SIGBUS, "SIGBUS, .*shm")]
)
def test_a_killed_worker_is_named_with_its_signal_where_a_batch_is_waited_for_and_nowhere_else(number, words):
    watched = loader(Numbers(count=100), 2)
    iterator = iter(watched)
    assert next(iterator).tolist() == [0, 1]
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, number)
    worker.join()
    time.sleep(0.1)  # here torch would raise, in the middle of whatever is being done
    with pytest.raises(WorkerError, match=rf"loader worker \d+ was killed by {words}") as error:
        list(iterator)
    watched.close()
    assert error.value.code == ExitCode.LOADER_WORKER_KILLED


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_named_too(monkeypatch, error):
    watched = loader(Numbers(count=100), 1)
    iterator = iter(watched)
    next(iterator)
    (worker,) = multiprocessing.active_children()

    def cut_off(*_, **__):
        threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL)).start()
        raise error

    monkeypatch.setattr(watched._iterator, "_data_queue", SimpleNamespace(get=cut_off))
    with pytest.raises(WorkerError, match=rf"loader worker {worker.pid} was killed by SIGKILL"):
        list(iterator)
    watched.close()


def test_a_worker_ignores_what_is_sent_to_the_group_from_its_first_instruction_on(monkeypatch):
    start = multiprocessing.process.BaseProcess.start

    def start_and_signal(process):
        start(process)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, number)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_and_signal)
    watched = loader(Numbers(), 2)
    assert taken(watched) == list(range(8))
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    assert taken(watched) == list(range(8))
    watched.close()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_worker_that_hangs_does_not_hold_up_a_loader_that_is_dropped():
    watched = loader(Numbers(hang, at=5), 1)
    assert next(iter(watched)).tolist() == [0, 1]
    (worker,) = multiprocessing.active_children()
    worker.terminate()  # as torch and, at the end, Python do
    worker.join(5)
    assert not worker.is_alive()
    watched.close()


def test_workers_that_cannot_be_started_are_said_so(monkeypatch):
    def start(process):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(WorkerError, match=r"data\.workers=2: .* cannot be started .*No space left.*/dev/shm"):
        taken(loader(Numbers(), 2))


def test_an_error_of_the_dataset_is_handed_on(workers):
    def break_down():
        raise ValueError("broken")

    watched = loader(Numbers(break_down, at=5), workers)
    with pytest.raises(ValueError, match="broken"):
        taken(watched)
    watched.close()


@pytest.fixture()
def dataset(tmp_path, write_dataset):
    path = write_dataset(tmp_path, sizes=[(40, 60)] * 6, boxes=[[(1, 2, 3, 20, 20)], []] * 3)
    return CocoDetection(path, path.parent / "images", train=True)


def test_batches_come_through_a_pipe_where_shared_memory_is_full(dataset, monkeypatch):
    alone = list(build_train_loader(dataset, batch_size=2))

    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    watched = build_train_loader(dataset, batch_size=2, workers=2, timeout=60)
    through_pipe = list(watched)
    watched.close()
    assert len(alone) == len(through_pipe) == 3
    for (ours, our_targets), (theirs, their_targets) in zip(through_pipe, alone):
        assert torch.equal(ours.pixels, theirs.pixels) and ours.sizes == theirs.sizes
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(our_targets, their_targets))


def test_a_worker_hands_over_shared_memory_where_there_is_room(dataset):
    watched = build_train_loader(dataset, batch_size=2, workers=1)
    assert all(images.pixels.is_shared() for images, _ in watched)
    watched.close()


def test_a_shortage_of_shared_memory_is_reported_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: usage(64 * 2**20))
    batch = 3 * 4 * 1333 * 1333  # 20 MB
    warning = shared_memory.shortage(4, batch, processes=2)
    assert "has 64 MB free" in warning and "may need 366 MB" in warning
    assert "--shm-size" in warning and "data.workers" in warning
    assert shared_memory.shortage(1, batch) is None  # three batches
    assert shared_memory.shortage(0, 10**12) is None
