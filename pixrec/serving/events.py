"""What shoppers did since the data set was prepared: events in, histories out. Knows SQLite; knows no model.

Several processes of a node may use one file; they wait for each other. An event that `add` has returned for is on disk.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pixrec import storage
from pixrec.errors import InputError, OutputError
from pixrec.schema import EVENT, ITEM_ID, TIMESTAMP, USER_ID

_ROWS_AT_A_TIME, _WAIT_SECONDS = 100_000, 10.0
_TABLE = pa.schema([(USER_ID, pa.string()), (ITEM_ID, pa.string()), (TIMESTAMP, pa.int64()), (EVENT, pa.string())])
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    user_id TEXT NOT NULL, timestamp INTEGER NOT NULL, item_id TEXT NOT NULL, event TEXT NOT NULL,
    number INTEGER NOT NULL, PRIMARY KEY (user_id, timestamp, item_id, event)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Event:
    """Somebody met an item."""

    user_id: str
    item_id: str
    timestamp: int
    """milliseconds since the epoch"""
    event: str | None = None
    """view, cart, purchase, or any word"""


class EventStore:
    """The events of a file. May be used by several threads, which wait for each other."""

    def __init__(self, path: str, most_per_user: int) -> None:
        """most_per_user: older events of a user than so many are dropped. Raises OutputError where the file cannot be
        used."""
        self._lock, self._most = threading.Lock(), most_per_user
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._sql = sqlite3.connect(path, _WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            self._sql.execute("PRAGMA journal_mode = WAL")
            self._sql.execute("PRAGMA synchronous = FULL")
            self._sql.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise OutputError(f"the events file {path} cannot be used: {error}; set serve.events to another") from None

    def add(self, events: Sequence[Event]) -> None:
        """Store all of the events or none; equal timestamps keep their order, and one that is there already stays
        one, so that events may be sent again."""
        with self._lock, self._transaction():
            numbered = enumerate(events, time.time_ns())  # later than all before, whichever process added them
            rows = [(e.user_id, e.timestamp, e.item_id, e.event or "", number) for number, e in numbered]
            self._sql.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)", rows)
            for user_id in {event.user_id for event in events}:
                self._sql.execute(
                    "DELETE FROM events WHERE user_id = ?1 AND (timestamp, number) <= (SELECT timestamp, number FROM "
                    "events WHERE user_id = ?1 ORDER BY timestamp DESC, number DESC LIMIT 1 OFFSET ?2)",
                    (user_id, self._most),
                )

    def history(self, user_id: str, most: int) -> list[tuple[str, int]]:
        """(item_id, timestamp) of the last `most` events of a user, oldest first."""
        with self._lock:
            found = self._sql.execute(
                "SELECT item_id, timestamp FROM events WHERE user_id = ? ORDER BY timestamp DESC, number DESC LIMIT ?",
                (user_id, most),
            ).fetchall()
        return found[::-1]

    def forget(self, user_id: str) -> int:
        """Delete all events of a user; returns how many there were."""
        with self._lock, self._transaction():
            return self._sql.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount

    def close(self) -> None:
        with self._lock:
            self._sql.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._sql)


class _Transaction:
    """All of a block or nothing. sqlite3's own would begin only with the first change."""

    def __init__(self, sql: sqlite3.Connection) -> None:
        self._sql = sql

    def __enter__(self) -> None:
        self._sql.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._sql.execute("COMMIT" if kind is None else "ROLLBACK")


def export(path: str, out: str) -> int:
    """Write the events of a file as an interactions table, a Parquet file, for `pixrec prepare`; returns how many.

    The file may be in use. Raises InputError where there is none.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} holds no events: there is no such file")
    rows = 0
    sql = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
    try:
        with storage.table_writer(out, _TABLE) as write:
            cursor = sql.execute(
                "SELECT user_id, item_id, timestamp, NULLIF(event, '') FROM events ORDER BY user_id, timestamp, number"
            )
            while found := cursor.fetchmany(_ROWS_AT_A_TIME):
                rows += len(found)
                columns = map(list, zip(*found, strict=True))
                write(pa.table(dict(zip(_TABLE.names, columns, strict=True)), schema=_TABLE))
    except sqlite3.Error as error:
        raise InputError(f"{path} is no file of events: {error}") from None
    finally:
        sql.close()
    return rows
