"""`benchmarks/cnn_step.py`: what it times are the losses that its columns name."""

import argparse

import torch
from support import ROOT, module_from

from brs_detr.losses import RankingObjective, ScoreObjective
from brs_detr.models.build import DETECTORS

bench = module_from(ROOT / "benchmarks" / "cnn_step.py")
OPTIONS = argparse.Namespace(full=False, device="cpu", repeats=1)


def test_it_times_every_cnn_detector_by_every_form():
    assert {*bench.SCORE_BASED, "brs_detr", "co_detr", "brs_dino", "co_dino"} == {*DETECTORS}
    for detector in bench.SCORE_BASED:
        models = {form: bench.settings(detector, form, OPTIONS).model for form in bench.FORMS}
        heads = {form: getattr(model, "head", None) or model.roi for form, model in models.items()}
        losses = {form: head.objective.loss for form, head in heads.items()}
        assert (losses["brs"], losses["rs"], losses["pairwise"]) == ("brs", "rs", "rs")
        assert losses["score"] in ("focal", "cross_entropy")


def test_pairwise_is_the_exact_loss_slower(monkeypatch):
    monkeypatch.setattr(bench, "CLASSES", 2)
    terms = {}
    for form in ("rs", "pairwise"):
        step, watch = bench.prepare("atss", form, OPTIONS)
        model = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
        images, targets = bench.random_batch(OPTIONS, masks=False)
        with torch.no_grad():
            terms[form] = model(images, targets)
        (objective,) = (m for m in model.modules() if isinstance(m, RankingObjective | ScoreObjective))
        assert objective.method == {"rs": "exact"}.get(form, form)
    torch.testing.assert_close(terms["pairwise"], terms["rs"])
    assert 0 < watch.share(step) < 1
    assert watch.positives > 0 and watch.logits % 2 == 0
