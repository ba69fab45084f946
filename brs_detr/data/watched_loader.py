"""A DataLoader that nobody waits for in vain: a hung storage, a killed worker and a request to stop end the waiting.

Batches are fetched in a thread, while the caller's own thread looks several times a second whether it should wait on.
The workers ignore SIGTERM and Ctrl-C, which schedulers and terminals send to the whole process group, from their first
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

LOOK_EVERY = 0.2  # seconds
_TO_THE_GROUP = (signal.SIGTERM, signal.SIGINT)
# what is said of a worker that has ended: the first where a batch is awaited, the others where one is handed over
_OF_A_DEAD_WORKER = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class LoaderTimeout(Interruption):
    """No batch came for too long; the message names the files that were being read."""

    code = ExitCode.STORAGE


class WorkerError(Interruption):
    """A worker was killed, or could not be started; the message says how."""

    code = ExitCode.LOADER_WORKER_KILLED


class WatchedLoader(DataLoader):
    """A DataLoader with persistent workers.

    Args:
        dataset: may have a `being_read()` that lists the files its workers are reading.
        workers: their number; with 0 the thread of this process reads.
        timeout: seconds to wait for one batch; None waits for ever.
        options: of `DataLoader`.

    Attributes:
        interrupted: asked before and during each wait; where it is True the wait ends with an `Interruption`.

    Iterating raises:
        LoaderTimeout: no batch came in time.
        WorkerError: a worker was killed or could not be started.
        Interruption: told to stop; or one that the dataset has raised.
    """

    def __init__(self, dataset: Dataset, *, workers: int, timeout: float | None, **options: Any) -> None:
        init = ignore_signals if workers else None
        super().__init__(dataset, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=init, **options)
        self.longest_wait = timeout
        self.interrupted: Callable[[], bool] = lambda: False

    def __iter__(self) -> Iterator[Any]:
        tasks, results = queue.SimpleQueue(), queue.SimpleQueue()
        pins = self.pin_memory and torch.accelerator.is_available()
        device = torch.accelerator.current_device_index() if pins else None
        threading.Thread(target=_work, args=(tasks, results, device), daemon=True).start()
        begin = super().__iter__  # new workers are children of the main thread; living ones are only told to begin
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
        """End the workers, whatever they are doing; the loader is not used any more."""
        iterator, self._iterator = self._iterator, None
        workers = getattr(iterator, "_workers", ())
        if workers:
            iterator._shutdown = True  # torch would wait for workers that hang, and for a pipe that was cut
        if hasattr(iterator, "_pin_memory_thread_done_event"):
            iterator._pin_memory_thread_done_event.set()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=1)

    def _wait(self, task: Callable[[], Any], tasks: queue.SimpleQueue, results: queue.SimpleQueue) -> Any:
        """The result of a task of the thread."""
        if self.interrupted():
            raise Interruption("told to stop")
        began = time.monotonic()
        tasks.put(task)
        while True:
            try:
                value, error = results.get(timeout=LOOK_EVERY)
            except queue.Empty:
                self._require_living_workers()
                if self.interrupted():
                    raise Interruption("told to stop while waiting for a batch") from None
                if self.longest_wait is not None and time.monotonic() - began > self.longest_wait:
                    raise LoaderTimeout(self._describe_wait(time.monotonic() - began)) from None
                continue
            if isinstance(error, _OF_A_DEAD_WORKER):
                self._require_living_workers(patience=2.0)
            if error is not None:
                raise error
            return value

    def _start_workers(self) -> Iterator[Any]:
        """Torch's iterator with its workers.

        A worker that starts inherits the blocked signals, and unblocks them once it ignores them. They are children of
        the calling thread, with which they end.
        """
        before = set(multiprocessing.active_children())
        try:
            with _signals_blocked():
                iterator = super().__iter__()
        except (OSError, RuntimeError) as error:
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise WorkerError(
                f"data.workers={self.num_workers}: the loader's workers cannot be started ({error}). "
                "Free memory, processes or space in /dev/shm, or lower data.workers."
            ) from error
        for worker in getattr(iterator, "_workers", ()):
            worker._popen.terminate = worker._popen.kill  # they ignore SIGTERM, and Python waits for them at its end
        if getattr(iterator, "_worker_pids_set", False):
            # with these, torch's handler of SIGCHLD raises wherever this process is, in the middle of a step too
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        return iterator

    def _require_living_workers(self, patience: float = 0.0) -> None:
        """Raise where a worker has ended, or does so within some seconds: its connections end a moment before."""
        deadline, workers = time.monotonic() + patience, getattr(self._iterator, "_workers", ())
        dead = [worker for worker in workers if not worker.is_alive()]
        while workers and not dead and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY / 4)
            dead = [worker for worker in workers if not worker.is_alive()]
        if dead:
            raise WorkerError(f"loader worker {dead[0].pid} {_cause_of_death(dead[0].exitcode)}") from None

    def _describe_wait(self, seconds: float) -> str:
        files = getattr(self.dataset, "being_read", list)()
        what = f"being read: {', '.join(files)}" if files else "no file is being read; do the loader's workers run?"
        return (
            f"no batch came for {seconds:.0f} s ({what}). Does the storage answer? Mend it and go on with --resume; "
            "data.timeout sets how long a batch is waited for."
        )


def ignore_signals(_: int) -> None:
    """First words of a worker: what is sent to the whole process group is for its parent, with which it ends."""
    for number in _TO_THE_GROUP:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_THE_GROUP)
    if sys.platform == "linux":  # torch looks for the parent only between two batches
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(tasks: queue.SimpleQueue, results: queue.SimpleQueue, device: int | None) -> None:
    """Do one task after the other until there is None, and put (result, error) of each."""
    if device is not None:
        torch.accelerator.set_device_index(device)  # a thread begins on the first one
    while (task := tasks.get()) is not None:
        try:
            result = (task(), None)
        except BaseException as error:
            result = (None, error)
        results.put(result)
        del task, result


def _cause_of_death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"has ended with exit code {code}; its output says why."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    reasons = {
        signal.SIGKILL: "most likely for lack of memory (`dmesg` tells). Lower data.workers or give the job more.",
        signal.SIGBUS: "most likely since /dev/shm is full. Start the container with a larger --shm-size.",
    }
    return f"was killed by {name}, {reasons.get(-code, 'not by this program.')}"
