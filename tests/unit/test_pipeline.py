"""What is done, found, refused and cleared below one place. Preparing, training and embedding are stand-ins that leave
what the real ones leave; evaluation is the real one. tests/cluster/test_pipeline.py runs all of it under Ray."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import tiny_config, tiny_dataset, tiny_model, write_prepared

from pixrec import storage, verbs
from pixrec.artifact import index_version, list_versions, load_index, load_model, save_model
from pixrec.config import Config, PipelineConfig
from pixrec.data.sequences import load_dataset
from pixrec.errors import ConfigError, InputError
from pixrec.handles import PreparedData, PublishedIndex, TrainedModel
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import AddedItem, EmbeddedVectors, Event
from pixrec.model.catalog import Catalog
from pixrec.pipeline import decide, pipeline
from pixrec.recommender import load_recommender
from pixrec.training.stages import model_facts

STEPS = {"prepare", "train", "embed", "evaluate"}


class Shop:
    """One place, the events that arrive, and what the stand-ins were asked to make."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.events, self.ran, self.kill = folder / "events.parquet", list[str](), ""
        self.prepared: Any = None
        self.kept = dict[str, set[str | None]](train=set(), embed=set())  # where what frozen encoders made is kept
        self.start: str | None = None
        self.users = 10
        self.events.write_text("10 users")

    def more_users(self, count: int) -> None:
        self.users = count
        self.events.write_text(f"{count} users and another day")

    def run(self, items: str | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
        sections = {"evaluate": {"bootstrap_samples": 50, "scorers": ["popularity"]}, **sections}
        self.ran.clear()
        return pipeline(items, str(self.events), self.out, config=tiny_config(**sections))

    def step(self, name: str) -> None:
        self.ran.append(name)
        if name == self.kill:
            self.kill = ""
            raise KeyboardInterrupt

    def prepare(self, items: Any, interactions: Any, out: str, **options: Any) -> PreparedData:
        self.prepared = items, interactions
        self.step("prepare")
        write_prepared(out, tiny_dataset(num_users=self.users))
        return PreparedData.load(out)

    def train(self, data: Any, out: str, *, config: Config, resume: bool, progress: Any) -> TrainedModel:
        work = Path(storage.parent(out)) / f".{storage.name(out)}.training"
        assert resume == work.exists(), "what was begun is gone on with"
        work.mkdir(parents=True, exist_ok=True)
        (work / "config.yaml").touch()
        self.step("train")
        model = tiny_model(config, load_dataset(str(data)).items)
        Path(out).mkdir()
        self.start = config.train.start
        self.kept["train"].add(config.train.picture_tokens)
        save_model(out, model, model_facts(load_dataset(str(data)), config))
        storage.remove(str(work))
        return TrainedModel.load(out)

    def embed(self, model: Any, data: Any, out: str, *, current: bool, **options: Any) -> PublishedIndex:
        self.step("embed")
        self.kept["embed"].add(options["config"].embed.picture_tokens)
        dataset, loaded = load_dataset(str(data)), load_model(str(model))
        vectors = loaded.embedder().items(Catalog(dataset.items, loaded.encoder), np.arange(len(dataset.items)))
        facts = {"model": str(model), "data": str(data), "data_fingerprint": dataset.info["fingerprint"]}
        with index_version(out, loaded.fingerprint, vectors.shape[1], "float32", facts, current=current) as writer:
            writer.add(dataset.items.item_ids, vectors, [dataset.items.content_hash(r) for r in range(len(vectors))])
        return PublishedIndex.of(out, writer.manifest)

    def in_use(self) -> dict[str, Any]:
        return next(version for version in list_versions(f"{self.out}/index") if version["current"])


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop, evaluate = Shop(tmp_path), verbs.evaluate
    monkeypatch.setitem(sys.modules, "pixrec.cluster.session", SimpleNamespace(connect=contextlib.nullcontext))
    for name in ("prepare", "train", "embed"):
        monkeypatch.setattr(verbs, name, getattr(shop, name))

    def told(*places: Any, **options: Any) -> Any:
        shop.step("evaluate")
        return evaluate(*places, **options)

    monkeypatch.setattr(verbs, "evaluate", told)
    return shop


def test_the_first_run_publishes_and_the_next_finds_everything(shop: Shop) -> None:
    first = shop.run()
    assert shop.ran == ["prepare", "train", "embed", "evaluate"]
    assert first["steps"] == dict.fromkeys(STEPS, "made")
    assert (first["published"], first["published_model"]) == (first["version"], "new")
    assert shop.in_use()["version"] == first["version"]
    again = shop.run()
    assert shop.ran == []
    assert again["steps"] == dict.fromkeys(STEPS - {"evaluate"}, "found")
    assert {**again, "steps": None, "why": None} == {**first, "steps": None, "why": None}


@pytest.mark.parametrize("step", sorted(STEPS))
def test_a_run_that_was_killed_is_gone_on_with(shop: Shop, step: str) -> None:
    shop.kill = step
    with pytest.raises(KeyboardInterrupt):
        shop.run()
    before = shop.ran[:-1]
    assert not (shop.out / "index" / "CURRENT").exists(), "nothing is published before the end"
    assert shop.run()["published_model"] == "new"
    assert shop.ran == ["prepare", "train", "embed", "evaluate"][len(before) :]


def test_killed_before_the_swap_only_the_swap_is_left(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pixrec.pipeline.rollback", die)
        with pytest.raises(KeyboardInterrupt):
            shop.run()
    assert shop.run()["published_model"] == "new"
    assert shop.ran == []


def test_frozen_encoders_see_a_picture_once_and_not_with_each_data_set(shop: Shop) -> None:
    shop.run()
    shop.more_users(11)
    assert shop.run()["steps"]["train"] == "made"
    assert shop.kept == {step: {f"{shop.out}/tokens"} for step in ("train", "embed")}
    shop.kept["train"].clear()
    shop.run(train={"picture_tokens": None})
    assert shop.kept["train"] == {None}


def test_settings_that_change_nothing_of_the_model_train_no_other(shop: Shop) -> None:
    shop.run()
    shop.run(train={"cpus_per_worker": 0.25}, serve={"num_replicas": 3}, embed={"batch_size": 5})
    assert shop.ran == []
    shop.run(evaluate={"bootstrap_samples": 40, "scorers": ["popularity"]})
    assert shop.ran == ["evaluate"]
    shop.run(train={"learning_rate": 0.01}, pipeline={"margin": 1.0})
    assert shop.ran[0] == "train"


def test_a_model_that_may_be_worse_is_not_published_but_the_new_catalog_is(shop: Shop) -> None:
    old = shop.run()
    shop.more_users(9)
    refused = shop.run(train={"seed": 1}, pipeline={"margin": 0})
    assert refused["published_model"] == "served"
    assert "may be worse by more than 0 (pipeline.margin)" in refused["why"]
    assert shop.ran == ["prepare", "train", "embed", "embed", "evaluate"]
    now = shop.in_use()
    assert storage.name(now["model"]) == storage.name(old["model"])
    assert storage.name(now["data"]) == storage.name(refused["data"])
    assert now["version"] == refused["published"] not in (old["version"], refused["version"])

    again = shop.run(train={"seed": 1}, pipeline={"margin": 0})
    assert shop.ran == []
    assert again["published"] == refused["published"]
    accepted = shop.run(train={"seed": 1}, pipeline={"margin": 1.0})
    assert shop.ran == []
    assert (accepted["published"], accepted["published_model"]) == (refused["version"], "new")


def test_the_version_in_use_names_its_model_so_both_change_in_one_write(shop: Shop) -> None:
    first = shop.run()
    second = shop.run(train={"seed": 1}, pipeline={"margin": 1.0})
    for run in (second, first):
        PublishedIndex.load(run["index"]).rollback(run["version"])
        now = shop.in_use()
        assert (now["model"], now["data"]) == (run["model"], run["data"])
        load_recommender(now["model"], run["index"])  # raises where the two do not belong together


@pytest.mark.parametrize(("publish", "version"), [("always", "new"), ("never", None)])
def test_publication_by_setting(shop: Shop, publish: str, version: str | None) -> None:
    first = shop.run()
    second = shop.run(train={"seed": 1}, pipeline={"publish": publish})
    assert shop.ran == ["train", "embed", "evaluate"], "no model is compared with"
    assert second["published_model"] == version
    assert shop.in_use()["version"] == (second if version else first)["version"]


def test_what_no_version_names_is_deleted(shop: Shop) -> None:
    settings = {"pipeline": {"publish": "always", "keep_versions": 2}}
    for seed in range(2):
        shop.run(train={"seed": seed}, **settings)
    (shop.out / "models" / ".lost.training").mkdir()
    first = sorted(path.name for path in (shop.out / "models").iterdir())
    summary = shop.run(train={"seed": 2}, **settings)
    assert len(list_versions(f"{shop.out}/index")) == 2
    left = {room: {path.name for path in (shop.out / room).iterdir()} for room in ("data", "models", "reports")}
    assert {room: len(names) for room, names in left.items()} == {"data": 1, "models": 2, "reports": 2}
    assert "models/.lost.training" in summary["deleted"]
    assert len(set(first) & left["models"]) == 1
    load_index(f"{shop.out}/index")


@pytest.mark.parametrize(("low", "margin", "published"), [(-0.02, 0.01, False), (-0.01, 0.01, True), (0.001, 0, True)])
def test_what_decides_is_the_lower_end_of_the_paired_interval(low: float, margin: float, published: bool) -> None:
    found = {"ndcg@10": 0.05, "ci95": {"ndcg@10": [low, 0.1]}}
    decision, why = decide({"differences": {"minus": {"served": found}}}, PipelineConfig(margin=margin))
    assert decision is published
    assert f"+0.0500 [{low:+.4f}, +0.1000]" in why


def test_a_refused_version_and_the_one_in_use_both_stay() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.keep_versions is 1: must be at least 2"):
        PipelineConfig(keep_versions=1)


DAY_MS = 86_400_000
NOON = 20_000 * DAY_MS + DAY_MS // 2


@pytest.fixture
def loop(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A shop with a server's store, at noon of a day; what is set of its runs."""
    pq.write_table(pa.table({"user_id": ["u00"], "item_id": ["i00"], "timestamp": [0]}), shop.events)
    at(monkeypatch, 0)
    store = SqliteStore(str(shop.folder / "live.sqlite"), 100)
    store.add([Event("u", "i01", NOON - DAY_MS, "view"), Event("u", "i02", NOON - 1, "view")])
    return {"pipeline": {"store": str(shop.folder / "live.sqlite"), "start": "served", "keep_versions": 2}}


def at(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    monkeypatch.setattr("pixrec.pipeline.time", SimpleNamespace(time=lambda: (NOON + days * DAY_MS) / 1000))


def learned(shop: Shop) -> list[dict[str, Any]]:
    """The events of the store that were prepared beside the table."""
    given, more = shop.prepared[1]
    assert given == str(shop.events)
    return pq.read_table(more).to_pylist()


def test_each_day_learns_from_the_events_before_it_and_goes_on_from_the_model_in_use(
    shop: Shop, loop: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shop.run(**loop)
    yesterday = {"user_id": "u", "item_id": "i01", "timestamp": NOON - DAY_MS}
    assert (learned(shop), shop.start) == ([yesterday], None)
    assert shop.run(**loop)["steps"]["export"] == "found"
    assert shop.ran == []

    at(monkeypatch, 1)
    shop.users = 9  # what the stand-in makes of another day
    second = shop.run(**loop)
    assert shop.ran == ["prepare", "train", "embed", "evaluate"]
    assert [event["item_id"] for event in learned(shop)] == ["i01", "i02"], "in one table, each once"
    assert shop.start == first["model"] != second["model"]
    assert TrainedModel.load(second["model"]).info["start"]["uri"] == first["model"]
    assert shop.run(**loop)["published"] == second["published"]
    assert shop.ran == [], "what it has learned from is not learned from again"

    at(monkeypatch, 2)
    assert shop.run(**loop)["data"] == second["data"]
    assert shop.ran == [], "a day without events makes nothing"
    assert len(list((shop.out / "store").glob("*.parquet")) + list((shop.out / "store").glob("*.json"))) == 1
    assert len([path for path in (shop.out / "store").iterdir() if path.is_dir()]) == 1, "older exports are deleted"


@pytest.mark.parametrize("step", ["prepare", "train", "embed", "evaluate"])
def test_a_loop_that_was_killed_is_gone_on_with_and_sees_the_same_events(
    shop: Shop, loop: dict[str, Any], step: str
) -> None:
    shop.kill = step
    with pytest.raises(KeyboardInterrupt):
        shop.run(**loop)
    before, seen = shop.ran[:-1], learned(shop)
    SqliteStore(str(shop.folder / "live.sqlite"), 100).add([Event("late", "i03", NOON - 2 * DAY_MS)])
    assert shop.run(**loop)["published_model"] == "new"
    assert shop.ran == ["prepare", "train", "embed", "evaluate"][len(before) :]
    assert learned(shop) == seen


def test_a_model_of_other_settings_is_trained_afresh(shop: Shop, loop: dict[str, Any]) -> None:
    shop.run(**loop)
    shop.users = 9
    with pytest.warns(UserWarning, match=r"fresh weights: .* was trained with another model\.embedding_width"):
        shop.run(**loop, model={"embedding_width": 8}, prepare={"min_item_events": 2})
    assert "train" in shop.ran
    assert shop.start is None


def test_new_items_come_with_what_the_table_says_of_items(shop: Shop, loop: dict[str, Any]) -> None:
    items = shop.folder / "items.parquet"
    pq.write_table(pa.table({"item_id": ["i00"], "title": ["A"], "price": [1], "tags": [["x"]]}), items)
    store, vectors = SqliteStore(str(shop.folder / "live.sqlite"), 100), EmbeddedVectors(np.zeros(2, np.float32), None)
    fields = {"title": "New", "tags": ["y", "z"]}
    added = [AddedItem(i, fields, "New", b"jpeg", "h") for i in ("i00", "new", "hidden")]
    store.put("m", added, [vectors] * 3, 9)
    store.change("new", {"price": 2.5})
    store.change("hidden", {}, hidden=True)
    shop.run(items=str(items), **loop)
    given, more = shop.prepared[0]
    assert given == str(items)
    assert pq.read_table(more).to_pylist() == [
        {"item_id": "new", "title": "New", "brand": None, "category": None, "description": None, "price": 2.5,
         "tags": ["y", "z"], "image": b"jpeg"}
    ]  # fmt: skip


def test_events_have_kinds_where_those_of_the_table_do(shop: Shop, loop: dict[str, Any]) -> None:
    table = pa.table({"user_id": ["u00"], "item_id": ["i00"], "timestamp": [0], "event": ["view"]})
    pq.write_table(table, shop.events)
    shop.run(**loop)
    assert [event["event"] for event in learned(shop)] == ["view"]


def test_what_a_store_cannot_give_is_refused(shop: Shop, loop: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.min_rating 3\.0 leaves all events of pipeline\.store out"):
        shop.run(**loop, prepare={"min_rating": 3.0})
    with pytest.raises(InputError, match="nowhere holds no events: there is no such file"):
        shop.run(pipeline={"store": str(shop.folder / "nowhere")})
    shop.run(pipeline={"store": "index"})
    assert shop.prepared == (None, str(shop.events)), "where there is no store yet, there is nothing to learn from it"
