"""The protocol on a catalog of six items, worked out by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes import FixedScorer, tiny_dataset, tiny_items
from six_items import COUNTS, FALLING, FLAT, HELD_OUT, NUM_ITEMS, WITH_IMAGE, evaluate

from pixrec.config import EvaluateConfig, SasrecConfig, SasrecTrainingConfig
from pixrec.data.sequences import HeldOut, sample_users
from pixrec.errors import InputError
from pixrec.evaluation import evaluate_scorers, protocol
from pixrec.evaluation.protocol import Collector
from pixrec.scorers import Scorer, Users, train_sasrec
from pixrec.scorers.baselines import ItemTransition, Popularity, RepeatLast
from pixrec.scorers.fusion import ReciprocalRankFusion, RoundRobin


def test_ranks_with_seen_items_allowed_and_filtered():
    outcomes = evaluate().outcomes
    assert outcomes["pixrec"].ranks["allowed"].tolist() == [3, 6, 1, 4]
    assert outcomes["pixrec"].ranks["filtered"].tolist() == [1, 5, 1, 3]  # u2's target is in its history: it stays
    assert outcomes["popularity"].ranks["allowed"].tolist() == [6] * 4
    assert outcomes["popularity"].ranks["filtered"].tolist() == [4, 5, 4, 5]
    assert (outcomes["popularity"].ties > 0).all()
    assert not outcomes["pixrec"].ties.any()


class Timed(FixedScorer):
    """A scorer that takes note of the timestamps that it is told."""

    def __init__(self) -> None:
        super().__init__("timed", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
        self.told: list[list[int]] = []

    def scores(self, users: Users) -> torch.Tensor:
        times = users.timestamps
        self.told += [[]] * len(users.histories) if times is None else [each.tolist() for each in times]
        return super().scores(users)


def test_a_scorer_that_reads_time_is_told_it_also_within_a_fusion():
    timestamps = [np.array([1, 2]), np.array([3]), np.array([4, 5, 6]), np.array([7])]
    alone, fused, merged = Timed(), Timed(), Timed()
    scorers = (alone, ReciprocalRankFusion("rrf", [fused, FLAT]), RoundRobin("round_robin", [FALLING, merged]), FLAT)
    evaluate(scorers, HELD_OUT._replace(timestamps=timestamps))
    expected = [times.tolist() for times in timestamps]
    assert alone.told == fused.told == merged.told == expected
    evaluate((alone,))
    assert alone.told == [*expected, [], [], [], []]


def test_without_a_training_event_no_id_based_scorer_finds_an_item():
    """Every user's last event is the one item that no training saw; content would find it."""
    dataset = tiny_dataset(tiny_items(24), num_users=20, num_events=6)
    rows = dataset.events.rows % 12
    rows[dataset.events.offsets[1:] - 1] = 23
    dataset = dataclasses.replace(dataset, events=dataclasses.replace(dataset.events, rows=rows))
    counts, histories = dataset.training_counts(), dataset.training_histories()
    training = SasrecTrainingConfig(loss="full", epochs=2, validate_every_epochs=1)
    scorers = [
        FixedScorer("content", list(range(24))),
        Popularity(counts),
        RepeatLast(counts),
        ItemTransition(histories, 24),
        train_sasrec("sasrec", dataset, SasrecConfig(training=training, refit=True)),
    ]
    config, items = EvaluateConfig(bootstrap_samples=20), dataset.items
    held_out = dataset.held_out("test")
    found = evaluate_scorers(scorers, held_out, config, training_counts=counts, with_image=items.with_image)
    cold = found.metrics_json("leave_one_out")["buckets"]["target_cold"]
    assert cold["users"] == 20
    assert {name: result["recall@10"] for name, result in cold["results"].items()} == {
        "content": 1.0, "popularity": 0.0, "repeat_last": 0.0, "item_transition": 0.0, "sasrec": 0.0,
    }  # fmt: skip
    assert {scorer: outcome.ranks["allowed"].min() for scorer, outcome in found.outcomes.items()}["sasrec"] == 24


@pytest.mark.parametrize("seen", ["allowed", "filtered"])
def test_item_order_does_not_change_metrics(seen):
    """Ranks, ties, coverage and novelty alike, with many ties among items of one score."""
    rng = np.random.default_rng(0)
    ids = [f"item {row}" for row in range(NUM_ITEMS)]
    scores = {"pixrec": FALLING._scores, "popularity": FLAT._scores, "coarse": torch.tensor([1.0, 2, 2, 1, 2, 1])}

    def measured(order):
        place = np.argsort(order)
        return evaluate_scorers(
            [FixedScorer(name, values[torch.from_numpy(order)].tolist()) for name, values in scores.items()],
            HeldOut(HELD_OUT.user_ids, [place[h] for h in HELD_OUT.histories], place[HELD_OUT.targets]),
            EvaluateConfig(ks=(2, 3), bootstrap_samples=50, batch_size=3, seen=seen),
            training_counts=COUNTS[order],
            with_image=WITH_IMAGE[order],
            item_ids=[ids[row] for row in order],
        ).metrics_json("x")

    straight = measured(np.arange(NUM_ITEMS))
    for _ in range(5):
        assert measured(rng.permutation(NUM_ITEMS)) == straight


def test_batches_do_not_change_ranks_and_progress_counts_users():
    seen = []
    evaluation = evaluate_scorers(
        [FALLING],
        HELD_OUT,
        EvaluateConfig(batch_size=3),
        training_counts=COUNTS,
        with_image=WITH_IMAGE,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [("pixrec", 3, 4), ("pixrec", 4, 4)]
    assert evaluation.outcomes["pixrec"].ranks["allowed"].tolist() == [3, 6, 1, 4]


def test_a_sample_of_users_is_seeded_and_whole():
    sample = sample_users(HELD_OUT, 2, seed=1)
    again = sample_users(HELD_OUT, 2, seed=1)
    assert sample.user_ids == again.user_ids
    for user, history, target in zip(*sample[:3], strict=True):
        place = HELD_OUT.user_ids.index(user)
        assert np.array_equal(history, HELD_OUT.histories[place])
        assert target == HELD_OUT.targets[place]
    assert sample_users(HELD_OUT, None, 0) is HELD_OUT
    assert evaluate(max_users=3).metrics_json("x")["users"] == 3


def test_refusals():
    with pytest.raises(ValueError, match="name of its own"):
        evaluate([FALLING, FALLING])
    with pytest.raises(ValueError, match="'narrow' gave scores"):
        evaluate([FixedScorer("narrow", [1.0])])
    with pytest.raises(InputError, match="holds out no event"):
        evaluate(held_out=HeldOut([], [], np.array([], dtype=np.int64)))
    with pytest.raises(ValueError, match="one entry for each"):
        evaluate_scorers([FALLING], HELD_OUT, EvaluateConfig(), training_counts=COUNTS[:2], with_image=WITH_IMAGE)


def test_no_more_scores_at_a_time_than_the_bound(monkeypatch):
    sizes = []

    class Watched(FixedScorer):
        def scores(self, users):
            sizes.append(len(users.histories))
            return super().scores(users)

    expected = evaluate([FALLING]).metrics_json("x")
    monkeypatch.setattr(protocol, "MAX_SCORES", 2 * NUM_ITEMS + 1)
    assert evaluate([Watched("pixrec", FALLING._scores.tolist())], batch_size=100).metrics_json("x") == expected
    assert sizes == [2, 2]
    monkeypatch.setattr(protocol, "MAX_SCORES", 1)
    evaluate([Watched("pixrec", FALLING._scores.tolist())])
    assert sizes[2:] == [1] * 4  # a single user has to fit


def test_a_scorer_may_ask_who_the_users_are():
    class ByName(Scorer):
        name = "by_name"

        def scores(self, users):
            wanted = dict(zip(HELD_OUT.user_ids, HELD_OUT.targets, strict=True))
            return torch.nn.functional.one_hot(torch.tensor([wanted[u] for u in users.user_ids]), NUM_ITEMS).float()

    assert evaluate([ByName()]).metrics_json("x")["results"]["by_name"]["recall@1"] == 1


def test_blocks_may_come_in_any_order():
    """As they do from several machines."""
    tasks = []

    def rank(scorer, task, progress):
        tasks.append(task)
        return protocol.rank_here(scorer, task, progress)

    config = EvaluateConfig(ks=(2,), bootstrap_samples=50)
    known = {"training_counts": COUNTS, "with_image": WITH_IMAGE}
    expected = evaluate_scorers([FALLING], HELD_OUT, config, rank=rank, **known).outcomes["pixrec"]
    collector = Collector(tasks[0])
    for users in (np.array([3, 1]), np.array([0]), np.array([2])):
        collector.add(users, tasks[0].rank(FALLING, HELD_OUT.only(users)))
    outcome = collector.outcome()
    assert outcome.lists == pytest.approx(expected.lists)
    for seen in ("allowed", "filtered"):
        np.testing.assert_array_equal(outcome.ranks[seen], expected.ranks[seen])
