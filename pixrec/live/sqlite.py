"""The store of one node: a SQLite file. What a method has returned for is on disk.

Several processes of the node may use the file; they wait for each other to write, and reading waits for nobody.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrec.errors import InputError, OutputError
from pixrec.live.popularity import HALF_LIFE_DAYS, HALF_LIVES_KEPT, Decay, joined
from pixrec.live.store import (
    FEEDBACK_KEPT,
    MODELS_KEPT,
    AddedItem,
    EmbeddedVectors,
    Event,
    Feedback,
    LiveItem,
    StoreAway,
    StoreFull,
)
from pixrec.live.vectors import bytes_of, vectors_of

_EVENTS_AT_A_TIME, _WAIT_SECONDS = 100_000, 10.0
_CACHE_KIB = 65_536  # holds the inner pages of 100 million events, so that each look-up reads one page of the file
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    user_id TEXT NOT NULL, timestamp INTEGER NOT NULL, item_id TEXT NOT NULL, event TEXT NOT NULL,
    number INTEGER NOT NULL, PRIMARY KEY (user_id, timestamp, item_id, event)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS popularity (
    half_life_days REAL NOT NULL, item_id TEXT NOT NULL, score REAL NOT NULL, PRIMARY KEY (half_life_days, item_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS popularity_by_score ON popularity (half_life_days, score);
CREATE TABLE IF NOT EXISTS items (
    item_id TEXT PRIMARY KEY, change INTEGER NOT NULL UNIQUE, fields TEXT NOT NULL, hidden INTEGER NOT NULL,
    content_hash TEXT, text TEXT, image BLOB
);
CREATE TABLE IF NOT EXISTS feedback (
    request_id TEXT NOT NULL, item_id TEXT NOT NULL, clicked INTEGER NOT NULL, UNIQUE (request_id, item_id)
);
CREATE TABLE IF NOT EXISTS click_through (
    model TEXT PRIMARY KEY, impressions INTEGER NOT NULL DEFAULT 0, clicks INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS vectors (
    item_id TEXT NOT NULL, model TEXT NOT NULL, vector BLOB NOT NULL, content BLOB, UNIQUE (item_id, model)
);
"""
_NEXT_CHANGE = "(SELECT COALESCE(MAX(change), 0) + 1 FROM items)"


class SqliteStore:
    """A file. May be used by several threads, which wait for each other."""

    def __init__(
        self, path: str, most_per_user: int, read_only: bool = False, half_life_days: float = HALF_LIFE_DAYS
    ) -> None:
        """most_per_user: older events of a user than so many are dropped; half_life_days: of what sells best, which
        another one begins anew. Raises OutputError where the file cannot be used; with `read_only`, InputError."""
        self._lock, self._most, self._path = threading.Lock(), most_per_user, path
        self._decay = Decay(half_life_days)
        try:
            if read_only:
                place = f"{Path(path).absolute().as_uri()}?mode=ro"
                self._sql = sqlite3.connect(place, _WAIT_SECONDS, uri=True, check_same_thread=False)
                self._sql.execute("SELECT 1 FROM events LIMIT 1")
                return
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._sql = sqlite3.connect(path, _WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            self._sql.execute("PRAGMA journal_mode = WAL")
            self._sql.execute("PRAGMA synchronous = FULL")
            self._sql.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._sql.executescript(_SCHEMA)
            self._sql.create_function("joined", 2, joined, deterministic=True)
            self._sql.execute("DELETE FROM popularity WHERE half_life_days != ?", (half_life_days,))
        except (OSError, sqlite3.Error) as error:
            if read_only:
                raise InputError(f"{path} is no file of events: {error}") from None
            raise OutputError(f"the store {path} cannot be used: {error}; set serve.store to another") from None

    def add(self, events: Sequence[Event]) -> None:
        users = dict[str, int]()  # the oldest of these events, of each
        for event in events:
            users[event.user_id] = min(event.timestamp, users.get(event.user_id, event.timestamp))
        with self._transaction():
            first = time.time_ns()  # later than all before, whichever process added them
            rows = [(e.user_id, e.timestamp, e.item_id, e.event or "", n) for n, e in enumerate(events, first)]
            rows.sort()  # as they lie in the file, so that a page is written once
            self._sql.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)", rows)
            with_too_many = self._sql.execute(
                "SELECT key FROM json_each(?) WHERE (SELECT COUNT(*) FROM events WHERE user_id = key) > ?",
                (json.dumps(users), self._most),
            )
            for (user_id,) in with_too_many.fetchall():
                self._sql.execute(
                    "DELETE FROM events WHERE user_id = ?1 AND (timestamp, number) <= (SELECT timestamp, number FROM "
                    "events WHERE user_id = ?1 ORDER BY timestamp DESC, number DESC LIMIT 1 OFFSET ?2)",
                    (user_id, self._most),
                )
            self._count(users, first, first + len(events) - 1)

    def _count(self, users: Mapping[str, int], first: int, last: int) -> None:
        """Add the events numbered from first to last to what sells best, where they were stored: not what was there
        already, nor what a user has too many of, so that nothing counts twice however often it is sent.

        users: the oldest of those events, of each user.
        """
        now = self._decay.now()
        found = self._sql.execute(
            "SELECT item_id, timestamp FROM json_each(?) CROSS JOIN events ON user_id = key AND timestamp >= value "
            "WHERE number BETWEEN ? AND ?",
            (json.dumps(users), first, last),
        )
        stored = [(self._decay.half_life_days, item, self._decay.score(timestamp, now)) for item, timestamp in found]
        self._sql.executemany(
            "INSERT INTO popularity VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET score = joined(score, excluded.score)",
            (row for row in stored if row[2] > now - HALF_LIVES_KEPT),
        )
        self._sql.execute(
            "DELETE FROM popularity WHERE half_life_days = ? AND score < ?",
            (self._decay.half_life_days, now - HALF_LIVES_KEPT),
        )

    def popular(self, most: int) -> list[tuple[str, float]]:
        found = self._rows(
            "SELECT item_id, score FROM popularity WHERE half_life_days = ? ORDER BY score DESC LIMIT ?",
            self._decay.half_life_days,
            most,
        )
        return self._decay.counts(found)

    def history(self, user_id: str, most: int) -> list[tuple[str, int]]:
        found = self._rows(
            "SELECT item_id, timestamp FROM events WHERE user_id = ? ORDER BY timestamp DESC, number DESC LIMIT ?",
            user_id,
            most,
        )
        return found[::-1]

    def forget(self, user_id: str) -> int:
        with self._transaction():
            return self._sql.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount

    def events(self) -> Iterator[list[Event]]:
        with _answered(self._path):
            cursor = self._sql.execute(
                "SELECT user_id, item_id, timestamp, NULLIF(event, '') FROM events ORDER BY user_id, timestamp, number"
            )
            while found := cursor.fetchmany(_EVENTS_AT_A_TIME):
                yield [Event(*row) for row in found]

    def add_feedback(self, feedback: Sequence[Feedback]) -> None:
        with self._transaction():
            for one in feedback:
                seen = [(one.request_id, item_id) for item_id in (*one.impressions, *one.clicks)]
                clicked = [(one.request_id, item_id) for item_id in one.clicks]
                counts = (
                    self._sql.executemany("INSERT OR IGNORE INTO feedback VALUES (?, ?, 0)", seen).rowcount,
                    self._sql.executemany(
                        "UPDATE feedback SET clicked = 1 WHERE request_id = ? AND item_id = ? AND clicked = 0", clicked
                    ).rowcount,
                )
                self._sql.execute(
                    "INSERT INTO click_through VALUES (?1, ?2, ?3) ON CONFLICT (model) "
                    "DO UPDATE SET impressions = impressions + ?2, clicks = clicks + ?3",
                    (one.model_version, *(max(0, count) for count in counts)),
                )
            newest = "(SELECT MAX(rowid) FROM feedback)"
            self._sql.execute(f"DELETE FROM feedback WHERE rowid <= {newest} - ?", (FEEDBACK_KEPT,))

    def click_through(self) -> dict[str, tuple[int, int]]:
        found = self._rows("SELECT model, impressions, clicks FROM click_through ORDER BY rowid")
        return {model: (impressions, clicks) for model, impressions, clicks in found}

    def put(self, model: str, items: Sequence[AddedItem], vectors: Sequence[EmbeddedVectors], most: int) -> None:
        with self._transaction():
            for item, made in zip(items, vectors, strict=True):
                self._sql.execute(
                    f"INSERT OR REPLACE INTO items VALUES (?, {_NEXT_CHANGE}, ?, 0, ?, ?, ?)",
                    (item.item_id, json.dumps(item.fields), item.content_hash, item.text, item.image),
                )
                self._sql.execute("DELETE FROM vectors WHERE item_id = ?", (item.item_id,))
                self._add_vectors(item.item_id, model, made)
            count = self._sql.execute("SELECT COUNT(*) FROM items").fetchone()[0]
            if count > most:
                raise StoreFull

    def change(self, item_id: str, fields: Mapping[str, Any], hidden: bool | None = None) -> None:
        with self._transaction():
            found = self._sql.execute("SELECT fields, hidden FROM items WHERE item_id = ?", (item_id,)).fetchone()
            before, was_hidden = ({}, 0) if found is None else (json.loads(found[0]), found[1])
            self._sql.execute(
                f"INSERT INTO items VALUES (?1, {_NEXT_CHANGE}, ?2, ?3, NULL, NULL, NULL) ON CONFLICT (item_id) "
                "DO UPDATE SET change = excluded.change, fields = ?2, hidden = ?3",
                (item_id, json.dumps({**before, **fields}), was_hidden if hidden is None else int(hidden)),
            )

    def last_change(self) -> int:
        return self._rows("SELECT COALESCE(MAX(change), 0) FROM items")[0][0]

    def changes(self, after: int, model: str, most: int) -> list[LiveItem]:
        found = self._rows(
            "SELECT items.item_id, fields, content_hash, hidden, change, vector, content FROM items LEFT JOIN vectors "
            "ON vectors.item_id = items.item_id AND model = ? WHERE change > ? ORDER BY change LIMIT ?",
            model,
            after,
            most,
        )
        return [
            LiveItem(item_id, json.loads(fields), content_hash, bool(hidden), change, vectors_of(vector, content))
            for item_id, fields, content_hash, hidden, change, vector, content in found
        ]

    def contents(self, item_ids: Sequence[str]) -> list[AddedItem]:
        found = self._rows(
            "SELECT item_id, fields, text, image, content_hash FROM items, json_each(?) "
            "WHERE item_id = value AND content_hash IS NOT NULL",
            json.dumps(item_ids),
        )
        return [AddedItem(item_id, json.loads(fields), *rest) for item_id, fields, *rest in found]

    def set_vectors(self, model: str, made: Mapping[tuple[str, str], EmbeddedVectors]) -> None:
        with self._transaction():
            for (item_id, content_hash), vectors in made.items():
                changed = self._sql.execute(
                    f"UPDATE items SET change = {_NEXT_CHANGE} WHERE item_id = ? AND content_hash = ?",
                    (item_id, content_hash),
                ).rowcount
                if changed:
                    self._add_vectors(item_id, model, vectors)

    def close(self) -> None:
        with self._lock:
            self._sql.close()

    def _add_vectors(self, item_id: str, model: str, made: EmbeddedVectors) -> None:
        self._sql.execute("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", (item_id, model, *bytes_of(made)))
        self._sql.execute(
            "DELETE FROM vectors WHERE item_id = ?1 AND rowid NOT IN "
            "(SELECT rowid FROM vectors WHERE item_id = ?1 ORDER BY rowid DESC LIMIT ?2)",
            (item_id, MODELS_KEPT),
        )

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with _answered(self._path), self._lock:
            return self._sql.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of a block or nothing. sqlite3's own would begin only with the first change."""
        with _answered(self._path), self._lock:
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                self._sql.execute("ROLLBACK")
                raise


@contextlib.contextmanager
def _answered(path: str) -> Iterator[None]:
    """A block in which an error of SQLite, such as a full disk or a file locked for long, becomes StoreAway."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreAway(f"the store {path} did not answer: {error}") from None
