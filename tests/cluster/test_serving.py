"""The Serve application over a real, untrained model on s3://: the library's answers, in batches, over HTTP."""

from __future__ import annotations

import base64
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from fakes import tiny_dataset, write_prepared
from ray import serve

import pixrec
from pixrec import storage
from pixrec.artifact import index_version, new_model, save_model
from pixrec.config import Config, ModelConfig, ServeConfig, TinyConfig
from pixrec.data.items import ItemTable
from pixrec.data.synthetic import build_world, picture
from pixrec.model.catalog import Catalog
from pixrec.schema import PREPARED_ITEM_FIELDS
from pixrec.serving.app import APP_NAME, build_app

NUM_ITEMS, NUM_USERS = 30, 8
TINY = TinyConfig(hidden_width=16, num_layers=1, num_heads=2, vision_width=16, vision_layers=1, image_size_px=32)


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
    with index_version(made.index, facts["fingerprint"], vectors.shape[1], "float32", {"data": made.data}) as writer:
        writer.add(items.item_ids, vectors, [items.content_hash(row) for row in range(len(items))])
    return made


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

    def __call__(self, path: str, body: Any = None, data: bytes | None = None) -> tuple[int, Any]:
        sent = data if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", sent, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, kind, content = answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, kind, content = error.code, error.headers["Content-Type"], error.read()
        return status, json.loads(content) if kind == "application/json" else content


@pytest.fixture(scope="module")
def client(ray_session: Any, artifacts: Artifacts) -> Iterator[Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = ServeConfig(max_batch_size=8, cpus_per_replica=0.1, threads_per_replica=1, max_body_bytes=100_000)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
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
