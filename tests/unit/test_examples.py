"""The scripts of docs/examples read an index version into others' tools and find what our own search finds."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from pixrec.artifact import index_version, load_index
from pixrec.index import top_k

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PACKAGES = {"index_in_faiss": "faiss", "index_in_lancedb": "lancedb", "index_in_qdrant": "qdrant_client"}


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the tools' own imports
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_example_finds_the_nearest_items(name: str, dtype: str, tmp_path: Path):
    pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed")
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with index_version(str(tmp_path), "0123456789", 8, dtype, {}) as writer:
        writer.add([f"p{row:02d}" for row in range(50)], vectors, ["hash"] * 50)
    index = load_index(str(tmp_path))
    scores, rows = top_k(index.vectors[7:8], index.vectors, 5)
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))["nearest"](str(tmp_path), "p07", 5)
    assert [item_id for item_id, _ in found] == [index.item_ids[row] for row in rows[0]]
    np.testing.assert_allclose([score for _, score in found], scores[0], atol=1e-5)
