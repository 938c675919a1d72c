"""Pictures of a data set from everywhere: the web, s3://, a column of bytes; and the raw files that name them."""

from __future__ import annotations

import gzip
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from raw_shop import CONFIG, NUM_ITEMS, everything_below, jpeg, silent, write_amazon, write_items

from pixrec import storage
from pixrec.cluster.prepare import check_counts, prepare
from pixrec.config import PrepareConfig
from pixrec.data.sequences import load_dataset
from pixrec.errors import InputError


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A loopback server with one good picture, a text, and nothing else; the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = {"/good": jpeg(), "/text.jpg": b"no picture"}.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_inside_the_table(slices_here: None, raw: Path, tmp_path: Path):
    pictures = [jpeg(), None, b"no picture"] * (NUM_ITEMS // 3)
    items = write_items(raw, {"image": pa.array(pictures, pa.large_binary())})
    info = prepare(items, str(raw / "interactions.parquet"), str(tmp_path / "out"), CONFIG, silent)
    assert info["images"] == {"ok": 100, "missing": 100, "rejected": 99}
    data = load_dataset(str(tmp_path / "out"))
    picture = data.items.image(0)
    assert picture is not None
    assert max(Image.open(io.BytesIO(picture)).size) == 16


def test_amazon2023_with_pictures_from_the_web(slices_here: None, tmp_path: Path, shop: tuple[str, list[str]]):
    web, asked = shop
    items, events = write_amazon(tmp_path, [f"{web}/good", f"{web}/gone", f"{web}/text.jpg", f"{web}/good"])
    config = PrepareConfig(**{**vars(CONFIG), "min_rating": 2.0, "allow_private_addresses": True})
    out = tmp_path / "out"
    info = prepare(items, events, str(out), config, silent, "amazon2023")
    check_counts(info)
    assert info["items"] == {"read": 5, "kept": 4, "rejected": 1}
    assert info["images"] == {"ok": 2, "missing": 1, "rejected": 1}
    assert info["interactions"] == {
        "read": 28,
        "kept": 24,
        "rejected": 2,
        "filtered_rating": 1,
        "filtered_repeats": 1,
        "filtered_kcore": 0,
        "held_out_cold": 0,
    }
    assert info["cold"] == {"items": 0, "test_targets": 0}
    assert info["rejects"] == {
        "items: not valid JSON": 1,
        "interactions: not valid JSON": 1,
        "interactions: item is not in the items table": 1,
        "images: file not found": 1,
        "images: not a picture": 1,
    }
    assert info["inputs"] == {"source": "amazon2023", "items": items, "interactions": events}
    data = load_dataset(str(out))
    assert data.items.text(3) == "Cup & saucer 3 | Kitchen | $5.00 | Blue cup"
    assert data.items.image(0)
    assert data.items.image(0) == data.items.image(3)
    names = {"Kitchen.jsonl", "meta_Kitchen.jsonl.gz", "out", "out.pictures"}
    assert {path.name for path in tmp_path.iterdir()} == names, "the tables in between are gone"

    asked.clear()
    again = prepare(items, events, str(out), config, silent, "amazon2023")
    assert again["fingerprint"] == info["fingerprint"]
    assert asked == ["/gone"], "what was downloaded is not asked for again"


def test_everything_on_s3(slices_here: None, raw: Path, bucket: str, shop: tuple[str, list[str]]):
    web, asked = shop
    catalog = f"{bucket}/catalog"
    storage.copy_folder(str(raw), catalog)
    uris = [f"{catalog}/good.jpg", "good.png", "../catalog/cut.jpg", "nowhere.jpg", f"{web}/good", "s3://no-such/x.jpg"]
    titles = [f"t{row}" for row in range(6)]
    items = pa.table({"item_id": [f"i{row:03d}" for row in range(6)], "title": titles, "image_uri": uris})
    storage.write_table(f"{catalog}/items.parquet", items)
    config = PrepareConfig(**{**vars(CONFIG), "allow_private_addresses": True})
    places = [f"{catalog}/items.parquet", f"{catalog}/interactions.parquet", f"{bucket}/out"]
    info = prepare(*places, config, silent)
    assert info["images"] == {"ok": 3, "missing": 2, "rejected": 1}
    data = load_dataset(f"{bucket}/out")
    statuses = [data.items.fields(row)["image_status"] for row in range(6)]
    assert statuses == ["ok", "ok", "rejected", "missing", "ok", "missing"]

    lines = [{"parent_asin": f"B{row}", "title": "Cup", "images": [{"large": f"{web}/good"}]} for row in range(2)]
    reviews = [{"user_id": "u", "parent_asin": f"B{row}", "timestamp": row} for row in range(2)]
    for name, rows in (("raw/meta_Cups.jsonl.gz", lines), ("raw/Cups.jsonl.gz", reviews)):
        packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        storage.write_bytes(f"{bucket}/{name}", packed)
    asked.clear()
    info = prepare(f"{bucket}/raw", f"{bucket}/raw", f"{bucket}/out", config, silent, "amazon2023")
    assert info["images"] == {"ok": 2, "missing": 0, "rejected": 0}
    assert asked == [], "the cache lies on s3:// too"
    assert not [name for name in storage.list_folders(bucket) if name.startswith(".")]


def test_private_addresses_are_refused_unless_allowed(slices_here: None, tmp_path: Path, shop: tuple[str, list[str]]):
    web, asked = shop
    items, events = write_amazon(tmp_path, [f"{web}/good"] * 4)
    info = prepare(items, events, str(tmp_path / "out"), CONFIG, silent, "amazon2023")
    assert info["images"] == {"ok": 0, "missing": 0, "rejected": 4}
    assert info["rejects"]["images: address refused"] == 4
    assert asked == []
    assert not (tmp_path / "out.pictures").exists()


def test_faults_of_the_raw_files_leave_nothing(no_ray: None, tmp_path: Path):
    items, events = write_amazon(tmp_path, ["http://192.0.2.1/x"] * 4)
    Path(events).write_text("user_id,item_id\n")
    before = everything_below(tmp_path)
    with pytest.raises(InputError, match=r"Kitchen\.jsonl: holds nothing usable"):
        prepare(items, events, str(tmp_path / "out"), CONFIG, silent, "amazon2023")
    assert everything_below(tmp_path) == before


def test_pictures_from_the_bytes_column(slices_here: None, raw: Path, tmp_path: Path):
    pictures = [jpeg() if row % 2 else None for row in range(NUM_ITEMS)]
    items = write_items(raw, {"image": pictures, "image_uri": ["good.png", "text.jpg"] * (NUM_ITEMS // 2)})
    info = prepare(items, str(raw / "interactions.parquet"), str(tmp_path / "out"), CONFIG, silent)
    assert info["images"] == {"ok": NUM_ITEMS - 1, "missing": 0, "rejected": 0}, "bytes win over a URI"
