"""Events in, histories out: what is kept, what is dropped, what a crash leaves, what an export holds."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pixrec.errors import InputError, OutputError
from pixrec.live.places import export_events
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import Event


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "deep" / "events.sqlite")


def test_a_history_is_in_order_of_time_whatever_came_first(path: str) -> None:
    store = SqliteStore(path, 100)
    store.add([Event("u", "b", 2000), Event("v", "x", 1)])
    store.add([Event("u", "a", 1000, "view"), Event("u", "c", 2000), Event("u", "d", 2000, "cart")])
    assert store.history("u", 10) == [("a", 1000), ("b", 2000), ("c", 2000), ("d", 2000)]
    assert store.history("u", 2) == [("c", 2000), ("d", 2000)]
    assert store.history("nobody", 10) == []


def test_the_same_event_sent_again_is_stored_once(path: str) -> None:
    store = SqliteStore(path, 100)
    for _ in range(3):
        store.add([Event("u", "a", 1, "view"), Event("u", "a", 1, "cart"), Event("u", "a", 2)])
    assert store.history("u", 10) == [("a", 1), ("a", 1), ("a", 2)]


def test_only_the_newest_are_kept(path: str) -> None:
    store = SqliteStore(path, 3)
    store.add([Event("u", f"i{n}", n) for n in range(10)] + [Event("v", "x", 0)])
    store.add([Event("u", "late news of old times", -5)])
    assert [item for item, _ in store.history("u", 10)] == ["i7", "i8", "i9"]
    assert store.history("v", 10) == [("x", 0)]


def test_a_user_is_forgotten_whole(path: str) -> None:
    store = SqliteStore(path, 100)
    store.add([Event("u", "a", 1), Event("u", "b", 2), Event("v", "a", 1)])
    assert (store.forget("u"), store.forget("u")) == (2, 0)
    assert (store.history("u", 10), len(store.history("v", 10))) == ([], 1)


def test_several_stores_of_one_file_lose_nothing(path: str) -> None:
    """As HTTP replicas of one node do."""
    stores = [SqliteStore(path, 1000) for _ in range(3)]

    def add(number: int) -> None:
        stores[number % 3].add([Event("u", f"i{number}", number)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(60)))
    for store in stores:
        assert [time for _, time in store.history("u", 1000)] == list(range(60))


def test_what_was_added_survives_a_process_that_is_killed(path: str) -> None:
    script = (
        "import os, signal, sys; from pixrec.live.sqlite import SqliteStore; from pixrec.live.store import Event; "
        "store = SqliteStore(sys.argv[1], 9); "
        "store.add([Event('u', 'a', 1)]); store._sql.execute('BEGIN IMMEDIATE'); "
        "store._sql.execute(\"INSERT INTO events VALUES ('u', 2, 'half', '', 1)\"); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", script, path], timeout=120)
    assert ran.returncode == -9
    assert SqliteStore(path, 9).history("u", 9) == [("a", 1)]


def test_an_export_is_an_interactions_table(path: str, tmp_path: Path) -> None:
    store, out = SqliteStore(path, 100), str(tmp_path / "out.parquet")
    assert export_events(path, out).rows == 0
    store.add([Event("v", "b", 2, "view"), Event("u", "a", 3), Event("v", "a", 1)])
    assert export_events(path, out).rows == 3
    assert pq.read_table(out).to_pylist() == [
        {"user_id": "u", "item_id": "a", "timestamp": 3, "event": None},
        {"user_id": "v", "item_id": "a", "timestamp": 1, "event": None},
        {"user_id": "v", "item_id": "b", "timestamp": 2, "event": "view"},
    ]


def test_what_is_no_file_of_events(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        export_events(str(tmp_path / "nothing"), str(tmp_path / "out.parquet"))
    (tmp_path / "text").write_text("no database, but long enough to be looked at by whoever reads a header" * 20)
    with pytest.raises(InputError, match="is no file of events"):
        export_events(str(tmp_path / "text"), str(tmp_path / "out.parquet"))
    with pytest.raises(OutputError, match=r"set serve\.store to another"):
        SqliteStore(str(tmp_path / "text"), 1)
