"""The recall of exact neighbours that remains when vectors are stored in fewer bits. Knows vectors, no file.

Shapes: U items of a block · N items of an index · D width · Q queries · k neighbours.
"""

from __future__ import annotations

import numpy as np

from pixrec.index import top_k


class NeighbourRecall:
    """Which share of an item's exact neighbours (by float32) is still found among the stored vectors.

    Blocks of all N items come one after the other and are not kept: memory is that of the queries.
    """

    def __init__(self, queries: np.ndarray, rows: np.ndarray, ks: tuple[int, ...] = (10, 100)) -> None:
        """`queries` (Q, D) float32 are the vectors of the items at `rows` (Q,), counted in the order of the blocks."""
        self._queries, self._rows, self._ks = queries, rows, ks
        nothing = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        self._exact = self._stored = nothing
        self._seen = 0

    def add(self, exact: np.ndarray, stored: np.ndarray) -> None:
        """The next U items: their float32 vectors and what the index gives back for them, both (U, D)."""
        self._exact = self._merged(self._exact, exact)
        self._stored = self._merged(self._stored, stored)
        self._seen += len(exact)

    def result(self) -> dict[str, float]:
        """`recall@k` for each k that has as many other items."""
        figures = {}
        for k in self._ks:
            if k < self._seen:
                pairs = zip(self._neighbours(self._exact, k), self._neighbours(self._stored, k), strict=True)
                figures[f"recall@{k}"] = float(np.mean([len(a & b) / k for a, b in pairs]))
        return figures

    def _merged(self, best: tuple[np.ndarray, np.ndarray], block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k = max(self._ks) + 1  # the item itself is among them
        scores, rows = top_k(self._queries, block, k)
        scores, rows = np.hstack([best[0], scores]), np.hstack([best[1], rows + self._seen])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _neighbours(self, best: tuple[np.ndarray, np.ndarray], k: int) -> list[set[int]]:
        return [set(found[found != own][:k].tolist()) for found, own in zip(best[1], self._rows, strict=True)]
