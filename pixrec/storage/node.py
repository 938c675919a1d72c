"""Files that all processes of a node share: copies of what lies on s3://, and mapped forms of tables."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

from pixrec.errors import OutputError
from pixrec.storage.places import TROUBLE, absolute, failed, is_remote, locate, one_line

_T = TypeVar("_T")
_KEPT_SECONDS = 7 * 24 * 3600


def node_copy(uri: str, key: str) -> str:
    """A local folder with the content of the folder `uri`: itself, or a copy that all processes of a node share.

    `key` names the content, and so the copy. The copies lie where `node_place` says.
    """
    if not is_remote(uri):
        return absolute(uri)
    with _locked(key) as copy:
        if not os.path.isdir(copy):
            _sweep(os.path.dirname(copy))
            partial = f"{copy}.partial-{uuid.uuid4().hex[:8]}"
            fs, path = locate(uri)
            try:
                fs.get(path, partial, recursive=True)
                os.replace(partial, copy)
            except TROUBLE as error:
                raise failed(uri, error) from None
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
            _sweep(os.path.dirname(path))
            partial = f"{path}.partial"
            try:
                make(partial)
                for old in glob.glob(f"{glob.escape(place)}.*.made"):
                    os.unlink(old)
                os.replace(partial, path)
            except OSError as error:
                cure = "set PIXREC_CACHE to a folder with room"
                raise OutputError(f"{path} cannot be written: {one_line(error)}; {cure}") from None
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
        os.utime(path)
        return opened(path)


def node_place(name: str) -> str:
    """The path of a file or folder in the cache of the node: in PIXREC_CACHE, by default a folder of the user's own in
    the system's for temporary files. What nobody has asked for in a week may be removed."""
    place = os.environ.get("PIXREC_CACHE") or os.path.join(tempfile.gettempdir(), f"pixrec-{os.getuid()}")
    os.makedirs(place, mode=0o700, exist_ok=True)
    path = os.path.join(place, name)
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
    return path


def _sweep(folder: str) -> None:
    """Remove what has not been used for a week. Processes that have mapped it keep it."""
    oldest = time.time() - _KEPT_SECONDS
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # somebody else was faster
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


@contextlib.contextmanager
def _locked(name: str) -> Iterator[str]:
    """A path in the cache of the node, for one process at a time."""
    path = node_place(name)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by a process that dies
        yield path
