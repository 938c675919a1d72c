"""The vectors of a PixRec index in Qdrant's client, which needs no server in this form: the items nearest to one.

python docs/examples/index_in_qdrant.py INDEX ITEM_ID      (pip install qdrant-client)
"""

from __future__ import annotations

import sys

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

from pixrec.artifact import load_index


def nearest(index: str, item_id: str, k: int = 5) -> list[tuple[str, float]]:
    """(item_id, cosine) of the k items nearest to one, itself among them."""
    version = load_index(index)
    client = QdrantClient(":memory:")  # or url="http://..."
    client.create_collection("items", VectorParams(size=version.vectors.shape[1], distance=Distance.COSINE))
    for first in range(0, len(version.item_ids), 1000):
        part = enumerate(zip(version.item_ids[first : first + 1000], version.vectors[first:], strict=False), first)
        points = [PointStruct(id=row, vector=v.tolist(), payload={"item_id": name}) for row, (name, v) in part]
        client.upsert("items", points)
    asked = version.vectors[list(version.item_ids).index(item_id)].tolist()
    found = client.query_points("items", query=asked, limit=k).points
    client.close()
    return [(point.payload["item_id"], point.score) for point in found]


if __name__ == "__main__":
    print(*nearest(*sys.argv[1:3]), sep="\n")
