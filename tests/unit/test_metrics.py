"""Ranks by hand, metrics against the plainest computation, intervals by their properties."""

import math

import numpy as np
import pytest
import torch

from pixrec.metrics import (
    bootstrap_ci,
    count_ties,
    paired_difference_ci,
    random_tie_recall,
    rank_metrics,
    target_ranks,
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
    first, tied, last = (random_tie_recall(ranks[i : i + 1], ties[i : i + 1], (1, 2, 3, 4)) for i in range(3))
    assert set(first.values()) == {1.0}
    assert set(last.values()) == {0.0}
    assert tied == pytest.approx({"recall@1": 0, "recall@2": 1 / 3, "recall@3": 2 / 3, "recall@4": 1})


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
        result[f"recall@{k}"] = sum(1 for rank in ranks if rank <= k) / len(ranks)
        # NDCG as defined over the list: the gain of each place, here 1 at the target's, over the ideal list's
        gains = [[1.0 if place == rank else 0.0 for place in range(1, k + 1)] for rank in ranks]
        result[f"ndcg@{k}"] = sum(sum(g / math.log2(1 + p) for p, g in enumerate(gs, 1)) for gs in gains) / len(ranks)
    return result


def test_rank_metrics_equal_the_naive_computation():
    ranks = np.random.default_rng(1).integers(1, 60, 300)
    assert rank_metrics(ranks, (1, 5, 10, 50)) == pytest.approx(naive_metrics(ranks.tolist(), (1, 5, 10, 50)))


def test_rank_metrics_by_hand():
    assert rank_metrics([1, 3, 20], [1, 10]) == pytest.approx(
        {"recall@1": 1 / 3, "recall@10": 2 / 3, "ndcg@1": 1 / 3, "ndcg@10": 1.5 / 3, "mrr": (1 + 1 / 3 + 1 / 20) / 3}
    )


@pytest.mark.parametrize(
    ("ranks", "ks"), [([0, 1], [1]), ([], [1]), ([1.5], [1]), ([1], [0]), ([[1]], [1]), ([NAN], [1])]
)
def test_rank_metrics_refuse(ranks, ks):
    with pytest.raises(ValueError, match=r"rank|cut-offs"):
        rank_metrics(np.array(ranks), ks)


def test_interval_contains_the_mean_and_shrinks_with_users():
    rng = np.random.default_rng(2)
    widths = []
    for users in (50, 500, 5000):
        values = rng.random(users) < 0.3
        low, high = bootstrap_ci(values, 1000, seed=0)
        assert low < values.mean() < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_interval_has_the_width_theory_gives():
    values = np.random.default_rng(3).normal(size=500)
    low, high = bootstrap_ci(values, 2000, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(500), rel=0.1)


def test_interval_is_reproducible_in_any_blocks(monkeypatch):
    values = np.random.default_rng(4).normal(size=100)
    whole = bootstrap_ci(values, 200, seed=5)
    monkeypatch.setattr("pixrec.metrics.RESAMPLE_BLOCK", 700)
    assert bootstrap_ci(values, 200, seed=5) == pytest.approx(whole)
    assert bootstrap_ci(values, 200, seed=6) != pytest.approx(whole)


def test_interval_of_one_value_is_that_value():
    assert bootstrap_ci([0.25]) == (0.25, 0.25)


@pytest.mark.parametrize(("values", "samples"), [([], 10), ([NAN], 10), ([1.0], 0)])
def test_interval_refuses(values, samples):
    with pytest.raises(ValueError, match=r"values|samples"):
        bootstrap_ci(values, samples)


def test_pairing_takes_out_what_users_share():
    rng = np.random.default_rng(6)
    shared = rng.normal(size=400)
    a, b = shared + 0.1 + 0.01 * rng.normal(size=400), shared
    low, high = paired_difference_ci(a, b)
    assert 0.09 < low < 0.1 < high < 0.11
    with pytest.raises(ValueError, match="same users"):
        paired_difference_ci(a, b[:-1])
