"""Every status code of the HTTP interface, without Ray."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import httpx
import pytest
from fakes import square

from pixrec.client import AsyncClient, Rejected
from pixrec.config import ServeConfig
from pixrec.live.sqlite import SqliteStore
from pixrec.live.store import StoreAway
from pixrec.query import Answer, NewItem, Query, ScoreKind
from pixrec.schema import TEXT_FIELDS
from pixrec.serving.backend import ItemChange, Overloaded, Unavailable
from pixrec.serving.bodies import AnswerBody, FilterValue, NewItemBody, RangeBody, RankedItem, RecommendBody
from pixrec.serving.edge import jsonable
from pixrec.serving.gate import Rate
from pixrec.serving.http import create_api
from pixrec.serving.items import image_type
from pixrec.serving.metrics import RequestMetrics

RANKING_KEYS = {"items", "score_kind", "model_version", "index_version", "unknown_items", "fallback"}


# What stands at the edge for a type within: a value of JSON, and objects that are told apart by their keys.
AT_THE_EDGE = [
    (FilterValue, Any),
    (NewItemBody, NewItem),
    (RankedItem, tuple[str, float]),
    (RangeBody, Mapping[str, float]),
]


def shape(kind: Any) -> Any:
    """A type without what the edge adds to check it, and with the one name for lists and mappings."""
    kind = next((within for edge, within in AT_THE_EDGE if kind == edge), kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return shape(parts[0])
    if origin in (Union, UnionType):
        return frozenset(map(shape, parts))
    name = {Sequence: list, Mapping: dict}.get(origin, origin)
    return (name, *map(shape, parts)) if origin else kind


@pytest.mark.parametrize(("body", "within"), [(RecommendBody, Query), (AnswerBody, Answer)])
def test_bodies_have_the_fields_of_the_library(body: Any, within: Any) -> None:
    fields, hints = {field.name: field for field in dataclasses.fields(within)}, get_type_hints(within)
    edge = get_type_hints(body, include_extras=True)
    assert set(body.model_fields) == set(fields)
    for name, field in fields.items():
        assert shape(edge[name]) == shape(hints[name]), name
        if body is RecommendBody:  # an answer holds every field
            described = body.model_fields[name]
            default = field.default_factory() if callable(field.default_factory) else field.default
            assert described.is_required() == (default is dataclasses.MISSING), name
            if default is not dataclasses.MISSING:
                given = described.get_default(call_default_factory=True)
                assert (tuple(given) if isinstance(given, list) else given) == default, name


def test_a_new_item_says_what_an_item_can_say() -> None:
    assert set(NewItemBody.model_fields) == {*TEXT_FIELDS, "image_base64"}
    assert all(field.default is None for field in NewItemBody.model_fields.values())


def test_recommend_answers_the_documented_shape(client: Any) -> None:
    answer = client("POST", "/v1/recommend", json={"history": ["a", "ghost"], "k": 2})
    assert answer.status_code == 200
    assert answer.json() == {
        "items": [{"item_id": "b/ä 1", "score": 1.0}, {"item_id": "c", "score": 0.9}],
        "score_kind": "cosine",
        "model_version": "model-1",
        "index_version": "index-1",
        "unknown_items": ["ghost"],
        "fallback": False,
    }


@pytest.mark.parametrize("history", [[], ["ghost"], [""]])
def test_a_history_without_known_items_falls_back(client: Any, history: list[str]) -> None:
    answer = client("POST", "/v1/recommend", json={"history": history}).json()
    assert (answer["fallback"], answer["score_kind"]) == (True, "purchase_share")
    assert answer["unknown_items"] == history
    assert len(answer["items"]) == 4


def test_exclusions_reach_the_backend(client: Any) -> None:
    body = {"history": ["a"], "exclude": ["c"], "exclude_history": False, "k": 200}
    items = client("POST", "/v1/recommend", json=body).json()["items"]
    assert [item["item_id"] for item in items] == ["a", "b/ä 1", "c/image"]


def test_new_items_reach_the_backend_with_their_pictures(client: Any, backend: Any) -> None:
    picture = base64.b64encode(backend.images["a"]).decode()
    body = {"history": ["n"], "new_items": {"n": {"title": "A lamp", "price": 3.5, "image_base64": picture}}}
    answer = client("POST", "/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["unknown_items"], answer.json()["fallback"]) == ([], False)
    assert backend.request.new_items == {"n": NewItem({"title": "A lamp", "price": 3.5}, backend.images["a"])}


def test_timestamps_reach_the_backend_where_there_are_any(client: Any, backend: Any) -> None:
    for timestamps in ([0, 1_700_000_000_000], None):
        body = {"history": ["a", "c"], "timestamps": timestamps}
        assert client("POST", "/v1/recommend", json=body).status_code == 200
        assert backend.request.timestamps == timestamps
    assert client("POST", "/v1/recommend", json={"history": ["a"]}).status_code == 200
    assert backend.request.timestamps is None


def test_similar_and_search_answer_the_same_shape(client: Any) -> None:
    picture = base64.b64encode(b"a picture").decode()
    for path, body in [
        ("/v1/similar", {"item_id": "a"}),
        ("/v1/similar", {"item_id": "b/ä 1", "k": 1, "filters": {"brand": ["x"]}}),
        ("/v1/search", {"text": "lamp"}),
        ("/v1/search", {"text": "", "image_base64": picture, "k": 3}),
        ("/v1/search", {"text": "lamp", "image_base64": None}),
    ]:
        answer = client("POST", path, json=body)
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == RANKING_KEYS


def test_what_a_catalog_can_be_filtered_by(client: Any) -> None:
    assert client("GET", "/v1/filters").json() == {
        "filters": {
            "brand": [{"value": "Acme", "items": 3}, {"value": "Øre", "items": 1}],
            "year": [{"value": 2001, "items": 2}],
        }
    }


BAD_BODIES = [
    ("/v1/recommend", {}, "history"),
    ("/v1/recommend", {"history": "a"}, "history"),
    ("/v1/recommend", {"history": None}, "history"),
    ("/v1/recommend", {"history": [1]}, "history"),
    ("/v1/recommend", {"history": [None] * 900}, "history"),
    ("/v1/recommend", {"history": [], "k": 0}, "k"),
    ("/v1/recommend", {"history": [], "k": -1}, "k"),
    ("/v1/recommend", {"history": [], "k": 201}, "k"),
    ("/v1/recommend", {"history": [], "k": "10"}, "k"),
    ("/v1/recommend", {"history": [], "k": 10.0}, "k"),
    ("/v1/recommend", {"history": [], "k": True}, "k"),
    ("/v1/recommend", {"history": [], "k": None}, "k"),
    ("/v1/recommend", {"history": [], "k": 10**30}, "k"),
    ("/v1/recommend", {"history": ["a"] * 1001}, "history"),
    ("/v1/recommend", {"history": [], "exclude": ["a"] * 1001}, "exclude"),
    ("/v1/recommend", {"history": [], "exclude_history": "yes"}, "exclude_history"),
    ("/v1/recommend", {"history": [], "filters": {"colour": ["red"]}}, "filters"),
    ("/v1/recommend", {"history": [], "filters": {"brand": "red"}}, "filters"),
    ("/v1/recommend", {"history": [], "filters": {"brand": [None]}}, "filters"),
    ("/v1/recommend", {"history": [], "filters": {"brand": [{}]}}, "filters"),
    ("/v1/recommend", {"history": [], "filters": {"brand": ["x"] * 1001}}, "filters"),
    ("/v1/recommend", {"history": [], "filters": []}, "filters"),
    ("/v1/recommend", {"history": [], "histroy": []}, "histroy"),
    ("/v1/recommend", {"history": ["a"], "timestamps": ["now"]}, "timestamps"),
    ("/v1/recommend", {"history": ["a"], "timestamps": [1.5]}, "timestamps"),
    ("/v1/recommend", {"history": ["a"], "timestamps": [0] * 1001}, "timestamps"),
    ("/v1/recommend", {"history": ["n"], "new_items": {"n": {}}}, "new_items"),
    ("/v1/recommend", {"history": ["n"], "new_items": {"n": {"titel": "x"}}}, "new_items"),
    ("/v1/recommend", {"history": ["n"], "new_items": {"n": {"title": "x" * 10_001}}}, "new_items"),
    ("/v1/recommend", {"history": ["n"], "new_items": {"n": {"image_base64": "no base64!"}}}, "new_items"),
    ("/v1/recommend", {"history": [], "new_items": {str(n): {"title": "x"} for n in range(21)}}, "new_items"),
    ("/v1/similar", {}, "item_id"),
    ("/v1/similar", {"item_id": 7}, "item_id"),
    ("/v1/similar", {"item_id": "a", "filters": {"colour": ["red"]}}, "filters"),
    ("/v1/similar", {"item_id": "a", "history": []}, "history"),
    ("/v1/search", {}, "text"),
    ("/v1/search", {"text": "  ", "image_base64": ""}, "text"),
    ("/v1/search", {"text": "x" * 10_001}, "text"),
    ("/v1/search", {"image_base64": "no base64!"}, "image_base64"),
    ("/v1/search", {"image_base64": "ä"}, "image_base64"),
    ("/v1/search", {"image_base64": base64.b64encode(b"not a picture").decode()}, "image_base64"),
    ("/v1/search", {"text": "a", "filters": {"colour": ["red"]}}, "filters"),
]


@pytest.mark.parametrize(("path", "body", "field"), BAD_BODIES)
def test_bad_input_is_422_and_names_the_field(client: Any, path: str, body: Any, field: str) -> None:
    answer = client("POST", path, json=body)
    assert answer.status_code == 422, answer.text
    assert field in answer.json()["detail"][0]["loc"]


NASTY_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b'{"history": [], "k": NaN}',
    b'{"history": [], "k": 1e999}',
    b'{"history": [], "k": ' + b"1" * 5000 + b"}",
    b'{"history": [], "filters": {"brand": [NaN]}}',
    b'{"history": [], "filters": {"brand": [Infinity]}}',
    b'{"history": ["\\ud800"]}',
    b'{"\\ud800": 1}',
    b'{"history": ["\xff"]}',
    b"[" * 200_000,
]


@pytest.mark.parametrize("content", NASTY_BODIES, ids=lambda content: repr(content[:40]))
def test_what_is_hardly_json_is_422_in_valid_json(client: Any, content: bytes) -> None:
    answer = client("POST", "/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert isinstance(json.loads(answer.content, parse_constant=pytest.fail)["detail"], list)


def test_filter_values_of_any_size_pass(client: Any) -> None:
    values = [10**30, 10**400, -1, 0.5, True, "x"]
    answer = client("POST", "/v1/recommend", json={"history": [], "filters": {"brand": values}})
    assert answer.status_code in (200, 422)


def test_another_content_type_is_told_what_to_send(client: Any) -> None:
    answer = client("POST", "/v1/recommend", content=b'{"history": []}', headers={"content-type": "text/plain"})
    assert answer.status_code == 422
    assert "application/json" in answer.json()["detail"][0]["msg"]


def test_the_default_k_respects_a_smaller_limit(client_for: Callable[..., Any]) -> None:
    assert len(client_for(max_k=2)("POST", "/v1/recommend", json={"history": []}).json()["items"]) == 2


def test_unknown_items_are_404(client: Any) -> None:
    assert client("POST", "/v1/similar", json={"item_id": "ghost"}).status_code == 404
    for path in ("/v1/items/ghost", "/v1/items/", "/v1/items/ghost/image", "/v1/items/c/image", "/nowhere"):
        answer = client("GET", path)
        assert answer.status_code == 404
        assert isinstance(answer.json()["detail"], str)


def test_items_are_found_whatever_their_id(client: Any) -> None:
    assert client("GET", "/v1/items/a").json() == {"item_id": "a", "title": "A lamp", "price": 9.5, "weight": None}
    for path in ("/v1/items/b/ä 1", "/v1/items/b%2F%C3%A4%201"):
        assert client("GET", path).json()["item_id"] == "b/ä 1"
        assert client("GET", f"{path}/image").headers["content-type"] == "image/png"
    assert client("GET", "/v1/items/c%2Fimage").json()["item_id"] == "c/image"
    assert client("GET", "/v1/items/c%2Fimage/image").headers["content-type"] == "image/webp"


def test_pictures_are_cached_by_their_bytes(client: Any) -> None:
    first = client("GET", "/v1/items/a/image")
    assert first.status_code == 200
    assert first.headers["content-type"] == "image/jpeg"
    assert first.headers["cache-control"] == "private, max-age=3600"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = client("GET", "/v1/items/a/image", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
    assert client("GET", "/v1/items/a/image", headers={"if-none-match": '"other"'}).status_code == 200


def test_state_version_page_and_documentation(client: Any) -> None:
    assert client("GET", "/healthz").json()["status"] == "ok"
    versions = client("GET", "/version").json()
    assert set(versions) == {"model_version", "index_version", "pixrec", "ray", "torch", "transformers"}
    for path in ("/", "/docs"):
        page = client("GET", path)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "://" not in page.text.replace("http://www.w3.org/2000/svg", "")  # nothing from another host
    described = client("GET", "/openapi.json").json()["paths"]
    assert set(described) == {
        "/v1/recommend",
        "/v1/similar",
        "/v1/search",
        "/v1/filters",
        "/v1/items",
        "/v1/items/{item_id}",
        "/v1/items/{item_id}/image",
        "/v1/embed",
        "/v1/events",
        "/v1/feedback",
        "/v1/users/{user_id}",
        "/admin/reload",
        "/admin/pin",
        "/admin/rollback",
        "/healthz",
        "/readyz",
        "/version",
        "/metrics",
    }
    assert {"200", "401", "413", "422", "503"} <= set(described["/v1/search"]["post"]["responses"])


def test_the_page_has_words_for_every_kind_of_score(client: Any) -> None:
    page = client("GET", "/").text
    for kind in get_args(ScoreKind):
        assert f"{kind}: (score)" in page


@pytest.mark.parametrize(
    ("trouble", "health"),
    [(Overloaded("too many"), 200), (Unavailable("gone"), 503), (RuntimeError("a defect"), 503)],
)
def test_trouble_is_503_with_retry_after(
    client_for: Callable[..., Any], backend: Any, trouble: Exception, health: int
) -> None:
    backend.trouble = trouble
    client = client_for(retry_after_seconds=3)
    for method, path, body in [
        ("POST", "/v1/recommend", {"history": []}),
        ("POST", "/v1/similar", {"item_id": "a"}),
        ("POST", "/v1/search", {"text": "a"}),
        ("GET", "/v1/filters", None),
        ("GET", "/v1/items/a", None),
        ("GET", "/v1/items/a/image", None),
        ("GET", "/version", None),
    ]:
        answer = client(method, path, json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
        assert isinstance(answer.json()["detail"], str)
        assert "defect" not in answer.text  # what went wrong is for the log
    assert client("GET", "/healthz").status_code == health


def test_the_api_key_guards_v1_only(client_for: Callable[..., Any], backend: Any) -> None:
    client = client_for(api_key="schlüssel")
    key = "schlüssel".encode()
    for headers in ({"x-api-key": key}, {"authorization": b"Bearer " + key}, {"authorization": b"bearer " + key}):
        assert client("GET", "/v1/items/a", headers=headers).status_code == 200
    backend.asked.clear()
    wrong: list[dict[str, Any]] = [
        {},
        {"x-api-key": ""},
        {"x-api-key": "wrong"},
        {"authorization": key},
        {"authorization": b"Basic " + key},
        {"authorization": "Bearer "},
    ]
    for headers in wrong:
        for method, path in [("GET", "/v1/items/a"), ("GET", "/v1/items/a/image"), ("POST", "/v1/recommend")]:
            answer = client(method, path, headers=headers, content=b"not even json")
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    assert backend.asked == []
    for path in ("/", "/healthz", "/version", "/docs", "/openapi.json"):
        assert client("GET", path).status_code == 200


def test_large_bodies_are_413_announced_or_not(client_for: Callable[..., Any], backend: Any) -> None:
    client = client_for(max_body_bytes=100)
    sent = 0

    async def in_pieces(pieces: int) -> Any:
        nonlocal sent
        for _ in range(pieces):
            sent += 20
            yield b" " * 20

    json_type = {"content-type": "application/json"}
    for content in (b" " * 101, b" " * 5000, in_pieces(6), in_pieces(10**9)):
        answer = client("POST", "/v1/recommend", content=content, headers=json_type)
        assert answer.status_code == 413, answer.text
    assert sent == 120 + (6 + 41) * 20  # an endless body is read only so far
    assert backend.asked == []
    assert client("POST", "/v1/recommend", content=b'{"history": []}', headers=json_type).status_code == 200


def test_who_asks_before_sending_a_large_body_is_refused_at_once(client_for: Callable[..., Any]) -> None:
    async def unsent() -> Any:
        pytest.fail("the body was read")
        yield b""

    headers = {"expect": "100-continue", "content-length": "101"}
    answer = client_for(max_body_bytes=100)("POST", "/v1/search", content=unsent(), headers=headers)
    assert answer.status_code == 413


def test_a_wrong_method_is_405(client: Any) -> None:
    assert client("GET", "/v1/recommend").status_code == 405


def test_jsonable_has_no_nan_and_no_surprises() -> None:
    assert jsonable({"a": [1.5, float("nan"), float("inf")], 1: b"x", "n": None}) == {
        "a": [1.5, None, None],
        "1": "b'x'",
        "n": None,
    }


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\xff\xd8\xff\xe0", "image/jpeg"), (b"GIF89a", "image/gif"), (b"?", "application/octet-stream")],
)
def test_image_type_goes_by_the_first_bytes(data: bytes, kind: str) -> None:
    assert image_type(data) == kind


def test_what_rankings_may_be_asked_for_reaches_the_backend(client: Any, backend: Any) -> None:
    options = {"filters": {"brand": ["Acme"]}, "diversity": 0.5, "max_per": {"brand": 2}}
    for path, body in [
        ("/v1/recommend", {"history": ["a"], "reasons": True}),
        ("/v1/similar", {"item_id": "a"}),
        ("/v1/search", {"text": "lamp"}),
    ]:
        assert client("POST", path, json=body | options).status_code == 200
        assert (backend.request.diversity, backend.request.max_per) == (0.5, {"brand": 2})
    client("POST", "/v1/recommend", json={"history": [], "filters": {"price": {"min": 3}}})
    assert backend.request.filters == {"price": {"min": 3.0}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"diversity": 1.5}, "diversity"),
        ({"diversity": "much"}, "diversity"),
        ({"max_per": {"brand": 0}}, "max_per"),
        ({"max_per": ["brand"]}, "max_per"),
        ({"reasons": 1}, "reasons"),
        ({"filters": {"price": {"least": 3}}}, "filters"),
        ({"filters": {"price": {}}}, "filters"),
        ({"filters": {"price": {"min": "3"}}}, "filters"),
    ],
)
def test_options_at_fault_name_the_field(client: Any, body: Any, field: str) -> None:
    answer = client("POST", "/v1/recommend", json={"history": []} | body)
    assert answer.status_code == 422
    assert field in answer.json()["detail"][0]["loc"]


def test_embed_gives_vectors_in_the_order_asked_for(client: Any, backend: Any) -> None:
    picture = base64.b64encode(b"a picture").decode()
    body = {"texts": ["lamp"], "images_base64": [picture], "item_ids": ["ghost", "a"], "histories": [["a"], []]}
    answer = client("POST", "/v1/embed", json=body)
    assert answer.json() == {
        "texts": [[1.0, 0.0]],
        "images": [[0.0, 1.0]],
        "item_ids": [None, [0.6, 0.8]],
        "histories": [[0.8, 0.6], None],
        "model_version": "model-1",
        "index_version": "index-1",
    }
    assert backend.asked[-1][1].images == [b"a picture"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "texts"),
        ({"texts": ["x"] * 40, "item_ids": ["a"] * 30}, "texts"),
        ({"texts": ["x" * 10_001]}, "texts"),
        ({"histories": [["a"] * 1001]}, "histories"),
        ({"histories": ["a"]}, "histories"),
        ({"images_base64": ["no base64!"]}, "images_base64"),
        ({"images_base64": [base64.b64encode(b"not a picture").decode()]}, "images_base64"),
        ({"vectors": []}, "vectors"),
    ],
)
def test_what_cannot_be_embedded_names_the_field(client: Any, body: Any, field: str) -> None:
    answer = client("POST", "/v1/embed", json=body)
    assert answer.status_code == 422, answer.text
    assert field in answer.json()["detail"][0]["loc"]


def test_large_pictures_are_refused_before_they_are_decoded(client_for: Callable[..., Any], backend: Any) -> None:
    picture = base64.b64encode(square(0.5, size=40)).decode()
    for limit in ({"max_image_bytes": 100}, {"max_image_pixels": 1599}):
        for path, body in [
            ("/v1/search", {"image_base64": picture}),
            ("/v1/embed", {"images_base64": [picture]}),
            ("/v1/recommend", {"history": ["n"], "new_items": {"n": {"image_base64": picture}}}),
        ]:
            answer = client_for(**limit)("POST", path, json=body)
            assert answer.status_code == 422
            assert f"at most {next(iter(limit.values()))}" in answer.json()["detail"][0]["msg"]
    assert backend.asked == []
    assert client_for(max_image_pixels=1600)("POST", "/v1/search", json={"image_base64": picture}).status_code == 200


def test_the_admin_routes_want_their_key_and_are_closed_without_one(client_for: Callable[..., Any]) -> None:
    assert client_for()("POST", "/admin/reload").status_code == 403
    for config in ({"admin_key": "boss", "api_key": "shop"}, {"api_key": "boss"}):
        client = client_for(**config)
        for key in ("", "shop", "bos"):
            assert client("POST", "/admin/reload", headers={"x-api-key": key}).status_code == 401
        answer = client("POST", "/admin/reload", headers={"authorization": "Bearer boss"})
        assert answer.status_code == 200
        assert answer.json()["replicas"][0]["outcome"] == "swapped"
    assert client_for(admin_key="boss")("GET", "/v1/items/a").status_code == 200


def test_pins_and_rollbacks_say_what_happened(client_for: Callable[..., Any], backend: Any) -> None:
    client, key = client_for(admin_key="boss"), {"x-api-key": "boss"}
    for version in ("20261128T000000-abc", None):
        assert client("POST", "/admin/pin", json={"index_version": version}, headers=key).status_code == 200
        assert backend.asked[-2] == ("pin", version)
    assert client("POST", "/admin/pin", json={"index_version": "ghost"}, headers=key).status_code == 404
    refused = client("POST", "/admin/pin", json={"index_version": "of-another-model"}, headers=key)
    assert (refused.status_code, "another model" in refused.json()["detail"]) == (409, True)
    for body in ({}, {"index_version": "../.."}, {"index_version": 7}):
        assert client("POST", "/admin/pin", json=body, headers=key).status_code == 422
    assert client("POST", "/admin/rollback", headers=key).status_code == 404


def test_any_of_several_keys_opens(client_for: Callable[..., Any]) -> None:
    client = client_for(api_key="one", api_keys=("two", "three"))
    for key, code in [("one", 200), ("three", 200), ("four", 401)]:
        assert client("GET", "/v1/items/a", headers={"x-api-key": key}).status_code == code


def test_each_key_has_its_own_rate(client_for: Callable[..., Any]) -> None:
    client = client_for(api_keys=("one", "two"), requests_per_second=0.01, request_burst=2)
    for key in ("one", "two"):
        codes = [client("GET", "/v1/items/a", headers={"x-api-key": key}).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
    answer = client("GET", "/v1/items/a", headers={"x-api-key": "one"})
    assert int(answer.headers["retry-after"]) > 50
    assert client("GET", "/healthz").status_code == 200


def test_a_bucket_fills_with_time() -> None:
    rate = Rate(2.0, 3)
    assert [rate.wait(b"a", 0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert rate.wait(b"a", 0.25) == 0.25
    assert rate.wait(b"a", 0.5) == 0
    assert rate.wait(b"b", 0.5) == 0
    assert [rate.wait(b"a", 100.0) for _ in range(4)] == [0, 0, 0, 0.5], "no more than a burst after a pause"


def test_every_answer_has_an_id_and_is_counted(client_for: Callable[..., Any], backend: Any) -> None:
    metrics = RequestMetrics()
    client = client_for(metrics, api_key="k")
    key = {"x-api-key": "k"}
    ids = {client("GET", path, headers=key).headers["x-request-id"] for path in ("/v1/items/a", "/v1/items/ghost", "/")}
    assert len(ids) == 3
    assert client("GET", "/v1/items/a").status_code == 401
    given = client("GET", "/healthz", headers={"x-request-id": "of the caller"})
    assert "x-request-id" not in given.headers  # Ray Serve says it again
    told = metrics.text()
    for line in [
        'pixrec_requests_total{code="200",route="/v1/items/{item_id:path}"} 1.0',
        'pixrec_requests_total{code="404",route="/v1/items/{item_id:path}"} 1.0',
        'pixrec_requests_total{code="401",route="none"} 1.0',
        'pixrec_requests_total{code="200",route="/healthz"} 1.0',
        "pixrec_requests_in_flight 0.0",
    ]:
        assert line in told
    assert "ghost" not in told


def test_readiness_and_metrics(client: Any, backend: Any) -> None:
    assert client("GET", "/readyz").json() == {
        "ready": True,
        "model_version": "model-1",
        "index_version": "index-1",
        "published": None,
        "refused": None,
    }
    answer = client("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    backend.trouble = Unavailable("starting")
    assert client("GET", "/readyz").status_code == 503


def test_the_shipped_client_and_the_server_understand_each_other(backend: Any) -> None:
    async def ask() -> None:
        transport = httpx.ASGITransport(create_api(backend, ServeConfig()))
        async with AsyncClient("http://pixrec", transport=transport) as client:
            query = Query(
                ["a"],
                2,
                filters={"brand": ["Acme"]},
                new_items={"n": NewItem({"title": "x"}, b"picture")},
                diversity=0.5,
                max_per={"brand": 3},
                reasons=True,
            )
            answer = await client.answer(query)
            assert [item_id for item_id, _ in answer.items] == ["b/ä 1", "c"]
            assert backend.request == dataclasses.replace(query, exclude=[])
            assert (await client.similar("a", 1)).items == [("b/ä 1", 1.0)]
            assert len((await client.search("lamp", b"picture")).items) == 4
            assert (await client.embed(["lamp"])).texts == [[1.0, 0.0]]
            assert (await client.item("b/ä 1"))["item_id"] == "b/ä 1"
            assert (await client.version())["index_version"] == "index-1"
            with pytest.raises(Rejected, match="stores no events"):
                await client.recommend([], user_id="u")
            with pytest.raises(Rejected, match="k is 500"):
                await client.recommend([], 500)

    asyncio.run(ask())


def test_the_shipped_client_changes_items(backend: Any, tmp_path: Path) -> None:
    async def ask() -> None:
        store = SqliteStore(str(tmp_path / "live"), 100)
        transport = httpx.ASGITransport(create_api(backend, ServeConfig(api_key="k"), store=store))
        async with AsyncClient("http://pixrec", api_key="k", transport=transport) as client:
            items = {"n/1": NewItem({"title": "A lamp", "stock": 3}, backend.images["a"])}
            assert await client.add_items(items) == 1
            assert backend.asked[-1] == ("add_items", items)
            await client.change_item("n/1", {"stock": 2})
            assert (await client.item("n/1"))["stock"] == 2
            await client.hide_item("n/1")
            assert backend.asked[-1] == ("change_item", "n/1", ItemChange(hidden=True))
            with pytest.raises(Rejected, match="is unknown"):
                await client.hide_item("ghost")

    asyncio.run(ask())


@pytest.fixture
def shop(client_for: Callable[..., Any], tmp_path: Path) -> Any:
    """A client of a server that stores events."""
    return client_for(store=SqliteStore(str(tmp_path / "events"), 100), max_events=3)


def test_stored_events_are_the_history_of_their_user(shop: Any, backend: Any) -> None:
    events = [
        {"user_id": "u/1", "item_id": "c", "timestamp": 2000, "event": "view"},
        {"user_id": "u/1", "item_id": "a"},
    ]
    for _ in range(2):
        assert shop("POST", "/v1/events", json={"events": events[:1]}).json() == {"stored": 1}
    assert shop("POST", "/v1/events", json={"events": events[1:]}).json() == {"stored": 1}
    assert shop("POST", "/v1/recommend", json={"user_id": "u/1"}).status_code == 200
    assert backend.request.history == ["c", "a"]
    assert backend.request.timestamps[0] == 2000
    assert abs(backend.request.timestamps[1] / 1000 - time.time()) < 60
    assert shop("POST", "/v1/recommend", json={"user_id": "nobody"}).json()["fallback"] is True
    assert shop("DELETE", "/v1/users/u%2F1").json() == {"deleted": 2}
    shop("POST", "/v1/recommend", json={"user_id": "u/1"})
    assert backend.request.history == []


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/recommend", {"user_id": "u", "history": []}, "user_id"),
        ("/v1/recommend", {"user_id": "u", "timestamps": []}, "user_id"),
        ("/v1/recommend", {"user_id": ""}, "user_id"),
        ("/v1/recommend", {"user_id": None}, "history"),
        ("/v1/events", {}, "events"),
        ("/v1/events", {"events": [{"item_id": "a"}]}, "user_id"),
        ("/v1/events", {"events": [{"user_id": "u", "item_id": ""}]}, "item_id"),
        ("/v1/events", {"events": [{"user_id": "u", "item_id": "a", "timestamp": 1.5}]}, "timestamp"),
        ("/v1/events", {"events": [{"user_id": "u", "item_id": "a", "timestamp": 10**16}]}, "timestamp"),
        ("/v1/events", {"events": [{"user_id": "u", "item_id": "a"}] * 4}, "events"),
    ],
)
def test_events_at_fault_name_the_field(shop: Any, path: str, body: Any, field: str) -> None:
    answer = shop("POST", path, json=body)
    assert answer.status_code == 422, answer.text
    assert field in answer.json()["detail"][0]["loc"]


def test_a_server_without_a_store_says_so(client: Any) -> None:
    event = {"user_id": "u", "item_id": "a"}
    for answer in (client("POST", "/v1/events", json={"events": [event]}), client("DELETE", "/v1/users/u")):
        assert (answer.status_code, "stores no events" in answer.json()["detail"]) == (404, True)
    assert client("POST", "/v1/recommend", json={"user_id": "u"}).status_code == 422


@pytest.fixture
def keeper(client_for: Callable[..., Any], tmp_path: Path) -> Any:
    """A client with the key of a server that has a store."""
    client = client_for(store=SqliteStore(str(tmp_path / "live"), 100), api_key="k", max_items=3)
    return lambda method, path, **request: client(method, path, headers={"X-API-Key": "k"}, **request)


def test_items_are_added_changed_and_hidden(keeper: Any, backend: Any) -> None:
    picture = base64.b64encode(backend.images["a"]).decode()
    items = [{"item_id": "n/1", "title": "A lamp", "stock": 3, "image_base64": picture}, {"item_id": "a", "title": "A"}]
    answer = keeper("POST", "/v1/items", json={"items": items})
    assert answer.json() == {"stored": 2, "model_version": "model-1", "index_version": "index-1"}
    assert backend.asked[-1][1]["n/1"] == NewItem({"title": "A lamp", "stock": 3}, backend.images["a"])
    assert keeper("GET", "/v1/items/n%2F1").json() == {"item_id": "n/1", "title": "A lamp", "stock": 3}
    for body, change in (
        ({"fields": {"price": 2.5}}, ItemChange({"price": 2.5})),
        ({"hidden": False}, ItemChange(hidden=False)),
    ):
        assert keeper("PATCH", "/v1/items/n%2F1", json=body).json() == {"item_id": "n/1"}
        assert backend.asked[-1] == ("change_item", "n/1", change)
    assert keeper("DELETE", "/v1/items/n%2F1").json() == {"item_id": "n/1"}
    assert backend.asked[-1] == ("change_item", "n/1", ItemChange(hidden=True))
    assert keeper("DELETE", "/v1/items/ghost").status_code == 404


def test_a_picture_is_read_where_its_uri_says(client_for: Callable[..., Any], backend: Any, tmp_path: Path) -> None:
    (tmp_path / "lamp.jpg").write_bytes(backend.images["a"])
    (tmp_path / "large.jpg").write_bytes(square(0.5, size=50))
    store, place = SqliteStore(str(tmp_path / "live"), 100), f"{tmp_path}/"
    client = client_for(store=store, api_key="k", image_uris=(place,), max_image_pixels=1600)

    def add(**item: Any) -> Any:
        return client("POST", "/v1/items", json={"items": [{"item_id": "n", **item}]}, headers={"X-API-Key": "k"})

    assert add(image_uri=f"{place}lamp.jpg").json()["stored"] == 1
    assert backend.asked[-1] == ("add_items", {"n": NewItem({}, backend.images["a"])})
    picture = base64.b64encode(backend.images["a"]).decode()
    for item, said in (
        ({"image_uri": f"{place}none.jpg"}, "file not found"),
        ({"image_uri": f"{place}large.jpg"}, "2500 pixels"),
        ({"image_uri": "http://example.com/a.jpg"}, "serve.image_uris"),
        ({"image_uri": f"{place}lamp.jpg", "image_base64": picture}, "give one of them"),
    ):
        answer = add(**item)
        assert (answer.status_code, said in answer.text) == (422, True), answer.text


@pytest.mark.parametrize(
    ("method", "body", "code", "said"),
    [
        ("POST", {"items": []}, 422, "items"),
        ("POST", {"items": [{"title": "no id"}]}, 422, "item_id"),
        ("POST", {"items": [{"item_id": "x", "title": 1}]}, 422, "title"),
        ("POST", {"items": [{"item_id": "x"}]}, 422, "neither a title nor a picture"),
        ("POST", {"items": [{"item_id": "x", "title": "t", "odd": {"a": 1}}]}, 422, "odd"),
        ("POST", {"items": [{"item_id": "x", "title": "t", "odd": 1}]}, 422, "lacks"),
        ("POST", {"items": [{"item_id": "x", "title": "t"}] * 2}, 422, "more than once"),
        ("POST", {"items": [{"item_id": str(n), "title": "t"} for n in range(4)]}, 422, "at most 3"),
        ("POST", {"items": [{"item_id": "x", "title": "t" * 20_000}]}, 422, "at most 10000"),
        ("POST", {"items": [{"item_id": "x", "image_base64": "*"}]}, 422, "not base64"),
        ("POST", {"items": [{"item_id": "away", "title": "t"}]}, 503, "the store is away"),
        ("PATCH", {}, 422, "give columns to change"),
        ("PATCH", {"fields": {"title": "other"}}, 422, "send the item to POST"),
        ("PATCH", {"fields": {"odd": 1}}, 422, "no such column"),
    ],
)
def test_changes_of_items_at_fault(keeper: Any, method: str, body: Any, code: int, said: str) -> None:
    answer = keeper(method, "/v1/items" if method == "POST" else "/v1/items/a", json=body)
    assert answer.status_code == code, answer.text
    assert said in answer.text
    assert ("retry-after" in answer.headers) == (code == 503)


def test_a_full_store_says_so(keeper: Any, backend: Any) -> None:
    backend.catalog |= {str(n): {} for n in range(98)}
    answer = keeper("POST", "/v1/items", json={"items": [{"item_id": "x", "title": "t"}]})
    assert (answer.status_code, answer.json()["detail"]) == (409, "the store is full")


def test_changes_of_items_want_the_admin_key(client_for: Any) -> None:
    body = {"items": [{"item_id": "x", "title": "t"}]}
    answer = client_for()("POST", "/v1/items", json=body)
    assert (answer.status_code, "set serve.admin_key" in answer.json()["detail"]) == (403, True)
    both = client_for(api_key="k", admin_key="boss")
    for method, path in (("POST", "/v1/items"), ("PATCH", "/v1/items/a"), ("DELETE", "/v1/items/a")):
        assert both(method, path, json=body, headers={"X-API-Key": "k"}).status_code == 401
        # who has the key learns that nothing is stored here
        assert both(method, path, json=body, headers={"X-API-Key": "boss"}).status_code in (404, 422)
    assert both("GET", "/v1/items/a", headers={"X-API-Key": "k"}).status_code == 200


class Away:
    """A store that does not answer."""

    def history(self, user_id: str, most: int) -> list[tuple[str, int]]:
        raise StoreAway("the store is away")

    def add(self, events: Any) -> None:
        raise StoreAway("the store is away")


def test_a_store_that_is_away_stops_no_recommendation(client_for: Any) -> None:
    client = client_for(store=Away())
    answer = client("POST", "/v1/recommend", json={"user_id": "u"})
    assert (answer.status_code, answer.json()["store_away"], answer.json()["fallback"]) == (200, True, True)
    assert "store_away" not in client("POST", "/v1/recommend", json={"history": ["a"]}).json()
    refused = client("POST", "/v1/events", json={"events": [{"user_id": "u", "item_id": "a"}]})
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)


def test_feedback_counts_once_by_model_version(shop: Any) -> None:
    told = {"request_id": "r1", "model_version": "model-1", "impressions": ["a", "c"], "clicks": ["c"]}
    assert "pixrec_clicks_total" not in shop("GET", "/metrics").text
    for _ in range(2):
        assert shop("POST", "/v1/feedback", json=told).json() == {"stored": 2}
    assert shop("POST", "/v1/feedback", json={**told, "request_id": "r2", "clicks": []}).status_code == 200
    metrics = shop("GET", "/metrics").text
    assert 'pixrec_impressions_total{model_version="model-1"} 4\n' in metrics
    assert 'pixrec_clicks_total{model_version="model-1"} 1\n' in metrics
    refused = shop("POST", "/v1/feedback", json={**told, "model_version": "ghost"})
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", "model_version"])
