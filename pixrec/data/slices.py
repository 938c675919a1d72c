"""The items table in slices, each read, its pictures fetched and shrunk, and written as files of a data set of its own.

The files carry the slice's number: so the items keep their order, and a slice that is tried twice replaces its files
and doubles nothing. Knows tables and pictures; knows no events and no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pixrec import errors, storage
from pixrec.config import PrepareConfig
from pixrec.data import pictures, tables
from pixrec.data.fetch import Fetcher, Picture
from pixrec.data.images import shrink_image
from pixrec.data.sequences import ITEMS_FOLDER, PICTURES_FOLDER, REJECTS_FOLDER
from pixrec.schema import IMAGE, IMAGE_URI, IMAGE_URIS, IMAGES, ITEM_ID, MISSING, OK, REJECTED

# A slice reads its row group up to its own rows, so a group is cut into no more than 64 slices, and the whole table
# into a thousand or so, each of them a file; unless a slice would then hold more than 4096 pictures (20 KB each at
# 256 px) or more than 64 MiB of input.
_SLICES_PER_GROUP, _SLICES, _ROWS_LEAST, _ROWS_MOST, _BYTES_MOST = 64, 1024, 128, 4096, 64 * 1024**2


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a row group of an items file; `number` counts the slices in input order."""

    number: int
    file: str
    group: int
    start: int
    stop: int


def slices(files: list[str]) -> list[Slice]:
    """All rows of the items files, in order."""
    found: list[Slice] = []
    groups_of = {file: storage.row_groups(file) for file in files}
    least = max(_ROWS_LEAST, sum(group.rows for groups in groups_of.values() for group in groups) // _SLICES)
    for file, groups in groups_of.items():
        for group, (rows, num_bytes) in enumerate(groups):
            step = min(max(-(-rows // _SLICES_PER_GROUP), least), _ROWS_MOST)
            step = max(min(step, _BYTES_MOST * rows // max(num_bytes, 1)), 1)
            step = -(-rows // max(1, -(-rows // step)))  # slices of a group are of like size
            for start in range(0, rows, step):
                found.append(Slice(len(found), file, group, start, min(start + step, rows)))
    return found


def prepare_slice(
    row: dict[str, Any], *, staging: str, config: PrepareConfig, cache: str | None = None
) -> dict[str, Any]:
    """Read one slice (the fields of `Slice`), store its pictures, write its items and its rejected pictures.

    The answer counts `items` and pictures by status, and holds the `hash` of the file of items and that of `pictures`.
    """
    piece = Slice(**row)
    table = tables.with_id(storage.read_rows(piece.file, piece.group, piece.start, piece.stop))
    found = _pictures(table, storage.parent(piece.file), config, cache)
    statuses = [picture.status for picture in found]
    items = tables.prepared_items(table, statuses)
    faults = [(key, picture.reason) for key, picture in zip(_values(items, ITEM_ID), found, strict=True)]
    keys, reasons = [key for key, reason in faults if reason], [reason for _, reason in faults if reason]
    if not storage.exists(table_rejects(staging)):  # written first; gone with the folder of a run that failed
        raise errors.OutputError(f"{staging} is gone: the run that made it has ended; start it again")
    if keys:
        rejected = tables.rejects(IMAGES, keys, reasons)
        storage.write_table(storage.join(staging, REJECTS_FOLDER, f"images-{piece.number:06d}.parquet"), rejected)
    return {
        "number": piece.number,
        "items": len(items),
        "hash": storage.write_table(_part(staging, ITEMS_FOLDER, piece.number), items),
        "pictures": pictures.write_part(
            storage.join(staging, PICTURES_FOLDER), piece.number, [picture.data for picture in found]
        ),
        **{status: statuses.count(status) for status in (OK, MISSING, REJECTED)},
    }


def _pictures(table: pa.Table, folder: str, config: PrepareConfig, cache: str | None) -> list[Picture]:
    """The pictures of a slice as they are stored; each is shrunk as soon as it is there, while others still come."""
    found = [Picture(None, MISSING)] * len(table)
    with Fetcher(folder, config, cache) as fetcher:
        for row, picture in fetcher.pictures(zip(_values(table, IMAGE), _image_uris(table), strict=True)):
            found[row] = _stored(picture, config)
    return found


def _image_uris(table: pa.Table) -> Iterator[str | None]:
    """Where each item's picture lies: its image_uri, or else the first of its image_uris."""
    for one, several in zip(_values(table, IMAGE_URI), _values(table, IMAGE_URIS), strict=True):
        yield one or next(iter(several or ()), None)


def _stored(picture: Picture, config: PrepareConfig) -> Picture:
    if picture.data is None:
        return picture
    try:
        return Picture(shrink_image(picture.data, config.image_size_px, max_pixels=config.max_image_pixels), OK)
    except errors.UnreadableImage as error:
        return Picture(None, REJECTED, error.reason)


def write_bare_items(pieces: Iterable[pa.Array], staging: str) -> list[dict[str, Any]]:
    """The catalog of an interactions table alone: pieces of ids, with no text and no pictures. Answers as
    `prepare_slice` does."""
    parts = []
    for number, item_ids in enumerate(pieces):
        count = len(item_ids)
        items = tables.prepared_items(pa.table({ITEM_ID: item_ids}), [MISSING] * count)
        digest = storage.write_table(_part(staging, ITEMS_FOLDER, number), items)
        shown = pictures.write_part(storage.join(staging, PICTURES_FOLDER), number, [None] * count)
        counts = {OK: 0, MISSING: count, REJECTED: 0}
        parts.append({"number": number, "items": count, "hash": digest, "pictures": shown, **counts})
    return parts


def _values(table: pa.Table, name: str) -> Iterator[Any]:
    """A column's values one by one; Nones where the table lacks it."""
    if name not in table.column_names:
        return itertools.repeat(None, len(table))
    return (value.as_py() for value in table.column(name))


def _part(staging: str, folder: str, number: int) -> str:
    return storage.join(staging, folder, f"part-{number:06d}.parquet")


def table_rejects(staging: str) -> str:
    """Where the rejected rows of the tables lie; the first file of a data set that is written."""
    return storage.join(staging, REJECTS_FOLDER, "tables.parquet")
