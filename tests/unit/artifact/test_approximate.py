"""The structure for approximate search as a part of an index version."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pixrec import storage
from pixrec.artifact import index_manifest, index_version, load_index
from pixrec.artifact.approximate import add_structure, measured, wants_structure
from pixrec.artifact.index import APPROXIMATE, STRUCTURE
from pixrec.config import EmbedConfig
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError, ConfigError, PixRecError, raise_fault
from pixrec.retrieval.approximate import build

pytest.importorskip("faiss", reason="faiss is not installed")

N, D = 3000, 8
IDS = [f"p{number:04d}" for number in range(N)]


def clustered(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((30, D))[rng.integers(0, 30, N)] + 0.3 * rng.standard_normal((N, D))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of 3,000 items, in three parts, with a structure."""
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pixrec.artifact.index._ROWS_PER_PART", 1000)
    uri, vectors = str(tmp_path / "index"), clustered()
    with index_version(uri, "0123456789", D, "float32", {}) as writer:
        for first in range(0, N, 500):
            writer.add(IDS[first : first + 500], vectors[first : first + 500], ["hash"] * 500)
        writer.flush()
        facts = add_structure(writer.folder, writer.rows, D, "float32", EmbedConfig(approximate_above=0))
        raise_fault(facts.get("fault"))
        writer.facts[APPROXIMATE] = facts
    return uri


def facts_of(uri: str) -> dict[str, Any]:
    return index_manifest(uri)[APPROXIMATE]


def test_the_manifest_says_what_it_is_and_what_it_finds(index: str):
    facts = facts_of(index)
    assert facts["structure"] == "IVF256,SQ8"
    assert facts["library"].startswith("faiss 1.")
    assert facts["recall@10"] >= 0.98
    assert 1 <= facts["probes"] <= 32
    assert (facts["queries"], facts["bytes_per_item"]) == (256, 16)
    version = Path(index, "versions", index_manifest(index)["version"])
    assert (version / STRUCTURE).is_file()


def test_rows_are_those_of_the_vectors_in_whichever_order_they_come(index: str, monkeypatch: pytest.MonkeyPatch):
    vectors = clustered()
    plain = load_index(index)
    proposed = plain.structure().candidates(vectors[:20], 30)
    assert (proposed == np.arange(20)[:, None]).any(1).all()

    monkeypatch.setattr("pixrec.artifact.index.MAPPED_FROM", 1)
    backwards = ItemTable(pa.table({"item_id": IDS[::-1]}))
    mapped = load_index(index, items=backwards)
    np.testing.assert_array_equal(mapped.vectors, vectors[::-1])
    np.testing.assert_array_equal(mapped.structure().candidates(vectors[:20], 30), N - 1 - proposed)


def test_an_index_without_one_has_none(tmp_path: Path):
    with index_version(str(tmp_path), "0123456789", D, "float32", {}) as writer:
        writer.add(IDS[:2], clustered()[:2], ["hash"] * 2)
    assert load_index(str(tmp_path)).structure is None


def test_opening_one_without_faiss_names_the_extra_and_vectors_alone_need_none(
    index: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    loaded = load_index(index)
    assert len(loaded.vectors) == N
    with pytest.raises(PixRecError, match=r"needs faiss, .* pip install 'pixrec\[approximate\]'"):
        loaded.structure()


def test_a_structure_that_is_damaged(index: str):
    file = storage.join(index, "versions", index_manifest(index)["version"], STRUCTURE)
    Path(file).write_bytes(Path(file).read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="is damaged"):
        load_index(index).structure()


def test_vectors_without_clusters_get_none_since_reading_most_of_them_is_no_gain(tmp_path: Path):
    from pixrec.retrieval.approximate import Approximate

    vectors = np.random.default_rng(0).standard_normal((N, 64)).astype(np.float32)
    build(vectors, "int8", str(tmp_path / STRUCTURE), threads=1)
    facts = measured(vectors, Approximate(str(tmp_path / STRUCTURE), 1), 0.98)
    assert "probes" not in facts
    assert "an exact search is as fast" in facts["left_out"]


def test_which_index_gets_one():
    assert not wants_structure(300_000, EmbedConfig())
    assert wants_structure(300_001, EmbedConfig())
    assert not wants_structure(10**9, EmbedConfig(approximate_above=None))
    with pytest.raises(ConfigError, match=r"approximate_recall is 1\.5"):
        EmbedConfig(approximate_recall=1.5)


def test_without_faiss_an_index_is_searched_exactly_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    facts = add_structure(str(tmp_path), 10, 4, "float32", EmbedConfig(approximate_above=0))
    assert list(facts) == ["left_out"]
    assert "needs faiss, which is not installed" in facts["left_out"]
    assert not list(tmp_path.iterdir())
