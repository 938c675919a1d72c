"""`top_k` against a full sort of the same scores."""

import numpy as np
import pytest
import torch

from pixrec import index
from pixrec.index import top_k


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and an uneven tail, at sizes that take no time."""
    monkeypatch.setattr(index, "QUERY_BLOCK", 3)
    monkeypatch.setattr(index, "ITEM_BLOCK", 16)


def whole_numbers(rows: int, width: int, seed: int) -> np.ndarray:
    """Vectors whose products are exact and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, width)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 5, 16, 17, 69, 70, 100])
def test_equals_a_full_stable_sort_with_ties(small_blocks, k):
    queries, items = whole_numbers(7, 4, 0), whole_numbers(70, 4, 1)
    scores, rows = top_k(queries, items, k)
    expected = np.argsort(-(queries @ items.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(queries @ items.T, expected, axis=1))
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_many_items_with_ties_in_row_order(num_queries, threads):
    """Enough items for the way by the largest of each chunk; one query on one thread has a product of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        queries, items = whole_numbers(num_queries, 4, 0), whole_numbers(70_001, 4, 1)
        scores, rows = top_k(queries, items, 20)
    finally:
        torch.set_num_threads(before)
    expected = np.argsort(-(queries @ items.T), axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(queries @ items.T, expected, axis=1))


@pytest.mark.parametrize("num_items", [1, 63, 1003, 5001])
def test_equal_items_come_in_row_order(num_items):
    vector = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    queries = np.random.default_rng(1).standard_normal((7, 100)).astype(np.float32)
    _, rows = top_k(queries, np.tile(vector, (num_items, 1)), 10)
    np.testing.assert_array_equal(rows, np.tile(np.arange(min(10, num_items)), (7, 1)))


def test_blocks_do_not_change_the_answer(small_blocks, monkeypatch):
    rng = np.random.default_rng(2)
    queries, items = rng.standard_normal((8, 32)), rng.standard_normal((203, 32))
    scores, rows = top_k(queries, items, 20)
    monkeypatch.undo()
    whole_scores, whole_rows = top_k(queries, items, 20)
    np.testing.assert_array_equal(rows, whole_rows)
    np.testing.assert_allclose(scores, whole_scores, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_takes_tensors_of_any_float_type(dtype):
    queries, items = torch.from_numpy(whole_numbers(2, 8, 3)), torch.from_numpy(whole_numbers(30, 8, 4))
    scores, rows = top_k(queries.to(dtype), items.to(dtype), 4)
    assert isinstance(scores, torch.Tensor)
    assert scores.dtype == torch.float32
    np.testing.assert_array_equal(rows, top_k(queries.numpy(), items.numpy(), 4)[1])


def test_takes_arrays_read_backwards():
    items = whole_numbers(5, 3, 5)
    expected = top_k(items[::-1].copy(), items[::-1].copy(), 2)
    for ours, theirs in zip(top_k(items[::-1], items[::-1], 2), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_takes_read_only_arrays():
    items = whole_numbers(5, 3, 5)
    items.flags.writeable = False
    assert top_k(items, items, 2)[1].shape == (5, 2)


def test_empty_sides():
    assert top_k(np.zeros((0, 3), np.float32), np.zeros((4, 3), np.float32), 2)[0].shape == (0, 2)
    assert top_k(np.zeros((4, 3), np.float32), np.zeros((0, 3), np.float32), 2)[1].shape == (4, 0)


@pytest.mark.parametrize(
    ("queries", "items", "k", "message"),
    [
        (np.ones((1, 3)), np.ones((2, 3)), 0, "at least 1"),
        (np.ones((1, 3)), np.ones((2, 4)), 1, "one width"),
        (np.ones(3), np.ones((2, 3)), 1, r"\(B, D\)"),
        (np.full((1, 3), np.nan), np.ones((2, 3)), 1, "queries"),
        (np.ones((1, 3)), np.full((2, 3), np.nan), 1, "items"),
    ],
)
def test_refuses_what_it_cannot_rank(queries, items, k, message):
    with pytest.raises(ValueError, match=message):
        top_k(queries, items, k)


@pytest.mark.parametrize("share", [0.5, 0.01, 0.9, 1.0])
@pytest.mark.parametrize("k", [7, 1000])
def test_a_search_among_some_rows_is_that_among_their_vectors(share, k):
    rng = np.random.default_rng(0)
    queries, items = rng.standard_normal((3, 8)).astype("float32"), rng.standard_normal((300, 8)).astype("float32")
    rows = np.flatnonzero(rng.random(300) < share)
    scores, found = top_k(queries, items, k, rows)
    expected, places = top_k(queries, items[rows], k)
    assert np.array_equal(scores, expected)
    assert np.array_equal(found, rows[places])
