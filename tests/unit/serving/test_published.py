"""Which version is served: swaps, refusals, pins, and the model that belongs to an index. No Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model, write_index, write_model, write_prepared

from pixrec.artifact import index_manifest, list_versions, pinned_version
from pixrec.errors import ArtifactError
from pixrec.query import Query
from pixrec.serving.published import Published, Rollout, place_of


class Shelf:
    """Versions in memory: `wanted` names one, `broken` are those that cannot be loaded."""

    def __init__(self) -> None:
        self.current, self.pin_at, self.broken, self.loads = "1", None, set(), 0
        self.models = {"1": "m", "2": "m", "3": "other"}

    def wanted(self) -> dict[str, Any]:
        version = self.pin_at or self.current
        if version not in self.models:
            raise ArtifactError(f"no version {version}")
        return {"version": version, "model_fingerprint": self.models[version], "time": "2026-11-28T00:00:00+00:00"}

    def load(self, manifest: Any) -> Any:
        self.loads += 1
        if manifest["version"] in self.broken:
            raise ArtifactError(f"version {manifest['version']} was made by another model")
        return SimpleNamespace(model_version=manifest["model_fingerprint"], index_version=manifest["version"])

    def pin(self, version: str | None) -> None:
        if version is not None and version not in self.models:
            raise ArtifactError("no such version")
        self.pin_at = version

    def pinned(self) -> str | None:
        return self.pin_at

    def before(self, version: str) -> str | None:
        earlier = [known for known in self.models if known < version]
        return earlier[-1] if earlier else None

    def canary(self) -> dict[str, Any] | None:
        newer = self.pin_at is not None and self.current > self.pin_at
        return {"version": self.current, "model_fingerprint": self.models[self.current]} if newer else None

    def make_current(self, version: str) -> None:
        self.current = version


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def test_a_new_version_takes_the_place_of_the_old_one(shelf: Shelf) -> None:
    rollout = Rollout(shelf)
    assert rollout.refresh() == "unchanged"
    before = rollout.in_use
    shelf.current = "3"
    assert rollout.refresh() == "swapped"
    assert (rollout.current.model_version, rollout.current.index_version) == ("other", "3")
    assert rollout.in_use[1]["version"] == "3"
    assert before[0].index_version == "1", "who took the old one goes on with it"


def test_what_cannot_be_loaded_is_refused_and_tried_again_only_when_told(shelf: Shelf) -> None:
    rollout = Rollout(shelf)
    shelf.current, shelf.broken = "2", {"2"}
    assert rollout.refresh() == "refused"
    assert rollout.refresh() == "refused"
    assert shelf.loads == 2, "a poll does not load what it knows to be broken"
    assert rollout.current.index_version == "1"
    assert "another model" in rollout.state()["refused"]
    assert rollout.refresh(again=True) == "refused"
    assert shelf.loads == 3
    shelf.broken.clear()
    assert rollout.refresh(again=True) == "swapped"
    assert rollout.state()["refused"] is None
    assert rollout.outcomes == {"refused": 3, "swapped": 1}


def test_storage_that_fails_for_a_while_costs_nothing(shelf: Shelf) -> None:
    rollout = Rollout(shelf)
    shelf.current = "gone"
    assert rollout.refresh() == "refused"
    shelf.current = "2"
    assert rollout.refresh() == "swapped"


def test_a_version_that_goes_back_in_time_is_no_longer_refused(shelf: Shelf) -> None:
    rollout = Rollout(shelf)
    shelf.current, shelf.broken = "2", {"2"}
    rollout.refresh()
    shelf.current = "1"
    assert rollout.refresh() == "unchanged"
    assert rollout.refused is None


def test_pins_and_rollbacks(shelf: Shelf) -> None:
    rollout = Rollout(shelf)
    assert rollout.rollback() is None
    shelf.current = "2"
    rollout.refresh()
    assert rollout.rollback() == "swapped"
    assert (rollout.current.index_version, shelf.pin_at) == ("1", "1")
    shelf.current = "3"
    assert rollout.refresh() == "unchanged", "what is published does not matter while pinned"
    with pytest.raises(ArtifactError):
        rollout.pin("ghost")
    shelf.broken = {"2"}
    assert rollout.pin("2") == "refused"
    assert (rollout.current.index_version, shelf.pin_at) == ("1", "1"), "a pin that cannot be served is taken back"
    assert rollout.pin(None) == "swapped"
    assert rollout.current.index_version == "3"


def test_a_share_of_users_gets_the_newest_version_while_another_is_pinned(shelf: Shelf) -> None:
    shelf.pin_at = "1"
    rollout = Rollout(shelf, canary_share=0.25)
    assert rollout.canary is None
    shelf.current = "3"
    assert rollout.refresh() == "swapped"
    users = [Query(["i"], user_id=f"u{number}") for number in range(2000)]
    given = [(r.model_version, r.index_version) for r in map(rollout.for_query, users)]
    assert set(given) == {("m", "1"), ("other", "3")}
    assert given.count(("other", "3")) / len(users) == pytest.approx(0.25, abs=0.03)
    assert [rollout.for_query(user).index_version for user in users] == [version for _, version in given]
    assert rollout.state()["canary"] == ["other", "3"]
    assert Rollout(shelf, canary_share=1.0).for_query(users[0]).index_version == "3", "a new replica has it too"
    assert Rollout(shelf).for_query(users[0]).index_version == "1"


def test_who_has_no_id_is_known_by_the_history() -> None:
    histories = [place_of(Query([f"i{number}", "i"])) for number in range(500)]
    assert len(set(histories)) == 500
    assert 0.4 < sum(histories) / 500 < 0.6
    assert place_of(Query(["i1", "i"])) == histories[1]
    assert place_of(Query(["i1"], user_id="u")) == place_of(Query([], user_id="u"))
    assert place_of(Query([])) == 1.0, "they all get the same"


def test_a_canary_becomes_what_all_get_without_being_loaded_again(shelf: Shelf) -> None:
    shelf.pin_at, shelf.current = "1", "2"
    rollout = Rollout(shelf, canary_share=0.5)
    canary, loads = rollout.canary, shelf.loads
    assert rollout.pin(None) == "swapped"
    assert (rollout.current, rollout.canary, shelf.loads) == (canary, None, loads)


def test_a_rollback_gives_the_canary_up(shelf: Shelf) -> None:
    shelf.pin_at, shelf.current = "1", "2"
    rollout = Rollout(shelf, canary_share=0.5)
    assert rollout.rollback() == "swapped"
    assert (rollout.current.index_version, rollout.canary, shelf.current, shelf.pin_at) == ("1", None, "1", "1")
    assert "canary" not in rollout.state()


def test_a_canary_that_cannot_be_loaded_leaves_all_as_they_were(shelf: Shelf) -> None:
    shelf.pin_at, shelf.current, shelf.broken = "1", "2", {"2"}
    rollout = Rollout(shelf, canary_share=1.0)
    assert rollout.for_query(Query(["i"])).index_version == "1"
    assert "another model" in rollout.state()["refused"]
    assert (rollout.refresh(), shelf.loads) == ("refused", 2)
    assert rollout.pin("1") == "unchanged", "that the canary is refused again does not undo the pin"
    assert shelf.pin_at == "1"
    shelf.broken.clear()
    assert rollout.refresh(again=True) == "swapped"
    assert (rollout.for_query(Query(["i"])).index_version, rollout.refused) == ("2", None)


def test_without_a_first_version_there_is_nothing_to_serve(shelf: Shelf) -> None:
    shelf.broken = {"1"}
    with pytest.raises(ArtifactError):
        Rollout(shelf)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    items = tiny_items()
    dataset = write_prepared(tmp_path / "data", tiny_dataset(items))
    model = write_model(tmp_path / "model", tiny_model(items=items))
    write_index(tmp_path / "index", model, dataset)
    return tmp_path


def test_each_version_is_served_by_the_model_that_made_it(place: Path) -> None:
    source = Published(str(place / "model"), str(place / "index"), str(place / "data"))
    rollout = Rollout(source)
    first = rollout.current.index_version
    dataset = tiny_dataset(tiny_items(), uri=str(place / "data"))
    other = tiny_model(tiny_config(model={"embedding_width": 8}), tiny_items())
    write_index(place / "index", other, dataset)
    assert rollout.refresh() == "refused", "no model of that index is to be had"
    assert "run pixrec embed with this model" in rollout.state()["refused"]
    assert rollout.current.index_version == first

    write_model(place / "model2", other)
    manifest = index_manifest(str(place / "index"))
    assert Rollout(Published(str(place / "model2"), str(place / "index"))).current.model_version == other.fingerprint
    manifest |= {"model": str(place / "model2")}  # as pixrec embed writes it
    assert source.load(manifest).model_version == other.fingerprint

    assert rollout.rollback() is None, "nothing came before the first"
    assert [version["current"] for version in list_versions(source.index)] == [False, True]
    assert rollout.pin(first) == "unchanged"
    assert pinned_version(source.index) == first
    assert Rollout(source).current.index_version == first, "a new replica begins with the pinned version"


def test_the_canary_is_the_current_version_where_an_earlier_one_is_pinned(place: Path) -> None:
    source = Published(str(place / "model"), str(place / "index"), str(place / "data"))
    first = source.wanted()["version"]
    write_index(place / "index", tiny_model(items=tiny_items()), tiny_dataset(tiny_items(), uri=str(place / "data")))
    second = source.wanted()["version"]
    assert source.canary() is None
    source.pin(second)
    assert source.canary() is None
    source.pin(first)
    assert source.canary() == index_manifest(source.index)
    rollout = Rollout(source, canary_share=1.0)
    assert (rollout.current.index_version, rollout.canary.index_version) == (first, second)  # type: ignore[union-attr]
    rollout.rollback()
    assert (index_manifest(source.index)["version"], source.canary()) == (first, None)
    source.make_current(second)
    source.pin(second)
    source.make_current(first)
    assert source.canary() is None, "what was published before the pinned version is no canary"


def test_an_index_of_new_items_is_served_with_their_data(place: Path) -> None:
    source = Published(str(place / "model"), str(place / "index"), str(place / "data"))
    rollout = Rollout(source)
    items = tiny_items(14)
    more = write_prepared(place / "data2", tiny_dataset(items))
    write_index(place / "index", tiny_model(items=tiny_items()), more)
    assert rollout.refresh() == "swapped"
    assert len(rollout.current.items) == 14
