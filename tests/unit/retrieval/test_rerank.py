"""Maximal marginal relevance and caps, on candidates small enough to work out by hand."""

from __future__ import annotations

import numpy as np

from pixrec.retrieval.rerank import choose

# Two near copies, one that is unlike them, and one in between.
VECTORS = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
SCORES = np.array([1.0, 0.9, 0.5, 0.0], np.float32)


def test_without_diversity_the_scores_decide() -> None:
    assert choose(SCORES, VECTORS, 3) == [0, 1, 2]


def test_diversity_passes_a_copy_over() -> None:
    # After 0: 1 is worth 0.5 · 0.9 - 0.5 · 1 = -0.05, 2 is worth 0.5 · 0.5 - 0 = 0.25, 3 is worth 0 - 0.5 · 0.6.
    assert choose(SCORES, VECTORS, 4, diversity=0.5) == [0, 2, 1, 3]


def test_full_diversity_takes_the_least_similar_after_the_best() -> None:
    assert choose(SCORES, VECTORS, 3, diversity=1.0)[:2] == [0, 2]


def test_a_cap_counts_values_and_not_their_absence() -> None:
    brands = ["a", "a", None, None]
    assert choose(SCORES, VECTORS, 4, caps=[(brands, 1)]) == [0, 2, 3]
    assert choose(SCORES, VECTORS, 4, caps=[(brands, 2), (["x"] * 4, 2)]) == [0, 1]


def test_equal_scores_and_nothing_at_all() -> None:
    assert choose(np.ones(2, np.float32), VECTORS[:2], 5, diversity=0.3) == [0, 1]
    assert choose(np.zeros(0, np.float32), VECTORS[:0], 5, diversity=0.3) == []
