"""Random reads of pictures by row: the picture store beside the other ways to keep many blobs.

    python -m benchmarks.speed.store [--pictures 10000] [--open-rows 1000000] [--s3-pictures 2000] [--only NAME ...]

Blobs of 25 KB, each of other bytes, in batches of 256 rows drawn at random. Each figure comes from processes of its
own: warm after one pass over the rows, cold after the page cache was told to forget the files (`POSIX_FADV_DONTNEED`).
S3 is moto's server on the loopback, one Python process: what it takes is the number of requests and bytes of a batch,
which no network changes; its pictures/s only compare. Opening: seconds and growth of proportional memory until the
first batch is read, of a store with blobs of 300 B. Everything lies in a temporary folder (`TMPDIR`).
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BLOB_BYTES, OPEN_BLOB_BYTES, BATCH, PART_ROWS, BATCHES = 25_000, 300, 256, 1000, 30
BUCKET, CONTROL = "s3://bench", "/_requests"
Reader = Callable[[np.ndarray], list[bytes]]


def blobs(start: int, stop: int, size: int) -> list[bytes]:
    rng = np.random.default_rng(start)
    data = rng.bytes((stop - start) * size)
    return [data[at : at + size] for at in range(0, len(data), size)]


def parts(count: int, size: int, rows: int = PART_ROWS) -> Iterator[tuple[int, list[bytes]]]:
    for number, start in enumerate(range(0, count, rows)):
        yield number, blobs(start, min(start + rows, count), size)


def file_system(place: str) -> tuple[Any, str]:
    """Arrow's own, which reads no more than it is asked for."""
    import pyarrow.fs

    if not place.startswith("s3://"):
        return pyarrow.fs.LocalFileSystem(), place
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    return pyarrow.fs.S3FileSystem(endpoint_override=endpoint, scheme="http"), place.removeprefix("s3://")


# Each contestant: write(place, parts), open(place) -> a function from rows to blobs. `place` is a folder, or s3://.


class Store:
    """pixrec.data.pictures: Lance, `take`."""

    s3 = True

    def write(self, place: str, parts: Iterator[tuple[int, list[bytes]]]) -> None:
        from pixrec.data.pictures import complete, write_part

        complete(place, len([write_part(place, number, content) for number, content in parts]))

    def open(self, place: str) -> Reader:
        from pixrec.data.pictures import open_pictures

        return open_pictures(place).read


class LanceBlob:
    """Lance, its blob encoding, `read_blobs`."""

    s3 = True

    def write(self, place: str, parts: Iterator[tuple[int, list[bytes]]]) -> None:
        import lance
        import pyarrow as pa

        from pixrec import storage

        field = pa.field("picture", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
        for number, content in parts:
            table = pa.table([pa.array(content, pa.large_binary())], schema=pa.schema([field]))
            lance.write_dataset(
                table,
                place,
                mode="append" if number else "create",
                data_storage_version="2.1",
                storage_options=storage.object_store_options(place),
            )

    def open(self, place: str) -> Reader:
        import lance

        from pixrec import storage

        data = lance.dataset(place, storage_options=storage.object_store_options(place))
        return lambda rows: [blob for _, blob in data.read_blobs("picture", indices=rows.tolist())]


class Parquet:
    """Parquet with page index, row groups of 32; pyarrow reads a group at least."""

    s3, group = True, 32

    def write(self, place: str, parts: Iterator[tuple[int, list[bytes]]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        fs, path = file_system(place)
        fs.create_dir(path, recursive=True)
        for number, content in parts:
            pq.write_table(
                pa.table({"picture": pa.array(content, pa.large_binary())}),
                f"{path}/{number:06d}.parquet",
                filesystem=fs,
                row_group_size=self.group,
                write_page_index=True,
                use_dictionary=False,
                compression="none",
            )

    def open(self, place: str) -> Reader:
        import pyarrow.fs
        import pyarrow.parquet as pq

        fs, path = file_system(place)
        names = sorted(info.path for info in fs.get_file_info(pyarrow.fs.FileSelector(path)))
        files = [pq.ParquetFile(name, filesystem=fs) for name in names]
        per_file = files[0].metadata.num_rows

        def read(rows: np.ndarray) -> list[bytes]:
            found: list[Any] = [None] * len(rows)
            group_of = rows % per_file // self.group
            for file in np.unique(rows // per_file):
                here = np.flatnonzero(rows // per_file == file)
                groups = np.unique(group_of[here])
                column = files[file].read_row_groups(groups.tolist()).column(0).combine_chunks()
                starts = np.searchsorted(groups, group_of[here]) * self.group
                for at, place in zip(here, starts + rows[here] % per_file % self.group, strict=True):
                    found[at] = column[int(place)].as_py()
            return found

        return read


class ArrowIpc:
    """Arrow IPC files, mapped; on s3:// read by record batches of 32 rows."""

    s3 = True

    def write(self, place: str, parts: Iterator[tuple[int, list[bytes]]]) -> None:
        import pyarrow as pa

        fs, path = file_system(place)
        fs.create_dir(path, recursive=True)
        schema = pa.schema([("picture", pa.large_binary())])
        for number, content in parts:
            table = pa.table([pa.array(content, pa.large_binary())], schema=schema)
            with fs.open_output_stream(f"{path}/{number:06d}.arrow") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_table(table, max_chunksize=32)

    def open(self, place: str) -> Reader:
        import pyarrow as pa
        import pyarrow.fs

        fs, path = file_system(place)
        names = sorted(info.path for info in fs.get_file_info(pyarrow.fs.FileSelector(path)))
        remote = place.startswith("s3://")
        files = [pa.ipc.open_file(fs.open_input_file(name) if remote else pa.memory_map(name)) for name in names]
        per_file = (files[0].num_record_batches - 1) * 32 + files[0].get_batch(files[0].num_record_batches - 1).num_rows

        def read(rows: np.ndarray) -> list[bytes]:
            places = [(row // per_file, row % per_file // 32, row % per_file % 32) for row in rows.tolist()]
            batches = {(file, batch): files[file].get_batch(batch).column(0) for file, batch, _ in places}
            return [batches[file, batch][row].as_py() for file, batch, row in places]

        return read


class Flat:
    """Flat files and their offsets: `pread`, or range reads."""

    s3 = True

    def write(self, place: str, parts: Iterator[tuple[int, list[bytes]]]) -> None:
        from pixrec import storage

        index: list[tuple[int, int, int]] = []
        for number, content in parts:
            data, offsets = self.pack(content)
            storage.write_bytes(f"{place}/{number:06d}.bin", data)
            index += [(number, at, len(blob)) for at, blob in zip(offsets, content, strict=True)]
        sink = io.BytesIO()
        np.save(sink, np.array(index, np.int64))
        storage.write_bytes(f"{place}/index.npy", sink.getvalue())

    def pack(self, content: list[bytes]) -> tuple[bytes, list[int]]:
        return b"".join(content), np.cumsum([0, *map(len, content[:-1])]).tolist()

    def open(self, place: str) -> Reader:
        from pixrec import storage

        names = storage.list_files(place, ".bin")
        if place.startswith("s3://"):
            index = np.load(io.BytesIO(storage.read_bytes(f"{place}/index.npy")))
            fs, _ = storage.locate(place)

            def read(rows: np.ndarray) -> list[bytes]:
                file, start, size = index[rows].T
                return fs.cat_ranges([names[f] for f in file], start.tolist(), (start + size).tolist())

            return read
        index = np.load(f"{place}/index.npy", mmap_mode="r")
        files = [os.open(name, os.O_RDONLY) for name in names]
        return lambda rows: [os.pread(files[file], size, at) for file, at, size in index[rows].tolist()]


class Tar(Flat):
    """WebDataset shards (tar) with an index beside them."""

    def pack(self, content: list[bytes]) -> tuple[bytes, list[int]]:
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for row, blob in enumerate(content):
                member = tarfile.TarInfo(f"{row:09d}.jpg")
                member.size = len(blob)
                tar.addfile(member, io.BytesIO(blob))
        sink.seek(0)
        with tarfile.open(fileobj=sink) as tar:
            return sink.getvalue(), [member.offset_data for member in tar]


class Lmdb:
    """LMDB."""

    s3 = False

    def write(self, place: str, parts: Iterator[tuple[int, list[bytes]]]) -> None:
        import lmdb

        with lmdb.open(place, map_size=1 << 40, sync=False) as store:
            for number, content in parts:
                with store.begin(write=True) as transaction:
                    for row, blob in enumerate(content, number * len(content)):
                        transaction.put(row.to_bytes(8, "big"), blob, append=True)

    def open(self, place: str) -> Reader:
        import lmdb

        transaction = lmdb.open(place, readonly=True, lock=False, readahead=False).begin(buffers=False)
        return lambda rows: [transaction.get(int(row).to_bytes(8, "big")) for row in rows]


class Sqlite:
    """SQLite."""

    s3 = False

    def write(self, place: str, parts: Iterator[tuple[int, list[bytes]]]) -> None:
        Path(place).mkdir()
        store = sqlite3.connect(f"{place}/store.db")
        store.execute("create table p (row integer primary key, picture blob)")
        for number, content in parts:
            store.executemany("insert into p values (?, ?)", enumerate(content, number * len(content)))
            store.commit()
        store.close()

    def open(self, place: str) -> Reader:
        store = sqlite3.connect(f"file:{place}/store.db?mode=ro", uri=True)
        query = "select picture from p where row = ?"
        return lambda rows: [store.execute(query, (row,)).fetchone()[0] for row in rows.tolist()]


CONTESTANTS: dict[str, Any] = {
    "store": Store(),
    "lance_blob": LanceBlob(),
    "parquet": Parquet(),
    "arrow_ipc": ArrowIpc(),
    "flat": Flat(),
    "tar": Tar(),
    "lmdb": Lmdb(),
    "sqlite": Sqlite(),
}


def forget(folder: str) -> None:
    """Ask the kernel to drop the pages of all files below a folder."""
    for file in Path(folder).rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def memory_mib() -> float:
    """Proportional set size of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(name: str, place: str, count: int, batches: int, seed: int, warm: bool, barrier: Any, answers: Any) -> None:
    """One process: pictures a second of `batches` batches, warm after one pass over the rows; processor time in µs."""
    read, rng = CONTESTANTS[name].open(place), np.random.default_rng(seed)
    if warm:
        for start in range(0, count, BATCH):
            read(np.arange(start, min(start + BATCH, count)))
    barrier.wait(600)
    began, spent = time.perf_counter(), time.process_time()
    for _ in range(batches):
        rows = rng.integers(0, count, BATCH)
        assert len(read(rows)) == BATCH
    pictures = batches * BATCH
    answers.put((pictures / (time.perf_counter() - began), (time.process_time() - spent) / pictures * 1e6))


def measure_opening(name: str, place: str, count: int, answers: Any) -> None:
    """One process: seconds to open and to read a first batch, the growth of memory meanwhile. Imports are not timed."""
    contestant = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as other:  # imports, caches and threads of a small store do not count
        contestant.write(f"{other}/s", parts(100, OPEN_BLOB_BYTES, 100))
        contestant.open(f"{other}/s")(np.arange(10))
    before, began = memory_mib(), time.perf_counter()
    read = contestant.open(place)
    opened = time.perf_counter() - began
    read(np.random.default_rng(0).integers(0, count, BATCH))
    first = time.perf_counter() - began
    after = memory_mib()
    for seed in range(50):
        read(np.random.default_rng(seed).integers(0, count, BATCH))
    answers.put((opened, first, after - before, memory_mib() - before))


def in_processes(target: Callable[..., None], *args: Any, processes: int = 1) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    answers, barrier = context.Queue(), context.Barrier(processes)
    extra = (barrier, answers) if target is measure else (answers,)
    seeds = [(seed,) for seed in range(processes)] if target is measure else [()]
    running = []
    for seed in seeds:
        head, tail = (args[:4], args[4:]) if target is measure else (args, ())
        running.append(context.Process(target=target, args=(*head, *seed, *tail, *extra)))
    for process in running:
        process.start()
    try:
        return [answers.get(timeout=900) for _ in running]
    finally:
        for process in running:
            process.join(10)
            process.kill()


def local(name: str, place: str, count: int) -> list[str]:
    """Rates and disk of one contestant, as cells of the table."""
    began = time.perf_counter()
    CONTESTANTS[name].write(place, parts(count, BLOB_BYTES))
    written = count / (time.perf_counter() - began)
    disk = sum(file.stat().st_blocks * 512 for file in Path(place).rglob("*") if file.is_file()) / (count * BLOB_BYTES)
    rates, spent = [], 0.0
    for warm in (True, False):
        for processes in (1, 2):
            if not warm:
                forget(place)
            found = in_processes(measure, name, place, count, BATCHES, warm, processes=processes)
            rates.append(sum(rate for rate, _ in found))
            spent = spent or found[0][1]
    return [*(f"{rate:,.0f}" for rate in rates), f"{spent:.0f}", f"{written:,.0f}", f"{disk:.3f}"]


def opening(name: str, place: str, count: int) -> list[str]:
    CONTESTANTS[name].write(place, parts(count, OPEN_BLOB_BYTES, 10_000))
    opened, first, grown, later = in_processes(measure_opening, name, place, count)[0]
    return [f"{opened:.3f}", f"{first:.3f}", f"{grown:.0f}", f"{later:.0f}"]


def serve_s3(ready: Any, bucket: str) -> None:
    """moto's server with two counters: requests, and bytes of answers."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    app, counted = DomainDispatcherApplication(create_backend_app), [0, 0]

    class Silent(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    def counting(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == CONTROL:
            body = f"{counted[0]} {counted[1]}".encode()
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            counted[0] += 1
            if environ["REQUEST_METHOD"] == "GET":
                counted[1] += int(dict(headers).get("Content-Length", 0))
            return start_response(status, headers, *rest)

        return app(environ, start)

    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Silent)
    ready.put(server.server_port)
    server.serve_forever()


def counts() -> np.ndarray:
    from urllib.request import urlopen

    with urlopen(os.environ["AWS_ENDPOINT_URL"] + CONTROL) as answer:
        return np.array(answer.read().split(), np.int64)


def remote(name: str, place: str, count: int, batches: int = 3) -> list[str]:
    """Rates, and what a batch asks of the server."""
    CONTESTANTS[name].write(place, parts(count, BLOB_BYTES, 250))
    rate = {
        n: sum(r for r, _ in in_processes(measure, name, place, count, batches, False, processes=n)) for n in (1, 2)
    }
    read, rng = CONTESTANTS[name].open(place), np.random.default_rng(9)
    read(rng.integers(0, count, BATCH))
    before = counts()
    read(rng.integers(0, count, BATCH))
    requests, size = counts() - before
    return [f"{rate[1]:,.0f}", f"{rate[2]:,.0f}", f"{requests}", f"{size / BATCH / BLOB_BYTES:.2f}"]


def print_table(head: list[str], rows: dict[str, list[str]]) -> None:
    print("\n| " + " | ".join(["", *head]) + " |\n|" + "---|" * (len(head) + 1))
    for name, cells in rows.items():
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--pictures", type=int, default=10_000)
    ask.add_argument("--open-rows", type=int, default=1_000_000)
    ask.add_argument("--s3-pictures", type=int, default=2000)
    ask.add_argument("--only", nargs="*", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    given = ask.parse_args()

    def each(contest: Callable[..., list[str]], *args: Any, names: list[str] = given.only) -> dict[str, list[str]]:
        rows = {}
        for name in names:
            with tempfile.TemporaryDirectory(prefix="pixrec-store-") as folder:
                rows[name] = contest(name, f"{folder}/{name}", *args)
            print(name, *rows[name], flush=True)
        return rows

    if given.pictures:
        head = [
            "warm, 1 process",
            "warm, 2",
            "cold, 1",
            "cold, 2 (pictures/s)",
            "CPU, warm (µs a picture)",
            "written (pictures/s)",
            "disk / bytes",
        ]
        print_table(head, each(local, given.pictures))
    if given.open_rows:
        head = ["open (s)", "until first batch (s)", "memory (MiB)", "after 51 batches (MiB)"]
        print_table(head, each(opening, given.open_rows))
    if given.s3_pictures:
        context = multiprocessing.get_context("spawn")
        ready = context.Queue()
        server = context.Process(target=serve_s3, args=(ready, BUCKET), daemon=True)
        server.start()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ready.get(timeout=60)}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        from pixrec import storage

        storage.locate(BUCKET)[0].mkdir(BUCKET)
        names = [name for name in given.only if CONTESTANTS[name].s3]
        rows = {}
        for name in names:
            rows[name] = remote(name, f"{BUCKET}/{name}", given.s3_pictures)
            storage.remove(f"{BUCKET}/{name}")
            print(name, *rows[name], flush=True)
        print_table(["1 process", "2 (pictures/s)", "requests a batch", "bytes read / bytes wanted"], rows)
        server.kill()
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {shutil.disk_usage('/').free >> 30} GiB free")


if __name__ == "__main__":
    main()
