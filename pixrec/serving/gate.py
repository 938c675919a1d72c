"""What every request passes before a route sees it: the API key, the size limit, and a net under all defects.

Plain ASGI, outermost: the key is checked before a byte of the body is read, and the body is counted before it is
parsed. Knows no route but the prefix that wants a key.
"""

from __future__ import annotations

import hmac
import json
import logging
from typing import Any

from fastapi import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixrec.config import ServeConfig

logger = logging.getLogger(__name__)

KEYED_PREFIX = "/v1/"

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
    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.key = config.api_key.encode() if config.api_key else None
        self.max_body_bytes = config.max_body_bytes
        self.retry_after_seconds = config.retry_after_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            if not any(name == b"expect" for name, _ in scope["headers"]):  # who expects waits for leave to send
                await self._drain(receive)
            await refusal(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, self._limited(receive), watched_send)
        except Exception:
            # A defect of ours must not look like the caller's fault, nor take the connection down without an answer.
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await unavailable("the request could not be answered", self.retry_after_seconds)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = scope["headers"]
        # Anywhere in the path, not at its start only: a proxy in front may leave its own prefix before it.
        if self.key is not None and KEYED_PREFIX in scope["path"] and not _holds_key(headers, self.key):
            detail = "a valid API key is needed, in `Authorization: Bearer` or `X-API-Key`"
            return JsonResponse({"detail": detail}, 401, headers={"WWW-Authenticate": "Bearer"})
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


def _holds_key(headers: list[tuple[bytes, bytes]], key: bytes) -> bool:
    offered = b""
    for name, value in headers:
        if name == b"x-api-key":
            offered = value
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            offered = value[7:].strip()
        if offered and hmac.compare_digest(offered, key):
            return True
    return False
