"""Stores by the place that a setting names, and what is written out of one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec import storage
from pixrec.data.ids import hash_ids
from pixrec.data.tables import prepared_items
from pixrec.errors import ConfigError, InputError, UnavailableError
from pixrec.live.popularity import HALF_LIFE_DAYS
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import AddedItem, EmbeddedVectors, Event, Store, StoreAway
from pixrec.schema import EVENT, IMAGE, IMAGE_STATUS, IMAGE_URIS, ITEM_ID, TIMESTAMP, USER_ID

STORE_FILE = "live.sqlite"
PASSWORD_VARIABLE = "PIXREC_STORE_PASSWORD"
REMOTE = ("redis://", "rediss://")
_EVENTS_AT_A_TIME, _ITEMS_AT_A_TIME = 100_000, 1000
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


class Exported(NamedTuple):
    """What was written out of a store: how many rows, and a digest of what they say, in whatever order."""

    rows: int
    digest: int


def export_events(place: str, out: str, *, until: int | None = None, kinds: bool = True) -> Exported:
    """Write the events of a store as an interactions table, a Parquet file, for `pixrec prepare`.

    `until`: only those before that time, in milliseconds; `kinds` False: without the column of their kinds. The store
    may be in use. Raises InputError where there is none, UnavailableError where it does not answer.
    """
    schema = _EVENTS if kinds else _EVENTS.remove(_EVENTS.get_field_index(EVENT))
    rows = digest = 0
    with _reached(place) as store, storage.table_writer(out, schema) as write:
        for block in _joined(store.events()):
            told = [(e.user_id, e.item_id, e.timestamp, e.event) for e in block if until is None or e.timestamp < until]
            columns = zip(*told, strict=True) if told else [()] * len(_EVENTS)
            table = pa.table(dict(zip(_EVENTS.names, map(list, columns), strict=True)), schema=_EVENTS)
            write(table.select(schema.names))
            rows, digest = rows + len(told), digest + _digest(map(repr, told))
    return Exported(rows, digest % 2**64)


def export_items(place: str, out: str, tables: Sequence[str]) -> Exported:
    """Write the items that were added to a store and are not hidden as an items table, a Parquet file: those that the
    files `tables` of another one lack, with its columns and their pictures. Raises as `export_events`."""
    stored = [prepared_items(storage.read_schema(file).empty_table(), []).schema for file in tables]
    schema = pa.unify_schemas(stored, promote_options="permissive")
    for name in (IMAGE_STATUS, IMAGE_URIS):
        if name in schema.names:
            schema = schema.remove(schema.get_field_index(name))
    schema = schema.append(pa.field(IMAGE, pa.binary()))
    with _reached(place):
        new = {item.item_id for block in added_items(place, "", _ITEMS_AT_A_TIME) for item, _ in block}
        wanted = pa.array(sorted(new), pa.string())
        for file in tables if new else ():
            for part in storage.stream_table(file, [ITEM_ID], _EVENTS_AT_A_TIME):
                ids = part.column(ITEM_ID).cast(pa.string())
                new.difference_update(ids.filter(pc.is_in(ids, value_set=wanted)).to_pylist())
        rows = digest = 0
        with storage.table_writer(out, schema) as write:
            for block in added_items(place, "", _ITEMS_AT_A_TIME):
                added = [item for item, _ in block if item.item_id in new]
                said = [{**item.fields, ITEM_ID: item.item_id, IMAGE: item.image} for item in added]
                write(pa.Table.from_pylist([{name: one.get(name) for name in schema.names} for one in said], schema))
                facts = (f"{item.item_id} {item.content_hash} {json.dumps(dict(item.fields))}" for item in added)
                rows, digest = rows + len(added), digest + _digest(facts)
    return Exported(rows, digest % 2**64)


def _joined(blocks: Iterable[list[Event]]) -> Iterator[list[Event]]:
    """Small blocks together, of which each becomes a row group."""
    held: list[Event] = []
    for block in blocks:
        held += block
        if len(held) >= _EVENTS_AT_A_TIME:
            yield held
            held = []
    yield held


def _digest(facts: Iterable[str]) -> int:
    """The same for the same facts in any order."""
    return int(hash_ids(pa.array(facts, pa.large_string())).sum(dtype=np.uint64))


@contextlib.contextmanager
def _reached(place: str) -> Iterator[Store]:
    """A store to be read. Raises UnavailableError where it does not answer."""
    store = _read_only(place)
    try:
        yield store
    except StoreAway as error:
        raise UnavailableError(f"{place}: {error}; run the same command again later") from None
    finally:
        store.close()


def _read_only(place: str) -> Store:
    if place.startswith(REMOTE):
        return open_store(place, password=os.environ.get(PASSWORD_VARIABLE))
    if not storage.exists(place):
        raise InputError(f"{place} holds no events: there is no such file")
    return SqliteStore(place, 1, read_only=True)
