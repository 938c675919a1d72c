"""The whole pipeline from s3:// to s3://, with credentials and endpoint from the usual variables only.

The tests build on each other, in the order of the file. Serving from s3:// is in test_serving.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TINY

import pixrec
from pixrec import cli, storage
from pixrec.artifact import list_versions, load_index, load_model
from pixrec.config import EmbedConfig, SyntheticConfig, dump_config
from pixrec.data.sequences import load_dataset
from pixrec.data.synthetic import build_world, write_catalog
from pixrec.model.catalog import Catalog

WORLD = SyntheticConfig(num_items=20, num_users=16, image_size_px=32)
CONFIG = dataclasses.replace(
    TINY,
    train=dataclasses.replace(TINY.train, epochs=1, max_steps=2, validate_every_steps=2),
    embed=EmbedConfig(batch_size=8, max_part_items=8, threads_per_actor=1),
)

Verb = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def shop(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prefix with the two tables and a configuration."""
    local, uri = tmp_path_factory.mktemp("shop"), f"{bucket}/shop"
    write_catalog(build_world(WORLD), str(local / "catalog"))
    storage.copy_folder(str(local / "catalog"), f"{uri}/catalog")
    storage.write_bytes(f"{uri}/config.yaml", dump_config(CONFIG).encode())
    return uri


@pytest.fixture
def verb(ray_session: None, shop: str, capfd: pytest.CaptureFixture[str]) -> Verb:
    def verb(name: str, *flags: str, **places: str) -> dict[str, Any]:
        capfd.readouterr()
        arguments = [*flags, *(f"--{option}={value}" for option, value in places.items())]
        assert cli.main([name, *arguments, f"--config={shop}/config.yaml"]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out.splitlines()[-1])

    return verb


def test_prepare(verb: Verb, shop: str):
    tables = {name: f"{shop}/catalog/{name}.parquet" for name in ("items", "interactions")}
    assert verb("prepare", **tables, out=f"{shop}/data")["images"]["ok"] == WORLD.num_items


def test_train(verb: Verb, shop: str):
    summary = verb("train", data=f"{shop}/data", out=f"{shop}/model")
    assert load_model(f"{shop}/model").fingerprint == summary["fingerprint"]


def test_embed(verb: Verb, shop: str, tmp_path: Path):
    places = {name: f"{shop}/{name}" for name in ("model", "data")}
    summary = verb("embed", **places, out=f"{shop}/index")
    assert (summary["rows"], summary["computed"]) == (WORLD.num_items, WORLD.num_items)
    again = verb("embed", **places, out=f"{shop}/index")
    assert (again["reused"], again["computed"]) == (WORLD.num_items, 0)
    assert [v["version"] for v in list_versions(f"{shop}/index")] == [summary["version"], again["version"]]
    left = {file.removeprefix(f"{shop}/index/").split("/")[0] for file in storage.list_files(f"{shop}/index")}
    assert left == {"CURRENT", "versions"}
    assert storage.list_folders(f"{shop}/index/versions") == [summary["version"], again["version"]]

    items, index, model = load_dataset(f"{shop}/data").items, load_index(f"{shop}/index"), load_model(f"{shop}/model")
    rows = np.array([items.row_of[item] for item in index.item_ids])
    np.testing.assert_allclose(index.vectors, model.embedder().items(Catalog(items, model.encoder), rows), atol=1e-5)

    local = verb("embed", **places, out=str(tmp_path / "index"))
    assert local["rows"] == WORLD.num_items, "from s3:// to a local folder"


def test_versions(verb: Verb, shop: str):
    first, second = (version["version"] for version in verb("embed", "--list", out=f"{shop}/index")["versions"])
    assert load_index(f"{shop}/index").version == second
    storage.write_bytes(f"{shop}/index/CURRENT", first.encode())
    assert cli.main(["embed", f"--out={shop}/index", f"--rollback={second}", "--keep=1"]) == 0
    assert [v["version"] for v in list_versions(f"{shop}/index")] == [second]
    assert load_index(f"{shop}/index").version == second


def test_evaluate(verb: Verb, shop: str):
    places = {name: f"{shop}/{name}" for name in ("model", "data", "index")}
    summary = verb("evaluate", **places, out=f"{shop}/report")
    assert storage.read_json(f"{shop}/report/metrics.json")["results"] == summary["results"]


def test_recommend_and_what_a_server_holds(verb: Verb, shop: str):
    items = load_dataset(f"{shop}/data").items
    answer = verb("recommend", model=f"{shop}/model", index=f"{shop}/index", history=",".join(items.item_ids[:3]))
    recommender = pixrec.load_recommender(f"{shop}/model", f"{shop}/index")  # as each replica of the server does
    expected = recommender.recommend(items.item_ids[:3], 10)
    assert [item["item_id"] for item in answer["items"]] == [item_id for item_id, _ in expected]
    assert len(expected) == 10
