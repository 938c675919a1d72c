"""What every request passes before a route sees it: the key, the rate, the size limit, and a net under all defects.

Plain ASGI, outermost: the key is checked before a byte of the body is read, and the body is counted before it is
parsed. Counts and times what is answered. Knows no route but the prefixes that want a key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixrec.config import ServeConfig
from pixrec.serving.metrics import RequestMetrics, arrived

logger = logging.getLogger("ray.serve.pixrec")

KEYED_PREFIX, ADMIN_PREFIX, ITEMS_PREFIX = "/v1/", "/admin/", "/v1/items"
CHANGING = ("POST", "PUT", "PATCH", "DELETE")
"""Methods by which items are changed, which takes the key of the /admin routes."""
SENDERS_KEPT = 10_000
"""Of so many keys or addresses the rate is known; the one that has been quiet the longest is forgotten first."""

# Most clients send all of a body before they read the answer, and would see a reset connection instead of the 413. So
# a body that is refused is still read, and thrown away, up to this many times the limit.
DRAINED_BODIES = 8


class JsonResponse(Response):
    """JSON that is always valid: NaN is an error here, and text that is not Unicode is escaped rather than refused."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


class Gate:
    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: RequestMetrics) -> None:
        self.app = app
        self.metrics = metrics
        self.keys = [key.encode() for key in config.keys]
        self.admin_keys = [config.admin_key.encode()] if config.admin_key else self.keys
        self.rate = Rate(config.requests_per_second, config.request_burst) if config.requests_per_second else None
        self.max_body_bytes = config.max_body_bytes
        self.retry_after_seconds = config.retry_after_seconds
        self.in_flight, self.max_in_flight = 0, config.max_in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        arrived.set(start)
        code = 0
        # Ray Serve names each request and says so in its answer; without it the name is made here.
        given = any(name == b"x-request-id" for name, _ in scope["headers"])
        own_id = [] if given else [(b"x-request-id", uuid.uuid4().hex.encode())]

        async def watched_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *own_id]}
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            self.in_flight += 1
            try:
                await self._answer(scope, receive, watched_send, lambda: code > 0)
            finally:
                self.in_flight -= 1
                self.metrics.answered(_route(scope), code, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, started: Callable[[], bool]) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            if not any(name == b"expect" for name, _ in scope["headers"]):  # who expects waits for leave to send
                await self._drain(receive)
            await refusal(scope, receive, send)
            return
        try:
            await self.app(scope, self._limited(receive), send)
        except Exception:
            # A defect of ours must not look like the caller's fault, nor take the connection down without an answer.
            logger.exception("%s %s failed", scope["method"], _route(scope))
            if started():
                raise
            await unavailable("the request could not be answered", self.retry_after_seconds)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = scope["headers"]
        # Anywhere in the path, not at its start only: a proxy in front may leave its own prefix before it.
        changes = ITEMS_PREFIX in scope["path"] and scope["method"] in CHANGING
        admin = ADMIN_PREFIX in scope["path"] or changes
        if admin and not self.admin_keys:
            what = "changes of items" if changes else "its /admin routes"
            return JsonResponse({"detail": f"this server has no key for {what}: set serve.admin_key"}, 403)
        keys = self.admin_keys if admin else self.keys if KEYED_PREFIX in scope["path"] else []
        key = _held_key(headers, keys)
        if keys and key is None:
            detail = "a valid API key is needed, in `Authorization: Bearer` or `X-API-Key`"
            return JsonResponse({"detail": detail}, 401, headers={"WWW-Authenticate": "Bearer"})
        if self.in_flight > self.max_in_flight and KEYED_PREFIX in scope["path"]:
            return unavailable("too many requests are waiting; try again", self.retry_after_seconds)
        if self.rate is not None and KEYED_PREFIX in scope["path"]:
            wait = self.rate.wait(key or str((scope.get("client") or ("",))[0]).encode())
            if wait > 0:
                retry = {"Retry-After": str(math.ceil(wait))}
                return JsonResponse({"detail": "too many requests; see Retry-After"}, 429, headers=retry)
        for name, value in headers:
            if name == b"content-length" and value.isdigit() and int(value[:19]) > self.max_body_bytes:
                return JsonResponse({"detail": self._too_large()}, 413)
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body_bytes} bytes"

    def _limited(self, receive: Receive) -> Receive:
        """Counts a body that announces no length; the routes turn the exception into the answer."""
        read_bytes = 0

        async def counted() -> Message:
            nonlocal read_bytes
            message = await receive()
            if message["type"] == "http.request":
                read_bytes += len(message.get("body", b""))
                if read_bytes > self.max_body_bytes:
                    if message.get("more_body"):
                        await self._drain(receive)
                    raise HTTPException(413, self._too_large())
            return message

        return counted

    async def _drain(self, receive: Receive) -> None:
        read_bytes, more = 0, True
        while more and read_bytes <= DRAINED_BODIES * self.max_body_bytes:
            message = await receive()
            read_bytes += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)


def unavailable(detail: str, retry_after_seconds: int) -> Response:
    return JsonResponse({"detail": detail}, 503, headers={"Retry-After": str(retry_after_seconds)})


class Rate:
    """A token bucket for each sender: `per_second` requests, and a `burst` after a pause."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second, self._burst = per_second, burst
        self._senders: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def wait(self, sender: bytes, now: float | None = None) -> float:
        """Seconds until the sender may send again; 0: this request counts and may pass."""
        now = time.monotonic() if now is None else now
        name = hashlib.blake2b(sender, digest_size=16).digest()  # one size, whatever was sent
        left, seen = self._senders.pop(name, (float(self._burst), now))
        left = min(self._burst, left + (now - seen) * self._per_second)
        passes = left >= 1
        self._senders[name] = (left - 1 if passes else left), now
        if len(self._senders) > SENDERS_KEPT:
            self._senders.popitem(last=False)
        return 0.0 if passes else (1 - left) / self._per_second


def _route(scope: Scope) -> str:
    """The pattern of the route, never the path itself: that may hold an id, and there are any number of them."""
    return str(getattr(scope.get("route"), "path", "none"))


def _held_key(headers: list[tuple[bytes, bytes]], keys: Sequence[bytes]) -> bytes | None:
    """The key that the headers hold; every one is compared, each in constant time."""
    found = None
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            offered = value[7:].strip()
        elif name == b"x-api-key":
            offered = value
        else:
            continue
        for key in keys:
            if hmac.compare_digest(offered, key):
                found = key
    return found
