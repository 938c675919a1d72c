"""Pictures over http, many at a time, beside one after the other, and beside a rerun that finds them in its cache.

The server is on the loopback and takes its time, as the way to a far one does; no bandwidth is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.timing import Row
from pixrec.config import PrepareConfig
from pixrec.data.fetch import Fetcher

NUM_PICTURES = 200
LATENCY_SECONDS = 0.05
PICTURE = b"\xff\xd8\xff" + bytes(40_000)


def run() -> list[Row]:
    many = PrepareConfig(allow_private_addresses=True)
    one = dataclasses.replace(many, fetch_concurrency=1)
    with _server() as place, tempfile.TemporaryDirectory(prefix="pixrec-fetch-") as cache:
        urls = [f"{place}/{number}.jpg" for number in range(NUM_PICTURES)]
        alone, together = _rate(urls, one, None), _rate(urls, many, None)
        first, again = _rate(urls, many, cache), _rate(urls, many, cache)
    what = f"pictures over http, {LATENCY_SECONDS * 1000:.0f} ms each"
    return [
        Row(f"{what}, {many.fetch_concurrency} at a time", together, "one after the other", alone, "pictures/s"),
        Row(f"{what}, filling the cache", first, "without a cache", together, "pictures/s"),
        Row(f"{what}, a rerun from the cache", again, "without a cache", together, "pictures/s"),
    ]


def _rate(urls: list[str], config: PrepareConfig, cache: str | None) -> float:
    started = time.perf_counter()
    with Fetcher("", config, cache) as fetcher:
        arrived = [picture for _, picture in fetcher.pictures((None, url) for url in urls)]
    assert all(picture.data == PICTURE for picture in arrived)
    return len(urls) / (time.perf_counter() - started)


class _Slow(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body would wait for the acknowledgement of the header

    def do_GET(self) -> None:
        time.sleep(LATENCY_SECONDS)
        self.send_response(200)
        self.send_header("Content-Length", str(len(PICTURE)))
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of 5, as it comes, all others who knock at once wait a second


@contextlib.contextmanager
def _server() -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), _Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
