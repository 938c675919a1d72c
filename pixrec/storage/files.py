"""Single files, whole or not there, and what lies below a folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pixrec.errors import ArtifactError, InputError
from pixrec.storage.places import TROUBLE, absolute, failed, is_remote, locate, unwritable

STREAM_BYTES = 4 * 1024**2


def exists(uri: str) -> bool:
    fs, path = locate(uri)
    try:
        return fs.exists(path)
    except TROUBLE as error:
        raise failed(uri, error) from None


def is_folder(uri: str) -> bool:
    fs, path = locate(uri)
    return fs.isdir(path)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """URIs of all files below a folder that end in `suffix`, sorted; hidden ones are skipped."""
    fs, path = locate(uri)
    if not fs.exists(path):
        return []
    scheme = "s3://" if is_remote(uri) else ""
    below = (f for f in fs.find(path) if not any(p.startswith((".", "_")) for p in f[len(path) :].split("/")))
    return sorted(f"{scheme}{f}" for f in below if f.endswith(suffix))


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below a folder, sorted."""
    fs, path = locate(uri)
    if not fs.exists(path):
        return []
    entries = fs.ls(path, detail=True)
    return sorted(PurePosixPath(e["name"]).name for e in entries if e["type"] == "directory")


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The content of one file. Raises FileNotFoundError, or InputError when it is larger than `max_bytes`."""
    fs, path = locate(uri)
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
    located = [locate(uri) for uri in uris]
    try:
        found = located[0][0].cat([path for _, path in located], on_error="return")
    except TROUBLE as error:
        raise failed(uris[0], error) from None
    contents: list[bytes | None] = []
    for uri, (_, path) in zip(uris, located, strict=True):
        content = found[path]
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise failed(uri, content) from None
        contents.append(None if isinstance(content, Exception) else content)
    return contents


def read_text(uri: str) -> str:
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{uri}: is not UTF-8 text") from None
    except TROUBLE as error:
        raise failed(uri, error) from None


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
    if not is_remote(uri):
        with new_file(uri) as file:
            file.write(data)
        return
    fs, path = locate(uri)
    try:
        fs.pipe_file(path, data)  # one PUT
    except TROUBLE as error:
        raise unwritable(uri, error) from None


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def new_file(uri: str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write from start to end, whole or not at all. `durable` False: it may be lost with the machine's
    power, as what a run makes for itself may."""
    fs, path = locate(uri)
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
    except TROUBLE as error:
        raise unwritable(uri, error) from None


@contextlib.contextmanager
def open_stream(uri: str) -> Iterator[io.BufferedReader]:
    """The bytes of one file from the start, a few MiB in memory at a time. Raises InputError, also inside the block."""
    fs, path = locate(uri)
    try:
        with fs.open(path, "rb", block_size=STREAM_BYTES) if is_remote(uri) else open(path, "rb", 0) as raw:
            yield io.BufferedReader(raw, STREAM_BYTES)
    except TROUBLE as error:
        raise failed(uri, error) from None


def stamp(uri: str) -> str:
    """What changes when a file is written anew: its size and time, or what s3:// calls its ETag."""
    fs, path = locate(uri)
    try:
        facts = fs.info(path)
    except TROUBLE as error:
        raise failed(uri, error) from None
    return f"{facts.get('size')}-{facts.get('ETag') or facts.get('mtime')}"


def remove(uri: str) -> None:
    """Remove a file or a folder with all below it; what is gone already is no error."""
    fs, path = locate(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def remove_empty(uri: str) -> None:
    """Remove a folder unless something lies in it; on s3:// an empty one is none."""
    _, path = locate(uri)
    if not is_remote(uri):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def copy_folder(source: str, target: str) -> None:
    """Copy all files below one folder to another place, as `copy_file` does."""
    fs, path = locate(source)
    scheme = "s3://" if is_remote(source) else ""
    for file in fs.find(path):  # also those in folders that begin with `_`, which belong to data sets
        copy_file(f"{scheme}{file}", target.rstrip("/") + file[len(path) :])


def copy_file(source: str, target: str) -> None:
    """Copy one file to another place, across file systems, a few MiB in memory at a time."""
    with open_stream(source) as stream, new_file(target) as file:
        shutil.copyfileobj(stream, file, STREAM_BYTES)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[str]:
    """A local path with the content of `uri`, for libraries that only read local folders."""
    if not is_remote(uri):
        yield absolute(uri)
        return
    with tempfile.TemporaryDirectory(prefix="pixrec-") as folder:
        copy_folder(uri, folder)
        yield folder
