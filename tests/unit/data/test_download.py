from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pixrec.config import PrepareConfig
from pixrec.data.download import Download, Downloader, is_public

SETTINGS = {"max_image_bytes": 1000, "fetch_backoff_seconds": 0.0, "fetch_timeout_seconds": 5.0}
ALLOWED = PrepareConfig(**SETTINGS, allow_private_addresses=True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        kind, _, rest = self.path.strip("/").partition("/")
        getattr(self, f"answer_{kind}")(rest)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_bytes(self, count: str) -> None:
        self.reply(200, b"x" * int(count))

    def answer_status(self, status: str) -> None:
        self.reply(int(status), b"" if status in ("204", "304") else b"no picture")

    def answer_flaky(self, times: str) -> None:
        """Fails so many times, then answers."""
        tries = sum(path == self.path for path, _ in self.server.seen)
        self.reply(503 if tries <= int(times) else 200, b"at last", **{"Retry-After": "0"})

    def answer_hops(self, count: str) -> None:
        place = f"/hops/{int(count) - 1}" if int(count) else "../bytes/3"
        self.reply(302, Location=place)

    def answer_to(self, place: str) -> None:
        self.reply(301, Location=place)

    def answer_endless(self, _: str) -> None:
        """No Content-Length, and no end."""
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 500)
        except OSError:
            self.close_connection = True

    def answer_cut(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "900")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.close_connection = True

    def answer_drip(self, _: str) -> None:
        """A byte at a time: no single wait is long."""
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.ending.wait(0.02):
                self.wfile.write(b"x")
                self.wfile.flush()
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.seen, running.ending, running.daemon_threads = [], threading.Event(), True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.ending.set()
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def url(server: ThreadingHTTPServer) -> Callable[[str], str]:
    server.seen.clear()
    return lambda path: f"http://127.0.0.1:{server.server_port}/{path}"


def get(*urls: str, config: PrepareConfig = ALLOWED) -> list[Download]:
    async def all_of_them() -> list[Download]:
        async with Downloader(config) as downloader:
            return await asyncio.gather(*(downloader.get(url) for url in urls))

    return asyncio.run(all_of_them())


def test_bytes_come_as_they_are(server, url):
    assert get(url("bytes/1000")) == [Download(b"x" * 1000)]
    assert get(url("bytes/0")) == [Download(b"")]
    headers = server.seen[0][1]
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("pixrec/")
    assert "Cookie" not in headers


@pytest.mark.parametrize(
    ("path", "reason", "requests"),
    [
        ("status/404", "file not found", 1),
        ("status/410", "file not found", 1),
        ("status/403", "HTTP status 403", 1),
        ("status/204", "HTTP status 204", 1),
        ("status/304", "HTTP status 304", 1),
        ("status/500", "HTTP status 500", 4),
        ("status/429", "HTTP status 429", 4),
        ("bytes/1001", "file too large", 1),
        ("endless/", "file too large", 1),
        ("cut/", "server not reached", 4),
        ("hops/9", "too many redirects", 6),
        ("to/file:///etc/passwd", "bad URL", 1),
        ("to/ftp://127.0.0.1/x", "bad URL", 1),
        ("to/https://", "bad URL", 1),
    ],
)
def test_what_does_not_come_says_why(server, url, path: str, reason: str, requests: int):
    (answer,) = get(url(path))
    assert (answer.data, answer.reason) == (None, reason)
    assert len(server.seen) == requests


def test_passing_trouble_is_tried_again_with_growing_random_waits(server, url, monkeypatch: pytest.MonkeyPatch):
    waits, highest = [], []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    def draw(low: float, high: float) -> float:
        highest.append((low, high))
        return high / 2

    monkeypatch.setattr("pixrec.data.download.asyncio.sleep", note)
    monkeypatch.setattr("pixrec.data.download.random.uniform", draw)
    config = PrepareConfig(**{**SETTINGS, "fetch_backoff_seconds": 2.0}, allow_private_addresses=True)
    assert get(url("flaky/3"), config=config) == [Download(b"at last")]
    assert highest == [(0, 2.0), (0, 4.0), (0, 8.0)]
    assert [seconds for seconds in waits if seconds] == [1.0, 2.0, 4.0]
    assert len(server.seen) == 4


def test_redirects_are_followed_relative_ones_too(url):
    assert get(url("hops/3")) == [Download(b"xxx")]


def test_a_slow_drip_ends_at_the_time_limit(server, url):
    config = PrepareConfig(
        max_image_bytes=10**6, fetch_timeout_seconds=0.2, fetch_retries=0, allow_private_addresses=True
    )
    started = time.monotonic()
    assert [answer.reason for answer in get(url("drip/"), config=config)] == ["download timed out"]
    assert time.monotonic() - started < 4


def test_a_closed_port_is_not_reached():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        (answer,) = get(f"http://127.0.0.1:{taken.getsockname()[1]}/x")
    assert answer.reason == "server not reached"


@pytest.mark.parametrize(
    "url", ["http://", "http:///x", "https://[::1", "http://a:b:c/", "http://exa mple/", "http://./"]
)
def test_bad_urls_are_answers(url: str):
    (answer,) = get(url, config=PrepareConfig(**SETTINGS, fetch_retries=0))
    assert answer.data is None
    assert answer.reason in ("bad URL", "server not reached")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_loopback_is_refused_however_it_is_written(server, host: str):
    server.seen.clear()
    strict = PrepareConfig(**SETTINGS)
    (answer,) = get(f"http://{host}:{server.server_port}/bytes/3", config=strict)
    assert answer.data is None
    assert answer.reason in ("address refused", "bad URL")  # the client takes no numbers for names itself
    assert server.seen == []


def test_a_name_is_refused_by_the_address_it_leads_to(server, monkeypatch: pytest.MonkeyPatch):
    server.seen.clear()

    async def resolve(self, host: str, port: int = 0, family: int = 0):
        entry = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [{**entry, "host": "127.0.0.1"}]

    monkeypatch.setattr("aiohttp.resolver.ThreadedResolver.resolve", resolve)
    monkeypatch.setattr("aiohttp.connector.DefaultResolver.resolve", resolve, raising=False)
    place = f"http://pictures.example:{server.server_port}/bytes/3"
    assert get(place, config=PrepareConfig(**SETTINGS))[0].reason == "address refused"
    assert server.seen == []
    assert get(place) == [Download(b"xxx")]


def test_a_redirect_into_the_private_network_is_refused(server, url, monkeypatch: pytest.MonkeyPatch):
    port = server.server_port
    monkeypatch.setattr("pixrec.data.download.is_public", lambda host: host == "127.0.0.1")  # the first hop passes
    (answer,) = get(url(f"to/http://127.0.0.2:{port}/bytes/3"), config=PrepareConfig(**SETTINGS))
    assert answer.reason == "address refused"
    assert len(server.seen) == 1


def test_nothing_of_a_url_is_logged(url, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    secret = url("status/500").replace("127.0.0.1", "ann:sesame@127.0.0.1")
    get(secret, secret.replace("status/500", "cut/"))
    assert "sesame" not in caplog.text


PUBLIC = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.9.9.9",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "2002:7f00:1::",
    "2001:db8::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1%eth0",
    "ff02::1",
]


@pytest.mark.parametrize("address", PUBLIC + PRIVATE)
def test_which_addresses_are_public(address: str):
    assert is_public(address) == (address in PUBLIC)
