"""The two deployments as plain classes: what the replica computes and refuses, what the backend makes of failures."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from pixrec.config import ServeConfig
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError, InputError, UnreadableImage
from pixrec.live.store import AddedItem, EmbeddedVectors
from pixrec.query import COSINE, PURCHASE_SHARE, Answer, NewItem, Query, Vectors
from pixrec.serving.backend import (
    Change,
    Incomplete,
    ItemChange,
    NotStored,
    Overloaded,
    Refusal,
    ToEmbed,
    Unavailable,
    Versions,
)
from pixrec.serving.deployments import ServeBackend, bind
from pixrec.serving.published import place_of
from pixrec.serving.replicas import RecommenderReplica, RetrievalReplica


def answer_of(item_id: str, score: float) -> Answer:
    return Answer([(item_id, score)], COSINE, "model-1", "index-1")


FALLBACK = Answer([("b", 0.1)], PURCHASE_SHARE, "model-1", "index-1", fallback=True)


class Followed:
    """An overlay that only says which store it was told to follow."""

    store: Any = None

    def follow(self, store: Any) -> None:
        self.store = store


class FakeRecommender:
    model_version, index_version = "model-1", "index-1"

    def __init__(self) -> None:
        self.items = ItemTable(pa.table({"item_id": ["a", "b"], "brand": ["Acme", None], "image": [b"jpeg", None]}))
        self.batches: list[int] = []
        self.encoded: list[tuple[str, Any, Any]] = []
        self.threads: set[str] = set()
        self.live = Followed()
        self.added: list[Any] = []

    def knows(self, item_id: str) -> bool:
        return item_id in self.items.row_of

    def fields(self, item_id: str) -> Any:
        return self.items.fields(self.items.row_of[item_id])

    def image(self, item_id: str) -> bytes | None:
        return self.items.image(self.items.row_of[item_id])

    def column_problem(self, fields: Any) -> str | None:
        return "'odd' is no column" if "odd" in fields else None

    def embed_new(self, items: Any) -> tuple[list[Any], list[Any]]:
        if problem := next(filter(None, (self.column_problem(item.fields) for item in items.values())), None):
            raise InputError(problem)
        added = [AddedItem(item_id, item.fields, "text", None, "hash") for item_id, item in items.items()]
        return added, [EmbeddedVectors(np.ones(2, np.float32), None)] * len(added)

    def read(self, queries: list[Query]) -> list[Query]:
        return queries

    def encode(self, asked: list[Query]) -> Any:
        return np.zeros((len(asked), 2), np.float32)

    def encode_new(self, new_items: Any) -> dict[str, Any]:
        for item_id, item in new_items.items():
            if item.image is not None:
                raise InputError(f"item {item_id!r}: not a picture")
            self.encoded.append((item_id, item.fields, item.image))
        return {item_id: [1.0] for item_id in new_items}

    def rank(self, queries: list[Query], vectors: Any) -> list[Answer]:
        self.batches.append(len(queries))
        self.threads.add(threading.current_thread().name)
        given = {"model_version": self.model_version, "index_version": self.index_version}
        return [dataclasses.replace(answer_of("b", 0.5) if query.history else FALLBACK, **given) for query in queries]

    def item_vectors(self, item_ids: list[str]) -> Any:
        return np.full((len(item_ids), 2), 0.25, np.float32)

    def search_vector(self, text: str, image: bytes | None) -> Any:
        return self.content_vectors([(text, image)])[0]

    def content_vectors(self, contents: list[tuple[str, bytes | None]]) -> Any:
        if any(image is not None for _, image in contents):
            raise UnreadableImage("not a picture")
        return np.full((len(contents), 2), 0.75, np.float32)

    def near(self, vector: Any, query: Query, of_content: bool = False) -> Answer:
        return answer_of("b" if vector[0] < 0.5 else "a", float(vector[0]))


class FakeSource:
    """Publishes one version."""

    def __init__(self, recommender: Any) -> None:
        self.recommender, self.pins = recommender, [None]

    def wanted(self) -> dict[str, Any]:
        return {"model_fingerprint": "model-1", "version": "index-1", "rows": 2, "recall": {"recall@10": 0.98}}

    def load(self, manifest: Any) -> Any:
        return self.recommender

    def canary(self) -> Any:
        return None

    def make_current(self, version: str) -> None:
        raise AssertionError

    def pin(self, version: str | None) -> None:
        self.pins.append(version)

    def pinned(self) -> str | None:
        return self.pins[-1]

    def before(self, version: str) -> str | None:
        return None


@pytest.fixture
def recommender() -> FakeRecommender:
    return FakeRecommender()


@pytest.fixture
def replica(recommender: FakeRecommender, monkeypatch: pytest.MonkeyPatch) -> RecommenderReplica:
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    return RecommenderReplica(FakeSource(recommender), ServeConfig(poll_seconds=0))


def test_a_batch_is_one_call_off_the_event_loop(replica: RecommenderReplica, recommender: FakeRecommender) -> None:
    answers = asyncio.run(replica.answer_all([Query(["a"]), Query([]), Query(["b"], k=0)]))
    assert recommender.batches == [3]
    assert [answer.fallback for answer in answers] == [False, True, False]
    assert threading.current_thread().name not in recommender.threads


def test_who_gets_the_canary_is_answered_by_it_in_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class CanarySource(FakeSource):
        def canary(self) -> Any:
            return {"model_fingerprint": "model-2", "version": "index-2"}

        def load(self, manifest: Any) -> Any:
            made = loaded[manifest["version"]] = FakeRecommender()
            made.model_version, made.index_version = manifest["model_fingerprint"], manifest["version"]
            return made

    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    loaded: dict[str, FakeRecommender] = {}
    replica = RecommenderReplica(CanarySource(None), ServeConfig(poll_seconds=0, canary_share=0.5))
    queries = [Query([], user_id=f"u{number}") for number in range(8)] + [Query([])]
    newer = [place_of(query) < 0.5 for query in queries]
    assert 0 < sum(newer) < 8
    answers = asyncio.run(replica.answer_all(queries))
    assert [answer.index_version for answer in answers] == ["index-2" if new else "index-1" for new in newer]
    assert (loaded["index-1"].batches, loaded["index-2"].batches) == ([9 - sum(newer)], [sum(newer)])


def test_a_bad_filter_is_refused_before_it_joins_a_batch(
    replica: RecommenderReplica, recommender: FakeRecommender
) -> None:
    colour = {"colour": ["red"]}
    for refusal in (
        asyncio.run(replica.recommend(Query([], 3, filters=colour))),
        asyncio.run(replica.similar("a", Query([], 3, filters=colour))),
        asyncio.run(replica.search("x", None, Query([], 3, filters=colour))),
    ):
        assert refusal == Refusal("filters", "'colour' is no filter field of this catalog; known: brand")
    assert recommender.batches == []


def test_timestamps_that_do_not_fit_are_refused_before_they_join_a_batch(
    replica: RecommenderReplica, recommender: FakeRecommender
) -> None:
    for timestamps in ([1], [2, 1]):
        refusal = asyncio.run(replica.recommend(Query(["a", "b"], 3, timestamps=timestamps)))
        assert isinstance(refusal, Refusal)
        assert refusal.field == "timestamps"
    assert recommender.batches == []


def test_new_items_are_encoded_before_the_batch(replica: RecommenderReplica, recommender: FakeRecommender) -> None:
    replica._answer_together = replica.answer_all
    ranking = asyncio.run(replica.recommend(Query(["n"], 3, new_items={"n": NewItem({"title": "lamp"})})))
    assert ranking == answer_of("b", 0.5)
    assert recommender.encoded == [("n", {"title": "lamp"}, None)]
    refusal = asyncio.run(replica.recommend(Query(["n"], 3, new_items={"n": NewItem({}, b"no picture")})))
    assert refusal == Refusal("new_items", "item 'n': not a picture")
    assert recommender.batches == [1]


def test_the_replica_answers_with_its_versions(replica: RecommenderReplica) -> None:
    assert asyncio.run(replica.versions()) == Versions("model-1", "index-1")
    assert asyncio.run(replica.similar("a", Query([], 3))) == answer_of("b", 0.25)
    assert asyncio.run(replica.search("x", None, Query([], 3, filters={"brand": ["Acme"]}))) == answer_of("a", 0.75)
    refusal = asyncio.run(replica.search("", b"?", Query([], 3)))
    assert refusal == Refusal("image_base64", "unreadable picture: not a picture")


def test_what_the_catalog_lacks_is_none(replica: RecommenderReplica) -> None:
    assert asyncio.run(replica.fields("a")) == {"item_id": "a", "brand": "Acme"}
    assert asyncio.run(replica.image("a")) == b"jpeg"
    assert asyncio.run(replica.filters()) == {"brand": [("Acme", 1)]}
    missing = (
        replica.similar("ghost", Query([], 1)),
        replica.fields("ghost"),
        replica.image("ghost"),
        replica.image("b"),
    )
    for answer in missing:
        assert asyncio.run(answer) is None


def test_changes_of_items_are_stored_or_refused(recommender: FakeRecommender, tmp_path: Path) -> None:
    config = ServeConfig(poll_seconds=0, store=str(tmp_path / "live"), max_live_items=2)
    replica = RecommenderReplica(FakeSource(recommender), config)
    store = recommender.live.store
    here = Versions("model-1", "index-1")
    assert asyncio.run(replica.add_items({"n": NewItem({"title": "Tile"})})) == here
    assert asyncio.run(replica.change_item("a", ItemChange({"price": 2.0}, True))) == here
    assert [(i.item_id, i.fields, i.hidden) for i in store.changes(0, "model-1", 9)] == [
        ("n", {"title": "Tile"}, False),
        ("a", {"price": 2.0}, True),
    ]
    assert asyncio.run(replica.change_item("ghost", ItemChange(hidden=True))) is None
    assert asyncio.run(replica.change_item("a", ItemChange({"odd": 1}))) == Refusal("fields", "'odd' is no column")
    assert asyncio.run(replica.add_items({"x": NewItem({"odd": 1})})) == Refusal("items", "'odd' is no column")
    full = asyncio.run(replica.add_items({"x": NewItem({}), "y": NewItem({})}))
    assert isinstance(full, NotStored)
    assert (full.full, "holds 2 items" in full.message) == (True, True)
    store.close()
    away = [asyncio.run(replica.add_items({"x": NewItem({})})), asyncio.run(replica.change_item("a", ItemChange()))]
    assert [(type(one), one.full) for one in away] == [(NotStored, False)] * 2


def backend_whose_handle(remote: Any) -> ServeBackend:
    handle = SimpleNamespace(versions=SimpleNamespace(remote=remote))
    return ServeBackend(handle, ServeConfig(request_timeout_seconds=0.01))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (BackPressureError(num_queued_requests=9, max_queued_requests=8), Overloaded),
        (RayActorError(), Unavailable),
    ],
)
def test_failures_of_the_handle_are_told_apart(failure: Exception, expected: type[Exception]) -> None:
    async def fail() -> Versions:
        raise failure

    with pytest.raises(expected):
        asyncio.run(backend_whose_handle(fail).versions())


def test_a_late_answer_is_unavailable() -> None:
    async def wait() -> Versions:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(Unavailable, match=r"0\.01 s"):
        asyncio.run(backend_whose_handle(wait).versions())


def test_requests_that_wait_go_in_one_call_and_those_with_new_items_by_themselves() -> None:
    calls: list[list[str]] = []

    async def all_of(queries: list[Query]) -> list[str]:
        calls.append([query.history[0] for query in queries])
        await asyncio.sleep(0)
        return [query.history[0] for query in queries]

    async def one(query: Query) -> str:
        return (await all_of([query]))[0]

    async def case() -> list[Any]:
        handle = SimpleNamespace(recommend=SimpleNamespace(remote=one), recommend_all=SimpleNamespace(remote=all_of))
        backend = ServeBackend(handle, ServeConfig(max_batch_size=4))  # type: ignore[arg-type]
        queries = [Query([name]) for name in "abcdefg"]
        queries[1] = Query(["b"], new_items={"b": NewItem({})})
        return await asyncio.gather(*map(backend.recommend, queries))

    assert asyncio.run(case()) == list("abcdefg")
    assert sorted(calls) == [
        ["a"],
        ["b"],
        ["c"],
        ["d", "e", "f", "g"],
    ]  # two calls are under way, and that of new items


def test_every_resource_number_comes_from_the_config() -> None:
    config = ServeConfig(
        num_replicas=3,
        cpus_per_replica=1.5,
        gpus_per_replica=0.5,
        num_ingress_replicas=2,
        cpus_per_ingress=0.25,
        max_ongoing_requests=64,
        max_queued_requests=20,
        retry_after_seconds=7,
    )
    ingress = bind(FakeSource(FakeRecommender()), config)._bound_deployment
    recommender = ingress.init_args[0]._bound_deployment
    assert (recommender.num_replicas, recommender.max_ongoing_requests, recommender.max_queued_requests) == (3, 64, 20)
    assert recommender.ray_actor_options == {"num_cpus": 1.5, "num_gpus": 0.5}
    assert (ingress.num_replicas, ingress.ray_actor_options["num_cpus"]) == (2, 0.25)
    assert config.max_in_flight == 3 * 32 + 20  # two calls for each of three replicas, from two HTTP replicas
    assert ingress.max_ongoing_requests == 3 * 32 + 2 * 20
    for deployment in (ingress, recommender):
        assert deployment.backpressure_config.retry_after_s == 7


def test_the_number_of_replicas_may_follow_the_load() -> None:
    config = ServeConfig(min_replicas=0, max_replicas=4, target_ongoing_requests=8, log_format="json")
    ingress = bind(FakeSource(FakeRecommender()), config)._bound_deployment
    recommender = ingress.init_args[0]._bound_deployment
    scaling = recommender._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (0, 4, 8)
    assert ingress.max_ongoing_requests == 4 * 256 + 2 * 512
    assert recommender._deployment_config.logging_config["encoding"] == "JSON"


def test_each_shard_is_a_deployment_of_its_own() -> None:
    config = ServeConfig(num_retrieval_replicas=2, retrieval_shards=3)
    ingress = bind(FakeSource(FakeRecommender()), config)._bound_deployment
    recommender, _, *shards = ingress.init_args
    assert list(recommender._bound_deployment.init_args[2:]) == shards
    assert [shard._bound_deployment.name for shard in shards] == ["Retrieval0", "Retrieval1", "Retrieval2"]
    assert [shard._bound_deployment.init_args[2] for shard in shards] == [0, 1, 2]


def test_retrieval_may_have_replicas_of_its_own() -> None:
    config = ServeConfig(num_retrieval_replicas=2, cpus_per_retrieval=0.75)
    ingress = bind(FakeSource(FakeRecommender()), config)._bound_deployment
    recommender, _, retrieval = ingress.init_args
    assert recommender._bound_deployment.init_args[2] is retrieval
    assert retrieval._bound_deployment.num_replicas == 2
    assert retrieval._bound_deployment.ray_actor_options == {"num_cpus": 0.75}


class FakeShard:
    """A part of an index version, which finds its rows with the scores they are told."""

    def __init__(self, name: str, rows: list[int], scores: list[float], asked: list[tuple[Any, ...]]) -> None:
        self.name, self.rows, self.scores, self.asked = name, rows, scores, asked

    def search(self, vectors: Any, k: int, filters: Any, of_content: bool, barred: Any) -> Any:
        self.asked.append((self.name, len(vectors), k, dict(filters), of_content))
        row = np.ones((len(vectors), 1), np.float32)
        return row * np.array(self.scores, np.float32)[None, :k], np.int64(row) * np.array(self.rows)[None, :k]


class SearchingRecommender(FakeRecommender):
    """Ranks by the search it is given."""

    def rank(self, queries: list[Query], vectors: Any, search: Any = None) -> list[Answer]:
        scores, rows = search(vectors, queries[0].k, queries[0].filters, False, np.zeros(0, np.int64))
        self.batches.append(len(queries))
        return [self._of(s, r) for s, r in zip(scores.tolist(), rows.tolist(), strict=True)]

    def near(self, vector: Any, query: Query, of_content: bool = False, search: Any = None) -> Answer:
        scores, rows = search(vector[None], query.k, query.filters, of_content, np.zeros(0, np.int64))
        return self._of(scores[0].tolist(), rows[0].tolist())

    def _of(self, scores: list[float], rows: list[int]) -> Answer:
        found = [(f"i{row}", score) for row, score in zip(rows, scores, strict=True)]
        return Answer(found, COSINE, self.model_version, self.index_version)


class Handle:
    """What a replica sees of another one's deployment, in this process; `trouble` is raised in place of an answer."""

    def __init__(self, replica: RetrievalReplica) -> None:
        self.replica, self.trouble = replica, None
        self.search = SimpleNamespace(remote=self._search)

    async def _search(self, *args: Any) -> Any:
        if self.trouble is not None:
            raise self.trouble
        return await self.replica.search(*args)

    def broadcast(self, method: str, *args: Any) -> Any:
        async def results_async(**_: Any) -> list[Any]:
            return [RayActorError() if self.trouble else await getattr(self.replica, method)(*args)]

        return SimpleNamespace(results_async=results_async)


class Apart:
    """A replica with the model, two that each search a half of the index for it, and what is published for all."""

    def __init__(self, config: ServeConfig) -> None:
        self.version, self.damaged, self.asked = "index-1", set[str](), list[tuple[Any, ...]]()
        apart = self

        class Source(FakeSource):
            def wanted(self) -> dict[str, Any]:
                return {"model_fingerprint": "model-1", "version": apart.version}

            def load(self, manifest: Any) -> Any:
                made = SearchingRecommender()
                made.index_version = manifest["version"]
                return made

            def load_shard(self, versions: Versions, number: int, shards: int) -> Any:
                assert shards == 2
                if versions.index_version in apart.damaged:
                    raise ArtifactError("a part is damaged")
                name, half = f"{versions.index_version}/{number}", [[0, 1], [2, 3]][number]
                return FakeShard(name, half, [[0.9, 0.3], [0.5, 0.3]][number], apart.asked)

        self.handles = [Handle(RetrievalReplica(Source(None), config, number)) for number in range(2)]
        self.replica = RecommenderReplica(Source(None), config, *self.handles)  # type: ignore[arg-type]


@pytest.fixture
def apart_as(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    sharded = {"poll_seconds": 0, "num_retrieval_replicas": 1, "retrieval_shards": 2}
    return lambda **config: Apart(ServeConfig(**sharded, **config))


def test_shards_are_asked_side_by_side_and_merged(apart_as: Any) -> None:
    """Of equal scores the lower row comes first, as in one index."""
    apart = apart_as()
    first, second = asyncio.run(apart.replica.answer_all([Query(["a"], 3), Query(["b"], 3)]))
    assert [item_id for item_id, _ in first.items] == ["i0", "i2", "i1"]
    assert (second.items, first.missing_shards) == (first.items, None)
    assert sorted(apart.asked) == [(f"index-1/{number}", 2, 3, {}, False) for number in (0, 1)]
    apart.asked.clear()
    found = asyncio.run(apart.replica.search("lamp", None, Query([], 2, filters={"brand": ["Acme"]})))
    assert [item_id for item_id, _ in found.items] == ["i0", "i2"]
    assert sorted(apart.asked) == [(f"index-1/{number}", 1, 2, {"brand": ["Acme"]}, True) for number in (0, 1)]


def test_a_batch_is_searched_in_the_version_that_it_was_encoded_for(apart_as: Any) -> None:
    """Whatever a shard has loaded beside it."""
    apart = apart_as()

    async def answered() -> tuple[str, set[str]]:
        apart.asked.clear()
        (answer,) = await apart.replica.answer_all([Query(["a"])])
        return answer.index_version, {name.partition("/")[0] for name, *_ in apart.asked}

    async def swap() -> None:
        await answered()
        apart.version = "index-2"
        await apart.handles[0].replica.hold(Versions("model-1", "index-2"))
        assert await answered() == ("index-1", {"index-1"})
        assert (await apart.replica.reload()).outcome == "swapped"
        assert await answered() == ("index-2", {"index-2"})

    asyncio.run(swap())


def test_all_shards_load_a_version_before_it_is_used(apart_as: Any) -> None:
    apart, second = apart_as(), Versions("model-1", "index-2")

    async def swap() -> Change:
        await apart.replica.answer_all([Query(["a"])])
        return await apart.replica.reload()

    apart.version, apart.damaged = "index-2", {"index-2"}
    change = asyncio.run(swap())
    assert (change.outcome, change.state["index_version"]) == ("refused", "index-1")
    assert change.state["refused"] == "shard 0 of the index cannot load it: a part is damaged"
    apart.damaged.clear()
    apart.handles[1].trouble = RayActorError()  # it loads the version when it is asked
    assert asyncio.run(swap()).outcome == "swapped"
    assert [handle.replica._held.get(second) is not None for handle in apart.handles] == [True, False]
    apart.handles[1].trouble = None
    asyncio.run(apart.replica.answer_all([Query(["a"])]))
    assert apart.handles[1].replica._held.get(second) is not None


def test_a_shard_that_gives_no_answer_is_said_or_refused(apart_as: Any) -> None:
    for trouble in (RayActorError(), BackPressureError(num_queued_requests=9, max_queued_requests=8), TimeoutError()):
        apart = apart_as(missing_shard="answer")
        apart.handles[1].trouble = trouble
        (answer,) = asyncio.run(apart.replica.answer_all([Query(["a"], 3)]))
        assert (answer.missing_shards, [item_id for item_id, _ in answer.items]) == ([1], ["i0", "i1"])
        assert asyncio.run(apart.replica.similar("a", Query([], 3))).missing_shards == [1]
        assert b'pixrec_shard_misses_total{shard="1"} 2.0' in asyncio.run(apart.replica.metrics())[1].encode()
        refusing = apart_as()
        refusing.handles[1].trouble = trouble
        refusals = asyncio.run(refusing.replica.answer_all([Query(["a"], 3), Query(["b"], 3)]))
        assert refusals == [Incomplete("shard 1 of 2 of the index gives no answer")] * 2
        assert asyncio.run(refusing.replica.similar("a", Query([], 3))) == refusals[0]
        apart.handles[0].trouble = trouble
        refusals = asyncio.run(apart.replica.answer_all([Query(["a"], 3)]))
        assert refusals == [Incomplete("shard 0, 1 of 2 of the index gives no answer")], (
            "nothing is left to answer from"
        )


def test_that_a_shard_is_lost_is_logged_once(apart_as: Any, caplog: pytest.LogCaptureFixture) -> None:
    apart = apart_as(missing_shard="answer")
    with caplog.at_level("WARNING", "ray.serve.pixrec"):
        for trouble in (None, TimeoutError(), TimeoutError(), None, None):
            apart.handles[1].trouble = trouble
            asyncio.run(apart.replica.answer_all([Query(["a"], 3)]))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["shard 1 of the index gives no answer: TimeoutError", "shard 1 of the index answers again"]


def test_a_shard_that_is_late_gives_no_answer(apart_as: Any) -> None:
    apart = apart_as(missing_shard="answer", shard_timeout_seconds=0.5)

    async def wait(*_: Any) -> None:
        await asyncio.Event().wait()

    apart.handles[0].search.remote = wait
    (answer,) = asyncio.run(apart.replica.answer_all([Query(["a"], 3)]))
    assert answer.missing_shards == [0]


def test_an_incomplete_answer_is_unavailable_to_the_caller() -> None:
    async def incomplete() -> Incomplete:
        return Incomplete("shard 1 of 2 of the index gives no answer")

    with pytest.raises(Unavailable, match="shard 1 of 2 of the index gives no answer; try again"):
        asyncio.run(backend_whose_handle(incomplete).versions())


def test_vectors_in_the_order_asked_for(replica: RecommenderReplica) -> None:
    wanted = ToEmbed(["lamp"], [], ["ghost", "a"], [])
    found = asyncio.run(replica.embed(wanted))
    assert found == Vectors([[0.75, 0.75]], [], [None, [0.25, 0.25]], [], "model-1", "index-1")
    refusal = asyncio.run(replica.embed(ToEmbed(images=[b"?"])))
    assert refusal == Refusal("images_base64", "unreadable picture: not a picture")


def test_caps_by_a_field_that_is_none_are_refused(replica: RecommenderReplica) -> None:
    refusal = asyncio.run(replica.recommend(Query([], 3, max_per={"colour": 1})))
    assert refusal == Refusal("max_per", "'colour' is no field of this catalog to count by; known: brand")


def test_pins_of_a_replica(replica: RecommenderReplica) -> None:
    change = asyncio.run(replica.pin("index-1"))
    assert change is not None
    assert (change.outcome, change.state["index_version"], change.state["recall"]) == (
        "unchanged",
        "index-1",
        {"recall@10": 0.98},
    )
    assert asyncio.run(replica.rollback()) is None


class Everywhere:
    """A handle whose replicas answer `answers` each."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def broadcast(self, method: str) -> Any:
        async def results_async(**_: Any) -> list[Any]:
            if isinstance(self._answers[method], Exception):
                raise self._answers[method]
            return self._answers[method]

        return SimpleNamespace(results_async=results_async)


def test_a_reload_reaches_every_replica_and_passes_over_the_dead() -> None:
    swapped = Change("swapped", {})
    recommender = Everywhere(reload=[swapped, RayActorError(), swapped])
    backend = ServeBackend(recommender, ServeConfig())  # type: ignore[arg-type]
    assert asyncio.run(backend.reload()) == [swapped, swapped]
    for trouble in (TimeoutError(), RayActorError(), [RayActorError()]):
        with pytest.raises(Unavailable):
            asyncio.run(ServeBackend(Everywhere(reload=trouble), ServeConfig()).reload())  # type: ignore[arg-type]


def test_the_metrics_of_all_replicas_are_one_page() -> None:
    answers = [
        ({"replica": "r1"}, "# TYPE a gauge\na 1\n"),
        RayActorError(),
        ({"replica": "r2"}, "# TYPE a gauge\na 2\n"),
    ]
    backend = ServeBackend(Everywhere(metrics=answers), ServeConfig())  # type: ignore[arg-type]
    text = asyncio.run(backend.metrics())
    assert 'a{replica="r1"} 1.0' in text
    assert 'a{replica="r2"} 2.0' in text
    assert 'pixrec_requests_in_flight{deployment="none",replica="none"} 0.0' in text
