"""From tables to a prepared data set: every row accounted for, the same whoever does it, faults said in one line."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_shop import CONFIG, NUM_ITEMS, PICTURES, everything_below, silent, write_items

from pixrec import storage
from pixrec.cluster import prepare as module
from pixrec.cluster.prepare import check_counts, prepare
from pixrec.config import PrepareConfig
from pixrec.data.pictures import open_pictures
from pixrec.data.sequences import load_dataset
from pixrec.data.slices import prepare_slice
from pixrec.errors import InputError, OutputError
from pixrec.schema import REJECTS


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


def outside_the_store(out: Path) -> list[str]:
    """Files of a data set but those of the picture store, which names them by chance."""
    return [name for name in everything_below(out) if not name.startswith("pictures/")]


def test_again_gives_the_same_and_replaces_the_old(
    ray_session: None, raw: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    out = tmp_path / "out"
    arguments = (str(raw / "items.parquet"), str(raw / "interactions.parquet"), str(out), CONFIG, silent)
    first, files = prepare(*arguments), outside_the_store(out)
    pictures = open_pictures(str(out / "pictures")).read_range(0, first["items"]["kept"])
    (out / "stale").write_text("")
    request.getfixturevalue("slices_here")
    assert prepare(*arguments) == first
    assert outside_the_store(out) == files
    assert open_pictures(str(out / "pictures")).read_range(0, first["items"]["kept"]) == pictures
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"]
    os.remove(raw / "good.jpg")
    assert prepare(*arguments)["fingerprint"] != first["fingerprint"]


def test_a_fault_found_by_a_worker_is_one_line_and_leaves_nothing(slices_here: None, raw: Path, tmp_path: Path):
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
    first = prepare_slice(piece, staging=staging, config=CONFIG)
    assert prepare_slice(piece, staging=staging, config=CONFIG) == first
    assert first["items"] == 20 == first["ok"] + first["missing"] + first["rejected"]
    assert everything_below(Path(staging)) == [
        "items",
        "items/part-000003.parquet",
        *sorted(name for name in everything_below(Path(staging)) if name.startswith("pictures")),
        "rejects",
        "rejects/images-000003.parquet",
        "rejects/tables.parquet",
    ]
    expected = pq.read_table(raw / "items.parquet", columns=["item_id"]).slice(210, 20)
    assert pq.read_table(f"{staging}/items/part-000003.parquet", columns=["item_id"]).equals(expected)


def test_a_slice_that_outlives_its_run_writes_nothing(raw: Path, tmp_path: Path):
    piece = {"number": 0, "file": str(raw / "items.parquet"), "group": 0, "start": 0, "stop": 9}
    with pytest.raises(OutputError, match="staging is gone"):
        prepare_slice(piece, staging=str(tmp_path / "staging"), config=CONFIG)
    assert os.listdir(tmp_path) == ["raw"]


def test_what_a_killed_worker_left_is_not_published(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def leave_partial(work: Any, rows: list, config: PrepareConfig) -> list[dict[str, Any]]:
        results = [work(row) for row in reversed(rows)]
        folder = Path(work.keywords["step"].keywords["staging"]) / "items"
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


def test_several_tables_are_one_whose_overlap_counts_once(no_ray: None, tmp_path: Path):
    tables = {
        "old": [("u", "a", 1), ("u", "b", 2), ("v", "a", 5), ("u", "b", 2)],
        "new": [("u", "b", 2), ("u", "c", 3), ("w", "a", 9)],
    }
    for name, rows in tables.items():
        columns = dict(zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True))
        pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"item_id": ["a", "b"], "title": ["A", "B"]}), tmp_path / "items.parquet")
    pq.write_table(pa.table({"item_id": ["c"], "title": ["C"], "price": [1.0]}), tmp_path / "added.parquet")
    events = [str(tmp_path / f"{name}.parquet") for name in tables]
    items = [str(tmp_path / f"{name}.parquet") for name in ("items", "added")]
    info = prepare(items, events, str(tmp_path / "out"), PrepareConfig(), silent)
    data = load_dataset(str(tmp_path / "out"))
    assert (data.items.item_ids, data.items.text(2), info["name"]) == (["a", "b", "c"], "C | $1.00", "old")
    assert (info["interactions"]["read"], info["interactions"]["filtered_repeats"]) == (7, 2)
    histories = {user: data.events.rows[start:end].tolist() for user, start, end in zip(
        data.events.user_ids, data.events.offsets[:-1], data.events.offsets[1:], strict=True)}  # fmt: skip
    assert histories == {"u": [0, 1, 2], "v": [0], "w": [0]}
    with pytest.raises(InputError, match=r"items\.parquet and .*items\.parquet: item_id 'a' occurs 2 times"):
        prepare([items[0]] * 2, events, str(tmp_path / "other"), PrepareConfig(), silent)
