"""Command lines: quick answers to wrong ones, and the same arguments for scripts, modules and commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from brs_detr import cli

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# (arguments, words of the answer): all are answered before torch is imported
ANSWERS = [
    (["--help"], "check-data"),
    (["train", "--help"], "--dry-run"),
    (["eval", "--help"], "--images"),
    (["eval", "--help"], "exported .onnx"),
    (["predict", "--help"], "exported .onnx"),
    (["train", "demo", "optim.lrr=1"], "did you mean optim.lr?"),
    (["train", "dmeo"], "Did you mean demo?"),
    (["train", "demo"], "datasets/demo/annotations/train.json: this annotation file does not exist"),
    (["train", "demo"], "brs-detr make-dataset datasets/demo"),
    (
        ["train", "demo", "--data.root", "nowhere"],
        "nowhere/annotations/train.json: this annotation file does not exist",
    ),
    (["train", "demo", "data.root=half"], "half/annotations/val.json: this annotation file does not exist"),
    (["train", "demo", "data.root=half", "data.val_json=."], "half: this is a folder, not an annotation file"),
    (["train", "demo", "data=nowhere"], "nowhere: there is no such file or folder. Set data= to"),
    (["train", "demo", "--data", "nowhere"], "nowhere: there is no such file or folder"),
    (["train", "demo", "data=.", "data.val_json=x"], "data=. stands for all paths of the dataset"),
    (["train", "demo", "data=."], "no dataset was recognized here. Known are COCO"),
    (["check-data", ".", "--sheet", "sheet"], "--sheet=sheet: the ending is not one of .png, .jpg,"),
    (["check-data", "demo", "--sheet", "sheet.html"], "Add .png."),
    (["check-data", ".", "--sheet", "sheet", "--samples", "0"], "no dataset was recognized here"),
    (["check-data", ".", "--show=-1"], "--show: -1 is not an integer of at least 0"),
    (["check-data", "."], "no dataset was recognized here. Known are COCO"),
    (["train", "demo", "dataset=half"], "did you mean data.source?"),
    (["train", "demo", "data.augment.preset=arial"], "did you mean aerial?"),
    (["train", "demo", "data.root=full", "train.init_from=gone"], "train.init_from=gone: neither a weights file"),
    (["train", "demo", "data.root=full", "model.backbone.checkpoint=gone"], "there is no file gone"),
    (["train", "demo", "--epochs", "3"], "Write train.epochs=3."),
    (["train", "--lr", "1e-4", "demo"], "Write optim.lr=1e-4."),
    (["train", "demo", "--batch-size=8"], "Write train.total_batch_size=8."),
    (["train", "demo", "-lr", "1"], "Write optim.lr=1."),
    (["train", "demo", "--fp16", "--resume"], "Write train.precision=VALUE."),
    (["train", "demo", "--dry_run"], "did you mean --dry-run?"),
    (["eval", "nowhere"], "nowhere: neither a weights file nor a run folder"),
    (["eval", ".", "evla.batch_size=1"], "did you mean eval.batch_size?"),
    (["eval", ".", "model.head.max_detection=1"], "did you mean model.head.max_detections?"),
    (["predict", ".", "full", "model.head.nms_uoi=1"], "did you mean model.head.nms_iou?"),
    (["benchmark", "demo", "eval.predict_with=ensemble"], "needs weights whose validation scored all heads"),
    (["info", "demo", "--classes", "-2"], "--classes: -2 is not a positive integer"),
    (["push", ".", "bad-name"], "bad-name: not the name of a repository. Write user/repository."),
    (["push", ".", "a/b/c"], "a/b/c: not the name of a repository ("),
    (["push", ".", "user/-cells", "--out", "x"], "user/-cells: not the name of a repository ("),
    (["trian", "demo"], "did you mean train?"),
]
PROBE = """
import contextlib, io, json, sys
from brs_detr.cli import main
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), sorted({"torch", "timm", "accelerate", "numpy"} & set(sys.modules))]))
"""


def test_what_is_wrong_at_once_is_said_before_torch_is_imported(tmp_path):
    for split in ("train", "val"):
        for root in ("full", "half")[: 2 if split == "train" else 1]:
            (tmp_path / root / "annotations").mkdir(parents=True, exist_ok=True)
            (tmp_path / root / "annotations" / f"{split}.json").write_text("{}")
    command = [sys.executable, "-c", PROBE, json.dumps([arguments for arguments, _ in ANSWERS])]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(ANSWERS)
    for (arguments, answer), line in zip(ANSWERS, lines, strict=True):
        code, said, heavy = json.loads(line)
        assert answer in said and heavy == [], (arguments, said, heavy)
        assert code == (0 if "--help" in arguments else 2), arguments
        assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [["train.py"], ["eval.py"], ["-m", "brs_detr", "train"], ["-m", "brs_detr"]])
def test_scripts_and_modules_answer_as_the_command_does(command, tmp_path):
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command]
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: {'brs-detr' if '-m' in command else command[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["brs_detr.train", "brs_detr.evaluate"])
def test_the_stories_run_as_modules_as_accelerate_starts_them(module, tmp_path):
    command = [sys.executable, "-m", module, "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: ") and done.stderr.count("\n") == 1


def test_every_command_has_arguments_and_help(capsys):
    for name, command in cli.COMMANDS.items():
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0 and f"usage: brs-detr {name}" in capsys.readouterr().out and command.text


def test_an_unknown_option_of_a_command_without_settings_is_refused_with_the_nearest(capsys):
    for option, message in (
        ("--imagesize", "did you mean --image-size?"),
        ("--frob", "the options are --image-size, --max"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["make-dataset", "out", option, "3"])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_an_option_before_the_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--seed", "train"])
    assert end.value.code == 2 and "--seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("info", "demo", "optim.lrr=1"),
        ("check-data", "demo", "data.rot=x"),
        ("predict", "nowhere", "images"),
        ("export", "nowhere", "--out", "a.onnx"),
        ("train", "demo", "data.rot=x"),
    ],
)
def test_what_is_wrong_with_the_words_is_said_before_torch_is_imported(words, tmp_path):
    """Importing torch takes seconds."""
    code = f"import sys; from brs_detr.cli import main; print(main({list(words)!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"], done.stderr
