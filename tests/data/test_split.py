"""Held-out images: a partition by name, seeded, with every class on both sides where that is possible."""

import random
from collections import Counter

import pytest

from brs_detr.data.split import hold_out_images, short_names


def images(count, classes, seed=0):
    """Up to four classes an image; low numbers are frequent, high ones rare."""
    draw = random.Random(seed)
    return {
        f"{i}": {min(classes - 1, int(draw.expovariate(1) * classes / 6)) for _ in range(draw.randint(0, 4))}
        for i in range(count)
    }


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize(("count", "classes"), [(200, 20), (1000, 30)])
def test_every_class_of_two_images_is_on_both_sides_at_about_its_share(count, classes, fraction):
    labels = images(count, classes)
    held = hold_out_images(labels, fraction)
    everywhere, inside = (Counter(c for name in names for c in labels[name]) for names in (labels, held))
    assert all(0 < inside[label] < number for label, number in everywhere.items() if number > 1)
    assert all(inside[label] == 0 for label, number in everywhere.items() if number == 1)
    assert len(held) == pytest.approx(count * fraction, abs=classes / 2)
    # a random choice would spread by the square root of the expectation
    for label, number in everywhere.items():
        if number * fraction > 20:
            assert inside[label] == pytest.approx(number * fraction, rel=0.25)


def test_by_hand():
    """The rare class first: one of its two images is held out, and fills half of what the frequent one needs."""
    labels = {"a": {0, 1}, "b": {0, 1}, "c": {0}, "d": {0}, "e": set(), "f": set(), "g": set(), "h": set()}
    held = hold_out_images(labels, 0.5)
    assert len(held) == 4 and len(held & {"a", "b"}) == 1 and len(held & set("abcd")) == 2


def test_order_and_names_of_classes_do_not_matter_and_the_seed_does():
    labels = images(60, 5)
    held = hold_out_images(labels, 0.2)
    renamed = {name: {f"class {c}" for c in labels[name]} for name in reversed(labels)}
    assert hold_out_images(renamed, 0.2) == held == hold_out_images(labels, 0.2, seed=0)
    others = [hold_out_images(labels, 0.2, seed=seed) for seed in (1, 2)]
    assert held != others[0] != others[1] and len(others[0]) == pytest.approx(len(held), abs=2)


@pytest.mark.parametrize("labels", [{"a": {0}, "b": {1}}, {"a": {0}, "b": {0}}, {"a": set(), "b": set()}])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_images_are_one_on_each_side(labels, fraction):
    assert len(hold_out_images(labels, fraction)) == 1


def test_names_are_those_of_files_unless_two_are_alike():
    assert short_names(["x/a.jpg", "y\\b.png", "c"]) == ["a", "b", "c"]
    assert short_names(["x/a.jpg", "y/a.jpg", "b.jpg"]) == ["x/a.jpg", "y/a.jpg", "b"]
    assert short_names(["x/a.jpg", "x/a.jpg"]) == ["a", "a"]  # one image listed twice stays on one side
