from __future__ import annotations

import contextlib
import io
import itertools
import struct
import zlib
from functools import cache

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from pixrec.data.images import (
    PixelBudget,
    decode_image,
    decode_picture,
    largest_side,
    middle,
    shrink_image,
    stored_size,
)
from pixrec.errors import UnreadableImage

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def noise(width: int = 40, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def half_red(kind: str, orientation: int) -> bytes:
    """Upper half red, lower half white, as the camera's sensor saw it."""
    picture = Image.new("RGB", (40, 80), WHITE)
    picture.paste(RED, (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, kind, exif=exif)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


ODD = {
    "cmyk jpeg": (encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), RED),
    "grey jpeg": (encoded(Image.new("L", (9, 9), 128), "JPEG"), (128, 128, 128)),
    "16-bit png": (encoded(Image.fromarray(np.full((9, 9), 0x8000, np.uint16)), "PNG"), (128, 128, 128)),
    "16-bit tiff": (encoded(Image.fromarray(np.full((9, 9), 0xFFFF, np.uint16)), "TIFF"), WHITE),
    "float tiff": (encoded(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), (127, 127, 127)),
    "1-bit png": (encoded(Image.new("1", (9, 9), 1), "PNG"), WHITE),
    "palette png": (encoded(Image.new("RGB", (9, 9), RED).convert("P"), "PNG"), RED),
    "palette png with alpha": (encoded(Image.new("P", (9, 9), 0), "PNG", transparency=0), WHITE),
    "clear png": (encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "PNG"), WHITE),
    "half clear png": (encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "grey and alpha png": (encoded(Image.new("LA", (9, 9), (0, 0)), "PNG"), WHITE),
    "animated gif": (
        encoded(Image.new("RGB", (9, 9), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), WHITE)]),
        RED,
    ),
    "webp": (encoded(Image.new("RGB", (9, 9), RED), "WEBP", lossless=True), RED),
    "avif": (encoded(Image.new("RGB", (16, 16), RED), "AVIF", quality=95), RED),
    "animated webp": (
        encoded(
            Image.new("RGB", (9, 9), RED),
            "WEBP",
            save_all=True,
            lossless=True,
            append_images=[Image.new("RGB", (9, 9))],
        ),
        RED,
    ),
    "mpo": (
        encoded(Image.new("RGB", (16, 16), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
        RED,
    ),
    "tiff of two pages": (
        encoded(Image.new("RGB", (9, 9), RED), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        RED,
    ),
    "cmyk tiff": (encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF"), RED),
    "progressive jpeg": (encoded(Image.new("RGB", (16, 16), RED), "JPEG", progressive=True), RED),
    "rgb jpeg": (encoded(Image.new("RGB", (16, 16), RED), "JPEG", keep_rgb=True), RED),
    "4:2:0 jpeg": (encoded(Image.new("RGB", (400, 300), RED), "JPEG", subsampling=2), RED),
    "bmp": (encoded(Image.new("RGB", (9, 9), RED), "BMP"), RED),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_pictures_decode_to_rgb(case: str):
    data, colour = ODD[case]
    square = decode_image(data, 16)
    assert square.shape == (16, 16, 3)
    assert square.dtype == np.uint8
    assert np.abs(square.astype(int) - colour).max() <= 3, square[0, 0]
    stored = decode_image(shrink_image(data, 8), 16)
    assert np.abs(stored.astype(int) - colour).max() <= 5, stored[0, 0]


WHOLE_JPEG, WHOLE_PNG = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
UNREADABLE = {
    "empty": (b"", "empty"),
    "text": (b"this is no picture", "not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "cut jpeg": (WHOLE_JPEG[:-500], "truncated"),
    "cut jpeg header": (WHOLE_JPEG[:100], "truncated"),
    "cut png": (WHOLE_PNG[:-3000], "truncated"),
    "damaged png": (WHOLE_PNG[:60] + b"\0\0\0" + WHOLE_PNG[63:], "damaged"),
    "large png": (png_claiming(9_000, 9_000), "too many pixels"),
    "larger than Pillow warns of": (png_claiming(12_000, 12_000), "too many pixels"),
    "larger than Pillow opens": (png_claiming(60_000, 60_000), "too many pixels"),
    "12-bit jpeg": (WHOLE_JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "damaged"),
    "cut avif": (encoded(noise(), "AVIF")[:-500], "damaged"),
    "cut webp": (encoded(noise(), "WEBP")[:-500], "damaged"),
    "cut gif": (encoded(noise(), "GIF")[:-500], "truncated"),
    "cut tiff": (encoded(noise(), "TIFF")[:-500], "truncated"),
    "a whole header and no more": (WHOLE_PNG[:8], "damaged"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


def test_a_budget_gives_the_sizes_that_the_library_gives():
    for least, most, side in ((56 * 56, 28 * 28 * 1280, 28), (800, 4096, 8), (65_536, 65_536, 32), (64, 1024, 32)):
        budget = PixelBudget(side, least, most)
        for width, height in itertools.product((1, 7, 28, 41, 100, 131, 199, 640, 1333, 4000), repeat=2):
            if max(width, height) <= 200 * min(width, height):
                assert budget.fit(width, height)[::-1] == smart_resize(height, width, side, least, most)
    assert PixelBudget(28, 56 * 56, 28 * 28 * 4).fit(28, 28000) == (28, 784), "longer than the library takes"
    assert largest_side(PixelBudget(28, 56 * 56, 65_536)) == 252
    assert largest_side(512) == 512


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_keeps_its_aspect_and_stands_upright(form):
    budget = PixelBudget(8, 64, 40 * 40)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 15, 3)).astype(np.uint8)).resize((120, 72), 3)
    for turned in (False, True):
        sink = io.BytesIO()
        notes = Image.Exif()
        notes[0x0112] = 6 if turned else 1
        smooth.save(sink, form, exif=notes)
        found = decode_picture(sink.getvalue(), budget)
        expected = np.asarray(Image.open(io.BytesIO(sink.getvalue())).convert("RGB").resize((48, 24), 3))
        if turned:
            expected = np.rot90(expected, -1)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 4
    assert np.array_equal(decode_picture(sink.getvalue(), 16), decode_image(sink.getvalue(), 16))
    assert stored_size(sink.getvalue()) == (120, 72)


def keep_aspect(data: bytes, size: int) -> np.ndarray:
    return decode_picture(data, PixelBudget(8, 64, size**2))


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("read", [decode_image, shrink_image, keep_aspect])
def test_unreadable_bytes_say_why(case: str, read):
    data, reason = UNREADABLE[case]
    with pytest.raises(UnreadableImage) as raised:
        read(data, 32)
    assert raised.value.reason == reason


def test_the_middle_of_a_picture_fills_its_size():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[5:15, 10:30] = 200
    assert middle(pixels, 0.5).shape == pixels.shape
    assert (middle(pixels, 0.4) > 190).all()
    assert np.array_equal(middle(pixels, 1.0), pixels)


def test_max_pixels_counts_exactly():
    assert decode_image(WHOLE_PNG, 8, max_pixels=40 * 60).shape == (8, 8, 3)
    with pytest.raises(UnreadableImage, match="too many pixels"):
        decode_image(WHOLE_PNG, 8, max_pixels=40 * 60 - 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_camera_orientation_is_undone(kind: str):
    red_edges = {1: "top", 3: "bottom", 6: "right", 8: "left"}
    edges = {"top": np.s_[0, :], "bottom": np.s_[-1, :], "left": np.s_[:, 0], "right": np.s_[:, -1]}
    for orientation, red in red_edges.items():
        data = half_red(kind, orientation)
        stored = shrink_image(data, 30)
        width, height = Image.open(io.BytesIO(stored)).size
        assert (width > height) == (orientation in (6, 8))
        kept = decode_picture(data, PixelBudget(8, 64, 2048))
        assert kept.shape[:2] == ((32, 64) if orientation in (6, 8) else (64, 32))
        for square in (decode_image(data, 8), decode_image(stored, 8), kept):
            assert square[edges[red]][:, 1].max() < 60, f"{orientation}: {red} edge must be red"
            opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}[red]
            assert square[edges[opposite]][:, 1].min() > 200


@cache
def photograph(side_px: int, **options) -> bytes:
    """A JPEG with the spectrum of a photograph (amplitude falls with frequency), colours paler than its lights."""
    frequency = np.hypot(np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None])
    frequency[0, 0] = 1
    white = np.random.default_rng(3).standard_normal((3, side_px, side_px))
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency**1.2, s=(side_px, side_px))
    channels = 128 + np.array([40, 12, 12])[:, None, None] * noise / noise.std(axis=(1, 2), keepdims=True)
    pixels = np.moveaxis(np.clip(channels, 0, 255).astype(np.uint8), 0, -1).copy()
    return encoded(Image.fromarray(pixels, "YCbCr").convert("RGB"), "JPEG", **{"quality": 90, **options})


def plainly(data: bytes, size: int) -> np.ndarray:
    """The slow twin of `decode_image`, and what the backbones' processors do: every pixel, then bicubic."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 75}], ids=str)
@pytest.mark.parametrize("size", [64, 224, 384, 512, 999, 1200])
def test_fast_decoding_stays_close_to_full_decoding(size: int, options: dict):
    data = photograph(1000, **options)
    apart = np.abs(decode_image(data, size).astype(int) - plainly(data, size))
    assert apart.mean() < 3.0  # of 255
    assert np.percentile(apart, 99) < 12


def test_without_scaling_the_pixels_are_pillows():
    data = photograph(300)
    assert np.array_equal(decode_image(data, 300), plainly(data, 300))
    for size in (299, 64, 350):
        png = encoded(Image.open(io.BytesIO(data)), "PNG")
        assert np.abs(decode_image(png, size).astype(int) - plainly(png, size)).max() <= (2 if size > 100 else 9)


def test_a_jpeg_is_decoded_at_the_smallest_eighths_that_cover(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def decode(*arguments, **options):
        seen.append(real(*arguments, **options))
        return seen[-1]

    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    data = encoded(noise(1000, 500), "JPEG")
    for size, (height, width) in {
        62: (63, 125),
        63: (125, 250),
        64: (125, 250),
        224: (250, 500),
        301: (313, 625),
    }.items():
        assert decode_image(data, size).shape == (size, size, 3)
        assert seen.pop().shape == (height, width, 3)


@pytest.mark.parametrize(
    "shape", [(787, 635), (437, 633), (699, 2), (1, 400), (9, 9), (5, 7), (1, 1), (17, 16)], ids=str
)
def test_sides_that_eight_does_not_divide_shift_nothing(shape: tuple[int, int]):
    """A picture's last block is filled up; the filling must not count as picture."""
    across, down = np.meshgrid(np.linspace(0, 255, shape[0]), np.linspace(0, 255, shape[1]))
    pixels = np.stack([across, down, np.full_like(across, 9)], -1).astype(np.uint8)
    data = encoded(Image.fromarray(pixels), "JPEG", quality=98, subsampling=0)
    for size in (3, 8, 53, 64, 200, 319):
        assert np.abs(decode_image(data, size).astype(int) - plainly(data, size)).max() <= 6, size


def test_what_libjpeg_turbo_refuses_pillow_decides():
    data = photograph(64)
    marker = data.index(b"\xff\xc0")
    junk = data[:marker] + b"\1\2\3\4" + data[marker:]  # superfluous bytes before a marker: a warning, no harm
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(junk)
    assert np.array_equal(decode_image(junk, 64), plainly(data, 64))
    assert decode_image(shrink_image(junk, 64), 64).shape == (64, 64, 3)


def test_a_header_that_hides_the_size_is_not_believed():
    small, large = photograph(16), photograph(64)
    frame = small[small.index(b"\xff\xc0") : small.index(b"\xff\xc0") + 19]
    at = large.index(b"\xff\xc0")
    for data in (large[:at] + frame + large[at:], large[: at + 19] + frame + large[at + 19 :]):
        with pytest.raises(UnreadableImage):
            decode_image(data, 32)


def test_damaged_camera_notes_cost_no_picture():
    data = bytearray(half_red("JPEG", 6))
    notes = data.index(b"Exif") + 6
    for place in range(notes, notes + 26):
        for value in (0, 255):
            damaged = bytes([*data[:place], value, *data[place + 1 :]])
            assert decode_image(damaged, 8).shape == (8, 8, 3)
            assert shrink_image(damaged, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "BMP"])
def test_damage_anywhere_is_a_picture_or_unreadable(kind: str):
    whole = encoded(noise(40, 40), kind)
    random = np.random.default_rng(5)
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 4):
            data[place] = random.integers(256)
        damaged = bytes(data[: random.integers(1, len(data) + 1)] if random.random() < 0.5 else data)
        for read in (decode_image, shrink_image):
            with contextlib.suppress(UnreadableImage):
                read(damaged, 16, max_pixels=100_000)


def test_shrinking_keeps_the_aspect_and_never_enlarges():
    assert Image.open(io.BytesIO(shrink_image(encoded(noise(400, 200), "PNG"), 100))).size == (100, 50)
    assert Image.open(io.BytesIO(shrink_image(encoded(noise(40, 20), "PNG"), 100))).size == (40, 20)
    assert Image.open(io.BytesIO(shrink_image(encoded(noise(1000, 1), "PNG"), 100))).size == (100, 1)


def test_a_small_upright_baseline_jpeg_is_stored_as_it_is():
    assert shrink_image(WHOLE_JPEG, 60) == WHOLE_JPEG
    assert shrink_image(WHOLE_JPEG, 59) != WHOLE_JPEG
    rotated = half_red("JPEG", 6)
    assert shrink_image(rotated, 100) != rotated
    progressive = encoded(noise(), "JPEG", progressive=True)  # takes more than twice as long to decode
    assert "progressive" not in Image.open(io.BytesIO(shrink_image(progressive, 60))).info
