"""What the workers of batch embedding do: hash items, decode them, embed them. Plain functions and one class.

Usable without Ray; Arrow tables in, Arrow tables out. Pictures go from stage to stage as uint8 at the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from pixrec import storage
from pixrec.artifact import load_model
from pixrec.artifact.stored import item_keys, to_table
from pixrec.artifact.unfinished import Unfinished
from pixrec.config import EmbedConfig, Modalities
from pixrec.data.images import PictureSize, decode_picture
from pixrec.data.items import PICTURES_FOLDER, ItemTable, content_hash
from pixrec.data.pictures import Pictures, open_pictures
from pixrec.errors import ArtifactError, PixRecError, UnreadableImage, fault_text, raise_fault
from pixrec.model.catalog import Embedder
from pixrec.model.encoders import EncoderTower
from pixrec.model.encoding import Content
from pixrec.model.texts import open_texts
from pixrec.model.vision import (
    PictureTokens,
    StoredPictures,
    fitting_store,
    open_store,
    stored_pictures,
)
from pixrec.schema import CONTENT_HASH, ITEM_ID, TEXT_FIELDS

PIXELS, HEIGHT, TOKENS_OF, TEXT = "pixels", "height", "tokens_of", "text"
REJECTED_PICTURE, FAULT = "rejected_picture", "fault"
DECODED = pa.schema(
    [
        (ITEM_ID, pa.string()),
        (TEXT, pa.string()),
        (PIXELS, pa.binary()),  # (height, width, 3) uint8; null where the model is to see no picture, or has its tokens
        (HEIGHT, pa.int32()),  # of the pixels
        (TOKENS_OF, pa.binary()),  # hash of a picture whose tokens are stored
        (REJECTED_PICTURE, pa.bool_()),
        (CONTENT_HASH, pa.string()),
        (FAULT, pa.string()),  # of a row that is no item: an error of ours, as `errors.fault_text`
    ]
)
_COLUMNS = [ITEM_ID, *TEXT_FIELDS]
_ROWS_READ = 128


def hash_items(pieces: pa.Table) -> Iterator[pa.Table]:
    """For each `file` of prepared items, whose first item is row `start`, the keys of its rows: `file`, `keys` (16
    bytes a row), `fault`."""
    for piece in pieces.to_pylist():
        keys, fault = [], None
        try:
            for table, pictures in _rows(piece["file"], piece["start"], None):
                hashes = [content_hash(table.text(row), picture) for row, picture in enumerate(pictures)]
                keys += item_keys(table.item_ids, hashes).to_pylist()
        except PixRecError as error:
            fault = fault_text(error)
        yield _row(file=piece["file"], keys=b"".join(keys), fault=fault)


def decode_items(
    pieces: pa.Table, *, picture_size: PictureSize, modalities: Modalities, tokens: str | None = None
) -> Iterator[pa.Table]:
    """The items of each piece, as `DECODED` says: `file`, the row `start` of its first item, and the numbers of the
    `rows` in it (int32 bytes; null: all).

    A picture that cannot be read leaves the item with its text alone. One that has its tokens in the store `tokens`
    is not decoded.
    """
    for piece in pieces.to_pylist():
        wanted = None if piece["rows"] is None else np.frombuffer(piece["rows"], np.int32)
        try:
            stored = None if tokens is None else stored_pictures(tokens)
            for table, pictures in _rows(piece["file"], piece["start"], wanted):
                yield _decoded(table, pictures, picture_size, modalities, stored)
        except PixRecError as error:
            yield pa.Table.from_pylist([{FAULT: fault_text(error)}], schema=DECODED)


def find_store(model: str, place: str) -> dict[str, str | None]:
    """The `store` below `place` that holds what this model's vision part makes of pictures; `fault` as elsewhere."""
    try:
        return {"store": fitting_store(place, load_model(model).tower.backbone), "fault": None}
    except PixRecError as error:
        return {"store": None, "fault": fault_text(error)}


def _row(**values: object) -> pa.Table:
    """One row; `fault` is a column of text also where it is null."""
    table = pa.Table.from_pylist([values])
    at = table.column_names.index(FAULT)
    return table.set_column(at, FAULT, table.column(at).cast(pa.string()))


def _rows(file: str, start: int, wanted: np.ndarray | None) -> Iterator[tuple[ItemTable, list[bytes | None]]]:
    """The wanted rows of a file of prepared items (int32, ascending; None: all) and their pictures, a few at a time.

    `start` is the row of its first item in the data set.
    """
    pictures: Pictures | None = None
    first = 0
    for table in storage.stream_table(file, _COLUMNS, _ROWS_READ):
        rows, first = np.arange(first, first + len(table)), first + len(table)
        if wanted is not None:
            table, rows = table.take(wanted[np.isin(wanted, rows)] - rows[0]), wanted[np.isin(wanted, rows)]
        if len(table):
            pictures = pictures or open_pictures(storage.join(storage.parent(storage.parent(file)), PICTURES_FOLDER))
            yield ItemTable(table), pictures.read(start + rows)


def _decoded(
    table: ItemTable,
    pictures: list[bytes | None],
    size: PictureSize,
    modalities: Modalities,
    stored: StoredPictures | None,
) -> pa.Table:
    columns: dict[str, list[object]] = {name: [] for name in DECODED.names}
    for row, (item_id, picture) in enumerate(zip(table.item_ids, pictures, strict=True)):
        data = None if modalities == "text" else picture
        pixels, height, rejected = None, None, False
        tokens_of = None if data is None or stored is None else stored.hash_of(data)
        if data is not None and tokens_of is None:
            try:
                decoded = decode_picture(data, size)
                pixels, height = decoded.tobytes(), len(decoded)
            except UnreadableImage:
                rejected = True
        text = table.text(row)
        values = (item_id, text, pixels, height, tokens_of, rejected, content_hash(text, picture), None)
        for name, value in zip(DECODED.names, values, strict=True):
            columns[name].append(value)
    return pa.table(columns, schema=DECODED)


class ItemEmbedder:
    """One actor: loads the model once, turns blocks of decoded items into stored parts."""

    def __init__(
        self,
        model: str,
        config: EmbedConfig,
        unfinished: Unfinished,
        tokens: str | None = None,
        texts: str | None = None,
    ) -> None:
        """tokens: the store that `decode_items` looked into; texts: the place below which vectors of texts may lie."""
        self._model, self._config, self._unfinished = model, config, unfinished
        self._store, self._texts = tokens, texts

    def __call__(self, block: pa.Table) -> pa.Table:
        """Embed and store U decoded items; the receipt says `part`, `keys` (16 bytes an item, in the part's order),
        how many `pictures` were seen, how many of them `stored` as tokens and how many `rejected`, and the `fault`
        where there is one instead."""
        try:
            for fault in block.column(FAULT).drop_null().to_pylist():
                raise_fault(fault)
            return _row(**self._stored(block), fault=None)
        except PixRecError as error:
            return _row(part="", keys=b"", pictures=0, stored=0, rejected=0, fault=fault_text(error))

    def _stored(self, block: pa.Table) -> dict[str, object]:
        name = self._unfinished.start(len(block))
        item_ids, hashes = block.column(ITEM_ID).to_pylist(), block.column(CONTENT_HASH).to_pylist()
        stored = block.column(TOKENS_OF).is_valid().to_numpy()
        has_image = block.column(PIXELS).is_valid().to_numpy() | stored
        vectors, content = self.vectors(block)
        part = self._unfinished.finish(name, to_table(item_ids, vectors, hashes, has_image, "float32", content))
        return {
            "part": part,
            "keys": b"".join(item_keys(item_ids, hashes).to_pylist()),
            "pictures": int(has_image.sum()),
            "stored": int(stored.sum()),
            "rejected": sum(block.column(REJECTED_PICTURE).to_pylist()),
        }

    def vectors(self, block: pa.Table) -> tuple[np.ndarray, np.ndarray | None]:
        """Item vectors (U, D) of decoded items, and what a search compares (U, C) where that is something else; items
        of like length share a forward pass, so little is padding."""
        texts, item_ids = block.column(TEXT).to_pylist(), block.column(ITEM_ID).to_pylist()
        pictures = self._pictures(block)
        order = sorted(range(len(texts)), key=lambda row: (pictures[row] is not None, len(texts[row])))
        batches = []
        for start in range(0, len(order), self._config.batch_size):
            rows = order[start : start + self._config.batch_size]
            batches.append(([Content(texts[row], pictures[row]) for row in rows], [item_ids[row] for row in rows]))
        made, place = list(self._embedder.content_batches(batches)), np.argsort(order)
        content = [searched for _, searched in made if searched is not None]
        vectors = np.concatenate([of_batch for of_batch, _ in made])
        return vectors[place], np.concatenate(content)[place] if content else None

    def _pictures(self, block: pa.Table) -> list[np.ndarray | None]:
        """Of each item what `Content` takes: pixels (height, width, 3), stored tokens (K, X), or nothing."""
        hashes = block.column(TOKENS_OF).to_pylist()
        stored = [None] * len(hashes) if self._tokens is None else self._tokens.of_hashes(hashes)
        if any(wanted is not None and tokens is None for wanted, tokens in zip(hashes, stored, strict=True)):
            raise ArtifactError(f"{self._store}: its picture tokens went while they were in use; run it again")
        return [
            np.frombuffer(pixels.as_buffer(), np.uint8).reshape(height.as_py(), -1, 3) if pixels.is_valid else tokens
            for pixels, height, tokens in zip(block.column(PIXELS), block.column(HEIGHT), stored, strict=True)
        ]

    @cached_property
    def _tokens(self) -> PictureTokens | None:
        """Opened for the weights that are loaded here, whatever the store was chosen by."""
        return open_store(storage.parent(self._store), self._embedder.tower.backbone) if self._store else None

    @cached_property
    def _embedder(self) -> Embedder:
        """Loaded at the first block and not before: from there an error of ours reaches the driver."""
        torch.set_num_threads(self._config.threads_per_actor)
        device = "cuda" if self._config.gpus_per_actor and torch.cuda.is_available() else "cpu"
        embedder = load_model(self._model, device).embedder()
        if self._texts is not None and isinstance(embedder.tower, EncoderTower):
            embedder.tower.stored_texts = open_texts([self._texts], embedder.tower.backbone)
        embedder.precision = self._config.precision
        return embedder
