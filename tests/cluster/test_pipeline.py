"""The verbs one after the other, as people type them, on a synthetic catalog; and what they refuse without Ray.

The first tests build on each other, in the order of the file. They go from s3:// to s3://, with credentials and
endpoint from the usual variables only; local folders are what all other tests use. The driver trains: workers have
tests of their own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import ray
from fakes import TINY, tiny_dataset, tiny_items, tiny_model, write_model, write_prepared
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pixrec
from pixrec import cli, storage
from pixrec.artifact import Index, knockout_uri, list_versions, load_index, load_model
from pixrec.cluster import embed as embedding
from pixrec.cluster.embed import embed
from pixrec.config import EmbedConfig, SyntheticConfig, dump_config
from pixrec.data.items import ItemTable
from pixrec.data.sequences import load_dataset
from pixrec.data.synthetic import build_world, write_catalog
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import AddedItem, EmbeddedVectors, Event
from pixrec.model.catalog import Catalog
from pixrec.schema import EMBEDDING, ITEM_ID, PREPARED_ITEM_FIELDS
from pixrec.training.tracking import read_log

WORLD = SyntheticConfig(num_items=24, num_users=30, image_size_px=32)
STEPS = 4
CONFIG = dataclasses.replace(
    TINY,
    train=dataclasses.replace(
        TINY.train,
        num_workers=0,
        micro_batch_histories=2,
        histories_per_step=8,
        epochs=10,
        max_steps=STEPS,
        validate_every_steps=2,
        knockouts=("text",),
    ),
    embed=EmbedConfig(batch_size=7, threads_per_actor=1),
)
MODEL_FILES = {"config.yaml", "heads.safetensors", "model.json", "backbone", "processor"}
CI_METRICS = {"recall@1", "recall@10", "ndcg@10", "mrr"}

Verb = Callable[..., dict[str, Any]]


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """What the last line of stdout says."""
        return json.loads(self.out[-1])


def run(capture: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    capture.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    captured = capture.readouterr()
    return Ran(code, captured.out.splitlines(), captured.err)


@pytest.fixture(scope="module")
def place(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prefix with catalog/ and config.yaml, to which the verbs add data/, model/, index/ and report/."""
    local, uri = tmp_path_factory.mktemp("catalog"), f"{bucket}/pipeline"
    write_catalog(build_world(WORLD), str(local))
    storage.copy_folder(str(local), f"{uri}/catalog")
    storage.write_bytes(f"{uri}/config.yaml", dump_config(CONFIG).encode())
    return uri


@pytest.fixture
def verb(ray_session: None, place: str, capfd: pytest.CaptureFixture[str]) -> Verb:
    def verb(name: str, *flags: str, **places: str) -> dict[str, Any]:
        arguments = [*flags, *(f"--{option}={value}" for option, value in places.items())]
        ran = run(capfd, name, *arguments, "--config", f"{place}/config.yaml")
        assert ran.code == 0, ran.err
        assert len(ran.out) == 1
        return ran.summary

    return verb


def names(uri: str) -> set[str]:
    """What lies directly below, hidden things too."""
    fs, path = storage.locate(uri)
    return {PurePosixPath(entry).name for entry in fs.ls(path, detail=False)}


def without_out(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "out"}


def test_prepare(verb: Verb, place: str):
    tables = {name: f"{place}/catalog/{name}.parquet" for name in ("items", "interactions")}
    summary = verb("prepare", **tables, out=f"{place}/data")
    assert summary["images"] == {"ok": WORLD.num_items, "missing": 0, "rejected": 0}
    assert summary["users"] == WORLD.num_users
    assert names(f"{place}/data") == {"items", "pictures", "sequences", "arrays", "rejects", "dataset.json"}


def test_train(verb: Verb, place: str):
    uri = f"{place}/model"
    summary = verb("train", data=f"{place}/data", out=uri)
    assert names(place) == {"catalog", "config.yaml", "data", "model"}, "nothing hidden is left beside the model"
    assert names(uri) == {*MODEL_FILES, "knockouts", "training.jsonl", "tensorboard"}
    assert names(f"{uri}/knockouts") == {"text_only"}
    assert names(f"{uri}/knockouts/text_only") == MODEL_FILES
    assert storage.read_json(f"{uri}/model.json") == without_out(summary)

    model, knockout = load_model(uri), load_model(knockout_uri(uri, "text"))
    assert model.config == CONFIG
    assert (model.config.model.modalities, knockout.config.model.modalities) == ("both", "text")
    assert model.fingerprint == summary["fingerprint"] != knockout.fingerprint
    assert summary["data_fingerprint"] == load_dataset(f"{place}/data").info["fingerprint"]

    logged = read_log(uri)
    for part in ("both", "text"):
        rows = [row for row in logged if row["part"] == part]
        losses, checks = [r for r in rows if "loss" in r], [r for r in rows if "valid_ndcg@10" in r]
        assert [row["step"] for row in losses] == list(range(1, STEPS + 1))
        assert [row["step"] for row in checks] == list(range(2, STEPS + 1, 2))
        with storage.local_folder(f"{uri}/tensorboard/{part}") as folder:
            events = EventAccumulator(folder)
            events.Reload()
        for name in ("loss_nig", "loss_tt", "loss_ut"):
            drawn = {event.step: event.value for event in events.Scalars(name)}
            assert drawn == pytest.approx({row["step"]: row[name] for row in losses})
        best = max(event.value for event in events.Scalars("valid_ndcg@10"))
        made = model if part == "both" else knockout
        assert best == pytest.approx(made.info["metrics"]["valid_ndcg@10"]), "the best checkpoint is the one published"


def test_embed(verb: Verb, place: str, monkeypatch: pytest.MonkeyPatch):
    """Reading and embedding overlap, also where actors are allowed all CPUs: one is left to read and decode."""
    runs, plain = [], embedding.pipeline
    monkeypatch.setattr(embedding, "pipeline", lambda *args: runs.append(plain(*args)) or runs[-1])
    all_cpus = [f"--set=embed.num_actors={int(ray.cluster_resources()['CPU'])}"]
    all_cpus += [f"--set=embed.{share}=1.0" for share in ("cpus_per_actor", "cpus_per_decode")]
    summary = verb("embed", *all_cpus, model=f"{place}/model", data=f"{place}/data", out=f"{place}/index")
    counts = [summary[name] for name in ("rows", "reused", "computed", "resumed", "redone")]
    assert counts == [WORLD.num_items, 0, WORLD.num_items, 0, 0]
    operators = [line for line in runs[0].stats().splitlines() if line.startswith("Operator")]
    assert len([line for line in operators if "decode_items" in line and "ItemEmbedder" not in line]) == 1
    assert len([line for line in operators if "ItemEmbedder" in line and "decode_items" not in line]) == 1
    version = storage.read_text(f"{place}/index/CURRENT")
    folder = f"{place}/index/versions/{version}"
    assert names(f"{place}/index") == {"CURRENT", "versions"}
    assert names(f"{place}/index/versions") == {version}
    assert names(folder) == {"manifest.json", "part-00000.parquet"}
    manifest = storage.read_json(f"{folder}/manifest.json")
    assert manifest == without_out(summary)
    assert (manifest["version"], manifest["rows"], manifest["width"]) == (version, WORLD.num_items, 16)
    assert manifest["model_fingerprint"] == load_model(f"{place}/model").fingerprint
    width = CONFIG.model.embedding_width
    assert storage.read_schema(folder).field(EMBEDDING).type == pa.list_(pa.float32(), width)


def test_a_vector_is_the_same_in_batch_library_and_server(place: str, ray_session: None):
    model, items = load_model(f"{place}/model"), load_dataset(f"{place}/data").items
    index = load_index(f"{place}/index", model.fingerprint)
    vectors = in_order(index, items)
    rows = np.arange(len(items))
    np.testing.assert_allclose(model.embedder().items(Catalog(items, model.encoder), rows), vectors, atol=1e-5)
    assert np.abs(vectors - vectors.mean(0)).max() > 1e-3, "equal vectors would prove nothing"

    recommender = pixrec.load_recommender(f"{place}/model", f"{place}/index")  # what a replica holds
    for row in (0, 7, 23):
        found = recommender.search(items.text(row), items.image(row), k=len(items)).items
        np.testing.assert_allclose(
            [score for _, score in found],
            [vectors[row] @ vectors[items.row_of[item_id]] for item_id, _ in found],
            atol=1e-5,
        )


def test_evaluate(verb: Verb, place: str):
    given = {name: f"{place}/{name}" for name in ("model", "data", "index")}
    summary = verb("evaluate", **given, out=f"{place}/report")
    assert {"index.html", "metrics.json"} <= names(f"{place}/report")
    assert not [name for name in names(place) if name.startswith(".")]
    metrics = storage.read_json(f"{place}/report/metrics.json")
    assert metrics["results"] == summary["results"]
    assert metrics["users"] == WORLD.num_users
    assert metrics["protocol"] == {
        "split": "leave_one_out",
        "candidates": "all",
        "ties": "pessimistic",
        "seen": "allowed",
    }
    assert metrics["knockouts"] == {"pixrec_text_only": "trained", "pixrec_image_only": "scored"}
    assert metrics["provenance"]["index_version"] == storage.read_text(f"{place}/index/CURRENT")
    scorers = {"pixrec", "pixrec_text_only", "pixrec_image_only", "popularity", "repeat_last"}
    assert scorers <= set(metrics["results"])
    for result in metrics["results"].values():
        assert set(result) >= CI_METRICS
        for name, (low, high) in result["ci95"].items():
            assert 0 <= low <= result[name] <= high <= 1


def test_recommend(verb: Verb, place: str):
    items = load_dataset(f"{place}/data").items
    history = [*items.item_ids[:3], "ghost"]
    answer = verb("recommend", "-k5", model=f"{place}/model", index=f"{place}/index", history=",".join(history))
    expected = pixrec.load_recommender(f"{place}/model", f"{place}/index").recommend(history, 5)
    assert [(item["item_id"], item["score"]) for item in answer["items"]] == [
        (item_id, pytest.approx(score)) for item_id, score in expected
    ]
    assert (answer["unknown_items"], answer["fallback"]) == (["ghost"], False)


def test_embed_again_adds_a_version(place: str, ray_session: None):
    uri, items = f"{place}/index", load_dataset(f"{place}/data").items
    first = load_index(uri)
    half = dataclasses.replace(CONFIG, embed=dataclasses.replace(CONFIG.embed, dtype="float16"))
    seen: list[tuple[str, int, int | None, str]] = []
    manifest = embed(f"{place}/model", f"{place}/data", uri, half, progress=lambda *a: seen.append(a))
    assert seen[-1] == ("embed", WORLD.num_items, WORLD.num_items, "nothing new")
    assert (manifest["reused"], manifest["computed"]) == (WORLD.num_items, 0)
    second = load_index(uri, manifest["model_fingerprint"])
    assert names(f"{uri}/versions") == {first.version, second.version}
    assert first.version < second.version == manifest["version"]
    np.testing.assert_allclose(in_order(second, items), in_order(first, items), atol=1e-3)

    parts = [f"{uri}/versions/{index.version}" for index in (first, second)]
    types = [storage.read_schema(part).field(EMBEDDING).type.value_type for part in parts]
    assert types == [pa.float32(), pa.float16()]
    again = storage.read_table(parts[0])
    assert again.column(ITEM_ID).to_pylist() == first.item_ids
    assert np.array_equal(np.stack(again.column(EMBEDDING).to_numpy()), first.vectors)


def in_order(index: Index, items: ItemTable) -> np.ndarray:
    """Vectors (N, D) in the order of the items, every item exactly once."""
    assert sorted(index.item_ids) == sorted(items.item_ids)
    return index.vectors[[index.item_ids.index(item_id) for item_id in items.item_ids]]


def test_versions(verb: Verb, place: str):
    uri = f"{place}/index"
    first, second = (version["version"] for version in verb("embed", "--list", out=uri)["versions"])
    assert load_index(uri).version == second
    storage.write_bytes(f"{uri}/CURRENT", first.encode())
    verb("embed", f"--rollback={second}", "--keep=1", out=uri)
    assert [v["version"] for v in list_versions(uri)] == [second]
    assert load_index(uri).version == second


def test_one_run_of_everything_makes_what_the_verbs_made(
    verb: Verb, place: str, tmp_path: Path, slices_here: None, without_ray: Callable[[ModuleType], None]
):
    """In this process: the verbs had workers."""
    without_ray(embedding)
    tables = {name: f"{place}/catalog/{name}.parquet" for name in ("items", "interactions")}
    options = ["--set=train.knockouts=[]", "--set=evaluate.bootstrap_samples=20"]
    summary = verb("pipeline", *options, **tables, out=f"{place}/nightly")
    assert summary["steps"] == dict.fromkeys(["prepare", "train", "embed", "evaluate"], "made")
    assert (summary["published"], summary["published_model"]) == (summary["version"], "new")
    assert load_dataset(summary["data"]).info["fingerprint"] == load_dataset(f"{place}/data").info["fingerprint"]
    assert load_model(summary["model"]).fingerprint == load_model(f"{place}/model").fingerprint
    items = load_dataset(f"{place}/data").items
    ours, theirs = load_index(summary["index"]), load_index(f"{place}/index")
    np.testing.assert_allclose(in_order(ours, items), in_order(theirs, items), atol=1e-3)  # float16, by now
    pair = pixrec.load_recommender(ours.manifest["model"], summary["index"])
    assert (pair.model_version, pair.index_version) == (load_model(summary["model"]).fingerprint, ours.version)

    again = verb("pipeline", *options, **tables, out=f"{place}/nightly")
    assert set(again["steps"].values()) == {"found"}
    assert again["results"] == summary["results"]

    store = SqliteStore(str(tmp_path / "live.sqlite"), 10)
    store.add([Event("somebody new", item_id, 10**12 + n) for n, item_id in enumerate([*items.item_ids[:4], "fresh"])])
    added = AddedItem("fresh", {"title": "A fresh lamp"}, "A fresh lamp", None, "hash")
    store.put("another model", [added], [EmbeddedVectors(np.zeros(16, np.float32), None)], 9)
    loop = [
        f"--set=pipeline.store={tmp_path}/live.sqlite",
        "--set=pipeline.start=served",
        "--set=pipeline.publish=always",
    ]
    next_day = verb("pipeline", *options, *loop, **tables, out=f"{place}/nightly")
    assert next_day["steps"] == dict.fromkeys(["export", "prepare", "train", "embed", "evaluate"], "made")
    learned = load_dataset(next_day["data"])
    assert (learned.items.item_ids, "somebody new" in learned.events.user_ids) == ([*items.item_ids, "fresh"], True)
    trained = load_model(next_day["model"])
    assert trained.info["start"]["fingerprint"] == load_model(summary["model"]).fingerprint != trained.fingerprint
    assert set(load_index(next_day["index"]).item_ids) == {*items.item_ids, "fresh"}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with data/, ids/ (a catalog of bare ids), model/ and letters/."""
    write_prepared(tmp_path / "data")
    ids = tiny_items(with_pictures=False)
    empty = {name: [None] * len(ids) for name, _ in PREPARED_ITEM_FIELDS}
    empty |= {"item_id": ids.item_ids, "image_status": ["missing"] * len(ids)}
    write_prepared(tmp_path / "ids", tiny_dataset(ItemTable(pa.table(empty, schema=pa.schema(PREPARED_ITEM_FIELDS)))))
    write_model(tmp_path / "model", tiny_model())
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    return tmp_path


TRAIN_FAULTS = {
    "no data": ("--data nowhere --out out", "nowhere holds no dataset.json.*pixrec prepare"),
    "data that is a model": ("--data model --out out", "model holds no dataset.json.*pixrec prepare"),
    "ids only": (
        "--data ids --out out --set model.user_tower=compact",
        "ids: no item has a text or a picture.*items table",
    ),
    "ids only, pictures wanted": ("--data ids --out out --set model.modalities=image", "no item has a picture"),
    "taken": ("--data data --out letters", "letters is not empty and holds no model; choose another --out"),
    "a file": ("--data data --out letters/letter.txt", "letter.txt is a file"),
    "knockouts of one modality": (
        "--data data --out out --set model.modalities=text --set train.knockouts=[image]",
        r"train.knockouts needs model.modalities both, not text; set train.knockouts to \[\]",
    ),
    "unknown key": ("--data data --out out --set train.epoch=1", "did you mean 'train.epochs'"),
    "nothing to resume": ("--data data --out out --resume", "--resume: no unfinished run of .*out lies at"),
}
EMBED_FAULTS = {
    "no model": ("--model nowhere --data data --out out", "nowhere holds no complete model.*pixrec train"),
    "no data": ("--model model --data nowhere --out out", "nowhere holds no complete data set.*pixrec prepare"),
    "taken": ("--model model --data data --out letters", "letters is not empty and holds no index"),
    "a model": ("--model model --data data --out model", "model is not empty and holds no index"),
}


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [pytest.param("train", *fault, id=f"train, {name}") for name, fault in TRAIN_FAULTS.items()]
    + [pytest.param("embed", *fault, id=f"embed, {name}") for name, fault in EMBED_FAULTS.items()],
)
def test_refused_before_ray_starts(
    no_ray: None, parts: Path, capfd: pytest.CaptureFixture[str], verb: str, options: str, message: str
):
    before = sorted(parts.rglob("*"))
    words = [re.sub(r"^(?=[a-z])(?!.*=)", f"{parts}/", word) for word in options.split()]
    ran = run(capfd, verb, *words)
    assert (ran.code, ran.out) == (2, []), ran.err
    lines = ran.err.splitlines()
    assert len(lines) == 1
    assert re.search(f"^pixrec {verb}: .*{message}", lines[0])
    assert sorted(parts.rglob("*")) == before
