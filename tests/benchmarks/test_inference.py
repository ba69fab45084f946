"""benchmarks/inference.py: detectors take turns, and memory is what a batch adds."""

import argparse

import pytest
import torch

from brs_detr.commands.benchmark import Subject


@pytest.fixture(scope="module")
def inference(benchmark_module):
    return benchmark_module("inference")


def subject(detect):
    return Subject("x", detect, (8, 8), torch.device("cpu"), [])


def test_detectors_take_turns(inference):
    seen = []
    builds = {name: lambda name=name: subject(lambda images: seen.append((name, len(images)))) for name in "ab"}
    args = argparse.Namespace(sizes=[(8, 8), (8, 16)], batch=3, runs=2, warmup=1)
    times = inference.latencies(builds, args)
    assert seen == [("a", 3), ("b", 3)] * 6
    assert {key: len(value) for key, value in times.items()} == {(s, n): 2 for s in args.sizes for n in "ab"}


def test_memory_is_what_a_batch_adds(inference):
    def detect(images):
        return torch.ones(images.pixels.shape[-1] * 2**18).sum()  # a megabyte for each column

    small, large = inference.memory_of(lambda: subject(detect), [(8, 40), (8, 120)], 1, 1)
    assert 30 < small < 60 and 110 < large < 150
