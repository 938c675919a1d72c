"""Training of the compact tower: what it reads, what it may know, and that it learns and resumes."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes import tiny_dataset, tiny_items, users_of

from pixrec.config import CompactConfig, SasrecConfig, SasrecTowerConfig, SasrecTrainingConfig, SequenceConfig
from pixrec.data.sequences import HeldOut, Histories
from pixrec.errors import ConfigError, InputError
from pixrec.model.compact import CompactTower
from pixrec.scorers.sasrec import train_sasrec
from pixrec.training.compact import CompactTrainer

FAST = SequenceConfig(epochs=40, learning_rate=1e-2, warmup_steps=1, histories_per_step=4, validate_every_epochs=10)
SHAPE = CompactConfig(layers=1, heads=1, max_history_items=6, dropout=0.0, id_dropout=0.3)
ITEMS = 12


def trainer(config=FAST, *, content=True, known=ITEMS, seed=0):
    """Content is a random vector an item; the first `known` items have learned vectors too."""
    dataset = tiny_dataset(tiny_items(ITEMS), num_users=12, num_events=6)
    vectors = torch.randn(ITEMS, 10, generator=torch.Generator().manual_seed(1)) if content else None
    torch.manual_seed(0)
    tower = CompactTower(16, SHAPE, 10 if content else None, known, unit=content)
    id_rows = np.where(np.arange(ITEMS) < known, np.arange(ITEMS), -1)
    counts = dataset.training_counts()
    made = CompactTrainer(tower, dataset.training_histories(), counts, vectors, id_rows, config, 0.3, seed)
    return made, dataset


@pytest.mark.parametrize("loss", ["full", "sampled", "gbce"])
@pytest.mark.parametrize("content", [True, False], ids=["content", "identities"])
def test_the_next_item_is_learned(loss, content):
    training, dataset = trainer(dataclasses.replace(FAST, loss=loss, negatives=6), content=content)
    figures = training.fit(dataset.held_out("valid"))
    assert figures["valid_recall@1"] > 0.9


def test_content_alone_is_enough_where_nothing_is_learned_for_an_item():
    training, dataset = trainer(known=0)
    assert training.fit(dataset.held_out("valid"))["valid_recall@1"] > 0.9


def test_an_item_without_identity_stands_for_its_content():
    training, _ = trainer(known=5)
    vectors = training.item_vectors()
    by_content = torch.nn.functional.normalize(training.tower.content(training.content), dim=-1)
    torch.testing.assert_close(vectors[5:], by_content[5:])
    assert not torch.allclose(vectors[:5], by_content[:5])


def test_the_projection_of_content_has_a_rate_of_its_own():
    moved = []
    for rate in (None, FAST.learning_rate / 100):
        training, _ = trainer(dataclasses.replace(FAST, content_learning_rate=rate))
        before = training.tower.content.weight.detach().clone()
        training.train_step()
        moved.append((training.tower.content.weight - before).abs().max().item())
    assert moved[1] == pytest.approx(moved[0] / 100, rel=0.01)
    alone, _ = trainer(dataclasses.replace(FAST, content_learning_rate=1e-4), content=False)
    assert len(alone.optimizer.param_groups) == 1


def test_items_of_many_events_keep_their_vectors_more_often():
    tower = CompactTower(16, SHAPE, 10, 3)
    of_each = [np.array([0, 1, 2])]
    counts, rows, content = np.array([0, 30, 270]), np.arange(3), torch.zeros(3, 10)
    made = CompactTrainer(tower, of_each, counts, content, rows, FAST, 0.5, id_dropout_events=30)
    assert made.id_dropout.tolist() == pytest.approx([0.5, 0.25, 0.05])
    assert CompactTrainer(tower, of_each, counts, content, rows, FAST, 0.5).id_dropout.tolist() == [0.5] * 3


def test_items_that_nobody_bought_are_no_candidates():
    """Their vectors get no gradient: being always a negative would teach that they are bad."""
    training, _ = trainer(content=False)
    training.warm = torch.arange(6)
    before = training.tower.id_embedding.weight.detach().clone()
    training._step([np.array([0, 1, 2]), np.array([3, 4, 5])])
    moved = (training.tower.id_embedding.weight.detach() - before).abs().sum(1) > 0
    assert moved.tolist() == [True] * 6 + [False] * 6


def test_validation_ranks_no_item_that_identities_do_not_know():
    """Such an item's vector is 0, and so is its score: ahead of all others where a loss pushes scores below 0."""
    training, dataset = trainer(content=False)
    held_out = dataset.held_out("valid")
    training.nothing_known = torch.ones(len(training.id_rows), dtype=torch.bool)
    training.nothing_known[held_out.targets[0]] = False
    assert training.validate(held_out.only(np.array([0])))["valid_recall@1"] == 1


def test_the_vector_of_a_user_reads_the_newest_items_only_and_never_the_padding():
    training, _ = trainer()
    table = training.item_vectors()
    long = np.arange(10)
    alone = training.user_vectors([long[-6:]], table)
    beside = training.user_vectors([np.array([1]), long], table)
    torch.testing.assert_close(beside[1:], alone)


def test_steps_share_their_lengths():
    rng = np.random.default_rng(0)
    histories = Histories.of([rng.integers(ITEMS, size=length) for length in range(2, 24)])
    shape = dataclasses.replace(SHAPE, max_history_items=20)
    tower = CompactTower(16, shape, None, ITEMS)
    config = dataclasses.replace(FAST, histories_per_step=1)
    training = CompactTrainer(tower, histories, np.ones(ITEMS, int), None, np.arange(ITEMS), config, 0.0, 0)
    lengths = set()
    tower.user.register_forward_pre_hook(lambda _, given: lengths.add(given[0].shape[1]))
    training.train_epoch()
    assert lengths == {7, 15, 20}


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_vectors_that_move_row_by_row_learn_the_next_item_too(loss):
    config = dataclasses.replace(FAST, loss=loss, negatives=6, id_optimizer="rowwise_adagrad", id_learning_rate=0.3)
    training, dataset = trainer(config, content=False)
    assert training.fit(dataset.held_out("valid"))["valid_recall@1"] > 0.9
    assert not any("id_embedding" in name and "row_sum" not in name for name in training.training_tensors())


def test_only_the_rows_that_a_step_reads_move_and_cost_memory():
    config = dataclasses.replace(FAST, loss="sampled", negatives=2, id_optimizer="rowwise_adagrad", averaging=0.5)
    training, _ = trainer(config, content=False)
    training.warm = torch.tensor([4])
    before = training.tower.id_embedding.weight.detach().clone()
    training._step([np.array([7, 1, 2])])
    moved = (training.tower.id_embedding.weight.detach() - before).abs().sum(1) > 0
    assert np.flatnonzero(moved).tolist() == [1, 2, 4, 7]
    state = training.training_tensors()
    assert [(name, tuple(t.shape)) for name, t in state.items() if "id_embedding" in name] == [
        ("id_embedding.weight/row_sum", (ITEMS,))
    ]


def test_small_tables_move_as_all_weights_do():
    assert trainer()[0].table is None


def test_a_run_stops_and_validates_within_an_epoch_where_it_is_told_to():
    config = dataclasses.replace(FAST, max_steps=5, validate_every_steps=2)
    training, dataset = trainer(config)
    assert len(training.source.epoch(0)) == 3
    rows = []
    at = [training.step for _ in training.validations(dataset.held_out("valid"), rows.append)]
    assert at == [2, 4, 5]
    assert {row["total_steps"] for row in rows} == {5}


@pytest.mark.parametrize(
    "settings", [{}, {"id_optimizer": "rowwise_adagrad", "loss": "sampled"}], ids=["adamw", "rows"]
)
def test_a_run_that_stopped_within_an_epoch_goes_on_there(settings):
    config = dataclasses.replace(FAST, **settings)
    whole, _ = trainer(config)
    expected = [whole.train_step()["loss"] for _ in range(8)]
    first, _ = trainer(config)
    begun = [first.train_step()["loss"] for _ in range(4)]
    second, _ = trainer(config)
    second.tower.load_state_dict(first.tower.state_dict())
    second.restore(first.position(), first.training_tensors())
    assert begun + [second.train_step()["loss"] for _ in range(4)] == expected


@pytest.mark.parametrize("rate", [None, 1e-4], ids=["one rate", "content slower"])
def test_a_resumed_run_goes_on_as_the_undisturbed_one(rate):
    settings = dataclasses.replace(FAST, content_learning_rate=rate)

    def losses(training, epochs):
        rows = []
        for _ in range(epochs):
            training.train_epoch(rows.append)
        return [row["loss"] for row in rows]

    whole, _ = trainer(settings)
    expected = losses(whole, 4)
    first, _ = trainer(settings)
    begun = losses(first, 2)
    second, _ = trainer(settings)
    second.tower.load_state_dict(first.tower.state_dict())
    second.restore(first.position(), first.training_tensors())
    assert begun + losses(second, 2) == expected


def test_the_mean_of_the_weights_is_what_is_validated_saved_and_kept():
    """And training goes on from the last weights, also where it resumes from what a validation left."""
    training, dataset = trainer(dataclasses.replace(FAST, epochs=2, validate_every_epochs=1))
    weights = training.tower.content.weight
    means, last = [], []
    for _ in training.validations(dataset.held_out("valid")):
        means.append(weights.detach().clone())
        saved = {n: t.clone() for n, t in training.training_tensors().items()}
        last.append(saved["last/content.weight"])
        torch.testing.assert_close(saved["mean/content.weight"], weights.detach(), rtol=0, atol=0)
    assert (means[1] - last[1]).abs().max() > 1e-4
    torch.testing.assert_close(weights.detach(), last[1], rtol=0, atol=0)
    resumed, _ = trainer()
    resumed.restore({"epoch": 2, "step": training.step}, saved)
    torch.testing.assert_close(resumed.tower.content.weight.detach(), last[1], rtol=0, atol=0)
    resumed.mean.keep()
    torch.testing.assert_close(resumed.tower.content.weight.detach(), means[1], rtol=0, atol=0)


def test_without_averaging_the_last_weights_are_validated():
    training, dataset = trainer(dataclasses.replace(FAST, epochs=1, averaging=0.0))
    for _ in training.validations(dataset.held_out("valid")):
        within = training.tower.content.weight.detach().clone()
    torch.testing.assert_close(training.tower.content.weight.detach(), within, rtol=0, atol=0)
    assert not [name for name in training.training_tensors() if name.startswith(("mean/", "last/"))]


def test_divergence_is_said_with_its_cure():
    training, _ = trainer()
    with torch.no_grad():
        training.tower.content.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"train\.compact\.learning_rate"):
        training._step([np.array([0, 1, 2])])


def test_sasrec_ranks_what_follows_and_puts_what_nobody_bought_last():
    dataset = tiny_dataset(tiny_items(ITEMS), num_users=5, num_events=5)
    config = SasrecConfig(width=16, training=SasrecTrainingConfig(**{**dataclasses.asdict(FAST), "loss": "sampled"}))
    scorer = train_sasrec("sasrec_full", dataset, config)
    scores = scorer.scores(users_of([np.array([0, 1]), np.array([2])]))
    assert scores.argmax(1).tolist() == [2, 3]
    cold = dataset.training_counts() == 0
    assert cold.any()
    assert torch.isneginf(scores[:, torch.from_numpy(cold)]).all()


def test_a_refit_sees_the_validation_events_and_no_test_event():
    dataset = tiny_dataset(tiny_items(ITEMS), num_users=5, num_events=5)
    training = SasrecTrainingConfig(**{**dataclasses.asdict(FAST), "epochs": 10})
    plain = train_sasrec("sasrec", dataset, SasrecConfig(width=16, training=training))
    refit = train_sasrec("sasrec", dataset, SasrecConfig(width=16, training=training, refit=True))
    validation, test = dataset.held_out("valid").targets, dataset.held_out("test").targets
    ranked = [~torch.isneginf(scorer.scores(users_of([np.array([0])])))[0].numpy() for scorer in (plain, refit)]
    assert not ranked[0][validation].all()
    assert ranked[1][validation].all()
    assert not ranked[1][test].all()
    assert refit.figures["epoch"] == plain.figures["epoch"]


MINUTE, MONTH = 60_000, 30 * 86_400_000


def told_by_time(form, **shape):
    """Everybody has item 0, then 1, then 2 if that was a minute later or 3 if it was a month: a trainer of 64
    histories and 32 held out."""
    steps = np.random.default_rng(0).choice([MINUTE, MONTH], 96)
    histories = [np.array([0, 1, 2 if step == MINUTE else 3]) for step in steps]
    timestamps = [1_000_000 * user + np.array([0, step, step + 5 * MINUTE]) for user, step in enumerate(steps)]
    torch.manual_seed(0)
    shape = CompactConfig(
        layers=2, heads=2, max_history_items=4, dropout=0.0, time=form, **{"time_dropout": 0.0, **shape}
    )
    tower = CompactTower(16, shape, None, 4, unit=False)
    config = dataclasses.replace(FAST, epochs=16, validate_every_epochs=4, histories_per_step=16)
    trainer = CompactTrainer(
        tower, histories[:64], np.ones(4), None, np.arange(4), config, seed=0, timestamps=timestamps[:64]
    )
    past = slice(64, 96)
    held_out = HeldOut(
        [str(user) for user in range(32)],
        [h[:2] for h in histories[past]],
        np.array([h[2] for h in histories[past]]),
        [m[:2] for m in timestamps[past]],
    )
    return trainer, held_out


@pytest.mark.parametrize(("form", "learns"), [("none", False), ("gaps", True), ("ages", True), ("both", True)])
def test_what_only_time_tells_is_learned_by_who_reads_it(form, learns):
    training, held_out = told_by_time(form)
    figures = training.fit(held_out)
    assert (figures["valid_recall@1"] == 1) == learns
    if learns:
        blind = training.validate(held_out._replace(timestamps=None))
        assert blind["valid_recall@1"] < 0.8


def test_the_moment_of_the_target_is_not_read_in_training():
    """Every gradient stays what it is when the newest event, which is a target only, comes at another time."""
    gradients = []
    for late in (0, MONTH):
        training, _ = told_by_time("both")
        window = np.array([[0, 0], [1, MINUTE], [2, 2 * MINUTE + late]])
        training._loss([window], training.warm, torch.zeros(4, dtype=torch.bool)).backward()
        gradients.append({n: p.grad for n, p in training.named.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=0)


def test_a_tower_that_reads_no_time_is_not_given_any():
    training, _ = told_by_time("none")
    assert all(window.ndim == 1 for batch in training.source.epoch(0) for window in batch)


def test_timed_training_goes_on_as_the_undisturbed_one():
    whole, _ = told_by_time("both", time_dropout=0.5)
    rows = []
    for _ in range(3):
        whole.train_epoch(rows.append)
    first, _ = told_by_time("both", time_dropout=0.5)
    first.train_epoch()
    second, _ = told_by_time("both", time_dropout=0.5)
    second.tower.load_state_dict(first.tower.state_dict())
    second.restore(first.position(), first.training_tensors())
    again = []
    for _ in range(2):
        second.train_epoch(again.append)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[-len(again) :]]


def test_sasrec_reads_no_time():
    with pytest.raises(ConfigError, match=r"sasrec\.tower\.time is gaps"):
        SasrecTowerConfig(time="gaps")


@pytest.mark.parametrize("loss", ["full", "sampled", "gbce"])
def test_the_loss_is_taken_at_targets_only(loss):
    """Of two kinds of events, what is learned of both is the sum of what is learned of each."""
    training, _ = trainer(dataclasses.replace(FAST, loss=loss, negatives=6))
    rows, ends = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8]), np.array([4, 6, 9])
    views = np.array([1, 0, 1, 0, 1, 0, 1, 1, 0], bool)
    nothing = torch.zeros(ITEMS, dtype=torch.bool)
    negatives = torch.arange(6) if loss != "gbce" else torch.arange(18).view(3, 6) % ITEMS

    def loss_of(is_target):
        windows = Histories(rows, np.append(0, ends)[:-1], ends, is_target)
        return float(training._loss(windows, negatives, nothing).detach())

    assert loss_of(views) + loss_of(~views) == pytest.approx(loss_of(None), rel=1e-5)
    assert 0 < loss_of(views) < loss_of(None)


def test_views_and_purchases_train_the_purchases():
    """Items of odd rows are bought, the others viewed: only what is bought next is learned."""
    training, dataset = trainer()
    events = dataclasses.replace(dataset.events, is_target=dataset.events.rows % 2 == 1)
    histories = dataclasses.replace(dataset, events=events).training_histories()
    counts = dataset.training_counts()
    training = CompactTrainer(training.tower, histories, counts, training.content, np.arange(ITEMS), FAST, 0.3)
    while training.epoch < FAST.epochs:
        training.train_step()
    table = training.item_vectors()
    foretold = {False: [], True: []}
    for history, mark in zip(histories, histories.marks, strict=True):
        for place in range(1, len(history)):
            scores = training.user_vectors([history[:place]], table) @ table.T
            foretold[bool(mark[place])].append(int(scores.argmax()) == history[place])
    assert np.mean(foretold[True]) > 0.9
    assert not any(foretold[False])
