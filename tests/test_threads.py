"""Threads that predict at the same time leave the libraries' settings as they were."""

import contextlib
import multiprocessing
import threading
import time

import pytest
import torch
from PIL import Image, ImageFile

from brs_detr.data.image_io import _strict_pillow
from brs_detr.engine.predict import full_float32
from brs_detr.threads import shared_by_threads


def overlapping(context, settings):
    """Enter a context manager in two threads, leave it in the order of entering; return the settings at each step."""
    first, second = context(), context()
    leave = (None, None, None)
    steps = [first.__enter__, second.__enter__, lambda: first.__exit__(*leave), lambda: second.__exit__(*leave)]
    found = []
    for step in steps:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        found.append(settings())
    return found


def test_pillow_is_strict_until_the_last_thread_has_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    strict, users = (False, None), (True, 10)
    found = overlapping(_strict_pillow, lambda: (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS))
    assert found == [strict, strict, strict, users]


def test_products_are_not_rounded_until_the_last_thread_has_predicted():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        found = overlapping(full_float32, lambda: torch.backends.cuda.matmul.allow_tf32)
        assert found == [False, False, False, True]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_forked_while_a_thread_enters_can_enter_too():
    entering = threading.Event()

    @shared_by_threads
    @contextlib.contextmanager
    def slow():
        entering.set()
        time.sleep(0.3)
        yield

    def enter():
        with slow():
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    entering.wait()
    process = multiprocessing.get_context("fork").Process(target=enter, daemon=True)
    process.start()
    process.join(10)
    thread.join()
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
