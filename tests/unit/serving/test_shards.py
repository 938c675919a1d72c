"""A part of an index: what is loaded of it and what it finds; the versions that are held of it. No Ray."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny_dataset, tiny_items, tiny_model, write_model, write_prepared

import pixrec
from pixrec.artifact import index_manifest, index_version
from pixrec.artifact.approximate import add_structure
from pixrec.config import EmbedConfig
from pixrec.errors import ArtifactError
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import EmbeddedVectors
from pixrec.query import NewItem, Query
from pixrec.retrieval.search import merge
from pixrec.serving.backend import Versions
from pixrec.serving.published import Published
from pixrec.serving.shards import Held, Shard, load_shard

NUM_ITEMS, CONTENT_WIDTH = 300, 24


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """An index of more items than a list of its structure holds, with content vectors, in another order than the items,
    and without a few of them."""
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path / "cache"))
    items = tiny_items(NUM_ITEMS, with_pictures=False)
    write_prepared(tmp_path / "data", tiny_dataset(items))
    model = write_model(tmp_path / "model", tiny_model(items=items))
    rng = np.random.default_rng(0)
    rows = rng.permutation(NUM_ITEMS)[5:]
    vectors, content = (rng.standard_normal((len(rows), width)).astype(np.float32) for width in (16, CONTENT_WIDTH))
    vectors, content = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, content))
    ids = [items.item_ids[row] for row in rows.tolist()]
    facts = {"data": str(tmp_path / "data")}
    with index_version(str(tmp_path / "index"), model.fingerprint, 16, "float32", facts, CONTENT_WIDTH) as writer:
        writer.add(ids, vectors, ids, content=content)
        writer.flush()
        writer.facts["approximate"] = add_structure(writer.folder, len(rows), 16, "float32", EmbedConfig())
    return Published(str(tmp_path / "model"), str(tmp_path / "index"), str(tmp_path / "data"))


def sharded(parts: list[Shard], vectors: np.ndarray, k: int, *how: Any) -> Any:
    return merge([part.search(vectors, k, *how) for part in parts], k)[:2]


def parts_of(shop: Published, shards: int) -> list[Shard]:
    manifest = index_manifest(shop.index)
    return [load_shard(shop.index, str(shop.data), manifest, number, shards) for number in range(shards)]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_answer_as_the_whole_recommender(shop: Published, tmp_path: Path, shards: int) -> None:
    """Filters, exclusions, diversity, caps, reasons, live items and a search by content alike."""
    whole = pixrec.load_recommender(shop.model, shop.index, shop.data)
    whole.live.follow(store := SqliteStore(str(tmp_path / "live.sqlite"), 100))
    added, vectors = whole.embed_new({"new": NewItem({"title": "Lamp"}), "i09": NewItem({"title": "Other"})})
    made = [EmbeddedVectors(v.vector, np.ones(CONTENT_WIDTH, np.float16)) for v in vectors]
    store.put(whole.model_version, added, made, 10)
    store.change("i05", {}, True)
    store.change("i299", {}, True)
    search = partial(sharded, parts_of(shop, shards))
    history = ["i03", "i07", "ghost"]
    queries = [
        Query(history, 9),
        Query(history, 9, ["i11"], exclude_history=False, filters={"brand": ["Ann"]}),
        Query(history, 5, diversity=0.4, reasons=True),
        Query(history, 4, max_per={"brand": 2}),
        Query([], 4),
    ]
    asked = whole.read(queries)
    vectors = whole.encode(asked)
    for ours, theirs in zip(whole.rank(asked, vectors, search), whole.rank(asked, vectors), strict=True):
        assert [item_id for item_id, _ in ours.items] == [item_id for item_id, _ in theirs.items]
        assert ours.reasons == theirs.reasons
    by_content = np.random.default_rng(1).standard_normal(CONTENT_WIDTH).astype(np.float32)
    nearest = [whole.near(by_content, Query([], 7), True, s) for s in (search, None)]
    assert [item_id for item_id, _ in nearest[0].items] == [item_id for item_id, _ in nearest[1].items]


def test_each_shard_has_its_part_of_the_structure(shop: Published) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    manifest = index_manifest(shop.index)
    structure_rows = [len(part._searcher.approximate or ()) for part in parts_of(shop, 2)]
    assert all(structure_rows)
    assert sum(structure_rows) == manifest["rows"] == NUM_ITEMS - 5


def test_a_shard_holds_no_copy_of_the_others(shop: Published) -> None:
    first, second = parts_of(shop, 2)
    assert len(first._searcher.vectors) == len(second._searcher.vectors) == NUM_ITEMS // 2
    assert first._searcher.vectors.base is None
    assert (first._searcher.first_row, second._searcher.first_row) == (0, NUM_ITEMS // 2)


def test_of_a_version_only_what_its_model_made(shop: Published) -> None:
    manifest = index_manifest(shop.index)
    fitting = Versions(manifest["model_fingerprint"], manifest["version"])
    assert isinstance(shop.load_shard(fitting, 1, 2), Shard)
    assert isinstance(Published(shop.model, shop.index).load_shard(fitting, 0, 2), Shard), "its data is remembered"
    with pytest.raises(ArtifactError, match="is of another model"):
        shop.load_shard(Versions("f" * 32, manifest["version"]), 1, 2)


def test_versions_that_are_asked_for_are_held_beside_each_other() -> None:
    loads = []

    def load(versions: Versions) -> Any:
        loads.append(versions.index_version)
        return versions

    held, (first, second, third, fourth) = Held(load), (Versions("m", str(number)) for number in range(4))
    assert held.get(first) is None
    assert [held.of(first), held.of(second), held.of(first), held.get(second)] == [first, second, first, second]
    held.of(third)
    held.get(first)
    held.of(fourth)
    assert held.versions() == [third, first, fourth], "the second was not asked for the longest"
    assert loads == ["0", "1", "2", "3"]


def test_while_one_version_loads_the_others_answer() -> None:
    loading, go_on = threading.Event(), threading.Event()

    def load(versions: Versions) -> Any:
        if versions.index_version == "2":
            loading.set()
            assert go_on.wait(10)
        return versions

    held, first, second = Held(load), Versions("m", "1"), Versions("m", "2")  # type: ignore[arg-type]
    held.of(first)
    thread = threading.Thread(target=held.of, args=(second,))
    thread.start()
    assert loading.wait(10)
    assert (held.get(first), held.get(second)) == (first, None)
    go_on.set()
    thread.join()
    assert held.get(second) == second
