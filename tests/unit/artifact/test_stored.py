"""Vectors as they are stored, and what a type loses of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pixrec.artifact.stored import dtype_of, item_keys, to_table, to_vectors


def unit_vectors(count: int, width: int = 32, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored(vectors: np.ndarray, dtype: str) -> pa.Table:
    ids = [str(row) for row in range(len(vectors))]
    return to_table(ids, vectors, ids, [True] * len(ids), dtype)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0), ("float16", 5e-4), ("int8", 4e-3)])
def test_vectors_come_back_as_float32(dtype: str, most: float):
    vectors = unit_vectors(50)
    table = stored(vectors, dtype)
    assert dtype_of(table.schema) == dtype
    back = to_vectors(table)
    assert back.dtype == np.float32
    assert np.abs(back - vectors).max() <= most


def test_int8_keeps_length_and_uses_its_whole_range():
    vectors = np.concatenate([unit_vectors(50), np.zeros((1, 32), np.float32), 1e-3 * unit_vectors(3, seed=1)])
    table = stored(vectors, "int8")
    np.testing.assert_allclose(np.linalg.norm(to_vectors(table), axis=1), np.linalg.norm(vectors, axis=1), rtol=1e-5)
    integers = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(len(vectors), -1)
    assert set(np.abs(integers.astype(int)).max(1).tolist()) == {127, 0}


def test_a_slice_of_a_table_has_its_own_vectors():
    vectors = unit_vectors(9)
    for dtype in ("float32", "int8"):
        table = stored(vectors, dtype)
        np.testing.assert_array_equal(to_vectors(table.slice(3, 4)), to_vectors(table)[3:7])
        np.testing.assert_array_equal(to_vectors(table.take([8, 0])), to_vectors(table)[[8, 0]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(dtype: str, value: float):
    vectors = unit_vectors(3)
    vectors[1, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        stored(vectors, dtype)


def test_a_key_names_item_and_content():
    keys = item_keys(["a", "a", "b", "a"], ["x", "y", "x", "x"]).to_pylist()
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]
    assert {len(key) for key in keys} == {16}
    assert item_keys(["ab"], ["c"]) != item_keys(["a"], ["bc"])
