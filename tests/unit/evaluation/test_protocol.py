"""The protocol on a catalog of six items, worked out by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from fakes import tiny_dataset, tiny_items

from pixrec.config import EvaluateConfig, SasrecConfig, SasrecTrainingConfig
from pixrec.data.sequences import HeldOut
from pixrec.errors import InputError
from pixrec.evaluation import protocol
from pixrec.evaluation.protocol import Collector, evaluate_scorers, sample_users
from pixrec.scorers import Scorer, Users, train_sasrec
from pixrec.scorers.baselines import ItemTransition, Popularity, RepeatLast
from pixrec.scorers.fusion import ReciprocalRankFusion, RoundRobin

NUM_ITEMS = 6
LISTS = ("coverage", "novelty")
COUNTS = np.array([9, 1, 2, 1, 3, 0])  # item 5 is cold, item 0 alone is head
WITH_IMAGE = np.array([True, True, True, True, False, False])
HELD_OUT = HeldOut(
    ["u0", "u1", "u2", "u3"],
    [np.array([0, 1]), np.array([0]), np.array([4, 0, 1]), np.array([1])],
    np.array([2, 5, 0, 3]),
)


class Table(Scorer):
    """A scorer that gives every user the same scores."""

    def __init__(self, name: str, scores: list[float]) -> None:
        self.name, self._scores = name, torch.tensor(scores)

    def scores(self, users: Users) -> torch.Tensor:
        return self._scores.expand(len(users.histories), -1)


FALLING = Table("pixrec", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
FLAT = Table("popularity", [1.0] * NUM_ITEMS)


def evaluate(scorers=(FALLING, FLAT), held_out=HELD_OUT, **config):
    config = EvaluateConfig(**{"ks": (2,), "bootstrap_samples": 50, "batch_size": 3} | config)
    return evaluate_scorers(list(scorers), held_out, config, training_counts=COUNTS, with_image=WITH_IMAGE)


def test_ranks_with_seen_items_allowed_and_filtered():
    outcomes = evaluate().outcomes
    assert outcomes["pixrec"].ranks["allowed"].tolist() == [3, 6, 1, 4]
    assert outcomes["pixrec"].ranks["filtered"].tolist() == [1, 5, 1, 3]  # u2's target is in its history: it stays
    assert outcomes["popularity"].ranks["allowed"].tolist() == [6] * 4
    assert outcomes["popularity"].ranks["filtered"].tolist() == [4, 5, 4, 5]
    assert (outcomes["popularity"].ties > 0).all()
    assert not outcomes["pixrec"].ties.any()


class Timed(Table):
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


def test_metrics_json_has_the_promised_shape():
    metrics = evaluate().metrics_json("temporal")
    assert metrics["protocol"] == {"split": "temporal", "candidates": "all", "ties": "pessimistic", "seen": "allowed"}
    assert metrics["users"] == 4
    result = metrics["results"]["pixrec"]
    assert {k: result[k] for k in ("recall@1", "recall@2", "recall@10", "mrr")} == pytest.approx(
        {"recall@1": 1 / 4, "recall@2": 1 / 4, "recall@10": 1, "mrr": (1 / 3 + 1 / 6 + 1 + 1 / 4) / 4}
    )
    lists = {f"{name}@{k}" for name in ("coverage", "novelty") for k in (1, 2, 10)}
    assert set(result["ci95"]) == set(result) - {"ci95"} - lists
    assert set(result) >= {f"{name}@{k}" for name in ("recall", "ndcg", "mrr", "map") for k in (1, 2, 10)} | lists
    for metric, (low, high) in result["ci95"].items():
        assert low <= result[metric] <= high
    assert json.loads(json.dumps(metrics)) == metrics  # plain numbers only


def test_seen_filtered_swaps_the_two_settings():
    allowed, filtered = evaluate().metrics_json("x"), evaluate(seen="filtered").metrics_json("x")
    assert filtered["protocol"]["seen"] == "filtered"
    accuracy = lambda results: {s: {m: v for m, v in r.items() if not m.startswith(LISTS)} for s, r in results.items()}  # noqa: E731
    assert accuracy(filtered["results"]) == allowed["results_other_seen"]["results"]
    assert filtered["results_other_seen"] == {"seen": "allowed", "results": accuracy(allowed["results"])}
    # filtered, u1 is recommended item 1 first, u0 and u2 item 2, u3 item 0
    assert allowed["results"]["pixrec"]["coverage@1"] == pytest.approx(1 / 6)
    assert filtered["results"]["pixrec"]["coverage@1"] == pytest.approx(3 / 6)


def test_buckets_hold_every_user_once_a_pair():
    buckets = evaluate().metrics_json("x")["buckets"]
    users = {name: bucket["users"] for name, bucket in buckets.items()}
    assert users == {
        "target_warm": 3,
        "target_cold": 1,
        "target_head": 1,
        "target_tail": 2,
        "target_with_picture": 3,
        "target_without_picture": 1,
        "history_short": 2,
        "history_long": 2,
    }
    cold = buckets["target_cold"]["results"]["pixrec"]
    assert (cold["recall@10"], cold["ci95"]["recall@10"]) == (1.0, [1.0, 1.0])
    assert cold["ndcg@10"] == pytest.approx(1 / np.log2(7))


def test_the_cold_bucket_compares_the_scorers_on_its_own_users():
    buckets = evaluate(ks=(2, 4)).metrics_json("x")["buckets"]
    assert [name for name in buckets if "differences" in buckets[name]] == ["target_cold"]
    found = buckets["target_cold"]["differences"]
    assert found["of"] == "pixrec"
    assert found["minus"]["popularity"]["ndcg@10"] == 0, "u1 alone: the target is last for both"
    assert found["minus"]["popularity"]["p_holm"] == {"recall@10": 1.0, "ndcg@10": 1.0}


def test_without_a_training_event_no_id_based_scorer_finds_an_item():
    """Every user's last event is the one item that no training saw; content would find it."""
    dataset = tiny_dataset(tiny_items(24), num_users=20, num_events=6)
    rows = dataset.events.rows % 12
    rows[dataset.events.offsets[1:] - 1] = 23
    dataset = dataclasses.replace(dataset, events=dataclasses.replace(dataset.events, rows=rows))
    counts, histories = dataset.training_counts(), dataset.training_histories()
    training = SasrecTrainingConfig(loss="full", epochs=2, validate_every_epochs=1)
    scorers = [
        Table("content", list(range(24))),
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


def test_an_empty_bucket_has_no_results():
    held_out = HeldOut(["u"], [np.array([0])], np.array([1]))
    bucket = evaluate(held_out=held_out).metrics_json("x")["buckets"]["target_cold"]
    assert bucket["users"] == 0
    assert bucket["results"] == {}
    assert "differences" not in bucket


def test_guards():
    guards = evaluate([FALLING, FLAT, Table("worse", [float("nan")] * 6)]).metrics_json("x")["guards"]
    assert guards["repeat_share"] == 0.25
    assert guards["tie_share"] == {"pixrec": 0.0, "popularity": 1.0, "worse": 1.0}
    assert guards["chance_recall@10"] == 1.0
    assert guards["popularity_recall@10"] == 1.0
    assert guards["below_popularity"] == []


@pytest.mark.parametrize("seen", ["allowed", "filtered"])
def test_ties_broken_at_random_are_never_worse_than_against_the_scorer(seen):
    """In the setting of `results`: of a filtered list the seen items that tie with the target are no rivals."""
    measured = evaluate(seen=seen)
    metrics = measured.metrics_json("leave_one_out")
    assert measured.outcomes["popularity"].ties.tolist() == ([5] * 4 if seen == "allowed" else [3, 4, 3, 4])
    flat = metrics["guards"]["random_ties"]["popularity"]
    candidates = np.array([6] * 4 if seen == "allowed" else [4, 5, 4, 5])
    assert flat["recall@1"] == pytest.approx((1 / candidates).mean())
    assert flat["recall@1"] >= metrics["results"]["popularity"]["recall@1"]


def test_guard_names_the_scorer_below_popularity():
    held_out = HeldOut(["u"], [np.array([0])], np.array([20]))
    mask = np.zeros(21, bool)
    best_last = Table("popularity", list(range(21)))
    best_first = Table("pixrec", list(range(21, 0, -1)))
    evaluation = evaluate_scorers(
        [best_first, best_last], held_out, EvaluateConfig(), training_counts=mask + 1, with_image=mask
    )
    assert evaluation.metrics_json("x")["guards"]["below_popularity"] == ["pixrec"]


def test_differences_are_taken_from_the_first_scorer():
    differences = evaluate().metrics_json("x")["differences"]
    assert differences["of"] == "pixrec"
    assert differences["minus"]["popularity"]["recall@1"] == 0.25
    low, high = differences["minus"]["popularity"]["ci95"]["recall@1"]
    assert 0 <= low < 0.25 < high < 1
    other = differences["minus"]["popularity"]
    assert 0 < other["p"]["mrr"] == other["p_holm"]["mrr"] <= 1


def test_p_values_are_adjusted_for_the_number_of_scorers():
    minus = evaluate([FALLING, FLAT, Table("third", [1.0] * 6)]).metrics_json("x")["differences"]["minus"]
    assert minus["third"]["p_holm"]["mrr"] == pytest.approx(min(1.0, 2 * minus["third"]["p"]["mrr"]))


@pytest.mark.parametrize("seen", ["allowed", "filtered"])
def test_item_order_does_not_change_metrics(seen):
    """Ranks, ties, coverage and novelty alike, with many ties among items of one score."""
    rng = np.random.default_rng(0)
    ids = [f"item {row}" for row in range(NUM_ITEMS)]
    scores = {"pixrec": FALLING._scores, "popularity": FLAT._scores, "coarse": torch.tensor([1.0, 2, 2, 1, 2, 1])}

    def measured(order):
        place = np.argsort(order)
        return evaluate_scorers(
            [Table(name, values[torch.from_numpy(order)].tolist()) for name, values in scores.items()],
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
        evaluate([Table("narrow", [1.0])])
    with pytest.raises(InputError, match="holds out no event"):
        evaluate(held_out=HeldOut([], [], np.array([], dtype=np.int64)))
    with pytest.raises(ValueError, match="one entry for each"):
        evaluate_scorers([FALLING], HELD_OUT, EvaluateConfig(), training_counts=COUNTS[:2], with_image=WITH_IMAGE)


def test_no_more_scores_at_a_time_than_the_bound(monkeypatch):
    sizes = []

    class Watched(Table):
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
