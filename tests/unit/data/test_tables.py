from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pixrec.data import tables
from pixrec.data.ids import hash_ids
from pixrec.errors import InputError

ITEMS = pa.schema([("item_id", pa.string()), ("title", pa.string())])
EVENTS = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
CATALOG = pa.array(["a", "b", "c"], pa.large_string())


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.null()]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_kind_of_string_is_text(kind: pa.DataType):
    tables.check_items_schema(pa.schema([("item_id", kind), ("title", kind), ("brand", kind)]), "items.parquet")
    tables.check_interactions_schema(pa.schema([("user_id", kind), ("item_id", kind), EVENTS.field(2)]), "events")
    values = [None, None] if pa.types.is_null(kind) else ["x", None]
    assert tables.as_text(pa.chunked_array([pa.array(values, kind)])).to_pylist() == values


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (ITEMS.remove(0), r"items.parquet: no column 'item_id', which an items table needs; it has title"),
        (pa.schema([("itemid", pa.string()), ITEMS.field(1)]), r"no column 'item_id'.*did you mean 'itemid'\?"),
        (pa.schema([ITEMS.field(0), ("Title", pa.string())]), r"no column 'title'.*did you mean 'Title'\?"),
        (
            ITEMS.set(0, pa.field("item_id", pa.int64())),
            r"items.parquet: column 'item_id' is int64, must be string; cast",
        ),
        (ITEMS.append(pa.field("price", pa.string())), r"column 'price' is string, must be double"),
        (ITEMS.append(pa.field("image", pa.string())), r"column 'image' is string, must be binary"),
        (ITEMS.append(pa.field("image_uri", pa.binary())), r"column 'image_uri' is binary, must be string"),
        (ITEMS.append(pa.field("category", pa.list_(pa.string()))), r"column 'category' is list<.*>, must be string"),
        (ITEMS.append(ITEMS.field(1)), r"column 'title' occurs more than once"),
        (
            pa.schema([*ITEMS, ("shelf", pa.int64()), ("shelf", pa.string())]),
            r"items.parquet: column 'shelf' occurs more than once; keep one",
        ),
    ],
)
def test_an_items_table_of_another_make(schema: pa.Schema, message: str):
    with pytest.raises(InputError, match=message):
        tables.check_items_schema(schema, "items.parquet")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (EVENTS.remove(2), r"events: no column 'timestamp', which an interactions table needs"),
        (EVENTS.set(2, pa.field("timestamp_ms", pa.int64())), r"did you mean 'timestamp_ms'\?"),
        (
            EVENTS.set(2, pa.field("timestamp", pa.string())),
            r"column 'timestamp' is string, must be int64; store milli",
        ),
        (EVENTS.set(2, pa.field("timestamp", pa.timestamp("ms"))), r"column 'timestamp' is timestamp.*milliseconds"),
        (EVENTS.set(2, pa.field("timestamp", pa.float64())), r"column 'timestamp' is double, must be int64"),
        (EVENTS.set(0, pa.field("user_id", pa.int32())), r"column 'user_id' is int32, must be string"),
        (EVENTS.append(pa.field("rating", pa.string())), r"column 'rating' is string, must be double"),
    ],
)
def test_an_interactions_table_of_another_make(schema: pa.Schema, message: str):
    with pytest.raises(InputError, match=message):
        tables.check_interactions_schema(schema, "events")


def test_min_rating_needs_ratings():
    with pytest.raises(InputError, match=r"events: no column 'rating', which prepare\.min_rating 3\.0 needs"):
        tables.check_interactions_schema(EVENTS, "events", min_rating=3.0)
    tables.check_interactions_schema(EVENTS.append(pa.field("rating", pa.int8())), "events", min_rating=3.0)


def checked(column: pa.ChunkedArray) -> tables.CheckedIds:
    found = tables.usable_ids(column)
    tables.check_item_ids(found.item_ids, hash_ids(found.item_ids), len(column), "items")
    return found


def test_items_without_id_are_rejected_and_the_others_kept():
    found = checked(pa.chunked_array([["a", None], ["", "b"]]))
    assert found.item_ids.to_pylist() == ["a", "b"]
    assert found.rejects.to_pylist() == [
        {"source": "items", "key": "row 1", "reason": "item_id is empty"},
        {"source": "items", "key": "row 2", "reason": "item_id is empty"},
    ]
    kept = tables.with_id(pa.table({"item_id": ["a", None, "", "b"], "title": list("wxyz")}))
    assert kept.column("title").to_pylist() == ["w", "z"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "items: the items table is empty"),
        ([None, ""], "'item_id' is empty in all 2 rows"),
        (["x", "a", "y", "a", "y", "a"], "item_id 'a' occurs 3 times, and 2 ids occur more than once"),
    ],
)
def test_ids_that_name_no_catalog(ids: list, message: str):
    with pytest.raises(InputError, match=message):
        checked(pa.chunked_array([pa.array(ids, pa.string())]))


def test_ids_of_one_hash_are_not_taken_for_one():
    tables.check_item_ids(pa.array(["a", "b"], pa.large_string()), np.zeros(2, np.uint64), 2, "items")


def test_further_columns_have_one_type_in_all_files_of_a_table():
    with_shelf = [ITEMS.append(pa.field("shelf", kind)) for kind in (pa.string(), pa.large_string(), pa.null())]
    tables.check_items_agree([ITEMS, *with_shelf], "items")
    with pytest.raises(InputError, match=r"items: its files disagree about a column: .*shelf.*one type"):
        tables.check_items_agree([*with_shelf, ITEMS.append(pa.field("shelf", pa.int64()))], "items")


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_string()), pa.list_(pa.dictionary(pa.int32(), pa.string()))])
def test_every_kind_of_list_of_strings_is_one(kind: pa.DataType):
    raw = pa.table({"item_id": ["a", "b"], "tags": pa.array([["new", None], None], kind)})
    made = tables.prepared_items(raw, ["missing", "missing"]).column("tags")
    assert (made.type, made.to_pylist()) == (pa.list_(pa.string()), [["new", None], None])


def test_prepared_items_have_known_types_and_the_catalogs_own_columns():
    raw = pa.table(
        {
            "year": [1995],
            "item_id": pa.array(["a"], pa.large_string()),
            "title": pa.array(["A"]).dictionary_encode(),
            "price": [12],
            "brand": pa.nulls(1),
            "shelf": pa.array(["s"], pa.string_view()),
            "image_uri": ["a.jpg"],
            "image": [b"raw"],
        }
    )
    items = tables.prepared_items(raw, ["ok"])
    assert items.to_pylist() == [
        {
            "item_id": "a",
            "title": "A",
            "brand": None,
            "category": None,
            "description": None,
            "price": 12.0,
            "image_status": "ok",
            "year": 1995,
            "shelf": "s",
        }
    ]
    assert {items.schema.field(name).type for name in ("item_id", "title", "brand", "shelf")} == {pa.string()}
