"""A DataLoader whose waiting can end: on a hung storage, a killed worker, or a request to stop.

Batches are fetched in a thread, while the caller's thread checks several times a second whether to keep waiting. The
workers ignore SIGTERM and Ctrl-C, which schedulers and terminals send to the entire process group, from their first
instruction on: this process ends them, and they end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from brs_detr.exit_codes import ExitCode, Interruption

POLL_SECONDS = 0.2
_GROUP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # sent to the entire process group
# raised for a worker that has ended: the first while waiting for a batch, the others while receiving one
_DEAD_WORKER_ERRORS = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class LoaderTimeout(Interruption):
    """No batch arrived in time; the message names the files that were being read."""

    code = ExitCode.STORAGE


class WorkerError(Interruption):
    """A worker was killed, or could not be started; the message says how."""

    code = ExitCode.LOADER_WORKER_KILLED


class WatchedLoader(DataLoader):
    """A DataLoader with persistent workers.

    Args:
        dataset: may have a method `being_read()` that lists the files its workers are reading.
        workers: number of worker processes; with 0 a thread of this process reads.
        timeout: seconds to wait for one batch; None waits indefinitely.
        options: further arguments of `DataLoader`.

    Attributes:
        interrupted: called before and during each wait; the wait ends with an `Interruption` if it returns True.

    Iterating raises:
        LoaderTimeout: no batch arrived in time.
        WorkerError: a worker was killed or could not be started.
        Interruption: a stop was requested, or the dataset raised one.
    """

    def __init__(self, dataset: Dataset, *, workers: int, timeout: float | None, **options: Any) -> None:
        init = ignore_signals if workers else None
        super().__init__(dataset, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=init, **options)
        self.max_wait = timeout  # DataLoader has a `timeout` of its own, which kills nothing and names no file
        self.interrupted: Callable[[], bool] = lambda: False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator instead of torch's private class
        tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pins = self.pin_memory and torch.accelerator.is_available()
        device = torch.accelerator.current_device_index() if pins else None
        threading.Thread(target=_work, args=(tasks, results, device), daemon=True).start()
        begin = super().__iter__  # new workers are children of the main thread; running ones only start a new epoch
        try:
            iterator = self._start_workers() if self._iterator is None else self._wait(begin, tasks, results)
            while True:
                try:
                    batch = self._wait(iterator.__next__, tasks, results)
                except StopIteration:
                    return
                yield batch
        finally:
            tasks.put(None)

    def close(self) -> None:
        """Kill the workers, whatever they are doing; the loader must not be used afterwards."""
        iterator: Any = self._iterator  # torch does not declare its private attributes
        self._iterator = None
        workers = getattr(iterator, "_workers", ())
        if workers:
            iterator._shutdown = True  # otherwise torch waits for workers that hang, and for a closed pipe
        if hasattr(iterator, "_pin_memory_thread_done_event"):
            iterator._pin_memory_thread_done_event.set()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=1)

    def _wait(self, task: Callable[[], Any], tasks: queue.SimpleQueue, results: queue.SimpleQueue) -> Any:
        """Run a task in the thread and wait for its result."""
        if self.interrupted():
            raise Interruption("stop requested")
        began = time.monotonic()
        tasks.put(task)
        while True:
            try:
                value, error = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._require_living_workers()
                if self.interrupted():
                    raise Interruption("stop requested while waiting for a batch") from None
                if self.max_wait is not None and time.monotonic() - began > self.max_wait:
                    raise LoaderTimeout(self._describe_wait(time.monotonic() - began)) from None
                continue
            if isinstance(error, _DEAD_WORKER_ERRORS):
                self._require_living_workers(patience=2.0)
            if error is not None:
                raise error
            return value

    def _start_workers(self) -> Iterator[Any]:
        """Create torch's iterator with its workers.

        A new worker inherits the blocked signals, and unblocks them once it ignores them. Workers are children of the
        calling thread and end with it, so they must not be started in the thread that fetches.
        """
        before = set(multiprocessing.active_children())
        try:
            with _signals_blocked():
                iterator: Any = super().__iter__()
        except (OSError, RuntimeError) as error:
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise WorkerError(
                f"data.workers={self.num_workers}: the loader workers cannot be started ({error}). "
                "Free memory, processes or space in /dev/shm, or lower data.workers."
            ) from error
        for worker in getattr(iterator, "_workers", ()):
            worker._popen.terminate = worker._popen.kill  # they ignore SIGTERM, and Python joins them at exit
        if getattr(iterator, "_worker_pids_set", False):
            # for these pids torch's SIGCHLD handler raises anywhere in this process, even in the middle of a step
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        return iterator

    def _require_living_workers(self, patience: float = 0.0) -> None:
        """Raise if a worker has ended, or ends within `patience` seconds: its connections close a moment before it."""
        deadline, workers = time.monotonic() + patience, getattr(self._iterator, "_workers", ())
        dead = [worker for worker in workers if not worker.is_alive()]
        while workers and not dead and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
            dead = [worker for worker in workers if not worker.is_alive()]
        if dead:
            raise WorkerError(f"loader worker {dead[0].pid} {_cause_of_death(dead[0].exitcode)}") from None

    def _describe_wait(self, seconds: float) -> str:
        files: list[str] = getattr(self.dataset, "being_read", list)()
        what = f"being read: {', '.join(files)}" if files else "no file is being read"
        return (
            f"data loader: no batch arrived for {seconds:.0f} s ({what}). Check the storage and the loader workers, "
            "then continue with --resume; data.timeout sets the maximum wait for a batch."
        )


def ignore_signals(_: int) -> None:
    """Ignore the signals of the process group in a worker (`worker_init_fn`), and end it together with its parent."""
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
    if sys.platform == "linux":  # torch checks for the parent only between two batches
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is None or os.getppid() != parent.pid:  # it ended before prctl took effect
            os._exit(1)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(tasks: queue.SimpleQueue, results: queue.SimpleQueue, device: int | None) -> None:
    """Run tasks from the queue until None arrives, and put (result, error) of each."""
    if device is not None:
        torch.accelerator.set_device_index(device)  # a new thread starts on device 0
    result: tuple[Any, BaseException | None]
    while (task := tasks.get()) is not None:
        try:
            result = (task(), None)
        except BaseException as error:
            result = (None, error)
        results.put(result)
        del task, result  # otherwise this thread keeps a batch alive while it waits for the next task


def _cause_of_death(code: int | None) -> str:
    if code is None or code >= 0 or sys.platform == "win32":
        return f"has ended with exit code {code}. See its output."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    reasons: dict[int, str] = {
        signal.SIGKILL: "most likely for lack of memory (see `dmesg`). Lower data.workers or request more memory.",
        signal.SIGBUS: "most likely because /dev/shm is full. Start the container with a larger --shm-size.",
    }
    return f"was killed by {name}, {reasons.get(-code, 'not by this program.')}"
