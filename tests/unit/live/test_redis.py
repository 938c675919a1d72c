"""Both stores do the same, Redis against a real server; and what is left when that is killed for a while."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model

from pixrec.artifact import Index
from pixrec.errors import UnavailableError
from pixrec.live import redis as redis_store
from pixrec.live.places import added_items, export_events, open_store
from pixrec.live.store import AddedItem, EmbeddedVectors, Event, Feedback, LiveItem, Store, StoreAway, StoreFull
from pixrec.model.catalog import Catalog
from pixrec.query import NewItem, Query
from pixrec.recommender import Recommender

SERVER = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(SERVER is None, reason="there is no redis-server: apt-get install redis-server")


class Server:
    """A Redis server that keeps what it holds in a folder, also when it is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        place = ["--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        kept = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self._process = subprocess.Popen([str(SERVER), *place, *kept], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("redis"))
    yield running
    running.kill()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def place(request: Any, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "live.sqlite")
    url = request.getfixturevalue("server").url
    redis_store.redis.Redis.from_url(url).flushall()
    return url


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    opened = open_store(place, 5)
    yield opened
    opened.close()


def added(item_id: str, image: bytes | None = None, **fields: Any) -> AddedItem:
    return AddedItem(item_id, fields, f"text of {item_id}", image, f"hash of {item_id}")


def made(value: float, content: bool = False) -> EmbeddedVectors:
    return EmbeddedVectors(np.full(3, value, np.float32), np.full(2, value, np.float16) if content else None)


def same(one: EmbeddedVectors | None, other: EmbeddedVectors) -> bool:
    assert one is not None
    assert (one.content is None) == (other.content is None)
    return bool((one.vector == other.vector).all()) and (
        other.content is None or bool((one.content == other.content).all())
    )


def test_events(store: Store, place: str, tmp_path: Path) -> None:
    store.add([Event("u", "b", 2000), Event("v\0", "x\0y", 1, "vi\0ew")])
    store.add([Event("u", "a", 1000, "view"), Event("u", "z", 2000), Event("u", "c", 2000, "cart")])
    store.add([Event("u", "z", 2000), Event("u", "b", 2000, "cart")])  # the first is there, the second is another kind
    assert store.history("u", 9) == [("a", 1000), ("b", 2000), ("z", 2000), ("c", 2000), ("b", 2000)]
    assert store.history("u", 2) == [("c", 2000), ("b", 2000)]
    assert store.history("v\0", 9) == [("x\0y", 1)]
    store.add([Event("u", f"n{n}", 3000 + n) for n in range(4)])
    assert store.history("u", 9) == [("b", 2000), *((f"n{n}", 3000 + n) for n in range(4))]
    assert export_events(place, str(tmp_path / "out.parquet")).rows == 6
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {"user_id": "v\0", "item_id": "x\0y", "timestamp": 1, "event": "vi\0ew"} in rows
    assert {"user_id": "u", "item_id": "n0", "timestamp": 3000, "event": None} in rows
    assert (store.forget("u"), store.forget("u"), store.history("u", 9)) == (5, 0, [])


def test_what_sells_best_is_counted_by_its_age(place: str) -> None:
    store, now, day = open_store(place, 4, half_life_days=2), int(time.time() * 1000), 86_400_000
    assert store.popular(9) == []
    for user in ("u", "v", "w"):
        store.add([Event(user, "old", now - 4 * day, "view"), Event(user, "kind\0", now, "cart")])
    events = [Event("x", "new", now), Event("x", "late", now - 2 * day), Event("x", "new", now + 900 * day, "buy")]
    for _ in range(3):  # what is sent again is counted once
        store.add(events)
    store.add([Event("x", "older than any", 5)])
    expected = [("kind\0", 3.0), ("new", 2.0), ("old", 0.75), ("late", 0.5)]
    assert [item for item, _ in store.popular(9)] == [item for item, _ in expected]
    assert [count for _, count in store.popular(9)] == pytest.approx([count for _, count in expected], rel=1e-3)
    assert [item for item, _ in store.popular(2)] == ["kind\0", "new"]
    store.add([Event("w", f"i{n}", now + 1 + n) for n in range(4)])
    store.add([Event("w", "kind\0", now, "cart"), Event("w", "old", now - 4 * day, "view")])  # crowded out meanwhile
    assert dict(store.popular(9))["kind\0"] == pytest.approx(3, rel=1e-3)
    assert dict(store.popular(9))["old"] == pytest.approx(0.75, rel=1e-3)
    assert open_store(place, 4, half_life_days=5).popular(9) == []


def test_items(store: Store, place: str) -> None:
    assert store.last_change() == 0
    a, b = added("a", b"\xff\0jpeg", title="Ä", tags=[], price=1.0), added("b")
    store.put("m1", [a, b], [made(1, content=True), made(2)], 9)
    store.change("c", {"price": 2}, hidden=True)
    found = store.changes(0, "m1", 9)
    assert [(i.item_id, i.fields, i.content_hash, i.hidden) for i in found] == [
        ("a", {"title": "Ä", "tags": [], "price": 1.0}, "hash of a", False),
        ("b", {}, "hash of b", False),
        ("c", {"price": 2}, None, True),
    ]
    assert [i.change for i in found] == [1, 2, 3]
    assert store.last_change() == 3
    assert same(found[0].vectors, made(1, content=True))
    assert same(found[1].vectors, made(2))
    assert found[2].vectors is None
    assert store.contents(["b", "c", "a", "ghost"]) in ([b, a], [a, b])
    store.change("a", {"stock": 3})
    store.change("c", {"stock": 0}, hidden=False)
    assert store.changes(3, "other", 1) == [
        LiveItem("a", {"title": "Ä", "tags": [], "price": 1.0, "stock": 3}, "hash of a", False, 4)
    ]
    assert store.changes(4, "m1", 9) == [LiveItem("c", {"price": 2, "stock": 0}, None, False, 5)]
    store.change("b", {}, hidden=True)
    assert [[item.item_id for item, _ in block] for block in added_items(place, "m1")] == [["a"]]
    with pytest.raises(StoreFull):
        store.put("m1", [added("d"), added("a")], [made(1)] * 2, 3)
    store.put("m1", [added("a")], [made(4)], 3)
    assert store.changes(6, "m1", 9)[0].fields == {}
    assert store.contents(["a"]) == [added("a")]


def test_vectors_of_other_models(store: Store) -> None:
    store.put("m1", [added("a"), added("b")], [made(1), made(1)], 9)
    store.set_vectors("m2", {("a", "hash of a"): made(2, content=True), ("b", "hash of before"): made(2)})
    one, other = store.changes(0, "m2", 9)[::-1]
    assert (one.item_id, one.change, other.item_id, other.vectors) == ("a", 3, "b", None)
    assert same(one.vectors, made(2, content=True))
    assert same(store.changes(2, "m1", 9)[0].vectors, made(1))
    store.set_vectors("m3", {("a", "hash of a"): made(3)})
    assert store.changes(3, "m1", 9)[0].vectors is None  # of two models they are kept
    assert same(store.changes(3, "m2", 9)[0].vectors, made(2, content=True))
    store.put("m1", [added("a")], [made(5)], 9)
    assert store.changes(4, "m2", 9)[0].vectors is None  # of what the item was


def test_feedback_of_one_answer_counts_once(store: Store) -> None:
    assert store.click_through() == {}
    for _ in range(2):
        store.add_feedback([Feedback("r1", "m1", ["a", "b"], ["b"]), Feedback("r1", "m1", [], ["c"])])
    store.add_feedback([Feedback("r2", "m2", ["a"], []), Feedback("r2", "m2", [], ["a"])])
    assert store.click_through() == {"m1": (3, 2), "m2": (1, 1)}


def test_changes_at_the_same_time_lose_nothing(store: Store, place: str) -> None:
    stores = [store, open_store(place, 5)]

    def change(number: int) -> None:
        stores[number % 2].change(f"i{number % 3}", {f"f{number}": number})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(change, range(60)))
    assert sum(len(item.fields) for item in store.changes(0, "m", 9)) == 60
    assert store.last_change() == 60
    stores[1].close()


@needs_redis
def test_a_server_that_is_killed_loses_nothing_and_stops_no_recommendation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "_PAUSE_SECONDS", 0.05)
    server, items = Server(tmp_path), tiny_items()
    model = tiny_model(tiny_config(model={"user_tower": "compact"}))
    vectors = model.embedder().items(Catalog(items, model.encoder), np.arange(len(items)))
    index = Index("v1", list(items.item_ids), vectors, {})
    shop = Recommender(model, index, items, tiny_dataset().training_counts())
    store = open_store(server.url, 1000)
    try:
        shop.live.follow(store)
        store.put(shop.model_version, *shop.embed_new({"new": NewItem({"title": "Tile"})}), 10)
        store.change("i05", {}, hidden=True)
        stored = 0
        for number in range(20):
            store.add([Event("u", "i00", number)])
            stored += 1
        asked = [Query(["i00"], 50)]
        before = shop.answer(asked)[0]
        server.kill()
        away = shop.answer(asked)[0]
        assert (away.items, away.store_away, before.store_away) == (before.items, True, False)
        for attempt in (lambda: store.add([Event("u", "lost", 1)]), lambda: store.history("u", 9), store.last_change):
            with pytest.raises(StoreAway, match="did not answer"):
                attempt()
        with pytest.raises(UnavailableError, match="again later"):
            export_events(server.url, str(tmp_path / "out.parquet"))
        server.start()
        deadline = time.monotonic() + 30
        while shop.answer(asked)[0].store_away:
            assert time.monotonic() < deadline
        assert shop.answer(asked)[0].items == before.items
        assert len(store.history("u", 1000)) == stored
        again = Recommender(model, index, items, tiny_dataset().training_counts())
        again.live.follow(store)
        assert [item for item, _ in again.answer(asked)[0].items] == [item for item, _ in before.items]
    finally:
        store.close()
        server.kill()
