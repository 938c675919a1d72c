"""`top_k`, exact and with ties in row order, beside a plain product with `torch.topk`, and faiss where installed.

CPU time of one thread."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import Row, seconds_each
from pixrec.index import top_k

WIDTH, K = 128, 100
NUM_ITEMS, NUM_QUERIES = (100_000, 1_000_000), (1, 32)

Search = Callable[[torch.Tensor], Any]


def run() -> list[Row]:
    return [row for count in NUM_ITEMS for row in _rows(count)]


def _rows(num_items: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    items = F.normalize(torch.randn(num_items, WIDTH, generator=generator), dim=-1)
    others: dict[str, Search] = {"torch.topk(q @ items.T)": lambda q: torch.topk(q @ items.T, K)}
    if importlib.util.find_spec("faiss"):
        others["faiss IndexFlatIP"] = _faiss_search(items)
    rows = []
    for count in NUM_QUERIES:
        queries = F.normalize(torch.randn(count, WIDTH, generator=generator), dim=-1)
        calls = {name: functools.partial(search, queries) for name, search in others.items()}
        ours = functools.partial(top_k, queries, items, K)
        taken = seconds_each({"ours": ours, **calls}, rounds=9, clock=time.process_time)
        rows += [
            Row(
                what=f"top_k, {num_items:,} x {WIDTH}, k={K}, {count} {'query' if count == 1 else 'queries'}",
                ours=count / taken["ours"],
                alternative=name,
                theirs=count / taken[name],
                unit="queries/s",
            )
            for name in others
        ]
    return rows


def _faiss_search(items: torch.Tensor) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(items.numpy())
    return lambda queries: index.search(queries.numpy(), K)
