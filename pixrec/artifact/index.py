"""Save and load an index as versions. Parquet and JSON only.

An index is a folder of versions; CURRENT names the one in use and is written after that version is whole.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

import pixrec
from pixrec import storage
from pixrec.errors import ArtifactError
from pixrec.schema import CONTENT_HASH, EMBEDDING, ITEM_ID, index_schema

_MANIFEST, _CURRENT, _VERSIONS = "manifest.json", "CURRENT", "versions"
_ROWS_PER_PART = 50_000


@dataclass(frozen=True)
class Index:
    """One published version: N item vectors and what made them."""

    version: str
    item_ids: list[str]
    vectors: np.ndarray
    """(N, D) float32"""
    manifest: dict[str, Any]


class IndexWriter:
    """Collects vectors into part files of one version; nothing is visible before `index_version` ends."""

    def __init__(self, folder: str, width: int, dtype: str) -> None:
        self._folder, self._schema, self._dtype = folder, index_schema(width, dtype), dtype
        self._pending: list[pa.Table] = []
        self._parts = 0
        self.rows = 0
        self.item_ids: set[str] = set()

    def add(self, item_ids: list[str], vectors: np.ndarray, content_hashes: list[str]) -> None:
        """Vectors (U, D) of U items. Raises ValueError on a repeated item or a value that is not finite."""
        stored = vectors.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"the vector of an item near {item_ids[0]!r} is not finite")
        self.item_ids.update(item_ids)
        self.rows += len(item_ids)
        if len(self.item_ids) != self.rows:
            raise ValueError(f"an item near {item_ids[0]!r} came twice")
        values = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
        columns = {ITEM_ID: item_ids, EMBEDDING: values, CONTENT_HASH: content_hashes}
        self._pending.append(pa.table(columns, schema=self._schema))
        if sum(t.num_rows for t in self._pending) >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            part = storage.join(self._folder, f"part-{self._parts:05d}.parquet")
            storage.write_table(part, pa.concat_tables(self._pending))
            self._parts, self._pending = self._parts + 1, []


@contextlib.contextmanager
def index_version(
    uri: str, model_fingerprint: str, width: int, dtype: str, facts: dict[str, Any]
) -> Iterator[IndexWriter]:
    """Write a new version of the index at `uri`; when the block ends well it is published and CURRENT."""
    now = datetime.datetime.now(datetime.UTC)
    version = f"{now:%Y%m%dT%H%M%S%f}-{model_fingerprint[:8]}"
    with storage.staged_folder(storage.join(uri, _VERSIONS, version), _MANIFEST, "index version") as staging:
        writer = IndexWriter(staging, width, dtype)
        yield writer
        writer.flush()
        manifest = {
            "version": version,
            "model_fingerprint": model_fingerprint,
            "width": width,
            "dtype": dtype,
            "rows": writer.rows,
            "time": now.isoformat(timespec="seconds"),
            "pixrec": pixrec.__version__,
            **facts,
        }
        storage.write_json(storage.join(staging, _MANIFEST), manifest)
    storage.write_bytes(storage.join(uri, _CURRENT), version.encode())


def check_index_writable(uri: str) -> None:
    """Raise OutputError when no index can be published at `uri`."""
    storage.check_writable(uri, _VERSIONS, "index")  # a first version that failed left that folder and no CURRENT


def index_manifest(uri: str) -> dict[str, Any]:
    """The manifest of the current version. Raises ArtifactError when there is none."""
    current = storage.join(uri, _CURRENT)
    if not storage.exists(current):
        raise ArtifactError(f"{uri} holds no published index (no {_CURRENT}); make one with pixrec embed")
    manifest = storage.join(uri, _VERSIONS, storage.read_text(current).strip(), _MANIFEST)
    if not storage.exists(manifest):
        raise ArtifactError(f"{uri}: {_CURRENT} names a version that is not there; run pixrec embed again")
    return dict(storage.read_json(manifest))


def load_index(uri: str, model_fingerprint: str | None = None) -> Index:
    """The current version. Raises ArtifactError when absent, damaged, or made by another model than the one named."""
    manifest = index_manifest(uri)
    if model_fingerprint not in (None, manifest["model_fingerprint"]):
        raise ArtifactError(
            f"{uri} was made by model {manifest['model_fingerprint'][:8]}, not {str(model_fingerprint)[:8]}; "
            "run pixrec embed with this model"
        )
    version = str(manifest["version"])
    table = storage.read_table(storage.join(uri, _VERSIONS, version), [ITEM_ID, EMBEDDING])
    if table.num_rows != manifest["rows"]:
        raise ArtifactError(
            f"{uri}: version {version} holds {table.num_rows} rows, its manifest says {manifest['rows']}"
        )
    flat = table.column(EMBEDDING).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = flat.astype(np.float32).reshape(-1, manifest["width"])
    return Index(version, table.column(ITEM_ID).to_pylist(), vectors, manifest)
