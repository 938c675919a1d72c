from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from pixrec.config import PrepareConfig
from pixrec.data import download
from pixrec.data.download import Download
from pixrec.data.fetch import Cache, Fetcher, Picture
from pixrec.errors import OutputError

CONFIG = PrepareConfig(max_image_bytes=100, fetch_concurrency=4)


def fetch(
    folder: Path | str, *uris: str | None, cache: str | None = None, config: PrepareConfig = CONFIG
) -> list[Picture]:
    with Fetcher(str(folder), config, cache) as fetcher:
        found = dict(fetcher.pictures((None, uri) for uri in uris))
    assert sorted(found) == list(range(len(uris)))
    return [found[row] for row in range(len(uris))]


class Web:
    """In the place of Downloader: answers by URL, and counts."""

    def __init__(self, answers: dict[str, Download]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, config: PrepareConfig) -> Web:
        return self

    async def __aenter__(self) -> Web:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def get(self, url: str) -> Download:
        self.asked.append(url)
        return self.answers[url]


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Web:
    made = Web(
        {
            "https://a/1.jpg": Download(b"one"),
            "HTTP://A/2.jpg": Download(b"two"),
            "http://a/same.jpg": Download(b"one"),
            "http://a/gone.jpg": Download(None, download.NOT_FOUND),
            "http://a/private.jpg": Download(None, download.REFUSED),
        }
    )
    monkeypatch.setattr("pixrec.data.fetch.Downloader", made)
    return made


def test_what_a_row_holds_never_raises(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"one")
    (tmp_path / "huge.jpg").write_bytes(b"\xff" * 101)
    (tmp_path / "folder.jpg").mkdir()
    expected = {
        "images/1.jpg": Picture(b"one", "ok"),
        "images/../images/1.jpg": Picture(b"one", "ok"),
        str(tmp_path / "images" / "1.jpg"): Picture(b"one", "ok"),
        None: Picture(None, "missing"),
        "": Picture(None, "missing"),
        "nowhere.jpg": Picture(None, "missing", "file not found"),
        "folder.jpg": Picture(None, "missing", "file not found"),
        "huge.jpg/below.jpg": Picture(None, "missing", "file not found"),
        "huge.jpg": Picture(None, "rejected", "file too large"),
        "ftp://example.com/1.jpg": Picture(None, "rejected", "file cannot be read"),
        "nul\0.jpg": Picture(None, "rejected", "file cannot be read"),
        "http://127.0.0.1/1.jpg": Picture(None, "rejected", "address refused"),
        "http://[/1.jpg": Picture(None, "rejected", "bad URL"),
    }
    assert dict(zip(expected, fetch(tmp_path, *expected), strict=True)) == expected


def test_bytes_in_the_row_win():
    with Fetcher("", CONFIG) as fetcher:
        rows = [(b"", "x.jpg"), (b"here", "http://127.0.0.1/x.jpg"), (b"x" * 101, None), (b"x" * 100, None)]
        found = dict(fetcher.pictures(rows))
    assert [found[row].status for row in range(4)] == ["ok", "ok", "rejected", "ok"]
    assert found[1].data == b"here"
    assert found[2].reason == "file too large"


def test_downloads_become_pictures(web: Web, tmp_path: Path):
    assert fetch(tmp_path, *web.answers) == [
        Picture(b"one", "ok"),
        Picture(b"two", "ok"),
        Picture(b"one", "ok"),
        Picture(None, "missing", "file not found"),
        Picture(None, "rejected", "address refused"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_cache_answers_a_rerun_and_keeps_equal_pictures_once(web: Web, tmp_path: Path):
    cache = str(tmp_path / "cache")
    first = fetch("", *web.answers, cache=cache)
    assert len(list((tmp_path / "cache" / "content").rglob("*/*"))) == 2
    assert len(list((tmp_path / "cache" / "urls").rglob("*/*"))) == 3
    web.asked.clear()
    assert fetch("", *web.answers, cache=cache) == first
    assert sorted(web.asked) == ["http://a/gone.jpg", "http://a/private.jpg"]  # failures may pass


def test_a_damaged_cache_is_fetched_again_and_healed(web: Web, tmp_path: Path):
    cache, url = str(tmp_path), "https://a/1.jpg"
    fetch("", url, cache=cache)
    (content,) = (tmp_path / "content").rglob("*/*")
    (pointer,) = (tmp_path / "urls").rglob("*/*")
    for spoil in (content.unlink, lambda: content.write_bytes(b"on"), lambda: pointer.write_bytes(b"\xff/../../x")):
        spoil()
        assert Cache(cache).get(url) is None
        assert fetch("", url, cache=cache) == [Picture(b"one", "ok")]
        assert Cache(cache).get(url) == b"one"


def test_a_limit_lowered_since_holds_for_the_cache_too(web: Web, tmp_path: Path):
    fetch("", "https://a/1.jpg", cache=str(tmp_path))
    strict = PrepareConfig(max_image_bytes=2)
    assert fetch("", "https://a/1.jpg", cache=str(tmp_path), config=strict)[0].reason == "file too large"


def test_a_cache_that_cannot_be_written_ends_the_run_in_one_line(web: Web, tmp_path: Path):
    (tmp_path / "file").write_text("taken")
    with pytest.raises(OutputError, match="cannot be written"):
        fetch("", "https://a/1.jpg", cache=str(tmp_path / "file"))


def test_many_come_at_a_time_but_no_more_than_allowed(monkeypatch: pytest.MonkeyPatch):
    together = threading.Barrier(4, timeout=20)  # breaks unless four reads are under way at once
    lock, now, most = threading.Lock(), 0, 0

    def read(uri: str, max_bytes: int) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait()
        with lock:
            now -= 1
        return uri.encode()

    monkeypatch.setattr("pixrec.storage.read_bytes", read)
    found = fetch("/f", *(f"{row}.jpg" for row in range(12)))
    assert [picture.data for picture in found] == [f"/f/{row}.jpg".encode() for row in range(12)]
    assert most == 4


def test_the_source_is_read_no_faster_than_pictures_are_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pixrec.storage.read_bytes", lambda uri, max_bytes: b"x")
    taken = []

    def source():
        for row in range(100):
            taken.append(row)
            yield None, f"{row}.jpg"

    with Fetcher("/f", CONFIG) as fetcher:
        pictures = fetcher.pictures(source())
        next(pictures)
        assert len(taken) <= CONFIG.fetch_concurrency + 1


def test_leaving_early_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    class Never(Web):
        async def get(self, url: str) -> Download:
            return await asyncio.Event().wait()

    def leave() -> None:
        with Fetcher("", CONFIG) as fetcher:
            for _ in fetcher.pictures([(None, "http://a/x"), (b"here", None)]):
                raise ZeroDivisionError

    monkeypatch.setattr("pixrec.data.fetch.Downloader", Never({}))
    with pytest.raises(ZeroDivisionError):
        leave()
    assert not [thread for thread in threading.enumerate() if thread.name == "pixrec-fetch"]
