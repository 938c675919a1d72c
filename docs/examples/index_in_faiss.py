"""The vectors of a PixRec index in faiss: the items nearest to one.

python docs/examples/index_in_faiss.py INDEX ITEM_ID      (pip install faiss-cpu)
"""

from __future__ import annotations

import sys

import faiss

from pixrec.artifact import load_index


def nearest(index: str, item_id: str, k: int = 5) -> list[tuple[str, float]]:
    """(item_id, cosine) of the k items nearest to one, itself among them."""
    version = load_index(index)
    searched = faiss.IndexFlatIP(version.vectors.shape[1])  # vectors are of length 1: inner product is cosine
    searched.add(version.vectors)
    row = list(version.item_ids).index(item_id)
    scores, rows = searched.search(version.vectors[row : row + 1], k)
    return [(version.item_ids[found], float(score)) for found, score in zip(rows[0], scores[0], strict=True)]


if __name__ == "__main__":
    print(*nearest(*sys.argv[1:3]), sep="\n")
