"""What sells best lately: the scores of items, and what a replica makes of the events of a store."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny_config, tiny_items, tiny_model

from pixrec.artifact import Index
from pixrec.live import popularity
from pixrec.live.popularity import PRIOR_EVENTS, Decay, joined
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import AddedItem, EmbeddedVectors, Event, StoreAway
from pixrec.model.catalog import Catalog
from pixrec.query import Query
from pixrec.recommender import Recommender

DAY_MS = 86_400_000


def test_the_score_of_a_sum_is_exact_and_never_overflows() -> None:
    assert joined(3.0, 1.0) == joined(1.0, 3.0) == pytest.approx(math.log2(8 + 2))
    assert joined(1e6, 1e6) == pytest.approx(1e6 + 1)
    assert joined(1e6, 0.0) == 1e6


def test_an_event_of_the_future_counts_as_one_of_now() -> None:
    decay = Decay(1.0)
    now = decay.now()
    assert decay.score(10**18, now) == now
    (_, two) = decay.counts([("a", decay.now() + 1)])[0]
    assert two == pytest.approx(2, rel=1e-3)


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(str(tmp_path / "live.sqlite"), 1000, half_life_days=2)


@pytest.fixture
def recommender(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> Recommender:
    """Of items of which the first was bought most, the last least; it reads the store at every question."""
    monkeypatch.setattr(popularity, "READ_SECONDS", 0.0)
    items = tiny_items(6)
    model = tiny_model(tiny_config(), items)
    vectors = model.embedder().items(Catalog(items, model.encoder), np.arange(6))
    made = Recommender(model, Index("v", list(items.item_ids), vectors, {}), items, np.array([8, 4, 2, 1, 1, 0]))
    made.live.follow(store)
    return made


def fallback(recommender: Recommender, k: int = 9, **options: object) -> dict[str, float]:
    return dict(recommender.answer([Query([], k, **options)])[0].items)  # type: ignore[arg-type]


def test_without_events_the_index_decides(recommender: Recommender) -> None:
    assert fallback(recommender) == {"i00": 0.5, "i01": 0.25, "i02": 0.125, "i03": 0.0625, "i04": 0.0625, "i05": 0.0}


def test_the_fallback_follows_the_store(recommender: Recommender, store: SqliteStore) -> None:
    now = int(time.time() * 1000)
    store.add([Event(f"u{n}", "i05", now) for n in range(200)] + [Event("v", "nobody knows", now)])
    store.add([Event(f"u{n}", "i04", now - 2 * DAY_MS) for n in range(200)])
    found = fallback(recommender)
    assert list(found) == ["i05", "i04", "i00", "i01", "i02", "i03"]
    total = 200 + 100 + PRIOR_EVENTS
    assert found["i05"] == pytest.approx(200 / total, rel=1e-3)
    assert found["i04"] == pytest.approx((100 + PRIOR_EVENTS / 16) / total, rel=1e-3)
    assert found["i00"] == pytest.approx(PRIOR_EVENTS / 2 / total, rel=1e-3)
    assert list(fallback(recommender, 2, exclude=["i05"])) == ["i04", "i00"]
    assert sum(found.values()) == pytest.approx(1)


def test_a_few_events_do_not_decide_alone(recommender: Recommender, store: SqliteStore) -> None:
    store.add([Event("u", "i05", int(time.time() * 1000))])
    assert list(fallback(recommender)) == ["i00", "i01", "i02", "i03", "i04", "i05"]


def test_a_new_item_has_its_place_by_its_events(recommender: Recommender, store: SqliteStore) -> None:
    vectors = EmbeddedVectors(np.ones(recommender.item_vectors(["i00"]).shape[1], np.float32), None)
    store.put(recommender.model_version, [AddedItem("new", {"title": "new"}, "new", None, "h")], [vectors], 9)
    assert list(fallback(recommender))[-1] == "new"
    store.add([Event(f"u{n}", "new", int(time.time() * 1000)) for n in range(30)])
    assert list(fallback(recommender, 2)) == ["i00", "new"]
    store.change("new", {}, hidden=True)
    assert "new" not in fallback(recommender)


def test_what_was_read_is_kept_for_a_while_and_while_the_store_is_away(
    recommender: Recommender, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([Event(f"u{n}", "i05", int(time.time() * 1000)) for n in range(200)])
    before = list(fallback(recommender))

    def away(most: int) -> list[tuple[str, float]]:
        raise StoreAway("away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "popular", away)
        assert list(fallback(recommender)) == before
    monkeypatch.setattr(popularity, "READ_SECONDS", 60.0)
    store.add([Event(f"u{n}", "i03", int(time.time() * 1000)) for n in range(900)])
    assert list(fallback(recommender)) == before
