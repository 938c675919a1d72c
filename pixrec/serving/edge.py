"""What all routes check and answer in the same way. Knows no route and no backend."""

from __future__ import annotations

import base64
import io
import math
import sys
import warnings
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError

from pixrec.config import ServeConfig

NO_STORE = "this server stores no events and no items: set serve.store"


def jsonable(value: Any) -> Any:
    """`value` with NaN and infinities as null, and anything JSON has no word for as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    return str(value)


def check_length(field: str, length: int, most: int, unit: str) -> None:
    if length > most:
        raise field_error(field, f"{field} holds {length} {unit}: at most {most}")


def decoded(image_base64: str, config: ServeConfig, field: str = "image_base64") -> bytes:
    try:
        image = base64.b64decode(image_base64, validate=True)
    except ValueError:
        raise field_error(field, "image_base64 is not base64") from None
    check_picture(image, config, field)
    return image


def check_picture(image: bytes, config: ServeConfig, field: str) -> None:
    """Refuse what is too large, before it is decoded."""
    check_length(field, len(image), config.max_image_bytes, "bytes of a picture")
    check_length(field, _pixels(image), config.max_image_pixels, "pixels")


def _pixels(image: bytes) -> int:
    """The size that a picture claims to have; 0 where that cannot be read, which decoding will say better."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(image)) as opened:
            return opened.width * opened.height
    except Image.DecompressionBombError:
        return sys.maxsize
    except (OSError, ValueError, SyntaxError):
        return 0


def field_error(field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": ("body", field), "msg": message}])


def no_store() -> HTTPException:
    return HTTPException(404, NO_STORE)
