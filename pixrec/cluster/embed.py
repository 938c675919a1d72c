"""Batch embedding: the catalog through the item tower in Ray Data, published as an index version.

Two stages that overlap: CPU tasks read and decode, model actors embed. An actor stores what it has computed at once,
in the index's work folder, and sends only a receipt to the driver, which at the end puts the version together. So a
run that is killed anywhere is finished by the next: it computes what neither the current version nor the work folder
holds. Two runs for one index at a time do no harm: each publishes a whole version, and the later one is current.
"""

from __future__ import annotations

import functools
import os.path
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, check_index_writable, index_version
from pixrec.artifact.approximate import add_structure, wants_structure
from pixrec.artifact.decoding import decode_items, hash_items
from pixrec.artifact.embedding import ItemEmbedder, find_store
from pixrec.artifact.folded import LIVE, fold
from pixrec.artifact.index import APPROXIMATE, IndexWriter
from pixrec.artifact.sources import Sources, reusable, write_chosen
from pixrec.artifact.stored import KEY
from pixrec.artifact.unfinished import Unfinished, Vanished, sweep
from pixrec.config import Config, EmbedConfig, ModelConfig, load_config
from pixrec.console import Progress, Rate
from pixrec.data.images import PictureSize, largest_side, read_size
from pixrec.data.items import part_starts, read_info
from pixrec.data.sequences import DATASET_MARKER
from pixrec.data.tokens import texts_place, tokens_place
from pixrec.errors import ArtifactError, ConfigError, InputError, OutputError, raise_fault
from pixrec.live.places import REMOTE, store_place
from pixrec.schema import ITEMS

_ATTEMPTS = 3
_PIXEL_BYTES = 128 * 1024**2


@dataclass(frozen=True)
class ModelFacts:
    """What the driver knows of a model; the weights are the actors' business."""

    uri: str
    fingerprint: str
    width: int
    picture_size: PictureSize
    config: ModelConfig

    def part_items(self, config: EmbedConfig) -> int:
        """Items embedded and stored at a time: whole batches, and no more decoded pictures than memory likes."""
        room = _PIXEL_BYTES // (3 * largest_side(self.picture_size) ** 2)
        return config.batch_size * max(1, min(config.max_part_items, room) // config.batch_size)


def embed(
    model: str, data: str, out: str, config: Config, *, progress: Progress, current: bool = True
) -> dict[str, Any]:
    """Publish a version at `out` that holds every item of the prepared data set `data`, and make it the one in use
    unless `current` is False; returns its manifest.

    Rows of the current version whose item, content and model are the same are taken over.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _embed(model_facts(model), data, out, config.embed, progress, current)
        except Vanished:
            continue  # another run published what we counted on: plan again, with its version at hand
    raise OutputError(f"{out}: other runs of pixrec embed keep clearing up what this one needs; wait for them")


def _embed(
    model: ModelFacts, data: str, out: str, config: EmbedConfig, progress: Progress, current: bool
) -> dict[str, Any]:
    info = read_info(data)
    total = int(info["items"]["kept"])
    structured = wants_structure(total, config)
    files = [storage.absolute(file) for file in storage.table_files(storage.join(data, ITEMS))]
    unfinished = Unfinished(storage.absolute(out), model.fingerprint)
    left_behind = unfinished.files()
    content_width = model.config.content_width if model.config.text_encoder else 0
    reused_parts, before = reusable(out, model.fingerprint, config.dtype, content_width)
    resumed_parts = [file for file in left_behind if file.endswith(".parquet")]
    sources = Sources()
    for part in [*reused_parts, *resumed_parts]:
        sources.add(part)
    whole = [
        {"file": file, "start": start, "rows": None}
        for file, start in zip(files, part_starts(info["item_parts"]), strict=True)
    ]
    pieces, wanted = _compare(whole, sources, config, progress) if len(sources) else (whole, [])
    rejected = stored = 0
    if not pieces:
        progress("embed", total, total, "nothing new")
    else:
        texts = texts_place(storage.absolute(data), model.config, config.picture_tokens)
        work = pipeline(pieces, model, config, unfinished, _store(model, data, config), texts)
        rejected, stored = _compute(work, sources, wanted, total, progress)
    if sum(map(len, wanted)) != total:
        raise RuntimeError(f"{sum(map(len, wanted))} items were embedded of {total}")

    chosen = sources.choose(wanted)
    taken = {part.file: len(part.rows) for part in chosen}
    reused, resumed = (sum(taken.get(file, 0) for file in parts) for parts in (reused_parts, resumed_parts))
    facts = {
        "data": storage.absolute(data),
        "data_from_index": _relative(data, out),
        "data_fingerprint": info["fingerprint"],
        "model": model.uri,
        "reused": reused,
        "computed": total - reused,
        "resumed": resumed,
        "redone": unfinished.lost_rows(unfinished.files()),
        "pictures_rejected": rejected,
        "pictures_from_tokens": stored,
    }
    fingerprint, width = model.fingerprint, model.width
    with index_version(out, fingerprint, width, config.dtype, facts, content_width, current=current) as writer:
        write_chosen(writer, chosen, config.dtype, before)
        writer.facts["text_alone"] = writer.rows - writer.with_image
        if (store := _live_store(config, out)) is not None:
            writer.facts |= _folded(writer, model, store, config)
        if structured:
            progress("approximate", 0, total, "")
            writer.facts[APPROXIMATE] = _structure(writer, config)
            progress("approximate", total, total, "")
    unfinished.clear(left_behind)
    sweep(out)
    return writer.manifest


def _compare(
    whole: list[dict[str, Any]], sources: Sources, config: EmbedConfig, progress: Progress
) -> tuple[list[dict[str, Any]], list[pa.Array]]:
    """What is left to embed: pieces of files with the numbers of their rows; and the keys of all other items."""
    found: dict[str, pa.Array] = {}
    scan = ray.data.from_items(whole, override_num_blocks=len(whole)).map_batches(
        hash_items, batch_size=1, batch_format="pyarrow", num_cpus=config.cpus_per_decode
    )
    for block in _blocks(scan):
        for row in block.to_pylist():
            raise_fault(row["fault"])
            found[row["file"]] = _keys(row["keys"])
            progress("compare", len(found), len(whole), "files")
    names, keys = list(found), pa.chunked_array(found.values(), KEY)
    known = np.split(sources.known(keys.combine_chunks()), np.cumsum([len(found[name]) for name in names])[:-1])
    start_of = {piece["file"]: piece["start"] for piece in whole}
    pieces = [
        {"file": name, "start": start_of[name], "rows": np.flatnonzero(~old).astype(np.int32).tobytes()}
        for name, old in zip(names, known, strict=True)
        if not old.all()
    ]
    return pieces, [found[name].filter(pa.array(old)) for name, old in zip(names, known, strict=True)]


def _compute(
    work: ray.data.Dataset, sources: Sources, wanted: list[pa.Array], total: int, progress: Progress
) -> tuple[int, int]:
    """Run a `pipeline`; adds its parts to `sources` and their keys to `wanted`. Returns how many pictures were
    unreadable, and how many had stored tokens."""
    done, rejected, stored, rate = sum(map(len, wanted)), 0, 0, Rate()
    progress("embed", done, total, "")
    for block in _blocks(work):
        for receipt in block.to_pylist():
            raise_fault(receipt["fault"])
            keys = _keys(receipt["keys"])
            sources.add(receipt["part"], keys)
            wanted.append(keys)
            done, rejected, stored = done + len(keys), rejected + receipt["rejected"], stored + receipt["stored"]
            speed = rate.add(receipt["pictures"], "pictures/s")
            progress("embed", done, total, f"{speed}, {rejected} rejected")
    return rejected, stored


def _live_store(config: EmbedConfig, out: str) -> str | None:
    """The place of the store whose items become part of the version; None: there is none."""
    if config.live_items is None:
        return None
    place = store_place(config.live_items, storage.absolute(out))
    there = place != "none" and (place.startswith(REMOTE) or storage.exists(place))
    if config.live_items not in ("index", "none") and not there:
        raise InputError(f"embed.live_items is {config.live_items}: there is no such store")
    return place if there else None


def _folded(writer: IndexWriter, model: ModelFacts, store: str, config: EmbedConfig) -> dict[str, Any]:
    """Make the live items of a store part of the version. A worker of this node does, since that takes the model and
    the store may be a file."""
    writer.flush()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    work = ray.remote(num_cpus=config.cpus_per_actor)(fold).options(scheduling_strategy=here)
    counts = ray.get(work.remote(model.uri, store, storage.absolute(writer.folder), config.batch_size))
    raise_fault(counts["fault"])
    return {LIVE: counts["items"], "live_computed": counts["computed"]}


def _structure(writer: IndexWriter, config: EmbedConfig) -> dict[str, Any]:
    """Add the structure for approximate search to the version. A worker does, since that takes the vectors."""
    writer.flush()
    add = ray.remote(num_cpus=config.cpus_per_actor)(add_structure)
    folder = storage.absolute(writer.folder)
    facts = ray.get(add.remote(folder, writer.rows, writer.width, writer.dtype, config))
    raise_fault(facts.get("fault"))
    return facts


def _store(model: ModelFacts, data: str, config: EmbedConfig) -> str | None:
    """The store of picture tokens that fits the model. A worker looks, since that takes the weights."""
    place = tokens_place(storage.absolute(data), model.config, config.picture_tokens)
    if place is None or not storage.is_folder(place):
        return None
    look = ray.remote(num_cpus=config.cpus_per_actor)(find_store)
    found = ray.get(look.remote(model.uri, storage.absolute(place)))
    raise_fault(found["fault"])
    return found["store"]


def pipeline(
    pieces: list[dict[str, Any]],
    model: ModelFacts,
    config: EmbedConfig,
    unfinished: Unfinished,
    tokens: str | None = None,
    texts: str | None = None,
) -> ray.data.Dataset:
    """The two stages over `pieces` (`file`, `start`; `rows` as int32 bytes, None for all): receipts of stored parts.

    `tokens` is a store of picture tokens that fits the model, `texts` a place that may have vectors of texts.
    """
    part_items = model.part_items(config)
    context = ray.data.DataContext.get_current().copy()
    part_bytes = part_items * 3 * largest_side(model.picture_size) ** 2
    context.target_max_block_size = max(1, part_bytes)  # hand on what fills a part
    with ray.data.DataContext.current(context):
        items = ray.data.from_items(pieces, override_num_blocks=len(pieces))
    decoded = items.map_batches(
        functools.partial(
            decode_items, picture_size=model.picture_size, modalities=model.config.modalities, tokens=tokens
        ),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=config.cpus_per_decode,
        max_calls=0,  # the default; but stages whose settings are equal would be fused, and could not overlap
    )
    return decoded.map_batches(
        ItemEmbedder,
        fn_constructor_args=(model.uri, config, unfinished, tokens, texts),
        batch_size=part_items,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )


def check_ready(model: str, data: str, out: str) -> None:
    """Raise before Ray starts when a part is absent or --out cannot be written."""
    if not storage.exists(storage.join(data, DATASET_MARKER)):
        raise ArtifactError(f"{data} holds no complete data set (no {DATASET_MARKER}); make it with pixrec prepare")
    model_facts(model)
    check_index_writable(out)


def model_facts(uri: str) -> ModelFacts:
    """Raises ArtifactError where there is no model."""
    if not storage.exists(storage.join(uri, MODEL_MARKER)):
        raise ArtifactError(f"{uri} holds no complete model (no {MODEL_MARKER}); make one with pixrec train")
    try:
        config = load_config(storage.read_text(storage.join(uri, "config.yaml"))).model
        pictures = storage.read_json(storage.join(uri, "processor", "preprocessor_config.json"))
        fingerprint = str(storage.read_json(storage.join(uri, MODEL_MARKER))["fingerprint"])
        size = read_size(pictures)
    except (InputError, ConfigError, KeyError, TypeError) as error:
        raise ArtifactError(f"{uri} is damaged: {' '.join(str(error).split())[:200]}; train it again") from None
    return ModelFacts(storage.absolute(uri), fingerprint, config.index_width, size, config)


def _blocks(data: ray.data.Dataset) -> Iterator[pa.Table]:
    return cast(Iterator[pa.Table], data.iter_batches(batch_format="pyarrow", batch_size=None))


def _keys(data: bytes) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(KEY, len(data) // KEY.byte_width, [None, pa.py_buffer(data)])


def _relative(data: str, out: str) -> str | None:
    """Path from the index to the data set, so that a moved tree stays whole; None across file systems."""
    if storage.is_remote(data) != storage.is_remote(out):
        return None
    here, there = storage.absolute(out), storage.absolute(data)
    if storage.is_remote(data) and here.split("/")[2] != there.split("/")[2]:
        return None
    return os.path.relpath(there.removeprefix("s3://"), here.removeprefix("s3://"))
