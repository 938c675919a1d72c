"""`python -m benchmarks.faults.broken [--count 10000]`: a catalog with 5 % broken pictures through the real
`pixrec prepare` and `pixrec embed`.

Every broken picture must be in rejects/ with its own reason, every other one stored and embedded, odd as its format may
be, and the items of the broken ones embedded by their text; the counts must add up. Prints one line a kind and exits
with 1 where that is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import catalogs
from pixrec.cli import main as pixrec
from pixrec.config import Config

SHARE_BROKEN = 0.05
SIDE_PX = 96


def good_pictures() -> dict[str, bytes]:
    """Every kind of picture that must be stored."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    two = {"save_all": True, "append_images": [Image.new("RGB", rgb.size)]}
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": _bytes(rgb, "JPEG"),
        "jpeg, progressive": _bytes(rgb, "JPEG", progressive=True),
        "jpeg, CMYK": _bytes(rgb.convert("CMYK"), "JPEG"),
        "jpeg, grey": _bytes(rgb.convert("L"), "JPEG"),
        "jpeg, on its side": _bytes(rgb, "JPEG", exif=turned),
        "png": _bytes(rgb, "PNG"),
        "png, 16 bits": _bytes(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"),
        "png, palette": _bytes(rgb.convert("P"), "PNG"),
        "png, alpha": _bytes(rgb.convert("RGBA"), "PNG"),
        "gif, animated": _bytes(rgb.convert("P"), "GIF", **two),
        "webp": _bytes(rgb, "WEBP"),
        "webp, animated": _bytes(rgb, "WEBP", **two),
        "avif": _bytes(rgb, "AVIF"),
        "mpo": _bytes(rgb, "MPO", **two),
        "tiff": _bytes(rgb, "TIFF"),
        "tiff, CMYK": _bytes(rgb.convert("CMYK"), "TIFF"),
        "bmp": _bytes(rgb, "BMP"),
    }


def broken_pictures() -> dict[str, tuple[bytes | None, str]]:
    """Every kind that must be rejected or missing, with the reason; None: no such file."""
    good = good_pictures()
    half = {name: data[: len(data) // 2] for name, data in good.items()}
    damaged = bytearray(good["png"])
    damaged[60:64] = b"\0\0\0\0"
    return {
        "jpeg, truncated": (half["jpeg"], "truncated"),
        "jpeg, progressive, truncated": (good["jpeg, progressive"][:-900], "truncated"),
        "png, truncated": (half["png"], "truncated"),
        "gif, truncated": (half["gif, animated"], "truncated"),
        "png, damaged": (bytes(damaged), "damaged"),
        "webp, truncated": (half["webp"], "damaged"),
        "avif, truncated": (half["avif"], "damaged"),
        "empty": (b"", "empty"),
        "text called .jpg": (b"<html>404</html>", "not a picture"),
        "bomb": (_png_claiming(50_000, 50_000), "too many pixels"),
        "bomb, just above the limit": (_png_claiming(8_001, 8_000), "too many pixels"),
        "larger than allowed": (good["jpeg"] + bytes(200_000), "file too large"),
        "no such file": (None, "file not found"),
    }


def run(count: int, folder: Path) -> dict[str, Any]:
    """Make a catalog of `count` items in `folder`, prepare it, compare; returns the figures."""
    kinds, uris = _write_catalog(count, folder)
    good, broken = good_pictures(), broken_pictures()
    started = time.monotonic()
    sets = ["prepare.image_size_px=64", "prepare.max_image_bytes=200000", "prepare.num_cpus_per_task=1"]
    arguments = ["prepare", "--items", str(folder / "items.parquet"), "--out", str(folder / "out")]
    arguments += ["--interactions", str(folder / "interactions.parquet")]
    said = _called([*arguments, *(part for each in sets for part in ("--set", each))])
    seconds = time.monotonic() - started
    catalogs.write_model(folder / "model", Config())
    places = ["--data", str(folder / "out"), "--model", str(folder / "model"), "--out", str(folder / "index")]
    manifest = _called(["embed", *places])
    embedded = _seen_with_picture(folder / "index")
    items = pq.read_table(folder / "out" / "items", columns=["item_id", "image", "image_status"]).to_pylist()
    rejects = {row["key"]: row["reason"] for row in pq.read_table(folder / "out" / "rejects").to_pylist()}
    wrong: Counter[str] = Counter()
    for item, kind in zip(items, kinds, strict=True):
        reason = None if kind in good else broken[kind][1]
        fits = (item["image"] is not None) == (item["image_status"] == "ok") == (kind in good)
        fits = fits and embedded.get(item["item_id"]) == (kind in good)
        wrong[kind] += not fits or rejects.get(item["item_id"]) != reason
    counts = said["images"]
    seen = Counter(kinds)
    for kind in (*good, *broken):
        outcome = "stored" if kind in good else broken[kind][1]
        print(f"{kind:32} {seen[kind]:6}  {outcome:18} {wrong[kind]} wrong", file=sys.stderr)
    num_broken = sum(kind in broken for kind in kinds)
    assert counts["ok"] == count - num_broken, counts
    assert len(rejects) == num_broken, len(rejects)
    assert (len(embedded), manifest["text_alone"]) == (count, num_broken), manifest
    return {
        "pictures": count,
        "broken": num_broken,
        "wrong": wrong.total(),
        "images": counts,
        "embedded": {"with_picture": len(embedded) - manifest["text_alone"], "text_alone": manifest["text_alone"]},
        "seconds": round(seconds, 1),
        "distinct_files": len(set(uris)),
    }


def _called(arguments: list[str]) -> dict[str, Any]:
    """What a verb of the command says on the last line of stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pixrec(arguments)
    assert code == 0, f"{arguments[0]} exited with {code}"
    return dict(json.loads(said.getvalue().splitlines()[-1]))


def _seen_with_picture(index: Path) -> dict[str, bool]:
    """Of each item of the index, each there once, whether its picture was seen."""
    parts = (index / "versions").glob("*/*.parquet")
    table = pa.concat_tables([pq.read_table(file, columns=["item_id", "has_image"]) for file in parts])
    seen = dict(zip(table["item_id"].to_pylist(), table["has_image"].to_pylist(), strict=True))
    assert len(seen) == len(table), "an item is in the index twice"
    return seen


def _write_catalog(count: int, folder: Path) -> tuple[list[str], list[str]]:
    """Kind and URI of each item; its picture a file of its own kind, with a suffix that says nothing true."""
    random = np.random.default_rng(1)
    good, broken = good_pictures(), broken_pictures()
    files: dict[str, bytes | None] = {**good, **{kind: data for kind, (data, _) in broken.items()}}
    names = {kind: f"{number:02d}.jpg" for number, kind in enumerate(files)}
    for kind, data in files.items():
        if data is not None:
            (folder / names[kind]).write_bytes(data)
    num_broken = round(SHARE_BROKEN * count)
    kinds = [list(broken)[row % len(broken)] for row in range(num_broken)]
    kinds += [list(good)[row % len(good)] for row in range(count - num_broken)]
    random.shuffle(kinds)
    uris = [names[kind] for kind in kinds]
    ids = [f"i{row:07d}" for row in range(count)]
    pq.write_table(pa.table({"item_id": ids, "title": ids, "image_uri": uris}), folder / "items.parquet")
    events = {"user_id": ["u"] * 3, "item_id": ids[:3], "timestamp": [1, 2, 3]}
    pq.write_table(pa.table(events), folder / "interactions.parquet")
    return kinds, uris


def _bytes(picture: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    with tempfile.TemporaryDirectory(prefix="pixrec-broken-") as place:
        figures = run(parser.parse_args().count, Path(place))
    print(json.dumps(figures))
    sys.exit(1 if figures["wrong"] else 0)
