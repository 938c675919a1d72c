"""Search among vectors: exact and approximate, filtered, in shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pixrec.index import top_k
from pixrec.retrieval.approximate import Approximate, build
from pixrec.retrieval.search import EXACT_SHARE, Searcher, merge, row_ranges, search_shards

N, D = 4000, 16


def whole_numbers(rows: int, seed: int) -> np.ndarray:
    """Vectors whose products are exact and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, D)).astype(np.float32)


class Recorded:
    """Proposes what it is told to, and notes what it was asked for."""

    proposed_each = 4

    def __init__(self, proposed: np.ndarray) -> None:
        self.proposed, self.asked = proposed, []

    def candidates(self, queries, count, allowed=None):
        self.asked.append((len(queries), count, None if allowed is None else int(allowed.sum())))
        return self.proposed


def test_without_a_structure_a_search_is_exact():
    queries, items = whole_numbers(3, 0), whole_numbers(N, 1)
    for allowed in (None, np.random.default_rng(0).random(N) < 0.5, np.ones(N, bool)):
        rows = None if allowed is None else np.flatnonzero(allowed)
        for found, wanted in zip(
            Searcher(items).search(queries, 9, allowed), top_k(queries, items, 9, rows), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)
    scores, rows = Searcher(items).search(queries, 9, np.zeros(N, bool))
    assert scores.shape == rows.shape == (3, 0)


def test_what_is_proposed_is_ranked_by_the_full_vectors_with_ties_in_row_order():
    queries, items = whole_numbers(2, 0), whole_numbers(N, 1)
    structure = Recorded(np.stack([np.random.default_rng(0).permutation(N)] * 2))
    scores, rows = Searcher(items, structure).search(queries, 30)
    wanted_scores, wanted_rows = top_k(queries, items, 30)
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert structure.asked == [(2, 120, None)]
    Searcher(items, structure).search(queries, 3, np.ones(N, bool))
    assert structure.asked[1:] == [(2, 64, None)]


def test_a_query_for_which_too_few_are_proposed_is_searched_exactly():
    queries, items = whole_numbers(2, 0), whole_numbers(N, 1)
    proposed = np.full((2, 64), -1)
    proposed[0] = np.argsort(-(queries[0] @ items.T), kind="stable")[:64]
    proposed[1, :4] = [5, 6, 7, 8]
    found = Searcher(items, Recorded(proposed)).search(queries, 10)
    for ours, theirs in zip(found, top_k(queries, items, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("k", "value", "message"), [(0, 1.0, "at least 1"), (3, np.nan, "queries hold a value")])
def test_refuses_what_it_cannot_rank(k, value, message):
    for structure in (None, Recorded(np.tile(np.arange(64), (1, 1)))):
        with pytest.raises(ValueError, match=message):
            Searcher(whole_numbers(N, 1), structure).search(np.full((1, D), value, np.float32), k)


def test_where_few_items_pass_they_are_all_compared():
    queries, items = whole_numbers(2, 0), whole_numbers(N, 1)
    structure = Recorded(np.tile(np.arange(64), (2, 1)))
    for passing in (1, 10, int(N * EXACT_SHARE)):
        allowed = np.zeros(N, bool)
        allowed[np.random.default_rng(0).choice(N, passing, replace=False)] = True
        _, rows = Searcher(items, structure).search(queries, 10, allowed)
        np.testing.assert_array_equal(rows, top_k(queries, items, 10, np.flatnonzero(allowed))[1])
    assert not structure.asked
    allowed[: N // 2] = True
    Searcher(items, structure).search(queries, 10, allowed)
    assert structure.asked == [(2, 64, int(allowed.sum()))]


def test_recall_under_filters_of_any_share(tmp_path: Path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    rng = np.random.default_rng(0)
    items = rng.standard_normal((40, D))[rng.integers(0, 40, N)] + 0.4 * rng.standard_normal((N, D))
    items = (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)
    build(items, "int8", str(tmp_path / "structure.faiss"), threads=1)
    searcher, queries = Searcher(items, Approximate(str(tmp_path / "structure.faiss"), 32)), items[:100]
    for passing, least in ((N, 0.98), (N // 2, 0.98), (N // 100, 1.0), (10, 1.0)):
        allowed = np.zeros(N, bool)
        allowed[rng.choice(N, passing, replace=False)] = True
        _, rows = searcher.search(queries, 10, allowed)
        _, exact = Searcher(items).search(queries, 10, allowed)
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact, strict=True)]) >= least
        assert allowed[rows].all()


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("num_items", [4000, 1003, 5])
def test_shards_give_what_one_index_gives(shards, num_queries, num_items):
    """Ties, which whole numbers are full of, in the order of the whole index. Their scores are equal to the bit; those
    of other numbers may differ in the last one, since threads sum in an order of their own."""
    real = np.random.default_rng(0).standard_normal((num_items, D)).astype(np.float32)
    real[::3] = real[0]
    for items in (whole_numbers(num_items, 1), real):
        queries, allowed = items[:num_queries] + 1, np.random.default_rng(0).random(num_items) < 0.6
        parts = row_ranges(num_items, shards)
        assert [row for part in parts for row in part] == list(range(num_items))
        searchers = [Searcher(items[part.start : part.stop], first_row=part.start) for part in parts]
        for mask in (None, allowed):
            masks = None if mask is None else [mask[part.start : part.stop] for part in parts]
            merged, whole = search_shards(searchers, queries, 20, masks), Searcher(items).search(queries, 20, mask)
            np.testing.assert_array_equal(merged.rows, whole[1])
            np.testing.assert_allclose(merged.scores, whole[0], rtol=0 if items is not real else 1e-6)
            assert merged.missing == []


def test_a_shard_that_fails_is_named_and_the_others_answer():
    class Broken:
        def search(self, queries, k, allowed=None):
            raise OSError("gone")

    items, lost = whole_numbers(90, 1), []
    shards = [Searcher(items[:30]), Broken(), Searcher(items[60:], first_row=60)]
    merged = search_shards(shards, items[:2], 8, lost=lambda number, error: lost.append((number, str(error))))
    assert (merged.missing, lost) == ([1], [(1, "gone")])
    others = np.r_[0:30, 60:90]
    np.testing.assert_array_equal(merged.rows, top_k(items[:2], items, 8, others)[1])
    with pytest.raises(ValueError, match="no shard gave an answer"):
        merge([None, None], 8)
    with pytest.raises(ValueError, match="no shard gave an answer"):
        search_shards([Broken()], items[:2], 8)
