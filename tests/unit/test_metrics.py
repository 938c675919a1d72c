"""Ranks by hand, metrics against the plainest computation, intervals by their properties."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.retrieval as torchmetrics

from pixrec.index import top_k
from pixrec.metrics import (
    ListStatistics,
    count_ties,
    random_tie_metrics,
    rank_metrics,
    rank_targets,
    target_ranks,
    top_rows,
    user_metrics,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([3, 2, 1], 0, 1),
        ([3, 2, 1], 2, 3),
        ([2, 2, 1], 0, 2),  # a tie counts against the target
        ([2, 2, 2], 1, 3),
        ([NAN, 2, 1], 1, 1),  # a NaN elsewhere is no rival
        ([3, NAN, 1], 1, 3),  # a NaN target is last
        ([NAN, NAN, NAN], 0, 3),
        ([-INF, -INF, 0], 0, 3),
        ([INF, INF, 0], 1, 2),
        ([0.5, 0.5 + 6e-8, 0.1], 0, 2),  # one float32 step apart: the noise of a matrix product
        ([0.5, 0.5 - 6e-8, 0.1], 0, 2),
        ([0.5, 0.5 - 1e-6, 0.1], 0, 1),
    ],
)
def test_rank_by_hand(scores, target, rank):
    assert target_ranks(torch.tensor([scores]), np.array([target])).tolist() == [rank]


def test_excluded_items_leave_the_candidates_but_the_target_never_does():
    scores = np.array([[9, 8, 7, 6], [9, 8, 7, 6], [9, 8, 7, 6]], dtype=np.float32)
    targets = np.array([3, 3, 0])
    exclude = [np.array([0, 1, 0]), np.array([3, 2]), np.array([], dtype=np.int64)]
    ranks = target_ranks(scores, targets, exclude)
    assert ranks.tolist() == [2, 3, 1]
    assert ranks.dtype == np.int64
    assert target_ranks(scores, targets).tolist() == [4, 4, 1]


def test_item_order_does_not_matter():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (40, 30)).astype(np.float32)
    targets = rng.integers(0, 30, 40)
    exclude = [rng.integers(0, 30, 6) for _ in targets]
    order = rng.permutation(30)
    place = np.argsort(order)
    shuffled = target_ranks(scores[:, order], place[targets], [place[rows] for rows in exclude])
    np.testing.assert_array_equal(shuffled, target_ranks(scores, targets, exclude))


def test_equal_items_tie_wherever_they_stand():
    """BLAS sums the last columns of a product in another order; identical items must tie all the same."""
    vector = torch.nn.functional.normalize(torch.randn(1, 100, generator=torch.Generator().manual_seed(0)))
    queries = torch.nn.functional.normalize(torch.randn(7, 100, generator=torch.Generator().manual_seed(1)))
    scores = queries @ vector.repeat(1003, 1).T
    for target in (0, 500, 1002):
        targets = np.full(7, target)
        assert target_ranks(scores, targets).tolist() == [1003] * 7
        assert (count_ties(scores, targets) > 0).all()


def test_count_ties():
    scores = np.array([[2, 2, 1], [2, 2, 1], [NAN, NAN, 1], [INF, INF, 1]], dtype=np.float32)
    assert count_ties(scores, np.array([0, 2, 0, 1])).tolist() == [1, 0, 1, 1]


def test_random_ties_share_a_rank_evenly():
    scores, targets = np.array([[3.0, 2.0, 2.0, 2.0, 1.0]] * 3), np.array([0, 2, 4])
    ranks, ties = target_ranks(scores, targets), count_ties(scores, targets)
    first, tied, last = (
        [random_tie_metrics(ranks[i : i + 1], ties[i : i + 1], (k,))[f"recall@{k}"] for k in (1, 2, 3, 4)]
        for i in range(3)
    )
    assert first == [1, 1, 1, 1]
    assert last == [0, 0, 0, 0]
    assert tied == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(("scores", "targets"), [((2, 3), [0]), ((2, 3), [0, 3]), ((2, 3), [-1, 0]), ((3,), [0])])
def test_ranks_refuse_what_does_not_fit(scores, targets):
    with pytest.raises(ValueError, match="targets"):
        target_ranks(np.zeros(scores, np.float32), np.array(targets))


def test_exclusions_are_one_for_each_user():
    with pytest.raises(ValueError, match="1 entries for 2 users"):
        target_ranks(np.zeros((2, 3), np.float32), np.array([0, 1]), [np.array([2])])


def naive_metrics(ranks, ks):
    result = {"mrr": sum(1 / rank for rank in ranks) / len(ranks)}
    for k in ks:
        for name in ("mrr", "map"):
            result[f"{name}@{k}"] = sum(1 / rank for rank in ranks if rank <= k) / len(ranks)
        result[f"recall@{k}"] = sum(1 for rank in ranks if rank <= k) / len(ranks)
        # NDCG as defined over the list: the gain of each place, here 1 at the target's, over the ideal list's
        gains = [[1.0 if place == rank else 0.0 for place in range(1, k + 1)] for rank in ranks]
        result[f"ndcg@{k}"] = sum(sum(g / math.log2(1 + p) for p, g in enumerate(gs, 1)) for gs in gains) / len(ranks)
    return result


def test_rank_metrics_equal_the_naive_computation():
    ranks = np.random.default_rng(1).integers(1, 60, 300)
    assert rank_metrics(ranks, (1, 5, 10, 50)) == pytest.approx(naive_metrics(ranks.tolist(), (1, 5, 10, 50)))


def test_rank_metrics_by_hand():
    reciprocal = {"mrr@1": 1 / 3, "map@1": 1 / 3, "mrr@10": 4 / 9, "map@10": 4 / 9, "mrr": (1 + 1 / 3 + 1 / 20) / 3}
    assert rank_metrics([1, 3, 20], [1, 10]) == pytest.approx(
        {"recall@1": 1 / 3, "recall@10": 2 / 3, "ndcg@1": 1 / 3, "ndcg@10": 1.5 / 3, **reciprocal}
    )


@pytest.mark.parametrize(
    ("ranks", "ks"), [([0, 1], [1]), ([], [1]), ([1.5], [1]), ([1], [0]), ([[1]], [1]), ([NAN], [1])]
)
def test_rank_metrics_refuse(ranks, ks):
    with pytest.raises(ValueError, match=r"rank|cut-offs"):
        rank_metrics(np.array(ranks), ks)


LIBRARY = {
    "recall": torchmetrics.retrieval_recall,
    "ndcg": torchmetrics.retrieval_normalized_dcg,
    "mrr": torchmetrics.retrieval_reciprocal_rank,
    "map": torchmetrics.retrieval_average_precision,
}


def library(name: str, scores: torch.Tensor, target: int, k: int) -> float:
    relevant = torch.zeros(len(scores), dtype=torch.int64)
    relevant[target] = 1
    return float(LIBRARY[name](scores, relevant, top_k=k))


def test_metrics_equal_those_of_torchmetrics():
    """Scores above 0: torchmetrics takes an item of 0 or less as not retrieved at all."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 80, generator=generator) + 0.1
    targets = torch.randint(80, (60,), generator=generator)
    values = user_metrics(target_ranks(scores, targets), (1, 5, 10, 50))
    for name in LIBRARY:
        for k in (1, 5, 10, 50):
            theirs = [library(name, s, int(t), k) for s, t in zip(scores, targets, strict=True)]
            np.testing.assert_allclose(values[f"{name}@{k}"], theirs, atol=1e-6)
    whole = [library("mrr", s, int(t), 80) for s, t in zip(scores, targets, strict=True)]
    np.testing.assert_allclose(values["mrr"], whole, atol=1e-6)


def test_ties_equal_those_of_torchmetrics_where_it_defines_them():
    """It averages NDCG over the orders of tied items; of the other metrics it says nothing."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(1, 7, (60, 40), generator=generator).float()
    targets = torch.randint(40, (60,), generator=generator)
    ranked = rank_targets(scores, targets)
    assert (ranked.ties > 0).mean() > 0.9
    ours = random_tie_metrics(ranked.allowed, ranked.ties, (1, 5, 10, 40))
    pessimistic = rank_metrics(ranked.allowed, (1, 5, 10, 40))
    for k in (1, 5, 10, 40):
        theirs = [library("ndcg", s, int(t), k) for s, t in zip(scores, targets, strict=True)]
        assert ours[f"ndcg@{k}"] == pytest.approx(np.mean(theirs), abs=1e-6)
        assert pessimistic[f"ndcg@{k}"] <= ours[f"ndcg@{k}"]


def test_top_rows_are_those_of_top_k():
    generator = torch.Generator().manual_seed(2)
    queries, items = torch.randn(7, 4, generator=generator).round(), torch.randn(90, 4, generator=generator).round()
    scores = queries @ items.T
    np.testing.assert_array_equal(top_rows(scores, 12), top_k(queries, items, 12)[1].numpy())
    assert top_rows(scores, 500).shape == (7, 90)


def test_equal_scores_are_listed_in_the_order_given():
    scores = np.array([[1, 2, 2, 2, 0]], dtype=np.float32)
    assert top_rows(scores, 2).tolist() == [[1, 2]]
    assert top_rows(scores, 2, torch.tensor([4, 3, 2, 1, 0])).tolist() == [[3, 2]]


def test_seen_items_and_items_without_a_score_are_not_recommended():
    scores = np.array([[3, 2, 1, -INF], [NAN, 2, 1, 0]], dtype=np.float32)
    before = scores.copy()
    assert top_rows(scores, 4, seen=[np.array([0, 0]), np.array([1])]).tolist() == [[1, 2, -1, -1], [2, 3, -1, -1]]
    np.testing.assert_array_equal(scores, before)


def test_coverage_and_novelty_by_hand_and_in_blocks():
    counts = np.array([4, 2, 1, 1, 0])  # 1, 2, 3, 3 bits; the item never seen counts as seen once
    lists = np.array([[0, 1, 4], [0, 2, -1], [-1, -1, -1]])
    whole, parts = ListStatistics((1, 3), counts), ListStatistics((1, 3), counts)
    whole.add(lists)
    for row in lists:
        parts.add(row[None])
    novelty = {"novelty@1": 1.0, "novelty@3": ((1 + 2 + 3) / 3 + (1 + 3) / 2) / 2}
    assert whole.results() == pytest.approx({"coverage@1": 0.2, "coverage@3": 0.8, **novelty})
    assert parts.results() == pytest.approx(whole.results())
    assert whole.longest == 3


def test_filtered_ranks_need_no_second_pass():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 9, (30, 25)).astype(np.float32)
    targets = rng.integers(0, 25, 30)
    seen = [rng.integers(0, 25, 8) for _ in targets]
    ranked = rank_targets(scores, targets, seen)
    for user, target in enumerate(targets):
        rivals = [i for i in range(25) if i != target and i not in set(seen[user])]
        assert ranked.filtered[user] == 1 + sum(scores[user, i] >= scores[user, target] for i in rivals)
        assert ranked.ties[user] == sum(scores[user] == scores[user, target]) - 1
        assert ranked.filtered_ties[user] == sum(scores[user, i] == scores[user, target] for i in rivals)
