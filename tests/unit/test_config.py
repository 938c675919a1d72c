from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pixrec import config as config_module
from pixrec.config import Config, PrepareConfig, StageConfig, TrainConfig, dump_config, load_config, to_dict
from pixrec.errors import ConfigError


def leaves(node: Any, where: str = "") -> dict[str, Any]:
    """Every key of the tree as `section.key`, with its value."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        inner = leaves(value, f"{where}{f.name}.") if dataclasses.is_dataclass(value) else {f"{where}{f.name}": value}
        found.update(inner)
    return found


def test_keys_that_others_rely_on():
    relied_on = {
        "prepare.min_user_events",
        "prepare.min_item_events",
        "train.learning_rate",
        "train.num_workers",
        "train.epochs",
        "serve.api_key",
    }
    assert relied_on <= set(leaves(Config()))


def test_every_field_says_what_it_means():
    modules = [ast.parse(file.read_text()) for file in Path(config_module.__file__).parent.glob("*.py")]
    classes = [node for tree in modules for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {"TrainConfig", "StageConfig", "ServeConfig"} <= {cls.name for cls in classes}
    for cls in classes:
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).endswith("Config"):
                continue
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert told, f"{cls.name}.{ast.unparse(field.target)}"
            assert str(after.value.value).endswith("."), f"{cls.name}.{ast.unparse(field.target)}"


def test_the_tree_is_frozen_and_made_by_keyword():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        PrepareConfig(3)  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "# nothing\n", "train: {}\n", "---\n"])
def test_nothing_said_means_the_defaults(text: str):
    assert load_config(text) == Config()


def test_settings_that_need_each_other_may_come_in_any_order():
    pair = ["model.user_tower=compact", "model.image_encoder=b", "model.text_encoder=a"]
    model = load_config("", pair).model
    assert (model.text_encoder, model.image_encoder) == ("a", "b")
    alone = ["model={text_encoder: null, modalities: image}", "model.image_encoder="]
    assert load_config("", alone, base=load_config("", pair)).model.image_encoder is None


def test_a_file_then_the_overrides_in_order():
    text = "train:\n  epochs: 33\n  seed: 55\nmodel:\n  tiny:\n    num_layers: 9\n"
    made = load_config(text, ["train.epochs=77", "train.epochs=88", "model.lora.enabled=true"])
    assert (made.train.epochs, made.train.seed) == (88, 55)
    assert made.model.tiny.num_layers == 9
    assert made.model.lora.enabled is True
    changed = {key for key, value in leaves(made).items() if value != leaves(Config())[key]}
    assert changed == {"train.epochs", "train.seed", "model.tiny.num_layers", "model.lora.enabled"}


def test_a_base_supplies_what_is_not_named():
    base = load_config("train: {epochs: 3, seed: 4}")
    made = load_config("train: {seed: 5}", ["train.max_steps=6"], base=base)
    assert (made.train.epochs, made.train.seed, made.train.max_steps) == (3, 5, 6)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),  # YAML itself calls this text
        ("train.learning_rate=0.5", 0.5),
        ("train.learning_rate=1", 1.0),
        ("train.max_steps=null", None),
        ("train.max_steps=", None),
        ("train.max_steps=20", 20),
        ("train.use_gpu=true", True),
        ("train.knockouts=[text, image]", ("text", "image")),
        ("train.knockouts=[]", ()),
        ("evaluate.ks=[1, 10]", (1, 10)),
        ("prepare.split=temporal", "temporal"),
        ("serve.api_key=s3cr3t=", "s3cr3t="),
        ("serve.api_key=1234", "1234"),
        (" train.epochs = 4", 4),
        ("model.backbone=@odd", "@odd"),  # no YAML, so it stands for itself
    ],
)
def test_override_values(override: str, value: Any):
    made = leaves(load_config("", [override]))[override.split("=")[0].strip()]
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", "unknown config key 'train.learning_rat'; did you mean 'train.learning_rate'?"),
        ("learning_rate: 1", "unknown config key 'learning_rate'; did you mean 'train.learning_rate'?"),
        ("traim: {epochs: 1}", "unknown config key 'traim'; did you mean 'train'?"),
        ("train: {rank: 1}", "unknown config key 'train.rank'; did you mean 'model.lora.rank'?"),
        ("colour: 1", "unknown config key 'colour'; known here: prepare, model, train, "),
        ("model: {tiny: {layers: 1}}", "unknown config key 'model.tiny.layers'; did you mean 'model.tiny.num_layers'?"),
        ("train: {1: 2}", "unknown config key 'train.1'; known here: learning_rate, "),
        ("train: 3", "config key 'train' is a section; give its keys, not 3"),
        ("train: null", "config key 'train' is a section; give its keys, not None"),
        ("train: [1]", "config key 'train' is a section"),
        ("[1, 2]", "must hold a mapping of sections, not list"),
        ("hello", "must hold a mapping of sections, not str"),
        ("train: {epochs: [", "not valid YAML"),
        ("train: {epochs: many}", "config key 'train.epochs' is 'many': must be of type int"),
        ("train: {epochs: 1.5}", "config key 'train.epochs' is 1.5: must be of type int"),
        ("train: {epochs: true}", "config key 'train.epochs' is True: must be of type int"),
        ("train: {epochs: null}", "config key 'train.epochs' is None: must be of type int"),
        ("train: {max_steps: few}", "config key 'train.max_steps' is 'few': must be of type int"),
        ("train: {learning_rate: fast}", "config key 'train.learning_rate' is 'fast': must be a number"),
        ("train: {beta: .nan}", "config key 'train.beta' is nan: must be a number"),
        ("train: {use_gpu: 1}", "config key 'train.use_gpu' is 1: must be of type bool"),
        ("evaluate: {ks: 10}", r"config key 'evaluate.ks' is 10: must be a list, such as \[a, b\]"),
        ("evaluate: {ks: [one]}", "config key 'evaluate.ks' is 'one': must be of type int"),
        ("prepare: {split: random}", "'prepare.split' is 'random': must be one of leave_one_out, temporal"),
        ("train: {knockouts: [both]}", "'train.knockouts' is 'both': must be one of text, image"),
        ("model: {backbone: [a]}", r"config key 'model.backbone' is \['a'\]: must be of type str"),
        ("train: {stages: {name: a}}", r"config key 'train.stages' is \{'name': 'a'\}: must be a list"),
        ("train: {stages: [a]}", r"config key 'train.stages\[0\]' is a section; give its keys, not 'a'"),
        (
            "train: {stages: [{name: a}, {name: b, learning_rat: 1}]}",
            r"unknown config key 'train.stages\[1\].learning_rat'; did you mean 'train.stages\[1\].learning_rate'\?",
        ),
        ("train: {stages: [{rank: 1}]}", r"'train.stages\[0\].rank'; did you mean 'model.lora.rank'\?"),
        ("train: {stages: [{colour: 1}]}", r"'train.stages\[0\].colour'; known here: name, data, epochs, "),
        ("train: {stages: [{name: a, epochs: few}]}", r"'train.stages\[0\].epochs' is 'few': must be of type int"),
        ("train: {stages: [{name: a, data: b}]}", r"'train.stages\[0\].data' is 'b': must be a list"),
    ],
)
def test_what_the_file_may_not_say(text: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("override", ["train.epochs", "=3", " =3"])
def test_an_override_has_a_key_and_a_value(override: str):
    with pytest.raises(ConfigError, match=r"must look like section\.key=value"):
        load_config("", [override])


@pytest.mark.parametrize("override", ["train=3", "train..epochs=3", "train.epochs.more=3", "epoch=3"])
def test_an_override_names_a_key_of_a_section(override: str):
    with pytest.raises(ConfigError, match=override.split("=")[0].split(".")[0]):
        load_config("", [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prepare.min_user_events=0"], "prepare.min_user_events is 0: must be at least 1"),
        (["prepare.num_cpus_per_task=-1"], "prepare.num_cpus_per_task is -1.0: must be at least 0"),
        (["prepare.temporal_test_fraction=1"], "prepare.temporal_test_fraction is 1.0: must lie between 0 and 1"),
        (["prepare.temporal_valid_fraction=0.5", "prepare.temporal_test_fraction=0.5"], "leave no training period"),
        (["model.tiny.num_layers=0"], "model.tiny.num_layers is 0: must be at least 1"),
        (["model.tiny.num_heads=50"], r"must be a multiple of 100 \(twice model.tiny.num_heads\)"),
        (["model.tiny.vision_width=30"], "model.tiny.vision_width is 30: must be a multiple of 4"),
        (["model.tiny.image_size_px=49"], r"model.tiny.image_size_px is 49: must be a multiple of \d+ \(twice "),
        (["model.lora.rank=0"], "model.lora.rank is 0: must be at least 1"),
        (["model.lora.targets=[]"], "model.lora.targets is empty"),
        (["model.lora.targets=some"], "model.lora.targets' is 'some': must be one of language, vision, all"),
        (
            ["model.lora.enabled=true", "model.lora.targets=vision", "model.freeze_vision=true"],
            "model.lora.targets vision leaves nothing to learn",
        ),
        (["model.revision=v1"], "model.revision 'v1' pins a pretrained model.backbone"),
        (["model.attn_implementation=flash_attention_2"], "flash_attention_2 needs model.dtype bf16"),
        (
            ["model.compact.heads=7"],
            r"model.embedding_width is \d+: must be a multiple of 14 \(twice model.compact.heads",
        ),
        (["model.compact.width=6"], r"model.compact.width is 6: must be a multiple of 4 \(twice model.compact.heads\)"),
        (
            ["sasrec.width=3", "sasrec.tower.heads=2"],
            r"sasrec.width is 3: must be a multiple of 2 \(sasrec.tower.heads",
        ),
        (["sasrec.tower.width=64"], "sasrec.tower.width is 64: leave it out and set sasrec.width"),
        (["model.compact.dropout=1.5"], "model.compact.dropout is 1.5: must be between 0 and 1"),
        (["sasrec.training.epochs=0"], "sasrec.training.epochs is 0: must be at least 1"),
        (["train.learning_rate=0"], "train.learning_rate is 0.0: must be above 0"),
        (["train.temperature=-1"], "train.temperature is -1.0: must be above 0"),
        (["train.max_steps=0"], "train.max_steps is 0: must be at least 1"),
        (["train.num_workers=-1"], "train.num_workers is -1: must be at least 0"),
        (["train.beta=0.8", "train.alpha=0.3"], "train.alpha 0.3 and train.beta 0.8 must leave L_NIG a weight"),
        (["train.histories_per_step=2", "train.num_workers=3"], "2 leaves some of train.num_workers 3"),
        (["train.histories_per_step=1", "train.num_workers=1"], "leaves one history to contrast at a time"),
        (["train.negatives=local", "train.histories_per_step=3"], "leaves one history to contrast at a time"),
        (["train.gradient_accumulation=16"], "leaves one history to contrast at a time"),
        (["train.max_workers=1"], "train.max_workers 1 is below train.num_workers 2"),
        (["train.max_workers=32"], "16 leaves some of train.num_workers 32 without a history"),
        (["train.micro_batch_histories=0"], "train.micro_batch_histories is 0: must be at least 1"),
        (["train.trackers=[comet]"], "must be one of mlflow, wandb"),
        (["model.lora.connector=true"], "model.lora.connector trains .*set model.lora.enabled to true"),
        (
            ["model.lora.enabled=true", "model.lora.connector=true", "model.freeze_vision=true"],
            "model.lora.connector .*model.freeze_vision, which freezes the connector too, to false",
        ),
        (
            ["model={text_encoder: t, image_encoder: i, user_tower: compact, lora: {enabled: true, connector: true}}"],
            "model.text_encoder has no connector",
        ),
        (["model.lora.base=nf4"], "model.lora.base nf4 needs model.lora.enabled and a pretrained"),
        (["train.modality_dropout=0.6"], "train.modality_dropout is 0.6: must be between 0 and 0.5"),
        (["train.stages=[{epochs: 1}]"], "train.stages: the name '' of a stage must be of a-z"),
        (["train.stages=[{name: ../up}]"], "train.stages: the name '../up' of a stage must be of a-z"),
        (["train.stages=[{name: compact}]"], "train.stages: compact is what the log calls"),
        (["train.stages=[{name: a}, {name: b}, {name: a}]"], "train.stages has several of one name among a, b, a"),
        (
            ["train.stages=[{name: a, data: [x, x/]}]"],
            r"train.stages a: data is \['x', 'x/'\]: name each data set once",
        ),
        (["train.stages=[{name: a, data: ['']}]"], "train.stages a: data is .*: name each data set once"),
        (["train.stages=[{name: a, epochs: 0}]"], "train.stages a: train.epochs is 0: must be at least 1"),
        (["train.stages=[{name: a, alpha: 0.5}]"], "train.stages a: train.alpha 0.5 and train.beta 0.9 must leave"),
        (["train.alpha=0", "train.stages=[{name: a, beta: 2}]"], "train.stages a: train.alpha 0.0 and train.beta 2.0"),
        (["train.stages=[{name: a, histories_per_step: 1}]"], "train.stages a: .*one history to contrast at a time"),
        (["embed.batch_size=0"], "embed.batch_size is 0: must be at least 1"),
        (["evaluate.ks=[0, 10]"], r"evaluate.ks is \[0, 10\]: every cut-off must be at least 1"),
        (["serve.max_replicas=1", "serve.min_replicas=2"], r"serve.max_replicas 1 is below serve.min_replicas 2"),
        (["serve.api_keys=[a, '']"], r"serve.api_keys holds an empty key"),
        (["serve.requests_per_second=0"], r"serve.requests_per_second is 0.0: must be above 0"),
        (["serve.max_batch_size=9999"], r"serve.max_ongoing_requests \d+ is below serve.max_batch_size 9999"),
        (["demo.min_events=99"], r"demo.max_events \d+ is below demo.min_events 99"),
        (["demo.num_items=0"], "demo.num_items is 0: must be at least 1"),
        (["serve.new_item_share=1.5"], "serve.new_item_share is 1.5: must be between 0 and 1"),
    ],
)
def test_values_that_cannot_work(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config("", overrides)


def test_dump_and_load_give_the_same_tree():
    overrides = ["train.knockouts=[text]", "train.max_steps=9", "model.lora.enabled=true", "train.learning_rate=1e-4"]
    made = load_config("", overrides)
    assert load_config(dump_config(made)) == made
    assert load_config(dump_config(Config())) == Config()


STAGES = """
train:
  learning_rate: 1e-3
  alpha: 0.1
  stages:
  - {name: joint, data: [books, s3://bucket/films], learning_rate: 1e-4, max_steps: 7}
  - {name: target_only, alpha: 0, beta: -0.5}
"""


def test_stages_are_a_list_of_sections():
    made = load_config(STAGES)
    joint, only = made.train.stages
    assert (joint.name, joint.data, joint.learning_rate) == ("joint", ("books", "s3://bucket/films"), 1e-4)
    assert (only.data, only.learning_rate, only.epochs) == ((), None, None)
    assert load_config(dump_config(made)) == made
    assert load_config("", ["train.stages=[]"], base=made) == load_config("train: {alpha: 0.1}")
    assert Config().train.stages == ()


def test_a_stage_changes_what_it_names_and_no_more():
    made = load_config(STAGES)
    joint, only = (made.train.of_stage(stage) for stage in made.train.stages)
    assert joint == load_config("train: {learning_rate: 1e-4, alpha: 0.1, max_steps: 7}").train
    assert only == load_config("train: {alpha: 0, beta: -0.5}").train
    settings = {f.name for f in dataclasses.fields(StageConfig)} - {"name", "data"}
    assert settings < {f.name for f in dataclasses.fields(TrainConfig)}


def test_a_secret_is_never_dumped():
    made = load_config("", ["serve.api_key=s3cr3t"])
    assert made.serve.api_key == "s3cr3t"
    assert "s3cr3t" not in dump_config(made)
    assert to_dict(made)["serve"]["api_key"] == "***"
    assert to_dict(made, redact=False)["serve"]["api_key"] == "s3cr3t"
    assert to_dict(Config())["serve"]["api_key"] is None
    several = load_config("", ["serve.api_keys=[s3cr3t, other]", "serve.admin_key=b055"])
    assert several.serve.keys == ("s3cr3t", "other")
    assert not {"s3cr3t", "other", "b055"} & set(dump_config(several).replace("'", "").split())
    assert load_config(dump_config(several)).serve.api_keys == ("***", "***")
