import dataclasses

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model

from pixrec.config import TrainConfig
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.model.objective import TrainingTask
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.reading import Collator
from pixrec.training.trainer import DivergedError
from pixrec.training.windows import ShiftedWindows

INTERLEAVED = {"user_tower": "interleaved"}


def trainer(**sections):
    sections = {"model": INTERLEAVED, **sections}
    config, dataset = tiny_config(**sections), tiny_dataset(num_events=8)
    model = tiny_model(config, dataset.items)
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    catalog = Catalog(dataset.items, model.encoder)
    collator = Collator(catalog, dataset.training_counts(), config, source.examples_per_step)
    return InterleavedTrainer(model.tower, source, collator, config), dataset


def test_training_learns_the_next_item():
    training, dataset = trainer(train={"epochs": 40, "learning_rate": 1e-2, "modality_dropout": 0})
    first = training.train_step()
    while training.step < training.total_steps:
        last = training.train_step()
    assert last["loss_ut"] < 0.6 * first["loss_ut"]
    figures = training.validate(dataset.held_out("valid"))
    assert figures["valid_recall@1"] > 0.5


@pytest.mark.parametrize(("connector", "modalities"), [(False, "both"), (True, "both"), (True, "text")])
def test_beside_adapters_the_connector_is_trained_where_it_shall_be(connector, modalities):
    lora = {"enabled": True, "rank": 2, "connector": connector}
    training, _ = trainer(model={**INTERLEAVED, "lora": lora, "modalities": modalities})
    before = {name: tensor.clone() for name, tensor in training.tower.state_dict().items()}
    training.train_step()
    training.train_step()
    after = training.tower.state_dict()
    moved = {n for n, t in after.items() if n.startswith("backbone.") and not torch.equal(t, before[n])}
    adapters = {name for name in moved if "lora_" in name}
    assert adapters
    learns = connector and modalities == "both"
    assert moved - adapters == {name for name in after if ".connector." in name and learns and "lora_" not in name}


def test_the_loss_is_the_weighted_sum_of_its_parts():
    training, _ = trainer(train={"alpha": 0.2, "beta": 0.3})
    row = training.train_step()
    assert row["loss"] == pytest.approx(0.5 * row["loss_nig"] + 0.2 * row["loss_tt"] + 0.3 * row["loss_ut"], rel=1e-5)


def test_a_resumed_run_goes_on_as_the_undisturbed_one():
    whole, _ = trainer()
    losses = [whole.train_step()["loss"] for _ in range(6)]
    start, _ = trainer()
    for _ in range(3):
        start.train_step()
    resumed, _ = trainer()
    resumed.tower.load_state_dict(start.tower.state_dict())
    resumed.restore({"step": 3}, {name: tensor.clone() for name, tensor in start.training_tensors().items()})
    assert [resumed.train_step()["loss"] for _ in range(3)] == pytest.approx(losses[3:], rel=1e-6)


def test_divergence_stops_with_the_step_and_the_cure():
    training, _ = trainer()
    with torch.no_grad():
        training.tower.item_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"step 1.*learning_rate"):
        training.train_step()


def test_a_negative_beta_pushes_users_away():
    """The sign of the paper's reference code; kept expressible so that it can be measured."""
    task = TrainingTask(tiny_model(tiny_config(model=INTERLEAVED)).tower, TrainConfig(alpha=0.125, beta=-0.025))
    assert task.weights() == {"nig": pytest.approx(0.85), "tt": 0.125, "ut": -0.025}


def test_modality_dropout_never_takes_all_of_an_item():
    items = tiny_items(with_pictures=[0, 1, 2])
    config = tiny_config(model=INTERLEAVED, train={"modality_dropout": 0.5})
    model = tiny_model(config, items)
    collator = Collator(Catalog(items, model.encoder), np.ones(len(items)), config, 4.0)
    for seed in range(5):
        batch = collator([np.arange(12)], np.random.default_rng(seed))
        seen = batch.items.is_text.any(1) | (batch.items.picture_slot >= 0).any(1)
        assert seen.all()


def test_a_data_set_without_pictures_trains():
    config = tiny_config(model=INTERLEAVED)
    dataset = tiny_dataset(tiny_items(with_pictures=False), num_events=6)
    model = tiny_model(config, dataset.items)
    source = ShiftedWindows(dataset.training_histories(), 4, config.train)
    collator = Collator(Catalog(dataset.items, model.encoder), dataset.training_counts(), config, 4.0)
    row = InterleavedTrainer(model.tower, source, collator, dataclasses.replace(config)).train_step()
    assert np.isfinite(row["loss"])


@pytest.mark.parametrize("option", [{}, {"micro_batch_histories": 2}, {"extra_negatives": 4}])
def test_the_processor_reads_a_step_once(option, monkeypatch):
    """Each time it reads a number off a GPU, it waits until all before is computed. That no forward pass does so is
    tested with the families."""
    training, _ = trainer(train=option)
    training.train_step()  # which fills the table of extra negatives, and makes the optimiser's state
    read = []
    for name in ("tolist", "item", "cpu", "__float__", "__int__", "__bool__", "nonzero", "unique"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, plain=plain, name=name, **k: (t.is_floating_point() and read.append(name),
                                                                           plain(t, *a, **k))[1]
        )  # fmt: skip
    training.train_step()
    assert read == ["tolist"]


def parameters(training):
    return {name: p.detach().clone() for name, p in training.tower.named_parameters()}


@pytest.mark.parametrize("option", [{"activation_checkpointing": True}, {"micro_batch_histories": 2}])
def test_what_saves_memory_changes_no_gradient(option):
    plain, _ = trainer(train={"gradient_clip": 1e9})
    saving, _ = trainer(train={"gradient_clip": 1e9, **option})
    rows = [t.train_step() for t in (plain, saving)]
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert rows[1]["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=1e-5)


def test_activation_checkpointing_is_on_in_every_layer():
    training, _ = trainer(train={"activation_checkpointing": True})
    layers = training.tower.backbone.model.model.text_model.layers
    assert all(layer.gradient_checkpointing for layer in layers)


def test_bf16_is_near_float32_and_keeps_weights_and_loss_whole():
    plain, _ = trainer()
    half, _ = trainer(train={"precision": "bf16"})
    assert half.train_step()["loss"] == pytest.approx(plain.train_step()["loss"], rel=0.02)
    assert {p.dtype for p in half.tower.parameters()} == {torch.float32}


def test_compile_reaches_the_layers_that_see_and_those_that_read(monkeypatch):
    called = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: called.append((module, options)))
    training, _ = trainer(train={"compile": True})
    model = training.tower.backbone.model.model
    layers = [*model.vision_model.encoder.layers, *model.text_model.layers]
    assert called == [(layer, {"dynamic": True}) for layer in layers]


def test_accumulated_passes_give_the_mean_of_their_losses():
    """With generation alone, which contrasts nothing, and passes of the same number of tokens."""
    option = {"alpha": 0, "beta": 0, "modality_dropout": 0, "gradient_clip": 1e9, "learnable_temperature": False}
    whole, _ = trainer(train={**option, "histories_per_step": 4})
    parts, _ = trainer(train={**option, "histories_per_step": 4, "gradient_accumulation": 2})
    row, split = whole.train_step(), parts.train_step()
    assert split["loss_nig"] == pytest.approx(row["loss_nig"], rel=1e-5)
    assert split["loss"] == pytest.approx(row["loss"], rel=0.05)
    assert split["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=0.1)


def test_extra_negatives_come_from_a_table_that_a_validation_renews():
    training, dataset = trainer(train={"extra_negatives": 5, "alpha": 0, "beta": 1})
    first = training._extra(0)
    assert len(first.rows) == len(set(first.rows.tolist())) == 5
    assert first.drawn == pytest.approx(5 / 12)
    table = training.table.clone()
    training.train_step()
    assert torch.equal(training.table, table), "stale until the next validation"
    training.validate(dataset.held_out("valid"))
    assert not torch.equal(training.table, table)
    assert torch.allclose(training.table.norm(dim=1), torch.ones(12), atol=1e-5)


def test_a_resumed_run_draws_the_extra_negatives_of_the_undisturbed_one():
    option = {"train": {"extra_negatives": 5}}
    whole, dataset = trainer(**option)
    for _ in range(2):
        whole.train_step()
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    tensors = {name: tensor.clone() for name, tensor in whole.training_tensors().items()}
    whole.validate(dataset.held_out("valid"))
    resumed, _ = trainer(**option)
    resumed.tower.load_state_dict(state)
    resumed.restore({"step": 2}, tensors)
    expected = [whole.train_step()["loss"] for _ in range(2)]
    assert [resumed.train_step()["loss"] for _ in range(2)] == pytest.approx(expected, rel=1e-5)


def test_a_validation_says_what_each_modality_brings():
    training, dataset = trainer(train={"epochs": 60, "learning_rate": 3e-3})
    while training.step < 60:
        training.train_step()
    figures = training.validate(dataset.held_out("valid"))
    assert figures["valid_loss"] < figures["valid_loss_text_only"]  # only pictures tell these items apart
    assert figures["valid_recall@10_image_only"] >= figures["valid_recall@10_text_only"]
    quiet, _ = trainer(train={"validate_modalities": False})
    assert not [k for k in quiet.validate(dataset.held_out("valid")) if "only" in k]


def test_every_row_says_what_the_step_took():
    training, _ = trainer()
    row = training.train_step()
    assert 0 <= row["padding_share"] < 1
    assert 0 <= row["data_wait_share"] <= 1
    assert row["samples_per_second"] > 0
    assert row["tokens_per_second"] > row["samples_per_second"]
    assert row["peak_memory_bytes"] > 1e7


def test_divergence_names_the_batch():
    training, dataset = trainer()
    training.train_step()
    with torch.no_grad():
        training.tower.item_proj.weight.fill_(float("nan"))
    before = parameters(training)
    with pytest.raises(DivergedError, match="holds among others i0") as error:
        training.train_step()
    ids = dataset.items.item_ids
    assert error.value.batch["step"] == 2
    assert error.value.batch["histories"] == [[ids[r] for r in w] for w in training.source.step(1)]
    assert all(torch.equal(before[n], p) or before[n].isnan().any() for n, p in training.tower.named_parameters())


def test_where_nobody_is_held_out_there_are_no_figures():
    training, dataset = trainer(train={"extra_negatives": 5})
    held_out = dataset.held_out("valid")
    nobody = type(held_out)([], [], held_out.targets[:0])
    assert training.validate(nobody) == {}
    assert training.table is not None, "the table is renewed all the same"


def test_a_catalog_above_the_bound_is_validated_on_a_sample(monkeypatch):
    training, dataset = trainer(train={"validation_candidates": 4})
    held_out = dataset.held_out("valid")
    figures = training.validate(held_out)
    assert 4 <= figures["valid_candidates"] < 12 + 1
    assert figures == training.validate(held_out), "the sample stays the same"
    assert figures["valid_recall@10_text_only"] >= 0
    everything, _ = trainer(train={"validation_candidates": 12})
    assert "valid_candidates" not in everything.validate(held_out)
