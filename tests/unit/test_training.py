import dataclasses

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model

from pixrec.config import TrainConfig
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.training import BatchSource, Collator, Trainer, TrainingTask

INTERLEAVED = {"user_tower": "interleaved"}


def trainer(**sections):
    sections = {"model": INTERLEAVED, **sections}
    config, dataset = tiny_config(**sections), tiny_dataset(num_events=8)
    model = tiny_model(config, dataset.items)
    source = BatchSource(dataset.training_histories(), config.model.max_history_items, config.train)
    catalog = Catalog(dataset.items, model.encoder)
    collator = Collator(catalog, dataset.training_counts(), config, source.examples_per_step)
    return Trainer(model.tower, source, collator, config), dataset


def test_every_event_is_a_target_once_an_epoch_when_windows_fit():
    histories = [np.arange(10 * i, 10 * i + n) for i, n in enumerate((2, 5, 3))]
    source = BatchSource(histories, 4, TrainConfig(histories_per_step=3, num_workers=1))
    windows = source.step(0)
    assert sorted(len(w) - 1 for w in windows) == [1, 2, 4]
    assert source.steps_per_epoch == 1


def test_long_histories_are_cut_into_windows_that_move_from_epoch_to_epoch():
    source = BatchSource([np.arange(50)], 4, TrainConfig(histories_per_step=1, num_workers=1))
    epochs = [
        [tuple(source.step(e * source.steps_per_epoch + s)[0]) for s in range(source.steps_per_epoch)] for e in (0, 1)
    ]
    assert all(2 <= len(w) <= 5 and list(w) == list(range(w[0], w[-1] + 1)) for epoch in epochs for w in epoch)
    assert set(epochs[0]) != set(epochs[1])


def test_a_batch_is_a_function_of_the_step_and_workers_share_it():
    histories = [np.arange(i, i + 4) for i in range(20)]
    config = TrainConfig(histories_per_step=6, num_workers=2)
    first, second = BatchSource(histories, 4, config), BatchSource(histories, 4, config)
    whole = [tuple(w) for w in first.step(17)]
    assert [tuple(w) for w in second.step(17)] == whole
    shared = [[tuple(w) for w in first.step(17, rank, 2)] for rank in (0, 1)]
    assert sorted(shared[0] + shared[1]) == sorted(whole)


def test_nothing_to_learn_is_said():
    with pytest.raises(InputError, match="two events"):
        BatchSource([np.array([1]), np.array([2])], 4, TrainConfig())


def test_no_held_out_event_reaches_training():
    dataset = tiny_dataset(num_events=6)
    source = BatchSource(dataset.training_histories(), 4, TrainConfig(histories_per_step=4))
    seen = {tuple(w) for step in range(source.total_steps()) for w in source.step(step)}
    training = {tuple(h.tolist()) for h in dataset.training_histories()}
    assert all(len(t) == 4 for t in training)
    assert seen <= training


@pytest.mark.parametrize("model", [INTERLEAVED, {"user_tower": "compact"}], ids=["interleaved", "compact"])
def test_training_learns_the_next_item(model):
    training, dataset = trainer(model=model, train={"epochs": 60, "learning_rate": 3e-3, "modality_dropout": 0})
    first = training.train_step()
    while training.step < training.total_steps:
        last = training.train_step()
    assert last["loss_ut"] < 0.6 * first["loss_ut"]
    figures = training.validate(training.collate.catalog, dataset.held_out("valid"))
    assert figures["valid_recall@1"] > 0.5


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
    resumed.restore(3, {name: tensor.clone() for name, tensor in start.optimizer_tensors().items()})
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
    source = BatchSource(dataset.training_histories(), 4, config.train)
    collator = Collator(Catalog(dataset.items, model.encoder), dataset.training_counts(), config, 4.0)
    row = Trainer(model.tower, source, collator, dataclasses.replace(config)).train_step()
    assert np.isfinite(row["loss"])
