"""Tables and arrays in files: Parquet, Arrow IPC and .npy, read whole, in pieces or mapped."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from pixrec.errors import ArtifactError, InputError
from pixrec.storage.files import STREAM_BYTES, exists, is_folder, list_files, new_file, read_bytes, write_bytes
from pixrec.storage.places import TROUBLE, absolute, arrow_location, failed, is_remote, one_line, unwritable

_AHEAD_BYTES = 128 * 1024**2  # what is smaller is read at once, which is twice as fast


def table_files(uri: str) -> list[str]:
    """The Parquet files behind a table URI: the file itself, or all below a folder or prefix."""
    if not exists(uri):
        raise InputError(f"{uri}: no such file or folder")
    files = list_files(uri, ".parquet") if is_folder(uri) else [uri]
    if not files:
        raise InputError(f"{uri}: holds no .parquet file")
    return files


def read_schema(uri: str) -> pa.Schema:
    fs, path = arrow_location(table_files(uri)[0])
    try:
        return pq.read_schema(path, filesystem=fs)
    except (pa.ArrowException, *TROUBLE) as error:
        raise failed(uri, error) from None


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A whole table in memory, files in name order. Raises InputError when it is absent, is not Parquet or lacks one
    of the `columns`."""
    tables = []
    for file in table_files(uri):
        fs, path = arrow_location(file)
        try:
            table = pq.ParquetFile(path, filesystem=fs).read(columns)  # passes over columns that are not there
        except (pa.ArrowException, KeyError, *TROUBLE) as error:
            raise failed(file, error) from None
        if missing := set(columns or ()).difference(table.column_names):
            raise InputError(f"{file}: no column {min(missing)!r}")
        tables.append(table)
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{uri}: its files disagree about a column: {one_line(error)}") from None


class RowGroup(NamedTuple):
    """One of the pieces in which a Parquet file can be read; `num_bytes` is its size in memory, about."""

    rows: int
    num_bytes: int


def row_groups(uri: str) -> list[RowGroup]:
    """The row groups of one Parquet file, in order. Raises InputError when it cannot be read."""
    fs, path = arrow_location(uri)
    try:
        metadata = pq.read_metadata(path, filesystem=fs)
    except (pa.ArrowException, *TROUBLE) as error:
        raise failed(uri, error) from None
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return [RowGroup(group.num_rows, group.total_byte_size) for group in groups]


def read_rows(uri: str, group: int, start: int, stop: int) -> pa.Table:
    """Rows `start` to `stop` of one row group, all columns, without holding the rest of the group in memory."""
    fs, path = arrow_location(uri)
    pieces, seen = [], 0
    try:
        file = pq.ParquetFile(path, filesystem=fs, pre_buffer=False, buffer_size=STREAM_BYTES)
        for batch in file.iter_batches(batch_size=stop - start, row_groups=[group]):
            if seen + len(batch) > start and seen < stop:
                pieces.append(batch.slice(max(start - seen, 0), stop - max(start, seen)))
            seen += len(batch)
            if seen >= stop:
                break
        return pa.Table.from_batches(pieces, file.schema_arrow)
    except (pa.ArrowException, *TROUBLE) as error:
        raise failed(uri, error) from None


def stream_table(
    uri: str,
    columns: list[str] | None,
    rows_at_a_time: int,
    *,
    groups: range | None = None,
    encoded: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """The rows of one Parquet file in order, a few at a time; named columns that it lacks are left out.

    Of the row `groups` alone, where they are given. Columns of strings named in `encoded` come as dictionaries.
    """
    fs, path = arrow_location(uri)
    try:
        if encoded:
            schema = pq.read_schema(path, filesystem=fs)
            encoded = [name for name in encoded if name in schema.names and schema.field(name).type == pa.string()]
        metadata = pq.read_metadata(path, filesystem=fs)
        chosen = list(range(metadata.num_row_groups) if groups is None else groups)
        ahead = sum(metadata.row_group(group).total_byte_size for group in chosen) <= _AHEAD_BYTES
        file = pq.ParquetFile(
            path, filesystem=fs, pre_buffer=ahead, buffer_size=STREAM_BYTES, read_dictionary=list(encoded)
        )
        known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=rows_at_a_time, columns=known, row_groups=chosen):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, *TROUBLE) as error:
        raise failed(uri, error) from None


def write_table(uri: str, table: pa.Table) -> str:
    """Write one Parquet file whole; returns the hash of its bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    write_bytes(uri, data)
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextlib.contextmanager
def table_writer(uri: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A function that appends rows to one new Parquet file, a row group a call; for what does not fit into memory."""
    fs, path = arrow_location(uri)
    try:
        if not is_remote(uri):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with pq.ParquetWriter(path, schema, filesystem=fs, compression="zstd") as writer:
            yield writer.write_table
    except TROUBLE as error:
        raise unwritable(uri, error) from None


def write_batches(uri: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], *, durable: bool = True) -> None:
    """One Arrow IPC file, from which each batch can be read alone."""
    with new_file(uri, durable=durable) as sink, pa.ipc.new_file(pa.PythonFile(sink, "w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_batches(uri: str, numbers: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
    """Some batches of an Arrow IPC file, by number, or all of them, without reading the others."""
    fs, path = arrow_location(uri)
    try:
        with fs.open_input_file(path) as source, pa.ipc.open_file(source) as file:
            for number in range(file.num_record_batches) if numbers is None else numbers:
                yield file.get_batch(number)
    except (pa.ArrowException, *TROUBLE) as error:
        raise failed(uri, error) from None


def write_array(uri: str, array: np.ndarray, *, durable: bool = True) -> None:
    """One .npy file."""
    with new_file(uri, durable=durable) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def read_array(uri: str) -> np.ndarray:
    """The array of one .npy file, in memory. Raises ArtifactError when it is damaged, InputError when it is absent."""
    try:
        if not is_remote(uri):
            return np.load(absolute(uri), allow_pickle=False)
        return np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{uri} is damaged: {one_line(error)}; make the artifact again") from None
    except TROUBLE as error:
        raise failed(uri, error) from None


def map_array(uri: str) -> np.ndarray:
    """The array of one local .npy file, mapped: its pages are shared by all processes and read when touched."""
    try:
        array = np.load(absolute(uri), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{uri} is damaged: {one_line(error)}; make the artifact again") from None
    except TROUBLE as error:
        raise failed(uri, error) from None
    return array.view(np.ndarray)


def map_column(uri: str) -> pa.ChunkedArray:
    """The only column of a local Arrow IPC file, mapped as `map_array` does it."""
    try:
        return pa.ipc.open_file(pa.memory_map(absolute(uri))).read_all().column(0)
    except pa.ArrowException as error:
        raise ArtifactError(f"{uri} is damaged: {one_line(error)}; make the artifact again") from None
    except TROUBLE as error:
        raise failed(uri, error) from None


def map_table(uri: str) -> pa.Table:
    """A local Arrow IPC file, mapped as `map_array` does it."""
    return pa.ipc.open_file(pa.memory_map(absolute(uri))).read_all()
