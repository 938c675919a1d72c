"""Saves and loads the versions of an index. Parquet and JSON only.

An index is a folder of versions; CURRENT names the one in use and is written after that version is whole.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import pixrec
from pixrec import storage
from pixrec.artifact.stored import to_table, to_vectors
from pixrec.data.ids import Ids
from pixrec.errors import ArtifactError
from pixrec.schema import EMBEDDING, HAS_IMAGE, ITEM_ID, SCALE, index_schema

MANIFEST, CURRENT, VERSIONS = "manifest.json", "CURRENT", "versions"
_FACTS = ("version", "model_fingerprint", "width", "dtype", "rows")  # what a manifest always says
_ROWS_PER_PART = 20_000


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


def index_manifest(uri: str) -> dict[str, Any]:
    """The manifest of the current version. Raises ArtifactError when there is none."""
    current = storage.join(uri, CURRENT)
    if not storage.exists(current):
        raise ArtifactError(f"{uri} holds no published index (no {CURRENT}); make one with pixrec embed")
    manifest = storage.join(uri, VERSIONS, storage.read_text(current).strip(), MANIFEST)
    if not storage.exists(manifest):
        raise ArtifactError(f"{uri}: {CURRENT} names a version that is not there; run pixrec embed again")
    return dict(storage.read_json(manifest, _FACTS))


def load_index(uri: str, model_fingerprint: str | None = None) -> Index:
    """The current version. Raises ArtifactError when absent, damaged, or made by another model than the one named."""
    manifest = index_manifest(uri)
    if model_fingerprint not in (None, manifest["model_fingerprint"]):
        raise ArtifactError(
            f"{uri} was made by model {manifest['model_fingerprint'][:8]}, not {str(model_fingerprint)[:8]}; "
            "run pixrec embed with this model"
        )
    version, rows = str(manifest["version"]), int(manifest["rows"])
    columns = [ITEM_ID, EMBEDDING, *([SCALE] if manifest["dtype"] == "int8" else [])]
    vectors, item_ids, found = np.empty((rows, int(manifest["width"])), np.float32), list[pa.Array](), 0
    for file in storage.table_files(storage.join(uri, VERSIONS, version)):  # so that what is read is never held twice
        table = storage.read_table(file, columns)
        part, room = to_vectors(table), vectors[found : found + len(table)]
        if not np.isfinite(part).all():
            raise ArtifactError(f"{uri}: version {version} holds a vector that is not finite; run pixrec embed again")
        room[:] = part[: len(room)]
        item_ids += table.column(ITEM_ID).chunks
        found += len(table)
    if found != rows:
        raise ArtifactError(f"{uri}: version {version} holds {found} rows, its manifest says {rows}")
    return Index(version, Ids(pa.chunked_array(item_ids, pa.string())), vectors, manifest)
