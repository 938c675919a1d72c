"""Approximate search beside exact search: recall, time, bytes an item, filters.

    python -m benchmarks.speed.approximate [--items 1000000] [--codes int8 pq float16] [--others] [--random]

Vectors come from a mixture of 5,000 clusters of unequal sizes whose variance falls off as 1/rank over 128 dimensions,
like that of trained item vectors; queries are drawn with 1.3 times the spread. `--random`: the hard case, directions
without any structure. Times are CPU time of one thread, so that others on the machine disturb them little. `--others`
builds graphs (HNSW) by faiss and usearch beside ours, which takes some minutes for 100,000 items.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from pixrec.artifact.approximate import measured
from pixrec.retrieval.approximate import Approximate, build, bytes_per_item, require_faiss
from pixrec.retrieval.search import Found, Searcher

WIDTH, K, CLUSTERS, QUERIES, BATCH = 128, 10, 5000, 256, 32
PASSING = (0.5, 0.1, 0.03, 0.01)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.approximate", description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--codes", nargs="+", default=["int8", "pq"], choices=("float16", "int8", "pq"))
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--random", action="store_true")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    faiss = require_faiss("this benchmark")
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        items, queries = _vectors(a.items, a.random, os.path.join(folder, "vectors.npy"))
        exact = Searcher(items)
        truth = _searched(exact.search, queries)
        base = _milliseconds(exact.search, queries, rounds=3)
        print(f"{a.items:,} x {WIDTH}, {'random' if a.random else 'clustered'}, k={K}, CPU ms a query, one thread")
        _say("exact", 1.0, base, base, 4 * WIDTH)
        for codes in a.codes:
            path, started = os.path.join(folder, f"{codes}.faiss"), time.process_time()
            name = build(items, codes, path, threads=os.cpu_count() or 1)
            built = time.process_time() - started
            facts, size = measured(items, Approximate(path, 1), a.recall), os.path.getsize(path) / a.items
            print(f"{codes}: {name}, built in {built:.0f} CPU s, {size:.1f} bytes an item")
            print(f"  as the manifest would say: {facts}")
            structure = Approximate(path, 1)
            for probes in (16, 32, 64, 128):
                search = Searcher(items, structure.with_probes(probes)).search
                recall = _recall(_searched(search, queries), truth)
                _say(f"  {probes} lists", recall, _milliseconds(search, queries), base, bytes_per_item(WIDTH, codes))
                if recall >= a.recall:
                    break
            _filtered(Searcher(items, structure.with_probes(probes)), exact, queries)
            _memory(os.path.join(folder, "vectors.npy"), path, probes)
        if a.others:
            for name, size, search in _graphs(items, folder):
                _say(
                    f"  {name}", _recall(_searched(search, queries), truth), _milliseconds(search, queries), base, size
                )
    return 0


def _vectors(count: int, random: bool, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Items, mapped from a file, and queries, all of length 1."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, WIDTH + 1, dtype=np.float32) ** -0.5
    spread /= np.linalg.norm(spread)
    centres = rng.standard_normal((CLUSTERS, WIDTH), dtype=np.float32) * spread
    sizes = 1 / np.arange(1, CLUSTERS + 1) ** 0.7

    def drawn(number: int, noise: float) -> np.ndarray:
        found = rng.standard_normal((number, WIDTH), dtype=np.float32)
        if not random:
            found = centres[rng.choice(CLUSTERS, number, p=sizes / sizes.sum())] + found * (noise * spread)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    items = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, WIDTH))
    for first in range(0, count, 100_000):
        items[first : first + 100_000] = drawn(min(100_000, count - first), 0.6)
    return items.view(np.ndarray), drawn(QUERIES, 0.8)


def _searched(search: Callable[..., Found], queries: np.ndarray, *more: np.ndarray) -> np.ndarray:
    return np.vstack([search(queries[at : at + BATCH], K, *more)[1] for at in range(0, len(queries), BATCH)])


def _milliseconds(
    search: Callable[..., Found], queries: np.ndarray, *more: np.ndarray, rounds: int = 20
) -> tuple[float, float]:
    """CPU milliseconds a query: asked alone, and in batches of 32."""
    taken = []
    for size in (1, BATCH):
        search(queries[:size], K, *more)
        started = time.process_time()
        for number in range(rounds):
            at = number * size % (len(queries) - size + 1)
            search(queries[at : at + size], K, *more)
        taken.append(1000 * (time.process_time() - started) / rounds / size)
    return taken[0], taken[1]


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def _say(what: str, recall: float, taken: tuple[float, float], base: tuple[float, float], size: float) -> None:
    one, many = taken
    print(
        f"{what:24} recall@10 {recall:.3f}   alone {one:7.3f} ms {base[0] / one:6.1f}x   "
        f"32 together {many:7.3f} ms {base[1] / many:6.1f}x" + (f"   {size:.0f} bytes an item" if size else ""),
        flush=True,
    )


def _filtered(searcher: Searcher, exact: Searcher, queries: np.ndarray) -> None:
    rng, count = np.random.default_rng(1), len(exact.vectors)
    some = queries[: 2 * BATCH]
    for passing in (*(int(share * count) for share in PASSING), K):
        allowed = np.zeros(count, bool)
        allowed[rng.choice(count, passing, replace=False)] = True
        recall = _recall(_searched(searcher.search, some, allowed), _searched(exact.search, some, allowed))
        base = _milliseconds(exact.search, some, allowed, rounds=2)
        taken = _milliseconds(searcher.search, some, allowed, rounds=5)
        _say(f"  {passing:,} pass", recall, taken, base, 0)


_OPENED = """
import re, sys
import numpy as np
from pixrec import storage
from pixrec.retrieval.approximate import Approximate
from pixrec.retrieval.search import Searcher

def held():
    text = open("/proc/self/status").read()
    return [int(re.search(rf"{name}:\\s+(\\d+) kB", text)[1]) / 1024 for name in ("RssAnon", "RssFile")]

queries = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
Searcher(queries).search(queries, 10), Approximate.__init__
import faiss
before = held()
vectors = storage.map_array(sys.argv[1])
searcher = Searcher(vectors, Approximate(sys.argv[2], int(sys.argv[3])))
searcher.search(queries, 10), searcher.search(queries, 10, np.arange(len(vectors)) % 2 == 0)
own, mapped = (after - at_first for after, at_first in zip(held(), before))
print(f"  memory of a process that opened and searched it: {own:.1f} MiB its own, {mapped:.1f} MiB of files, shared")
"""


def _memory(vectors: str, structure: str, probes: int) -> None:
    subprocess.run([sys.executable, "-c", _OPENED, vectors, structure, str(probes)], check=True)


def _graphs(items: np.ndarray, folder: str) -> Iterator[tuple[str, float, Callable[..., Found]]]:
    """Graphs of other libraries; what they find is ranked again by the full vectors, as ours is."""

    class Proposed:
        def __init__(self, find: Callable[[np.ndarray, int], np.ndarray]) -> None:
            self.find = find

        def candidates(self, queries: np.ndarray, count: int, allowed: np.ndarray | None = None) -> np.ndarray:
            return self.find(queries, count)

    faiss = require_faiss("this benchmark")
    started, path = time.process_time(), os.path.join(folder, "graph")
    graph = faiss.index_factory(WIDTH, "HNSW16_SQ8", faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 100
    graph.train(items[:100_000])
    graph.add(np.ascontiguousarray(items))
    faiss.write_index(graph, path)
    print(f"faiss HNSW16_SQ8, built in {time.process_time() - started:.0f} CPU s")
    for depth in (32, 64, 128, 256):
        graph.hnsw.efSearch = depth
        searcher = Searcher(items, Proposed(lambda q, count: graph.search(q, count)[1]))  # type: ignore[arg-type]
        yield f"faiss HNSW, {depth} deep", os.path.getsize(path) / len(items), searcher.search
    if importlib.util.find_spec("usearch"):
        from usearch.index import Index

        started = time.process_time()
        other = Index(ndim=WIDTH, metric="ip", dtype="i8", connectivity=16, expansion_add=100)
        other.add(np.arange(len(items), dtype=np.uint64), np.asarray(items), threads=1)
        other.save(path)
        print(f"usearch i8, built in {time.process_time() - started:.0f} CPU s")
        other = Index.restore(path, view=True)
        for depth in (32, 64, 128, 256):
            other.expansion_search = depth
            find = lambda q, n: np.atleast_2d(other.search(q, n, threads=1).keys).astype(np.int64)  # noqa: E731
            yield f"usearch, {depth} deep", os.path.getsize(path) / len(items), Searcher(items, Proposed(find)).search  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
