"""Live items that are part of a version: they come back as they were, and its parts are read for hashes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from fakes import square, tiny_items, tiny_model, write_index, write_model, write_prepared

from pixrec import storage
from pixrec.artifact import index_manifest, index_version, load_index
from pixrec.artifact.folded import LIVE, fold, version_contents, write_folded
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import AddedItem, EmbeddedVectors
from pixrec.model.encoding import Content


def test_live_items_of_a_version_come_back(tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    items = [
        AddedItem(f"n{n}", {"title": "Tile", "year": n}, "Tile", b"jpeg" if n else None, f"h{n}") for n in range(3)
    ]
    made = [EmbeddedVectors(np.full(4, n, np.float32), np.full(2, n, np.float16) if n else None) for n in range(3)]
    with index_version(index, "m", 4, "float32", {}) as writer:
        writer.add(["a", "b"], np.eye(2, 4, dtype=np.float32), ["ha", "hb"])
        write_folded(writer.folder, [list(zip(items[:2], made[:2], strict=True)), [(items[2], made[2])]])
        writer.facts[LIVE] = 3
    found = version_contents(index, index_manifest(index))
    assert [item for item, _ in found.folded.values()] == items
    for (_, there), here in zip(found.folded.values(), made, strict=True):
        np.testing.assert_array_equal(there.vector, here.vector)
        assert (there.content is None) == (here.content is None)
    assert found.content_hashes(["b", "n1", "ghost"]) == {"b": "hb"}
    assert list(load_index(index).item_ids) == ["a", "b"]


def test_a_version_without_any(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data")
    model: Any = write_model(tmp_path / "model", tiny_model(items=tiny_items()))
    write_index(tmp_path / "index", model, data)
    index = str(tmp_path / "index")
    assert storage.list_files(index, ".arrow") == []
    assert version_contents(index, index_manifest(index)).folded == {}


def test_what_another_model_embedded_is_computed_and_what_the_parts_have_is_left_out(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_model(items=tiny_items()))
    store, index = SqliteStore(str(tmp_path / "live"), 1), str(tmp_path / "index")
    added = [AddedItem(f"n{n}", {"title": "Tile"}, "Tile", square(n / 4), f"h{n}") for n in range(4)]
    mine = EmbeddedVectors(np.ones(16, np.float32), None)
    store.put(model.fingerprint, added[:1], [mine], 9)
    store.put("another", added[1:], [mine] * 3, 9)
    store.change("n3", {}, hidden=True)
    with index_version(index, model.fingerprint, 16, "float32", {}) as writer:
        writer.add(["n2"], np.ones((1, 16), np.float32), ["h2"])
        writer.flush()
        counts = fold(str(tmp_path / "model"), str(tmp_path / "live"), writer.folder, 2)
        writer.facts[LIVE] = counts["items"]
    assert counts == {"items": 2, "computed": 1, "fault": None}
    folded = version_contents(index, index_manifest(index)).folded
    assert list(folded) == ["n0", "n1"]
    np.testing.assert_array_equal(folded["n0"][1].vector, mine.vector)
    expected = model.embedder().contents([Content("Tile", model.encoder.decode(square(0.25)))], ["n1"])[0]
    np.testing.assert_allclose(folded["n1"][1].vector, expected, atol=1e-6)
    assert "there is no such file" in fold(str(tmp_path / "model"), str(tmp_path / "no"), writer.folder, 2)["fault"]
