"""The live items of a store beside a version of an index: what a replica holds of them, and how it keeps up.

A live item stands in the place of the catalog's item of the same id, if there is one, so that no item is found twice.
Vectors always come from the model that is served: from the store, from the index, or made here of the stored content.
Knows vectors, rows and columns; knows no search and no HTTP.

Shapes: B queries · N items of the catalog · M rows of live items · D width · C width of what a search compares.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pixrec.data.filters import can_filter
from pixrec.data.items import ItemTable
from pixrec.live.store import AddedItem, EmbeddedVectors, LiveItem, Store, StoreAway
from pixrec.query import Filters
from pixrec.schema import IMAGE_STATUS, IMAGE_URIS, ITEM_ID

logger = logging.getLogger("ray.serve.pixrec")

_BLOCK = 1024
"""Items read from a store at a time, and rows of a table whose filters are made once."""

Embed = Callable[[Sequence[AddedItem]], list[EmbeddedVectors]]


class Base:
    """What an overlay lies on: the items of a data set and the vectors that a version of an index has for them."""

    def __init__(
        self,
        items: ItemTable,
        vectors: np.ndarray,
        content: np.ndarray | None,
        indexed: np.ndarray,
        content_hashes: Callable[[Sequence[str]], Mapping[str, str]] = lambda item_ids: {},
        folded: Mapping[str, tuple[AddedItem, EmbeddedVectors]] | None = None,
    ) -> None:
        """vectors (N, D), content (N, C) or None, indexed: bool (N,), which may be answers. `content_hashes` gives
        those that the index has for items; `folded` are live items that are part of the version."""
        self.items, self.vectors, self.content, self.indexed = items, vectors, content, indexed
        self.content_hashes, self.folded = content_hashes, folded or {}
        fields = [f for f in items.schema if can_filter(f.type) and f.name not in (IMAGE_STATUS, IMAGE_URIS)]
        self.schema = pa.schema(fields)
        """Columns that live items have, as filters and caps read them; other columns are only shown."""

    def vectors_of(self, row: int) -> EmbeddedVectors:
        content = None if self.content is None else self.content[row]
        return EmbeddedVectors(np.asarray(self.vectors[row], np.float32), content)


class View:
    """The live items at one moment. Never changes."""

    def __init__(
        self,
        item_ids: Sequence[str],
        row_of: Mapping[str, int],
        fields: Sequence[Mapping[str, Any]],
        vectors: np.ndarray,
        content: np.ndarray | None,
        shown: np.ndarray,
        base_rows: np.ndarray,
        has_content: Sequence[bool],
        first_number: int,
        tables: Sequence[ItemTable],
        schema: pa.Schema,
    ) -> None:
        """M rows, of which those of items that were replaced are not `shown`, nor are hidden ones. `tables` have the
        columns of the first rows already."""
        self.item_ids, self.row_of, self.fields = item_ids, row_of, fields
        self.vectors, self.content = vectors, content
        self.shown = shown
        """bool (M,): may be answers"""
        self.base_rows = base_rows
        """int64 (M,): the row in the catalog of the item that each stands in the place of; -1: none"""
        self.has_content = has_content
        """by row: whether the item was added, not one of the catalog with other columns"""
        self.first_number = first_number
        """of the first row; no two rows that there ever were have one number"""
        self.barred = base_rows[base_rows >= 0]
        """rows of the catalog that a live item stands in the place of"""
        self.current = np.sort(np.fromiter(row_of.values(), np.int64, len(row_of)))
        """rows that were not replaced"""
        self._made, self._schema = tables, schema

    def __len__(self) -> int:
        return len(self.item_ids)

    def mask(self, filters: Filters) -> np.ndarray:
        """bool (M,): the rows that may be answers and pass the filters."""
        if not filters or not len(self):
            return self.shown
        return self.shown & np.concatenate([table.filter_mask(filters) for table in self._tables])

    @cached_property
    def new_ids(self) -> list[str]:
        """Ids of the current rows that stand in no item's place, in their order."""
        return [self.item_ids[row] for row in self.current[self.base_rows[self.current] < 0]]

    @cached_property
    def new_of(self) -> dict[str, int]:
        """The number of each of them."""
        return {item_id: number for number, item_id in enumerate(self.new_ids)}

    @property
    def num_new(self) -> int:
        return len(self.new_ids)

    @cached_property
    def _tables(self) -> list[ItemTable]:
        rest = self.fields[len(self._made) * _BLOCK :]
        return [*self._made, *([table_of(rest, self._schema)] if rest else [])]


class Overlay:
    """Follows a store. `view` is replaced, never changed, so that each piece of work may take it once."""

    def __init__(self, base: Base, model: str, embed: Embed) -> None:
        """model: fingerprint of that whose vectors count; `embed` makes vectors by it."""
        self._base, self._model, self._embed = base, model, embed
        self.store: Store | None = None
        self._lock = threading.Lock()
        self._read_to = 0
        self._viewed_to = 0
        self._ids: list[str] = []
        self._fields: list[Mapping[str, Any]] = []
        self._vectors = np.zeros((0, base.vectors.shape[1]), np.float32)
        self._content = None if base.content is None else np.zeros((0, base.content.shape[1]), np.float16)
        self._shown: list[bool] = []
        self._base_rows: list[int] = []
        self._has_content: list[bool] = []
        self._first_number = 0
        self._row_of: dict[str, int] = {}
        self._tables: list[ItemTable] = []
        for item, vectors in base.folded.values():
            self._place(LiveItem(item.item_id, item.fields, item.content_hash, False, 0), vectors)
        self.view = self._viewed()

    def follow(self, store: Store) -> None:
        """Keep up with this store from now on; what it holds already is read at once."""
        self.store = store
        self.refresh()

    def refresh(self) -> bool:
        """Read what has changed since the last time; False: the store did not answer, and the view is the last one."""
        if self.store is None:
            return True
        try:
            if self.store.last_change() != self._viewed_to:
                with self._lock:
                    self._read(self.store)
            return True
        except StoreAway as error:
            logger.warning("%s", error)
            return False

    def content_of(self, item_id: str) -> AddedItem | None:
        """An added item with its text and picture. Raises StoreAway."""
        found = self.store.contents([item_id]) if self.store is not None else []
        return found[0] if found else self._base.folded[item_id][0] if item_id in self._base.folded else None

    def _read(self, store: Store) -> None:
        while items := store.changes(self._read_to, self._model, _BLOCK):
            placed = self._with_vectors(store, items)
            for item in items:
                self._place(item, placed.get(item.item_id))
            self._read_to = items[-1].change
        if self._read_to != self._viewed_to:
            self._compact()
            self.view = self._viewed()
            self._viewed_to = self._read_to  # last: who sees it without the lock has to find the view

    def _with_vectors(self, store: Store, items: Sequence[LiveItem]) -> dict[str, EmbeddedVectors]:
        """Vectors of the items by the model served, wherever there are some; the others are made, and stored."""
        found, unknown = dict[str, EmbeddedVectors](), dict[str, str]()
        for item in items:
            row = self._base.items.row_of.get(item.item_id)
            folded = self._base.folded.get(item.item_id)
            if item.vectors is not None:
                found[item.item_id] = item.vectors
            elif folded is not None and folded[0].content_hash == item.content_hash:
                found[item.item_id] = folded[1]
            elif item.content_hash is not None:
                unknown[item.item_id] = item.content_hash
            elif folded is not None:
                found[item.item_id] = folded[1]
            elif row is not None:
                found[item.item_id] = self._base.vectors_of(row)
        for item_id, content_hash in (self._base.content_hashes(list(unknown)) if unknown else {}).items():
            if unknown[item_id] == content_hash:
                found[item_id] = self._base.vectors_of(self._base.items.row_of[item_id])
                del unknown[item_id]
        if unknown:
            contents = store.contents(list(unknown))
            made = dict(zip(((c.item_id, c.content_hash) for c in contents), self._embed(contents), strict=True))
            store.set_vectors(self._model, made)
            found |= {item_id: vectors for (item_id, _), vectors in made.items()}
        return found

    def _place(self, item: LiveItem, vectors: EmbeddedVectors | None) -> None:
        """Put the item in the place of its row before, if there are vectors."""
        base_row, before = self._base.items.row_of.get(item.item_id), self._row_of.get(item.item_id)
        if before is not None and (vectors is not None or item.hidden):
            self._shown[before] = False
        if vectors is None and item.hidden and base_row is not None:
            vectors = self._base.vectors_of(base_row)
        if vectors is None:
            return  # until there are some, what stood there stays
        fields, shown = dict(item.fields), not item.hidden
        if item.content_hash is None and base_row is not None:
            fields = {**self._base.items.fields(base_row), **fields}
            shown = shown and bool(self._base.indexed[base_row])
        elif item.content_hash is None:
            fields = {**self._base.folded[item.item_id][0].fields, **fields}
        row = len(self._ids)
        self._ids.append(item.item_id)
        self._fields.append({**fields, ITEM_ID: item.item_id})
        self._vectors = _appended(self._vectors, row, vectors.vector)
        if self._content is not None:
            nothing = np.zeros(self._content.shape[1], np.float16)
            self._content = _appended(self._content, row, nothing if vectors.content is None else vectors.content)
        self._shown.append(shown)
        self._base_rows.append(-1 if base_row is None else base_row)
        self._has_content.append(item.content_hash is not None or base_row is None)
        self._row_of[item.item_id] = row

    def _compact(self) -> None:
        """Let go of the rows of items that were replaced, once they are most of all."""
        if len(self._ids) < 2 * max(len(self._row_of), _BLOCK):
            return
        rows, self._first_number = sorted(self._row_of.values()), self._first_number + len(self._ids)
        self._ids, self._fields = [self._ids[row] for row in rows], [self._fields[row] for row in rows]
        self._vectors = self._vectors[rows]
        self._content = None if self._content is None else self._content[rows]
        self._shown, self._base_rows = [self._shown[row] for row in rows], [self._base_rows[row] for row in rows]
        self._has_content = [self._has_content[row] for row in rows]
        self._row_of = {item_id: row for row, item_id in enumerate(self._ids)}
        self._tables = []

    def _viewed(self) -> View:
        count = len(self._ids)
        for start in range(len(self._tables) * _BLOCK, count - count % _BLOCK, _BLOCK):
            self._tables.append(table_of(self._fields[start : start + _BLOCK], self._base.schema))
        content = None if self._content is None else self._content[:count]
        return View(
            list(self._ids),
            dict(self._row_of),
            list(self._fields),
            self._vectors[:count],
            content,
            np.array(self._shown, bool),
            np.array(self._base_rows, np.int64),
            list(self._has_content),
            self._first_number,
            list(self._tables),
            self._base.schema,
        )


def table_of(fields: Sequence[Mapping[str, Any]], schema: pa.Schema) -> ItemTable:
    """Items as a table of these columns. Raises ArrowInvalid or ArrowTypeError on a value of another type."""
    return ItemTable(pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in fields], schema))


def wrong_column(fields: Mapping[str, Any], schema: pa.Schema) -> str | None:
    """What keeps live items from having these columns; None: all is well."""
    for name, value in fields.items():
        if name not in schema.names:
            known = ", ".join(n for n in schema.names if n != ITEM_ID)
            return f"{name!r} is no column that items of this catalog can be given; known: {known}"
        try:
            pa.array([value], schema.field(name).type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError):
            return f"{name!r} must be of type {schema.field(name).type}"
    return None


def _appended(array: np.ndarray, row: int, value: np.ndarray) -> np.ndarray:
    """With `value` at `row`, the first that is free: what views hold of the array stays as it is."""
    if row == len(array):
        grown = np.empty((max(2 * row, 64), array.shape[1]), array.dtype)
        grown[:row] = array
        array = grown
    array[row] = value
    return array
