"""Stores by the place that a setting names, and what is written out of one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyarrow as pa

from pixrec import storage
from pixrec.errors import ConfigError, InputError
from pixrec.live.popularity import HALF_LIFE_DAYS
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import AddedItem, EmbeddedVectors, Store
from pixrec.schema import EVENT, ITEM_ID, TIMESTAMP, USER_ID

STORE_FILE = "live.sqlite"
PASSWORD_VARIABLE = "PIXREC_STORE_PASSWORD"
REMOTE = ("redis://", "rediss://")
_EVENTS = pa.schema([(USER_ID, pa.string()), (ITEM_ID, pa.string()), (TIMESTAMP, pa.int64()), (EVENT, pa.string())])


def store_place(place: str, index: str) -> str:
    """The place of the store that a setting names: `index` is a file in that folder, where it can be one, or `none`."""
    if place == "index":
        usable = not storage.is_remote(index) and os.access(index, os.W_OK)
        return storage.join(index, STORE_FILE) if usable else "none"
    return place if place == "none" or place.startswith(REMOTE) else storage.absolute(place)


def added_items(place: str, model: str, most: int = 100) -> Iterator[list[tuple[AddedItem, EmbeddedVectors | None]]]:
    """The items that were added to a store and are not hidden, some at a time, each with its vectors by this model
    where there are any. Raises InputError where there is no store."""
    store, after = _read_only(place), 0
    while items := store.changes(after, model, most):
        after = items[-1].change
        wanted = {item.item_id: item for item in items if item.content_hash is not None and not item.hidden}
        contents = store.contents(list(wanted)) if wanted else []
        yield [(item, wanted[item.item_id].vectors) for item in contents]
    store.close()


def open_store(
    place: str, most_per_user: int = 1000, password: str | None = None, half_life_days: float = HALF_LIFE_DAYS
) -> Store:
    """The store at a `redis://` URL, or the SQLite file at a path. most_per_user: older events of a user than so many
    are dropped; half_life_days: of what sells best. Raises OutputError where it cannot be used."""
    if place.startswith(REMOTE):
        try:
            from pixrec.live.redis import RedisStore
        except ImportError:
            raise ConfigError("a store at redis:// needs the package redis: pip install 'pixrec[redis]'") from None
        return RedisStore(place, most_per_user, password, half_life_days)
    return SqliteStore(place, most_per_user, half_life_days=half_life_days)


def export_events(place: str, out: str) -> int:
    """Write the events of a store as an interactions table, a Parquet file, for `pixrec prepare`; returns how many.

    The store may be in use. Raises InputError where there is none.
    """
    rows = 0
    with storage.table_writer(out, _EVENTS) as write:
        for block in _read_only(place).events():
            rows += len(block)
            columns = zip(*((e.user_id, e.item_id, e.timestamp, e.event) for e in block), strict=True)
            write(pa.table(dict(zip(_EVENTS.names, map(list, columns), strict=True)), schema=_EVENTS))
    return rows


def _read_only(place: str) -> Store:
    if place.startswith(REMOTE):
        return open_store(place, password=os.environ.get(PASSWORD_VARIABLE))
    if not storage.exists(place):
        raise InputError(f"{place} holds no events: there is no such file")
    return SqliteStore(place, 1, read_only=True)
