"""Tables given in memory reach `prepare` as files that hold the same rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from pixrec import storage
from pixrec.data import memory
from pixrec.data.memory import on_storage
from pixrec.errors import InputError, OutputError


class Stream:
    """A table of a library that knows nothing but the protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def written(table: object, out: Path) -> pa.Table:
    with on_storage({"items": table}, str(out)) as at:
        return storage.read_table(at["items"])


ROWS = {"item_id": ["a", "b"], "price": [1.5, None], "image": [b"x", None], "tags": [["k"], []]}
TYPES = {"item_id": pa.string(), "price": pa.float64(), "image": pa.binary(), "tags": pa.list_(pa.string())}
TABLE = pa.table({name: pa.array(ROWS[name], kind) for name, kind in TYPES.items()})


@pytest.mark.parametrize("given", [TABLE, Stream(TABLE), TABLE.to_reader(), TABLE.to_batches()[0]])
def test_what_speaks_the_protocol_is_a_table(tmp_path: Path, given: object):
    assert written(given, tmp_path / "data") == TABLE
    assert list(tmp_path.iterdir()) == []


def test_types_that_only_live_in_memory_become_plain(tmp_path: Path):
    views = {
        "item_id": pa.array(["a", "b"], pa.string_view()),
        "image": pa.array([b"x", None], pa.binary_view()),
        "category": pa.array(["c", "c"]).dictionary_encode(),
        "brand": pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.uint32()), pa.array(["b"], pa.string_view())),
        "title": pa.array(["A", "B"], pa.large_string()),
    }
    kinds = written(pa.table(views), tmp_path / "data").schema.types
    assert kinds == [pa.string(), pa.binary(), pa.string(), pa.string(), pa.string()]


def test_a_filtered_data_frame_brings_no_row_labels(tmp_path: Path):
    frame = pd.DataFrame({"item_id": ["a", "b", "c"], "price": [1.0, 2.0, 3.0]})
    assert written(frame[frame.price != 2], tmp_path / "data").to_pydict() == {"item_id": ["a", "c"], "price": [1, 3]}


def test_pictures_are_those_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    uris = ["a.jpg", "../b.jpg", "/c.jpg", "s3://bucket/d.jpg", "https://shop/e.jpg", None, ""]
    table = pa.table({"image_uri": uris, "image_uris": [[uri] if uri else None for uri in uris]})
    found = written(table, tmp_path / "data").to_pydict()
    expected = [f"{tmp_path}/here/a.jpg", f"{tmp_path}/b.jpg", *uris[2:]]
    assert found["image_uri"] == expected
    assert found["image_uris"] == [[uri] if uri else None for uri in expected]


def test_columns_that_are_wrong_are_left_for_prepare_to_name(tmp_path: Path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], ["image_uri", "twice", "twice"])
    with on_storage({"items": table}, str(tmp_path / "data")) as at:
        assert storage.read_schema(at["items"]) == table.schema


def test_rows_come_in_groups_that_workers_can_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_GROUP_ROWS", 4)
    pieces = [pa.table({"n": list(range(start, stop))}) for start, stop in ((0, 1), (1, 3), (3, 13), (13, 14))]
    with on_storage({"items": pa.concat_tables(pieces)}, str(tmp_path / "data")) as at:
        groups = [group.rows for group in storage.row_groups(at["items"]) if group.rows]
        assert storage.read_table(at["items"])["n"].to_pylist() == list(range(14))
    assert max(groups) < 8, "large batches are cut"
    assert len(groups) < 4, "small ones are joined"

    monkeypatch.setattr(memory, "_GROUP_BYTES", 1000)
    heavy = pa.table({"image": [b"p" * 400] * 9})
    with on_storage({"items": heavy}, str(tmp_path / "data")) as at:
        assert max(group.rows for group in storage.row_groups(at["items"])) * 400 < 2 * 1000


def test_no_rows_are_a_table_too(tmp_path: Path):
    assert written(TABLE.schema.empty_table(), tmp_path / "data") == TABLE.schema.empty_table()


def test_places_are_left_as_they_are(tmp_path: Path):
    with on_storage({"items": None, "interactions": "s3://there"}, str(tmp_path / "data")) as at:
        assert at == {"items": None, "interactions": "s3://there"}


def test_an_error_speaks_of_the_table_and_nothing_is_left(tmp_path: Path):
    def fails(at: dict) -> None:
        raise InputError(f"{at['items']}: no column 'title'")

    with (
        pytest.raises(InputError, match=r"^items: no column 'title'$"),
        on_storage({"items": TABLE}, f"{tmp_path}/d") as at,
    ):
        fails(at)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_breaks(tmp_path: Path):
    def batches():
        yield TABLE.to_batches()[0]
        raise pa.ArrowInvalid("the source is gone")

    broken = pa.RecordBatchReader.from_batches(TABLE.schema, batches())
    with pytest.raises(InputError, match=r"items: cannot be read: .*the source is gone"):
        written(broken, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_refused_before_anything_is_written(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not empty and holds no data set"):
        written(TABLE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
