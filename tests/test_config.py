"""Recipes: what is written is what runs, and what cannot run is refused with a sentence that helps."""

from pathlib import Path

import pytest
import yaml

from brs_detr.api import as_words
from brs_detr.commands.arguments import dataset_setting
from brs_detr.config import (
    Config,
    ConfigError,
    apply_overrides,
    check_overrides,
    differences,
    dump,
    from_dict,
    load_config,
    option_as_setting,
    to_dict,
)
from brs_detr.config_aliases import ALIASES
from brs_detr.config_io import setting_names

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("cnn/*.yaml")])


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_starts_with_its_launch_command(path):
    load_config(path)
    first = path.read_text().splitlines()[0]
    # `accelerate launch` computes on one thread unless `--num_cpu_threads_per_process` says more
    on_cpu = path.stem.endswith(("demo", "_cpu")) or (path.parent.name == "cnn" and path.stem.endswith("_small"))
    launcher = "python" if on_cpu else "accelerate launch"
    assert first.startswith(f"# {launcher} train.py configs/{path.relative_to(CONFIGS).as_posix()}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dumped_config_reads_back_equal(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path / "dumped.yaml", dump(config))) == config
    assert from_dict(to_dict(config), "x") == config


def test_the_paper_recipe_has_the_published_numbers():
    config = load_config(CONFIGS / "brs_detr_r50_12e_coco.yaml")
    model, optim, train = config.model, config.optim, config.train
    assert (model.queries, model.encoder_layers, model.decoder_layers, model.dim, model.heads) == (300, 6, 6, 256, 8)
    assert (optim.lr, optim.weight_decay, optim.clip_norm, optim.backbone_lr_factor) == (2e-4, 1e-4, 0.1, 0.1)
    assert (train.epochs, train.lr_steps, train.lr_gamma, train.total_batch_size) == (12, (10, 11), 0.2, 16)
    assert (model.matcher.cls, model.matcher.l1, model.matcher.giou) == (4, 5, 2)
    assert model.rpn.sample is None and model.roi.sample is None and not model.atss.centerness


def test_the_twins_differ_only_in_what_the_paper_changed():
    """The backbone twins share everything but loss, costs, sampling, centerness, schedule and names."""
    changed = (
        "model.name",
        "model.objective.",
        "model.matcher",
        "model.rpn.",
        "model.roi.",
        "model.atss.",
        "train.lr_",
        "output",
    )
    for size in ("r50", "swin_t", "swin_l"):
        pair = [load_config(CONFIGS / f"{name}_{size}_12e_coco.yaml") for name in ("brs_detr", "co_detr")]
        for difference in differences(*pair):
            assert difference.startswith(changed), difference


def test_a_recipe_overrides_its_base_and_the_command_line_both(tmp_path):
    write(tmp_path / "base.yaml", "optim: {lr: 0.5, weight_decay: 0.25}\nmodel: {queries: 7}\n")
    recipe = write(tmp_path / "recipe.yaml", "base: base.yaml\noptim: {lr: 0.125}\n")
    config = load_config(recipe, ["model.queries=9"])
    assert (config.optim.lr, config.optim.weight_decay, config.model.queries) == (0.125, 0.25, 9)


def test_a_base_has_no_base(tmp_path):
    write(tmp_path / "a.yaml", "seed: 1")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml: a base may not have a base"):
        load_config(write(tmp_path / "c.yaml", "base: b.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.backbone.nmae=x",
            "command line: model.backbone.nmae is not a setting; did you mean model.backbone.name?",
        ),
        ("model.problems.x=1", "model.problems.x is not a setting"),
        ("model.SHARED_SECTION=1", "model.SHARED_SECTION is not a setting"),
        ("lr=1", "lr is not a setting; did you mean optim.lr"),
        ("model.epochs=1", "did you mean train.epochs"),
        ("optim.lr=fast", "optim.lr must be a number, not 'fast'"),
        ("optim.lr=nan", "optim.lr must be a number"),
        ("optim.betas=[0.9]", "optim.betas must be a list of 2 numbers"),
        ("train.epochs=1.5", "train.epochs must be an integer"),
        ("train.epochs=true", "train.epochs must be an integer"),
        ("train.epochs=1_000", "train.epochs must be an integer, not '1_000'"),
        ("train.epochs=0x10", "train.epochs must be an integer, not '0x10'"),
        (f"seed={'1' * 5000}", "seed must be an integer"),
        ("output_dir=[a]", "output_dir must be a string, not ['a']"),
        ("data={root: [a]}", "data.root must be a string, not ['a']"),
        ("train.epochs=0", "train.epochs=0 must be at least 1"),
        ("train.epochs=", "train.epochs must be an integer"),
        ("optim.lr=-1", "optim.lr=-1.0 must be at least 0"),
        ("model.loss=bsr", "did you mean brs"),
        ("model.backbone=resnet50", "model.backbone is a section"),
        ("model.backbone.pretrained=1", "must be true or false"),
        ("data.augment.flip=2", "must lie between 0 and 1"),
        ("data.augment.short_sides=[]", "needs at least one entry"),
        ("model.heads=7", "model.dim=256 must be a multiple of model.heads=7"),
        ("model.atss.centerness=true", "needs model.atss.objective.loss=focal"),
        ("model.name=co_dter", "did you mean co_detr?"),
        ("model.loss=cross_entropy", "model.rpn.objective.loss=cross_entropy needs a background class"),
        ("model.ranking_weights.decoder=1", "each head has an objective of its own"),
        ("model.score_weights.rpn.cls=1", "each head has an objective of its own"),
        ("model.ranking_delta=1", "did you mean model.objective.delta?"),
        ("model.ranking_scope=global", "did you mean model.objective.scope?"),
        ("train.lr_steps=[12]", "must lie before the end"),
        ("train.lr_steps=[3, 2]", "must increase"),
        ("train.ema_decay=1.0", "must be below 1"),
        ("optim.betas=[0.9, 1.0]", "optim.betas=[0.9, 1.0] must be below 1"),
        ("optim.clip_norm=0", "must be above 0, or null: no clipping"),
        ("model.max_aux_queries=0", "must be at least 1"),
        ("model.rpn.scales_per_octave=0", "must be at least 1"),
        ("model.rpn.anchor_ratios=[]", "needs at least one entry"),
        ("model.rpn.anchor_ratios=[1.0, 0]", "must be above 0"),
        ("model.rpn.sample=0", "must be at least 1, or null: all"),
        ("model.roi.sample=0", "must be at least 1, or null: all"),
        ("model.roi.max_rois=0", "must be at least 1, or null: no limit"),
        ("eval.predict_with=atts", "did you mean atss?"),
        ("eval.nms=hard", "e.g. eval.nms.kind=hard"),
        ("eval.nms.kind=sotf", "did you mean soft?"),
        ("eval.nms.iou=0.5", "eval.nms.iou is not a setting of eval.nms.kind=none; it is one of soft, hard"),
        ("epochs", "not of the form"),
        ("epochs", "write train.epochs=VALUE"),
        ("train.batch_size=4", "did you mean train.total_batch_size?"),
        ("batch_size=4", "did you mean train.total_batch_size?"),
        ("eval.batchsize=4", "did you mean eval.batch_size?"),
        ("train.lr=1", "did you mean optim.lr?"),
        ("optimizer.lr=1", "optimizer.lr is not a setting; did you mean optim.lr?"),
        ("solver.base_lr=1", "did you mean optim.lr?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("modle.backbone.name=x", "did you mean model.backbone.name?"),
        ("model.num_classes=3", "not a setting: the classes are read from `categories` of data.train_json"),
        ("data.classes=[a]", "not a setting: the classes are read from `categories` of data.train_json"),
        ("train.gpus=2", "use `accelerate launch --num_processes N`"),
        ("data.num_workers=2", "did you mean data.workers?"),
        ("model.backbone=resnet50", "e.g. model.backbone.name=resnet50"),
        ("optim=sgd", "the optimizer is optim.name, adamw or sgd"),
    ],
)
def test_an_impossible_override_is_refused_with_what_to_write_instead(override, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides(Config(), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("co_detr_r50_12e_coco", "model.objective.weights.l1=0 model.objective.weights.giou=0", "untrained; set it"),
        ("co_detr_r50_12e_coco", "model.objective.normalizer=rows", "set it to positives"),
        ("co_detr_r50_12e_coco", "model.atss.objective.weights.centerness=0", "weights.centerness=0 leaves a part"),
        ("co_detr_r50_12e_coco", "model.atss.objective.normalizer=rows", "model.atss.objective.normalizer=rows is of"),
        ("brs_detr_r50_12e_coco", "model.objective.loss=alrp model.objective.balance=epoch", "balance=value"),
        ("cnn/atss_demo", "model.loss=focal model.head.centerness=true", "weights.centerness=0 leaves a part"),
        ("cnn/atss_demo", "model.loss=focal model.head.objective.weights.giou=0", "weights.giou=0 leaves a part"),
        ("cnn/paa_demo", "model.loss=focal model.head.objective.weights.giou=0", "weights.giou=0 leaves a part"),
        ("cnn/paa_demo", "model.loss=focal model.head.objective.normalizer=rows", "set it to positives"),
        ("cnn/paa_demo", "model.head.iou_branch=true model.head.iou_weight=0", "iou_weight=0 leaves the IoU branch"),
        ("cnn/foveabox_demo", "model.loss=cross_entropy", "needs a background class"),
        ("cnn/foveabox_demo", "model.head.object_sizes=[4,6]", r"object_sizes=\[4.0, 6.0\] leaves objects"),
        ("cnn/solov2_small", "model.head.object_sizes=[8,2]", r"object_sizes=\[8.0, 2.0\] leaves objects"),
        ("cnn/retinanet_demo", "model.head.positive_iou=0.3", r"negative_iou=0.4 is above .*positive_iou=0.3; lower"),
        ("cnn/yolact_small", "model.head.positive_iou=0.3", r"negative_iou=0.4 is above .*positive_iou=0.3; lower"),
        ("cnn/retinanet_demo", "model.loss=focal model.head.objective.gamma=0.5", "gamma=0.5: its loss has no"),
        ("demo", "model.encoder_layers=0", "model.encoder_layers=0 must be at least 1"),
    ],
)
def test_settings_that_train_a_part_of_a_head_by_nothing_are_refused(recipe, overrides, message):
    config = load_config(CONFIGS / f"{recipe}.yaml")
    with pytest.raises(ConfigError, match=message):
        apply_overrides(config, overrides.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {backbone: {nmae: x}}", "bad.yaml: model.backbone.nmae is not a setting"),
        ("model: [1]", "bad.yaml: model is a section"),
        ("seed: 1\nseed: 2", "seed is written twice"),
        ("a: {b", "bad.yaml: not valid YAML"),
        ("- 1", "bad.yaml: a recipe is a list of"),
        ("model: {num_classes: 3}", "bad.yaml: model.num_classes is not a setting: the classes are read"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_name(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path / "bad.yaml", text))
    assert message in str(error.value)


def test_a_missing_recipe_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: the recipe cannot be read"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("optim.lr=1e-4", "lr", 1e-4),
        ("optim.lr=1", "lr", 1.0),
        ("optim.clip_norm=null", "clip_norm", None),
        ("optim.betas=[0.5, 0.75]", "betas", (0.5, 0.75)),
    ],
)
def test_values_become_the_type_of_the_setting(override, name, value):
    assert getattr(apply_overrides(Config(), [override]).optim, name) == value


def test_no_is_a_word():
    """YAML 1.1 reads `no` as false; here it is the precision of that name."""
    assert apply_overrides(Config(), ["train.precision=no"]).train.precision == "no"


NAMES = ("007", "2024_01_15", "12:30", "0x1F", "+5", "1e3", "-0", "9" * 5000, "yes", "runs/日本 \U0001f600", "a\u00a0b")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_what_is_written(tmp_path, name):
    """YAML 1.1 takes 007 for 7, 12:30 for 750 and 2024_01_15 for 20240115, which are other folders."""
    assert apply_overrides(Config(), [f"output_dir={name}"]).output_dir == name
    assert apply_overrides(Config(), as_words({"output_dir": name})).output_dir == name
    config = load_config(write(tmp_path / "recipe.yaml", f"output_dir: {name}\ntrain: {{freeze: [{name}]}}"))
    assert (config.output_dir, config.train.freeze) == (name, (name,))
    assert load_config(write(tmp_path / "dumped.yaml", dump(config))) == config


@pytest.mark.parametrize(
    "name", ["/data/a #b", "#1", "a: b", "&a b", "'tis", "*", "%x", "/data/\udcff", "\U0001f600\udcff"]
)
def test_a_path_on_the_command_line_may_hold_what_yaml_reads_otherwise(tmp_path, name):
    for word in (f"data.root={name}", f"--data.root={name}", *as_words({"data.root": name})):
        config = apply_overrides(Config(), [word])
        assert config.data.root == name
    assert apply_overrides(Config(), [f"data={name}"]).data.source == name
    assert apply_overrides(Config(), [dataset_setting(Path(name))]).data.source == name
    assert load_config(write(tmp_path / "dumped.yaml", dump(config))) == config


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ('"a # b"', "a # b"),
        (" a ", "a"),
        ("true", "true"),
        ('"\\ud83d\\ude00"', "\U0001f600"),  # as JSON writes it
    ],
)
def test_null_and_quotes_mean_what_they_mean_in_yaml(written, value):
    assert apply_overrides(Config(), [f"train.init_from={written}"]).train.init_from == value
    if value is None:
        with pytest.raises(ConfigError, match="output_dir must be a string"):
            apply_overrides(Config(), [f"output_dir={written}"])


@pytest.mark.parametrize(("written", "value"), [("020", 20), ("+5", 5), ("'3'", 3), ("-0", 0)])
def test_an_integer_is_decimal(tmp_path, written, value):
    """In YAML 1.1, 020 is 16."""
    assert apply_overrides(Config(), [f"seed={written}"]).seed == value
    assert load_config(write(tmp_path / "recipe.yaml", f"seed: {written}")).seed == value


def test_the_home_of_paths_is_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    recipe = write(tmp_path / "recipe.yaml", "output_dir: ~/runs\nmodel: {backbone: {checkpoint: ~/b.pth}}")
    config = load_config(recipe, ["data.root=~u/d", "data.val_json='~/v'", "train.init_from=a~/x"])
    assert (config.output_dir, config.model.backbone.checkpoint) == ("/home/u/runs", "/home/u/b.pth")
    assert (config.data.root, config.data.val_json, config.train.init_from) == (
        "~u/d",
        "/home/u/v",
        "a~/x",
    )  # no user u
    assert apply_overrides(Config(output_dir="~/runs"), ["data=~/coco"]).data.source == "/home/u/coco"
    assert apply_overrides(Config(output_dir="~/runs"), []).output_dir == "/home/u/runs"


def test_a_config_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        Config().seed = 1


def test_the_number_of_classes_is_no_setting():
    assert "num_classes" not in yaml.safe_dump(to_dict(Config()))


def test_an_alias_leads_to_a_setting_and_is_not_a_setting():
    names = set(setting_names(Config()))
    for alias, target in ALIASES.items():
        assert alias not in names and (" " in target or target in names), alias
        if " " in target:
            assert target.endswith("."), alias
        else:
            section = any(name.startswith(f"{alias}.") for name in names)  # "model": a value for a section
            message = "is a section" if section else f"did you mean {target}?"
            with pytest.raises(ConfigError) as error:
                apply_overrides(Config(), [f"{alias}=1"])
            assert message in str(error.value) and target in str(error.value)


def test_an_option_with_the_full_name_of_a_setting_is_that_setting():
    assert option_as_setting("--data.root", "x y") == "data.root=x y"
    assert option_as_setting("--seed", "3") == "seed=3"
    assert option_as_setting("--output-dir", "runs/x") == "output_dir=runs/x"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "3", "--epochs 3: settings are written section.setting=value. Write train.epochs=3."),
        ("--lr", "1e-4", "Write optim.lr=1e-4."),
        ("--batch-size", "8", "Write train.total_batch_size=8."),
        ("--train.epochs", "", "Write train.epochs=VALUE."),
        ("--num-classes", "3", "--num-classes 3: the classes are read from"),
        ("--frobnicate", "3", "--frobnicate: neither an option nor near a setting."),
    ],
)
def test_another_option_is_refused_with_the_setting_that_was_meant(option, value, message):
    with pytest.raises(ConfigError) as error:
        option_as_setting(option, value)
    assert message in str(error.value)


def test_a_loss_given_once_is_that_of_every_head():
    model = apply_overrides(Config(), ["model.loss=ap", "model.scope=global", "model.rpn.objective.loss=rs"]).model
    objectives = [model.objective, model.rpn.objective, model.roi.objective, model.atss.objective]
    assert [objective.loss for objective in objectives] == ["ap", "rs", "ap", "ap"]
    assert {objective.scope for objective in objectives} == {"global"}
    assert [objective.weight for objective in objectives] == [2, 1, 5, 5]  # each head keeps its own


def test_score_based_losses_have_the_published_weights_of_their_head():
    """Co-DETR's: 2, 5, 2 in the decoder, twelvefold in dense heads; boxes ten times that beside a softmax only."""
    model = apply_overrides(Config(), ["model.loss=focal"]).model
    weights = [head.objective.weights for head in (model, model.roi, model.atss)]
    assert [(w.cls, w.l1, w.giou) for w in weights] == [(2, 5, 2), (12, 0, 24), (12, 0, 24)]
    published = apply_overrides(Config(), ["model.name=co_detr"]).model.roi.objective
    assert (published.loss, published.weights.cls, published.weights.giou) == ("cross_entropy", 12, 120)
    with pytest.raises(ConfigError, match="scope is not a setting"):
        apply_overrides(Config(), ["model.loss=focal", "model.scope=global"])


def test_a_loss_has_the_published_weights_of_that_loss_in_that_head():
    """Faster R-CNN's cross entropies are means over sampled rows, with offsets in the RPN; focal loss is neither."""
    for loss, normalizer, l1, giou in (("binary_cross_entropy", "rows", 12, 0), ("focal", "positives", 12, 24)):
        override = f"model.rpn.objective.loss={loss}"
        objective = apply_overrides(Config(), [override, "model.rpn.box_loss=l1"]).model.rpn.objective
        weights = objective.weights
        assert (objective.loss, objective.normalizer, weights.l1, weights.giou) == (loss, normalizer, l1, giou)
    assert (
        apply_overrides(Config(), ["model.roi.objective.loss=cross_entropy"]).model.roi.objective.normalizer == "rows"
    )


def test_a_setting_given_once_for_all_heads_may_be_one_of_the_loss_given_beside_it():
    for words in (["model.loss=focal", "model.weights.cls=3"], ["model.weights.cls=3", "model.loss=focal"]):
        model = apply_overrides(Config(), words).model
        assert {head.objective.weights.cls for head in (model, model.rpn, model.roi, model.atss)} == {3}
    with pytest.raises(ConfigError, match=r"model\.weights\.cls is not a setting"):
        apply_overrides(Config(), ["model.weights.cls=3"])


def test_another_detector_keeps_what_was_changed_and_both_have():
    config = apply_overrides(Config(), ["model.dim=64", "model.backbone.name=resnet10t", "model.rpn.proposals=7"])
    model = apply_overrides(config, ["model.queries=9", "model.name=co_detr"]).model
    assert (model.name, model.dim, model.queries, model.backbone.name) == ("co_detr", 64, 9, "resnet10t")
    assert (model.rpn.proposals, model.rpn.sample, model.objective.loss) == (7, 256, "focal")
    back = apply_overrides(Config(model=model), ["model.name=brs_detr"]).model
    assert (back.dim, back.queries, back.rpn.sample, back.objective.loss) == (64, 9, None, "brs")


def test_another_detector_keeps_what_is_null_by_default_or_became_null():
    for name in ("co_detr", "brs_dino", "co_dino"):
        model = apply_overrides(load_config("demo"), [f"model.name={name}"]).model
        assert (model.query_boxes, model.proposal_nms_iou) == ("rpn", 0.5)
    ssd = ["data.augment.name=ssd", "data.augment.custom=a:b"]
    config = apply_overrides(Config(), [*ssd, "model.rpn.sample=9", "model.roi.max_rois=5"])
    changed = apply_overrides(config, ["data.augment.name=detr", "model.name=co_detr"])
    assert (changed.data.augment.custom, changed.model.rpn.sample, changed.model.roi.max_rois) == ("a:b", 9, 5)
    all_rois = apply_overrides(Config(), ["model.name=co_detr", "model.roi.sample=null"])
    assert apply_overrides(all_rois, ["model.name=co_dino"]).model.roi.sample is None


def test_another_detector_keeps_a_backbone_that_was_chosen():
    """Also settings that are those of the former detector by default, but not of the new one."""
    for recipe in ("bccd_cpu", "brs_detr_small_cpu", "nuclei_cpu", "demo"):
        backbone = load_config(recipe).model.backbone
        for name in ("co_dino", "brs_dino", "co_detr"):
            assert load_config(recipe, [f"model.name={name}"]).model.backbone == backbone
    published = load_config("brs_detr_r50_12e_coco", ["model.name=co_dino"]).model
    assert (published.backbone.levels, published.levels) == ((4, 8, 16, 32), 5)


def test_another_detector_keeps_the_sizes_of_heads_that_both_have():
    """Faster R-CNN's RPN has other defaults than that beside a decoder; what a recipe changed is kept."""
    model = apply_overrides(load_config("demo"), ["model.name=faster_rcnn"]).model
    assert (model.rpn.proposals, model.rpn.anchor_scale, model.roi.fc_dim, model.dim) == (24, 2.0, 128, 64)
    assert (model.rpn.scales_per_octave, model.rpn.objective.weight, model.roi.add_ground_truth) == (1, 0.2, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=atss", "model.queries=5"], "is not a setting of model.name=atss; it is one of brs_detr, co_detr"),
        (["model.head.topk=3"], "is not a setting of model.name=brs_detr; it is one of retinanet"),
        (["model.objective.weights.cls=1"], "is not a setting of model.objective.loss=brs; it is one of focal"),
        (
            ["data.augment.name=ssd", "data.augment.short_sides=[3]"],
            "not a setting of data.augment.name=ssd; it is one of detr",
        ),
        (["data.augment.name=ssd", "data.augment.sze=3"], "did you mean data.augment.size?"),
        (["model.name=atss", "model.head.stacked_conv=3"], "did you mean model.head.stacked_convs?"),
    ],
)
def test_a_setting_of_another_alternative_is_refused_with_those_that_have_it(overrides, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides(Config(), overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.head.max_detections=50", "data=~/birds"],
        ["model={mask: {loss: dice}}"],
        ["model.denoising.queries=20"],
        ["model.roi.objective.alpha=0.3"],
        ["model.weights.cls=1"],
        ["eval.nms.min_score=0.1"],
        ["eval.nms.iou=0.7"],
    ],
)
def test_a_setting_that_some_detector_has_passes_until_the_file_says_which_it_is_of(overrides):
    check_overrides(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.head.max_detections=5", "model.head.max_detection=5"], "did you mean model.head.max_detections?"),
        (["model.head.max_detections=many"], "model.head.max_detections must be an integer"),
        (["model.head.objective={loss: focal, gamma: x}"], "model.head.objective.gamma must be a number"),
        (["model.head=5"], "model.head is a section"),
        (["eval.nms.kind=sfot"], "did you mean soft?"),
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["model=5"], "model is a section"),
        (["data=x", "data.root=y"], "data=x stands for all paths"),
        (["model.head"], "is not of the form section.setting=value"),
    ],
)
def test_a_setting_that_no_detector_has_is_refused_before_the_file_is_read(overrides, message):
    with pytest.raises(ConfigError) as error:
        check_overrides(overrides)
    assert message in str(error.value)


def test_the_order_of_overrides_that_choose_and_that_set_does_not_matter():
    pairs = ["model.name=co_detr", "model.rpn.objective.weights.cls=3", "model.rpn.sample=5"]
    assert apply_overrides(Config(), pairs) == apply_overrides(Config(), pairs[::-1])


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        (
            {"loss": "rs", "ranking_delta": 0.25, "ranking_scope": "global", "score_weighted": True},
            ["model.loss=rs", "model.delta=0.25", "model.scope=global", "model.score_weighted=true"],
        ),
        (
            {"name": "co_detr", "loss": "focal", "matcher": {"cls": 2.0}, "atss": {"centerness": True}}
            | {"rpn": {"sample": 256, "proposals": 1000}, "roi": {"sample": 512, "add_ground_truth": True}},
            ["model.name=co_detr"],
        ),
    ],
)
def test_settings_stored_before_heads_had_objectives_mean_what_they_meant(stored, now):
    weights = {"ranking_weights": {"decoder": 2.0, "rpn": 1.0, "roi": 5.0, "atss": 5.0}}
    none = {"cls": 0.0, "l1": 0.0, "giou": 0.0, "centerness": 0.0}
    weights["score_weights"] = {
        "decoder": none | {"cls": 2.0, "l1": 5.0, "giou": 2.0},
        "rpn": none | {"cls": 12.0, "l1": 12.0},
        "roi": none | {"cls": 12.0, "giou": 120.0},
        "atss": none | {"cls": 12.0, "giou": 24.0, "centerness": 12.0},
    }
    assert from_dict({"model": stored | weights}, "old.safetensors") == apply_overrides(Config(), now)


def test_stored_weights_of_the_ranking_are_those_of_their_heads():
    ranking = {"decoder": 3.0, "rpn": 0.5, "roi": 7.0, "atss": 0.0}
    model = from_dict({"model": {"loss": "bap", "ranking_weights": ranking, "score_weights": {}}}, "old").model
    heads = {"decoder": model, "rpn": model.rpn, "roi": model.roi, "atss": model.atss}
    assert {name: head.objective.weight for name, head in heads.items()} == ranking
    assert {head.objective.loss for head in heads.values()} == {"bap"}


def test_a_stored_rpn_with_a_score_based_loss_learned_offsets():
    """So it did whatever the detector's name was; the boxes of a ranked RPN are decoded, and trained with GIoU."""
    weights = {"cls": 12.0, "l1": 12.0, "giou": 24.0, "centerness": 0.0}
    stored = {"ranking_weights": {}, "score_weights": dict.fromkeys(("decoder", "rpn", "roi", "atss"), weights)}
    model = from_dict({"model": {"name": "brs_detr", "loss": "focal"} | stored}, "old.safetensors").model
    assert (model.rpn.box_loss, model.rpn.objective.loss) == ("l1", "binary_cross_entropy")
    assert model.objective.loss == model.atss.objective.loss == "focal"
