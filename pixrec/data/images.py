"""Bytes to pictures. The one decoder of PixRec: preparing, training, embedding and serving all see the same pixels.

Knows Pillow and libjpeg-turbo; knows no table, no model and no place where pictures lie. Whatever the bytes are, the
answer is a picture or UnreadableImage with one of the reasons below.

JPEGs, which nearly all photographs of a catalog are, go through libjpeg-turbo, which decodes at M/8 of the full size
for M = 1 .. 8: the smallest that still covers what is wanted. Pillow's own `draft` knows 1, 2, 4 and 8 eighths only,
so that 1000 px cost a full decode on the way to 512. What libjpeg-turbo refuses (CMYK, anything damaged) goes to
Pillow.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pixrec.errors import UnreadableImage

DECODER = "turbo-m8-bicubic-1"
"""Names the way from bytes to pixels, and is part of every item's content hash. Change it whenever `decode_image` gives
other pixels: vectors in an index that were made from the old ones are then computed again."""

# Reasons of UnreadableImage.
EMPTY, NOT_A_PICTURE, TRUNCATED, DAMAGED = "empty", "not a picture", "truncated", "damaged"
TOO_MANY_PIXELS = "too many pixels"

MAX_PIXELS = 64_000_000

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "MPO", "AVIF")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_JPEG, _APP1, _START_OF_SCAN, _ORIENTATION_TAG = b"\xff\xd8\xff", 0xE1, 0xDA, 0x0112
# Pillow shrinks by a whole factor first while the picture is more than this times too large, then resamples;
# its documentation calls the result of 3 indistinguishable from resampling alone.
_REDUCING_GAP = 3.0
_MOST_ELONGATED = 200  # a longer picture is squeezed; the library refuses it
# How pictures are stored. At 256 px a photograph decodes to 224 px in 0.58 ms and differs from the unstored one by 2.9
# of 255 on average; 4:2:0 takes 0.43 ms and differs by 3.9, quality 85 takes 0.52 ms and differs by 3.7; PNG takes
# 1.8 ms, and 0.9 ms where JPEG takes 0.43 ms on flat drawings; a progressive JPEG 1.4 ms.
_STORED = {"quality": 92, "subsampling": 0}  # 0: full colour, 4:4:4


class _Decoded(NamedTuple):
    pixels: np.ndarray
    """uint8 (H, W, 3), RGB."""
    extent: tuple[float, float]
    """How much of W and H the picture takes: 100 px at 1/8 fill 12.5 of 13 columns."""
    orientation: int
    """As the camera wrote it; 1 is upright."""


@dataclass(frozen=True)
class PixelBudget:
    """Sizes of pictures whose aspect is kept: sides are multiples of `side_px`, and as long as the picture's own where
    the number of pixels lies within the bounds. The rule of Qwen2-VL's processor (`smart_resize` of transformers)."""

    side_px: int
    min_pixels: int
    """A picture of fewer is enlarged."""
    max_pixels: int
    """A picture of more is shrunk."""

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, in px, that a picture is given."""
        side, longest = self.side_px, max(width, height)
        sides = [max(length, longest / _MOST_ELONGATED) for length in (width, height)]
        fitted = [round(length / side) * side for length in sides]
        if math.prod(fitted) > self.max_pixels:
            scale = math.sqrt(math.prod(sides) / self.max_pixels)
            fitted = [max(side, math.floor(length / scale / side) * side) for length in sides]
        elif math.prod(fitted) < self.min_pixels:
            scale = math.sqrt(self.min_pixels / math.prod(sides))
            fitted = [math.ceil(length * scale / side) * side for length in sides]
        return fitted[0], fitted[1]


PictureSize = int | PixelBudget
"""What a backbone takes: squares of one side in px, or any picture within a budget."""


def size_settings(size: PictureSize) -> dict[str, Any]:
    """How a processor's file says what pictures are decoded to."""
    if isinstance(size, int):
        return {"size": {"height": size, "width": size}}
    limits = {"shortest_edge": size.min_pixels, "longest_edge": size.max_pixels}
    return {"size": limits, "patch_size": size.side_px, "merge_size": 1}


def read_size(settings: dict[str, Any]) -> PictureSize:
    """What `size_settings` said."""
    size = settings["size"]
    if "height" in size:
        return int(size["height"])
    return PixelBudget(settings["patch_size"], size["shortest_edge"], size["longest_edge"])


def largest_side(size: PictureSize) -> int:
    """The side in px of the largest square that is taken."""
    return size if isinstance(size, int) else math.isqrt(size.max_pixels) // size.side_px * size.side_px


def decode_picture(data: bytes, size: PictureSize, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 `(height, width, 3)` as a backbone takes it: `decode_image`, or with the aspect kept."""
    if isinstance(size, int):
        return decode_image(data, size, max_pixels=max_pixels)
    stored = stored_size(data, max_pixels=max_pixels)
    target = size.fit(*stored)
    if (decoded := _scaled_jpeg(data, target, max_pixels)) is None:
        with _opened(data, max_pixels) as picture:
            decoded = _loaded(picture, target)
            if picture.size == stored[::-1]:  # a TIFF that was turned while it was loaded
                target = target[::-1]
    return np.ascontiguousarray(_upright(_resized(decoded, target), decoded.orientation))


def stored_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as they are stored, whichever side is up. Raises UnreadableImage, as for `decode_image`."""
    with _opened(data, max_pixels) as picture:
        return picture.size


def decode_image(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 `(size, size, 3)`, RGB: the first frame, upright, on white where it is transparent.

    The aspect is not kept: the square is filled, as the backbones' own processors do.
    Raises UnreadableImage, for a picture of more than `max_pixels` before a pixel is decoded.
    """
    if (decoded := _scaled_jpeg(data, (size, size), max_pixels)) is None:
        with _opened(data, max_pixels) as picture:
            decoded = _loaded(picture, (size, size))
    return np.ascontiguousarray(_upright(_resized(decoded, (size, size)), decoded.orientation))


def middle(pixels: np.ndarray, share: float) -> np.ndarray:
    """The middle of a decoded picture (height, width, 3), `share` of each of its sides, at the size of the whole."""
    height, width, _ = pixels.shape
    edge = (1 - share) / 2
    box = (edge * width, edge * height, (1 - edge) * width, (1 - edge) * height)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box))


def shrink_image(data: bytes, longest_side_px: int, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The picture as a JPEG of at most `longest_side_px` on its longer side, aspect kept, never enlarged.

    An upright baseline JPEG that is small enough comes back as it is, so preparing twice loses nothing.
    Raises UnreadableImage as `decode_image` does.
    """
    with _opened(data, max_pixels) as picture:
        size = picture.size
        target = _fitted(size, longest_side_px)
        fast = _scaled_jpeg(data, target, max_pixels)
        if fast and size == target and fast.orientation == 1 and "progressive" not in picture.info:
            return data
        decoded = fast or _loaded(picture, target)
    small = Image.fromarray(decoded.pixels)
    if size != target:
        target = _fitted(decoded.extent, longest_side_px)
        small = small.resize(target, Image.Resampling.BICUBIC, (0, 0, *decoded.extent), reducing_gap=_REDUCING_GAP)
    sink = io.BytesIO()
    Image.fromarray(_upright(np.asarray(small), decoded.orientation)).save(sink, "JPEG", **_STORED)
    return sink.getvalue()


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture, header read and size checked; whatever goes wrong inside the block becomes UnreadableImage."""
    if not data:
        raise UnreadableImage(EMPTY)
    # Pillow's warnings about a stranger's file do not help our user. Not `catch_warnings`: that swaps global state and
    # is not safe where a server decodes in threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as picture:
            if picture.width * picture.height > max_pixels:
                raise UnreadableImage(TOO_MANY_PIXELS)
            yield picture
    except UnreadableImage:
        raise
    except UnidentifiedImageError:  # also where a format that Pillow knows fails at its header
        raise UnreadableImage(DAMAGED if _looks_like_a_picture(data) else NOT_A_PICTURE) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(TOO_MANY_PIXELS) from None
    except Exception as error:  # hostile bytes make decoders raise OSError, SyntaxError, struct.error, zlib.error ...
        raise UnreadableImage(TRUNCATED if "truncated" in str(error).lower() else DAMAGED) from None


def _looks_like_a_picture(data: bytes) -> bool:
    return data.startswith(_SIGNATURES) or data[4:12] in (b"ftypavif", b"ftypavis") or data[8:12] == b"WEBP"


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]  # AVIF came to Pillow late


def _scaled_jpeg(data: bytes, least: tuple[int, int], max_pixels: int) -> _Decoded | None:
    """A JPEG at the smallest M/8 that covers `least` (width, height); None where Pillow must look at it.

    Pillow is not asked for the header: that would take 2 % of the time of a decode to 224 px. Faster chroma upsampling
    and a faster DCT would gain less than 1 % each at these scales.
    """
    if not data.startswith(_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels:
            raise UnreadableImage(TOO_MANY_PIXELS)
        if colours not in ("YCbCr", "RGB", "Gray"):  # the inks of CMYK are Pillow's business
            return None
        eighths = _eighths((width, height), least)
        covered = (
            {} if eighths == 8 else {"min_width": -(-width * eighths // 8), "min_height": -(-height * eighths // 8)}
        )
        pixels = simplejpeg.decode_jpeg(data, "RGB", **covered)
    except ValueError:
        return None
    return _Decoded(pixels, (width * eighths / 8, height * eighths / 8), _jpeg_orientation(data))


def _eighths(size: tuple[int, int], least: tuple[int, int]) -> int:
    """The smallest M at which M/8 of `size` is no less than `least`, both (width, height); 8 where none is.

    The decoder is told sides, rounded up. They tell the Ms apart from 8 px on, so that smaller pictures stay whole.
    """
    enough = (m for m in range(1, 8) if all(side * m >= 8 * wanted for side, wanted in zip(size, least, strict=True)))
    return next(enough, 8) if max(size) >= 8 else 8


def _jpeg_orientation(data: bytes) -> int:
    """Walks the segments of a JPEG up to the pixels, in search of the camera's notes."""
    at = 2
    while len(data) >= at + 10 and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        if data[at + 1] == _APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _orientation(functools.partial(_notes, data[at + 4 : at + 2 + _length(data, at)]))
        at += 2 + _length(data, at)
    return 1


def _length(data: bytes, at: int) -> int:
    """Of the segment whose marker stands at `at`, marker left out."""
    return int.from_bytes(data[at + 2 : at + 4], "big")


def _notes(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data)
    return exif


def _loaded(picture: Image.Image, least: tuple[int, int]) -> _Decoded:
    """Any picture, at least as large as `least` (width, height) where it is that large itself."""
    drafted = picture.draft("RGB", least)  # the JPEGs that came here can still be shrunk a little
    picture.load()
    rgb = _rgb(picture)
    extent = drafted[1][2:] if drafted else rgb.size
    factor = int(min(side / (wanted * _REDUCING_GAP) for side, wanted in zip(rgb.size, least, strict=True)))
    # The orientation is asked after loading: TIFF turns itself upright then and drops the tag, PNG may hold it behind.
    if factor > 1:
        rgb, extent = rgb.reduce(factor), (extent[0] / factor, extent[1] / factor)
    return _Decoded(np.array(rgb, dtype=np.uint8), extent, _orientation(picture.getexif))


def _orientation(read_notes: Callable[[], Image.Exif]) -> int:
    """1 to 8 as the camera wrote it; 1 is upright."""
    try:
        orientation = read_notes().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged notes are no reason to lose a good picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def _resized(decoded: _Decoded, size: tuple[int, int]) -> np.ndarray:
    """uint8 (height, width, 3) of `size` (width, height), bicubic with antialiasing: Pillow's values but for
    rounding, in a fifth of its time (625 to 512 px: 0.6 ms beside 3.3 ms), which would eat half of what scaled decoding
    gains."""
    width, height = decoded.extent
    if (width, height) == size:
        return decoded.pixels
    import torch  # here: workers that only prepare never resize to a square, and torch takes seconds to import

    batch = torch.from_numpy(decoded.pixels)[None].permute(0, 3, 1, 2)  # so that torch sees: channels come last
    # What `interpolate(mode="bicubic", antialias=True)` calls; here the scales can differ from those of the arrays.
    resize = torch.ops.aten._upsample_bicubic2d_aa
    return resize(batch, [size[1], size[0]], False, size[1] / height, size[0] / width)[0].permute(1, 2, 0).numpy()


def _fitted(size: tuple[float, float], longest_side_px: int) -> tuple[int, int]:
    scale = min(1.0, longest_side_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) as the photographer saw it. 5 to 8 lie on their side; of every four, three are mirrored or turned."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


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
