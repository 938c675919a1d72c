from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixrec import storage
from pixrec.cluster import prepare as module
from pixrec.cluster.prepare import check_counts, prepare
from pixrec.config import PrepareConfig
from pixrec.data.sequences import load_dataset
from pixrec.errors import InputError, OutputError
from pixrec.schema import REJECTS

NUM_ITEMS = 300  # three slices
CONFIG = PrepareConfig(image_size_px=16, max_image_bytes=50_000, num_cpus_per_task=0.5)
PICTURES: dict[str, tuple[str, str | None]] = {
    "good.jpg": ("ok", None),
    "good.png": ("ok", None),
    "cut.jpg": ("rejected", "truncated"),
    "text.jpg": ("rejected", "not a picture"),
    "empty.jpg": ("rejected", "empty"),
    "huge.jpg": ("rejected", "file too large"),
    "http://localhost/1.jpg": ("rejected", "address refused"),
    "nowhere.jpg": ("missing", "file not found"),
    "": ("missing", None),
}


def silent(stage: str, done: int, total: int | None, note: str = "") -> None:
    pass


def jpeg() -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


def write_items(folder: Path, columns: dict[str, Any] | None = None) -> str:
    ids = [f"i{number:03d}" for number in range(NUM_ITEMS)]
    np.random.default_rng(1).shuffle(ids)
    columns = columns or {"image_uri": [list(PICTURES)[row % len(PICTURES)] for row in range(NUM_ITEMS)]}
    table = pa.table(
        {"item_id": [*ids[:-1], None], "title": [f"Title {i}" for i in ids], "year": [2000] * NUM_ITEMS, **columns}
    )
    pq.write_table(table, folder / "items.parquet", row_group_size=200)
    return str(folder / "items.parquet")


def write_interactions(folder: Path) -> str:
    random = np.random.default_rng(2)
    columns = {
        "user_id": [f"u{random.integers(30)}" for _ in range(500)],
        "item_id": [f"i{random.integers(320):03d}" for _ in range(500)],
        "timestamp": random.integers(0, 400, 500),
        "rating": random.integers(1, 6, 500).astype(float),
    }
    columns["user_id"][7] = None
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return str(folder / "interactions.parquet")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    whole = jpeg()
    (folder / "good.jpg").write_bytes(whole)
    Image.new("RGBA", (8, 20), (0, 0, 255, 128)).save(folder / "good.png")
    (folder / "cut.jpg").write_bytes(whole[:-200])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "huge.jpg").write_bytes(whole + b"\0" * 50_000)
    write_items(folder)
    write_interactions(folder)
    return folder


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(module, "_on_ray", refuse)


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_prepare_end_to_end(ray_session: None, raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out, stages = str(tmp_path / "out"), []
    config = PrepareConfig(**{**vars(CONFIG), "min_rating": 2.0, "min_user_events": 12, "split": "temporal"})
    config = dataclasses.replace(config, cold_item_share=0.4)

    info = prepare(
        str(raw / "items.parquet"), str(raw / "interactions.parquet"), out, config, lambda *step: stages.append(step)
    )

    assert capfd.readouterr().out == ""
    assert stages[-1][0] == "writing sequences"
    last = next(step for step in reversed(stages) if step[0] == "preparing items")
    assert last[:3] == ("preparing items", NUM_ITEMS, NUM_ITEMS)
    assert last[3].endswith(f" pictures/s, {info['images']['rejected']} rejected")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == info
    check_counts(info)
    assert info["items"] == {"read": NUM_ITEMS, "kept": NUM_ITEMS - 1, "rejected": 1}
    assert info["interactions"]["read"] == 500
    assert info["interactions"].pop("filtered_repeats") == 0, "a table's events are all meant"
    assert min(info["interactions"].values()) > 0, "every way out is taken in this test"

    data = load_dataset(out)
    source = pq.read_table(raw / "items.parquet").to_pylist()[:-1]
    assert data.items.item_ids == [row["item_id"] for row in source]
    reasons = {}
    for row, item in enumerate(source):
        status, reason = PICTURES[item["image_uri"]]
        assert data.items.fields(row)["image_status"] == status
        assert (data.items.image(row) is not None) == (status == "ok")
        assert data.items.text(row) == item["title"]
        if reason:
            reasons[item["item_id"]] = reason
    rejects = pq.read_table(tmp_path / "out" / "rejects").to_pylist()
    assert {row["key"]: row["reason"] for row in rejects if row["source"] == "images"} == reasons
    assert len(rejects) == len(reasons) + info["items"]["rejected"] + info["interactions"]["rejected"]
    assert sum(info["rejects"].values()) == len(rejects)
    assert info["rejects"]["images: file not found"] == info["images"]["missing"] - len(
        [row for row in source if not row["image_uri"]]
    )
    assert len(data.events.rows) == info["interactions"]["kept"]
    assert len(data.events.user_ids) == info["users"]
    assert data.held_out("test").user_ids
    cold = data.training_counts()[data.held_out("test").targets] == 0
    assert cold.sum() >= info["cold"]["test_targets"] > 0


def test_without_held_out_items_the_fingerprint_is_what_it_was():
    """Models name the data set that they were trained on by it."""
    assert module._fingerprint(PrepareConfig(), []) == "96a25e34b9fef50a732b7eff06bbca09"
    assert module._fingerprint(PrepareConfig(seed=1), []) == module._fingerprint(PrepareConfig(), [])
    seeds = [PrepareConfig(cold_item_share=0.1, seed=seed) for seed in (0, 1)]
    assert len({module._fingerprint(config, []) for config in (PrepareConfig(), *seeds)}) == 3


def test_again_gives_the_same_and_replaces_the_old(ray_session: None, raw: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = (str(raw / "items.parquet"), str(raw / "interactions.parquet"), str(out), CONFIG, silent)
    first, files = prepare(*arguments), everything_below(out)
    (out / "stale").write_text("")
    assert prepare(*arguments) == first
    assert everything_below(out) == files
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"]
    os.remove(raw / "good.jpg")
    assert prepare(*arguments)["fingerprint"] != first["fingerprint"]


def test_pictures_inside_the_table(ray_session: None, raw: Path, tmp_path: Path):
    pictures = [jpeg(), None, b"no picture"] * (NUM_ITEMS // 3)
    items = write_items(raw, {"image": pa.array(pictures, pa.large_binary())})
    info = prepare(items, str(raw / "interactions.parquet"), str(tmp_path / "out"), CONFIG, silent)
    assert info["images"] == {"ok": 100, "missing": 100, "rejected": 99}
    data = load_dataset(str(tmp_path / "out"))
    picture = data.items.image(0)
    assert picture is not None
    assert max(Image.open(io.BytesIO(picture)).size) == 16


def test_a_fault_found_by_a_worker_is_one_line_and_leaves_nothing(ray_session: None, raw: Path, tmp_path: Path):
    items = raw / "items.parquet"
    page = pq.read_metadata(items).row_group(1).column(1).data_page_offset
    content = bytearray(items.read_bytes())
    content[page : page + 40] = b"\xff" * 40
    items.write_bytes(content)
    before = everything_below(tmp_path)
    with pytest.raises(InputError, match=r"items\.parquet: cannot be read") as raised:
        prepare(str(items), str(raw / "interactions.parquet"), str(tmp_path / "out"), CONFIG, silent)
    assert "\n" not in str(raised.value)
    assert everything_below(tmp_path) == before


def test_a_slice_done_twice_doubles_nothing(raw: Path, tmp_path: Path):
    staging = str(tmp_path / "staging")
    storage.write_table(f"{staging}/rejects/tables.parquet", REJECTS.empty_table())
    piece = {"number": 3, "file": str(raw / "items.parquet"), "group": 1, "start": 10, "stop": 30}
    first = module.prepare_slice(piece, staging=staging, config=CONFIG)
    assert module.prepare_slice(piece, staging=staging, config=CONFIG) == first
    assert first["items"] == 20 == first["ok"] + first["missing"] + first["rejected"]
    assert everything_below(Path(staging)) == [
        "items",
        "items/part-000003.parquet",
        "rejects",
        "rejects/images-000003.parquet",
        "rejects/tables.parquet",
    ]
    expected = pq.read_table(raw / "items.parquet", columns=["item_id"]).slice(210, 20)
    assert pq.read_table(f"{staging}/items/part-000003.parquet", columns=["item_id"]).equals(expected)


def test_a_slice_that_outlives_its_run_writes_nothing(raw: Path, tmp_path: Path):
    piece = {"number": 0, "file": str(raw / "items.parquet"), "group": 0, "start": 0, "stop": 9}
    with pytest.raises(OutputError, match="staging is gone"):
        module.prepare_slice(piece, staging=str(tmp_path / "staging"), config=CONFIG)
    assert os.listdir(tmp_path) == ["raw"]


def test_what_a_killed_worker_left_is_not_published(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def leave_partial(work: Any, slices: list, config: PrepareConfig) -> list[dict[str, Any]]:
        results = [work(vars(piece)) for piece in reversed(slices)]
        folder = Path(work.keywords["staging"]) / "items"
        (folder / "part-000001.parquet.partial-0a1b2c3d").write_bytes(b"half")
        return results

    monkeypatch.setattr(module, "_on_ray", leave_partial)
    out = tmp_path / "out"
    prepare(str(raw / "items.parquet"), str(raw / "interactions.parquet"), str(out), CONFIG, silent)
    assert [name for name in everything_below(out) if "partial" in name] == []
    source = pq.read_table(raw / "items.parquet").column("item_id").to_pylist()[:-1]
    assert load_dataset(str(out)).items.item_ids == source


def test_without_pictures_or_items_no_ray_is_needed(no_ray: None, raw: Path, tmp_path: Path):
    interactions, out = str(raw / "interactions.parquet"), str(tmp_path / "out")
    info = prepare(write_items(raw, {"brand": ["B"] * NUM_ITEMS}), interactions, out, CONFIG, silent)
    assert info["images"] == {"ok": 0, "missing": NUM_ITEMS - 1, "rejected": 0}
    info = prepare(None, interactions, out, CONFIG, silent)
    seen = {item for item in pq.read_table(interactions).to_pydict()["item_id"] if item}
    assert 0 < info["items"]["kept"] <= len(seen)
    data = load_dataset(out)
    assert (data.items.text(0), data.items.image(0)) == ("", None)
    assert data.items.item_ids[0] == pq.read_table(interactions).column("item_id")[0].as_py()


def rewrite(uri: Path, change: Any) -> None:
    pq.write_table(change(pq.read_table(uri)), uri)


FAULTS = {
    "no items file": ("items", None, "items.parquet: no such file or folder"),
    "no interactions file": ("interactions", None, "interactions.parquet: no such file or folder"),
    "no item_id": ("items", lambda t: t.drop_columns("item_id"), "items.parquet: no column 'item_id'"),
    "no timestamp": ("interactions", lambda t: t.drop_columns("timestamp"), "no column 'timestamp'"),
    "duplicate id": ("items", lambda t: pa.concat_tables([t, t.slice(0, 2)]), "occurs 2 times, and 2 ids occur more"),
    "empty items": ("items", lambda t: t.slice(0, 0), "items.parquet: the items table is empty"),
    "empty interactions": ("interactions", lambda t: t.slice(0, 0), "the interactions table is empty"),
    "item_id of numbers": ("items", lambda t: t.set_column(0, "item_id", [range(300)]), "is int64, must be string"),
    "time as text": ("interactions", lambda t: t.set_column(2, "timestamp", t["user_id"]), "is string, must be int64"),
    "no known item": (
        "interactions",
        lambda t: t.set_column(1, "item_id", t["user_id"]),
        "none of its 500 events names",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_tables_are_found_before_ray_starts(no_ray: None, raw: Path, tmp_path: Path, case: str):
    name, change, message = FAULTS[case]
    if change is None:
        os.remove(raw / f"{name}.parquet")
    else:
        rewrite(raw / f"{name}.parquet", change)
    before = everything_below(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        prepare(
            str(raw / "items.parquet"), str(raw / "interactions.parquet"), str(tmp_path / "a" / "out"), CONFIG, silent
        )
    assert "\n" not in str(raised.value)
    assert everything_below(tmp_path) == before


def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices one after the other in this process: what they do is the same."""
    monkeypatch.setattr(module, "_on_ray", lambda work, slices, config: [work(vars(piece)) for piece in slices])


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


def write_amazon(folder: Path, pictures: list[str]) -> tuple[str, str]:
    """Items B0, B1, ... with one picture each, in the published format; odd lines and reviews among them."""
    items = [
        {
            "parent_asin": f"B{row}",
            "title": f"Cup &amp; saucer {row}",
            "main_category": "Kitchen",
            "price": "from 5.00",
            "images": [{"variant": "PT01", "hi_res": "http://192.0.2.1/no"}, {"variant": "MAIN", "large": url}],
            "description": ["<b>Blue</b>", "cup"],
        }
        for row, url in enumerate(pictures)
    ]
    reviews = [
        {
            "user_id": f"u{user}",
            "parent_asin": f"B{(user + step) % len(items)}",
            "timestamp": 1000 * step,
            "rating": 4 + user % 2,
        }
        for user in range(6)
        for step in range(4)
    ]
    reviews += [reviews[0], {**reviews[1], "rating": 1.0}, {**reviews[2], "parent_asin": "B999"}]
    with gzip.open(folder / "meta_Kitchen.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(item) + "\n" for item in items) + "{half a line\n")
    (folder / "Kitchen.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews) + "[]\n")
    return str(folder / "meta_Kitchen.jsonl.gz"), str(folder / "Kitchen.jsonl")


def test_amazon2023_with_pictures_from_the_web(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shop: tuple[str, list[str]]
):
    run_here(monkeypatch)
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


def test_everything_on_s3(monkeypatch: pytest.MonkeyPatch, raw: Path, bucket: str, shop: tuple[str, list[str]]):
    run_here(monkeypatch)
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


def test_private_addresses_are_refused_unless_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shop: tuple[str, list[str]]
):
    run_here(monkeypatch)
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


def test_pictures_from_the_bytes_column(monkeypatch: pytest.MonkeyPatch, raw: Path, tmp_path: Path):
    run_here(monkeypatch)
    pictures = [jpeg() if row % 2 else None for row in range(NUM_ITEMS)]
    items = write_items(raw, {"image": pictures, "image_uri": ["good.png", "text.jpg"] * (NUM_ITEMS // 2)})
    info = prepare(items, str(raw / "interactions.parquet"), str(tmp_path / "out"), CONFIG, silent)
    assert info["images"] == {"ok": NUM_ITEMS - 1, "missing": 0, "rejected": 0}, "bytes win over a URI"


def test_a_place_that_is_taken_is_refused_first(no_ray: None, raw: Path):
    before = everything_below(raw)
    with pytest.raises(OutputError, match="is not empty and holds no data set"):
        prepare(str(raw / "nowhere.parquet"), str(raw / "nowhere.parquet"), str(raw), CONFIG, silent)
    assert everything_below(raw) == before


def test_counts_that_do_not_reconcile_are_a_defect():
    good = {
        "items": {"read": 3, "kept": 2, "rejected": 1},
        "images": {"ok": 1, "missing": 1, "rejected": 0},
        "interactions": {"read": 9, "kept": 5, "rejected": 1, "filtered_rating": 1, "filtered_kcore": 2},
        "users": 2,
    }
    check_counts(good)
    for section, name in [("items", "kept"), ("images", "ok"), ("interactions", "filtered_kcore")]:
        with pytest.raises(AssertionError):
            check_counts({**good, section: {**good[section], name: 7}})
