"""Bytes from http:// and https://, bounded in time, size, redirects, retries and in what may be connected to.

Knows HTTP and addresses; knows no picture and no table. A URL that a stranger wrote into a catalog must not reach
what only our own network can see, so the address is checked where the socket is made: after DNS, after every redirect,
and it is that very address that is connected to. Proxies of the environment and cookies are not used, and no URL is
ever logged: it may hold a password.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from typing import Any, NamedTuple, Self
from urllib.parse import urljoin, urlsplit

import aiohttp

from pixrec import __version__
from pixrec.config import PrepareConfig

# Reasons why there are no bytes, `HTTP status <number>` beside them.
BAD_URL, REFUSED, TIMED_OUT, NOT_REACHED = "bad URL", "address refused", "download timed out", "server not reached"
TOO_MANY_REDIRECTS, TOO_LARGE, NOT_FOUND = "too many redirects", "file too large", "file not found"

_MAX_REDIRECTS = 5
_MAX_WAIT_SECONDS = 60.0
_CHUNK_BYTES = 64 * 1024
_REDIRECTS = {301, 302, 303, 307, 308}
_GONE = {404, 410}
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # worth asking again
_HEADERS = {"User-Agent": f"pixrec/{__version__}", "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"}


class Download(NamedTuple):
    """`data`, or the `reason` why there is none; `passing` says that another attempt may succeed."""

    data: bytes | None
    reason: str | None = None
    passing: bool = False
    wait_seconds: float = 0.0
    """What the server asked for in Retry-After."""


class AddressRefused(Exception):
    """Not an OSError: those make aiohttp try the host's next address, and a host with one bad address is refused."""


class Downloader:
    """One connection pool. Made, used and closed (`async with`) in one event loop."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        connector = aiohttp.TCPConnector(
            limit=config.fetch_concurrency,
            happy_eyeballs_delay=None,  # addresses one after the other, in the task that sees the refusal
            socket_factory=self._socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> Download:
        """The body behind `url`, tried again with growing random waits while the trouble may pass. Never raises."""
        attempts = 1
        while (download := await self._attempt(url)).passing and attempts <= self._config.fetch_retries:
            # All of the wait is random, so that clients which failed together do not come back together.
            wait = random.uniform(0, self._config.fetch_backoff_seconds * 2 ** (attempts - 1))
            await asyncio.sleep(min(max(wait, download.wait_seconds), _MAX_WAIT_SECONDS))
            attempts += 1
        return download

    async def _attempt(self, url: str) -> Download:
        """All of it within the time limit: name lookup, redirects, header and body, however slowly they drip."""
        try:
            async with asyncio.timeout(self._config.fetch_timeout_seconds):
                return await self._follow(url)
        except AddressRefused:
            return Download(None, REFUSED)
        except TimeoutError:
            return Download(None, TIMED_OUT, passing=True)
        except ValueError:  # aiohttp.InvalidURL among them; UnicodeError of a host that is no name
            return Download(None, BAD_URL)
        except (aiohttp.ClientError, OSError):
            return Download(None, NOT_REACHED, passing=True)

    async def _follow(self, url: str) -> Download:
        for _ in range(_MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                return Download(None, BAD_URL)
            async with self._session.get(url, allow_redirects=False) as response:
                place = response.headers.get("Location")
                if response.status not in _REDIRECTS or not place:
                    return await self._read(response)
                url = urljoin(url, place)
        return Download(None, TOO_MANY_REDIRECTS)

    async def _read(self, response: aiohttp.ClientResponse) -> Download:
        status = response.status
        if status in _GONE:
            return Download(None, NOT_FOUND)
        if status != 200:
            return Download(None, f"HTTP status {status}", status in _PASSING, _seconds(response))
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body += chunk
            if len(body) > self._config.max_image_bytes:  # whatever Content-Length said
                return Download(None, TOO_LARGE)
        return Download(bytes(body))

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        """The socket that aiohttp is about to connect to `address`, as getaddrinfo returned it."""
        family, kind, protocol, _, (host, *_) = address
        if not self._config.allow_private_addresses and not is_public(host):
            raise AddressRefused
        return socket.socket(family, kind, protocol)


def is_public(host: str) -> bool:
    """Whether an IP address is one of the open Internet: not loopback, private, link-local (where clouds keep the
    credentials of their machines), shared, multicast or reserved, nor an IPv6 address that leads to such an IPv4 one.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    inner = address.ipv4_mapped or address.sixtofour
    if any(address in network for network in _LEAD_TO_IPV4):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    if inner is not None:
        return is_public(str(inner))
    return address.is_global and not address.is_multicast


# Last 32 bits an IPv4 address: NAT64 (RFC 6052) and the deprecated "compatible" form (RFC 4291), which holds ::1 too.
_LEAD_TO_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))


def _seconds(response: aiohttp.ClientResponse) -> float:
    """Retry-After where it is a number of seconds; its other form, a date, depends on two clocks."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 6 else 0.0
