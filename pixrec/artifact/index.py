"""Saves and loads the versions of an index. Parquet and JSON only.

An index is a folder of versions; CURRENT names the one in use and is written after that version is whole.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import pixrec
from pixrec import storage
from pixrec.artifact.stored import to_table, to_vectors
from pixrec.data.ids import Ids
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError
from pixrec.schema import EMBEDDING, HAS_IMAGE, ITEM_ID, SCALE, index_schema

MANIFEST, CURRENT, VERSIONS = "manifest.json", "CURRENT", "versions"
_FACTS = ("version", "model_fingerprint", "width", "dtype", "rows")  # what a manifest always says
_ROWS_PER_PART = 20_000
MAPPED_FROM = 2**26
"""Bytes of float32 vectors from which on they are mapped rather than held by each process."""


@dataclass(frozen=True)
class Index:
    """One published version: N item vectors and the manifest that says what made them."""

    version: str
    item_ids: Sequence[str]
    vectors: np.ndarray
    """(N, D) float32"""
    manifest: dict[str, Any]


class IndexWriter:
    """Collects rows into part files of one version; nothing is visible before `index_version` ends.

    Of what was written it keeps the item ids, 20 bytes an item or so.
    """

    def __init__(self, folder: str, width: int, dtype: str, facts: dict[str, Any]) -> None:
        self._folder, self._dtype, self._schema = folder, dtype, index_schema(width, dtype)
        self._pending: list[pa.Table] = []
        self._item_ids: list[pa.ChunkedArray] = []
        self._parts = 0
        self.rows = self.with_image = 0
        self.facts = facts
        """What the manifest says beside the counts; may be added to until the block ends."""
        self.manifest: dict[str, Any] = {}
        """Set when the version is whole."""

    def add(
        self,
        item_ids: Sequence[str],
        vectors: np.ndarray,
        content_hashes: Sequence[str],
        has_image: Sequence[bool] | None = None,
    ) -> None:
        """Vectors (U, D) of U items. Raises ValueError on a value that is not finite."""
        seen = [None] * len(item_ids) if has_image is None else has_image
        self.add_stored(to_table(item_ids, vectors, content_hashes, seen, self._dtype))

    def add_stored(self, table: pa.Table) -> None:
        """Rows as an index of this type stores them; they are copied bit by bit."""
        self._pending.append(table.select(self._schema.names).cast(self._schema))
        self._item_ids.append(table.column(ITEM_ID))
        self.rows += len(table)
        self.with_image += pc.sum(table.column(HAS_IMAGE)).as_py() or 0
        if sum(t.num_rows for t in self._pending) >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            part = storage.join(self._folder, f"part-{self._parts:05d}.parquet")
            storage.write_table(part, pa.concat_tables(self._pending))
            self._parts, self._pending = self._parts + 1, []

    def check_ids(self) -> None:
        """Raise ValueError when an item came twice."""
        ids = pa.chunked_array([chunk for column in self._item_ids for chunk in column.chunks], pa.string())
        if pc.count_distinct(ids).as_py() != self.rows:
            counted = pc.value_counts(ids)
            twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
            raise ValueError(f"item {twice[0].as_py()!r} came twice ({len(twice)} such items)")


@contextlib.contextmanager
def index_version(
    uri: str, model_fingerprint: str, width: int, dtype: str, facts: dict[str, Any]
) -> Iterator[IndexWriter]:
    """Write a new version of the index at `uri`; when the block ends well it is published and CURRENT.

    Raises ValueError when an item came twice.
    """
    now = datetime.datetime.now(datetime.UTC)
    version = f"{now:%Y%m%dT%H%M%S%f}-{model_fingerprint[:8]}"
    with storage.staged_folder(storage.join(uri, VERSIONS, version), MANIFEST, "index version") as staging:
        writer = IndexWriter(staging, width, dtype, dict(facts))
        yield writer
        writer.flush()
        writer.check_ids()
        writer.manifest = {
            "version": version,
            "model_fingerprint": model_fingerprint,
            "width": width,
            "dtype": dtype,
            "rows": writer.rows,
            "with_image": writer.with_image,
            "time": now.isoformat(timespec="seconds"),
            "pixrec": pixrec.__version__,
            **writer.facts,
        }
        storage.write_json(storage.join(staging, MANIFEST), writer.manifest)
    storage.write_bytes(storage.join(uri, CURRENT), version.encode())


def check_index_writable(uri: str) -> None:
    """Raise OutputError when no index can be published at `uri`."""
    storage.check_writable(uri, VERSIONS, "index")  # a first version that failed left that folder and no CURRENT


def index_manifest(uri: str, version: str | None = None) -> dict[str, Any]:
    """The manifest of a version, by default the current one. Raises ArtifactError when there is none."""
    current = storage.join(uri, CURRENT)
    if version is None and not storage.exists(current):
        raise ArtifactError(f"{uri} holds no published index (no {CURRENT}); make one with pixrec embed")
    manifest = storage.join(uri, VERSIONS, version or storage.read_text(current).strip(), MANIFEST)
    if not storage.exists(manifest):
        named = f"version {version} is not there" if version else f"{CURRENT} names a version that is not there"
        raise ArtifactError(f"{uri}: {named}; run pixrec embed again")
    return dict(storage.read_json(manifest, _FACTS))


def load_index(
    uri: str, model_fingerprint: str | None = None, items: ItemTable | None = None, version: str | None = None
) -> Index:
    """A version, by default the current one. Raises ArtifactError when absent, damaged, or made by another model than
    the one named.

    With `items` that are those of the index, the vectors of a large one come in their order, mapped from a file that a
    node makes of them once: all processes share its pages.
    """
    manifest = index_manifest(uri, version)
    if model_fingerprint not in (None, manifest["model_fingerprint"]):
        raise ArtifactError(
            f"{uri} was made by model {manifest['model_fingerprint'][:8]}, not {str(model_fingerprint)[:8]}; "
            "run pixrec embed with this model"
        )
    name, rows, width = str(manifest["version"]), int(manifest["rows"]), int(manifest["width"])
    if items is not None and rows == len(items) and 4 * rows * width >= MAPPED_FROM:
        with contextlib.suppress(_OtherItems):
            write = partial(_write_ordered, uri=uri, manifest=manifest, items=items)
            vectors = storage.node_file(uri, f"{name} {items.row_of.digest}", write, storage.map_array)
            return Index(name, items.item_ids, vectors, manifest)
    vectors, item_ids, found = np.empty((rows, width), np.float32), list[pa.Array](), 0
    for ids, part in _parts(uri, manifest):  # so that what is read is never held twice
        room = vectors[found : found + len(part)]
        room[:] = part[: len(room)]
        item_ids += ids.chunks
        found += len(part)
    _check_rows(uri, manifest, found)
    return Index(name, Ids(pa.chunked_array(item_ids, pa.string())), vectors, manifest)


def _parts(uri: str, manifest: dict[str, Any]) -> Iterator[tuple[pa.ChunkedArray, np.ndarray]]:
    """Ids (U,) and vectors (U, D) of one part after the other."""
    version = str(manifest["version"])
    columns = [ITEM_ID, EMBEDDING, *([SCALE] if manifest["dtype"] == "int8" else [])]
    for file in storage.table_files(storage.join(uri, VERSIONS, version)):
        table = storage.read_table(file, columns)
        part = to_vectors(table)
        if not np.isfinite(part).all():
            raise ArtifactError(f"{uri}: version {version} holds a vector that is not finite; run pixrec embed again")
        yield table.column(ITEM_ID), part


def _check_rows(uri: str, manifest: dict[str, Any], found: int) -> None:
    if found != manifest["rows"]:
        raise ArtifactError(
            f"{uri}: version {manifest['version']} holds {found} rows, its manifest says {manifest['rows']}"
        )


class _OtherItems(Exception):
    """An index holds other items than the data set."""


def _write_ordered(path: str, uri: str, manifest: dict[str, Any], items: ItemTable) -> None:
    """The vectors (N, D) in the order of the items, as one .npy file. Raises _OtherItems where the two differ."""
    shape = len(items), int(manifest["width"])
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    seen, found = np.zeros(len(items), bool), 0
    for ids, part in _parts(uri, manifest):
        rows = items.rows_of(Ids(ids))
        if (rows < 0).any():
            raise _OtherItems
        vectors[rows], seen[rows] = part, True
        found += len(part)
    _check_rows(uri, manifest, found)
    if not seen.all():
        raise _OtherItems
    vectors.flush()
