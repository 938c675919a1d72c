"""Live items beside an index: found at once, found once, and by the served model's vectors only."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import small_encoders, square, tiny_config, tiny_dataset, tiny_items, tiny_model, write_prepared

from pixrec.artifact import Index, Model, fingerprint
from pixrec.artifact.folded import VersionContents
from pixrec.data.items import ItemTable
from pixrec.errors import InputError
from pixrec.live.overlay import _BLOCK
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import LiveItem, StoreAway, StoreFull
from pixrec.model.catalog import Catalog
from pixrec.query import NewItem, Query
from pixrec.recommender import Recommender
from pixrec.scorers.blend import Mixture
from pixrec.training.phases import begin

COLUMNS = ("title", "brand", "category", "price", "year")


def recommender_of(model: Model, items: ItemTable, version: VersionContents | None = None) -> Recommender:
    vectors = model.embedder().items(Catalog(items, model.encoder), np.arange(len(items)))
    index = Index("v1", list(items.item_ids), vectors, {})
    return Recommender(model, index, items, tiny_dataset(items).training_counts(), version=version)


@pytest.fixture(params=["compact", "interleaved"])
def model(request: Any) -> Model:
    return tiny_model(tiny_config(model={"user_tower": request.param}))


@pytest.fixture
def compact() -> Model:
    return tiny_model(tiny_config(model={"user_tower": "compact"}))


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(str(tmp_path / "live.sqlite"), 100)


@pytest.fixture
def shop(store: SqliteStore) -> Callable[..., Recommender]:
    """A recommender of the tiny catalog that follows the store."""

    def make(model: Model, version: VersionContents | None = None) -> Recommender:
        found = recommender_of(model, tiny_items(), version)
        found.live.follow(store)
        return found

    return make


def as_new(items: ItemTable, row: int) -> NewItem:
    return NewItem({name: items.fields(row)[name] for name in COLUMNS}, items.image(row))


def put(shop: Recommender, new: dict[str, NewItem]) -> None:
    assert shop.live.store is not None
    shop.live.store.put(shop.model_version, *shop.embed_new(new), 10_000)


def test_who_asks_while_a_change_is_read_waits_for_it(compact: Model, shop: Any, monkeypatch: Any) -> None:
    found = shop(compact)
    live = found.live
    made, other = live._viewed, threading.Thread(target=live.refresh)

    def viewed() -> Any:
        other.start()
        other.join(0.2)
        assert other.is_alive(), "it went on with the view before the change"
        return made()

    monkeypatch.setattr(live, "_viewed", viewed)
    live.store.change(found.items.item_ids[3], {}, hidden=True)
    assert live.refresh()
    other.join()


def ids(shop: Recommender, history: list[str], k: int = 50, **query: Any) -> list[str]:
    return [item_id for item_id, _ in shop.answer([Query(history, k, **query)])[0].items]


def test_an_added_item_is_ranked_as_if_it_were_in_the_index(model: Model, shop: Any) -> None:
    """The items of the catalog that the index lacks come by way of the store: nothing else is different."""
    whole, items = recommender_of(model, tiny_items()), tiny_items()
    part = recommender_of(model, ItemTable(items._table.slice(0, 9)))
    store = shop(model).live.store
    part.live.follow(store)
    put(part, {items.item_ids[row]: as_new(items, row) for row in range(9, 12)})
    for history in (["i00", "i03"], ["i10", "i01"], ["i11"], ["i09", "i10", "i11"]):
        for query in (
            Query(history, 12),
            Query(history, 3, exclude=["i09"]),
            Query(history, 12, filters={"brand": ["Bob"], "year": {"min": 2005}}),
            Query(history, 6, diversity=0.5, max_per={"brand": 3}),
            Query(history, 6, reasons=True),
        ):
            here, there = part.answer([query])[0], whole.answer([query])[0]
            assert [item for item, _ in here.items] == [item for item, _ in there.items], query
            np.testing.assert_allclose([s for _, s in here.items], [s for _, s in there.items], atol=1e-5)
            assert (here.reasons, here.unknown_items) == (there.reasons, [])
    assert [i for i, _ in part.similar("i10").items] == [i for i, _ in whole.similar("i10").items]
    assert [i for i, _ in part.search("Patch by Bob", k=12).items] == [
        i for i, _ in whole.search("Patch by Bob", k=12).items
    ]
    assert part.fields("i10")["brand"] == "Ann"
    assert part.image("i10") == items.image(10)


def test_an_item_is_found_once_whatever_is_sent(compact: Model, shop: Any) -> None:
    one, other = shop(compact), shop(compact)
    put(one, {"new": NewItem({"title": "Tile"}, square(0.3)), "i03": NewItem({"title": "Patch", "brand": "Cyn"})})
    for recommender in (one, other):
        found = ids(recommender, ["i00"])
        assert len(found) == len(set(found)) == 12  # all of the catalog but the history, and the new one
        assert {"new", "i03"} <= set(found)
        assert ids(recommender, ["i00"], filters={"brand": ["Cyn"]}) == ["i03"]
    put(other, {"new": NewItem({"title": "Square", "brand": "Cyn"})})
    assert set(ids(one, ["i00"], filters={"brand": ["Cyn"]})) == {"i03", "new"}
    assert len(ids(one, ["i00"])) == 12
    assert ids(one, []).count("new") == ids(one, []).count("i03") == 1  # by popularity too
    assert "new" not in ids(one, ["new", "i00"])
    assert "new" in ids(one, ["new"], exclude_history=False)


def test_a_hidden_item_is_never_returned_and_is_known_all_the_same(model: Model, shop: Any) -> None:
    one, other = shop(model), shop(model)
    put(one, {"new": NewItem({"title": "Tile"}, square(0.3))})
    for item_id in ("new", "i05"):
        one.live.store.change(item_id, {}, hidden=True)
        for recommender in (one, other):
            for history in (["i00"], []):
                assert item_id not in ids(recommender, history)
            assert item_id not in [i for i, _ in recommender.search("Tile", k=50).items]
            assert item_id not in [i for i, _ in recommender.similar("i04", k=50).items]
            assert recommender.answer([Query([item_id])])[0].unknown_items == []
            assert recommender.fields(item_id)["hidden"] is True
    other.live.store.change("i05", {}, hidden=False)
    assert "i05" in ids(one, ["i00"])


def test_a_change_of_columns_keeps_the_vector_and_the_popularity(compact: Model, shop: Any) -> None:
    one, before = shop(compact), recommender_of(compact, tiny_items())
    one.live.store.change("i03", {"price": 77.0, "year": 1900})
    assert [i for i, _ in one.recommend(["i00"], 12)] == [i for i, _ in before.recommend(["i00"], 12)]
    assert one.recommend([], 12) == before.recommend([], 12)
    assert ids(one, ["i00"], filters={"price": {"min": 70}}) == ids(one, [], filters={"year": [1900]}) == ["i03"]
    assert one.fields("i03") == {**before.fields("i03"), "price": 77.0, "year": 1900}


def test_a_blend_counts_a_changed_item_as_before_and_a_new_one_by_the_model(compact: Model, shop: Any) -> None:
    one, before = shop(compact), recommender_of(compact, tiny_items())
    for recommender in (one, before):
        recommender.blend_with(tiny_dataset())
    one.live.store.change("i03", {"price": 77.0})
    one.live.store.change("i04", {}, hidden=True)
    put(one, {"new": NewItem({"title": "Tile"}, square(0.3))})
    found, expected = dict(one.recommend(["i00"], 20)), dict(before.recommend(["i00"], 20))
    assert found.keys() == {*expected, "new"} - {"i04"}
    np.testing.assert_allclose(found["i03"], expected["i03"], rtol=0.2)  # the model's part is shared with one more
    assert "new" not in dict(one.recommend(["new", "i00"], 20))


def test_a_blend_finds_a_live_item_by_what_it_is_as_one_of_the_catalog(store: SqliteStore, tmp_path: Path) -> None:
    whole = tiny_items()
    dataset = write_prepared(tmp_path / "data", tiny_dataset(whole))
    config = tiny_config(model=small_encoders(tmp_path / "encoders"), train={"compact": {"epochs": 1}})
    model = begin("compact", [dataset.uri], config, "cpu").model
    model = dataclasses.replace(model, info={"fingerprint": fingerprint(model)})
    vectors, content = model.embedder().items_and_search(Catalog(whole, model.encoder), np.arange(len(whole)))
    counts, histories = np.ones(len(whole), np.int64), [np.array([0, 1, 2])]
    counts[11] = 0

    def blended(count: int) -> Recommender:
        items = ItemTable(whole._table.slice(0, count))
        index = Index("v1", list(items.item_ids), vectors[:count], {})
        found = Recommender(model, index, items, counts[:count], content=content[:count])
        mixture = Mixture(histories, counts[:count], 1.0, content[:count])
        mixture.weights = torch.tensor([float(name.startswith("alike")) for name in mixture.parts])
        found.ranking.mixture = mixture
        return found

    one, expected = blended(11), blended(12).recommend(["i00", "i03"], 12)
    one.live.follow(store)
    put(one, {"i11": as_new(whole, 11)})
    found = one.recommend(["i00", "i03"], 12)
    assert [item for item, _ in found] == [item for item, _ in expected]
    np.testing.assert_allclose(
        [chance for _, chance in found], [chance for _, chance in expected], rtol=1e-2
    )  # float16
    assert dict(found)["i11"] > 0.001


def test_vectors_of_another_model_are_never_used(compact: Model, shop: Any) -> None:
    """A model that takes the place of another embeds again what the store holds, by its own item tower."""
    first = shop(compact)
    put(first, {"new": NewItem({"title": "Tile", "price": 3.0}, square(0.3))})
    model = tiny_model(tiny_config(model={"user_tower": "compact"}, train={"seed": 5}))
    model = dataclasses.replace(model, info={"fingerprint": "another"})
    with_noise(model)
    second = shop(model)
    expected = second.embed_added(second.live.store.contents(["new"]))[0].vector
    np.testing.assert_allclose(second.item_vectors(["new"])[0], expected, atol=1e-6)
    assert np.abs(second.item_vectors(["new"]) - first.item_vectors(["new"])).max() > 0.01
    assert second.live.store.changes(0, "another", 9)[0].vectors is not None  # for the next replica
    before = first.item_vectors(["new"])
    first.live.refresh()
    np.testing.assert_array_equal(first.item_vectors(["new"]), before)


def with_noise(model: Model) -> None:
    import torch

    with torch.no_grad():
        for weights in model.tower.parameters():
            weights.add_(0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(3)))


def test_what_the_version_says_of_an_item_is_used(compact: Model, shop: Any, monkeypatch: Any) -> None:
    """A folded item, and one that the data set has by now, are not embedded again."""
    items, first = tiny_items(), shop(compact)
    added, made = first.embed_new({"new": NewItem({"title": "Tile"}), "i03": as_new(items, 3)})
    first.live.store.put("an older model", added, made, 100)
    hashes = {"i03": items.content_hash(3)}
    version = VersionContents(lambda wanted: hashes, {"new": (added[0], made[0])})
    monkeypatch.setattr(Recommender, "embed_added", lambda *_: pytest.fail("was embedded"))
    again = shop(compact, version=version)
    assert len(ids(again, ["i00"])) == 12
    np.testing.assert_array_equal(again.item_vectors(["new"])[0], made[0].vector)
    alone = recommender_of(compact, items, version)
    assert "new" in ids(alone, ["i00"])  # without any store
    assert alone.image("new") is None
    assert alone.fields("new")["title"] == "Tile"


def test_a_store_that_is_away_leaves_what_was_known(compact: Model, shop: Any, monkeypatch: Any) -> None:
    one = shop(compact)
    put(one, {"new": NewItem({"title": "Tile"})})
    assert "new" in ids(one, ["i00"])

    def away(*_: Any) -> int:
        raise StoreAway("gone")

    monkeypatch.setattr(SqliteStore, "last_change", away)
    answer = one.answer([Query(["i00"], 50)])[0]
    assert answer.store_away
    assert answer.to_dict()["store_away"]
    assert "new" in [i for i, _ in answer.items]
    monkeypatch.undo()
    assert not one.answer([Query(["i00"])])[0].store_away


def test_many_changes_leave_little_behind(compact: Model, shop: Any) -> None:
    one = shop(compact)
    made = one.embed_new({"new": NewItem({"title": "Tile"})})
    for number in range(3):
        many = [dataclasses.replace(made[0][0], item_id=f"n{n}", fields={"year": n}) for n in range(_BLOCK)]
        one.live.store.put(one.model_version, many, made[1] * _BLOCK, 10_000)
        assert one.live.refresh()
        assert len(one.live.view.current) == _BLOCK
        assert len(one.live.view) <= 2 * _BLOCK, number
        assert ids(one, ["i00"], filters={"year": [7, 1023]}, k=5) == ["n7", "n1023"]


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (NewItem({"title": "t", "odd": 1}), "'odd' is no column that items of this catalog can be given"),
        (NewItem({"title": "t", "year": "soon"}), "'year' must be of type int64"),
        (NewItem({"title": "t"}, b"no picture"), "unreadable picture"),
    ],
)
def test_items_at_fault_are_named(compact: Model, shop: Any, new: NewItem, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        shop(compact).embed_new({"x/1": new})
    assert "item 'x/1'" in str(error.value)


def test_a_store_holds_so_many_items_and_no_more(compact: Model, shop: Any) -> None:
    one = shop(compact)
    added, made = one.embed_new({f"n{n}": NewItem({"title": "Tile"}) for n in range(3)})
    with pytest.raises(StoreFull):
        one.live.store.put("m", added, made, 2)
    assert one.live.store.changes(0, "m", 9) == []
    one.live.store.change("i00", {"price": 1.0})
    assert one.live.store.changes(0, "m", 9) == [LiveItem("i00", {"price": 1.0}, None, False, 1)]
