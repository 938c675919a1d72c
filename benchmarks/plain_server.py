"""What PixRec's server is compared with: one process of FastAPI and faiss, without Ray, that does the same work.

    python -m benchmarks.plain_server model index data port

Each request is read and checked, its history encoded alone and searched exactly with faiss, in a thread of the pool.
"""

from __future__ import annotations

import sys
from typing import Any

import faiss
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

import pixrec
from pixrec.query import Query
from pixrec.recommender import load_recommender
from pixrec.serving.bodies import AnswerBody, RecommendBody


def application(model: str, index: str, data: str) -> FastAPI:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    recommender = load_recommender(model, index, data)
    flat = faiss.IndexFlatIP(recommender.item_vectors(recommender.items.item_ids[:1]).shape[1])
    flat.add(np.ascontiguousarray(recommender.item_vectors(recommender.items.item_ids)))
    api = FastAPI()

    @api.get("/version")
    def version() -> dict[str, str]:
        return {"model_version": recommender.model_version, "pixrec": pixrec.__version__}

    @api.get("/readyz")
    def readyz() -> dict[str, bool]:
        return {"ready": True}

    @api.post("/v1/recommend", response_model=AnswerBody)
    def recommend(body: RecommendBody) -> dict[str, Any]:
        if not body.history:
            return recommender.answer([Query([], body.k)])[0].to_dict()
        asked = recommender.read([Query(body.history, body.k)])
        out = asked[0].excluded
        scores, rows = flat.search(recommender.encode(asked), body.k + len(out))
        ids = recommender.items.item_ids
        items = [
            {"item_id": ids[row], "score": score}
            for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
            if row not in out
        ][: body.k]
        unknown = [item_id for item_id in body.history if item_id not in asked[0].rows]
        return {
            "items": items,
            "score_kind": "cosine",
            "model_version": recommender.model_version,
            "index_version": recommender.index_version,
            "unknown_items": unknown,
            "fallback": False,
        }

    return api


if __name__ == "__main__":
    *places, port = sys.argv[1:]
    uvicorn.run(application(*places), port=int(port), log_level="warning")
