"""The pictures that a request of /v1/items names by a URI. Knows no route."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import PurePosixPath

from pixrec.config import PrepareConfig, ServeConfig
from pixrec.errors import InputError

_AT_A_TIME, _SECONDS_EACH, _ATTEMPTS_MORE = 8, 10.0, 1


def read_pictures(uris: Mapping[str, str], config: ServeConfig) -> dict[str, bytes]:
    """The bytes of the picture of each item, by the item's id; together at most `max_body_bytes`, as if they had come
    with the request. Blocks, for `request_timeout_seconds` and the time of one picture at most.

    Raises InputError for a URI that may not be read, or behind which no picture is; UnavailableError where S3 does not
    answer.
    """
    from pixrec.data.fetch import Fetcher  # here: where no URI is sent, no HTTP client is needed

    for item_id, uri in uris.items():
        if not _allowed(uri, config.image_uris):
            raise InputError(f"item {item_id!r}: serve.image_uris does not allow this image_uri")
    limits = PrepareConfig(
        max_image_bytes=config.max_image_bytes,
        fetch_concurrency=_AT_A_TIME,
        fetch_timeout_seconds=_SECONDS_EACH,
        fetch_retries=_ATTEMPTS_MORE,
        allow_private_addresses=config.allow_private_addresses,
    )
    item_ids, found, left = [*uris], dict[str, bytes](), config.max_body_bytes
    deadline = time.monotonic() + config.request_timeout_seconds
    with Fetcher("/", limits) as fetcher:
        for row, picture in fetcher.pictures((None, uri) for uri in uris.values()):
            if picture.data is None:
                raise InputError(f"item {item_ids[row]!r}: its image_uri gave no picture: {picture.reason}")
            found[item_ids[row]] = picture.data
            left -= len(picture.data)
            if left < 0:
                raise InputError(f"the pictures hold more than {config.max_body_bytes} bytes: send fewer items")
            if time.monotonic() > deadline:
                raise InputError(f"the pictures did not come within {config.request_timeout_seconds:g} s")
    return found


def _allowed(uri: str, beginnings: tuple[str, ...]) -> bool:
    return uri.startswith(beginnings) and ".." not in PurePosixPath(uri).parts
