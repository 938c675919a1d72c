"""Folders that are published whole: written beside their place, and moved there when they are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator

from pixrec.errors import OutputError, PixRecError
from pixrec.storage.files import exists, list_folders, remove, remove_empty
from pixrec.storage.places import TROUBLE, absolute, is_remote, join, locate, name, parent, unwritable


@contextlib.contextmanager
def staged_folder(uri: str, marker: str, kind: str) -> Iterator[str]:
    """A folder to write into that becomes `uri` when the block ends well, and vanishes when it does not.

    `marker` is the file every complete folder of this `kind` holds. An older one at `uri` is replaced whole;
    anything else there is refused, so that a mistyped --out destroys nothing. On s3:// the marker is copied last
    and readers go by it. What a killed run for the same place left behind is removed.
    """
    check_writable(uri, marker, kind)
    staging = _fresh_beside(uri, "partial")
    fs, staging_path = locate(staging)
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
    fs, path = locate(uri)
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
    except TROUBLE as error:
        raise unwritable(uri, error) from None


def _move(source: str, target: str, marker: str) -> None:
    fs, source_path = locate(source)
    _, target_path = locate(target)
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
