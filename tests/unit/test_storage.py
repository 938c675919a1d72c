from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pixrec import storage
from pixrec.errors import ArtifactError, InputError, OutputError

MARKER, KIND = "done.json", "thing"


def test_a_file_is_written_whole_and_read_back(tmp_path: Path):
    uri = str(tmp_path / "new" / "folder" / "file.bin")
    storage.write_bytes(uri, b"old")
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    assert os.listdir(tmp_path / "new" / "folder") == ["file.bin"]
    assert storage.read_bytes(uri, max_bytes=3) == b"new"
    with pytest.raises(InputError, match="is larger than 2 bytes"):
        storage.read_bytes(uri, max_bytes=2)


@pytest.mark.parametrize("where", ["nowhere", "folder", "file/below"])
def test_reading_what_is_no_file(tmp_path: Path, where: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / where))
    with pytest.raises(InputError, match="no such file or folder"):
        storage.read_text(str(tmp_path / where))


def test_json(tmp_path: Path):
    uri = str(tmp_path / "a.json")
    storage.write_json(uri, {"name": "Café", "n": [1, None]})
    assert storage.read_json(uri) == {"name": "Café", "n": [1, None]}
    storage.write_bytes(uri, b"{")
    with pytest.raises(ArtifactError, match=r"a\.json is not valid JSON"):
        storage.read_json(uri)
    for content, missing in ((b'{"name": 1}', "n, m"), (b"[]", "name, n, m"), (b"null", "name, n, m")):
        storage.write_bytes(uri, content)
        with pytest.raises(ArtifactError, match=rf"a\.json is damaged: it says nothing of {missing};"):
            storage.read_json(uri, ("name", "n", "m"))


def test_paths():
    assert storage.join("s3://bucket/key/", "a", "b") == "s3://bucket/key/a/b"
    assert storage.parent("s3://bucket/key/file.parquet") == "s3://bucket/key"
    assert storage.name("/a/b/") == "b"
    assert storage.resolve("../images/1.jpg", "/data/ml/") == "/data/images/1.jpg"
    assert storage.resolve("../images/1.jpg", "s3://bucket/data/ml") == "s3://bucket/data/images/1.jpg"
    assert storage.resolve("/abs/1.jpg", "s3://bucket/data") == "/abs/1.jpg"
    assert storage.resolve("s3://other/1.jpg", "/data") == "s3://other/1.jpg"
    assert storage.resolve("http://host/1.jpg", "/data") == "http://host/1.jpg"


def test_an_empty_place_is_none_and_not_the_current_folder():
    for use in (storage.exists, storage.table_files, storage.read_text):
        with pytest.raises(InputError, match="a place is empty"):
            use("")


def test_other_schemes_are_refused():
    with pytest.raises(InputError, match=r"gs://bucket/x: only local paths and s3:// URIs are known"):
        storage.exists("gs://bucket/x")


def test_listing_skips_what_is_hidden(tmp_path: Path):
    for name in ("b.parquet", "a.parquet", "c.txt", ".hidden.parquet", "_temporary/d.parquet", "sub/e.parquet"):
        storage.write_bytes(str(tmp_path / name), b"")
    uri = str(tmp_path)
    assert storage.list_files(uri, ".parquet") == [f"{uri}/{name}.parquet" for name in ("a", "b", "sub/e")]
    assert storage.list_folders(uri) == ["_temporary", "sub"]
    assert storage.list_files(f"{uri}/nowhere") == storage.list_folders(f"{uri}/nowhere") == []


def test_a_table_is_a_file_or_a_folder_in_name_order(tmp_path: Path):
    folder = str(tmp_path / "t")
    storage.write_table(f"{folder}/part-1.parquet", pa.table({"x": [3], "y": pa.nulls(1)}))
    storage.write_table(f"{folder}/part-0.parquet", pa.table({"x": [1, 2], "y": ["a", "b"]}))
    assert storage.read_table(folder).to_pydict() == {"x": [1, 2, 3], "y": ["a", "b", None]}
    assert storage.read_table(f"{folder}/part-0.parquet", ["x"]).to_pydict() == {"x": [1, 2]}
    assert storage.read_schema(folder).names == ["x", "y"]


def test_the_hash_of_a_written_table_is_that_of_its_content(tmp_path: Path):
    same = [storage.write_table(str(tmp_path / name), pa.table({"x": [1, 2]})) for name in ("a", "b")]
    assert same[0] == same[1] != storage.write_table(str(tmp_path / "c"), pa.table({"x": [2, 1]}))


def test_tables_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "text.parquet").write_text("this is no Parquet")
    (tmp_path / "empty").mkdir()
    storage.write_table(str(tmp_path / "two" / "a.parquet"), pa.table({"x": [1]}))
    storage.write_table(str(tmp_path / "two" / "b.parquet"), pa.table({"x": ["one"]}))
    for read in (storage.read_table, storage.read_schema):
        with pytest.raises(InputError, match="nowhere: no such file or folder"):
            read(str(tmp_path / "nowhere"))
        with pytest.raises(InputError, match=r"text\.parquet: cannot be read"):
            read(str(tmp_path / "text.parquet"))
        with pytest.raises(InputError, match=r"empty: holds no \.parquet file"):
            read(str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"two: its files disagree about a column"):
        storage.read_table(str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"two/a\.parquet: no column 'y'"):
        storage.read_table(str(tmp_path / "two"), ["x", "y"])
    with pytest.raises(InputError, match=r"text\.parquet: cannot be read"):
        storage.row_groups(str(tmp_path / "text.parquet"))


def test_rows_of_a_row_group(tmp_path: Path):
    uri = str(tmp_path / "t.parquet")
    table = pa.table({"x": range(100), "text": [str(x) for x in range(100)]})
    pa.parquet.write_table(table, uri, row_group_size=60)
    assert [group.rows for group in storage.row_groups(uri)] == [60, 40]
    for group, start, stop in [(0, 0, 60), (0, 0, 7), (0, 7, 14), (0, 10, 17), (0, 59, 60), (1, 3, 40)]:
        found = storage.read_rows(uri, group, start, stop)
        assert found.equals(table.slice(60 * group + start, stop - start)), (group, start, stop)


def test_a_folder_is_complete_or_invisible(tmp_path: Path):
    out = str(tmp_path / "deep" / "out")
    with storage.staged_folder(out, MARKER, KIND) as staging:
        storage.write_bytes(f"{staging}/sub/data", b"1")
        storage.write_json(f"{staging}/{MARKER}", {})
        assert not os.path.exists(out)
    assert storage.read_bytes(f"{out}/sub/data") == b"1"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_older_one_is_replaced_whole(tmp_path: Path):
    out = str(tmp_path / "out")
    for name in ("old", "new"):
        with storage.staged_folder(out, MARKER, KIND) as staging:
            storage.write_bytes(f"{staging}/{name}", b"")
            storage.write_json(f"{staging}/{MARKER}", {})
    assert sorted(os.listdir(out)) == [MARKER, "new"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_leaves_the_older_one_and_nothing_else(tmp_path: Path):
    out = str(tmp_path / "out")
    with storage.staged_folder(out, MARKER, KIND) as staging:
        storage.write_json(f"{staging}/{MARKER}", {"kept": True})

    def fail(error: Exception | None) -> None:
        with storage.staged_folder(out, MARKER, KIND) as staging:
            storage.write_bytes(f"{staging}/data", b"")
            if error:
                storage.write_json(f"{staging}/{MARKER}", {"kept": False})
                raise error

    with pytest.raises(KeyError):
        fail(KeyError())
    with pytest.raises(RuntimeError, match=r"thing was left without its done\.json"):
        fail(None)
    assert storage.read_json(f"{out}/{MARKER}") == {"kept": True}
    assert os.listdir(tmp_path) == ["out"]


def test_places_that_cannot_become_a_folder_of_this_kind(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="is a file; --out must name a folder"):
        storage.check_writable(str(tmp_path / "file"), MARKER, KIND)
    with pytest.raises(OutputError, match="precious is not empty and holds no thing; choose another --out"):
        storage.check_writable(str(tmp_path / "precious"), MARKER, KIND)
    with pytest.raises(OutputError, match=r"below cannot be written.*choose another --out"):
        storage.check_writable(str(tmp_path / "file" / "below"), MARKER, KIND)
    for fine in ("empty", "new", "new/below"):
        storage.check_writable(str(tmp_path / fine), MARKER, KIND)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "precious"]


def test_a_local_folder_is_itself_and_copies_are_whole(tmp_path: Path):
    storage.write_bytes(str(tmp_path / "a" / "sub" / "x"), b"1")
    storage.copy_folder(str(tmp_path / "a"), str(tmp_path / "b"))
    with storage.local_folder(str(tmp_path / "b")) as folder:
        assert storage.read_bytes(f"{folder}/sub/x") == b"1"
    storage.remove(str(tmp_path / "b"))
    storage.remove(str(tmp_path / "b"))
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / ".other.partial-dead").mkdir()
    with storage.staged_folder(str(tmp_path / "out"), "done", "thing") as staging:
        storage.write_bytes(storage.join(staging, "done"), b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-dead", "out"]


def test_a_table_is_written_piece_by_piece(tmp_path: Path):
    uri = str(tmp_path / "new" / "t.parquet")
    schema = pa.schema([("a", pa.int64())])
    with storage.table_writer(uri, schema) as write:
        for start in (0, 3):
            write(pa.table({"a": range(start, start + 3)}, schema=schema))
    assert storage.read_table(uri).column("a").to_pylist() == list(range(6))
    assert [group.rows for group in storage.row_groups(uri)] == [3, 3]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written"),
        storage.table_writer(f"{tmp_path}/file/t.parquet", schema),
    ):
        pass


def test_a_stream_is_read_from_the_start(tmp_path: Path):
    (tmp_path / "lines").write_bytes(b"one\ntwo\n")
    with storage.open_stream(str(tmp_path / "lines")) as stream:
        assert stream.peek(2).startswith(b"on")
        assert stream.readlines() == [b"one\n", b"two\n"]
    with pytest.raises(InputError, match="no such file"), storage.open_stream(str(tmp_path / "none")):
        pass


def test_scratch_is_gone_afterwards_and_so_is_what_a_killed_run_left(tmp_path: Path):
    left_behind, other = tmp_path / ".out.scratch-0a1b2c3d", tmp_path / ".outer.scratch-0a1b2c3d"
    for folder in (left_behind, other):
        folder.mkdir()
    with storage.scratch_folder(str(tmp_path / "out")) as scratch:
        storage.write_bytes(f"{scratch}/x", b"x")
        assert not left_behind.exists()
    assert list(tmp_path.iterdir()) == [other]


def test_a_table_is_streamed_in_order_a_few_rows_at_a_time(tmp_path: Path):
    uri = str(tmp_path / "t.parquet")
    table = pa.table({"a": range(10), "b": [str(n) for n in range(10)]})
    storage.write_table(uri, table)
    parts = list(storage.stream_table(uri, ["b", "absent"], 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert pa.concat_tables(parts).equals(table.select(["b"]))
    assert pa.concat_tables(storage.stream_table(uri, None, 99)).equals(table)
    with pytest.raises(InputError, match="no such file"):
        list(storage.stream_table(str(tmp_path / "absent"), None, 1))
    (tmp_path / "text").write_text("no table")
    with pytest.raises(InputError, match="cannot be read"):
        list(storage.stream_table(str(tmp_path / "text"), None, 1))


class Killed(BaseException):
    """Stands for a SIGKILL."""


def test_a_new_file_is_whole_or_not_there(tmp_path: Path):
    target = tmp_path / "folder" / "file"

    def die_halfway() -> None:
        with storage.new_file(str(target)) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        die_halfway()
    assert list(target.parent.iterdir()) == []
    with storage.new_file(str(target), durable=False) as file:
        file.write(b"who")
        file.write(b"le")
    assert target.read_bytes() == b"whole"


def test_arrays_and_batches_come_back(tmp_path: Path):
    array = np.arange(7, dtype=np.int32)
    storage.write_array(str(tmp_path / "a.npy"), array)
    assert storage.read_array(str(tmp_path / "a.npy")).tolist() == storage.map_array(str(tmp_path / "a.npy")).tolist()
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:40])
    for read in (storage.read_array, storage.map_array):
        with pytest.raises(ArtifactError, match=r"cut\.npy is damaged.*make the artifact again"):
            read(str(tmp_path / "cut.npy"))
        with pytest.raises(InputError, match=r"gone\.npy: no such file"):
            read(str(tmp_path / "gone.npy"))
    batches = [pa.record_batch({"x": [number]}) for number in range(3)]
    storage.write_batches(str(tmp_path / "b.arrow"), batches[0].schema, batches)
    found = storage.read_batches(str(tmp_path / "b.arrow"), [2, 0])
    assert [batch.column("x").to_pylist() for batch in found] == [[2], [0]]
    assert sum(map(len, storage.read_batches(str(tmp_path / "b.arrow")))) == 3


def end_work(out: str, key: str, error: BaseException) -> None:
    with storage.work_folder(out, key, MARKER, KIND) as work:
        storage.write_bytes(f"{work}/steps/{key}", b"done")
        raise error


def test_a_work_folder_survives_a_kill_and_no_error(tmp_path: Path):
    out = str(tmp_path / "new" / "out")
    with pytest.raises(Killed):
        end_work(out, "k", Killed())
    with storage.work_folder(out, "k", MARKER, KIND) as work:
        assert storage.read_bytes(f"{work}/steps/k") == b"done"
        storage.write_bytes(f"{work}/data/{MARKER}", b"")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == [MARKER]

    for key in ("k", "another"):
        with pytest.raises(Killed):
            end_work(str(tmp_path / "other" / "out"), key, Killed())
        assert [path.name for path in (tmp_path / "other").iterdir()] == [f".out.work-{key}"], "others leave"
    with pytest.raises(InputError):
        end_work(str(tmp_path / "other" / "out"), "another", InputError("not our day"))
    assert list((tmp_path / "other").iterdir()) == []
    with pytest.raises(InputError):
        end_work(str(tmp_path / "x" / "y" / "z"), "k", InputError("not our day"))
    assert not (tmp_path / "x").exists()


def test_what_was_moved_already_is_not_gone_on_with(tmp_path: Path):
    out = str(tmp_path / "out")
    storage.write_bytes(f"{tmp_path}/.out.work-k/done/1.json", b"{}")
    with storage.work_folder(out, "k", MARKER, KIND) as work:
        assert not storage.exists(f"{work}/done")
        storage.write_bytes(f"{work}/data/{MARKER}", b"")
    assert storage.exists(f"{out}/{MARKER}")


def test_the_cache_of_a_node_forgets_what_nobody_used_for_a_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path))
    used, unused = storage.node_place("used"), storage.node_place("unused")
    for path in (used, unused):
        os.makedirs(path)
        os.utime(path, (0, 0))
    assert storage.node_place("used") == used
    made = storage.node_file("anything", "1", lambda path: Path(path).write_text("mapped"), lambda path: path)
    assert Path(made).read_text() == "mapped"
    assert os.path.exists(used)
    assert not os.path.exists(unused)
