"""Rows that many processes write at once and any process reads by number: a Lance data set, made of parts.

Knows Lance, and nothing of what the rows hold. A writer stores its rows as files (`write_rows`) and keeps what this
returns; `publish` makes the files of all writers one data set, at no cost for the rows. Paths in a data set are
relative to its folder.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.errors import ArtifactError, OutputError

os.environ.setdefault("LANCE_LOG", "error")  # else it warns of each new folder

import lance
from lance.fragment import FragmentMetadata, write_fragments

_DATA, _FILE_FORMAT = "data", "2.1"
_CACHE_BYTES = 32 * 1024**2  # in each process, for what Lance remembers of files and pages; its default is 6 GB
# It would say so at every fork, also where another program follows at once; Ray starts its workers anew.
warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)
_TROUBLE = (OSError, ValueError, RuntimeError)  # what Lance raises


def write_rows(uri: str, table: pa.Table) -> list[dict[str, Any]]:
    """Write rows below `uri`, where nobody sees them before `publish` is told what this returns (JSON).

    Raises OutputError when they cannot be written.
    """
    if not len(table):
        return []
    with _writing(uri):
        files = write_fragments(
            table,
            storage.absolute(uri),
            schema=table.schema,
            max_rows_per_file=len(table),
            data_storage_version=_FILE_FORMAT,
            storage_options=storage.object_store_options(uri),
        )
    return [file.to_json() for file in files]


def publish(uri: str, files: Sequence[dict[str, Any]], schema: pa.Schema) -> int:
    """Make the data set at `uri` consist of these files' rows, in order; the answer is the version that names it.

    Readers see the rows that were there or the new ones. Raises ArtifactError when one of `files` is gone, OutputError
    when the place cannot be written.
    """
    names = _names(files)
    if lost := names - _names_there(uri):
        raise ArtifactError(f"{uri}: {len(lost)} of its {len(names)} files are gone; remove the folder and begin again")
    numbered = [FragmentMetadata.from_json(json.dumps({**content, "id": at})) for at, content in enumerate(files)]
    with _writing(uri):
        made = lance.LanceDataset.commit(
            storage.absolute(uri),
            lance.LanceOperation.Overwrite(schema, numbered),
            storage_options=storage.object_store_options(uri),
        )
    return made.version


def remove_others(uri: str, files: Sequence[dict[str, Any]]) -> None:
    """Remove what killed and repeated writers left behind: every file of rows but these.

    All writers must have ended.
    """
    for left_behind in _names_there(uri) - _names(files):
        storage.remove(storage.join(uri, _DATA, left_behind))


def _names(files: Sequence[dict[str, Any]]) -> set[str]:
    return {file["path"] for content in files for file in content["files"]}


def _names_there(uri: str) -> set[str]:
    return {storage.name(file) for file in storage.list_files(storage.join(uri, _DATA))}


class Rows:
    """A published data set, of whose N rows none is in memory. Belongs to one process."""

    def __init__(self, uri: str, cure: str, version: int | None = None) -> None:
        """cure: what to do about a data set that is not there or damaged. Raises ArtifactError with it."""
        self._uri, self._cure = storage.absolute(uri), cure
        with self._reading("there is no complete one"):
            self._data = lance.dataset(
                self._uri,
                version=version,
                storage_options=storage.object_store_options(uri),
                index_cache_size_bytes=_CACHE_BYTES,
                metadata_cache_size_bytes=_CACHE_BYTES,
            )
            self._rows = self._data.count_rows()

    def __len__(self) -> int:
        return self._rows

    @property
    def schema(self) -> pa.Schema:
        return self._data.schema

    def take(self, rows: Sequence[int] | np.ndarray, column: str) -> pa.Array:
        """(len(rows),) one column of any rows, in the order asked for. Raises IndexError for a row that is none."""
        wanted = np.asarray(rows, np.int64)
        if not len(wanted):
            return pa.array([], self._data.schema.field(column).type)
        if wanted.min() < 0 or wanted.max() >= self._rows:
            raise IndexError(f"{self._uri} has rows 0 to {self._rows - 1}, asked for {wanted.min()} to {wanted.max()}")
        distinct, places = np.unique(wanted, return_inverse=True)
        with self._reading("it is damaged"):
            found = self._data.take(pa.array(distinct), columns=[column]).column(0).combine_chunks()
        return found if np.array_equal(distinct, wanted) else found.take(pa.array(places))

    def column(self, column: str) -> pa.ChunkedArray:
        """(N,) one whole column, which should be a small one; others are not read."""
        with self._reading("it is damaged"):
            return self._data.to_table(columns=[column]).column(0)

    @contextmanager
    def _reading(self, trouble: str) -> Iterator[None]:
        try:
            yield
        except _TROUBLE as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{self._uri}: {trouble}: {reason}; {self._cure}") from None


@contextmanager
def _writing(uri: str) -> Iterator[None]:
    try:
        yield
    except _TROUBLE as error:
        reason = " ".join(str(error).split())[:200]
        raise OutputError(f"{uri} cannot be written: {reason}; choose another --out") from None
