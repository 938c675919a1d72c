"""A new version from rows that lie in old versions and in unfinished parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pixrec import storage
from pixrec.artifact import index_version, load_index
from pixrec.artifact.sources import RECALL, Sources, reusable, write_chosen
from pixrec.artifact.stored import item_keys, to_table, to_vectors
from pixrec.artifact.unfinished import Vanished, read_part

MODEL = "m" * 32
WIDTH = 8


def vectors_of(ids: list[str]) -> np.ndarray:
    """A unit vector for each id, always the same one."""
    rows = [np.random.default_rng([ord(letter) for letter in item]).normal(size=WIDTH) for item in ids]
    return (np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_part(uri: Path, ids: list[str], dtype: str = "float32") -> str:
    storage.write_table(str(uri), to_table(ids, vectors_of(ids), ids, [True] * len(ids), dtype))
    return str(uri)


def wanted(ids: list[str]) -> list[pa.Array]:
    return [item_keys(ids, ids)]


def made_of(parts: list[str]) -> Sources:
    sources = Sources()
    for part in parts:
        sources.add(part)
    return sources


def publish(uri: Path, parts: list[str], ids: list[str], dtype: str = "float32") -> dict:
    _, before = reusable(str(uri), MODEL, dtype)
    with index_version(str(uri), MODEL, WIDTH, dtype, {}) as writer:
        write_chosen(writer, made_of(parts).choose(wanted(ids)), dtype, before)
    return load_index(str(uri)).manifest


def test_each_wanted_row_is_taken_from_exactly_one_place(tmp_path: Path):
    parts = [
        write_part(tmp_path / "0.parquet", ["a", "b", "c"]),
        write_part(tmp_path / "1.parquet", ["b", "d", "gone"]),
        write_part(tmp_path / "2.parquet", ["d", "a"]),
    ]
    sources = made_of(parts)
    chosen = sources.choose(wanted(["d", "a", "b"]))
    assert [(part.file, part.rows.tolist()) for part in chosen] == [(parts[0], [0, 1]), (parts[1], [1])]
    assert sources.known(item_keys(["a", "x", "d"], ["a", "x", "d"])).tolist() == [True, False, True]
    assert not sources.known(item_keys(["a"], ["another content"])).any()
    assert not Sources().known(item_keys(["a"], ["a"])).any()
    with pytest.raises(KeyError, match="1 items are in no source"):
        sources.choose(wanted(["a", "x"]))


def test_an_item_that_is_wanted_twice_is_not_published(tmp_path: Path):
    part = write_part(tmp_path / "0.parquet", ["a", "b"])
    with pytest.raises(ValueError, match="'a' came twice"):
        publish(tmp_path / "index", [part], ["a", "b", "a"])


def test_a_source_that_vanished(tmp_path: Path):
    with pytest.raises(Vanished):
        made_of([str(tmp_path / "0.parquet")])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_reused_rows_are_copied_bit_by_bit(tmp_path: Path, dtype: str):
    ids = [f"{row:03d}" for row in range(200)]
    part = write_part(tmp_path / "0.parquet", ids)
    publish(tmp_path / "index", [part], ids, dtype)
    parts, before = reusable(str(tmp_path / "index"), MODEL, dtype)
    assert (len(parts), before["rows"]) == (1, 200)
    first = storage.read_table(parts[0])
    second = publish(tmp_path / "index", parts, ids[50:], dtype)
    parts, _ = reusable(str(tmp_path / "index"), MODEL, dtype)
    assert storage.read_table(parts[0]).equals(first.slice(50))
    assert second.get(RECALL) == before.get(RECALL), "nothing new was measured: the old figure stands"
    assert (RECALL in before) == (dtype != "float32")


def test_what_int8_costs_is_measured_on_what_was_computed(tmp_path: Path):
    ids = [f"{row:03d}" for row in range(300)]
    parts = [write_part(tmp_path / f"{n}.parquet", ids[n * 100 : n * 100 + 100]) for n in range(3)]
    recall = publish(tmp_path / "index", parts, ids, "int8")[RECALL]
    assert recall["items"] == 300
    assert 0.9 < recall["recall@10"] <= 1
    assert 0.9 < recall["recall@100"] <= 1
    exact, stored = vectors_of(ids), load_index(str(tmp_path / "index")).vectors
    plain = [len(set(np.argsort(-(exact @ q))[1:11]) & set(np.argsort(-(stored @ q))[1:11])) / 10 for q in exact]
    assert recall["recall@10"] == pytest.approx(np.mean(plain), abs=0.02)


@pytest.mark.parametrize(
    ("had", "wanted_dtype", "model", "taken"),
    [
        ("float32", "int8", MODEL, True),
        ("float32", "float16", MODEL, True),
        ("int8", "int8", MODEL, True),
        ("int8", "float32", MODEL, False),
        ("float16", "int8", MODEL, False),
        ("float32", "float32", "another", False),
    ],
)
def test_which_version_can_be_reused(tmp_path: Path, had: str, wanted_dtype: str, model: str, taken: bool):
    assert reusable(str(tmp_path), MODEL, had) == ([], {})
    publish(tmp_path, [write_part(tmp_path / "0.parquet", ["a", "b"])], ["a", "b"], had)
    assert bool(reusable(str(tmp_path), model, wanted_dtype)[0]) == taken


def test_a_converted_row_is_the_conversion_of_its_vector(tmp_path: Path):
    ids = ["a", "b", "c"]
    publish(tmp_path / "index", [write_part(tmp_path / "0.parquet", ids)], ids, "int8")
    parts, _ = reusable(str(tmp_path / "index"), MODEL, "int8")
    fresh = to_table(ids, vectors_of(ids), ids, [True] * 3, "int8")
    np.testing.assert_array_equal(to_vectors(read_part(parts[0])), to_vectors(fresh))
