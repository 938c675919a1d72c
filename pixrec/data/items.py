"""The items of a prepared data set. Knows columns and rows; knows no model and no preparing.

A row number (0 .. N-1) names an item wherever arrays are involved: histories, vectors, masks.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec import storage
from pixrec.data.arrays import Arrays, open_arrays
from pixrec.data.filters import Filter, bounds_of, can_filter, is_number, single_values, turned
from pixrec.data.ids import IdIndex, Ids
from pixrec.data.images import DECODER
from pixrec.data.pictures import open_pictures
from pixrec.data.text import item_text
from pixrec.errors import ArtifactError, InputError
from pixrec.query import Filters
from pixrec.schema import (
    DESCRIPTION,
    IMAGE,
    IMAGE_STATUS,
    IMAGE_URIS,
    ITEM_ID,
    ITEMS,
    PRICE,
    TEXT_FIELDS,
    TITLE,
)

FORMAT = 2
"""The version of the prepared data set's format, as docs/format.md describes it."""
DATASET_MARKER, PICTURES_FOLDER = "dataset.json", "pictures"
MOST_ITEMS_READ = 50_000
"""The columns of larger catalogs are mapped from a file rather than held by each process."""

MOST_TEXTS = 200_000
"""A tokenizer is trained on so many texts at most."""

_IDS_AT_A_TIME, _TEXTS_AT_A_TIME = 100_000, 10_000
_NOT_A_FILTER = {ITEM_ID, TITLE, DESCRIPTION, PRICE, IMAGE, IMAGE_STATUS, IMAGE_URIS}


class PictureSource(Protocol):
    """Pictures by the rows of their items, such as `pixrec.data.pictures.Pictures`."""

    def read(self, rows: Sequence[int]) -> list[bytes | None]: ...


class ItemTable:
    """The prepared items: their columns, their order and their pictures, and what the other rooms ask of them.

    Those of a stored data set are opened and not read: columns come when one is asked for, pictures one by one.
    """

    def __init__(
        self,
        table: pa.Table | Callable[[], pa.Table],
        pictures: Callable[[], PictureSource] | None = None,
        arrays: Arrays | None = None,
        kept: Callable[[str, Callable[[], pa.Table]], pa.Table] | None = None,
    ) -> None:
        """table: with a column `image` unless `pictures` gives them; `arrays` saves reading it for ids and counts.

        kept: gives what is made of the column named, from where it was kept, or made and kept now.
        """
        self._read, self._open, self._arrays, self._kept = table, pictures, arrays, kept
        self._filters: dict[str, Filter] = {}

    @cached_property
    def _table(self) -> pa.Table:
        return self._read() if callable(self._read) else self._read

    @cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        return {name: self._table.column(name) for name in self._table.column_names}

    @cached_property
    def _pictures(self) -> PictureSource:
        if self._open is not None:
            return self._open()
        return _Column(self._columns[IMAGE] if IMAGE in self._columns else pa.nulls(len(self)))

    @cached_property
    def item_ids(self) -> Ids:
        return Ids(self._columns[ITEM_ID] if self._arrays is None else self._arrays.item_ids)

    @cached_property
    def row_of(self) -> IdIndex:
        """The row of an item's id."""
        if self._arrays is not None:
            return self._arrays.index
        return IdIndex.of(pa.array(self.item_ids, pa.large_string()))

    def rows_of(self, item_ids: Sequence[str]) -> np.ndarray:
        """int32 (U,): the row of each id; -1 where this catalog lacks it."""
        ids = pa.array(item_ids, pa.large_string())
        blocks = [self.row_of.rows_of(ids[at : at + _IDS_AT_A_TIME]) for at in range(0, len(ids), _IDS_AT_A_TIME)]
        return np.concatenate([np.zeros(0, np.int32), *blocks])

    def __len__(self) -> int:
        return len(self._table if self._arrays is None else self._arrays.item_ids)

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self._table.schema

    def text(self, row: int) -> str:
        """The item as one line of text; empty when nothing is known."""
        return item_text({name: self._value(name, row) for name in TEXT_FIELDS if name in self._columns})

    def image(self, row: int) -> bytes | None:
        """The stored picture, or None when it is missing or was rejected."""
        return self.images([row])[0]

    def images(self, rows: Sequence[int]) -> list[bytes | None]:
        """The stored picture of each of the rows, read together."""
        return self._pictures.read(rows)

    @cached_property
    def with_image(self) -> np.ndarray:
        """bool (N,): the items that have a stored picture."""
        if self._arrays is not None:
            return self._arrays["has_image"]
        if IMAGE not in self._columns:
            return np.zeros(len(self), dtype=bool)
        return pc.is_valid(self._columns[IMAGE]).to_numpy().astype(bool)

    def fields(self, row: int) -> dict[str, Any]:
        """Every column but the picture, as JSON can hold it; nulls are None."""
        return {name: _jsonable(self._value(name, row)) for name in self._columns if name != IMAGE}

    def content_hash(self, row: int) -> str:
        """Hash of exactly what the model may see: the item's text, its stored picture and how that is decoded."""
        return content_hash(self.text(row), self.image(row))

    @property
    def filter_fields(self) -> list[str]:
        """Names of the columns that `filter_mask` takes: brand, category and the catalog's own further columns."""
        return [name for name, column in self._columns.items() if name not in _NOT_A_FILTER and can_filter(column.type)]

    @property
    def range_fields(self) -> list[str]:
        """Names of the columns of numbers, of which `filter_mask` takes ranges: price and the catalog's own."""
        return [
            name
            for name, column in self._columns.items()
            if name not in _NOT_A_FILTER - {PRICE} and is_number(column.type)
        ]

    def filter_problem(self, filters: Filters) -> str | None:
        """What keeps the filters from being used on this catalog; None when all is well."""
        for name, wanted in filters.items():
            if isinstance(wanted, Mapping) and name in self.filter_fields and name not in self.range_fields:
                return f"{name!r} holds no numbers: give a list of values"
            usable = [*self.filter_fields, *(self.range_fields if isinstance(wanted, Mapping) else [])]
            if name not in usable:
                return (
                    f"{name!r} is no filter field of this catalog; known: {', '.join(dict.fromkeys(usable)) or 'none'}"
                )
        return None

    def values(self, name: str, rows: Sequence[int]) -> list[Any]:
        """What the column `name` holds in each of the rows."""
        return self._columns[name].take(pa.array(rows, pa.int64())).to_pylist()

    def filter_values(self, most: int) -> dict[str, list[tuple[Any, int]]]:
        """For each of `filter_fields` its `most` frequent values, each with the number of items that hold it.

        A text field that joins several values with `|`, and a list field, count each of them.
        """
        found = {}
        for name in self.filter_fields:
            counts = pc.value_counts(pa.chunked_array(single_values(self._columns[name])[0]))
            values, numbers = counts.field("values"), counts.field("counts")
            plain = pc.is_finite(values) if pa.types.is_floating(values.type) else pc.is_valid(values)
            values, numbers = values.filter(plain), numbers.filter(plain)
            order = np.argsort(-numbers.to_numpy(), kind="stable")[:most]
            found[name] = list(zip(values.take(order).to_pylist(), numbers.take(order).to_pylist(), strict=True))
        return found

    def filter_mask(self, filters: Filters) -> np.ndarray:
        """bool (N,): the items that hold, in every field named, one of the values given for it, or a number within the
        range given, `{"min": x, "max": y}`, both included, either may be absent.

        A text field that joins several values with `|`, and a list field, match by any one of them or the whole.
        Raises InputError on an unknown field, and where something else stands for the list of values.
        """
        problem = self.filter_problem(filters)
        if problem is not None:
            raise InputError(f"filters: {problem}")
        mask = np.ones(len(self), dtype=bool)
        for name, wanted in filters.items():
            if isinstance(wanted, str):
                raise InputError(f"filters: {name!r} must be a list of values, such as [{wanted!r}]")
            if isinstance(wanted, Mapping):
                mask &= self._filter(name).range_mask(*bounds_of(name, wanted), len(self))
            else:
                mask &= self._filter(name).mask(wanted, len(self))
        return mask

    def _filter(self, name: str) -> Filter:
        if name not in self._filters:
            make = functools.partial(turned, self._columns[name])
            self._filters[name] = Filter(make() if self._kept is None else self._kept(name, make))
        return self._filters[name]

    def _value(self, name: str, row: int) -> Any:
        return self._columns[name][row].as_py()


class _Column:
    """Pictures that are in memory anyway."""

    def __init__(self, column: pa.Array | pa.ChunkedArray) -> None:
        self._column = column

    def read(self, rows: Sequence[int]) -> list[bytes | None]:
        return [self._column[int(row)].as_py() for row in rows]


class _Joined:
    """The pictures of several tables, one table after the other."""

    def __init__(self, tables: Sequence[ItemTable]) -> None:
        self._tables, self._starts = tables, np.cumsum([0, *map(len, tables)])[:-1]

    def read(self, rows: Sequence[int]) -> list[bytes | None]:
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        found: list[bytes | None] = [None] * len(rows)
        for number, table in enumerate(self._tables):
            places = np.flatnonzero(numbers == number)
            wanted = [int(rows[int(at)] - self._starts[number]) for at in places]
            for at, picture in zip(places, table.images(wanted) if wanted else [], strict=True):
                found[at] = picture
        return found


def content_hash(text: str, image: bytes | None) -> str:
    """Hash of an item's text, its stored picture and how that is decoded."""
    encoded = text.encode()
    content = hashlib.blake2b(len(encoded).to_bytes(8, "big") + encoded, digest_size=16)
    content.update(b"" if image is None else b"\x01" + DECODER.encode() + image)
    return content.hexdigest()


def load_items(data_uri: str) -> ItemTable:
    """The items of the prepared data set at `data_uri`, opened. Raises ArtifactError when it holds none."""
    return open_items(data_uri, open_arrays(data_uri, read_info(data_uri)["fingerprint"]))


def open_items(data_uri: str, arrays: Arrays) -> ItemTable:
    """The items of a prepared data set whose arrays are open already."""
    folder, pictures = storage.join(data_uri, ITEMS), storage.join(data_uri, PICTURES_FOLDER)
    kept = functools.partial(_kept, folder) if len(arrays.item_ids) > MOST_ITEMS_READ else None
    return ItemTable(
        lambda: _read(data_uri, folder, len(arrays.item_ids)), lambda: open_pictures(pictures), arrays, kept
    )


def _read(data_uri: str, folder: str, num_items: int) -> pa.Table:
    """The columns of the items: read where they are few, otherwise mapped from a file that a node makes of them once.

    Parquet cannot give a single row without unpacking thousands, an uncompressed Arrow file can.
    """
    try:
        files = storage.table_files(folder)
        if num_items <= MOST_ITEMS_READ:
            table = storage.read_table(folder)
        else:
            table = storage.node_file(folder, _version(files), lambda path: _unpack(files, path), storage.map_table)
        table.column(ITEM_ID)
        return table
    except (InputError, KeyError) as error:  # KeyError: no item_id
        raise ArtifactError(f"{data_uri} is no complete data set ({error}); make it with pixrec prepare") from None


def _version(files: Sequence[str]) -> str:
    return " ".join(f"{storage.name(file)} {storage.stamp(file)}" for file in files)


def _kept(folder: str, name: str, make: Callable[[], pa.Table]) -> pa.Table:
    """What is made of a column, mapped from a file that a node makes of it once."""

    def write(path: str) -> None:
        table = make()
        storage.write_batches(path, table.schema, table.combine_chunks().to_batches(), durable=False)

    version = _version(storage.table_files(folder))
    return storage.node_file(storage.join(folder, f"filter {name}"), version, write, storage.map_table)


def _unpack(files: Sequence[str], path: str) -> None:
    """Parquet files as one Arrow file, a file in memory at a time."""
    schema = pa.unify_schemas([storage.read_schema(file) for file in files], promote_options="permissive")
    schema = schema.remove_metadata()

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            table = storage.read_table(file)
            absent = [pa.nulls(len(table), field.type) for field in schema if field.name not in table.column_names]
            lacking = [field.name for field in schema if field.name not in table.column_names]
            for name, column in zip(lacking, absent, strict=True):
                table = table.append_column(name, column)
            yield from table.select(schema.names).cast(schema).combine_chunks().to_batches()

    storage.write_batches(path, schema, batches(), durable=False)


def read_info(data_uri: str) -> dict[str, Any]:
    """The content of dataset.json. Raises ArtifactError when it is absent, damaged, or of another format."""
    marker = storage.join(data_uri, DATASET_MARKER)
    if not storage.exists(marker):
        raise ArtifactError(f"{data_uri} holds no {DATASET_MARKER}: no complete data set; make it with pixrec prepare")
    info = storage.read_json(marker, ("split",))
    found = info.get("format", 1)
    if found != FORMAT:
        cure = "run pixrec prepare again" if found == 1 else "use the pixrec that made it"
        raise ArtifactError(f"{data_uri} is of format {found}, this pixrec reads format {FORMAT}; {cure}")
    return info


def load_texts(data_uri: str, most: int = MOST_TEXTS) -> list[str]:
    """The texts of the items of the prepared data set at `data_uri`; of more than `most`, that many, evenly spread."""
    files = storage.table_files(storage.join(data_uri, ITEMS))
    total = sum(group.rows for file in files for group in storage.row_groups(file))
    seen, texts = 0, list[str]()
    chosen = np.arange(total) if total <= most else np.arange(most) * total // most
    for file in files:
        for table in storage.stream_table(file, [ITEM_ID, *TEXT_FIELDS], _TEXTS_AT_A_TIME):
            here = chosen[np.searchsorted(chosen, seen) : np.searchsorted(chosen, seen + len(table))] - seen
            items = ItemTable(table.take(here))
            texts += [items.text(row) for row in range(len(here))]
            seen += len(table)
    return texts


def part_starts(parts: Sequence[int]) -> list[int]:
    """The row of the first item of each file of items/, of the numbers of rows that dataset.json has for them."""
    return np.cumsum([0, *parts])[:-1].tolist()


def join_items(tables: Sequence[ItemTable]) -> ItemTable:
    """The items of all `tables`, one table after the other, with the columns that the towers may see.

    Equal item ids of different tables are different items: an id gets the number of its table, as in `0:B00X`.
    """
    joined = []
    for number, items in enumerate(tables):
        seen = {name: items._columns[name] for name in (*TEXT_FIELDS, IMAGE_STATUS) if name in items._columns}
        item_ids = pa.array([f"{number}:{item_id}" for item_id in items.item_ids], pa.string())
        joined.append(pa.table({ITEM_ID: item_ids, **seen}))
    items = ItemTable(pa.concat_tables(joined, promote_options="permissive"), lambda: _Joined(tables))
    items.with_image = np.concatenate([table.with_image for table in tables])
    return items


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int)) else str(value)
