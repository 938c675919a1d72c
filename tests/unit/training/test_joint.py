"""Training of both towers together: exact gradients, what staleness does and does not change, resuming."""

import numpy as np
import pytest
import torch
from fakes import small_encoders, tiny_config, tiny_dataset, tiny_items, tiny_model

from pixrec.artifact import load_model, save_model
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.model.encoders import EncoderTower
from pixrec.model.seeding import seeded
from pixrec.training.joint import JointTrainer, item_rate

NO_CLIP = 1e9
WINDOWS = [np.array([0, 1, 2, 3]), np.array([4, 5]), np.array([2, 6, 1])]


def trainer(*, joint=(), compact=(), model=(), train=(), items=None):
    """Both towers of a tiny model without dropout; `joint` … change their section of the config."""
    config = tiny_config(
        model={"user_tower": "compact", "compact": {"dropout": 0.0}, **dict(model)},
        train={
            "gradient_clip": NO_CLIP,
            "compact": {"histories_per_step": 4, **dict(compact)},
            "joint": {"epochs": 2, "warmup_steps": 0, **dict(joint)},
            **dict(train),
        },
    )
    dataset = tiny_dataset(items or tiny_items(), num_events=7)
    made = tiny_model(config, dataset.items)
    if isinstance(made.tower, EncoderTower):
        with torch.no_grad():
            rows = np.arange(len(dataset.items))
            made.tower.fit(made.tower.item_vectors(Catalog(dataset.items, made.encoder).items(rows)))
        made.tower.backbone.tune(config.model, 0)
    known = np.where(np.arange(len(dataset.items)) < len(made.embedded_ids), np.arange(len(dataset.items)), -1)
    training = JointTrainer(
        made.tower,
        Catalog(dataset.items, made.encoder),
        dataset.training_histories(),
        dataset.training_counts(),
        known,
        config,
    )
    return training, dataset, made


def gradients(training):
    return {n: p.grad.clone() for n, p in training.named.items() if p.grad is not None}


def assert_close(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        difference = float((found[name] - wanted).norm())
        assert difference <= tolerance * max(float(wanted.norm()), 1e-3), (name, difference, float(wanted.norm()))


def autograd(training):
    """Gradients of a step's loss where the whole catalog is encoded in one pass, with a graph through all of it."""
    content = training.towers.item_vectors(training.catalog.items(np.arange(len(training.catalog))))
    training._content_at = lambda items: content[items]
    nothing = torch.zeros(len(training.catalog), dtype=torch.bool)
    negatives = training.warm[torch.arange(training.config.negatives) % len(training.warm)]
    (training._loss(WINDOWS, negatives, nothing) / sum(len(w) - 1 for w in WINDOWS)).backward()
    return gradients(training)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_the_gradient_is_plain_autograds_where_every_item_is_fresh(micro_batch):
    # Only items that stand in the windows are encoded, so only they may be candidates.
    settings = {"model": {"compact": {"dropout": 0.0, "id_dropout": 0.0}}}
    training, _, _ = trainer(joint={"micro_batch_items": micro_batch}, **settings)
    reference, _, _ = trainer(**settings)
    for one in (training, reference):
        one.warm = torch.arange(7)
    training._step(WINDOWS)
    expected = autograd(reference)
    assert {name.split(".")[0] for name in expected} == {"compact", "backbone", "item_proj"}
    assert any("vision" in name for name in expected)
    assert_close(gradients(training), expected)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_gradient_of_encoders_is_plain_autograds_too(tmp_path, adapters):
    lora = {"enabled": adapters, "rank": 2}
    settings = {**small_encoders(tmp_path), "lora": lora, "compact": {"dropout": 0.0, "id_dropout": 0.0}}
    training, _, _ = trainer(joint={"micro_batch_items": 3}, model=settings)
    reference, _, _ = trainer(model=settings)
    for one in (training, reference):
        one.warm = torch.arange(7)
    training._step(WINDOWS)
    expected = autograd(reference)
    assert {".".join(name.split(".")[:2]) for name in expected} >= {"backbone.text", "backbone.model"}
    assert_close(gradients(training), expected, 1e-4)
    assert training.item.keys() >= {name for name in expected if name.startswith("backbone.")}


def test_staleness_is_of_directions_whatever_the_length_of_content_vectors(tmp_path):
    rows, settings = [], small_encoders(tmp_path)
    still, dataset, _ = trainer(joint={"item_learning_rate": 1e-12}, model=settings)
    still.train_epoch(rows.append)
    assert (still.content.norm(dim=1) - 1).abs().max() > 0.1
    assert all(abs(row["staleness"]) < 1e-5 for row in rows)
    assert still.validate(dataset.held_out("valid"))["table_staleness"] == pytest.approx(0, abs=1e-5)
    training, _, made = trainer(model=settings)
    training.refresh()
    old = training.content.clone()
    with torch.no_grad(), seeded(0):
        for parameter in training.item.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        new = made.tower.item_vectors(training.catalog.items(np.arange(len(old))))
    moved = 1 - torch.nn.functional.cosine_similarity(old, new)
    assert moved.mean() > 1e-3
    assert training.refresh() == pytest.approx(float(moved.mean()), rel=1e-3)


@pytest.mark.parametrize(("lora", "given", "rate"), [(False, None, 2e-5), (True, None, 2e-4), (True, 1e-3, 1e-3)])
def test_pretrained_encoders_have_usual_rates_unless_one_is_given(lora, given, rate):
    settings = {"text_encoder": "a", "image_encoder": "b", "user_tower": "compact", "lora": {"enabled": lora}}
    joint = {"epochs": 1, "item_learning_rate": given}
    assert item_rate(tiny_config(model=settings, train={"joint": joint})) == rate
    assert item_rate(tiny_config(train={"joint": joint})) == (given or 1e-4)


def test_a_stale_row_gets_no_gradient_and_stays_as_it_is():
    training, _, _ = trainer(joint={"fresh_items_per_step": 2})
    training.refresh()
    before = training.content.clone()
    reached = []
    original = training._read

    def noted(rows):
        if torch.is_grad_enabled():
            reached.extend(rows.tolist())
        return original(rows)

    training._read = noted
    training._step(WINDOWS)  # an optimiser step, so that a second one encodes to something else
    training._step(WINDOWS)
    fresh = set(training._fresh.tolist())
    assert len(fresh) == 2
    assert set(reached[-2:]) == fresh
    moved = (training.content - before).abs().sum(1) > 0
    assert set(torch.nonzero(moved).flatten().tolist()) <= set(reached)
    assert moved[list(fresh)].all()
    content = training._content_at(torch.arange(len(training.catalog)))
    (gradient,) = torch.autograd.grad(content.sum(), training._vectors)
    assert gradient.shape == (2, training.content.shape[1])
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_the_table_equals_a_full_recompute_right_after_a_refresh():
    training, dataset, made = trainer(joint={"fresh_items_per_step": 3, "refresh_every_steps": 1000})
    for _ in range(3):
        training._step(WINDOWS)

    def error():
        training.towers.eval()
        with torch.no_grad():
            exact = made.tower.item_vectors(training.catalog.items(np.arange(len(dataset.items))))
        return float((training.content - exact).abs().max())

    assert error() > 1e-4
    assert training.refresh() > 0
    assert error() < 1e-6
    figures = training.validate(dataset.held_out("valid"))
    assert figures["table_staleness"] == pytest.approx(0, abs=1e-6)


def test_the_table_is_computed_anew_at_its_steps_and_its_age_is_logged():
    training, _, _ = trainer(joint={"refresh_every_steps": 3, "fresh_items_per_step": 1})
    refreshed, ages = [], []
    original = training.refresh
    training.refresh = lambda: refreshed.append(training.step) or original()
    for _ in range(7):
        row = training._step(WINDOWS)
        ages.append(row["age_steps"])
        assert row["fresh_share"] == pytest.approx(1 / 7)
    assert refreshed == [0, 3, 6]
    assert [ages[i] for i in (0, 3, 6)] == [0, 0, 0]
    assert all(0 < age <= 2 for age in (ages[1], ages[4]))


def test_what_a_step_finds_stale_is_what_the_item_tower_moved():
    training, _, _ = trainer(joint={"item_learning_rate": 1e-2})
    rows = []
    training.train_epoch(rows.append)
    assert rows[0]["staleness"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["staleness"] > 1e-5
    still, _, _ = trainer(joint={"item_learning_rate": 1e-12})
    rows = []
    still.train_epoch(rows.append)
    assert all(row["staleness"] < 1e-6 for row in rows)


def test_a_resumed_run_goes_on_as_the_undisturbed_one(tmp_path):
    def work(training, dataset, epochs):
        rows = []
        for _ in range(epochs):
            training.train_epoch(rows.append)
            rows.append(training.validate(dataset.held_out("valid")))
        return rows

    settings = {"joint": {"fresh_items_per_step": 3, "refresh_every_steps": 2}}
    whole, dataset, _ = trainer(**settings)
    expected = work(whole, dataset, 4)
    first, _, model = trainer(**settings)
    begun = work(first, dataset, 2)
    save_model(str(tmp_path), model, {})
    second, _, _ = trainer(**settings)
    second.towers.load_state_dict(load_model(str(tmp_path)).tower.state_dict())
    second.restore(first.position(), first.training_tensors())
    assert begun + work(second, dataset, 2) == expected


def test_only_what_may_learn_is_moved():
    training, _, made = trainer(model={"lora": {"enabled": True, "rank": 2}, "freeze_vision": True})
    for parameter in made.tower.backbone.parameters():  # as a model that was read from its folder
        parameter.requires_grad_(False)
    again = JointTrainer(
        made.tower,
        training.catalog,
        training.source.histories,
        np.ones(len(training.catalog), dtype=np.int64),
        training.id_rows.numpy(),
        made.config,
    )
    before = {name: value.clone() for name, value in made.tower.state_dict().items()}
    again._step(WINDOWS)
    again._step(WINDOWS)
    moved = {n for n, value in made.tower.state_dict().items() if not torch.equal(value, before[n])}
    assert {name for name in moved if name.startswith("backbone.")}
    assert all("lora_" in name and "vision" not in name for name in moved if name.startswith("backbone."))
    assert not any(name.startswith("user_tower.") or name == "log_temperature" for name in moved)


def test_the_best_of_all_is_kept_the_beginning_among_it():
    training, dataset, made = trainer(joint={"item_learning_rate": 10.0, "learning_rate": 10.0, "epochs": 1})
    before = {name: value.clone() for name, value in made.tower.state_dict().items()}
    held_out = dataset.held_out("valid")
    at_first = training.validate(held_out)["valid_ndcg@10"]
    training.refresh = lambda: 0.0  # ruined anyway
    training.validate = lambda _: {"valid_ndcg@10": at_first if training.epoch == 0 else 0.0}
    figures = training.fit(held_out)
    assert figures == {"valid_ndcg@10": at_first, "epoch": 0}
    assert all(torch.equal(value, before[name]) for name, value in made.tower.state_dict().items())


def test_divergence_is_said_with_its_cure():
    training, _, made = trainer()
    with torch.no_grad():
        made.tower.compact.content.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"train\.joint\.learning_rate"):
        training._step(WINDOWS)
