from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixrec.data.images import decode_image, load_picture, shrink_image
from pixrec.errors import UnreadableImage

RED, WHITE = (255, 0, 0), (255, 255, 255)
LIMITS = {"max_bytes": 100_000, "max_pixels": 1_000_000}


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
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("read", [decode_image, shrink_image])
def test_unreadable_bytes_say_why(case: str, read):
    data, reason = UNREADABLE[case]
    with pytest.raises(UnreadableImage) as raised:
        read(data, 32)
    assert raised.value.reason == reason


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
        for square in (decode_image(data, 8), decode_image(stored, 8)):
            assert square[edges[red]][:, 1].max() < 60, f"{orientation}: {red} edge must be red"
            opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}[red]
            assert square[edges[opposite]][:, 1].min() > 200


def test_scaled_jpeg_decoding_looks_like_full_decoding():
    across, down = np.meshgrid(np.linspace(0, 255, 1000), np.linspace(0, 255, 1000))
    picture = Image.fromarray(np.stack([across, down, np.full_like(across, 9)], -1).astype(np.uint8))
    data = encoded(picture, "JPEG", quality=95)
    full = np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC))
    assert np.abs(decode_image(data, 64).astype(int) - full).mean() < 1.0


def test_shrinking_keeps_the_aspect_and_never_enlarges():
    assert Image.open(io.BytesIO(shrink_image(encoded(noise(400, 200), "PNG"), 100))).size == (100, 50)
    assert Image.open(io.BytesIO(shrink_image(encoded(noise(40, 20), "PNG"), 100))).size == (40, 20)
    assert Image.open(io.BytesIO(shrink_image(encoded(noise(1000, 1), "PNG"), 100))).size == (100, 1)


def test_a_small_upright_jpeg_is_stored_as_it_is():
    assert shrink_image(WHOLE_JPEG, 60) == WHOLE_JPEG
    assert shrink_image(WHOLE_JPEG, 59) != WHOLE_JPEG
    rotated = half_red("JPEG", 6)
    assert shrink_image(rotated, 100) != rotated


def test_load_picture_from_a_file_beside_the_table(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(WHOLE_JPEG)
    for uri in ("images/1.jpg", "../images/1.jpg", str(tmp_path / "images" / "1.jpg")):
        folder = tmp_path / "images" if uri.startswith("..") else tmp_path
        assert load_picture(None, uri, str(folder), 64, **LIMITS) == (WHOLE_JPEG, "ok", None)


def test_load_picture_never_raises_for_a_row(tmp_path: Path):
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "huge.jpg").write_bytes(b"\xff" * 100_001)
    (tmp_path / "folder.jpg").mkdir()
    expected = {
        None: ("missing", None),
        "": ("missing", None),
        "nowhere.jpg": ("missing", "file not found"),
        "folder.jpg": ("missing", "file not found"),
        "text.jpg/below.jpg": ("missing", "file not found"),
        "text.jpg": ("rejected", "not a picture"),
        "huge.jpg": ("rejected", "file too large"),
        "http://example.com/1.jpg": ("rejected", "http pictures are not fetched"),
        "ftp://example.com/1.jpg": ("rejected", "file cannot be read"),
        "nul\0.jpg": ("rejected", "file cannot be read"),
    }
    for uri, (status, reason) in expected.items():
        assert load_picture(None, uri, str(tmp_path), 64, **LIMITS) == (None, status, reason), uri
    assert load_picture(b"", None, "", 64, **LIMITS) == (None, "rejected", "empty")
    assert load_picture(b"x" * 100_001, None, "", 64, **LIMITS) == (None, "rejected", "file too large")
    assert load_picture(WHOLE_JPEG, "ignored.jpg", "", 64, **LIMITS).status == "ok"
