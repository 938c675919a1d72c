"""Checkpoints without Ray: every phase goes on from one as if nothing had happened; what is published of it."""

import importlib.util
import os

import pytest
import torch
import yaml
from fakes import tiny_config, tiny_dataset, tiny_model, write_model, write_prepared

from pixrec import storage
from pixrec.artifact import load_model
from pixrec.config import load_config
from pixrec.training.checkpoint import make_whole, publish, save_checkpoint
from pixrec.training.phases import begin

CONFIG = tiny_config(
    model={"user_tower": "compact", "compact": {"time_dropout": 0.0}},
    train={
        "compact": {"epochs": 2, "validate_every_epochs": 1, "histories_per_step": 4},
        "joint": {"epochs": 2, "fresh_items_per_step": 3},
    },
)


@pytest.fixture(autouse=True)
def made_here(tmp_path, monkeypatch):
    """Checkpoints are the caller's to remove."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(autouse=True)
def no_packed_weights(monkeypatch):
    """On a CPU with AVX512 bf16, bitsandbytes packs 4-bit weights to validate, and loses bits as it unpacks them."""
    if importlib.util.find_spec("bitsandbytes"):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


SHAPE = {"hidden_width": 128, "vision_width": 64}  # matrices that 4 bits are for
MODES = {
    "full": {},
    "lora": {"lora": {"enabled": True, "rank": 2}},
    "nf4": {"lora": {"enabled": True, "rank": 2, "base": "nf4"}},
    "bf16": {"dtype": "bf16"},
    "shards-bf16": {"dtype": "bf16"},
    "lora-bf16": {"dtype": "bf16", "lora": {"enabled": True, "rank": 2}},
    "connector-bf16": {"dtype": "bf16", "lora": {"enabled": True, "rank": 2, "connector": True}},
    "shards-connector": {"lora": {"enabled": True, "rank": 2, "connector": True}},
}


def config_of(mode, folder):
    """That of a mode, and of the model that its compact phase begins with; `folder` is for a pretrained backbone."""
    model = dict(MODES.get(mode, {}))
    if mode == "nf4":
        pytest.importorskip("bitsandbytes")
        whole = tiny_model(tiny_config(model={"tiny": SHAPE}))
        whole.tower.backbone.model.save_pretrained(folder)
        whole.encoder.tokenizer.save_pretrained(folder)
        model |= {"backbone": str(folder), "tiny": SHAPE}
    train = {"parallel": "fsdp2"} if mode.startswith("shards") else {}
    config = load_config(yaml.safe_dump({"model": model, "train": train}), base=CONFIG)
    return config, load_config(yaml.safe_dump({"model": {"user_tower": "interleaved"}}), base=config)


@pytest.mark.parametrize(
    ("phase", "mode"),
    [
        *[(phase, mode) for phase in ("interleaved", "compact", "joint") for mode in MODES if mode != "shards-bf16"],
        ("interleaved", "shards"),
        ("interleaved", "shards-bf16"),
    ],
)
def test_a_phase_goes_on_from_its_checkpoint_as_the_undisturbed_one(tmp_path, phase, mode):
    data = write_prepared(tmp_path / "data", tiny_dataset(num_events=7)).uri
    config, before = config_of(mode, tmp_path / "backbone")
    if phase != "interleaved":
        write_model(tmp_path / "start", tiny_model(before if phase == "compact" else config))

    def begun(checkpoint=None):
        start = None if phase == "interleaved" else str(tmp_path / "start")
        return begin(phase, [data], config, "cpu", start=start, vocabulary=[data], checkpoint=checkpoint)

    whole, model, held_out = begun()
    rows, kept = [], []
    for figures in whole.validations(held_out, rows.append):
        kept.append((save_checkpoint(whole, model, figures), len(rows), whole.watch.best))
    folder, at, best = kept[0]
    resumed, again, _ = begun(folder)
    assert resumed.watch.best == best
    assert resumed.position() == load_position(folder, resumed)
    more = []
    list(resumed.validations(held_out, more.append))
    assert more
    losses, expected = ([row["loss"] for row in of if "loss" in row] for of in (more, rows[at:]))
    exact = mode != "nf4"  # the threads of bitsandbytes' kernels add in any order
    assert losses == (expected if exact else pytest.approx(expected, rel=1e-5))
    for name, weight in model.tower.state_dict().items():
        found = again.tower.state_dict()[name]
        if exact:
            assert torch.equal(found, weight), name
        else:
            torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4)  # Adam turns rounding into steps


def load_position(folder, trainer):
    info = storage.read_json(storage.join(folder, "state.json"))
    return {name: info[name] for name in trainer.counters}


def test_what_is_published_is_a_model_and_nothing_that_training_goes_on_from(tmp_path):
    data = write_prepared(tmp_path / "data").uri
    trainer, model, _ = begin("interleaved", [data], CONFIG, "cpu", vocabulary=[data])
    trainer.train_step()
    folder = save_checkpoint(trainer, model, {"valid_ndcg@10": 0.5})
    publish(folder, str(tmp_path / "model"), {"data": data})
    assert not {"state.json", "optimizer.safetensors"} & set(os.listdir(tmp_path / "model"))
    assert {"state.json", "optimizer.safetensors"} <= set(os.listdir(folder))
    info = load_model(str(tmp_path / "model")).info
    assert (info["step"], info["metrics"], info["data"]) == (1, {"valid_ndcg@10": 0.5}, data)


@pytest.mark.parametrize("lora", [False, True])
def test_shards_become_the_model_that_a_whole_checkpoint_is(tmp_path, lora):
    data = write_prepared(tmp_path / "data").uri
    found = {}
    for parallel in ("ddp", "fsdp2"):
        config = tiny_config(model={"lora": {"enabled": lora}}, train={"parallel": parallel})
        trainer, model, _ = begin("interleaved", [data], config, "cpu", vocabulary=[data])
        trainer.train_step()
        folder = save_checkpoint(trainer, model, {"valid_ndcg@10": 0.5})
        if parallel == "fsdp2":
            assert not storage.exists(storage.join(folder, "model.json"))
            assert not [file for file in storage.list_files(folder) if file.endswith((".metadata", ".distcp", ".pt"))]
        make_whole(folder)
        make_whole(folder)  # nothing is left to do
        publish(folder, str(tmp_path / parallel), {"data": data})
        found[parallel] = load_model(str(tmp_path / parallel))
    whole, shards = found["ddp"], found["fsdp2"]
    files = [sorted(file[len(str(tmp_path / p)) :] for file in storage.list_files(str(tmp_path / p))) for p in found]
    assert files[0] == files[1]
    for name, weight in whole.tower.state_dict().items():
        assert torch.equal(shards.tower.state_dict()[name], weight), name
    assert {**whole.info} == {**shards.info}
    assert (
        shards.tower.backbone.model.get_output_embeddings().weight
        is shards.tower.backbone.model.get_input_embeddings().weight
    )
