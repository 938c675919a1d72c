"""The structure for approximate search: who it proposes, with and without a filter."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pixrec.errors import ArtifactError, PixRecError
from pixrec.retrieval.approximate import Approximate, Codes, build, bytes_per_item, num_lists, require_faiss

pytest.importorskip("faiss", reason="faiss is not installed")

N, D = 4000, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Forty clusters, whose items lie in no order."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((40, D))[rng.integers(0, 40, N)] + 0.4 * rng.standard_normal((N, D))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def file(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("structure") / "int8.faiss")
    assert build(vectors, "int8", path, threads=1) == f"IVF{num_lists(N)},SQ8"
    return path


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)]))


def nearest(vectors: np.ndarray, queries: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    scores = queries @ vectors.T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :10]


@pytest.mark.parametrize("codes", ["float16", "int8", "pq"])
def test_the_nearest_items_are_among_those_proposed(vectors: np.ndarray, tmp_path: Path, codes):
    path = str(tmp_path / "structure.faiss")
    build(vectors, codes, path, threads=1)
    structure = Approximate(path, 32)
    assert structure.proposed_each == (32 if codes == "pq" else 4), "coarse codes propose more"
    found = structure.candidates(vectors[:100], 60)
    assert recall(found, nearest(vectors, vectors[:100])) > 0.97
    centroids = 4 * D * (num_lists(N) + (256 if codes == "pq" else 0))
    assert 0 < Path(path).stat().st_size - bytes_per_item(D, codes) * N - centroids < 8 * num_lists(N) + 1000


def test_the_same_vectors_make_the_same_structure(vectors: np.ndarray, file: str, tmp_path: Path):
    again = str(tmp_path / "again.faiss")
    build(vectors, "int8", again, threads=1)
    assert Path(again).read_bytes() == Path(file).read_bytes()


def test_only_what_is_allowed_is_proposed_and_its_nearest_are_found(vectors: np.ndarray, file: str):
    structure = Approximate(file, 16)
    for share in (0.5, 0.05):
        allowed = np.random.default_rng(1).random(N) < share
        found = structure.candidates(vectors[:50], 40, allowed)
        assert allowed[found[found >= 0]].all()
        assert recall(found, nearest(vectors, vectors[:50], allowed)) > 0.95


def test_a_filter_that_only_passes_items_far_away(vectors: np.ndarray, file: str):
    """Of a cluster that the query's nearest lists do not hold."""
    centre = vectors[7]
    allowed = vectors @ centre > 0.8
    queries = -centre[None]
    structure = Approximate(file, 4)
    assert recall(structure.candidates(queries, 40, allowed), nearest(vectors, queries, allowed)) > 0.9
    assert (structure.candidates(queries, 5, np.zeros(N, bool)) == -1).all()


def test_rows_may_be_known_by_other_numbers(vectors: np.ndarray, file: str):
    """Also twice, as when a version is in one order, the catalog in another."""
    structure, rng = Approximate(file, 16), np.random.default_rng(2)
    first, second = (rng.permutation(N).astype(np.int32) for _ in range(2))
    plain = structure.candidates(vectors[:3], 20)
    np.testing.assert_array_equal(structure.renumbered(first).candidates(vectors[:3], 20), first[plain])
    both = structure.renumbered(first).renumbered(second)
    np.testing.assert_array_equal(both.candidates(vectors[:3], 20), second[first[plain]])
    allowed = rng.random(N) < 0.5
    expected = structure.candidates(vectors[:3], 20, allowed[second[first]])
    np.testing.assert_array_equal(both.candidates(vectors[:3], 20, allowed), second[first[expected]])


@pytest.mark.parametrize("codes", ["float16", "int8"])
def test_a_part_proposes_what_the_whole_proposes_of_its_rows(vectors: np.ndarray, tmp_path: Path, codes: Codes):
    """Also where the caller knows the vectors by other numbers."""
    build(vectors, codes, str(tmp_path / "whole.faiss"), threads=1)
    rows = np.random.default_rng(3).permutation(N).astype(np.int32)
    for whole in (Approximate(str(tmp_path / "whole.faiss"), 8), Approximate(str(tmp_path / "whole.faiss"), 8, rows)):
        half = range(N // 3, N)
        whole.write_part(half, str(tmp_path / "part.faiss"))
        part, inside = Approximate(str(tmp_path / "part.faiss"), 8), np.isin(np.arange(N), half)
        assert len(part) == len(half)
        proposed = part.candidates(vectors[:20], N)
        everything = whole.candidates(vectors[:20], N)
        for ours, theirs in zip(proposed, everything, strict=True):
            assert set(ours[ours >= 0] + half.start) == {row for row in theirs[theirs >= 0] if inside[row]}
        allowed = np.random.default_rng(4).random(len(half)) < 0.5
        filtered = part.candidates(vectors[:20], 9, allowed)
        assert allowed[filtered[filtered >= 0]].all()


def test_faiss_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PixRecError, match=r"an index needs faiss, .* pip install 'pixrec\[approximate\]'"):
        require_faiss("an index")


def test_a_damaged_file(file: str, tmp_path: Path):
    half = tmp_path / "half.faiss"
    half.write_bytes(Path(file).read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"is damaged: .*; run pixrec embed again"):
        Approximate(str(half), 1)
