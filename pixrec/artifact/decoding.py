"""What the workers of batch embedding do before the model: hash items, read and decode them. Plain functions.

Usable without Ray; Arrow tables in, Arrow tables out. Pictures go from stage to stage as uint8 at the model's size.
A cluster runs many of these workers: what is imported here knows neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.artifact.stored import item_keys
from pixrec.config import Modalities
from pixrec.data.images import PictureSize, decode_picture
from pixrec.data.items import PICTURES_FOLDER, ItemTable, content_hash
from pixrec.data.pictures import Pictures, open_pictures
from pixrec.data.tokens import StoredPictures, stored_pictures
from pixrec.errors import PixRecError, UnreadableImage, fault_text
from pixrec.schema import CONTENT_HASH, IMAGE, ITEM_ID, TEXT_FIELDS

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
        yield receipt(file=piece["file"], keys=b"".join(keys), fault=fault)


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


def read_pictures(rows: pa.Table, *, uri: str) -> pa.Table:
    """The pictures of the data set at the rows `id`, as they are stored: `image`, null where an item has none."""
    return pa.table({IMAGE: pa.array(open_pictures(uri).read(rows.column("id").to_numpy()), pa.binary())})


def receipt(**values: object) -> pa.Table:
    """One row of what a worker tells the driver; `fault` is a column of text also where it is null."""
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
