"""What a type loses of exact neighbours, and how that is measured."""

from __future__ import annotations

import numpy as np
import pytest

from pixrec.artifact.recall import NeighbourRecall


def unit_vectors(count: int, width: int = 32) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def plain_recall(queries: np.ndarray, exact: np.ndarray, other: np.ndarray, k: int) -> float:
    """Brute force over whole matrices; `queries` are row numbers."""
    shares = []
    for row in queries:
        found = []
        for items in (exact, other):
            scores = items @ exact[row]
            scores[row] = -np.inf
            found.append(set(np.argsort(-scores)[:k].tolist()))
        shares.append(len(found[0] & found[1]) / k)
    return float(np.mean(shares))


def test_recall_in_blocks_is_that_of_the_whole():
    vectors = unit_vectors(700, width=8)
    coarse = np.round(vectors * 6) / 6
    rows = np.array([0, 250, 333, 699])
    meter = NeighbourRecall(vectors[rows], rows)
    for start in range(0, 700, 250):
        meter.add(vectors[start : start + 250], coarse[start : start + 250])
    figures = meter.result()
    for k in (10, 100):
        assert figures[f"recall@{k}"] == pytest.approx(plain_recall(rows, vectors, coarse, k), abs=1e-9)
    assert 0.2 < figures["recall@10"] < 1, "a loss that is there is seen"


def test_recall_of_the_same_vectors_is_one_and_small_indexes_have_fewer_figures():
    vectors = unit_vectors(40)
    meter = NeighbourRecall(vectors[:5], np.arange(5))
    meter.add(vectors, vectors)
    assert meter.result() == {"recall@10": 1.0}
