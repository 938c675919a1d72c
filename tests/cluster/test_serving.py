"""The Serve application over a real, untrained model on s3://: the library's answers, in batches, over HTTP."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import ray
from collector import Collector
from fakes import tiny_dataset, write_prepared
from ray import serve

import pixrec
from pixrec import storage
from pixrec.artifact import index_version, list_versions, new_model, pin_version, save_model
from pixrec.config import Config, ModelConfig, ServeConfig, TinyConfig
from pixrec.data.items import ItemTable
from pixrec.data.synthetic import build_world, picture
from pixrec.model.catalog import Catalog
from pixrec.schema import PREPARED_ITEM_FIELDS
from pixrec.serving.app import APP_NAME, build_app
from pixrec.serving.traces import tracing

NUM_ITEMS, NUM_USERS = 30, 8
TINY = TinyConfig(hidden_width=16, num_layers=1, num_heads=2, vision_width=16, vision_layers=1, image_size_px=32)


SMALL: dict[str, Any] = {
    "max_batch_size": 8,
    "cpus_per_replica": 0.1,
    "threads_per_replica": 1,
    "max_body_bytes": 100_000,
    "admin_key": "boss",
}


class Artifacts(NamedTuple):
    model: str
    index: str
    data: str


@pytest.fixture(scope="module")
def artifacts(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    local = str(tmp_path_factory.mktemp("serving"))
    made = Artifacts(*(storage.join(bucket, "serving", name) for name in Artifacts._fields))
    config = Config(model=ModelConfig(embedding_width=16, tiny=TINY))
    items = write_data(made.data, config)
    model = new_model(config, [items.text(row) for row in range(len(items))])
    facts = save_model(local, model, {})
    storage.copy_folder(local, made.model)
    vectors = model.embedder().items(Catalog(items, model.encoder), np.arange(len(items)))
    publish(made, facts["fingerprint"], items, vectors)
    return made


def publish(place: Artifacts, fingerprint: str, items: ItemTable, vectors: np.ndarray) -> str:
    """A new version of the index; returns its name."""
    with index_version(place.index, fingerprint, vectors.shape[1], "float32", {"data": place.data}) as writer:
        writer.add(items.item_ids, vectors, [items.content_hash(row) for row in range(len(items))])
    return str(writer.manifest["version"])


def write_data(uri: str, config: Config) -> ItemTable:
    """A prepared data set of drawn pictures: item `i`'s id is `item/i`, user `u` bought items u, u+1 and u+2."""
    world = build_world(config.demo)
    ids = [f"item/{row}" for row in range(NUM_ITEMS)]
    columns: dict[str, list[Any]] = {name: [None] * NUM_ITEMS for name, _ in PREPARED_ITEM_FIELDS}
    columns |= {
        "item_id": ids,
        "title": [f"Lamp {row}" for row in range(NUM_ITEMS)],
        "image_status": ["ok"] * NUM_ITEMS,
    }
    columns |= {"image_status": ["ok"] * NUM_ITEMS, "brand": ["Øre", "Acme"] * (NUM_ITEMS // 2)}
    columns |= {"image": [picture(world, row) for row in range(NUM_ITEMS)]}
    items = ItemTable(pa.table(columns, schema=pa.schema(PREPARED_ITEM_FIELDS)))
    write_prepared(uri, tiny_dataset(items, num_users=NUM_USERS, num_events=3))
    return items


class Client:
    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(
        self, path: str, body: Any = None, data: bytes | None = None, method: str | None = None, **further: str
    ) -> tuple[int, Any]:
        sent = data if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "X-API-Key": "boss", **further}
        request = urllib.request.Request(f"{self._url}{path}", sent, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, kind, content = answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, kind, content = error.code, error.headers["Content-Type"], error.read()
        return status, json.loads(content) if kind == "application/json" else content


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store") / "live.sqlite")


@pytest.fixture(scope="module")
def client(ray_session: Any, artifacts: Artifacts, store: str) -> Iterator[Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = ServeConfig(poll_seconds=0, num_replicas=2, store=store, **SMALL)
    http = {"host": "127.0.0.1", "port": port}
    serve.start(http_options=http, proxy_location="HeadOnly", tracing_config=tracing(1.0))
    try:
        serve.run(build_app(*artifacts, Config(serve=small)), name=APP_NAME, route_prefix="/")
        yield Client(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def recommender(artifacts: Artifacts) -> Any:
    return pixrec.load_recommender(*artifacts)


def test_answers_are_the_librarys_also_in_a_batch(client: Client, recommender: Any) -> None:
    histories = [[f"item/{start}", f"item/{start + 1}", "ghost"] for start in range(24)]

    def ask(history: list[str]) -> tuple[int, Any]:
        return client("/v1/recommend", {"history": history, "k": 5})

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, histories))
    for history, (status, answer) in zip(histories, answers, strict=True):
        assert status == 200
        assert answer["unknown_items"] == ["ghost"]
        assert (answer["model_version"], answer["index_version"]) == (
            recommender.model_version,
            recommender.index_version,
        )
        expected = recommender.recommend(history, 5)
        assert [item["item_id"] for item in answer["items"]] == [item_id for item_id, _ in expected]
        assert [item["score"] for item in answer["items"]] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_every_route_answers(client: Client, recommender: Any) -> None:
    image = recommender.items.image(3)
    status, found = client("/v1/search", {"text": "Lamp 3", "image_base64": base64.b64encode(image).decode(), "k": 4})
    assert (status, len(found["items"])) == (200, 4)
    assert client("/v1/similar", {"item_id": "item/3", "filters": {"brand": ["Øre"]}, "k": 100})[1]["items"]
    assert client("/v1/items/item%2F3")[1]["title"] == "Lamp 3"
    assert client("/v1/items/item/3/image") == (200, image)
    brands = client("/v1/filters")[1]["filters"]["brand"]
    assert sorted((brand["value"], brand["items"]) for brand in brands) == [("Acme", 15), ("Øre", 15)]
    assert client("/healthz")[1]["status"] == "ok"
    assert client("/version")[1]["index_version"] == recommender.index_version
    assert b"<title>PixRec</title>" in client("/")[1]


def test_a_request_is_traced_to_the_replica_as_part_of_the_callers_trace(client: Client, collector: Collector) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    assert client("/v1/recommend", {"history": ["item/1"]}, traceparent=f"00-{trace}-b7ad6b7169203331-01")[0] == 200
    parts = ["POST /v1/recommend", "route_to_replica Recommender", "replica_handle_request Recommender"]
    said = collector.wait_for(trace, parts)
    assert [part for part in parts if part not in said] == [], said


def test_refusals_reach_the_client_as_they_are(client: Client) -> None:
    bad_picture = base64.b64encode(b"not a picture").decode()
    for status, path, body in [
        (422, "/v1/recommend", {"history": [], "filters": {"colour": ["red"]}}),
        (422, "/v1/recommend", {"history": [], "k": 0}),
        (422, "/v1/search", {"image_base64": bad_picture}),
        (404, "/v1/similar", {"item_id": "ghost"}),
        (404, "/v1/items/ghost", None),
    ]:
        assert client(path, body)[0] == status
    assert client("/v1/recommend", data=b" " * 500_000)[0] == 413
    status, popular = client("/v1/recommend", {"history": [], "k": 200, "filters": {"brand": ["Øre"]}})
    assert (status, popular["fallback"], len(popular["items"])) == (200, True, NUM_ITEMS // 2)


class Load:
    """Shoppers who ask one request after the other until the block ends; `answers` holds all of theirs."""

    def __init__(self, client: Client, shoppers: int = 4) -> None:
        self._client, self._shoppers = client, shoppers
        self._stop = threading.Event()
        self.answers: list[tuple[int, Any]] = []

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._shoppers)
        self._asking = [self._pool.submit(self._ask) for _ in range(self._shoppers)]
        return self

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.answers.append(self._client("/v1/recommend", {"history": ["item/1", "item/2"], "k": 3}))

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for shopper in self._asking:
            shopper.result()
        self._pool.shutdown()


def post(client: Client, path: str, body: Any = None) -> tuple[int, Any]:
    return client(path, body, data=b"")


def test_versions_change_under_load(client: Client, artifacts: Artifacts, recommender: Any) -> None:
    """A new index is served after one call, one of another model never, and one call goes back."""
    first, model = recommender.index_version, recommender.model_version
    items, vectors = recommender.items, recommender.item_vectors(list(recommender.items.item_ids))
    with Load(client) as load:
        second = publish(artifacts, model, items, vectors[::-1].copy())
        status, changed = post(client, "/admin/reload")
        assert (status, [change["outcome"] for change in changed["replicas"]]) == (200, ["swapped"] * 2)
        assert client("/v1/recommend", {"history": ["item/1"]})[1]["index_version"] == second
        foreign = publish(artifacts, "f" * 32, items, vectors)
        status, refused = post(client, "/admin/reload")
        assert (status, "was made by model ffffffff" in refused["detail"]) == (409, True)
        state = client("/readyz")[1]
        assert (state["index_version"], "ffffffff" in state["refused"]) == (second, True)
        assert b"pixrec_version_refused" in client("/metrics")[1]
        assert post(client, "/admin/pin", {"index_version": foreign})[0] == 409
        assert post(client, "/admin/rollback")[0] == 200
        assert client("/version")[1]["index_version"] == first
    assert {status for status, _ in load.answers} == {200}
    assert {answer["model_version"] for _, answer in load.answers} == {model}
    best = {first: set[str](), second: set[str]()}
    for _, answer in load.answers:
        best[answer["index_version"]].add(answer["items"][0]["item_id"])
    assert [len(found) for found in best.values()] == [1, 1], "each version has its own answer"
    assert best[first] != best[second]
    assert post(client, "/admin/pin", {"index_version": second})[0] == 200


def test_an_added_item_is_found_by_every_replica_and_a_hidden_one_by_none(client: Client, recommender: Any) -> None:
    """Whichever of the two replicas answers."""
    lamp = {"title": "Lamp 77", "brand": "New", "image_base64": base64.b64encode(recommender.items.image(3)).decode()}
    assert client("/v1/items", {"items": [{"item_id": "new/1", **lamp}, {"item_id": "item/9", **lamp}]})[0] == 200
    only_new = {"history": ["item/1"], "filters": {"brand": ["New"]}}
    for _ in range(10):
        found = client("/v1/recommend", only_new)[1]["items"]
        assert {item["item_id"] for item in found} == {"new/1", "item/9"}
    assert client("/v1/recommend", {"history": ["new/1"]})[1]["unknown_items"] == []
    assert client("/v1/similar", {"item_id": "new/1", "k": 1})[1]["items"][0]["item_id"] == "item/9"
    assert client("/v1/items/new%2F1")[1]["title"] == "Lamp 77"
    assert client("/v1/items/item%2F9", method="DELETE")[0] == 200
    for _ in range(10):
        assert [item["item_id"] for item in client("/v1/recommend", only_new)[1]["items"]] == ["new/1"]
    assert client("/v1/items/item%2F9", {"fields": {"brand": "Acme"}}, method="PATCH")[0] == 422
    assert client("/v1/items/item%2F9", {"fields": {"price": 3.0}, "hidden": False}, method="PATCH")[0] == 200
    assert len(client("/v1/recommend", only_new)[1]["items"]) == 2


def test_retrieval_apart_gives_the_same_answers(client: Client, artifacts: Artifacts, store: str) -> None:
    """The application is deployed anew, with replicas that only rank, and follows what is published by itself."""
    asked = [
        ("/v1/recommend", {"history": ["item/1", "ghost"], "k": 4, "reasons": True, "max_per": {"brand": 1}}),
        ("/v1/similar", {"item_id": "item/3", "k": 4, "diversity": 0.5}),
        ("/v1/search", {"text": "Lamp 3", "k": 4, "filters": {"brand": ["Acme"]}}),
        ("/v1/recommend", {"history": ["new/1"], "filters": {"brand": ["New"]}}),
    ]
    before = [client(path, body) for path, body in asked]
    apart = ServeConfig(num_retrieval_replicas=1, cpus_per_retrieval=0.1, poll_seconds=0.2, store=store, **SMALL)
    serve.run(build_app(*artifacts, Config(serve=apart)), name=APP_NAME, route_prefix="/")
    assert [client(path, body) for path, body in asked] == before
    vectors = client("/v1/embed", {"item_ids": ["item/3", "ghost"], "histories": [["item/3"]], "texts": ["Lamp 3"]})[1]
    assert [len(vectors["texts"][0]), vectors["item_ids"][1]] == [16, None]
    told = client("/metrics")[1].decode()
    for deployment in ("Ingress", "Recommender", "Retrieval"):
        assert f'deployment="{deployment}"' in told
    served = client("/version")[1]["index_version"]
    earlier = min(version["version"] for version in list_versions(artifacts.index))
    assert served != earlier
    pin_version(artifacts.index, earlier)
    with Load(client, 2) as load:
        deadline = time.monotonic() + 30
        while client("/version")[1]["index_version"] != earlier:
            assert time.monotonic() < deadline
    assert {status for status, _ in load.answers} == {200}
    assert {answer["index_version"] for _, answer in load.answers} <= {served, earlier}


def kill_replica_of(deployment: str) -> None:
    (name,) = (
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"SERVE_REPLICA::{APP_NAME}#{deployment}#")
    )
    ray.kill(ray.get_actor(name, namespace="serve"))


def until(client: Client, body: Any, wanted: Callable[[Any], bool]) -> tuple[int, Any]:
    """Ask until an answer is as wanted."""
    deadline = time.monotonic() + 60
    while True:
        status, answer = client("/v1/recommend", body)
        if wanted(answer):
            return status, answer
        assert time.monotonic() < deadline, answer


def test_two_shards_answer_as_one_and_one_may_die(client: Client, artifacts: Artifacts, store: str) -> None:
    asked = [
        ("/v1/recommend", {"history": ["item/1", "ghost"], "k": 4, "reasons": True, "max_per": {"brand": 1}}),
        ("/v1/recommend", {"history": ["item/1"], "k": 30, "exclude": ["item/9"]}),
        ("/v1/recommend", {"history": []}),
        ("/v1/similar", {"item_id": "item/3", "k": 4, "diversity": 0.5}),
        ("/v1/search", {"text": "Lamp 3", "k": 4, "filters": {"brand": ["Acme"]}}),
    ]
    before = [client(path, body) for path, body in asked]
    sharded: dict[str, Any] = {"num_retrieval_replicas": 1, "retrieval_shards": 2, "cpus_per_retrieval": 0.1}
    sharded |= {"missing_shard": "answer", "poll_seconds": 0, "shard_timeout_seconds": 1.0, "store": store}
    serve.run(build_app(*artifacts, Config(serve=ServeConfig(**sharded, **SMALL))), name=APP_NAME, route_prefix="/")
    assert [client(path, body) for path, body in asked] == before
    everything = {"history": ["item/1"], "k": 30, "exclude_history": False}
    kill_replica_of("Retrieval1")
    status, partial = until(client, everything, lambda answer: "missing_shards" in answer)
    of_catalog = [item for item in partial["items"] if item["item_id"].startswith("item/")]
    assert (status, partial["missing_shards"], len(of_catalog)) == (200, [1], NUM_ITEMS // 2)
    until(client, everything, lambda answer: "items" in answer and "missing_shards" not in answer)
    assert [client(path, body) for path, body in asked] == before
