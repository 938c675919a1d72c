"""Batch embedding: the catalog through the item tower in a Ray Data actor pool, published as an index version."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data
import torch

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, check_index_writable, index_manifest, index_version, load_model
from pixrec.config import Config, EmbedConfig
from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable
from pixrec.data.sequences import DATASET_MARKER
from pixrec.errors import ArtifactError
from pixrec.model.encoding import Content
from pixrec.schema import CONTENT_HASH, EMBEDDING, IMAGE, ITEM_ID, ITEMS, TEXT_FIELDS


class ItemEmbedder:
    """One actor: loads the model once, turns blocks of prepared items into vectors. Usable without Ray."""

    def __init__(self, model: str, config: EmbedConfig) -> None:
        torch.set_num_threads(config.threads_per_actor)
        device = "cuda" if config.gpus_per_actor and torch.cuda.is_available() else "cpu"
        self._embedder = load_model(model, device).embedder()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Prepared items (U rows) to `item_id`, `embedding` (U, D) and `content_hash`."""
        table = ItemTable(block)
        size = self._embedder.encoder.image_size_px
        images = [table.image(row) for row in range(len(table))]
        contents = [
            Content(table.text(row), None if image is None else decode_image(image, size))
            for row, image in enumerate(images)
        ]
        vectors = self._embedder.contents(contents)
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        hashes = [table.content_hash(row) for row in range(len(table))]
        return pa.table({ITEM_ID: table.item_ids, EMBEDDING: values, CONTENT_HASH: hashes})


def embed(
    model: str, data: str, out: str, config: Config, *, progress: Callable[[str, int, int | None], None]
) -> dict[str, Any]:
    """Embed every item of the prepared data set `data` and publish a version at `out`; returns its manifest."""
    info = storage.read_json(storage.join(data, DATASET_MARKER))
    loaded = load_model(model)
    total, width = int(info["items"]["kept"]), loaded.config.model.embedding_width
    settings = config.embed
    facts = {
        "data": storage.absolute(data),
        "data_from_index": _relative(data, out),
        "data_fingerprint": info["fingerprint"],
    }
    filesystem, path = storage.arrow_location(storage.join(data, ITEMS))
    known = storage.read_schema(storage.join(data, ITEMS)).names
    columns = [name for name in (ITEM_ID, *TEXT_FIELDS, IMAGE) if name in known]
    items = ray.data.read_parquet(path, filesystem=filesystem, columns=columns)
    vectors = items.map_batches(
        ItemEmbedder,
        fn_constructor_args=(storage.absolute(model), settings),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=settings.num_actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor or None,
    )
    with index_version(out, loaded.fingerprint, width, settings.dtype, facts) as writer:
        blocks = cast(Iterable[pa.Table], vectors.iter_batches(batch_format="pyarrow", batch_size=None))
        for block in blocks:
            flat = block.column(EMBEDDING).combine_chunks().flatten().to_numpy()
            ids, hashes = block.column(ITEM_ID).to_pylist(), block.column(CONTENT_HASH).to_pylist()
            writer.add(ids, np.asarray(flat).reshape(-1, width), hashes)
            progress("embed", writer.rows, total)
        if writer.rows != total:
            raise RuntimeError(f"{writer.rows} items were embedded of {total}")
    return index_manifest(out)


def check_ready(model: str, data: str, out: str) -> None:
    """Raise before Ray starts when a part is absent or --out cannot be written."""
    if not storage.exists(storage.join(data, DATASET_MARKER)):
        raise ArtifactError(f"{data} holds no complete data set (no {DATASET_MARKER}); make it with pixrec prepare")
    if not storage.exists(storage.join(model, MODEL_MARKER)):
        raise ArtifactError(f"{model} holds no complete model (no {MODEL_MARKER}); make one with pixrec train")
    check_index_writable(out)


def _relative(data: str, out: str) -> str | None:
    """Path from the index to the data set, so that a moved tree stays whole; None across file systems."""
    if storage.is_remote(data) != storage.is_remote(out):
        return None
    here, there = storage.absolute(out), storage.absolute(data)
    if storage.is_remote(data) and here.split("/")[2] != there.split("/")[2]:
        return None
    return os.path.relpath(there.removeprefix("s3://"), here.removeprefix("s3://"))
