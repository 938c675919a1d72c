"""What a dry run computes, beside what a real step on the CPU takes."""

import dataclasses
import json

import pytest
import torch
from fakes import small_encoders, tiny_config, tiny_dataset, write_prepared
from transformers import AutoModelForImageTextToText, LlamaConfig, SmolVLMConfig

from benchmarks import shapes
from pixrec import cli
from pixrec.artifact import new_model, planned_model
from pixrec.model.catalog import Catalog
from pixrec.training.dry_run import LiveTensors, collator_batch, dry_run, plan_memory, step_memory, table
from pixrec.training.phases import begin
from pixrec.training.reading import Collator, Reader
from pixrec.training.windows import ShiftedWindows

WITHIN = 0.15


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("dry") / "data", tiny_dataset(num_events=8))


def measured_beside_computed(config, texts, dataset):
    """Bytes of a real step on the CPU, followed tensor by tensor, and what the plan says."""
    model, plan = new_model(config, texts), planned_model(config, texts)
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    collator = Collator(Catalog(dataset.items, model.encoder), dataset.training_counts(), config, 8)
    batch, _ = collator_batch(Reader(source, collator).read(0, 0, 1).passes[0], collator, None)
    computed = plan_memory(plan.tower, batch, config)
    for parameter, shape in zip(model.tower.parameters(), plan.tower.parameters(), strict=True):
        parameter.requires_grad_(shape.requires_grad)
    return step_memory(model.tower, batch, config), computed, model


def texts_of(dataset):
    return [dataset.items.text(row) for row in range(len(dataset.items))]


@pytest.mark.parametrize(
    "model",
    [{}, {"freeze_vision": True}, {"lora": {"enabled": True}}],
    ids=["full", "frozen vision", "lora"],
)
def test_memory_of_a_step_is_what_a_real_one_takes(dataset, model):
    config = tiny_config(model={"user_tower": "interleaved", "tiny": {"hidden_width": 96, "num_layers": 2}, **model})
    (kept, most), computed, real = measured_beside_computed(config, texts_of(dataset), dataset)
    assert computed["weights"] == sum(p.numel() * 4 for p in real.tower.parameters())
    assert computed["activations"] == pytest.approx(kept, rel=WITHIN)
    trained = sum(p.numel() for p in real.tower.parameters() if p.requires_grad)
    assert (computed["gradients"], computed["optimizer"]) == (4 * trained, 8 * trained)
    total = computed["total"] - computed["weights"] - computed["optimizer"]
    assert total == pytest.approx(max(most, 4 * trained), rel=WITHIN)


def test_memory_of_a_larger_smolvlm_shape(dataset, tmp_path):
    """Loaded from a folder, wider and with more tokens a picture."""
    texts = texts_of(dataset)
    tokenizer = new_model(tiny_config(), texts).encoder.tokenizer
    known = tokenizer.get_vocab()
    text = LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, pad_token_id=known["<pad>"],
    )  # fmt: skip
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": 128, "patch_size": 16}  # fmt: skip
    whole = SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=known["<image>"], scale_factor=2)
    AutoModelForImageTextToText.from_config(whole).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = tiny_config(model={"user_tower": "interleaved", "backbone": str(tmp_path)})
    (kept, most), computed, real = measured_beside_computed(config, texts, dataset)
    assert computed["activations"] == pytest.approx(kept, rel=WITHIN)
    weights = sum(p.numel() * 4 for p in real.tower.parameters())
    assert computed["total"] == pytest.approx(3 * weights + most, rel=WITHIN)


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen3-vl-2b"])
def test_memory_of_a_qwen_which_takes_pictures_of_any_shape(dataset, tmp_path, name):
    texts = texts_of(dataset)
    tokenizer = shapes.small_tokenizer(texts)
    AutoModelForImageTextToText.from_config(shapes.shape(name, tokenizer.get_vocab(), small=True)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    config = tiny_config(model={"user_tower": "interleaved", "backbone": str(tmp_path), "max_pixels": 64**2})
    (kept, _), computed, real = measured_beside_computed(config, texts, dataset)
    assert computed["activations"] == pytest.approx(kept, rel=WITHIN)
    assert computed["weights"] == sum(p.numel() * 4 for p in real.tower.parameters())


def test_live_tensors_counts_a_storage_once_and_lets_it_go():
    with LiveTensors() as live:
        first = torch.zeros(1000)
        view, other = first.view(10, 100), first + 1
        assert live.bytes == 8000
        del other
        assert (live.bytes, live.most_bytes) == (4000, 8000)
        del first
        assert live.bytes == 4000, "its view lives"
        del view
        assert live.bytes == 0


def test_what_is_said_follows_from_the_settings(dataset):
    config = tiny_config(train={"epochs": 2})
    found = dry_run([dataset.uri], config, tokens_per_second=100.0)
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    assert found["steps"] == source.total_steps()
    assert found["parameters"]["trained"] == found["parameters"]["total"]
    assert found["seconds"] == pytest.approx(found["steps"] * found["tokens_per_step_per_worker"] / 100, rel=0.05)
    train = dataclasses.replace(config.train, micro_batch_histories=1)
    few = dry_run([dataset.uri], dataclasses.replace(config, train=train))
    assert few["seconds"] is None
    assert few["memory_per_gpu_bytes"]["activations"] < found["memory_per_gpu_bytes"]["activations"]
    assert few["tokens_per_step_per_worker"] == found["tokens_per_step_per_worker"]


def test_the_command_plans_and_stops(dataset, tmp_path, capsys):
    out = tmp_path / "model"
    settings = ["--set", "model.tiny.num_layers=1", "--set", "model.tiny.hidden_width=32"]
    code = cli.main(["train", "--data", dataset.uri, "--out", str(out), "--dry-run", *settings])
    said = capsys.readouterr()
    assert code == 0, said.err
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["dry_run"] is True
    assert summary["memory_per_gpu_bytes"]["total"] > 0
    assert "memory a GPU" in said.err
    assert not out.exists()


@pytest.mark.parametrize("lora", [False, True])
def test_of_encoders_the_plan_counts_what_learns_and_the_steps_of_both_phases(dataset, tmp_path, lora):
    settings = {**small_encoders(tmp_path), "lora": {"enabled": lora}}
    joint = {"epochs": 2 if lora else 0}
    config = tiny_config(model=settings, train={"compact": {"epochs": 3, "histories_per_step": 4}, "joint": joint})
    found = dry_run([dataset.uri], config)
    compact = begin("compact", [dataset.uri], config, "cpu")
    assert found["steps"] == {"compact": compact.trainer.total_steps, "joint": joint["epochs"] * 3}
    learned = sum(parameter.numel() for parameter in compact.trainer.named.values())
    of_encoders = 16 * 8 * (32 + 32) if lora else 0  # 2 layers of 4 matrices in each encoder, rank 8
    assert found["parameters"]["of_encoders"] == of_encoders
    assert found["parameters"]["trained"] == learned + of_encoders
    assert found["parameters"]["total"] > learned + of_encoders
    assert f"{of_encoders:,} of them in the encoders" in table(found)[1]
    json.dumps(found)
