"""The HTTP interface: routes and what each failure answers. Knows no Ray and no model, only a Backend."""

from __future__ import annotations

import asyncio
import dataclasses
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException

import pixrec
from pixrec.config import ServeConfig
from pixrec.live.store import Store, StoreAway
from pixrec.query import Answer, NewItem, Query
from pixrec.serving.backend import Backend, BackendError, Change, Overloaded, Refusal, ToEmbed
from pixrec.serving.bodies import (
    CLOSED,
    NO_VERSION,
    NOT_STORED,
    PROBLEMS,
    REFUSED,
    UNKNOWN,
    AnswerBody,
    ChangesBody,
    EmbedBody,
    EmbeddedBody,
    FiltersBody,
    HealthBody,
    PinBody,
    RangeBody,
    RankingBody,
    ReadyBody,
    RecommendBody,
    SearchBody,
    SimilarBody,
)
from pixrec.serving.edge import check_length, decoded, field_error, jsonable
from pixrec.serving.gate import Gate, JsonResponse, unavailable
from pixrec.serving.items import item_routes, unknown
from pixrec.serving.live import event_routes, feedback_metrics, history_of
from pixrec.serving.metrics import RequestMetrics

MAX_REPORTED_ERRORS = 20
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SOFTWARE = ("ray", "torch", "transformers")

# The pages need no other host, and a picture or a title must not be able to reach one.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_api(
    backend: Backend,
    config: ServeConfig,
    metrics: RequestMetrics | None = None,
    store: Store | None = None,
) -> FastAPI:
    """The whole HTTP application over a backend; `metrics` counts its requests, `store` holds what changes."""
    api = FastAPI(
        title="PixRec",
        version=pixrec.__version__,
        description="Recommends the next product from what products look like and say.",
        docs_url=None,  # FastAPI's own loads its scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )
    api.add_middleware(Gate, config=config, metrics=metrics or RequestMetrics())
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(StarletteHTTPException, _refused)

    async def no_answer(request: Request, error: Exception) -> Response:
        return unavailable(str(error) or "the model is not available", config.retry_after_seconds)

    api.add_exception_handler(BackendError, no_answer)
    api.add_exception_handler(StoreAway, no_answer)
    keyed = [Security(HTTPBearer(auto_error=False))] if config.api_key else []  # shows the key's field in /docs
    rankings = _ranking_routes(backend, config, store)
    api.include_router(rankings, responses=PROBLEMS, dependencies=keyed, tags=["rankings"])
    told, items = event_routes(store, config, backend), item_routes(backend, config, store is not None)
    api.include_router(told, responses=PROBLEMS | NOT_STORED, dependencies=keyed, tags=["events"])
    api.include_router(items, responses=PROBLEMS | UNKNOWN | CLOSED, dependencies=keyed, tags=["items"])
    api.include_router(_admin_routes(backend), responses=PROBLEMS | REFUSED, dependencies=keyed, tags=["admin"])
    api.include_router(_state_routes(backend, store), tags=["state"])
    return api


def _ranking_routes(backend: Backend, config: ServeConfig, store: Store | None) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/recommend", response_model=AnswerBody)
    async def recommend(body: RecommendBody) -> Response:
        """The items that fit best after this history."""
        for name in ("history", "exclude"):
            check_length(name, len(getattr(body, name)), config.max_request_items, "items")
        if body.timestamps is not None:
            check_length("timestamps", len(body.timestamps), config.max_request_items, "values")
        new_items = _new_items(body, config)
        history, timestamps, away = await history_of(body, store, config)
        query = _query(
            body,
            config,
            history=history,
            exclude=body.exclude,
            exclude_history=body.exclude_history,
            new_items=new_items,
            timestamps=timestamps,
            reasons=body.reasons,
            user_id=body.user_id,
        )
        answer = await backend.recommend(query)
        if away and isinstance(answer, Answer):
            answer = dataclasses.replace(answer, store_away=True)
        return _answered(answer)

    @router.post("/similar", response_model=AnswerBody, responses=UNKNOWN)
    async def similar(body: SimilarBody) -> Response:
        """The items closest to one item."""
        answer = await backend.similar(body.item_id, _query(body, config, exclude=[body.item_id]))
        if answer is None:
            raise unknown(body.item_id)
        return _answered(answer)

    @router.post("/search", response_model=AnswerBody)
    async def search(body: SearchBody) -> Response:
        """The items closest to a text, a picture, or both."""
        query = _query(body, config)
        text = (body.text or "").strip()
        check_length("text", len(text), config.max_text_characters, "characters")
        image = decoded(body.image_base64, config) if body.image_base64 else None
        if not text and not image:
            raise field_error("text", "text and image_base64 are both empty: give one of them")
        return _answered(await backend.search(text, image, query))

    @router.post("/embed", response_model=EmbeddedBody)
    async def embed(body: EmbedBody) -> Response:
        """Vectors in the space in which the nearest items are the best, to be used elsewhere."""
        fields = {name: getattr(body, name) for name in EmbedBody.model_fields}
        together = sum(map(len, fields.values()))
        if not together:
            raise field_error("texts", f"give at least one of {', '.join(fields)}")
        largest = max(fields, key=lambda name: len(fields[name]))
        check_length(largest, together, config.max_embedded, "entries, together with the other fields")
        for name, most, unit in (
            ("texts", config.max_text_characters, "characters"),
            ("histories", config.max_request_items, "items"),
        ):
            for entry in fields[name]:
                check_length(name, len(entry), most, f"{unit} in one entry")
        images = [decoded(image, config, "images_base64") for image in body.images_base64]
        found = await backend.embed(ToEmbed(body.texts, images, body.item_ids, body.histories))
        if isinstance(found, Refusal):
            raise field_error(found.field, found.message)
        return JsonResponse(vars(found))

    @router.get("/filters", response_model=FiltersBody)
    async def filters() -> Response:
        """The fields that `filters` may name, each with its most frequent values."""
        found = await backend.filters()
        counted = {name: [{"value": v, "items": n} for v, n in values] for name, values in found.items()}
        return JsonResponse(jsonable({"filters": counted}))

    return router


def _admin_routes(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/admin")

    @router.post("/reload", response_model=ChangesBody)
    async def reload() -> Response:
        """Look for a newly published version now: every replica loads it and then swaps."""
        return _changed(await backend.reload())

    @router.post("/pin", response_model=ChangesBody, responses=NO_VERSION)
    async def pin(body: PinBody) -> Response:
        """Serve one version whatever is published later, or again what is current."""
        return _changed(await backend.pin(body.index_version))

    @router.post("/rollback", response_model=ChangesBody, responses=NO_VERSION)
    async def rollback() -> Response:
        """Pin the version that was published before the one in use."""
        return _changed(await backend.rollback())

    return router


def _changed(changes: list[Change] | None) -> Response:
    if changes is None:
        raise HTTPException(404, "there is no such version")
    refused = [change.state["refused"] for change in changes if change.outcome == "refused"]
    if refused:
        raise HTTPException(409, f"the version before stays in use: {refused[0]}")
    return JsonResponse({"replicas": [vars(change) for change in changes]})


def _state_routes(backend: Backend, store: Store | None) -> APIRouter:
    router = APIRouter()
    static = files("pixrec.serving").joinpath("static")
    pages = {name: static.joinpath(f"{name}.html").read_text("utf-8") for name in ("index", "docs")}

    @router.get("/healthz", response_model=HealthBody, responses={503: PROBLEMS[503]})
    async def healthz() -> Response:
        """Whether the model answers. A replica that is merely busy is healthy: restarting it would not help."""
        try:
            versions = await backend.versions()
        except Overloaded:
            return JsonResponse({"status": "ok", "overloaded": True})
        return JsonResponse({"status": "ok", "overloaded": False, **vars(versions)})

    @router.get("/readyz", response_model=ReadyBody, responses={503: PROBLEMS[503]})
    async def readyz() -> Response:
        """Whether a model and its index are loaded; with the reason where a newer version is refused."""
        return JsonResponse({"ready": True, **jsonable(await backend.state())})

    @router.get("/version", response_model=dict[str, Any], responses={503: PROBLEMS[503]})
    async def software_versions() -> Response:
        """Versions of the model, the index and the software, and what recall of the index was measured."""
        state = await backend.state()
        recall = {name: value for name, value in state.items() if name.startswith("recall")}
        return JsonResponse(vars(await backend.versions()) | software() | jsonable(recall))

    @router.get(
        "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 503: PROBLEMS[503]}
    )
    async def metrics() -> Response:
        """What all replicas count and measure, for Prometheus."""
        told = await backend.metrics() + await asyncio.to_thread(feedback_metrics, store)
        return Response(told, headers={"Content-Type": METRICS_TYPE})

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def try_it() -> Response:
        return _page(pages["index"])

    @router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def interface() -> Response:
        return _page(pages["docs"])

    return router


def _page(html: str) -> Response:
    return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})


def software() -> dict[str, str | None]:
    """Versions of PixRec and what it stands on; null for what is not installed here."""
    found: dict[str, str | None] = {"pixrec": pixrec.__version__}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _answered(answer: Answer | Refusal) -> Response:
    if isinstance(answer, Refusal):
        raise field_error(answer.field, answer.message)
    return JsonResponse(jsonable(answer.to_dict()))


def _query(body: RankingBody, config: ServeConfig, **fields: Any) -> Query:
    """What the body asks for, of `fields` and of what all rankings know."""
    filters: dict[str, Any] = {}
    for name, wanted in body.filters.items():
        if isinstance(wanted, RangeBody):
            filters[name] = wanted.model_dump(exclude_none=True)
            if not filters[name]:
                raise field_error("filters", f"the range of {name!r} needs a min, a max, or both")
        else:
            check_length("filters", len(wanted), config.max_request_items, "values of one field")
            filters[name] = wanted
    k = _checked_k(body, config)
    history = fields.pop("history", [])
    return Query(history, k, filters=filters, diversity=body.diversity, max_per=body.max_per, **fields)


def _checked_k(body: RankingBody, config: ServeConfig) -> int:
    if "k" not in body.model_fields_set:
        return min(body.k, config.max_k)
    if body.k > config.max_k:
        raise field_error("k", f"k is {body.k}: must be at most {config.max_k}")
    return body.k


def _new_items(body: RecommendBody, config: ServeConfig) -> dict[str, NewItem]:
    check_length("new_items", len(body.new_items), config.max_new_items, "items")
    found = {}
    for item_id, item in body.new_items.items():
        fields = item.model_dump(exclude={"image_base64"}, exclude_none=True)
        check_length("new_items", sum(len(str(v)) for v in fields.values()), config.max_text_characters, "characters")
        if not fields and not item.image_base64:
            raise field_error("new_items", f"item {item_id!r} has neither text nor a picture")
        found[item_id] = NewItem(fields, decoded(item.image_base64, config, "new_items") if item.image_base64 else None)
    return found


async def _invalid(request: Request, error: Exception) -> Response:
    """422 in FastAPI's own shape, without echoing the input: it may hold NaN, which JSON cannot."""
    assert isinstance(error, RequestValidationError)
    found = [{"type": e["type"], "loc": list(e["loc"]), "msg": e["msg"]} for e in error.errors()[:MAX_REPORTED_ERRORS]]
    is_json = "json" in request.headers.get("content-type", "")
    if not is_json and any(e["loc"] == ["body"] for e in found):
        found = [{"type": "content_type", "loc": ["body"], "msg": "send JSON with Content-Type: application/json"}]
    return JsonResponse({"detail": found}, 422)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:  # the body cannot be parsed for another reason than JSON's grammar
        return JsonResponse({"detail": [{"type": "body", "loc": ["body"], "msg": "the body is not valid JSON"}]}, 422)
    return JsonResponse({"detail": error.detail}, error.status_code, headers=error.headers)
