"""Ids in columns, their hashes, and the way from an id to its row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pixrec.data import ids as module
from pixrec.data.ids import IdIndex, Ids, hash_id, hash_ids, only


def large(*texts: str | None) -> pa.Array:
    return pa.array(texts, pa.large_string())


@pytest.mark.parametrize("chunked", [False, True])
def test_ids_are_a_sequence_of_strings(chunked: bool):
    column = pa.chunked_array([["a", "b"], ["c", "d"]]) if chunked else pa.array(list("abcd"))
    ids = Ids(column)
    assert (len(ids), ids[0], ids[-1], ids.index("c")) == (4, "a", "d", 2)
    assert ids == list("abcd")
    assert list("abcd") == ids
    assert ids != list("abc")
    assert ids[1:3] == ["b", "c"]
    some = only(ids, np.array([3, 0]))
    assert some == ["d", "a"]
    assert only(some, np.array([1])) == ["a"]
    assert pa.array(some, pa.string()).to_pylist() == ["d", "a"]
    assert only(["a", "b"], np.array([1])) == ["b"]
    assert "b" in ids
    assert "z" not in ids


def test_a_hash_is_that_of_the_bytes_whatever_is_around_them():
    """Stored data sets hold these numbers: they may never change."""
    texts = ["", "a", "12345678", "123456789", "ä", "x" * 100]
    hashes = hash_ids(large(*texts))
    assert hashes[[1, 3]].tolist() == [12812169089589012694, 4033013329960724831]
    for row, text in enumerate(texts):
        assert hash_ids(large(text))[0] == hash_id(text) == hashes[row]
    assert hash_ids(large("before", *texts, "after").slice(1, len(texts))).tolist() == hashes.tolist()
    assert hash_ids(pa.array(texts)).tolist() == hashes.tolist()
    assert hash_ids(large()).tolist() == []


def test_hashes_of_like_ids_are_spread():
    hashes = hash_ids(pa.array([f"item-{number:07d}" for number in range(50_000)], pa.large_string()))
    assert len(np.unique(hashes)) == 50_000
    ones = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert 0.48 < ones.min() <= ones.max() < 0.52
    assert np.bincount((hashes >> np.uint64(61)).astype(int)).min() > 5_500


def test_an_index_finds_the_rows_of_ids():
    texts = [f"i{number}" for number in np.random.default_rng(0).permutation(1000)]
    index = IdIndex.of(large(*texts))
    asked = ["i7", None, "nowhere", "", "i999", "i7"]
    rows = index.rows_of(large(*asked))
    assert rows.dtype == np.int32
    assert rows.tolist() == [texts.index("i7"), -1, -1, -1, texts.index("i999"), texts.index("i7")]
    assert (index["i7"], index.get("z"), "i8" in index, "z" in index, None in index) == (
        rows[0],
        None,
        True,
        False,
        False,
    )
    assert (len(index), next(iter(index))) == (1000, texts[0])
    for stranger in ("nowhere", "\udcff", 7):
        assert index.get(stranger) is None
        with pytest.raises(KeyError):
            index[stranger]


def test_ids_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "hash_ids", lambda ids: np.full(len(ids), 7, np.uint64))
    index = IdIndex.of(large("a", "b", "c"))
    assert index.rows_of(large("c", "z", "a", "b")).tolist() == [2, -1, 0, 1]
