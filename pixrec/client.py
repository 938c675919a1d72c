"""A client of the HTTP interface, for threads and for asyncio, in the words of `pixrec.query`.

    with Client("http://127.0.0.1:8000", api_key=key) as client:
        answer = client.recommend(["p00017", "p00042"], k=5, filters={"price": {"max": 20.0}})

What only reads is sent again, after a pause that grows, when the server was not reached, is overloaded or is starting;
a pause that the server names (Retry-After) is kept to. Knows httpx; knows no torch and no Ray.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from pixrec.errors import PixRecError
from pixrec.query import Answer, Filters, NewItem, Query, Vectors

_Given = TypeVar("_Given")

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Codes of answers to requests that were not carried out; 500 is what Ray Serve's proxy says when a replica dies over
one."""


class RequestFailed(PixRecError):
    """No answer; `status` is the HTTP code, None where the server was not reached.

    RequestFailed
    ├── Rejected        the request is at fault: sent again it would be refused again
    └── NotAnswered     the server is at fault; it may answer later
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Rejected(RequestFailed):
    pass


class NotAnswered(RequestFailed):
    pass


@dataclass(frozen=True)
class Retries:
    """How often and with what pauses a request is sent again."""

    attempts: int = 5
    """How often it is sent at most; 1: never again."""
    first_seconds: float = 0.1
    """The first pause; each further one is twice as long, and all are shortened at random by up to a half."""
    most_seconds: float = 10.0
    """The longest pause, also where the server asks for a longer one."""

    def pause(self, attempt: int, answer: httpx.Response | None) -> float:
        """Seconds to wait after the attempt, of which the first is number 0."""
        grown = self.first_seconds * 2**attempt * random.uniform(0.5, 1.0)
        asked = "" if answer is None else answer.headers.get("retry-after", "")
        return min(self.most_seconds, max(grown, float(asked) if asked.isdigit() else 0.0))


@dataclass(frozen=True)
class _Call(Generic[_Given]):
    """One request and what its answer means."""

    method: str
    path: str
    read: Callable[[Any], _Given]
    body: Mapping[str, Any] | None = None
    again: bool = True
    """Whether sending it twice does no harm."""

    def request(self) -> dict[str, Any]:
        # One name for all attempts, so that the server's logs show them together.
        headers = {"X-Request-Id": uuid.uuid4().hex}
        sent = {} if self.body is None else {"json": self.body}
        return {"method": self.method, "url": self.path, "headers": headers, **sent}

    def result(self, answer: httpx.Response | httpx.TransportError) -> _Given:
        """What the answer holds. Raises Rejected or NotAnswered."""
        if isinstance(answer, httpx.TransportError):
            raise NotAnswered(f"{self.path}: {type(answer).__name__}: {answer}") from answer
        if answer.is_success:
            return self.read(answer)
        kind = NotAnswered if answer.status_code in TRY_AGAIN or answer.is_server_error else Rejected
        raise kind(f"{self.path}: {answer.status_code}: {_detail(answer)}", answer.status_code)

    def wants_another(self, answer: httpx.Response | httpx.TransportError) -> bool:
        if not self.again:
            return False
        return isinstance(answer, httpx.TransportError) or answer.status_code in TRY_AGAIN


def _recommend(query: Query) -> _Call[Answer]:
    query.check()
    items = {item_id: _new(item) for item_id, item in query.new_items.items()}
    timestamps = None if query.timestamps is None else list(query.timestamps)
    whose = {"history": list(query.history), "timestamps": timestamps}
    body = {
        **_ranking(query),
        **(whose if query.user_id is None else {"user_id": query.user_id}),
        "exclude": list(query.exclude),
        "exclude_history": query.exclude_history,
        "new_items": items,
        "reasons": query.reasons,
    }
    return _Call("POST", "/v1/recommend", _answer, body)


def _similar(item_id: str, query: Query) -> _Call[Answer]:
    return _Call("POST", "/v1/similar", _answer, {**_ranking(query), "item_id": item_id})


def _search(text: str | None, image: bytes | None, query: Query) -> _Call[Answer]:
    sent = {"text": text, "image_base64": None if image is None else _text(image)}
    return _Call("POST", "/v1/search", _answer, {**_ranking(query), **sent})


def _embed(
    texts: Sequence[str], images: Sequence[bytes], item_ids: Sequence[str], histories: Sequence[Sequence[str]]
) -> _Call[Vectors]:
    body = {
        "texts": list(texts),
        "images_base64": [_text(image) for image in images],
        "item_ids": list(item_ids),
        "histories": [list(history) for history in histories],
    }
    return _Call("POST", "/v1/embed", lambda answer: Vectors(**answer.json()), body)


def _add_events(events: Sequence[Mapping[str, Any]]) -> _Call[int]:
    # Sent again they are stored once, as long as their times are theirs and not those of their arrival.
    now = int(1000 * time.time())
    body = {"events": [{"timestamp": now, **event} for event in events]}
    return _Call("POST", "/v1/events", lambda answer: int(answer.json()["stored"]), body)


def _add_feedback(request_id: str, model_version: str, impressions: Sequence[str], clicks: Sequence[str]) -> _Call[int]:
    body = {"request_id": request_id, "model_version": model_version}
    told = {**body, "impressions": list(impressions), "clicks": list(clicks)}
    return _Call("POST", "/v1/feedback", lambda answer: int(answer.json()["stored"]), told)


def _forget(user_id: str) -> _Call[int]:
    path = f"/v1/users/{quote(user_id, safe='')}"
    return _Call("DELETE", path, lambda answer: int(answer.json()["deleted"]))


def _add_items(items: Mapping[str, NewItem]) -> _Call[int]:
    body = [{"item_id": item_id, **_new(item)} for item_id, item in items.items()]
    return _Call("POST", "/v1/items", lambda answer: int(answer.json()["stored"]), {"items": body})


def _change_item(item_id: str, fields: Mapping[str, Any], hidden: bool | None) -> _Call[None]:
    return _Call("PATCH", _place(item_id), lambda answer: None, {"fields": dict(fields), "hidden": hidden})


def _hide_item(item_id: str) -> _Call[None]:
    return _Call("DELETE", _place(item_id), lambda answer: None)


def _item(item_id: str) -> _Call[dict[str, Any]]:
    return _Call("GET", _place(item_id), httpx.Response.json)


def _version() -> _Call[dict[str, Any]]:
    return _Call("GET", "/version", httpx.Response.json)


def _reload() -> _Call[dict[str, Any]]:
    return _Call("POST", "/admin/reload", httpx.Response.json, again=False)


def _place(item_id: str) -> str:
    return f"/v1/items/{quote(item_id, safe='')}"


def _new(item: NewItem) -> dict[str, Any]:
    return {**item.fields, **({"image_base64": _text(item.image)} if item.image is not None else {})}


def _ranking(query: Query) -> dict[str, Any]:
    return {
        "k": query.k,
        "filters": {name: _wanted(value) for name, value in query.filters.items()},
        "diversity": query.diversity,
        "max_per": dict(query.max_per),
    }


def _wanted(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)


def _text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def _answer(answer: httpx.Response) -> Answer:
    """Fields that a newer server adds are passed over."""
    found = answer.json()
    known = {name: found[name] for name in Answer.__dataclass_fields__ if name in found}
    return Answer(**{**known, "items": [(item["item_id"], item["score"]) for item in found["items"]]})


def _detail(answer: httpx.Response) -> str:
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
    if isinstance(detail, list):  # of 422: a list of what is wrong where
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in detail)
    return str(detail)


def _settings(url: str, api_key: str | None, timeout_seconds: float) -> dict[str, Any]:
    headers = {"X-API-Key": api_key} if api_key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout_seconds}


class Client:
    """Asks a server and waits for the answer. Threads may share one."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_seconds: float = 60.0,
        retries: Retries = Retries(),
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """timeout_seconds: of one attempt. `transport`: httpx's own, for tests."""
        self._http = httpx.Client(transport=transport, **_settings(url, api_key, timeout_seconds))
        self._retries = retries

    def recommend(self, history: Sequence[str], k: int = 10, **options: Any) -> Answer:
        """The items that fit best after this history; `options` are further fields of Query."""
        return self.answer(Query(history, k, **options))

    def answer(self, query: Query) -> Answer:
        return self._send(_recommend(query))

    def similar(self, item_id: str, k: int = 10, filters: Filters | None = None, **options: Any) -> Answer:
        """The items closest to one item. Raises Rejected where it is unknown."""
        return self._send(_similar(item_id, Query([], k, filters=filters or {}, **options)))

    def search(
        self,
        text: str | None = None,
        image: bytes | None = None,
        k: int = 10,
        filters: Filters | None = None,
        **options: Any,
    ) -> Answer:
        """The items closest to a text, a picture (the bytes of its file), or both."""
        return self._send(_search(text, image, Query([], k, filters=filters or {}, **options)))

    def embed(
        self,
        texts: Sequence[str] = (),
        images: Sequence[bytes] = (),
        item_ids: Sequence[str] = (),
        histories: Sequence[Sequence[str]] = (),
    ) -> Vectors:
        """Vectors in the space in which the nearest items are the best."""
        return self._send(_embed(texts, images, item_ids, histories))

    def add_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Store what shoppers did: each `user_id`, `item_id` and, where known, `event` and `timestamp` (ms; now)."""
        return self._send(_add_events(events))

    def add_feedback(
        self, request_id: str, model_version: str, impressions: Sequence[str] = (), clicks: Sequence[str] = ()
    ) -> int:
        """Tell which items of an answer were seen and clicked; `request_id` is any name of the answer."""
        return self._send(_add_feedback(request_id, model_version, impressions, clicks))

    def forget(self, user_id: str) -> int:
        """Delete all that is stored of a user; returns how many events were there."""
        return self._send(_forget(user_id))

    def add_items(self, items: Mapping[str, NewItem]) -> int:
        """Add items by their ids, or put them in the place of those that are there: fields may be all columns of the
        catalog. Needs the admin key. Raises Rejected where one is at fault; then none is added."""
        return self._send(_add_items(items))

    def change_item(self, item_id: str, fields: Mapping[str, Any] | None = None, hidden: bool | None = None) -> None:
        """Change columns of an item, or whether it is hidden; needs the admin key. Raises Rejected where it is
        unknown."""
        self._send(_change_item(item_id, fields or {}, hidden))

    def hide_item(self, item_id: str) -> None:
        """Never return an item again, until `change_item` shows it; needs the admin key."""
        self._send(_hide_item(item_id))

    def item(self, item_id: str) -> dict[str, Any]:
        """Everything the catalog says about the item. Raises Rejected where it is unknown."""
        return self._send(_item(item_id))

    def version(self) -> dict[str, Any]:
        """Versions of the model, the index and the software."""
        return self._send(_version())

    def reload(self) -> dict[str, Any]:
        """Make every replica look for a newly published version; needs the admin key. Sent once."""
        return self._send(_reload())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: _Call[_Given]) -> _Given:
        request, attempt = call.request(), 0
        while True:
            answer: httpx.Response | httpx.TransportError
            try:
                answer = self._http.request(**request)
            except httpx.TransportError as error:
                answer = error
            if not call.wants_another(answer) or attempt + 1 >= self._retries.attempts:
                return call.result(answer)
            time.sleep(self._retries.pause(attempt, answer if isinstance(answer, httpx.Response) else None))
            attempt += 1


class AsyncClient:
    """Asks a server from asyncio, any number of requests at a time; the methods are those of Client."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout_seconds: float = 60.0,
        retries: Retries = Retries(),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(transport=transport, limits=limits, **_settings(url, api_key, timeout_seconds))
        self._retries = retries

    async def recommend(self, history: Sequence[str], k: int = 10, **options: Any) -> Answer:
        return await self.answer(Query(history, k, **options))

    async def answer(self, query: Query) -> Answer:
        return await self._send(_recommend(query))

    async def similar(self, item_id: str, k: int = 10, filters: Filters | None = None, **options: Any) -> Answer:
        return await self._send(_similar(item_id, Query([], k, filters=filters or {}, **options)))

    async def search(
        self,
        text: str | None = None,
        image: bytes | None = None,
        k: int = 10,
        filters: Filters | None = None,
        **options: Any,
    ) -> Answer:
        return await self._send(_search(text, image, Query([], k, filters=filters or {}, **options)))

    async def embed(
        self,
        texts: Sequence[str] = (),
        images: Sequence[bytes] = (),
        item_ids: Sequence[str] = (),
        histories: Sequence[Sequence[str]] = (),
    ) -> Vectors:
        return await self._send(_embed(texts, images, item_ids, histories))

    async def add_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        return await self._send(_add_events(events))

    async def add_feedback(
        self, request_id: str, model_version: str, impressions: Sequence[str] = (), clicks: Sequence[str] = ()
    ) -> int:
        return await self._send(_add_feedback(request_id, model_version, impressions, clicks))

    async def forget(self, user_id: str) -> int:
        return await self._send(_forget(user_id))

    async def add_items(self, items: Mapping[str, NewItem]) -> int:
        return await self._send(_add_items(items))

    async def change_item(
        self, item_id: str, fields: Mapping[str, Any] | None = None, hidden: bool | None = None
    ) -> None:
        await self._send(_change_item(item_id, fields or {}, hidden))

    async def hide_item(self, item_id: str) -> None:
        await self._send(_hide_item(item_id))

    async def item(self, item_id: str) -> dict[str, Any]:
        return await self._send(_item(item_id))

    async def version(self) -> dict[str, Any]:
        return await self._send(_version())

    async def reload(self) -> dict[str, Any]:
        return await self._send(_reload())

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, call: _Call[_Given]) -> _Given:
        request, attempt = call.request(), 0
        while True:
            answer: httpx.Response | httpx.TransportError
            try:
                answer = await self._http.request(**request)
            except httpx.TransportError as error:
                answer = error
            if not call.wants_another(answer) or attempt + 1 >= self._retries.attempts:
                return call.result(answer)
            await asyncio.sleep(self._retries.pause(attempt, answer if isinstance(answer, httpx.Response) else None))
            attempt += 1
