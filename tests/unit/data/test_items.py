from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import tiny_items, write_prepared

from pixrec import storage
from pixrec.data.arrays import write_arrays
from pixrec.data.items import ItemTable, load_items
from pixrec.data.pictures import complete, write_part
from pixrec.errors import ArtifactError, InputError

PICTURE = b"\xff\xd8 stands for a picture"


def table(**changes) -> pa.Table:
    columns = {
        "item_id": ["a", "b", "c"],
        "title": ["Red shoe", "Blue shoe", None],
        "brand": ["Ann", None, "Ann"],
        "category": ["Shoes|Sport", "Shoes", None],
        "description": pa.nulls(3, pa.string()),
        "price": [1.5, None, float("nan")],
        "image": pa.array([PICTURE, None, None], pa.binary()),
        "image_status": ["ok", "missing", "rejected"],
        "year": [1995, 1996, None],
        "tags": [["new", "sale"], [], None],
        "since": [datetime.date(2020, 1, 2), None, None],
    }
    return pa.table({**columns, **changes})


@pytest.fixture
def items() -> ItemTable:
    return ItemTable(table())


def test_rows_and_ids_name_each_other(items: ItemTable):
    assert len(items) == 3
    assert items.item_ids == ["a", "b", "c"]
    assert [items.row_of[item_id] for item_id in items.item_ids] == [0, 1, 2]


def test_text_and_picture_of_a_row(items: ItemTable):
    assert [items.text(row) for row in range(3)] == [
        "Red shoe | by Ann | Shoes, Sport | $1.50",
        "Blue shoe | Shoes",
        "by Ann",
    ]
    assert [items.image(row) for row in range(3)] == [PICTURE, None, None]


def test_fields_are_json_and_hold_no_picture(items: ItemTable):
    fields = [items.fields(row) for row in range(3)]
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert "image" not in fields[0]
    assert fields[0]["since"] == "2020-01-02"
    assert fields[0]["tags"] == ["new", "sale"]
    assert fields[2]["price"] is None
    assert fields[2]["title"] is None


def test_content_hash_covers_what_the_model_sees_and_nothing_else(items: ItemTable):
    same = ItemTable(table(year=[1, 2, 3], item_id=["x", "y", "z"]))
    assert [same.content_hash(row) for row in range(3)] == [items.content_hash(row) for row in range(3)]
    assert len({items.content_hash(row) for row in range(3)}) == 3
    other_text = ItemTable(table(title=["Red boot", "Blue shoe", None]))
    other_picture = ItemTable(table(image=pa.array([PICTURE + b".", b"", None], pa.binary())))
    for other in (other_text, other_picture):
        assert other.content_hash(0) != items.content_hash(0)
        assert other.content_hash(2) == items.content_hash(2)
    assert other_picture.content_hash(1) != items.content_hash(1)


def test_filter_fields_are_brand_category_and_the_catalogs_own(items: ItemTable):
    assert items.filter_fields == ["brand", "category", "year", "tags"]


@pytest.mark.parametrize(
    ("filters", "rows"),
    [
        ({}, [0, 1, 2]),
        ({"brand": ["Ann"]}, [0, 2]),
        ({"category": ["Shoes"]}, [0, 1]),
        ({"category": ["Sport"]}, [0]),
        ({"category": ["Shoes|Sport"]}, [0]),
        ({"category": ["Sho"]}, []),
        ({"category": ["Sport", "Hats"], "brand": ["Ann"]}, [0]),
        ({"year": [1995, 1996]}, [0, 1]),
        ({"year": ["1995"]}, []),
        ({"tags": ["sale"]}, [0]),
        ({"brand": []}, []),
        ({"brand": [["not", "a", "value"]]}, []),
    ],
)
def test_filter_mask(items: ItemTable, filters: dict, rows: list[int]):
    assert items.filter_mask(filters).nonzero()[0].tolist() == rows
    assert items.filter_mask(filters).nonzero()[0].tolist() == rows  # the second time from the cache


@pytest.mark.parametrize(
    ("filters", "rows"),
    [
        ({"price": {"min": 20}}, [1]),
        ({"price": {"max": 20.5}}, [0]),
        ({"price": {"min": 10, "max": 30}, "brand": ["Ann"]}, [0]),
        ({"price": {"min": 30, "max": 10}}, []),
        ({"year": {"min": 1996, "max": 1996}}, [1]),
        ({"year": {"min": -(10**30), "max": 10**30}}, [0, 1, 2]),
        ({"year": [10**30, float("nan"), 1995.0]}, [0]),
    ],
)
def test_ranges_of_numbers(filters: dict, rows: list[int]):
    items = ItemTable(table(price=[10.0, 30.0, None], year=[1995, 1996, 1999]))
    assert items.range_fields == ["price", "year"]
    assert items.filter_mask(filters).nonzero()[0].tolist() == rows


def test_a_number_that_is_none_is_in_no_range():
    items = ItemTable(table(price=[float("nan"), 1.0, 2.0], year=[True, False, None]))
    assert items.filter_mask({"price": {"min": 0}}).tolist() == [False, True, True]
    assert items.filter_mask({"year": [True]}).tolist() == [True, False, False]
    assert items.range_fields == ["price"]


@pytest.mark.parametrize("wanted", [{}, {"least": 3}, {"min": "3"}, {"min": True}, {"min": 1, "max": None}])
def test_a_range_that_is_none(items: ItemTable, wanted: dict):
    with pytest.raises(InputError, match="'price': a range is"):
        items.filter_mask({"price": wanted})


def test_a_range_of_what_has_none(items: ItemTable):
    with pytest.raises(InputError, match=r"'brand' holds no numbers"):
        items.filter_mask({"brand": {"min": 1}})


def test_the_most_frequent_values_of_each_filter_field():
    odd = ItemTable(table(year=[1995.5, 1995.5, float("nan")], size=pa.nulls(3, pa.string())))
    assert odd.filter_values(2) == {
        "brand": [("Ann", 2)],
        "category": [("Shoes", 2), ("Sport", 1)],
        "year": [(1995.5, 2)],
        "tags": [("new", 1), ("sale", 1)],
        "size": [],
    }
    assert odd.filter_values(1)["tags"] == [("new", 1)]
    several_chunks = ItemTable(pa.concat_tables([table(), table(item_id=["d", "e", "f"])]))
    assert several_chunks.filter_values(1)["category"] == [("Shoes", 4)]
    for name, values in several_chunks.filter_values(9).items():  # the number is that of the items which pass
        assert all(several_chunks.filter_mask({name: [value]}).sum() == items for value, items in values)


@pytest.mark.parametrize("name", ["colour", "title", "image", "item_id"])
def test_an_unknown_filter_field_is_the_callers_fault(items: ItemTable, name: str):
    with pytest.raises(InputError, match=f"'{name}' is no filter field.*brand, category, year, tags"):
        items.filter_mask({name: ["x"]})


def test_a_filter_wants_a_list(items: ItemTable):
    with pytest.raises(InputError, match=r"'brand' must be a list of values, such as \['Ann'\]"):
        items.filter_mask({"brand": "Ann"})


def test_items_without_any_content():
    bare = ItemTable(pa.table({"item_id": ["a"]}))
    assert (bare.text(0), bare.image(0), bare.filter_fields) == ("", None, [])


def test_load_items_keeps_the_order_of_the_files(tmp_path: Path):
    rows = table().drop_columns(["image"])
    for number, part in enumerate((rows.slice(0, 2), rows.slice(2))):
        storage.write_table(str(tmp_path / "items" / f"part-{number:06d}.parquet"), part)
        write_part(str(tmp_path / "pictures"), number, [PICTURE, None] if number == 0 else [None])
    complete(str(tmp_path / "pictures"), 2)
    write_arrays(
        str(tmp_path),
        item_ids=["a", "b", "c"],
        has_image=np.array([True, False, False]),
        training_count=np.zeros(3),
        user_ids=["u"],
        user_offset=np.array([0, 1]),
        item_row=np.zeros(1),
        timestamp=np.zeros(1),
    )
    storage.write_json(str(tmp_path / "dataset.json"), {"format": 2, "split": {}, "fingerprint": "f"})
    items = load_items(str(tmp_path))
    assert items.item_ids == ["a", "b", "c"]
    assert items.filter_mask({"category": ["Shoes"]}).tolist() == [True, True, False]
    assert [items.image(row) for row in range(3)] == [PICTURE, None, None]
    assert items.with_image.tolist() == [True, False, False]
    assert [items.content_hash(row) for row in range(3)] == [ItemTable(table()).content_hash(row) for row in range(3)]


def test_load_items_names_the_cure(tmp_path: Path):
    with pytest.raises(ArtifactError, match="make it with pixrec prepare"):
        load_items(str(tmp_path))


def test_another_decoder_makes_another_content_of_what_has_a_picture(monkeypatch: pytest.MonkeyPatch):
    items = tiny_items(2, with_pictures={0})
    before = [items.content_hash(row) for row in range(2)]
    monkeypatch.setattr("pixrec.data.items.DECODER", "another")
    assert [items.content_hash(row) == before[row] for row in range(2)] == [False, True]


def test_a_large_catalog_is_mapped_and_says_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path / "cache"))
    write_prepared(tmp_path / "data")
    read = load_items(str(tmp_path / "data"))
    expected = [read.fields(row) for row in range(len(read))]
    monkeypatch.setattr("pixrec.data.items.MOST_ITEMS_READ", 0)
    for _ in range(2):  # made, and found made
        mapped = load_items(str(tmp_path / "data"))
        assert [mapped.fields(row) for row in range(len(mapped))] == expected
        assert mapped.filter_values(9) == read.filter_values(9)
        assert mapped.text(3) == read.text(3)
    assert len(list((tmp_path / "cache").glob("*.made"))) == 1
    name = read.filter_fields[0]
    for value, _ in read.filter_values(9)[name]:
        wanted = {name: [value]}
        np.testing.assert_array_equal(mapped.filter_mask(wanted), read.filter_mask(wanted))
    assert len(list((tmp_path / "cache").glob("*.made"))) == 2
