import numpy as np
import torch

from pixrec.baselines import Popularity, RepeatLast

COUNTS = np.array([5, 0, 7, 5])


def test_popularity_orders_by_count_and_keeps_ties():
    scores = Popularity(COUNTS).scores([np.array([1]), np.array([2, 3])])
    assert scores.shape == (2, 4)
    assert scores.dtype == torch.float32
    assert scores[0].equal(scores[1])
    assert scores[0, 2] > scores[0, 0] == scores[0, 3] > scores[0, 1]


def test_popularity_keeps_large_counts_apart():
    scores = Popularity(np.array([2**24, 2**24 + 1])).scores([np.array([0])])
    assert scores[0, 1] > scores[0, 0]


def test_repeat_last_puts_the_own_items_first_most_recent_leading():
    scores = RepeatLast(COUNTS).scores([np.array([1, 3, 1]), np.array([0])])
    assert scores.argsort(dim=1, descending=True, stable=True).tolist() == [[1, 3, 2, 0], [0, 2, 3, 1]]


def test_repeat_last_leaves_no_trace_between_users():
    scorer = RepeatLast(COUNTS)
    first = scorer.scores([np.array([1])])
    scorer.scores([np.array([3])])
    assert scorer.scores([np.array([1])]).equal(first)
