"""Live items that `pixrec embed` made part of a version of an index: `live.arrow` beside its parts, one row each.

The parts hold the items of the data set and nothing else; what came after it lies here whole, with its text and its
picture, so that a version can be served without the store that it was taken from.

Shapes: D width of the shared space · C width of what a search compares.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec import storage
from pixrec.artifact.model import load_model
from pixrec.artifact.versions import VERSIONS
from pixrec.errors import InputError, PixRecError, UnreadableImage, fault_text
from pixrec.live.places import added_items
from pixrec.live.store import AddedItem, EmbeddedVectors
from pixrec.model.catalog import Embedder
from pixrec.model.encoding import Content
from pixrec.schema import CONTENT, CONTENT_HASH, EMBEDDING, IMAGE, ITEM_ID

LIVE, FOLDED = "live_items", "live.arrow"
"""What the manifest says of them, and their file."""
_FIELDS, _TEXT = "fields", "text"
_ROWS_AT_A_TIME = 1000
_SCHEMA = pa.schema(
    [
        (ITEM_ID, pa.string()),
        (_FIELDS, pa.string()),  # JSON
        (_TEXT, pa.string()),
        (IMAGE, pa.binary()),
        (CONTENT_HASH, pa.string()),
        (EMBEDDING, pa.binary()),  # D float32
        (CONTENT, pa.binary()),  # C float16
    ]
)


@dataclass(frozen=True)
class VersionContents:
    """What a version says of items beside their vectors."""

    content_hashes: Callable[[Sequence[str]], Mapping[str, str]] = lambda item_ids: {}
    """the hashes of those of the items that are in its parts"""
    folded: Mapping[str, tuple[AddedItem, EmbeddedVectors]] = field(default_factory=dict)
    """the live items that are part of it, by id"""


def write_folded(folder: str, blocks: Iterable[Sequence[tuple[AddedItem, EmbeddedVectors]]]) -> None:
    """Write the live items of the version that is being made in `folder`, a block at a time."""

    def batches() -> Iterator[pa.RecordBatch]:
        for block in blocks:
            rows = [_row(item, made) for item, made in block]
            yield pa.RecordBatch.from_pylist(rows, _SCHEMA)

    storage.write_batches(storage.join(folder, FOLDED), _SCHEMA, batches())


def fold(model: str, store: str, folder: str, batch_size: int) -> dict[str, Any]:
    """Write the live items of a store into the version that is being made in `folder`, whose parts are there; an item
    whose content stands in a part is one of the data set by now and left out. A worker does, as that takes the model.

    Returns how many there are (`items`), how many of them were `computed`, and the `fault` where there is one.
    """
    counts: Counter[str] = Counter(items=0, computed=0)
    try:
        loaded = load_model(model)
        embedder = loaded.embedder()

        def blocks() -> Iterator[list[tuple[AddedItem, EmbeddedVectors]]]:
            for block in added_items(store, loaded.fingerprint, _ROWS_AT_A_TIME):
                known = content_hashes(folder, [item.item_id for item, _ in block]) if block else {}
                new = [(item, made) for item, made in block if known.get(item.item_id) != item.content_hash]
                lacking = [item for item, made in new if made is None]
                made_now = dict[str, EmbeddedVectors]()
                for start in range(0, len(lacking), batch_size):
                    batch = lacking[start : start + batch_size]
                    made_now |= zip((item.item_id for item in batch), embedded(embedder, batch), strict=True)
                counts.update(items=len(new), computed=len(lacking))
                yield [(item, made_now[item.item_id] if made is None else made) for item, made in new]

        write_folded(folder, blocks())
    except PixRecError as error:
        return {"fault": fault_text(error)}
    return {**counts, "fault": None}


def embedded(embedder: Embedder, items: Sequence[AddedItem]) -> list[EmbeddedVectors]:
    """What the item tower makes of items. Raises InputError with the id of an item whose picture cannot be read."""
    if not items:
        return []
    contents = [Content(item.text, _pixels(embedder, item)) for item in items]
    vectors, content = next(embedder.content_batches([(contents, [item.item_id for item in items])]))
    searched = [None] * len(items) if content is None else content.astype(np.float16)
    return [EmbeddedVectors(*both) for both in zip(vectors, searched, strict=True)]


def _pixels(embedder: Embedder, item: AddedItem) -> np.ndarray | None:
    try:
        return None if item.image is None else embedder.encoder.decode(item.image)
    except UnreadableImage as error:
        raise InputError(f"item {item.item_id!r}: {error}") from None


def version_contents(uri: str, manifest: Mapping[str, Any]) -> VersionContents:
    """What the version of this manifest says; its live items are read."""
    folder = storage.join(uri, VERSIONS, str(manifest["version"]))
    folded: dict[str, tuple[AddedItem, EmbeddedVectors]] = {}
    if manifest.get(LIVE):
        for batch in storage.read_batches(storage.join(folder, FOLDED)):
            folded |= {row[ITEM_ID]: _item(row) for row in batch.to_pylist()}
    return VersionContents(functools.partial(content_hashes, folder), folded)


def content_hashes(folder: str, item_ids: Sequence[str]) -> dict[str, str]:
    """The content hashes of those of the items that are in the parts of a version."""
    wanted, found = pa.array(item_ids, pa.string()), dict[str, str]()
    for file in storage.table_files(folder):
        table = storage.read_table(file, [ITEM_ID, CONTENT_HASH])
        table = table.filter(pc.is_in(table.column(ITEM_ID), value_set=wanted))
        found |= zip(table.column(ITEM_ID).to_pylist(), table.column(CONTENT_HASH).to_pylist(), strict=True)
    return found


def _row(item: AddedItem, made: EmbeddedVectors) -> dict[str, Any]:
    return {
        ITEM_ID: item.item_id,
        _FIELDS: json.dumps(dict(item.fields)),
        _TEXT: item.text,
        IMAGE: item.image,
        CONTENT_HASH: item.content_hash,
        EMBEDDING: made.vector.astype("<f4").tobytes(),
        CONTENT: None if made.content is None else made.content.astype("<f2").tobytes(),
    }


def _item(row: Mapping[str, Any]) -> tuple[AddedItem, EmbeddedVectors]:
    searched = None if row[CONTENT] is None else np.frombuffer(row[CONTENT], "<f2")
    added = AddedItem(row[ITEM_ID], json.loads(row[_FIELDS]), row[_TEXT], row[IMAGE], row[CONTENT_HASH])
    return added, EmbeddedVectors(np.frombuffer(row[EMBEDDING], "<f4"), searched)
