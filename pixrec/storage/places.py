"""Places: which file system a URI belongs to, its parts, and what its troubles are called."""

from __future__ import annotations

import errno
import os
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow.fs
from botocore.exceptions import BotoCoreError, HTTPClientError

from pixrec.errors import InputError, OutputError, UnavailableError

_REMOTE = ("s3://",)
TROUBLE = (OSError, BotoCoreError)  # the second: no credentials, no such endpoint
_PASSING = {errno.EBUSY, errno.EIO, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EIO)}  # of 5xx, and of silence
_ATTEMPTS = 8
"""Of one request, with waits that double from a second at random: S3 may refuse for a minute, not for ten."""
_CONNECT_SECONDS = 10


def is_remote(uri: str) -> bool:
    return uri.startswith(_REMOTE)


def locate(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and its path there. Raises InputError where there is none."""
    if not uri:
        raise InputError("a place is empty: name a file or a folder")
    if "://" in uri and not is_remote(uri):
        raise InputError(f"{uri}: only local paths and s3:// URIs are known")
    if not is_remote(uri):
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(uri))
    client: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        client["retries"] = {"total_max_attempts": _ATTEMPTS, "mode": "legacy"}  # the others share one budget
    fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, config_kwargs=client)
    return fs, path.rstrip("/")


def arrow_location(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path for readers that want Arrow's own types (Ray Data, datasets)."""
    fs, path = locate(uri)
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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def passes(error: BaseException) -> bool:
    """Whether S3 did not answer, or refused for now, as often as it was asked."""
    return isinstance(error, (HTTPClientError, TimeoutError)) or getattr(error, "errno", None) in _PASSING


def failed(uri: str, error: BaseException) -> InputError | UnavailableError:
    if is_remote(uri) and passes(error):
        return UnavailableError(f"{uri}: cannot be read for now: {one_line(error)}; run the same command again later")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{uri}: no such file or folder")
    return InputError(f"{uri}: cannot be read: {one_line(error)}")


def unwritable(uri: str, error: BaseException) -> OutputError | UnavailableError:
    if is_remote(uri) and passes(error):
        return UnavailableError(f"{uri} cannot be written for now: {one_line(error)}; run the same command again later")
    return OutputError(f"{uri} cannot be written: {one_line(error)}; choose another --out")
