"""What a machine says about itself, for `doctor`: versions, clock, pictures, disk, and which places it reaches. Plain
functions that run on every node; knows neither the cluster nor what a run needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from PIL import Image

from pixrec import __version__, storage
from pixrec.data.images import DECODER, decode_image
from pixrec.errors import PixRecError

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "numpy", "pillow", "simplejpeg", "pylance")
"""Packages whose versions decide what is computed, or whether processes understand each other."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")

Access = Literal["read", "write"]


def look(places: Mapping[str, Access], tokens: Mapping[str, str]) -> dict[str, Any]:
    """All that one node knows. `tokens`: a file for each local place to write to, which the driver has left there."""
    return {
        "versions": versions(),
        "pictures": {form: fault for form in FORMATS if (fault := picture_fault(form))},
        "cache": cache_facts(),
        "places": {
            place: fault for place, access in places.items() if (fault := place_fault(place, access, tokens.get(place)))
        },
    }


def clock() -> float:
    """Seconds since the epoch."""
    return time.time()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "pixrec": __version__, "picture decoder": str(DECODER)}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def picture_fault(form: str) -> str | None:
    """Why a picture of this format cannot be read here."""
    sink = io.BytesIO()
    try:
        Image.new("RGB", (8, 8), (200, 40, 40)).save(sink, form)
        decode_image(sink.getvalue(), 8)
    except (KeyError, OSError, PixRecError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def cache_facts() -> dict[str, Any]:
    """Where the node keeps copies (PIXREC_CACHE), and how much of that disk is free."""
    try:
        place = storage.node_place(f"probe-{uuid.uuid4().hex[:8]}").rpartition("/")[0]
        usage = shutil.disk_usage(place)
        return {"place": place, "free": usage.free, "share_used": usage.used / usage.total}
    except OSError as error:
        return {"fault": str(error)}


def ground(place: str) -> str:
    """The nearest folder at or above a local place that is there, so that looking makes none; an s3:// place itself."""
    while not storage.is_remote(place) and not storage.is_folder(place):
        place = storage.parent(place)
    return place


def place_fault(place: str, access: Access, token: str | None = None) -> str | None:
    """Why a place cannot be read, or written, from here. `token`: a file of the driver's that must be seen there."""
    try:
        if access == "write":
            if token is not None and not storage.exists(token):
                return "it is another folder there than for the driver"
            probe = storage.join(ground(place), f".pixrec-probe-{uuid.uuid4().hex[:8]}")
            storage.write_bytes(probe, b"probe")
            storage.remove(probe)
        elif not storage.exists(place):
            return "it is not there"
    except (PixRecError, OSError) as error:
        return str(error)
    return None
