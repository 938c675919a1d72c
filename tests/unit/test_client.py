"""The shipped client against the real HTTP application over a fake backend, and against servers that fail."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pixrec.client import AsyncClient, Client, NotAnswered, Rejected, Retries, Vectors
from pixrec.query import COSINE, Answer, NewItem, Query

NO_PAUSE = Retries(attempts=3, first_seconds=0.0)
ANSWER = {"items": [{"item_id": "b", "score": 0.5}], "score_kind": "cosine", "model_version": "m", "index_version": "i"}


def server(*answers: Any) -> tuple[Callable[[httpx.Request], httpx.Response], list[httpx.Request]]:
    """Gives one answer after the other, the last for ever; an exception is raised. And what it was asked."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            status, headers, body = (*answer, None, None)[:3]
            return httpx.Response(status, headers=headers, json=body)
        return httpx.Response(200, json=answer)

    return handle, seen


def client_of(*answers: Any, retries: Retries = NO_PAUSE) -> tuple[Client, list[httpx.Request]]:
    handle, seen = server(*answers)
    return Client("http://x", "key", retries=retries, transport=httpx.MockTransport(handle)), seen


def test_a_query_goes_out_as_http_takes_it_and_an_answer_comes_back_typed() -> None:
    client, seen = client_of({**ANSWER, "unknown_items": ["ghost"], "fallback": False, "from the future": 1})
    query = Query(
        ("a", "ghost"),
        5,
        filters={"brand": ("Acme",), "price": {"max": 3.0}},
        new_items={"n": NewItem({"title": "lamp"}, b"jpeg")},
        max_per={"brand": 1},
        reasons=True,
    )
    assert client.answer(query) == Answer([("b", 0.5)], COSINE, "m", "i", ["ghost"])
    (request,) = seen
    assert request.headers["x-api-key"] == "key"
    body = httpx.Response(200, content=request.content).json()
    assert body["filters"] == {"brand": ["Acme"], "price": {"max": 3.0}}
    assert body["new_items"] == {"n": {"title": "lamp", "image_base64": "anBlZw=="}}


def test_what_only_reads_is_sent_again_until_it_is_answered() -> None:
    client, seen = client_of(httpx.ConnectError("refused"), (503, {"retry-after": "0"}), ANSWER)
    assert client.recommend(["a"]).items == [("b", 0.5)]
    assert len({request.headers["x-request-id"] for request in seen}) == 1
    assert len(seen) == 3
    client, seen = client_of((500,), (502,), ANSWER)  # of Serve's proxy, when a replica dies over it
    assert client.recommend(["a"]).items == [("b", 0.5)]


def test_attempts_end() -> None:
    for trouble, status in [(httpx.ReadTimeout("slow"), None), ((503,), 503), ((429,), 429)]:
        client, seen = client_of(trouble)
        with pytest.raises(NotAnswered) as failed:
            client.search("lamp")
        assert (failed.value.status, len(seen)) == (status, 3)


def test_what_is_at_fault_is_not_sent_again() -> None:
    detail = [{"loc": ["body", "k"], "msg": "k is 500: must be at most 200"}]
    client, seen = client_of((422, None, {"detail": detail}))
    with pytest.raises(Rejected, match=r"/v1/similar: 422: body.k: k is 500: must be at most 200"):
        client.similar("a", 500)
    assert len(seen) == 1


def test_a_reload_is_sent_once() -> None:
    client, seen = client_of(httpx.ConnectError("refused"))
    with pytest.raises(NotAnswered):
        client.reload()
    assert len(seen) == 1


def test_pauses_grow_and_keep_to_what_the_server_asks_for() -> None:
    retries = Retries(first_seconds=0.1, most_seconds=8.0)
    for attempt in range(4):
        assert 0.05 * 2**attempt <= retries.pause(attempt, None) <= 0.1 * 2**attempt
    assert retries.pause(0, httpx.Response(503, headers={"retry-after": "3"})) == 3
    assert retries.pause(0, httpx.Response(503, headers={"retry-after": "300"})) == 8
    assert retries.pause(0, httpx.Response(503, headers={"retry-after": "Fri, 31 Dec"})) <= 0.1


def test_an_item_whose_id_holds_a_slash() -> None:
    client, seen = client_of({"item_id": "a/b"})
    assert client.item("a/b ä")["item_id"] == "a/b"
    assert seen[0].url.raw_path == b"/v1/items/a%2Fb%20%C3%A4"


def test_the_same_from_asyncio() -> None:
    vectors = {"texts": [[1.0]], "images": [], "item_ids": [None], "histories": []}
    versions = {"model_version": "m", "index_version": "i"}
    handle, seen = server((503,), {**vectors, **versions}, (401,))

    async def ask() -> Vectors:
        async with AsyncClient("http://x", retries=NO_PAUSE, transport=httpx.MockTransport(handle)) as client:
            found = await client.embed(["lamp"], item_ids=["ghost"])
            with pytest.raises(Rejected):
                await client.version()
            return found

    assert asyncio.run(ask()) == Vectors(**vectors, **versions)
    assert len(seen) == 3


def test_both_clients_offer_the_same() -> None:
    def offered(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert offered(Client) == offered(AsyncClient)


def test_it_stands_on_nothing_heavy() -> None:
    loaded = "import sys, pixrec.client; print(*sorted({'numpy', 'torch', 'ray', 'pyarrow'} & {*sys.modules}))"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
