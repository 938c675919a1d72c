"""Baselines worked out by hand, and the properties each promises."""

import itertools

import numpy as np
import pytest
import torch
from fakes import users_of

from pixrec.scorers.baselines import (
    ContentLinear,
    ItemTransition,
    Popularity,
    RecentPopularity,
    RepeatLast,
)

COUNTS = np.array([5, 0, 7, 5])


def test_popularity_orders_by_count_and_keeps_ties():
    scores = Popularity(COUNTS).scores(users_of([np.array([1]), np.array([2, 3])]))
    assert scores.shape == (2, 4)
    assert scores.dtype == torch.float32
    assert scores[0].equal(scores[1])
    assert scores[0, 2] > scores[0, 0] == scores[0, 3] > scores[0, 1]


def test_popularity_keeps_large_counts_apart():
    scores = Popularity(np.array([2**24, 2**24 + 1])).scores(users_of([np.array([0])]))
    assert scores[0, 1] > scores[0, 0]


def test_repeat_last_puts_the_own_items_first_most_recent_leading():
    scores = RepeatLast(COUNTS).scores(users_of([np.array([1, 3, 1]), np.array([0])]))
    assert scores.argsort(dim=1, descending=True, stable=True).tolist() == [[1, 3, 2, 0], [0, 2, 3, 1]]


def test_repeat_last_leaves_no_trace_between_users():
    scorer = RepeatLast(COUNTS)
    first = scorer.scores(users_of([np.array([1])]))
    scorer.scores(users_of([np.array([3])]))
    assert scorer.scores(users_of([np.array([1])])).equal(first)


def test_recent_popularity_counts_the_last_stretch_first():
    rows, times = np.array([0, 0, 0, 1, 2, 1]), np.array([1, 2, 3, 4, 9, 10])
    scores = RecentPopularity([rows], [times], 4, recent_share=0.4).scores(users_of([np.array([0])]))
    assert scores[0].argsort(descending=True, stable=True).tolist() == [1, 2, 0, 3]  # of late: 1 once or twice, 2 once
    ever = RecentPopularity([rows], [times], 4, recent_share=1.0).scores(users_of([np.array([0])]))
    assert ever[0].argsort(descending=True, stable=True).tolist() == [0, 1, 2, 3]


def test_recent_popularity_takes_all_of_one_moment():
    scores = RecentPopularity([np.array([0, 1, 2])], [np.array([5, 5, 5])], 3, recent_share=0.01).scores(
        users_of([np.array([0])])
    )
    assert len(scores[0].unique()) == 1
    empty = np.array([], dtype=np.int64)
    assert RecentPopularity([empty], [empty], 3, recent_share=0.5).scores(users_of([np.array([0])])).shape == (1, 3)


def dense_transitions(histories, n, steps, damping, backoff):
    """The plain twin: whole matrices."""
    counts = np.zeros((n, n))
    for history in histories:
        for a, b in itertools.pairwise(history):
            counts[a, b] += 1
    followed = counts.sum(1)
    p = counts / np.maximum(followed, 1)[:, None]
    weights = damping ** np.arange(steps)
    walk = sum(w * np.linalg.matrix_power(p, k + 1) for k, w in enumerate(weights / weights.sum()))
    popularity = np.bincount(np.concatenate(histories), minlength=n) / sum(map(len, histories))
    chance = (followed[:, None] * walk + backoff * popularity) / (followed[:, None] + backoff)
    return np.log(np.maximum(chance, 1e-12))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_transitions_equal_the_whole_matrices(steps):
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 20, rng.integers(1, 9)) for _ in range(30)]  # items 20 to 24 never occur
    scorer = ItemTransition(histories, 25, steps=steps, damping=0.4, backoff_events=3)
    asked = [np.array([3, item]) for item in (0, 7, 24, 7)]
    expected = dense_transitions(histories, 25, steps, 0.4, 3)[[0, 7, 24, 7]]
    np.testing.assert_allclose(scorer.scores(users_of(asked)).numpy(), expected, rtol=1e-5)


def test_transitions_know_what_follows_and_what_follows_that():
    histories = [np.array([0, 1]), np.array([0, 1]), np.array([1, 2])]
    near = ItemTransition(histories, 4, steps=1, backoff_events=0.1).scores(users_of([np.array([0])]))[0]
    far = ItemTransition(histories, 4, steps=2, backoff_events=0.1).scores(users_of([np.array([0])]))[0]
    assert near.argmax() == far.argmax() == 1
    assert far[2] - far[3] > near[2] - near[3]  # item 2 is two steps away
    assert torch.isfinite(far).all()


def test_content_linear_learns_where_histories_go():
    """Items on a circle; everybody goes on a quarter turn, which a linear map of the last item can say."""
    angles = 2 * np.pi * np.arange(12) / 12
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    histories = [(start + 3 * np.arange(5)) % 12 for start in range(12)]
    scorer = ContentLinear(histories, vectors, decay=0.0, ridge=1e-6)
    scores = scorer.scores(users_of([np.array([4, 7]), np.array([1])]))
    assert scores.argmax(dim=1).tolist() == [10, 4]


def test_content_linear_is_the_ridge_solution_over_all_pairs():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(15, 4)).astype(np.float32)
    histories = [rng.integers(0, 15, n) for n in (1, 2, 5, 9, 5)]
    scorer = ContentLinear(histories, vectors, decay=0.7, ridge=0.01)
    pairs = [(h[: i + 1], h[i + 1]) for h in histories for i in range(len(h) - 1)]
    users = []
    for past, _ in pairs:
        weights = 0.7 ** np.arange(len(past))[::-1]
        users.append((weights[:, None] * vectors[past]).sum(0) / weights.sum())
    users, following = np.stack(users), vectors[[row for _, row in pairs]]
    gram = users.T @ users
    solution = np.linalg.solve(gram + 0.01 * np.trace(gram) / 4 * np.eye(4), users.T @ following)
    expected = np.stack([user @ solution @ vectors.T for user in users[:3]])
    np.testing.assert_allclose(scorer.scores(users_of([past for past, _ in pairs[:3]])).numpy(), expected, atol=1e-4)


def test_transitions_of_a_large_catalog_do_not_overflow():
    histories = [np.array([99_000, 99_999, 3], dtype=np.int32)] * 3
    scores = ItemTransition(histories, 100_000, steps=1).scores(users_of([np.array([99_999])]))
    assert int(scores[0].argmax()) == 3
