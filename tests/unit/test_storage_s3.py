"""The same door for s3://, against a server on the loopback; credentials and endpoint from the usual variables."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest

from pixrec import storage
from pixrec.data.pictures import complete, open_pictures, write_part
from pixrec.errors import ArtifactError, InputError, OutputError, UnavailableError

BUCKET = "s3://shop"


@pytest.fixture(scope="module", autouse=True)
def server():
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fs, _ = storage.locate(BUCKET)
    fs.mkdir("shop")
    yield
    fs.clear_instance_cache()
    running.stop()
    patch.undo()


def test_files_and_tables_round_trip():
    table = pa.table({"item_id": ["a", "b"]})
    storage.write_table(f"{BUCKET}/t/part-0.parquet", table)
    storage.write_json(f"{BUCKET}/t/facts.json", {"n": 2})
    assert storage.read_table(f"{BUCKET}/t").equals(table)
    assert storage.read_json(f"{BUCKET}/t/facts.json") == {"n": 2}
    assert storage.list_files(f"{BUCKET}/t", ".parquet") == [f"{BUCKET}/t/part-0.parquet"]
    assert storage.resolve("../x/y.jpg", f"{BUCKET}/t") == f"{BUCKET}/x/y.jpg"


def test_a_folder_is_published_whole_or_not_at_all():
    target = f"{BUCKET}/data"

    def die_halfway():
        with storage.staged_folder(target, "done.json", "thing") as staging:
            storage.write_bytes(storage.join(staging, "part"), b"half")
            raise ValueError("died")

    with pytest.raises(ValueError, match="died"):
        die_halfway()
    assert not storage.exists(target)
    for content in (b"first", b"second"):
        with storage.staged_folder(target, "done.json", "thing") as staging:
            storage.write_bytes(storage.join(staging, "part"), content)
            storage.write_json(storage.join(staging, "done.json"), {})
    assert storage.read_bytes(f"{target}/part") == b"second"
    assert {file.rsplit("/", 1)[1] for file in storage.list_files(target)} == {"part", "done.json"}
    assert storage.list_folders(BUCKET).count("data") == 1


def test_a_foreign_prefix_is_refused():
    storage.write_bytes(f"{BUCKET}/mine/notes.txt", b"keep")
    with pytest.raises(OutputError, match="not empty"), storage.staged_folder(f"{BUCKET}/mine", "done.json", "thing"):
        pass
    assert storage.read_bytes(f"{BUCKET}/mine/notes.txt") == b"keep"


def test_what_is_absent_is_said_in_one_line():
    with pytest.raises(InputError, match="no such file or folder"):
        storage.read_table(f"{BUCKET}/nowhere")
    with pytest.raises(OutputError, match="cannot be written"):
        storage.check_writable("s3://no-such-bucket/x", "done.json", "thing")


def test_many_small_files_are_read_together():
    for number in range(3):
        storage.write_bytes(f"{BUCKET}/many/{number}", bytes([number]))
    assert storage.read_files([f"{BUCKET}/many/{number}" for number in (2, 0, 7)]) == [b"\2", b"\0", None]


def test_a_picture_store_is_read_by_row_where_it_lies():
    pictures = [None if row % 4 == 1 else bytes([row]) * 5000 for row in range(30)]
    with storage.staged_folder(f"{BUCKET}/prepared", "dataset.json", "thing") as staging:
        store = storage.join(staging, "pictures")
        for number in (2, 0, 1, 0):
            write_part(store, number, pictures[10 * number : 10 * number + 10])
        assert complete(store, 3) == 30
        storage.write_json(storage.join(staging, "dataset.json"), {})
    found = open_pictures(f"{BUCKET}/prepared/pictures")
    assert found.read([29, 3, 3, 1]) == [pictures[29], pictures[3], pictures[3], None]
    assert found.read_range(5, 25) == pictures[5:25]
    assert len(storage.list_files(f"{BUCKET}/prepared/pictures/data")) == 3
    with pytest.raises(ArtifactError, match="no complete one"):
        open_pictures(f"{BUCKET}/elsewhere")


def test_a_new_file_is_whole_or_not_there_on_s3():
    def die_halfway(size: int) -> None:
        with storage.new_file(f"{BUCKET}/new/file") as file:
            file.write(bytes(size))
            raise KeyError

    for size in (4, 60 * 1024**2):  # in one piece, and in several
        with pytest.raises(KeyError):
            die_halfway(size)
    assert not storage.exists(f"{BUCKET}/new/file")
    storage.write_array(f"{BUCKET}/new/file", np.arange(5))
    assert storage.read_array(f"{BUCKET}/new/file").tolist() == [0, 1, 2, 3, 4]
    batch = pa.record_batch({"x": [1, 2]})
    storage.write_batches(f"{BUCKET}/new/batches", batch.schema, [batch, batch])
    assert [len(found) for found in storage.read_batches(f"{BUCKET}/new/batches", [1])] == [2]


def test_a_node_keeps_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path / "cache"))
    storage.write_array(f"{BUCKET}/arrays/a.npy", np.arange(3))
    copy = storage.node_copy(f"{BUCKET}/arrays", "fingerprint")
    assert storage.map_array(f"{copy}/a.npy").tolist() == [0, 1, 2]
    storage.write_array(f"{BUCKET}/arrays/a.npy", np.arange(4))
    assert storage.node_copy(f"{BUCKET}/arrays", "fingerprint") == copy
    assert len(storage.map_array(f"{copy}/a.npy")) == 3, "the key names the content"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["fingerprint", "fingerprint.lock"]
    with pytest.raises(InputError, match="no such file"):
        storage.node_copy(f"{BUCKET}/nowhere", "other")
    assert storage.node_copy(str(tmp_path), "unused") == str(tmp_path)


def test_a_work_folder_on_s3():
    class Killed(BaseException):
        pass

    def be_killed() -> None:
        with storage.work_folder(f"{BUCKET}/made", "k", "marker", "thing") as work:
            storage.write_bytes(f"{work}/data/part", b"done")
            raise Killed

    with pytest.raises(Killed):
        be_killed()
    with storage.work_folder(f"{BUCKET}/made", "k", "marker", "thing") as work:
        assert storage.read_bytes(f"{work}/data/part") == b"done"
        storage.write_bytes(f"{work}/data/marker", b"")
    assert storage.list_files(f"{BUCKET}/made") == [f"{BUCKET}/made/marker", f"{BUCKET}/made/part"]
    assert not [name for name in storage.list_folders(BUCKET) if name.startswith(".made")]


class _Refuses(BaseHTTPRequestHandler):
    """Answers 503 as often as its server says, then as if the file lay there."""

    def do_GET(self) -> None:
        self.server.refusals -= 1  # type: ignore[attr-defined]
        refused = self.server.refusals >= 0  # type: ignore[attr-defined]
        found = b"" if self.command == "PUT" else b"there"
        body = b"<Error><Code>ServiceUnavailable</Code><Message>Later.</Message></Error>" if refused else found
        self.send_response(503 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """An endpoint that refuses; nobody waits between two tries."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("botocore.retryhandler.random.random", lambda: 0.0)
    fs, _ = storage.locate(BUCKET)
    fs.clear_instance_cache()
    yield server
    fs.clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("refusals", [1, 7])
def test_what_refuses_for_a_while_is_asked_again(refusing: ThreadingHTTPServer, refusals: int):
    refusing.refusals = refusals  # type: ignore[attr-defined]
    assert storage.read_bytes(f"{BUCKET}/file") == b"there"
    refusing.refusals = refusals  # type: ignore[attr-defined]
    storage.write_bytes(f"{BUCKET}/file", b"there")
    assert refusing.refusals == -1  # type: ignore[attr-defined]


def test_what_refuses_on_and_on_is_nobodys_fault(refusing: ThreadingHTTPServer):
    refusing.refusals = 10_000  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match=r"cannot be written for now: .*; run the same command again later"):
        storage.write_bytes(f"{BUCKET}/file", b"there")
    with pytest.raises(UnavailableError, match="cannot be read for now"):
        storage.read_text(f"{BUCKET}/file")
