"""The only module that knows file systems (local paths and s3://) and Parquet.

A URI is a local path or `s3://bucket/key`; credentials and endpoint come from the usual AWS_* variables.
A folder that is published here is complete or invisible: it is written beside its place and moved there whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError

from pixrec.errors import ArtifactError, InputError, OutputError, PixRecError

_T = TypeVar("_T")

_REMOTE = ("s3://",)
_TROUBLE = (OSError, BotoCoreError)  # the second: no credentials, no such endpoint
_STREAM_BYTES = 4 * 1024**2
_AHEAD_BYTES = 128 * 1024**2  # what is smaller is read at once, which is twice as fast


def is_remote(uri: str) -> bool:
    return uri.startswith(_REMOTE)


def _locate(uri: str) -> tuple[Any, str]:
    if not uri:
        raise InputError("a place is empty: name a file or a folder")
    if "://" in uri and not is_remote(uri):
        raise InputError(f"{uri}: only local paths and s3:// URIs are known")
    if not is_remote(uri):
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(uri))
    fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    return fs, path.rstrip("/")


def arrow_location(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path for readers that want Arrow's own types (Ray Data, datasets)."""
    fs, path = _locate(uri)
    if not is_remote(uri):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def object_store_options(uri: str) -> dict[str, str]:
    """For libraries that reach s3:// by the Rust crate `object_store` (Lance): what it does not take from AWS_*."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not is_remote(uri) or not endpoint:
        return {}
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


def absolute(uri: str) -> str:
    return uri.rstrip("/") if is_remote(uri) else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def parent(uri: str) -> str:
    uri = absolute(uri)
    return uri.rsplit("/", 1)[0] or "/"


def name(uri: str) -> str:
    return PurePosixPath(absolute(uri)).name


def resolve(uri: str, folder: str) -> str:
    """`uri` itself where it is absolute, else joined to `folder` with `..` resolved."""
    if "://" in uri or uri.startswith("/"):
        return uri
    if is_remote(folder):
        scheme, _, rest = folder.partition("://")
        return f"{scheme}://{os.path.normpath(f'{rest}/{uri}')}"
    return os.path.normpath(os.path.join(folder, uri))


def exists(uri: str) -> bool:
    fs, path = _locate(uri)
    try:
        return fs.exists(path)
    except _TROUBLE as error:
        raise _failed(uri, error) from None


def is_folder(uri: str) -> bool:
    fs, path = _locate(uri)
    return fs.isdir(path)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """URIs of all files below a folder that end in `suffix`, sorted; hidden ones are skipped."""
    fs, path = _locate(uri)
    if not fs.exists(path):
        return []
    scheme = "s3://" if is_remote(uri) else ""
    below = (f for f in fs.find(path) if not any(p.startswith((".", "_")) for p in f[len(path) :].split("/")))
    return sorted(f"{scheme}{f}" for f in below if f.endswith(suffix))


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below a folder, sorted."""
    fs, path = _locate(uri)
    if not fs.exists(path):
        return []
    entries = fs.ls(path, detail=True)
    return sorted(PurePosixPath(e["name"]).name for e in entries if e["type"] == "directory")


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The content of one file. Raises FileNotFoundError, or InputError when it is larger than `max_bytes`."""
    fs, path = _locate(uri)
    try:
        with fs.open(path, "rb") as file:
            data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    except (IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    if max_bytes is not None and len(data) > max_bytes:
        raise InputError(f"{uri} is larger than {max_bytes} bytes")
    return data


def read_files(uris: Sequence[str]) -> list[bytes | None]:
    """The content of many small files, from s3:// side by side; None for one that is not there."""
    if not uris:
        return []
    located = [_locate(uri) for uri in uris]
    try:
        found = located[0][0].cat([path for _, path in located], on_error="return")
    except _TROUBLE as error:
        raise _failed(uris[0], error) from None
    contents: list[bytes | None] = []
    for uri, (_, path) in zip(uris, located, strict=True):
        content = found[path]
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise _failed(uri, content) from None
        contents.append(None if isinstance(content, Exception) else content)
    return contents


def read_text(uri: str) -> str:
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{uri}: is not UTF-8 text") from None
    except _TROUBLE as error:
        raise _failed(uri, error) from None


def read_json(uri: str, keys: Sequence[str] = ()) -> Any:
    """The value in a JSON file. Raises ArtifactError where it is not JSON, or is not an object that has all of `keys`;
    InputError where the file cannot be read."""
    try:
        value = json.loads(read_text(uri))
    except ValueError:
        raise ArtifactError(f"{uri} is not valid JSON; make the artifact again") from None
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise ArtifactError(f"{uri} is damaged: it says nothing of {', '.join(missing)}; make the artifact again")
    return value


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file whole: readers see the old content or the new, never a part."""
    fs, path = _locate(uri)
    try:
        if is_remote(uri):
            fs.pipe_file(path, data)  # one PUT
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except _TROUBLE as error:
        raise _unwritable(uri, error) from None


@contextlib.contextmanager
def new_file(uri: str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write from start to end, whole or not at all. `durable` False: it may be lost with the machine's
    power, as what a run makes for itself may."""
    fs, path = _locate(uri)
    partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
    try:
        if is_remote(uri):
            file = fs.open(path, "wb", autocommit=False)
            try:
                yield file
            except BaseException:
                file.close()
                file.discard()
                raise
            file.close()
            file.commit()
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(partial, "wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
    except _TROUBLE as error:
        raise _unwritable(uri, error) from None


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
        raise ArtifactError(f"{uri} is damaged: {_one_line(error)}; make the artifact again") from None
    except _TROUBLE as error:
        raise _failed(uri, error) from None


def map_array(uri: str) -> np.ndarray:
    """The array of one local .npy file, mapped: its pages are shared by all processes and read when touched."""
    try:
        array = np.load(absolute(uri), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{uri} is damaged: {_one_line(error)}; make the artifact again") from None
    except _TROUBLE as error:
        raise _failed(uri, error) from None
    return array.view(np.ndarray)


def map_column(uri: str) -> pa.ChunkedArray:
    """The only column of a local Arrow IPC file, mapped as `map_array` does it."""
    try:
        return pa.ipc.open_file(pa.memory_map(absolute(uri))).read_all().column(0)
    except pa.ArrowException as error:
        raise ArtifactError(f"{uri} is damaged: {_one_line(error)}; make the artifact again") from None
    except _TROUBLE as error:
        raise _failed(uri, error) from None


def map_table(uri: str) -> pa.Table:
    """A local Arrow IPC file, mapped as `map_array` does it."""
    return pa.ipc.open_file(pa.memory_map(absolute(uri))).read_all()


def node_copy(uri: str, key: str) -> str:
    """A local folder with the content of the folder `uri`: itself, or a copy that all processes of a node share.

    `key` names the content, and so the copy. The copies lie below PIXREC_CACHE, by default `pixrec` in the system's
    folder for temporary files, and stay there.
    """
    if not is_remote(uri):
        return absolute(uri)
    with _locked(key) as copy:
        if not os.path.isdir(copy):
            partial = f"{copy}.partial-{uuid.uuid4().hex[:8]}"
            fs, path = _locate(uri)
            try:
                fs.get(path, partial, recursive=True)
                os.replace(partial, copy)
            except _TROUBLE as error:
                raise _failed(uri, error) from None
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return copy


def node_file(uri: str, version: str, make: Callable[[str], None], opened: Callable[[str], _T]) -> _T:
    """What `opened(path)` gives of a local file that all processes of a node share, such as a mapped form of `uri`.

    `make(path)` writes it where it is not there yet. It lies beside the copies of `node_copy`; when the `version` of
    `uri` changes the new file takes the place of the old one, which stays with the processes that have it open.
    """
    name = hashlib.blake2b(absolute(uri).encode(), digest_size=16).hexdigest()
    kept = hashlib.blake2b(version.encode(), digest_size=8).hexdigest()
    with _locked(name) as place:
        path = f"{place}.{kept}.made"
        if not os.path.exists(path):
            partial = f"{path}.partial"
            try:
                make(partial)
                for old in glob.glob(f"{glob.escape(place)}.*.made"):
                    os.unlink(old)
                os.replace(partial, path)
            except OSError as error:
                cure = "set PIXREC_CACHE to a folder with room"
                raise OutputError(f"{path} cannot be written: {_one_line(error)}; {cure}") from None
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
        return opened(path)


@contextlib.contextmanager
def _locked(name: str) -> Iterator[str]:
    """A path in the cache of the node, for one process at a time."""
    place = os.environ.get("PIXREC_CACHE") or os.path.join(tempfile.gettempdir(), f"pixrec-{os.getuid()}")
    os.makedirs(place, exist_ok=True)
    path = os.path.join(place, name)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by a process that dies
        yield path


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


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
    except (pa.ArrowException, *_TROUBLE) as error:
        raise _failed(uri, error) from None


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A whole table in memory, files in name order. Raises InputError when it is absent, is not Parquet or lacks one
    of the `columns`."""
    tables = []
    for file in table_files(uri):
        fs, path = arrow_location(file)
        try:
            table = pq.ParquetFile(path, filesystem=fs).read(columns)  # passes over columns that are not there
        except (pa.ArrowException, KeyError, *_TROUBLE) as error:
            raise _failed(file, error) from None
        if missing := set(columns or ()).difference(table.column_names):
            raise InputError(f"{file}: no column {min(missing)!r}")
        tables.append(table)
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{uri}: its files disagree about a column: {_one_line(error)}") from None


class RowGroup(NamedTuple):
    """One of the pieces in which a Parquet file can be read; `num_bytes` is its size in memory, about."""

    rows: int
    num_bytes: int


def row_groups(uri: str) -> list[RowGroup]:
    """The row groups of one Parquet file, in order. Raises InputError when it cannot be read."""
    fs, path = arrow_location(uri)
    try:
        metadata = pq.read_metadata(path, filesystem=fs)
    except (pa.ArrowException, *_TROUBLE) as error:
        raise _failed(uri, error) from None
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return [RowGroup(group.num_rows, group.total_byte_size) for group in groups]


def read_rows(uri: str, group: int, start: int, stop: int) -> pa.Table:
    """Rows `start` to `stop` of one row group, all columns, without holding the rest of the group in memory."""
    fs, path = arrow_location(uri)
    pieces, seen = [], 0
    try:
        file = pq.ParquetFile(path, filesystem=fs, pre_buffer=False, buffer_size=_STREAM_BYTES)
        for batch in file.iter_batches(batch_size=stop - start, row_groups=[group]):
            if seen + len(batch) > start and seen < stop:
                pieces.append(batch.slice(max(start - seen, 0), stop - max(start, seen)))
            seen += len(batch)
            if seen >= stop:
                break
        return pa.Table.from_batches(pieces, file.schema_arrow)
    except (pa.ArrowException, *_TROUBLE) as error:
        raise _failed(uri, error) from None


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
            path, filesystem=fs, pre_buffer=ahead, buffer_size=_STREAM_BYTES, read_dictionary=list(encoded)
        )
        known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=rows_at_a_time, columns=known, row_groups=chosen):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, *_TROUBLE) as error:
        raise _failed(uri, error) from None


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
    except _TROUBLE as error:
        raise _unwritable(uri, error) from None


@contextlib.contextmanager
def open_stream(uri: str) -> Iterator[io.BufferedReader]:
    """The bytes of one file from the start, a few MiB in memory at a time. Raises InputError, also inside the block."""
    fs, path = _locate(uri)
    try:
        with fs.open(path, "rb", block_size=_STREAM_BYTES) if is_remote(uri) else open(path, "rb", 0) as raw:
            yield io.BufferedReader(raw, _STREAM_BYTES)
    except _TROUBLE as error:
        raise _failed(uri, error) from None


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
    except (pa.ArrowException, *_TROUBLE) as error:
        raise _failed(uri, error) from None


def stamp(uri: str) -> str:
    """What changes when a file is written anew: its size and time, or what s3:// calls its ETag."""
    fs, path = _locate(uri)
    try:
        facts = fs.info(path)
    except _TROUBLE as error:
        raise _failed(uri, error) from None
    return f"{facts.get('size')}-{facts.get('ETag') or facts.get('mtime')}"


def remove(uri: str) -> None:
    """Remove a file or a folder with all below it; what is gone already is no error."""
    fs, path = _locate(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def remove_empty(uri: str) -> None:
    """Remove a folder unless something lies in it; on s3:// an empty one is none."""
    _, path = _locate(uri)
    if not is_remote(uri):
        with contextlib.suppress(OSError):
            os.rmdir(path)


@contextlib.contextmanager
def staged_folder(uri: str, marker: str, kind: str) -> Iterator[str]:
    """A folder to write into that becomes `uri` when the block ends well, and vanishes when it does not.

    `marker` is the file every complete folder of this `kind` holds. An older one at `uri` is replaced whole;
    anything else there is refused, so that a mistyped --out destroys nothing. On s3:// the marker is copied last
    and readers go by it. What a killed run for the same place left behind is removed.
    """
    check_writable(uri, marker, kind)
    staging = _fresh_beside(uri, "partial")
    fs, staging_path = _locate(staging)
    try:
        if not is_remote(uri):
            os.makedirs(staging_path)
        yield staging
        if not exists(join(staging, marker)):
            raise RuntimeError(f"{kind} was left without its {marker}")
        _move(staging, uri, marker)
    finally:
        if fs.exists(staging_path):
            fs.rm(staging_path, recursive=True)


@contextlib.contextmanager
def work_folder(uri: str, key: str, marker: str, kind: str) -> Iterator[str]:
    """A folder to work in whose part `data` becomes `uri` when the block ends well, as in `staged_folder`.

    One that a killed run with the same `key` left behind is gone on with, one of another key is removed. An error that
    we raise ourselves leaves nothing.
    """
    check_writable(uri, marker, kind)
    work = join(parent(uri), f".{name(uri)}.work-{key}")
    _clear_beside(uri, "work", but=name(work))
    absent = _absent_above(work)
    try:
        if exists(work) and not exists(join(work, "data")):
            remove(work)  # killed when its data had been moved already
        if not is_remote(uri):
            os.makedirs(absolute(join(work, "data")), exist_ok=True)
        yield work
        if not exists(join(work, "data", marker)):
            raise RuntimeError(f"{kind} was left without its {marker}")
        _move(join(work, "data"), uri, marker)
    except PixRecError:
        remove(work)
        for folder in absent:
            remove_empty(folder)
        raise
    remove(work)


def _absent_above(uri: str) -> list[str]:
    """The folders above `uri` that are not there, the deepest first."""
    absent: list[str] = []
    above = parent(uri)
    while not is_remote(uri) and not os.path.exists(above):
        absent.append(above)
        above = parent(above)
    return absent


@contextlib.contextmanager
def scratch_folder(uri: str) -> Iterator[str]:
    """A folder beside `uri` for temporary files, removed when the block ends, whichever way it ends."""
    scratch = _fresh_beside(uri, "scratch")
    try:
        yield scratch
    finally:
        remove(scratch)


def _fresh_beside(uri: str, what: str) -> str:
    """A folder name of its own beside `uri`; what killed runs for the same place left behind is removed."""
    _clear_beside(uri, what)
    return join(parent(uri), f".{name(uri)}.{what}-{uuid.uuid4().hex[:8]}")


def _clear_beside(uri: str, what: str, but: str = "") -> None:
    for folder in list_folders(parent(uri)):
        if folder.startswith(f".{name(uri)}.{what}-") and folder != but:
            remove(join(parent(uri), folder))


def check_writable(uri: str, marker: str, kind: str) -> None:
    """Raise OutputError when `uri` cannot become a folder of this `kind`, before any work is spent on it."""
    fs, path = _locate(uri)
    try:
        if fs.exists(path) and not fs.isdir(path):
            raise OutputError(f"{uri} is a file; --out must name a folder")
        if fs.isdir(path) and fs.ls(path) and not fs.exists(f"{path}/{marker}"):
            raise OutputError(f"{uri} is not empty and holds no {kind}; choose another --out or empty it")
        if not is_remote(uri):
            above = os.path.dirname(path)
            while not os.path.exists(above):
                above = os.path.dirname(above)
            probe = os.path.join(above, f".pixrec-probe-{uuid.uuid4().hex[:8]}")
            os.mkdir(probe)
            os.rmdir(probe)
        else:
            probe = f"{path}.pixrec-probe"
            fs.pipe_file(probe, b"")
            fs.rm_file(probe)
    except _TROUBLE as error:
        raise _unwritable(uri, error) from None


def _move(source: str, target: str, marker: str) -> None:
    fs, source_path = _locate(source)
    _, target_path = _locate(target)
    if not is_remote(target):
        old = None
        if os.path.exists(target_path):
            old = f"{source_path}-old"
            os.replace(target_path, old)
        try:
            os.replace(source_path, target_path)
        except OSError:
            if old:
                os.replace(old, target_path)
            raise
        if old:
            shutil.rmtree(old)
        return
    if fs.exists(f"{target_path}/{marker}"):
        fs.rm_file(f"{target_path}/{marker}")  # readers see an incomplete folder from here on
    if fs.exists(target_path):
        fs.rm(target_path, recursive=True)
    files = sorted(fs.find(source_path), key=lambda f: f == f"{source_path}/{marker}")
    for file in files:
        fs.copy(file, target_path + file[len(source_path) :])


def copy_folder(source: str, target: str) -> None:
    """Copy all files below one folder to another place, across file systems, one file in memory at a time."""
    fs, path = _locate(source)
    scheme = "s3://" if is_remote(source) else ""
    for file in fs.find(path):  # also those in folders that begin with `_`, which belong to data sets
        write_bytes(target.rstrip("/") + file[len(path) :], read_bytes(f"{scheme}{file}"))


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[str]:
    """A local path with the content of `uri`, for libraries that only read local folders."""
    if not is_remote(uri):
        yield absolute(uri)
        return
    with tempfile.TemporaryDirectory(prefix="pixrec-") as folder:
        copy_folder(uri, folder)
        yield folder


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _failed(uri: str, error: BaseException) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{uri}: no such file or folder")
    return InputError(f"{uri}: cannot be read: {_one_line(error)}")


def _unwritable(uri: str, error: BaseException) -> OutputError:
    return OutputError(f"{uri} cannot be written: {_one_line(error)}; choose another --out")
