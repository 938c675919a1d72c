"""Search by photograph: of photographs of groceries, whether the product is found among the iconic pictures.

    python -m benchmarks.quality.photos tables GROCERY_PHOTOS TABLES
    pixrec prepare --items TABLES/items.parquet --interactions TABLES/interactions.parquet --out data
    pixrec train --data data --out model && pixrec embed --model model --data data --out index
    python -m benchmarks.quality.photos search GROCERY_PHOTOS --model model --index index [--photos 300]
    python -m benchmarks.quality.photos search GROCERY_PHOTOS --url http://127.0.0.1:8000   # asks pixrec serve
    python -m benchmarks.quality.photos ceiling GROCERY_PHOTOS --data data

`tables` joins the listings of the market, which simulated shoppers bought, and the products, which nobody did, into
one catalog with a column `kind`. `search` takes photographs that are no listing's picture and ranks the products (the
filter `kind: product`) by the photograph, by the words of its coarse class, and by both. `ceiling` says what
recommendations in the market could reach at best.
"""

from __future__ import annotations

import argparse
import base64
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import pixrec
from pixrec.data.sequences import Users, load_dataset
from pixrec.evaluation import bootstrap_ci
from pixrec.metrics import count_ties, target_ranks, user_random_tie_metrics
from pixrec.scorers.baselines import ItemTransition

Search = Callable[[str, bytes | None, int], list[str]]
PRODUCTS = {"kind": ["product"]}


def write_tables(source: Path, out: Path) -> None:
    """The catalog of listings and products, and the market's events."""
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, kind in (("items", "listing"), ("products", "product")):
        table = pq.read_table(source / f"{name}.parquet")
        pictures = [str((source / place).absolute()) for place in table.column("image_uri").to_pylist()]
        at = table.column_names.index("image_uri")
        table = table.set_column(at, "image_uri", pa.array(pictures)).append_column(
            "kind", pa.array([kind] * len(table))
        )
        parts.append(table)
    pq.write_table(pa.concat_tables(parts, promote_options="default"), out / "items.parquet")
    pq.write_table(pq.read_table(source / "interactions.parquet"), out / "interactions.parquet")


def photographs(source: Path, wanted: int, seed: int) -> list[dict[str, Any]]:
    """Photographs that are no listing's picture, drawn at random, each with its product and the words of its class."""
    listed = set(pq.read_table(source / "items.parquet").column("image_uri").to_pylist())
    words = {row["item_id"]: row["category"] for row in pq.read_table(source / "products.parquet").to_pylist()}
    rows = [row for row in pq.read_table(source / "photos.parquet").to_pylist() if row["image_uri"] not in listed]
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), min(wanted, len(rows)), replace=False))
    return [
        {"data": (source / rows[i]["image_uri"]).read_bytes(), "product": rows[i]["item_id"],
         "words": words[rows[i]["item_id"]]}
        for i in drawn
    ]  # fmt: skip


def ceiling(source: Path, data: str) -> dict[str, list[float]]:
    """Recall@10 with its interval of who is told the product of each listing: what followed a product in training, all
    its listings alike. Shoppers of the market choose by product, so pictures can hardly bring more."""
    product_of = {row["image_uri"]: row["item_id"] for row in pq.read_table(source / "photos.parquet").to_pylist()}
    picture_of = dict(
        zip(
            *(pq.read_table(source / "items.parquet").column(c).to_pylist() for c in ("item_id", "image_uri")),
            strict=True,
        )
    )
    dataset = load_dataset(data)
    names = [product_of.get(picture_of.get(item, ""), item) for item in dataset.items.item_ids]
    products = np.unique(names, return_inverse=True)[1]
    listed = np.array([item in picture_of for item in dataset.items.item_ids])
    scorer = ItemTransition([products[history] for history in dataset.training_histories()], products.max() + 1)
    held_out = dataset.held_out("test")
    users = Users(held_out.user_ids, [products[history] for history in held_out.histories])
    shares = scorer.scores(users).exp()[:, products] / torch.from_numpy(np.bincount(products, listed)[products])
    shares[:, ~listed] = 0
    ranks = target_ranks(shares.numpy(), held_out.targets)
    ties = count_ties(shares.numpy(), held_out.targets)
    hits = user_random_tie_metrics(ranks, ties, (10,))["recall@10"]
    cold = dataset.training_counts()[held_out.targets] == 0
    found = {"all": hits, "cold": hits[cold]}
    return {
        name: [len(part), *(round(float(v), 4) for v in (part.mean(), *bootstrap_ci(part)))]
        for name, part in found.items()
        if len(part)
    }


def measure(search: Search, photos: list[dict[str, Any]], products: int) -> dict[str, dict[str, Any]]:
    """R@1 and R@5 with their intervals over the photographs, for each way of asking."""
    asked = {
        "photo": lambda photo: search("", photo["data"], products),
        "words": lambda photo: search(photo["words"], None, products),
        "photo and words": lambda photo: search(photo["words"], photo["data"], products),
    }
    found = {}
    for name, ask in asked.items():
        started = time.monotonic()
        places = np.array([ask(photo).index(photo["product"]) for photo in photos])
        row = {"photos": len(photos), "seconds_each": round((time.monotonic() - started) / len(photos), 3)}
        for k in (1, 5):
            hits = (places < k).astype(float)
            row[f"recall@{k}"] = [round(float(v), 3) for v in (hits.mean(), *bootstrap_ci(hits))]
        found[name] = row
    return found


def served(url: str) -> Search:
    """Asks `POST /v1/search`."""

    def search(text: str, image: bytes | None, k: int) -> list[str]:
        body = {"text": text, "k": k, "filters": PRODUCTS}
        body["image_base64"] = None if image is None else base64.b64encode(image).decode()
        request = urllib.request.Request(
            f"{url}/v1/search", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [item["item_id"] for item in json.load(answer)["items"]]

    return search


def loaded(model: str, index: str) -> Search:
    """Asks the recommender that the server would ask."""
    recommender = pixrec.load_recommender(model, index)
    return lambda text, image, k: [item for item, _ in recommender.search(text, image, k, PRODUCTS).items]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tables", "search", "ceiling"])
    parser.add_argument("source", type=Path, help="the folder grocery_photos")
    parser.add_argument("out", type=Path, nargs="?", help="where the tables go")
    parser.add_argument("--model")
    parser.add_argument("--index")
    parser.add_argument("--url")
    parser.add_argument("--data", help="the market, prepared")
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.what == "tables":
        write_tables(a.source, a.out)
        return
    if a.what == "ceiling":
        print(json.dumps(ceiling(a.source, a.data), indent=2))
        return
    products = len(pq.read_table(a.source / "products.parquet"))
    search = served(a.url.rstrip("/")) if a.url else loaded(a.model, a.index)
    print(json.dumps(measure(search, photographs(a.source, a.photos, a.seed), products), indent=2))


if __name__ == "__main__":
    main()
