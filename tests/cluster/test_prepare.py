from __future__ import annotations

import io
import json
import os
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
    "http://localhost/1.jpg": ("rejected", "http pictures are not fetched"),
    "nowhere.jpg": ("missing", "file not found"),
    "": ("missing", None),
}


def silent(stage: str, done: int, total: int | None) -> None:
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

    info = prepare(
        str(raw / "items.parquet"), str(raw / "interactions.parquet"), out, config, lambda *step: stages.append(step)
    )

    assert capfd.readouterr().out == ""
    assert stages[-1][0] == "writing sequences"
    assert ("preparing items", NUM_ITEMS, NUM_ITEMS) in stages
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == info
    check_counts(info)
    assert info["items"] == {"read": NUM_ITEMS, "kept": NUM_ITEMS - 1, "rejected": 1}
    assert info["interactions"]["read"] == 500
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
