"""A new index version put together from rows that were computed before.

The sources of rows are the parts of the current version and of unfinished ones. Each wanted item is taken from exactly
one of them. Memory: 16 bytes for each row of the sources and for each wanted item, and the rows of one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec import storage
from pixrec.artifact.index import IndexWriter
from pixrec.artifact.recall import NeighbourRecall
from pixrec.artifact.stored import KEY, dtype_of, item_keys, to_content, to_table, to_vectors
from pixrec.artifact.unfinished import read_part
from pixrec.artifact.versions import CURRENT, MANIFEST, VERSIONS
from pixrec.schema import CONTENT, CONTENT_HASH, HAS_IMAGE, ITEM_ID

RECALL = "recall_of_float32"
_QUERY_PARTS, _QUERIES_PER_PART = 16, 16


class Chosen(NamedTuple):
    """Rows of one source, ascending."""

    file: str
    rows: np.ndarray


class Sources:
    """Part files and the keys of their rows."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._keys: list[pa.Array] = []

    def __len__(self) -> int:
        return len(self._files)

    def add(self, file: str, keys: pa.Array | None = None) -> None:
        """One more part; its keys are read from it when not given. Raises Vanished."""
        if keys is None:
            table = read_part(file, [ITEM_ID, CONTENT_HASH])
            keys = item_keys(table.column(ITEM_ID).to_pylist(), table.column(CONTENT_HASH).to_pylist())
        self._files.append(file)
        self._keys.append(keys)

    def known(self, keys: pa.Array) -> np.ndarray:
        """bool (U,): which of the keys some source has."""
        return pc.is_in(keys, value_set=self._all_keys()).to_numpy(zero_copy_only=False)

    def choose(self, wanted: Sequence[pa.Array]) -> list[Chosen]:
        """One row for every wanted key, grouped by source. Raises KeyError when no source has a key."""
        positions = pc.index_in(pa.chunked_array(wanted, KEY), value_set=self._all_keys())
        if positions.null_count:
            raise KeyError(f"{positions.null_count} items are in no source")
        rows = np.sort(positions.to_numpy())
        bounds = np.cumsum([0, *map(len, self._keys)])
        cuts = np.searchsorted(rows, bounds)
        return [
            Chosen(file, rows[first:last] - start)
            for file, start, first, last in zip(self._files, bounds[:-1], cuts[:-1], cuts[1:], strict=True)
            if last > first
        ]

    def _all_keys(self) -> pa.Array:
        return pa.chunked_array(self._keys, KEY).combine_chunks() if self._keys else pa.array([], KEY)


def reusable(uri: str, model_fingerprint: str, dtype: str, content_width: int = 0) -> tuple[list[str], dict[str, Any]]:
    """Parts of the current version that a new one of this model and type can take rows from, and its manifest.

    None when there is no version, when another model made it, when its vectors have lost what `dtype` keeps, or when it
    lacks content vectors that are wanted.
    """
    current = storage.join(uri, CURRENT)
    if not storage.exists(current):
        return [], {}
    folder = storage.join(uri, VERSIONS, storage.read_text(current).strip())
    if not storage.exists(storage.join(folder, MANIFEST)):
        return [], {}
    manifest = dict(storage.read_json(storage.join(folder, MANIFEST)))
    parts = storage.list_files(folder, ".parquet")
    same = manifest["model_fingerprint"] == model_fingerprint and manifest["dtype"] in (dtype, "float32")
    wanted = {HAS_IMAGE, CONTENT} if content_width else {HAS_IMAGE}
    if not (same and parts and wanted <= set(storage.read_schema(parts[0]).names)):
        return [], manifest
    return parts, manifest


def write_chosen(writer: IndexWriter, chosen: Sequence[Chosen], dtype: str, before: dict[str, Any]) -> None:
    """Write the chosen rows, and into the manifest which share of exact neighbours is still found as `dtype`.

    That recall is measured on the rows whose float32 vectors are at hand. When these are fewer than half, the figure of
    the manifest `before` stands.
    """
    exact = [part for part in chosen if dtype != "float32" and dtype_of(storage.read_schema(part.file)) == "float32"]
    at_hand = {part.file for part in exact}
    meter = _meter(exact) if exact else None
    for part in chosen:
        table = read_part(part.file).take(part.rows)
        if dtype_of(table.schema) == dtype:
            writer.add_stored(table)
            continue
        columns = (table.column(name).to_pylist() for name in (ITEM_ID, CONTENT_HASH, HAS_IMAGE))
        item_ids, hashes, has_image = columns
        vectors = to_vectors(table)
        stored = to_table(item_ids, vectors, hashes, has_image, dtype, to_content(table))
        writer.add_stored(stored)
        if meter and part.file in at_hand:
            meter.add(vectors, to_vectors(stored))
    measured = sum(len(part.rows) for part in exact)
    if meter and 2 * measured >= writer.rows:
        writer.facts[RECALL] = {**meter.result(), "items": measured}
    elif dtype == before.get("dtype") and RECALL in before:
        writer.facts[RECALL] = before[RECALL]


def _meter(exact: Sequence[Chosen]) -> NeighbourRecall:
    """Queries drawn at random from a few parts of the rows that will be measured."""
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *(len(part.rows) for part in exact)])
    drawn = np.sort(rng.choice(len(exact), min(len(exact), _QUERY_PARTS), replace=False))
    queries = list(_queries([exact[i] for i in drawn], starts[drawn], rng))
    return NeighbourRecall(np.concatenate([q[0] for q in queries]), np.concatenate([q[1] for q in queries]))


def _queries(
    parts: Sequence[Chosen], starts: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    share = _QUERIES_PER_PART * _QUERY_PARTS // len(parts)
    for part, start in zip(parts, starts, strict=True):
        some = np.sort(rng.choice(len(part.rows), min(len(part.rows), share), replace=False))
        yield to_vectors(read_part(part.file).take(part.rows[some])), some + start
