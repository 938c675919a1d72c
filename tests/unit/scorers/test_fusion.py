"""Merged rankings worked out by hand."""

import numpy as np
import torch
from fakes import FixedScorer, users_of

from pixrec.scorers.fusion import ReciprocalRankFusion, RoundRobin, pessimistic_ranks


def fixed(scores: list[float]) -> FixedScorer:
    return FixedScorer("fixed", scores)


ONE_USER = users_of([np.array([0])])


def test_pessimistic_ranks():
    ranks = pessimistic_ranks(torch.tensor([[3.0, 1.0, 1.0, float("-inf"), float("nan")]]))
    assert ranks.tolist() == [[1, 3, 3, 5, 5]]


def test_fusion_sums_reciprocal_ranks_whatever_the_scale():
    fused = ReciprocalRankFusion("rrf", [fixed([9.0, 8.0, 1.0]), fixed([0.1, 0.3, 0.2])])
    expected = np.log([1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])
    np.testing.assert_allclose(fused.scores(ONE_USER)[0].numpy(), expected, rtol=1e-6)
    assert fused.name == "rrf"


def test_round_robin_takes_turns():
    merged = RoundRobin(
        "round_robin",
        [fixed([5.0, 4.0, 3.0, 2.0, 1.0]), fixed([1.0, 2.0, 0.0, 4.0, 5.0])],
    )
    order = merged.scores(ONE_USER)[0].argsort(descending=True, stable=True).tolist()
    assert order == [0, 4, 1, 3, 2]
