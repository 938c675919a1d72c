"""Tables given in memory, written to where `prepare` reads: any object with the Arrow C stream protocol.

Rows are written in groups as they come, so a stream may be longer than memory.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import pyarrow as pa

from pixrec import storage
from pixrec.data.sequences import DATASET_MARKER
from pixrec.data.tables import plain
from pixrec.errors import InputError
from pixrec.schema import IMAGE_URI

IN_MEMORY = "a table in memory"
_GROUP_BYTES, _GROUP_ROWS = 32 * 1024**2, 65_536
_PICTURE_PLACES = (IMAGE_URI, "image_uris")
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")  # what a filtered DataFrame has beside its columns


class ArrowStream(Protocol):
    """A table of pyarrow, pandas (2.2 or newer), Polars, DuckDB, ...: the Arrow PyCapsule interface."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


def in_memory(table: object) -> TypeGuard[ArrowStream]:
    return hasattr(table, "__arrow_c_stream__")


@contextlib.contextmanager
def on_storage(tables: Mapping[str, Any], out: str) -> Iterator[dict[str, Any]]:
    """The places of `tables`: one in memory is written beside the data set `out` until the block ends, and an
    InputError of the block calls it by its name. Raises OutputError when `out` cannot become a data set."""
    if not any(map(in_memory, tables.values())):
        yield dict(tables)
        return
    storage.check_writable(out, DATASET_MARKER, "data set")
    with storage.scratch_folder(f"{storage.absolute(out)}.tables") as scratch:
        written = {name: storage.join(scratch, f"{name}.parquet") for name, table in tables.items() if in_memory(table)}
        try:
            for name, uri in written.items():
                table = tables[name]
                if in_memory(table):
                    _write(table, name, uri)
            yield {**tables, **written}
        except InputError as error:
            message = str(error)
            for name, uri in written.items():
                message = message.replace(uri, name)
            raise InputError(message) from None


def _write(table: ArrowStream, name: str, uri: str) -> None:
    """Write a table as one Parquet file. Relative places of pictures are those below the working directory."""
    try:
        reader = pa.RecordBatchReader.from_stream(table)
        rows = _prepared(reader.schema.empty_table())
        with storage.table_writer(uri, rows.schema) as write:
            write(rows)  # a stream may hold no batch at all
            for group in _groups(reader):
                write(_prepared(group).cast(rows.schema))
    except pa.ArrowException as error:
        raise InputError(f"{name}: cannot be read: {' '.join(str(error).split())[:300]}") from None


def _groups(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """The rows of a stream, small batches joined and large ones cut: `prepare` shares groups out to workers."""
    pending: list[pa.RecordBatch] = []
    rows = num_bytes = 0
    for batch in reader:
        step = max(1, min(_GROUP_ROWS, _GROUP_BYTES * len(batch) // max(batch.nbytes, 1)))
        for start in range(0, len(batch), step):
            piece = batch.slice(start, step)
            pending.append(piece)
            rows, num_bytes = rows + len(piece), num_bytes + piece.nbytes
            if rows >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
                yield pa.Table.from_batches(pending)
                pending, rows, num_bytes = [], 0, 0
    if pending:
        yield pa.Table.from_batches(pending)


def _prepared(table: pa.Table) -> pa.Table:
    """The same rows in the plainest types, pictures named in full, without what is only pandas' row labels."""
    kept = [number for number, name in enumerate(table.column_names) if not _PANDAS_INDEX.fullmatch(name)]
    names = [table.column_names[number] for number in kept]
    columns = [plain(_decoded(table.column(number))) for number in kept]
    located = [_located(c) if name in _PICTURE_PLACES else c for name, c in zip(names, columns, strict=True)]
    return pa.Table.from_arrays(located, names)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A dictionary of string views (Polars' categories) as strings: Arrow itself takes no views by their index."""
    if not pa.types.is_dictionary(column.type) or not pa.types.is_string_view(column.type.value_type):
        return column
    chunks = [chunk.dictionary.cast(pa.string()).take(chunk.indices) for chunk in column.chunks]
    return pa.chunked_array(chunks, pa.string())


def _located(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type not in (pa.string(), pa.list_(pa.string())):
        return column
    return pa.chunked_array([[_absolute(value) for value in column.to_pylist()]], column.type)


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    return storage.resolve(value, os.getcwd()) if value else value
