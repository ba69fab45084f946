"""The numbers on the command line of `eval`."""

import argparse

import pytest

from brs_detr.commands.evaluate import add_arguments, score_list


def test_scores_are_parsed_in_order():
    assert score_list("1e-4,.8,0,.1,.1") == (0.0, 1e-4, 0.1, 0.8)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["runs/a"]).score_thresholds == ()
    assert parser.parse_args(["runs/a", "--score-thresholds", ".5,1e-3"]).score_thresholds == (1e-3, 0.5)


@pytest.mark.parametrize("text", ["", "a", "1.5", "-1", "nan", ".1,,.2", "1"])
def test_what_is_no_score_is_refused(text, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["runs/a", f"--score-thresholds={text}"])
    assert stop.value.code == 2 and "scores in [0, 1)" in capsys.readouterr().err


def test_fewer_than_no_images_are_refused(capsys):
    """A count of -1 would draw all images but one."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert [parser.parse_args(["runs/a", *words]).images for words in ([], ["--images=0"])] == [12, 0]
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["runs/a", "--images", "-1"])
    assert stop.value.code == 2 and "--images: -1 is not an integer of at least 0" in capsys.readouterr().err
