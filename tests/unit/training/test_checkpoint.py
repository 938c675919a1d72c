"""Checkpoints without Ray: every phase goes on from one as if nothing had happened; what is published of it."""

import os

import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_model, write_model, write_prepared

from pixrec import storage
from pixrec.artifact import load_model
from pixrec.training.checkpoint import publish, save_checkpoint
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


@pytest.mark.parametrize("phase", ["interleaved", "compact", "joint"])
def test_a_phase_goes_on_from_its_checkpoint_as_the_undisturbed_one(tmp_path, phase):
    data = write_prepared(tmp_path / "data", tiny_dataset(num_events=7)).uri
    base = tiny_config(model={"user_tower": "interleaved"}) if phase == "compact" else CONFIG
    if phase != "interleaved":
        write_model(tmp_path / "start", tiny_model(base))

    def begun(checkpoint=None):
        start = None if phase == "interleaved" else str(tmp_path / "start")
        return begin(phase, [data], CONFIG, "cpu", start=start, vocabulary=[data], checkpoint=checkpoint)

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
    assert [row["loss"] for row in more if "loss" in row] == [row["loss"] for row in rows[at:] if "loss" in row]
    for name, weight in model.tower.state_dict().items():
        assert torch.equal(again.tower.state_dict()[name], weight), name


def load_position(folder, trainer):
    info = storage.read_json(storage.join(folder, "model.json"))
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
