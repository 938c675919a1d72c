"""Stores by the place that a setting names, and what is written out of one."""

from __future__ import annotations

import pyarrow as pa

from pixrec import storage
from pixrec.errors import InputError
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import Store
from pixrec.schema import EVENT, ITEM_ID, TIMESTAMP, USER_ID

REMOTE = ("redis://", "rediss://")
_EVENTS = pa.schema([(USER_ID, pa.string()), (ITEM_ID, pa.string()), (TIMESTAMP, pa.int64()), (EVENT, pa.string())])


def open_store(place: str, most_per_user: int = 1000) -> Store:
    """The store at a `redis://` URL, or the SQLite file at a path. most_per_user: older events of a user than so many
    are dropped. Raises OutputError where it cannot be used."""
    if place.startswith(REMOTE):
        from pixrec.live.redis import RedisStore  # an extra

        return RedisStore(place, most_per_user)
    return SqliteStore(place, most_per_user)


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
        return open_store(place)
    if not storage.exists(place):
        raise InputError(f"{place} holds no events: there is no such file")
    return SqliteStore(place, 1, read_only=True)
