"""What stands before the routes: how many requests are admitted at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from pixrec.config import ServeConfig
from pixrec.serving.gate import Gate
from pixrec.serving.metrics import RequestMetrics


async def answered(gate: Gate, path: str) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of the answer to a request without a body."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await gate({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def test_more_requests_than_are_admitted_are_refused_at_once_and_none_when_they_are_done() -> None:
    async def case() -> None:
        let_go = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await let_go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        config = ServeConfig(max_ongoing_requests=2, max_batch_size=1, max_queued_requests=1, retry_after_seconds=7)
        gate = Gate(app, config, RequestMetrics())
        admitted = [asyncio.create_task(answered(gate, "/v1/recommend")) for _ in range(3)]
        await asyncio.sleep(0)
        status, headers = await answered(gate, "/v1/recommend")
        assert (status, headers[b"retry-after"]) == (503, b"7")
        state = asyncio.create_task(answered(gate, "/metrics"))  # whoever watches the server is let in
        await asyncio.sleep(0)
        let_go.set()
        assert [status for status, _ in await asyncio.gather(*admitted, state)] == [200] * 4
        assert (await answered(gate, "/v1/recommend"))[0] == 200

    asyncio.run(case())
