"""The routes of items: what the catalog says of them, and adding, changing and hiding them. Knows only a Backend."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from pixrec.config import ServeConfig
from pixrec.errors import InputError, UnavailableError
from pixrec.query import NewItem
from pixrec.serving.backend import Backend, ItemChange, NotStored, Refusal, Versions
from pixrec.serving.bodies import (
    FULL,
    ChangedBody,
    ItemBody,
    ItemChangeBody,
    ItemsBody,
    ItemsStoredBody,
)
from pixrec.serving.edge import check_length, check_picture, decoded, field_error, jsonable, no_store
from pixrec.serving.gate import JsonResponse, unavailable
from pixrec.serving.pictures import read_pictures

IMAGE_MAX_AGE_SECONDS = 3600

# First bytes of the formats a stored picture may have; WebP names itself after its RIFF header.
IMAGE_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def item_routes(backend: Backend, config: ServeConfig, stores: bool) -> APIRouter:
    """stores: whether the server has a store for changes of items."""
    router = APIRouter(prefix="/v1/items")

    # Ids may hold slashes, so the longer pattern has to come first.
    @router.get("/{item_id:path}/image", response_class=Response, responses={200: {"content": {"image/*": {}}}})
    async def item_image(item_id: str, request: Request) -> Response:
        """The item's picture."""
        if request.scope.get("raw_path", b"").lower().endswith(b"%2fimage"):  # the id itself ends in /image
            return await item_fields(f"{item_id}/image")
        data = await backend.image(item_id)
        if data is None:
            raise HTTPException(404, f"item {item_id!r} is unknown or has no picture")
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {
            "ETag": tag,
            "Cache-Control": f"private, max-age={IMAGE_MAX_AGE_SECONDS}",
            "X-Content-Type-Options": "nosniff",
        }
        if _names_tag(request.headers.get("if-none-match", ""), tag):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=image_type(data), headers=headers)

    @router.get("/{item_id:path}", response_model=dict[str, Any])
    async def item_fields(item_id: str) -> Response:
        """Everything the catalog says about the item."""
        fields = await backend.fields(item_id)
        if fields is None:
            raise unknown(item_id)
        return JsonResponse(jsonable(fields))

    @router.post("", response_model=ItemsStoredBody, responses=FULL)
    async def add_items(body: ItemsBody) -> Response:
        """Add items, or put them in the place of those of their ids: from the answer on every replica finds them."""
        if not stores:
            raise no_store()
        check_length("items", len(body.items), config.max_items, "items")
        if len({item.item_id for item in body.items}) < len(body.items):
            raise field_error("items", "an item_id occurs more than once")
        items = {item.item_id: _new(item, config) for item in body.items}
        uris = {item.item_id: item.image_uri for item in body.items if item.image_uri}
        try:
            pictures = await asyncio.to_thread(read_pictures, uris, config) if uris else {}
        except InputError as error:
            raise field_error("items", str(error)) from None
        except UnavailableError as error:
            return unavailable(str(error), config.retry_after_seconds)
        for item_id, image in pictures.items():
            check_picture(image, config, "items")
            items[item_id] = replace(items[item_id], image=image)
        made = _stored(await backend.add_items(items), config)
        return made if isinstance(made, Response) else JsonResponse({"stored": len(items), **vars(made)})

    async def change(item_id: str, changes: ItemChange) -> Response:
        if not stores:
            raise no_store()
        found = await backend.change_item(item_id, changes)
        if found is None:
            raise unknown(item_id)
        made = _stored(found, config)
        return made if isinstance(made, Response) else JsonResponse({"item_id": item_id})

    @router.patch("/{item_id:path}", response_model=ChangedBody)
    async def change_item(item_id: str, body: ItemChangeBody) -> Response:
        """Change columns of an item, such as its price, or whether it is hidden. Its vector stays."""
        fields = dict(body.fields)
        for name in ("item_id", "title", "brand", "category", "description"):
            if name in fields:
                raise field_error("fields", f"{name} is what the vector is made of: send the item to POST /v1/items")
        check_length("fields", _characters(fields), config.max_text_characters, "characters")
        if not fields and body.hidden is None:
            raise field_error("fields", "give columns to change, or hidden")
        return await change(item_id, ItemChange(fields, body.hidden))

    @router.delete("/{item_id:path}", response_model=ChangedBody)
    async def hide_item(item_id: str) -> Response:
        """Hide an item: no request that begins after the answer gets it. `PATCH` with `hidden` false shows it again."""
        return await change(item_id, ItemChange(hidden=True))

    return router


def unknown(item_id: str) -> HTTPException:
    return HTTPException(404, f"item {item_id!r} is unknown")


def image_type(data: bytes) -> str:
    """Media type by the first bytes; the name or the uploader's word is not to be trusted."""
    return next((kind for start, kind in IMAGE_TYPES.items() if data.startswith(start)), "application/octet-stream")


def _new(item: ItemBody, config: ServeConfig) -> NewItem:
    fields = item.model_dump(exclude={"item_id", "image_base64", "image_uri"}, exclude_none=True)
    check_length("items", _characters(fields), config.max_text_characters, "characters of one item")
    if item.image_base64 and item.image_uri:
        raise field_error("items", f"item {item.item_id!r} has both image_base64 and image_uri: give one of them")
    if not item.title and not item.image_base64 and not item.image_uri:
        raise field_error("items", f"item {item.item_id!r} has neither a title nor a picture")
    return NewItem(fields, decoded(item.image_base64, config, "items") if item.image_base64 else None)


def _characters(fields: Mapping[str, Any]) -> int:
    return sum(len(name) + len(str(value)) for name, value in fields.items())


def _stored(found: Versions | Refusal | NotStored, config: ServeConfig) -> Versions | Response:
    """The versions that answered. Raises for what was not stored."""
    if isinstance(found, Refusal):
        raise field_error(found.field, found.message)
    if isinstance(found, NotStored) and found.full:
        raise HTTPException(409, found.message)
    if isinstance(found, NotStored):
        return unavailable(found.message, config.retry_after_seconds)
    return found


def _names_tag(if_none_match: str, tag: str) -> bool:
    return any(offered.strip().removeprefix("W/") in (tag, "*") for offered in if_none_match.split(","))
