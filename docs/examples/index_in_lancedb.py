"""The vectors of a PixRec index as a LanceDB table: the items nearest to one.

python docs/examples/index_in_lancedb.py INDEX ITEM_ID      (pip install lancedb)
"""

from __future__ import annotations

import sys
import tempfile

import lancedb
import pyarrow as pa

from pixrec.artifact import load_index


def nearest(index: str, item_id: str, k: int = 5) -> list[tuple[str, float]]:
    """(item_id, cosine) of the k items nearest to one, itself among them."""
    version = load_index(index)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(version.vectors.reshape(-1)), version.vectors.shape[1])
    rows = pa.table({"item_id": pa.array(version.item_ids, pa.string()), "vector": vectors})
    with tempfile.TemporaryDirectory() as folder:
        table = lancedb.connect(folder).create_table("items", rows)
        asked = version.vectors[list(version.item_ids).index(item_id)]
        found = table.search(asked).distance_type("cosine").limit(k).to_list()
    return [(row["item_id"], 1.0 - row["_distance"]) for row in found]


if __name__ == "__main__":
    print(*nearest(*sys.argv[1:3]), sep="\n")
