"""Saves and loads the versions of an index. Parquet and JSON only.

An index is a folder of versions; CURRENT names the one in use and is written after that version is whole.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import pixrec
from pixrec import storage
from pixrec.artifact.stored import to_content, to_table, to_vectors
from pixrec.artifact.versions import CURRENT, MANIFEST, VERSIONS, index_manifest
from pixrec.data.ids import Ids
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError
from pixrec.retrieval.approximate import Approximate
from pixrec.schema import CONTENT, EMBEDDING, HAS_IMAGE, ITEM_ID, SCALE, index_schema

APPROXIMATE, STRUCTURE = "approximate", "approximate.faiss"
"""What the manifest says of the structure for approximate search, and its file; only large indexes have one."""
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
    structure: Callable[[], Approximate] | None = None
    """Opens the structure for approximate search, whose rows are those of `vectors`, where the version has one. Raises
    PixRecError where faiss is not installed."""

    def rows_among(self, items: ItemTable) -> np.ndarray:
        """int (N,): the row of each vector among `items`. Raises ArtifactError where they lack one of them."""
        rows = items.rows_of(self.item_ids)
        if (rows < 0).any():
            stray = self.item_ids[int(np.argmin(rows))]
            raise ArtifactError(f"the index holds item {stray!r}, which the data set lacks; run pixrec embed again")
        return rows


class IndexWriter:
    """Collects rows into part files of one version; nothing is visible before `index_version` ends.

    Of what was written it keeps the item ids, 20 bytes an item or so.
    """

    def __init__(self, folder: str, width: int, dtype: str, facts: dict[str, Any], content_width: int = 0) -> None:
        self.folder, self.width, self.dtype = folder, width, dtype
        self._schema = index_schema(width, dtype, content_width)
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
        content: np.ndarray | None = None,
    ) -> None:
        """Vectors (U, D) of U items, and their content vectors (U, C) where the version has any.

        Raises ValueError on a value that is not finite.
        """
        seen = [None] * len(item_ids) if has_image is None else has_image
        self.add_stored(to_table(item_ids, vectors, content_hashes, seen, self.dtype, content))

    def add_stored(self, table: pa.Table) -> None:
        """Rows as an index of this type stores them; they are copied bit by bit."""
        self._pending.append(table.select(self._schema.names).cast(self._schema))
        self._item_ids.append(table.column(ITEM_ID))
        self.rows += len(table)
        self.with_image += pc.sum(table.column(HAS_IMAGE)).as_py() or 0
        if sum(t.num_rows for t in self._pending) >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Store what was added so far as a part."""
        if self._pending:
            part = storage.join(self.folder, f"part-{self._parts:05d}.parquet")
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
    uri: str,
    model_fingerprint: str,
    width: int,
    dtype: str,
    facts: dict[str, Any],
    content_width: int = 0,
    *,
    current: bool = True,
) -> Iterator[IndexWriter]:
    """Write a new version of the index at `uri`; when the block ends well it is published and, unless `current` is
    False, CURRENT.

    Raises ValueError when an item came twice.
    """
    now = datetime.datetime.now(datetime.UTC)
    version = f"{now:%Y%m%dT%H%M%S%f}-{model_fingerprint[:8]}"
    with storage.staged_folder(storage.join(uri, VERSIONS, version), MANIFEST, "index version") as staging:
        writer = IndexWriter(staging, width, dtype, dict(facts), content_width)
        yield writer
        writer.flush()
        writer.check_ids()
        writer.manifest = {
            "version": version,
            "model_fingerprint": model_fingerprint,
            "width": width,
            "dtype": dtype,
            **({"content_width": content_width} if content_width else {}),
            "rows": writer.rows,
            "with_image": writer.with_image,
            "time": now.isoformat(timespec="seconds"),
            "pixrec": pixrec.__version__,
            **writer.facts,
        }
        storage.write_json(storage.join(staging, MANIFEST), writer.manifest)
    if current:
        storage.write_bytes(storage.join(uri, CURRENT), version.encode())


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
    folder = storage.join(uri, VERSIONS, name)
    if items is not None and rows == len(items) and 4 * rows * width >= MAPPED_FROM:
        with contextlib.suppress(_OtherItems):
            of_both = f"{name} {items.row_of.digest}"
            write = partial(_write_ordered, folder=folder, manifest=manifest, items=items)
            vectors = storage.node_file(uri, of_both, write, storage.map_array)
            order = partial(_map_order, folder, of_both, items)
            return Index(name, items.item_ids, vectors, manifest, _structure(folder, manifest, order))
    vectors, item_ids, found = np.empty((rows, width), np.float32), list[pa.Array](), 0
    for ids, part in stored_parts(folder, manifest["dtype"]):  # so that what is read is never held twice
        room = vectors[found : found + len(part)]
        room[:] = part[: len(room)]
        item_ids += ids.chunks
        found += len(part)
    _check_rows(folder, manifest, found)
    ids = Ids(pa.chunked_array(item_ids, pa.string()))
    return Index(name, ids, vectors, manifest, _structure(folder, manifest, lambda: None))


def load_content(uri: str, manifest: dict[str, Any], items: ItemTable) -> np.ndarray | None:
    """The content vectors (N, C) float16 of a version in the order of `items`, zeros for those that are not in it; None
    where it has none. Those of a large index are mapped, as its vectors are."""
    width = int(manifest.get("content_width", 0))
    if not width:
        return None
    if 2 * len(items) * width < MAPPED_FROM:
        content = np.zeros((len(items), width), np.float16)
        _fill_content(content, uri, manifest, items)
        return content
    write = partial(_write_content, uri=uri, manifest=manifest, items=items)
    return storage.node_file(uri, f"{manifest['version']} content {items.row_of.digest}", write, storage.map_array)


def _write_content(path: str, uri: str, manifest: dict[str, Any], items: ItemTable) -> None:
    shape = len(items), int(manifest["content_width"])
    content = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    _fill_content(content, uri, manifest, items)
    content.flush()


def _fill_content(content: np.ndarray, uri: str, manifest: dict[str, Any], items: ItemTable) -> None:
    for file in storage.table_files(storage.join(uri, VERSIONS, str(manifest["version"]))):
        table = storage.read_table(file, [ITEM_ID, CONTENT])
        rows, part = items.rows_of(Ids(table.column(ITEM_ID))), to_content(table)
        assert part is not None
        content[rows[rows >= 0]] = part[rows >= 0]


def stored_parts(folder: str, dtype: str) -> Iterator[tuple[pa.ChunkedArray, np.ndarray]]:
    """Ids (U,) and vectors (U, D) of one part of a version after the other."""
    columns = [ITEM_ID, EMBEDDING, *([SCALE] if dtype == "int8" else [])]
    for file in storage.table_files(folder):
        table = storage.read_table(file, columns)
        part = to_vectors(table)
        if not np.isfinite(part).all():
            raise ArtifactError(f"{folder} holds a vector that is not finite; run pixrec embed again")
        yield table.column(ITEM_ID), part


def _structure(
    folder: str, manifest: dict[str, Any], rows: Callable[[], np.ndarray | None]
) -> Callable[[], Approximate] | None:
    """What opens the structure; `rows` gives the row by which the caller knows each of the version's."""
    facts = manifest.get(APPROXIMATE)
    if not facts or "probes" not in facts:
        return None

    def opened() -> Approximate:
        file = storage.join(folder, STRUCTURE)
        numbers = rows()
        if not storage.is_remote(file):
            return Approximate(storage.absolute(file), int(facts["probes"]), numbers)
        copy = partial(storage.copy_file, file)
        return storage.node_file(file, folder, copy, lambda path: Approximate(path, int(facts["probes"]), numbers))

    return opened


def _check_rows(folder: str, manifest: dict[str, Any], found: int) -> None:
    if found != manifest["rows"]:
        raise ArtifactError(f"{folder} holds {found} rows, its manifest says {manifest['rows']}")


def _map_order(folder: str, key: str, items: ItemTable) -> np.ndarray:
    """int32 (N,): the row among `items` of each row of a version, mapped like the vectors."""

    def write(path: str) -> None:
        ids = (storage.read_table(file, [ITEM_ID]).column(ITEM_ID) for file in storage.table_files(folder))
        storage.write_array(path, np.concatenate([items.rows_of(Ids(column)) for column in ids]), durable=False)

    return storage.node_file(storage.join(folder, "order"), key, write, storage.map_array)


class _OtherItems(Exception):
    """An index holds other items than the data set."""


def _write_ordered(path: str, folder: str, manifest: dict[str, Any], items: ItemTable) -> None:
    """The vectors (N, D) in the order of the items, as one .npy file. Raises _OtherItems where the two differ."""
    shape = len(items), int(manifest["width"])
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    seen, found = np.zeros(len(items), bool), 0
    for ids, part in stored_parts(folder, manifest["dtype"]):
        rows = items.rows_of(Ids(ids))
        if (rows < 0).any():
            raise _OtherItems
        vectors[rows], seen[rows] = part, True
        found += len(part)
    _check_rows(folder, manifest, found)
    if not seen.all():
        raise _OtherItems
    vectors.flush()
