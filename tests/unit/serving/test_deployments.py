"""The two deployments as plain classes: what the replica computes and refuses, what the backend makes of failures."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from pixrec.config import ServeConfig
from pixrec.data.items import ItemTable
from pixrec.errors import InputError, UnreadableImage
from pixrec.query import COSINE, PURCHASE_SHARE, Answer, NewItem, Query
from pixrec.serving.backend import Overloaded, Refusal, Unavailable, Versions
from pixrec.serving.deployments import RecommenderReplica, ServeBackend, bind


def answer_of(item_id: str, score: float) -> Answer:
    return Answer([(item_id, score)], COSINE, "model-1", "index-1")


FALLBACK = Answer([("b", 0.1)], PURCHASE_SHARE, "model-1", "index-1", fallback=True)


class FakeRecommender:
    model_version, index_version = "model-1", "index-1"

    def __init__(self) -> None:
        self.items = ItemTable(pa.table({"item_id": ["a", "b"], "brand": ["Acme", None], "image": [b"jpeg", None]}))
        self.batches: list[int] = []
        self.encoded: list[tuple[str, Any, Any]] = []
        self.threads: set[str] = set()

    def encode_new(self, new_items: Any) -> dict[str, Any]:
        for item_id, item in new_items.items():
            if item.image is not None:
                raise InputError(f"item {item_id!r}: not a picture")
            self.encoded.append((item_id, item.fields, item.image))
        return {item_id: [1.0] for item_id in new_items}

    def answer(self, queries: list[Query]) -> list[Answer]:
        self.batches.append(len(queries))
        self.threads.add(threading.current_thread().name)
        return [answer_of("b", 0.5) if query.history else FALLBACK for query in queries]

    def similar(self, item_id: str, k: int, filters: Any) -> Answer:
        return answer_of("b", 0.25)

    def search(self, text: str, image: bytes | None, k: int, filters: Any) -> Answer:
        if image is not None:
            raise UnreadableImage("not a picture")
        return answer_of("a", 0.75)


@pytest.fixture
def recommender() -> FakeRecommender:
    return FakeRecommender()


@pytest.fixture
def replica(recommender: FakeRecommender, monkeypatch: pytest.MonkeyPatch) -> RecommenderReplica:
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    return RecommenderReplica(lambda: recommender, ServeConfig())  # type: ignore[arg-type, return-value]


def test_a_batch_is_one_call_off_the_event_loop(replica: RecommenderReplica, recommender: FakeRecommender) -> None:
    answers = asyncio.run(replica.answer_all([Query(["a"]), Query([]), Query(["b"], k=0)]))
    assert recommender.batches == [3]
    assert [answer.fallback for answer in answers] == [False, True, False]
    assert threading.current_thread().name not in recommender.threads


def test_a_bad_filter_is_refused_before_it_joins_a_batch(
    replica: RecommenderReplica, recommender: FakeRecommender
) -> None:
    colour = {"colour": ["red"]}
    for refusal in (
        asyncio.run(replica.recommend(Query([], 3, filters=colour))),
        asyncio.run(replica.similar("a", 3, colour)),
        asyncio.run(replica.search("x", None, 3, colour)),
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
    async def alone(query: Query) -> Answer:
        return (await replica.answer_all([query]))[0]

    replica._answer_together = alone
    ranking = asyncio.run(replica.recommend(Query(["n"], 3, new_items={"n": NewItem({"title": "lamp"})})))
    assert ranking == answer_of("b", 0.5)
    assert recommender.encoded == [("n", {"title": "lamp"}, None)]
    refusal = asyncio.run(replica.recommend(Query(["n"], 3, new_items={"n": NewItem({}, b"no picture")})))
    assert refusal == Refusal("new_items", "item 'n': not a picture")
    assert recommender.batches == [1]


def test_the_replica_answers_with_its_versions(replica: RecommenderReplica) -> None:
    assert asyncio.run(replica.versions()) == Versions("model-1", "index-1")
    assert asyncio.run(replica.similar("a", 3, {})) == answer_of("b", 0.25)
    assert asyncio.run(replica.search("x", None, 3, {"brand": ["Acme"]})) == answer_of("a", 0.75)
    refusal = asyncio.run(replica.search("", b"?", 3, {}))
    assert refusal == Refusal("image_base64", "unreadable picture: not a picture")


def test_what_the_catalog_lacks_is_none(replica: RecommenderReplica) -> None:
    assert asyncio.run(replica.fields("a")) == {"item_id": "a", "brand": "Acme"}
    assert asyncio.run(replica.image("a")) == b"jpeg"
    assert asyncio.run(replica.filters()) == {"brand": [("Acme", 1)]}
    missing = (replica.similar("ghost", 1, {}), replica.fields("ghost"), replica.image("ghost"), replica.image("b"))
    for answer in missing:
        assert asyncio.run(answer) is None


def backend_whose_handle(remote: Any) -> ServeBackend:
    handle = SimpleNamespace(versions=SimpleNamespace(remote=remote))
    return ServeBackend(handle, timeout_seconds=0.01)  # type: ignore[arg-type]


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
    ingress = bind(lambda: FakeRecommender(), config)._bound_deployment  # type: ignore[arg-type, return-value]
    recommender = ingress.init_args[0]._bound_deployment
    assert (recommender.num_replicas, recommender.max_ongoing_requests, recommender.max_queued_requests) == (3, 64, 20)
    assert recommender.ray_actor_options == {"num_cpus": 1.5, "num_gpus": 0.5}
    assert (ingress.num_replicas, ingress.ray_actor_options["num_cpus"]) == (2, 0.25)
    assert ingress.max_ongoing_requests == 3 * 64 + 20
    for deployment in (ingress, recommender):
        assert deployment.backpressure_config.retry_after_s == 7
