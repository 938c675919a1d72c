"""Builds the structure for approximate search of an index version, and measures what it finds. Usable without Ray.

Shapes: N items of the version · D width · Q queries.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

from pixrec import storage
from pixrec.artifact.index import STRUCTURE, stored_parts
from pixrec.config import EmbedConfig
from pixrec.errors import PixRecError, fault_text
from pixrec.index import top_k
from pixrec.retrieval.approximate import Approximate, build, bytes_per_item, require_faiss
from pixrec.retrieval.search import Searcher

NEIGHBOURS, QUERIES = 10, 256
MOST_READ = 1 / 8
"""Where a search would have to read more of the lists than this for the recall wanted, the exact one is as fast."""


def wants_structure(rows: int, config: EmbedConfig) -> bool:
    """Whether an index of so many items is to get a structure."""
    return config.approximate_above is not None and rows > config.approximate_above


def add_structure(folder: str, rows: int, width: int, dtype: str, config: EmbedConfig) -> dict[str, Any]:
    """Write the structure beside the parts of a version that is being written; returns what the manifest says of it,
    and the `fault` where there is one instead.

    The vectors lie in a temporary file meanwhile, 4 N D bytes. Without faiss nothing is written, which `left_out` says.
    """
    try:
        require_faiss("approximate search")
    except PixRecError as error:
        return {"left_out": str(error)}
    try:
        with tempfile.TemporaryDirectory(prefix="pixrec-") as place:
            shape, vectors_file = (rows, width), os.path.join(place, "vectors.npy")
            vectors, found = np.lib.format.open_memmap(vectors_file, mode="w+", dtype=np.float32, shape=shape), 0
            for _, part in stored_parts(folder, dtype):
                vectors[found : found + len(part)] = part
                found += len(part)
            path = os.path.join(place, STRUCTURE)
            name = build(vectors, config.approximate_codes, path, threads=config.threads_per_actor)
            facts = measured(vectors, Approximate(path, 1), config.approximate_recall)
            if "probes" in facts:
                storage.copy_file(path, storage.join(folder, STRUCTURE))
                facts["bytes_per_item"] = bytes_per_item(width, config.approximate_codes)
            return {"structure": name, "library": f"faiss {require_faiss(name).__version__}", **facts}
    except PixRecError as error:
        return {"fault": fault_text(error)}


def measured(vectors: np.ndarray, structure: Approximate, wanted: float) -> dict[str, Any]:
    """How many lists a search must read (`probes`) to find the wanted share of the ten items nearest to a query, and
    the share it finds, over 256 queries; where it is not worth it, `left_out` says why instead."""
    queries = _between(vectors)
    exact, probes = top_k(queries, vectors, NEIGHBOURS)[1], 1
    while True:
        found = Searcher(vectors, structure.with_probes(probes)).search(queries, NEIGHBOURS)[1]
        recall = float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(exact, found, strict=True)]))
        if recall >= wanted or probes >= structure.num_lists:
            break
        probes *= 2
    facts = {f"recall@{NEIGHBOURS}": recall, "queries": len(queries)}
    if recall >= wanted and probes <= max(1, MOST_READ * structure.num_lists):
        return {"probes": probes, **facts}
    share = min(1.0, probes / structure.num_lists)
    return {**facts, "left_out": f"recall {recall:.3f} takes {share:.0%} of the vectors; an exact search is as fast"}


def _between(vectors: np.ndarray) -> np.ndarray:
    """Queries (Q, D) that lie where users do: not on an item, but about as far from it as its tenth neighbour.

    Each is a random item, moved by that distance in the direction from one random item to another, which is how the
    catalog spreads. On the items themselves a search does better: their neighbours lie in the same list more often.
    """
    rng = np.random.default_rng(0)
    items, first, second = (
        np.asarray(vectors[rng.choice(len(vectors), min(QUERIES, len(vectors)), replace=False)], np.float32)
        for _ in range(3)
    )
    tenth = top_k(items, vectors, NEIGHBOURS + 1)[1][:, -1]
    moved = items + _unit(first - second) * np.linalg.norm(vectors[tenth] - items, axis=1, keepdims=True)
    return _unit(moved) * np.linalg.norm(items, axis=1, keepdims=True)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
