"""`decode_image`, which lets the JPEG decoder shrink, beside decoding every pixel and resampling then."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

from benchmarks.timing import Row, seconds_each
from pixrec.data.images import decode_image

NUM_PICTURES = 8
SIDE_PX = 1000
TARGETS_PX = (224, 512)


def run() -> list[Row]:
    pictures = _pictures()
    rows = []
    for size in TARGETS_PX:
        decoders = {"ours": functools.partial(decode_image, size=size), "theirs": functools.partial(_plain, size=size)}
        taken = seconds_each({name: functools.partial(_all, decode, pictures) for name, decode in decoders.items()})
        apart = [np.abs(decode_image(data, size).astype(int) - _plain(data, size)).mean() for data in pictures]
        rows.append(
            Row(
                what=f"decode_image, {SIDE_PX} px JPEG to {size} px",
                ours=NUM_PICTURES / taken["ours"],
                alternative="PIL full decode, bicubic",
                theirs=NUM_PICTURES / taken["theirs"],
                unit="pictures/s",
                note=f"pixels differ by {np.mean(apart):.2f} of 255 on average",
            )
        )
    return rows


def _plain(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _all(decode: functools.partial[np.ndarray], pictures: list[bytes]) -> list[np.ndarray]:
    return [decode(data) for data in pictures]


def _pictures() -> list[bytes]:
    """JPEGs of noise whose spectrum falls with the frequency as that of photographs does: 1 / f in amplitude."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE_PX)[:, None], np.fft.rfftfreq(SIDE_PX)[None])
    frequency[0, 0] = 1
    pictures = []
    for _ in range(NUM_PICTURES):
        spectrum = np.fft.rfft2(rng.standard_normal((3, SIDE_PX, SIDE_PX))) / frequency
        noise = np.fft.irfft2(spectrum, s=(SIDE_PX, SIDE_PX))
        pixels = np.clip(128 + 48 * noise / noise.std(), 0, 255).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(np.moveaxis(pixels, 0, -1)).save(sink, "JPEG", quality=90)
        pictures.append(sink.getvalue())
    return pictures
