"""Files made in the published format, with its field names: https://amazon-reviews-2023.github.io."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pixrec.data import amazon2023
from pixrec.data.amazon2023 import event_row, item_row, picture_url, price, to_tables
from pixrec.data.tables import check_interactions_schema, check_items_schema
from pixrec.errors import InputError


def meta(asin: str = "B001", **changes: Any) -> dict[str, Any]:
    return {
        "main_category": "All Beauty",
        "title": "Howard LC0008 Leather Conditioner, 8-Ounce (4-Pack)",
        "average_rating": 4.8,
        "rating_number": 10,
        "features": ["Cleans", "Conditions"],
        "description": [],
        "price": None,
        "images": [],
        "videos": [],
        "store": "Howard Products",
        "categories": [],
        "details": {"Package Dimensions": "7.1 x 5.5 x 3 inches; 2.38 Pounds", "UPC": "617390882781"},
        "parent_asin": asin,
        "bought_together": None,
        **changes,
    }


def review(user: str = "AGK", asin: str = "B001", moment: Any = 1588687728923, **changes: Any) -> dict[str, Any]:
    return {
        "rating": 5.0,
        "title": "Such a lovely scent",
        "text": "This spray is really nice.<br />It smells good.",
        "images": [],
        "asin": "B00YQ6X8EO",
        "parent_asin": asin,
        "user_id": user,
        "timestamp": moment,
        "helpful_vote": 0,
        "verified_purchase": True,
        **changes,
    }


def picture(variant: str, **sizes: str | None) -> dict[str, Any]:
    return {"thumb": None, "large": None, "hi_res": None, "variant": variant, **sizes}


def write(file: Path, lines: Iterable[Any]) -> str:
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def silent(stage: str, done: int, total: int | None) -> None:
    pass


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_both_files_become_tables(tmp_path: Path, ending: str):
    items = write(tmp_path / f"meta_All_Beauty.{ending}", [meta("B001"), meta("B002", price="$12.99")])
    events = write(tmp_path / f"All_Beauty.{ending}", [review("u1", "B002", 7, rating=4), review("u2", "B001", 5)])
    made = to_tables(items, events, str(tmp_path / "made"), silent)
    assert made.rejects.num_rows == 0
    check_items_schema(pq.read_schema(made.items), "items")
    check_interactions_schema(pq.read_schema(made.interactions), "interactions", min_rating=3.0)
    assert pq.read_table(made.items).to_pylist()[1] == {
        "item_id": "B002",
        "title": "Howard LC0008 Leather Conditioner, 8-Ounce (4-Pack)",
        "brand": "Howard Products",
        "category": "All Beauty",
        "description": "Cleans Conditions",
        "price": 12.99,
        "image_uri": None,
        "average_rating": 4.8,
        "rating_number": 10,
    }
    assert pq.read_table(made.interactions).to_pylist() == [
        {"user_id": "u1", "item_id": "B002", "timestamp": 7, "rating": 4.0},
        {"user_id": "u2", "item_id": "B001", "timestamp": 5, "rating": 5.0},
    ]


def test_a_folder_of_categories(tmp_path: Path):
    for name, asin in (("A", "B1"), ("B", "B2")):
        write(tmp_path / f"meta_{name}.jsonl.gz", [meta(asin)])
        write(tmp_path / f"{name}.jsonl", [review(asin=asin)])
    made = to_tables(str(tmp_path), str(tmp_path), str(tmp_path / "made"), silent)
    for table in (made.items, made.interactions):
        assert pq.read_table(table).column("item_id").to_pylist() == ["B1", "B2"]


def test_without_a_meta_file(tmp_path: Path):
    made = to_tables(None, write(tmp_path / "A.jsonl", [review()]), str(tmp_path / "made"), silent)
    assert made.items is None
    assert pq.read_table(made.interactions).num_rows == 1


def test_lines_that_cannot_be_used_name_file_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(amazon2023, "_MAX_LINE_BYTES", 2000)
    items = write(
        tmp_path / "meta_A.jsonl",
        [
            meta("B001"),
            b"",
            b'{"parent_asin": "B00',
            b"[1, 2]",
            b"\xff\xfe\x00",
            b"[" * 1500,
            meta(title="x" * 5000),
            meta(""),
            meta(parent_asin=7),
            meta("B001", title="again"),
            meta("B002"),
        ],
    )
    events = write(
        tmp_path / "A.jsonl.gz",
        [
            review(),
            b"no json",
            review(user_id=None),
            review(asin=""),
            review(moment=None),
            review(moment="soon"),
            review(moment=1.5),
            review(moment=10**30),
            review(moment=True),
            b"9" * 1900,
            {},
        ],
    )
    made = to_tables(items, events, str(tmp_path / "made"), silent)
    assert pq.read_table(made.items).column("item_id").to_pylist() == ["B001", "B002"]
    assert pq.read_table(made.interactions).num_rows == 1
    bad_time = "timestamp is no whole number of milliseconds"
    assert [tuple(row.values()) for row in made.rejects.to_pylist()] == [
        ("items", "meta_A.jsonl line 3", "not valid JSON"),
        ("items", "meta_A.jsonl line 4", "not valid JSON"),
        ("items", "meta_A.jsonl line 5", "not valid JSON"),
        ("items", "meta_A.jsonl line 6", "not valid JSON"),
        ("items", "meta_A.jsonl line 7", "line too long"),
        ("items", "meta_A.jsonl line 8", "parent_asin is empty"),
        ("items", "meta_A.jsonl line 9", "parent_asin is empty"),
        ("items", "meta_A.jsonl line 10", "parent_asin occurred before"),
        ("interactions", "A.jsonl.gz line 2", "not valid JSON"),
        ("interactions", "A.jsonl.gz line 3", "user_id is empty"),
        ("interactions", "A.jsonl.gz line 4", "parent_asin is empty"),
        *(("interactions", f"A.jsonl.gz line {line}", bad_time) for line in (5, 6, 7, 8, 9)),
        ("interactions", "A.jsonl.gz line 10", "not valid JSON"),
        ("interactions", "A.jsonl.gz line 11", bad_time),
    ]


FAULTS = {
    "absent": (None, "no such file or folder"),
    "empty": (b"", "holds nothing usable .no line."),
    "no json": (b"item_id,title\nB1,Cup\n", "holds nothing usable .2 lines, the first: not valid JSON"),
    "cut gzip": (gzip.compress(json.dumps(review()).encode() * 99)[:-30], "is damaged .* get it again"),
    "damaged gzip": (b"\x1f\x8b" + b"\0" * 50, "cannot be read"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_file_that_is_no_such_file_is_one_line(tmp_path: Path, case: str):
    data, message = FAULTS[case]
    if data is not None:
        (tmp_path / "A.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=message) as raised:
        to_tables(None, str(tmp_path / "A.jsonl"), str(tmp_path / "made"), silent)
    assert "\n" not in str(raised.value)
    assert "A.jsonl: " in str(raised.value)


def test_a_folder_without_such_files(tmp_path: Path):
    write(tmp_path / "A.jsonl", [review()])
    with pytest.raises(InputError, match="holds no meta_<Category>"):
        to_tables(str(tmp_path), str(tmp_path), str(tmp_path / "made"), silent)


@pytest.mark.parametrize(
    ("value", "dollars"),
    [
        (12.99, 12.99),
        (7, 7.0),
        ("12.99", 12.99),
        ("$12.99", 12.99),
        ("from 5.00", 5.0),
        ("$1,299.00", 1299.0),
        ("$10.00 - $20.00", 10.0),
        ("—", None),
        ("None", None),
        ("", None),
        ("9" * 400, None),
        (None, None),
        (True, None),
        (float("nan"), None),
        (-1.0, None),
        (10**400, None),
        ([1], None),
        ({}, None),
    ],
)
def test_prices(value: Any, dollars: float | None):
    assert price(value) == dollars


MAIN = picture("MAIN", thumb="t", large="l", hi_res="h")
PICTURES = {
    "the best size": ([MAIN], "h"),
    "large where hi_res is null": ([{**MAIN, "hi_res": None}], "l"),
    "thumb where nothing else is": ([picture("MAIN", thumb=" t ")], "t"),
    "MAIN wherever it stands": ([picture("PT01", hi_res="other"), picture("MAIN", thumb="t")], "t"),
    "the best of the others": ([picture("PT01", large="a"), picture("PT02", hi_res="b")], "b"),
    "the first of equals": ([picture("PT02", large="a"), picture("PT01", large="b")], "a"),
    "a MAIN without URLs": ([picture("MAIN"), picture("PT01", thumb="a")], "a"),
    "no variant named": ([{"large": "a"}], "a"),
    "nothing": ([], None),
    "null": (None, None),
    "of other types": (["http://x", 7, None, {"variant": "MAIN", "hi_res": 3, "large": ""}], None),
}


@pytest.mark.parametrize("case", PICTURES)
def test_which_picture(case: str):
    images, url = PICTURES[case]
    assert picture_url(images) == url


def test_texts_are_cleaned():
    row = item_row(
        meta(
            title="  Salt &amp; Pepper\n<b>Mill</b> ",
            description=[
                "<p>Grinds <i>fine</i>.</p>",
                None,
                "5 &lt; 6 &amp;amp; more",
                7,
                "<script>var x=1</script>End",
            ],
            categories=["All Beauty", "Hair|Skin", "", None, "Tools"],
            store=None,
            details={"Brand": "Peugeot"},
            rating_number="12",
            average_rating="high",
        )
    )
    assert row["title"] == "Salt & Pepper Mill"
    assert row["description"] == "Grinds fine . 5 < 6 & more End"
    assert row["category"] == "All Beauty|Hair/Skin|Tools"
    assert (row["brand"], row["rating_number"], row["average_rating"]) == ("Peugeot", 12, None)


def test_descriptions_are_lists_strings_or_the_features():
    assert item_row(meta(description="Plain"))["description"] == "Plain"
    assert item_row(meta(description=["One", "Two"]))["description"] == "One Two"
    assert item_row(meta(description=["", " <br> "], features=["F"]))["description"] == "F"
    assert item_row(meta(description=[], features=None))["description"] is None


@pytest.mark.parametrize("field", [key for key in meta() if key != "parent_asin"])
@pytest.mark.parametrize(
    "value", [None, 7, True, "text", "\ud800", [], [None], {}, {"a": []}, float("nan"), 1e300], ids=repr
)
def test_no_field_of_another_type_costs_the_item(tmp_path: Path, field: str, value: Any):
    line = meta("B001")
    line[field] = value
    made = to_tables(
        write(tmp_path / "meta_A.jsonl", [line]),
        write(tmp_path / "A.jsonl", [review()]),
        str(tmp_path / "made"),
        silent,
    )
    assert pq.read_table(made.items).column("item_id").to_pylist() == ["B001"]


def test_a_line_without_anything_but_its_id_is_an_item():
    assert item_row({"parent_asin": " B1 "}) == dict.fromkeys(amazon2023.ITEMS_SCHEMA.names) | {"item_id": "B1"}
    assert event_row({"user_id": "u", "parent_asin": "B1", "timestamp": "5"})["rating"] is None


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(amazon2023, "_ROWS_AT_ONCE", {"items": 50, "interactions": 50})

    def peak(lines: int) -> int:
        uri = write(tmp_path / f"{lines}.jsonl.gz", (review(text="word " * 200, moment=n) for n in range(lines)))
        tracemalloc.start()
        to_tables(None, uri, str(tmp_path / "made"), silent)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(100)
    assert peak(4000) < 1.3 * peak(400)
