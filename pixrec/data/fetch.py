"""The bytes of items' pictures, wherever they lie: in the table, in local files, at s3:// and at http(s)://.

Many are fetched at a time: while one picture is being decoded the next ones are on their way. Does not decode. Whatever
a row holds, it raises nothing: the result is bytes, `missing`, or `rejected` with a reason.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

from pixrec import storage
from pixrec.config import PrepareConfig
from pixrec.data.download import NOT_FOUND, TOO_LARGE, Download, Downloader
from pixrec.errors import InputError
from pixrec.schema import MISSING, OK, REJECTED

# A reason why a picture is rejected; more in download.py and images.py.
NOT_READ = "file cannot be read"

_HTTP = ("http://", "https://")


class Picture(NamedTuple):
    """What became of an item's picture: `data` when `status` is ok, else why, where there is something to say."""

    data: bytes | None
    status: str
    reason: str | None = None


class Fetcher:
    """Use as a context manager; holds one thread with an event loop, and `fetch_concurrency` threads for files.

    Relative URIs start at `folder`. `cache` is the folder of downloads, None for none.
    """

    def __init__(self, folder: str, config: PrepareConfig, cache: str | None = None) -> None:
        self._folder = folder
        self._config = config
        self._cache = Cache(cache) if cache else None
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(config.fetch_concurrency))
        self._thread = threading.Thread(target=self._loop.run_forever, name="pixrec-fetch", daemon=True)
        self._downloader: Downloader | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def pictures(self, sources: Iterable[tuple[bytes | None, str | None]]) -> Iterator[tuple[int, Picture]]:
        """Each row of `sources` (bytes, URI; the bytes win) with its position, in the order in which they arrive.

        No more than `fetch_concurrency` are on their way or wait to be taken.
        """
        under_way: dict[concurrent.futures.Future[Picture], int] = {}
        try:
            for row, (data, uri) in enumerate(sources):
                if data is not None or not uri:
                    yield row, self._given(data)
                    continue
                while len(under_way) >= self._config.fetch_concurrency:
                    yield from _arrived(under_way)
                under_way[asyncio.run_coroutine_threadsafe(self._fetch(uri), self._loop)] = row
            while under_way:
                yield from _arrived(under_way)
        finally:
            for future in under_way:
                future.cancel()

    def _given(self, data: bytes | None) -> Picture:
        if data is None:
            return Picture(None, MISSING)
        return Picture(data, OK) if len(data) <= self._config.max_image_bytes else Picture(None, REJECTED, TOO_LARGE)

    async def _fetch(self, uri: str) -> Picture:
        if not uri.lower().startswith(_HTTP):
            return await asyncio.to_thread(self._read, storage.resolve(uri, self._folder))
        if self._cache and (kept := await asyncio.to_thread(self._cache.get, uri)) is not None:
            return self._given(kept)
        download = await self._download(uri)
        if download.data is None:
            return Picture(None, MISSING if download.reason == NOT_FOUND else REJECTED, download.reason)
        if self._cache:
            await asyncio.to_thread(self._cache.put, uri, download.data)
        return Picture(download.data, OK)

    async def _download(self, url: str) -> Download:
        if self._downloader is None:
            self._downloader = Downloader(self._config)  # here: it belongs to the loop
        return await self._downloader.get(url)

    def _read(self, uri: str) -> Picture:
        try:
            return Picture(storage.read_bytes(uri, self._config.max_image_bytes), OK)
        except FileNotFoundError:
            return Picture(None, MISSING, NOT_FOUND)
        except InputError as error:
            return Picture(None, REJECTED, TOO_LARGE if "larger than" in str(error) else NOT_READ)
        except Exception as error:  # a file system may raise anything of its own; the row says so and the job goes on
            if storage.is_remote(uri) and storage.passes(error):
                raise storage.failed(uri, error) from None  # the picture may be a good one
            return Picture(None, REJECTED, NOT_READ)

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._downloader:
            async with self._downloader:
                pass
        await self._loop.shutdown_default_executor()


def _arrived(under_way: dict[concurrent.futures.Future[Picture], int]) -> Iterator[tuple[int, Picture]]:
    """Wait for at least one, and take those that are there out of `under_way`."""
    done, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
    for future in done:
        yield under_way.pop(future), future.result()


class Cache:
    """Downloads kept in a folder, local or s3://: `urls/` leads from the hash of a URL to the hash of its content,
    `content/` from there to the bytes, so that a picture with many URLs lies there once.

    Never asked again: what is kept counts as current until the folder is deleted. Failures are not kept.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def get(self, url: str) -> bytes | None:
        """The bytes kept for `url`; None when there are none, or damaged ones."""
        try:
            digest = storage.read_bytes(self._place("urls", _digest(url.encode())), 100).decode()
            data = storage.read_bytes(self._place("content", digest))
        except (OSError, InputError, ValueError):
            return None
        return data if _digest(data) == digest else None

    def put(self, url: str, data: bytes) -> None:
        """Keep `data`; the content first, so that a URL never leads to nothing. Raises OutputError."""
        digest = _digest(data)
        storage.write_bytes(self._place("content", digest), data)
        storage.write_bytes(self._place("urls", _digest(url.encode())), digest.encode())

    def _place(self, kind: str, digest: str) -> str:
        return storage.join(self._folder, kind, digest[:2], digest)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()
