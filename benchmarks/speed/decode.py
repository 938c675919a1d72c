"""`decode_image` beside a full decode with bicubic resampling, beside libjpeg-turbo alone, and from stored pictures."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.timing import Row, seconds_each
from pixrec.config import PrepareConfig
from pixrec.data.images import decode_image, shrink_image

NUM_PICTURES = 8
SIDE_PX = 1000
TARGETS_PX = (224, 512)
STORED_PX = PrepareConfig().image_size_px

Decoder = Callable[[bytes], object]


def run() -> list[Row]:
    light, heavy = ([photograph(seed, fall) for seed in range(NUM_PICTURES)] for fall in (1.5, 1.2))
    stored = [shrink_image(data, STORED_PX) for data in light]
    rows = [row for pictures in (light, heavy) for size in TARGETS_PX for row in _decoding(pictures, size)]
    for size in (64, 224):
        ours, full = (functools.partial(decode, size=size) for decode in (decode_image, _full))
        rates = _rates({"stored": (ours, stored), "fresh": (ours, light), "full": (full, light)})
        what = f"an epoch's decoding to {size} px, stored once at {STORED_PX} px"
        rows.append(Row(what, rates["stored"], "decode_image of the photographs", rates["fresh"], "pictures/s"))
        rows.append(Row(what, rates["stored"], "PIL full decode of them", rates["full"], "pictures/s"))
    return rows


def _decoding(pictures: list[bytes], size: int) -> list[Row]:
    ours, full = (functools.partial(decode, size=size) for decode in (decode_image, _full))
    bare = functools.partial(simplejpeg.decode_jpeg, min_height=size, min_width=size)
    rates = _rates({"ours": (ours, pictures), "full": (full, pictures), "bare": (bare, pictures)})
    apart = np.mean([np.abs(ours(data).astype(int) - full(data)).mean() for data in pictures])
    what = f"decode_image, {SIDE_PX} px JPEG of {np.mean([len(data) for data in pictures]) / 1000:.0f} KB to {size} px"
    note = f"pixels differ by {apart:.2f} of 255 on average"
    return [
        Row(what, rates["ours"], "PIL full decode, bicubic", rates["full"], "pictures/s", note),
        Row(what, rates["ours"], "libjpeg-turbo scaled decode alone", rates["bare"], "pictures/s"),
    ]


def _rates(work: dict[str, tuple[Decoder, list[bytes]]]) -> dict[str, float]:
    """Pictures a second of each decoder."""
    calls = {name: functools.partial(_all, decode, pictures) for name, (decode, pictures) in work.items()}
    return {name: NUM_PICTURES / seconds for name, seconds in seconds_each(calls, clock=time.process_time).items()}


def _full(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _all(decode: Decoder, pictures: list[bytes]) -> None:
    for data in pictures:
        decode(data)


def photograph(seed: int, fall: float = 1.5) -> bytes:
    """A JPEG of noise whose amplitude falls with frequency f as f**-fall, and whose colour varies less than its light
    (standard deviations 12 and 40). 1.5 makes 1.6 bits a pixel, 1.2 twice that, which is a lot: the more bits, the
    more of the time goes into Huffman decoding, which no scaling saves.
    """
    frequency = np.hypot(np.fft.fftfreq(SIDE_PX)[:, None], np.fft.rfftfreq(SIDE_PX)[None])
    frequency[0, 0] = 1
    white = np.fft.rfft2(np.random.default_rng(seed).standard_normal((3, SIDE_PX, SIDE_PX)))
    noise = np.fft.irfft2(white / frequency**fall, s=(SIDE_PX, SIDE_PX))
    channels = 128 + np.array([40, 12, 12])[:, None, None] * noise / noise.std(axis=(1, 2), keepdims=True)
    pixels = np.moveaxis(np.clip(channels, 0, 255).astype(np.uint8), 0, -1)
    sink = io.BytesIO()
    Image.fromarray(pixels.copy(), "YCbCr").convert("RGB").save(sink, "JPEG", quality=90)
    return sink.getvalue()
