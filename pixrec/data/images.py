"""Bytes to pictures. The one decoder of PixRec: preparing, embedding and serving all see the same pixels.

Knows Pillow and where a picture may lie; knows no table and no model. Whatever the bytes are, the answer is a
picture or UnreadableImage with one of the reasons below.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pixrec import storage
from pixrec.errors import InputError, UnreadableImage
from pixrec.schema import MISSING, OK, REJECTED

# Reasons of UnreadableImage.
EMPTY, NOT_A_PICTURE, TRUNCATED, DAMAGED = "empty", "not a picture", "truncated", "damaged"
TOO_MANY_PIXELS = "too many pixels"
# Further reasons why an item's picture is rejected or missing.
TOO_LARGE, NOT_FOUND, NOT_READ = "file too large", "file not found", "file cannot be read"
NOT_FETCHED = "http pictures are not fetched"

MAX_PIXELS = 64_000_000

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "MPO", "AVIF")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow shrinks by a whole factor first while the picture is more than this times too large, then resamples;
# its documentation calls the result of 3 indistinguishable from resampling alone.
_REDUCING_GAP = 3.0


def decode_image(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 `(size, size, 3)`, RGB: the first frame, upright, on white where it is transparent.

    The aspect is not kept: the square is filled, as the backbones' own processors do.
    Raises UnreadableImage, for a picture of more than `max_pixels` before a pixel is decoded.
    """
    with _opened(data, max_pixels) as picture:
        picture.draft("RGB", (size, size))  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below (size, size)
        picture.load()
        square = _rgb(picture).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
        return np.array(_upright(square, _orientation(picture)), dtype=np.uint8)


def shrink_image(data: bytes, longest_side_px: int, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The picture as a JPEG of at most `longest_side_px` on its longer side, aspect kept, never enlarged.

    A JPEG that is upright and small enough comes back as it is, so preparing twice loses nothing.
    Raises UnreadableImage as `decode_image` does.
    """
    with _opened(data, max_pixels) as picture:
        is_small = max(picture.size) <= longest_side_px
        picture.draft("RGB", _fitted(picture.size, longest_side_px))
        picture.load()
        orientation = _orientation(picture)
        if is_small and picture.format == "JPEG" and picture.mode in ("RGB", "L") and orientation not in _UPRIGHT:
            return data
        small = _rgb(picture)
        if not is_small:
            target = _fitted(small.size, longest_side_px)
            small = small.resize(target, Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
        sink = io.BytesIO()
        _upright(small, orientation).save(sink, "JPEG", quality=92, subsampling=0)  # 0: full colour, 4:4:4
        return sink.getvalue()


class Picture(NamedTuple):
    """What became of an item's picture: `data` when `status` is ok, else why, where there is something to say."""

    data: bytes | None
    status: str
    reason: str | None = None


def load_picture(
    data: bytes | None, uri: str | None, folder: str, longest_side_px: int, *, max_bytes: int, max_pixels: int
) -> Picture:
    """An item's picture, shrunk for storage, from its bytes or from its URI (relative ones start at `folder`).

    Never raises for what a row can hold: one bad picture costs one picture.
    """
    if data is None:
        if not uri:
            return Picture(None, MISSING)
        if uri.startswith(("http://", "https://")):
            return Picture(None, REJECTED, NOT_FETCHED)
        try:
            data = storage.read_bytes(storage.resolve(uri, folder), max_bytes)
        except FileNotFoundError:
            return Picture(None, MISSING, NOT_FOUND)
        except InputError as error:
            return Picture(None, REJECTED, TOO_LARGE if "larger than" in str(error) else NOT_READ)
        except Exception:  # a file system may raise anything of its own; the row says so and the job goes on
            return Picture(None, REJECTED, NOT_READ)
    if len(data) > max_bytes:
        return Picture(None, REJECTED, TOO_LARGE)
    try:
        return Picture(shrink_image(data, longest_side_px, max_pixels=max_pixels), OK)
    except UnreadableImage as error:
        return Picture(None, REJECTED, error.reason)


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture, header read and size checked; whatever goes wrong inside the block becomes UnreadableImage."""
    if not data:
        raise UnreadableImage(EMPTY)
    # Pillow's own remarks on a stranger's file are no news to our user. Not `catch_warnings`: that swaps global
    # state and is not safe where a server decodes in threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as picture:
            if picture.width * picture.height > max_pixels:
                raise UnreadableImage(TOO_MANY_PIXELS)
            yield picture
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(NOT_A_PICTURE) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(TOO_MANY_PIXELS) from None
    except Exception as error:  # hostile bytes make decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        raise UnreadableImage(TRUNCATED if "truncated" in str(error).lower() else DAMAGED) from None


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # AVIF came to Pillow late


def _fitted(size: tuple[int, int], longest_side_px: int) -> tuple[int, int]:
    scale = min(1.0, longest_side_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _orientation(picture: Image.Image) -> int:
    """Asked after loading: TIFF turns itself upright then and drops the tag; PNG may hold it behind its pixels."""
    try:
        return picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged camera data is no reason to lose a good picture
        return 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: deep greys scaled down rather than clipped, transparency on white."""
    if picture.mode.startswith("I"):  # "I;16" and its byte orders; "I" where a format widens 16 bits to 32
        deep = np.asarray(picture, dtype=np.int64).clip(0, 65535)
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        values = values * 255 if values.max() <= 1 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")
